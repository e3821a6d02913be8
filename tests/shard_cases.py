"""What the tests of sharded optimizers share: parameters, steps and jobs that every number of ranks runs alike."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict_loader import load as dcp_load
from torch.distributed.checkpoint.state_dict_saver import save as dcp_save

from lowmem_adam import AdamW8bit
from lowmem_adam.layout import Layout
from tests.cases import DTYPES, SHAPES, copied, make_params, params_of, set_gradients
from tests.kernel_cases import UPDATES

STEPS = 20
HALF = 10
RESUMED = 4
"""Steps after a load."""
SMALL_BUCKET = 0.125
"""MiB: several buckets, and large parameters in more than one of them."""

# moments, dtype of the parameters, MiB of a bucket, how 16-bit parameters are updated
VARIANTS = (
    *(
        (moments, dtype, bucket, "stochastic")
        for moments in ("8bit", "32bit")
        for dtype, bucket in zip(DTYPES, (SMALL_BUCKET, 64.0, SMALL_BUCKET), strict=True)
    ),
    ("8bit", torch.bfloat16, SMALL_BUCKET, "split"),
    ("32bit", torch.float16, SMALL_BUCKET, "split in 24 bits"),
    ("8bit", torch.bfloat16, SMALL_BUCKET, "fp32"),
    ("bnb8bit", torch.float32, SMALL_BUCKET, "stochastic"),
    ("bnb8bit", torch.bfloat16, SMALL_BUCKET, "split"),
)


def optimizer(
    moments: str, dtype: torch.dtype, bucket: float, update: str, shard_group: Any, seed: int = 0
) -> AdamW8bit:
    """Parameters of every shape in two groups, and one of another dtype; the second group has settings of its own."""
    params = make_params(SHAPES, dtype, seed=seed)
    other = make_params(SHAPES[:1], torch.bfloat16 if dtype == torch.float32 else torch.float32, seed=seed + 1)
    half = len(params) // 2
    groups: list[dict[str, Any]] = [
        {"params": params[:half]},
        {"params": params[half:] + other, "lr": 3e-3, "weight_decay": 0.1, "betas": (0.8, 0.99)},
    ]
    settings: dict[str, Any] = {"moments": moments, "bucket_cap_mb": bucket, **UPDATES[update]}
    return AdamW8bit(groups, lr=1e-2, shard_group=shard_group, **settings)


def take_steps(opt: AdamW8bit, steps: range) -> None:
    """The same gradients for every number of ranks. One parameter never has any, one every third step only."""
    params = params_of(opt)
    for step in steps:
        set_gradients(params, step)
        params[3].grad = None
        if step % 3:
            params[4].grad = None
        opt.step()
        opt.zero_grad()


def values(opt: AdamW8bit) -> list[Tensor]:
    """Copies of all parameters."""
    return [copied(param) for param in params_of(opt)]


def name_of(variant: tuple[Any, ...]) -> str:
    """A key for results of a variant."""
    return "-".join(map(str, variant))


class Model(nn.Module):
    """Names for parameters, as torch.distributed.checkpoint wants them."""

    def __init__(self, opt: AdamW8bit) -> None:
        super().__init__()
        self.held = nn.ParameterList(params_of(opt))


def train_and_save_job(rank: int, folder: Path) -> Any:
    """Twenty steps; after ten the state is saved in every way."""
    found: dict[str, Any] = {}
    world = torch.distributed.get_world_size()
    for variant in VARIANTS:
        opt = optimizer(*variant, "world")
        name = f"{name_of(variant)}-{world}"
        take_steps(opt, range(HALF))
        whole = opt.state_dict()
        if rank == 0:
            torch.save({"params": values(opt), "optimizer": whole}, folder / f"{name}.pt")
        saved = {"params": dict(enumerate(values(opt))), "optimizer": opt.sharded_state_dict()}
        dcp_save(saved, checkpoint_id=folder / name)
        take_steps(opt, range(HALF, STEPS))
        opt.check_replicas()
        consolidated = opt.consolidate_state_dict()
        assert (consolidated is None) == (rank != 0)
        blocks = [Layout.of(p.shape, variant[0]).n_blocks for p in params_of(opt)]
        found[name_of(variant)] = {
            "params": values(opt),
            "weights": [opt.master_weight(param) for param in params_of(opt)],
            "state": consolidated,
            "memory": opt.memory_report()["ranks"],
            "held": sum(v.nbytes for s in opt.state.values() for v in s.values()),
            "loads": [*opt._cut().loads],
            "blocks": sum(blocks),
            "buckets": len(opt._cut().buckets),
        }
    return found


def load_job(rank: int, folder: Path) -> Any:
    """From whatever number of ranks saved, some more steps on this number."""
    found = {}
    for variant in VARIANTS:
        for writers in (1, 2, 3, 4):
            name = f"{name_of(variant)}-{writers}"
            for way in ("torch.save", "dcp"):
                opt = optimizer(*variant, "world", seed=1)
                if way == "torch.save":
                    saved = torch.load(folder / f"{name}.pt", weights_only=True)
                else:
                    saved = {"params": dict(enumerate(values(opt))), "optimizer": opt.sharded_state_dict()}
                    dcp_load(saved, checkpoint_id=folder / name)
                    saved["params"] = list(saved["params"].values())
                with torch.no_grad():
                    for param, value in zip(params_of(opt), saved["params"], strict=True):
                        param.copy_(value)
                opt.load_state_dict(saved["optimizer"])
                take_steps(opt, range(HALF, HALF + RESUMED))
                state = opt.state_dict()
                found[f"{name}-{way}"] = {"params": values(opt), "state": state if rank == 0 else None}
    return found
