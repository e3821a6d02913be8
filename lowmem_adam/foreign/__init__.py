"""State of other optimizers as ours, and ours as theirs: torch's Adam and AdamW, bitsandbytes' in 8 and 32 bits.

Functions of whole state_dicts and of our optimizer's param groups; they change neither. Work goes tile by tile: only
an export to bitsandbytes holds one parameter's moments in fp32 at a time.

``moments`` has how ours are coded and decoded; ``of_torch`` and ``of_bitsandbytes`` have what the others look like.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from torch import Tensor

from lowmem_adam import saved_state, settings
from lowmem_adam.foreign import of_bitsandbytes, of_torch
from lowmem_adam.foreign.moments import SHARED_SETTINGS, Format, Source, coded_state
from lowmem_adam.foreign.overrides import split_overrides
from lowmem_adam.layout import FLAT
from lowmem_adam.saved_state import Owner

__all__ = ["FORMATS", "from_own", "kind_of", "split_overrides", "to_own"]

FORMATS: dict[str, Format] = {"torch": of_torch.FORMAT, "bitsandbytes": of_bitsandbytes.FORMAT}
"""Whose state is read and written, beside our own."""

OWN_SETTINGS = (*settings.ALL, "backend", "decoupled_weight_decay", "format_version")


def kind_of(state_dict: Any) -> str:
    """Whose state this is.

    Returns:
        ``"lowmem_adam"``, ``"torch"`` (Adam or AdamW) or ``"bitsandbytes"`` (any of its optimizers: ``to_own`` refuses
        those that are not Adam). State of bitsandbytes before 0.44 is not told from others' where it is empty.

    Raises:
        ValueError: no state_dict, or another optimizer's.
    """
    saved_state.check_form(state_dict)
    names = set().union(*state_dict["param_groups"]) - {"params"}
    keys = set().union(*(state for state in state_dict["state"].values() if isinstance(state, Mapping)))
    if "format_version" in names:
        return "lowmem_adam"
    for kind, form in FORMATS.items():
        if form.is_ours(names, keys):
            return kind
    raise ValueError(
        f"state_dict has no format_version, but settings {sorted(map(str, names))} and state {sorted(map(str, keys))}; "
        "accepted: state of Adam8bit, AdamW8bit; of torch.optim.Adam, AdamW; of bitsandbytes' Adam, AdamW in 8 or 32 "
        "bits"
    )


def to_own(state_dict: Any, groups: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """State of our optimizer, made of another's; our own is returned as it is, unchecked.

    lr, betas, eps, weight_decay, maximize, and whatever others left in the groups, such as a scheduler's
    ``initial_lr``, come from the saved state as in a load of our own; settings that it does not have come from
    ``groups``. Moments of parameters that keep codes are coded to nearest, the others become fp32, both in row-major
    order, on the device where they are. What groups keep of the weights begins with the parameters: it is zero.

    Groups with ``moments="bnb8bit"`` take bitsandbytes' 8-bit state byte for byte, and each parameter goes on as it
    was: in 8 bits or, where it was overridden and others are in 8 bits, in fp32. State that is all in fp32 is coded.
    For other settings ``split_overrides`` brings overridden parameters into groups of their own.

    Args:
        state_dict: as their ``state_dict()`` returns it, unsharded.
        groups: our optimizer's param groups.

    Returns:
        A new dictionary that passes ``saved_state.check``; parameters keep their ids. No tensor is shared.

    Raises:
        ValueError: of another optimizer, AMSGrad, AdEMAMix and LAMB included; other numbers of groups or parameters;
            another shape or dtype; missing or surplus tensors; moments that are not finite, negative second ones;
            torch's other class of weight decay, or any of bitsandbytes', which is decoupled in its Adam too, for
            ``Adam8bit``; blocks that do not have 256 elements; the gradient norms of percentile clipping.
        TypeError: a setting in a group that our optimizer knows to be another's.
    """
    if kind_of(state_dict) == "lowmem_adam":
        return {**state_dict, "param_groups": [settings.completed(group) for group in state_dict["param_groups"]]}
    own_groups, states = each_to_own(state_dict, groups)
    return {**state_dict, "state": dict(states), "param_groups": own_groups}


def each_to_own(
    state_dict: Any, groups: Sequence[Mapping[str, Any]]
) -> tuple[list[dict[str, Any]], Iterator[tuple[Any, dict[str, Tensor]]]]:
    """As ``to_own`` of another optimizer's state, a parameter's at a time: no more than that is held here.

    Returns:
        Our param groups; an id and our state of every parameter that has any. Groups, shapes and dtypes are checked
        before the first, values as they come.
    """
    form, saved_groups = FORMATS[kind_of(state_dict)], state_dict["param_groups"]
    if len(saved_groups) != len(groups):
        raise ValueError(f"state_dict has {len(saved_groups)} param groups; accepted: {len(groups)}, as the optimizer")
    own_groups = [
        own_group(saved, group, form, f"state_dict, param group {index}")
        for index, (saved, group) in enumerate(zip(saved_groups, groups, strict=True))
    ]
    # Groups and ids are checked before the moments, which take long.
    owners = saved_state.owners_of({**state_dict, "param_groups": own_groups}, groups)
    sources = {
        key: form.read_state(state, owners[key].param.shape, owners[key].label)
        for key, state in state_dict["state"].items()
        if state  # an empty one is left behind where somebody read optimizer.state[param]
    }
    return own_groups, _each_coded(sources, owners)


def _each_coded(sources: Mapping[Any, Source], owners: Mapping[Any, Owner]) -> Iterator[tuple[Any, dict[str, Tensor]]]:
    some_coded = any(source.as_they_are is not None for source in sources.values())
    for key, source in sources.items():
        param, moments, label, master, _ = owners[key]
        stays_full = moments == FLAT and some_coded and source.as_they_are is None
        state = coded_state(source, param.shape, moments, label, master, False if stays_full else None)
        saved_state.check_owned(state, owners[key])
        yield key, state
        del state  # before the next one's is made


def from_own(state_dict: Any, groups: Sequence[Mapping[str, Any]], kind: str) -> dict[str, Any]:
    """State of another optimizer, made of ours.

    ``"torch"``: what ``torch.optim.AdamW`` (``Adam`` for ``Adam8bit``) holds and writes in the torch installed here:
    moments in the parameter's dtype and strides, ``step`` as a float32 scalar (exact up to 2^24). From fp32, ``to_own``
    makes the same state again, every value bit for bit and the codes with it (but see ``moments.recovered_grid``; and a
    code of m beside a root of 0, which stands for 0 whatever it is, becomes that of 0), as long as v is 0 or a normal
    number. 16 bits lose what torch's own moments lose. What is kept of weights beside 16-bit parameters is left out.

    ``"bitsandbytes"``: the nested form, which bitsandbytes reads from 0.49.2 on, for its Adam and AdamW classes alike,
    since they take the same step. Each parameter is in 8 bits as ``AdamW8bit`` has it, nearest values of the dynamic
    map, or in fp32 below 4096 elements and in groups with ``moments="32bit"``; all of its classes step both. State
    under ``moments="bnb8bit"`` leaves byte for byte. Its map has no positive value below 3.25e-7 of a block's largest
    v: less than half of that becomes 0.

    Args:
        state_dict: ours, whole.
        groups: our optimizer's param groups: shapes, dtypes and strides of the parameters.
        kind: ``"torch"`` or ``"bitsandbytes"``.

    Returns:
        A new dictionary; parameters keep their ids, moments are on the device of the state. No tensor is shared.

    Raises:
        ValueError: another kind; state that ``saved_state.check`` refuses; ``maximize`` or L2 weight decay, which
            bitsandbytes does not have.
    """
    if kind not in FORMATS:
        raise ValueError(f"kind is {kind!r}; accepted: {', '.join(map(repr, FORMATS))}")
    saved_state.check(state_dict, groups)
    owners = saved_state.owners_of(state_dict, groups)
    states = {key: state_from_own(state, owners[key], kind) for key, state in state_dict["state"].items() if state}
    return {**state_dict, "state": states, "param_groups": groups_from_own(state_dict["param_groups"], kind)}


def groups_from_own(saved_groups: Sequence[Mapping[str, Any]], kind: str) -> list[dict[str, Any]]:
    """The param groups of another optimizer, made of ours; a part of ``from_own``."""
    form = FORMATS[kind]
    theirs = []
    for index, saved in enumerate(saved_groups):
        defaults = form.defaults(saved, f"state_dict, param group {index}")
        # Their settings in their order with our values, then what others left in the group, then the parameters.
        carried = {name: copy.deepcopy(saved[name]) for name in saved if name in defaults or name not in OWN_SETTINGS}
        params = carried.pop("params")
        theirs.append({**defaults, **carried, "lr": float(saved["lr"]), "params": params})
    return theirs


def state_from_own(state: Mapping[str, Tensor], owner: Owner, kind: str) -> dict[str, Any]:
    """A parameter's state of another optimizer, made of ours, which was checked; a part of ``from_own``."""
    return FORMATS[kind].write_state(state, owner.param, owner.moments)


def own_group(saved: Mapping[str, Any], group: Mapping[str, Any], form: Format, where: str) -> dict[str, Any]:
    """Our param group, made of another optimizer's; a part of ``to_own``."""
    if missing := [name for name in SHARED_SETTINGS if name not in saved]:
        raise ValueError(
            f"{where} has no {', '.join(map(repr, missing))}; accepted: all of {', '.join(SHARED_SETTINGS)}"
        )
    form.check_group(saved, group, where)
    own = {name: group[name] for name in OWN_SETTINGS if name in group}
    carried = {name: copy.deepcopy(value) for name, value in saved.items() if name not in form.settings}
    betas = carried["betas"]
    if isinstance(betas, tuple | list):  # of tensors, where torch captures steps in a graph
        carried["betas"] = tuple(float(beta) if isinstance(beta, Tensor) else beta for beta in betas)
    return {**own, **carried}
