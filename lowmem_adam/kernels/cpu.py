"""The native step: one call into a C library (``lowmem_adam/native``) for all fragments.

The library knows nothing of torch, so this module is where dtypes, devices, contiguity and sizes are checked; the
library checks once more what it can see. It is looked for beside this package, or where ``LOWMEM_ADAM_LIBRARY`` says
(``none``: nowhere). ``LOWMEM_ADAM_ISA`` pins an instruction set: scalar, avx2, avx512, neon.
"""

from __future__ import annotations

import ctypes
import functools
import os
import struct
import sys
from array import array
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from lowmem_adam.codec import FORMAT
from lowmem_adam.dynamic_map import dynamic_map
from lowmem_adam.kernels import reference
from lowmem_adam.kernels.checks import check, merged_dimensions
from lowmem_adam.kernels.fragment import Batch, CodedMoments, DynamicMoments, Fragment, Work
from lowmem_adam.kernels.records import RECORD, pack

ABI_VERSION = 4
MAX_DIMS = 8
ISAS = ("scalar", "avx2", "avx512", "neon")
"""Instruction sets by the numbers that the library has for them."""

_BEST = -1
_CPU = torch.device("cpu")
_DTYPES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}
_MASTER_KINDS = {torch.float32: 1, torch.int16: 2, torch.int8: 3}
_FORKED = 6
_STATUS = {1: "dtypes", 2: "layout", 3: "a null pointer", 4: "instruction set", 5: "number of threads"}

# Twice data, shape, dtype, dims; then exp_avg, exp_avg_sq, block_floor, block_span, absmax1, absmax2; master and its
# kind; rows, cols, block_size, first_block, end_block, index of the scalars: struct lowmem_adam_fragment.
_FRAGMENT = struct.Struct("QQii QQii QQQQQQ Qq qqqqqq")
_GRAD_WORD = 3
"""Which of a fragment's 8-byte words is its gradient's address."""


class LibraryError(RuntimeError):
    """The native library is not there, cannot be loaded, or is not the one that belongs to this package."""


class _Format(ctypes.Structure):
    """``struct lowmem_adam_format``."""

    _fields_ = (
        *((name, ctypes.c_int32) for name in ("fragment_bytes", "scalars_bytes", "version", "block_size")),
        *((name, ctypes.c_int32) for name in ("root_intervals", "max_octaves", "octave_bits", "ratio_scale")),
        *((name, ctypes.c_int32) for name in ("ratio_limit", "ratio_always_dithered")),
        ("ratio_thresholds", ctypes.c_float * 7),
        ("reciprocal_first", ctypes.c_float),
        ("reciprocal_second", ctypes.c_float),
        ("reciprocal_seed", ctypes.c_uint32),
        ("hash_fold", ctypes.c_uint32),
        ("hash_multipliers", ctypes.c_uint32 * 2),
        *((name, ctypes.c_uint32) for name in ("moment_step", "moment_lane", "update_step", "update_lane")),
        ("update_key", ctypes.c_uint32),
    )


@dataclass(frozen=True, slots=True)
class Library:
    """The loaded library and the instruction set that its steps take."""

    handle: ctypes.CDLL
    path: Path
    isa: int

    def has_isa(self, name: str) -> bool:
        """Whether it was built with an instruction set that this processor has."""
        return bool(self.handle.lowmem_adam_has_isa(ISAS.index(name)))

    @property
    def isa_name(self) -> str:
        """The instruction set in use."""
        return ISAS[self.handle.lowmem_adam_best_isa() if self.isa == _BEST else self.isa]

    @property
    def openmp(self) -> str | None:
        """The file of the OpenMP library whose threads are used; None where the library was built without."""
        path = self.handle.lowmem_adam_openmp_library()
        return None if path is None else os.fsdecode(path) or "unknown"


@functools.cache
def load() -> Library:
    """The native library, loaded once.

    Raises:
        LibraryError: says where it was looked for and what is wrong.
    """
    path = _library_path()
    try:
        # After torch, whose OpenMP library this one then shares: two in one process would compete for the cores.
        handle = ctypes.CDLL(str(path))
    except OSError as error:
        raise LibraryError(f"the native library cannot be loaded: {error}") from error
    library = Library(_declared(handle, path), path, _pinned_isa())
    if library.isa != _BEST and not library.has_isa(ISAS[library.isa]):
        accepted = ", ".join(name for name in ISAS if library.has_isa(name))
        raise LibraryError(f"LOWMEM_ADAM_ISA is {ISAS[library.isa]!r}; accepted on this machine: {accepted}")
    return library


def _library_path() -> Path:
    given = os.environ.get("LOWMEM_ADAM_LIBRARY", "")
    if given == "none":
        raise LibraryError("the native library is switched off by LOWMEM_ADAM_LIBRARY=none")
    if given:
        path = Path(given)
    else:
        suffix = ".dylib" if sys.platform == "darwin" else ".so"
        path = Path(__file__).resolve().parents[1] / "native" / f"liblowmem_adam{suffix}"
    if not path.is_file():
        raise LibraryError(f"there is no native library at {path}: it was not built when lowmem_adam was installed")
    return path


def _pinned_isa() -> int:
    given = os.environ.get("LOWMEM_ADAM_ISA", "")
    if given and given not in ISAS:
        raise LibraryError(f"LOWMEM_ADAM_ISA is {given!r}; accepted: {', '.join(ISAS)}")
    return ISAS.index(given) if given else _BEST


def _declared(handle: ctypes.CDLL, path: Path) -> ctypes.CDLL:
    """Declare the functions, once it is certain that they are those of this package."""
    try:
        version = handle.lowmem_adam_abi_version()
        if version != ABI_VERSION:
            raise LibraryError(f"{path} has interface version {version}; accepted: {ABI_VERSION} (build it anew)")
        handle.lowmem_adam_format.restype = _Format
        _check_format(handle.lowmem_adam_format(), path)
        handle.lowmem_adam_dynamic_map.restype = ctypes.POINTER(ctypes.c_float)
        _check_dynamic_maps(handle, path)
        handle.lowmem_adam_openmp_library.restype = ctypes.c_char_p
        handle.lowmem_adam_step.argtypes = (
            *(ctypes.c_void_p, ctypes.c_int64, ctypes.c_void_p, ctypes.c_int64, ctypes.c_int32, ctypes.c_int32),
            ctypes.POINTER(ctypes.c_int64),
        )
    except AttributeError as error:
        raise LibraryError(f"{path} is not a library of this package: {error}") from error
    return handle


def _check_format(compiled: _Format, path: Path) -> None:
    """The one description of the format is ``codec.FORMAT``: a library compiled from another one is refused."""
    expected: dict[str, object] = {"fragment_bytes": _FRAGMENT.size, "scalars_bytes": RECORD.size}
    for field in _Format._fields_:
        name = field[0]
        value = getattr(compiled, name)
        value = tuple(value) if isinstance(value, ctypes.Array) else value
        wanted = expected[name] if name in expected else getattr(FORMAT, name)
        if value != wanted:
            raise LibraryError(f"{path} was compiled with {name} = {value}; accepted: {wanted} (build it anew)")


def _check_dynamic_maps(handle: ctypes.CDLL, path: Path) -> None:
    """The one description of bitsandbytes' format is ``dynamic_map``."""
    for signed in (True, False):
        if handle.lowmem_adam_dynamic_map(int(signed))[:256] != dynamic_map(signed).tolist():
            raise LibraryError(f"{path} was compiled with other dynamic maps; accepted: dynamic_map's (build it anew)")


def describe() -> dict[str, str | int | None]:
    """What is in use: file, instruction set, threads, OpenMP library.

    Raises:
        LibraryError: there is no library.
    """
    library = load()
    return {
        "library": str(library.path),
        "isa": library.isa_name,
        "threads": torch.get_num_threads(),
        "openmp": library.openmp,
    }


def adam_step_(work: Sequence[Work], *, isa: str | None = None, num_threads: int | None = None) -> int:
    """One Adam step on many fragments, in place, as ``reference.adam_step_`` to the last bit.

    Args:
        work: fragments on the CPU and their hyperparameters.
        isa: an instruction set; None for the one that ``load`` chose.
        num_threads: None for ``torch.get_num_threads()``. The result does not depend on it.

    Returns:
        The number of blocks left as they were for a non-finite gradient.

    Raises:
        ValueError: a fragment of another device, dtype or size, or an instruction set that this machine lacks;
            nothing has changed.
        LibraryError: there is no library.
        RuntimeError: more than one thread in the child of a fork, where none of OpenMP's threads are.
    """
    library = load()
    number = library.isa if isa is None else _isa_number(library, isa)
    threads = torch.get_num_threads() if num_threads is None else num_threads
    packed = _packed(work)
    skipped = ctypes.c_int64()
    status = library.handle.lowmem_adam_step(
        packed.fragments, packed.count, packed.scalars, packed.scalars_count, threads, number, ctypes.byref(skipped)
    )
    if status == _FORKED:
        raise RuntimeError(
            f"step with {threads} threads in a forked child process, where OpenMP's threads do not exist; accepted: "
            "torch.set_num_threads(1) in the child, or the start method 'spawn' or 'forkserver'"
        )
    if status:
        raise RuntimeError(f"the native step refused its arguments: {_STATUS.get(status, status)}")
    left_over = (int(reference.adam_step_(fragment, scalars)) for fragment, scalars in packed.left_over)
    return skipped.value + sum(left_over)


def _isa_number(library: Library, isa: str) -> int:
    if isa not in ISAS or not library.has_isa(isa):
        accepted = ", ".join(name for name in ISAS if library.has_isa(name))
        raise ValueError(f"isa is {isa!r}; accepted on this machine: {accepted}")
    return ISAS.index(isa)


def _packed(work: Sequence[Work]) -> _Packed:
    """Of a batch that is there again, what was packed before, with other addresses and numbers."""
    if not isinstance(work, Batch):
        return _Packed(work)
    packed: _Packed | None = work.kept.get("cpu")
    if packed is not None:
        packed.renew(work)
        return packed
    packed = _Packed(work)
    if not packed.left_over:
        packed.drop_gradients()
        work.kept["cpu"] = packed
    return packed


class _Packed:
    """Fragments and hyperparameters as the library reads them.

    ``left_over`` holds what the library cannot walk, for the reference to step: more dimensions than it takes, and
    parameters that are negative views.
    """

    def __init__(self, work: Sequence[Work]) -> None:
        self.left_over: list[Work] = []
        self._kept: list[object] = []  # what the library is given addresses of
        self._gradients: list[Tensor] = []  # likewise
        fragments, records = bytearray(_FRAGMENT.size * len(work)), bytearray()
        index_of: dict[int, int] = {}
        offset = 0
        for item in work:
            fragment, scalars = item
            place = _place_of(fragment)
            # A view with the sign bit, such as the imaginary part of a conjugate, has other values than its memory.
            grad_tensor = fragment.grad.resolve_neg()
            grad = _Place(grad_tensor)
            if place.param.dims > MAX_DIMS or grad.dims > MAX_DIMS or fragment.param.is_neg():
                self.left_over.append(item)
                continue
            self._kept += (place, grad)
            self._gradients.append(grad_tensor)
            index = index_of.get(id(scalars))
            if index is None:
                index = index_of[id(scalars)] = len(index_of)
                records += pack(scalars)
            _FRAGMENT.pack_into(fragments, offset, *place.param.packed, *grad.packed, *place.rest, index)
            offset += _FRAGMENT.size
        self.count, self.scalars_count = offset // _FRAGMENT.size, len(index_of)
        self.fragments = (ctypes.c_char * len(fragments)).from_buffer(fragments)
        self.scalars = (ctypes.c_char * len(records)).from_buffer(records)
        self._words, self._records = fragments, records

    def drop_gradients(self) -> None:
        """Leave it to the caller to keep gradients as long as the library reads them."""
        self._gradients.clear()

    def renew(self, batch: Batch) -> None:
        """Take another batch of the same kind, of which nothing is left over."""
        words = memoryview(self._words).cast("B").cast("q")
        words[_GRAD_WORD :: _FRAGMENT.size // words.itemsize] = array("q", batch.addresses)
        self._records[:] = b"".join(map(pack, batch.records))


class _Place:
    """Where a tensor's elements lie: ``packed`` is a ``struct lowmem_adam_tensor``, ``shape`` what it points to."""

    __slots__ = ("dims", "packed", "shape")

    def __init__(self, tensor: Tensor) -> None:
        dtype = _DTYPES[tensor.dtype]
        if tensor.is_contiguous():
            self.dims = 0
            self.packed = (tensor.data_ptr(), 0, dtype, 0)
            return
        merged = merged_dimensions(tensor)
        sizes, strides = zip(*merged, strict=True)
        self.dims = len(merged)
        self.shape = (ctypes.c_int64 * (2 * len(merged)))(*sizes, *strides)
        self.packed = (tensor.data_ptr(), ctypes.addressof(self.shape), dtype, self.dims)


class _FragmentPlace:
    """What the library is told of a checked fragment, but for its gradient and hyperparameters."""

    __slots__ = ("numel", "param", "rest")

    def __init__(self, fragment: Fragment) -> None:
        check(fragment, _CPU)
        moments, layout = fragment.moments, fragment.layout
        self.numel = layout.block_start(fragment.end_block) - layout.block_start(fragment.first_block)
        self.param = _Place(fragment.param)
        first, second, *metadata = (tensor.data_ptr() for tensor in moments)
        of_rows = metadata if isinstance(moments, CodedMoments) else (0, 0)
        flat = metadata if isinstance(moments, DynamicMoments) else (0, 0)
        pointers = [first, second, *of_rows, *flat]
        master = fragment.master
        pointers += (0, 0) if master is None else (master.data_ptr(), _MASTER_KINDS[master.dtype])
        self.rest = (*pointers, layout.rows, layout.cols, layout.block_size, fragment.first_block, fragment.end_block)


def _place_of(fragment: Fragment) -> _FragmentPlace:
    """From the fragment's cache, if it has one; the gradient is checked each time."""
    cache = fragment.cache
    place: _FragmentPlace | None = None if cache is None else cache.get("cpu")
    if place is None:
        place = _FragmentPlace(fragment)
        if cache is not None:
            cache["cpu"] = place
    grad, dtype = fragment.grad, fragment.param.dtype
    if (grad.dtype is not dtype and grad.dtype is not torch.float32) or grad.numel() != place.numel or not grad.is_cpu:
        raise ValueError(
            f"gradient of dtype {grad.dtype} has {grad.numel()} elements on {grad.device}; "
            f"accepted: {dtype} or torch.float32, {place.numel}, cpu"
        )
    return place
