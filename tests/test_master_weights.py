"""``low_precision_update="split"`` and ``"fp32"``: 16-bit parameters that are stepped as float32 ones are."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import Parameter

from lowmem_adam import Adam8bit, AdamW8bit
from lowmem_adam.kernels import rounding
from lowmem_adam.state import MASTER_KEYS, expected_tensors
from tests.cases import (
    CLASSES,
    FEW,
    SHAPES,
    OptimizerClass,
    assert_same_bits,
    copied,
    differ,
    everything,
    gradient,
    make_params,
    need_other_gradients,
    params_of,
    train,
)
from tests.kernel_cases import MASTERS, UPDATES
from tests.test_state_dict import through_file

KEPT = {"split": torch.int16, "split in 24 bits": torch.int8, "fp32": torch.float32}
DEFAULTS = {"low_precision_update": "stochastic", "master_bits": 32}
every_master = pytest.mark.parametrize("update", MASTERS)
every_half = pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])


def twins_of(params: list[Parameter]) -> list[Parameter]:
    """float32 parameters of the same values."""
    return [Parameter(param.detach().float()) for param in params]


def step_both(pairs: list[tuple[Adam8bit, list[Parameter]]], step: int) -> None:
    """One step of each with the same float32 gradients."""
    need_other_gradients()
    for opt, params in pairs:
        for index, param in enumerate(params):
            param.grad_dtype = None
            param.grad = gradient(param.detach().float(), 0, index, step)
        opt.step()


# ---------------------------------------------------------------- as float32


@pytest.mark.parametrize("update", ["split", "fp32"])
@pytest.mark.parametrize("moments", ["8bit", "32bit"])
@pytest.mark.parametrize("cls", CLASSES)
def test_the_weight_is_that_of_a_float32_parameter(cls: OptimizerClass, moments: str, update: str) -> None:
    params = make_params(SHAPES, torch.bfloat16)
    wide = twins_of(params)
    settings: dict[str, Any] = {"lr": 1e-3, "moments": moments, "weight_decay": 0.1}
    opt, other = cls(params, **settings, **UPDATES[update]), cls(wide, **settings)
    for step in range(6):
        step_both([(opt, params), (other, wide)], step)
        opt.clip_grad_norm_(1e-3)
        other.clip_grad_norm_(1e-3)
        for param, twin in zip(params, wide, strict=True):
            assert_same_bits(opt.master_weight(param), twin.detach().contiguous())
    exact = [opt.master_weight(param) for param in params]
    assert differ(exact, [param.detach().float() for param in params])


def test_float16_is_stepped_as_float32_above_its_fixed_point() -> None:
    params = [Parameter((torch.rand(64, 128, generator=torch.Generator().manual_seed(1)) + 0.5).half())]
    wide = twins_of(params)
    opts = [AdamW8bit(params, lr=1e-5, **UPDATES["split"]), AdamW8bit(wide, lr=1e-5)]
    for step in range(6):
        step_both([(opts[0], params), (opts[1], wide)], step)
    assert_same_bits(opts[0].master_weight(params[0]), wide[0].detach())


def test_small_steps_add_up() -> None:
    """200 steps of 1e-5 on weights of about 1, of which bfloat16 has 128 to a unit: nearest stands still."""
    travelled = {}
    for update, settings in UPDATES.items():
        param = Parameter(torch.full((64, 128), 1.25, dtype=torch.bfloat16))
        opt = AdamW8bit([param], lr=1e-5, weight_decay=0.0, **settings)
        for _ in range(200):
            param.grad = torch.ones_like(param)
            opt.step()
        travelled[update] = (1.25 - opt.master_weight(param).double()).mean().item() / (200 * 1e-5)
    assert travelled["nearest"] == 0.0
    for update in ("split", "split in 24 bits", "fp32"):
        assert travelled[update] == pytest.approx(1.0, abs=0.01)
    # Of 8,192 roundings up or down by 2^-7 the mean is known to a few percent of 2e-3.
    assert travelled["stochastic"] == pytest.approx(1.0, abs=0.25)


@every_half
@every_master
def test_backends_give_the_same_bits(update: str, dtype: torch.dtype) -> None:
    found = []
    for backend in (None, "reference"):
        params = make_params(SHAPES, dtype)
        opt = AdamW8bit(params, lr=1e-3, backend=backend, **UPDATES[update])
        train(opt, params, 3)
        found.append({"params": copied(params), "state": copied(opt.state_dict()["state"])})
    assert_same_bits(found[0], found[1])


# ---------------------------------------------------------------- parameters changed from outside


@every_half
@every_master
@pytest.mark.parametrize("to", ["zero", "negative zero", "other values", "infinite", "not a number"])
def test_a_changed_parameter_is_stepped_from_what_it_is_now(to: str, update: str, dtype: torch.dtype) -> None:
    params = make_params(FEW[:1], dtype)
    opt = AdamW8bit(params, lr=1e-4, weight_decay=0.0, **UPDATES[update])
    train(opt, params, 3)
    value = {"zero": 0.0, "negative zero": -0.0, "infinite": torch.inf, "not a number": torch.nan}.get(to)
    new = torch.randn(params[0].shape) + 3.0 if value is None else torch.full(params[0].shape, value)
    with torch.no_grad():
        params[0].copy_(new)
    weight, now = opt.master_weight(params[0]), params[0].detach().float()
    if update == "fp32" or to in ("infinite", "not a number"):
        assert torch.equal(weight.nan_to_num(7.0), now.nan_to_num(7.0))
    if update != "fp32":  # halves are rounded away from zero
        rounded = rounding.split(weight, dtype, torch.int16, None)[0]
        assert torch.equal(rounded.nan_to_num(7.0), params[0].detach().nan_to_num(7.0))
    before = copied(params[0])
    params[0].grad = torch.zeros_like(params[0])
    opt.param_groups[0]["lr"] = 0.0
    opt.step()
    assert torch.equal(params[0].nan_to_num(7.0), before.nan_to_num(7.0))


def test_a_model_loaded_after_construction_counts() -> None:
    """The usual order of a script: optimizer first, weights then."""
    for update, settings in UPDATES.items():
        first, second = make_params(FEW, torch.bfloat16), make_params(FEW, torch.bfloat16, seed=1)
        late, early = AdamW8bit(first, lr=1e-3, **settings), AdamW8bit(second, lr=1e-3, **settings)
        with torch.no_grad():
            for param, value in zip(first, second, strict=True):
                param.copy_(value)
        train(late, first, 2)
        train(early, second, 2)
        assert_same_bits(everything(late), everything(early), update)


@every_master
@pytest.mark.parametrize("order", ["model first", "optimizer first"])
def test_model_and_optimizer_load_in_any_order(order: str, update: str) -> None:
    params = make_params(FEW, torch.bfloat16)
    opt = AdamW8bit(params, lr=1e-3, **UPDATES[update])
    train(opt, params, 3)
    saved = through_file({"params": copied(params), "opt": opt.state_dict()})
    others = make_params(FEW, torch.bfloat16, seed=1)
    other = AdamW8bit(others, lr=1.0, **UPDATES[update])
    train(other, others, 1)
    if order == "optimizer first":
        other.load_state_dict(saved["opt"])
    with torch.no_grad():
        for param, value in zip(others, saved["params"], strict=True):
            param.copy_(value)
    if order == "model first":
        other.load_state_dict(saved["opt"])
    for each, held in ((opt, params), (other, others)):
        train(each, held, 2, start=3)
    assert_same_bits(everything(opt), everything(other))


@every_master
def test_a_skipped_block_keeps_parameter_and_rest(update: str) -> None:
    params = make_params(FEW[:1], torch.bfloat16)
    opt = AdamW8bit(params, lr=1e-3, **UPDATES[update])
    train(opt, params, 3)
    before, kept = opt.master_weight(params[0]), copied(opt.state[params[0]])
    params[0].grad = torch.ones_like(params[0])
    params[0].grad[3, 5] = torch.nan
    with pytest.warns(RuntimeWarning, match="1 blocks"):
        opt.step()
    after, key = opt.master_weight(params[0]), MASTER_KEYS[KEPT[update]]
    assert torch.equal(after[3], before[3])
    assert torch.equal(opt.state[params[0]][key][3], kept[key][3])
    assert (after[:3] != before[:3]).all()


# ---------------------------------------------------------------- what is held


@every_half
@pytest.mark.parametrize("update", UPDATES)
def test_state_has_what_the_setting_asks_for_and_the_report_counts_it(update: str, dtype: torch.dtype) -> None:
    params = [*make_params(FEW, dtype), *make_params(FEW, seed=1)]
    opt = AdamW8bit(params, **UPDATES[update])
    train(opt, params, 1)
    for param in params:
        kept = KEPT.get(update) if param.dtype == dtype else None
        wanted = expected_tensors(param.shape, "8bit", None, kept)
        assert {key: (tuple(v.shape), v.dtype) for key, v in opt.state[param].items()} == wanted
    numel = sum(param.numel() for param in params if param.dtype == dtype)
    counted = {key: size for key, size in opt.memory_report()["bytes"].items() if key in MASTER_KEYS.values()}
    assert counted == ({MASTER_KEYS[KEPT[update]]: numel * KEPT[update].itemsize} if update in KEPT else {})


def test_master_weight_is_new_memory_and_the_parameter_where_nothing_is_kept() -> None:
    params = make_params(SHAPES, torch.bfloat16) + make_params(FEW)
    for settings in UPDATES.values():
        opt = AdamW8bit(params, **settings)
        for param in params:
            weight = opt.master_weight(param)
            assert_same_bits(weight, param.detach().float().contiguous())
            assert weight.data_ptr() != param.data_ptr() or not param.numel()
    opt = AdamW8bit(params, low_precision_update="nearest")
    train(opt, params, 1)
    assert_same_bits([opt.master_weight(p) for p in params], [p.detach().float().contiguous() for p in params])
    for other, words in ((torch.zeros(3), r"shape \(3,\)"), ("weight", "str")):
        with pytest.raises(ValueError, match=f"{words}.*accepted: a parameter of this optimizer"):
            opt.master_weight(other)  # type: ignore[arg-type]


def test_a_setting_that_changes_begins_anew_with_the_parameter() -> None:
    names = list(UPDATES)
    for old in names:
        for new in names:
            params = make_params(FEW, torch.bfloat16)
            opt = AdamW8bit(params, lr=1e-3, **UPDATES[old])
            train(opt, params, 2)
            twins = [Parameter(copied(param)) for param in params]
            twin = AdamW8bit(twins, lr=1e-3, **UPDATES[new])
            moments = {
                index: {key: value for key, value in state.items() if key not in MASTER_KEYS.values()}
                for index, state in copied(opt.state_dict()["state"]).items()
            }
            opt.param_groups[0].update({**DEFAULTS, **UPDATES[new]})
            kept = [opt.master_weight(param) for param in params]
            if old != new:
                assert_same_bits(kept, [param.detach().float().contiguous() for param in params])
                for param, state in zip(twins, moments.values(), strict=True):
                    twin.state[param] = state
                train(twin, twins, 1, start=2)
                train(opt, params, 1, start=2)
                assert_same_bits(copied(params), copied(twins), f"{old} to {new}")
                assert_same_bits(opt.state_dict()["state"], twin.state_dict()["state"], f"{old} to {new}")


# ---------------------------------------------------------------- saved state


@every_master
@pytest.mark.parametrize("moments", ["8bit", "32bit"])
def test_a_round_trip_changes_no_bit(moments: str, update: str) -> None:
    params = make_params(SHAPES, torch.bfloat16)
    opt = AdamW8bit(params, moments=moments, **UPDATES[update])
    train(opt, params, 2)
    saved = through_file(opt.state_dict())
    assert_same_bits(saved, opt.state_dict())
    other = AdamW8bit(make_params(SHAPES, torch.bfloat16), moments=moments)  # settings come from the file
    other.load_state_dict(saved)
    assert_same_bits(opt.state_dict(), other.state_dict())


def saved_by(update: str) -> dict[str, Any]:
    params = make_params(FEW, torch.bfloat16)
    opt = AdamW8bit(params, **UPDATES[update])
    train(opt, params, 1)
    return copied(opt.state_dict())


@pytest.mark.parametrize(
    ("update", "change", "words"),
    [
        ("fp32", lambda s: s["state"][1].pop("master_weight"), "parameter 1.*keeps master_weight.*accepted"),
        ("split", lambda s: s["state"][1].pop("weight_correction"), "parameter 1.*keeps weight_correction.*accepted"),
        ("split", lambda s: s["param_groups"][0].update(master_bits=24), "int16; accepted: .*int8"),
        ("split", lambda s: s["param_groups"][0].update(master_bits=16), "master_bits is 16; accepted: 32, 24"),
        ("split", lambda s: s["param_groups"][0].update(low_precision_update="fp32"), "keeps master_weight"),
        ("nearest", lambda s: s["param_groups"][0].update(low_precision_update="fp32"), "keeps master_weight"),
        ("fp32", lambda s: s["param_groups"][0].update(low_precision_update="nearest"), "accepted: .*'step'"),
        ("fp32", lambda s: s["state"][0].update(master_weight=s["state"][0]["master_weight"].double()), "float64"),
        ("fp32", lambda s: s["state"][0].update(master_weight=s["state"][0]["master_weight"][:9]), r"\(9, 128\)"),
    ],
)
def test_state_without_what_its_setting_asks_for_changes_nothing(update: str, change: Any, words: str) -> None:
    params = make_params(FEW, torch.bfloat16, seed=2)
    opt = AdamW8bit(params, lr=0.5, low_precision_update="stochastic")
    train(opt, params, 1)
    before, given = everything(opt), saved_by(update)
    change(given)
    with pytest.raises(ValueError, match=words):
        opt.load_state_dict(given)
    assert_same_bits(before, everything(opt))


def test_a_tensor_of_another_dtype_put_into_the_state_is_refused() -> None:
    params = make_params(FEW, torch.bfloat16)
    opt = AdamW8bit(params, low_precision_update="fp32")
    train(opt, params, 1)
    opt.state[params[0]]["master_weight"] = opt.state[params[0]]["master_weight"].double()
    before = everything(opt)
    with pytest.raises(ValueError, match=r"master_weight has .*float64; accepted: .*float32"):
        train(opt, params, 1)
    assert_same_bits(before, everything(opt))


@pytest.mark.parametrize("update", ["nearest", "stochastic"])
def test_state_saved_before_there_were_master_bits_loads(update: str) -> None:
    saved = saved_by(update)
    del saved["param_groups"][0]["master_bits"]
    opt = AdamW8bit(make_params(FEW, torch.bfloat16), low_precision_update="split", master_bits=24)
    opt.load_state_dict(saved)
    assert opt.param_groups[0]["master_bits"] == 32
    assert opt.param_groups[0]["low_precision_update"] == update
    params = params_of(opt)
    train(opt, params, 1)


@every_master
def test_state_of_torch_starts_from_the_parameters(update: str) -> None:
    params = make_params(FEW, torch.bfloat16)
    theirs = torch.optim.AdamW(params, lr=1e-3)
    train(theirs, params, 2)
    found = []
    for settings in (UPDATES[update], UPDATES["nearest"]):
        own = [Parameter(copied(param)) for param in params]
        opt = AdamW8bit(own, **settings)
        opt.load_state_dict(theirs.state_dict())
        weights: list[Tensor] = [opt.master_weight(param) for param in own]
        assert_same_bits(weights, [param.detach().float().contiguous() for param in params])
        train(opt, own, 1, start=2)
        found.append([opt.master_weight(param) for param in own])
    assert differ(*found)
