"""How long a checkpoint takes to save and to load: all contestants in turns, in another order every round."""

from __future__ import annotations

import gc
import random
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch.nn import Parameter
from torch.optim import Optimizer

from benchmarks import harness
from benchmarks.memory_probe import filled_params, held_bytes, load_file, shape_of
from benchmarks.step_contestants import Contestant, count
from benchmarks.step_probe import seconds
from benchmarks.step_timing import Plan, available_bytes


def save(optimizer: Optimizer, path: Path) -> None:
    torch.save(optimizer.state_dict(), path)


def load(optimizer: Optimizer, path: Path) -> None:
    optimizer.load_state_dict(load_file(path)[0])


def build_all(
    contestants: Sequence[Contestant], numel: int
) -> dict[str, tuple[Contestant, list[Parameter], Optimizer]]:
    """Optimizers that have taken a step; those of a dtype share parameters, so that all fit beside one another."""
    shared: dict[torch.dtype, list[Parameter]] = {}
    built = {}
    for contestant in contestants:
        params = shared.setdefault(contestant.dtype, filled_params(shape_of(numel), contestant.dtype))
        optimizer = contestant.build(params)
        optimizer.step()
        built[contestant.label] = (contestant, params, optimizer)
    return built


def time_checkpoints(contestants: Sequence[Contestant], numel: int, plan: Plan) -> dict[str, Any]:
    """Rows of bytes and seconds: the file is written into memory that the system keeps of it, and read from there.

    A load is ``torch.load``, with ``weights_only`` where that can be, and ``load_state_dict`` into a fresh optimizer.
    """
    need = numel * (sum(c.moment_bytes for c in contestants) + 2 * 12)
    if need * 1.15 > (free := available_bytes()):
        return {"rows": [], "skipped": f"needs {need / 1e9:.1f} GB of {free / 1e9:.1f} GB free"}
    built = build_all(contestants, numel)
    samples: dict[str, list[tuple[float, float]]] = {label: [] for label in built}
    rows: dict[str, dict[str, Any]] = {}
    order, shuffle, end = list(built), random.Random(0).shuffle, time.perf_counter() + plan.seconds
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "checkpoint.pt"
        for done in range(plan.rounds + 1):
            if done > plan.least and time.perf_counter() > end:
                break
            shuffle(order)
            for label in order:
                samples[label].append(save_and_load(*built[label], path))
                if label not in rows:
                    rows[label] = file_row(label, path, *built[label][1:])
                path.unlink()
    # The first round, which finds neither memory nor code in place, is not counted.
    return {"rows": [rows[label] | quantiles_of(found[1:]) for label, found in samples.items()]}


def save_and_load(
    contestant: Contestant, params: list[Parameter], optimizer: Optimizer, path: Path
) -> tuple[float, float]:
    """Seconds of both; the optimizer that loads is made before."""
    fresh = contestant.build(params)
    gc.collect()
    return seconds(lambda: save(optimizer, path)), seconds(lambda: load(fresh, path))


def file_row(label: str, path: Path, params: Sequence[Parameter], optimizer: Optimizer) -> dict[str, Any]:
    numel, size = count([param.shape for param in params]), path.stat().st_size
    row: dict[str, Any] = {"label": label, "numel": numel, "file_bytes": size, "per_parameter": size / numel}
    return row | {"state_bytes": held_bytes(optimizer)}


def quantiles_of(samples: Sequence[tuple[float, float]]) -> dict[str, Any]:
    out: dict[str, Any] = {"rounds": len(samples)}
    for kind, found in zip(("save", "load"), zip(*samples, strict=True), strict=True):
        low, middle, high = harness.quantiles(found)
        out |= {f"{kind}_seconds": middle, f"{kind}_p5": low, f"{kind}_p95": high}
    return out
