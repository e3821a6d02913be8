"""What DeepSpeed's ZeRO makes of an optimizer, and what it finds in its state.

ZeRO (stages 1 to 3, and its BF16_Optimizer) puts flat fp32 partitions in the place of the model's parameters, a
one-dimensional tensor for each param group or part of one, cuts ``param_groups`` to one of them for a step, and looks
for ``exp_avg`` and ``exp_avg_sq`` in saved state: its converter to universal checkpoints reads these two, and its
loader of them writes fp32 tensors under these names into ``state``. So state that it asks for has these names, as
``DecodedMoment``, and what its loader has left is coded before anybody else looks at it.

Source: deepspeed 0.19.8, ``runtime/zero/stage_1_and_2.py``, ``runtime/base_optimizer.py``,
``checkpoint/ds_to_universal.py``; accelerate 1.15, ``utils/deepspeed.py``.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from lowmem_adam.callers import called_from
from lowmem_adam.decoded import DecodedMoment
from lowmem_adam.foreign.moments import coded_state, step_count
from lowmem_adam.foreign.of_torch import read_state
from lowmem_adam.local import is_dtensor
from lowmem_adam.state import CODED_KEYS, FULL_KEYS, home_of, keeps_codes

_FLOAT32_STEPS = 2**24
"""Below it a float32 counts steps exactly, as torch's own optimizers do."""

_APART, _KEPT_APART = "lowmem_adam", ("moments", "format_version")
"""In a saved group: under which name, and which settings."""


def asked_by_zero() -> bool:
    """Whether ZeRO is calling, whose parameters are this rank's partitions alone."""
    return called_from("deepspeed.runtime.zero", "deepspeed.runtime.bf16_optimizer")


def refuse_shards(shard_group: Any) -> None:
    """Refuse to share out among ranks what ZeRO has shared out already: ranks would overwrite their partitions.

    Raises:
        ValueError: ``shard_group`` is set and ZeRO is calling.
    """
    if shard_group is not None and asked_by_zero():
        raise ValueError(
            f"shard_group is {shard_group!r} under DeepSpeed's ZeRO, which gives each rank a partition of its own; "
            "accepted there: shard_group=None"
        )


def refuse_lost_state(states: Mapping[Tensor, Mapping[str, Any]]) -> None:
    """Refuse to begin anew with ZeRO's partitions, of one dimension each, beside state of what they have replaced.

    Raises:
        ValueError: there is state of a parameter of other dimensions, and ZeRO is calling.
    """
    lost = sum(bool(state) and param.dim() != 1 for param, state in states.items())
    if lost and asked_by_zero():
        raise ValueError(
            f"state is of {lost} parameters in whose place DeepSpeed's ZeRO has put its partitions; accepted: "
            "engine.load_checkpoint after deepspeed.initialize, or optimizer.state.clear() before it to begin with new "
            "moments"
        )


class Defaults:
    """The attribute ``defaults``, which accelerate reads when it is about to replace the optimizer."""

    def __get__(self, optimizer: Any, owner: object = None) -> Any:
        if optimizer is None:
            return self
        if called_from("accelerate.utils.deepspeed"):
            raise ValueError(
                f"accelerate would step with DeepSpeedCPUAdam in the place of {type(optimizer).__name__}, as the "
                "DeepSpeed config has offload_optimizer, and its zero_force_ds_cpu_optimizer is not false; accepted: "
                'a config with "zero_force_ds_cpu_optimizer": false'
            )
        return optimizer.__dict__["defaults"]

    def __set__(self, optimizer: Any, defaults: dict[str, Any]) -> None:
        optimizer.__dict__["defaults"] = defaults


# ---------------------------------------------------------------- saved state


def for_zero(packed: Mapping[str, Any]) -> dict[str, Any]:
    """A ``state_dict()`` under the names and with the types of torch's AdamW, without a copy of any moment.

    ``step`` is a float32 scalar (float64 from 2^24 on). DeepSpeed writes the groups that it loads over the settings of
    the optimizer, so ``backend``, which is the machine's, is left out of them, and what decides how moments are kept
    has a place of its own.
    """
    moments = {key: group["moments"] for group in packed["param_groups"] for key in group["params"]}
    groups = [_apart(group) for group in packed["param_groups"]]
    states = {key: _seen_as_fp32(state, moments[key]) for key, state in packed["state"].items()}
    return {**packed, "state": states, "param_groups": groups}


def _apart(group: Mapping[str, Any]) -> dict[str, Any]:
    others = {name: value for name, value in group.items() if name not in ("backend", *_KEPT_APART)}
    return {**others, _APART: {name: group[name] for name in _KEPT_APART}}


def _seen_as_fp32(state: Mapping[str, Tensor], moments: str) -> dict[str, Tensor]:
    if not state:
        return {}
    step = state["step"]
    counted = {"step": step.to(torch.float32 if step < _FLOAT32_STEPS else torch.float64)}
    codes = next((state[key] for key in ("exp_avg_code", "state1") if key in state), None)
    if codes is None or codes.dim() != 1:
        return {**state, **counted}
    return counted | {key: DecodedMoment(key, state, codes.numel(), moments) for key in FULL_KEYS}


def from_zero(given: Mapping[str, Any]) -> dict[str, Any]:
    """The inverse of ``for_zero``, of any state that may have passed it; other state as it is.

    Raises:
        ValueError: a step that is no whole number.
    """
    if not all(isinstance(group.get(_APART), Mapping) for group in given["param_groups"]):
        return dict(given)
    groups = [
        {**{name: value for name, value in group.items() if name != _APART}, **group[_APART]}
        for group in given["param_groups"]
    ]
    states = {key: _own_state(state, f"state_dict, parameter {key}") for key, state in given["state"].items()}
    return {**given, "state": states, "param_groups": groups}


def _own_state(state: Any, label: str) -> Any:
    if not isinstance(state, Mapping) or "step" not in state:
        return state
    decoded = state.get("exp_avg")
    if isinstance(decoded, DecodedMoment):
        return dict(decoded.state)
    if isinstance(state["step"], Tensor) and state["step"].dtype.is_floating_point:
        return {**state, "step": step_count(state["step"], label)}
    return state


# ---------------------------------------------------------------- state that was written past the optimizer


def taken_over(
    groups: Sequence[Mapping[str, Any]],
    states: Mapping[Tensor, Mapping[str, Any]],
    decoupled: bool,
    offload: str | None,
) -> dict[Tensor, dict[str, Tensor]]:
    """State of our own, made of fp32 moments that somebody has written into ``state``; nothing changes.

    That is ``exp_avg`` beside codes, or beside a step that is no int64 scalar.

    Args:
        groups: param groups.
        states: the state of every parameter that has one.
        decoupled: whether the optimizer decouples weight decay.
        offload: its setting.

    Returns:
        What is to be put in the place of the state of these parameters.

    Raises:
        ValueError: moments of another shape, not finite, or without a step; settings of another optimizer in the group.
    """
    out: dict[Tensor, dict[str, Tensor]] = {}
    for index, group in enumerate(groups):
        for place, param in enumerate(group["params"]):
            state = states.get(param)
            if state and not is_dtensor(param) and _is_written(state):
                label = f"param group {index}, parameter {place}: state that was written into the optimizer"
                _check_group(group, decoupled, label)
                out[param] = _coded(param, state, group, label, offload)
    return out


def _is_written(state: Mapping[str, Any]) -> bool:
    if "exp_avg" not in state:
        return False
    step = state.get("step")
    return not isinstance(step, Tensor) or step.dtype != torch.int64 or any(key in state for key in CODED_KEYS)


def _check_group(group: Mapping[str, Any], decoupled: bool, label: str) -> None:
    for name, accepted in (("decoupled_weight_decay", decoupled), ("amsgrad", False), ("bias_correction", True)):
        if group.get(name, accepted) != accepted:
            raise ValueError(f"{label} comes with {name}={group[name]!r}; accepted: {accepted!r}")


def _coded(
    param: Tensor, state: Mapping[str, Any], group: Mapping[str, Any], label: str, offload: str | None
) -> dict[str, Tensor]:
    written = {"step": state.get("step", group.get("step")), **{key: state[key] for key in FULL_KEYS if key in state}}
    source = read_state(written, param.shape, label)
    coded = keeps_codes(param.shape, group["moments"])
    made = coded_state(source, param.shape, group["moments"], label, coded=coded)
    # What was kept of the weight beside the moments before is no longer of this weight: a step begins it anew.
    return {key: tensor if key == "step" else tensor.to(home_of(param, offload)) for key, tensor in made.items()}
