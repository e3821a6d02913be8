"""docs/troubleshooting.md: figures of its ladder are those of ``lowmem_adam.plan``, errors that it quotes are real."""

from __future__ import annotations

import ast
import re
from pathlib import Path
from typing import Any

import pytest
import torch

from lowmem_adam.plan import Bytes, Settings, of_shapes, plan

ROOT = Path(__file__).resolve().parents[1]
PAGE = (ROOT / "docs/troubleshooting.md").read_text(encoding="utf-8")
LLAMA_8B = ("2*128256x4096", "64*4096x4096", "64*1024x4096", "64*14336x4096", "32*4096x14336", "65*4096")
SPLIT: dict[str, Any] = {"low_precision_update": "split"}
HOST: dict[str, Any] = {**SPLIT, "offload": "cpu"}


def section(heading: str) -> list[list[str]]:
    """The cells of the first table behind a heading."""
    text = PAGE.partition(f"\n## {heading}\n")[2]
    assert text, heading
    rows = [line for line in text.split("\n## ")[0].splitlines() if line.startswith("|")]
    return [[cell.strip() for cell in row.strip("|").split("|")] for row in rows[2:]]


LADDER = {row[0]: row for row in section("It does not fit: what next")}


def bytes_of(dtype: torch.dtype, **settings: Any) -> tuple[Bytes, Bytes]:
    row = plan(of_shapes(LLAMA_8B), Settings(dtype=dtype, **settings)).own
    return row.device, row.host


def test_the_ladder_starts_where_torch_is() -> None:
    model = of_shapes(LLAMA_8B)
    rows = plan(model, Settings(dtype=torch.float32)).rows
    (total,) = (row.device.total for row in rows if row.name.startswith("torch AdamW"))
    assert LADDER["0"][3:6] == [f"{total / model.numel:.2f}", f"{total / 2**30:.2f}", ""]


@pytest.mark.parametrize(
    ("rung", "dtype", "settings"),
    [
        ("1", torch.float32, {}),
        ("2", torch.bfloat16, SPLIT),
        ("3", torch.bfloat16, {**SPLIT, "master_bits": 24}),
        ("4", torch.bfloat16, {}),
        ("5", torch.bfloat16, {**SPLIT, "world_size": 8}),
        ("6", torch.bfloat16, HOST),
        ("7", torch.bfloat16, {**HOST, "offload_gradients": True}),
        ("8", torch.bfloat16, {**HOST, "offload_gradients": True}),
        ("10", torch.bfloat16, {}),
        ("11", torch.bfloat16, {"world_size": 8, "zero_stage": 3, "offload": "cpu"}),
    ],
)
def test_figures_of_the_ladder(rung: str, dtype: torch.dtype, settings: dict[str, Any]) -> None:
    device, host = bytes_of(dtype, **settings)
    total: float = device.total
    if rung == "10":
        total /= 8
    if rung == "8":  # as rung 7, but that the host keeps no gradients
        host.gradients = 0
    numel = of_shapes(LLAMA_8B).numel
    assert LADDER[rung][3:5] == [f"{total / numel:.2f}", f"{total / 2**30:.2f}"]
    assert LADDER[rung][5] == (f"{host.total / 2**30:.2f}" if host.total > 2**20 else "")


def test_each_rung_of_one_device_takes_less_than_the_one_before() -> None:
    totals = [float(LADDER[rung][4]) for rung in ("0", "1", "2", "3", "4", "6", "7", "8", "10")]
    assert totals == sorted(totals, reverse=True)
    assert float(LADDER["5"][4]) < float(LADDER["4"][4])


def messages() -> list[str]:
    """All strings of the package, with {} for what is put into them, and those that stand beside one another as one."""
    found = []
    for path in (ROOT / "lowmem_adam").rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.JoinedStr):
                found.append("".join(str(v.value) if isinstance(v, ast.Constant) else "{}" for v in node.values))
            elif isinstance(node, ast.Constant) and isinstance(node.value, str):
                found.append(node.value)
    return found


def quoted() -> list[str]:
    """Errors and warnings that first cells begin with: code of several words that is no call and no assignment."""
    cells = [re.findall(r"`([^`]+)`", line.split("|")[1]) for line in PAGE.splitlines() if line.startswith("| `")]
    words = [cell for found in cells for cell in found[:1] if " " in cell and "=" not in cell]
    theirs = ("AdamW8bit is not a supported DeepSpeed Optimizer", "KeyError: 'exp_avg'")
    return [cell for cell in words if cell not in theirs]


def test_errors_that_the_page_quotes_are_there() -> None:
    """Piece by piece between ellipses, each in one message; `;` joins two in warnings."""
    there, cells = messages(), quoted()
    assert len(cells) > 20
    for cell in cells:
        for part in cell.removeprefix("torch.OutOfMemoryError: ").split("; steps"):
            pieces = [piece.strip(" :;,") for piece in part.split("...") if len(piece.strip(" :;,")) > 2]
            assert any(all(piece.replace("'bnb8bit'", "{}") in text for piece in pieces) for text in there), part
