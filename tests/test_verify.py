"""Everything that is wrong with a checkpoint file is named, and nothing else is; and both commands on the shell."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("typer")
pytest.importorskip("rich")

from typer.testing import CliRunner

from lowmem_adam import AdamW8bit, stored
from lowmem_adam.cli import app
from lowmem_adam.converting import OWN
from lowmem_adam.verifying import verify
from tests.cases import SHAPES, make_params, params_of, train
from tests.test_cli import run
from tests.test_convert import not_checkpoints, read, saved_in, written
from tests.test_foreign import NESTED, SOURCES, trained

MATRIX, BIAS, FLAT_VECTOR = 0, 7, 9
"""Keys of rows of SHAPES."""


def faults_in(value: Any, folder: Path, key: str | None = None) -> list[str]:
    return verify([written(value, folder / "state.pt")], key).faults


@pytest.mark.parametrize("steps", [1, 60])
@pytest.mark.parametrize("update", ["stochastic", "split", "fp32"])
@pytest.mark.parametrize("moments", OWN)
def test_nothing_is_wrong_with_what_steps_leave(moments: str, update: str, steps: int, tmp_path: Path) -> None:
    opt = trained(AdamW8bit, torch.bfloat16, steps, moments=moments, low_precision_update=update)
    report = verify([written(opt.state_dict(), tmp_path / "state.pt")])
    assert report.faults == []
    held = opt.memory_report()
    assert (report.kind, report.parameters, report.with_state) == ("lowmem_adam", len(SHAPES), len(SHAPES))
    assert (report.bytes, report.elements) == (held["bytes"], held["parameters"])
    assert report.steps == [steps, steps]
    assert [(group["moments"], group["lr"], group["parameters"]) for group in report.groups] == [(moments, 0.02, 19)]


@pytest.mark.parametrize("name", SOURCES)
def test_nothing_is_wrong_with_what_others_leave(name: str, tmp_path: Path) -> None:
    saved = SOURCES[name].saved(SHAPES)
    report = verify([written({"epoch": 1, "optimizer": saved}, tmp_path / "state.pt")], "optimizer")
    assert (report.kind, report.faults, report.with_state) == (SOURCES[name].kind, [], len(SHAPES))
    assert report.elements == sum(param.numel() for param in make_params(SHAPES))


def test_zero_gradients_and_parameters_without_any(tmp_path: Path) -> None:
    params = make_params(SHAPES)
    opt = AdamW8bit(params)
    for param in params[::2]:
        param.grad = torch.zeros_like(param)
    opt.step()
    opt.zero_grad()
    train(opt, params[:3], 2)
    report = verify([written(opt.state_dict(), tmp_path / "state.pt")])
    assert (report.faults, report.steps, report.with_state) == ([], [1, 3], 11)
    assert verify([written(AdamW8bit(params).state_dict(), tmp_path / "new.pt")]).steps == []


def put(key: int, name: str, place: int, value: Any) -> Callable[[dict[str, Any]], object]:
    def edit(saved: dict[str, Any]) -> None:
        state = saved["state"][key]
        tensor = {**state, **state.get(NESTED, {})}[name]
        tensor.view(-1)[place] = value

    return edit


def change(key: int, name: str, value: Any) -> Callable[[dict[str, Any]], object]:
    return lambda saved: saved["state"][key].update({name: value})


def group(**values: Any) -> Callable[[dict[str, Any]], object]:
    return lambda saved: saved["param_groups"][0].update(values)


FAULTS: list[tuple[str, Callable[[dict[str, Any]], object], str]] = [
    ("8bit", put(MATRIX, "block_span", 0, 25), "parameter 0: block_span reaches 25; accepted: 0 to 24"),
    ("8bit", put(MATRIX, "block_floor", 0, 200), "parameter 0: block_floor + block_span reaches"),
    ("8bit", put(MATRIX, "block_floor", 3, 0), "parameter 0: block_floor and block_span are not 0 in the same blocks"),
    (
        "8bit",
        put(MATRIX, "exp_avg_code", 5, -128),
        "parameter 0: exp_avg_code has a value -128; accepted: codes from -127",
    ),
    ("8bit", change(MATRIX, "step", torch.tensor(-1)), "parameter 0: step is -1; accepted"),
    ("8bit", change(MATRIX, "exp_avg_sq_code", torch.ones(3)), "parameter 0: exp_avg_sq_code has shape (3,) and dtype"),
    ("8bit", change(MATRIX, "block_floor", None), "parameter 0: block_floor is a NoneType; accepted: a tensor"),
    ("8bit", change(MATRIX, "extra", torch.ones(3)), "parameter 0 of shape (64, 128), where moments is '8bit'"),
    ("8bit", put(BIAS, "exp_avg", 2, torch.nan), "parameter 7: exp_avg has a value nan; accepted: finite"),
    ("8bit", put(BIAS, "exp_avg_sq", 2, -1.0), "parameter 7: exp_avg_sq has a value -1.0; accepted: from 0"),
    ("32bit", put(FLAT_VECTOR, "exp_avg", -1, torch.inf), "parameter 9: exp_avg has a value inf"),
    ("bnb8bit", put(MATRIX, "absmax2", 1, torch.nan), "parameter 0: absmax2 has a value nan; accepted"),
    ("8bit", group(betas=(0.9, 1.0)), "param group 0: betas is (0.9, 1.0); accepted"),
    ("8bit", group(format_version=3), "param group 0: format version 3; accepted: 1, 2 "),
    ("8bit", group(moments="4bit"), "param group 0: moments is '4bit'; accepted"),
    ("8bit", lambda saved: saved["param_groups"][0].pop("seed"), "param group 0 has no 'seed'"),
    ("8bit", lambda saved: saved["state"].update({77: {}}), "state of a parameter 77 that is in none"),
    ("8bit", lambda saved: saved["state"].update({3: 5}), "parameter 3: its state is a int; accepted: a dictionary"),
    ("8bit", lambda saved: saved["param_groups"][0]["params"].append(0), "a parameter is listed twice"),
    ("torch", put(MATRIX, "exp_avg", 9, torch.nan), "parameter 0: exp_avg has a value nan; accepted"),
    ("torch", put(BIAS, "exp_avg_sq", 0, -2.0), "parameter 7: exp_avg_sq has a value -2.0; accepted"),
    ("torch", lambda saved: saved["state"][5].pop("exp_avg"), "parameter 5 has state ['exp_avg_sq', 'step']"),
    ("torch", group(amsgrad=True), "param group 0: amsgrad is True; accepted: False"),
    ("torch", group(lr=-1.0), "param group 0: lr is -1.0; accepted"),
    ("bitsandbytes", put(MATRIX, "absmax1", 0, torch.inf), "parameter 0: exp_avg has a value"),
    ("bitsandbytes", lambda saved: saved["state"][0][NESTED].pop("qmap1"), "parameter 0 has state"),
]


@pytest.mark.parametrize(("kind", "edit", "words"), FAULTS, ids=[f"{kind} {words}" for kind, _, words in FAULTS])
def test_a_fault_is_named(kind: str, edit: Callable[[Any], object], words: str, tmp_path: Path) -> None:
    saved = saved_in(kind)
    assert faults_in(saved, tmp_path) == []
    edit(saved)
    (fault,) = faults_in(saved, tmp_path)
    assert words in fault


def test_every_fault_is_named(tmp_path: Path) -> None:
    saved = saved_in("8bit")
    for key, name, value in (
        (0, "exp_avg_code", -128),
        (3, "block_span", 30),
        (3, "block_floor", 255),
        (7, "exp_avg", torch.nan),
        (7, "exp_avg_sq", -1.0),
    ):
        put(key, name, 0, value)(saved)
    saved["state"][99] = {}
    found = faults_in(saved, tmp_path)
    for words in ("parameter 0: exp_avg_code", "3: block_span", "3: block_floor", "7: exp_avg ", "7: exp_avg_sq", "99"):
        assert sum(words in fault for fault in found) == 1, (words, found)
    assert len(found) == 6


def test_a_flipped_bit_is_found_and_its_tensor_named(tmp_path: Path) -> None:
    """Where no rule is broken: torch.load does not look at checksums."""
    path = written({"other": torch.ones(50), "optimizer": saved_in("8bit")}, tmp_path / "state.pt")
    content = bytearray(path.read_bytes())
    codes = read(path)["optimizer"]["state"][0]["exp_avg_code"].numpy().tobytes()
    content[content.index(codes) + 100] ^= 1
    path.write_bytes(content)
    (fault,) = verify([path], "optimizer").faults
    assert "the bytes of ['optimizer']['state'][0]['exp_avg_code'] are not those that were written; accepted" in fault


def test_what_is_no_checkpoint_is_an_error(tmp_path: Path) -> None:
    for name, content in not_checkpoints():
        (tmp_path / "state.pt").write_bytes(content)
        with pytest.raises(stored.NotACheckpointError, match=r"state\.pt.*accepted"):
            print(name, verify([tmp_path / "state.pt"]))


# ---------------------------------------------------------------- on the shell


def on_shell(*arguments: str) -> Any:
    """A command in this process, which takes a tenth of the time of one of its own."""
    return CliRunner().invoke(app, arguments, env={"COLUMNS": "200"})


def test_verify_on_the_shell(tmp_path: Path) -> None:
    saved = saved_in("8bit")
    good, bad = written({"optimizer": saved}, tmp_path / "good.pt"), tmp_path / "bad.pt"
    put(BIAS, "exp_avg", 0, torch.nan)(saved)
    written(saved, bad)
    finished = run("verify", str(good), "--key", "optimizer")
    assert finished.returncode == 0, finished.stderr
    for words in ("state of lowmem_adam: 19 parameters", "exp_avg_code: ", "steps taken: 3", "nothing is wrong"):
        assert words in finished.stdout
    finished = on_shell("verify", str(bad), "--json")
    assert finished.exit_code == 1
    told = json.loads(finished.stdout)
    assert (told["parameters"], told["steps"], len(told["faults"])) == (19, [3, 3], 1)
    finished = on_shell("verify", str(bad))
    assert (finished.exit_code, "FAULT: state_dict, parameter 7: exp_avg" in finished.stdout) == (1, True)
    for path, words in ((good, "accepted: 'optimizer'"), (tmp_path / "none.pt", "No such file")):
        finished = on_shell("verify", str(path))
        assert (finished.exit_code, words in finished.stderr) == (2, True)


def test_convert_on_the_shell(tmp_path: Path) -> None:
    saved = saved_in("8bit")
    source, target = written({"optimizer": saved}, tmp_path / "source.pt"), tmp_path / "torch.pt"
    put(BIAS, "exp_avg", 0, torch.nan)(saved)
    bad = written(saved, tmp_path / "bad.pt")
    to_torch = ("-o", str(target), "--to", "torch")
    finished = run("convert", str(source), *to_torch, "--key", "optimizer")
    assert finished.returncode == 0, finished.stderr
    assert finished.stdout.startswith(f"{target}: 19 parameters of 205776 elements, lowmem_adam to torch")
    for arguments, code, words in (
        ((str(source), *to_torch, "--force"), 2, "key is None; accepted: 'optimizer'"),
        ((str(source), *to_torch, "--key", "optimizer"), 2, "which exists"),
        ((str(bad), *to_torch, "--force", "--to", "8"), 2, "to is '8'; accepted: 'torch'"),
        ((str(bad), "-o", str(tmp_path / "new.pt"), "--to", "32bit"), 1, "parameter 7: exp_avg has a value nan"),
        ((str(source),), 2, "--output"),
    ):
        finished = on_shell("convert", *arguments)
        assert (finished.exit_code, words in finished.stderr) == (code, True), finished.stderr
    theirs = torch.optim.AdamW(make_params(SHAPES))
    theirs.load_state_dict(read(target)["optimizer"])
    train(theirs, params_of(theirs), 1)
    finished = on_shell(
        "convert", str(target), "-o", str(source), "--key", "optimizer", "--to", "8bit", "--seed", "4", "--force"
    )
    assert finished.exit_code == 0
    assert read(source)["optimizer"]["param_groups"][0]["seed"] == 4
