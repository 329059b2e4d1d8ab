"""Runs stages with nothing silenced, and writes down what any library calls deprecated meanwhile.

    python -m tests.support.deprecations OUT STAGE CONFIG [STAGE CONFIG ...]

OUT gets one JSON list of texts, each once. The exit code is that of the first stage that fails.
"""

import json
import logging
import sys
import warnings
from pathlib import Path

from megatron_capgap.runtime import third_party


class Ear(logging.Handler):
    """Collects log records and warnings, shown or not, that speak of what will be removed."""

    def __init__(self) -> None:
        super().__init__()
        self.heard: dict[str, None] = {}

    def emit(self, record: logging.LogRecord) -> None:
        if "deprecat" in record.getMessage().lower():
            self.heard[f"{record.name}: {record.getMessage()}"] = None

    def warned(self, message: Warning | str, category: type[Warning], filename: str, *_: object) -> None:
        """In place of `warnings.showwarning`."""
        if issubclass(category, DeprecationWarning | FutureWarning) or "deprecat" in str(message).lower():
            self.heard[f"{filename}: {message}"] = None


def main() -> int:
    out, *words = sys.argv[1:]
    ear = Ear()
    logging.getLogger().addHandler(ear)
    third_party._silence = lambda: None
    warnings.simplefilter("always")
    warnings.showwarning = ear.warned  # type: ignore[assignment]

    from megatron_capgap.__main__ import main as capgap

    code = 0
    for stage, config in zip(words[::2], words[1::2], strict=True):
        code = code or capgap([stage, "--config", config])
    Path(out).write_text(json.dumps(list(ear.heard)))
    return code


if __name__ == "__main__":
    sys.exit(main())
