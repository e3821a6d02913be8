"""What a plan is made for, and the bytes that it is made of."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch

from lowmem_adam import settings as optimizer_settings
from lowmem_adam.offload import check_offload, check_offload_gradients
from lowmem_adam.shard import check_bucket_cap

DTYPES = {
    "float32": torch.float32,
    "bfloat16": torch.bfloat16,
    "float16": torch.float16,
    "fp32": torch.float32,
    "bf16": torch.bfloat16,
    "fp16": torch.float16,
}
"""Of parameters, by the names that are accepted; those that the optimizer steps."""

ZERO_BUCKET = 500_000_000
"""Elements of DeepSpeed's ``reduce_bucket_size`` where its config does not say (0.19.8, ``runtime/zero/config.py``)."""

KINDS = ("parameters", "gradients", "moments", "master", "transient")


def dtype_of(name: str, what: str = "dtype") -> torch.dtype:
    """The dtype of a name.

    Raises:
        ValueError: another name than those accepted.
    """
    name = name.removeprefix("torch.")
    if name not in DTYPES:
        raise ValueError(f"{what} is {name!r}; accepted: {', '.join(DTYPES)}")
    return DTYPES[name]


@dataclass(frozen=True, slots=True)
class Settings:
    """How a model is to be trained.

    Args:
        dtype: of all parameters and their gradients; None for what the model's file says, bfloat16 where it does not.
        moments: as the optimizer's.
        low_precision_update: as the optimizer's.
        master_bits: as the optimizer's.
        world_size: ranks, each with a device of its own.
        shard: whether they share the moments (``shard_group="world"``).
        offload: as the optimizer's.
        offload_gradients: as the optimizer's.
        zero_stage: of DeepSpeed, under whose engine the optimizer steps then; 0 for none.
        bucket_cap_mb: as the optimizer's.
        zero_bucket: elements of DeepSpeed's ``reduce_bucket_size``.
    """

    dtype: torch.dtype | None = None
    moments: str = "8bit"
    low_precision_update: str = "stochastic"
    master_bits: int = 32
    world_size: int = 1
    shard: bool = True
    offload: str | None = None
    offload_gradients: bool = False
    zero_stage: int = 0
    bucket_cap_mb: float = 64.0
    zero_bucket: int = ZERO_BUCKET

    def check(self) -> None:
        """Check them as the optimizer does.

        Raises:
            ValueError: names the value given and the values accepted.
        """
        if self.dtype is not None and self.dtype not in DTYPES.values():
            raise ValueError(f"dtype is {self.dtype}; accepted: {', '.join(DTYPES)}")
        optimizer_settings.check_group(self.group, "plan")
        check_offload(self.offload)
        check_offload_gradients(self.offload_gradients, self.offload)
        check_bucket_cap(self.bucket_cap_mb)
        for name, value in (("world_size", self.world_size), ("zero_bucket", self.zero_bucket)):
            if type(value) is not int or value < 1:
                raise ValueError(f"{name} is {value!r}; accepted: integers from 1")
        if type(self.zero_stage) is not int or self.zero_stage not in (0, 1, 2, 3):
            raise ValueError(f"zero_stage is {self.zero_stage!r}; accepted: 0, 1, 2, 3")
        if self.offload_gradients and (self.world_size > 1 or self.zero_stage > 0):
            raise ValueError(
                f"offload_gradients is True, world_size {self.world_size} and zero_stage {self.zero_stage}; accepted "
                "with it: world_size 1 and zero_stage 0, since gradients stay on their device in several processes"
            )

    @property
    def group(self) -> dict[str, Any]:
        """What of them is a param group's, with the optimizer's defaults for all others."""
        return {
            "lr": 1e-3,
            "betas": (0.9, 0.999),
            "eps": 1e-8,
            "weight_decay": 1e-2,
            "maximize": False,
            "moments": self.moments,
            "low_precision_update": self.low_precision_update,
            "master_bits": self.master_bits,
            "nonfinite": "skip",
            "seed": 0,
            "backend": None,
        }

    @property
    def shards(self) -> int:
        """Ranks among which our optimizer cuts the moments."""
        return self.world_size if self.shard else 1

    @property
    def keeps_weights(self) -> bool:
        """Whether 16-bit parameters are stepped from float32 weights."""
        return self.low_precision_update in ("split", "fp32")

    def described(self) -> dict[str, Any]:
        """By name, in JSON's types."""
        values = {name: getattr(self, name) for name in self.__dataclass_fields__}
        return {**values, "dtype": None if self.dtype is None else str(self.dtype).removeprefix("torch.")}

    def arguments(self) -> str:
        """As the optimizer's keywords, and what else is to be set up."""
        words = [f'moments="{self.moments}"']
        if self.zero_stage == 0:
            words.append(f'low_precision_update="{self.low_precision_update}"')
            words += [f"master_bits={self.master_bits}"] if self.master_bits != 32 else []
            words += ['shard_group="world"'] if self.shards > 1 else []
            words += ['offload="cpu"'] if self.offload else []
            words += ["offload_gradients=True"] if self.offload_gradients else []
            return ", ".join(words)
        words.append(f"DeepSpeed's zero_optimization.stage={self.zero_stage}")
        words += ["and its offload_optimizer on the cpu"] if self.offload else []
        return ", ".join(words)


@dataclass(slots=True)
class Bytes:
    """Bytes of one memory, by kind."""

    parameters: int = 0
    gradients: int = 0
    moments: int = 0
    """The counters of steps included."""
    master: int = 0
    """What is kept of float32 weights beside 16-bit parameters."""
    transient: int = 0
    """The most that is held besides at one time: buffers and copies, not activations."""

    @property
    def total(self) -> int:
        """Of all kinds."""
        return sum(getattr(self, kind) for kind in KINDS)

    def described(self) -> dict[str, int]:
        """By kind, and in all."""
        return {**{kind: getattr(self, kind) for kind in KINDS}, "total": self.total}


@dataclass(slots=True)
class Row:
    """What one optimizer takes on the rank that holds most."""

    name: str
    device: Bytes = field(default_factory=Bytes)
    host: Bytes = field(default_factory=Bytes)
    note: str = ""
    state: dict[str, int] = field(default_factory=dict)
    """Of our optimizer: bytes by key, as ``memory_report()["bytes"]`` has them; empty for others."""
    rank: int = 0

    def described(self) -> dict[str, Any]:
        """In JSON's types."""
        own = {"rank": self.rank, "state": self.state} if self.state else {}
        return {
            "name": self.name,
            "device": self.device.described(),
            "host": self.host.described(),
            "note": self.note,
            **own,
        }
