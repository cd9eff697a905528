"""Models by name: the starter, and files on the Hugging Face Hub. Loads no torch.

`huggingface_hub` caches what it downloads, and heeds its own settings: HF_HOME, HF_ENDPOINT for a
mirror, HF_HUB_OFFLINE and HF_TOKEN.
"""

import os
import re
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.util import find_spec
from pathlib import Path

from nucsam.errors import UserError
from nucsam.files import UNWRITABLE, expanded

STARTER = "starter"
STARTER_FILE = Path(__file__).with_name("starter.safetensors")  # an adapter; starter.md is its card
PREFIX = "hf:"
FILE = "model.safetensors"  # of every repository: a file of nucsam export
CARD = "README.md"


def find_model(name: str | Path) -> tuple[Path, str]:
    """The file or run directory that a name stands for.

    Args:
        name: "starter"; hf:USER/NAME, or hf:USER/NAME@REVISION with a branch, tag or commit; else
            a path. A text that is a name wins over a file of that name: `./starter` is the file. A
            `Path` is always a path.

    Returns:
        The path, and a permanent name: "starter", hf:USER/NAME@COMMIT, or the path as given.

    Raises:
        UserError: the Hub has no such repository, revision or file, or cannot be reached.
    """
    if name == STARTER:
        return STARTER_FILE, STARTER
    if isinstance(name, str) and is_hub_name(name):
        return _fetch(name)
    return expanded(name), str(name)


def is_hub_name(text: str) -> bool:
    return text.startswith(PREFIX)


def is_model_name(text: str) -> bool:
    """Whether a text of `find_model` is a name and no path."""
    return text == STARTER or is_hub_name(text)


def is_permanent(text: str) -> bool:
    """Whether a text of `find_model` is a name, which means the same model everywhere."""
    return text == STARTER or bool(re.fullmatch(rf"{PREFIX}[^@]+@[0-9a-f]{{40}}", text))


def portable_name(source: str) -> str:
    """A name as it is, or the name of a file without its folders."""
    return source if is_hub_name(source) else Path(source).name


def default_cache() -> Path:
    """Folder of published base weights: $NUCSAM_CACHE, $XDG_CACHE_HOME/nucsam, ~/.cache/nucsam.

    Raises:
        UserError: no home folder is known.
    """
    parent = Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache")
    folder = Path(os.environ.get("NUCSAM_CACHE") or parent / "nucsam")
    try:
        return folder.expanduser()
    except RuntimeError as error:
        raise UserError(f"NUCSAM_CACHE: found {folder} ({error}), expected a folder") from None


def _fetch(name: str) -> tuple[Path, str]:
    """The model file of a repository, downloaded unless it is in the cache; its permanent name."""
    if find_spec("huggingface_hub") is None:
        raise UserError(f"{name}: found no huggingface_hub, expected that package and PyTorch")
    from huggingface_hub import hf_hub_download

    repository, at, revision = name.removeprefix(PREFIX).partition("@")
    if at and not revision:
        raise UserError(f"{name}: found no revision, expected one after @")
    with _hub_errors(name, f"a repository with a {FILE} of nucsam export"):
        path = Path(hf_hub_download(repository, FILE, revision=revision or None))
    return path, f"{PREFIX}{repository}@{path.parent.name}"  # the cache's folder is the commit


def check_repository(name: str) -> str:
    """USER/NAME of a repository, which may come with PREFIX.

    Raises:
        UserError: it is something else.
    """
    repository = name.removeprefix(PREFIX)
    if not re.fullmatch(r"[\w.-]+/[\w.-]+", repository):
        raise UserError(f"push: found {name!r}, expected USER/NAME")
    return repository


def push_model(name: str, model: Path, card: str) -> tuple[str, bool]:
    """Upload a model file and its card in one commit, to a repository that is made if need be.

    Args:
        name: USER/NAME.
        model: file of nucsam export.
        card: text of the repository's README.md. One that is there stays, for its author has
            perhaps written the licence into it.

    Returns:
        hf:USER/NAME@COMMIT, and whether the repository has kept its card.

    Raises:
        UserError: no access token, no right to write there, or the Hub cannot be reached.
    """
    from huggingface_hub import CommitOperationAdd, HfApi

    hub = HfApi()
    files = {FILE: model, CARD: card.encode()}
    with _hub_errors(f"{PREFIX}{name}", "a repository of yours; `hf auth login` keeps your token"):
        hub.create_repo(name, exist_ok=True)
        kept = hub.file_exists(name, CARD)
        if kept:
            del files[CARD]
        commit = hub.create_commit(
            name,
            [CommitOperationAdd(path, content) for path, content in files.items()],
            commit_message="A model of nucsam",
        )
    return f"{PREFIX}{name}@{commit.oid}", kept


def hub_models() -> dict[str, Path]:
    """Lasting name -> file of every model of nucsam in the Hub's cache."""
    if find_spec("huggingface_hub") is None:  # as where ONNX files predict without PyTorch
        return {}
    from huggingface_hub import CacheNotFound, scan_cache_dir

    try:
        repositories = scan_cache_dir().repos
    except (CacheNotFound, ValueError, OSError):  # a file in its place, or no right to read it
        return {}
    files = {
        f"{PREFIX}{repository.repo_id}@{revision.commit_hash}": revision.snapshot_path / FILE
        for repository in repositories
        for revision in repository.revisions
        if repository.repo_type == "model"
    }
    return {name: path for name, path in files.items() if path.is_file() and _is_ours(path)}


def _is_ours(path: Path) -> bool:
    """Whether a safetensors file is one of nucsam export."""
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, framework="np") as file:
            return "nucsam" in (file.metadata() or {})
    except (SafetensorError, OSError):
        return False


@contextmanager
def _hub_errors(name: str, expected: str) -> Iterator[None]:
    """Turn what the Hub and the network refuse into a UserError."""
    try:
        yield
    except Exception as error:  # its own kinds, those of the HTTP client beneath, and OSError
        if isinstance(error, OSError) and error.errno in UNWRITABLE:
            expected = "a cache to write to; HF_HOME names another"
        reason = " ".join(str(error).split()) or type(error).__name__
        raise UserError(f"{name}: {reason.rstrip('.')}; expected {expected}") from error
