"""``Adam8bit`` and ``AdamW8bit``: param groups, state, and a step that reads as its phases."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.optim.optimizer import ParamsT

from lowmem_adam import agreement, compiled, inputs, kernels, local, master, resharding, settings, zero
from lowmem_adam.codec import FORMAT
from lowmem_adam.gradients import GradientOptimizer
from lowmem_adam.host_gradients import HostGradients
from lowmem_adam.layout import FLAT, FLAT_BLOCK_SIZE
from lowmem_adam.offload import Offload, check_offload, check_offload_gradients
from lowmem_adam.phases import CHECK, GATHER, NOBODY, OTHER
from lowmem_adam.shard import Partition, World, check_bucket_cap, check_shard_group
from lowmem_adam.shard_tensor import asked_by_checkpoint
from lowmem_adam.state import memory_by_kind
from lowmem_adam.stepping import States, Stepper, label_of
from lowmem_adam.updating import Task

if TYPE_CHECKING:
    from typing_extensions import Unpack


_WHOLE = ("_shard_group", "_bucket_cap_mb", "_offload", "_offload_gradients", "_capturable")
"""What ``_reset`` takes, under the names by which it is kept."""


class Adam8bit(GradientOptimizer):
    """Adam with 8-bit moments: about 2.02 bytes of state a parameter instead of 8.

    A drop-in for ``torch.optim.Adam`` (L2 weight decay; ``AdamW8bit`` decouples it). A step has four phases:

    1. *cut*: parameters that are new are cut into a shard for each rank, of which there may be only one;
    2. *check*: settings, gradients and state of all parameters, and memory for the moments of those that get their
       first gradient; an error leaves everything unchanged. At a first step ranks compare what they hold;
    3. *begin*: this rank's blocks of these parameters get their moments, which are zero;
    4. *update*: this rank's shard, bucket by bucket, each in one pass and one call: gradient factor, finite check,
       decode, Adam in fp32, encode; blocks with a non-finite gradient stay. Beside the next buckets' steps all ranks
       send one another what they stepped. With ``offload`` buckets pass through buffers of the host.

    A step of one process that is the last one over again, but for values and where gradients lie, is taken at once.

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
        moments: ``"8bit"``, or ``"32bit"`` for exact fp32 moments through the same code, or ``"bnb8bit"`` for
            bitsandbytes' format (``lowmem_adam.dynamic_map``), in which its checkpoints go on byte for byte: of all
            tensors of at least 4,096 elements, in blocks of 256, not of DTensors.
        low_precision_update: how bfloat16 and float16 parameters take updates smaller than their rounding step.
            ``"stochastic"`` lets them add up on average, ``"nearest"`` loses them. With more memory they are kept:
            ``"split"`` keeps beside the parameter what it cannot hold of a float32 weight, in 16 bits an element or in
            8, ``"fp32"`` keeps the whole weight. float32 parameters are stepped alike in all of them.
        master_bits: of the weight that ``"split"`` keeps, 32 or 24, parameter included.
        nonfinite: what a gradient with an infinity or NaN does. ``"skip"``: its block of at most 128 elements (256
            with ``"bnb8bit"``) keeps parameter and moments and is counted in ``stats()``, while the step number counts
            on; ``"error"``: an error before anything changes; ``"propagate"``: as in torch, the parameter's element
            becomes NaN (its 8-bit first moment is reset to zero).
        seed: keys all rounding decisions; equal seeds give equal bits.
        backend: ``None`` for the best there is, ``"cpu"`` for the native kernel, which must be there then,
            ``"triton"`` for the kernels of CUDA devices, or ``"reference"``. All give the same bits.
            ``"bitsandbytes"`` is its own operator for ``"bnb8bit"``, which does not. It is the machine's: a load does
            not change it.
        shard_group: the ranks that share the moments, each of them keeping its part (ZeRO-1): ``"world"`` for the
            default process group, a ``ProcessGroup``, a one-dimensional ``DeviceMesh``, or None for all moments on
            every rank. All ranks must step with the same gradients, as under ``DistributedDataParallel``; any number
            of them gives the same bits. Looked up at the first step, so ``"world"`` may come before
            ``init_process_group``.
        offload: ``"cpu"`` keeps moments, and what ``low_precision_update`` keeps, on the host and steps there, while
            parameters and gradients stay on their device. The next forward pass waits for the parameters by itself.
        offload_gradients: with ``offload``, takes each gradient to the host as the backward pass makes it, frees it on
            the device, and adds those of further passes on the host. ``param.grad`` is then a tensor of the parameter's
            device whose values are on the host; torch's operators accept it. Those of plain parameters in one of
            several processes stay where they are, since ``DistributedDataParallel`` may reduce them later.
        bucket_cap_mb: MiB of parameters that a rank steps and sends at a time, as in ``DistributedDataParallel``, and
            of half of the pinned buffers that ``offload`` has for a device. Small ones and those that do not lie
            in one run are sent in copies, of which all ranks' take no more than that.
        capturable: steps can be captured in a CUDA graph, as with torch's optimizers: they are counted on the device,
            a learning rate that is a tensor there is read at each replay, and nothing waits for the device. Take a few
            steps before the capture. Only for parameters on CUDA devices, without ``shard_group`` and ``offload``.

    Raises:
        ValueError: a value or parameter that is not accepted; the message names it and what is.
        TypeError: a keyword of another optimizer; the message says what to use instead.
        RuntimeError: ``backend="cpu"``, and the native library cannot be loaded.

    Source: Kingma & Ba 2015 (arXiv 1412.6980).
    """

    _stepper: Stepper
    param_groups = compiled.Groups()
    defaults = zero.Defaults()

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
        master_bits: int = 32,
        nonfinite: str = "skip",
        seed: int = 0,
        backend: str | None = None,
        shard_group: Any = None,
        offload: str | None = None,
        offload_gradients: bool = False,
        bucket_cap_mb: float = 64.0,
        capturable: bool = False,
        **unsupported: object,
    ) -> None:
        settings.refuse_keywords(unsupported)
        check_shard_group(shard_group)
        check_offload(offload)
        check_offload_gradients(offload_gradients, offload)
        check_bucket_cap(bucket_cap_mb)
        settings.check_capturable(capturable, shard_group, offload)
        defaults = {
            "lr": lr,
            "betas": betas,
            "eps": eps,
            "weight_decay": weight_decay,
            "maximize": maximize,
            "moments": moments,
            "low_precision_update": low_precision_update,
            "master_bits": master_bits,
            "nonfinite": nonfinite,
            "seed": seed,
            "backend": backend,
            "decoupled_weight_decay": self._decoupled,
            "format_version": FORMAT.version,
        }
        settings.check_group(defaults, type(self).__name__, capturable=capturable)
        self._reset(shard_group, bucket_cap_mb, offload, offload_gradients, capturable)
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
        settings.check_group(group, where, capturable=self._capturable)
        for name in ("decoupled_weight_decay", "format_version"):
            if group[name] != self.defaults[name]:
                raise ValueError(f"{where}: {name} is {group[name]!r}; accepted: {self.defaults[name]!r}")
        if not isinstance(params, set):
            given = [params] if isinstance(params, Tensor) else params
            inputs.check_params(given, self.param_groups, group["moments"], where)
            for param in (entry[1] if isinstance(entry, tuple) else entry for entry in given):
                backend = kernels.choose(group["backend"], self._stepper.home_of(param), group, param.dtype)
                if self._capturable and backend != "triton":
                    raise ValueError(
                        f"{where}: capturable is True and a parameter on {param.device} is stepped by backend "
                        f'{backend!r}; accepted with capturable: parameters on CUDA devices and backend "triton"'
                    )
                if self._shard_group is not None and local.is_dtensor(param):
                    raise ValueError(
                        f"{where} has DTensors, which are sharded already, and shard_group is {self._shard_group!r}; "
                        "accepted with DTensors: shard_group=None"
                    )
        super().add_param_group(settings.normalised(group))
        self._watch_gradients()

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
            torch.OutOfMemoryError: there is no memory for state that is to be made; nor has anything changed then.
            RuntimeError: inside of a CUDA graph capture, without ``capturable`` or before any step outside of one.
        """
        if torch.compiler.is_dynamo_compiling():
            return compiled.step(self, closure)
        return self._step(closure)

    def _step(self, closure: Callable[[], float] | None) -> float | None:
        self._opt_called = True
        if not self.state and asked_by_checkpoint():
            # Its functions take a step with zero gradients to have state made. A step is counted, so none is taken.
            self._make_all_state()
            return None
        listener = self._stepper.listener
        if listener is not None:
            listener.begin()
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        if self._in_backward is not None:
            self._finish_in_backward(self._in_backward)
        if not self._capturable and self._found_inf() > 0:
            self._use_up_gradients()
            return loss
        if listener is not None:
            listener.now(CHECK)
        self._watch_gradients()
        partition = self._cut()
        if not (self._agreed and self._stepper.repeat(self.param_groups, self.state, partition, self._grad_factor)):
            self._take_over_written()
            tasks, made = self._checked(partition)
            tasks = self._stepper.begin(tasks, made, self.state, partition)
            self._stepper.update(tasks, partition)
            self._stepper.remember(self.param_groups, self.state, tasks, partition)
        if listener is not None:
            listener.now(OTHER)
        self._consolidated = None
        self._use_up_gradients()
        self._warn_of_skipped()
        if listener is not None:
            listener.end()
        return loss

    # Without this mark torch's learning rate schedulers put a wrapper around a step, which sets _opt_called and nothing
    # else, and which torch.compile does not trace.
    step._wrapped_by_lr_sched = True  # type: ignore[attr-defined]

    def _checked(self, partition: Partition) -> tuple[list[Task], States]:
        """Phase *check*. What one rank refuses no other rank may wait for, so it is told where ranks meet anyway."""
        world, listener = partition.world, self._stepper.listener or NOBODY
        tasks: list[Task] = []
        made: States = {}
        refusal: Exception | None = None
        try:
            self._check_owners()
            tasks = self._stepper.check(
                self.param_groups, self.state, partition, self._grad_factor(), self._found_inf()
            )
            made = self._stepper.made(tasks, partition)
        except Exception as error:  # noqa: BLE001 (raised below, after the others have been told)
            refusal = error
        if world.size > 1:
            if not self._agreed:
                lines = agreement.describe(self.param_groups, partition, self._steps_of, gradients=True)
                listener.now(GATHER)
                agreement.agree([*lines, *agreement.describe_settings(self.param_groups)], world, refusal)
            elif self._stops_at_nonfinite():
                listener.now(GATHER)
                agreement.stop_together(refusal, partition.device, [world.group])
        elif self._stops_at_nonfinite():
            listener.now(GATHER)
            agreement.stop_together(refusal, partition.device, local.groups_of(partition.params))
        listener.now(CHECK)
        if refusal is not None:
            raise refusal
        self._agreed = True
        return tasks, made

    def _stops_at_nonfinite(self) -> bool:
        return any(group["nonfinite"] == "error" for group in self.param_groups)

    def check_replicas(self) -> None:
        """Compare the bits of all parameters among the ranks of ``shard_group``; a collective.

        Without one, among the default process group's. It sends 8 bytes a parameter tensor.

        Raises:
            RuntimeError: on every rank, if they differ; names the parameters and ranks.
            ValueError: parameters are DTensors, of which ranks have different parts.
        """
        world = self._cut().world
        if world.size == 1 and self._shard_group is None:
            world = World.of("world")
        labelled = [
            (label_of(group, group_index, index), param)
            for group_index, group in enumerate(self.param_groups)
            for index, param in enumerate(group["params"])
        ]
        if any(local.is_dtensor(param) for _, param in labelled):
            raise ValueError("parameters are DTensors; accepted by check_replicas: plain parameters, as under DDP")
        agreement.compare_replicas(labelled, world)

    def join_hook(self, **_: Any) -> None:
        """Refuse ``torch.distributed.algorithms.join.Join``, which asks by this name.

        Raises:
            ValueError: always.
        """
        raise ValueError(
            "Join is not supported: a rank without batches has no gradients to step its shard with; accepted: as many "
            "batches on every rank, such as DistributedSampler and accelerate deal out"
        )

    # ---------------------------------------------------------------- what happened, and what is held

    @torch.no_grad()
    def master_weight(self, param: Tensor) -> Tensor:
        """The float32 weight that the next step of a parameter starts from.

        With ``low_precision_update="split"`` or ``"fp32"`` that is more than the parameter holds; otherwise, and before
        the first step, it is the parameter. Where moments are shared among ranks it is a collective.

        Returns:
            A new tensor of the parameter's shape; of a DTensor one with the same placements.

        Raises:
            ValueError: the optimizer does not have the parameter.
        """
        group = next((group for group in self.param_groups if any(param is held for held in group["params"])), None)
        if group is None:
            what = f"a tensor of shape {tuple(param.shape)}" if isinstance(param, Tensor) else type(param).__name__
            raise ValueError(f"param is {what} that is in no param group; accepted: a parameter of this optimizer")
        return master.weight_of(param, self.state.get(param, {}), group, self._cut())

    def stats(self) -> dict[str, int]:
        """Counts since construction: ``skipped_blocks``, blocks left out of a step for a non-finite gradient.

        Of a sharded optimizer, those of this rank's shard. The first skip is warned of by ``step`` on the CPU; on an
        accelerator by this method, since reading the count waits for the device.
        """
        count = sum(int(skipped) for skipped in self._stepper.skipped.values())
        self._warn_of(count, stacklevel=3)
        return {"skipped_blocks": count}

    def memory_report(self) -> dict[str, Any]:
        """Bytes of optimizer state, measured from the tensors held.

        Returns:
            ``parameters``: elements of all parameters; ``bytes``: by kind of tensor, on this rank; ``total_bytes``, on
            this rank; ``bytes_per_parameter``, of this rank's bytes; ``pinned_bytes``: of the buffers that ``offload``
            has on the host; ``gradient_bytes``: of the host's memory for gradients that ``offload_gradients`` has
            taken; ``ranks``: total bytes of every rank, those of others by what they hold of the parameters
            that have state here. State exists from the first step on.
        """
        # ZeRO's stage 3 leaves no parameter in the groups between two steps.
        held = {p for group in self.param_groups for p in group["params"]} | set(self.state)
        parameters = sum(p.numel() for p in held)
        kinds = memory_by_kind(list(self.state.values()))
        total = sum(kinds.values())
        return {
            "parameters": parameters,
            "bytes": kinds,
            "total_bytes": total,
            "bytes_per_parameter": total / parameters if parameters else 0.0,
            "pinned_bytes": 0 if self._stepper.offload is None else self._stepper.offload.pinned_bytes,
            "gradient_bytes": 0 if self._stepper.gradients is None else self._stepper.gradients.nbytes,
            "ranks": [total] if self._partition is None else resharding.bytes_by_rank(self.state, self._partition),
        }

    def _reset(
        self, shard_group: Any, bucket_cap_mb: float, offload: str | None, offload_gradients: bool, capturable: bool
    ) -> None:
        self._shard_group = shard_group
        self._bucket_cap_mb = bucket_cap_mb
        self._offload = offload
        self._offload_gradients = offload_gradients
        self._capturable = capturable
        # So a GradScaler leaves its scale and what it found to the step, and nothing waits for the device.
        self._step_supports_amp_scaling = capturable
        self._partition = None
        lanes = Offload(int(bucket_cap_mb * 2**20)) if offload == "cpu" else None
        gradients = HostGradients(lanes) if lanes is not None and offload_gradients else None
        self._stepper = Stepper(lanes, gradients, capturable)
        self._traced = compiled.Traced(self)
        self._known = ()
        self._reduced = None
        self._in_backward = None
        self._warned = False
        self._clip_coefficient = 1.0
        self._clipped = None

    def _warn_of_skipped(self) -> None:
        on_cpu = self._stepper.skipped.get(torch.device("cpu"))
        if on_cpu is not None:
            self._warn_of(int(on_cpu), stacklevel=7)  # _warn_of, this, _step, step, and torch's two wrappers around it

    def _warn_of(self, count: int, stacklevel: int) -> None:
        if count and not self._warned:
            self._warned = True
            size = FLAT_BLOCK_SIZE if any(g["moments"] == FLAT for g in self.param_groups) else FORMAT.block_size
            warnings.warn(
                f"non-finite gradients: {count} blocks of at most {size} elements kept their "
                'parameters and moments; stats()["skipped_blocks"] counts on, nonfinite="error" stops instead',
                RuntimeWarning,
                stacklevel=stacklevel,
            )

    # ---------------------------------------------------------------- copying

    def __getstate__(self) -> dict[str, Any]:
        if not isinstance(self._shard_group, str | None):
            raise TypeError(
                f"an optimizer whose shard_group is a {type(self._shard_group).__name__} cannot be copied or pickled, "
                "as that cannot; accepted: shard_group='world' or None, and state_dict() with any"
            )
        kept = {name: self.__dict__[name] for name in (*_WHOLE, "_warned")}
        partition = None if self._partition is None else self._partition.without_group()
        return {**super().__getstate__(), **kept, "_partition": partition, "_skipped": self._stepper.skipped}

    def __setstate__(self, state: dict[str, Any]) -> None:
        restored = dict(state)
        skipped = restored.pop("_skipped", {})
        if "_stepper" not in self.__dict__:
            for name in ("_offload_gradients", "_capturable"):
                restored.setdefault(name, False)  # of a version without it
            self._reset(*(restored[name] for name in _WHOLE))
            self._stepper.skipped = skipped
        super().__setstate__(restored)
        self.param_groups = self.__dict__["param_groups"]  # torch writes past the attribute
        for group in self.param_groups:
            for name, value in settings.SINCE.items():
                group.setdefault(name, value)
            group["format_version"] = FORMAT.version
        self._watch_gradients()
        self._stepper.forget()  # also after a load, or the tensors replaced would stay in memory
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
        **keywords: Unpack[settings.Keywords],
    ) -> None:
        super().__init__(params, lr, betas, eps, weight_decay, **keywords)
