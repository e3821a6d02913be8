"""DeepSpeed's real engine on spawned gloo ranks: what a rank does in the tests of the integration."""

from __future__ import annotations

import copy
import hashlib
import os
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from lowmem_adam import AdamW8bit
from tests.launching import deepspeed_environment, extensions_folder, path_with_scripts, to_its_end

WIDTH, HIDDEN = 256, 512
BASE: dict[str, Any] = {"train_micro_batch_size_per_gpu": 4, "zero_allow_untested_optimizer": True}
BF16 = {"bf16": {"enabled": True}}
BY_NAME = {"optimizer": {"type": "AdamW8bit", "params": {"lr": 1e-3, "betas": [0.9, 0.99]}}}


def zero(stage: int, **settings: Any) -> dict[str, Any]:
    return {"zero_optimization": {"stage": stage, **settings}}


def begin(rank: int) -> None:
    """What DeepSpeed reads from the environment, before it is imported in this process."""
    variables = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": dist.get_world_size(), "DS_ACCELERATOR": "cpu"}
    # Without LOCAL_SIZE, with which DeepSpeed leaves segments of shared memory behind, by names that runs share.
    variables |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": 1}
    os.environ |= {name: str(value) for name, value in variables.items()}
    os.environ |= {"TORCH_EXTENSIONS_DIR": str(extensions_folder()), "PATH": path_with_scripts()}
    os.environ["DEEPSPEED_LOG_LEVEL"] = "error"


def model() -> torch.nn.Module:
    """262,912 parameters, so that a half of them still keeps codes."""
    torch.manual_seed(0)
    return torch.nn.Sequential(torch.nn.Linear(WIDTH, HIDDEN), torch.nn.GELU(), torch.nn.Linear(HIDDEN, WIDTH))


def two_groups(module: torch.nn.Module) -> list[dict[str, Any]]:
    """Matrices that decay, and vectors that do not."""
    decayed = [param for param in module.parameters() if param.dim() > 1]
    others = [param for param in module.parameters() if param.dim() == 1]
    return [{"params": decayed, "weight_decay": 0.1}, {"params": others, "weight_decay": 0.0}]


def engine_of(config: Mapping[str, Any], client: Mapping[str, Any] | None = None, **settings: Any) -> Any:
    """An engine, with the optimizer of the config, or with a client optimizer of two groups and these settings."""
    import deepspeed

    import lowmem_adam.integrations.deepspeed  # noqa: F401 (registers the names)

    module = model()
    who: dict[str, Any] = {"model_parameters": module.parameters()}
    if client is not None:
        who = {"optimizer": AdamW8bit(two_groups(module), lr=1e-3, betas=(0.9, 0.99), **client)}
    complete = config if "train_micro_batch_size_per_gpu" in config else {**BASE, **config}
    return deepspeed.initialize(model=module, config=copy.deepcopy(complete), **who, **settings)[0]


def without_the_import(rank: int, folder: Path, config: dict[str, Any]) -> str:
    """What DeepSpeed says to a name that nobody has registered in this process."""
    begin(rank)
    import deepspeed

    module = torch.nn.Linear(8, 8)
    try:
        deepspeed.initialize(model=module, model_parameters=module.parameters(), config=config)
    except AssertionError as error:
        return str(error)
    return "no error"


def train(engine: Any, steps: range) -> list[float]:
    """The losses of these optimizer steps on this rank, each of the first of its batches."""
    dtype = next(engine.module.parameters()).dtype
    losses = []
    for step in steps:
        for batch in range(engine.gradient_accumulation_steps()):
            generator = torch.Generator().manual_seed(1000 * step + 10 * batch + dist.get_rank())
            x = torch.randn(4, WIDTH, generator=generator).to(dtype)
            loss = (engine(x) - x.roll(1, 1)).float().square().mean()
            engine.backward(loss)
            engine.step()
            losses += [loss.item()] if batch == 0 else []
    return losses


def base_of(engine: Any) -> Any:
    """The optimizer that steps, below DeepSpeed's own."""
    return engine.basic_optimizer


def digest(engine: Any) -> str:
    """Of all moments, steps and flat weights that this rank holds."""
    found = hashlib.sha256()
    for param, state in base_of(engine).state.items():
        for key, value in [("param", param), *sorted(state.items())]:
            found.update(f"{key} {value.dtype} {tuple(value.shape)}".encode())
            found.update(value.detach().contiguous().view(-1).view(torch.uint8).numpy().tobytes())
    return found.hexdigest()


def masters(engine: Any) -> dict[str, torch.Tensor]:
    """The fp32 weights that ZeRO holds, put together from all ranks."""
    from deepspeed.utils import safe_get_full_fp32_param

    return {name: safe_get_full_fp32_param(param).clone() for name, param in engine.module.named_parameters()}


def convert(folder: Path, tag: str) -> str:
    """Make a universal checkpoint of another with DeepSpeed's own tool; the new tag."""
    made = f"{tag}_universal"
    tool = [sys.executable, "-m", "deepspeed.checkpoint.ds_to_universal", "--inject_missing_state"]
    folders = ["--input_folder", str(folder / tag), "--output_folder", str(folder / made)]
    workers = ["--num_extract_workers", "1", "--num_merge_workers", "1"]
    finished = to_its_end([*tool, *folders, *workers], deepspeed_environment())
    assert finished.returncode == 0, finished.stdout + finished.stderr
    return made
