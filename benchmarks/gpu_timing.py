"""Timing on an accelerator: all entrants of a case step the same parameters with fresh gradients, in turns.

Each has two samples a round. One starts on an idle device, so that launches count as they do where the device waits
for the host: its time by CUDA events, and the host's time until `step` returns. The other waits behind a delay on the
device until the host has queued all of it: the time of the kernels alone. On the CPU there is one clock and no queue.
"""

from __future__ import annotations

import gc
import random
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.nn import Parameter
from torch.optim import Optimizer

from benchmarks import harness
from benchmarks.gpu_contestants import FAILURES, Contestant, Steps, told
from benchmarks.step_contestants import Shape, count
from benchmarks.step_probe import state_bytes
from benchmarks.step_timing import Plan

# Past the second and the sixteenth step: Triton compiles anew for integer arguments of 1 and for multiples of 16.
WARM_STEPS = {"cuda": 17, "cpu": 3}
SLOW_STEP = 0.5
"""Seconds of a step from which a contestant is left out, where two in a row take them: it would take the time of all
others. The first step and single ones may compile."""
MEMORY_SHARE = 0.92
"""Of the memory that is free, for all that is alive at once."""
CYCLES = 2e9
"""A second on the device, at the highest clock of the cards this is for; a lower clock makes a delay longer."""


@dataclass(frozen=True)
class Clock:
    """The device's time and memory."""

    device: torch.device

    @property
    def cuda(self) -> bool:
        return self.device.type == "cuda"

    def wait(self) -> None:
        if self.cuda:
            torch.cuda.synchronize()

    def sample(self, run: Callable[[], Any]) -> tuple[float, float]:
        """Seconds of `run` from an idle device: until all is done, and until the host is free."""
        self.wait()
        if not self.cuda:
            start = time.perf_counter()
            run()
            host = time.perf_counter() - start
            return host, host
        return self._timed(run)

    def queued(self, run: Callable[[], Any], delay: float) -> tuple[float, float] | None:
        """Seconds of `run` behind a delay on the device; None where work does not queue."""
        if not self.cuda:
            return None
        torch.cuda.synchronize()
        return self._timed(run, delay)

    def _timed(self, run: Callable[[], Any], delay: float = 0.0) -> tuple[float, float]:
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        if delay:
            torch.cuda._sleep(int(delay * CYCLES))
        start = time.perf_counter()
        begin.record()
        run()
        end.record()
        host = time.perf_counter() - start
        torch.cuda.synchronize()
        return begin.elapsed_time(end) / 1e3, host

    def allocated(self) -> int | None:
        return torch.cuda.memory_allocated() if self.cuda else None

    def free(self) -> float:
        """Bytes that can be had; on the CPU no limit is set."""
        if not self.cuda:
            return float("inf")
        gc.collect()
        torch.cuda.empty_cache()
        return float(torch.cuda.mem_get_info()[0])

    def peak(self, run: Callable[[], Any]) -> int | None:
        """Bytes that `run` takes at its peak above what is held before it."""
        if not self.cuda:
            run()
            return None
        self.wait()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        run()
        self.wait()
        return torch.cuda.max_memory_allocated() - before


@dataclass
class Entrant:
    """A contestant in a case, warmed up, and its samples in seconds; index i of all lists is the same round."""

    contestant: Contestant
    steps: Steps
    state_bytes: int | None
    peak_extra_bytes: int | None
    delay: float
    idle: list[float] = field(default_factory=list)
    host: list[float] = field(default_factory=list)
    queue: list[float] = field(default_factory=list)
    queue_host: list[float] = field(default_factory=list)
    failure: str | None = None
    """Why it was taken out in the middle of a case."""

    def sample(self, arena: Arena) -> None:
        """One round's samples, each with gradients of its own."""
        arena.fresh_gradients()
        seconds, host = arena.clock.sample(self.steps.step)
        arena.fresh_gradients()
        behind = arena.clock.queued(self.steps.step, self.delay)
        self.idle.append(seconds)
        self.host.append(host)
        if behind is not None:
            self.queue.append(behind[0])
            self.queue_host.append(behind[1])


class Arena:
    """The parameters that all step, and their gradients, which are drawn anew before every step."""

    def __init__(self, shapes: Sequence[Shape], dtype: torch.dtype, clock: Clock) -> None:
        self.shapes, self.clock = shapes, clock
        self.generator = torch.Generator(clock.device).manual_seed(0)
        self.params = [Parameter(self.draw(shape, dtype, 0.02)) for shape in shapes]
        for param in self.params:
            param.grad = self.draw(tuple(param.shape), dtype, 0.01)

    def draw(self, shape: Shape, dtype: torch.dtype, scale: float) -> Tensor:
        return torch.empty(shape, dtype=dtype, device=self.clock.device).normal_(0, scale, generator=self.generator)

    def fresh_gradients(self) -> None:
        for param in self.params:
            assert param.grad is not None
            param.grad.normal_(0, 0.01, generator=self.generator)

    def enter(self, contestant: Contestant, spared: float) -> Entrant | str:
        """Build and warm up a contestant; why it is left out where it does not fit, fails or is slow."""
        need, free = contestant.state_bytes(self.shapes) + spared, self.clock.free() * MEMORY_SHARE
        if need > free:
            return f"left out: {need / 1e9:.1f} GB needed of {free / 1e9:.1f} GB"
        before, hosts, slow = self.clock.allocated(), [], 0
        try:
            steps = contestant.build(self.params)
            for done in range(WARM_STEPS[self.clock.device.type]):
                self.fresh_gradients()
                seconds, host = self.clock.sample(steps.step)
                slow = slow + 1 if done > 0 and seconds > SLOW_STEP else 0
                if slow == 2:
                    return f"left out: a step takes {seconds:.2g} s"
                hosts.append(host)
            held = self.clock.allocated()
            peak = self.clock.peak(steps.step)
        except FAILURES as problem:
            return told(problem)
        if held is not None and before is not None:
            state: int | None = held - before
        else:
            state = state_bytes(steps) if isinstance(steps, Optimizer) else None
        delay = 2 * statistics.median(hosts[-3:]) + 1e-4
        # What a replay takes lies in the graph's own pool all the time.
        return Entrant(contestant, steps, state, None if contestant.captured else peak, delay)


def copy_run(size: int, device: torch.device) -> Callable[[], Any]:
    """A copy of so many bytes; it reads and writes each of them."""
    source = torch.ones(size // 4, device=device)
    target = torch.empty_like(source)
    return lambda: target.copy_(source)


def time_case(
    contestants: Sequence[Contestant], shapes: Sequence[Shape], clock: Clock, plan: Plan, copy_bytes: int
) -> dict[str, Any]:
    """Time contestants of one precision against one another and against a copy in the device's memory."""
    arena = Arena(shapes, contestants[0].dtype, clock)
    copy = copy_run(copy_bytes, clock.device)
    # The workspaces of steps are a small part of this; what a step takes more is what the case finds out.
    spared = 0.1 * sum(param.numel() * param.element_size() for param in arena.params)
    entered = {contestant.label: arena.enter(contestant, spared) for contestant in contestants}
    entrants = [entrant for entrant in entered.values() if isinstance(entrant, Entrant)]
    copies = interleave(arena, entrants, copy, plan)
    reasons = {label: entry if isinstance(entry, str) else entry.failure for label, entry in entered.items()}
    left_out = [{"label": label, "status": reason} for label, reason in reasons.items() if reason is not None]
    finished = [entrant for entrant in entrants if entrant.failure is None]
    return case_rows(shapes, finished, copies, copy_bytes) | {"left_out": left_out}


def interleave(arena: Arena, entrants: Sequence[Entrant], copy: Callable[[], Any], plan: Plan) -> list[float]:
    """All samples of all entrants, in another order every round; returns the seconds of the copy."""
    clock, order, copies = arena.clock, list(entrants), []
    shuffle, end = random.Random(0).shuffle, time.perf_counter() + plan.seconds
    for _ in range(3):
        copy()
    gc.collect()
    gc.disable()
    try:
        for done in range(plan.rounds):
            if done >= plan.least and time.perf_counter() > end:
                break
            shuffle(order)
            copies.append((clock.queued(copy, 1e-4) or clock.sample(copy))[0])
            for entrant in tuple(order):
                try:
                    entrant.sample(arena)
                except FAILURES as problem:
                    entrant.failure = told(problem)
                    order.remove(entrant)
    finally:
        gc.enable()
    return copies


def spread(prefix: str, seconds: Sequence[float]) -> dict[str, float | None]:
    """Median and quantiles in ms under prefixed names; all None where nothing was sampled."""
    names = (f"{prefix}_ms", f"{prefix}_p5", f"{prefix}_p95")
    if not seconds:
        return dict.fromkeys(names)
    low, middle, high = harness.quantiles(1e3 * s for s in seconds)
    return dict(zip(names, (middle, low, high), strict=True))


def ratios(prefix: str, ours: Sequence[float], theirs: Sequence[float]) -> dict[str, float | None]:
    """Ratio of medians, and quantiles of the ratios round by round."""
    names = (f"{prefix}_ratio", f"{prefix}_ratio_p5", f"{prefix}_ratio_p95")
    if not ours or not theirs:
        return dict.fromkeys(names)
    low, high = harness.quantiles((a / b for a, b in zip(ours, theirs, strict=True)), (0.05, 0.95))
    return dict(zip(names, (harness.median(ours) / harness.median(theirs), low, high), strict=True))


def case_rows(
    shapes: Sequence[Shape], entrants: Sequence[Entrant], copies: Sequence[float], copy_bytes: int
) -> dict[str, Any]:
    """What was sampled, as rows: times, ratios to the yardsticks, bytes and rates."""
    numel = count(shapes)
    low, middle, high = harness.quantiles(2 * copy_bytes / s / 1e9 for s in copies)
    by_label = {entrant.contestant.label: entrant for entrant in entrants}
    rows = []
    for entrant in entrants:
        contestant = entrant.contestant
        row: dict[str, Any] = {"label": contestant.label, "name": contestant.name, "rounds": len(entrant.idle)}
        row |= spread("step", entrant.idle) | spread("queued", entrant.queue) | spread("host", entrant.host)
        row["yardstick"] = contestant.yardstick if contestant.yardstick in by_label else None
        to = by_label.get(contestant.yardstick)
        row |= ratios("step", entrant.idle, to.idle if to else ())
        row |= ratios("queued", entrant.queue, to.queue if to else ())
        row["waits"] = bool(entrant.queue) and harness.median(entrant.queue_host) >= entrant.delay
        moved = contestant.moved_bytes(shapes)
        seconds = harness.median(entrant.queue or entrant.idle)
        row |= {"moved_bytes": moved / numel, "gb_s": moved / seconds / 1e9}
        row["copy_share"] = row["gb_s"] / middle
        row["least_state"] = contestant.state_bytes(shapes) / numel
        row["state"] = None if entrant.state_bytes is None else entrant.state_bytes / numel
        row["peak_extra_bytes"] = entrant.peak_extra_bytes
        samples = {"idle": entrant.idle, "host": entrant.host, "queue": entrant.queue}
        row["samples"] = {key: [round(s, 9) for s in values] for key, values in samples.items()}
        rows.append(row)
    return {
        "tensors": len(shapes),
        "numel": numel,
        "copy": {"bytes": copy_bytes, "gb_s": middle, "p5": low, "p95": high},
        "rows": rows,
    }
