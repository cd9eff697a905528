"""The methods section of a report: what the runs of a cross-validation did, with citations."""

import re
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from nucsam.files import printable
from nucsam.folds.jobs import Job
from nucsam.score.tables import COLUMNS

REFERENCES = {  # the works of CITATION.cff that templates/methods.md cites
    "nuinsseg": "Mahbod et al. NuInsSeg: A fully annotated dataset for nuclei instance "
    "segmentation in H&E-stained histological images. Scientific Data 11, 295 (2024). "
    "doi:10.1038/s41597-024-03117-2",
    "mobilesam": "Zhang et al. Faster Segment Anything: Towards Lightweight SAM for Mobile "
    "Applications (2023). https://arxiv.org/abs/2306.14289",
    "sam": "Kirillov et al. Segment Anything. ICCV (2023). doi:10.1109/ICCV51070.2023.00371",
    "lora": "Hu et al. LoRA: Low-Rank Adaptation of Large Language Models. ICLR (2022). "
    "https://arxiv.org/abs/2106.09685",
    "microsam": "Archit et al. Segment Anything for Microscopy. Nature Methods 22(3), 579-591 "
    "(2025). doi:10.1038/s41592-024-02580-4",
    "aji": "Kumar et al. A Dataset and a Technique for Generalized Nuclear Segmentation for "
    "Computational Pathology. IEEE Transactions on Medical Imaging 36(7), 1550-1560 (2017). "
    "doi:10.1109/TMI.2017.2677499",
    "pq": "Kirillov et al. Panoptic Segmentation. CVPR (2019). doi:10.1109/CVPR.2019.00963",
    "accelerate": "Gugger et al. Accelerate: Training and inference at scale made simple, "
    "efficient and adaptable (2022). https://github.com/huggingface/accelerate",
}
CITATION = re.compile(rf"\[@({'|'.join(REFERENCES)})\]")


def methods_section(jobs: Sequence[Job], *, nuinsseg: bool) -> str:
    """What the finished folds of one variant did, as a section of Markdown with its references.

    Every number comes from the configuration or from the files of the runs.

    Args:
        jobs: all folds of the variant.
        nuinsseg: whether the images are NuInsSeg's.

    Returns:
        The section; "" where no fold is finished.
    """
    from jinja2 import Environment, PackageLoader

    scores = {job: job.scores() for job in jobs}
    done = {job: document for job, document in scores.items() if document}
    if not done:
        return ""
    loader = PackageLoader("nucsam.folds")
    template = Environment(loader=loader, trim_blocks=True, lstrip_blocks=True).get_template(
        "methods.md"
    )
    facts = _of_training(list(done)) | _of_scores(done)
    missing = [job.fold for job in jobs if job not in done]
    text = template.render(
        c=jobs[0].config, label=jobs[0].variant, nuinsseg=nuinsseg, missing=missing, **facts
    )
    title, *paragraphs = [" ".join(part.split()) for part in text.split("\n\n") if part.strip()]
    return _with_references(printable("\n\n".join([title, *paragraphs])))


def _of_training(jobs: Sequence[Job]) -> dict[str, Any]:
    """What the template says of images, parameters and training, from the files of the runs."""
    c = jobs[0].config
    environments = [job.directory.read_environment() for job in jobs]
    first = environments[0]
    images = [environment.get("images", {}) for environment in environments]
    inventory = jobs[0].directory.read_images().values()
    processes = [environment.get("processes", 1) for environment in environments]
    keys = ("precision", "device", "processes", "nucsam", "packages")
    made = [{key: environment.get(key) for key in keys} for environment in environments]
    return {
        "folder": Path(c.data.root).name,
        "images": sum(images[0].values()),
        "organs": len({image["organ"] for image in inventory} - {""}),
        "groups": len({image["group"] for image in inventory}),
        "inner": round(1 / c.data.inner),
        "train": _span(counts.get("train") for counts in images),
        "validation": _span(counts.get("inner") for counts in images),
        "test": _span(counts.get("test") for counts in images),
        "base": Path(c.model.weights).name,
        "parameters": first.get("parameters"),
        "trainable": first.get("parameters_trainable"),
        "steps": _span(environment.get("steps") for environment in environments),
        "batch": _span(c.train.batch * c.train.accumulate * count for count in processes),
        "side": round(c.data.crop * c.data.scale),
        "made": first if made.count(made[0]) == len(made) else {},
        "metric": COLUMNS[c.train.best],
    }


def _of_scores(done: Mapping[Job, Mapping[str, Any]]) -> dict[str, Any]:
    """What the template says of test images and scoring."""
    summaries = [document["scores"][0]["summary"] for document in done.values()]
    protocols = max((document["scores"] for document in done.values()), key=len)
    return {
        "finished": len(done),
        "tested": sum(summary["images"] for summary in summaries),
        "nuclei": sum(summary["nuclei"] for summary in summaries),
        "kept": ", ".join(f"{d['epoch']} in fold {job.fold}" for job, d in done.items()),
        "rules": [protocol["rules"].partition(": ")[2] for protocol in protocols],
        "vague": len(protocols) > 1,
    }


def _span(counts: Iterable[int | None]) -> str:
    """The values of the folds: "41" or "41 to 42"; "" where a run does not say."""
    values = sorted({count for count in counts if count is not None})
    return " to ".join(f"{value:,}" for value in dict.fromkeys(values[:1] + values[-1:]))


def _with_references(text: str) -> str:
    """Citations [@key] as numbers in the order in which they come, and the list of the works."""
    keys = list(dict.fromkeys(CITATION.findall(text)))
    text = CITATION.sub(lambda match: f"[{keys.index(match[1]) + 1}]", text)
    works = (f"{number}. {REFERENCES[key]}" for number, key in enumerate(keys, 1))
    return "\n".join([text, "", "References", "", *works, ""])
