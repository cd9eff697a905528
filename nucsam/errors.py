"""The one exception for what the user can fix."""

import importlib.util
from collections.abc import Iterator
from contextlib import contextmanager


class UserError(ValueError):
    """A mistake that the user can fix.

    The message names the file or argument, what was found and what was expected. The command line
    prints it without a traceback and exits with status 2. Every other exception is a bug of nucsam
    and keeps its traceback.
    """


@contextmanager
def reading(
    path: object, expected: str, kinds: tuple[type[Exception], ...] = (Exception,)
) -> Iterator[None]:
    """Context of reading a file, in which an exception becomes a UserError that names the file.

    Args:
        path: the file.
        expected: what the file should be.
        kinds: of exceptions; a damaged file makes decoders raise nearly anything. A UserError only
            gets the name of the file, if it lacks it.
    """
    try:
        yield
    except UserError as error:
        if str(path) in str(error):
            raise
        raise UserError(f"{path}: {error}") from error
    except kinds as error:
        reason = f"{type(error).__name__}: {error}"
        raise UserError(f"{path}: cannot be read ({reason}), expected {expected}") from error


def check_packages(extra: str, *names: str) -> None:
    """Check that the packages of an extra of nucsam are installed.

    Raises:
        UserError: names those that are not.
    """
    missing = [name for name in names if importlib.util.find_spec(name) is None]
    if missing:
        raise UserError(f"found no {', '.join(missing)}: pip install 'nucsam[{extra}]' installs it")
