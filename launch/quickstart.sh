#!/usr/bin/env bash
# Trains and scores a model on synthetic images: minutes from a fresh clone, without a GPU and
# without downloading weights.
set -euo pipefail
cd "$(dirname "$0")/.."
. launch/environment.sh
environment report

data=runs/quickstart/data run=runs/quickstart/fold0
[ -d "$data" ] || nucsam synth "$data" --images 60 --size 256 --seed 0
rm -rf "$run"
forwarding_sigterm accelerate launch --config_file launch/cpu.yaml -m nucsam.train configs/quickstart.toml --out "$run"
echo
echo "Held-out test images, before and after training:"
nucsam evaluate "$run" --untrained
nucsam evaluate "$run" --overlays "$run/overlays"
echo
echo "images                    $data"
echo "run                       $run (config.toml, metrics.jsonl, scores.json, adapter.safetensors)"
echo "truth | prediction        $run/overlays/*.png"
echo "report page               $run/report.html"
echo "one merged file           nucsam export $run --out nuclei.safetensors"
