"""State of ``torch.optim.Adam`` and ``AdamW``: fp32 or 16-bit moments in the parameter's dtype and strides.

Also of DeepSpeedCPUAdam, whose state looks the same but for a setting ``bias_correction``.

Sources: torch 2.13, ``torch/optim/adam.py``, ``adamw.py``; DeepSpeed 0.19.8, ``deepspeed/ops/adam/cpu_adam.py``.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from lowmem_adam.foreign.moments import (
    Format,
    Source,
    check_keys,
    decode_into,
    pair_of_sources,
    plain_tensor,
    step_count,
)
from lowmem_adam.inputs import PARAM_DTYPES
from lowmem_adam.local import is_dtensor, local


def _is_ours(names: set[str], keys: set[str]) -> bool:
    # Only Adam and AdamW have it: RAdam's and NAdam's state looks the same, but stands for other steps.
    return "amsgrad" in names


def _check_group(saved: Mapping[str, Any], group: Mapping[str, Any], where: str) -> None:
    if saved.get("amsgrad") is not False:
        raise ValueError(f"{where}: amsgrad is {saved.get('amsgrad')!r}; accepted: False, there is no AMSGrad variant")
    corrected = saved.get("bias_correction", True)
    if corrected is not True:
        raise ValueError(f"{where}: bias_correction is {corrected!r}; accepted: True, moments are always corrected")


def read_state(state: Mapping[str, Any], shape: Sequence[int], label: str) -> Source:
    """A parameter's state; see ``Format.read_state``.

    Raises:
        ValueError: missing or surplus tensors, another shape or dtype; AMSGrad's.
    """
    if "max_exp_avg_sq" in state:
        raise ValueError(f"{label} has max_exp_avg_sq; accepted: state without, there is no AMSGrad variant")
    check_keys(state, ("step", "exp_avg", "exp_avg_sq"), label)
    exp_avg, exp_avg_sq = (plain_tensor(state, key, shape, PARAM_DTYPES, label) for key in ("exp_avg", "exp_avg_sq"))
    return Source(step_count(state["step"], label), exp_avg.device, pair_of_sources(exp_avg, exp_avg_sq))


def _defaults(saved: Mapping[str, Any], where: str) -> dict[str, Any]:
    theirs = torch.optim.AdamW if saved["decoupled_weight_decay"] else torch.optim.Adam
    return dict(theirs([torch.empty(0)]).defaults)


def _write_state(state: Mapping[str, Tensor], param: Tensor, moments: str) -> dict[str, Any]:
    device = next(tensor.device for key, tensor in state.items() if key != "step")
    # torch's fused step takes for granted that moments lie in memory as their parameter does.
    like = local(param) if not is_dtensor(param) else torch.empty(param.shape, dtype=param.dtype, device="meta")
    exp_avg, exp_avg_sq = (torch.empty_like(like, device=device, requires_grad=False) for _ in range(2))
    decode_into(state, exp_avg, exp_avg_sq)
    return {"step": state["step"].to(torch.float32), "exp_avg": exp_avg, "exp_avg_sq": exp_avg_sq}


FORMAT = Format(
    settings=("amsgrad", "foreach", "capturable", "differentiable", "fused", "bias_correction"),
    is_ours=_is_ours,
    check_group=_check_group,
    read_state=read_state,
    defaults=_defaults,
    write_state=_write_state,
)
