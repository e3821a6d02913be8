"""docs/migration.md: each example is run. The old optimizer trains, its state is saved, the run goes on with ours."""

from __future__ import annotations

import copy
import re
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import nn

from lowmem_adam import AdamW8bit
from tests.test_docs import ROOT, blocks

PAGE = (ROOT / "docs/migration.md").read_text(encoding="utf-8")
NEEDS = {"bitsandbytes": "bitsandbytes", "torchao": "torchao", "FlashOptim": "flashoptim"}
SECTIONS = re.findall(r"^## (.+)$", PAGE, flags=re.MULTILINE)


def code_of(section: str) -> list[str]:
    return list(blocks(PAGE.partition(f"\n## {section}\n")[2].split("\n## ")[0], "python"))


def network() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Embedding(50, 128), nn.Linear(128, 256), nn.LayerNorm(256), nn.Linear(256, 128))


def train(model: nn.Module, optimizer: torch.optim.Optimizer, steps: range) -> None:
    for step in steps:
        generator = torch.Generator().manual_seed(step)
        optimizer.zero_grad()
        model(torch.randint(0, 50, (64,), generator=generator)).square().mean().backward()
        optimizer.step()


def test_every_optimizer_of_the_overview_has_a_section() -> None:
    assert len(SECTIONS) == 6
    assert [len(code_of(section)) for section in SECTIONS] == [2, 2, 2, 0, 2, 2]


@pytest.mark.parametrize("section", [name for name in SECTIONS if code_of(name)])
def test_a_run_goes_on(section: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    if section in NEEDS:
        pytest.importorskip(NEEDS[section], reason=f"needs {NEEDS[section]}")
    if section == "FlashOptim" and not torch.cuda.is_available():
        pytest.skip("FlashOptim needs a GPU")
    if section == "torchao":
        monkeypatch.setattr(torch, "compile", lambda function, **_: function)  # seconds for each shape
    monkeypatch.chdir(tmp_path)
    before, after = code_of(section)
    model = network()
    parallel = section == "ZeroRedundancyOptimizer"
    if parallel:
        dist.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    try:
        names: dict[str, Any] = {"torch": torch, "model": model}
        exec(before, names)
        theirs = names["optimizer"]
        train(model, theirs, range(10))
        if parallel:
            theirs.consolidate_state_dict(to=0)
        torch.save(theirs.state_dict(), "optimizer.pt")

        names = {"torch": torch, "model": copy.deepcopy(model)}
        exec(after, names)
        ours = names["optimizer"]
        assert type(ours) is AdamW8bit
        assert {int(state["step"]) for state in ours.state.values()} == {10}
        assert len(ours.state) == len(list(model.parameters()))
        group = ours.param_groups[0]
        assert group["weight_decay"] == 0.1
        assert float(group["lr"]) == pytest.approx(3e-4, rel=2.0**-24)  # torchao keeps it in float32
        start = [param.detach().clone() for param in model.parameters()]
        train(model, theirs, range(10, 11))
        train(names["model"], ours, range(10, 11))
    finally:
        if parallel:
            dist.destroy_process_group()
    moved = torch.cat([(b - a).flatten() for a, b in zip(start, model.parameters(), strict=True)])
    apart = torch.cat([(b - a).flatten() for a, b in zip(model.parameters(), names["model"].parameters(), strict=True)])
    # One coding is worth some 1% of an update (docs/format.md). A run begun anew parts by more than the update itself.
    assert apart.norm() <= 0.03 * moved.norm()
