"""Gradients reduced to the rank that steps them, as DDP's communication hook."""

from __future__ import annotations

import math
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from lowmem_adam import AdamW8bit, reduce_scatter_hook
from tests.cases import assert_same_bits, copied, differ
from tests.ranks import NEEDS_GLOO, on_ranks
from tests.test_ddp import Model, loss_of

pytestmark = NEEDS_GLOO

STEPS = 5
MICRO_STEPS = 2


class Replica:
    """A model under DDP, in small buckets, with a sharded optimizer and the hook, or the all-reduce."""

    def __init__(self, hook: bool, dtype: torch.dtype = torch.float32, bucket_view: bool = False) -> None:
        self.plain = Model().to(dtype)
        if dtype == torch.float32:  # one that does not lie in one run
            self.plain.wide.weight = nn.Parameter(self.plain.wide.weight.detach().t().contiguous().t())
        self.ddp = DistributedDataParallel(self.plain, bucket_cap_mb=0.02, gradient_as_bucket_view=bucket_view)
        self.opt = AdamW8bit(self.plain.parameters(), lr=1e-2, shard_group="world", bucket_cap_mb=0.05)
        if hook:
            self.ddp.register_comm_hook(self.opt, reduce_scatter_hook)

    def backward(self, rank: int, step: int) -> None:
        """Accumulates over micro-batches, of which the last is synchronised."""
        for micro in range(MICRO_STEPS):
            with self.ddp.no_sync() if micro < MICRO_STEPS - 1 else nullcontext():
                (loss_of(self.ddp, rank, MICRO_STEPS * step + micro) / MICRO_STEPS).backward()

    def own_gradients(self) -> list[Tensor]:
        partition = self.opt._cut()
        pieces = [partition.own(param) for param in self.plain.parameters()]
        return [
            piece.param.grad.reshape(-1)[piece.start : piece.stop].clone()
            for piece in pieces
            if piece.param.grad is not None
        ]


def steps_job(rank: int, folder: Path) -> Any:
    """The hook beside the all-reduce, with the same batches."""
    found: dict[str, Any] = {}
    for dtype in (torch.float32, torch.bfloat16):
        for clip in (None, 2.0, math.inf):
            one, other = Replica(True, dtype, bucket_view=clip is None), Replica(False, dtype)
            norms, grads = [], []
            for step in range(STEPS):
                for replica in (one, other):
                    replica.backward(rank, step)
                if step == 0:
                    grads = [replica.own_gradients() for replica in (one, other)]
                    foreign = [p.grad.isnan().sum().item() for p in one.plain.parameters() if p.grad is not None]
                    mine = sum(grad.numel() for grad in grads[0])
                    total = sum(p.numel() for p in one.plain.parameters())
                    assert sum(foreign) == total - mine  # NaN wherever another rank steps, and nowhere else
                if clip is not None:
                    norms.append([float(replica.opt.clip_grad_norm_(0.3, clip)) for replica in (one, other)])
                for replica in (one, other):
                    replica.opt.step()
                    replica.opt.zero_grad(set_to_none=step % 2 == 0)
            for replica in (one, other):
                replica.opt.check_replicas()
            found[f"{dtype}-{clip}"] = {
                "grads": grads,
                "norms": norms,
                "params": [copied(list(replica.plain.parameters())) for replica in (one, other)],
            }
    return found


def refusals_job(rank: int, folder: Path) -> Any:
    """What the hook cannot serve."""
    replica = Replica(True)
    replica.backward(rank, 0)
    with pytest.raises(RuntimeError, match=r"reduced a second time.*no_sync"):
        replica.backward(rank, 1)
    del replica
    replica = Replica(True)
    replica.backward(rank, 0)
    replica.opt.zero_grad()  # the step is left out
    replica.backward(rank, 1)
    norm = torch.nn.utils.clip_grad_norm_(replica.plain.parameters(), 1.0)
    assert norm.isnan()  # loud, since it does not know of the other ranks' gradients
    replica.opt.zero_grad()
    replica.backward(rank, 2)
    replica.opt.step()
    replica.opt.zero_grad()
    alone = [dist.new_group([member]) for member in range(dist.get_world_size())][rank]
    for case, words in (
        ("not sharded", "accepted: an optimizer with shard_group"),
        ("not all parameters", "accepted: an optimizer with shard_group"),
        ("among fewer ranks", "accepted: a shard_group of all ranks"),
    ):
        ddp = DistributedDataParallel(Model())
        params = list(ddp.parameters())[: 2 if case == "not all parameters" else None]
        group = {"not sharded": None, "among fewer ranks": alone}.get(case, "world")
        ddp.register_comm_hook(AdamW8bit(params, shard_group=group), reduce_scatter_hook)
        with pytest.raises((ValueError, RuntimeError), match=words):
            loss_of(ddp, rank, 0).backward()
    return None


def both_jobs(rank: int, folder: Path) -> Any:
    return {job.__name__: job(rank, folder) for job in (steps_job, refusals_job)}


@pytest.fixture(scope="module", params=[2, 3])
def ranks(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> list[Any]:
    return on_ranks(request.param, both_jobs, tmp_path_factory.mktemp("reduce"))


def test_the_hook_trains_as_the_all_reduce_does(ranks: list[Any]) -> None:
    for name in ranks[0]["steps_job"]:
        for found in (rank["steps_job"][name] for rank in ranks):
            exact = len(ranks) == 2 and "float32" in name  # two summands and a half: no order, no rounding
            # Otherwise sums of the ranks' gradients differ by their rounding, of which bfloat16 has 8 bits.
            tolerance = 0 if exact else len(ranks) * (2**-24 if "float32" in name else 2**-8)
            for one, other in zip(*found["grads"], strict=True):
                torch.testing.assert_close(one, other, rtol=2 * tolerance, atol=tolerance * 0.1)
            for one, other in found["norms"]:
                assert one == pytest.approx(other, rel=1e-5 + 10 * tolerance)
            if exact and "None" in name:
                assert_same_bits(*found["params"])
            else:  # a step is at most about the learning rate, whatever the gradient
                for one, other in zip(*found["params"], strict=True):
                    torch.testing.assert_close(one, other, rtol=0.02, atol=STEPS * 2e-2)
            assert differ(found["params"][0], list(Model().to(found["params"][0][0].dtype).parameters()))
        assert all(
            not differ(rank["steps_job"][name]["params"], ranks[0]["steps_job"][name]["params"]) for rank in ranks
        )


def test_refusals_were_raised(ranks: list[Any]) -> None:
    assert all(rank["refusals_job"] is None for rank in ranks)
