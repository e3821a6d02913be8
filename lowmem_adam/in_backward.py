"""Gradient release: a parameter is stepped in the backward pass, as soon as its gradient is there, which is then freed.

The gradients of a model never are there together, which on a device is what is left of the memory of training beside
the parameters once moments are on the host. Source of the idea: Lv et al. 2023 (arXiv 2306.09782); torch's tutorial
"How to save memory by fusing the optimizer step into the backward pass".
"""

from __future__ import annotations

import sys
import threading
import weakref
from types import TracebackType
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from lowmem_adam.host_gradients import may_be_reduced_later, several_processes
from lowmem_adam.offload import on_device
from lowmem_adam.optimizer import Adam8bit
from lowmem_adam.shard import Partition
from lowmem_adam.stand_ins import SteppedGradient, local_part, place_like
from lowmem_adam.stepping import refuse_capture
from lowmem_adam.updating import Flow, Task, count, stages_of


def step_in_backward(model: nn.Module, optimizer: Adam8bit) -> StepInBackward:
    """Step each parameter of a model in the backward pass, as its gradient becomes final, and free the gradient.

    The training loop stays as it is: ``zero_grad()``, one backward pass, ``step()``, which then steps what was not
    stepped yet, and the learning-rate scheduler. Steps have the bits that they have without this. In ``param.grad``
    stands a tensor that refuses to be read: what needs all gradients at once cannot be had.

    With ``offload`` the host steps parameters while the device goes on with the backward pass. Gradients that have a
    graph (``create_graph=True``) are left to ``step()``.

    Args:
        model: has parameters of the optimizer. FSDP2's is served, as it reduces gradients before it calls hooks.
        optimizer: ``Adam8bit`` or ``AdamW8bit``, also as ``Accelerator.prepare`` returns it.

    Returns:
        What undoes it by ``remove()``, or at the end of a ``with`` block.

    Raises:
        TypeError: another model or optimizer.
        ValueError: what cannot be served: ``DistributedDataParallel``, which reduces gradients later and keeps them in
            buckets of its own, so that none would be freed; moments that several ranks share; accelerate's
            accumulation over several passes and its ``GradScaler``; ``nonfinite="error"``, which checks all gradients
            first; gradients that are there already; a model of which the optimizer has no parameter, or whose
            parameters another optimizer steps in this way.
        RuntimeError: the optimizer steps in backward passes already, or is being profiled. Later, from where it is
            tried: a second gradient for a parameter before ``zero_grad()`` and whatever else reads gradients,
            ``clip_grad_norm_``, ``GradScaler``.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"model is a {type(model).__name__}; accepted: a torch.nn.Module")
    own = _own_of_accelerate(optimizer)
    if not isinstance(own, Adam8bit):
        raise TypeError(f"optimizer is a {type(own).__name__}; accepted: Adam8bit, AdamW8bit")
    if own._in_backward is not None:
        raise RuntimeError("the optimizer steps in backward passes already; accepted: remove() of that handle first")
    if own._stepper.listener is not None:
        raise RuntimeError(
            "the optimizer is being profiled, which sees step() alone; accepted: the end of profile first"
        )
    if any(isinstance(module, nn.parallel.DistributedDataParallel) for module in model.modules()):
        raise ValueError(
            "model is a DistributedDataParallel, which reduces gradients after their parameters' hooks and keeps all "
            "of them in its buckets; accepted: a model in one process, or FSDP2's fully_shard"
        )
    return StepInBackward(model, own)


def _own_of_accelerate(optimizer: Any) -> Any:
    """The optimizer that accelerate has wrapped, or what was given.

    Raises:
        ValueError: accelerate was told to do what cannot be served.
    """
    accelerate = sys.modules.get("accelerate.optimizer")
    if accelerate is None or not isinstance(optimizer, accelerate.AcceleratedOptimizer):
        return optimizer
    if optimizer.scaler is not None:
        raise ValueError("accelerate scales gradients (mixed_precision='fp16'); accepted: 'no' and 'bf16'")
    passes = optimizer.gradient_state.num_steps
    if passes > 1:
        raise ValueError(f"accelerate's gradient_accumulation_steps is {passes}; accepted: 1")
    return optimizer.optimizer


def _next_of(stepped: Tensor) -> Tensor:
    assert isinstance(stepped, SteppedGradient)
    following = stepped.next()
    assert following is not None
    return following


class _GradientHook:
    """A hook of a parameter that keeps neither the optimizer nor its state alive."""

    def __init__(self, handle: StepInBackward) -> None:
        self.handle = weakref.ref(handle)

    def __call__(self, param: Tensor) -> None:
        handle = self.handle()
        if handle is not None:
            handle._step(param)


class _EndOfPass:
    """Autograd calls it at the end of a backward pass, and drops it uncalled where the pass is broken off.

    So what was begun is stepped in either case. After an error that may be a moment later than the caller has it, in
    the thread of a device: the optimizer's calls wait for it.
    """

    def __init__(self, handle: StepInBackward, flow: Flow) -> None:
        self._handle, self._flow = handle, flow

    def __call__(self) -> None:
        self._handle._finish(self._flow)

    def __del__(self) -> None:
        try:
            self._handle._finish(self._flow)
        except Exception as error:  # noqa: BLE001 (raised by the next call; from here nobody would see it)
            self._handle._failure = error


class StepInBackward:
    """What ``step_in_backward`` has set up; see there. Lives as long as its optimizer."""

    def __init__(self, model: nn.Module, optimizer: Adam8bit) -> None:
        self._optimizer = optimizer
        held = {id(param) for group in optimizer.param_groups for param in group["params"]}
        self._params = [param for param in model.parameters() if id(param) in held]
        self._check_params(model)
        self._check_settings()
        # Autograd runs the hooks of each device's parameters in a thread of that device.
        self._lock = threading.RLock()
        self._flow: Flow | None = None
        self._partition: Partition | None = None
        self._pass = -1
        self._places: dict[int, tuple[int, int]] = {}
        self._placed: tuple[tuple[int, ...], list[int]] = ((), [])
        self._waiting: list[Task] = []
        self._waiting_bytes = 0
        self._failure: Exception | None = None
        self._pause_taking(True)
        self._hooks: list[Any] = []
        for param in self._params:
            if param.requires_grad:
                hook = param.register_post_accumulate_grad_hook(_GradientHook(self))  # type: ignore[no-untyped-call]
                self._hooks.append(hook)
        optimizer._in_backward = self

    def remove(self) -> None:
        """Undo it: gradients are there for ``step()`` again. Further calls do nothing."""
        if self._optimizer._in_backward is not self:
            return
        try:
            self.finish()
            self._pause_taking(False)
        finally:
            self._optimizer._in_backward = None
            while self._hooks:
                self._hooks.pop().remove()
        for param in self._params:
            if param.grad is not None and isinstance(part := local_part(param.grad), SteppedGradient):
                param.grad = None if part.next() is None else place_like(param.grad, _next_of)

    def __enter__(self) -> StepInBackward:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.remove()

    @torch._disable_dynamo  # type: ignore[attr-defined]
    def finish(self) -> None:
        """Step what still waits, and let what reads parameters wait for all that were stepped.

        Raises:
            Exception: that failed, now or at the end of a pass that was broken off.
        """
        with self._lock:
            failure, self._failure = self._failure, None
            if failure is not None:
                raise failure
            if self._flow is not None:
                self._finish(self._flow)
            offload = self._optimizer._stepper.offload
            if offload is not None:
                offload.join()  # where another thread has finished it, that one's stream waits alone

    @torch.no_grad()
    def _finish(self, flow: Flow) -> None:
        with self._lock:
            if self._flow is flow:
                self._flow = None
                self._send(flow)
                flow.finish()

    # ---------------------------------------------------------------- a parameter with its gradient

    @torch.no_grad()
    @torch._disable_dynamo  # type: ignore[attr-defined]
    def _step(self, param: Tensor) -> None:
        if param.grad is None:
            return
        part = local_part(param.grad)
        if isinstance(part, SteppedGradient):
            if part.next() is None:
                return
            param.grad = place_like(param.grad, _next_of)
        # One that has a graph (create_graph=True) is still wanted: step() has it.
        if not (param.grad.requires_grad or local_part(param.grad).requires_grad):
            with self._lock:
                self._step_with(param, param.grad)

    def _step_with(self, param: Tensor, grad: Tensor) -> None:
        optimizer, stepper = self._optimizer, self._optimizer._stepper
        flow, partition = self._current_flow()
        if id(param) not in self._places:  # it was taken out of the optimizer
            return
        group_index, index = self._places[id(param)]
        group = optimizer.param_groups[group_index]
        tasks = stepper.check_some(group, group_index, [(index, param)], optimizer.state, partition, 1.0)
        tasks = stepper.begin(tasks, stepper.made(tasks, partition), optimizer.state, partition)
        param.grad = place_like(grad, lambda part: SteppedGradient(part, stepper.owner))
        # As for every write into a parameter: where it was saved for the rest of the pass, that is an error of torch's.
        torch.autograd.graph.increment_version(param)
        for task in tasks:
            if stepper.offload is not None and not task.prepared.param.is_cpu:  # type: ignore[union-attr]
                # Now, on the stream that has made the gradient: another one may send it.
                stepper.offload.lane(task.prepared.param.device).follow()  # type: ignore[union-attr]
        self._waiting += tasks
        self._waiting_bytes += sum(part.nbytes for task in tasks for part in on_device(task.param, task.grad))
        count(tasks)
        optimizer._consolidated = None
        if stepper.offload is None or param.is_cpu or self._waiting_bytes >= stepper.offload.buffer_bytes:
            self._send(flow)
        if self._pass < 0:
            self.finish()

    def _current_flow(self) -> tuple[Flow, Partition]:
        """What the parameters of this backward pass go through; ends that of a pass that was broken off."""
        this_pass = torch._C._current_graph_task_id()
        if self._flow is not None and this_pass != self._pass:
            self.finish()
        if self._flow is None or self._partition is None:
            refuse_capture()
            self._check_settings()
            optimizer = self._optimizer
            self._partition = optimizer._cut()
            placed = (optimizer._known, [len(group["params"]) for group in optimizer.param_groups])
            if not optimizer._known or placed != self._placed:
                self._placed = placed
                self._places = {
                    id(param): (group_index, index)
                    for group_index, group in enumerate(optimizer.param_groups)
                    for index, param in enumerate(group["params"])
                }
            self._flow = Flow(self._partition, optimizer._stepper.offload, optimizer._stepper.skipped)
            self._pass = this_pass
            if this_pass >= 0:
                torch.autograd.Variable._execution_engine.queue_callback(_EndOfPass(self, self._flow))
        return self._flow, self._partition

    def _send(self, flow: Flow) -> None:
        """Start what waits on its way; small parameters go together."""
        assert self._partition is not None
        work = [(self._partition.own(task.param), task) for task in self._waiting]
        self._waiting, self._waiting_bytes = [], 0
        for stage in stages_of(work, self._optimizer._stepper.offload, None):
            flow.put(stage)

    # ---------------------------------------------------------------- what can be served

    def _check_params(self, model: nn.Module) -> None:
        """Check the parameters that are to be stepped.

        Raises:
            ValueError: there are none, they have gradients, or another optimizer steps them.
        """
        if not self._params:
            raise ValueError(
                f"the optimizer has none of the {sum(1 for _ in model.parameters())} parameters of the model; "
                "accepted: an optimizer of this model's parameters"
            )
        given = sum(param.grad is not None for param in self._params)
        if given:
            raise ValueError(f"{given} parameters have gradients; accepted: none, as after zero_grad() or before any")
        hooks = [
            hook for p in self._params for hook in (getattr(p, "_post_accumulate_grad_hooks", None) or {}).values()
        ]
        if any(isinstance(hook, _GradientHook) and hook.handle() is not None for hook in hooks):
            raise ValueError(
                "another optimizer steps parameters of the model in the backward pass; accepted: remove() of its "
                "handle first"
            )

    def _check_settings(self) -> None:
        """Check what may also change later.

        Raises:
            ValueError: what needs all gradients, or all ranks, at once.
        """
        optimizer = self._optimizer
        if optimizer._stops_at_nonfinite():
            raise ValueError('nonfinite is "error", which checks all gradients first; accepted: "skip", "propagate"')
        if optimizer._capturable:
            raise ValueError(
                "capturable is True, for steps in a CUDA graph; accepted with step_in_backward: capturable=False"
            )
        size = optimizer._cut().world.size
        if size > 1:
            raise ValueError(
                f"{size} ranks share the moments, and all of them must step together; accepted: shard_group=None, as "
                "with FSDP2, or a group of one rank"
            )
        if several_processes() and any(may_be_reduced_later(param) for param in self._params):
            raise ValueError(
                f"there are {dist.get_world_size()} processes, and the model has plain parameters, whose gradients "
                "DistributedDataParallel reduces after their hooks; accepted: one process, or FSDP2's fully_shard"
            )

    def _pause_taking(self, paused: bool) -> None:
        if self._optimizer._stepper.gradients is not None:
            self._optimizer._stepper.gradients.descents.pause(paused)
