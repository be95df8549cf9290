"""Adapters on the Hugging Face hub: fetched by their id, and pushed."""

import os
from collections.abc import Sequence
from pathlib import Path

import huggingface_hub

from pyro_blora.errors import CheckpointError, first_line
from pyro_blora.network.pretrained import ADAPTER

__all__ = ["downloaded", "fetched", "pushed"]

_FILES = ["bayesian_lora*", "adapter_config.json", "config.json"]  # the last two for hints


def fetched(folder: str | os.PathLike[str]) -> Path:
    """The folder itself, or for a hub id the copy of it in the hub's cache.

    Raises:
        CheckpointError: it is no folder here, and no repository that can be had.
    """
    path = Path(folder)
    if path.exists() or path.is_absolute() or isinstance(folder, Path):
        return path
    wanted = f"a folder with a {ADAPTER}, which save_pretrained wrote, or the id of a repository"
    return downloaded(str(folder), _FILES, f"{wanted} with one")


def downloaded(repo_id: str, files: Sequence[str], wanted: str) -> Path:
    """The hub's cache of some files of a repository.

    Args:
        repo_id: the repository.
        files: patterns of their names.
        wanted: what to give in its place, for the message.

    Raises:
        CheckpointError: there is no such repository, or it cannot be had.
    """
    try:
        return Path(huggingface_hub.snapshot_download(repo_id, allow_patterns=list(files)))
    except Exception as error:  # of the HTTP library, which depends on huggingface_hub's version
        raise CheckpointError(
            f"{repo_id} does not exist here, and the hub does not give it ({first_line(error)}). "
            f"Give {wanted}."
        ) from error


def pushed(folder: Path, repo_id: str, *, private: bool | None, message: str) -> str:
    """Uploads a folder to a repository, which is made if it is missing, and gives the address.

    Raises:
        CheckpointError: the hub refuses, or cannot be reached.
    """
    api = huggingface_hub.HfApi()
    try:
        repo_id = api.create_repo(repo_id, private=private, exist_ok=True).repo_id
        done = api.upload_folder(repo_id=repo_id, folder_path=folder, commit_message=message)
    except Exception as error:  # as above
        raise CheckpointError(
            f"{repo_id} was not pushed ({first_line(error)}). Log in by `hf auth login` with a "
            "token that may write, give an id 'user/name', and see that the hub can be reached; "
            "save_pretrained keeps the adapter in a folder."
        ) from error
    return str(done.commit_url)
