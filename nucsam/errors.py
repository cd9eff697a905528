"""The one exception that is the user's to mend."""

import importlib.util


class UserError(ValueError):
    """A mistake that the user can mend.

    The message names the file or argument, what was found and what was expected. The command line
    prints it without a traceback and exits with status 2. Every other exception is a bug of nucsam
    and keeps its traceback.
    """


def check_packages(extra: str, *names: str) -> None:
    """Check that the packages of an extra of nucsam are installed.

    Raises:
        UserError: names those that are not.
    """
    missing = [name for name in names if importlib.util.find_spec(name) is None]
    if missing:
        raise UserError(f"found no {', '.join(missing)}: pip install 'nucsam[{extra}]' installs it")
