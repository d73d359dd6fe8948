"""The one exception that the command line turns into exit status 2."""


class InputError(ValueError):
    """The arguments or the input are wrong: one line that says what is wrong, where, and what would work."""
