"""Set-up shared by the benchmarks: environment record, results files, tables, quantiles, a captured training run."""

from __future__ import annotations

import hashlib
import json
import math
import os
import platform
import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table

from lowmem_adam.layout import is_coded

RESULTS = Path(__file__).resolve().parent / "results"
CACHE = Path(__file__).resolve().parent / ".cache"
PACKAGES = (
    "lowmem-adam",
    "torch",
    "triton",
    "transformers",
    "bitsandbytes",
    "torchao",
    "flashoptim",
    "deepspeed",
    "scikit-learn",
    "mlxtend",
    "numpy",
)
ISA_FLAGS = ("sse4_2", "avx", "avx2", "fma", "f16c", "avx512f", "avx512bw", "avx512vl", "avx512_bf16", "asimd", "sve")

Cell = str | float | int
Row = Sequence[Cell]


def environment() -> dict[str, Any]:
    """What a reader must know to judge a figure: processor, instruction sets, threads and versions."""
    model, flags = _cpu_info()
    versions: dict[str, str | None] = {}
    for name in PACKAGES:
        try:
            versions[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            versions[name] = None
    return {
        "cpu": model,
        "logical_cpus": os.cpu_count(),
        "isa": [flag for flag in ISA_FLAGS if flag in flags],
        "torch_cpu_capability": torch.backends.cpu.get_cpu_capability(),
        "torch_threads": torch.get_num_threads(),
        "machine": platform.machine(),
        "system": platform.system(),
        "python": platform.python_version(),
        "versions": versions,
        "accelerator": torch.cuda.get_device_name(0) if torch.cuda.is_available() else None,
        "date": time.strftime("%Y-%m-%d", time.gmtime()),
    }


def _cpu_info() -> tuple[str, set[str]]:
    info = Path("/proc/cpuinfo")
    model, flags = platform.processor() or platform.machine(), set[str]()
    if info.exists():
        for line in info.read_text().splitlines():
            key, _, value = line.partition(":")
            if key.strip() == "model name":
                model = value.strip()
            elif key.strip() in ("flags", "Features"):
                flags = set(value.split())
                break
    return model, flags


def quantiles(values: Iterable[float] | torch.Tensor, at: Sequence[float] = (0.05, 0.5, 0.95)) -> list[float]:
    """Quantiles with linear interpolation; works beyond the size limit of torch.quantile."""
    data = values.flatten() if isinstance(values, torch.Tensor) else torch.tensor(list(values))
    ordered = data.to(torch.float64).sort().values
    assert len(ordered) > 0, "quantiles of nothing"
    out = []
    for q in at:
        position = q * (len(ordered) - 1)
        low = int(position)
        high = min(low + 1, len(ordered) - 1)
        out.append(float(ordered[low] + (ordered[high] - ordered[low]) * (position - low)))
    return out


def median(values: Iterable[float] | torch.Tensor) -> float:
    return quantiles(values, (0.5,))[0]


def t_quantile(share: float, freedom: int) -> float:
    """Quantile of Student's t; scipy comes with scikit-learn."""
    from scipy import stats

    return float(stats.t.ppf(share, freedom))


def relative_error(got: torch.Tensor, want: torch.Tensor) -> float:
    """Relative Frobenius error, accumulated in float64; infinite where `got` holds a non-finite value."""
    if not bool(torch.isfinite(got).all()):
        return math.inf
    difference = (got.double() - want.double()).norm()
    return float(difference / want.double().norm())


def format_cell(value: Cell) -> str:
    return value if isinstance(value, str) else f"{value:.5g}" if isinstance(value, float) else str(value)


def print_table(title: str, header: Sequence[str], rows: Iterable[Row]) -> None:
    table = Table(*header, title=title)
    for row in rows:
        table.add_row(*(format_cell(cell) for cell in row))
    console = Console()
    if not console.is_terminal:
        console = Console(width=160)
    console.print(table)


def markdown_table(header: Sequence[str], rows: Iterable[Row]) -> str:
    lines = ["| " + " | ".join(header) + " |", "|" + "---|" * len(header)]
    lines += ["| " + " | ".join(format_cell(cell) for cell in row) + " |" for row in rows]
    return "\n".join(lines)


def _strict(value: Any) -> Any:
    """JSON has no infinity: non-finite numbers become the strings "inf", "-inf" and "nan"."""
    if isinstance(value, float) and not math.isfinite(value):
        return str(value)
    if isinstance(value, Mapping):
        return {str(key): _strict(entry) for key, entry in value.items()}
    return [_strict(entry) for entry in value] if isinstance(value, list | tuple) else value


def write_results(name: str, data: Mapping[str, Any], markdown: str, folder: Path = RESULTS) -> Path:
    """Write NAME.json (with the environment record) and NAME.md; returns the JSON file's path."""
    folder.mkdir(parents=True, exist_ok=True)
    record = environment()
    path = folder / f"{name}.json"
    path.write_text(json.dumps(_strict({"environment": record, **data}), indent=1, allow_nan=False) + "\n")
    versions = ", ".join(f"{package} {version}" for package, version in record["versions"].items() if version)
    machine = f"{record['cpu']}, {record['logical_cpus']} logical CPUs, {record['torch_cpu_capability']}"
    foot = f"\n\nMeasured {record['date']} on {machine}, {record['torch_threads']} torch thread(s); {versions}.\n"
    (folder / f"{name}.md").write_text(markdown.rstrip() + foot)
    return path


def standard_library_text(limit: int) -> torch.Tensor:
    """The first bytes of the training text of launch/train_lm.py, uint8: real text that needs no download."""
    from launch.lm_data import load_corpus

    return torch.tensor(load_corpus(()).train[:limit])


def byte_batches(text: torch.Tensor, batch: int, length: int, steps: int, seed: int) -> Iterable[torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    for _ in range(steps):
        starts = torch.randint(0, len(text) - length, (batch,), generator=generator)
        yield torch.stack([text[s : s + length] for s in starts.tolist()]).long()


@dataclass
class Captured:
    """First and second moments and the last gradient of each parameter of a real run, in the parameter's shape."""

    step: int
    loss: float
    exp_avg: dict[str, torch.Tensor]
    exp_avg_sq: dict[str, torch.Tensor]
    grad: dict[str, torch.Tensor]

    def coded_names(self) -> list[str]:
        """Tensors whose moments lowmem_adam codes; the peers are compared on the same ones."""
        return [name for name, m in self.exp_avg.items() if is_coded(m.shape)]


def byte_llama_config(hidden: int = 160, layers: int = 4, length: int = 128) -> Any:
    from transformers import LlamaConfig

    return LlamaConfig(
        vocab_size=256,
        hidden_size=hidden,
        intermediate_size=int(hidden * 2.7) // 8 * 8,
        num_hidden_layers=layers,
        num_attention_heads=4,
        max_position_embeddings=length,
        use_cache=False,
        bos_token_id=None,
        eos_token_id=None,
        pad_token_id=None,
    )


def build_byte_llama(hidden: int = 160, layers: int = 4, length: int = 128) -> torch.nn.Module:
    from transformers import LlamaForCausalLM

    return LlamaForCausalLM(byte_llama_config(hidden, layers, length))


def capture_digest(text: torch.Tensor, **settings: str | float) -> str:
    """Of all that decides what a captured run is: its text, its settings and the torch that computes it."""
    described = json.dumps({"torch": torch.__version__, **settings}, sort_keys=True).encode()
    return hashlib.sha256(hashlib.sha256(text.numpy()).digest() + described).hexdigest()[:16]


def captured_run(steps: int = 300, seed: int = 0, lr: float = 1e-3, refresh: bool = False) -> Captured:
    """Train a byte-level Llama (about 1.3 million parameters) with torch's AdamW and keep its moments.

    Cached: a run with the same text, model, settings and torch is read from the file of the first one.
    """
    batch, length = 8, 128
    config = byte_llama_config(length=length)
    text = standard_library_text(4 << 20)
    digest = capture_digest(
        text, steps=steps, seed=seed, lr=lr, batch=batch, length=length, config=config.to_json_string(use_diff=False)
    )
    path = CACHE / f"moments_{steps}_{seed}_{digest}.pt"
    if path.exists() and not refresh:
        return Captured(**torch.load(path, weights_only=True))
    torch.manual_seed(seed)
    model = build_byte_llama(length=length)
    optimizer = torch.optim.AdamW(model.parameters(), lr=lr)
    loss = 0.0
    for tokens in byte_batches(text, batch, length, steps, seed):
        optimizer.zero_grad()
        objective = model(input_ids=tokens, labels=tokens).loss
        objective.backward()
        optimizer.step()
        loss = objective.item()
    named = dict(model.named_parameters())
    record: dict[str, Any] = {"step": steps, "loss": loss}
    for key in ("exp_avg", "exp_avg_sq"):
        record[key] = {name: optimizer.state[p][key].clone() for name, p in named.items()}
    record["grad"] = {name: p.grad.clone() for name, p in named.items() if p.grad is not None}
    CACHE.mkdir(parents=True, exist_ok=True)
    torch.save(record, path)
    return Captured(**record)
