"""The one exception that is the user's to mend."""

import importlib.util


class UserError(ValueError):
    """A mistake that the user can mend.

    The message names the file or argument, what was found and what was expected. The command line
    prints it without a traceback and exits with status 2. Every other exception is a bug of nucsam
    and keeps its traceback.
    """


def unreadable(path: object, error: Exception, expected: str) -> UserError:
    """What to tell the user of an exception that reading a file has raised.

    Args:
        path: the file.
        error: the exception; a UserError only gets the name of the file, if it lacks it.
        expected: what the file should be.
    """
    if isinstance(error, UserError):
        return error if str(path) in str(error) else UserError(f"{path}: {error}")
    reason = f"{type(error).__name__}: {error}"
    return UserError(f"{path}: cannot be read ({reason}), expected {expected}")


def check_packages(extra: str, *names: str) -> None:
    """Check that the packages of an extra of nucsam are installed.

    Raises:
        UserError: names those that are not.
    """
    missing = [name for name in names if importlib.util.find_spec(name) is None]
    if missing:
        raise UserError(f"found no {', '.join(missing)}: pip install 'nucsam[{extra}]' installs it")
