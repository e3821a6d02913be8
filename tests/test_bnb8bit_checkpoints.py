"""Checkpoints of bitsandbytes under ``moments="bnb8bit"``: in and out byte for byte, and its choices for parameters."""

from __future__ import annotations

import io
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import Parameter

from lowmem_adam import AdamW8bit, checkpoint
from lowmem_adam.foreign import split_overrides
from tests.bnb_cases import NESTED, SETTINGS, bitsandbytes
from tests.bnb_cases import SHAPES as FLAT_SHAPES
from tests.cases import SHAPES, Shape, assert_same_bits, copied, everything, make_params, set_gradients, train

BOTH = pytest.mark.parametrize("nested", [True, False], ids=["nested", "flat"])


def through_file(value: Any) -> Any:
    file = io.BytesIO()
    torch.save(value, file)
    file.seek(0)
    return torch.load(file, weights_only=True)


def flat(saved: dict[str, Any]) -> dict[str, Any]:
    """As bitsandbytes wrote it before 0.49.2."""
    return {**saved, "state": {key: {"step": s["step"], **s[NESTED]} for key, s in saved["state"].items()}}


def theirs(params: list[Parameter], steps: int = 3, **changes: Any) -> Any:
    opt = bitsandbytes().optim.AdamW8bit(params, **{**SETTINGS, **changes})
    train(opt, params, steps)
    return opt


def ours(params: list[Parameter], **changes: Any) -> AdamW8bit:
    return AdamW8bit(params, **{**SETTINGS, "moments": "bnb8bit", **changes})


def exported_from(opt: AdamW8bit, kind: str) -> dict[str, Any]:
    exported = checkpoint.export(opt, kind)
    assert exported is not None
    return exported


def row_major(saved: dict[str, Any]) -> dict[str, Any]:
    """Tensors of the state as they are in row-major order; in which order they lie is no matter of a checkpoint."""
    state = {
        key: {"step": s["step"], NESTED: {name: t.contiguous() for name, t in s[NESTED].items()}}
        for key, s in saved["state"].items()
    }
    return {**saved, "state": state}


@pytest.fixture
def manager() -> Iterator[Any]:
    """The real one, empty before and after."""
    found = bitsandbytes().optim.GlobalOptimManager.get_instance()
    found.initialize()
    yield found
    found.initialize()


# ---------------------------------------------------------------- byte for byte


@BOTH
@pytest.mark.parametrize("shapes", [FLAT_SHAPES, SHAPES], ids=["contiguous", "of every memory layout"])
def test_in_and_out(shapes: tuple[Shape, ...], nested: bool) -> None:
    shapes = tuple(shape for shape in shapes if 0 not in shape.shape)  # bitsandbytes cannot step these
    saved = through_file(theirs(make_params(shapes)).state_dict())
    opt = ours(make_params(shapes))
    opt.load_state_dict(saved if nested else flat(saved))
    for key, state in opt.state_dict()["state"].items():
        held = saved["state"][key][NESTED]
        assert int(state["step"]) == 3
        names = {"exp_avg": "state1", "exp_avg_sq": "state2"}
        assert_same_bits(
            {names.get(name, name): value for name, value in state.items() if name != "step"},
            {name: value.contiguous() for name, value in held.items() if not name.startswith("qmap")},
        )
    # Our own file in between.
    other = ours(make_params(shapes))
    other.load_state_dict(through_file(opt.state_dict()))
    exported = exported_from(other, "bitsandbytes")
    assert_same_bits(exported["state"], row_major(saved)["state"])
    assert exported["param_groups"] == saved["param_groups"]
    again = bitsandbytes().optim.AdamW8bit(make_params(shapes), **SETTINGS)
    again.load_state_dict(through_file(exported))
    assert_same_bits(row_major(again.state_dict())["state"], row_major(saved)["state"])


def test_a_run_goes_on_in_bitsandbytes_as_if_it_had_never_left() -> None:
    """Three steps there, three here by its own operator, three there: the bits of nine there."""
    whole = theirs(params := make_params(FLAT_SHAPES), 9)
    first = theirs(moving := make_params(FLAT_SHAPES), 3)
    opt = ours(moving, backend="bitsandbytes", nonfinite="propagate", low_precision_update="nearest")
    opt.load_state_dict(first.state_dict())
    train(opt, moving, 3, start=3)
    last = bitsandbytes().optim.AdamW8bit(moving, **SETTINGS)
    last.load_state_dict(exported_from(opt, "bitsandbytes"))
    train(last, moving, 3, start=6)
    assert_same_bits([p.detach() for p in moving], [p.detach() for p in params])
    assert_same_bits(last.state_dict(), whole.state_dict())


def test_export_shares_no_tensor() -> None:
    opt = ours(params := make_params(FLAT_SHAPES))
    train(opt, params, 2)
    exported = exported_from(opt, "bitsandbytes")
    before = copied(exported)
    train(opt, params, 2)
    assert_same_bits(exported, before)


def test_resumes_to_the_bit() -> None:
    whole = ours(params := make_params(SHAPES))
    train(whole, params, 6)
    first = ours(moving := make_params(SHAPES))
    train(first, moving, 3)
    second = ours(moving)
    second.load_state_dict(through_file(first.state_dict()))
    train(second, moving, 3, start=3)
    assert_same_bits(everything(second), everything(whole))


def test_between_our_settings_by_way_of_bitsandbytes_and_torch() -> None:
    """To "8bit" and back costs a coding of each; to "32bit" and back nothing."""
    opt = ours(params := make_params(FLAT_SHAPES))
    train(opt, params, 5)
    full = AdamW8bit(make_params(FLAT_SHAPES), **SETTINGS, moments="32bit")
    full.load_state_dict(exported_from(opt, "bitsandbytes"))
    back = ours(make_params(FLAT_SHAPES))
    back.load_state_dict(exported_from(full, "torch"))
    # A block's largest second moment has code 255, and so has a largest first one that is positive: these come back.
    for key, state in opt.state_dict()["state"].items():
        again = back.state_dict()["state"][key]
        if "state1" not in state:
            assert_same_bits(again, state)
            continue
        assert_same_bits(again["state2"], state["state2"])
        assert_same_bits(again["absmax2"], state["absmax2"])
    coded = AdamW8bit(make_params(FLAT_SHAPES), **SETTINGS, moments="8bit")
    coded.load_state_dict(exported_from(opt, "bitsandbytes"))
    home = ours(make_params(FLAT_SHAPES))
    home.load_state_dict(exported_from(coded, "bitsandbytes"))
    train(home, params, 1)


def test_state_that_was_all_in_32_bits_is_coded() -> None:
    saved = bitsandbytes().optim.AdamW(params := make_params(FLAT_SHAPES), **SETTINGS)
    train(saved, params, 2)
    opt = ours(make_params(FLAT_SHAPES))
    opt.load_state_dict(saved.state_dict())
    for param, shape in zip(opt.param_groups[0]["params"], FLAT_SHAPES, strict=True):
        assert ("state1" in opt.state[param]) == shape.coded


# ---------------------------------------------------------------- choices for single parameters


def test_overridden_parameters_stay_as_they_are(manager: Any) -> None:
    """A large one in fp32, a small one in 8 bits: through a load, steps, our own file and back to bitsandbytes."""
    params = make_params(FLAT_SHAPES)
    manager.register_parameters(params)
    manager.override_config(params[0], "optim_bits", 32)
    manager.override_config(params[4], key_value_dict={"min_8bit_size": 100})
    their = theirs(params)
    saved = their.state_dict()
    assert saved["state"][0][NESTED]["state1"].dtype == torch.float32
    assert saved["state"][4][NESTED]["state1"].dtype == torch.uint8
    opt = ours(moving := make_params(FLAT_SHAPES))
    opt.load_state_dict(saved)
    assert "exp_avg" in opt.state[moving[0]]
    assert "state1" in opt.state[moving[4]]
    exported = exported_from(opt, "bitsandbytes")
    assert_same_bits(exported["state"], saved["state"])
    train(opt, moving, 2, start=3)
    other = ours(make_params(FLAT_SHAPES))
    other.load_state_dict(through_file(opt.state_dict()))
    assert_same_bits(other.state_dict()["state"], opt.state_dict()["state"])
    assert "exp_avg" in opt.state[moving[0]]
    assert "state1" in opt.state[moving[4]]


@pytest.mark.parametrize("moments", ["8bit", "bnb8bit"])
def test_groups_for_overrides_and_their_checkpoint(manager: Any, moments: str) -> None:
    """In any other setting overridden parameters come into groups of their own, and so does their saved state."""
    params = make_params(FLAT_SHAPES)
    manager.register_parameters(params)
    manager.override_config([params[0], params[5]], "optim_bits", 32)
    manager.override_config(params[1], key_value_dict={"lr": 0.5, "betas": (0.7, 0.9)})
    saved = theirs(params).state_dict()
    groups, regrouped = split_overrides(params, saved, moments)
    places = {id(param): index for index, param in enumerate(params)}
    assert [[places[id(p)] for p in group["params"]]
            for group in groups] == [[0, 5], [1], [2, 3, 4, 6]]  # fmt: skip
    assert [group["moments"] for group in groups] == ["32bit", moments, moments]
    assert (groups[1]["lr"], groups[1]["betas"]) == (0.5, (0.7, 0.9))
    opt = AdamW8bit(groups, **SETTINGS)
    assert regrouped is not None
    opt.load_state_dict(regrouped)
    assert [group["lr"] for group in opt.param_groups] == [0.02, 0.5, 0.02]
    for index, (param, shape) in enumerate(zip(params, FLAT_SHAPES, strict=True)):
        state, held = opt.state[param], saved["state"][index][NESTED]
        if index in (0, 5):
            assert_same_bits([state["exp_avg"], state["exp_avg_sq"]], [held["state1"], held["state2"]])
        # Our own format keeps vectors of this length in fp32 whatever bitsandbytes does.
        full = index in (0, 5) or not shape.coded or (moments == "8bit" and len(shape.shape) == 1)
        assert ("exp_avg" in state) == full
    set_gradients(params, 9)
    opt.step()


def test_groups_from_a_checkpoint_alone(manager: Any) -> None:
    params = make_params(FLAT_SHAPES)
    manager.override_config(params[2], "optim_bits", 32)
    saved = theirs(params).state_dict()
    manager.initialize()
    fresh = make_params(FLAT_SHAPES)
    groups, regrouped = split_overrides([{"params": fresh, "lr": 0.02}], saved)
    assert [group["moments"] for group in groups] == ["8bit", "32bit"]
    assert [len(group["params"]) for group in groups] == [6, 1]
    assert groups[1]["params"][0] is fresh[2]
    opt = AdamW8bit(groups, **SETTINGS)
    assert regrouped is not None
    opt.load_state_dict(regrouped)
    assert_same_bits(opt.state[fresh[2]]["exp_avg"], saved["state"][2][NESTED]["state1"])


def test_groups_where_the_run_begins(manager: Any) -> None:
    """StableEmbedding registers its weight with the manager when it is made."""
    model = nn.Sequential(bitsandbytes().nn.StableEmbedding(100, 64), nn.Linear(64, 64))
    groups, nothing = split_overrides(model.named_parameters())
    assert nothing is None
    assert [(group["moments"], len(group["params"])) for group in groups] == [("32bit", 1), ("8bit", 4)]
    assert groups[0]["params"][0][0] == "0.weight"
    opt = AdamW8bit(groups)
    assert [len(group["params"]) for group in opt.param_groups] == [1, 4]


def test_groups_of_a_32_bit_optimizer_with_parameters_in_8(manager: Any) -> None:
    params = make_params(FLAT_SHAPES)
    manager.override_config(params[0], "optim_bits", 8)
    groups, _ = split_overrides(params, moments="32bit")
    assert [(group["moments"], len(group["params"])) for group in groups] == [("8bit", 1), ("32bit", 6)]


def test_groups_refuse_what_is_no_setting_here(manager: Any) -> None:
    params = make_params(FLAT_SHAPES)
    manager.override_config(params[0], "max_unorm", 1.0)
    with pytest.raises(ValueError, match=r"parameter 0: bitsandbytes' override max_unorm=1\.0 is no setting here"):
        split_overrides(params)
    manager.initialize()
    manager.override_config(params[0], "optim_bits", 4)
    with pytest.raises(ValueError, match="override optim_bits is 4; accepted: 8, 32"):
        split_overrides(params)
    manager.initialize()
    with pytest.raises(ValueError, match=r"param groups of \[7\] parameters; accepted: \[6\]"):
        split_overrides(params[:6], theirs(params).state_dict())


# ---------------------------------------------------------------- refusals


def with_tensor(saved: dict[str, Any], name: str, value: Tensor) -> dict[str, Any]:
    state = {key: {"step": s["step"], NESTED: dict(s[NESTED])} for key, s in saved["state"].items()}
    state[0][NESTED][name] = value
    return {**saved, "state": state}


def test_refuses_other_maps_and_scales_and_changes_nothing() -> None:
    saved = theirs(make_params(FLAT_SHAPES)).state_dict()
    opt = ours(params := make_params(FLAT_SHAPES))
    train(opt, params, 1)
    before = everything(opt)
    held = saved["state"][0][NESTED]
    for name, value, words in (
        ("qmap1", held["qmap1"] * 2, "qmap1 is not the dynamic map that bitsandbytes makes"),
        ("absmax1", held["absmax1"] * torch.inf, "absmax1 has a value"),
        ("absmax2", -held["absmax2"], "absmax2 has a value -"),
        ("absmax2", held["absmax2"][1:], "absmax2 has 31 blocks for 8192 elements; accepted: 32"),
        ("state1", held["state1"].float(), "accepted"),
    ):
        with pytest.raises(ValueError, match=words):
            opt.load_state_dict(with_tensor(saved, name, value))
        assert_same_bits(everything(opt), before)


@pytest.mark.parametrize(("saved_as", "loaded_as"), [("bnb8bit", "8bit"), ("8bit", "bnb8bit"), ("32bit", "bnb8bit")])
def test_own_state_of_another_setting_is_refused(saved_as: str, loaded_as: str) -> None:
    first = ours(params := make_params(FLAT_SHAPES), moments=saved_as)
    train(first, params, 1)
    opt = ours(make_params(FLAT_SHAPES), moments=loaded_as)
    with pytest.raises(ValueError, match=f"moments is '{saved_as}'; accepted: '{loaded_as}'"):
        opt.load_state_dict(first.state_dict())


def test_own_state_is_checked() -> None:
    opt = ours(params := make_params(FLAT_SHAPES))
    train(opt, params, 1)
    for name, value, words in (
        ("absmax1", torch.full((32,), torch.nan), "absmax1 has a value nan; accepted: finite numbers from 0"),
        ("absmax1", torch.zeros(31), r"absmax1 has shape \(31,\)"),
        ("state1", torch.zeros(64, 128, dtype=torch.int8), "state1 has shape .* and dtype torch.int8"),
        ("exp_avg", torch.zeros(64, 128), "accepted: "),
    ):
        saved = copied(opt.state_dict())
        saved["state"][0][name] = value
        with pytest.raises(ValueError, match=words):
            opt.load_state_dict(saved)
