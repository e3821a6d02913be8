"""Two gloo ranks under DistributedDataParallel: replicas that never exchange optimizer state must stay equal."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from torch.nn.parallel import DistributedDataParallel

from lowmem_adam import AdamW8bit
from tests.cases import assert_same_bits, differ, everything, generator
from tests.ranks import NEEDS_GLOO, on_ranks

pytestmark = NEEDS_GLOO

WORLD_SIZE = 2
Results = dict[str, tuple[Any, Any]]
VARIANTS = ((torch.float32, False), (torch.bfloat16, True))
"""Dtype of the parameters, and whether gradients are views into DDP's buckets."""


# ---------------------------------------------------------------- what they train


class Model(nn.Module):
    """Rows shorter than a block, rows that end in a short block, and tensors too small for codes."""

    def __init__(self, seed: int = 0) -> None:
        super().__init__()
        torch.manual_seed(seed)
        self.embedding = nn.Embedding(64, 96)
        self.wide = nn.Linear(96, 130)
        self.norm = nn.LayerNorm(130)
        self.narrow = nn.Linear(130, 48)
        self.head = nn.Linear(48, 10)

    def forward(self, tokens: Tensor) -> Tensor:
        hidden = self.norm(self.wide(self.embedding(tokens)).relu())
        out: Tensor = self.head(self.narrow(hidden).relu())
        return out


def loss_of(model: nn.Module, rank: int, step: int) -> Tensor:
    """The loss of a batch that no other rank and no other step sees."""
    tokens = torch.randint(0, 64, (16,), generator=generator(rank, step))
    return cross_entropy(model(tokens).float(), tokens % 10)


class Replica:
    """A rank's model under DDP, its optimizer, and a loop over steps."""

    def __init__(self, dtype: torch.dtype, bucket_view: bool, seed: int = 0) -> None:
        self.plain = Model(seed).to(dtype)
        self.ddp = DistributedDataParallel(self.plain, gradient_as_bucket_view=bucket_view)
        self.opt = AdamW8bit(self.plain.parameters(), lr=1e-2)

    def gradients(self) -> list[Tensor]:
        return [p.grad.clone() for p in self.plain.parameters() if p.grad is not None]

    def train(self, rank: int, steps: range, poison: Callable[[], Tensor] | None = None) -> None:
        for step in steps:
            loss = loss_of(self.ddp, rank, step)
            (loss if poison is None else loss + poison()).backward()
            self.opt.step()
            self.opt.zero_grad()


def assert_trained(found: Any) -> None:
    """Some tensors keep codes and some do not, all have moved, and the moments are not zero."""
    keys = {key for state in found["state"].values() for key in state}
    assert {"exp_avg_code", "exp_avg"} <= keys
    initial = Model().to(found["params"][0].dtype)
    for param, before in zip(found["params"], initial.parameters(), strict=True):
        assert differ(param, before.detach())
    for state in found["state"].values():
        assert state["exp_avg_code" if "exp_avg_code" in state else "exp_avg"].any()


# ---------------------------------------------------------------- jobs


def steps_job(rank: int, folder: Path) -> Any:
    """Also without DDP: a loop that would leave the ranks equal without its all-reduce would prove nothing."""
    found = {}
    for dtype, bucket_view in VARIANTS:
        replica = Replica(dtype, bucket_view)
        replica.train(rank, range(6))
        alone = Model().to(dtype)
        opt = AdamW8bit(alone.parameters(), lr=1e-2)
        for step in range(6):
            loss_of(alone, rank, step).backward()
            opt.step()
            opt.zero_grad()
        found[str(dtype)] = {"ddp": everything(replica.opt), "alone": everything(opt)}
    return found


def no_sync_job(rank: int, folder: Path) -> Any:
    found = {}
    for dtype, bucket_view in VARIANTS:
        replica = Replica(dtype, bucket_view)
        for step in range(4):
            for micro in range(3):
                with replica.ddp.no_sync() if micro < 2 else nullcontext():
                    (loss_of(replica.ddp, rank, 3 * step + micro) / 3).backward()
                if micro == 1:
                    local = replica.gradients()
            reduced = replica.gradients()
            replica.opt.step()
            replica.opt.zero_grad()
        found[str(dtype)] = {"local": local, "reduced": reduced, "end": everything(replica.opt)}
    return found


def resume_job(rank: int, folder: Path) -> Any:
    found = {}
    for dtype, bucket_view in VARIANTS:
        path = folder / f"{dtype}.pt"
        through = Replica(dtype, bucket_view)
        through.train(rank, range(4))
        if rank == 0:
            torch.save({"model": through.plain.state_dict(), "optimizer": through.opt.state_dict()}, path)
        dist.barrier()
        through.train(rank, range(4, 8))
        ends = {"through": everything(through.opt)}
        for name in ("resumed", "model only"):
            saved = torch.load(path, weights_only=True)
            again = Replica(dtype, bucket_view, seed=1)
            again.plain.load_state_dict(saved["model"])
            if name == "resumed":
                again.opt.load_state_dict(saved["optimizer"])
            again.train(rank, range(4, 8))
            ends[name] = everything(again.opt)
        found[str(dtype)] = ends
    return found


def nonfinite_job(rank: int, folder: Path) -> Any:
    """On rank 1 alone two elements get an infinite gradient: one of a tensor with codes, one of a small tensor."""
    found = {}
    for dtype, bucket_view in VARIANTS:
        replica = Replica(dtype, bucket_view)
        replica.train(rank, range(3))
        before = everything(replica.opt)

        def poison(plain: Model = replica.plain) -> Tensor:
            # The derivative by these two elements becomes infinite; all others stay as they are.
            infinite = math.inf if rank == 1 else 0.0
            return infinite * (plain.narrow.weight[7, 129] + plain.head.bias[3]).float()

        with pytest.warns(RuntimeWarning, match="non-finite gradients: 2 blocks"):
            replica.train(rank, range(3, 4), poison)
        after = everything(replica.opt)
        replica.train(rank, range(4, 6))
        stats = replica.opt.stats()
        found[str(dtype)] = {"before": before, "after": after, "end": everything(replica.opt), "stats": stats}
    return found


def all_jobs(rank: int, folder: Path) -> Any:
    return {job.__name__: job(rank, folder) for job in (steps_job, no_sync_job, resume_job, nonfinite_job)}


@pytest.fixture(scope="module")
def ranks(tmp_path_factory: pytest.TempPathFactory) -> Results:
    """One pair of processes for all jobs: to start it takes longer than they do."""
    first, second = on_ranks(WORLD_SIZE, all_jobs, tmp_path_factory.mktemp("ranks"))
    return {name: (first[name], second[name]) for name in first}


# ---------------------------------------------------------------- tests


def test_ranks_stay_equal_on_different_data_and_equal_one_process_with_mean_gradients(ranks: Results) -> None:
    first, second = ranks[steps_job.__name__]
    for dtype, _ in VARIANTS:
        one, other = first[str(dtype)], second[str(dtype)]
        assert_trained(one["ddp"])
        assert_same_bits(one["ddp"], other["ddp"])
        assert differ(one["alone"]["params"], other["alone"]["params"])
    assert_same_bits(one_process_with_mean_gradients(6), first["torch.float32"]["ddp"])


def one_process_with_mean_gradients(steps: int) -> Any:
    """Halves added up: exact, so the same bits in whatever order."""
    model = Model()
    opt = AdamW8bit(model.parameters(), lr=1e-2)
    for step in range(steps):
        for rank in range(WORLD_SIZE):
            (loss_of(model, rank, step) / WORLD_SIZE).backward()
        opt.step()
        opt.zero_grad()
    return everything(opt)


def test_ranks_stay_equal_when_gradients_accumulate_without_synchronisation(ranks: Results) -> None:
    first, second = ranks[no_sync_job.__name__]
    for dtype, _ in VARIANTS:
        one, other = first[str(dtype)], second[str(dtype)]
        assert all(differ(a, b) for a, b in zip(one["local"], other["local"], strict=True))
        assert_same_bits(one["reduced"], other["reduced"])
        assert_trained(one["end"])
        assert_same_bits(one["end"], other["end"])


def test_both_ranks_resume_from_what_one_saved_as_if_nothing_had_happened(ranks: Results) -> None:
    first, second = ranks[resume_job.__name__]
    assert_same_bits(first, second)
    for found in (first, second):
        for dtype, _ in VARIANTS:
            ends = found[str(dtype)]
            assert_trained(ends["through"])
            assert_same_bits(ends["through"], ends["resumed"])
            assert differ(ends["through"]["params"], ends["model only"]["params"])


def elements(found: Any) -> Iterator[tuple[str, Tensor]]:
    names = [name for name, _ in Model().named_parameters()]
    yield from zip(names, found["params"], strict=True)


def test_an_infinite_gradient_on_one_rank_is_skipped_on_both(ranks: Results) -> None:
    first, second = ranks[nonfinite_job.__name__]
    assert_same_bits(first, second)
    for dtype, _ in VARIANTS:
        found = first[str(dtype)]
        assert found["stats"] == {"skipped_blocks": 2}
        assert_trained(found["end"])
        before, after, end = (dict(elements(found[key])) for key in ("before", "after", "end"))
        # Elements 128 and 129 of row 7 are a block of their own; the small tensor is one block.
        same = before["narrow.weight"] == after["narrow.weight"]
        assert same[7, 128:].all()
        assert not same[7, :128].all()
        assert not same[6].all()
        assert torch.equal(before["head.bias"], after["head.bias"])
        assert not torch.equal(before["head.weight"], after["head.weight"])
        assert not torch.equal(after["head.bias"], end["head.bias"])


def failing_job(rank: int, folder: Path) -> Any:
    if rank == 1:
        raise ArithmeticError("rank 1 went wrong")
    dist.barrier()


def test_an_error_on_a_rank_is_raised_with_its_traceback_and_ends_the_other(tmp_path: Path) -> None:
    with pytest.raises(AssertionError, match=r"(?s)Rank 1: Traceback.*in failing_job.*rank 1 went wrong"):
        on_ranks(WORLD_SIZE, failing_job, tmp_path)
