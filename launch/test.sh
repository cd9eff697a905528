#!/usr/bin/env bash
# Checks format and lint, and runs the tests, in the environment of the quickstart with the test
# extra. Arguments go to pytest.
set -euo pipefail
cd "$(dirname "$0")/.."
. launch/environment.sh
environment test

ruff format --check .
ruff check .
OMP_NUM_THREADS=1 python -m pytest -n 2 --dist worksteal "$@"
