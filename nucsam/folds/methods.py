"""The methods section of a report: what the runs of a cross-validation did, with citations."""

from collections.abc import Iterable, Sequence
from typing import Any

from nucsam.files import folder_name, printable
from nucsam.folds.jobs import Job
from nucsam.model.bases import BASES
from nucsam.model.instances import CONFIDENCE_POWER, FOREGROUND_POWER
from nucsam.names import portable_name
from nucsam.score.tables import COLUMNS, percent

LATEX = str.maketrans(
    {character: f"\\{character}" for character in "&%$#_{}"}
    | {"\\": r"\textbackslash{}", "~": r"\textasciitilde{}", "^": r"\textasciicircum{}"}
    | {"±": r"$\pm$", percent(None): "--"}
)


def render(template: str, **values: Any) -> str:
    """A template of this package, filled in."""
    from jinja2 import Environment, PackageLoader

    loader = PackageLoader("nucsam.folds")
    environment = Environment(loader=loader, trim_blocks=True, lstrip_blocks=True)
    environment.filters["latex"] = lambda text: text.translate(LATEX)
    return environment.get_template(template).render(**values)


def methods_section(jobs: Sequence[Job], *, nuinsseg: bool) -> str:
    """What the finished folds of one variant did, as a section of Markdown with its references.

    Every number comes from the configuration or from the files of the runs.

    Args:
        jobs: all folds of the variant.
        nuinsseg: whether the images are NuInsSeg's.

    Returns:
        The section; "" where no fold is finished.
    """
    scores = {job: job.scores() for job in jobs}
    done = {job: document for job, document in scores.items() if document}
    if not done:
        return ""
    cited: list[str] = []

    def cite(key: str) -> str:
        if key not in cited:
            cited.append(key)
        return f"[{cited.index(key) + 1}]"

    config = jobs[0].config
    environments = [job.directory.read_environment() for job in done]
    step_images = config.train.batch * config.train.accumulate  # of a process
    text = render(
        "methods.md",
        c=config,
        label=jobs[0].variant,
        nuinsseg=nuinsseg,
        folder=folder_name(config.data.root),
        base=portable_name(environments[0].get("base", config.model.weights)),
        encoder=BASES[config.model.encoder].name,
        pattern=config.model.pattern or BASES[config.model.encoder].pattern,
        metric=COLUMNS[config.train.best],
        powers=(FOREGROUND_POWER, CONFIDENCE_POWER),
        inventory=list(next(iter(done)).directory.read_images().values()),
        environments=environments,
        alike=all(
            _settings_of(environment) == _settings_of(environments[0])
            for environment in environments
        ),
        batches=[step_images * environment.get("processes", 1) for environment in environments],
        counts=[environment.get("images", {}) for environment in environments],
        done={job.fold: document for job, document in done.items()},
        span=_span,
        cite=cite,
        cited=cited,
    )
    paragraphs = (" ".join(part.split()) for part in text.split("\n\n"))
    return printable("\n\n".join(filter(None, paragraphs)) + "\n")


def _settings_of(environment: dict[str, Any]) -> list[Any]:
    """On what a run was trained."""
    keys = ("precision", "device", "processes", "nucsam", "packages")
    return [environment.get(key) for key in keys]


def _span(counts: Iterable[Any]) -> str:
    """The values of the folds: "41" or "41 to 42"; "" where a run does not say."""
    values = sorted({count for count in counts if isinstance(count, int)})
    return " to ".join(f"{value:,}" for value in dict.fromkeys(values[:1] + values[-1:]))
