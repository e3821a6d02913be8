"""A step that does what the last one did: the same parameters, state and settings, and gradients that look the same.

Nearly all steps are of this kind. Whether one is, is asked of all tensors at once, which takes a tenth of the time of
checking each and describing it to a kernel anew. Every fact that the phases of a step look at is compared; whatever
differs, the step goes through its phases, and these say what is wrong, if anything is.
"""

from __future__ import annotations

import ctypes
from collections.abc import Iterable, Iterator, Mapping, Sequence
from itertools import chain
from operator import is_
from typing import Any, NamedTuple

import torch
from torch import Tensor

from lowmem_adam import kernels
from lowmem_adam.kernels.fragment import Batch, Fragment, StepScalars
from lowmem_adam.local import is_plain
from lowmem_adam.looks import Look
from lowmem_adam.phases import CHECK, STEP, Listener
from lowmem_adam.shard import Partition
from lowmem_adam.updating import Skipped, Task, add_skipped

_SETTINGS = ("moments", "low_precision_update", "master_bits", "nonfinite", "backend")
"""Those that decide what state there is and what steps it; others are numbers in records, which are made anew."""

States = Mapping[Tensor, dict[str, Tensor]]


class Record(NamedTuple):
    """Whose hyperparameters are to be known: those of a group's parameters that have taken as many steps."""

    group_index: int
    place: int
    """Of the first of these parameters in the group."""
    task: int
    """Of the first of them among all that are stepped."""


class _Call(NamedTuple):
    """Fragments that one backend steps at a time."""

    backend: str
    device: torch.device
    fragments: list[Fragment]
    tasks: list[int]
    """Of every fragment the parameter, among all that are stepped."""
    records: list[int]
    rows: list[int]
    """Of every fragment the record, as a place in ``records``."""
    kept: dict[tuple[tuple[bool, ...], ...], dict[str, Any]]
    """What the backend knows, by the switches of records."""


class Repeat:
    """The step that was taken, to be taken again.

    Args:
        groups: param groups.
        states: the state of every parameter, after the step.
        tasks: of the step, complete ones, which ``can_repeat``.
        partition: of one process.
    """

    def __init__(
        self, groups: Sequence[dict[str, Any]], states: States, tasks: Sequence[Task], partition: Partition
    ) -> None:
        self._partition = partition
        self._groups = [list(group["params"]) for group in groups]
        self._settings = [_settings_of(group) for group in groups]
        self._params = [task.param for task in tasks]
        stepped = set(map(id, self._params))
        self._idle = [param for params in self._groups for param in params if id(param) not in stepped]

        self._owners, self._of_owners = list(states), list(states.values())
        self._states = [states[param] for param in self._params]
        self._keys = list(chain.from_iterable(self._states))
        self._tensors = list(_values(self._states))
        # Memory can move below a tensor that stays the same, by share_memory_() or an assignment to .data.
        self._addresses = _addresses(chain(self._params, self._tensors))
        self._params_look, self._grads_look = Look(self._params), Look([task.grad for task in tasks])

        self._step_tensors = [state["step"] for state in self._states]
        # Read and written where they lie: by way of torch that takes longer than all else that is done for a parameter.
        self._counters = [ctypes.c_int64.from_address(step.data_ptr()) for step in self._step_tensors]
        self._steps = [counter.value for counter in self._counters]

        self._records, of_tasks = _records(self._groups, self._params, self._steps)
        self._calls = _calls(tasks, of_tasks, partition)
        self._grads: list[Tensor] = []

    @staticmethod
    def can_repeat(groups: Sequence[dict[str, Any]], tasks: Sequence[Task], partition: Partition) -> bool:
        """Whether it is a step of one process, of plain tensors, counted here, and not after a look at all values."""
        return (
            partition.world.size == 1
            and len(tasks) > 0
            and all(group["nonfinite"] != "error" for group in groups)
            and all(
                is_plain(task.param)
                and type(task.grad) is Tensor
                and task.grad is task.param.grad
                and not task.grad.is_neg()
                and isinstance(task.scalars, StepScalars)
                for task in tasks
            )
        )

    def fits(self, groups: Sequence[dict[str, Any]], states: States, partition: Partition) -> bool:
        """Whether nothing has changed but values, addresses of gradients, and numbers among the settings."""
        return (
            partition is self._partition
            and self._fit_groups(groups)
            and self._fit_gradients()
            and self._params_look.fits(self._params)
            and self._fit_states(states)
            and _addresses(chain(self._params, self._tensors)) == self._addresses
            and [counter.value for counter in self._counters] == self._steps
        )

    def _fit_groups(self, groups: Sequence[dict[str, Any]]) -> bool:
        if len(groups) != len(self._groups):
            return False
        for group, params, values in zip(groups, self._groups, self._settings, strict=True):
            if not (_same(group["params"], params) and all(map(is_, _settings_of(group), values))):
                return False
        return True

    def _fit_gradients(self) -> bool:
        self._grads = []
        if any(param.grad is not None for param in self._idle):
            return False
        grads = [param.grad for param in self._params]
        fit = self._grads_look.fits(grads)
        if fit:
            self._grads = grads  # type: ignore[assignment]
        return fit

    def _fit_states(self, states: States) -> bool:
        return (
            _same(states, self._owners)
            and all(map(is_, states.values(), self._of_owners))
            and list(chain.from_iterable(self._states)) == self._keys
            and all(map(is_, _values(self._states), self._tensors))
        )

    def records(self, group_index: int) -> Iterator[tuple[int, int]]:
        """Of which steps hyperparameters are needed, each with the first parameter of the group that takes it."""
        for record in self._records:
            if record.group_index == group_index:
                yield record.place, self._steps[record.task] + 1

    def step(self, records: Sequence[StepScalars], skipped: Skipped, listener: Listener | None) -> None:
        """Take the step, where ``fits`` has just said that it can be taken.

        Args:
            records: one for each that ``records`` asks for, group by group.
            skipped: is added to.
            listener: is told of the kernel's calls; None for nobody.
        """
        grads, self._grads = self._grads, []
        addresses = _addresses(grads)
        for call in self._calls:
            used = [records[record] for record in call.records]
            switches = tuple((one.weight_decay != 0.0, one.stochastic, one.skip_nonfinite, one.wide) for one in used)
            if switches not in call.kept:
                call.kept.clear()
                call.kept[switches] = {}
            own, places = [grads[task] for task in call.tasks], [addresses[task] for task in call.tasks]
            batch = Batch(call.fragments, own, places, used, call.rows, call.kept[switches])
            if listener is not None:
                listener.now(STEP)
            add_skipped(skipped, call.device, kernels.BACKENDS[call.backend](batch))
            if listener is not None:
                listener.now(CHECK)
        self._steps = [step + 1 for step in self._steps]
        for counter, step in zip(self._counters, self._steps, strict=True):
            counter.value = step
        torch.autograd.graph.increment_version(self._step_tensors)


def _settings_of(group: Mapping[str, Any]) -> list[Any]:
    return [group.get(name) for name in _SETTINGS]


def _same(tensors: Iterable[Tensor], held: Sequence[Tensor]) -> bool:
    return len(tensors) == len(held) and all(map(is_, tensors, held))  # type: ignore[arg-type]


def _values(states: Iterable[dict[str, Tensor]]) -> Iterator[Tensor]:
    return chain.from_iterable(map(dict.values, states))


def _addresses(tensors: Iterable[Tensor]) -> list[int]:
    return list(map(Tensor.data_ptr, tensors))


def _records(
    groups: Sequence[Sequence[Tensor]], params: Sequence[Tensor], steps: Sequence[int]
) -> tuple[list[Record], list[int]]:
    """The records of parameters in the order of groups, and for every parameter which of them is its own."""
    places = {id(p): (group_index, index) for group_index, group in enumerate(groups) for index, p in enumerate(group)}
    records: list[Record] = []
    known: dict[tuple[int, int], int] = {}
    of_params: list[int] = []
    for task, (param, step) in enumerate(zip(params, steps, strict=True)):
        group_index, index = places[id(param)]
        if (group_index, step) not in known:
            known[group_index, step] = len(records)
            records.append(Record(group_index, index, task))
        of_params.append(known[group_index, step])
    return records, of_params


def _calls(tasks: Sequence[Task], records: Sequence[int], partition: Partition) -> list[_Call]:
    calls: dict[tuple[str, torch.device], _Call] = {}
    for place, (task, record) in enumerate(zip(tasks, records, strict=True)):
        first_block, end_block = partition.span(task.param)
        if first_block == end_block:
            continue
        assert task.prepared is not None
        # The parameter in its gradient's place, which would else stay in memory.
        fragment = task.prepared.fragment(task.prepared.param, first_block, end_block)
        key = (task.backend, task.param.device)
        call = calls.setdefault(key, _Call(*key, [], [], [], [], {}))
        if record not in call.records:
            call.records.append(record)
        call.fragments.append(fragment)
        call.tasks.append(place)
        call.rows.append(call.records.index(record))
    return list(calls.values())
