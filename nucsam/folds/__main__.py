"""`accelerate launch -m nucsam.folds`: the command `nucsam folds` in each launched process."""

import sys

from nucsam.cli import run_command

sys.exit(run_command(["folds", *sys.argv[1:]]))
