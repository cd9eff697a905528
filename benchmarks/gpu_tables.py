"""The tables of benchmarks/gpu.sh, in Markdown.

    python benchmarks/gpu_tables.py RESULTS

A number that RESULTS does not have is "not measured yet".
"""

import json
import sys
from pathlib import Path
from typing import Any

NOT_YET = "not measured yet"
STEPS = {  # file: what it measures
    "step-1-fp16": "batch 1, fp16",
    "step-4-fp16": "batch 4, fp16",
    "step-16-fp16": "batch 16, fp16",
    "step-1-bf16": "batch 1, bf16",
    "step-4-bf16": "batch 4, bf16",
    "step-16-bf16": "batch 16, bf16",
    "step-4-fp16-compiled": "batch 4, fp16, compiled",
    "memory-nuinsseg": "batch 4, fp16, configs/nuinsseg.toml",
}


def row(*cells: Any) -> str:
    texts = (f"{cell:.3g}" if isinstance(cell, float) else str(cell) for cell in cells)
    return f"| {' | '.join(texts)} |"


def step_row(about: str, document: dict[str, Any] | None) -> str:
    """Speed and memory of a training step."""
    if document is None:
        return row(about, *[NOT_YET] * 5)
    speeds = [document[stage]["nucsam"]["images_per_second"] for stage in ("step", "pipeline")]
    ratios = [document["ratios"]["pipeline"].get(peer, {}) for peer in ("plain", "tuned")]
    memory = document["memory_mib"]["nucsam"]
    gib = memory.get("reserved", memory["held"]) / 2**10
    return row(about, *speeds, *(ratio.get("speed", "") for ratio in ratios), gib)


def tables(documents: dict[str, dict[str, Any]]) -> list[str]:
    """Lines of Markdown from the documents of the measurements, by name."""
    measured = documents.get("step-4-fp16", {})
    versions = [f"{name} {number}" for name, number in measured.get("versions", {}).items()]
    lines = [
        "; ".join(["Machine: " + measured.get("machine", NOT_YET), *versions]),
        "",
        f"A step never waits for the GPU: {'yes' if 'sync_check' in documents else NOT_YET}",
        "",
        row("training step", "step, images/s", "pipeline", "times plain", "times tuned", "GiB"),
        row(*["---"] * 6),
        *(step_row(about, documents.get(name)) for name, about in STEPS.items()),
        "",
        row("prediction", "megapixels/s", "times stock"),
        row(*["---"] * 3),
    ]
    results = documents.get("prediction", {}).get("results", {})
    for name, about in (("tiled", "one TIFF, 20,000 px a side"), ("images", "images of 512 px")):
        result = results.get(name)
        cells = [result["mp_per_second"], result["times_stock"]] if result else [NOT_YET] * 2
        lines.append(row(about, *cells))
    scores = documents.get("fold", {}).get("headline", {})
    names = ("dice", "aji", "pq")
    cells = [f"{100 * scores[name]:.1f}" if scores else NOT_YET for name in names]
    return [*lines, "", row("a fold", *map(str.upper, names)), row(*["---"] * 4), row("", *cells)]


def main(arguments: list[str] | None = None) -> None:
    (folder,) = arguments or sys.argv[1:]
    paths = sorted(Path(folder).glob("*.json"))
    documents = {path.stem: json.loads(path.read_text()) for path in paths}
    print("\n".join(tables(documents)))


if __name__ == "__main__":
    main()
