"""What becomes of gradients before a step: they are clipped, reduced to shards, taken to the host, or used at once."""

from __future__ import annotations

import weakref
from collections.abc import Callable
from typing import Any, Protocol

import torch
from torch import Tensor

from lowmem_adam import compiled, local, reduction, settings
from lowmem_adam.kernels.tables import capturing
from lowmem_adam.saving import SavedOptimizer
from lowmem_adam.shard import Partition
from lowmem_adam.stepping import Stepper


class InBackward(Protocol):
    """Steps parameters in the backward pass; ``lowmem_adam.in_backward`` has it."""

    def finish(self) -> None:
        """Step what still waits, and let what reads parameters wait for it."""


class GradientOptimizer(SavedOptimizer):
    """An optimizer with what concerns the gradients that it has not stepped yet."""

    # Set from outside by who scales gradients, for the time of a step; see _grad_factor.
    grad_scale: Tensor
    found_inf: Tensor

    _stepper: Stepper
    _capturable: bool
    _clip_coefficient: float | Tensor
    _clipped_in_capture: bool
    # The first gradient of those that _clip_coefficient is of.
    _clipped: weakref.ref[Tensor] | None
    # DDP's buckets reduced since the last step; None without reduce_scatter_hook.
    _reduced: set[int] | None
    # What torch.compile looks at.
    _traced: compiled.Traced
    # While parameters are stepped in the backward pass.
    _in_backward: InBackward | None

    @torch._disable_dynamo  # type: ignore[attr-defined]
    def clip_grad_norm_(self, max_norm: float, norm_type: float = 2.0, error_if_nonfinite: bool = False) -> Tensor:
        """Clip the norm of all gradients together, as ``torch.nn.utils.clip_grad_norm_``, in the next step.

        Gradients stay as they are: the step multiplies them on the way, which saves a pass over them. Call it right
        before ``step``, after a ``GradScaler``'s ``unscale_``; where gradients are set to None instead, it goes with
        them. With ``reduce_scatter_hook`` it is a collective, of the parts that each rank has. The norm of gradients
        that ``offload_gradients`` has taken is computed on the host.

        Returns:
            The norm before clipping, a scalar.

        Raises:
            ValueError: ``max_norm`` is not a number from 0.
            RuntimeError: ``error_if_nonfinite`` and the norm is not finite; under ``step_in_backward``, which never has
                all gradients together.
        """
        settings.check_max_norm(max_norm)
        if self._in_backward is not None:
            raise RuntimeError(
                "clip_grad_norm_ needs all gradients at once, and step_in_backward frees each when it is stepped; "
                "accepted with it: no clipping by the global norm"
            )
        params = [param for group in self.param_groups for param in group["params"]]
        self._drop_clipping_of_others()
        if self._reduced is None:
            norm = torch.nn.utils.get_total_norm([p.grad for p in params if p.grad is not None], norm_type)
        else:
            norm = reduction.norm_of_shards(params, self._cut(), norm_type)
        if local.is_dtensor(norm):
            norm = norm.full_tensor()  # type: ignore[attr-defined]
        if error_if_nonfinite and not bool(norm.isfinite()):
            raise RuntimeError(f"the total norm of order {norm_type} of the gradients is non-finite: {float(norm)}")
        norm = norm * self._clip_coefficient
        self._clipped = next((weakref.ref(p.grad) for p in params if p.grad is not None), None)
        coefficient = (max_norm / (norm + 1e-6)).clamp(max=1.0)
        self._clip_coefficient *= coefficient.double() if self._capturable else float(coefficient)
        self._clipped_in_capture = capturing()
        return norm

    def zero_grad(self, set_to_none: bool = True) -> None:
        """As ``torch.optim.Optimizer.zero_grad``; also takes back a clipping that no step has used."""
        if torch.compiler.is_dynamo_compiling():
            compiled.zero_grad(self, set_to_none)
            return
        if self._in_backward is not None:
            self._in_backward.finish()
        self._use_up_gradients()
        super().zero_grad(set_to_none)

    def _drop_clipping_of_others(self) -> None:
        """Forget a clipping whose gradients were replaced without a step, as by ``model.zero_grad()``."""
        if self._clipped is not None:
            grads = (param.grad for group in self.param_groups for param in group["params"])
            if next((grad for grad in grads if grad is not None), None) is not self._clipped():
                self._clip_coefficient, self._clipped = 1.0, None

    def _cut(self, needed: Callable[[Tensor], bool] = lambda _: False) -> Partition:
        if self._in_backward is not None:
            self._in_backward.finish()  # of a pass that was broken off; state is what it says then
        return super()._cut(needed)

    def _watch_gradients(self) -> None:
        """Have the gradients of all parameters taken to the host, where that is asked for."""
        if self._stepper.gradients is not None:
            self._stepper.gradients.watch([param for group in self.param_groups for param in group["params"]])

    def _finish_in_backward(self, stepped: InBackward) -> None:
        """What a step has to do for parameters that were stepped in the backward pass.

        Raises:
            RuntimeError: a ``GradScaler`` gives the scale of gradients that are used up.
        """
        stepped.finish()
        if getattr(self, "grad_scale", None) is not None or getattr(self, "found_inf", None) is not None:
            raise RuntimeError(
                "a GradScaler tells the scale of gradients, and step_in_backward has stepped with them before; "
                "accepted with it: gradients that are not scaled, as with bfloat16"
            )

    def _use_up_gradients(self) -> None:
        """Forget what was of these gradients: their clipping, and which of them ranks have reduced."""
        self._clip_coefficient, self._clipped = 1.0, None
        if self._reduced is not None:
            self._reduced.clear()

    def _reduce_scatter(self, bucket: Any) -> Tensor:
        """What ``reduce_scatter_hook`` does with a bucket of DDP's; see there."""
        if self._reduced is None:
            self._reduced = set()
        if bucket.index() in self._reduced:
            raise RuntimeError(
                "gradients were reduced a second time without a step, when ranks no longer have all of them; accepted "
                "with reduce_scatter_hook: model.no_sync() for all backward passes of a step but the last, and "
                "optimizer.zero_grad() where a step is left out"
            )
        partition, params = self._cut(), bucket.parameters()
        if partition.world.group is not None and partition.world.size != torch.distributed.get_world_size():
            raise ValueError(
                f"reduce_scatter_hook: shard_group has {partition.world.size} of {torch.distributed.get_world_size()} "
                "ranks, and would average gradients among these alone; accepted: a shard_group of all ranks, as DDP's"
            )
        if self._shard_group is None or not all(param in partition for param in params):
            raise ValueError(
                f"reduce_scatter_hook: shard_group is {self._shard_group!r}, and the optimizer has "
                f"{sum(param in partition for param in params)} of a bucket's {len(params)} parameters; accepted: an "
                "optimizer with shard_group that has all parameters of the model"
            )
        self._reduced.add(bucket.index())
        return reduction.reduce_scatter(params, bucket.gradients(), bucket.buffer(), partition)

    def _found_inf(self) -> float | Tensor:
        """Above 0 where a scaler has found infinite gradients; read from the device unless ``capturable``."""
        found_inf: Tensor | None = getattr(self, "found_inf", None)
        if found_inf is None:
            return 0.0
        return found_inf if self._capturable else float(found_inf)

    def _grad_factor(self) -> float | Tensor:
        """What the step multiplies gradients by: clipping, and the inverse of an attribute ``grad_scale``.

        ``grad_scale`` and ``found_inf`` are the attributes by which ``torch.amp.GradScaler`` and others drive
        optimizers that unscale by themselves.
        """
        self._drop_clipping_of_others()
        if isinstance(self._clip_coefficient, Tensor) and self._clipped_in_capture != capturing():
            self._use_up_gradients()
            raise RuntimeError(
                "clip_grad_norm_ was called outside of a CUDA graph capture and step() inside of it, or the other way "
                "round; accepted: both in the capture, or both outside"
            )
        scale: Tensor | None = getattr(self, "grad_scale", None)
        if scale is None:
            return self._clip_coefficient
        return self._clip_coefficient / (scale.double() if self._capturable else float(scale))
