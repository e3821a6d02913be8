"""The phases of a step: what is checked, which state is made, and the update bucket by bucket.

Works on an optimizer's param groups and state; keeps what it found out about them from one step to the next.
"""

from __future__ import annotations

import operator
from collections import deque
from collections.abc import Mapping, MutableMapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from lowmem_adam import inputs, kernels, settings
from lowmem_adam.kernels.fragment import StepScalars, Work
from lowmem_adam.local import check_dtensor, is_dtensor, local_gradient
from lowmem_adam.prepared import Prepared, is_plain_gradient
from lowmem_adam.shard import Gather, Partition, Piece, read, write
from lowmem_adam.state import MASTER_KEYS, check_state, master_dtype, master_of, new_state, refit_master


class Task(NamedTuple):
    """A parameter that this step changes, with everything about it checked; of a DTensor's gradient what lies here."""

    param: Tensor
    grad: Tensor
    moments: str
    master: torch.dtype | None
    backend: str
    scalars: StepScalars
    label: str
    state: Mapping[str, Tensor] | None
    """None before its first step."""
    prepared: Prepared | None
    """None before its first step, and where the state keeps another rest of the weight than the group now asks for."""


class Stepper:
    """The phases in their order: ``check``, ``make_state``, ``update``."""

    def __init__(self) -> None:
        self.skipped: dict[torch.device, Tensor | int] = {}
        """Blocks of this rank's shard left out for a non-finite gradient, by device."""
        self._prepared: dict[Tensor, Prepared] = {}
        self._checked: dict[int, tuple[object, ...]] = {}

    def forget(self) -> None:
        """Drop what can be found out again, so that tensors that were replaced do not stay in memory."""
        self._prepared.clear()
        self._checked.clear()

    # ---------------------------------------------------------------- check

    def check(
        self,
        groups: Sequence[dict[str, Any]],
        states: Mapping[Tensor, dict[str, Tensor]],
        partition: Partition,
        grad_factor: float,
    ) -> list[Task]:
        """Settings, gradients and state of all parameters that have a gradient; nothing changes.

        Args:
            groups: param groups.
            states: the state of every parameter that has taken a step.
            partition: has cut all of these parameters.
            grad_factor: what gradients are multiplied by.

        Raises:
            ValueError: something is not accepted.
            RuntimeError: inside of a CUDA graph capture.
        """
        if torch.cuda.is_available() and torch.cuda.is_current_stream_capturing():
            raise RuntimeError(
                "step() in a CUDA graph capture would replay one step's learning rate and rounding for ever; "
                "accepted: steps outside of captures"
            )
        if len(self._prepared) > sum(len(group["params"]) for group in groups):
            self._prepared.clear()  # some belong to parameters that were taken out
        tasks: list[Task] = []
        for group_index, group in enumerate(groups):
            self._check_settings(group, group_index)
            lr = float(group["lr"])
            records: dict[int, StepScalars] = {}
            backends: dict[torch.device, str] = {}
            for index, param in enumerate(group["params"]):
                grad = param.grad
                if grad is None:
                    continue
                label = label_of(group, group_index, index)
                master = master_dtype(param.dtype, group)
                state, prepared = self._checked_state(param, grad, states, group["moments"], master, partition, label)
                if param.device not in backends:
                    backends[param.device] = kernels.choose(group["backend"], param.device)
                grad = local_gradient(param, grad)
                if group["nonfinite"] == "error":
                    _check_finite(param, grad, grad_factor, partition, label)
                step = int(state["step"]) + 1 if state else 1
                if step not in records:
                    records[step] = _scalars(group, lr, step, grad_factor, label)
                told = (group["moments"], master, backends[param.device], records[step], label)
                tasks.append(Task(param, grad, *told, state, prepared))
        return tasks

    def _check_settings(self, group: dict[str, Any], group_index: int) -> None:
        """Check the settings of a group, unless they are the very objects of the last step."""
        values = (len(group), *[group.get(name) for name in settings.ALL], group.get("backend"))
        known = self._checked.get(group_index, ())
        changeable = isinstance(group["lr"], Tensor) or not isinstance(group["betas"], tuple)
        if changeable or len(known) != len(values) or any(map(operator.is_not, values, known)):
            settings.check_group(group, f"param group {group_index}")
            self._checked[group_index] = values

    def _checked_state(
        self,
        param: Tensor,
        grad: Tensor,
        states: Mapping[Tensor, dict[str, Tensor]],
        moments: str,
        master: torch.dtype | None,
        partition: Partition,
        label: str,
    ) -> tuple[Mapping[str, Tensor] | None, Prepared | None]:
        """The state of a parameter that can be stepped with this gradient, and what is known of it."""
        # Not states[param], which would leave an empty entry behind.
        state: dict[str, Tensor] | None = states.get(param) or None
        prepared = self._prepared.get(param)
        known = state is not None and prepared is not None and prepared.fits(param, state, moments, master)
        if not known:
            inputs.check_param(param, label)
            if is_dtensor(param):
                check_dtensor(param, moments, label)
        if not is_plain_gradient(param, grad):
            inputs.check_gradient(param, grad, label)
        if not known:
            self._prepared.pop(param, None)
            prepared = None
            if state is not None and not _keeps_another(state, master):
                prepared = self._prepared[param] = _prepared(param, state, moments, label, partition, master)
            elif state is not None:
                held = master_of(state)
                span = None if is_dtensor(param) else partition.span(param)
                check_state(state, param.shape, moments, label, span, None if held is None else held.dtype)
                inputs.check_devices(state, param, label)
        return state, prepared

    # ---------------------------------------------------------------- state

    def make_state(
        self, tasks: Sequence[Task], states: MutableMapping[Tensor, dict[str, Tensor]], partition: Partition
    ) -> list[Task]:
        """Zero moments of this rank's blocks for parameters that get their first gradient.

        Of others, where ``low_precision_update`` or ``master_bits`` has changed, what is kept of the weight.

        Returns:
            The tasks, each with its state.
        """
        complete = []
        for task in tasks:
            if task.prepared is None:
                param, master = task.param, task.master
                if task.state is None:
                    states[param] = new_state(param, task.moments, partition.span(param), master)
                else:
                    refit_master(states[param], param, partition.span(param), master)
                state = states[param]
                prepared = _prepared(param, state, task.moments, task.label, partition, master)
                self._prepared[param] = prepared
                task = task._replace(state=state, prepared=prepared)
            complete.append(task)
        return complete

    # ---------------------------------------------------------------- update

    # What compilers make of the kernel may round differently. This is what torch.optim uses itself: unlike
    # torch.compiler.disable it does not import the compiler together with this module.
    @torch._disable_dynamo  # type: ignore[attr-defined]
    def update(self, tasks: Sequence[Task], partition: Partition) -> None:
        """Step this rank's shard and gather everybody's, buckets' gathers beside the next ones' steps.

        As many are on their way as the bytes of their copies allow. Every bucket is gathered, whatever has a gradient
        here: ranks that disagree about that still send alike.

        Args:
            tasks: complete ones.
            partition: who steps what.
        """
        by_id = {id(task.param): task for task in tasks}  # hashing a tensor takes longer than that
        world = partition.world
        on_their_way: deque[tuple[Gather, int]] = deque()
        for bucket in partition.buckets:
            self._step(
                [(piece, by_id[id(piece.param)]) for piece in bucket.pieces[world.rank] if id(piece.param) in by_id]
            )
            if world.size > 1:
                while on_their_way and bucket.copied + sum(held for _, held in on_their_way) > partition.bucket_bytes:
                    on_their_way.popleft()[0].wait()
                on_their_way.append((Gather(bucket, partition), bucket.copied))
        for gather, _ in on_their_way:
            gather.wait()
        for task in tasks:
            assert task.state is not None
            task.state["step"].fill_(task.scalars.step)

    def _step(self, work: Sequence[tuple[Piece, Task]]) -> None:
        calls: dict[tuple[str, torch.device], list[Work]] = {}
        copies: list[tuple[Piece, Tensor]] = []
        for piece, task in work:
            assert task.prepared is not None
            fragment = task.prepared.fragment(task.grad, piece.first_block, piece.end_block)
            if fragment.cache is None:
                copies.append((piece, fragment.param))
            calls.setdefault((task.backend, task.param.device), []).append((fragment, task.scalars))
        for (backend, device), fragments in calls.items():
            skipped = kernels.BACKENDS[backend](fragments)
            self.skipped[device] = self.skipped.get(device, 0) + skipped
        for piece, values in copies:
            write(piece.param, piece.start, piece.stop, values)


def _keeps_another(state: Mapping[str, Tensor], master: torch.dtype | None) -> bool:
    """Whether state keeps another rest of the weight than its group asks for; a step makes that good."""
    held = master_of(state)
    if held is None:
        return master is not None and not any(key in state for key in MASTER_KEYS.values())
    return held.dtype is not master


def _prepared(
    param: Tensor,
    state: Mapping[str, Tensor],
    moments: str,
    label: str,
    partition: Partition,
    master: torch.dtype | None,
) -> Prepared:
    return Prepared(param, state, moments, label, partition.layout(param), partition.span(param), master)


def label_of(group: Mapping[str, Any], group_index: int, index: int) -> str:
    """What errors call a parameter."""
    names = group.get("param_names")
    return f"param group {group_index}, parameter {index}" + (f" ({names[index]!r})" if names else "")


def _check_finite(param: Tensor, grad: Tensor, grad_factor: float, partition: Partition, label: str) -> None:
    """Check the gradient of the blocks that this rank steps: the others are other ranks' to check.

    Raises:
        ValueError: an element is an infinity or NaN, or becomes one by the factor.
    """
    piece = partition.own(param)
    if not is_dtensor(param) and (piece.first_block, piece.end_block) != (0, piece.layout.n_blocks):
        grad = read(grad, piece.start, piece.stop)
    if not inputs.is_finite(grad, grad_factor):
        count = int((~(grad * grad_factor).isfinite()).sum())
        raise ValueError(
            f"{label}: {count} of {grad.numel()} gradient elements are not finite; accepted with "
            'nonfinite="error": finite gradients'
        )


def _scalars(group: dict[str, Any], lr: float, step: int, grad_factor: float, label: str) -> StepScalars:
    """The record of a parameter's next step.

    Raises:
        ValueError: learning rate and decay are so large that their products leave float32.
    """
    scalars = StepScalars.at_step(
        step,
        lr=lr,
        betas=group["betas"],
        eps=group["eps"],
        weight_decay=group["weight_decay"],
        decoupled=group["decoupled_weight_decay"],
        maximize=group["maximize"],
        low_precision_update=group["low_precision_update"],
        nonfinite=group["nonfinite"],
        seed=group["seed"],
        grad_scale=grad_factor,
    )
    if max(scalars.step_size, abs(scalars.shrink)) > settings.FLOAT32_MAX:
        raise ValueError(
            f"{label}: lr is {lr!r} with weight_decay {group['weight_decay']!r}, a step of {scalars.step_size:g}; "
            f"accepted: steps and factors up to {settings.FLOAT32_MAX:g}"
        )
    return scalars
