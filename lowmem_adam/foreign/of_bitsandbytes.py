"""State of bitsandbytes' ``Adam`` and ``AdamW``: fp32 moments, or 8-bit codes of a dynamic map by blocks of 256.

A coded moment is ``qmap[code] * absmax[block]`` (``lowmem_adam.dynamic_map``), where blocks count the elements in the
order in which the step ran over them. For state that is not row-major that is the logical order on the CPU, but the
order in memory on accelerators, where the parameter was made contiguous and its state was not. Codes tell, since each
block's largest has the last code. 32-bit state does not: it is taken as of the device where it lies, so load it where
it was made.

All of its Adam classes decouple weight decay, and read one another's state.

Sources: bitsandbytes 0.50.2, ``optim/optimizer.py``, ``functional.py``, ``backends/{cpu,cuda}/ops.py``.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from lowmem_adam import dynamic_map
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
from lowmem_adam.kernels import reference
from lowmem_adam.kernels.fragment import DynamicMoments
from lowmem_adam.layout import FLAT, FLAT_BLOCK_SIZE, MIN_FLAT_CODED_NUMEL, Layout
from lowmem_adam.shard import read
from lowmem_adam.state import DYNAMIC_KEYS

NESTED = "__bnb_optimizer_quant_state__"
"""Key under which it saves all of a parameter's state but ``step``, from 0.49.2 on; before, there was no such level."""

FULL_KEYS = ("state1", "state2")
CODED_KEYS = ("state1", "qmap1", "state2", "qmap2", "absmax1", "absmax2")


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
        block = torch.arange(start, stop, device=device) // FLAT_BLOCK_SIZE
        first, second = (
            table[read(code, start, stop).int()] * scale[block]
            for code, table, scale in zip(codes, maps, scales, strict=True)
        )
        return first, second

    def as_they_are() -> DynamicMoments:
        for key, table, signed in zip(("qmap1", "qmap2"), maps, (True, False), strict=True):
            if not torch.equal(table.cpu(), dynamic_map.dynamic_map(signed)):
                raise ValueError(
                    f"{label}: {key} is not the dynamic map that bitsandbytes makes; accepted under "
                    f"moments={FLAT!r}: that map (other settings of moments take the state with any)"
                )
        return DynamicMoments(*(code.reshape(shape) for code in codes), *scales)

    return Source(step, device, dequantized, as_they_are)


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
    blocks = dynamic_map.n_blocks(numel)
    for key in ("absmax1", "absmax2"):
        found = state[key]
        if isinstance(found, Tensor) and found.ndim == 1 and len(found) != blocks:
            raise ValueError(
                f"{label}: {key} has {len(found)} blocks for {numel} elements; accepted: {blocks}, blocks of "
                f"{FLAT_BLOCK_SIZE} as bitsandbytes has made them since 0.44"
            )
    return blocks


def _blocks_in_memory(state2: Tensor, absmax: Tensor) -> bool:
    """Whether blocks count the elements in the order in memory."""

    def fits(codes: Tensor) -> bool:
        rows = F.pad(codes.reshape(-1), (0, -codes.numel() % FLAT_BLOCK_SIZE)).view(-1, FLAT_BLOCK_SIZE)
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
    if "state1" in state:
        return {"step": int(state["step"]), NESTED: _with_maps([state[key].contiguous() for key in DYNAMIC_KEYS])}
    both = [torch.empty(param.shape, dtype=torch.float32, device=device) for _ in range(2)]
    decode_into(state, *both)
    if "exp_avg_code" not in state and (moments != "8bit" or param.numel() < MIN_FLAT_CODED_NUMEL):
        return {"step": int(state["step"]), NESTED: dict(zip(FULL_KEYS, both, strict=True))}
    return {"step": int(state["step"]), NESTED: _with_maps(_quantized(*both))}


def _with_maps(moments: Sequence[Tensor]) -> dict[str, Tensor]:
    """Codes and scales as its state has them: copies, and the maps beside them."""
    codes1, codes2, *scales = (tensor.clone() for tensor in moments)
    maps = [dynamic_map.dynamic_map(signed).to(codes1.device, copy=True) for signed in (True, False)]
    return dict(zip(CODED_KEYS, (codes1, maps[0], codes2, maps[1], *scales), strict=True))


def _quantized(exp_avg: Tensor, exp_avg_sq: Tensor) -> DynamicMoments:
    """Contiguous fp32 values as the nearest codes, of their shape."""
    layout, device = Layout.of(exp_avg.shape, FLAT), exp_avg.device
    codes = (torch.empty(exp_avg.shape, dtype=torch.uint8, device=device) for _ in range(2))
    made = DynamicMoments(*codes, *(torch.empty(layout.n_blocks, device=device) for _ in range(2)))
    for tile in layout.tiles(0, layout.n_blocks, reference.TILE_ELEMENTS):
        flat = (values.view(-1)[tile.start : tile.stop] for values in (exp_avg, exp_avg_sq))
        first, second = (reference.to_blocks(values, tile) for values in flat)
        blocks = slice(tile.first_block, tile.first_block + tile.n_blocks)
        reference.store_dynamic(made, (first, second), None, tile, tile.start, tile.stop, blocks)
    return made


FORMAT = Format(
    settings=("alpha", "t_alpha", "t_beta3"),
    is_ours=_is_ours,
    check_group=_check_group,
    read_state=_read_state,
    defaults=_defaults,
    write_state=_write_state,
)
