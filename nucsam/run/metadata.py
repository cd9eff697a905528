"""What the metadata of an adapter or an export must hold. Loads no torch."""

from pathlib import Path
from typing import Any

from nucsam.config import Config
from nucsam.files import COUNT, NUMBER, TEXT, Leaf, check_form

MPP = Leaf("microns per px over 0, or null", lambda v: v is None or (NUMBER.holds(v) and v > 0))
PRECISION = Leaf("a precision", lambda value: value in ("no", "fp16", "bf16", "fp8"))


def check_metadata(path: Path, metadata: dict[str, Any]) -> Config:
    """Check the metadata of an adapter or a merged export, and return their configuration.

    Raises:
        UserError: an entry is missing, of another type or out of range.
    """
    source = f"{path}: metadata"
    check_form(metadata, {"base": {"sha256": TEXT, "source": TEXT}, "config": dict}, source)
    for name, form in (("mpp", MPP), ("precision", PRECISION), ("selected", {"epoch": COUNT})):
        if name in metadata:
            check_form(metadata[name], form, f"{source}: {name}")
    return Config.from_dict(metadata["config"], f"{path}: configuration")
