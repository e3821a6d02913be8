"""``lowmem-adam profile``: real steps of a model made on the spot, measured."""

from __future__ import annotations

import copy
import json
import statistics
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from time import perf_counter
from typing import Annotated, Any

import torch
import typer
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn

import lowmem_adam
from lowmem_adam.commands import outcome
from lowmem_adam.commands.options import (
    BACKENDS,
    MASTER_BITS,
    MODEL,
    MOMENTS,
    OFFLOAD,
    OPTIMIZER,
    OUTPUT,
    UPDATES,
    WORK,
    AsJson,
    choice,
    option,
)
from lowmem_adam.commands.progress import shown
from lowmem_adam.profiling import Profile

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


@dataclass
class Job:
    """Parameters, and what gives them the gradients of a step."""

    params: list[nn.Parameter]
    gradients: Callable[[], None]
    trains: bool
    """Gradients come from a forward and a backward pass, not from a generator."""
    description: str


def _devices(incomplete: str) -> list[str]:
    """Those that are here."""
    present = ["cpu"]
    if torch.accelerator.is_available():
        kind = torch.accelerator.current_accelerator()
        assert kind is not None
        present += [kind.type, *(f"{kind.type}:{index}" for index in range(torch.accelerator.device_count()))]
    return [name for name in present if name.startswith(incomplete)]


def profile(
    steps: Annotated[int, option("Steps, from 2; the first one makes the state.", WORK)] = 20,
    hidden_size: Annotated[int, option("Of a Llama with fresh weights; needs transformers.", MODEL)] = 256,
    layers: Annotated[int, option("Of the Llama.", MODEL)] = 4,
    heads: Annotated[int | None, option("Of the Llama; hidden size / 64, if not given.", MODEL)] = None,
    vocab_size: Annotated[int, option("Of the Llama.", MODEL)] = 8192,
    seq_len: Annotated[int, option("Tokens of a sequence.", MODEL)] = 128,
    batch_size: Annotated[int, option("Sequences of a training step.", MODEL)] = 4,
    shapes: Annotated[
        str | None,
        option('Parameters of these shapes and no model, such as "4096x4096,4096"; gradients are random.', MODEL),
    ] = None,
    dtype: Annotated[str, choice(tuple(DTYPES), "Of parameters.", MODEL)] = "float32",
    moments: Annotated[str, choice(MOMENTS, "How moments are kept.", OPTIMIZER)] = "8bit",
    low_precision_update: Annotated[str, choice(UPDATES, "How 16-bit parameters are stepped.", OPTIMIZER)] = (
        "stochastic"
    ),
    master_bits: Annotated[int, choice(MASTER_BITS, "Of the weight that split keeps.", OPTIMIZER)] = 32,
    offload: Annotated[str | None, choice(OFFLOAD, "Moments and step on the host.", OPTIMIZER)] = None,
    backend: Annotated[str | None, choice(BACKENDS, "What steps; by default the best there is.", OPTIMIZER)] = None,
    device: Annotated[
        str, option("Where parameters are, such as cpu, cuda or cuda:1.", WORK, autocompletion=_devices)
    ] = "cpu",
    threads: Annotated[int | None, option("Of this process; torch's choice, if not given.", WORK)] = None,
    seed: Annotated[int, option("Of weights, data and rounding.", WORK)] = 0,
    compare: Annotated[
        bool, option("Step a copy with torch's fused AdamW in turns; takes its memory, too.", WORK, "--compare")
    ] = False,
    output_dir: Annotated[
        Path | None,
        option("Folder for profile.json, trace.json (Chrome, Perfetto) and profile.png (matplotlib).", OUTPUT),
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Take real steps and say where their time goes, what the state takes, and the step's share of a training step.

    The model is a Llama made on the spot, or parameters of given shapes; nothing is downloaded. Files in the folder of
    --output-dir that have the names of those written take each other's place, when all are written.
    """
    try:
        for name, number, least in (
            ("steps", steps, 2),
            ("hidden-size", hidden_size, 2),
            ("layers", layers, 1),
            ("heads", heads, 1),
            ("vocab-size", vocab_size, 2),
            ("seq-len", seq_len, 2),
            ("batch-size", batch_size, 1),
            ("threads", threads, 1),
        ):
            if number is not None and number < least:
                raise ValueError(f"{name} is {number}; accepted: whole numbers from {least}")
        if dtype not in DTYPES:
            raise ValueError(f"dtype is {dtype!r}; accepted: {', '.join(DTYPES)}")
        where = _device(device)
        if output_dir is not None:
            _check_plot()
            output_dir.mkdir(parents=True, exist_ok=True)
        if threads is not None:
            torch.set_num_threads(threads)
        torch.manual_seed(seed)
        if shapes is not None:
            job = _of_shapes(_parsed(shapes), DTYPES[dtype], where)
        else:
            sizes = _LlamaSizes(hidden_size, layers, heads, vocab_size, seq_len, batch_size)
            job = _of_llama(sizes, DTYPES[dtype], where)
        optimizer = lowmem_adam.AdamW8bit(
            job.params,
            moments=moments,
            low_precision_update=low_precision_update,
            master_bits=master_bits,
            offload=offload,
            backend=backend,
            seed=seed,
        )
    except (ValueError, RuntimeError, ImportError) as error:
        outcome.refuse(error)
    prof, theirs = _run(job, optimizer, steps, compare=compare)
    report = _report(job, prof, theirs)
    if output_dir is not None:
        _write(output_dir, prof, report)
    if as_json:
        outcome.print_json(report)
        return
    _print(report)
    if output_dir is not None:
        typer.echo(f"written: {', '.join(str(output_dir / name) for name in _FILES)}")


_FILES = ("profile.json", "trace.json", "profile.png")


def _write(folder: Path, prof: Profile, report: dict[str, Any]) -> None:
    """All of the files or none."""
    with tempfile.TemporaryDirectory(dir=folder, prefix=".profile.") as beside:
        first, second, third = (Path(beside, name) for name in _FILES)
        first.write_text(json.dumps({**report, **prof.as_dict()}, indent=1) + "\n", "utf-8")
        prof.chrome_trace(second)
        prof.plot(third)
        for path in (first, second, third):
            path.replace(folder / path.name)


def _device(name: str) -> torch.device:
    """Raise ValueError: there is no such device here."""
    present = _devices("")
    if name not in present:
        raise ValueError(f"device is {name!r}; accepted here: {', '.join(present)}")
    return torch.device(name)


def _check_plot() -> None:
    """Raise ImportError before the work: there is no matplotlib."""
    try:
        import matplotlib  # noqa: F401
    except ImportError as error:
        raise ImportError(f"{error}; --output-dir needs: pip install matplotlib") from error


# ---------------------------------------------------------------- what is stepped


def _parsed(text: str) -> list[tuple[int, ...]]:
    """Shapes such as ``4096x4096,4096``.

    Raises:
        ValueError: there is none, or it is not of whole numbers above 0.
    """
    shapes = []
    for word in text.split(","):
        numbers = word.strip().split("x")
        if not all(number.isascii() and number.isdigit() and int(number) > 0 for number in numbers):
            raise ValueError(
                f"shapes is {text!r}, with {word.strip()!r} in it; accepted: shapes with commas between them, each of "
                "whole numbers above 0 with an x between them, such as 4096x4096,4096"
            )
        shapes.append(tuple(map(int, numbers)))
    return shapes


def _of_shapes(shapes: Sequence[tuple[int, ...]], dtype: torch.dtype, device: torch.device) -> Job:
    params = [nn.Parameter((torch.randn(shape, device=device) * 0.02).to(dtype)) for shape in shapes]

    def gradients() -> None:
        for param in params:
            param.grad = torch.randn_like(param) * 1e-3

    return Job(params, gradients, trains=False, description=f"{len(shapes)} tensors, random gradients")


@dataclass
class _LlamaSizes:
    hidden_size: int
    layers: int
    heads: int | None
    vocab_size: int
    seq_len: int
    batch_size: int

    def checked_heads(self) -> int:
        """The number of heads.

        Raises:
            ValueError: heads would not be of an even size, which rotary embeddings need.
        """
        heads = max(1, self.hidden_size // 64) if self.heads is None else self.heads
        if self.hidden_size % (2 * heads):
            raise ValueError(
                f"hidden-size is {self.hidden_size} with {heads} heads; accepted with as many: multiples of {2 * heads}"
            )
        return heads


def _of_llama(sizes: _LlamaSizes, dtype: torch.dtype, device: torch.device) -> Job:
    """A Llama by transformers' definition, with fresh weights and random tokens; nothing is downloaded."""
    heads = sizes.checked_heads()
    try:
        import transformers
    except ImportError as error:
        raise ImportError(f"{error}; a model needs: pip install transformers; --shapes does without") from error
    config = transformers.LlamaConfig(
        vocab_size=sizes.vocab_size,
        hidden_size=sizes.hidden_size,
        intermediate_size=4 * sizes.hidden_size,
        num_hidden_layers=sizes.layers,
        num_attention_heads=heads,
        num_key_value_heads=heads,
        max_position_embeddings=sizes.seq_len,
        tie_word_embeddings=False,
        use_cache=False,
        pad_token_id=None,
        bos_token_id=None,
        eos_token_id=None,
    )
    model = transformers.LlamaForCausalLM(config).to(device=device, dtype=dtype)
    params = list(model.parameters())

    def gradients() -> None:
        tokens = torch.randint(sizes.vocab_size, (sizes.batch_size, sizes.seq_len), device=device)
        model(input_ids=tokens, labels=tokens).loss.backward()

    description = f"Llama of {sizes.layers} layers, hidden size {sizes.hidden_size}, {heads} heads, "
    description += f"{sizes.batch_size} sequences of {sizes.seq_len} tokens"
    return Job(params, gradients, trains=True, description=description)


# ---------------------------------------------------------------- the steps


class _Theirs:
    """torch's fused AdamW on copies of the parameters, stepped with the same gradients."""

    def __init__(self, params: Sequence[nn.Parameter]) -> None:
        self.params = [copy.deepcopy(param) for param in params]
        self.optimizer = torch.optim.AdamW(self.params, fused=True)
        self.seconds: list[float] = []

    def step(self, params: Sequence[nn.Parameter]) -> None:
        """One step, waited for as ours is."""
        for mine, other in zip(self.params, params, strict=True):
            mine.grad = other.grad
        _wait(self.params)
        start = perf_counter()
        self.optimizer.step()
        _wait(self.params)
        self.seconds.append(perf_counter() - start)
        self.optimizer.zero_grad()

    def report(self) -> dict[str, Any]:
        """Time and bytes; times are without the first step's, as ours."""
        tensors = [value for state in self.optimizer.state.values() for value in state.values()]
        nbytes = sum(tensor.nbytes for tensor in tensors if isinstance(tensor, Tensor))
        return {
            "optimizer": "torch.optim.AdamW(fused=True)",
            "steps": len(self.seconds),
            "step_s": {"sum": sum(self.seconds[1:]), "median": statistics.median(self.seconds[1:])},
            "total_bytes": nbytes,
            "bytes_per_parameter": nbytes / sum(param.numel() for param in self.params),
        }


def _wait(params: Sequence[Tensor]) -> None:
    if not params[0].is_cpu:
        torch.accelerator.synchronize(params[0].device)


def _run(job: Job, optimizer: lowmem_adam.AdamW8bit, steps: int, *, compare: bool) -> tuple[Profile, _Theirs | None]:
    """Take the steps; the other optimizer's come before ours and after, in turns."""
    theirs = _Theirs(job.params) if compare else None
    with shown("steps") as (progress,), lowmem_adam.profile(optimizer) as prof:
        for number in range(steps):
            progress(number, steps)
            job.gradients()
            if theirs is not None and number % 2 == 0:
                with prof.paused():
                    theirs.step(job.params)
            optimizer.step()
            if theirs is not None and number % 2 == 1:
                with prof.paused():
                    theirs.step(job.params)
            optimizer.zero_grad()
    return prof, theirs


# ---------------------------------------------------------------- what is said


def _report(job: Job, prof: Profile, theirs: _Theirs | None) -> dict[str, Any]:
    """What ``--json`` prints."""
    summary = prof.summary()
    if not job.trains:  # what lies between two steps is no rest of a training step
        summary["share_of_training"] = None
    report = {"lowmem_adam": lowmem_adam.__version__, "model": job.description, **prof.about(), "summary": summary}
    if theirs is not None:
        told = theirs.report()
        report["compared"] = told | {
            "time_ratio": summary["total_s"]["median"] / told["step_s"]["median"],
            "bytes_ratio": summary["total_bytes"] / told["total_bytes"],
        }
    return report


def _print(report: dict[str, Any]) -> None:
    summary, console = report["summary"], Console()
    settings = ", ".join(f"{name} {value}" for name, value in report["settings"].items() if name in _SHOWN and value)
    console.print(f"{report['model']}: {summary['parameters']:,} parameters", highlight=False)
    threads = f"{report['threads']} thread{'s' if report['threads'] > 1 else ''}"
    place = f"{', '.join(report['dtypes'])} on {', '.join(report['devices'])}, {threads}"
    console.print(f"{report['optimizer']}, {settings}; {place}; {summary['steps']} steps", highlight=False)
    times = Table("part of a step", "median ms", "share", box=None, pad_edge=False)
    for name, figures in summary["parts_s"].items():
        times.add_row(name, _ms(figures), f"{figures['share']:.1%}")
    times.add_row("whole step", _ms(summary["total_s"]), "100.0%")
    if summary["share_of_training"] is not None:
        times.add_row("rest of the training step", _ms(summary["rest_s"]), "")
        times.add_row("step's share of training", "", f"{summary['share_of_training']:.1%}")
    state = Table("state", "bytes", "a parameter", box=None, pad_edge=False)
    for name, size in summary["bytes"].items():
        state.add_row(name, f"{size:,}", f"{size / summary['parameters']:.4f}")
    state.add_row("all", f"{summary['total_bytes']:,}", f"{summary['bytes_per_parameter']:.4f}")
    tables = [times, state]
    if "compared" in report:
        told = report["compared"]
        versus = Table("compared", "median ms", "bytes of state", box=None, pad_edge=False)
        versus.add_row(report["optimizer"], _ms(summary["total_s"]), f"{summary['total_bytes']:,}")
        versus.add_row(told["optimizer"], _ms(told["step_s"]), f"{told['total_bytes']:,}")
        versus.add_row("ratio", f"{told['time_ratio']:.3f}", f"{told['bytes_ratio']:.3f}")
        tables.append(versus)
    for table in tables:
        for column in table.columns[1:]:
            column.justify = "right"
        console.print()
        console.print(table, highlight=False)


_SHOWN = ("moments", "low_precision_update", "offload")


def _ms(figures: dict[str, float]) -> str:
    return f"{figures['median'] * 1e3:.3f}"
