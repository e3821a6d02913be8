"""What tests of compiled steps share: twins of which one is compiled, and what the compiler counts."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
import torch._dynamo
from torch import Tensor, nn
from torch._dynamo.utils import counters

from lowmem_adam import AdamW8bit
from tests.cases import FEW, assert_same_bits, everything, make_params

BACKENDS = ["eager", "aot_eager", pytest.param("inductor", marks=pytest.mark.slow)]
"""Graphs of ``eager`` are given the optimizer's own tensors, those of ``aot_eager`` copies, of ``inductor`` either."""


@contextmanager
def compiled_once() -> Iterator[None]:
    """No compiled code of other tests, counts from zero, and an error where something is compiled a second time."""
    torch._dynamo.reset()
    counters.clear()
    with torch._dynamo.config.patch(error_on_recompile=True), warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*record_function.*")
        yield
    torch._dynamo.reset()


def graphs() -> int:
    return int(counters["stats"]["unique_graphs"])


def breaks() -> list[str]:
    return [reason for reason, count in counters["graph_break"].items() for _ in range(count)]


def of_all_dtypes() -> AdamW8bit:
    """Groups of every dtype and kind of update, of several layouts, one parameter of each frozen."""
    kinds: list[tuple[torch.dtype, dict[str, Any]]] = [
        (torch.float32, {"lr": 0.01}),
        (torch.bfloat16, {"weight_decay": 0.1}),
        (torch.bfloat16, {"low_precision_update": "split", "moments": "32bit"}),
        (torch.float16, {"low_precision_update": "fp32", "betas": (0.8, 0.9)}),
    ]
    groups = []
    for seed, (dtype, settings) in enumerate(kinds):
        frozen = nn.Parameter(torch.ones(3, dtype=dtype), requires_grad=False)
        groups.append({"params": [*make_params(FEW, dtype, seed=seed), frozen], **settings})
    return AdamW8bit(groups, lr=1e-3)


def trainable(opt: torch.optim.Optimizer) -> list[Tensor]:
    return [param for group in opt.param_groups for param in group["params"] if param.requires_grad]


class Twins:
    """Two equal models with their optimizers, one to be compiled."""

    def __init__(self, **settings: Any) -> None:
        torch.manual_seed(0)
        self.nets = [nn.Sequential(nn.Linear(70, 80), nn.Tanh(), nn.Linear(80, 5))]
        self.nets.append(copy.deepcopy(self.nets[0]))
        self.opts = [AdamW8bit(net.parameters(), lr=0.01, **settings) for net in self.nets]

    def run(self, make: Callable[[nn.Module, AdamW8bit], Callable[[Tensor], Any]], steps: int, **how: Any) -> None:
        """Call what ``make`` makes as it is and compiled, with the same inputs; compare results and everything held."""
        plain, traced = (make(net, opt) for net, opt in zip(self.nets, self.opts, strict=True))
        traced = torch.compile(traced, **how)
        for _ in range(steps):
            batch = torch.randn(4, 70)
            assert_same_bits(plain(batch), traced(batch))
        assert_same_bits(everything(self.opts[0]), everything(self.opts[1]))
        assert any(step["step"] for step in self.opts[0].state.values())


def loss_of(net: nn.Module, batch: Tensor) -> Tensor:
    loss: Tensor = net(batch).square().mean()
    return loss


def training(net: nn.Module, opt: AdamW8bit) -> Callable[[Tensor], Any]:
    def function(batch: Tensor) -> Tensor:
        opt.zero_grad()
        loss = loss_of(net, batch)
        loss.backward()
        opt.step()
        return loss.detach()

    return function


def train_in_one_graph() -> None:
    """Training steps with their backward pass; called in a process of its own."""
    with torch._dynamo.config.patch(trace_autograd_ops=True, error_on_recompile=True):
        for backend in ("eager", "aot_eager"):
            torch._dynamo.reset()
            counters.clear()
            Twins().run(training, 5, backend=backend, fullgraph=True)
            assert (graphs(), breaks()) == (1, [])
