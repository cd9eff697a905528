#!/usr/bin/env bash
# Everything that a GPU has to say about nucsam, in under 10 minutes, the most important first.
#
#   bash benchmarks/gpu.sh [--small] RESULTS [DATA]
#
# DATA, a folder in NuInsSeg's layout such as monuseg-train, adds a fold. RESULTS gets NAME.json and
# NAME.txt of each measurement, and gpu.md, the tables. The same command continues where it stopped:
# it skips what RESULTS has. --small runs everything on a CPU, in tiny sizes, to try this script.
# The peers in the tables need `pip install peft`.
set -euo pipefail
small=
if [ "${1:-}" = --small ]; then
  small=1
  export ACCELERATE_USE_CPU=true
  shift
fi
results=$(mkdir -p "${1:?the folder of the results}" && cd "$1" && pwd)
data=${2:+$(cd "$2" && pwd)}
cd "$(dirname "$0")/.."
python=${PYTHON:-python}
LIMIT=${LIMIT:-570} # s, of all measurements together

# measure NAME SECONDS COMMAND...: the command writes the file that replaces JSON in its arguments.
measure() {
  local name=$1 seconds=$2 left=$((LIMIT - SECONDS))
  shift 2
  [ ! -s "$results/$name.json" ] || return 0
  if [ "$left" -lt 15 ]; then
    echo "$name: no time left; the same command continues"
    return 0
  fi
  [ -z "$small" ] && [ "$seconds" -lt "$left" ] || seconds=$left
  echo "$name"
  if timeout --kill-after=10 "$seconds" "${@/#JSON/$results/$name.part}" >"$results/$name.txt" 2>&1; then
    mv "$results/$name.part" "$results/$name.json"
  else
    echo "$name: failed or longer than $seconds s; see $results/$name.txt" >&2
    rm -f "$results/$name.part"
  fi
}

step() { # NAME SECONDS BATCH DTYPE OPTION...
  local name=$1 seconds=$2 batch=$3 dtype=$4
  shift 4
  [ -z "$small" ] || { batch=1 && dtype=${dtype/fp16/fp32}; }
  measure "$name" "$seconds" "$python" benchmarks/train_step.py --json JSON \
    --batch "$batch" --dtype "$dtype" "${size[@]}" "$@"
}

if [ -n "$small" ]; then
  size=(--device cpu --image-size 64 --repeat 1 --steps 1 --workers 0)
  predicted=(--device cpu --image-size 64 --size 300 --images 1 --sample 1 --scale 0.25 --batch 1)
  budget=(data.crop=64 data.scale=1.0 train.epochs=1 train.batch=1 model.weights=none)
  tests=(-k would_be_seen)
  half=bf16
  compile=() # minutes on a CPU
else
  size=(--image-size 1024 --repeat 5 --steps 16 --workers 4)
  predicted=(--image-size 1024 --size 20000 --images 8 --sample 4 --batch 4)
  budget=(train.epochs=60 train.validate_every=20)
  tests=()
  half=fp16
  compile=(--compile)
fi

measure sync_check 120 bash -c '
  file=$1 && shift
  "$@" && echo "{\"benchmark\": \"sync_check\"}" >"$file"
' _ JSON "$python" -m pytest -q -n 0 tests/test_cuda.py "${tests[@]}"
step step-4-fp16 90 4 fp16 --ways nucsam plain tuned
step step-4-bf16 90 4 bf16 --ways nucsam plain tuned
step memory-nuinsseg 60 4 fp16 --ways nucsam --config configs/nuinsseg.toml
measure prediction 150 "$python" benchmarks/inference.py --json JSON --dtype "$half" "${predicted[@]}"
step step-4-fp16-compiled 120 4 fp16 --ways nucsam "${compile[@]}"
step step-16-fp16 60 16 fp16 --ways nucsam
step step-1-fp16 60 1 fp16 --ways nucsam
step step-16-bf16 60 16 bf16 --ways nucsam
step step-1-bf16 60 1 bf16 --ways nucsam
if [ -n "$data" ]; then
  measure fold 200 bash -c '"${@:3}" && cp "$2/scores.json" "$1"' _ JSON "$results/fold" \
    "$python" -m nucsam train configs/nuinsseg.toml data.root="$data" data.folds=2 data.fold=0 \
    'data.group=^(.*)_\d+$' "${budget[@]}" --out "$results/fold" --resume
fi
"$python" benchmarks/gpu_tables.py "$results" | tee "$results/gpu.md"
