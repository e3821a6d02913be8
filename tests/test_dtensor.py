"""Parameters that are DTensors, as FSDP2 and tensor parallelism make them: stepped and saved where they lie."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_optimizer_state_dict,
    set_optimizer_state_dict,
)
from torch.distributed.checkpoint.state_dict_loader import load as dcp_load
from torch.distributed.checkpoint.state_dict_saver import save as dcp_save
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, Partial, Placement, Replicate, Shard, distribute_tensor

from lowmem_adam import AdamW8bit, agreement, checkpoint
from lowmem_adam.local import whole_tensor
from tests.cases import assert_same_bits, copied, differ, gradient
from tests.kernel_cases import UPDATES
from tests.ranks import NEEDS_GLOO, on_ranks

pytestmark = NEEDS_GLOO

Shapes = Sequence[tuple[int, ...]]
ROWS: Shapes = [(64, 130), (50, 300), (7,), (131072,), (33, 4, 40), (5, 9), (1, 5000)]
"""Cut along dimension 0 by any number of ranks, (131072,) between blocks by 1, 2 and 4."""
COLUMNS: Shapes = [(40, 1024), (24, 512), (20, 8, 64), (96, 257)]

S0, S1, R = Shard(0), Shard(1), Replicate()
DTYPES = (torch.float32, torch.bfloat16)
KINDS: dict[str, tuple[torch.dtype, dict[str, Any]]] = {
    "float32": (torch.float32, {}),
    "float32, offload": (torch.float32, {"offload": "cpu"}),
    **{f"bfloat16, {update}": (torch.bfloat16, UPDATES[update]) for update in ("stochastic", "split", "fp32")},
}
"""Of parameters, and how they are updated."""
FILLERS = 8
"""Process groups made before those of a mesh, so that those are named 9 to 12."""


def whole_params(shapes: Shapes, dtype: torch.dtype, seed: int = 0) -> list[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(shape, generator=generator).to(dtype) for shape in shapes]


def placed(values: Sequence[Tensor], mesh: Any, placements: Sequence[Placement]) -> list[nn.Parameter]:
    # Copies: without a source rank torch 2.9 takes shards that lie in the whole tensor.
    return [nn.Parameter(distribute_tensor(value.clone(), mesh, placements, src_data_rank=None)) for value in values]


def take_steps(opt: AdamW8bit, steps: range) -> None:
    """Gradients of whole parameters, the same on every rank, placed as the parameters are."""
    for step in steps:
        for index, param in enumerate(opt.param_groups[0]["params"]):
            grad = gradient(torch.empty(param.shape, dtype=param.dtype), 0, index, step)
            if isinstance(param, DTensor):
                param.grad = distribute_tensor(grad, param.device_mesh, param.placements, src_data_rank=None)
            else:
                param.grad = grad
        opt.step()
        opt.zero_grad()


def whole(value: Any) -> Any:
    if isinstance(value, DTensor):
        return whole_tensor(value)
    return {key: whole(entry) for key, entry in value.items()} if isinstance(value, dict) else value


def found_in(opt: AdamW8bit) -> dict[str, Any]:
    """All parameters and all state, put together."""
    params = opt.param_groups[0]["params"]
    weights = [opt.master_weight(param) for param in params]
    assert [isinstance(weight, DTensor) for weight in weights] == [isinstance(param, DTensor) for param in params]
    return {
        "params": [copied(whole(param)) for param in params],
        "weights": [copied(whole(weight)) for weight in weights],
        "state": copied(whole(opt.state_dict()["state"])),
        "bytes": opt.memory_report()["total_bytes"],
    }


# ---------------------------------------------------------------- jobs


def rows_job(rank: int, folder: Path) -> Any:
    """Six steps of parameters cut by rows; after three the state is saved, each rank its part."""
    world = torch.distributed.get_world_size()
    mesh = init_device_mesh("cpu", (world,))
    found = {}
    for name, (dtype, settings) in KINDS.items():
        shapes = [shape for shape in ROWS if world != 3 or shape != (131072,)]
        opt = AdamW8bit(placed(whole_params(shapes, dtype), mesh, [S0]), lr=1e-2, **settings)
        take_steps(opt, range(3))
        params = dict(enumerate(opt.param_groups[0]["params"]))
        dcp_save({"params": params, "optimizer": opt.sharded_state_dict()}, checkpoint_id=folder / f"{name}-{world}")
        take_steps(opt, range(3, 6))
        found[name] = found_in(opt)
        consolidated = opt.consolidate_state_dict()
        if consolidated is not None:
            assert_same_bits(consolidated["state"], found[name]["state"], name)
    return found


def load_job(rank: int, folder: Path) -> Any:
    """What two ranks saved of DTensors, loaded by DTensors, by shards and by an optimizer that has everything."""
    world = torch.distributed.get_world_size()
    mesh = init_device_mesh("cpu", (world,))
    found = {}
    for name, (dtype, settings) in KINDS.items():
        values = whole_params(ROWS, dtype, seed=1)
        plain = [nn.Parameter(value.clone()) for value in values]
        for kind, opt in {
            "dtensor": AdamW8bit(placed(values, mesh, [S0]), lr=1e-2, **settings) if world != 3 else None,
            "shards": AdamW8bit(plain, lr=1e-2, shard_group="world", **settings),
            "alone": AdamW8bit([nn.Parameter(value.clone()) for value in values], lr=1e-2, **settings),
        }.items():
            if opt is None:
                continue
            saved: Any = {
                "params": dict(enumerate(opt.param_groups[0]["params"])),
                "optimizer": opt.sharded_state_dict(),
            }
            dcp_load(saved, checkpoint_id=folder / f"{name}-2")
            opt.load_state_dict(saved["optimizer"])
            take_steps(opt, range(3, 6))
            found[f"{name}-{kind}"] = found_in(opt)["params"]
    return found


def columns_job(rank: int, folder: Path) -> Any:
    """Two ranks, cut by columns: each steps blocks of its own, as if its columns were a parameter."""
    mesh = init_device_mesh("cpu", (2,))
    found = {}
    for dtype in DTYPES:
        for moments in ("8bit", "32bit"):
            shapes = [shape for shape in COLUMNS if moments == "32bit" or shape != (96, 257)]
            values = whole_params(shapes, dtype)
            opt = AdamW8bit(placed(values, mesh, [S1]), lr=1e-2, moments=moments)
            take_steps(opt, range(4))
            part = AdamW8bit([nn.Parameter(v.chunk(2, dim=1)[rank].clone()) for v in values], lr=1e-2, moments=moments)
            for step in range(4):
                for index, (param, value) in enumerate(zip(part.param_groups[0]["params"], values, strict=True)):
                    param.grad = gradient(value, 0, index, step).chunk(2, dim=1)[rank].contiguous()
                part.step()
            for index, param in enumerate(opt.param_groups[0]["params"]):
                wanted = part.param_groups[0]["params"][index]
                assert_same_bits(param.to_local().detach(), wanted.detach(), f"{dtype} {moments} parameter {index}")
                for key, value in opt.state_dict()["state"][index].items():
                    held = value.to_local() if isinstance(value, DTensor) else value
                    assert_same_bits(held, part.state[wanted][key], f"{dtype} {moments} parameter {index}, {key}")
            found[f"{dtype}-{moments}"] = found_in(opt)
    with pytest.raises(ValueError, match=r"cuts through blocks of 128 elements; accepted: .*moments=\"32bit\""):
        AdamW8bit(placed(whole_params([(96, 257)], torch.float32), mesh, [S1]))
    with pytest.raises(ValueError, match=r"cuts through blocks of 128 elements"):
        AdamW8bit(placed(whole_params([(128 * 1024 + 2,)], torch.float32), mesh, [S0]))
    with pytest.raises(ValueError, match="accepted with DTensors: shard_group=None"):
        AdamW8bit(placed(whole_params([(4, 4)], torch.float32), mesh, [S0]), shard_group="world")
    partial = DTensor.from_local(torch.ones(4, 4), mesh, [Partial()])
    with pytest.raises(ValueError, match="accepted: Shard and Replicate"):
        AdamW8bit([partial])
    return found


def gradients_job(rank: int, folder: Path) -> Any:
    """Gradients that are placed otherwise, or are none of DTensors; one that is not finite, on one rank alone."""
    mesh = init_device_mesh("cpu", (2,))
    values = whole_params([(64, 130)], torch.float32)
    grad = gradient(values[0], 0, 0, 0)
    (straight,), (other,) = placed(values, mesh, [S0]), placed(values, mesh, [S0])
    straight.grad = distribute_tensor(grad, mesh, [S0], src_data_rank=None)
    other.grad = DTensor.from_local(grad / 2, mesh, [Partial()])
    for param in (straight, other):
        AdamW8bit([param]).step()
    assert_same_bits(straight.to_local(), other.to_local())  # type: ignore[attr-defined]
    plain = nn.Parameter(values[0].clone())
    opt = AdamW8bit([plain])
    plain.grad = distribute_tensor(grad, mesh, [S0], src_data_rank=None)
    with pytest.raises(ValueError, match="its gradient is a DTensor; accepted: a "):
        opt.step()
    for mode in ("error", "skip"):
        (param,) = placed(values, mesh, [S0])
        opt = AdamW8bit([param], nonfinite=mode)
        bad = grad.clone()
        bad[60, 3] = torch.inf  # in the last rows, on rank 1
        param.grad = distribute_tensor(bad, mesh, [S0], src_data_rank=None)
        if mode == "error":
            with pytest.raises((ValueError, RuntimeError), match="not finite" if rank == 1 else "another rank"):
                opt.step()
            assert_same_bits(whole(param.detach()), values[0])
            assert not opt.state
        else:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                opt.step()
            moved = whole(param.detach()) != values[0]
            assert not moved[60, :128].any()
            assert moved[59].all()
            assert moved[60, 128:].all()
            assert opt.stats()["skipped_blocks"] == (1 if rank == 1 else 0)
    return None


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.wide, self.norm, self.narrow = nn.Linear(96, 130), nn.LayerNorm(130), nn.Linear(130, 48)

    def forward(self, rows: Tensor) -> Tensor:
        out: Tensor = self.narrow(self.norm(self.wide(rows)).relu())
        return out


def fsdp_job(rank: int, folder: Path) -> Any:
    """A model under fully_shard: clipped steps, and its state through torch's functions for it, whole and in parts."""

    def step(model: nn.Module, opt: AdamW8bit, number: int) -> float:
        rows = torch.randn(8, 96, generator=torch.Generator().manual_seed(number))
        model(rows).square().mean().backward()
        norm = opt.clip_grad_norm_(0.05)
        opt.step()
        opt.zero_grad()
        return float(norm)

    models, norms = [], []
    for sharded in (True, False):
        model = Net()
        if sharded:
            mesh = init_device_mesh("cpu", (2,))
            fully_shard(model.wide, mesh=mesh)
            fully_shard(model, mesh=mesh)
        opt = AdamW8bit(model.parameters(), lr=1e-2)
        norms.append([step(model, opt, number) for number in range(3)])
        models.append((model, opt))
    (model, opt), (plain, _) = models
    before = {name: copied(whole(param)) for name, param in model.named_parameters()}
    # The norm of parts is summed in another order: one rounding an element at most.
    assert norms[0] == pytest.approx(norms[1], rel=1e-6)
    for name, param in plain.named_parameters():
        torch.testing.assert_close(before[name], param.detach(), rtol=1e-3, atol=1e-4)
    # Put together on one rank: for a file, for torch, and to go on with alone.
    consolidated = opt.consolidate_state_dict(to=1)
    exported = checkpoint.export(opt, to=1)
    assert (consolidated is None) == (exported is None) == (rank == 0)
    held = copied(consolidated)
    if consolidated is not None and exported is not None:
        alone = AdamW8bit([nn.Parameter(value) for value in before.values()])
        alone.load_state_dict(consolidated)
        assert_same_bits(alone.state_dict()["state"], consolidated["state"])
        torch.optim.AdamW([nn.Parameter(value) for value in before.values()]).load_state_dict(exported)
    opt.consolidate_state_dict(to=1)
    if rank == 1:
        assert_same_bits(opt.state_dict()["state"], held["state"])
    with pytest.MonkeyPatch.context() as patch:  # one rank alone neither hangs nor begins what others do not
        patch.setattr(agreement, "MEETING_SECONDS", 0.5)
        if rank == 0:
            with pytest.raises(RuntimeError, match=r"waited 0\.5 s for the other ranks; accepted: this call on all"):
                opt.consolidate_state_dict()
        torch.distributed.barrier()
    with pytest.raises(ValueError, match="parameters are DTensors"):
        opt.check_replicas()
    options = StateDictOptions(full_state_dict=True)
    found = []
    for option in (None, options):
        saved = copied(get_optimizer_state_dict(model, opt, options=option))
        again = Net()
        fully_shard(again, mesh=init_device_mesh("cpu", (2,)))
        with torch.no_grad():
            for name, param in again.named_parameters():
                param.copy_(distribute_tensor(before[name], param.device_mesh, param.placements, src_data_rank=None))  # type: ignore[attr-defined]
        fresh = AdamW8bit(again.parameters(), lr=1e-2)
        set_optimizer_state_dict(again, fresh, saved, options=option)
        step(again, fresh, 3)
        found.append({name: copied(whole(param)) for name, param in again.named_parameters()})
    step(model, opt, 3)
    straight = {name: copied(whole(param)) for name, param in model.named_parameters()}
    for loaded in found:
        assert_same_bits(loaded, straight)
    assert differ(before, straight)
    return None


def grid_job(rank: int, folder: Path) -> Any:
    """Four ranks on a mesh of two by two."""
    # Names of groups count on, and as words "10" comes before "9": nothing may go by their order.
    for _ in range(FILLERS):
        torch.distributed.new_group()
    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("data", "tensor"))
    found = {}
    for bad in range(4):
        (param,) = placed(whole_params([(64, 130)], torch.float32), mesh, [S0, S0])
        opt = AdamW8bit([param], nonfinite="error")
        param.grad = torch.zeros_like(param)
        if rank == bad:
            param.grad.to_local().fill_(torch.nan)  # type: ignore[attr-defined]
        with pytest.raises((ValueError, RuntimeError), match="not finite" if rank == bad else "another rank"):
            opt.step()
    for name, placements, shapes in (
        ("rows", [S0, R], ROWS),
        ("replicas", [R, S0], ROWS),
        ("rows of rows", [S0, S0], ROWS),
        ("rows and columns", [S0, S1], [(40, 1024), (64, 512)]),
    ):
        opt = AdamW8bit(placed(whole_params(shapes, torch.float32), mesh, placements), lr=1e-2)
        take_steps(opt, range(6))
        found[name] = found_in(opt)
    return found


def two_ranks_job(rank: int, folder: Path) -> Any:
    jobs = (rows_job, columns_job, gradients_job, fsdp_job)
    return {job.__name__: job(rank, folder) for job in jobs} | {"load": load_job(rank, folder)}


def other_ranks_job(rank: int, folder: Path) -> Any:
    found = {"rows_job": rows_job(rank, folder), "load": load_job(rank, folder)}
    return found | ({"grid": grid_job(rank, folder)} if torch.distributed.get_world_size() == 4 else {})


# ---------------------------------------------------------------- tests


@pytest.fixture(scope="module")
def ranks(tmp_path_factory: pytest.TempPathFactory) -> dict[int, list[Any]]:
    folder = tmp_path_factory.mktemp("dtensor")
    return {world: on_ranks(world, two_ranks_job if world == 2 else other_ranks_job, folder) for world in (2, 1, 3, 4)}


def straight(shapes: Shapes, name: str) -> dict[str, Any]:
    """One process with plain parameters."""
    dtype, settings = KINDS[name]
    opt = AdamW8bit([nn.Parameter(value) for value in whole_params(shapes, dtype)], lr=1e-2, **settings)
    take_steps(opt, range(6))
    return found_in(opt)


@pytest.mark.parametrize("world", [1, 2, 3, 4])
@pytest.mark.parametrize("name", KINDS)
def test_rows_on_any_number_of_ranks_give_the_bits_of_one_process(
    ranks: dict[int, list[Any]], name: str, world: int
) -> None:
    wanted = straight([shape for shape in ROWS if world != 3 or shape != (131072,)], name)
    for found in ranks[world]:
        result = found["rows_job"][name]
        # Vectors cut inside of a block round to bfloat16 by other numbers than whole ones.
        vectors = [i for i, param in enumerate(wanted["params"]) if param.ndim == 1 and param.numel() < 65536]
        for index in range(len(wanted["params"])):
            if not name.endswith("stochastic") or index not in vectors or world == 1:
                assert_same_bits(result["weights"][index], wanted["weights"][index], f"weight {index}")
                assert_same_bits(result["params"][index], wanted["params"][index], f"parameter {index}")
                assert_same_bits(result["state"][index], wanted["state"][index], f"state {index}")
    total = sum(found["rows_job"][name]["bytes"] for found in ranks[world])
    steps = 8 * len(wanted["params"])  # every rank counts steps
    assert total - world * steps == wanted["bytes"] - steps


@pytest.mark.parametrize("kind", ["dtensor", "shards", "alone"])
@pytest.mark.parametrize("world", [1, 2, 3, 4])
@pytest.mark.parametrize("name", KINDS)
def test_state_saved_as_dtensors_is_loaded_by_any_other_arrangement(
    ranks: dict[int, list[Any]], name: str, world: int, kind: str
) -> None:
    if (world, kind) == (3, "dtensor"):
        pytest.skip("three ranks cut (131072,) through a block")
    wanted = straight(ROWS, name)["params"]
    for found in ranks[world]:
        for index, param in enumerate(found["load"][f"{name}-{kind}"]):
            if not name.endswith("stochastic") or param.ndim > 1:
                assert_same_bits(param, wanted[index], f"parameter {index}")


def test_columns_and_everything_else_on_two_ranks(ranks: dict[int, list[Any]]) -> None:
    for dtype in DTYPES:
        wanted = straight_columns(dtype)
        for found in ranks[2]:
            result = found["columns_job"][f"{dtype}-32bit"]
            for key in ("exp_avg", "exp_avg_sq"):
                for index, state in wanted["state"].items():
                    if dtype == torch.float32:
                        assert_same_bits(result["state"][index][key], state[key], f"state {index}")


def straight_columns(dtype: torch.dtype) -> dict[str, Any]:
    opt = AdamW8bit([nn.Parameter(value) for value in whole_params(COLUMNS, dtype)], lr=1e-2, moments="32bit")
    take_steps(opt, range(4))
    return found_in(opt)


@pytest.mark.parametrize("name", ["rows", "replicas", "rows of rows"])
def test_rows_on_a_mesh_of_two_dimensions(ranks: dict[int, list[Any]], name: str) -> None:
    wanted = straight(ROWS, "float32")
    for found in ranks[4]:
        assert_same_bits(found["grid"][name]["params"], wanted["params"])
        assert_same_bits(found["grid"][name]["state"], wanted["state"])


def test_rows_and_columns_on_a_mesh_of_two_dimensions(ranks: dict[int, list[Any]]) -> None:
    """Columns are coded by numbers of their own, so only nearly as one process does it."""
    wanted = straight([(40, 1024), (64, 512)], "float32")
    for found in ranks[4]:
        result = found["grid"]["rows and columns"]
        for got, expected in zip(result["params"], wanted["params"], strict=True):
            torch.testing.assert_close(got, expected, rtol=0, atol=6 * 1e-2 * 0.1)
        assert {k: v.shape for k, v in result["state"][0].items()} == {
            k: v.shape for k, v in wanted["state"][0].items()
        }
