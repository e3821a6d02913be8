"""State of bitsandbytes' ``Adam`` and ``AdamW``: fp32 moments, or 8-bit codes of a dynamic map by blocks of 256.

A coded moment is ``qmap[code] * absmax[block]``, where blocks count the elements in the order in which the step ran
over them. For state that is not row-major that is the logical order on the CPU, but the order in memory on
accelerators, where the parameter was made contiguous and its state was not. Codes tell, since each block's largest has
the last code. 32-bit state does not: it is taken as of the device where it lies, so load it where it was made.

All of its Adam classes decouple weight decay, and read one another's state.

Sources: bitsandbytes 0.50.2, ``optim/optimizer.py``, ``functional.py``, ``backends/{cpu,cuda}/ops.py``; the dynamic map
of Dettmers et al. 2022 (arXiv 2110.02861).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from lowmem_adam.foreign.moments import (
    SHARED_SETTINGS,
    Format,
    Source,
    check_keys,
    decode_into,
    pair_of_sources,
    plain_tensor,
    step_count,
)
from lowmem_adam.kernels.reference import TILE_ELEMENTS
from lowmem_adam.shard import read

NESTED = "__bnb_optimizer_quant_state__"
"""Key under which it saves all of a parameter's state but ``step``, from 0.49.2 on; before, there was no such level."""

BLOCK = 256
"""Elements of a block since 0.44; before, it was 2048."""

MIN_8BIT_NUMEL = 4096
"""Smaller tensors keep fp32 moments in its 8-bit optimizers."""

FULL_KEYS = ("state1", "state2")
CODED_KEYS = ("state1", "qmap1", "state2", "qmap2", "absmax1", "absmax2")


def dynamic_map(signed: bool) -> Tensor:
    """The 256 values of its 8-bit formats in rising order, float32, equal to its ``create_dynamic_map``.

    Seven decades below 1, each cut into twice as many equal parts as the one below, whose middles are the values: 1 to
    64 parts for each sign, or 2 to 128 without signs; and 0 and 1.
    """
    values = [torch.tensor([0.0, 1.0])]
    for decade in range(7):
        edges = torch.linspace(0.1, 1.0, 2 ** (decade if signed else decade + 1) + 1)
        middles = (edges[1:] + edges[:-1]) / 2 * 10.0 ** (decade - 6)
        values += [middles, -middles] if signed else [middles]
    return torch.cat(values).sort().values


def _is_ours(names: set[str], keys: set[str]) -> bool:
    return bool({NESTED, "state1"} & keys) or {"alpha", "t_alpha"} <= names


# ---------------------------------------------------------------- reading


def _check_group(saved: Mapping[str, Any], group: Mapping[str, Any], where: str) -> None:
    for name in FORMAT.settings:
        if saved.get(name):
            raise ValueError(f"{where}: {name} is {saved[name]!r}, AdEMAMix's; accepted: state of Adam and AdamW")
    if saved["weight_decay"] and not group["decoupled_weight_decay"]:
        raise ValueError(
            f"{where}: weight_decay is {saved['weight_decay']!r}, which bitsandbytes decouples in Adam as in AdamW; "
            "accepted by Adam8bit, whose decay is L2: 0 (AdamW8bit goes on with any)"
        )


def _read_state(given: Mapping[str, Any], shape: Sequence[int], label: str) -> Source:
    nested = given.get(NESTED, {})
    if not isinstance(nested, Mapping):
        raise ValueError(f"{label}: {NESTED} is a {type(nested).__name__}; accepted: a dictionary of tensors")
    state = {**{key: value for key, value in given.items() if key != NESTED}, **nested}
    _check_is_adam(state, label)
    coded = isinstance(state.get("state1"), Tensor) and state["state1"].dtype == torch.uint8
    check_keys(state, ("step", *(CODED_KEYS if coded else FULL_KEYS)), label)
    step = step_count(state["step"], label)
    dtype = torch.uint8 if coded else torch.float32
    both = [plain_tensor(state, key, shape, (dtype,), label) for key in FULL_KEYS]
    device = both[0].device
    if not coded:
        return Source(step, device, pair_of_sources(*(_as_stepped(one, device.type != "cpu") for one in both)))

    blocks = _block_count(state, both[0].numel(), label)
    maps = [plain_tensor(state, key, (256,), (torch.float32,), label) for key in ("qmap1", "qmap2")]
    scales = [plain_tensor(state, key, (blocks,), (torch.float32,), label) for key in ("absmax1", "absmax2")]
    in_memory = _blocks_in_memory(both[1], scales[1])
    codes = [_as_stepped(one, in_memory) for one in both]

    def dequantized(start: int, stop: int) -> tuple[Tensor, Tensor]:
        block = torch.arange(start, stop, device=device) // BLOCK
        first, second = (
            table[read(code, start, stop).int()] * scale[block]
            for code, table, scale in zip(codes, maps, scales, strict=True)
        )
        return first, second

    return Source(step, device, dequantized)


def _check_is_adam(state: dict[str, Any], label: str) -> None:
    """Refuse, by name, what other optimizers and options have; drop the norms of a clipping that never was on."""
    if "state1" in state and "state2" not in state:
        raise ValueError(f"{label} has state1 and no state2, so it is not Adam's; accepted: state of Adam and AdamW")
    if "unorm_vec" in state:
        raise ValueError(f"{label} has unorm_vec, as LAMB has; accepted: state of Adam and AdamW")
    if "max1" in state:
        raise ValueError(f"{label} has max1, as with block_wise=False; accepted: block-wise state")
    norms = state.pop("gnorm_vec", None)
    if norms is not None and not (isinstance(norms, Tensor) and not bool(norms.any())):
        raise ValueError(
            f"{label} has gnorm_vec, the norms of percentile clipping, which this optimizer does not do; accepted: "
            "state without (and clip_grad_norm_ instead)"
        )


def _block_count(state: Mapping[str, Any], numel: int, label: str) -> int:
    blocks = -(-numel // BLOCK)
    for key in ("absmax1", "absmax2"):
        found = state[key]
        if isinstance(found, Tensor) and found.ndim == 1 and len(found) != blocks:
            raise ValueError(
                f"{label}: {key} has {len(found)} blocks for {numel} elements; accepted: {blocks}, blocks of {BLOCK} "
                "as bitsandbytes has made them since 0.44"
            )
    return blocks


def _blocks_in_memory(state2: Tensor, absmax: Tensor) -> bool:
    """Whether blocks count the elements in the order in memory."""

    def fits(codes: Tensor) -> bool:
        rows = F.pad(codes.reshape(-1), (0, -codes.numel() % BLOCK)).view(-1, BLOCK)
        return bool(((rows.amax(1) == 255) | (absmax == 0)).all())

    if state2.is_contiguous():
        return False
    logical, in_memory = fits(state2), fits(_as_stepped(state2, True))
    return in_memory if logical != in_memory else state2.device.type != "cpu"


def _as_stepped(tensor: Tensor, in_memory: bool) -> Tensor:
    """The tensor itself, or its memory as one dimension where that is the order of the step."""
    if not in_memory or tensor.is_contiguous():
        return tensor
    return tensor.as_strided((tensor.numel(),), (1,))


# ---------------------------------------------------------------- writing


def _defaults(saved: Mapping[str, Any], where: str) -> dict[str, Any]:
    if saved["maximize"]:
        raise ValueError(f"{where}: maximize is {saved['maximize']!r}; accepted: False, bitsandbytes only minimizes")
    if saved["weight_decay"] and not saved["decoupled_weight_decay"]:
        raise ValueError(
            f"{where}: weight_decay is {saved['weight_decay']!r} as L2; accepted: 0, or state of AdamW8bit, since "
            "bitsandbytes decouples it in Adam as in AdamW"
        )
    return {**dict.fromkeys(SHARED_SETTINGS), "alpha": 0.0, "t_alpha": None, "t_beta3": None}


def _write_state(state: Mapping[str, Tensor], param: Tensor, moments: str) -> dict[str, Any]:
    device = next(tensor.device for key, tensor in state.items() if key != "step")
    both = [torch.empty(param.shape, dtype=torch.float32, device=device) for _ in range(2)]
    decode_into(state, *both)
    if moments == "32bit" or param.numel() < MIN_8BIT_NUMEL:
        quantized = dict(zip(FULL_KEYS, both, strict=True))
    else:
        maps = [dynamic_map(signed).to(device) for signed in (True, False)]
        codes, scales = zip(*map(_quantized, both, maps), strict=True)
        quantized = dict(zip(CODED_KEYS, (codes[0], maps[0], codes[1], maps[1], *scales), strict=True))
    return {"step": int(state["step"]), NESTED: quantized}


def _quantized(values: Tensor, table: Tensor) -> tuple[Tensor, Tensor]:
    """Contiguous fp32 values as uint8 codes of their shape, the nearest, and one scale for each block in flat order."""
    flat = values.view(-1)
    codes = torch.empty(flat.shape, dtype=torch.uint8, device=flat.device)
    absmax = torch.empty(-(-len(flat) // BLOCK), device=flat.device)
    middles = (table[1:] + table[:-1]) / 2
    for start in range(0, len(flat), TILE_ELEMENTS):
        part = flat[start : start + TILE_ELEMENTS]
        rows = F.pad(part, (0, -len(part) % BLOCK)).view(-1, BLOCK)
        scale = rows.abs().amax(1)
        scaled = rows / torch.where(scale > 0, scale, 1.0)[:, None]
        codes[start : start + len(part)] = torch.bucketize(scaled, middles).view(-1)[: len(part)].to(torch.uint8)
        absmax[start // BLOCK : start // BLOCK + len(scale)] = scale
    return codes.view(values.shape), absmax


FORMAT = Format(
    settings=("alpha", "t_alpha", "t_beta3"),
    is_ours=_is_ours,
    check_group=_check_group,
    read_state=_read_state,
    defaults=_defaults,
    write_state=_write_state,
)
