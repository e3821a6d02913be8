"""Memory that is a file: where tensors are put together that are more than should lie in memory at a time."""

from __future__ import annotations

import mmap
import os
import tempfile
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor

ARENA = 1 << 26
"""Bytes of the file that are mapped at a time, at least."""
ALIGNMENT = 64
"""Of a tensor's first byte."""


class Spool:
    """Tensors in a file without a name: it is gone with the last of them, however the process ends.

    The system writes their pages out and reads them again as it needs memory for others. ``torch.save`` wants all
    tensors at once, so what is made one after the other waits here.

    Args:
        folder: where there is room for them.

    Raises:
        OSError: no file can be made there.
    """

    def __init__(self, folder: Path) -> None:
        self._file = tempfile.TemporaryFile(dir=folder)  # noqa: SIM115 (closed by __exit__)
        self._size = 0
        self._arena: mmap.mmap | None = None
        self._used = 0

    def __enter__(self) -> Spool:
        return self

    def __exit__(self, *_: object) -> None:
        """No more tensors; those there are stay."""
        self._arena = None
        self._file.close()

    def empty(self, shape: Sequence[int], dtype: torch.dtype) -> Tensor:
        """A contiguous tensor of zeros with a storage of its own.

        Raises:
            OSError: there is no room for it.
        """
        count = torch.Size(shape).numel()
        if count == 0:
            return torch.empty(tuple(shape), dtype=dtype)
        nbytes = count * dtype.itemsize
        if self._arena is None or self._used + nbytes > len(self._arena):
            if self._arena is not None and hasattr(mmap, "MADV_DONTNEED"):
                self._arena.madvise(mmap.MADV_DONTNEED)  # what is written stays in the file
            self._arena, self._used = self._mapped(max(ARENA, nbytes)), 0
        flat = torch.frombuffer(self._arena, dtype=dtype, count=count, offset=self._used)
        self._used += -(-nbytes // ALIGNMENT) * ALIGNMENT
        return flat.view(tuple(shape))

    def put(self, tensor: Tensor) -> Tensor:
        """A contiguous copy; of a scalar the scalar."""
        return tensor if tensor.ndim == 0 else self.empty(tensor.shape, tensor.dtype).copy_(tensor)

    def _mapped(self, nbytes: int) -> mmap.mmap:
        """The next bytes of the file, which are really there: a write to others would end the process."""
        granted = -(-nbytes // mmap.ALLOCATIONGRANULARITY) * mmap.ALLOCATIONGRANULARITY
        if hasattr(os, "posix_fallocate"):
            os.posix_fallocate(self._file.fileno(), self._size, granted)
        else:  # macOS, Windows
            self._file.seek(self._size)
            zeros = bytes(1 << 20)
            for _ in range(0, granted, len(zeros)):
                self._file.write(zeros[:granted])
            self._file.flush()
        start, self._size = self._size, self._size + granted
        return mmap.mmap(self._file.fileno(), granted, offset=start)
