"""The one exception that is the user's to mend."""


class UserError(ValueError):
    """A mistake that the user can mend.

    The message names the file or argument, what was found and what was expected. The command line
    prints it without a traceback and exits with status 2. Every other exception is a bug of nucsam
    and keeps its traceback.
    """
