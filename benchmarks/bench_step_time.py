"""How long a step takes, how much memory it moves and how much it needs, against other optimizers on the CPU.

    python -m benchmarks.bench_step_time [--quick] [--seconds 420]

Every contestant first has to follow the textbook Adam in float64. Those that are compared take turns within one run,
in another order every round; figures are medians over rounds, of which there are fewer
where the time runs out, but never fewer than five. LOWMEM_ADAM_ISA pins our instruction set.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Annotated, Any

import torch
import typer

from benchmarks import harness
from benchmarks.growth import GROWTH_HEADER, growth, growth_row
from benchmarks.step_contestants import (
    BITSANDBYTES,
    DEEPSPEED,
    FOREACH,
    FUSED,
    OURS,
    OURS_32BIT,
    TORCHAO,
    Contestant,
    Shape,
    count,
    gpt2_shapes,
    installed_peers,
    one_tensor,
    own_and_torch,
    validate,
)
from benchmarks.step_plot import plot
from benchmarks.step_probe import run_probe
from benchmarks.step_timing import Entry, Plan, ratio, time_field, yardstick
from lowmem_adam.kernels import cpu

FUSED_TARGET = {"avx512": 0.60, "avx2": 0.90}  # fp32, by instruction set
BF16_TARGET, EXACT_TARGET, CACHED_TARGET, MANY_TENSORS_TARGET = 0.70, 1.05, 1.0, 1.10
PEER_TARGETS = {DEEPSPEED: 0.62, BITSANDBYTES: 1 / 40, TORCHAO: 1 / 40}
BANDWIDTH_TARGET, FIRST_STEP_TARGET = 0.85, 3.0
BEYOND_CACHES = 9_000_000  # parameters, whose least bytes (ours in bf16: 6 each) no cache holds
TIME_EXPONENT = 0.1
"""How far from 1 the exponent of a step's growth may be to be called linear. n log n, at 1.07, is not told from it."""
MIB = 1 << 20
EXTRA_MIB_TARGET = 1.0  # a thread
ALONE = "one tensor"
LEAST_PROBES = 3
VALIDATION_TITLE = "Validation: error of the displacement against float64 Adam (4-bit and fp8: of coded moments)"

Table = tuple[str, list[str], list[list[harness.Cell]]]


@dataclass(frozen=True)
class Size:
    """How much to run; the quick one is for trying the benchmark out, its figures are not quoted."""

    main: int = 1 << 25
    cached: int = 1 << 18
    sweep: tuple[int, ...] = (10**4, 10**5, 1 << 18, 10**6, 10**7, 1 << 25, 10**8, 250 * 10**6)
    gpt2: Sequence[Shape] = field(default_factory=gpt2_shapes)
    stream: int = 1 << 26  # 268 MB an array: far more than any cache
    plan: Plan = field(default_factory=Plan)
    probes: int = 5
    main_share: float = 0.2
    """Of the time that is left when a field begins, for its rounds; so are the next two."""
    sweep_share: float = 0.03
    gpt2_share: float = 0.12

    def plan_until(self, end: float, share: float) -> Plan:
        """The plan, in a share of what is left of the time; its least number of rounds is timed in any case."""
        left = max(end - time.perf_counter(), 0.0)
        return replace(self.plan, seconds=min(self.plan.seconds, share * left))


QUICK = Size(
    main=1 << 17,
    cached=1 << 14,
    sweep=(10**4, 1 << 14, 1 << 17),
    gpt2=gpt2_shapes(layers=2, width=64, vocabulary=512, context=64),
    stream=1 << 20,
    plan=Plan(rounds=3, seconds=2.0, least=2, sample_seconds=1e-3),
    probes=1,
)


def native() -> dict[str, Any]:
    """What the native backend says of itself, files by their names; why not, where the reference computes the step."""
    try:
        told = cpu.describe()
    except cpu.LibraryError as problem:
        return {"unavailable": str(problem)}
    return {key: Path(value).name if isinstance(value, str) else value for key, value in told.items()}


def measure_times(timed: Sequence[Contestant], size: Size, end: float) -> dict[str, Any]:
    """The fields: all contestants at the main size, ours and torch fused over sizes, GPT-2's tensors."""
    everywhere = [c for c in timed if c.name in (OURS, FUSED)]
    everyone = [Entry(c, one_tensor(size.main)) for c in timed]
    main = time_field(everyone, size.plan_until(end, size.main_share), size.stream)
    sweep = {}
    for numel in size.sweep:
        entries = [Entry(c, one_tensor(numel)) for c in everywhere]
        sweep[str(numel)] = time_field(entries, size.plan_until(end, size.sweep_share))
    many = [Entry(c, size.gpt2) for c in timed if c.name in (OURS, FUSED, FOREACH, DEEPSPEED)]
    width = size.gpt2[0][1]
    alone = [Entry(c, [(count(size.gpt2) // width, width)], ALONE) for c in everywhere if c.dtype == torch.float32]
    gpt2 = time_field([*many, *alone], size.plan_until(end, size.gpt2_share))
    return {"main": main, "sweep": sweep, "gpt2": gpt2}


def time_growth(sweep: dict[str, Any]) -> dict[str, dict[str, Any]]:
    """Fits of a step's seconds over all sizes and over those beyond the caches, where there are three or more."""
    rows = [row for field_ in sweep.values() for row in field_["times"]]
    out: dict[str, dict[str, Any]] = {}
    for label in dict.fromkeys(row["label"] for row in rows):
        for sizes, least in (("all", 0), ("beyond caches", BEYOND_CACHES)):
            found = [row for row in rows if row["label"] == label and row["numel"] >= least]
            if len(found) >= 3:
                numels = [row["numel"] for row in found]
                seconds = [row["ns"] * row["numel"] * 1e-9 for row in found]
                fitted = growth(numels, seconds, TIME_EXPONENT, with_constant=sizes == "all")
                out.setdefault(label, {})[sizes] = fitted
    return out


def measure_probes(timed: Sequence[Contestant], size: Size, peers: bool, end: float) -> list[dict[str, Any]]:
    """First step and memory: ours and torch's fused in several processes, in three if time is over, others in one."""
    chosen = [c for c in timed if c.name in (OURS, FUSED) or (peers and c.dtype == torch.float32)]
    rows = []
    for contestant in chosen:
        times = size.probes if contestant.name in (OURS, FUSED) else 1
        runs: list[dict[str, Any]] = []
        while len(runs) < times and (len(runs) < LEAST_PROBES or time.perf_counter() < end):
            runs.append(run_probe(contestant, size.main, torch.get_num_threads()))
        steady = harness.median(s for run in runs for s in run["steady_seconds"])
        row: dict[str, Any] = {"label": contestant.label, "processes": len(runs), "steady_seconds": steady}
        for key in ("first_seconds", "second_first_seconds"):
            row[key] = harness.median(run[key] for run in runs)
        for key in ("peak_extra_bytes", "kept_extra_bytes"):
            found = [run[key] for run in runs if run[key] is not None]
            row[key] = max(found) if found else None
        rows.append(row | {"first_over_steady": row["first_seconds"] / steady})
    return rows


def bandwidth_shares(main: dict[str, Any]) -> dict[str, float]:
    """Bytes that a step has to move over its time, as a share of the same run's bandwidth."""
    measure = yardstick(main["bandwidth"])
    return {row["label"]: row["gb_s"] / measure[1] for row in main["times"] if row["gb_s"]} if measure else {}


# A measured ratio (or None), the most it may be, and what to say where there is none.
Check = tuple[str, float | None, float | None, str]


def ratio_checks(data: dict[str, Any]) -> list[Check]:
    times = data["times"]
    main, cached = times["main"]["times"], times["sweep"][str(data["cached"])]["times"]
    ours, fused = f"{OURS} fp32", f"{FUSED} fp32"
    absent = {row["name"]: row["status"] for row in data["contestants"] if row["status"] != "timed"}
    wanted = [
        ("fp32 / torch fused", main, ours, fused, data["fused_target"]),
        ("bf16 / torch fused bf16", main, f"{OURS} bf16", f"{FUSED} bf16", BF16_TARGET),
        ('moments="32bit" / torch fused', main, f"{OURS_32BIT} fp32", fused, EXACT_TARGET),
        ("in the caches / torch fused", cached, ours, fused, CACHED_TARGET),
        ("GPT-2's tensors / one", times["gpt2"]["times"], ours, f"{ours}, {ALONE}", MANY_TENSORS_TARGET),
        *((f"fp32 / {name}", main, ours, f"{name} fp32", limit) for name, limit in PEER_TARGETS.items()),
    ]
    out: list[Check] = []
    for check, field_, label, to, limit in wanted:
        found = ratio(field_, label, to)
        out.append((check, found["of_medians"] if found else None, limit, absent.get(to, "not measured")))
    return out


def verdicts(data: dict[str, Any]) -> list[dict[str, Any]]:
    """The targets for our optimizer; `met` is None where there is nothing to judge."""
    rows = [
        {"check": check, "measured": absent if got is None else got, "target": f"<= {limit:.4g}" if limit else "none"}
        | {"met": None if got is None or limit is None else got <= limit}
        for check, got, limit, absent in ratio_checks(data)
    ]
    ours = f"{OURS} fp32"
    share = data["bandwidth_shares"].get(ours, 0.0)
    rows.append({"check": "bytes moved / bandwidth", "measured": share, "target": f">= {BANDWIDTH_TARGET}"})
    rows[-1]["met"] = share >= BANDWIDTH_TARGET
    probe = next(row for row in data["probes"] if row["label"] == ours)
    first, extra = probe["first_over_steady"], probe["peak_extra_bytes"]
    rows.append({"check": "first step / steady", "measured": first, "target": f"<= {FIRST_STEP_TARGET:g}"})
    rows[-1]["met"] = first <= FIRST_STEP_TARGET
    mib = None if extra is None else extra / MIB / data["threads"]
    rows.append({"check": "extra memory (MiB a thread)", "target": f"< {EXTRA_MIB_TARGET:g}"})
    rows[-1] |= {
        "measured": "not measured" if mib is None else mib,
        "met": None if mib is None else mib < EXTRA_MIB_TARGET,
    }
    return rows


def time_table(title: str, field_: dict[str, Any], yardstick_of: str) -> Table:
    header = ["optimizer", "tensors", "parameters", "ns/parameter", "5%", "95%", "rounds"]
    header += [f"ratio to {yardstick_of}, of medians", "median of rounds", "ratio 5%", "ratio 95%"]
    rows: list[list[harness.Cell]] = []
    for row in field_["times"]:
        dtype = row["label"].removeprefix(row["name"]).split(",")[0]
        found = ratio(field_["times"], row["label"], yardstick_of + dtype)
        ratios = list(found.values()) if found else ["-"] * 4
        times = [row[key] for key in ("label", "tensors", "numel", "ns", "p5", "p95")]
        rows.append([*times, len(row["rounds"]), *ratios])
    if "skipped" in field_:
        rows.append([f"left out: needs {field_['skipped']}", *["-"] * (len(header) - 1)])
    return title, header, rows


def sweep_table(data: dict[str, Any]) -> Table:
    rows: list[list[harness.Cell]] = []
    for field_ in data["times"]["sweep"].values():
        rows += time_table("", field_, FUSED)[2]
    header = time_table("", {"times": []}, FUSED)[1]
    return "One tensor, by size", header, rows


def growth_table(data: dict[str, Any]) -> Table:
    """In ns: what a parameter takes, and what a step of none would."""
    rows = [
        growth_row(label, sizes, fitted, scale=1e9)
        for label, found in data["growth"].items()
        for sizes, fitted in found.items()
    ]
    return "Growth of a step's time: ns = constant + ns a parameter * n", GROWTH_HEADER, rows


def bandwidth_table(data: dict[str, Any]) -> Table:
    main = data["times"]["main"]
    rows: list[list[harness.Cell]] = []
    best = yardstick(main["bandwidth"])
    for row in main["bandwidth"]:
        used = best is not None and row["name"] == best[0]
        counted = [row[key] for key in ("gb_s", "p5", "p95", "allocating_gb_s")]
        rows.append([row["name"] + (" (the yardstick)" if used else ""), "12", *counted, "1" if used else "-"])
    for row in main["times"]:
        if row["moved_bytes"]:
            low, high = (row["moved_bytes"] / row[key] for key in ("p95", "p5"))
            share = data["bandwidth_shares"][row["label"]]
            rows.append([row["label"], f"{row['moved_bytes']:.2f}", row["gb_s"], low, high, "-", share])
    title = (
        "Bytes that have to be moved, over time; yardstick: the better of triad and in-place add, stores' reads counted"
    )
    return title, ["what", "bytes/element", "GB/s", "5%", "95%", "with stores' reads", "share of yardstick"], rows


def probe_table(data: dict[str, Any]) -> Table:
    header = ["optimizer", "processes", "first step (ms)", "second optimizer's first (ms)", "steady (ms)"]
    header += ["first / steady", "peak extra of a step (MiB)", "kept besides state (MiB)"]
    rows: list[list[harness.Cell]] = []
    for row in data["probes"]:
        times = [1e3 * row[key] for key in ("first_seconds", "second_first_seconds", "steady_seconds")]
        sizes = [row[key] for key in ("peak_extra_bytes", "kept_extra_bytes")]
        mib: list[harness.Cell] = ["not measured" if size is None else size / MIB for size in sizes]
        rows.append([row["label"], row["processes"], *times, row["first_over_steady"], *mib])
    return "First step and extra memory, each in its own process", header, rows


def tables(data: dict[str, Any]) -> list[Table]:
    answers = {True: "yes", False: "NO", None: "not judged"}
    checks = [[v["check"], v["measured"], v["target"], answers[v["met"]]] for v in data["verdicts"]]
    keys = ("name", "error", "tolerance", "status")
    valid = [["-" if row[key] is None else row[key] for key in keys] for row in data["contestants"]]
    return [
        ("Targets", ["check", "measured", "target", "met"], checks),
        time_table(f"All contestants, one tensor of {data['main']} parameters", data["times"]["main"], FUSED),
        sweep_table(data),
        growth_table(data),
        time_table("GPT-2 small's tensors, and one tensor of their size", data["times"]["gpt2"], FUSED),
        bandwidth_table(data),
        probe_table(data),
        (VALIDATION_TITLE, ["optimizer", *keys[1:]], valid),
    ]


def measure(size: Size, quick: bool, peers: bool, seconds: float) -> dict[str, Any]:
    end = time.perf_counter() + seconds
    contestants = [*own_and_torch(), *(installed_peers() if peers else [])]
    checked = [validate(contestant) for contestant in contestants]
    timed = [c for c, row in zip(contestants, checked, strict=True) if row["status"] == "timed"]
    backend = native()
    data: dict[str, Any] = {"quick": quick, "threads": torch.get_num_threads(), "native": backend}
    data |= {"main": size.main, "cached": size.cached, "fused_target": fused_target(backend)}
    data |= {"contestants": checked, "times": measure_times(timed, size, end)}
    data["growth"] = time_growth(data["times"]["sweep"])
    data |= {"probes": measure_probes(timed, size, peers, end)}
    data["bandwidth_shares"] = bandwidth_shares(data["times"]["main"])
    return data | {"verdicts": verdicts(data)}


def fused_target(backend: dict[str, Any]) -> float | None:
    """By the instruction set in use; where nothing native runs, the lenient one is missed rather than not judged."""
    return FUSED_TARGET.get(backend["isa"]) if "isa" in backend else max(FUSED_TARGET.values())


def main(
    quick: Annotated[bool, typer.Option(help="A short version, to see that everything runs.")] = False,
    output: Annotated[Path, typer.Option(help="Folder for the JSON, Markdown and PNG files.")] = harness.RESULTS,
    name: Annotated[str, typer.Option(help="Name of the files, for runs with another instruction set.")] = "step_time",
    threads: Annotated[int, typer.Option(help="Threads of all contestants; 0 takes torch's number.", min=0)] = 0,
    peers: Annotated[bool | None, typer.Option(help="Time other packages' optimizers; default: not if quick.")] = None,
    seconds: Annotated[float, typer.Option(help="Time for all of it, about; at least five rounds are timed.")] = 420.0,
) -> None:
    """Measure the time of a step; ends with 1 if ours misses a target at full size."""
    if threads:
        torch.set_num_threads(threads)
    data = measure(QUICK if quick else Size(), quick, not quick if peers is None else peers, seconds)
    backend = data["native"].get("isa", "none, the reference ran")
    pages = ["# Time of a step" + (" (quick run, not to be quoted)" if quick else "")]
    pages.append(f"{data['threads']} threads; our native kernel's instruction set: {backend}.")
    for title, header, rows in tables(data):
        harness.print_table(title, header, rows)
        pages.append(f"## {title}\n\n{harness.markdown_table(header, rows)}")
    path = harness.write_results(name, data, "\n\n".join(pages), output)
    plot(data, path.with_suffix(".png"))
    if not quick and any(v["met"] is False for v in data["verdicts"]):
        raise typer.Exit(1)


if __name__ == "__main__":
    typer.run(main)
