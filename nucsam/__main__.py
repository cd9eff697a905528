"""`python -m nucsam` and the `nucsam` command."""

import sys


def main() -> None:
    """Run the command line of this process."""
    from nucsam.cli import run_command

    sys.exit(run_command(sys.argv[1:]))


if __name__ == "__main__":
    main()
