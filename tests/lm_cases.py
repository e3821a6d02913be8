"""Set-up shared by the tests of the language-model job: a small text and the smallest run worth its name."""

from __future__ import annotations

import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

ROOT = Path(__file__).resolve().parent.parent
LAUNCH = ROOT / "launch"
# The scripts of launch/ find one another by bare name, as they do when one of them is run.
sys.path.insert(0, str(LAUNCH))

from lm_settings import TrainingSettings  # noqa: E402

OURS_AND_TORCH = ("torch", "adamw8bit")


def write_text(folder: Path) -> Path:
    """Ten small files that a small model can learn something from."""
    for index in range(10):
        lines = [f"value_{index}_{line} = compute(value_{line}, {line * index})\n" for line in range(60)]
        path = folder / f"part_{index % 3}" / f"file_{index}.txt"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("".join(lines), encoding="utf-8")
    return folder


def tiny_settings(output_dir: Path, text: Path, **changes: Any) -> TrainingSettings:
    settings = TrainingSettings(
        output_dir=output_dir,
        data=(text,),
        validation_every=5,
        steps=8,
        warmup_steps=2,
        lr=1e-2,
        batch_size=4,
        seq_len=32,
        hidden_size=64,
        intermediate_size=96,
        layers=1,
        heads=2,
        eval_every=4,
        eval_windows=8,
    )
    return replace(settings, **changes)


def tiny_options(output_dir: Path, text: Path, **changes: str) -> list[str]:
    """The same run for the command line."""
    settings = tiny_settings(output_dir, text)
    names = [
        "output_dir",
        "validation_every",
        "steps",
        "warmup_steps",
        "lr",
        "batch_size",
        "seq_len",
        "hidden_size",
        "intermediate_size",
        "layers",
        "heads",
        "eval_every",
        "eval_windows",
    ]
    values = {name: str(getattr(settings, name)) for name in names} | {"data": str(text)} | changes
    return [part for name, value in values.items() for part in (f"--{name.replace('_', '-')}", value)]


def without_times(record: dict[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in record.items() if not name.endswith("_ms")}


def assert_same_checkpoint(one: Path, other: Path) -> None:
    last = Path("checkpoints") / "step-000008"
    assert (one / last / "model.safetensors").read_bytes() == (other / last / "model.safetensors").read_bytes()
    assert_same_tree(*(torch.load(folder / last / "optimizer.bin", weights_only=True) for folder in (one, other)))


def assert_same_tree(expected: Any, got: Any) -> None:
    if isinstance(expected, torch.Tensor):
        assert torch.equal(expected, got)
    elif isinstance(expected, dict):
        assert expected.keys() == got.keys()
        for key in expected:
            assert_same_tree(expected[key], got[key])
    elif isinstance(expected, (list, tuple)):
        assert len(expected) == len(got)
        for one, other in zip(expected, got, strict=True):
            assert_same_tree(one, other)
    else:
        assert expected == got
