"""Saved state: what it must look like, and how it passes torch's loader untouched.

``Optimizer.load_state_dict`` casts every tensor but ``step`` to its parameter's dtype, which would turn codes into
floats. So the tensors go through it wrapped in an object it does not look into.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from lowmem_adam import settings
from lowmem_adam.codec import FORMAT, grid_octaves
from lowmem_adam.local import Span, is_dtensor, local
from lowmem_adam.state import home_of, master_dtype, state_faults

MAX_STEP = 2**53
"""Steps are counted exactly in double, in which the bias corrections are computed."""


@dataclass(frozen=True, slots=True)
class _Sealed:
    tensor: Tensor


class Owner(NamedTuple):
    """Whose saved state it is: the optimizer's parameter, and what settings its state depends on."""

    param: Tensor
    moments: str
    label: str
    master: torch.dtype | None
    """By the saved settings, which a load takes over."""
    version: int
    """The saved format's."""


def check(
    state_dict: Any, groups: Sequence[Mapping[str, Any]], span_of: Callable[[Tensor], Span | None] = lambda _: None
) -> None:
    """Check saved state against the optimizer that is to load it, before anything changes.

    Args:
        state_dict: as returned by ``state_dict()``, of whole parameters or as ``local_state`` makes it.
        groups: the optimizer's own param groups.
        span_of: the blocks of a parameter that the state is of; None for all.

    Raises:
        ValueError: not a state_dict; state of another optimizer or format version; another number of groups or
            parameters; a parameter of another shape; missing, surplus or wrong tensors; settings not accepted.
    """
    check_form(state_dict)
    owners = owners_of(state_dict, groups)
    for key, state in state_dict["state"].items():
        if state == {}:  # left behind where somebody read optimizer.state[param] before its first step
            continue
        check_owned(state, owners[key], span_of(owners[key].param))


def check_owned(state: Mapping[str, Any], owner: Owner, span: Span | None = None) -> None:
    """Check one parameter's state; as ``check``.

    Raises:
        ValueError: missing, surplus or wrong tensors, values that no step writes.
    """
    for fault in faults(state, owner, span):
        raise ValueError(fault)


def faults(state: Mapping[str, Any], owner: Owner, span: Span | None = None) -> Iterator[str]:
    """Everything for which ``check_owned`` refuses state, a sentence each; of wrong tensors no values."""
    found = list(state_faults(state, owner.param.shape, owner.moments, owner.label, span, owner.master))
    yield from found or _value_faults(state, owner)


def owners_of(state_dict: Any, groups: Sequence[Mapping[str, Any]]) -> dict[Any, Owner]:
    """Whose state that of every saved id is; checks groups and ids."""
    saved_groups = state_dict["param_groups"]
    if len(saved_groups) != len(groups):
        raise ValueError(f"state_dict has {len(saved_groups)} param groups; accepted: {len(groups)}, as the optimizer")
    owners: dict[Any, Owner] = {}
    for index, (saved, group) in enumerate(zip(saved_groups, groups, strict=True)):
        owners |= owners_in_group(saved, group, f"state_dict, param group {index}")
    for fault in id_faults(state_dict, owners):
        raise ValueError(fault)
    return owners


def id_faults(state_dict: Mapping[str, Any], owners: Mapping[Any, Owner]) -> Iterator[str]:
    """What is wrong with ids and with what lies under them, a sentence each; ``owners`` are those of all groups."""
    if len(owners) != sum(len(saved["params"]) for saved in state_dict["param_groups"]):
        yield "state_dict: a parameter is listed twice in its param groups; accepted: each parameter once"
    for key, state in state_dict["state"].items():
        if key not in owners:
            yield f"state_dict has state of a parameter {key!r} that is in none of its param groups"
        elif not isinstance(state, Mapping):
            yield f"{owners[key].label}: its state is a {type(state).__name__}; accepted: a dictionary of tensors"


def owners_in_group(saved: Mapping[str, Any], group: Mapping[str, Any], where: str) -> dict[Any, Owner]:
    """Whose state that of every saved id of one group is; checks the group, which ``where`` names."""
    _check_group(saved, group, where)
    names = group.get("param_names", [None] * len(group["params"]))
    owners = {}
    for key, param, name in zip(saved["params"], group["params"], names, strict=True):
        label = f"state_dict, parameter {key}" + (f" ({name!r})" if name else "")
        owners[key] = Owner(param, group["moments"], label, master_dtype(param.dtype, saved), saved["format_version"])
    return owners


def check_form(state_dict: Any) -> None:
    """A dictionary with a dictionary ``state`` and a list of dictionaries ``param_groups``."""
    accepted = "accepted: a dictionary made by state_dict()"
    if not isinstance(state_dict, Mapping):
        raise ValueError(f"state_dict is a {type(state_dict).__name__}; {accepted}")
    for key, kind in (("state", Mapping), ("param_groups", list)):
        if not isinstance(state_dict.get(key), kind):
            found = f"{key!r} of type {type(state_dict[key]).__name__}" if key in state_dict else f"no {key!r}"
            raise ValueError(f"state_dict has {found}; {accepted}")
    for index, group in enumerate(state_dict["param_groups"]):
        if not isinstance(group, Mapping) or not isinstance(group.get("params"), list):
            raise ValueError(f"state_dict: param group {index} is no dictionary with a list 'params'; {accepted}")


def _check_group(saved: Mapping[str, Any], group: Mapping[str, Any], where: str) -> None:
    if len(saved["params"]) != len(group["params"]):
        raise ValueError(f"{where} has {len(saved['params'])} parameters; accepted: {len(group['params'])}")
    if "format_version" not in saved:
        raise ValueError(
            f"{where} has no format_version, so it is another optimizer's state; accepted: state of Adam8bit, "
            "AdamW8bit, torch's and bitsandbytes' Adam and AdamW"
        )
    settings.check_version(saved["format_version"], where)
    for name, meaning in (("decoupled_weight_decay", "the class of optimizer"), ("moments", "the constructor's")):
        if saved.get(name) != group[name]:
            raise ValueError(f"{where}: {name} is {saved.get(name)!r}; accepted: {group[name]!r}, {meaning}")
    if missing := [name for name in settings.REQUIRED if name not in saved]:
        raise ValueError(f"{where} has no {', '.join(map(repr, missing))}; accepted: every setting of this version")
    settings.check_group({**saved, "backend": group["backend"]}, where)


def _value_faults(state: Mapping[str, Tensor], owner: Owner) -> Iterator[str]:
    """What no step writes would decode to nonsense."""
    label = owner.label
    if not 0 <= int(state["step"]) < MAX_STEP:
        yield f"{label}: step is {int(state['step'])}; accepted: integers from 0 below {MAX_STEP}"
    for key in ("absmax1", "absmax2"):
        scales = local(state[key]) if key in state else None
        if scales is not None and not bool(((scales >= 0) & (scales < torch.inf)).all()):
            wrong = scales[~((scales >= 0) & (scales < torch.inf))][0].item()
            yield f"{label}: {key} has a value {wrong}; accepted: finite numbers from 0"
    floor, octaves = (local(state[key]) if key in state else None for key in ("block_floor", "block_span"))
    if floor is not None and octaves is not None and octaves.numel():
        if owner.version > 1:  # whose bytes hold ratio octaves too
            octaves = grid_octaves(octaves)
        span = int(octaves.max())
        if span > FORMAT.max_octaves:
            yield f"{label}: block_span reaches {span}; accepted: 0 to {FORMAT.max_octaves} octaves"
        ceiling = int((floor.to(torch.int32) + octaves).max())
        if ceiling > FORMAT.max_exponent:
            yield (
                f"{label}: block_floor + block_span reaches {ceiling}; accepted: exponents up to {FORMAT.max_exponent}"
            )


def seal(state_dict: Mapping[str, Any], groups: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """A copy of the state with sealed tensors.

    The machine's own choice of backend stays as the optimizer has it, and so does the format that steps write.
    """
    state = {
        param: {key: _Sealed(value) for key, value in tensors.items()} for param, tensors in state_dict["state"].items()
    }
    saved_groups = [
        settings.normalised({**saved, **{name: group[name] for name in ("backend", "format_version")}})
        for saved, group in zip(state_dict["param_groups"], groups, strict=True)
    ]
    return {**state_dict, "state": state, "param_groups": saved_groups}


def unseal(
    states: Mapping[Tensor, dict[str, Any]],
    held: dict[Tensor, dict[str, Any]],
    given_away: set[int],
    offload: str | None,
) -> None:
    """Unwrap in place: contiguous copies on the parameter's device or offloaded from it, ``step`` on the CPU.

    Args:
        states: the optimizer's state after torch's loader, by parameter.
        held: its state before, which is used up: so only one parameter's is there twice at a time. Tensors that come
            back as they were, or in their own memory, are not copied.
        given_away: addresses of tensors that nobody else has: they are kept.
        offload: the optimizer's setting.
    """
    for param, state in states.items():
        before = held.pop(param, {})
        for key, sealed in state.items():
            # One tensor after the other is given up for the one that comes.
            if _is_same(before.get(key), sealed.tensor):
                state[key] = before[key]
            elif not is_dtensor(sealed.tensor) and sealed.tensor.data_ptr() in given_away:
                state[key] = sealed.tensor
            else:
                device = torch.device("cpu") if key == "step" else home_of(param, offload)
                state[key] = sealed.tensor.to(device=device, copy=True, memory_format=torch.contiguous_format)


def _is_same(held: Any, given: Tensor) -> bool:
    """Whether it is the tensor held, or sees all of its memory in the same way."""
    if held is given:
        return True
    if held is None or is_dtensor(held) or is_dtensor(given) or held.numel() == 0:
        return False
    seen = [(t.data_ptr(), t.dtype, t.device, t.shape, t.stride()) for t in (held, given)]
    return bool(seen[0] == seen[1])
