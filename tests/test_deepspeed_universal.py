"""DeepSpeed's universal checkpoints of ours and of torch's AdamW, made by its own tool and loaded by its own loader."""

from __future__ import annotations

import gc
import weakref
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist

from lowmem_adam.decoded import DecodedMoment
from lowmem_adam.state import FULL_KEYS
from tests.deepspeed_jobs import (
    BF16,
    BY_NAME,
    base_of,
    begin,
    convert,
    digest,
    engine_of,
    masters,
    train,
    zero,
)
from tests.launching import NEEDS_DEEPSPEED
from tests.ranks import NEEDS_GLOO, on_ranks

pytestmark = [NEEDS_GLOO, NEEDS_DEEPSPEED]

SAVED, END = 3, 6
PARAMETERS = 262912
TORCH = {"optimizer": {"type": "AdamW", "params": {"lr": 1e-3, "betas": [0.9, 0.99], "torch_adam": True}}}
UNIVERSAL = {"checkpoint": {"load_universal": True}}
MOMENTS_32 = {"type": "AdamW8bit", "params": {"lr": 1e-3, "betas": [0.9, 0.99], "moments": "32bit"}}
CONFIGS = {
    "ours": {**BY_NAME, **BF16, **zero(1)},
    "torch": {**TORCH, **BF16, **zero(1)},
    "ours 3": {**BY_NAME, **BF16, **zero(3)},
}
"""What is saved, by name."""


def moments(engine: Any) -> dict[str, dict[str, torch.Tensor]]:
    """Both moments of every parameter in fp32, put together from all ranks, as DeepSpeed's loader leaves them."""
    from deepspeed.utils import safe_get_full_optimizer_state

    named = list(engine.module.named_parameters())
    return {key: {name: safe_get_full_optimizer_state(p, key).clone() for name, p in named} for key in FULL_KEYS}


def save(rank: int, folder: Path) -> dict[str, Any]:
    begin(rank)
    found: dict[str, Any] = {}
    for name, config in CONFIGS.items():
        engine = engine_of(config)
        train(engine, range(SAVED))
        engine.save_checkpoint(str(folder / name), tag="saved")
        found[name] = {"masters": masters(engine), "rest": train(engine, range(SAVED, END)), "digest": digest(engine)}
        engine.destroy()
        dist.barrier()
    found["weights"] = weights(folder / "ours") if rank == 0 else {}
    return found


def weights(folder: Path) -> dict[str, torch.Tensor]:
    """As DeepSpeed's zero_to_fp32 reads them, with a look at what is decoded on the way."""
    from deepspeed.utils.zero_to_fp32 import get_fp32_state_dict_from_zero_checkpoint

    def refuse(*_: Any) -> None:
        raise AssertionError("moments are decoded where weights alone are asked for")

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(DecodedMoment, "decoded", refuse)
        read = get_fp32_state_dict_from_zero_checkpoint(str(folder), tag="saved")
    return {name: tensor.clone() for name, tensor in read.items()}


def load(rank: int, folder: Path, cases: dict[str, tuple[str, dict[str, Any]]]) -> dict[str, Any]:
    """Go on from a universal checkpoint; each case names what was saved, and has the config to load it with."""
    begin(rank)
    found = {}
    for name, (saved, config) in cases.items():
        engine = engine_of({**config, **UNIVERSAL})
        path, _ = engine.load_checkpoint(str(folder / saved), tag="saved_universal")
        assert path is not None
        optimizer = base_of(engine)
        written = [weakref.ref(state[key]) for state in optimizer.state.values() for key in FULL_KEYS if key in state]
        assert len(written) == 2
        case = {"loaded": {} if "3" in saved else moments(engine), "masters": masters(engine)}
        if name in ("ours", "ours to ours"):
            (held,) = [state for state in optimizer.state_dict()["state"].values() if "exp_avg_code" in state]
            case["codes"] = {key: tensor.clone() for key, tensor in held.items()}
        case["rest"] = train(engine, range(SAVED, END))
        case["digest"] = digest(engine)
        if name != "ours to torch" and "3" not in saved:
            case["bytes"] = optimizer.memory_report()["bytes_per_parameter"]
        gc.collect()
        case["left"] = sum(reference() is not None for reference in written)
        found[name] = case
        engine.destroy()
        dist.barrier()
    return found


CASES = {
    "ours to ours": ("ours", CONFIGS["ours"]),
    "ours to torch": ("ours", CONFIGS["torch"]),
    "torch to ours": ("torch", CONFIGS["ours"]),
    "ours to 32 bits": ("ours", {**CONFIGS["ours"], "optimizer": MOMENTS_32}),
    "ours 3 to ours 3": ("ours 3", CONFIGS["ours 3"]),
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("universal")


@pytest.fixture(scope="module")
def saved(folder: Path) -> list[dict[str, Any]]:
    """On two ranks, and converted."""
    found = on_ranks(2, save, folder)
    with ThreadPoolExecutor(2) as pool:
        assert list(pool.map(lambda name: convert(folder / name, "saved"), CONFIGS)) == ["saved_universal"] * 3
    return found


@pytest.fixture(scope="module")
def loaded(saved: Any, folder: Path) -> list[dict[str, Any]]:
    """On as many ranks."""
    return on_ranks(2, partial(load, cases=CASES), folder)


def merged(folder: Path, name: str, parameter: str, key: str) -> torch.Tensor:
    """What the tool has written for a parameter."""
    file = folder / name / "saved_universal" / "zero" / parameter / f"{key}.pt"
    tensor: torch.Tensor = torch.load(file, weights_only=True)["param"]
    return tensor


@pytest.mark.parametrize("name", ["ours", "ours 3"])
def test_same_number_of_ranks_goes_on_to_the_bit(saved: Any, loaded: Any, name: str) -> None:
    """Values that were decoded from codes get codes of the same values again (foreign.moments)."""
    for before, after in zip(saved, loaded, strict=True):
        assert after[f"{name} to {name}"]["rest"] == before[name]["rest"]
        assert after[f"{name} to {name}"]["digest"] == before[name]["digest"]


def test_weights_are_those_that_were_saved(saved: Any, loaded: Any) -> None:
    for rank in range(2):
        for case in ("ours to ours", "ours to torch"):
            for parameter, master in saved[rank]["ours"]["masters"].items():
                assert torch.equal(loaded[rank][case]["masters"][parameter], master)


@pytest.mark.parametrize("case", ["ours to torch", "torch to ours"])
def test_moments_pass_between_ours_and_torch(loaded: Any, folder: Path, case: str) -> None:
    saved_name = CASES[case][0]
    for key in FULL_KEYS:
        for parameter, values in loaded[0][case]["loaded"][key].items():
            assert torch.equal(values.view(-1), merged(folder, saved_name, parameter, key).view(-1))
            assert values.count_nonzero() > 0
    assert len(set(loaded[0][case]["rest"])) == END - SAVED


def test_torch_goes_on_as_ours_would(saved: Any, loaded: Any) -> None:
    """The first loss after a load knows the weights alone; later ones differ by the rounding of codes."""
    ours, torchs = loaded[0]["ours to ours"]["rest"], loaded[0]["ours to torch"]["rest"]
    assert ours[0] == torchs[0]
    assert ours != torchs
    assert ours == pytest.approx(torchs, rel=1e-2)


@pytest.mark.parametrize("case", CASES)
def test_no_fp32_moments_stay_in_memory(loaded: Any, case: str) -> None:
    """DeepSpeed keeps views of what it wrote until the next step, and no longer."""
    for rank in loaded:
        assert rank[case]["left"] == (2 if case == "ours to torch" else 0)


def test_config_decides_how_moments_are_kept(loaded: Any) -> None:
    """Not the settings in the checkpoint."""
    for rank in loaded:
        assert rank["ours to 32 bits"]["bytes"] == pytest.approx(8, abs=0.01)
        assert rank["ours to ours"]["bytes"] == pytest.approx(2.02, abs=0.01)


@pytest.mark.parametrize("world", [1, 3])
def test_another_number_of_ranks(saved: Any, folder: Path, world: int) -> None:
    """Weights to the bit; roots within half a code of a block, which is span / 508 of the value."""
    ranks = on_ranks(world, partial(load, cases={"ours": CASES["ours to ours"]}), folder)
    names = list(saved[0]["ours"]["masters"])
    flat = {key: torch.cat([merged(folder, "ours", name, key).view(-1) for name in names]) for key in FULL_KEYS}
    start = 0
    for rank in ranks:
        case = rank["ours"]
        for name in names:
            assert torch.equal(case["masters"][name], saved[0]["ours"]["masters"][name])
        size = case["codes"]["exp_avg_code"].numel()
        decoded = DecodedMoment("exp_avg_sq", case["codes"], size, "8bit").decoded().sqrt()
        wanted = flat["exp_avg_sq"][start : start + size].sqrt()
        span = case["codes"]["block_span"].view(-1).repeat_interleave(128)[: wanted.numel()]
        error = (decoded[: wanted.numel()] - wanted).abs()
        # and a rounding of each of the two square roots
        assert (error <= wanted * (span / 508 + 2**-22)).all()
        assert case["left"] == 0
        start += size
    assert start >= PARAMETERS


def test_zero_to_fp32_is_unaffected(saved: Any) -> None:
    for name, master in saved[0]["ours"]["masters"].items():
        assert torch.equal(saved[0]["weights"][name], master)


@pytest.mark.parametrize(("name", "most"), [("ours", 6.1), ("torch", 12.1)])
def test_bytes_of_a_file(saved: Any, folder: Path, name: str, most: float) -> None:
    """4 bytes a parameter are the fp32 weights; codes take 2.03, torch's moments 8."""
    files = list((folder / name / "saved").glob("*optim_states.pt"))
    assert len(files) == 2
    assert most - 0.2 < sum(file.stat().st_size for file in files) / PARAMETERS < most
