"""``Adam8bit`` and ``AdamW8bit``: param groups, state, and a step that reads as its phases."""

from __future__ import annotations

import operator
import warnings
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any, NamedTuple, TypedDict

import torch
from torch import Tensor
from torch.optim.optimizer import ParamsT

from lowmem_adam import checkpoint, inputs, kernels, settings
from lowmem_adam.codec import FORMAT
from lowmem_adam.kernels.fragment import StepScalars, Work
from lowmem_adam.prepared import Prepared, is_plain_gradient
from lowmem_adam.state import memory_by_kind, new_state

if TYPE_CHECKING:
    from typing_extensions import Unpack


class _Keywords(TypedDict, total=False):
    """The keyword-only arguments of ``Adam8bit``."""

    maximize: bool
    moments: str
    low_precision_update: str
    nonfinite: str
    seed: int
    backend: str | None


class _Work(NamedTuple):
    """A parameter that this step changes, with everything about it checked."""

    param: Tensor
    grad: Tensor
    moments: str
    backend: str
    scalars: StepScalars
    label: str


class Adam8bit(torch.optim.Optimizer):
    """Adam with 8-bit moments: about 2.02 bytes of state a parameter instead of 8.

    A drop-in for ``torch.optim.Adam`` (L2 weight decay; ``AdamW8bit`` decouples it). A step has three phases:

    1. *check*: settings, gradients and state of all parameters; an error leaves everything unchanged;
    2. *state*: zero moments for parameters that get their first gradient;
    3. *update*: all parameters in one pass and one call: gradient factor, finite check, decode, Adam in fp32, encode;
       blocks with a non-finite gradient stay.

    Moments of tensors with two and more dimensions and at least 4,096 elements, and of one-dimensional ones with at
    least 65,536, are held in 8 bits (``lowmem_adam.codec`` has the format); all others in fp32.

    Args:
        params: parameters, named parameters, or param-group dictionaries; float32, bfloat16 or float16. Every
            keyword below may be set per group.
        lr: learning rate, a number or a one-element tensor.
        betas: decay rates of the two moments, each from 0 below 1.
        eps: added to the denominator.
        weight_decay: L2 coefficient, added to the gradient.
        maximize: ascend instead of descend.
        moments: ``"8bit"``, or ``"32bit"`` for exact fp32 moments through the same code.
        low_precision_update: how bfloat16 and float16 parameters are rounded: ``"stochastic"`` lets updates smaller
            than their rounding step add up on average, ``"nearest"`` loses them.
        nonfinite: what a gradient with an infinity or NaN does. ``"skip"``: its block of at most 128 elements keeps
            parameter and moments and is counted in ``stats()``, while the step number counts on; ``"error"``: an
            error before anything changes; ``"propagate"``: as in torch, the parameter's element becomes NaN (its 8-bit
            first moment is reset to zero).
        seed: keys all rounding decisions; equal seeds give equal bits.
        backend: ``None`` for the best there is, ``"cpu"`` for the native kernel, which must be there then, or
            ``"reference"``. All give the same bits. It is the machine's: a load does not change it.

    Raises:
        ValueError: a value or parameter that is not accepted; the message names it and what is.
        TypeError: a keyword of another optimizer; the message says what to use instead.
        RuntimeError: ``backend="cpu"``, and the native library cannot be loaded.

    Source: Kingma & Ba 2015 (arXiv 1412.6980).
    """

    _decoupled = False

    # Set from outside by who scales gradients, for the time of a step; see _grad_factor.
    grad_scale: Tensor
    found_inf: Tensor

    def __init__(
        self,
        params: ParamsT,
        lr: float | Tensor = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0.0,
        *,
        maximize: bool = False,
        moments: str = "8bit",
        low_precision_update: str = "stochastic",
        nonfinite: str = "skip",
        seed: int = 0,
        backend: str | None = None,
        **unsupported: object,
    ) -> None:
        settings.refuse_keywords(unsupported)
        defaults = {
            "lr": lr,
            "betas": betas,
            "eps": eps,
            "weight_decay": weight_decay,
            "maximize": maximize,
            "moments": moments,
            "low_precision_update": low_precision_update,
            "nonfinite": nonfinite,
            "seed": seed,
            "backend": backend,
            "decoupled_weight_decay": self._decoupled,
            "format_version": FORMAT.version,
        }
        settings.check_group(defaults, type(self).__name__)
        self._reset_counters()
        super().__init__(params, settings.normalised(defaults))

    # ---------------------------------------------------------------- param groups

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add a param group, as ``torch.optim.Optimizer.add_param_group``.

        Raises:
            ValueError: a setting or parameter that is not accepted, or a parameter that the optimizer already has;
                no group is added.
        """
        if not isinstance(param_group, Mapping) or "params" not in param_group:
            raise TypeError(f"param group is {type(param_group).__name__}; accepted: a dict with the key 'params'")
        params = param_group["params"]
        if not isinstance(params, Tensor | set):  # torch refuses sets: their order changes from run to run
            params = list(params)
        where = f"param group {len(self.param_groups)}"
        group = {**self.defaults, **param_group, "params": params}
        settings.check_group(group, where)
        for name in ("decoupled_weight_decay", "format_version"):
            if group[name] != self.defaults[name]:
                raise ValueError(f"{where}: {name} is {group[name]!r}; accepted: {self.defaults[name]!r}")
        if not isinstance(params, set):
            self._check_params([params] if isinstance(params, Tensor) else params, group["backend"], where)
        super().add_param_group(settings.normalised(group))

    def _check_params(self, params: list[Any], backend: str | None, where: str) -> None:
        seen = {id(p): f"param group {g}" for g, group in enumerate(self.param_groups) for p in group["params"]}
        for index, entry in enumerate(params):
            name, param = entry if isinstance(entry, tuple) and len(entry) == 2 else (None, entry)
            label = f"{where}, parameter {index}" + (f" ({name!r})" if name else "")
            inputs.check_param(param, label)
            kernels.choose(backend, param.device)
            if id(param) in seen:
                raise ValueError(f"{label} is already in {seen[id(param)]}; accepted: each parameter once")
            seen[id(param)] = label

    # ---------------------------------------------------------------- step

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:  # type: ignore[override]
        """Update every parameter that has a gradient.

        Args:
            closure: evaluates the model anew and returns the loss.

        Returns:
            The closure's loss, or None.

        Raises:
            ValueError: a setting, a gradient or a state that is not accepted; a non-finite gradient under
                ``nonfinite="error"``. No parameter and no state has changed then.
            RuntimeError: inside of a CUDA graph capture.
        """
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        found_inf = getattr(self, "found_inf", None)
        if found_inf is not None and float(found_inf) > 0:
            self._clip_coefficient = 1.0  # it was of the gradients that are dropped here
            return loss
        work = self._checked_work(self._grad_factor())
        for param, _, moments, _, _, label in work:
            if not self.state.get(param):
                state = self.state[param] = new_state(param, moments)
                self._prepared[param] = Prepared(param, state, moments, label)
        self._update(work)
        self._clip_coefficient = 1.0
        self._warn_of_skipped()
        return loss

    def clip_grad_norm_(self, max_norm: float, norm_type: float = 2.0, error_if_nonfinite: bool = False) -> Tensor:
        """Clip the norm of all gradients together, as ``torch.nn.utils.clip_grad_norm_``, in the next step.

        Gradients stay as they are: the step multiplies them on the way, which saves a pass over them. Call it right
        before ``step``; ``zero_grad`` takes it back. After a ``GradScaler``'s ``unscale_``.

        Returns:
            The norm before clipping, a scalar.

        Raises:
            ValueError: ``max_norm`` is not a number from 0.
            RuntimeError: ``error_if_nonfinite`` and the norm is not finite.
        """
        settings.check_max_norm(max_norm)
        grads = [p.grad for group in self.param_groups for p in group["params"] if p.grad is not None]
        norm = torch.nn.utils.get_total_norm(grads, norm_type, error_if_nonfinite) * self._clip_coefficient
        self._clip_coefficient *= float((max_norm / (norm + 1e-6)).clamp(max=1.0))
        return norm

    def zero_grad(self, set_to_none: bool = True) -> None:
        """As ``torch.optim.Optimizer.zero_grad``; also takes back a clipping that no step has used."""
        self._clip_coefficient = 1.0
        super().zero_grad(set_to_none)

    def _grad_factor(self) -> float:
        """What the step multiplies gradients by: clipping, and the inverse of an attribute ``grad_scale``.

        ``grad_scale`` and ``found_inf`` are the attributes by which ``torch.amp.GradScaler`` and others drive
        optimizers that unscale by themselves.
        """
        scale = getattr(self, "grad_scale", None)
        return self._clip_coefficient if scale is None else self._clip_coefficient / float(scale)

    def _checked_work(self, grad_factor: float) -> list[_Work]:
        if torch.cuda.is_available() and torch.cuda.is_current_stream_capturing():
            raise RuntimeError(
                "step() in a CUDA graph capture would replay one step's learning rate and rounding for ever; "
                "accepted: steps outside of captures"
            )
        if len(self._prepared) > sum(len(group["params"]) for group in self.param_groups):
            self._prepared.clear()  # some belong to parameters that were taken out
        work: list[_Work] = []
        for group_index, group in enumerate(self.param_groups):
            self._check_settings(group, group_index)
            lr = float(group["lr"])
            records: dict[int, StepScalars] = {}
            backends: dict[torch.device, str] = {}
            names = group.get("param_names")
            for index, param in enumerate(group["params"]):
                grad = param.grad
                if grad is None:
                    continue
                label = f"param group {group_index}, parameter {index}" + (f" ({names[index]!r})" if names else "")
                state = self._checked_state(param, grad, group["moments"], label)
                if param.device not in backends:
                    backends[param.device] = kernels.choose(group["backend"], param.device)
                if group["nonfinite"] == "error" and not inputs.is_finite(grad, grad_factor):
                    count = int((~(grad * grad_factor).isfinite()).sum())
                    raise ValueError(
                        f"{label}: {count} of {grad.numel()} gradient elements are not finite; accepted with "
                        'nonfinite="error": finite gradients'
                    )
                step = int(state["step"]) + 1 if state else 1
                if step not in records:
                    records[step] = _scalars(group, lr, step, grad_factor, label)
                backend = backends[param.device]
                work.append(_Work(param, grad, group["moments"], backend, records[step], label))
        return work

    def _check_settings(self, group: dict[str, Any], group_index: int) -> None:
        """Check the settings of a group, unless they are the very objects of the last step."""
        values = (len(group), *[group.get(name) for name in settings.REQUIRED], group.get("backend"))
        known = self._checked.get(group_index, ())
        changeable = isinstance(group["lr"], Tensor) or not isinstance(group["betas"], tuple)
        if changeable or len(known) != len(values) or any(map(operator.is_not, values, known)):
            settings.check_group(group, f"param group {group_index}")
            self._checked[group_index] = values

    def _checked_state(self, param: Tensor, grad: Tensor, moments: str, label: str) -> Mapping[str, Tensor] | None:
        """The state of a parameter that can be stepped with this gradient; None before its first step."""
        # Not self.state[param], which would leave an empty entry behind.
        state: dict[str, Tensor] | None = self.state.get(param) or None
        prepared = self._prepared.get(param)
        known = state is not None and prepared is not None and prepared.fits(param, state, moments)
        if not known:
            inputs.check_param(param, label)
        if not is_plain_gradient(param, grad):
            inputs.check_gradient(param, grad, label)
        if not known:
            self._prepared.pop(param, None)
            if state is not None:
                self._prepared[param] = Prepared(param, state, moments, label)
        return state

    # What compilers make of the kernel may round differently. This is what torch.optim uses itself: unlike
    # torch.compiler.disable it does not import the compiler together with this module.
    @torch._disable_dynamo  # type: ignore[attr-defined]
    def _update(self, work: list[_Work]) -> None:
        calls: dict[tuple[str, torch.device], list[Work]] = {}
        for param, grad, _, backend, scalars, _ in work:
            fragment = self._prepared[param].fragment(grad)
            calls.setdefault((backend, param.device), []).append((fragment, scalars))
        for (backend, device), fragments in calls.items():
            skipped = kernels.BACKENDS[backend](fragments)
            self._skipped[device] = self._skipped.get(device, 0) + skipped
        for item in work:
            self.state[item.param]["step"].fill_(item.scalars.step)

    # ---------------------------------------------------------------- what happened, and what is held

    def stats(self) -> dict[str, int]:
        """Counts since construction: ``skipped_blocks``, blocks left out of a step for a non-finite gradient.

        The first skip is warned of by ``step`` on the CPU; on an accelerator by this method, since reading the count
        waits for the device.
        """
        count = sum(int(skipped) for skipped in self._skipped.values())
        self._warn_of(count, stacklevel=3)
        return {"skipped_blocks": count}

    def memory_report(self) -> dict[str, Any]:
        """Bytes of optimizer state, measured from the tensors held.

        Returns:
            ``parameters``: elements of all parameters; ``bytes``: by kind of tensor; ``total_bytes``;
            ``bytes_per_parameter``; ``ranks``: total bytes of every rank. State exists from the first step on.
        """
        parameters = sum(p.numel() for group in self.param_groups for p in group["params"])
        kinds = memory_by_kind(list(self.state.values()))
        total = sum(kinds.values())
        return {
            "parameters": parameters,
            "bytes": kinds,
            "total_bytes": total,
            "bytes_per_parameter": total / parameters if parameters else 0.0,
            "ranks": [total],
        }

    def _reset_counters(self) -> None:
        self._skipped: dict[torch.device, Tensor | int] = {}
        self._checked: dict[int, tuple[object, ...]] = {}
        self._warned = False
        self._clip_coefficient = 1.0
        # No state: what can be found out again. Neither saved nor copied.
        self._prepared: dict[Tensor, Prepared] = {}

    def _warn_of_skipped(self) -> None:
        on_cpu = self._skipped.get(torch.device("cpu"))
        if on_cpu is not None:
            self._warn_of(int(on_cpu), stacklevel=6)  # _warn_of, this method, step, and torch's two wrappers around it

    def _warn_of(self, count: int, stacklevel: int) -> None:
        if count and not self._warned:
            self._warned = True
            warnings.warn(
                f"non-finite gradients: {count} blocks of at most {FORMAT.block_size} elements kept their "
                'parameters and moments; stats()["skipped_blocks"] counts on, nonfinite="error" stops instead',
                RuntimeWarning,
                stacklevel=stacklevel,
            )

    # ---------------------------------------------------------------- saving, loading, copying

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Load what ``state_dict()`` returned, bit for bit; the tensors are copied.

        Settings of the param groups come from the saved state, except ``backend``, which is the machine's.

        Raises:
            ValueError: state that does not fit, see ``checkpoint.check``; nothing has changed then.
        """
        held = {param: dict(state) for param, state in self.state.items()}

        def check_and_seal(_: torch.optim.Optimizer, given: dict[str, Any]) -> dict[str, Any]:
            checkpoint.check(given, self.param_groups)
            return checkpoint.seal(given, self.param_groups)

        def unseal(_: torch.optim.Optimizer) -> None:
            checkpoint.unseal(self.state, held)

        # As hooks, so that the user's own hooks see plain tensors on both sides.
        if not isinstance(state_dict, Mapping):  # torch copies it before any hook can look at it
            checkpoint.check(state_dict, self.param_groups)
        before = self.register_load_state_dict_pre_hook(check_and_seal)
        after = self.register_load_state_dict_post_hook(unseal, prepend=True)
        try:
            super().load_state_dict(state_dict)
        finally:
            before.remove()
            after.remove()

    def __getstate__(self) -> dict[str, Any]:
        return {**super().__getstate__(), "_skipped": self._skipped, "_warned": self._warned}

    def __setstate__(self, state: dict[str, Any]) -> None:
        if "_skipped" not in self.__dict__:
            self._reset_counters()
        super().__setstate__(state)
        self._prepared.clear()  # also after a load, or the tensors replaced would stay in memory
        # torch adds this to every optimizer it restores; it is no setting of ours.
        self.defaults.pop("differentiable", None)


class AdamW8bit(Adam8bit):
    """``Adam8bit`` with decoupled weight decay: a drop-in for ``torch.optim.AdamW``.

    Arguments are those of ``Adam8bit``, keyword-only ones included; every step first scales the parameter by
    ``1 - lr * weight_decay``.

    Source: Loshchilov & Hutter 2019 (arXiv 1711.05101).
    """

    _decoupled = True

    def __init__(
        self,
        params: ParamsT,
        lr: float | Tensor = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 1e-2,
        **keywords: Unpack[_Keywords],
    ) -> None:
        super().__init__(params, lr, betas, eps, weight_decay, **keywords)


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
