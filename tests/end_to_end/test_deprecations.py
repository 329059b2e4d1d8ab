"""What Megatron-Core calls deprecated while a model is taught: nothing that is ours to change, and nothing is shown."""

import json
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import pytest

from megatron_capgap.runtime import releases
from tests.support import runs
from tests.support.processes import environment
from tests.support.runs import Fixtures


@dataclass(frozen=True)
class Known:
    """A text that Megatron-Core brings about by itself, whatever it is called with.

    Args:
        text: a part of what is said.
        why: what in Megatron-Core does so.
        first, last: the releases that do; None where all supported ones do.
        torchs: whether it depends on torch's release too.
    """

    text: str
    why: str
    first: tuple[int, int] | None = None
    last: tuple[int, int] | None = None
    torchs: bool = False

    def due(self, release: tuple[int, int]) -> bool:
        return (self.first is None or self.first <= release) and (self.last is None or release <= self.last)


KNOWN = (
    Known("The following imports from `dynamic_context.py`", "megatron.core imports its own old place"),
    Known("custom_layers.transformer_engine", "megatron.core imports its own old place", last=(0, 16)),
    Known("MLP requires ffn_hidden_size", "TransformerLayer makes its MLP so"),
    Known("tp_group is None, using default tp group", "forward of Column- and RowParallelLinear"),
    Known("GPTModel IS DEPRECATED", "see HybridModel in docs/megatron_releases.md", first=(0, 19)),
    Known("load_common is deprecated", "load, of a folder with a common.pt, which older ones need", first=(0, 19)),
    Known("`torch.distributed.reduce_scatter_tensor`", "buffers of gradients", torchs=True),
    Known("`torch.distributed.all_gather_into_tensor`", "buffers of parameters", torchs=True),
    Known("we are deprecating ShardedTensor", "load", torchs=True),
    Known("`load_state_dict` is deprecated", "load", last=(0, 17), torchs=True),
)


@pytest.mark.slow("starts two interpreters, one after the other")
def test_nothing_of_ours_is_deprecated_and_nothing_is_shown(fixtures: Fixtures, tmp_path: Path) -> None:
    heard = tmp_path / "heard.json"
    teacher = runs.adapt_config(fixtures, tmp_path / "teacher", train__steps=1, data__valid=None)
    student = runs.distill_config(fixtures, tmp_path / "student", tmp_path / "teacher", train__steps=2)
    words = ["adapt", runs.write_config(teacher), "distill", runs.write_config(student)]
    said(["-m", "tests.support.deprecations", str(heard), *words])
    texts = json.loads(heard.read_text())
    due = [known for known in KNOWN if known.due(releases.release())]
    unknown = [text for text in texts if not any(known.text in text for known in due)]
    assert not unknown, "use what the release recommends, by a function of runtime/releases.py"
    gone = [known.text for known in due if not known.torchs and not any(known.text in text for text in texts)]
    assert not gone, "no longer said: take the line out of KNOWN"

    again = runs.write_config(runs.changed(student, run_dir=str(tmp_path / "again")))
    shown = said(["-W", "default", "-m", "megatron_capgap", "distill", "--config", again])
    assert [line for line in shown.splitlines() if "deprecat" in line.lower() or "FutureWarning" in line] == []


def said(words: list[str]) -> str:
    """What a Python says on both streams, which must succeed."""
    done = subprocess.run([sys.executable, *words], env=environment(), capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    return done.stdout + done.stderr
