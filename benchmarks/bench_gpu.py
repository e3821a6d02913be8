"""How long a step takes on a GPU, how much memory it moves and how much it needs, against other optimizers.

    python -m benchmarks.bench_gpu [--sizes 124m,one] [--only lowmem-adam --only bitsandbytes] [--quick] [--device cpu]

Every contestant first has to follow the textbook Adam in float64 on the device. Those of one case step the same
parameters in turns, in another order every round, with gradients drawn anew; what is not installed or does not run is
reported. Results are written after every case, so that a run that is ended keeps what it has measured. On the CPU, with
--quick, it shows that everything runs.
"""

from __future__ import annotations

import subprocess
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Annotated, Any

import torch
import typer

from benchmarks import harness
from benchmarks.gpu_contestants import PRECISIONS, Contestant, contestants, small_shapes, validate
from benchmarks.gpu_timing import Clock, time_case
from benchmarks.step_contestants import FUSED, Shape, gpt2_shapes
from benchmarks.step_timing import Plan
from lowmem_adam import kernels

MIB = 1 << 20
TITLES = {
    "124m": "GPT-2 small's tensors",
    "1.3b": "tensors of a GPT with 24 layers of width 2048",
    "one": "one tensor",
    "small": "small tensors, where launches count",
}

Table = tuple[str, list[str], list[list[harness.Cell]]]


@dataclass(frozen=True)
class Size:
    """How much to run; the quick one is for trying the benchmark out, its figures are not quoted."""

    shapes: Mapping[str, Sequence[Shape]] = field(
        default_factory=lambda: {
            "124m": gpt2_shapes(),
            "1.3b": gpt2_shapes(layers=24, width=2048),
            "one": [(1 << 17, 1 << 10)],
            "small": small_shapes(300),
        }
    )
    copy_bytes: int = 1 << 30
    plan: Plan = field(default_factory=lambda: Plan(rounds=30, seconds=8.0, least=7))


QUICK = Size(
    shapes={
        "124m": gpt2_shapes(layers=1, width=64, vocabulary=128, context=64),
        "1.3b": gpt2_shapes(layers=1, width=96, vocabulary=128, context=64),
        "one": [(64, 256)],
        "small": small_shapes(6),
    },
    copy_bytes=1 << 20,
    plan=Plan(rounds=3, seconds=1.0, least=2),
)


def card(device: torch.device) -> dict[str, Any]:
    """What a reader must know of the device; no more than its kind where it is the CPU."""
    if device.type != "cuda":
        return {"device": device.type}
    properties = torch.cuda.get_device_properties(device)
    told: dict[str, Any] = {"device": properties.name, "cuda": torch.version.cuda, "memory": properties.total_memory}
    told |= {
        "multiprocessors": properties.multi_processor_count,
        "capability": f"{properties.major}.{properties.minor}",
    }
    query = "driver_version,clocks.max.sm,clocks.max.mem,power.limit"
    try:
        answer = subprocess.run(
            ["nvidia-smi", f"--query-gpu={query}", "--format=csv,noheader"],
            check=True,
            capture_output=True,
            text=True,
            timeout=30,
        )
        told["nvidia_smi"] = dict(zip(query.split(","), answer.stdout.splitlines()[0].split(", "), strict=True))
    except (OSError, subprocess.SubprocessError) as problem:
        told["nvidia_smi"] = f"not available: {problem}"
    return told


def wanted(precision: str, only: Sequence[str]) -> list[Contestant]:
    """Those whose names are asked for, or all; torch's fused step always, since ratios are to it."""
    return [c for c in contestants(precision) if not only or c.name == FUSED or any(part in c.name for part in only)]


def case_title(case: Mapping[str, Any]) -> str:
    return f"{TITLES[case['size']]}, {case['precision']}: {case['tensors']} tensors, {case['numel']} parameters"


def case_table(case: Mapping[str, Any]) -> Table:
    header = ["optimizer", "ms a step", "5%", "95%", "ratio", "ratio 5%", "ratio 95%", "kernels alone (ms)", "ratio"]
    header += ["host (ms)", "waits", "bytes moved", "GB/s", "share of copy", "state", "least", "peak extra (MiB)"]
    keys = ["step_ms", "step_p5", "step_p95", "step_ratio", "step_ratio_p5", "step_ratio_p95"]
    keys += ["queued_ms", "queued_ratio", "host_ms"]
    rows: list[list[harness.Cell]] = []
    for row in case["rows"]:
        extra = row["peak_extra_bytes"]
        cells = [row["label"], *(row[key] for key in keys), "yes" if row["waits"] else "no"]
        cells += [row[key] for key in ("moved_bytes", "gb_s", "copy_share", "state", "least_state")]
        cells.append(None if extra is None else extra / MIB)
        rows.append(["-" if cell is None else cell for cell in cells])
    for row in case["left_out"]:
        rows.append([f"{row['label']}: {row['status']}", *["-"] * (len(header) - 1)])
    return case_title(case), header, rows


def shortened(table: Table) -> Table:
    """The columns that fit on a screen."""
    title, header, rows = table
    kept = [0, 1, 4, 7, 8, 9, 12, 13, 14, 16]
    return title, [header[i] for i in kept], [[row[i] for i in kept] for row in rows]


def validation_table(rows: Sequence[Mapping[str, Any]]) -> Table:
    keys = ("label", "error", "tolerance", "status")
    cells = [["-" if row[key] is None else row[key] for key in keys] for row in rows]
    return "Validation: error of the displacement against float64 Adam", ["optimizer", *keys[1:]], cells


def page(data: Mapping[str, Any]) -> str:
    """The results as Markdown."""
    told, backend = data["card"], data["backend"]
    where = told["device"] + (f", CUDA {told['cuda']}" if "cuda" in told else "")
    pages = ["# Time of a step on a GPU" + (" (quick run, not to be quoted)" if data["quick"] else "")]
    pages.append(
        f"On {where}; our backend: {backend}. Times are medians and quantiles over rounds. A step starts on an idle "
        "device, its launches included; *kernels alone* have been queued before they start. Ratios are to torch's "
        "fused step in the same case, for a captured step to torch's captured one. *Host* is the time until `step` "
        "returns, and *waits* says whether it waits for the device. Bytes are those of a parameter: what a step must "
        "read and write, its state as allocated, and the least that its format needs. GB/s and the share of the "
        "bandwidth of a copy (bytes read and written) are of the kernels alone. *Peak extra* is what a step takes "
        "above what is held; a graph's own pool is not counted."
    )
    for case in data["cases"]:
        title, header, rows = case_table(case)
        copy = case["copy"]
        pages.append(f"## {title}\n\n{harness.markdown_table(header, rows)}")
        pages.append(f"Copy: {copy['gb_s']:.0f} GB/s ({copy['p5']:.0f} to {copy['p95']:.0f}).")
    if data["not_run"]:
        pages.append(f"Not run, since the time was over: {', '.join(data['not_run'])}.")
    title, header, rows = validation_table(data["contestants"])
    pages.append(f"## {title}\n\n{harness.markdown_table(header, rows)}")
    return "\n\n".join(pages)


def choices(given: str, accepted: Sequence[str], option: str) -> list[str]:
    """A list from the command line, in the order given; an empty one is none.

    Raises:
        typer.BadParameter: a value that is not accepted.
    """
    names = [name.strip() for name in given.split(",") if name.strip()]
    for name in names:
        if name not in accepted:
            raise typer.BadParameter(f"{option} is {name!r}; accepted: {', '.join(accepted)}")
    return names


def main(
    quick: Annotated[bool, typer.Option(help="A short version, to see that everything runs.")] = False,
    device: Annotated[str, typer.Option(help='"cuda" or "cpu".')] = "cuda",
    sizes: Annotated[str, typer.Option(help="Cases, of 124m, 1.3b, one, small.")] = "124m,1.3b,one,small",
    precisions: Annotated[str, typer.Option(help="Of parameters and gradients: fp32, bf16.")] = "fp32,bf16",
    only: Annotated[
        list[str] | None, typer.Option(help="Parts of names of contestants; torch fused always runs.")
    ] = None,
    compiled: Annotated[str, typer.Option(help="Cases with torchao, which compiles each shape.")] = "one,small",
    seconds: Annotated[float, typer.Option(help="No case is begun after so many.", min=0)] = 210.0,
    rounds: Annotated[int, typer.Option(help="Rounds of a case; 0 takes the usual number.", min=0)] = 0,
    output: Annotated[Path, typer.Option(help="Folder for the JSON and Markdown files.")] = harness.RESULTS,
    name: Annotated[str, typer.Option(help="Name of the files, for other cards.")] = "gpu",
) -> None:
    """Measure steps on a GPU; ends with 1 if torch's fused step or one of ours is missing or not Adam."""
    start = time.perf_counter()
    size = QUICK if quick else Size()
    plan = replace(size.plan, rounds=rounds, least=min(rounds, size.plan.least)) if rounds else size.plan
    if choices(device, ("cuda", "cpu"), "--device") == ["cuda"] and not torch.cuda.is_available():
        raise typer.BadParameter("--device is 'cuda', and torch sees none; accepted here: cpu")
    clock = Clock(torch.device(device))
    asked = [
        (s, p)
        for s in choices(sizes, list(TITLES), "--sizes")
        for p in choices(precisions, list(PRECISIONS), "--precisions")
    ]
    compiling = choices(compiled, list(TITLES), "--compiled")
    timed: dict[str, list[Contestant]] = {}
    data: dict[str, Any] = {"quick": quick, "card": card(clock.device), "backend": kernels.choose(None, clock.device)}
    data |= {"contestants": [], "cases": [], "not_run": []}
    failed = False
    for precision in dict.fromkeys(p for _, p in asked):
        field_ = wanted(precision, only or [])
        if not any(key in compiling for key, _ in asked):
            field_ = [c for c in field_ if not c.compiled]  # its check compiles as well
        rows = [validate(contestant, clock.device) for contestant in field_]
        data["contestants"] += rows
        timed[precision] = [c for c, row in zip(field_, rows, strict=True) if row["status"] == "timed"]
        failed = failed or any(row["status"] != "timed" and not row["optional"] for row in rows)
    harness.print_table(*validation_table(data["contestants"]))
    slow: set[str] = set()
    for key, precision in asked:
        if time.perf_counter() - start > seconds:
            data["not_run"].append(f"{key} {precision}")
            continue
        entered = [c for c in timed[precision] if (key in compiling or not c.compiled) and c.label not in slow]
        if not entered:
            continue
        case = time_case(entered, size.shapes[key], clock, plan, size.copy_bytes)
        case = {"size": key, "precision": precision, **case, "ended_at": time.perf_counter() - start}
        slow |= {row["label"] for row in case["left_out"] if "a step takes" in row["status"]}
        data["cases"].append(case)
        harness.print_table(*shortened(case_table(case)))
        harness.write_results(name, data, page(data), output)
    path = harness.write_results(name, data, page(data), output)
    typer.echo(f"{path}: {len(data['cases'])} cases in {time.perf_counter() - start:.0f} s")
    if failed:
        raise typer.Exit(1)


if __name__ == "__main__":
    typer.run(main)
