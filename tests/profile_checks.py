"""What holds of every profile, and of every trace."""

from __future__ import annotations

import itertools
from collections.abc import Mapping
from typing import Any

from lowmem_adam.phases import PHASES
from lowmem_adam.profiling import StepRecord


def check_sums(records: list[StepRecord]) -> None:
    """Parts are no less than nothing and add up; steps follow one another in time."""
    for number, record in enumerate(records, 1):
        assert record.step == number
        assert list(record.parts_ns) == list(PHASES)
        assert all(part >= 0 for part in record.parts_ns.values())
        assert sum(record.parts_ns.values()) == record.total_ns
    assert records[0].rest_ns is None
    for before, record in itertools.pairwise(records):
        assert record.rest_ns is not None
        assert record.rest_ns >= 0
        assert record.start_ns >= before.start_ns + before.total_ns + record.rest_ns


def check_trace(trace: Mapping[str, Any], records: list[StepRecord]) -> None:
    """The Trace Event Format: complete events with microseconds, those of phases inside of their step's."""
    assert trace["displayTimeUnit"] in ("ms", "ns")
    events: list[dict[str, Any]] = trace["traceEvents"]
    for event in events:
        assert isinstance(event["name"], str)
        assert isinstance(event["pid"], int)
        assert isinstance(event["tid"], int)
        assert event["ph"] in ("X", "M", "C")
        assert event["ph"] == "M" or event["ts"] >= 0
        assert event["ph"] != "X" or event["dur"] >= 0
    bars = [event for event in events if event["ph"] == "X"]
    steps = [event for event in bars if event["cat"] == "step"]
    assert [event["args"]["step"] for event in steps] == [record.step for record in records]
    assert sum(event["cat"] == "rest" for event in bars) == len(records) - 1
    for event, record in zip(steps, records, strict=True):
        phases = [bar for bar in bars if bar["cat"] == "phase" and bar["args"]["step"] == record.step]
        edges = [(round(bar["ts"] * 1e3), round((bar["ts"] + bar["dur"]) * 1e3)) for bar in phases]
        assert edges[0][0] == record.start_ns == round(event["ts"] * 1e3)
        assert edges[-1][1] == record.start_ns + record.total_ns == round((event["ts"] + event["dur"]) * 1e3)
        assert all(stop == start for (_, stop), (start, _) in itertools.pairwise(edges))
        for name, spent in record.parts_ns.items():
            assert sum(
                stop - start for bar, (start, stop) in zip(phases, edges, strict=True) if bar["name"] == name
            ) == (spent)
    counters = [event["args"] for event in events if event["ph"] == "C"]
    assert counters == [record.bytes for record in records]
    assert {event["name"] for event in events if event["ph"] == "M"} == {"process_name", "thread_name"}
