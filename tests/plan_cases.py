"""What plans are compared with: a model of several dtypes, and the bytes that its optimizer really holds."""

from __future__ import annotations

import itertools
from collections import deque
from pathlib import Path
from typing import Any, ClassVar
from unittest import mock

import torch
import torch.distributed as dist
from torch import nn

from lowmem_adam import AdamW8bit, offload, updating
from lowmem_adam.plan import Model, Row, Settings, Weight, plan
from lowmem_adam.shard import Bucket, Gather, Partition
from tests import sim_device as sim
from tests.cases import gradient

UPDATES: tuple[dict[str, Any], ...] = (
    {"low_precision_update": "stochastic"},
    {"low_precision_update": "split"},
    {"low_precision_update": "split", "master_bits": 24},
    {"low_precision_update": "fp32"},
    {"low_precision_update": "nearest"},
)
BUCKET = 0.25
"""MiB, so that there are several buckets, and buffers take turns."""


def twelve() -> list[Settings]:
    """Moments x world size x offload, with updates in turn, so that each comes with each of the others."""
    rows = itertools.product(("8bit", "32bit", "bnb8bit"), (1, 2), (None, "cpu"))
    return [
        Settings(moments=moments, world_size=world, offload=where, bucket_cap_mb=BUCKET, **UPDATES[index % 5])
        for index, (moments, world, where) in enumerate(rows)
    ]


def network() -> nn.Module:
    """1.3 million parameters: an embedding, matrices whose rows end in shorter blocks, biases, norms in float32."""
    torch.manual_seed(0)
    body = nn.Sequential(nn.LayerNorm(200), nn.Linear(200, 1000), nn.GELU(), nn.Linear(1000, 200), nn.LayerNorm(200))
    model = nn.ModuleDict({"embedding": nn.Embedding(4001, 200), "body": body, "head": nn.Linear(200, 500)})
    model.to(torch.bfloat16)
    for module in model.modules():
        if isinstance(module, nn.LayerNorm):
            module.float()
    return model


def described(model: nn.Module) -> Model:
    return Model("network", [Weight(name, tuple(p.shape), p.dtype) for name, p in model.named_parameters()])


class Watched(Gather):
    """Counts the bytes of the copies that are on their way."""

    held: ClassVar[deque[int]] = deque()
    most = 0

    def __init__(self, bucket: Bucket, partition: Partition) -> None:
        super().__init__(bucket, partition)
        self.held.append(sum(buffer.nbytes for _, _, buffer in self._packs))
        Watched.most = max(Watched.most, sum(self.held))

    def wait(self) -> None:
        super().wait()
        self.held.popleft()


def measured(settings: Settings, device: str = "cpu") -> dict[str, Any]:
    """What this rank holds after two steps of the real optimizer."""
    model = network().to(device)
    params = list(model.parameters())
    opt = AdamW8bit(
        params,
        moments=settings.moments,
        low_precision_update=settings.low_precision_update,
        master_bits=settings.master_bits,
        shard_group="world" if settings.shards > 1 else None,
        offload=settings.offload,
        offload_gradients=settings.offload_gradients,
        bucket_cap_mb=settings.bucket_cap_mb,
    )
    Watched.held, Watched.most = deque(), 0
    with mock.patch.object(updating, "Gather", Watched):
        for step in range(2):
            if settings.offload_gradients:
                opt.zero_grad()
                sum((param * param).sum().float() for param in params).backward()  # type: ignore[union-attr]
            else:
                for index, param in enumerate(params):
                    values = torch.empty(param.shape, dtype=param.dtype)
                    param.grad = gradient(values, 0, index, step).to(device)
            opt.step()
    tensors = [tensor for state in opt.state.values() for tensor in state.values()]
    return {
        "report": opt.memory_report(),
        "parameters": sum(param.nbytes for param in params),
        "gradients": sum(0 if param.grad is None else param.grad.nbytes for param in params),
        "on the host": sum(tensor.nbytes for tensor in tensors if tensor.is_cpu),
        "on the device": sum(tensor.nbytes for tensor in tensors if not tensor.is_cpu),
        "copies": Watched.most,
    }


def planned(settings: Settings, rank: int = 0) -> Row:
    return plan(described(network()), settings, rank).own


def measure_job(rank: int, folder: Path) -> list[dict[str, Any]]:
    """Every one of the twelve, on this rank."""
    assert dist.get_world_size() == 2
    return [measured(settings) for settings in twelve()]


# ---------------------------------------------------------------- on the simulated device, in a process that has it


def check_on_device(**keywords: Any) -> None:
    settings = Settings(bucket_cap_mb=BUCKET, **keywords)
    found, row = measured(settings, "sim"), planned(settings)
    assert found["report"]["bytes"] == row.state
    assert (row.device.parameters, row.device.gradients + row.host.gradients) == (
        found["parameters"],
        found["gradients"],
    )
    assert row.device.moments + row.device.master == found["on the device"]
    assert row.host.moments + row.host.master == found["on the host"]
    assert row.host.gradients == found["report"]["gradient_bytes"]
    pinned = found["report"]["pinned_bytes"]
    if settings.offload_gradients:  # four whole buffers, once all of them have had their turn
        assert 0 < pinned <= row.host.transient == offload.SLOTS * (int(BUCKET * 2**20) // 2)
    else:
        assert pinned == row.host.transient
        assert (pinned > 0) == (settings.offload == "cpu")


def case_moments_on_the_device() -> None:
    check_on_device()


def case_float32_weights_on_the_device() -> None:
    check_on_device(moments="32bit", low_precision_update="fp32")


def case_offload() -> None:
    check_on_device(offload="cpu")
    check_on_device(offload="cpu", moments="bnb8bit", low_precision_update="split")


def case_offloaded_weights() -> None:
    check_on_device(offload="cpu", moments="32bit", low_precision_update="fp32")


def case_offload_has_its_buffers_where_they_do_not_fill() -> None:
    settings = Settings(offload="cpu", bucket_cap_mb=64.0)
    found = measured(settings, "sim")["report"]["pinned_bytes"]
    assert found == planned(settings).host.transient
    assert 0 < found < 64 * 2**20


def case_offloaded_gradients() -> None:
    check_on_device(offload="cpu", offload_gradients=True)


def case_the_device_holds_what_is_planned() -> None:
    """By the device's own counter, which knows of nothing but this."""
    before = sim.device_bytes()
    for settings in (Settings(), Settings(low_precision_update="split"), Settings(offload="cpu")):
        params = [nn.Parameter(param.detach().to("sim")) for param in network().parameters()]
        opt = AdamW8bit(params, low_precision_update=settings.low_precision_update, offload=settings.offload)
        for param in params:
            param.grad = torch.zeros_like(param)
        opt.step()
        torch.accelerator.synchronize()
        held, row = sim.device_bytes() - before, planned(settings)
        assert row.device.total <= held <= row.device.total * 1.01, (held, row.device)
        del params, opt, param
