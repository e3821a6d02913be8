"""The GPU benchmark in short: who may be timed, what is made of the times, and that it runs."""

from __future__ import annotations

import contextlib
import json
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("rich", reason="the benchmark prints tables")
pytest.importorskip("typer", reason="the benchmark has a command line")

import torch
import typer
from torch.nn import Parameter

from benchmarks import gpu_contestants as contestants
from benchmarks import gpu_timing as timing
from benchmarks.bench_gpu import QUICK, case_table, choices, page, wanted
from benchmarks.gpu_contestants import Contestant, Steps, grouped_state, own_state, per_element
from benchmarks.step_contestants import FUSED, OURS, SETTINGS, Shape
from benchmarks.step_timing import Plan
from tests.launching import ROOT

CPU = torch.device("cpu")
SHAPES: list[Shape] = [(64, 256), (100,)]
NUMEL = 64 * 256 + 100


class Idle:
    """Steps nothing."""

    def step(self) -> None:
        pass


def contestant(name: str, build: Callable[[list[Parameter]], Steps] = lambda _: Idle(), **settings: Any) -> Contestant:
    return Contestant(name, "fp32", build, per_element(8), **settings)


def entrant(of: Contestant, idle: Sequence[float], queue: Sequence[float] = (), **settings: Any) -> timing.Entrant:
    made = timing.Entrant(of, Idle(), settings.get("state"), settings.get("peak"), settings.get("delay", 1.0))
    made.idle, made.host, made.queue = list(idle), [s / 2 for s in idle], list(queue)
    made.queue_host = list(settings.get("queue_host", made.host))
    return made


# ---------------------------------------------------------------- who may be timed


@pytest.mark.parametrize("precision", contestants.PRECISIONS)
def test_ours_and_torch_follow_the_textbook(precision: str) -> None:
    rows = [contestants.validate(c, CPU) for c in wanted(precision, [OURS, FUSED])]
    for row in rows:
        assert row["status"] == "timed" or row["optional"], row
    assert sum(row["status"] == "timed" for row in rows) >= 3


def test_one_that_is_not_adam_is_not_timed(capsys: pytest.CaptureFixture[str]) -> None:
    row = contestants.validate(contestant("idle"), CPU)
    assert (row["status"], row["error"]) == ("not timed: outside of the tolerance", 1.0)

    def without_decay(params: list[Parameter]) -> Steps:
        return torch.optim.AdamW(params, **{**SETTINGS, "weight_decay": 0.0})

    assert contestants.validate(contestant("no decay", without_decay, coded=True), CPU)["status"].startswith(
        "not timed"
    )

    def broken(params: list[Parameter]) -> Steps:
        raise KeyError("no kernel")

    def missing(params: list[Parameter]) -> Steps:
        import a_package_that_nobody_has  # type: ignore[import-not-found]  # noqa: F401

        return Idle()

    assert contestants.validate(contestant("broken", broken), CPU)["status"] == "not available: KeyError: 'no kernel'"
    assert "in broken" in capsys.readouterr().err
    assert contestants.validate(contestant("missing", missing), CPU)["status"] == "not installed"
    assert capsys.readouterr().err == ""


def test_only_those_asked_for_and_the_yardstick() -> None:
    assert [c.name for c in wanted("fp32", ["Flash"])] == [FUSED, contestants.FLASHOPTIM]
    labels = [c.label for precision in contestants.PRECISIONS for c in wanted(precision, [])]
    assert len(set(labels)) == len(labels)
    assert all(c.yardstick in labels for precision in contestants.PRECISIONS for c in wanted(precision, []))
    assert choices("one, small,", ("one", "small"), "--sizes") == ["one", "small"]
    with pytest.raises(typer.BadParameter, match=r"--sizes is 'two'; accepted: one, small"):
        choices("two", ("one", "small"), "--sizes")


# ---------------------------------------------------------------- the device, played by a list of what it is asked


class Recorder:
    """Stands for torch.cuda: a clock that a delay and a step move on, and what is asked in its order."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.asked: list[str] = []
        self.now = 0.0
        recorder = self

        class Event:
            def __init__(self, enable_timing: bool) -> None:
                assert enable_timing

            def record(self) -> None:
                self.at = recorder.now
                recorder.asked.append("event")

            def elapsed_time(self, end: Any) -> float:
                return 1e3 * (end.at - self.at)

        class Graph:
            def replay(self) -> None:
                recorder.asked.append("replay")

        class Stream:
            def wait_stream(self, stream: object) -> None:
                recorder.asked.append("wait")

        @contextlib.contextmanager
        def named(name: str) -> Iterator[None]:
            recorder.asked.append(f"{name} begins")
            yield
            recorder.asked.append(f"{name} ends")

        stand_ins: dict[str, Any] = {"Event": Event, "CUDAGraph": Graph, "Stream": Stream, "current_stream": Stream}
        stand_ins |= {"graph": lambda graph: named("capture"), "stream": lambda stream: named("side")}
        stand_ins |= {"synchronize": lambda: self.asked.append("synchronize"), "_sleep": self.sleep}
        stand_ins |= {"memory_allocated": lambda: 100, "max_memory_allocated": lambda: 150}
        stand_ins |= {"reset_peak_memory_stats": lambda: self.asked.append("reset")}
        for name, value in stand_ins.items():
            monkeypatch.setattr(torch.cuda, name, value)

    def sleep(self, cycles: int) -> None:
        self.asked.append("sleep")
        self.now += cycles / timing.CYCLES

    def step(self) -> None:
        self.asked.append("step")
        self.now += 0.25


def test_samples_of_a_device(monkeypatch: pytest.MonkeyPatch) -> None:
    device = Recorder(monkeypatch)
    clock = timing.Clock(torch.device("cuda"))
    seconds, host = clock.sample(device.step)
    assert seconds == 0.25
    assert 0 < host < 0.25
    assert device.asked == ["synchronize", "event", "step", "event", "synchronize"]
    device.asked.clear()
    behind = clock.queued(device.step, 3.0)
    assert behind is not None
    assert behind[0] == 0.25  # without the delay
    assert device.asked == ["synchronize", "sleep", "event", "step", "event", "synchronize"]
    device.asked.clear()
    assert clock.peak(device.step) == 50
    assert device.asked == ["synchronize", "reset", "step", "synchronize"]


def test_a_captured_step_runs_once_a_call(monkeypatch: pytest.MonkeyPatch) -> None:
    """First on the side stream; what is captured does not run, so that its call is a replay as well."""
    device = Recorder(monkeypatch)
    captured = contestants.Captured(device)
    for _ in range(contestants.GRAPH_WARM_STEPS):
        captured.step()
    assert device.asked == ["wait", "side begins", "step", "side ends", "wait"] * contestants.GRAPH_WARM_STEPS
    device.asked.clear()
    captured.step()
    assert device.asked == ["capture begins", "step", "capture ends", "replay"]
    device.asked.clear()
    captured.step()
    assert device.asked == ["replay"]


# ---------------------------------------------------------------- bytes


def test_bytes_of_each_format() -> None:
    coded, tail, vector = (64, 256), (50, 200), (768,)
    assert [own_state()(shape) for shape in (coded, tail, vector)] == [
        2 * 16384 + 2 * 128,
        2 * 10000 + 2 * 100,
        8 * 768,
    ]
    assert own_state(2.0)(coded) == own_state()(coded) + 2 * 16384
    bitsandbytes = grouped_state(256, 4, least=4096)
    assert [bitsandbytes(shape) for shape in (coded, tail, vector)] == [2 * 16384 + 8 * 64, 2 * 10000 + 8 * 40, 8 * 768]
    assert grouped_state(256, 4, least=4096, whole=4, exact=True)(tail) == 4 * 10000
    assert grouped_state(32, 2, weight=1.0)(vector) == 3 * 768 + 4 * 24
    made = Contestant("one", "bf16", lambda _: Idle(), per_element(4))
    assert made.moved_bytes([(10,)]) == 10 * (3 * 2 + 2 * 4)
    assert Contestant("one", "bf16", lambda _: Idle(), per_element(16), moved=40.0).moved_bytes([(10,)]) == 400


@pytest.mark.parametrize("precision", contestants.PRECISIONS)
def test_our_state_takes_the_least_bytes(precision: str) -> None:
    """What the optimizer holds, measured, is what its format needs (and per tensor a counter of a few bytes)."""
    field = [c for c in wanted(precision, [OURS]) if not c.captured and "bnb" not in c.name]
    case = timing.time_case(field, SHAPES, timing.Clock(CPU), Plan(2, 1.0, 1), 1 << 16)
    assert not case["left_out"]
    for row in case["rows"]:
        assert 0 <= row["state"] * NUMEL - row["least_state"] * NUMEL <= 16 * len(SHAPES)


# ---------------------------------------------------------------- what is made of the times


def test_arithmetic_of_a_case() -> None:
    yard = entrant(contestant(FUSED), [0.002, 0.004, 0.003], [0.001, 0.002, 0.002], state=8 * NUMEL, peak=1 << 20)
    ours = entrant(contestant("ours"), [0.001, 0.002, 0.003], [0.001, 0.001, 0.001], queue_host=[2.0, 2.0, 0.1])
    case = timing.case_rows(SHAPES, [yard, ours], [1e-3, 2e-3, 4e-3], 10**6)
    assert (case["tensors"], case["numel"]) == (2, NUMEL)
    assert case["copy"]["gb_s"] == pytest.approx(2 * 10**6 / 2e-3 / 1e9)
    first, second = case["rows"]
    assert (first["step_ratio"], first["queued_ratio"], first["yardstick"]) == (1.0, 1.0, f"{FUSED} fp32")
    assert second["step_ms"] == pytest.approx(2.0)
    assert second["host_ms"] == pytest.approx(1.0)
    assert second["step_ratio"] == pytest.approx(2 / 3)
    assert (second["step_ratio_p5"], second["step_ratio_p95"]) == pytest.approx((0.5, 0.95))
    assert second["queued_ratio"] == pytest.approx(0.5)
    assert (first["waits"], second["waits"]) == (False, True)
    # 12 bytes of parameter and gradient and 16 of state, in the kernels' own time.
    assert first["moved_bytes"] == 28
    assert first["gb_s"] == pytest.approx(28 * NUMEL / 2e-3 / 1e9)
    assert first["copy_share"] == pytest.approx(first["gb_s"] / case["copy"]["gb_s"])
    assert (first["state"], first["least_state"], second["state"]) == (8.0, 8.0, None)

    title, header, rows = case_table({"size": "one", "precision": "fp32", "left_out": [], **case})
    assert title == f"one tensor, fp32: 2 tensors, {NUMEL} parameters"
    cells = dict(zip(header, rows[0], strict=False))
    assert (cells["peak extra (MiB)"], cells["bytes moved"], cells["waits"]) == (1.0, 28.0, "no")
    assert rows[1][header.index("state")] == "-"
    assert all(len(row) == len(header) for row in rows)


def test_times_of_a_clock_without_a_queue() -> None:
    yard = entrant(contestant(FUSED), [0.002, 0.002])
    captured = entrant(contestant("graph", captured=True), [0.001, 0.001])
    first, second = timing.case_rows(SHAPES, [yard, captured], [1e-3], 1000)["rows"]
    assert first["queued_ms"] is None
    assert first["gb_s"] == pytest.approx(28 * NUMEL / 2e-3 / 1e9)
    # Its yardstick, torch's captured step, is not in the case.
    assert (second["yardstick"], second["step_ratio"], second["queued_ratio"]) == (None, None, None)


def test_who_fails_or_is_slow_is_left_out(monkeypatch: pytest.MonkeyPatch) -> None:
    calls = {"late": 0}

    class Late:
        def step(self) -> None:
            calls["late"] += 1
            if calls["late"] > timing.WARM_STEPS["cpu"] + 1:
                raise RuntimeError("in the middle")

    def broken(params: list[Parameter]) -> Steps:
        raise RuntimeError("at once")

    field = [contestant("fine"), contestant("late", lambda _: Late()), contestant("broken", broken)]
    case = timing.time_case(field, SHAPES, timing.Clock(CPU), Plan(3, 1.0, 3), 1 << 12)
    assert [row["label"] for row in case["rows"]] == ["fine fp32"]
    assert case["rows"][0]["rounds"] == 3
    assert [(row["label"], row["status"]) for row in case["left_out"]] == [
        ("late fp32", "not available: RuntimeError: in the middle"),
        ("broken fp32", "not available: RuntimeError: at once"),
    ]
    monkeypatch.setattr(timing, "SLOW_STEP", -1.0)
    case = timing.time_case(field[:1], SHAPES, timing.Clock(CPU), Plan(1, 1.0, 1), 1 << 12)
    assert [row["status"][:21] for row in case["left_out"]] == ["left out: a step take"]
    monkeypatch.setattr(timing.Clock, "free", lambda self: 1e6)
    wide = Contestant("wide", "fp32", lambda _: Idle(), per_element(1000))
    case = timing.time_case([wide], SHAPES, timing.Clock(CPU), Plan(1, 1.0, 1), 1 << 12)
    assert [row["status"] for row in case["left_out"]] == ["left out: 0.0 GB needed of 0.0 GB"]


def test_gradients_are_drawn_anew_in_place() -> None:
    arena = timing.Arena(SHAPES, torch.bfloat16, timing.Clock(CPU))
    grads = [param.grad for param in arena.params]
    before = [None if grad is None else grad.clone() for grad in grads]
    arena.fresh_gradients()
    for param, grad, old in zip(arena.params, grads, before, strict=True):
        assert grad is not None
        assert old is not None
        assert param.grad is grad
        assert (grad != old).float().mean() > 0.9
        assert grad.count_nonzero() > 0.9 * grad.numel()  # torch 2.11 draws a bfloat16 zero now and then


# ---------------------------------------------------------------- the whole run


def run(output: Path, *arguments: str) -> dict[str, Any]:
    command = [sys.executable, "-m", "benchmarks.bench_gpu", "--quick", "--output", str(output), *arguments]
    result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=280, check=False)
    assert result.returncode == 0, result.stderr
    data: dict[str, Any] = json.loads((output / "gpu.json").read_text())
    text = (output / "gpu.md").read_text()
    assert text.startswith(page(data))
    assert "quick run" in text
    return data


def test_quick_run_on_the_cpu(tmp_path: Path) -> None:
    data = run(tmp_path, "--device", "cpu", "--only", OURS)
    assert data["card"] == {"device": "cpu"}
    assert [(case["size"], case["precision"]) for case in data["cases"]] == [
        (size, precision) for size in QUICK.shapes for precision in contestants.PRECISIONS
    ]
    statuses = {row["label"]: row["status"] for row in data["contestants"]}
    assert statuses[f"{contestants.OURS_GRAPH} bf16"].endswith("CUDA graphs need a CUDA device")
    for case in data["cases"]:
        labels = [row["label"] for row in case["rows"]]
        assert labels[:2] == [f"{FUSED} {case['precision']}", f"{OURS} {case['precision']}"]
        for row in case["rows"]:
            assert row["step_p5"] <= row["step_ms"] <= row["step_p95"]
            assert len(row["samples"]["idle"]) == row["rounds"] >= 2


def test_time_that_is_over_is_said(tmp_path: Path) -> None:
    data = run(tmp_path, "--device", "cpu", "--only", FUSED, "--sizes", "one", "--seconds", "0")
    assert data["cases"] == []
    assert data["not_run"] == ["one fp32", "one bf16"]
    assert "the time was over: one fp32, one bf16" in (tmp_path / "gpu.md").read_text()


@pytest.mark.gpu
def test_quick_run_on_the_gpu(tmp_path: Path) -> None:
    data = run(tmp_path, "--device", "cuda", "--compiled", "")
    statuses = {row["label"]: row["status"] for row in data["contestants"]}
    for precision in contestants.PRECISIONS:
        assert statuses[f"{FUSED} {precision}"] == statuses[f"{contestants.FUSED_GRAPH} {precision}"] == "timed"
    assert len(data["cases"]) == 8
    for case in data["cases"]:
        for row in case["rows"]:
            assert row["queued_ms"] > 0
            assert row["peak_extra_bytes"] is not None or "graph" in row["label"]
