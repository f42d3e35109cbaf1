"""Model directories on the Hugging Face Hub, at addresses such as hf://owner/name@revision.

Needs ``pip install 'enat_jax[hub]'``; the library is imported only when an address is used. Its own
environment variables and login apply: HF_TOKEN, HF_HOME, HF_ENDPOINT, HF_HUB_OFFLINE.
"""

import contextlib
import os
import pathlib
import re
from collections.abc import Iterator
from types import ModuleType

from enat_jax.runtime import exits

PREFIX = "hf://"

# Weights that the safetensors files of a model directory hold, too.
_TWICE = ["transformer/*", "tokenizer/params/*", "text_encoder/text/*", "reference/*"]


def is_address(text: str | os.PathLike) -> bool:
    """Says whether it names a repository and not a directory of this machine.

    It may be a ``pathlib.Path``, which makes one slash of two.
    """
    return str(text).startswith("hf:/")


def parse(address: str | os.PathLike) -> tuple[str, str | None]:
    """Reads an address such as "hf://owner/name" or "hf://owner/name@revision".

    Returns:
        "owner/name", and the revision or None.

    Raises:
        ValueError: it is no such address.
    """
    found = re.fullmatch(r"hf://?([\w.-]+/[\w.-]+)(?:@([\w./-]+))?", str(address))
    if not found:
        raise ValueError(f"{address} is no address such as hf://owner/name or hf://owner/name@main")
    return found[1], found[2]


def download(address: str | os.PathLike) -> pathlib.Path:
    """Fetches a model directory, or what has changed of it since the last time.

    Args:
        address: of the repository.

    Returns:
        The directory in the Hub's cache.

    Raises:
        ValueError: it is no address, there is no such repository or revision, or the library is
            not installed.
        OSError: the Hub cannot be reached and the cache does not have it.
    """
    repository, revision = parse(address)
    library = _library()
    fetch = library.snapshot_download
    with _explained(library, address):
        found = pathlib.Path(fetch(repository, revision=revision, ignore_patterns=_TWICE))
        needed = [found / "transformer.safetensors"]
        if (found / "text_encoder").is_dir():
            needed.append(found / "text_encoder" / "text.safetensors")
        if not all(path.is_file() for path in needed):
            found = pathlib.Path(fetch(repository, revision=revision))
    return found


def push(directory: str | os.PathLike, address: str) -> str:
    """Uploads a model directory; a repository that is not there is created.

    Args:
        directory: all its files are uploaded; other files of the repository stay.
        address: of the repository, without a revision.

    Returns:
        Address of the commit in a browser.

    Raises:
        ValueError: the address is wrong, or the library is not installed.
        OSError: the Hub cannot be reached, or does not let this user write there.
    """
    repository, revision = parse(address)
    if revision is not None:
        raise ValueError(f"{address}: push to the repository itself, without @{revision}")
    library = _library()
    with _explained(library, address):
        api = library.HfApi(library_name="enat_jax")
        api.create_repo(repository, exist_ok=True)
        commit = api.upload_folder(
            repo_id=repository, folder_path=directory, commit_message="Upload model directory"
        )
    return str(commit.commit_url)


def _library() -> ModuleType:
    try:
        import huggingface_hub
    except ImportError as error:
        raise ValueError(
            "models on the Hugging Face Hub need a library: pip install 'enat_jax[hub]'"
        ) from error
    return huggingface_hub


@contextlib.contextmanager
def _explained(library: ModuleType, address: str | os.PathLike) -> Iterator[None]:
    """Within, whatever the library raises becomes one line that says what to do."""
    try:
        yield
    except Exception as error:
        raise _mistake(library.errors, address, error) from error


def _mistake(errors: ModuleType, address: str | os.PathLike, error: Exception) -> Exception:
    """Returns the error that says what to do about one of the library."""
    status = getattr(getattr(error, "response", None), "status_code", None)
    if isinstance(error, errors.GatedRepoError):
        return ValueError(f"{address} asks for access: agree on its page, then set HF_TOKEN")
    if isinstance(error, errors.RevisionNotFoundError):
        return ValueError(f"{address}: the repository has no such revision")
    if isinstance(error, errors.RepositoryNotFoundError):  # with status 401, too
        return ValueError(
            f"{address}: there is no such repository, or it is private: check the name, or set "
            "HF_TOKEN"
        )
    if status in (401, 403) or isinstance(error, errors.LocalTokenNotFoundError):
        return OSError(
            f"{address}: the Hub does not know this user, or does not let them do this: check the "
            "name and the token (HF_TOKEN, or the command: hf auth login)"
        )
    reason = exits.one_line(error)
    if isinstance(error, errors.LocalEntryNotFoundError | errors.OfflineModeIsEnabled):
        reason = f"not in the cache, and the Hub cannot be reached: {reason}"
    return OSError(f"{address}: {reason}")
