#!/usr/bin/env bash
# Installs nucsam into .venv and runs `nucsam quickstart`: minutes from a fresh clone, without a GPU
# and without downloading weights. After an interruption, the same command continues.
set -euo pipefail
cd "$(dirname "$0")/.."
. launch/environment.sh
environment report

forwarding_sigterm nucsam quickstart runs/quickstart || {
  status=$?
  [ "$status" -lt 128 ] || echo "or: bash launch/quickstart.sh"
  exit "$status"
}
echo "Activate the environment   . .venv/bin/activate"
