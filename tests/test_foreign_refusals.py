"""Foreign state that is refused: what the error says, and that nothing was changed for it."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from lowmem_adam import Adam8bit, AdamW8bit, foreign
from tests.cases import FEW, OptimizerClass, Shape, assert_same_bits, copied, make_params, train
from tests.test_foreign import NESTED, SOURCES, bitsandbytes, flat

MATRIX, RAGGED, BIAS = 0, 1, 2
"""Keys of the first rows of FEW in a state_dict."""

TALLER = tuple(Shape(s.name, s.shape[::-1], s.coded) for s in FEW)

Make = Callable[[], Any]


def of(name: str, edit: Callable[[dict[str, Any]], object] = lambda saved: None, **settings: Any) -> Make:
    """State of a source with one thing changed; what ``edit`` returns takes its place unless None."""

    def make() -> Any:
        source = SOURCES[name]
        state = source._replace(settings={**source.settings, **settings}).saved()
        result = edit(state)
        return state if result is None else result

    return make


def torch_with(key: int, name: str, change: Callable[[Any], Any], source: str = "torch AdamW") -> Make:
    def edit(saved: dict[str, Any]) -> None:
        saved["state"][key][name] = change(saved["state"][key].get(name))

    return of(source, edit)


def bnb_with(key: int, name: str, change: Callable[[Any], Any]) -> Make:
    return torch_with(key, name, change, "bitsandbytes AdamW8bit flat")


def torch_without(name: str) -> Make:
    return of("torch AdamW", lambda saved: saved["state"][MATRIX].pop(name) is None or None)


def bnb_without(name: str) -> Make:
    return of("bitsandbytes AdamW8bit flat", lambda saved: saved["state"][MATRIX].pop(name) is None or None)


def group_with(source: str = "torch AdamW", **values: Any) -> Make:
    return of(source, lambda saved: saved["param_groups"][0].update(values))


def params_edit(change: Callable[[list[Any]], object]) -> Make:
    return of("torch AdamW", lambda saved: change(saved["param_groups"][0]["params"]) and None)


def other(cls: type[torch.optim.Optimizer], **settings: Any) -> Make:
    def make() -> Any:
        params = make_params(FEW)
        opt = cls(params, **settings)
        train(opt, params, 1)
        return opt.state_dict()

    return make


def other_bnb(name: str, *, edit: Callable[[dict[str, Any]], dict[str, Any]] = dict, **settings: Any) -> Make:
    def make() -> Any:
        state = other(getattr(bitsandbytes().optim, name), **settings)()
        assert isinstance(state, dict)
        return edit(state)

    return make


def set_at(index: int, value: float) -> Callable[[Tensor], Tensor]:
    def change(tensor: Tensor) -> Tensor:
        changed = tensor.clone()
        changed.view(-1)[index] = value
        return changed

    return change


ROWS: list[tuple[str, Make, str]] = [
    # ------------------------------------------------ not a state that is known
    ("None", lambda: None, "NoneType; accepted"),
    ("a list", list, "list; accepted"),
    ("no state", of("torch AdamW", lambda s: {"param_groups": s["param_groups"]}), "no 'state'; accepted"),
    ("SGD", other(torch.optim.SGD, lr=0.1, momentum=0.9), "no format_version.*momentum_buffer.*accepted.*AdamW"),
    ("RAdam, which looks alike", other(torch.optim.RAdam), "no format_version.*exp_avg_sq.*accepted"),
    ("NAdam", other(torch.optim.NAdam), "no format_version.*momentum_decay.*accepted"),
    ("Adamax", other(torch.optim.Adamax), "no format_version.*exp_inf.*accepted"),
    # ------------------------------------------------ torch's
    ("amsgrad", of("torch AdamW", amsgrad=True), "amsgrad is True; accepted: False"),
    ("amsgrad's state", torch_with(BIAS, "max_exp_avg_sq", lambda _: torch.ones(7)), "parameter 2 has max_exp_avg_sq"),
    ("the other class", of("torch Adam"), "decoupled_weight_decay is False; accepted: True"),
    ("more groups", of("torch AdamW", lambda s: s["param_groups"].append(s["param_groups"][0])), "has 2 .*accepted: 1"),
    ("fewer groups", of("torch AdamW", lambda s: s["param_groups"].clear()), r"settings \[\].*accepted"),
    ("more parameters", params_edit(lambda params: params.append(9)), "7 parameters; accepted: 6"),
    ("fewer parameters", params_edit(lambda params: params.pop()), "5 parameters; accepted: 6"),
    ("listed twice", group_with(params=[0, 0, 2, 3, 4, 5]), "twice.*accepted"),
    ("unknown parameter", of("torch AdamW", lambda s: s["state"].update({99: s["state"][0]})), "99 that is in none"),
    ("a list as state", of("torch AdamW", lambda s: s["state"].update({0: []})), "its state is a list; accepted"),
    ("no lr", of("torch AdamW", lambda s: s["param_groups"][0].pop("lr") and None), "has no 'lr'; accepted: all of lr"),
    ("bad lr", group_with(lr=-1.0), "lr is -1.0; accepted"),
    ("bad betas", group_with(betas=(0.9, 1.5)), r"betas is \(0.9, 1.5\); accepted"),
    ("no correction", group_with(bias_correction=False), "bias_correction is False; accepted: True"),
    ("another setting", group_with(correct_bias=False), "correct_bias=False is not a setting"),
    ("another shape", torch_with(MATRIX, "exp_avg", lambda t: t.t()), r"exp_avg has shape \(128, 64\).*: \(64, 128\)"),
    ("truncated", torch_with(RAGGED, "exp_avg_sq", lambda t: t[:9]), r"parameter 1: exp_avg_sq .*\(9, 300\)"),
    ("integers", torch_with(BIAS, "exp_avg", lambda t: t.int()), "exp_avg has .*int32; accepted: .*torch.float32"),
    ("no tensor", torch_with(BIAS, "exp_avg", lambda t: t.tolist()), "exp_avg is a list; accepted: a plain tensor"),
    ("no exp_avg", torch_without("exp_avg"), r"state \['exp_avg_sq', 'step'\]; accepted: \['exp_avg', "),
    ("no step", torch_without("step"), r"state \['exp_avg', 'exp_avg_sq'\]; accepted"),
    ("more state", torch_with(BIAS, "mu_product", lambda _: torch.ones(())), "'mu_product'.*accepted"),
    ("negative step", torch_with(BIAS, "step", lambda t: -t), r"step is tensor\(-3.\); accepted: integers from 0"),
    ("half a step", torch_with(BIAS, "step", lambda t: 2.5), "step is 2.5; accepted"),
    ("no step count", torch_with(BIAS, "step", lambda t: torch.inf), "step is inf; accepted"),
    ("many steps", torch_with(BIAS, "step", lambda t: torch.ones(2)), r"step is tensor\(\[1., 1.\]\); accepted"),
    ("negative v", torch_with(MATRIX, "exp_avg_sq", set_at(7, -1e-9)), "exp_avg_sq has a value -9.9.*e-10; accepted"),
    (
        "negative full v",
        torch_with(BIAS, "exp_avg_sq", set_at(3, -1.0)),
        "exp_avg_sq has a value -1.0; accepted",
    ),
    ("infinite v", torch_with(RAGGED, "exp_avg_sq", set_at(-1, torch.inf)), "exp_avg_sq has a value inf; accepted"),
    ("NaN in v", torch_with(RAGGED, "exp_avg_sq", set_at(300, torch.nan)), "exp_avg_sq has a value nan; accepted"),
    ("NaN in m", torch_with(MATRIX, "exp_avg", set_at(0, torch.nan)), "exp_avg has a value nan; accepted: finite"),
    ("infinite m", torch_with(BIAS, "exp_avg", set_at(0, -torch.inf)), "exp_avg has a value -inf; accepted: finite"),
    # ------------------------------------------------ bitsandbytes'
    ("Lion", other_bnb("Lion"), "state1 and no state2.*accepted"),
    ("momentum", other_bnb("SGD8bit", lr=0.1, momentum=0.9), "state1 and no state2.*accepted"),
    ("Lion, flat", other_bnb("Lion8bit", edit=flat), "state1 and no state2.*accepted"),
    ("AdEMAMix", other_bnb("AdEMAMix8bit"), "alpha is 5.0, AdEMAMix's; accepted"),
    ("AdEMAMix without alpha", other_bnb("AdEMAMix", alpha=0.0), r"betas is \(0.9, 0.999, 0.9999\); accepted"),
    ("LAMB", other_bnb("LAMB"), "unorm_vec, as LAMB has; accepted"),
    ("clipping", bnb_with(MATRIX, "gnorm_vec", lambda _: torch.ones(100)), "gnorm_vec.*accepted.*clip_grad_norm_"),
    ("not block-wise", bnb_with(MATRIX, "max1", lambda _: torch.ones(1)), "max1, as with block_wise=False; accepted"),
    ("large blocks", bnb_with(MATRIX, "absmax2", lambda t: t[:4]), "absmax2 has 4 .*8192 elements; accepted: 32.*256"),
    ("another map", bnb_with(MATRIX, "qmap1", lambda t: t[:16]), r"qmap1 has shape \(16,\).*accepted: \(256,\)"),
    ("no map", bnb_without("qmap2"), "'absmax2', 'qmap1', 'state1'.*accepted: .*'qmap2'"),
    ("no scales", bnb_without("absmax1"), "accepted: .*'absmax1'"),
    ("scales in 16 bits", bnb_with(RAGGED, "absmax1", lambda t: t.bfloat16()), "parameter 1: absmax1 .*bfloat16"),
    ("codes cast", bnb_with(RAGGED, "state2", lambda t: t.bfloat16()), "state2 has .*bfloat16; accepted: .*uint8"),
    ("16-bit moments", bnb_with(BIAS, "state1", lambda t: t.bfloat16()), "state1 .*bfloat16; accepted: .*float32"),
    ("transposed codes", bnb_with(MATRIX, "state1", lambda t: t.t()), r"state1 has shape \(128, 64\)"),
    ("a negative scale", bnb_with(MATRIX, "absmax2", set_at(5, -1.0)), "exp_avg_sq has a value -.*accepted"),
    ("an infinite scale", bnb_with(MATRIX, "absmax1", set_at(5, torch.inf)), "exp_avg has a value .*; accepted"),
    ("a list nested", bnb_with(BIAS, NESTED, lambda _: []), "is a list; accepted: a dictionary"),
]


@pytest.mark.parametrize(("name", "make", "words"), ROWS, ids=[row[0] for row in ROWS])
def test_state_that_is_not_adams_or_does_not_fit_is_refused(name: str, make: Make, words: str) -> None:
    given = make()
    as_given = copy.deepcopy(given)
    groups = AdamW8bit(make_params(FEW), lr=0.5).param_groups
    before = copied(groups)
    with pytest.raises(TypeError if name == "another setting" else ValueError, match=words):
        foreign.to_own(given, groups)
    assert_same_bits(before, copied(groups))
    assert_same_bits(as_given, given)


@pytest.mark.parametrize("source", ["torch AdamW", "bitsandbytes AdamW8bit flat", "bitsandbytes AdamW flat"])
def test_the_state_that_is_edited_here_fits(source: str) -> None:
    foreign.to_own(of(source)(), AdamW8bit(make_params(FEW)).param_groups)


def test_another_shape_of_the_parameter_is_refused_with_its_name() -> None:
    opt = AdamW8bit([(f"layer.{i}", p) for i, p in enumerate(make_params(TALLER))])
    for name in ("torch AdamW", "bitsandbytes AdamW8bit"):
        with pytest.raises(ValueError, match=r"parameter 0 \('layer.0'\): .* \(64, 128\) .*accepted: \(128, 64\)"):
            foreign.to_own(SOURCES[name].saved(), opt.param_groups)


def test_norms_of_a_clipping_that_was_never_on_are_dropped() -> None:
    make = bnb_with(MATRIX, "gnorm_vec", lambda _: torch.zeros(100))
    want = of("bitsandbytes AdamW8bit flat")()
    groups = AdamW8bit(make_params(FEW)).param_groups
    assert_same_bits(foreign.to_own(want, groups), foreign.to_own(make(), groups))


@pytest.mark.parametrize("name", ["bitsandbytes Adam", "bitsandbytes Adam8bit"])
def test_decoupled_decay_is_not_taken_for_l2(name: str) -> None:
    saved = of(name, weight_decay=0.25)()
    foreign.to_own(saved, AdamW8bit(make_params(FEW)).param_groups)
    with pytest.raises(ValueError, match=r"weight_decay is 0.25.*accepted by Adam8bit.*: 0"):
        foreign.to_own(saved, Adam8bit(make_params(FEW)).param_groups)


@pytest.mark.parametrize(
    ("kind", "cls", "settings", "words"),
    [
        ("lowmem_adam", AdamW8bit, {}, "kind is 'lowmem_adam'; accepted: 'torch', 'bitsandbytes'"),
        ("bnb", AdamW8bit, {}, "kind is 'bnb'; accepted: 'torch', 'bitsandbytes'"),
        ("bitsandbytes", AdamW8bit, {"maximize": True}, "maximize is True; accepted: False"),
        ("bitsandbytes", Adam8bit, {"weight_decay": 0.25}, "weight_decay is 0.25 as L2; accepted: 0"),
    ],
)
def test_an_export_that_cannot_be(kind: str, cls: OptimizerClass, settings: dict[str, Any], words: str) -> None:
    opt = cls(make_params(FEW), **settings)
    with pytest.raises(ValueError, match=words):
        foreign.from_own(opt.state_dict(), opt.param_groups, kind)


@pytest.mark.parametrize("kind", ["torch", "bitsandbytes"])
def test_an_export_of_state_that_is_not_ours(kind: str) -> None:
    with pytest.raises(ValueError, match="accepted: state of Adam8bit, AdamW8bit"):
        foreign.from_own(of("torch AdamW")(), AdamW8bit(make_params(FEW)).param_groups, kind)
