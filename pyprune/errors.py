"""Errors that the command line prints as one line: exit status 2 for the user's, 1 for ours."""


class InputError(ValueError):
    """The arguments or the input are wrong: one line that says what is wrong, where, and what would work."""


class VerificationError(RuntimeError):
    """The output does not load, or does not compute what its source computes: our failure, not the user's."""
