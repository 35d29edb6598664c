"""Published weights on a Hugging Face hub: one repository holds a folder for each, and a row pins the commit.

huggingface_hub is imported when it is needed (the extra `hub`); HF_ENDPOINT, HF_TOKEN and HF_HUB_OFFLINE are its own.
"""

import contextlib
import dataclasses
import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from zoo.files import cache_folder
from zoo.weights.files import WeightsError
from zoo.weights.published import Published, read_card, write_row


def client() -> Any:
    try:
        import huggingface_hub
    except ImportError as error:
        raise FileNotFoundError('weights on the hub need huggingface_hub: pip install "gatedfwa-zoo[hub]"') from error
    return huggingface_hub


@contextlib.contextmanager
def told(what: str) -> Iterator[None]:
    """The client's errors, of which some are no OSError, as one line that says what was asked for."""
    try:
        yield
    except Exception as error:  # of the client and of what it talks through: no family in common
        first = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise ConnectionError(f"{what}: {first}") from error


def pull(published: Published) -> Path:
    """Fetch the folder at its pinned commit into the cache, check all of it, and return where it lies.

    Raises FileNotFoundError where the row names no hub, ConnectionError, WeightsError for bytes that differ.
    """
    if not published.row.hub:
        raise FileNotFoundError(f"the row of {published.name} names no hub: `zoo push` fills it in")
    repository, _, revision = published.row.hub.partition("@")
    final = cache_folder() / "weights" / published.name
    part = final.with_name(f".{published.name}.{os.getpid()}.part")
    try:
        with told(f"{published.name} cannot be fetched from {published.row.hub}"):
            client().snapshot_download(
                repository, revision=revision, allow_patterns=[f"{published.name}/*"], local_dir=part
            )
        try:
            read_card(part / published.name, published.row.sha256, published.name).check()
        except (WeightsError, FileNotFoundError) as error:
            raise WeightsError(f"{published.row.hub} does not hold what the row promises: {error}") from error
        if final.exists():
            shutil.rmtree(final)
        os.rename(part / published.name, final)
    finally:
        shutil.rmtree(part, ignore_errors=True)
    return final


def push(published: Published, repository: str) -> str:
    """Upload the folder to owner/repository, which is made if need be, and pin the row to the commit; returns
    "owner/repository@commit". Raises FileNotFoundError, WeightsError, ConnectionError."""
    folder = published.here()
    if folder is None:
        raise FileNotFoundError(f"the weights {published.name} are not on this machine: there is nothing to push")
    read_card(folder, published.row.sha256, published.name).check()
    api = client().HfApi()
    with told(f"{published.name} cannot be pushed to {repository}"):
        api.create_repo(repository, exist_ok=True)
        done = api.upload_folder(
            repo_id=repository, folder_path=folder, path_in_repo=published.name, commit_message=published.name
        )
    pinned = f"{repository}@{done.oid}"
    write_row(published.table, dataclasses.replace(published.row, hub=pinned))
    return pinned
