"""``step_in_backward`` in several processes: FSDP2 is served, replicas and shared moments are refused."""

from __future__ import annotations

import itertools
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel

from lowmem_adam import AdamW8bit, reduce_scatter_hook, step_in_backward
from lowmem_adam.stand_ins import SteppedGradient, local_part
from tests.cases import assert_same_bits
from tests.ranks import NEEDS_GLOO, on_ranks
from tests.test_in_backward import make

pytestmark = NEEDS_GLOO


def refused_on_ranks(rank: int, _: Path) -> list[str]:
    said = []
    net, _opt = make()
    ddp = DistributedDataParallel(net, find_unused_parameters=True)
    for shard_group, model in ((None, ddp), ("world", net)):
        opt = AdamW8bit(net.parameters(), shard_group=shard_group)
        try:
            step_in_backward(model, opt)
        except ValueError as error:
            said.append(str(error))
    hooked, opt = make(shard_group="world")
    reduced = DistributedDataParallel(hooked, find_unused_parameters=True)
    reduced.register_comm_hook(opt, reduce_scatter_hook)
    try:
        step_in_backward(reduced, opt)
    except ValueError as error:
        said.append(str(error))
    try:  # of the module inside nothing shows what is around it
        step_in_backward(net, AdamW8bit(net.parameters()))
    except ValueError as error:
        said.append(str(error))
    return said


def test_data_parallel_replicas_and_shared_moments_are_refused(tmp_path: Path) -> None:
    words = (
        "model is a DistributedDataParallel",
        "2 ranks share the moments",
        "model is a DistributedDataParallel",
        "2 processes, and the model has plain parameters",
    )
    for said in on_ranks(2, refused_on_ranks, tmp_path):
        assert [word in sentence for word, sentence in zip(words, said, strict=True)] == [True] * 4, said


def train_fsdp2(rank: int, _: Path) -> list[Any]:
    runs = []
    net: Any
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    for in_backward, batches in itertools.product((False, True), (1, 2)):
        torch.manual_seed(0)
        net = nn.Sequential(nn.Linear(96, 128), nn.ReLU(), nn.Linear(128, 96), nn.LayerNorm(96))
        for layer in (net[0], net[2]):
            fully_shard(layer, mesh=mesh)
        fully_shard(net, mesh=mesh)
        opt = AdamW8bit(net.parameters(), lr=1e-2)
        if in_backward:
            step_in_backward(net, opt)
        for step in range(4):
            opt.zero_grad()
            for batch in range(batches):
                # FSDP2's own accumulation: gradients are reduced, and final, with the last pass.
                net.set_requires_gradient_sync(batch == batches - 1)
                seed = 100 * step + 10 * batch + rank
                x = torch.randn(8, 96, generator=torch.Generator().manual_seed(seed))
                net(x).square().sum().backward()
            opt.step()
        stepped = [isinstance(local_part(param.grad), SteppedGradient) for param in net.parameters()]
        assert stepped == [in_backward] * len(stepped)
        if in_backward:
            with pytest.raises(RuntimeError, match="clipping by their global norm"):
                nn.utils.clip_grad_norm_(net.parameters(), 1.0)
        runs.append([param.detach().full_tensor() for param in net.parameters()])
    return runs


def test_fsdp2_is_stepped_in_its_backward_pass(tmp_path: Path) -> None:
    for runs in on_ranks(2, train_fsdp2, tmp_path):
        assert_same_bits(runs[0], runs[2])
        assert_same_bits(runs[1], runs[3])
        assert not torch.equal(runs[0][0], runs[1][0])
