"""Saved state: what it must look like, and how it passes torch's loader untouched.

``Optimizer.load_state_dict`` casts every tensor but ``step`` to its parameter's dtype, which would turn codes into
floats. So the tensors go through it wrapped in an object it does not look into.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from lowmem_adam import settings
from lowmem_adam.codec import FORMAT
from lowmem_adam.state import expected_tensors


@dataclass(frozen=True, slots=True)
class _Sealed:
    tensor: Tensor


def check(state_dict: Mapping[str, Any], groups: Sequence[Mapping[str, Any]]) -> None:
    """Check saved state against the optimizer that is to load it, before anything changes.

    Args:
        state_dict: as returned by ``state_dict()``.
        groups: the optimizer's own param groups.

    Raises:
        ValueError: state of another optimizer or format version; another number of groups or parameters; a
            parameter of another shape; missing, surplus or wrong tensors; settings that are not accepted.
    """
    for key in ("state", "param_groups"):
        if not isinstance(state_dict, Mapping) or key not in state_dict:
            raise ValueError(f"state_dict has no {key!r}; accepted: a dictionary made by state_dict()")
    saved_groups = state_dict["param_groups"]
    if len(saved_groups) != len(groups):
        raise ValueError(f"state_dict has {len(saved_groups)} param groups; accepted: {len(groups)}, as the optimizer")
    owners: dict[Any, tuple[Tensor, str, str]] = {}
    for index, (saved, group) in enumerate(zip(saved_groups, groups, strict=True)):
        _check_group(saved, group, f"state_dict, param group {index}")
        names = group.get("param_names", [None] * len(group["params"]))
        for key, param, name in zip(saved["params"], group["params"], names, strict=True):
            label = f"state_dict, parameter {key}" + (f" ({name!r})" if name else "")
            owners[key] = (param, group["moments"], label)
    for key, state in state_dict["state"].items():
        if key not in owners:
            raise ValueError(f"state_dict has state of a parameter {key!r} that is in none of its param groups")
        param, moments, label = owners[key]
        _check_state(state, param, moments, label)


def _check_group(saved: Mapping[str, Any], group: Mapping[str, Any], where: str) -> None:
    if len(saved["params"]) != len(group["params"]):
        raise ValueError(f"{where} has {len(saved['params'])} parameters; accepted: {len(group['params'])}")
    if "format_version" not in saved:
        raise ValueError(
            f"{where} has no format_version, so it is another optimizer's state; accepted: state of Adam8bit, AdamW8bit"
        )
    settings.check_version(saved["format_version"], where)
    for name, meaning in (("decoupled_weight_decay", "the class of optimizer"), ("moments", "the constructor's")):
        if saved.get(name) != group[name]:
            raise ValueError(f"{where}: {name} is {saved.get(name)!r}; accepted: {group[name]!r}, {meaning}")
    settings.check_group({**group, **saved}, where)


def _check_state(state: Mapping[str, Any], param: Tensor, moments: str, label: str) -> None:
    expected = expected_tensors(param.shape, moments)
    if set(state) != set(expected):
        raise ValueError(
            f"{label} of shape {tuple(param.shape)} has state {sorted(state)}; accepted: {sorted(expected)}"
        )
    for key, (shape, dtype) in expected.items():
        value = state[key]
        if not isinstance(value, Tensor):
            raise ValueError(f"{label}: {key} is a {type(value).__name__}; accepted: a tensor")
        if tuple(value.shape) != shape or value.dtype != dtype:
            raise ValueError(
                f"{label}: {key} has shape {tuple(value.shape)} and dtype {value.dtype}; accepted: {shape} and {dtype}"
            )
    if int(state["step"]) < 0:
        raise ValueError(f"{label}: step is {int(state['step'])}; accepted: integers from 0")
    if "block_span" in expected and state["block_span"].numel():
        span = int(state["block_span"].max())
        if span > FORMAT.max_octaves:
            raise ValueError(f"{label}: block_span reaches {span}; accepted: 0 to {FORMAT.max_octaves} octaves")


def seal(state_dict: Mapping[str, Any], groups: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """A copy of the state with sealed tensors, and with the machine's own choice of backend kept."""
    state = {
        param: {key: _Sealed(value) for key, value in tensors.items()} for param, tensors in state_dict["state"].items()
    }
    saved_groups = [
        {**saved, "backend": group["backend"]} for saved, group in zip(state_dict["param_groups"], groups, strict=True)
    ]
    return {**state_dict, "state": state, "param_groups": saved_groups}


def unseal(states: Mapping[Tensor, dict[str, Any]], held: Mapping[Tensor, Mapping[str, Any]]) -> None:
    """Unwrap in place: contiguous copies on the parameter's device, ``step`` on the CPU.

    Args:
        states: the optimizer's state after torch's loader, by parameter.
        held: its state before; tensors that come back as they were are not copied.
    """
    for param, state in states.items():
        before = held.get(param, {})
        for key, sealed in state.items():
            if before.get(key) is sealed.tensor:
                state[key] = sealed.tensor
            else:
                device = torch.device("cpu") if key == "step" else param.device
                state[key] = sealed.tensor.to(device=device, copy=True, memory_format=torch.contiguous_format)
