"""What optimizers hold, take for a step and write into a checkpoint, by size, in a process of their own.

    python -m benchmarks.memory_probe '{"labels": [...], "numels": [...], "main": 33554432, "threads": 2, "seconds": 9}'

State is counted by the memory behind its tensors: those of dicts and lists in it and those within tensor subclasses
included, each storage once.
"""

from __future__ import annotations

import gc
import json
import os
import pickle
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn import Parameter
from torch.optim import Optimizer
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

from benchmarks.step_contestants import Contestant, Shape, count, installed_peers, own_and_torch, own_settings
from benchmarks.step_probe import ROOT, peak_growth, seconds
from benchmarks.step_timing import available_bytes

PATTERN = 1 << 20
TIMEOUT = 900
COMPILES = "compiles anew for every size, so three are taken"


def all_contestants() -> list[Contestant]:
    return [*own_and_torch(), *own_settings(), *installed_peers()]


def shape_of(numel: int) -> list[Shape]:
    """One matrix of about so many elements in whole blocks of 256, which are whole blocks of every format.

    torchao leaves a tensor uncoded whose elements do not fill its blocks.
    """
    columns = 1024 if numel >= 100_000 else 256
    return [(max(1, numel // columns), columns)]


def filled_params(shapes: Sequence[Shape], dtype: torch.dtype) -> list[Parameter]:
    """Parameters with gradients of normal values: a million of them over and over, as drawing all takes longer."""
    generator = torch.Generator().manual_seed(0)
    pattern = torch.randn(PATTERN, generator=generator).to(dtype)

    def tensor(shape: Shape, scale: float) -> Tensor:
        made = torch.empty(shape, dtype=dtype)
        for part in made.view(-1).split(PATTERN):
            torch.mul(pattern[: part.numel()], scale, out=part)
        return made

    params = []
    for shape in shapes:
        param = Parameter(tensor(shape, 0.02))
        param.grad = tensor(shape, 0.01)
        params.append(param)
    return params


def tensors_within(value: Any) -> Iterator[Tensor]:
    """Plain tensors of a state: those of mappings and sequences, and those that a tensor subclass consists of."""
    if isinstance(value, Tensor):
        if is_traceable_wrapper_subclass(value):
            for name in value.__tensor_flatten__()[0]:
                yield from tensors_within(getattr(value, name))
        else:
            yield value
    elif isinstance(value, Mapping):
        for entry in value.values():
            yield from tensors_within(entry)
    elif isinstance(value, list | tuple):
        for entry in value:
            yield from tensors_within(entry)


def held_bytes(optimizer: Optimizer) -> int:
    """Bytes of the memory behind the state's tensors, each storage once."""
    storages = [tensor.untyped_storage() for state in optimizer.state.values() for tensor in tensors_within(state)]
    return sum({storage.data_ptr(): storage.nbytes() for storage in storages}.values())


def load_file(path: Path) -> tuple[dict[str, Any], bool]:
    """A checkpoint, and whether it could be read with ``weights_only=True``."""
    try:
        return torch.load(path, weights_only=True), True
    except pickle.UnpicklingError:
        return torch.load(path, weights_only=False), False


def same_bits(ours: Sequence[Parameter], others: Sequence[Parameter]) -> bool:
    return all(torch.equal(a, b) for a, b in zip(ours, others, strict=True))


def measure_one(contestant: Contestant, numel: int, folder: Path | None) -> dict[str, Any]:
    """A row: state, growth of the peak over a steady step and, with a folder, the file and the step after a load.

    Returns:
        ``state_bytes``, ``peak_extra_bytes`` (None where the system does not say), ``first_seconds`` and
        ``step_seconds``; with a folder also what `saved_and_loaded` says.
    """
    shapes = shape_of(numel)
    params = filled_params(shapes, contestant.dtype)
    optimizer = contestant.build(params)
    row: dict[str, Any] = {"numel": count(shapes), "first_seconds": seconds(optimizer.step)}
    row["step_seconds"] = seconds(optimizer.step)
    row |= {"peak_extra_bytes": peak_growth(optimizer.step), "state_bytes": held_bytes(optimizer)}
    return row | ({} if folder is None else saved_and_loaded(contestant, params, optimizer, folder))


def saved_and_loaded(
    contestant: Contestant, params: Sequence[Parameter], optimizer: Optimizer, folder: Path
) -> dict[str, Any]:
    """What a checkpoint weighs, and whether it is all that there is to the optimizer.

    Returns:
        ``file_bytes``, ``weights_only`` (whether the file is read so) and ``same_bits`` (whether the next step of an
        optimizer that loaded the file gives the parameters that the saved one's gives).
    """
    path = folder / "checkpoint.pt"
    torch.save(optimizer.state_dict(), path)
    row: dict[str, Any] = {"file_bytes": path.stat().st_size}
    copies = [Parameter(param.detach().clone()) for param in params]
    for copy, param in zip(copies, params, strict=True):
        copy.grad = param.grad
    loaded = contestant.build(copies)
    state_dict, row["weights_only"] = load_file(path)
    path.unlink()
    loaded.load_state_dict(state_dict)
    for stepped in (optimizer, loaded):
        stepped.step()
    return row | {"same_bits": same_bits(params, copies)}


def why_not(contestant: Contestant, numel: int, main: int, needed: float, left: float) -> str | None:
    """Why a size is left out, if it is. Time is no reason up to the main size."""
    if numel > main and needed > left:
        return f"would take about {needed:.0f} s of {max(left, 0):.0f} s left"
    memory, free = (2.5 if numel <= main else 1.3) * numel * contestant.held_bytes, available_bytes()
    return f"needs {memory / 1e9:.1f} GB of {free / 1e9:.1f} GB free" if memory > free else None


def probe(contestant: Contestant, numels: Sequence[int], main: int, seconds_left: float) -> list[dict[str, Any]]:
    """Rows of the sizes in ascending order; those that are left out say why. Files are written up to the main size."""
    rows: list[dict[str, Any]] = []
    end, needed = time.perf_counter() + seconds_left, 0.0
    taken = {numels[0], numels[len(numels) // 3], main} if contestant.compiled else set(numels)
    contestant.build(filled_params([(16, 16)], contestant.dtype)).step()  # imports and loads what it needs
    with tempfile.TemporaryDirectory() as folder:
        for position, numel in enumerate(numels):
            why = COMPILES if numel not in taken else None
            why = why or why_not(contestant, numel, main, needed, end - time.perf_counter())
            if why is not None:
                rows.append({"numel": count(shape_of(numel)), "left_out": why})
                continue
            start = time.perf_counter()
            rows.append(measure_one(contestant, numel, Path(folder) if numel <= main else None))
            gc.collect()  # an optimizer whose parts refer to one another stays until then
            if position + 1 < len(numels):
                needed = (time.perf_counter() - start) * numels[position + 1] / numel
    return rows


def run_probe(
    contestants: Sequence[Contestant], numels: Sequence[int], main: int, threads: int, seconds_left: float
) -> dict[str, list[dict[str, Any]]]:
    """`probe` of each in one fresh process, by label; each has its part of the seconds."""
    asked = {
        "labels": [c.label for c in contestants],
        "numels": list(numels),
        "main": main,
        "threads": threads,
        "seconds": seconds_left / len(contestants),
    }
    command = [sys.executable, "-m", "benchmarks.memory_probe", json.dumps(asked)]
    variables = {**os.environ, "OMP_NUM_THREADS": str(threads)}
    finished = subprocess.run(
        command, check=True, timeout=TIMEOUT, cwd=ROOT, env=variables, stdout=subprocess.PIPE, text=True
    )
    found: dict[str, list[dict[str, Any]]] = json.loads(finished.stdout.splitlines()[-1])
    return found


def main() -> None:
    asked = json.loads(sys.argv[1])
    torch.set_num_threads(asked["threads"])
    known = {contestant.label: contestant for contestant in all_contestants()}
    given = (asked["numels"], asked["main"], asked["seconds"])
    print(json.dumps({label: probe(known[label], *given) for label in asked["labels"]}))


if __name__ == "__main__":
    main()
