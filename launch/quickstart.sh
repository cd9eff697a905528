#!/usr/bin/env bash
# Trains and scores a model on synthetic images: minutes from a fresh clone, without a GPU and
# without downloading weights. After an interruption, the same command continues.
set -euo pipefail
cd "$(dirname "$0")/.."
. launch/environment.sh
environment report

data=runs/quickstart/data run=runs/quickstart/fold0
# A thread waits for all others at each step, so there are no more of them than idle cores.
idle='import os; print(max(1, round(os.cpu_count() - os.getloadavg()[0])))'
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-$(python -c "$idle")}
if [ ! -d "$data" ]; then
  rm -rf "$data.partial"
  nucsam synth "$data.partial" --images 60 --size 256 --seed 0 >/dev/null
  mv "$data.partial" "$data"
fi
settings=(configs/quickstart.toml)
[ ! -f "$run/config.toml" ] || settings=(--resume)
forwarding_sigterm nucsam train "${settings[@]}" --out "$run" || {
  status=$?
  [ "$status" -lt 128 ] || echo "or: bash launch/quickstart.sh"
  exit "$status"
}
nucsam evaluate "$run" --untrained
cat <<END
Pictures and curves        open $run/report.html
Activate the environment   . .venv/bin/activate
What your images take      nucsam train my_folder --dry-run
END
