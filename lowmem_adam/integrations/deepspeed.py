"""DeepSpeed: the optimizers by the names that a config gives, once this module is imported.

``{"optimizer": {"type": "AdamW8bit", "params": {"lr": 3e-4}}}`` names one. DeepSpeed looks such names up in
``torch.optim`` and nowhere else, so that is where ``register`` puts them.
"""

from __future__ import annotations

import torch

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
