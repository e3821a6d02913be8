"""Profiles: parts that add up, bits that stay, and what is written."""

from __future__ import annotations

import importlib
import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import lowmem_adam
from lowmem_adam import AdamW8bit, kernels, profiling, step_in_backward
from lowmem_adam.profiling import Profile, StepRecord
from tests import profile_cases, sim_device
from tests.cases import FEW, SHAPES, assert_same_bits, everything, make_params, params_of, set_gradients, train
from tests.profile_checks import check_sums, check_trace
from tests.ranks import NEEDS_GLOO, on_ranks
from tests.sim_device import running

REASON = sim_device.why_unavailable()


def optimizer(dtype: torch.dtype = torch.float32, **keywords: Any) -> AdamW8bit:
    return AdamW8bit(make_params(FEW, dtype), lr=1e-2, **keywords)


def profiled(steps: int = 6, **keywords: Any) -> Profile:
    opt = optimizer(**keywords)
    with lowmem_adam.profile(opt) as prof:
        train(opt, params_of(opt), steps)
    return prof


# ---------------------------------------------------------------- records


@pytest.mark.parametrize("moments", ["8bit", "32bit", "bnb8bit"])
@pytest.mark.parametrize("offload", [None, "cpu"])
def test_parts_add_up(moments: str, offload: str | None) -> None:
    prof = profiled(moments=moments, offload=offload)
    check_sums(prof.records)
    assert len(prof.records) == 6
    for record in prof.records:
        assert record.step_ns > 0
        assert record.check_ns > 0
        assert record.gather_ns == 0
    assert all(record.transfer_ns == 0 for record in prof.records) == (offload is None)


@pytest.mark.parametrize("moments", ["8bit", "32bit"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_bits_are_those_of_a_run_without_it(moments: str, dtype: torch.dtype) -> None:
    runs = []
    for watched in (True, False):
        params = make_params(SHAPES, dtype)
        opt = AdamW8bit(params, lr=1e-2, moments=moments)
        train(opt, params, 2)
        if watched:
            with lowmem_adam.profile(opt) as prof:
                train(opt, params, 6, start=2)
            assert opt._stepper._repeat is not None, "a profile keeps steps from being repeated"
            check_sums(prof.records)
        else:
            train(opt, params, 6, start=2)
        train(opt, params, 2, start=8)
        runs.append(everything(opt))
    assert_same_bits(runs[0], runs[1])


def test_bytes_of_state_by_kind() -> None:
    prof = profiled()
    report = prof._optimizer.memory_report()
    for record in prof.records:
        assert record.bytes == report["bytes"]
    summary = prof.summary()
    assert summary["bytes"] == report["bytes"]
    assert sum(summary["bytes"].values()) == summary["total_bytes"] == report["total_bytes"]
    for name in ("parameters", "bytes_per_parameter", "pinned_bytes", "gradient_bytes"):
        assert summary[name] == report[name]


class Clock:
    """Time that passes only where a test lets it."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.now = 1_000_000
        monkeypatch.setattr(profiling, "perf_counter_ns", lambda: self.now)

    def passing(self, nanoseconds: int, call: Callable[..., Any]) -> Callable[..., Any]:
        """The call, which then takes so long."""

        def slower(*arguments: Any, **keywords: Any) -> Any:
            self.now += nanoseconds
            return call(*arguments, **keywords)

        return slower


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    return Clock(monkeypatch)


def test_each_part_gets_the_time_that_passes_in_it(clock: Clock, monkeypatch: pytest.MonkeyPatch) -> None:
    for name, backend in kernels.BACKENDS.items():
        monkeypatch.setitem(kernels.BACKENDS, name, clock.passing(7, backend))
    opt = optimizer()
    monkeypatch.setattr(opt, "_cut", clock.passing(300, opt._cut))
    monkeypatch.setattr(opt, "_use_up_gradients", clock.passing(20, opt._use_up_gradients))

    def closure() -> float:
        clock.now += 5000
        return 1.5

    with lowmem_adam.profile(opt) as prof:
        for step in range(5):
            set_gradients(params_of(opt), step)
            clock.now += 11
            assert opt.step(closure) == 1.5
            with prof.paused():
                clock.now += 10**6
                train(opt, params_of(opt), 1, start=100 + step)
            clock.now += 40_000
    assert len(prof.records) == 5
    for record in prof.records:
        parts = {"check": 300, "gather": 0, "step": 7, "transfer": 0, "other": 5020}
        assert record.parts_ns == parts
        assert record.total_ns == 5327
    assert [record.rest_ns for record in prof.records] == [None, 40_011, 40_011, 40_011, 40_011]
    assert prof.records[0].start_ns == 11
    summary = prof.summary()
    assert summary["steps"] == 5
    assert summary["first_step_s"] == 5327 / 1e9
    assert summary["total_s"] == {"sum": 4 * 5327 / 1e9, "median": 5327 / 1e9}
    assert summary["rest_s"] == {"sum": 4 * 40_011 / 1e9, "median": 40_011 / 1e9}
    assert summary["share_of_training"] == 5327 / (5327 + 40_011)
    for name, part in parts.items():
        assert summary["parts_s"][name] == {"sum": 4 * part / 1e9, "median": part / 1e9, "share": part / 5327}


def test_a_block_that_is_entered_again_goes_on(clock: Clock) -> None:
    opt = optimizer()
    prof = lowmem_adam.profile(opt)
    for block in range(2):
        with prof:
            train(opt, params_of(opt), 2, start=2 * block)
            clock.now += 100
        assert opt._stepper.listener is None
        train(opt, params_of(opt), 1)  # is not recorded
    assert [(record.step, record.rest_ns) for record in prof.records] == [(1, None), (2, 0), (3, None), (4, 0)]
    assert [record.start_ns for record in prof.records] == [0, 0, 100, 100]


def test_a_step_that_fails_or_is_left_out_has_no_record() -> None:
    opt = optimizer(nonfinite="error")
    params = params_of(opt)
    with lowmem_adam.profile(opt) as prof:
        train(opt, params, 2)
        set_gradients(params, 2)
        params[0].grad.view(-1)[0] = torch.inf  # type: ignore[union-attr]
        with pytest.raises(ValueError, match="not finite"):
            opt.step()
        assert len(prof.records) == 2
        opt.found_inf = torch.tensor(1.0)
        train(opt, params, 1)
        del opt.found_inf
        assert len(prof.records) == 2
        train(opt, params, 2, start=3)
    assert len(prof.records) == 4
    check_sums(prof.records)


def test_an_error_in_the_block_ends_the_profile() -> None:
    opt = optimizer()
    prof = lowmem_adam.profile(opt)

    def loop() -> None:
        with prof:
            train(opt, params_of(opt), 3)
            raise KeyError

    with pytest.raises(KeyError):
        loop()
    assert opt._stepper.listener is None
    assert prof.summary()["steps"] == 3


# ---------------------------------------------------------------- in other loops


class OfOthers:
    """As wrappers hold an optimizer."""

    def __init__(self, name: str, held: object) -> None:
        setattr(self, name, held)


def test_wrapped_optimizers_are_found() -> None:
    opt = optimizer()
    for wrapped in (OfOthers("optimizer", opt), OfOthers("_optimizer", OfOthers("optimizer", opt))):
        assert lowmem_adam.profile(wrapped)._optimizer is opt  # type: ignore[arg-type]


def test_lightnings_wrappers() -> None:
    core = pytest.importorskip("lightning.pytorch.core.optimizer")
    fabric = pytest.importorskip("lightning.fabric.wrappers")
    opt = optimizer()
    for wrapped in (core.LightningOptimizer(opt), fabric._FabricOptimizer(opt, None)):
        assert isinstance(wrapped, AdamW8bit)
        with lowmem_adam.profile(wrapped) as prof:
            assert opt._stepper.listener is prof
        assert opt._stepper.listener is None


def test_under_accelerate() -> None:
    accelerate = pytest.importorskip("accelerate")
    accelerator = accelerate.Accelerator(cpu=True, gradient_accumulation_steps=2)
    model = nn.Linear(64, 128)
    model, opt = accelerator.prepare(model, AdamW8bit(model.parameters()))
    with lowmem_adam.profile(opt) as prof:
        for _ in range(6):
            with accelerator.accumulate(model):
                accelerator.backward(model(torch.randn(4, 64)).square().mean())
                opt.step()
                opt.zero_grad()
    assert len(prof.records) == 3  # the wrapper leaves out every other one
    check_sums(prof.records)


def test_inside_of_a_compiled_function() -> None:
    opt = optimizer()

    @torch.compile(backend="eager", fullgraph=True)
    def step() -> None:
        opt.step()

    with lowmem_adam.profile(opt) as prof:
        for number in range(4):
            set_gradients(params_of(opt), number)
            step()
    alone = optimizer()
    train(alone, params_of(alone), 4)
    assert_same_bits(everything(opt), everything(alone))
    assert len(prof.records) == 4
    check_sums(prof.records)


def sharded_job(rank: int, folder: Path) -> dict[str, Any]:
    """Profiled or not, with small buckets, so that several gathers are on their way."""
    found: dict[str, Any] = {}
    for watched in (True, False):
        opt = optimizer(shard_group="world", bucket_cap_mb=2.0**-6)
        if watched:
            with lowmem_adam.profile(opt) as prof:
                train(opt, params_of(opt), 4)
            check_sums(prof.records)
            found["parts"] = [record.parts_ns for record in prof.records]
            found["gathers"] = sum(phase == "gather" for phase, _, _ in prof._segments[-1])
            found["buckets"] = len(opt._cut().buckets)
            found["about"] = {name: prof.as_dict()[name] for name in ("rank", "ranks")}
            found["bytes"] = prof.records[-1].bytes
            prof.chrome_trace(folder / f"trace_{rank}.json")
        else:
            train(opt, params_of(opt), 4)
        found[str(watched)] = {"params": [p.detach().clone() for p in params_of(opt)], "bytes": opt.memory_report()}
    return found


@NEEDS_GLOO
def test_sharded_steps(tmp_path: Path) -> None:
    ranks = on_ranks(2, sharded_job, tmp_path)
    alone = optimizer()
    train(alone, params_of(alone), 4)
    for rank, found in enumerate(ranks):
        assert_same_bits(found["True"], found["False"])
        assert_same_bits(found["True"]["params"], [param.detach() for param in params_of(alone)])
        assert found["about"] == {"rank": rank, "ranks": 2}
        assert found["bytes"] == found["True"]["bytes"]["bytes"]
        assert all(parts["gather"] > 0 and parts["transfer"] == 0 for parts in found["parts"])
        assert found["buckets"] >= 2
        assert found["gathers"] >= found["buckets"]
        trace = json.loads((tmp_path / f"trace_{rank}.json").read_text(encoding="utf-8"))
        assert {event["pid"] for event in trace["traceEvents"]} == {rank}


@pytest.fixture(scope="module")
def outcomes(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    return running.outcomes([profile_cases], tmp_path_factory.mktemp("sim") / "results.jsonl")


@pytest.mark.skipif(REASON is not None, reason=REASON or "")
@pytest.mark.parametrize("case", running.cases_of(profile_cases))
def test_on_the_simulated_device(outcomes: dict[str, str], case: str) -> None:
    failure = outcomes[running.full_name(profile_cases, case)]
    assert not failure, failure


# ---------------------------------------------------------------- what is written


def test_export_is_what_was_recorded(tmp_path: Path) -> None:
    prof = profiled(low_precision_update="nearest")
    prof.export(tmp_path / "profile.json")
    written = json.loads((tmp_path / "profile.json").read_text(encoding="utf-8"))
    assert written["format"] == "lowmem_adam.profile"
    assert written["version"] == 1
    assert written["optimizer"] == "AdamW8bit"
    assert written["settings"]["moments"] == "8bit"
    assert written["settings"]["low_precision_update"] == "nearest"
    assert written["summary"] == prof.summary()
    assert [StepRecord(**record) for record in written["records"]] == prof.records


def test_chrome_trace(tmp_path: Path) -> None:
    prof = profiled()
    prof.chrome_trace(tmp_path / "trace.json")
    check_trace(json.loads((tmp_path / "trace.json").read_text(encoding="utf-8")), prof.records)


def test_without_a_trace_no_phase_is_kept(tmp_path: Path) -> None:
    opt = optimizer()
    with lowmem_adam.profile(opt, trace=False) as prof:
        train(opt, params_of(opt), 2)
    assert prof._segments == []
    check_sums(prof.records)
    with pytest.raises(RuntimeError, match="accepted: profile\\(optimizer, trace=True\\)"):
        prof.chrome_trace(tmp_path / "trace.json")
    assert not (tmp_path / "trace.json").exists()


def pixels(path: Path) -> Tensor:
    image = pytest.importorskip("matplotlib.image")
    return torch.from_numpy(image.imread(path))


def test_plot(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    pictures = []
    for steps in (1, 6):  # one step has no rest
        prof = profiled(steps, offload="cpu")
        prof.plot(tmp_path / "profile.png")
        assert (tmp_path / "profile.png").read_bytes().startswith(b"\x89PNG\r\n\x1a\n")
        pictures.append(pixels(tmp_path / "profile.png"))
        for colour in ((0x56, 0xB4, 0xE9), (0x00, 0x72, 0xB2)):  # check, step
            wanted = torch.tensor(colour, dtype=torch.float32) / 255
            assert bool(((pictures[-1][..., :3] - wanted).abs() < 0.01).all(-1).any())
    assert not torch.equal(pictures[0], pictures[1])


# ---------------------------------------------------------------- what is refused


def test_the_name_is_the_functions() -> None:
    """However often its module is imported."""
    module = importlib.import_module("lowmem_adam.profile")
    from lowmem_adam import profile

    assert profile is lowmem_adam.profile is module.profile
    assert module is sys.modules["lowmem_adam.profile"]
    assert "profile" in lowmem_adam.__all__


def test_who_profiles_nothing_does_not_load_it() -> None:
    program = "import sys, lowmem_adam; assert callable(lowmem_adam.profile); print(*sys.modules)"
    loaded = subprocess.run([sys.executable, "-c", program], check=True, capture_output=True, text=True).stdout.split()
    assert "lowmem_adam.profile" in loaded
    assert not {"lowmem_adam.profiling", "lowmem_adam.profile_plot", "matplotlib"} & set(loaded)


def test_what_is_refused(tmp_path: Path) -> None:
    model = nn.Linear(64, 128)
    with pytest.raises(TypeError, match="optimizer is a AdamW; accepted: Adam8bit, AdamW8bit"):
        lowmem_adam.profile(torch.optim.AdamW(model.parameters()))  # type: ignore[arg-type]
    opt = AdamW8bit(model.parameters())
    with lowmem_adam.profile(opt) as prof:
        with pytest.raises(RuntimeError, match="being profiled already; accepted: one profile at a time"):
            lowmem_adam.profile(opt).__enter__()
        with pytest.raises(RuntimeError, match="is being profiled, which sees step\\(\\) alone"):
            step_in_backward(model, opt)
        assert opt._stepper.listener is prof
    with step_in_backward(model, opt), pytest.raises(RuntimeError, match="accepted: remove\\(\\) of its handle first"):
        prof.__enter__()
    assert opt._stepper.listener is None
    path = tmp_path / "nothing"
    for call in (prof.summary, *(lambda to=to: to(path) for to in (prof.export, prof.chrome_trace, prof.plot))):
        with pytest.raises(
            RuntimeError, match="no step was recorded; accepted: a block in which step\\(\\) was called"
        ):
            call()
    assert not path.exists()
