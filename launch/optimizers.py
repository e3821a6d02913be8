"""One place that turns the name of an optimizer into an optimizer, with the same settings for every one.

Weight decay reaches every parameter alike (embeddings and norms too), so that runs differ in the optimizer only.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import torch


@dataclass(frozen=True)
class OptimizerSettings:
    """What all the optimizers below have in common."""

    lr: float = 1e-3
    betas: tuple[float, float] = (0.9, 0.999)
    eps: float = 1e-8
    weight_decay: float = 1e-2
    seed: int = 0
    # Over all processes; only those in OURS can, and keep state on the host.
    shard: bool = False
    offload: bool = False
    offload_gradients: bool = False


Parameters = Iterable[torch.nn.Parameter]


def _common(settings: OptimizerSettings) -> dict[str, Any]:
    """The keywords that every one of them takes."""
    return {
        "lr": settings.lr,
        "betas": settings.betas,
        "eps": settings.eps,
        "weight_decay": settings.weight_decay,
    }


def _of_ours(settings: OptimizerSettings) -> dict[str, Any]:
    """The keywords of this repository's optimizers."""
    return {
        **_common(settings),
        "seed": settings.seed,
        "shard_group": "world" if settings.shard else None,
        "offload": "cpu" if settings.offload else None,
        "offload_gradients": settings.offload_gradients,
    }


def _adamw8bit(parameters: Parameters, settings: OptimizerSettings) -> torch.optim.Optimizer:
    from lowmem_adam import AdamW8bit

    return AdamW8bit(parameters, **_of_ours(settings))


def _adam8bit(parameters: Parameters, settings: OptimizerSettings) -> torch.optim.Optimizer:
    from lowmem_adam import Adam8bit

    return Adam8bit(parameters, **_of_ours(settings))


def _adamw32bit(parameters: Parameters, settings: OptimizerSettings) -> torch.optim.Optimizer:
    from lowmem_adam import AdamW8bit

    return AdamW8bit(parameters, **_of_ours(settings), moments="32bit")


def _torch(parameters: Parameters, settings: OptimizerSettings) -> torch.optim.Optimizer:
    # The fused step is torch's fastest on every device it exists for; comparing with a slower one would flatter us.
    return torch.optim.AdamW(parameters, **_common(settings), fused=True)


def _bitsandbytes(parameters: Parameters, settings: OptimizerSettings) -> torch.optim.Optimizer:
    _require("bitsandbytes")
    from bitsandbytes.optim import AdamW8bit

    return AdamW8bit(parameters, **_common(settings))


def _torchao(parameters: Parameters, settings: OptimizerSettings) -> torch.optim.Optimizer:
    _require("torchao")
    from torchao.optim import AdamW8bit

    return AdamW8bit(parameters, **_common(settings))


FACTORIES: dict[str, Callable[[Parameters, OptimizerSettings], torch.optim.Optimizer]] = {
    "adamw8bit": _adamw8bit,
    "adam8bit": _adam8bit,
    "adamw32bit": _adamw32bit,
    "torch": _torch,
    "bitsandbytes": _bitsandbytes,
    "torchao": _torchao,
}
OURS = ("adamw8bit", "adam8bit", "adamw32bit")
"""Those that can share their state out over the processes, and keep it on the host."""


def check_optimizer_name(name: str) -> None:
    """Refuse an unknown name before any model is built."""
    if name not in FACTORIES:
        raise ValueError(f"unknown optimizer {name!r}; accepted: {', '.join(FACTORIES)}")


def check_place(name: str, *, shard: bool, offload: bool, offload_gradients: bool) -> None:
    """Refuse to shard or offload what keeps all of its state in every process, on its device."""
    if shard and name not in OURS:
        raise ValueError(f"shard is for {', '.join(OURS)}; {name} keeps its whole state in every process")
    if offload and name not in OURS:
        raise ValueError(f"offload is for {', '.join(OURS)}; {name} keeps its state on the model's device")
    if offload_gradients and not offload:
        raise ValueError("offload_gradients goes with offload, and offload is not set")


def check_seed(seed: int) -> None:
    """Refuse what numpy's generator, which accelerate's set_seed seeds with the others, does not take."""
    if not 0 <= seed < 2**32:
        raise ValueError(f"seed must lie in 0..{2**32 - 1}, got {seed}")


def build_optimizer(name: str, parameters: Parameters, settings: OptimizerSettings) -> torch.optim.Optimizer:
    """Build the optimizer called `name` over `parameters`."""
    check_optimizer_name(name)
    check_place(name, shard=settings.shard, offload=settings.offload, offload_gradients=settings.offload_gradients)
    return FACTORIES[name](parameters, settings)


def _require(package: str) -> None:
    if importlib.util.find_spec(package) is None:
        raise ValueError(f"--optimizer {package} needs the package {package}, which is not installed here")
