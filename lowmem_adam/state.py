"""The state of one parameter: which tensors it has, how they begin, and as what a kernel sees them."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from lowmem_adam.kernels.fragment import CodedMoments, DynamicMoments, FullMoments, Moments
from lowmem_adam.kernels.rounding import CORRECTIONS
from lowmem_adam.layout import FLAT, Layout, is_coded
from lowmem_adam.local import Span, is_dtensor, like, local, place_of
from lowmem_adam.shard import read

CODED_KEYS = ("exp_avg_code", "exp_avg_sq_code", "block_floor", "block_span")
DYNAMIC_KEYS = ("state1", "state2", "absmax1", "absmax2")
"""Those of ``moments="bnb8bit"``, under bitsandbytes' names; its maps are constants and not kept."""
METADATA_KEYS = ("block_floor", "block_span", "absmax1", "absmax2")
"""Those with an entry a block; all others but ``step`` have one an element."""
FULL_KEYS = ("exp_avg", "exp_avg_sq")
MASTER_KEYS = {torch.float32: "master_weight", **dict.fromkeys(CORRECTIONS, "weight_correction")}
"""What is kept of a weight beside a 16-bit parameter, by its dtype: under which name."""


def keeps_codes(shape: Sequence[int], moments: str) -> bool:
    """Whether a parameter of this global shape keeps 8-bit codes in a group with this ``moments`` setting."""
    return moments != "32bit" and is_coded(shape, moments)


def master_dtype(dtype: torch.dtype, group: Mapping[str, Any]) -> torch.dtype | None:
    """As what is kept, beside a parameter of a dtype, what it cannot hold of its weight; None for nothing.

    Args:
        dtype: of the parameter.
        group: has the settings ``low_precision_update`` and ``master_bits``.
    """
    if dtype == torch.float32:
        return None
    if group["low_precision_update"] == "fp32":
        return torch.float32
    if group["low_precision_update"] == "split":
        return torch.int16 if group["master_bits"] == 32 else torch.int8
    return None


def master_of(state: Mapping[str, Any]) -> Tensor | None:
    """What a parameter's state keeps of its weight; None for nothing, or where it is no tensor that a step writes."""
    for dtype, key in MASTER_KEYS.items():
        value = state.get(key)
        if isinstance(value, Tensor) and value.dtype == dtype:
            return value
    return None


def entries(name: str, layout: Layout, span: Span) -> Span:
    """Which entries of a state tensor, flat, are of some blocks: an entry a block, or one an element."""
    return span if name in METADATA_KEYS else (layout.block_start(span[0]), layout.block_start(span[1]))


def holds_codes(state: Mapping[str, Any], shape: Sequence[int], moments: str) -> bool:
    """Whether the state that there is of a parameter is to be codes.

    With ``moments="bnb8bit"`` state itself decides, as in bitsandbytes, where an override may keep a large parameter in
    fp32 or a small one in 8 bits; otherwise, and of state that is neither, the parameter's shape.
    """
    if moments == FLAT and ("state1" in state) != ("exp_avg" in state):
        return "state1" in state
    return keeps_codes(shape, moments)


def expected_tensors(
    shape: Sequence[int],
    moments: str,
    span: Span | None = None,
    master: torch.dtype | None = None,
    coded: bool | None = None,
) -> dict[str, tuple[tuple[int, ...], torch.dtype]]:
    """Shape and dtype of every tensor in a parameter's state, ``step`` included; ``master`` as of ``master_dtype``.

    Codes have the parameter's shape; metadata ``(rows, blocks_per_row)``, so that both can be sharded along dim 0, or
    in flat blocks ``(n_blocks,)``, as bitsandbytes has it. Of a part of the parameter, told by its span, all are flat;
    of no block at all they are empty. ``coded`` is for state that ``holds_codes`` was asked about; None for new state.
    """
    layout = Layout.of(shape, moments)
    elements: tuple[int, ...] = tuple(shape)
    blocks: tuple[int, ...] = (layout.rows, layout.blocks_per_row) if moments != FLAT else (layout.n_blocks,)
    coded = keeps_codes(shape, moments) if coded is None else coded
    if span is not None and span != (0, layout.n_blocks):
        elements = (layout.block_start(span[1]) - layout.block_start(span[0]),)
        blocks = (span[1] - span[0],)
    tensors: dict[str, tuple[tuple[int, ...], torch.dtype]] = {"step": ((), torch.int64)}
    if coded and moments == FLAT:
        tensors |= {"state1": (elements, torch.uint8), "state2": (elements, torch.uint8)}
        tensors |= {"absmax1": (blocks, torch.float32), "absmax2": (blocks, torch.float32)}
    elif coded:
        tensors["exp_avg_code"] = (elements, torch.int8)
        tensors["exp_avg_sq_code"] = (elements, torch.uint8)
        tensors["block_floor"] = (blocks, torch.uint8)
        tensors["block_span"] = (blocks, torch.uint8)
    else:
        tensors["exp_avg"] = (elements, torch.float32)
        tensors["exp_avg_sq"] = (elements, torch.float32)
    if master is not None:
        tensors[MASTER_KEYS[master]] = (elements, master)
    return tensors


def home_of(param: Tensor, offload: str | None) -> torch.device:
    """Where a parameter's state lies: on its device, or on the host."""
    return torch.device("cpu") if offload == "cpu" else param.device


def new_state(
    param: Tensor,
    moments: str,
    span: Span | None = None,
    master: torch.dtype | None = None,
    home: torch.device | None = None,
) -> dict[str, Tensor]:
    """State before the first step: all moments zero, contiguous, at home; ``step`` on the CPU.

    Home is the parameter's device unless told otherwise.

    A master weight is the parameter, and so is a weight whose correction is zero. Of a DTensor all but ``step`` are
    DTensors placed like it.
    """
    span = None if is_dtensor(param) else span
    expected = expected_tensors(param.shape, moments, span, master)
    home = param.device if home is None else home
    layout = Layout.of(param.shape, moments)
    return {
        name: _new_tensor(name, param, shape, dtype, span, home, layout) for name, (shape, dtype) in expected.items()
    }


def refitted(
    state: Mapping[str, Tensor],
    param: Tensor,
    moments: str,
    span: Span,
    master: torch.dtype | None,
    home: torch.device,
) -> dict[str, Tensor]:
    """State where the setting of what is kept of the weight has changed: without that, and begun anew as it now is."""
    out = {name: value for name, value in state.items() if name not in MASTER_KEYS.values()}
    if master is not None:
        part = None if is_dtensor(param) else span
        name = MASTER_KEYS[master]
        shape, dtype = expected_tensors(param.shape, moments, part, master)[name]
        out[name] = _new_tensor(name, param, shape, dtype, part, home, Layout.of(param.shape, moments))
    return out


def state_bytes(param: Tensor, moments: str, span: Span, master: torch.dtype | None, held: Mapping[str, Tensor]) -> int:
    """What a parameter's state takes here, but for the tensors that it holds already."""
    coded = holds_codes(held, param.shape, moments)
    expected = expected_tensors(param.shape, moments, None if is_dtensor(param) else span, master, coded)
    return sum(
        math.prod(_shape_here(name, param, shape)) * dtype.itemsize
        for name, (shape, dtype) in expected.items()
        if name not in held or held[name].dtype != dtype
    )


def _new_tensor(
    name: str,
    param: Tensor,
    shape: tuple[int, ...],
    dtype: torch.dtype,
    span: Span | None,
    home: torch.device,
    layout: Layout,
) -> Tensor:
    if name == "step":
        return torch.zeros(shape, dtype=dtype)
    part = torch.zeros(_shape_here(name, param, shape), dtype=dtype, device=home)
    if name == MASTER_KEYS[torch.float32]:
        held = local(param)
        low, high = entries(name, layout, (0, layout.n_blocks) if span is None else span)
        part.view(-1).copy_(held.detach().reshape(-1) if is_dtensor(param) else read(held, low, high))
    return like(param, part, shape, by_block=name in METADATA_KEYS)


def _shape_here(name: str, param: Tensor, shape: tuple[int, ...]) -> tuple[int, ...]:
    """Shape of what lies here of a tensor of the state: of a DTensor's its part, an entry an element, or a block."""
    if name == "step" or not is_dtensor(param):
        return shape
    place = place_of(param)
    if name not in METADATA_KEYS:
        return place.shape
    if len(place.shape) < 2:
        return (1, place.span[1] - place.span[0])
    return (place.shape[0], Layout.of(place.shape).blocks_per_row)


def part_of(state: Mapping[str, Any], layout: Layout, span: Span) -> dict[str, Any]:
    """The state of some blocks, out of the state of a whole parameter: flat views, and ``step`` as it is.

    All blocks give the tensors as they are.
    """
    if span == (0, layout.n_blocks):
        return dict(state)
    return {
        key: value if key == "step" else value.reshape(-1)[slice(*entries(key, layout, span))]
        for key, value in state.items()
    }


def check_state(
    state: Mapping[str, Any],
    shape: Sequence[int],
    moments: str,
    label: str,
    span: Span | None = None,
    master: torch.dtype | None = None,
) -> None:
    """Check that a parameter's state has the tensors that its shape, its group's settings and its span call for.

    Raises:
        ValueError: names ``label``, what is there and what is accepted.
    """
    for fault in state_faults(state, shape, moments, label, span, master):
        raise ValueError(fault)


def state_faults(
    state: Mapping[str, Any],
    shape: Sequence[int],
    moments: str,
    label: str,
    span: Span | None = None,
    master: torch.dtype | None = None,
) -> Iterator[str]:
    """Everything for which ``check_state`` refuses state, a sentence each; of other tensors than expected just that."""
    expected = expected_tensors(shape, moments, span, master, holds_codes(state, shape, moments))
    if set(state) != set(expected):
        kept = "" if master is None else f" and low_precision_update keeps {MASTER_KEYS[master]} ({master})"
        yield (
            f"{label} of shape {tuple(shape)}, where moments is {moments!r}{kept}, has state "
            f"{sorted(map(str, state))}; accepted: {sorted(expected)}"
        )
        return
    for key, (wanted_shape, dtype) in expected.items():
        value = state[key]
        if not isinstance(value, Tensor):
            yield f"{label}: {key} is a {type(value).__name__}; accepted: a tensor"
        elif tuple(value.shape) != wanted_shape or value.dtype != dtype:
            yield (
                f"{label}: {key} has shape {tuple(value.shape)} and dtype {value.dtype}; "
                f"accepted: {wanted_shape} and {dtype}"
            )


def moments_of(state: Mapping[str, Any]) -> Moments:
    """The moments in a parameter's state, as a kernel takes them."""
    if "state1" in state:
        return DynamicMoments(*(local(state[key]) for key in DYNAMIC_KEYS))
    if "exp_avg_code" in state:
        return CodedMoments(*(local(state[key]) for key in CODED_KEYS))
    return FullMoments(*(local(state[key]) for key in FULL_KEYS))


def memory_by_kind(states: Sequence[Mapping[str, Any]]) -> dict[str, int]:
    """Bytes of the tensors held here, summed by key over all parameters."""
    kinds: dict[str, int] = {}
    for state in states:
        for key, value in state.items():
            if isinstance(value, Tensor):
                kinds[key] = kinds.get(key, 0) + local(value).nbytes
    return kinds
