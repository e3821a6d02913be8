"""What offload and steps in the backward pass take on a real GPU: memory at the peak of training, time of a step.

    python -m benchmarks.bench_gpu_offload [--quick]

Offloaded steps first have to give the bits of the same steps on the host. The time of a step runs from its call on an
idle device until the device has its last parameter. Beside it stand what its three lanes take alone: gradients and
parameters down and parameters up over the bus, each as fast as a single copy of pinned memory, and the host's step of
as many parameters. A step cannot be shorter than the longest.
"""

from __future__ import annotations

import gc
import random
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from torch.nn import Parameter

from benchmarks import harness
from benchmarks.bench_gpu import card
from benchmarks.bench_step_time import native
from benchmarks.memory_probe import filled_params
from benchmarks.step_contestants import SETTINGS, Shape, count, gpt2_shapes
from lowmem_adam import AdamW8bit, step_in_backward
from tests.cases import assert_same_bits

DTYPES = {"bf16": torch.bfloat16, "fp32": torch.float32}
MIB = 1 << 20
FUSED, OURS = "torch fused", "lowmem-adam"
OFFLOADED, SPLIT = f'{OURS}, offload="cpu"', f'{OURS}, offload="cpu", "split"'
VALIDATION_STEPS = 3

Step = Callable[[], Any]
Table = tuple[str, list[str], list[list[harness.Cell]]]


@dataclass(frozen=True)
class Size:
    """How much to run; the quick one is for trying the benchmark out."""

    layers: int = 24
    width: int = 2048
    vocabulary: int = 50257
    rounds: int = 7
    copy_bytes: int = 512 * MIB
    train_layers: int = 24
    train_width: int = 1024
    batch: int = 8
    length: int = 512


QUICK = Size(2, 128, 512, 3, 16 * MIB, 2, 64, 2, 32)


def on_device(shapes: list[Shape], dtype: torch.dtype) -> list[Parameter]:
    """Parameters with gradients that stay as they are, none of them zero."""
    made = []
    for host in filled_params(shapes, dtype):
        assert host.grad is not None
        made.append(Parameter(host.detach().cuda()))
        made[-1].grad = host.grad.cuda()
    return made


def validate(dtype: torch.dtype, **settings: Any) -> None:
    """Refuse to time what does not give the bits of a step on the host."""
    shapes = [(300, 512), (64, 100), (70,)]
    there, here = on_device(shapes, dtype), filled_params(shapes, dtype)
    opts = AdamW8bit(there, **SETTINGS, bucket_cap_mb=0.1, **settings), AdamW8bit(here, **SETTINGS, **settings)
    for opt in opts:
        for _ in range(VALIDATION_STEPS):
            opt.step()
    for offloaded, param in zip(there, here, strict=True):
        assert_same_bits(offloaded.detach().cpu(), param.detach())


def seconds_of(run: Step) -> float:
    torch.cuda.synchronize()
    begin = time.perf_counter()
    run()
    torch.cuda.synchronize()
    return time.perf_counter() - begin


def bus(size: int, rounds: int) -> dict[str, float]:
    """Bytes a second of one copy of pinned memory, each way alone."""
    host, there = torch.full((size,), 7, dtype=torch.uint8).pin_memory(), torch.ones(size, dtype=torch.uint8).cuda()
    ways: dict[str, Step] = {
        "down": lambda: host.copy_(there, non_blocking=True),
        "up": lambda: there.copy_(host, non_blocking=True),
    }
    return {way: size / harness.median(seconds_of(copy) for _ in range(rounds)) for way, copy in ways.items()}


def entrants(dtype: torch.dtype) -> dict[str, Callable[[list[Parameter]], torch.optim.Optimizer]]:
    found: dict[str, Callable[[list[Parameter]], torch.optim.Optimizer]] = {
        FUSED: lambda params: torch.optim.AdamW(params, **SETTINGS, fused=True),
        OURS: lambda params: AdamW8bit(params, **SETTINGS),
        OFFLOADED: lambda params: AdamW8bit(params, **SETTINGS, offload="cpu"),
    }
    if dtype != torch.float32:
        found[SPLIT] = lambda params: AdamW8bit(params, **SETTINGS, offload="cpu", low_precision_update="split")
    return found


def host_seconds(shapes: list[Shape], dtype: torch.dtype, rounds: int, **settings: Any) -> float:
    """The same step of parameters that are on the host already: nothing is copied."""
    opt = AdamW8bit(filled_params(shapes, dtype), **SETTINGS, offload="cpu", **settings)
    opt.step()
    times = []
    for _ in range(rounds):
        begin = time.perf_counter()
        opt.step()
        times.append(time.perf_counter() - begin)
    return harness.median(times)


def measure_steps(name: str, size: Size) -> dict[str, Any]:
    """Times of all entrants in turns, with the device memory that each keeps and takes for a step."""
    dtype = DTYPES[name]
    validate(dtype, offload="cpu")
    shapes = gpt2_shapes(layers=size.layers, width=size.width, vocabulary=size.vocabulary)
    numel = count(shapes)
    runs: dict[str, Step] = {}
    rows: dict[str, dict[str, Any]] = {}
    for label, build in entrants(dtype).items():
        params = on_device(shapes, dtype)
        opt, before = build(params), torch.cuda.memory_allocated()
        opt.step()
        torch.cuda.synchronize()
        held = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        opt.step()
        torch.cuda.synchronize()
        extra = torch.cuda.max_memory_allocated() - held
        rows[label] = {"name": label, "device": (held - before) / numel, "extra_mib": extra / MIB}
        runs[label] = opt.step
    samples: dict[str, list[float]] = {label: [] for label in runs}
    order = list(runs)
    for _ in range(size.rounds):
        random.Random(len(samples[FUSED])).shuffle(order)
        for label in order:
            samples[label].append(seconds_of(runs[label]))
    rates = bus(size.copy_bytes, size.rounds)
    moved = numel * dtype.itemsize
    lanes = {"down": 2 * moved / rates["down"], "up": moved / rates["up"]}
    for label, row in rows.items():
        low, row["seconds"], high = harness.quantiles(samples[label])
        row |= {"p5": low, "p95": high, "host": None, "of_longest": None}
        if "offload" in label:
            settings = {"low_precision_update": "split"} if label == SPLIT else {}
            row["host"] = host_seconds(shapes, dtype, 3, **settings)
            row["of_longest"] = row["seconds"] / max(row["host"], *lanes.values())
    return {
        "precision": name,
        "numel": numel,
        "tensors": len(shapes),
        "bus": rates,
        "lanes": lanes,
        "rows": list(rows.values()),
    }


TRAINED: dict[str, dict[str, Any]] = {
    FUSED: {},
    OURS: {},
    f"{OURS}, step_in_backward": {},
    OFFLOADED: {"offload": "cpu"},
    f"{OURS}, offload_gradients=True": {"offload": "cpu", "offload_gradients": True},
}


def measure_training(size: Size) -> list[dict[str, Any]]:
    """Peak of the device memory and time of a training step of a GPT-2 in bfloat16, forward, backward and step."""
    from transformers import GPT2Config, GPT2LMHeadModel

    rows = []
    for label, settings in TRAINED.items():
        gc.collect()
        torch.cuda.empty_cache()
        torch.manual_seed(0)
        heads = size.train_width // 64
        config = GPT2Config(
            n_embd=size.train_width,
            n_layer=size.train_layers,
            n_head=heads,
            vocab_size=size.vocabulary,
            use_cache=False,
            bos_token_id=None,
            eos_token_id=None,
        )
        model = GPT2LMHeadModel(config).to("cuda", torch.bfloat16).train()
        numel = sum(p.numel() for p in model.parameters())
        fused = label == FUSED
        opt: torch.optim.Optimizer = (
            torch.optim.AdamW(model.parameters(), lr=1e-4, fused=True)
            if fused
            else AdamW8bit(model.parameters(), lr=1e-4, **settings)
        )
        handle = step_in_backward(model, opt) if "backward" in label else None  # type: ignore[arg-type]
        tokens = torch.randint(0, size.vocabulary, (size.batch, size.length), device="cuda")

        def iteration(model: Any = model, opt: torch.optim.Optimizer = opt, tokens: torch.Tensor = tokens) -> None:
            opt.zero_grad()
            model(input_ids=tokens, labels=tokens).loss.backward()
            opt.step()

        for _ in range(2):
            iteration()
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        times = [seconds_of(iteration) for _ in range(size.rounds)]
        rows.append(
            {
                "name": label,
                "numel": numel,
                "peak": torch.cuda.max_memory_allocated() / numel,
                "peak_mib": torch.cuda.max_memory_allocated() / MIB,
                "seconds": harness.median(times),
            }
        )
        if handle is not None:
            handle.remove()
        del model, opt, iteration, handle
    return rows


def tables(data: Mapping[str, Any]) -> list[Table]:
    out: list[Table] = []
    for case in data["steps"]:
        title = (
            f"Step of {case['numel']} {case['precision']} parameters in {case['tensors']} tensors; alone: "
            f"down {case['lanes']['down'] * 1e3:.0f} ms, up {case['lanes']['up'] * 1e3:.0f} ms "
            f"({case['bus']['down'] / 1e9:.1f} and {case['bus']['up'] / 1e9:.1f} GB/s)"
        )
        header = ["optimizer", "ms", "5%", "95%", "host alone (ms)", "step / longest lane"]
        header += ["state on the device, bytes a parameter", "extra in a step (MiB)"]
        rows: list[list[harness.Cell]] = []
        for row in case["rows"]:
            host = "" if row["host"] is None else row["host"] * 1e3
            longest = "" if row["of_longest"] is None else row["of_longest"]
            times = [row[key] * 1e3 for key in ("seconds", "p5", "p95")]
            rows.append([row["name"], *times, host, longest, row["device"], row["extra_mib"]])
        out.append((title, header, rows))
    header = ["optimizer", "device memory at the peak (MiB)", "bytes a parameter", "ms a training step"]
    found = data["training"]
    lines: list[list[harness.Cell]] = [
        [row["name"], row["peak_mib"], row["peak"], row["seconds"] * 1e3] for row in found
    ]
    out.append((f"Training a GPT-2 of {found[0]['numel']} bf16 parameters", header, lines))
    return out


def main(
    quick: Annotated[bool, typer.Option(help="Small sizes, to see that everything works.")] = False,
    output: Annotated[Path, typer.Option(help="Folder for the JSON and Markdown files.")] = harness.RESULTS,
) -> None:
    """Measure offload on a CUDA device."""
    if not torch.cuda.is_available():
        raise typer.BadParameter("there is no CUDA device here; bench_offload measures on a simulated one")
    size = QUICK if quick else Size()
    data: dict[str, Any] = {"quick": quick, "card": card(torch.device("cuda")), "native": native()}
    data["steps"] = []
    data["training"] = measure_training(size)
    for name in (None, *DTYPES):  # written after every part: a run that is ended keeps what it has measured
        if name is not None:
            data["steps"].append(measure_steps(name, size))
            gc.collect()
            torch.cuda.empty_cache()
        found = tables(data)
        name_of = "Offload on a GPU" + (" (quick run, not to be quoted)" if quick else "")
        head = f"# {name_of}\n\n{data['card']['device']}, {torch.get_num_threads()} host threads."
        pages = [f"## {title}\n\n{harness.markdown_table(header, rows)}" for title, header, rows in found]
        harness.write_results("gpu_offload", data, "\n\n".join([head, *pages]), output)
    for table in tables(data):
        harness.print_table(*table)


if __name__ == "__main__":
    typer.run(main)
