"""DeepSpeed: the optimizers by the names that a config gives, and what in a config would keep them from stepping.

``{"optimizer": {"type": "AdamW8bit", "params": {"lr": 3e-4}}}`` names one, once this module is imported: DeepSpeed
looks such names up in ``torch.optim`` and nowhere else, so that is where ``register`` puts them. An optimizer that is
handed to ``deepspeed.initialize`` or to ``accelerator.prepare`` needs no import. DeepSpeed itself is not imported here.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch

from lowmem_adam import kernels
from lowmem_adam.optimizer import Adam8bit, AdamW8bit

OPTIMIZERS = {"Adam8bit": Adam8bit, "AdamW8bit": AdamW8bit}
"""By the name that stands as ``type`` in the ``optimizer`` block of a config."""


def register() -> None:
    """Make ``AdamW8bit`` and ``Adam8bit`` known to DeepSpeed by name; done by the import of this module.

    Raises:
        RuntimeError: ``torch.optim`` has another optimizer of that name.
    """
    for name, optimizer in OPTIMIZERS.items():
        if getattr(torch.optim, name, optimizer) is not optimizer:
            raise RuntimeError(f"torch.optim.{name} is {getattr(torch.optim, name)!r}; accepted: none of that name")
    for name, optimizer in OPTIMIZERS.items():
        setattr(torch.optim, name, optimizer)


register()


# ---------------------------------------------------------------- what a config does to the optimizer


class Finding(NamedTuple):
    """A setting by which the optimizer would be refused, or silently replaced."""

    setting: str
    """Its place in the config, with dots."""
    value: Any
    """What is there; None for nothing."""
    consequence: str
    mend: str
    """One line."""

    def __str__(self) -> str:
        given = "is missing" if self.value is None else f"is {json.dumps(self.value, default=repr)}"
        return f"{self.setting} {given}: {self.consequence}. Mend: {self.mend}"


class _Case(NamedTuple):
    """A config with what its rules look at."""

    config: Mapping[str, Any]
    client: bool

    def block(self, *path: str) -> Mapping[str, Any]:
        """A block of the config; an empty one where there is none."""
        found: Any = self.config
        for name in path:
            found = found.get(name) if isinstance(found, Mapping) else None
        return found if isinstance(found, Mapping) else {}

    @property
    def kind(self) -> str | None:
        """Which of ours the ``optimizer`` block names; None for none of them."""
        kind = self.block("optimizer").get("type")
        return kind if isinstance(kind, str) and kind in OPTIMIZERS else None

    @property
    def stage(self) -> int:
        """Of ZeRO; 0 where it is off."""
        stage = self.block("zero_optimization").get("stage", 0)
        return stage if isinstance(stage, int) else 0

    @property
    def params(self) -> Mapping[str, Any]:
        """Of the ``optimizer`` block."""
        return self.block("optimizer", "params")

    @property
    def offload(self) -> Mapping[str, Any]:
        """The block ``offload_optimizer``; an empty one where ZeRO or offload is off."""
        block = self.block("zero_optimization", "offload_optimizer")
        return block if self.stage > 0 and block.get("device", "none") not in ("none", None) else {}


def check_config(
    ds_config: Mapping[str, Any] | str | os.PathLike[str], client_optimizer: bool = False
) -> list[Finding]:
    """What in a DeepSpeed config would refuse ``AdamW8bit`` or ``Adam8bit``, or silently step with another optimizer.

    Args:
        ds_config: the config, or the JSON file that has it. Values may be ``"auto"`` where accelerate fills them in.
        client_optimizer: whether the optimizer is made by the script and handed to ``deepspeed.initialize`` or
            ``accelerator.prepare``; otherwise it is to be made of the config's ``optimizer`` block.

    Returns:
        What was found, each with a mend of one line; an empty list where the optimizer will step.

    Raises:
        ValueError: no dictionary, or a file that is not JSON of one.
        OSError: the file cannot be read.

    Source: deepspeed 0.19.8, ``runtime/engine.py``, ``runtime/zero``; accelerate 1.15, ``accelerator.py``.
    """
    case = _Case(_read(ds_config), client_optimizer)
    return [finding for rule in _RULES for finding in rule(case)]


def _read(ds_config: Any) -> Mapping[str, Any]:
    config, where = ds_config, "ds_config"
    if isinstance(ds_config, str | os.PathLike):
        where = os.fspath(ds_config)
        try:
            config = json.loads(Path(ds_config).read_text(encoding="utf-8"))
        except ValueError as error:
            raise ValueError(f"{where} is no JSON: {error}; accepted: a file with a DeepSpeed config") from error
    if not isinstance(config, Mapping):
        raise ValueError(f"{where} is a {type(config).__name__}; accepted: a dictionary, or a JSON file with one")
    return config


def _who_steps(case: _Case) -> Iterator[Finding]:
    kind = case.kind
    if case.client and case.config.get("optimizer") is not None:
        yield Finding(
            "optimizer",
            case.config["optimizer"],
            "DeepSpeed ignores it beside an optimizer that it is given, and accelerate refuses both together",
            "remove the block, or give accelerate its DummyOptim and this block the optimizer's settings",
        )
    elif not case.client and kind is None:
        names = " or ".join(map(json.dumps, OPTIMIZERS))
        given = case.block("optimizer").get("type")
        consequence = "nothing steps" if given is None else "DeepSpeed steps with its own optimizer, or with none"
        yield Finding("optimizer.type", given, consequence, f'"optimizer": {{"type": {names}, "params": {{...}}}}')


def _params(case: _Case) -> Iterator[Finding]:
    if case.client or case.kind is None:
        return
    kind = case.kind
    # Tried on the CPU, where what is for other devices would be refused.
    elsewhere = {"backend": tuple(kernels.BACKENDS), "capturable": (True,)}
    fixed = {
        name: value
        for name, value in case.params.items()
        if value != "auto" and not (name in elsewhere and value in elsewhere[name])
    }
    try:
        OPTIMIZERS[kind]([torch.nn.Parameter(torch.zeros(1))], **fixed)
    except (TypeError, ValueError, RuntimeError) as error:
        yield Finding("optimizer.params", dict(case.params), f"{kind} refuses them: {error}", "see its arguments")
    if case.stage > 0 and case.params.get("shard_group") is not None:
        yield Finding(
            "optimizer.params.shard_group",
            case.params["shard_group"],
            "ZeRO gives each rank a partition of its own, and a step refuses to share it out once more",
            "leave it out",
        )


def _stage(case: _Case) -> Iterator[Finding]:
    value = case.block("zero_optimization").get("stage", 0)
    if isinstance(value, bool) or not isinstance(value, int):
        yield Finding("zero_optimization.stage", value, "no number, so that nothing can be said of it", "0, 1, 2 or 3")


def _untested(case: _Case) -> Iterator[Finding]:
    value = case.config.get("zero_allow_untested_optimizer")
    if case.stage > 0 and value is not True:
        yield Finding(
            "zero_allow_untested_optimizer",
            value,
            "ZeRO refuses an optimizer that is not on its list (accelerate sets this for one that it is given)",
            '"zero_allow_untested_optimizer": true',
        )


def _forced(case: _Case) -> Iterator[Finding]:
    value = case.config.get("zero_force_ds_cpu_optimizer")
    if case.client and case.offload and value is not False:
        yield Finding(
            "zero_force_ds_cpu_optimizer",
            value,
            "with offload_optimizer DeepSpeed refuses an optimizer that it is given, and accelerate puts "
            "DeepSpeedCPUAdam in its place",
            '"zero_force_ds_cpu_optimizer": false',
        )


def _other_steppers(case: _Case) -> Iterator[Finding]:
    """Offload by other means, which is written for DeepSpeed's own optimizers."""
    where = "zero_optimization.offload_optimizer"
    for name, accepted, consequence, mend in (
        ("super_offload", False, "DeepSpeedCPUAdam steps in worker processes, whatever the optimizer", "leave it out"),
        ("ratio", 1.0, "the part that is not offloaded is stepped by torch.optim.AdamW; refused", '"ratio": 1.0'),
    ):
        value = case.offload.get(name, accepted)
        if value != accepted:
            yield Finding(f"{where}.{name}", value, consequence, mend)
    if case.offload.get("device") == "nvme":
        yield Finding(
            f"{where}.device", "nvme", "it swaps fp32 tensors of the partition's size only", '"device": "cpu"'
        )
    zenflow = case.block("zero_optimization").get("zenflow")
    if case.stage > 0 and zenflow is not None:
        yield Finding("zero_optimization.zenflow", zenflow, "it steps with ZenFlowCPUAdam alone", "leave it out")


def _masters(case: _Case) -> Iterator[Finding]:
    """16-bit partitions in the place of fp32 ones, which ZeRO grants to its own optimizer alone."""
    for block, name in (("fp16", "fp16_master_weights_and_grads"), ("bf16", "bf16_master_weights_and_grads")):
        value = case.block(block).get(name, False)
        states_too = block == "bf16" and case.block("bf16").get("bf16_optimizer_states") is True and not case.offload
        if case.stage > 0 and value and not states_too:
            yield Finding(
                f"{block}.{name}", value, "it is for DeepSpeedCPUAdam alone, others are refused", "leave it out"
            )


def _elastic(case: _Case) -> Iterator[Finding]:
    value = case.block("zero_optimization").get("elastic_checkpoint", False)
    if case.stage > 0 and value:
        yield Finding(
            "zero_optimization.elastic_checkpoint",
            value,
            "it merges state as fp32 tensors of the partition's size, and cannot load what it saved",
            "leave it out; universal checkpoints load at another world size",
        )


_RULES: tuple[Callable[[_Case], Iterator[Finding]], ...] = (
    _who_steps,
    _stage,
    _params,
    _untested,
    _forced,
    _other_steppers,
    _masters,
    _elastic,
)
