"""Checkpoint files of one optimizer as files of another: ours, torch's, bitsandbytes'; parts as a whole.

A parameter at a time. ``torch.save`` takes all tensors together, so converted ones wait in a file of their own, the
spool, beside the target: what lies in memory is what one parameter takes, apart from pages of mapped files, which the
system takes back as it needs to. A spool holds no more than the target does, and for parts as much again.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from lowmem_adam import checkpoint, foreign, saved_state, settings, stored
from lowmem_adam.foreign.moments import Source, coded_state, pair_of_sources
from lowmem_adam.saved_state import Owner
from lowmem_adam.spool import Spool
from lowmem_adam.state import FULL_KEYS, MASTER_KEYS
from lowmem_adam.stored import Stored

OWN: tuple[str, ...] = tuple(map(str, settings.CHOICES["moments"]))
TARGETS = (*foreign.FORMATS, *OWN)
"""Other optimizers, and our own by their setting of ``moments``."""

BETWEEN = {"torch": "32bit", "bitsandbytes": "bnb8bit"}
"""The setting of ``moments`` that holds what one of them gets of another: values exact, codes as they are."""

Progress = Callable[[int, int], None]
"""Is told the elements done, and those there are."""

States = Iterator[tuple[Any, Mapping[str, Any]]]


class Converted(NamedTuple):
    """What was done."""

    kind: str
    """Whose state was found, as ``foreign.kind_of``."""
    to: str | None
    parameters: int
    """That have state."""
    elements: int
    source_bytes: int
    """Of tensors of the optimizer's state."""
    target_bytes: int
    left_out: dict[str, int]
    """What the target has no place for: names, and of how many parameters."""


def convert(
    sources: Sequence[Path],
    target: Path,
    to: str | None = None,
    *,
    key: str | None = None,
    alone: bool = False,
    optimizer: str | None = None,
    given: Mapping[str, Any] | None = None,
    force: bool = False,
    progress: Progress = lambda done, there: None,
    writing: Progress = lambda done, there: None,
) -> Converted:
    """Write a checkpoint file that another optimizer loads. The source is read only.

    Moments are those that ``load_state_dict`` and ``checkpoint.export`` make, to the bit (``foreign.to_own``,
    ``from_own``), but for strides and dtypes, which files do not tell: they are float32 and row-major for torch, which
    casts them to the parameters' dtype as it loads them.

    Args:
        sources: a file; a folder of ``torch.distributed.checkpoint``; or a file of every rank's own ``state_dict()``.
        target: is there whole or not at all.
        to: one of ``TARGETS``; None for the format that there is, to put parts together or to take one of a key.
        key: where the state_dict is in a larger dictionary, with dots between names.
        alone: write the state_dict by itself, without what is around it in the file.
        optimizer: ``"AdamW8bit"`` or ``"Adam8bit"``, where ours is made of another's; None for what its state says.
        given: settings that the other one's state does not have: ``seed``, ``nonfinite``, ``low_precision_update``.
        force: take the place of a file that is there.
        progress: is called after each parameter.
        writing: is told the bytes written, and about those there are, when all parameters are done.

    Raises:
        FileExistsError: the target is there, and no ``force``; or it is a source.
        OSError: a file cannot be read or written; nothing is left behind, and what was there is as it was.
        stored.NotACheckpointError: not the state of an optimizer that is known here, or damaged.
        ValueError: an argument; state that ``foreign.to_own``, ``from_own`` or ``saved_state.check`` refuse.
    """
    given = dict(given or {})
    _check_arguments(sources, target, to, force)
    stored.check_settings(given)
    with Spool(target.parent) as spool:
        whole, done = _converted(sources, to, key, alone, optimizer, given, progress, spool)
        # Nothing holds the source any more, unless it is a part of what is written.
        there = _nbytes(whole)
        checkpoint.write(whole, target, lambda written: writing(min(written, there), there))
    return done


def _converted(
    sources: Sequence[Path],
    to: str | None,
    key: str | None,
    alone: bool,
    optimizer: str | None,
    given: Mapping[str, Any],
    progress: Progress,
    spool: Spool,
) -> tuple[Any, Converted]:
    """What is to be written, and what was done."""
    found = stored.opened(sources, key, spool)
    groups, states, elements = _plan(found, to, optimizer, given)
    before, there = found.state_dict["state"], sum(elements.values())
    done, state, source_bytes, target_bytes = 0, {}, 0, 0
    progress(0, there)
    for name, tensors in states:
        state[name] = tensors if to is None else _put(tensors, spool)
        del tensors  # before the next ones are made
        source_bytes, target_bytes = source_bytes + _nbytes(before[name]), target_bytes + _nbytes(state[name])
        done += elements[name]
        progress(done, there)
    counts = {name: sum(name in tensors for tensors in before.values()) for name in MASTER_KEYS.values()}
    left_out = {name: count for name, count in counts.items() if count and to in foreign.FORMATS}
    state_dict = {**found.state_dict, "state": state, "param_groups": groups}
    whole = state_dict if alone else found.replaced(state_dict)
    return whole, Converted(found.kind, to, len(state), done, source_bytes, target_bytes, left_out)


def _check_arguments(sources: Sequence[Path], target: Path, to: str | None, force: bool) -> None:
    if to is not None and to not in TARGETS:
        raise ValueError(f"to is {to!r}; accepted: {', '.join(map(repr, TARGETS))}")
    if not target.exists():
        return
    if any(source.exists() and source.samefile(target) for source in sources):
        raise FileExistsError(f"target is {target}, a source; accepted: another file, since sources are not changed")
    if target.is_dir():
        raise FileExistsError(f"target is {target}, a folder; accepted: a file")
    if not force:
        raise FileExistsError(f"target is {target}, which exists; accepted: a new file, or force")


def _plan(
    found: Stored, to: str | None, optimizer: str | None, given: Mapping[str, Any]
) -> tuple[list[dict[str, Any]], States, dict[Any, int]]:
    """The param groups of the target, the state of one parameter after the other, and the elements of each.

    Groups, shapes and dtypes are checked before the first.
    """
    if found.kind == "lowmem_adam" or to is None:
        for name, value in (("optimizer", optimizer), *given.items()):
            if value is not None:
                raise ValueError(f"{name} is {value!r}; accepted: None, where settings are those of the file")
    if found.kind == "lowmem_adam":
        return _plan_of_own(found.state_dict, to)
    if to is None:
        groups = stored.new_stand_ins(found.state_dict, "32bit", _any_class(found), {})
        return found.state_dict["param_groups"], _present(found.state_dict), _elements(found.state_dict, groups)
    groups = stored.new_stand_ins(found.state_dict, BETWEEN.get(to, to), optimizer, given)
    own_groups, states = foreign.each_to_own(found.state_dict, groups)
    elements = _elements(found.state_dict, groups)
    if to in OWN:
        return own_groups, states, elements
    owners = saved_state.owners_of({"state": {}, "param_groups": own_groups}, groups)
    theirs = foreign.groups_from_own(own_groups, to)
    return theirs, _each_of_theirs(states, owners, to), elements


def _each_of_theirs(states: States, owners: Mapping[Any, Owner], to: str) -> States:
    for name, state in states:
        made = foreign.state_from_own(state, owners[name], to)
        del state  # nothing of one parameter is held while the next one's is made
        yield name, made
        del made


def _any_class(found: Stored) -> str:
    decoupled = [group.get("decoupled_weight_decay", True) for group in found.state_dict["param_groups"]]
    return "AdamW8bit" if all(decoupled) else "Adam8bit"


def _plan_of_own(state_dict: dict[str, Any], to: str | None) -> tuple[list[dict[str, Any]], States, dict[Any, int]]:
    state_dict = foreign.to_own(state_dict, [])  # complete, where an earlier version wrote it
    groups = stored.own_stand_ins(state_dict)
    saved_state.check(state_dict, groups)
    owners = saved_state.owners_of(state_dict, groups)
    elements = _elements(state_dict, groups)
    saved_groups = state_dict["param_groups"]
    present = _present(state_dict)
    if to is None:
        return saved_groups, present, elements
    if to in OWN:
        own_groups = [{**group, "moments": to} for group in saved_groups]
        return own_groups, ((name, _recoded(state, owners[name], to)) for name, state in present), elements
    theirs = foreign.groups_from_own(saved_groups, to)
    full = {name: _in_float32(owner) for name, owner in owners.items()}
    return theirs, _each_of_theirs(present, full, to), elements


def _present(state_dict: Mapping[str, Any]) -> States:
    return ((name, state) for name, state in state_dict["state"].items() if state)


def _elements(state_dict: Mapping[str, Any], groups: Sequence[Mapping[str, Any]]) -> dict[Any, int]:
    """Of the parameters that have state, by id."""
    pairs = zip(state_dict["param_groups"], groups, strict=True)
    counts = {
        name: param.numel()
        for saved, group in pairs
        for name, param in zip(saved["params"], group["params"], strict=True)
    }
    return {name: counts[name] for name, state in state_dict["state"].items() if state and name in counts}


def _in_float32(owner: Owner) -> Owner:
    """As if the parameter were of float32: then its moments are written so."""
    return owner._replace(param=torch.empty(owner.param.shape, device="meta"))


def _recoded(state: Mapping[str, Any], owner: Owner, moments: str) -> Mapping[str, Any]:
    """Our state under another setting of ``moments``; what is kept of the weight stays."""
    if owner.moments == moments:
        return state
    values = state if FULL_KEYS[0] in state else foreign.state_from_own(state, _in_float32(owner), "torch")
    exp_avg, exp_avg_sq = (values[key] for key in FULL_KEYS)
    source = Source(state["step"], exp_avg.device, pair_of_sources(exp_avg, exp_avg_sq))
    kept = {name: value for name, value in state.items() if name in MASTER_KEYS.values()}
    return {**coded_state(source, owner.param.shape, moments, owner.label), **kept}


def _put(value: Any, spool: Spool) -> Any:
    if isinstance(value, Tensor):
        return spool.put(value)
    return {name: _put(entry, spool) for name, entry in value.items()} if isinstance(value, Mapping) else value


def _nbytes(value: Any) -> int:
    """Of the tensors of a parameter's state, or of a larger dictionary."""
    if isinstance(value, Mapping):
        return sum(map(_nbytes, value.values()))
    if isinstance(value, list | tuple):
        return sum(map(_nbytes, value))
    return value.nbytes if isinstance(value, Tensor) else 0
