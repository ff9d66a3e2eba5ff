"""From token ids to text while they come: incremental decoding, stop strings, and what may be shown already."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from tokenizers.decoders import DecodeStream


class TextStream:
    """The text of one growing sequence. ``push`` returns what can be shown: never a part of a stop string or of a character.

    Without a tokenizer the text stays empty.
    """

    def __init__(self, tokenizer: Any, stop: Sequence[str]) -> None:
        self._tokenizer = tokenizer
        self._stop = stop
        self._stream = DecodeStream(skip_special_tokens=True) if tokenizer is not None else None
        self._text = ""
        self._shown = 0
        self.stopped = False

    @property
    def text(self) -> str:
        """All text so far, cut before the first stop string."""
        return self._text

    def push(self, token: int) -> str:
        """Adds a token; sets ``stopped`` when a stop string is complete."""
        if self._stream is None:
            return ""
        piece = self._stream.step(self._tokenizer.backend_tokenizer, token) or ""
        before = len(self._text)
        self._text += piece
        found = [self._text.find(stop, max(0, before - len(stop) + 1)) for stop in self._stop]
        ends = [place for place in found if place >= 0]
        if ends:
            self._text = self._text[: min(ends)]
            self.stopped = True
        return self._show(len(self._text) if self.stopped else len(self._text) - self._held_back())

    def finish(self, token_ids: Sequence[int]) -> str:
        """The rest of the text when the sequence has ended: held-back characters, and bytes that never became one."""
        if self._tokenizer is not None and not self.stopped:
            whole = self._tokenizer.decode(list(token_ids), skip_special_tokens=True)
            if whole.startswith(self._text):
                self._text = whole
        return self._show(len(self._text))

    def _held_back(self) -> int:
        """Length of the longest end of the text that begins a stop string."""
        longest = max((len(stop) for stop in self._stop), default=1) - 1
        return next(
            (
                size
                for size in range(min(longest, len(self._text)), 0, -1)
                if any(s.startswith(self._text[-size:]) for s in self._stop)
            ),
            0,
        )

    def _show(self, end: int) -> str:
        piece = self._text[self._shown : max(end, self._shown)]
        self._shown += len(piece)
        return piece
