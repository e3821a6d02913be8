"""What a model's training takes on device and host, before any of it is there: ours and other optimizers.

For our own optimizer its own functions say which state, shards and buffers it makes, on tensors without memory; for
others ``lowmem_adam.plan.peers`` names its sources.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

from lowmem_adam.plan.model import Model, Weight, count_of, of_config, of_count, of_shapes, read_model
from lowmem_adam.plan.ours import Cut, own_row
from lowmem_adam.plan.peers import peers, zero_row
from lowmem_adam.plan.settings import DTYPES, KINDS, Bytes, Row, Settings, dtype_of

__all__ = [
    "DTYPES",
    "KINDS",
    "Bytes",
    "Choice",
    "Model",
    "Plan",
    "Row",
    "Settings",
    "Weight",
    "cheapest",
    "count_of",
    "dtype_of",
    "of_config",
    "of_count",
    "of_shapes",
    "plan",
    "read_model",
]


@dataclass(slots=True)
class Plan:
    """Our row first, then the others'."""

    model: Model
    settings: Settings
    rows: list[Row]

    @property
    def own(self) -> Row:
        """What our optimizer takes."""
        return self.rows[0]

    def described(self) -> dict[str, Any]:
        """In JSON's types."""
        model = {"source": self.model.source, "parameters": self.model.numel, "tensors": len(self.model.weights)}
        return {
            "model": {**model, "notes": self.model.notes},
            "settings": self.settings.described(),
            "rows": [row.described() for row in self.rows],
        }


@dataclass(slots=True)
class Choice:
    """Settings that fit, and what they take."""

    settings: Settings
    row: Row

    def described(self) -> dict[str, Any]:
        """In JSON's types."""
        return {"settings": self.settings.described(), **self.row.described()}


def plan(model: Model, settings: Settings | None = None, rank: int | None = None) -> Plan:
    """Bytes of a rank, by kind, on its device and on its host.

    Args:
        model: of ``read_model``, ``of_config``, ``of_count`` or ``of_shapes``.
        settings: those of ``Settings()`` by default.
        rank: the one asked for; by default the one that holds most of our state.

    Raises:
        ValueError: a setting that is not accepted; a rank that there is not.
    """
    settings = Settings() if settings is None else settings
    settings.check()
    if rank is not None and not 0 <= rank < settings.world_size:
        raise ValueError(f"rank is {rank}; accepted: 0 to {settings.world_size - 1}")
    model = model.with_dtypes(settings.dtype)
    own = _own_row(model.weights, settings, rank, {})
    return Plan(model, settings, [own, *peers(model.weights, settings)])


def _own_row(weights: Sequence[Weight], settings: Settings, rank: int | None, cuts: dict[Any, Cut]) -> Row:
    if settings.zero_stage:
        return zero_row(weights, settings, settings.zero_stage, settings.moments)
    key = (settings.shards, settings.moments == "bnb8bit", settings.bucket_cap_mb)
    if key not in cuts:
        cuts[key] = Cut.of(weights, settings)
    return own_row(cuts[key], settings, None if settings.shards == 1 else rank)


# ---------------------------------------------------------------- what fits


def cheapest(model: Model, settings: Settings, device_bytes: int, host_bytes: int | None = None) -> Choice | None:
    """The settings that fit at the least cost, where only what takes less memory is changed; None where none do.

    What may be changed, from what costs least to what costs most: moments to 8 bits; shards; ``"split"`` in the place
    of ``"fp32"``, which keeps the same weights; DeepSpeed's stage 2; offload, whose bytes cross the bus; gradients on
    the host; weights that are not float32; stage 3, which gathers parameters in every pass. All of the earlier ones
    together cost less than a later one.

    Args:
        model: as of ``plan``.
        settings: what one would rather have.
        device_bytes: of one rank's device.
        host_bytes: of the host's memory that one rank may take; None for any.
    """
    settings.check()
    weights = model.with_dtypes(settings.dtype).weights
    cuts: dict[Any, Cut] = {}
    for candidate in _by_cost(weights, settings):
        row = _own_row(weights, candidate, None, cuts)
        if row.device.total <= device_bytes and (host_bytes is None or row.host.total <= host_bytes):
            return Choice(candidate, row)
    return None


def _by_cost(weights: Sequence[Weight], wanted: Settings) -> Iterator[Settings]:
    """All settings that change some of what may be changed, the cheapest first; each once."""
    narrow = any(weight.dtype is not None and weight.dtype.itemsize < 4 for weight in weights)
    several, zero = wanted.world_size > 1, wanted.zero_stage > 0
    changes: list[dict[str, Any]] = []
    if wanted.moments == "32bit":
        changes.append({"moments": "8bit"})
    if several and not wanted.shard and not zero:
        changes.append({"shard": True})
    if narrow and not zero and wanted.low_precision_update == "fp32":
        changes.append({"low_precision_update": "split"})
    if several and wanted.zero_stage < 2:
        changes.append({"zero_stage": 2})
    if wanted.offload is None:
        changes.append({"offload": "cpu"})
    if not several and not zero and not wanted.offload_gradients:
        changes.append({"offload": "cpu", "offload_gradients": True})
    if narrow and not zero and wanted.keeps_weights:
        changes.append({"low_precision_update": "stochastic", "master_bits": 32})
    if several and wanted.zero_stage < 3:
        changes.append({"zero_stage": 3})
    seen = set()
    for taken in range(2 ** len(changes)):
        candidate = wanted
        for index, change in enumerate(changes):
            if taken >> index & 1:
                candidate = replace(candidate, **change)
        if candidate not in seen:
            seen.add(candidate)
            yield candidate
