"""Models by name on the Hugging Face Hub: `hf:USER/NAME`, or `hf:USER/NAME@REVISION`.

`huggingface_hub` caches what it downloads, and heeds its own settings: HF_HOME, HF_ENDPOINT for a
mirror, HF_HUB_OFFLINE and HF_TOKEN. Loads no torch.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from nucsam.errors import UserError

PREFIX = "hf:"
FILE = "model.safetensors"  # of every repository: a file of nucsam export
CARD = "README.md"


def is_hub_name(text: str) -> bool:
    return text.startswith(PREFIX)


def fetch_model(name: str) -> tuple[Path, str]:
    """The model file of a repository, downloaded unless it is in the cache.

    Args:
        name: hf:USER/NAME, or hf:USER/NAME@REVISION with a branch, tag or commit.

    Returns:
        The file, and hf:USER/NAME@COMMIT, which names these bytes for good.

    Raises:
        UserError: no such repository, revision or file, or no way to it.
    """
    from huggingface_hub import hf_hub_download

    repository, _, revision = name.removeprefix(PREFIX).partition("@")
    expected = f"a repository with a {FILE} of nucsam export"
    with _hub_errors(name, expected):
        path = Path(hf_hub_download(repository, FILE, revision=revision or None))
    return path, f"{PREFIX}{repository}@{path.parent.name}"  # the cache's folder is the commit


def push_model(name: str, model: Path, card: str) -> str:
    """Upload a model file and its card in one commit, to a repository that is made if need be.

    Args:
        name: USER/NAME.
        model: file of nucsam export.
        card: text of the repository's README.md.

    Returns:
        hf:USER/NAME@COMMIT.

    Raises:
        UserError: no access token, no right to write there, or no way to it.
    """
    from huggingface_hub import CommitOperationAdd, HfApi

    name = name.removeprefix(PREFIX)
    hub = HfApi()
    files = {FILE: model, CARD: card.encode()}
    with _hub_errors(f"{PREFIX}{name}", "a repository of yours; `hf auth login` keeps your token"):
        hub.create_repo(name, exist_ok=True)
        commit = hub.create_commit(
            name,
            [CommitOperationAdd(path, content) for path, content in files.items()],
            commit_message="A model of nucsam",
        )
    return f"{PREFIX}{name}@{commit.oid}"


def cached_models() -> dict[str, Path]:
    """Every model file in the Hub's cache, by its name with the commit."""
    from huggingface_hub import CacheNotFound, scan_cache_dir

    try:
        repositories = scan_cache_dir().repos
    except CacheNotFound:
        return {}
    return {
        f"{PREFIX}{repository.repo_id}@{revision.commit_hash}": file.file_path
        for repository in repositories
        for revision in repository.revisions
        for file in revision.files
        if file.file_name == FILE
    }


@contextmanager
def _hub_errors(name: str, expected: str) -> Iterator[None]:
    """Turn what the Hub and the network refuse into a UserError."""
    try:
        yield
    except Exception as error:  # its own kinds, those of the HTTP client beneath, and OSError
        reason = " ".join(str(error).split()) or type(error).__name__
        raise UserError(f"{name}: {reason.rstrip('.')}; expected {expected}") from error
