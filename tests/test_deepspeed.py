"""AdamW8bit under DeepSpeed's engine on two ranks: what steps, what it holds, and that a resumed run is the same."""

from __future__ import annotations

from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
import torch.distributed as dist

from lowmem_adam import kernels
from tests.deepspeed_jobs import BF16, BY_NAME, base_of, begin, digest, engine_of, train, zero
from tests.kernel_cases import without_library
from tests.launching import NEEDS_DEEPSPEED
from tests.ranks import NEEDS_GLOO, on_ranks

pytestmark = [NEEDS_GLOO, NEEDS_DEEPSPEED]

WORLD = 2
SAVED, END = 3, 6
"""Steps before the save, and in all."""


class Row(NamedTuple):
    """A way to run: the config, and settings of a client optimizer, or None for one by name."""

    config: dict[str, Any]
    client: dict[str, Any] | None = None
    wrapper: str = "DeepSpeedZeroOptimizer"
    """The class of DeepSpeed's own optimizer."""
    at_first: int = 0
    """Steps with zero gradients that it takes at the beginning, to have state made."""


OFFLOAD = {"offload_optimizer": {"device": "cpu"}}
WARMUP = {"scheduler": {"type": "WarmupLR", "params": {"warmup_max_lr": 1e-3, "warmup_num_steps": 5}}}
ACCUMULATED = {"gradient_accumulation_steps": 2, "gradient_clipping": 0.5}
UNFORCED = {"zero_force_ds_cpu_optimizer": False}

ROWS = {
    "stage 1": Row({**BY_NAME, **BF16, **zero(1)}),
    "stage 1, fp32": Row({**BY_NAME, **zero(1)}),
    "stage 1, BF16_Optimizer": Row(
        {**BY_NAME, **BF16, **zero(1), "data_types": {"grad_accum_dtype": "fp32"}}, None, "BF16_Optimizer"
    ),
    "stage 1, groups, accumulation, clipping, schedule": Row({**BF16, **zero(1), **ACCUMULATED, **WARMUP}, {}),
    "stage 2, offload": Row({**BY_NAME, **BF16, **zero(2, **OFFLOAD)}),
    "stage 2, offload, groups, accumulation, clipping": Row(
        {**BF16, **zero(2, **OFFLOAD), **ACCUMULATED, **UNFORCED}, {}
    ),
    "stage 2, 32 bits": Row({**BF16, **zero(2)}, {"moments": "32bit"}),
    "stage 1, our own offload": Row({**BF16, **zero(1)}, {"offload": "cpu"}),
    "stage 1, bnb8bit": Row({**BF16, **zero(1)}, {"moments": "bnb8bit"}),
    "stage 1, bf16 masters": Row(
        {
            **BY_NAME,
            **zero(1),
            "bf16": {"enabled": True, "bf16_master_weights_and_grads": True, "bf16_optimizer_states": True},
        }
    ),
    "stage 3": Row({**BY_NAME, **BF16, **zero(3)}, None, "DeepSpeedZeroOptimizer_Stage3"),
    "stage 3, offload": Row({**BY_NAME, **BF16, **zero(3, **OFFLOAD)}, None, "DeepSpeedZeroOptimizer_Stage3"),
    "stage 0, fp32": Row({**BY_NAME, **zero(0)}, None, "AdamW8bit"),
    "stage 0, bf16": Row({**BY_NAME, **BF16, **zero(0)}, None, "FP16_UnfusedOptimizer", 1),
}


def run_rows(rank: int, folder: Path) -> dict[str, dict[str, Any]]:
    """Every row: a run without interruption, and one that goes on from its checkpoint in a new engine."""
    begin(rank)
    backend = kernels.choose(None, torch.device("cpu"), {"moments": "8bit"}, torch.float32)
    found = {}
    for name, row in ROWS.items():
        stepped: list[int] = []
        real = kernels.BACKENDS[backend]

        def counting(batch: Any, stepped: list[int] = stepped, real: Any = real) -> Any:
            stepped.append(1)
            return real(batch)

        kernels.BACKENDS[backend] = counting
        try:
            engine = engine_of(row.config, row.client)
            before = train(engine, range(SAVED))
        finally:
            kernels.BACKENDS[backend] = real
        assert engine.save_checkpoint(str(folder / name), tag="saved")
        after = train(engine, range(SAVED, END))
        resumed = engine_of(row.config, row.client)
        path, _ = resumed.load_checkpoint(str(folder / name), tag="saved")
        assert path is not None
        found[name] = {
            "losses": before + after,
            "resumed": before + train(resumed, range(SAVED, END)),
            "digests": [digest(engine), digest(resumed)],
            "rates": [engine.get_lr(), resumed.get_lr()],
            "classes": [type(engine.optimizer).__name__, type(base_of(engine)).__name__],
            "report": base_of(engine).memory_report(),
            "calls": len(stepped),
            "backend": backend,
            "groups": len(base_of(engine).param_groups),
        }
        if name == "stage 1":
            found[name]["asked for exp_avg"] = asked_for_moments(engine)
        for each in (engine, resumed):
            each.destroy()
        dist.barrier()
    return found


def asked_for_moments(engine: Any) -> str:
    """By DeepSpeed's function that looks for slices of an fp32 tensor in state, which has codes."""
    from deepspeed.utils import safe_get_full_optimizer_state

    # One that lies in this rank's partition: the others would wait for this rank's part of it.
    param = list(engine.module.parameters())[2 * dist.get_rank()]
    try:
        safe_get_full_optimizer_state(param, "exp_avg")
    except ValueError as error:
        return str(error)
    return "no error"


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, dict[str, Any]]]:
    return on_ranks(WORLD, run_rows, tmp_path_factory.mktemp("rows"))


@pytest.mark.parametrize("name", ROWS)
def test_resumed_is_uninterrupted(results: list[Any], name: str) -> None:
    for rank in results:
        assert rank[name]["losses"] == rank[name]["resumed"]
        assert rank[name]["digests"][0] == rank[name]["digests"][1]
        assert rank[name]["rates"][0] == rank[name]["rates"][1]
        assert rank[name]["losses"][-1] < rank[name]["losses"][0]
    assert len(set(results[0][name]["losses"])) == END


@pytest.mark.parametrize("name", ROWS)
def test_ours_steps(results: list[Any], name: str) -> None:
    """Its class, below DeepSpeed's, and the backend that there is: the native kernel where the library is built."""
    for rank in results:
        assert rank[name]["classes"] == [ROWS[name].wrapper, "AdamW8bit"]
        at_once = ROWS[name].wrapper in ("AdamW8bit", "FP16_UnfusedOptimizer", "BF16_Optimizer")
        assert rank[name]["backend"] == ("reference" if without_library() else "cpu")
        assert rank[name]["calls"] == (SAVED + ROWS[name].at_first) * (1 if at_once else rank[name]["groups"])


@pytest.mark.parametrize("name", ROWS)
def test_state_of_all_ranks(results: list[Any], name: str) -> None:
    """Stage 0 keeps all of it on every rank; ZeRO's stages share it out."""
    bytes_per_parameter = [rank[name]["report"]["bytes_per_parameter"] for rank in results]
    settings = ROWS[name].client or {}
    most = {"8bit": 2.05, "32bit": 8.01, "bnb8bit": 2.06}[settings.get("moments", "8bit")]
    parameters = sum(rank[name]["report"]["parameters"] for rank in results)
    assert max(bytes_per_parameter) <= most
    assert parameters // (WORLD if "stage 0" in name else 1) == 262912


def test_a_moment_that_is_asked_for_by_name(results: list[Any]) -> None:
    """Rather an error than codes that are taken for values."""
    for rank in results:
        assert rank["stage 1"]["asked for exp_avg"] == "exp_avg not found in optimizer state fragment"
