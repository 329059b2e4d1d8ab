"""The errors a user can mend. Everything else that is raised is a bug of ours."""


class UserError(ValueError):
    """Bad input. The message is one line that names the key or file, the value and the fix.

    `__main__` prints it on the first rank only and exits with code 2, before anything is written.
    """

    raised_on_all_ranks = False
    """Whether the ranks had met and all of them raise this one; before they have, a rank may be alone with it."""


class ConfigError(UserError):
    """One or more wrong configuration keys; the message has one line for each of them.

    Args:
        problems: one finished sentence for each wrong key, for example
            `distill.yaml:7: student.layout.tensor: 3 does not divide student.model.heads 8; use 1, 2, 4 or 8`.
    """

    def __init__(self, problems: list[str]) -> None:
        self.problems = list(problems)
        super().__init__("\n".join(self.problems))

    def __reduce__(self) -> tuple[type, tuple[list[str]]]:
        """Ranks hand errors to each other."""
        return ConfigError, (self.problems,)


def not_installed(package: str, extra: str) -> str:
    """What to say of an optional package, and of the extra of this project that brings it to a clone."""
    return f"{package} is not installed; pip install -e '.[{extra}]' brings it"


def in_one_line(reason: object, most: int | None = None) -> str:
    """What a library says of an error, in one line of at most so many characters; the kind of error where it says
    nothing."""
    return " ".join(str(reason).split())[:most] or type(reason).__name__
