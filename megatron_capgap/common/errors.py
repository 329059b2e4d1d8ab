"""User errors. Any other exception is a bug of this project."""

INTERRUPTED = 130
"""Exit code after Ctrl-C."""


class UserError(ValueError):
    """Invalid input. The message is one line with the key or file, its value and the fix.

    `cli.main` prints it on rank 0 and exits with code 2, before anything is written.
    """

    raised_on_all_ranks = False
    """Whether all ranks raise this error after a collective; before, one rank may be the only one with the error."""


class ConfigError(UserError):
    """One or more invalid configuration keys; the message has one line per key.

    Args:
        problems: one complete message per key, for example `distill.yaml:7: student.layout.tensor: 3 does not divide
            student.model.heads 8; valid values: 1, 2, 4 or 8`.
    """

    def __init__(self, problems: list[str]) -> None:
        self.problems = list(problems)
        super().__init__("\n".join(self.problems))

    def __reduce__(self) -> tuple[type, tuple[list[str]]]:
        """Makes the error picklable: ranks send errors to each other."""
        return ConfigError, (self.problems,)


def not_installed(package: str, extra: str) -> str:
    """Message about a missing optional package and the extra of this project that installs it."""
    return f"{package} is not installed; run pip install -e '.[{extra}]'"


def in_one_line(reason: object, most: int | None = None) -> str:
    """A library's error message as one line of at most `most` characters; the exception type if the message is
    empty."""
    return " ".join(str(reason).split())[:most] or type(reason).__name__
