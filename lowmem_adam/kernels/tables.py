"""Fragments as tables on the device, by which the kernels of ``gpu.step`` find them.

What does not change from step to step is described once, in a ``Plan``; ``Plan.tables`` sends what does.
"""

from __future__ import annotations

import functools
import importlib
from array import array
from collections.abc import Sequence
from itertools import chain
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor

from lowmem_adam.codec import mix32
from lowmem_adam.kernels import checks
from lowmem_adam.kernels.fragment import (
    AnyWork,
    Batch,
    CodedMoments,
    DeviceRates,
    DeviceSettings,
    DeviceStep,
    DeviceWork,
    Fragment,
    StepScalars,
    Work,
)
from lowmem_adam.kernels.records import pack
from lowmem_adam.layout import BLOCK_SIZE

_ALIGNMENT = 16
"""Bytes of one load."""


@functools.cache
def step_code() -> Any:
    """The module of the step's kernel, imported when it is needed: it imports Triton."""
    return importlib.import_module("lowmem_adam.kernels.gpu.step")


@functools.cache
def record_code() -> Any:
    """That of the records' kernels, likewise."""
    return importlib.import_module("lowmem_adam.kernels.gpu.records")


@functools.cache
def weight_code() -> Any:
    """That of parameters and what is kept beside them, likewise."""
    return importlib.import_module("lowmem_adam.kernels.gpu.weights")


def capturing() -> bool:
    """Whether this is inside of a CUDA graph capture."""
    return torch.cuda.is_available() and torch.cuda.is_current_stream_capturing()


# ---------------------------------------------------------------- what does not change


class Kind(NamedTuple):
    """What a kernel is compiled for, in the order of its arguments; numbers are those of the device code."""

    param: int
    grad: int
    master: int
    coded: bool
    layout: int
    blocks: int
    decays_gradient: bool
    stochastic: bool
    skip_nonfinite: bool
    wide: bool


class _Row(NamedTuple):
    """A row of the table of fragments: a fragment, or the last block of one."""

    kind: Kind
    place: int
    """The fragment's, in the work."""
    words: list[int]
    grad_offset: int
    """Bytes from where the fragment's gradient begins."""


class _Seen(NamedTuple):
    """What of a gradient and of hyperparameters decides how a fragment is described."""

    grad: torch.dtype
    strides: tuple[int, ...] | None
    """None where it lies in one run."""
    aligned: bool
    decays_gradient: bool
    stochastic: bool
    skip_nonfinite: bool
    wide: bool
    settings: DeviceSettings | None
    counter: int
    """Where the device counts its steps; 0 where it does not."""


def _seen(grad: Tensor, scalars: StepScalars | DeviceStep) -> _Seen:
    strides = None if grad.is_contiguous() else grad.stride()
    layout = (grad.dtype, strides, grad.data_ptr() % _ALIGNMENT == 0)
    if isinstance(scalars, StepScalars):
        s = scalars
        return _Seen(*layout, s.weight_decay != 0.0, s.stochastic, s.skip_nonfinite, s.wide, None, 0)
    settings = scalars.settings
    flags = (settings.l2_decay != 0.0, settings.stochastic, settings.skip_nonfinite, settings.wide)
    return _Seen(*layout, *flags, settings, scalars.step.data_ptr())


def _key_of(fragment: Fragment) -> object | None:
    """What is the same only where the fragment's cache is."""
    return None if fragment.cache is None else fragment.cache.setdefault("key", _Key())


class _Key:
    """Nothing but itself."""


class Plan:
    """Tables for some fragments on a device.

    Args:
        work: what they are of; they hold for all that looks the same.
        device: of all fragments.
    """

    def __init__(self, work: Sequence[AnyWork], device: torch.device) -> None:
        # Not the caches themselves, which hold this plan and views of parameters and state.
        self._keys = [_key_of(fragment) for fragment, _ in work]
        self._seen = [_seen(fragment.grad, scalars) for fragment, scalars in work]
        self._aligned = [seen.aligned for seen in self._seen]
        self._device = device
        self.left_over: list[int] = []
        """Places in the work of fragments that kernels cannot walk, for the reference to step."""
        rows: list[_Row] = []
        for place, ((fragment, _), seen) in enumerate(zip(work, self._seen, strict=True)):
            described = _described(fragment, seen, place, device)
            if described is None:
                self.left_over.append(place)
            else:
                rows += described
        rows.sort(key=lambda row: row.kind)
        self._gradients = [(row.place, row.grad_offset) for row in rows]
        self.launches = self._numbered(rows)
        """Kinds, and for every program of each the row that it steps, int32."""
        words = [word for row in rows for word in row.words]
        self.fragments = _placed(torch.tensor(words, dtype=torch.int64), device)
        """int64, flat, ``FRAGMENT_WORDS`` a row."""
        self._recipes = _Recipes(cast("Sequence[DeviceWork]", work), device) if self._counts() else None

    def _counts(self) -> bool:
        counting = [seen.counter != 0 for seen in self._seen]
        assert all(counting) or not any(counting)
        assert not (counting[0] and self.left_over), "check_walkable was not asked"
        return counting[0]

    def _numbered(self, rows: Sequence[_Row]) -> list[tuple[Kind, Tensor]]:
        code = step_code()
        launches = []
        for kind in dict.fromkeys(row.kind for row in rows):
            own = [(index, row.words) for index, row in enumerate(rows) if row.kind == kind]
            repeats: list[int] = []
            total = 0
            for _, words in own:
                words[code.FIRST_PROGRAM] = total
                repeats.append(-(-words[code.COUNT] // kind.blocks))
                total += repeats[-1]
            programs = torch.tensor([index for index, _ in own], dtype=torch.int32).repeat_interleave(
                torch.tensor(repeats)
            )
            launches.append((kind, _placed(programs, self._device)))
        return launches

    def fits(self, work: Sequence[AnyWork]) -> bool:
        """Whether it describes these fragments."""
        if len(work) != len(self._seen) or (self._recipes is not None and not self._recipes.fit(work)):
            return False
        for (fragment, scalars), key, seen in zip(work, self._keys, self._seen, strict=True):
            if key is None or _key_of(fragment) is not key or _seen(fragment.grad, scalars) != seen:
                return False
        return True

    def fits_batch(self, batch: Batch) -> bool:
        """Whether it describes another batch of its kind: all but addresses is as it was."""
        return [address % _ALIGNMENT == 0 for address in batch.addresses] == self._aligned

    # ------------------------------------------------------------ what changes

    def tables(self, work: Sequence[AnyWork]) -> tuple[Tensor, Tensor, Tensor]:
        """A counter that is zero, the table of gradients, and records; all on the device."""
        if isinstance(work, Batch):
            held = b"".join([pack(scalars) + _LIVE for scalars in work.records])
            return _sent(
                [(work.addresses[place] + offset, work.rows[place]) for place, offset in self._gradients],
                held,
                self._device,
            )
        addresses = [fragment.grad.data_ptr() for fragment, _ in work]
        gradients = [(addresses[place] + offset, place) for place, offset in self._gradients]
        if self._recipes is None:
            index_of: dict[int, int] = {}
            packed = bytearray()
            for _, scalars in cast("Sequence[Work]", work):
                if id(scalars) not in index_of:
                    index_of[id(scalars)] = len(index_of)
                    packed += pack(scalars) + _LIVE
            gradients = [(address, index_of[id(work[place][1])]) for address, place in gradients]
            return _sent(gradients, bytes(packed), self._device)
        records = self._recipes.followed([scalars.rates for _, scalars in cast("Sequence[DeviceWork]", work)])
        if not capturing():
            return (*_sent(gradients, b"", self._device)[:2], records)
        return torch.zeros((), dtype=torch.int64, device=self._device), _written(gradients, self._device), records


_LIVE = (1).to_bytes(4, "little") + bytes(4)
"""What follows a packed record: that the step is to be taken, and what fills it up."""


def _sent(gradients: Sequence[tuple[int, int]], records: bytes, device: torch.device) -> tuple[Tensor, Tensor, Tensor]:
    """A counter, the table of gradients and records, in one copy to the device."""
    rows = array("q", chain.from_iterable(gradients)).tobytes()
    content = bytearray(_ALIGNMENT) + records + rows
    held = _placed(torch.frombuffer(content, dtype=torch.uint8), device)
    first, middle = _ALIGNMENT, _ALIGNMENT + len(records)
    return held[:8].view(torch.int64)[0], held[middle:].view(torch.int64), held[first:middle].view(torch.float32)


def _placed(tensor: Tensor, device: torch.device) -> Tensor:
    """A tensor of the host on the device, without waiting for it."""
    # Pinned memory is not given to others before the copy has been made.
    return tensor.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else tensor


def _written(gradients: Sequence[tuple[int, int]], device: torch.device) -> Tensor:
    """The table of gradients, from the arguments of kernels."""
    code = record_code()
    table = torch.empty(2 * len(gradients), dtype=torch.int64, device=device)
    rows = [(row, address, place) for row, (address, place) in enumerate(gradients)]
    for first in range(0, len(rows), code.ROWS_AT_ONCE):
        some = rows[first : first + code.ROWS_AT_ONCE]
        some += some[-1:] * (code.ROWS_AT_ONCE - len(some))
        code.address_kernel[(1,)](table, *(tuple(map(_odd_and_large, numbers)) for numbers in zip(*some, strict=True)))
    return table


def _odd_and_large(number: int) -> int:
    return (1 << 60) + 2 * number + 1


class _Recipes:
    """What records are made of where the device counts the steps."""

    def __init__(self, work: Sequence[DeviceWork], device: torch.device) -> None:
        row_of: dict[int, int] = {}
        recipes: list[float] = []
        places: list[int] = []
        self._groups: list[int] = []
        """Of every fragment: its row of rates."""
        for _, (step, settings, rates, _) in work:
            row = row_of.setdefault(id(rates), len(row_of))
            decoupled = settings.weight_decay if settings.decoupled else 0.0
            sign = -1.0 if settings.maximize else 1.0
            recipes += [*settings.betas, settings.eps, settings.l2_decay, decoupled, sign]
            places += [step.data_ptr(), row, mix32(settings.seed)]
            self._groups.append(row)
        self._recipes = _placed(torch.tensor(recipes, dtype=torch.float64), device)
        self._places = _placed(torch.tensor(places, dtype=torch.int64), device)
        self._rates = torch.zeros(len(row_of), len(DeviceRates._fields), dtype=torch.float64, device=device)
        self._written: dict[tuple[int, int], float] = {}

    def fit(self, work: Sequence[AnyWork]) -> bool:
        """Whether fragments belong together in the same groups."""
        rates: dict[int, DeviceRates] = {}
        for (_, scalars), row in zip(work, self._groups, strict=True):
            if not isinstance(scalars, DeviceStep) or rates.setdefault(row, scalars.rates) is not scalars.rates:
                return False
        return len(set(map(id, rates.values()))) == len(rates)

    def followed(self, rates: Sequence[DeviceRates]) -> Tensor:
        """Count a step, and make its records."""
        table, written = self._rates, self._written
        if capturing():  # a graph has its own, which a replay writes anew
            table, written = torch.empty_like(table), {}
        for row, values in dict(zip(self._groups, rates, strict=True)).items():
            for col, value in enumerate(values):
                if isinstance(value, Tensor):
                    written.pop((row, col), None)
                    table[row, col].copy_(value.detach().reshape(()), non_blocking=value.is_cuda)
                elif written.get((row, col)) != value:
                    written[row, col] = value
                    table[row, col].fill_(value)
        records = torch.zeros(len(self._groups) * step_code().RECORD_WORDS, device=table.device)
        record_code().record_kernel[(len(self._groups),)](
            self._recipes,
            self._places,
            table,
            records,
            records.view(torch.int32),
            num_warps=1,
            enable_fp_fusion=False,
        )
        return records


# ---------------------------------------------------------------- fragments as rows


def _described(fragment: Fragment, seen: _Seen, place: int, device: torch.device) -> list[_Row] | None:
    """The rows of a fragment; None where kernels cannot walk it."""
    checks.check(fragment, device)
    param, grad, layout = fragment.param, fragment.grad, fragment.layout
    origin = layout.block_start(fragment.first_block)
    numel = layout.block_start(fragment.end_block) - origin
    accepted = (param.dtype, torch.float32)
    if grad.dtype not in accepted or grad.numel() != numel or grad.device != device:
        raise ValueError(
            f"gradient of dtype {grad.dtype} has {grad.numel()} elements on {grad.device}; "
            f"accepted: {param.dtype} or torch.float32, {numel}, {device}"
        )
    if numel == 0:
        return []
    code = step_code()
    span = (fragment.first_block, fragment.end_block)
    in_one_run = param.is_contiguous() and seen.strides is None
    if param.is_neg() or layout.block_size != BLOCK_SIZE:
        return None
    if not in_one_run:
        both = [checks.merged_dimensions(tensor) for tensor in (param, grad)]
        if max(map(len, both)) > code.MAX_DIMS:
            return None
        dims = [number for merged in both for number in _innermost_first(merged, code.MAX_DIMS)]
        return [_row(fragment, seen, place, span, code.STRIDED.value, dims)]

    dims = [0] * (4 * code.MAX_DIMS)
    if not (_is_aligned(fragment) and seen.aligned):
        return [_row(fragment, seen, place, span, code.ANY.value, dims)]
    if layout.cols % BLOCK_SIZE == 0:
        return [_row(fragment, seen, place, span, code.WHOLE.value, dims)]
    if layout.rows == 1:  # all but the last block, which the row's end may cut
        cut = min(fragment.end_block, layout.cols // BLOCK_SIZE)
        spans = {(fragment.first_block, cut): code.WHOLE.value, (cut, fragment.end_block): code.ANY.value}
        return [_row(fragment, seen, place, part, how, dims) for part, how in spans.items() if part[0] < part[1]]
    how = code.ALIGNED.value if layout.cols % _ALIGNMENT == 0 else code.ANY.value
    return [_row(fragment, seen, place, span, how, dims)]


def _is_aligned(fragment: Fragment) -> bool:
    """Whether all that is loaded by elements lies at multiples of a load."""
    held = fragment.moments[:2]
    tensors = (fragment.param, *held, *(() if fragment.master is None else (fragment.master,)))
    return all(tensor.data_ptr() % _ALIGNMENT == 0 for tensor in tensors)


def _innermost_first(merged: Sequence[tuple[int, int]], most: int) -> list[int]:
    """Sizes and strides, filled up by dimensions of one element."""
    filled = [*reversed(merged), *[(1, 0)] * (most - len(merged))]
    return [number for dimension in filled for number in dimension]


def _row(fragment: Fragment, seen: _Seen, place: int, span: tuple[int, int], how: int, dims: Sequence[int]) -> _Row:
    layout, moments, master = fragment.layout, fragment.moments, fragment.master
    start = layout.block_start(span[0])
    elements, blocks = start - layout.block_start(fragment.first_block), span[0] - fragment.first_block
    coded = isinstance(moments, CodedMoments)
    by_element = (fragment.param, *moments[:2])
    addresses = [tensor.data_ptr() + elements * tensor.element_size() for tensor in by_element]
    addresses += [tensor.data_ptr() + blocks for tensor in moments[2:]] if coded else [0, 0]
    addresses += [0 if master is None else master.data_ptr() + elements * master.element_size()]
    of_blocks = [layout.cols, layout.blocks_per_row, span[0], span[1] - span[0], start, 0]
    kinds = weight_code()
    kind = Kind(
        kinds.DTYPES[fragment.param.dtype],
        kinds.DTYPES[seen.grad],
        kinds.MASTERS[None if master is None else master.dtype],
        coded,
        how,
        step_code().BLOCKS[how],
        seen.decays_gradient,
        seen.stochastic and master is None and fragment.param.dtype != torch.float32,
        seen.skip_nonfinite,
        seen.wide and coded,
    )
    return _Row(kind, place, [*addresses, *of_blocks, *dims], elements * seen.grad.itemsize)
