"""What lies beside the weights: the tokenizer and the ids that end a sequence, as transformers reads them."""

from __future__ import annotations

from typing import Any

from transformers import AutoTokenizer, GenerationConfig

from poise.errors import CheckpointError
from poise.model.checkpoint import Checkpoint

_TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json", "tokenizer.model")


def load_tokenizer(checkpoint: Checkpoint) -> Any:
    """The checkpoint's tokenizer, or None where it has none (token ids still work). Raises CheckpointError."""
    if not any((checkpoint.path / name).exists() for name in _TOKENIZER_FILES):
        return None
    try:
        return AutoTokenizer.from_pretrained(checkpoint.path, local_files_only=True)
    except Exception as error:  # noqa: BLE001 - the tokenizers library raises Exception itself
        raise CheckpointError(
            f"the tokenizer in {checkpoint.path} cannot be read ({_first_line(error)}); fetch tokenizer.json again, or take "
            "it away and give prompt_token_ids"
        ) from None


def end_tokens(checkpoint: Checkpoint, config: Any) -> frozenset[int]:
    """End-of-sequence ids from generation_config.json, else config.json. Raises CheckpointError for what is no token id."""
    file = checkpoint.path / "config.json"
    ids = config.get_text_config().eos_token_id
    generation_file = checkpoint.path / "generation_config.json"
    if generation_file.exists():
        try:
            own = GenerationConfig.from_pretrained(checkpoint.path, local_files_only=True).eos_token_id
        except (OSError, ValueError, TypeError, AttributeError) as error:
            raise CheckpointError(f"{generation_file} cannot be read ({_first_line(error)}); fetch it again") from None
        if own is not None and own != []:
            file, ids = generation_file, own
    listed = ids if isinstance(ids, list) else [] if ids is None else [ids]
    if not all(type(token) is int for token in listed):
        raise CheckpointError(
            f"{file} has eos_token_id {ids!r}; it must be a token id, or a list of them: fetch it again"
        )
    return frozenset(listed)


def _first_line(error: Exception) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0]
