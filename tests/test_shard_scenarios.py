"""Sharded optimizers in the loops that people write: what is the same without shards must be the same bits with them.

Each scenario runs beside an optimizer that keeps all moments, on the same gradients; all of those of one number of
ranks run in one start of processes.
"""

from __future__ import annotations

import copy
import math
import pickle
import warnings
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.optim.lr_scheduler import LambdaLR, OneCycleLR

from lowmem_adam import AdamW8bit
from tests.cases import (
    DTYPES,
    FEW,
    SHAPES,
    Shape,
    assert_same_bits,
    differ,
    generator,
    make_params,
    params_of,
    set_gradients,
    train,
)
from tests.ranks import NEEDS_GLOO, Job
from tests.shard_jobs import (
    PAIR,
    Outcomes,
    Replica,
    assert_equal_runs,
    group_of,
    held,
    loads_of,
    outcome,
    raised,
    set_trainable_gradients,
    small,
    start,
    take,
    values,
)
from tests.test_ddp import Model, loss_of

pytestmark = NEEDS_GLOO


# ---------------------------------------------------------------- DistributedDataParallel


def ddp_job(rank: int, folder: Path) -> Any:
    """Gradients accumulate over two batches, the first without synchronisation."""
    for bucket_view in (False, True):
        replica = Replica("world", gradient_as_bucket_view=bucket_view)
        alone = Model()
        opt = AdamW8bit(alone.parameters(), lr=1e-2)
        for step in range(4):
            for micro in range(2):
                with nullcontext() if micro else replica.ddp.no_sync():
                    (loss_of(replica.ddp, rank, 2 * step + micro) / 2).backward()
            means = [torch.zeros_like(param) for param in alone.parameters()]
            for other in range(PAIR):
                opt.zero_grad()
                for micro in range(2):
                    (loss_of(alone, other, 2 * step + micro) / 2).backward()
                for mean, param in zip(means, alone.parameters(), strict=True):
                    assert param.grad is not None
                    mean += param.grad / PAIR  # halves: exact, so the same bits as DDP's
            for mean, param in zip(means, alone.parameters(), strict=True):
                param.grad = mean
            replica.opt.step()
            replica.opt.zero_grad()
            opt.step()
        assert_equal_runs(replica.opt, opt, to=1)
        assert differ(values(opt), [p.detach() for p in Model().parameters()])


class Branches(nn.Module):
    """Two branches of which a rank uses its own, one that nobody uses, and one that is frozen."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.branches = nn.ModuleList(nn.Linear(96, 130) for _ in range(4))
        for param in self.branches[3].parameters():
            param.requires_grad_(False)

    def forward(self, x: Tensor, branch: int) -> Tensor:
        out: Tensor = self.branches[3](x) + self.branches[branch](x)
        return out.square().mean()


def unused_job(rank: int, folder: Path) -> Any:
    sharded, alone = (Replica(group, Branches(), find_unused_parameters=True) for group in ("world", None))
    for step in range(4):
        for replica in (sharded, alone):
            # In the last step everybody uses the same branch: the other one has no gradient then.
            branch = rank if step < 3 else 0
            replica.ddp(torch.randn(8, 96, generator=generator(rank, step)), branch).backward()
            replica.opt.step()
            replica.opt.zero_grad()
    whole = sharded.opt.state_dict()
    assert_equal_runs(sharded.opt, alone.opt)
    return sorted(whole["state"]) if rank == 0 else None


def closure_job(rank: int, folder: Path) -> Any:
    losses = []
    replicas = [Replica(group) for group in ("world", None)]
    for replica in replicas:

        def closure(replica: Replica = replica) -> float:
            replica.opt.zero_grad()
            loss = loss_of(replica.ddp, rank, 0)
            loss.backward()
            return loss.item()

        losses.append([replica.opt.step(closure) for _ in range(3)])
    assert losses[0] == losses[1]
    assert losses[0][0] is not None
    assert_equal_runs(replicas[0].opt, replicas[1].opt)


# ---------------------------------------------------------------- parameters of every kind, groups, freezing


def kinds_job(rank: int, folder: Path) -> Any:
    """Every shape, memory format and dtype, all in one optimizer."""
    three = []
    for group, offload in (("world", None), ("world", "cpu"), (None, None)):
        params = [param for seed, dtype in enumerate(DTYPES) for param in make_params(SHAPES, dtype, seed=seed)]
        three.append(AdamW8bit(params, lr=1e-2, shard_group=group, offload=offload, bucket_cap_mb=0.25))
        train(three[-1], params, 4)
    for sharded in three[:2]:
        assert_equal_runs(sharded, three[2], to=1)
    return loads_of(three[0])


def grow_job(rank: int, folder: Path) -> Any:
    """Freeze, step, unfreeze, add groups: whatever came when, the load stays even."""
    pair = [small(group) for group in ("world", None)]
    loads = []
    for opt in pair:
        for param in params_of(opt)[1::2]:
            param.requires_grad_(False)
        take(opt, range(2))
        if opt is pair[0]:
            loads.append(loads_of(opt))
        params_of(opt)[1].requires_grad_(True)
        take(opt, range(2, 4))
        if opt is pair[0]:
            loads.append(loads_of(opt))
        opt.add_param_group({"params": make_params((Shape("row", (1, 5000), True),), seed=5), "lr": 5e-3})
        params_of(opt)[0].requires_grad_(False)
        take(opt, range(4, 6))
        for param in params_of(opt):
            param.requires_grad_(True)
        opt.add_param_group({"params": make_params(FEW[:3], torch.bfloat16, seed=6)})
        take(opt, range(6, 8))
        if opt is pair[0]:
            loads.append(loads_of(opt))
    assert_equal_runs(pair[0], pair[1], to=1)
    return loads


def frozen_for_good_job(rank: int, folder: Path) -> Any:
    """Somebody read the state of a frozen parameter, on one rank only, which leaves an empty entry behind."""
    pair = [small(group) for group in (group_of(5), None)]
    for opt in pair:
        params_of(opt)[2].requires_grad_(False)
        take(opt, range(2))
        if rank == 1 or opt is pair[1]:
            assert opt.state[params_of(opt)[2]] == {}
    own = pair[0].state_dict()
    parts = pair[0].sharded_state_dict()
    pair[0].load_state_dict(own)
    for opt in pair:
        take(opt, range(2, 4))
    assert_same_bits(values(pair[0]), values(pair[1]))
    return sorted(parts["state"])


def all_frozen_job(rank: int, folder: Path) -> Any:
    for nonfinite in ("skip", "error"):
        opt = small("world", nonfinite=nonfinite)
        for param in params_of(opt):
            param.requires_grad_(False)
        before = values(opt)
        for call in (opt.step, opt.step, opt.state_dict, opt.sharded_state_dict, opt.consolidate_state_dict):
            call()
        opt.check_replicas()
        assert opt.memory_report()["ranks"] == [0, 0]
        assert_same_bits(values(opt), before)


# ---------------------------------------------------------------- schedulers, scalers, clipping, hooks, copies


def schedule_job(rank: int, folder: Path) -> Any:
    pair = [small(group, betas=(0.85, 0.99)) for group in ("world", None)]
    seen = []
    for opt in pair:
        warm = LambdaLR(opt, lambda step: 0.5**step)
        for step in range(3):
            take(opt, range(step, step + 1))
            warm.step()
        cycle = OneCycleLR(opt, max_lr=0.02, total_steps=6)
        for step in range(3, 8):
            take(opt, range(step, step + 1))
            cycle.step()
        seen.append((opt.param_groups[0]["lr"], opt.param_groups[0]["betas"]))
    assert seen[0] == seen[1]
    assert seen[0][1][0] != 0.85
    assert_equal_runs(pair[0], pair[1])


def scale_job(rank: int, folder: Path) -> Any:
    """The attributes by which scalers drive an optimizer, together with clipping."""
    pair = [small(group) for group in ("world", None)]
    norms = []
    for opt in pair:
        for step, found_inf in enumerate((0.0, 1.0, 0.0, 0.0)):
            set_trainable_gradients(opt, step)
            opt.grad_scale, opt.found_inf = torch.tensor(8.0), torch.tensor(found_inf)
            before = values(opt)
            norms.append(opt.clip_grad_norm_(0.05))
            opt.step()
            assert differ(before, values(opt)) == (found_inf == 0.0)
            del opt.grad_scale, opt.found_inf
        set_trainable_gradients(opt, 4)
        norms.append(torch.nn.utils.clip_grad_norm_(params_of(opt), 0.05))
        opt.step()
    assert all(norm > 0.05 for norm in norms)
    assert_same_bits(norms[:5], norms[5:])
    assert_equal_runs(pair[0], pair[1])


def hooks_job(rank: int, folder: Path) -> Any:
    opt = small("world")
    seen: list[Any] = []
    opt.register_step_pre_hook(lambda *_: seen.append("step"))
    opt.register_state_dict_post_hook(lambda _, made: {**made, "tag": sorted(made)})
    take(opt, range(2))
    made = opt.state_dict()
    opt.register_load_state_dict_pre_hook(lambda _, given: seen.append(given["tag"]))
    opt.register_load_state_dict_post_hook(
        lambda loaded: seen.append(
            {type(value).__name__ for state in loaded.state.values() for value in state.values()}
        )
    )
    before = held(opt)
    opt.load_state_dict(made)
    assert_same_bits(held(opt), before)
    parts = opt.sharded_state_dict()
    assert parts["tag"] == ["param_groups", "state"]
    return [seen[0], seen[1], seen[2], sorted(seen[3])]


def late_group_job(rank: int, folder: Path) -> Any:
    """State is loaded before there is a process group, where "world" is this process alone; then there is one."""
    alone = small(None)
    take(alone, range(3))
    dist.destroy_process_group()
    opt = small("world")
    opt.load_state_dict(alone.state_dict())
    assert len(loads_of(opt)) == 1
    with torch.no_grad():
        for param, value in zip(params_of(opt), values(alone), strict=True):
            param.copy_(value)
    init_method = (folder / "late").as_uri()
    dist.init_process_group("gloo", init_method=init_method, rank=rank, world_size=PAIR)
    take(opt, range(3, 6))
    take(alone, range(3, 6))
    assert len(loads_of(opt)) == PAIR
    held_here, whole = (sum(v.nbytes for s in o.state.values() for v in s.values()) for o in (opt, alone))
    assert held_here < 0.7 * whole
    assert_equal_runs(opt, alone)
    return None


def copies_job(rank: int, folder: Path) -> Any:
    opt = small("world")
    fresh = copy.deepcopy(opt)
    take(opt, range(3))
    twins = [copy.deepcopy(opt)]
    take(fresh, range(5))
    for one in (opt, *twins):
        take(one, range(3, 5))
        assert_same_bits(values(one), values(fresh))
        assert one.memory_report()["ranks"] == fresh.memory_report()["ranks"]
    take(opt, range(5, 6))
    assert differ(values(opt), values(fresh))


def pickles_job(rank: int, folder: Path) -> Any:
    opt = small("world")
    fresh = pickle.loads(pickle.dumps(opt))
    take(opt, range(3))
    again = pickle.loads(pickle.dumps(opt))
    take(fresh, range(5))
    for one in (opt, again):
        take(one, range(3, 5))
        assert_same_bits(values(one), values(fresh))
        assert one.memory_report()["ranks"] == fresh.memory_report()["ranks"]


def copied_group_job(rank: int, folder: Path) -> Any:
    """A ProcessGroup cannot be copied: that must be said in our words, before and after the first step."""
    opt = small(dist.new_group())
    calls = (lambda: copy.deepcopy(opt), lambda: pickle.dumps(opt))
    before = [raised(call) for call in calls]
    take(opt, range(1))
    return before + [raised(call) for call in calls]


# ---------------------------------------------------------------- non-finite gradients

BAD = {"the first rank's": (0, 5), "the last rank's": (-1, -1)}
"""Parameter and flat element that gets an infinity; each in another rank's shard."""


def poison(opt: AdamW8bit, place: tuple[int, int], value: float) -> None:
    grad = params_of(opt)[place[0]].grad
    assert grad is not None
    grad.view(-1)[place[1]] = value


def nonfinite_job(rank: int, folder: Path) -> Any:
    counts = {}
    for mode in ("skip", "propagate"):
        for where, place in BAD.items():
            pair = [small(group, nonfinite=mode) for group in ("world", None)]
            for opt in pair:
                take(opt, range(2))
                for step, value in ((2, math.inf), (3, math.nan)):
                    set_gradients(params_of(opt), step)
                    poison(opt, place, value)
                    with warnings.catch_warnings():
                        warnings.simplefilter("ignore")
                        opt.step()
                take(opt, range(4, 6))
            pair[0].check_replicas()
            counts[f"{mode}, {where}"] = [opt.stats()["skipped_blocks"] for opt in pair]
            assert_equal_runs(pair[0], pair[1])
    return counts


def nonfinite_error_job(rank: int, folder: Path) -> Any:
    said = []
    for place in BAD.values():
        for steps in (0, 2):  # at the first step ranks meet anyway
            pair = [small(group, nonfinite="error") for group in ("world", None)]
            for opt in pair:
                take(opt, range(steps))
                set_gradients(params_of(opt), steps)
                before = held(opt)
                poison(opt, place, math.nan)
                said.append(raised(opt.step))
                assert_same_bits(held(opt), before)
                take(opt, range(steps, 4))
            assert_equal_runs(pair[0], pair[1])
    return said


PAIR_JOBS: tuple[Job, ...] = (
    ddp_job,
    unused_job,
    closure_job,
    kinds_job,
    grow_job,
    frozen_for_good_job,
    all_frozen_job,
    schedule_job,
    scale_job,
    hooks_job,
    late_group_job,
    copies_job,
    pickles_job,
    copied_group_job,
    nonfinite_job,
    nonfinite_error_job,
)


@pytest.fixture(scope="module")
def pair(tmp_path_factory: pytest.TempPathFactory) -> Outcomes:
    return start(PAIR, PAIR_JOBS, tmp_path_factory.mktemp("pair"))


# ---------------------------------------------------------------- tests: training


@pytest.mark.parametrize(
    "job", [ddp_job, closure_job, schedule_job, scale_job, late_group_job, copies_job, pickles_job]
)
def test_a_training_loop_gives_the_bits_of_one_that_keeps_all_moments(pair: Outcomes, job: Job) -> None:
    outcome(pair, job)


def test_parameters_that_nobody_uses_and_frozen_ones_have_no_state(pair: Outcomes) -> None:
    assert outcome(pair, unused_job) == [[0, 1, 2, 3], None]


def test_parameters_of_every_shape_dtype_and_memory_format_go_into_one_even_cut(pair: Outcomes) -> None:
    for loads in outcome(pair, kinds_job):
        assert max(loads) - min(loads) <= 1


def test_loads_stay_within_a_block_when_parameters_are_unfrozen_and_groups_added(pair: Outcomes) -> None:
    first, second = outcome(pair, grow_job)
    assert first == second
    assert all(max(loads) - min(loads) <= 1 for loads in first)
    assert sum(first[0]) < sum(first[1]) < sum(first[2])


def test_an_empty_state_entry_of_a_frozen_parameter_changes_nothing(pair: Outcomes) -> None:
    assert outcome(pair, frozen_for_good_job) == [[0, 1, 3, 4, 5]] * PAIR


def test_an_optimizer_of_frozen_parameters_steps_and_saves_nothing(pair: Outcomes) -> None:
    outcome(pair, all_frozen_job)


def test_hooks_see_what_the_caller_gets_and_gives(pair: Outcomes) -> None:
    first, second = outcome(pair, hooks_job)
    assert first == ["step", "step", ["param_groups", "state"], ["Tensor"]]
    assert second == ["step", "step", ["param_groups", "shard_1_of_2", "state"], ["Tensor"]]


def test_copies_of_an_optimizer_with_a_process_group_are_refused_by_name(pair: Outcomes) -> None:
    for said in outcome(pair, copied_group_job):
        assert all("shard_group" in words for words in said), said


def test_nonfinite_blocks_are_left_out_or_propagated_on_all_ranks_alike(pair: Outcomes) -> None:
    first, second = outcome(pair, nonfinite_job)
    # A rank counts its own shard's; an optimizer that keeps all counts all.
    assert first == {
        "skip, the first rank's": [2, 2],
        "skip, the last rank's": [0, 2],
        "propagate, the first rank's": [0, 0],
        "propagate, the last rank's": [0, 0],
    }
    assert [second[f"skip, {where}"] for where in BAD] == [[0, 2], [2, 2]]


def test_a_nonfinite_gradient_in_any_shard_stops_all_ranks_before_anything_changes(pair: Outcomes) -> None:
    for said in outcome(pair, nonfinite_error_job):
        assert len(said) == 8
        assert all(words.startswith(("ValueError: ", "RuntimeError: ")) for words in said)
    of_both = list(zip(*outcome(pair, nonfinite_error_job), strict=True))[::2]
    for words in of_both:  # the rank of the bad block says which parameter
        assert any("gradient elements are not finite" in said for said in words)
