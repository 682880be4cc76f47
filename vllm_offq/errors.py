"""The one exception for what a user can put right, and what those of libraries say in it."""

REASON_LENGTH = 300


class UserError(ValueError):
    """A mistake in the input: str() is one sentence that says what is wrong and what to do.

    The command line prints it without a traceback and exits with code 2.
    """


def reason(error: BaseException) -> str:
    """What a library's exception says, in one line that is not too long."""
    line = " ".join(f"{type(error).__name__}: {error}".split())
    return line if len(line) <= REASON_LENGTH else f"{line[:REASON_LENGTH]}\N{HORIZONTAL ELLIPSIS}"
