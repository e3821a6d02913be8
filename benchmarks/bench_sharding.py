"""Sharded steps against torch's ZeroRedundancyOptimizer: state of every rank, step time, bytes sent, extra memory.

    python -m benchmarks.bench_sharding [--quick] [--ranks 2] [--shapes gpt2] [--dtype float32] [--rounds 9]

Ranks are gloo processes on this machine, which share its cores. In every case each contestant first has to give, on all
ranks, the bits that the same optimizer gives without shards. Then contestants take turns within one run, in another
order every round; the slowest rank's time counts. Bytes are counted (benchmarks/sharding_ranks.py says how).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import torch
import typer

from benchmarks import harness
from benchmarks.sharding_plot import plot
from benchmarks.sharding_ranks import OURS, OURS_SMALL, VALIDATION_STEPS, ZERO, ZERO_VIEWS, Case, run_case
from benchmarks.step_contestants import Shape, gpt2_shapes
from benchmarks.step_timing import available_bytes, ratio

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}

IMBALANCE_TARGET, SENT_TARGET, TIME_TARGET = 1.01, 1.01, 1.0
EXTRA_MIB_TARGET = 1.0  # besides a bucket
MIB = 1 << 20

Table = tuple[str, list[str], list[list[harness.Cell]]]


@dataclass(frozen=True)
class Model:
    """A model's shapes by its number of layers; as many layers are taken as memory allows, the first that fits."""

    name: str
    shapes: Callable[[int], list[Shape]]
    layers: Sequence[int]
    of_layers: int
    names: Sequence[str] = (OURS, OURS_SMALL, ZERO, ZERO_VIEWS)


def llama_shapes(
    layers: int, width: int = 2048, key_width: int = 256, mlp: int = 5632, vocabulary: int = 32000
) -> list[Shape]:
    """The parameters of a Llama, by default of TinyLlama's 1.1 billion at 22 layers; its output layer is its own."""
    attention: list[Shape] = [(width, width), (key_width, width), (key_width, width), (width, width)]
    block: list[Shape] = [*attention, (mlp, width), (mlp, width), (width, mlp), (width,), (width,)]
    return [(vocabulary, width), *block * layers, (width,), (vocabulary, width)]


def models(quick: bool) -> dict[str, Model]:
    if quick:
        return {
            "gpt2": Model("tiny GPT-2", lambda layers: gpt2_shapes(layers, 128, 512, 64), [2], 2),
            "llama": Model("tiny Llama", lambda layers: llama_shapes(layers, 256, 64, 640, 512), [1], 1),
        }
    return {
        "gpt2": Model("GPT-2 small", gpt2_shapes, [12], 12),
        # Without the small buckets: a replica less on every rank.
        "llama": Model("TinyLlama", llama_shapes, [2, 1], 22, (OURS, ZERO, ZERO_VIEWS)),
    }


def fitting_case(model: Model, ranks: int, dtype: torch.dtype, rounds: int) -> tuple[Case, str | None]:
    """With the most layers that fit into memory; else the smallest, and why it is left out."""
    free = available_bytes()
    for layers in model.layers:
        name = model.name if layers == model.of_layers else f"{model.name} ({layers} of {model.of_layers} layers)"
        case = Case(ranks, name, dtype, model.shapes(layers), rounds, model.names)
        if case.held_bytes * 1.15 <= free:
            return case, None
    return case, f"needs {case.held_bytes / 1e9:.1f} GB of {free / 1e9:.1f} GB free"


def with_ratios(found: dict[str, Any]) -> dict[str, Any]:
    """A case's figures completed by quantiles of the times and by ratios."""
    rows = found["rows"]
    for row in rows:
        times = [1e3 * seconds for seconds in row.pop("seconds")]
        low, middle, high = harness.quantiles(times)
        row |= {"ms": middle, "p5": low, "p95": high, "rounds_ms": [round(ms, 3) for ms in times]}
        state = row["state_bytes"]
        row |= {"imbalance": max(state) / (sum(state) / len(state)), "peak_state_per_parameter": max(state)}
        row["peak_state_per_parameter"] /= found["numel"]
    # Every rank must receive the parameters that it does not own, and somebody must send them.
    found["least_sent_bytes"] = (found["ranks"] - 1) * found["parameter_bytes"]
    comparable = [{"label": row["name"], "ns": row["ms"], "rounds": row["rounds_ms"]} for row in rows]
    for row in rows:
        row["ratio"] = ratio(comparable, row["name"], ZERO_VIEWS)
        sent = row["sent_bytes"]
        row["sent_over_least"] = None if sent is None else sum(sent) / found["least_sent_bytes"]
    return found


def verdicts(cases: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """The targets for our optimizer; `met` is None where nothing could be measured."""
    out = []
    for case in cases:
        for row in case["rows"]:
            checks: list[tuple[str, float | None, float]] = []
            if row["name"] == OURS:
                checks.append(("state of the largest rank / mean", row["imbalance"], IMBALANCE_TARGET))
                checks.append(("bytes sent / least possible", row["sent_over_least"], SENT_TARGET))
                checks.append((f"step time / {ZERO_VIEWS}", row["ratio"]["of_medians"], TIME_TARGET))
            if row["bucket_mb"] is not None:
                peaks = row["peak_extra_bytes"]
                extra = None if peaks is None else max(peaks) / MIB
                checks.append(("extra memory of a step (MiB)", extra, row["bucket_mb"] + EXTRA_MIB_TARGET))
            for check, measured, target in checks:
                told = {"check": check, "measured": "not measured" if measured is None else measured}
                met = None if measured is None else measured <= target
                out.append({"case": case["label"], "name": row["name"], **told, "target": target, "met": met})
    return out


def state_table(cases: Sequence[dict[str, Any]]) -> Table:
    header = ["case", "optimizer", "bytes a parameter, largest rank", "all ranks", "max / mean", "MiB by rank"]
    rows: list[list[harness.Cell]] = []
    for case in cases:
        for row in case["rows"]:
            state = row["state_bytes"]
            by_rank = ", ".join(f"{size / MIB:.1f}" for size in state)
            shares = [row["peak_state_per_parameter"], sum(state) / case["numel"], row["imbalance"]]
            rows.append([case["label"], row["name"], *shares, by_rank])
    return "State", header, rows


def time_table(cases: Sequence[dict[str, Any]]) -> Table:
    header = ["case", "parameters", "tensors", "optimizer", "ms, slowest rank", "5%", "95%", "rounds"]
    header += ["ratio to bucket views, of medians", "median of rounds", "ratio 5%", "ratio 95%"]
    rows: list[list[harness.Cell]] = []
    for case in cases:
        for row in case["rows"]:
            times = [row["ms"], row["p5"], row["p95"], len(row["rounds_ms"])]
            rows.append([case["label"], case["numel"], case["tensors"], row["name"], *times, *row["ratio"].values()])
    return "Time of a step", header, rows


def traffic_table(cases: Sequence[dict[str, Any]]) -> Table:
    header = ["case", "optimizer", "MiB sent, all ranks", "least possible", "ratio", "most by one rank"]
    header += ["MiB of extra memory, most on a rank"]
    rows: list[list[harness.Cell]] = []
    for case in cases:
        least = case["least_sent_bytes"] / MIB
        for row in case["rows"]:
            sent, peaks = row["sent_bytes"], row["peak_extra_bytes"]
            extra = "not measured" if peaks is None else max(peaks) / MIB
            if sent is None:
                rows.append([case["label"], row["name"], "not counted", least, "-", "-", extra])
                continue
            figures = [sum(sent) / MIB, least, row["sent_over_least"], max(sent) / MIB]
            rows.append([case["label"], row["name"], *figures, extra])
    return "Bytes sent in a step, and memory that it takes besides the state", header, rows


def tables(data: dict[str, Any]) -> list[Table]:
    answers = {True: "yes", False: "NO", None: "not judged"}
    keys = ("case", "name", "check", "measured", "target")
    checks = [[*(v[key] for key in keys), answers[v["met"]]] for v in data["verdicts"]]
    cases = data["cases"]
    out: list[Table] = [("Targets", ["case", "optimizer", "check", "measured", "at most", "met"], checks)]
    out += [state_table(cases), time_table(cases), traffic_table(cases)]
    if data["left_out"]:
        rows: list[list[harness.Cell]] = [[row["label"], row["why"]] for row in data["left_out"]]
        out.append(("Left out", ["case", "why"], rows))
    return out


def measure(chosen: Sequence[Model], ranks: Sequence[int], dtypes: Sequence[str], rounds: int) -> dict[str, Any]:
    cases, left_out = [], []
    for model in chosen:
        for name in dtypes:
            for size in ranks:
                case, why = fitting_case(model, size, DTYPES[name], rounds)
                if why is None:
                    typer.echo(f"{case.label} ...")
                    cases.append(with_ratios(run_case(case)))
                else:
                    left_out.append({"label": case.label, "why": why})
    return {"cases": cases, "left_out": left_out, "verdicts": verdicts(cases)}


def threads_of_ranks(cases: Sequence[dict[str, Any]]) -> str:
    """The parent's number, which stands below every results page, is not theirs."""
    by_size = {case["ranks"]: case["threads"] for case in cases}
    return ", ".join(f"{threads} with {ranks} ranks" for ranks, threads in by_size.items()) or "none ran"


def check_choices(name: str, given: Sequence[str], accepted: Sequence[str]) -> None:
    for choice in given:
        if choice not in accepted:
            raise typer.BadParameter(f"{name} is {choice!r}; accepted: {', '.join(accepted)}")


def main(
    quick: Annotated[bool, typer.Option(help="Small models, to see that everything runs.")] = False,
    ranks: Annotated[list[int] | None, typer.Option(help="Numbers of ranks; default: 2 and 4.", min=2)] = None,
    shapes: Annotated[list[str] | None, typer.Option(help="gpt2, llama; default: both.")] = None,
    dtype: Annotated[list[str] | None, typer.Option(help="float32, bfloat16; default: both.")] = None,
    rounds: Annotated[int, typer.Option(help="Timed steps of every contestant.", min=1)] = 9,
    output: Annotated[Path, typer.Option(help="Folder for the JSON, Markdown and PNG files.")] = harness.RESULTS,
    name: Annotated[str, typer.Option(help="Name of the files, for some of the cases.")] = "sharding",
) -> None:
    """Measure sharded steps; ends with 1 if ours misses a target at full size."""
    known = models(quick)
    check_choices("shapes", shapes or (), list(known))
    check_choices("dtype", dtype or (), list(DTYPES))
    chosen = [known[name] for name in shapes or known]
    data = measure(chosen, ranks or [2, 4], dtype or list(DTYPES), rounds)
    pages = ["# Sharded steps" + (" (quick run, not to be quoted)" if quick else "")]
    pages.append(
        "Gloo ranks on one machine, which share its cores and send over its loopback. After "
        f"{VALIDATION_STEPS} steps with gradients averaged by DistributedDataParallel, parameters were the same on all "
        "ranks, and for each contestant to the bit those of its optimizer without shards. ZeroRedundancyOptimizer "
        f"runs torch's fused AdamW. Threads of a rank: {threads_of_ranks(data['cases'])}."
    )
    for title, header, rows in tables(data):
        harness.print_table(title, header, rows)
        pages.append(f"## {title}\n\n{harness.markdown_table(header, rows)}")
    path = harness.write_results(name, {"quick": quick, **data}, "\n\n".join(pages), output)
    if data["cases"]:
        plot(data, path.with_suffix(".png"))
    if not quick and any(v["met"] is False for v in data["verdicts"]):
        raise typer.Exit(1)


if __name__ == "__main__":
    typer.run(main)
