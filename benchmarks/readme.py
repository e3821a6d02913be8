"""The README's section of figures, made from the files in benchmarks/results.

    python -m benchmarks.readme            # writes the section into README.md
    python -m benchmarks.readme --check    # ends with 1 where the section is another one

What stands between the two marks in README.md is written here and nowhere else; tests/test_readme_figures.py compares
it with the results.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any

import typer

from benchmarks import harness
from benchmarks.bench_parity import BASELINE, CONTROL
from benchmarks.bench_parity import OURS as PARITY_OURS
from benchmarks.step_contestants import BITSANDBYTES, DEEPSPEED, FUSED, OURS, TORCHAO, TORCHAO_4BIT, TORCHAO_FP8

README = Path(__file__).resolve().parents[1] / "README.md"
BEGIN, END = "<!-- figures: written by benchmarks/readme.py -->", "<!-- end of figures -->"
MIB = 1 << 20
LARGE = "100000000"
LOST = 10
"""So many times the baseline's loss is no training any more."""
TASK_NAMES = {
    "bytes": "byte-level Llama",
    "words": "word-level model",
    "digits": "scikit-learn's digits",
    "mnist5k": "5,000 MNIST images",
}

Results = Callable[[str], Mapping[str, Any]]
Cells = Sequence[str]


class QuickResultsError(ValueError):
    """Results of a quick run, which are not to be quoted."""


def reader(folder: Path) -> Results:
    """Reads results by name; those of a quick run are refused."""

    def read(name: str) -> Mapping[str, Any]:
        path = folder / f"{name}.json"
        data: Mapping[str, Any] = json.loads(path.read_text())
        if data.get("quick"):
            raise QuickResultsError(f"{path} is of a quick run; accepted: results of a whole one")
        return data

    return read


def figure(value: float, digits: int = 2) -> str:
    """So many significant digits, without an exponent."""
    if not math.isfinite(value):
        return "diverges"
    if value == 0:
        return "0"
    places = max(digits - 1 - math.floor(math.log10(abs(value))), 0)
    return f"{value:,.{places}f}"


def table(header: Cells, rows: Iterable[Cells]) -> str:
    return harness.markdown_table(header, rows)


def by_label(rows: Iterable[Mapping[str, Any]], key: str = "label") -> dict[str, Mapping[str, Any]]:
    return {row[key]: row for row in rows}


def ratio(rows: Mapping[str, Mapping[str, Any]], ours: str, theirs: str, key: str = "ns") -> str:
    """A ratio of medians, or why there is none."""
    return figure(rows[ours][key] / rows[theirs][key]) if ours in rows and theirs in rows else "not timed"


def machine(data: Mapping[str, Any]) -> str:
    record = data["environment"]
    return f"{record['cpu']}, {record['logical_cpus']} logical CPUs with {record['torch_cpu_capability']}"


# ---------------------------------------------------------------- the parts


MEMORY_ROWS = (
    ("`AdamW8bit`", f"{OURS} fp32"),
    ('... bf16 parameters, `"stochastic"`', f"{OURS} bf16"),
    ('... bf16 with float32 weights, `"split"`', f"{OURS} split bf16"),
    ("`torch.optim.AdamW`", f"{FUSED} fp32"),
    ("bitsandbytes `AdamW8bit`", f"{BITSANDBYTES} fp32"),
    ("torchao `AdamW8bit`", f"{TORCHAO} fp32"),
    ("torchao `AdamW4bit`", f"{TORCHAO_4BIT} fp32"),
    ("torchao `AdamWFp8`", f"{TORCHAO_FP8} fp32"),
    ("`DeepSpeedCPUAdam`", f"{DEEPSPEED} fp32"),
)


def memory(read: Results) -> str:
    """State, a step's transient memory, checkpoints, at the main size."""
    data = read("memory")
    rows = []
    for name, label in MEMORY_ROWS:
        found = {row["numel"]: row for row in data["probes"].get(label, ()) if "left_out" not in row}
        if not found:
            continue
        largest = found[max(n for n in found if n <= data["main"])]
        n, extra = largest["numel"], largest["peak_extra_bytes"]
        cells = [name, f"{largest['state_bytes'] / n:.3f}"]
        cells += ["" if extra is None else f"{extra / n:.2f}", f"{largest['file_bytes'] / n:.3f}"]
        cells.append("yes" if largest["weights_only"] and largest["same_bits"] else "no")
        rows.append(cells)
    header = ["bytes a parameter", "state", "more in a step", "checkpoint"]
    return table([*header, "`weights_only`, goes on with the same bits"], rows)


def sharded(read: Results) -> str:
    case = next(case for case in read("sharding_gpt2")["cases"] if case["ranks"] == 4)
    rows = by_label(case["rows"], "name")
    ours, zero = rows["lowmem-adam"], rows["ZeroRedundancyOptimizer"]
    views = rows["ZeroRedundancyOptimizer, bucket views"]
    mib, cores = case["numel"] / MIB, read("sharding_gpt2")["environment"]["logical_cpus"]
    return (
        f"Of GPT-2 small on 4 ranks the largest holds {ours['peak_state_per_parameter'] * mib:.0f} MiB of state "
        f"(`ZeroRedundancyOptimizer`: {zero['peak_state_per_parameter'] * mib:.0f}), and a step on {cores} cores takes "
        f"{figure(ours['ms'] / views['ms'], 3)} of its time; 2 ranks: {_two_ranks(read)}."
    )


def _two_ranks(read: Results) -> str:
    case = next(case for case in read("sharding_gpt2")["cases"] if case["ranks"] == 2)
    return ratio(by_label(case["rows"], "name"), "lowmem-adam", "ZeroRedundancyOptimizer, bucket views", "ms")


def fidelity(read: Results) -> str:
    data = read("codec_fidelity")
    formats = [("`AdamW8bit`", "lowmem-adam"), ("bitsandbytes' map", "bitsandbytes")]
    formats += [("FlashOptim's", "flashoptim"), ("linear 8 bits (control)", "linear")]
    rows = []
    for name, key in formats:
        coding, apart = data["coding"][key], data["displacement"][key]
        errors = [coding["u_error"], *(apart[decades] for decades in ("0", "2", "4", "6"))]
        rows.append([name, f"{coding['bytes_per_parameter']:.3f}", *(figure(error) for error in errors)])
    header = ["format", "bytes", "update after one coding of real moments"]
    header += ["displacement after 300 steps, gradient scales in a block equal", "over 2 decades", "4", "6"]
    return table(header, rows)


def follows(read: Results) -> str:
    rows = [row for row in read("codec_fidelity")["ratio"] if row["name"] == "lowmem-adam" and row["beta2"] == 0.999]
    near = [row for row in rows if row["decades"] <= 2]
    far = next(row for row in rows if row["decades"] == 4)
    low, high = min(row["worst_p5"] for row in near), max(row["worst_p95"] for row in near)
    return (
        f"`sqrt(v)` keeps within {low:.2f} to {high:.2f} of fp32's (5th to 95th percentile over 4,000 steps, "
        f"beta2 = 0.999) where scales in a block spread over up to 2 decades, over 4 within "
        f"{far['worst_p5']:.2f} to {far['worst_p95']:.2f}."
    )


def parity(read: Results) -> str:
    rows = []
    for task, found in read("parity")["tasks"].items():
        verdict = found["verdicts"][PARITY_OURS]
        low, high = verdict["interval"]
        baseline = [run["final"] for run in found["runs"][BASELINE]]
        mean, control = sum(baseline) / len(baseline), found["verdicts"][CONTROL]
        rows.append(
            [
                TASK_NAMES[task],
                figure(mean, 4),
                f"{verdict['mean_difference']:+.4f} ({low:+.4f} to {high:+.4f})",
                f"{verdict['seed_spread']:.4f}",
                "diverges" if _number(control["mean_difference"]) > LOST * mean else figure(control["mean_difference"]),
            ]
        )
    header = ["final validation loss", "float32 AdamW", "`AdamW8bit`, difference (95% interval)"]
    return table([*header, "spread between seeds", "control: linear 8 bits"], rows)


def _number(value: float | str) -> float:
    """JSON holds what is not finite as a string."""
    return float(value)


def steps(read: Results) -> str:
    """Ratios of step times on the CPU."""
    data = read("step_time")
    main, sweep = by_label(data["times"]["main"]["times"]), data["times"]["sweep"]
    large, cached = (by_label(sweep[key]["times"]) for key in (LARGE, str(data["cached"])))
    weights = by_label(read("master_weights")["rows"], "name")
    engine = [row for row in read("deepspeed")["rows"] if row["name"] == "AdamW8bit"]
    sizes = " / ".join(f"{row['parameters'] / 1e6:.0f}" for row in engine)
    ours, ours16 = f"{OURS} fp32", f"{OURS} bf16"
    fused, fused16 = f"{FUSED} fp32", f"{FUSED} bf16"
    peers = [f"{name} fp32" for name in (BITSANDBYTES, TORCHAO, TORCHAO_4BIT)]
    told = [f"{peer.removesuffix(' fp32')} {ratio(main, peer, fused)}" for peer in peers if peer in main]

    def both(found: Mapping[str, Mapping[str, Any]]) -> str:
        return f"{ratio(found, ours, fused)} / {ratio(found, ours16, fused16)}"

    rows = [
        [f"{data['main'] / 1e6:.1f} million fp32 parameters", ratio(main, ours, fused), ", ".join(told)],
        ["... bf16", ratio(main, ours16, fused16), ""],
        ["100 million fp32 / bf16", both(large), ""],
        [f"{data['cached']:,} fp32 / bf16, in the caches", both(cached), ""],
        ["bf16 with float32 weights (torch: widened gradients, rounded copies)", figure(weights["split"]["ratio"]), ""],
        ["of `DeepSpeedCPUAdam`'s step, alone", ratio(main, ours, f"{DEEPSPEED} fp32"), ""],
        [
            f"of `DeepSpeedCPUAdam`'s step, under ZeRO-2 with offload, {sizes} million",
            " / ".join(figure(row["ratio"]) for row in engine),
            "",
        ],
    ]
    return table(["time of a step on the CPU", "of torch's fused step", "others"], rows)


def grows(read: Results) -> str:
    time = read("step_time")["growth"][f"{OURS} fp32"]
    fitted = time["all"]
    low, high = (end * 1e9 for end in fitted["slope_interval"])
    state = read("memory")["growth"][f"{OURS} fp32"]
    return (
        f"Both grow linearly: fitted over 10,000 to 250 million parameters, state takes {state['slope']:.4f} bytes "
        f"a parameter (exponent {state['exponent']:.4f}) and a step {fitted['slope'] * 1e9:.2f} ns "
        f"({low:.2f} to {high:.2f}; exponent {fitted['exponent']:.2f})."
    )


def on_a_gpu(read: Results) -> str:
    data = read("gpu")
    rows = []
    for case in data["cases"]:
        if case["size"] not in ("124m", "1.3b"):
            continue
        found = by_label(case["rows"])
        p = case["precision"]
        name = f"{case['numel'] / 1e6:,.0f} million {p} parameters, {case['tensors']} tensors"
        cells = [name, figure(found[f"{OURS} {p}"]["step_ratio"])]
        cells += [figure(found[f"{OURS} in a graph {p}"]["step_ratio"]), figure(found[f"{OURS} {p}"]["queued_ratio"])]
        others = [f"{peer} {figure(found[f'{peer} {p}']['step_ratio'])}" for peer in (BITSANDBYTES, "FlashOptim")]
        rows.append([*cells, ", ".join(others)])
    header = [
        f"time of a step on {data['card']['device']}, of torch's fused step",
        "as it is",
        "in a CUDA graph (torch's too)",
    ]
    return table([*header, "kernels alone", "others"], rows)


def python_time(read: Results) -> str:
    rows = {(row["name"], row["tensors"]): row["us_a_tensor"] for row in read("host_time")["rows"]}
    few = min(tensors for _, tensors in rows)
    ours, phases, torchs = (rows[name, few] for name in ("lowmem-adam", "lowmem-adam, all phases", "torch fused"))
    return (
        f"Each tensor costs {ours:.1f} microseconds of Python a step (torch's fused AdamW: {torchs:.1f}) where a step "
        f"is like the last one, in one process with the state on the parameters' device; {phases:.1f} after a change, "
        'and always with shards, DTensors, `offload`, `capturable` and `nonfinite="error"`: thousands of tiny ones '
        "add up."
    )


def quickstart(read: Results) -> str:
    runs = read("quickstart")["runs"]
    theirs, ours = runs["torch"], runs["adamw8bit"]
    state = [max(run["optimizer_state_bytes"]) / MIB for run in (theirs, ours)]
    return (
        f"The quickstart's Llama ends at a validation loss of {theirs['final_val_loss']:.3f} with torch's AdamW and "
        f"{ours['final_val_loss']:.3f} with `AdamW8bit`, one seed each, with {state[0]:.1f} and {state[1]:.1f} MiB of "
        f"state in a process; a whole training step takes {theirs['step_ms_median']:.0f} and "
        f"{ours['step_ms_median']:.0f} ms."
    )


def closing(read: Results) -> str:
    return (
        f"Measured on {machine(read('step_time'))}, where no GPU is named. `python -m benchmarks.run_all` measures "
        "all of it anew but the figures of GPUs (`bench_gpu`); "
        "[docs/benchmarks.md](docs/benchmarks.md) says how, where others do better, and which targets are missed."
    )


def section(read: Results) -> str:
    """All between the marks."""
    parts = [
        "![State of an optimizer](benchmarks/results/memory_by_setting.png)",
        memory(read),
        f"{sharded(read)} {grows(read)}",
        "How far 8-bit formats are from exact moments, as relative errors:",
        fidelity(read),
        follows(read),
        "![Loss after training, 8 bits against float32](benchmarks/results/loss_parity.png)",
        f"Over {read('parity')['seeds']} paired seeds of trainings from scratch:",
        parity(read),
        quickstart(read),
        "![Time of a step against others](benchmarks/results/step_time_peers.png)",
        steps(read),
        python_time(read),
        on_a_gpu(read),
        closing(read),
    ]
    return "\n\n".join(parts)


def names(folder: Path = harness.RESULTS) -> list[str]:
    """Of all results that the section quotes."""
    asked, read = set[str](), reader(folder)

    def recorded(name: str) -> Mapping[str, Any]:
        asked.add(name)
        return read(name)

    section(recorded)
    return sorted(asked)


def whole(text: str, read: Results) -> str:
    """The README with its section as the results have it."""
    before, begin, rest = text.partition(BEGIN)
    _, end, after = rest.partition(END)
    if not begin or not end:
        raise ValueError(f"README.md lacks a mark; accepted: {BEGIN} and {END}")
    return f"{before}{BEGIN}\n\n{section(read)}\n\n{END}{after}"


def write(folder: Path = harness.RESULTS) -> None:
    README.write_text(whole(README.read_text(), reader(folder)))


def main(
    check: Annotated[bool, typer.Option("--check", help="Only say whether README.md has these figures.")] = False,
) -> None:
    """Write the README's figures, or compare them."""
    text = README.read_text()
    wanted = whole(text, reader(harness.RESULTS))
    if check and wanted != text:
        typer.echo("README.md has other figures than benchmarks/results: python -m benchmarks.readme", err=True)
        raise typer.Exit(1)
    if not check:
        README.write_text(wanted)


if __name__ == "__main__":
    typer.run(main)
