"""`accelerate launch -m nucsam.predict`: the command `nucsam predict` in each launched process."""

import sys

from nucsam.cli import run_command

sys.exit(run_command(["predict", *sys.argv[1:]]))
