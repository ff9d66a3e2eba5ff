"""Which model a checkpoint is, in a word: for files recorded from one model that must not be used with another."""

from __future__ import annotations

import hashlib
import json

from poise.errors import CheckpointError
from poise.model.checkpoint import Checkpoint

_PASSING_KEYS = frozenset({"_name_or_path", "transformers_version", "dtype", "torch_dtype", "use_cache"})
"""What a configuration says that is not about the model."""


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
            try:
                with tensor.file.open("rb") as file:
                    file.seek(tensor.offset)
                    digest.update(file.read(tensor.nbytes))
            except OSError as error:
                raise CheckpointError(f"{tensor.file} cannot be read ({error.strerror}); fetch it again") from None
    return digest.hexdigest()[:32]
