"""Wrappers of PyTorch Lightning, which inherit from the class of the optimizer they hold and are none of its kind.

``LightningModule.optimizers()`` and ``Fabric.setup`` return objects of a class that is made on the spot, from the
wrapper's and the optimizer's, so that ``isinstance`` finds what it looks for. The wrapper has none of the optimizer's
attributes and looks them up in the optimizer; but methods, properties and class attributes it inherits, and these would
work on an empty optimizer: ``clip_grad_norm_`` would note its clipping where no step looks for it, and ``state_dict()``
would take one rank's part for the whole. So a wrapper's class asks the optimizer for all that it inherits from it.
"""

from __future__ import annotations

from typing import Any

import torch

PACKAGES = frozenset({"lightning", "lightning_fabric", "pytorch_lightning"})
"""Those that wrap optimizers so; the optimizer is the wrapper's ``_optimizer``."""


class Asked:
    """An attribute that a wrapper does not have itself: read from the optimizer, and set there."""

    def __set_name__(self, owner: type, name: str) -> None:
        self.name = name

    def __get__(self, wrapper: Any, owner: type | None = None) -> Any:
        return self if wrapper is None else getattr(wrapper._optimizer, self.name)

    def __set__(self, wrapper: Any, value: Any) -> None:
        setattr(wrapper._optimizer, self.name, value)


def ask_the_optimizer(cls: type) -> None:
    """Have a class pass on all that it inherits from an optimizer's, if it is a wrapper's; leave any other alone."""
    wrappers = [base for base in cls.__mro__ if base.__module__.split(".")[0] in PACKAGES]
    if not wrappers:
        return
    kept = {name for wrapper in wrappers for name in vars(wrapper)}
    inherited = {name for base in cls.__mro__ if issubclass(base, torch.optim.Optimizer) for name in vars(base)}
    for name, method in (("__getstate__", _state), ("__setstate__", _set_state)):
        if name not in kept:
            setattr(cls, name, method)
    for name in inherited - kept:
        if not name.startswith("__"):
            asked = Asked()
            asked.__set_name__(cls, name)
            setattr(cls, name, asked)


def _state(wrapper: Any) -> dict[str, Any]:
    """For copies: what the wrapper itself holds, the optimizer among it."""
    return dict(wrapper.__dict__)


def _set_state(wrapper: Any, state: dict[str, Any]) -> None:
    wrapper.__dict__.update(state)


def inner_of(optimizer: Any) -> Any:
    """The optimizer that wrappers hold, such as accelerate's, Lightning's and DeepSpeed's; what is none, as it is."""
    while True:
        held = getattr(optimizer, "__dict__", {})
        inner = held.get("_optimizer", held.get("optimizer"))
        if inner is None:
            return optimizer
        optimizer = inner
