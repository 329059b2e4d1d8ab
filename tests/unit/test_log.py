"""Messages of a run on stderr."""

import logging
import re
from pathlib import Path

import pytest

from megatron_capgap.common import log
from megatron_capgap.common.errors import UserError
from megatron_capgap.runtime.logging import RunLogger


@pytest.fixture(autouse=True)
def no_rank() -> None:
    log.set_rank(None)


def test_a_message_shows_time_rank_and_level(capsys: pytest.CaptureFixture[str]) -> None:
    log.set_rank(3)
    log.LOG.error("text with 100% and {braces}")
    assert re.fullmatch(
        r"\d\d:\d\d:\d\d rank 3 capgap: error: text with 100% and \{braces\}\n", capsys.readouterr().err
    )


def test_every_line_has_the_prefix(capsys: pytest.CaptureFixture[str]) -> None:
    try:
        raise ValueError("why")
    except ValueError:
        log.LOG.exception("first\nsecond")
    lines = capsys.readouterr().err.splitlines()
    assert all(re.match(r"\d\d:\d\d:\d\d capgap: error: ", line) for line in lines), lines
    assert lines[1].endswith(": second") and lines[-1].endswith(": ValueError: why")


def test_without_a_launcher_no_rank_is_shown(capsys: pytest.CaptureFixture[str]) -> None:
    RunLogger(None, is_rank0=True).warning("text")
    assert re.fullmatch(r"\d\d:\d\d:\d\d capgap: warning: text\n", capsys.readouterr().err)


def test_other_ranks_log_no_warnings_of_the_run(capsys: pytest.CaptureFixture[str]) -> None:
    RunLogger(None, is_rank0=False).warning("text")
    assert capsys.readouterr().err == ""


def test_a_program_that_embeds_the_package_can_add_a_handler() -> None:
    seen: list[logging.LogRecord] = []
    handler = logging.Handler()
    handler.emit = seen.append  # type: ignore[method-assign]
    log.LOG.addHandler(handler)
    try:
        RunLogger(None, is_rank0=True).warning("text")
    finally:
        log.LOG.removeHandler(handler)
    assert [(record.levelname, record.getMessage()) for record in seen] == [("WARNING", "text")]


def test_the_log_of_a_rank_begins_when_it_is_opened_and_takes_warnings_until_it_is_closed(tmp_path: Path) -> None:
    run = RunLogger(tmp_path, is_rank0=False, rank=3)
    run.info("before")
    log.LOG.warning("of another module")
    assert not list(tmp_path.iterdir())
    run.open_rank_log()
    run.progress(2, 4, "loss 1.5", every=2)
    run.close()
    log.LOG.error("after the run")
    again = RunLogger(tmp_path, is_rank0=False, rank=3)
    again.open_rank_log()
    again.record_error(UserError("wrong\nin two ways"))
    lines = (tmp_path / "logs" / "rank_3.log").read_text().splitlines()
    assert all(re.match(r"\d{4}-\d\d-\d\d \d\d:\d\d:\d\d ", line) for line in lines)
    assert [line[20:] for line in lines] == [
        "info: before",
        "warning: of another module",
        "info: step 2/4  loss 1.5",
        "error: wrong",
        "error: in two ways",
    ]
