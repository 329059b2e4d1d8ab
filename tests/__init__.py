"""Tests: `unit` in one process, `distributed` on gloo workers, `end_to_end` through the commands."""

import os
from pathlib import Path

# Without a GPU the loss's kernels run in Triton's interpreter. Triton reads this when it is first imported, by whatever
# imports it, and this file comes before all others.
if not Path("/dev/nvidiactl").exists():
    os.environ.setdefault("TRITON_INTERPRET", "1")
