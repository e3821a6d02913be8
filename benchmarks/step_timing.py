"""Interleaved timing: all entrants of a field take turns, in another order every round."""

from __future__ import annotations

import gc
import math
import random
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from benchmarks import harness
from benchmarks.step_contestants import Contestant, Shape, count, make_params

WARM_STEPS = 3
TRIAD, ADD = "triad", "in-place add"
ARRAY_BYTES = 12  # three float32 arrays touched once an element: two read and one written, or one read and one updated
TRIAD_BYTES_ALLOCATING = 16  # a store that misses the caches first reads the line it writes


@dataclass(frozen=True)
class Plan:
    """How long to time: so many rounds, fewer when the seconds are over, never fewer than `least`."""

    rounds: int = 21
    seconds: float = 180.0
    least: int = 5
    sample_seconds: float = 5e-3


@dataclass(frozen=True)
class Entry:
    """A contestant on a list of parameters."""

    contestant: Contestant
    shapes: Sequence[Shape]
    note: str = ""

    @property
    def label(self) -> str:
        return f"{self.contestant.label}{', ' if self.note else ''}{self.note}"

    @property
    def held_bytes(self) -> float:
        return count(self.shapes) * self.contestant.held_bytes

    def stepper(self) -> Callable[[], Any]:
        optimizer = self.contestant.build(make_params(self.shapes, self.contestant.dtype))
        for _ in range(WARM_STEPS):
            optimizer.step()
        return optimizer.step


def repeats_for(run: Callable[[], Any], sample_seconds: float) -> int:
    """How often to run for a sample that the clock's resolution and a stray interrupt do not decide."""
    best = math.inf
    for _ in range(3):
        start = time.perf_counter()
        run()
        best = min(best, time.perf_counter() - start)
        if best >= sample_seconds:
            return 1
    return math.ceil(sample_seconds / best)


def sample(run: Callable[[], Any], repeats: int) -> float:
    """Seconds of one run. Where a sample takes several, all find what a run before them left in the caches."""
    if repeats > 1:
        run()
    start = time.perf_counter()
    for _ in range(repeats):
        run()
    return (time.perf_counter() - start) / repeats


def interleaved(runs: Mapping[str, Callable[[], Any]], plan: Plan, seed: int = 0) -> dict[str, list[float]]:
    """Seconds of every entrant in every round; index i of all lists is the same round."""
    repeats = {label: repeats_for(run, plan.sample_seconds) for label, run in runs.items()}
    samples: dict[str, list[float]] = {label: [] for label in runs}
    order, shuffle = list(runs), random.Random(seed).shuffle
    end = time.perf_counter() + plan.seconds
    gc.collect()
    gc.disable()
    try:
        for done in range(plan.rounds):
            if done >= plan.least and time.perf_counter() > end:
                break
            shuffle(order)
            for label in order:
                samples[label].append(sample(runs[label], repeats[label]))
    finally:
        gc.enable()
    return samples


def bandwidth_runs(numel: int) -> dict[str, Callable[[], Any]]:
    """STREAM's triad a = b + s * c, and the update in place a += s * c, by torch with the same threads."""
    a, b, c = (torch.full((numel,), value) for value in (0.0, 1.0, 2.0))
    return {TRIAD: lambda: torch.add(b, c, alpha=1e-6, out=a), ADD: lambda: b.add_(c, alpha=1e-6)}


def bandwidth_row(label: str, seconds: Sequence[float], numel: int) -> dict[str, Any]:
    """GB/s at 12 bytes an element; the triad also with the reads that its stores cause."""
    low, middle, high = harness.quantiles(numel / s / 1e9 for s in seconds)
    row = {"name": label, "numel": numel, "rounds": len(seconds)}
    row |= {"gb_s": ARRAY_BYTES * middle, "p5": ARRAY_BYTES * low, "p95": ARRAY_BYTES * high}
    return row | {"allocating_gb_s": (TRIAD_BYTES_ALLOCATING if label == TRIAD else ARRAY_BYTES) * middle}


def time_row(entry: Entry, seconds: Sequence[float]) -> dict[str, Any]:
    numel = count(entry.shapes)
    rounds = [s / numel * 1e9 for s in seconds]
    low, middle, high = harness.quantiles(rounds)
    row: dict[str, Any] = {"label": entry.label, "name": entry.contestant.name, "dtype": str(entry.contestant.dtype)}
    row |= {"tensors": len(entry.shapes), "numel": numel, "ns": middle, "p5": low, "p95": high}
    moved = entry.contestant.moved_bytes
    row |= {"moved_bytes": moved, "gb_s": moved / middle if moved else None}
    return row | {"rounds": [round(ns, 5) for ns in rounds]}


def time_field(entries: Sequence[Entry], plan: Plan, bandwidth: int = 0) -> dict[str, Any]:
    """Time entries against one another and, with arrays of `bandwidth` elements, against the memory.

    All are alive at once, or they could not take turns; where memory does not suffice the field is left out.
    """
    need, free = sum(entry.held_bytes for entry in entries) + bandwidth * ARRAY_BYTES, available_bytes()
    if need * 1.15 > free:
        return {"times": [], "bandwidth": [], "skipped": f"{need / 1e9:.1f} GB of {free / 1e9:.1f} GB free"}
    runs = {entry.label: entry.stepper() for entry in entries}
    streams = bandwidth_runs(bandwidth) if bandwidth else {}
    samples = interleaved({**runs, **streams}, plan)
    times = [time_row(entry, samples[entry.label]) for entry in entries]
    return {"times": times, "bandwidth": [bandwidth_row(name, samples[name], bandwidth) for name in streams]}


def available_bytes() -> float:
    """Memory that can be had without swapping; without Linux's account of it, no limit."""
    info = Path("/proc/meminfo")
    lines = info.read_text().splitlines() if info.exists() else []
    return next((int(line.split()[1]) * 1024.0 for line in lines if line.startswith("MemAvailable:")), math.inf)


def ratio(times: Sequence[Mapping[str, Any]], label: str, to: str) -> dict[str, float] | None:
    """Of two entrants of one field: the ratio of their medians, and quantiles of the ratios round by round."""
    rows = {row["label"]: row for row in times}
    if label not in rows or to not in rows:
        return None
    ours, theirs = rows[label], rows[to]
    low, middle, high = harness.quantiles(a / b for a, b in zip(ours["rounds"], theirs["rounds"], strict=True))
    return {"of_medians": ours["ns"] / theirs["ns"], "median_of_rounds": middle, "p5": low, "p95": high}


def yardstick(bandwidth: Sequence[Mapping[str, Any]]) -> tuple[str, float] | None:
    """The higher of the triad with its stores' reads counted and the update in place: what memory has shown to give."""
    rates = [(row["name"], row["allocating_gb_s"]) for row in bandwidth]
    return max(rates, key=lambda rate: rate[1]) if rates else None
