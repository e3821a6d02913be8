"""What ``lowmem_adam.profile`` makes: records of steps and their parts, and what is made of them."""

from __future__ import annotations

import json
import statistics
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from os import PathLike
from pathlib import Path
from time import perf_counter_ns
from types import TracebackType
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from lowmem_adam import profile_plot
from lowmem_adam.kernels.tables import capturing
from lowmem_adam.optimizer import Adam8bit
from lowmem_adam.phases import GATHER, OTHER, PHASES, STEP, TRANSFER, Listener
from lowmem_adam.state import memory_by_kind
from lowmem_adam.wrapped import inner_of

FORMAT = "lowmem_adam.profile"
VERSION = 1
"""Of what ``Profile.export`` writes."""

Segment = tuple[str, int, int]
"""A phase, when it began and when it ended, in nanoseconds since the profile began."""


@dataclass(frozen=True, slots=True)
class StepRecord:
    """One call of ``step()``, in whole nanoseconds: the five parts add up to ``total_ns`` exactly."""

    step: int
    """Number of the recorded step, from 1."""
    start_ns: int
    """Since the ``with`` block was entered for the first time."""
    total_ns: int
    """Of ``step()``."""
    check_ns: int
    """Python on the host: checks, making of state, describing the step to the kernel."""
    gather_ns: int
    """Communication among ranks: this process's wait for it, not what goes on beside kernels."""
    step_ns: int
    """Kernels; of those of a device what is not hidden behind Python."""
    transfer_ns: int
    """Starting and awaiting ``offload``'s copies; not what goes on beside kernels."""
    other_ns: int
    """The closure, above all."""
    rest_ns: int | None
    """Of the training step: from the end of the last step to the start of this one, without pauses; None of a first."""
    bytes: dict[str, int]
    """Of the state after the step, by kind of tensor, on this rank."""

    @property
    def parts_ns(self) -> dict[str, int]:
        """The five parts by name."""
        return {phase: getattr(self, f"{phase}_ns") for phase in PHASES}


class Profile(Listener):
    """What ``lowmem_adam.profile`` has recorded; see there. It may be entered again, and then records further steps."""

    records: list[StepRecord]
    """One for each step."""

    def __init__(self, optimizer: Adam8bit, *, trace: bool = True) -> None:
        own = inner_of(optimizer)
        if not isinstance(own, Adam8bit):
            raise TypeError(f"optimizer is a {type(own).__name__}; accepted: Adam8bit, AdamW8bit")
        self.records = []
        self._optimizer = own
        self._trace = trace
        self._segments: list[list[Segment]] = []
        self._epoch: int | None = None
        self._resumed: int | None = None
        self._paused_ns = self._pauses = 0
        self._recording = False
        self._memory: dict[str, Any] | None = None

    # ---------------------------------------------------------------- the block

    def __enter__(self) -> Profile:
        optimizer = self._optimizer
        if optimizer._in_backward is not None:
            raise RuntimeError(
                "step_in_backward steps the parameters in backward passes, outside of step(), whose time is recorded; "
                "accepted: remove() of its handle first"
            )
        if optimizer._stepper.listener is not None:
            raise RuntimeError("the optimizer is being profiled already; accepted: one profile at a time")
        self._epoch = perf_counter_ns() if self._epoch is None else self._epoch
        self._resumed, self._paused_ns, self._recording, self._memory = None, 0, False, None
        optimizer._stepper.listener = self
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._optimizer._stepper.listener = None
        self._memory = self._measured()
        self._recording = False

    @contextmanager
    def paused(self) -> Iterator[None]:
        """Leave out what happens in this block: its time is no rest of a training step, its steps are not recorded.

        For validation, checkpoints and the like.
        """
        start = perf_counter_ns()
        self._pauses += 1
        try:
            yield
        finally:
            self._pauses -= 1
            if not self._pauses:
                self._paused_ns += perf_counter_ns() - start

    # ---------------------------------------------------------------- told by the step

    def begin(self) -> None:
        """A step begins."""
        self._recording = not self._pauses and not capturing()
        if not self._recording:
            return
        optimizer = self._optimizer
        params = (param for group in optimizer.param_groups for param in group["params"])
        self._devices = sorted({param.device for param in params if param.device.type not in ("cpu", "meta")}, key=str)
        self._offloads = optimizer._offload is not None
        self._wait()
        self._phase, self._current = OTHER, []
        self._began = self._since = perf_counter_ns()

    def now(self, phase: str) -> None:
        """The phase before has ended."""
        if not self._recording or phase == self._phase:
            return
        if self._devices and not self._offloads and self._phase in (STEP, GATHER):
            for device in self._devices:
                torch.accelerator.current_stream(device).synchronize()
        self._close(perf_counter_ns())
        self._phase = phase

    def end(self) -> None:
        """The step is taken."""
        if not self._recording:
            return
        if self._devices:
            self.now(TRANSFER if self._offloads else STEP)
            self._wait()
        ended = perf_counter_ns()
        self._close(ended)
        self._recording = False
        parts = dict.fromkeys(PHASES, 0)
        for phase, start, stop in self._current:
            parts[phase] += stop - start
        rest = None if self._resumed is None else self._began - self._resumed - self._paused_ns
        assert self._epoch is not None
        record = StepRecord(
            step=len(self.records) + 1,
            start_ns=self._began - self._epoch,
            total_ns=ended - self._began,
            **{f"{phase}_ns": spent for phase, spent in parts.items()},
            rest_ns=rest,
            bytes=self._bytes(),
        )
        self.records.append(record)
        if self._trace:
            epoch = self._epoch
            self._segments.append([(phase, start - epoch, stop - epoch) for phase, start, stop in self._current])
        self._current = []
        self._paused_ns = 0
        self._resumed = perf_counter_ns()  # what was done since ``ended`` is nobody's time

    _phase: str
    _current: list[Segment]
    _began: int
    _since: int
    _devices: list[torch.device]
    _offloads: bool

    def _close(self, at: int) -> None:
        self._current.append((self._phase, self._since, at))
        self._since = at

    def _wait(self) -> None:
        for device in self._devices:
            torch.accelerator.synchronize(device)

    def _bytes(self) -> dict[str, int]:
        """Of the state; the object of the last record where they are the same."""
        kinds = memory_by_kind(list(self._optimizer.state.values()))
        return self.records[-1].bytes if self.records and self.records[-1].bytes == kinds else kinds

    def _measured(self) -> dict[str, Any]:
        report = self._optimizer.memory_report()
        return {name: report[name] for name in _MEMORY}

    # ---------------------------------------------------------------- what is made of it

    def summary(self) -> dict[str, Any]:
        """The figures in one dictionary, of numbers and strings; times in seconds.

        The first step makes the state and has the device's kernels compiled: where there are others, times are theirs.

        Returns:
            ``steps``: recorded ones; ``first_step_s``; ``total_s``, ``rest_s``: of a step and between two steps, each
            with ``sum`` and ``median`` (None without a rest); ``parts_s``: for each part ``sum``, ``median`` and
            ``share`` of the steps' time; ``share_of_training``: of steps' time and the time between them (None without
            the latter); ``bytes``: of the state, by kind; ``parameters``, ``total_bytes``, ``bytes_per_parameter``,
            ``pinned_bytes``, ``gradient_bytes``: as in ``memory_report()``, at the end of the block.

        Raises:
            RuntimeError: no step was recorded.
        """
        self._check_records()
        records = self.records[1:] or self.records
        total = sum(record.total_ns for record in records)
        parts = {phase: [record.parts_ns[phase] for record in records] for phase in PHASES}
        rests = [(record.rest_ns, record.total_ns) for record in records if record.rest_ns is not None]
        resting, stepping = sum(rest for rest, _ in rests), sum(stepped for _, stepped in rests)
        return {
            "steps": len(self.records),
            "first_step_s": self.records[0].total_ns / 1e9,
            "total_s": _figures([record.total_ns for record in records]),
            "rest_s": _figures([rest for rest, _ in rests]) if rests else None,
            "parts_s": {name: {**_figures(spent), "share": sum(spent) / total} for name, spent in parts.items()},
            "share_of_training": stepping / (stepping + resting) if rests else None,
            "bytes": dict(self.records[-1].bytes),
            **(self._memory or self._measured()),
        }

    def about(self) -> dict[str, Any]:
        """What was profiled and where: class, settings of the first group, number of tensors, devices, versions."""
        return _about(self._optimizer)

    def as_dict(self) -> dict[str, Any]:
        """All that ``export`` writes."""
        summary = self.summary()
        return {
            "format": FORMAT,
            "version": VERSION,
            **self.about(),
            "summary": summary,
            "records": [asdict(record) for record in self.records],
        }

    def export(self, path: str | PathLike[str]) -> None:
        """Write settings, summary and records to a JSON file.

        Raises:
            RuntimeError: no step was recorded.
            OSError: the file cannot be written.
        """
        Path(path).write_text(json.dumps(self.as_dict(), indent=1) + "\n", encoding="utf-8")

    def chrome_trace(self, path: str | PathLike[str]) -> None:
        """Write a trace for Perfetto (ui.perfetto.dev) and chrome://tracing, in the Trace Event Format.

        A process for each rank; in its thread a bar for each step with those of its phases below, between them the rest
        of the training step; and a counter of the state's bytes.

        Raises:
            RuntimeError: no step was recorded, or ``trace=False``.
            OSError: the file cannot be written.
        """
        self._check_records()
        if not self._trace:
            raise RuntimeError("trace is False, so no phase was kept; accepted: profile(optimizer, trace=True)")
        events = list(_events(self.records, self._segments, _rank()))
        trace = {"traceEvents": events, "displayTimeUnit": "ms", "otherData": {"format": FORMAT}}
        Path(path).write_text(json.dumps(trace) + "\n", encoding="utf-8")

    def plot(self, path: str | PathLike[str]) -> None:
        """Draw the steps and their parts into a picture, whose kind the path's suffix says, such as ``.png``.

        Raises:
            RuntimeError: no step was recorded.
            ImportError: there is no matplotlib.
        """
        report = self.as_dict()
        profile_plot.draw(Path(path), report)

    def _check_records(self) -> None:
        if not self.records:
            raise RuntimeError("no step was recorded; accepted: a block in which step() was called")


_MEMORY = ("parameters", "total_bytes", "bytes_per_parameter", "pinned_bytes", "gradient_bytes")
_SETTINGS = (
    "moments",
    "low_precision_update",
    "master_bits",
    "nonfinite",
    "backend",
    "lr",
    "betas",
    "eps",
    "weight_decay",
)


def _figures(nanoseconds: Sequence[int]) -> dict[str, float]:
    return {"sum": sum(nanoseconds) / 1e9, "median": statistics.median(nanoseconds) / 1e9}


def _rank() -> int:
    return dist.get_rank() if dist.is_available() and dist.is_initialized() else 0


def _about(optimizer: Adam8bit) -> dict[str, Any]:
    """What was profiled, and where. Settings are those of the first group."""
    group = optimizer.param_groups[0]
    params = [param for group in optimizer.param_groups for param in group["params"]]
    return {
        "optimizer": type(optimizer).__name__,
        "settings": {name: _plain(group[name]) for name in _SETTINGS} | {"offload": optimizer._offload},
        "groups": len(optimizer.param_groups),
        "tensors": len(params),
        "devices": sorted({str(param.device) for param in params}),
        "dtypes": sorted({str(param.dtype).removeprefix("torch.") for param in params}),
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "rank": _rank(),
        "ranks": 1 if optimizer._partition is None else optimizer._partition.world.size,
    }


def _plain(value: Any) -> Any:
    return float(value) if isinstance(value, Tensor) else value


def _events(
    records: Sequence[StepRecord], segments: Sequence[Sequence[Segment]], rank: int
) -> Iterator[dict[str, Any]]:
    """Trace events; times in microseconds."""

    def bar(name: str, category: str, start: int, length: int, **arguments: Any) -> dict[str, Any]:
        where = {"pid": rank, "tid": 0, "ts": start / 1e3, "dur": length / 1e3}
        return {"name": name, "cat": category, "ph": "X", **where, "args": arguments}

    yield {"name": "process_name", "ph": "M", "pid": rank, "tid": 0, "args": {"name": f"rank {rank}"}}
    yield {"name": "thread_name", "ph": "M", "pid": rank, "tid": 0, "args": {"name": "training steps"}}
    for record, phases in zip(records, segments, strict=True):
        start, number = record.start_ns, record.step
        if record.rest_ns is not None:
            yield bar("rest of the training step", "rest", start - record.rest_ns, record.rest_ns, step=number)
        parts = {f"{name}_us": spent / 1e3 for name, spent in record.parts_ns.items()}
        yield bar("optimizer.step", "step", start, record.total_ns, step=number, **parts)
        for phase, begin, stop in phases:
            yield bar(phase, "phase", begin, stop - begin, step=number)
        at = {"pid": rank, "tid": 0, "ts": (start + record.total_ns) / 1e3}
        yield {"name": "bytes of state", "ph": "C", **at, "args": record.bytes}
