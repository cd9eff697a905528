#!/usr/bin/env bash
# Format, lint and tests, in the same environment as the quickstart plus the test extra. Arguments go to pytest.
set -euo pipefail
cd "$(dirname "$0")/.."
. launch/environment.sh
environment test

ruff format --check .
ruff check .
OMP_NUM_THREADS=1 python -m pytest -n 2 "$@"
