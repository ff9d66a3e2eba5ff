"""Which model a checkpoint is, in a word: for files recorded from one model that must not be used with another."""

from __future__ import annotations

import hashlib
import json
import re

from poise.errors import CheckpointError
from poise.model.checkpoint import Checkpoint, TensorRef

_PASSING_KEYS = frozenset({"_name_or_path", "transformers_version", "dtype", "torch_dtype", "use_cache"})
"""What a configuration says that is not about the model."""
SAMPLED = 64
_PIECE_BYTES = 4096
_NUMBER = re.compile(r"\d+")


def model_fingerprint(checkpoint: Checkpoint) -> str:
    """32 hexadecimal digits: of the configuration, names and shapes of all tensors, and the values of the vectors.

    Vectors (norms, biases) are a few kilobytes and differ wherever a model was trained further. Raises CheckpointError.
    """
    digest = hashlib.sha256()
    config = {key: value for key, value in checkpoint.config.items() if key not in _PASSING_KEYS}
    digest.update(json.dumps(config, sort_keys=True, default=str).encode())
    for name, tensor in sorted(checkpoint.tensors.items()):
        digest.update(f"{name} {tensor.dtype} {tensor.shape}\n".encode())
        if len(tensor.shape) == 1:
            digest.update(_read(tensor, tensor.nbytes))
    return digest.hexdigest()[:32]


def weights_fingerprint(checkpoint: Checkpoint) -> str:
    """32 hexadecimal digits: of what ``model_fingerprint`` takes, and of 4 KiB from the middle of up to ``SAMPLED`` matrices of
    each kind. For processes that must compute with the same weights: vectors stay as they are where only matrices were trained
    (a merged LoRA). Raises CheckpointError.
    """
    digest = hashlib.sha256(model_fingerprint(checkpoint).encode())
    kinds: dict[str, list[TensorRef]] = {}
    for name, tensor in sorted(checkpoint.tensors.items()):
        if len(tensor.shape) > 1:
            kinds.setdefault(_NUMBER.sub("#", name), []).append(tensor)
    for alike in kinds.values():
        for place in range(min(len(alike), SAMPLED)):
            tensor = alike[place * len(alike) // min(len(alike), SAMPLED)]
            nbytes = min(tensor.nbytes, _PIECE_BYTES)
            digest.update(_read(tensor, nbytes, (tensor.nbytes - nbytes) // 2))
    return digest.hexdigest()[:32]


def _read(tensor: TensorRef, nbytes: int, begin: int = 0) -> bytes:
    try:
        with tensor.file.open("rb") as file:
            file.seek(tensor.offset + begin)
            return file.read(nbytes)
    except OSError as error:
        raise CheckpointError(f"{tensor.file} cannot be read ({error.strerror}); fetch it again") from None
