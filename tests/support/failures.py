"""What a failed test prints of the processes that it started."""

from collections.abc import Callable
from pathlib import Path

LINES = 60
"""Of each rank's output, the last ones: the stacks of its threads fit in."""
_tellers: list[tuple[str, Callable[[], str]]] = []


def on_failure(title: str, tell: Callable[[], str]) -> None:
    """Has `tell()` printed under a title if the current test, or one of its fixtures, fails."""
    _tellers.append((title, tell))


def told() -> list[tuple[str, str]]:
    """Titles and texts of all that was registered since `forget`; where a teller fails, its error is the text."""
    found = []
    for title, tell in _tellers:
        try:
            found.append((title, tell()))
        except Exception as error:
            found.append((title, f"{type(error).__name__}: {error}"))
    return found


def forget() -> None:
    """Forgets all that was registered."""
    _tellers.clear()


def last_lines(file: Path) -> str:
    """The end of a text file; empty where there is none."""
    text = file.read_text(errors="replace") if file.is_file() else ""
    return "\n".join(text.splitlines()[-LINES:])
