"""Whether tensors look as others did before: all about them but their values and addresses, asked in one call.

Python takes some 100 ns for each question about a tensor. torch compares all of them in 50 ns a tensor where it guards
compiled functions, and that is asked here; a torch without it is asked one by one.
"""

from __future__ import annotations

import importlib
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor


def _guards() -> Any:
    """``TensorGuards``, which is not public; None in a torch that has it no more. It does not import the compiler."""
    try:
        return importlib.import_module("torch._C._dynamo.guards").TensorGuards
    except (ImportError, AttributeError):
        return None


GUARDS = _guards()


class Look:
    """How some tensors look: class, dtype, device, layout, shape, strides, sign bit and ``requires_grad``.

    It holds none of them.
    """

    __slots__ = ("_facts", "_guard")

    def __init__(self, tensors: Sequence[Tensor]) -> None:
        self._guard = None
        self._facts: list[tuple[object, ...]] | int
        if GUARDS is None:
            self._facts = [_facts(tensor) for tensor in tensors]
            return
        self._facts = len(tensors)
        self._guard = GUARDS(
            *tensors,
            dynamic_dims_sizes=[list(tensor.shape) for tensor in tensors],
            dynamic_dims_strides=[list(tensor.stride()) for tensor in tensors],
        )

    def fits(self, tensors: Sequence[Tensor | None]) -> bool:
        """Whether others, one for each, look the same. It may be False of tensors that do, where one is there twice."""
        if self._guard is not None:
            return len(tensors) == self._facts and self._guard.check(*tensors) is True
        return self._facts == [_facts(tensor) for tensor in tensors]


def _facts(tensor: Tensor | None) -> tuple[object, ...]:
    if not isinstance(tensor, Tensor):
        return ()
    look = (type(tensor), tensor.dtype, tensor.device, tensor.layout, tensor.shape, tensor.requires_grad)
    strided = tensor.layout is torch.strided
    return (*look, tensor.stride(), tensor.is_neg(), tensor.is_inference()) if strided else look
