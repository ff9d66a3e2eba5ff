"""One stretch of memory on huge pages, cut into equal slots; pages are taken when first touched and can be given back.

``O_DIRECT`` reads into 2 MiB pages run two to three times as fast as into 4 KiB pages (facts of the design notes). The
arena owns the memory; tensors made by ``bytes_of`` share it and keep it alive.
"""

from __future__ import annotations

import ctypes
import mmap

import torch

from poise.model.read_plan import ALIGNMENT

HUGE_PAGE = 2 << 20


class Arena:
    """``num_slots`` slots of ``slot_bytes`` bytes each (rounded up to the alignment)."""

    def __init__(self, num_slots: int, slot_bytes: int) -> None:
        assert num_slots > 0, "an arena needs a slot"
        assert slot_bytes > 0, "a slot needs bytes"
        self.slot_bytes = -(-slot_bytes // ALIGNMENT) * ALIGNMENT
        self.num_slots = num_slots
        self._map = mmap.mmap(-1, num_slots * self.slot_bytes + HUGE_PAGE, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
        if hasattr(mmap, "MADV_HUGEPAGE"):
            self._map.madvise(mmap.MADV_HUGEPAGE)
        address = ctypes.addressof(ctypes.c_char.from_buffer(self._map))
        self._begin = -address % HUGE_PAGE
        self._view = memoryview(self._map)
        whole = torch.frombuffer(self._map, dtype=torch.uint8)
        self._bytes = whole[self._begin : self._begin + num_slots * self.slot_bytes]

    def view_of(self, slot: int, offset: int, nbytes: int) -> memoryview:
        """Writable memory of a slot, for reads."""
        assert offset + nbytes <= self.slot_bytes, "a read reaches past its slot"
        begin = self._begin + slot * self.slot_bytes + offset
        return self._view[begin : begin + nbytes]

    def bytes_of(self, slot: int, offset: int, nbytes: int) -> torch.Tensor:
        """The same memory as a uint8 tensor, shape (nbytes,)."""
        begin = slot * self.slot_bytes + offset
        return self._bytes[begin : begin + nbytes]

    def give_back_behind(self, slot: int) -> None:
        """Returns the memory of ``slot`` and of all behind it to the system; their content is lost."""
        begin = -(-(self._begin + slot * self.slot_bytes) // mmap.PAGESIZE) * mmap.PAGESIZE
        self._map.madvise(mmap.MADV_DONTNEED, begin, len(self._map) - begin)
