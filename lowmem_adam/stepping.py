"""The phases of a step: what is checked, which state is made, and the update bucket by bucket.

Works on an optimizer's param groups and state; keeps what it found out about them from one step to the next.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Iterable, Mapping, MutableMapping, Sequence
from typing import Any

import torch
from torch import Tensor

from lowmem_adam import inputs, kernels, making, settings, updating
from lowmem_adam.host_gradients import HostGradients
from lowmem_adam.kernels import triton
from lowmem_adam.kernels.fragment import DeviceRates, DeviceSettings, StepScalars
from lowmem_adam.kernels.tables import capturing
from lowmem_adam.layout import FLAT, FLAT_BLOCK_SIZE
from lowmem_adam.local import check_dtensor, is_dtensor, local, local_gradient
from lowmem_adam.offload import Offload
from lowmem_adam.phases import NOBODY, TRANSFER, Listener
from lowmem_adam.prepared import Prepared, is_plain_gradient
from lowmem_adam.repeating import Repeat
from lowmem_adam.shard import Partition, read
from lowmem_adam.stand_ins import HostGradient, SteppedGradient, local_part, place_like
from lowmem_adam.state import MASTER_KEYS, check_state, home_of, master_dtype, master_of
from lowmem_adam.updating import OnDevice, Task

_FIRST_IN_CAPTURE = (
    "a first step, or the first after a load, in a CUDA graph capture, which would make state anew at every replay; "
    "accepted: captures of a step that was taken a few times before"
)

States = MutableMapping[Tensor, dict[str, Tensor]]


class Stepper:
    """The phases in their order: ``check``, ``made`` and ``begin``, ``update``; or ``repeat``, for all of them."""

    def __init__(self, offload: Offload | None, gradients: HostGradients | None, capturable: bool = False) -> None:
        self.capturable = capturable
        """Steps are counted on the device, and nothing waits for it."""
        self.offload = offload
        """The way to the host; None where moments lie with their parameters."""
        self.gradients = gradients
        """Takes gradients there before they are stepped; None where they stay on their device."""
        self.captured: list[object] = []
        """What CUDA graphs of steps read."""
        self.owner = object()
        """Identifies whose gradients were stepped."""
        self.skipped: dict[torch.device, Tensor | int] = {}
        """Blocks of this rank's shard left out for a non-finite gradient, by device."""
        self.listener: Listener | None = None
        self._prepared: dict[Tensor, Prepared] = {}
        self._checked: dict[int, tuple[object, ...]] = {}
        self._repeat: Repeat | None = None
        self._stepped: list[int] = []
        """The parameters of the last step, by identity."""
        self._alike = 0
        """Steps in a row that went through the phases and were of the same parameters as the one before."""
        self._in_vain = 0
        """Steps in a row that were prepared to be repeated and were not."""

    def forget(self) -> None:
        """Drop what can be found out again, so that tensors that were replaced do not stay in memory."""
        self._prepared.clear()
        self._checked.clear()
        self._drop_repeat()

    def home_of(self, param: Tensor) -> torch.device:
        """Where a parameter's state lies and is stepped."""
        return home_of(param, None if self.offload is None else "cpu")

    def counted_on(self, param: Tensor) -> torch.device:
        """Where a parameter's steps are counted."""
        return param.device if self.capturable else torch.device("cpu")

    # ---------------------------------------------------------------- all phases at once

    # As of update, below.
    @torch._disable_dynamo  # type: ignore[attr-defined]
    def repeat(
        self,
        groups: Sequence[dict[str, Any]],
        states: States,
        partition: Partition,
        grad_factor: Callable[[], float | Tensor],
    ) -> bool:
        """Take a step that is the last one over again, as ``Repeat`` says; others are left to the phases.

        Args:
            groups: param groups.
            states: the state of every parameter that has taken a step.
            partition: has cut all of these parameters.
            grad_factor: tells what gradients are multiplied by.

        Returns:
            Whether the step is taken. If it is not, nothing has changed.

        Raises:
            ValueError: a setting is not accepted; nothing has changed.
            RuntimeError: inside of a CUDA graph capture.
        """
        repeat = self._repeat
        if repeat is None:
            return False
        refuse_capture()
        if not repeat.fits(groups, states, partition):
            self._drop_repeat()
            return False
        factor = grad_factor()
        scalars: list[StepScalars] = []
        for group_index, group in enumerate(groups):
            self._check_settings(group, group_index)
            records = _Records(group, factor)
            for index, step in repeat.records(group_index):
                scalars.append(records.at_step(step, label_of(group, group_index, index)))
        repeat.step(scalars, self.skipped, self.listener)
        self._in_vain = -1  # the end of this one adds one
        return True

    def remember(
        self, groups: Sequence[dict[str, Any]], states: States, tasks: Sequence[Task], partition: Partition
    ) -> None:
        """Prepare to ``repeat`` a step that was taken, where it is the second in a row of the same parameters.

        That takes as long as half a step: where it was in vain, it is left out of the next step, then of the next
        three, up to 63.
        """
        self._drop_repeat()
        stepped = [id(task.param) for task in tasks]
        self._alike = self._alike + 1 if stepped == self._stepped else 0
        self._stepped = stepped
        wanted = self._alike >= min(2**self._in_vain, 64)
        if wanted and self.offload is None and Repeat.can_repeat(groups, tasks, partition):
            self._repeat, self._alike = Repeat(groups, states, tasks, partition), 0

    def _drop_repeat(self) -> None:
        if self._repeat is not None:
            self._in_vain += 1
        self._repeat = None

    # ---------------------------------------------------------------- check

    def check(
        self,
        groups: Sequence[dict[str, Any]],
        states: Mapping[Tensor, dict[str, Tensor]],
        partition: Partition,
        grad_factor: float | Tensor,
        found_inf: float | Tensor = 0.0,
    ) -> list[Task]:
        """Settings, gradients and state of all parameters that have a gradient; nothing changes.

        Args:
            groups: param groups.
            states: the state of every parameter that has taken a step.
            partition: has cut all of these parameters.
            grad_factor: what gradients are multiplied by; a tensor only where the step is ``capturable``.
            found_inf: likewise, where that is not 0 there is to be no step.

        Raises:
            ValueError: something is not accepted.
            RuntimeError: inside of a CUDA graph capture that the step is not for.
        """
        if not self.capturable:
            refuse_capture()
        if len(self._prepared) > sum(len(group["params"]) for group in groups):
            self._prepared.clear()  # some belong to parameters that were taken out
        tasks: list[Task] = []
        for group_index, group in enumerate(groups):
            params = enumerate(group["params"])
            tasks += self.check_some(group, group_index, params, states, partition, grad_factor, found_inf)
        if self.capturable and capturing() and any(task.prepared is None for task in tasks):
            raise RuntimeError(next(task.label for task in tasks if task.prepared is None) + f": {_FIRST_IN_CAPTURE}")
        return tasks

    def check_some(
        self,
        group: dict[str, Any],
        group_index: int,
        params: Iterable[tuple[int, Tensor]],
        states: Mapping[Tensor, dict[str, Tensor]],
        partition: Partition,
        grad_factor: float | Tensor,
        found_inf: float | Tensor = 0.0,
    ) -> list[Task]:
        """As ``check``, of some parameters of a group, each with its place there."""
        self._check_settings(group, group_index)
        tasks: list[Task] = []
        rates = None
        if self.capturable:
            rates = DeviceRates(group["lr"], grad_factor, found_inf)
            _check_all_steps(group, f"param group {group_index}")
        records = _Records(group, grad_factor, rates, self.captured)
        backends: dict[tuple[torch.device, torch.dtype], str] = {}
        for index, param in params:
            grad = param.grad
            if grad is None:
                continue
            label = label_of(group, group_index, index)
            if isinstance(local_part(grad), SteppedGradient):
                grad = self._gradient_after(grad, label)
                if grad is None:
                    continue
            master = master_dtype(param.dtype, group)
            state, prepared = self._checked_state(param, grad, states, group["moments"], master, partition, label)
            place = (param.device, param.dtype)
            if place not in backends:
                backends[place] = kernels.choose(group["backend"], self.home_of(param), group, param.dtype)
            grad = local_gradient(param, grad)
            if isinstance(grad, HostGradient):
                grad = grad.values()
            backend = kernels.of_gradient(backends[place], group["backend"], param, grad, label)
            if self.capturable:
                for tensor, what in ((local(param), label), (grad, f"{label}: its gradient")):
                    triton.check_walkable(tensor, what)
            if group["nonfinite"] == "error":
                assert isinstance(grad_factor, float)
                _check_finite(param, grad, grad_factor, partition, label)
            told = (group["moments"], master, backend, records.next_of(state, label), label)
            tasks.append(Task(param, grad, *told, state, prepared))
        return tasks

    def _gradient_after(self, grad: Tensor, label: str) -> Tensor | None:
        """The gradient that is there after one that was stepped in the backward pass; None where there is no other.

        Raises:
            ValueError: another optimizer has stepped with it.
        """
        stepped = local_part(grad)
        assert isinstance(stepped, SteppedGradient)
        if stepped.owner is not self.owner:
            raise ValueError(
                f"{label}: another optimizer has stepped with its gradient, by step_in_backward, and freed it; "
                "accepted: gradients of a pass after remove() of that handle"
            )
        following = stepped.next()
        return None if following is None else place_like(grad, lambda _: following)

    def _check_settings(self, group: dict[str, Any], group_index: int) -> None:
        """Check the settings of a group, unless they are the very objects of the last step."""
        values = (len(group), *[group.get(name) for name in settings.ALL], group.get("backend"))
        known = self._checked.get(group_index, ())
        changeable = isinstance(group["lr"], Tensor) or not isinstance(group["betas"], tuple)
        if changeable or len(known) != len(values) or any(map(operator.is_not, values, known)):
            settings.check_group(group, f"param group {group_index}", capturable=self.capturable)
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
        if self.capturable and state is not None and state["step"].is_cpu:  # of a load
            if capturing():
                raise RuntimeError(f"{label}: {_FIRST_IN_CAPTURE}")
            state["step"] = state["step"].to(param.device)
        prepared = self._prepared.get(param)
        known = state is not None and prepared is not None and prepared.fits(param, state, moments, master)
        if not known:
            if is_dtensor(param):  # which a plain parameter may have been when it was taken
                check_dtensor(param, moments, label)
            if (partition.layout(param).block_size == FLAT_BLOCK_SIZE) != (moments == FLAT):
                raise ValueError(
                    f"{label}: moments is {moments!r}, and its blocks were cut for another setting; accepted: the one "
                    "that its param group had when the optimizer first saw it"
                )
            inputs.check_param(param, label)
        if not is_plain_gradient(param, grad):
            inputs.check_gradient(param, grad, label)
        if not known:
            self._prepared.pop(param, None)
            prepared = None
            if self.offload is not None and state is not None:
                # Lightning sends all state but "step" to the device after a load (_optimizer_to_device).
                state.update({key: value.cpu() for key, value in state.items() if not value.is_cpu})
            if state is not None and not _keeps_another(state, master):
                prepared = self._prepared[param] = _prepared(
                    param, state, moments, label, partition, master, self.home_of(param), self.counted_on(param)
                )
            elif state is not None:
                held = master_of(state)
                span = None if is_dtensor(param) else partition.span(param)
                check_state(state, param.shape, moments, label, span, None if held is None else held.dtype)
                inputs.check_devices(state, self.home_of(param), self.counted_on(param), label)
        return state, prepared

    # ---------------------------------------------------------------- state

    def made(self, tasks: Sequence[Task], partition: Partition) -> States:
        """Zero moments of this rank's blocks for parameters that get their first gradient; nothing changes.

        Of others, where ``low_precision_update`` or ``master_bits`` has changed, what is kept of the weight.

        Raises:
            torch.OutOfMemoryError: there is no memory for it.
        """
        return making.made([task for task in tasks if task.prepared is None], partition, self.home_of)

    def begin(self, tasks: Sequence[Task], made: States, states: States, partition: Partition) -> list[Task]:
        """Put in what was made.

        Args:
            tasks: checked ones.
            made: by ``made`` for these.
            states: the state of every parameter that has taken a step.
            partition: has cut their parameters.

        Returns:
            The tasks, each with its state.
        """
        states.update(made)
        complete = []
        for task in tasks:
            if task.prepared is None:
                param, state = task.param, states[task.param]
                home, counted = self.home_of(param), self.counted_on(param)
                state["step"] = state["step"].to(counted)
                prepared = _prepared(param, state, task.moments, task.label, partition, task.master, home, counted)
                self._prepared[param] = prepared
                task = task._replace(state=state, prepared=prepared)
            complete.append(task)
        return complete

    # ---------------------------------------------------------------- update

    # What compilers make of the kernel may round differently. This is what torch.optim uses itself: unlike
    # torch.compiler.disable it does not import the compiler together with this module.
    @torch._disable_dynamo  # type: ignore[attr-defined]
    def update(self, tasks: Sequence[Task], partition: Partition) -> None:
        """Step this rank's shard and gather everybody's; see ``updating.update``.

        Args:
            tasks: complete ones.
            partition: who steps what.
        """
        if self.gradients is not None:
            (self.listener or NOBODY).now(TRANSFER)
            self.gradients.descents.settle()  # also those that nobody waits for: their buffers are the step's now
        updating.update(tasks, partition, self.offload, self.skipped, self.listener or NOBODY)


def refuse_capture() -> None:
    """Refuse to step inside of a CUDA graph capture.

    Raises:
        RuntimeError: there is one.
    """
    if capturing():
        raise RuntimeError(
            "step() in a CUDA graph capture would replay one step's learning rate and rounding for ever; "
            "accepted: capturable=True, given to the optimizer's constructor, or steps outside of captures"
        )


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
    home: torch.device,
    counted: torch.device,
) -> Prepared:
    return Prepared(param, state, moments, label, partition.layout(param), partition.span(param), master, home, counted)


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


class _Records:
    """The hyperparameters of a param group's next steps, a record for each step number."""

    def __init__(
        self,
        group: dict[str, Any],
        grad_factor: float | Tensor,
        rates: DeviceRates | None = None,
        captured: list[object] | None = None,
    ) -> None:
        self._group = group
        self._by_step: dict[int, StepScalars] = {}
        self._on_device: OnDevice | None = None
        if rates is not None and captured is not None:
            self._on_device = (_device_settings(group), rates, captured)
        else:
            assert isinstance(grad_factor, float)
            self._lr, self._grad_factor = float(group["lr"]), grad_factor

    def next_of(self, state: Mapping[str, Tensor] | None, label: str) -> StepScalars | OnDevice:
        """Of a parameter's state; None before its first step."""
        if self._on_device is not None:
            return self._on_device
        return self.at_step(int(state["step"]) + 1 if state else 1, label)

    def at_step(self, step: int, label: str) -> StepScalars:
        """Of step number ``step``, on the host."""
        if step not in self._by_step:
            self._by_step[step] = _scalars(self._group, self._lr, step, self._grad_factor, label)
        return self._by_step[step]


def _device_settings(group: Mapping[str, Any]) -> DeviceSettings:
    return DeviceSettings(
        betas=(float(group["betas"][0]), float(group["betas"][1])),  # a list may be changed in place
        eps=group["eps"],
        weight_decay=group["weight_decay"],
        decoupled=group["decoupled_weight_decay"],
        maximize=group["maximize"],
        stochastic=group["low_precision_update"] == "stochastic",
        skip_nonfinite=group["nonfinite"] == "skip",
        seed=group["seed"],
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
    _check_range(group, max(scalars.step_size, abs(scalars.shrink)), label)
    return scalars


def _check_all_steps(group: Mapping[str, Any], label: str) -> None:
    """As ``_check_range``, of any step with this learning rate; one that is a tensor may lie on the device.

    Raises:
        ValueError: a step might be too large.
    """
    if not isinstance(group["lr"], Tensor):
        lr, decay = float(group["lr"]), group["weight_decay"] if group["decoupled_weight_decay"] else 0.0
        _check_range(group, max(lr / (1.0 - group["betas"][0]), abs(1.0 - lr * decay)), label)


def _check_range(group: Mapping[str, Any], largest: float, label: str) -> None:
    """Check that the size of a step and the factor of decay are float32 numbers.

    Raises:
        ValueError: the larger of them is not.
    """
    if largest > settings.FLOAT32_MAX:
        raise ValueError(
            f"{label}: lr is {float(group['lr'])!r} with weight_decay {group['weight_decay']!r}, a step or factor of "
            f"{largest:g}; accepted: steps and factors up to {settings.FLOAT32_MAX:g}"
        )
