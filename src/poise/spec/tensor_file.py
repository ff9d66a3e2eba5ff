"""Our own binary files: safetensors whose metadata says what they are, written whole, read strictly.

A format names every tensor (dtype and number of dimensions) and every metadata field. A file that lacks one, has one more, or
is of another kind or version is refused in one line. Rules about values are the caller's.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save

from poise.errors import TraceError
from poise.spec.whole_file import write_whole

Array = npt.NDArray[Any]

_NUMPY_DTYPE = {"I32": "int32", "F32": "float32"}


@dataclass(frozen=True, kw_only=True, slots=True)
class TensorFormat:
    """One kind of file. ``required`` and ``optional`` tensors: name to (dtype in safetensors' names, dimensions).

    ``fields``: the metadata's names and types; texts are kept as they are, the others as JSON. ``remedy`` ends a refusal.
    """

    kind: str
    version: int
    required: Mapping[str, tuple[str, int]]
    fields: Mapping[str, type]
    remedy: str
    optional: Mapping[str, tuple[str, int]] = field(default_factory=dict)

    def save(self, path: Path, tensors: Mapping[str, Array], fields: Mapping[str, object]) -> None:
        """Writes the file whole or not at all. Raises TraceError if it cannot be written."""
        assert set(fields) == set(self.fields), f"a {self.kind} has the fields {list(self.fields)}, not {list(fields)}"
        known = {**self.required, **self.optional}
        for name, array in tensors.items():
            code, dims = known[name]
            assert (array.dtype.name, array.ndim) == (_NUMPY_DTYPE[code], dims), (
                f"{name} is {array.dtype}, {array.shape}"
            )
        metadata = {"kind": self.kind, "version": str(self.version)}
        metadata |= {name: value if isinstance(value, str) else json.dumps(value) for name, value in fields.items()}
        try:
            write_whole(path, save({name: np.ascontiguousarray(array) for name, array in tensors.items()}, metadata))
        except OSError as error:
            raise TraceError(f"{path} cannot be written ({error.strerror}); name another file") from None

    def load(self, path: Path) -> tuple[dict[str, Array], dict[str, Any]]:
        """(tensors, fields). Raises TraceError for anything but a file of this kind and version."""
        try:
            with safe_open(path, framework="numpy") as file:
                fields = self._fields(file.metadata() or {}, path)
                self._check_tensors(file, path)
                return {name: file.get_tensor(name) for name in file.keys()}, fields  # noqa: SIM118 - no mapping
        except OSError as error:
            reason = error.strerror or str(error) or "no such file"
            raise TraceError(f"{self.kind} {path} cannot be read ({reason}); {self.remedy}") from None
        except SafetensorError as error:
            raise self.refusal(path, f"is damaged or no safetensors file ({error})") from None

    def refusal(self, path: Path, what: str) -> TraceError:
        """The error for a file that ``what`` is wrong with."""
        return TraceError(f"{self.kind} {path} {what}; {self.remedy}")

    def _fields(self, metadata: Mapping[str, str], path: Path) -> dict[str, Any]:
        left = dict(metadata)
        if left.pop("kind", None) != self.kind:
            raise self.refusal(path, f"is none: its metadata does not say kind {self.kind!r}")
        version = left.pop("version", None)
        if version != str(self.version):
            raise self.refusal(path, f"is of version {version}, and this Poise reads version {self.version}")
        fields = {}
        for name, wanted in self.fields.items():
            if name not in left:
                raise self.refusal(path, f"lacks the metadata field {name!r}")
            fields[name] = self._parsed(name, left.pop(name), wanted, path)
        if left:
            raise self.refusal(path, f"has unknown metadata: {', '.join(sorted(left))}")
        return fields

    def _parsed(self, name: str, text: str, wanted: type, path: Path) -> Any:
        if wanted is str:
            return text
        try:
            value = json.loads(text)
        except (ValueError, RecursionError):
            value = None
        is_whole = type(value) is int
        is_list = isinstance(value, list) and all(type(item) is int for item in value)
        if not (is_whole if wanted is int else is_list):
            raise self.refusal(path, f"has {name} {text[:40]!r}, not {'a whole number' if wanted is int else 'a list'}")
        return value

    def _check_tensors(self, file: Any, path: Path) -> None:
        names = set(file.keys())
        missing, unknown = set(self.required) - names, names - set(self.required) - set(self.optional)
        if missing or unknown:
            what = f"lacks {', '.join(sorted(missing))}" if missing else f"has unknown {', '.join(sorted(unknown))}"
            raise self.refusal(path, what)
        for name in names:
            code, dims = {**self.required, **self.optional}[name]
            stored = file.get_slice(name)
            if stored.get_dtype() != code or len(stored.get_shape()) != dims:
                raise self.refusal(
                    path,
                    f"has {name} as {stored.get_dtype()} {stored.get_shape()}, not {code} of {dims} dimensions",
                )
