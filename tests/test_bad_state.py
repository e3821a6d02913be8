"""Saved state that does not fit: an error that says why, and the running optimizer as it was."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch

from lowmem_adam import Adam8bit, AdamW8bit
from tests.cases import FEW, SHAPES, OptimizerClass, Shape, assert_same_bits, copied, everything, make_params, train

OTHER_SHAPES = tuple(Shape(s.name, s.shape[::-1], s.coded) for s in FEW)
SMALLER = tuple(Shape(s.name, tuple(n // 2 for n in s.shape), s.coded) for s in FEW)
MATRIX, RAGGED, BIAS = 0, 1, 2
"""Keys of the first rows of FEW in a state_dict."""


def saved_by(
    cls: OptimizerClass = AdamW8bit, shapes: tuple[Shape, ...] = FEW, groups: int = 1, **settings: Any
) -> dict[str, Any]:
    params = make_params(shapes)
    opt = cls([{"params": params[i::groups]} for i in range(groups)], **settings)
    train(opt, params, 1)
    return copied(opt.state_dict())


def saved_by_torch() -> dict[str, Any]:
    params = make_params(FEW)
    opt = torch.optim.Adam(params)
    train(opt, params, 1)
    return opt.state_dict()


def edited(edit: Callable[[dict[str, Any]], object]) -> Callable[[], Any]:
    """State of a fitting optimizer with one thing changed; what ``edit`` returns takes its place unless None."""

    def make() -> Any:
        state = saved_by()
        result = edit(state)
        return state if result is None else result

    return make


def state_edit(key: int, name: str, change: Callable[[Any], Any]) -> Callable[[], Any]:
    def edit(saved: dict[str, Any]) -> None:
        saved["state"][key][name] = change(saved["state"][key][name])

    return edited(edit)


def group_edit(**values: Any) -> Callable[[], Any]:
    return edited(lambda saved: saved["param_groups"][0].update(values))


def without(name: str) -> Callable[[], Any]:
    def edit(saved: dict[str, Any]) -> None:
        del saved["param_groups"][0][name]

    return edited(edit)


ROWS: list[tuple[str, Callable[[], Any], str]] = [
    ("another class", lambda: saved_by(Adam8bit), "decoupled_weight_decay is False; accepted: True"),
    ("torch Adam", saved_by_torch, "decoupled_weight_decay is False; accepted: True"),
    ("other shapes", lambda: saved_by(shapes=OTHER_SHAPES), r"parameter 0.*\(128, 64\).*accepted: \(64, 128\)"),
    ("smaller shapes", lambda: saved_by(shapes=SMALLER), "parameter 0.*accepted"),
    ("more parameters", lambda: saved_by(shapes=SHAPES), f"{len(SHAPES)} parameters; accepted: {len(FEW)}"),
    ("fewer parameters", lambda: saved_by(shapes=FEW[:2]), f"2 parameters; accepted: {len(FEW)}"),
    ("more groups", lambda: saved_by(groups=2), "2 param groups; accepted: 1"),
    ("other moments", lambda: saved_by(moments="32bit"), "moments is '32bit'; accepted: '8bit'"),
    ("newer format", group_edit(format_version=3), "format version 3; accepted: 1, 2 "),
    ("unknown format", group_edit(format_version="1"), "format version '1'; accepted: 1, 2 "),
    ("a bool as format", group_edit(format_version=True), "format version True; accepted: 1, 2 "),
    ("listed twice", group_edit(params=[0, 0, *range(2, len(FEW))]), "listed twice.*accepted"),
    ("no format", without("format_version"), "format_version"),
    ("no class", without("decoupled_weight_decay"), "decoupled_weight_decay is None"),
    ("no lr", without("lr"), "lr"),
    ("no betas", without("betas"), "betas"),
    ("no seed", without("seed"), "seed"),
    ("no params", without("params"), "params"),
    ("bad lr", group_edit(lr=-1.0), "lr is -1.0; accepted"),
    ("bad betas", group_edit(betas=(0.9, 1.5)), r"betas is \(0.9, 1.5\); accepted"),
    ("bad seed", group_edit(seed=-1), "seed is -1; accepted"),
    ("bad choice", group_edit(nonfinite="maybe"), "nonfinite is 'maybe'; accepted"),
    ("foreign setting", group_edit(amsgrad=True), "amsgrad"),
    ("missing tensor", edited(lambda s: s["state"][MATRIX].pop("block_span") is None or None), "block_span"),
    ("surplus tensor", edited(lambda s: s["state"][BIAS].update(max_exp_avg_sq=torch.zeros(7))), "max_exp_avg_sq"),
    ("empty entry", edited(lambda s: s["state"].update({MATRIX: []})), "parameter 0.*accepted"),
    ("unknown parameter", edited(lambda s: s["state"].update({99: {}})), "99"),
    ("codes as floats", state_edit(MATRIX, "exp_avg_code", lambda t: t.float()), "exp_avg_code.*float32.*torch.int8"),
    ("codes unsigned", state_edit(RAGGED, "exp_avg_code", lambda t: t.view(torch.uint8)), "parameter 1.*torch.uint8"),
    ("moments in 16 bits", state_edit(BIAS, "exp_avg", lambda t: t.bfloat16()), "parameter 2.*exp_avg.*bfloat16"),
    ("truncated codes", state_edit(MATRIX, "exp_avg_sq_code", lambda t: t[:63]), r"\(63, 128\).*accepted: \(64, 128\)"),
    ("flat codes", state_edit(MATRIX, "exp_avg_sq_code", lambda t: t.view(-1)), r"\(8192,\).*accepted"),
    ("truncated metadata", state_edit(RAGGED, "block_floor", lambda t: t[:, :2]), r"\(40, 2\).*accepted: \(40, 3\)"),
    ("no tensor", state_edit(MATRIX, "block_span", lambda t: t.tolist()), "block_span is a list; accepted: a tensor"),
    ("float step", state_edit(MATRIX, "step", lambda t: t.float()), "step.*float32"),
    ("negative step", state_edit(MATRIX, "step", lambda t: t - 5), "step is -4; accepted"),
    ("step too high", state_edit(MATRIX, "step", lambda t: t + 2**62), f"step is {2**62 + 1}; accepted"),
    ("span too wide", state_edit(MATRIX, "block_span", lambda t: t + 200), "block_span.*accepted"),
    ("floor too high", state_edit(MATRIX, "block_floor", lambda t: torch.full_like(t, 254)), "block_floor.*accepted"),
    ("no state", edited(lambda s: {"param_groups": s["param_groups"]}), "no 'state'; accepted"),
    ("no groups", edited(lambda s: {"state": s["state"]}), "no 'param_groups'; accepted"),
    ("state is a list", edited(lambda s: {**s, "state": []}), "accepted"),
    ("groups are None", edited(lambda s: {**s, "param_groups": None}), "accepted"),
    ("group is a list", edited(lambda s: {**s, "param_groups": [[]]}), "accepted"),
    ("None", lambda: None, "accepted"),
    ("a list", list, "accepted"),
]


@pytest.mark.parametrize(("name", "make", "words"), ROWS, ids=[row[0] for row in ROWS])
def test_state_that_does_not_fit_changes_nothing(name: str, make: Callable[[], Any], words: str) -> None:
    params, twins = make_params(FEW, seed=3), make_params(FEW, seed=3)
    opt, twin = AdamW8bit(params, lr=0.02), AdamW8bit(twins, lr=0.02)
    train(opt, params, 2)
    train(twin, twins, 2)
    before, given = everything(opt), make()
    as_given = copy.deepcopy(given)
    with pytest.raises((ValueError, TypeError), match=words) as caught:
        opt.load_state_dict(given)
    if isinstance(caught.value, TypeError):
        assert name in ("foreign setting", "None", "a list")
    assert_same_bits(before, everything(opt))
    assert_same_bits(as_given, given)
    train(opt, params, 2, start=2)
    train(twin, twins, 2, start=2)
    assert_same_bits(everything(twin), everything(opt))


def test_the_state_that_is_edited_here_fits() -> None:
    opt = AdamW8bit(make_params(FEW))
    opt.load_state_dict(edited(lambda saved: None)())
    assert_same_bits(saved_by(), opt.state_dict())


def test_the_name_of_a_parameter_is_in_the_error() -> None:
    saved = saved_by()
    saved["state"][RAGGED]["step"] = torch.tensor(-1)
    opt = AdamW8bit([(f"layer.{i}", p) for i, p in enumerate(make_params(FEW))])
    with pytest.raises(ValueError, match=r"parameter 1 \('layer.1'\)"):
        opt.load_state_dict(saved)


def test_a_good_load_leaves_the_dictionary_as_it_was() -> None:
    given = saved_by()
    as_given = copy.deepcopy(given)
    opt = AdamW8bit(make_params(FEW))
    opt.load_state_dict(given)
    assert_same_bits(as_given, given)


@pytest.mark.parametrize("when", ["before the first step", "after it"])
def test_moments_are_the_constructors(when: str) -> None:
    """A file cannot turn codes into fp32 moments or back, with or without state in it."""
    params = make_params(FEW)
    other = AdamW8bit(params, moments="32bit")
    if when == "after it":
        train(other, params, 1)
    opt = AdamW8bit(make_params(FEW))
    with pytest.raises(ValueError, match="moments is '32bit'; accepted: '8bit'"):
        opt.load_state_dict(other.state_dict())
    assert opt.param_groups[0]["moments"] == "8bit"
