"""What a run shows: the table at the start, and a bar in a terminal where a file gets plain lines."""

import io
import re
from types import SimpleNamespace

import pytest
from rich.console import Console

from megatron_capgap import devices
from megatron_capgap.runtime.logging import RunLogger


def shown(speaks: bool = True, terminal: bool = False) -> tuple[RunLogger, io.StringIO]:
    """A log without files, and what it shows."""
    log, screen = RunLogger(None, speaks), io.StringIO()
    log.console = Console(file=screen, quiet=not speaks, force_terminal=terminal, width=120, highlight=False)
    return log, screen


def four_steps(log: RunLogger) -> None:
    log.bar(0, 4)
    for step in range(1, 5):
        log.progress(step, 4, f"loss {step}.5 1k tokens/s", every=2)
    log.close()


def test_a_terminal_gets_a_bar_that_ends_at_the_last_step() -> None:
    log, screen = shown(terminal=True)
    four_steps(log)
    *_, last = (line for line in screen.getvalue().split("\r") if "loss" in line)
    assert "4/4" in last and "loss 4.5 1k tokens/s" in last and "\u2501" in last and re.search(r"\d:\d\d:\d\d", last)
    assert "step " not in screen.getvalue()


def test_a_file_gets_a_line_now_and_then() -> None:
    log, screen = shown()
    four_steps(log)
    assert screen.getvalue() == "step 2/4  loss 2.5 1k tokens/s\nstep 4/4  loss 4.5 1k tokens/s\n"


@pytest.mark.parametrize("terminal", [False, True])
def test_other_ranks_are_silent(terminal: bool) -> None:
    log, screen = shown(speaks=False, terminal=terminal)
    four_steps(log)
    assert screen.getvalue() == ""


def test_the_table_says_what_is_in_use_and_why_not() -> None:
    parts = (
        devices.Component("fused AdamW", True, "torch"),
        devices.Component("Apex kernels", False, "need an NVIDIA GPU"),
    )
    log, screen = shown()
    device = SimpleNamespace(name="cpu", backend="gloo", components=parts)
    log.table(*devices.Device.component_table(device))
    title, header, *rows = (line.split() for line in screen.getvalue().splitlines())
    assert (title, header) == ("device cpu, backend gloo".split(), ["part", "in", "use"])
    assert [" ".join(row) for row in rows] == ["fused AdamW yes torch", "Apex kernels no need an NVIDIA GPU"]
