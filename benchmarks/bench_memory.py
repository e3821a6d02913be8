"""What an optimizer holds, what its step takes besides, and what its checkpoints weigh, against others and over sizes.

    python -m benchmarks.bench_memory [--quick] [--only lowmem] [--seconds 270]

The contestants are those of the step-time benchmark and our other settings; every one first has to follow the textbook
Adam in float64. Each is measured in a process of its own over sizes, those above the main one until its part of the
time is over. Then all of them save and load a checkpoint in turns, in another order every round.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any

import torch
import typer

from benchmarks import harness
from benchmarks.bench_step_time import VALIDATION_TITLE, native
from benchmarks.checkpoint_timing import time_checkpoints
from benchmarks.growth import GROWTH_HEADER, growth, growth_row
from benchmarks.memory_probe import all_contestants, run_probe
from benchmarks.step_contestants import FUSED, OURS, Contestant, validate
from benchmarks.step_timing import Plan

STATE_TARGET, FILE_TARGET = 2.05, 2.05  # bytes a parameter, at the main size
EXTRA_MIB_TARGET = 1.0  # a thread
STATE_EXPONENT = 0.005
"""How far from 1 the exponent of a state's growth may be; a constant of some bytes is fitted beside it."""
LARGEST_PARTS = 3  # of the time, for those whose largest sizes matter most: ours and torch's fused step
MIB = 1 << 20

Table = tuple[str, list[str], list[list[harness.Cell]]]


@dataclass(frozen=True)
class Size:
    """How much to run; the quick one is for trying the benchmark out."""

    main: int = 1 << 25
    numels: tuple[int, ...] = (10**4, 10**5, 10**6, 10**7, 1 << 25, 10**8, 250 * 10**6)
    plan: Plan = field(default_factory=lambda: Plan(rounds=7, seconds=60.0, least=5))
    probes_share: float = 0.75
    """Of the time, for what is measured in processes of their own."""


QUICK = Size(main=1 << 18, numels=(10**4, 10**5, 1 << 18, 10**6), plan=Plan(rounds=3, seconds=2.0, least=2))


def measure_probes(
    chosen: Sequence[Contestant], size: Size, seconds: float, together: bool
) -> dict[str, list[dict[str, Any]]]:
    """Rows over sizes by label. What one leaves of its part of the time is for those after it, slow peers too."""
    if together:
        return run_probe(chosen, size.numels, size.main, torch.get_num_threads(), seconds)
    end = time.perf_counter() + seconds
    found: dict[str, list[dict[str, Any]]] = {}
    parts = [LARGEST_PARTS if contestant.name in (OURS, FUSED) else 1 for contestant in chosen]
    for position, contestant in enumerate(chosen):
        part = max(end - time.perf_counter(), 0.0) * parts[position] / sum(parts[position:])
        found |= run_probe([contestant], size.numels, size.main, torch.get_num_threads(), part)
    return found


def state_growth(probes: dict[str, list[dict[str, Any]]]) -> dict[str, Any]:
    """Fits of the state's bytes, of those who were measured at three sizes or more."""
    out = {}
    for label, rows in probes.items():
        there = [row for row in rows if "left_out" not in row]
        if len(there) >= 3:
            numels, held = [row["numel"] for row in there], [row["state_bytes"] for row in there]
            out[label] = growth(numels, held, STATE_EXPONENT)
    return out


def at_main(data: dict[str, Any], label: str) -> dict[str, Any] | None:
    rows = [row for row in data["probes"].get(label, ()) if "left_out" not in row and row["numel"] == data["main"]]
    return rows[0] if rows else None


def verdicts(data: dict[str, Any]) -> list[dict[str, Any]]:
    """The targets for our optimizer; `met` is None where nothing could be measured."""
    out: list[dict[str, Any]] = []

    def judge(check: str, measured: float | None, target: float) -> None:
        met = None if measured is None else measured <= target
        told = "not measured" if measured is None else measured
        out.append({"check": check, "measured": told, "target": f"<= {target:g}", "met": met})

    for label in (f"{OURS} fp32", f"{OURS} bf16"):
        row = at_main(data, label)
        if row is None:
            continue
        judge(f"{label}: state, bytes a parameter", row["state_bytes"] / row["numel"], STATE_TARGET)
        judge(f"{label}: checkpoint, bytes a parameter", row["file_bytes"] / row["numel"], FILE_TARGET)
        extra = row["peak_extra_bytes"]
        mib = None if extra is None else extra / MIB / data["threads"]
        judge(f"{label}: extra memory of a step (MiB a thread)", mib, EXTRA_MIB_TARGET)
        rows = [found for found in data["probes"][label] if "left_out" not in found]
        other = sum(not found["same_bits"] for found in rows if "same_bits" in found)
        judge(f"{label}: sizes whose step after a load is another one", other, 0)
        if label in data["growth"]:
            off = abs(data["growth"][label]["exponent"] - 1)
            judge(f"{label}: exponent of the state's growth, minus 1", off, STATE_EXPONENT)
    return out


def size_table(data: dict[str, Any]) -> Table:
    header = ["optimizer", "parameters", "state (MiB)", "bytes/parameter", "peak extra of a step (MiB)"]
    header += [
        "extra, bytes/parameter",
        "file (MiB)",
        "file, bytes/parameter",
        "weights_only",
        "same bits after a load",
    ]
    rows: list[list[harness.Cell]] = []
    for label, found in data["probes"].items():
        for row in found:
            if "left_out" in row:
                rows.append([label, row["numel"], f"left out: {row['left_out']}", *["-"] * (len(header) - 3)])
                continue
            state, extra = row["state_bytes"], row["peak_extra_bytes"]
            unknown = "not measured"
            figures: list[harness.Cell] = [state / MIB, state / row["numel"]]
            figures += [unknown, unknown] if extra is None else [extra / MIB, extra / row["numel"]]
            if "file_bytes" in row:
                figures += [row["file_bytes"] / MIB, row["file_bytes"] / row["numel"]]
                figures += ["yes" if row[key] else "NO" for key in ("weights_only", "same_bits")]
            rows.append([label, row["numel"], *figures, *["-"] * (len(header) - 2 - len(figures))])
    return "One matrix, by size, each optimizer in its own process", header, rows


def checkpoint_table(data: dict[str, Any]) -> Table:
    header = ["optimizer", "parameters", "file (MiB)", "bytes/parameter", "save (ms)", "5%", "95%"]
    header += ["load (ms)", "5%", "95%", "rounds"]
    rows: list[list[harness.Cell]] = []
    for row in data["checkpoints"]["rows"]:
        times = [1e3 * row[f"{kind}_{key}"] for kind in ("save", "load") for key in ("seconds", "p5", "p95")]
        rows.append([row["label"], row["numel"], row["file_bytes"] / MIB, row["per_parameter"], *times, row["rounds"]])
    if "skipped" in data["checkpoints"]:
        rows.append([f"left out: {data['checkpoints']['skipped']}", *["-"] * (len(header) - 1)])
    return "A checkpoint: torch.save, and torch.load with load_state_dict, in memory kept of the file", header, rows


def tables(data: dict[str, Any]) -> list[Table]:
    answers = {True: "yes", False: "NO", None: "not judged"}
    checks = [[v["check"], v["measured"], v["target"], answers[v["met"]]] for v in data["verdicts"]]
    keys = ("name", "error", "tolerance", "status")
    valid = [["-" if row[key] is None else row[key] for key in keys] for row in data["contestants"]]
    fits = [growth_row(label, "all", fitted) for label, fitted in data["growth"].items()]
    return [
        ("Targets", ["check", "measured", "target", "met"], checks),
        size_table(data),
        ("Growth of the state: bytes = constant + bytes a parameter * n", GROWTH_HEADER, fits),
        checkpoint_table(data),
        (VALIDATION_TITLE, ["optimizer", *keys[1:]], valid),
    ]


def measure(chosen: Sequence[Contestant], size: Size, seconds: float, quick: bool) -> dict[str, Any]:
    end = time.perf_counter() + seconds
    checked = [validate(contestant) for contestant in chosen]
    there = [c for c, row in zip(chosen, checked, strict=True) if row["status"] == "timed"]
    data: dict[str, Any] = {"quick": quick, "threads": torch.get_num_threads(), "native": native()}
    data |= {"main": size.main, "contestants": checked}
    data["probes"] = measure_probes(there, size, (end - time.perf_counter()) * size.probes_share, quick)
    # Those that the main size was too large for would take as long here.
    fit = [c for c in there if at_main(data, c.label) is not None]
    left = max(end - time.perf_counter(), 0.0)
    plan = Plan(size.plan.rounds, min(size.plan.seconds, left), size.plan.least)
    data["checkpoints"] = time_checkpoints(fit, size.main, plan)
    data["growth"] = state_growth(data["probes"])
    return data | {"verdicts": verdicts(data)}


def chosen_contestants(only: Sequence[str], peers: bool) -> list[Contestant]:
    """Those whose label contains one of the names, what is always there first."""
    known = [c for c in all_contestants() if peers or not c.optional]
    out = [c for c in known if not only or any(name.lower() in c.label.lower() for name in only)]
    if not out:
        raise typer.BadParameter(f"--only is {', '.join(only)}; accepted: parts of {', '.join(c.label for c in known)}")
    return out


def main(
    quick: Annotated[bool, typer.Option(help="A short version, to see that everything runs.")] = False,
    output: Annotated[Path, typer.Option(help="Folder for the JSON and Markdown files.")] = harness.RESULTS,
    threads: Annotated[int, typer.Option(help="Threads of all contestants; 0 takes torch's number.", min=0)] = 0,
    peers: Annotated[
        bool | None, typer.Option(help="Other packages' optimizers as well; default: not if quick.")
    ] = None,
    only: Annotated[list[str] | None, typer.Option(help="Part of an optimizer's name; may be repeated.")] = None,
    seconds: Annotated[float, typer.Option(help="Time for all of it, about.", min=1.0)] = 270.0,
) -> None:
    """Measure state, a step's memory and checkpoints; ends with 1 if ours misses a target at full size."""
    if threads:
        torch.set_num_threads(threads)
    chosen = chosen_contestants(only or (), not quick if peers is None else peers)
    if quick and not only:
        chosen = [c for c in chosen if c.name in (OURS, FUSED) or c.optional]
    data = measure(chosen, QUICK if quick else Size(), seconds, quick)
    pages = ["# Memory and checkpoints" + (" (quick run, not to be quoted)" if quick else "")]
    pages.append(
        "State: bytes of the memory behind all tensors in `optimizer.state`. Extra: growth of the process's peak "
        "resident memory over a steady step. Files are written up to the main size; larger ones are left out where an "
        "optimizer's part of the time, or the memory, would not do."
    )
    for title, header, rows in tables(data):
        harness.print_table(title, header, rows)
        pages.append(f"## {title}\n\n{harness.markdown_table(header, rows)}")
    harness.write_results("memory", data, "\n\n".join(pages), output)
    if not quick and any(v["met"] is False for v in data["verdicts"]):
        raise typer.Exit(1)


if __name__ == "__main__":
    typer.run(main)
