"""`accelerate launch -m nucsam.train`: the command `nucsam train` in each launched process."""

import sys

from nucsam.cli import run_command

sys.exit(run_command(["train", *sys.argv[1:]]))
