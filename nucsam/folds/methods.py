"""The methods section of a report: what the runs of a cross-validation did, with citations."""

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from nucsam.files import printable
from nucsam.folds.jobs import Job
from nucsam.model.bases import BASES
from nucsam.score.tables import COLUMNS


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
    options = {"trim_blocks": True, "lstrip_blocks": True}
    environment = Environment(loader=PackageLoader("nucsam.folds"), **options)
    cited: list[str] = []

    def cite(key: str) -> str:
        if key not in cited:
            cited.append(key)
        return f"[{cited.index(key) + 1}]"

    text = environment.get_template("methods.md").render(
        c=jobs[0].config,
        label=jobs[0].variant,
        nuinsseg=nuinsseg,
        missing=[job.fold for job in jobs if job not in done],
        cite=cite,
        cited=cited,
        **_of_training(list(done)),
        **_of_scores(done),
    )
    paragraphs = (" ".join(part.split()) for part in text.split("\n\n"))
    return printable("\n\n".join(filter(None, paragraphs)) + "\n")


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
        "encoder": BASES[c.model.encoder].name,
        "pattern": c.model.pattern or BASES[c.model.encoder].pattern,
        "steps": _span(environment.get("steps") for environment in environments),
        "batch": _span(c.train.batch * c.train.accumulate * count for count in processes),
        "side": round(c.data.crop * c.data.scale),
        "run": first,
        "alike": made.count(made[0]) == len(made),
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
