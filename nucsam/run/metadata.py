"""What the documents of a run, and the metadata of its weights, must hold. Loads no torch."""

from pathlib import Path
from typing import Any

from nucsam.config import Config
from nucsam.files import COUNT, FLAG, NUMBER, SHARE, TEXT, Leaf, check_form

MPP = Leaf("microns per px over 0, or null", lambda v: v is None or (NUMBER.holds(v) and v > 0))
AREA = Leaf("px over 0, or null", MPP.holds)
PRECISION = Leaf("a precision", lambda value: value in ("no", "fp16", "bf16", "fp8"))

# The form of what the table, the report and the export read in a run's documents
HEADLINE = dict.fromkeys(("dice", "aji", "pq"), SHARE)
MEANS = {"images": COUNT, "mean": HEADLINE}
SCORES = {
    "images_of": TEXT,
    "untrained": FLAG,
    "epoch": COUNT,
    "epoch_chosen_by": TEXT,
    "base": {"source": TEXT},
    "headline": HEADLINE,
    "scores": [
        {
            "protocol": {"name": TEXT},
            "rules": TEXT,
            "images": [
                HEADLINE
                | {"name": TEXT, "organ": TEXT, "n_truth": COUNT, "n_pred": COUNT}
                | {"outcomes": dict.fromkeys(("missed", "false", "split", "merged"), COUNT)}
            ],
            "summary": MEANS
            | {"nuclei": COUNT, "predicted": COUNT, "pooled": HEADLINE}
            | {"low": HEADLINE, "high": HEADLINE, "organs": {str: MEANS}},
        }
    ],
}
EPOCH = {"epoch": COUNT}
ENVIRONMENT = {
    "nucsam": TEXT,
    "python": TEXT,
    "packages": {str: TEXT},
    "platform": TEXT,
    "device": TEXT,
    "processes": COUNT,
    "precision": TEXT,
    "command": [TEXT],
    "parameters": COUNT,
    "parameters_trainable": COUNT,
    "base": TEXT,
    "base_sha256": TEXT,
    "images": {str: COUNT},
}
IMAGES = {str: {"organ": TEXT, "group": TEXT, "part": TEXT, "sha256": TEXT}}


def known_certainty(config: Config, metadata: dict[str, Any]) -> float:
    """The usual certainty of a model, by the metadata of its weights.

    It was measured on the images that chose the epoch. 0 = not measured, or not to be used.
    """
    if not config.instances.lenient:
        return 0.0
    return metadata.get("selected", {}).get("certainty") or 0.0


def check_metadata(path: Path, metadata: dict[str, Any]) -> Config:
    """Check the metadata of an adapter or a merged export, and return their configuration.

    Raises:
        UserError: an entry is missing, of another type or out of range.
    """
    source = f"{path}: metadata"
    check_form(metadata, {"base": {"sha256": TEXT, "source": TEXT}, "config": dict}, source)
    forms = {"mpp": MPP, "nucleus_area": AREA, "precision": PRECISION, "selected": EPOCH}
    for name, form in forms.items():
        if name in metadata:
            check_form(metadata[name], form, f"{source}: {name}")
    if "certainty" in metadata.get("selected", {}):
        check_form(metadata["selected"]["certainty"], SHARE, f"{source}: certainty")
    return Config.from_dict(metadata["config"], f"{path}: configuration")
