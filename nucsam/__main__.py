"""`python -m nucsam` and the `nucsam` command."""

import sys


def main() -> None:
    """Run the command line; a user's mistake is one line on stderr and exit status 2."""
    from nucsam.cli import run

    sys.exit(run(sys.argv[1:]))


if __name__ == "__main__":
    main()
