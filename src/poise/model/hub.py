"""A model named by its id on the Hugging Face hub: found in the ordinary cache, else fetched into it.

Only safetensors, JSON and tokenizer files at the top of the repository are fetched: never pickles, nor the second copies of
the weights that some repositories keep in folders. A snapshot in the cache is used as it is, without asking the network.
"""

from __future__ import annotations

import logging
import re
from pathlib import Path

from huggingface_hub import snapshot_download
from huggingface_hub.errors import GatedRepoError, HFValidationError, LocalEntryNotFoundError, RepositoryNotFoundError

from poise.errors import CheckpointError
from poise.model.checkpoint import Checkpoint, open_checkpoint

logger = logging.getLogger(__name__)

FILES = ("*.safetensors", "*.json", "*.jinja", "*.txt", "tokenizer.model")
FOLDERS = ("*/*",)
_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")


def find_model(model: str | Path) -> Path:
    """The directory of a model given as a path or as a hub id such as ``"Qwen/Qwen3-30B-A3B"``.

    Raises CheckpointError when it is neither a directory nor in the cache and cannot be fetched. What is found may still be
    damaged: ``open_checkpoint`` says so.
    """
    if not isinstance(model, (str, Path)) or model == "":
        raise CheckpointError(
            f"model {model!r} names nothing; give a folder with config.json and *.safetensors, or a hub id"
        )
    path = Path(model)
    if path.exists() or not isinstance(model, str) or not _HUB_ID.fullmatch(model):
        return path
    cached = _cached(model)
    if cached is not None and _is_whole(cached):
        return cached
    try:
        return _snapshot(model, local_files_only=False)
    except LocalEntryNotFoundError:
        if cached is not None:
            return cached
        reason = "the hub is out of reach"
    except GatedRepoError:
        reason = "the hub asks you to accept its terms first (then: hf auth login)"
    except RepositoryNotFoundError:
        reason = "the hub shows you no model of that name (a private one needs: hf auth login)"
    except Exception as error:  # noqa: BLE001 - the hub's client lets errors of its HTTP library through
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
    raise CheckpointError(
        f"{model} is no directory and not in the Hugging Face cache, and {reason}; give a directory, or an id that "
        f"this command can fetch: hf download {model}"
    )


def find_checkpoint(model: str | Path) -> Checkpoint:
    """The checkpoint of a model given like that. Without torch: commands refuse what is no model before they load anything.

    Raises CheckpointError for what ``find_model`` does not find, and for a directory that is damaged.
    """
    return open_checkpoint(find_model(model))


def _snapshot(model: str, *, local_files_only: bool) -> Path:
    found = snapshot_download(
        model, local_files_only=local_files_only, allow_patterns=list(FILES), ignore_patterns=list(FOLDERS)
    )
    return Path(found)


def _cached(model: str) -> Path | None:
    """The snapshot in the cache, whole or not; None where there is none."""
    try:
        return _snapshot(model, local_files_only=True)
    except LocalEntryNotFoundError as error:
        partial = getattr(error, "snapshot_path", None)
        return Path(partial) if partial else None
    except HFValidationError:
        return None


def _is_whole(snapshot: Path) -> bool:
    try:
        open_checkpoint(snapshot)
    except CheckpointError as error:
        logger.warning("%s; asking the hub", error)
        return False
    return True
