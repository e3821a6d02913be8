"""Plans against what is really held: twelve settings on two ranks, the simulated device, and DeepSpeed's engine."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch

from lowmem_adam.plan import KINDS, Model, Settings, Weight, plan
from lowmem_adam.state import MASTER_KEYS
from tests import plan_cases, sim_device
from tests.deepspeed_jobs import BASE, BF16, BY_NAME, WIDTH, base_of, begin, engine_of, model, train, zero
from tests.launching import NEEDS_DEEPSPEED
from tests.plan_cases import measure_job, network, planned, twelve
from tests.ranks import NEEDS_GLOO, on_ranks
from tests.sim_device import running

WORLD = 2
REASON = sim_device.why_unavailable()


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> list[list[dict[str, Any]]]:
    """By rank, then by setting."""
    return on_ranks(WORLD, measure_job, tmp_path_factory.mktemp("plan"))


@NEEDS_GLOO
@pytest.mark.parametrize("index", range(12))
def test_bytes_by_kind_are_those_measured(found: list[list[dict[str, Any]]], index: int) -> None:
    settings = twelve()[index]
    assert sum(param.numel() for param in network().parameters()) > 1_000_000
    for rank in range(WORLD):
        held, row = found[rank][index], planned(settings, rank % settings.world_size)
        kinds = held["report"]["bytes"]
        assert row.state == kinds
        masters = sum(nbytes for name, nbytes in kinds.items() if name in MASTER_KEYS.values())
        both = {kind: getattr(row.device, kind) + getattr(row.host, kind) for kind in KINDS}
        # Parameters that are on the CPU pass through no pinned buffers.
        del both["transient"]
        assert both == {
            "parameters": held["parameters"],
            "gradients": held["gradients"],
            "moments": sum(kinds.values()) - masters,
            "master": masters,
        }
        assert (masters > 0) == settings.keeps_weights
        assert row.device.transient == held["copies"]
        assert (held["copies"] > 0) == (settings.world_size == WORLD)
        of_ranks = held["report"]["ranks"]
        assert [sum(planned(settings, other).state.values()) for other in range(len(of_ranks))] == of_ranks


@NEEDS_GLOO
def test_the_rank_that_holds_most_is_planned(found: list[list[dict[str, Any]]]) -> None:
    for index, settings in enumerate(twelve()):
        own = plan(plan_cases.described(network()), settings).own
        totals = [rank[index]["report"]["total_bytes"] for rank in found]
        assert sum(own.state.values()) == max(totals)
        assert settings.world_size == 1 or totals[own.rank] == max(totals)


@pytest.fixture(scope="module")
def on_device(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    return running.outcomes([plan_cases], tmp_path_factory.mktemp("sim") / "results.jsonl")


@pytest.mark.skipif(REASON is not None, reason=REASON or "")
@pytest.mark.parametrize("case", running.cases_of(plan_cases))
def test_on_the_simulated_device(on_device: dict[str, str], case: str) -> None:
    failure = on_device[running.full_name(plan_cases, case)]
    assert not failure, failure


# ---------------------------------------------------------------- under DeepSpeed

TORCH = {"optimizer": {"type": "AdamW", "params": {"lr": 1e-3, "torch_adam": True}}}
OFFLOAD = {"offload_optimizer": {"device": "cpu"}}


class Engine(NamedTuple):
    stage: int
    dtype: torch.dtype
    ours: bool
    offload: str | None = None

    def config(self) -> dict[str, Any]:
        by_name = BY_NAME if self.ours else TORCH
        sections = zero(self.stage, reduce_bucket_size=1000, **(OFFLOAD if self.offload else {}))
        return {**BASE, **by_name, **(BF16 if self.dtype == torch.bfloat16 else {}), **sections}


ENGINES = (
    Engine(1, torch.bfloat16, ours=True),
    Engine(2, torch.float32, ours=True),
    Engine(2, torch.bfloat16, ours=True, offload="cpu"),
    Engine(3, torch.float32, ours=False),
    Engine(3, torch.bfloat16, ours=True, offload="cpu"),
)


def nbytes(tensors: Iterable[torch.Tensor | None]) -> int:
    return sum(0 if tensor is None else tensor.nbytes for tensor in tensors)


def watched(engine: Any) -> list[int]:
    """Is given the bytes of all gradients at the end of stage 1's backward pass, which then frees those of others."""
    whole: list[int] = []
    clear = engine.optimizer._clear_param_grad_only

    def count_and_clear() -> None:
        whole.append(nbytes(param.grad for param in engine.module.parameters()))
        clear()

    engine.optimizer._clear_param_grad_only = count_and_clear
    return whole


def engine_job(rank: int, folder: Path) -> list[dict[str, int]]:
    """What each engine holds after a step and the backward pass of the next one."""
    begin(rank)
    found = []
    for row in ENGINES:
        engine = engine_of(row.config())
        train(engine, range(1))
        whole = watched(engine) if row.stage == 1 else []
        engine.backward(engine(torch.ones(4, WIDTH, dtype=row.dtype)).float().square().mean())
        held, state = engine.optimizer, base_of(engine).state.values()
        early = row.stage < 3
        flat = held.bit16_groups_flat if early else held.fp16_partitioned_groups_flat
        masters = held.single_partition_of_fp32_groups if early else held.fp32_partitioned_groups_flat
        assert not {tensor.data_ptr() for tensor in flat} & {tensor.data_ptr() for tensor in masters}
        if row.stage == 3:
            gradients = held.grad_partitions_flat_buffer.nbytes
        elif row.stage == 2:
            gradients = nbytes(held.averaged_gradients.get(0) or [])
        else:
            (gradients,) = whole
        buffers = []
        if row.offload:
            gradients += nbytes(master.grad for master in masters)
            if early:
                buffers = [*held.param_buffer_of_bit16_for_cpu_offload_groups, held.temp_grad_buffer_for_cpu_offload]
        found.append(
            {
                "parameters": nbytes(flat),
                "gradients": gradients,
                "moments": nbytes(tensor for kinds in state for key, tensor in kinds.items() if key != "step"),
                "master": nbytes(masters),
                "buffers of the host": nbytes(buffers),
            }
        )
        engine.destroy()
    return found


@NEEDS_GLOO
@NEEDS_DEEPSPEED
def test_deepspeed_holds_what_is_planned(tmp_path: Path) -> None:
    weights = [Weight(name, tuple(param.shape)) for name, param in model().named_parameters()]
    for rank in on_ranks(WORLD, engine_job, tmp_path):
        for row, found in zip(ENGINES, rank, strict=True):
            settings = Settings(dtype=row.dtype, world_size=WORLD, zero_stage=row.stage, offload=row.offload)
            made = plan(Model("model", weights), settings)
            own = made.own if row.ours else made.rows[-4 + row.stage]
            assert own.name.startswith(f"DeepSpeed stage {row.stage}")
            both = {kind: getattr(own.device, kind) + getattr(own.host, kind) for kind in KINDS}
            assert found == {
                "parameters": both["parameters"],
                "gradients": both["gradients"],
                "moments": both["moments"] - (8 if row.ours else 0),  # but for our step counter
                "master": both["master"],
                "buffers of the host": own.host.transient,
            }, row
