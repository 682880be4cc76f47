"""The one exception for what a user can put right."""


class UserError(ValueError):
    """A mistake in the input: str() is one sentence that says what is wrong and what to do.

    The command line prints it without a traceback and exits with code 2.
    """
