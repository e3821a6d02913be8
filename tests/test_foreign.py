"""State of torch's and bitsandbytes' Adam as ours and back, made by real optimizers that took real steps."""

from __future__ import annotations

import io
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor
from torch.nn import Parameter

from lowmem_adam import Adam8bit, AdamW8bit, codec, foreign
from lowmem_adam.codec import FORMAT, Grid
from lowmem_adam.foreign import moments, of_bitsandbytes
from lowmem_adam.layout import Layout, Tile
from tests.cases import (
    CLASSES,
    DTYPES,
    FEW,
    SHAPES,
    OptimizerClass,
    Shape,
    assert_same_bits,
    copied,
    make_params,
    params_of,
    train,
)
from tests.test_memory import Allocations

SETTINGS: dict[str, Any] = {"lr": 0.02, "betas": (0.8, 0.99), "eps": 1e-7, "weight_decay": 0.03}
NESTED = of_bitsandbytes.NESTED
FULL: dict[str, Any] = {"moments": "32bit"}


def bitsandbytes() -> Any:
    return pytest.importorskip("bitsandbytes", reason="needs real bitsandbytes optimizers")


def through_file(value: Any) -> Any:
    file = io.BytesIO()
    torch.save(value, file)
    file.seek(0)
    return torch.load(file, weights_only=True)


def flat(saved: dict[str, Any]) -> dict[str, Any]:
    """As bitsandbytes wrote it before 0.49.2."""
    return {**saved, "state": {key: {"step": s["step"], **s[NESTED]} for key, s in saved["state"].items()}}


def of_bitsandbytes_named(name: str) -> Callable[..., torch.optim.Optimizer]:
    return lambda params, **settings: getattr(bitsandbytes().optim, name)(params, **settings)


class Source(NamedTuple):
    """An optimizer whose state is imported, and the class of ours that goes on with it."""

    kind: str
    make: Callable[..., torch.optim.Optimizer]
    ours: OptimizerClass
    settings: Mapping[str, Any] = {}
    edit: Callable[[dict[str, Any]], dict[str, Any]] = dict

    def saved(self, shapes: tuple[Shape, ...] = FEW, dtype: torch.dtype = torch.float32) -> dict[str, Any]:
        params = make_params(shapes, dtype)
        opt = self.make(params, **{**SETTINGS, **self.settings})
        train(opt, params, 3)
        saved = through_file(self.edit(opt.state_dict()))
        assert isinstance(saved, dict)
        return saved


SOURCES = {
    "torch AdamW": Source("torch", torch.optim.AdamW, AdamW8bit, {"maximize": True}),
    "torch Adam": Source("torch", torch.optim.Adam, Adam8bit),
    "torch fused": Source("torch", torch.optim.AdamW, AdamW8bit, {"fused": True}),
    "torch foreach": Source("torch", torch.optim.Adam, Adam8bit, {"foreach": True}),
    "bitsandbytes AdamW8bit": Source("bitsandbytes", of_bitsandbytes_named("AdamW8bit"), AdamW8bit),
    "bitsandbytes AdamW8bit flat": Source("bitsandbytes", of_bitsandbytes_named("AdamW8bit"), AdamW8bit, {}, flat),
    "bitsandbytes Adam8bit": Source("bitsandbytes", of_bitsandbytes_named("Adam8bit"), Adam8bit, {"weight_decay": 0}),
    "bitsandbytes Adam": Source("bitsandbytes", of_bitsandbytes_named("Adam"), Adam8bit, {"weight_decay": 0}),
    "bitsandbytes AdamW flat": Source("bitsandbytes", of_bitsandbytes_named("AdamW"), AdamW8bit, {}, flat),
}


THEIRS: dict[OptimizerClass, Any] = {AdamW8bit: torch.optim.AdamW, Adam8bit: torch.optim.Adam}


def values_of(state: Mapping[str, Any]) -> tuple[Tensor, Tensor]:
    """The moments that a foreign optimizer holds, fp32, row-major."""
    if "exp_avg" in state:
        return state["exp_avg"].float().contiguous(), state["exp_avg_sq"].float().contiguous()
    state = {**state, **state.get(NESTED, {})}
    if "qmap1" not in state:
        return state["state1"].contiguous(), state["state2"].contiguous()
    decode = bitsandbytes().functional.dequantize_blockwise
    return (
        decode(state["state1"], absmax=state["absmax1"], code=state["qmap1"], blocksize=256),
        decode(state["state2"], absmax=state["absmax2"], code=state["qmap2"], blocksize=256),
    )


def trained(cls: OptimizerClass, dtype: torch.dtype = torch.float32, steps: int = 12, **settings: Any) -> Adam8bit:
    params = make_params(SHAPES, dtype)
    opt = cls(params, **{**SETTINGS, **settings})
    train(opt, params, steps)
    return opt


def assert_within_coding_error(own: Mapping[str, Tensor], exp_avg: Tensor, exp_avg_sq: Tensor) -> None:
    """fp32 moments are as they were, coded ones within half a code."""
    if "exp_avg" in own:
        assert torch.equal(own["exp_avg"], exp_avg)
        assert torch.equal(own["exp_avg_sq"], exp_avg_sq)
        return
    cols = Layout.of(exp_avg.shape).cols
    floor, span = (own[key].repeat_interleave(128, dim=1)[:, :cols].flatten() for key in ("block_floor", "block_span"))
    root_code, m_code = own["exp_avg_sq_code"].flatten(), own["exp_avg_code"].flatten()
    decoded = codec.decode_root(root_code[:, None], Grid(floor, span))[:, 0]
    scale = 2.0 ** codec.ratio_octaves(span).double()
    span = codec.grid_octaves(span)
    root, m = exp_avg_sq.double().sqrt().float().flatten(), exp_avg.double().flatten()
    assert torch.equal(decoded > 0, root > 0)
    # Roots are coded linearly in the bits of the float, in 254 intervals. Coding and decoding both round a number of
    # bits up to 24 * 2^23 to float32, so by up to 8.
    bits_off = (decoded.view(torch.int32) - root.view(torch.int32)).abs()
    on_grid = root >= torch.exp2(floor.double() - 127)
    assert (bits_off <= span.double() * 2**23 / 254 / 2 + 16)[on_grid & (root > 0)].all()
    assert (root_code == 1)[~on_grid & (root > 0)].all()
    # y = m / (2^j root + |m|) in steps of 1/143; the codec's reciprocal is exact to 1.1e-6, its products to 2^-24 each.
    y = m / (scale * root + m.abs()).clamp_min(codec.SMALLEST_NORMAL)
    code = (y * FORMAT.ratio_scale).clamp(-FORMAT.ratio_limit, FORMAT.ratio_limit)
    assert ((m_code - code).abs() <= 0.5 + FORMAT.ratio_scale * 1.3e-6).all()


# ---------------------------------------------------------------- theirs as ours


@pytest.mark.parametrize("own_settings", [{}, FULL], ids=["8bit", "32bit"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", SOURCES)
def test_an_import_is_off_by_half_a_code_and_exact_where_moments_are_not_coded(
    name: str, dtype: torch.dtype, own_settings: dict[str, Any]
) -> None:
    source = SOURCES[name]
    saved = source.saved(SHAPES, dtype)
    given = copied(saved)
    assert foreign.kind_of(saved) == source.kind
    opt = source.ours(make_params(SHAPES, dtype), seed=5, nonfinite="propagate", **own_settings)
    before = copied(opt.param_groups)
    own = foreign.to_own(saved, opt.param_groups)
    assert_same_bits(given, saved)
    assert_same_bits(before, copied(opt.param_groups))
    for key, shape in enumerate(SHAPES):
        state = own["state"][key]
        assert ("exp_avg_code" in state) == (shape.coded and not own_settings)
        assert_within_coding_error(state, *values_of(saved["state"][key]))
        assert state["step"].item() == 3
    opt.load_state_dict(own)
    assert_same_bits(own["state"], copied(opt.state_dict()["state"]))
    theirs, ours = saved["param_groups"][0], opt.param_groups[0]
    assert set(ours) == set(before[0])
    for setting in ours.keys() - {"params"}:
        assert ours[setting] == theirs.get(setting, before[0][setting])
    train(opt, params_of(opt), 1, start=3)
    for tensor in (tensor for state in own["state"].values() for tensor in state.values()):
        tensor.zero_()
    assert_same_bits(given, saved)


@pytest.mark.parametrize("name", SOURCES)
def test_a_run_goes_on_where_the_other_optimizer_was(name: str) -> None:
    """Both go on for 20 steps; a run that starts without moments is the control."""
    source = SOURCES[name]
    params = make_params(FEW, as_is=False)
    theirs = source.make(params, **{**SETTINGS, **source.settings})
    train(theirs, params, 40)
    saved, start = through_file(source.edit(theirs.state_dict())), copied(params)
    runs = []
    for keep in (True, False):
        opt = source.ours([Parameter(value) for value in copied(start)])
        own = foreign.to_own(saved, opt.param_groups)
        opt.load_state_dict(own if keep else {**own, "state": {}})
        train(opt, params_of(opt), 20, start=40)
        runs.append(params_of(opt))
    train(theirs, params, 20, start=40)
    for theirs_now, imported, restarted in zip(params, *runs, strict=True):
        assert (imported - theirs_now).norm() < 0.2 * (restarted - theirs_now).norm()


def test_settings_come_from_the_file_and_what_it_does_not_have_from_the_optimizer() -> None:
    names = [shape.name for shape in FEW]
    theirs = torch.optim.AdamW(list(zip(names, make_params(FEW), strict=True)), torch.tensor(0.5), foreach=False)
    betas = (torch.tensor(0.75), torch.tensor(0.9375))
    theirs.param_groups[0].update(initial_lr=0.25, betas=betas, weight_decay=0.125)
    opt = AdamW8bit(make_params(FEW), lr=9.0, maximize=True, low_precision_update="nearest", seed=3)
    opt.load_state_dict(foreign.to_own(through_file(theirs.state_dict()), opt.param_groups))
    assert {key: value for key, value in opt.param_groups[0].items() if key != "params"} == {
        "lr": torch.tensor(0.5),
        "betas": (0.75, 0.9375),
        "eps": 1e-8,
        "weight_decay": 0.125,
        "maximize": False,
        "initial_lr": 0.25,
        "param_names": names,
        "moments": "8bit",
        "low_precision_update": "nearest",
        "master_bits": 32,
        "nonfinite": "skip",
        "seed": 3,
        "backend": None,
        "decoupled_weight_decay": True,
        "format_version": FORMAT.version,
    }


@pytest.mark.parametrize("name", ["torch AdamW", "bitsandbytes AdamW8bit"])
def test_several_groups_parameters_without_state_and_state_of_none(name: str) -> None:
    source = SOURCES[name]
    params, ours = make_params(FEW), make_params(FEW)
    cut = [{"params": params[:2], "lr": 0.5}, {"params": params[2:], "weight_decay": 0.25}]
    theirs = source.make(cut, **SETTINGS)
    own_cut: list[dict[str, Any]] = [{"params": ours[:2]}, {"params": ours[2:], **FULL}]
    opt = source.ours(own_cut)
    assert foreign.to_own(theirs.state_dict(), opt.param_groups)["state"] == {}
    for param in params[:4]:
        param.grad = torch.ones_like(param)
    theirs.step()
    assert theirs.state[params[4]] == {}
    own = foreign.to_own(through_file(theirs.state_dict()), opt.param_groups)
    assert list(own["state"]) == [0, 1, 2, 3]
    groups = [(group["lr"], group["weight_decay"], group["moments"]) for group in own["param_groups"]]
    assert groups == [(0.5, 0.03, "8bit"), (0.02, 0.25, "32bit")]
    opt.load_state_dict(own)


@pytest.mark.parametrize("step", [7, 7.0, torch.tensor(7), torch.tensor(7.0), torch.tensor([7.0])], ids=repr)
def test_a_step_may_be_any_number(step: Any) -> None:
    saved = SOURCES["torch AdamW"].saved()
    saved["state"][0]["step"] = step
    own = foreign.to_own(saved, AdamW8bit(make_params(FEW)).param_groups)
    assert_same_bits(own["state"][0]["step"], torch.tensor(7))


def test_state_of_deepspeed_cpu_adam_is_torchs_with_another_setting() -> None:
    """As its ``state_dict()`` has it: steps are integers, groups have ``bias_correction`` and nothing of torch's."""
    saved = SOURCES["torch AdamW"].saved()
    opt = AdamW8bit(make_params(FEW))
    wanted = foreign.to_own(saved, opt.param_groups)
    (group,) = saved["param_groups"]
    names = ("lr", "betas", "eps", "weight_decay", "amsgrad", "params")
    theirs = {**{name: group[name] for name in names}, "bias_correction": True}
    states = {key: {**state, "step": int(state["step"])} for key, state in saved["state"].items()}
    own = foreign.to_own({"state": states, "param_groups": [theirs]}, opt.param_groups)
    assert_same_bits(own["state"], wanted["state"])
    assert "bias_correction" not in own["param_groups"][0]
    opt.load_state_dict(own)


def test_our_own_state_is_returned_as_it_is() -> None:
    opt = trained(AdamW8bit, steps=1)
    saved = opt.state_dict()
    assert foreign.kind_of(saved) == "lowmem_adam"
    assert_same_bits(saved, foreign.to_own(saved, []))


def test_bitsandbytes_state_of_an_accelerator_is_read_in_the_order_in_memory() -> None:
    """There a parameter is made contiguous, its state keeps the strides, and the step goes through memory."""
    saved = SOURCES["bitsandbytes AdamW8bit"].saved(SHAPES)
    groups = AdamW8bit(make_params(SHAPES)).param_groups
    want = foreign.to_own(saved, groups)
    moved = 0
    for entry in saved["state"].values():
        nested = entry[NESTED]
        if "qmap1" in nested and not nested["state1"].is_contiguous():
            moved += 1
            for key in ("state1", "state2"):
                in_memory = torch.empty_like(nested[key])
                in_memory.as_strided((in_memory.numel(),), (1,)).copy_(nested[key].flatten())
                assert not torch.equal(in_memory, nested[key])
                nested[key] = in_memory
    assert moved == 3
    assert_same_bits(want, foreign.to_own(saved, groups))


def test_bitsandbytes_decouples_weight_decay_in_adam_too() -> None:
    """So ``Adam8bit`` refuses what ``AdamW8bit`` takes: a zero gradient leaves the decay alone."""
    for name in ("Adam", "Adam8bit"):
        (param,) = make_params(FEW[:1])
        before = copied(param)
        param.grad = torch.zeros_like(param)
        of_bitsandbytes_named(name)([param], lr=0.5, weight_decay=0.5).step()
        torch.testing.assert_close(param.detach(), before * 0.75)


# ---------------------------------------------------------------- ours as theirs


@pytest.mark.parametrize("own_settings", [{}, FULL], ids=["8bit", "32bit"])
@pytest.mark.parametrize("cls", CLASSES)
def test_a_round_trip_through_torch_changes_no_bit(cls: OptimizerClass, own_settings: dict[str, Any]) -> None:
    opt = trained(cls, **own_settings)
    own = copied(opt.state_dict())
    theirs = THEIRS[cls](make_params(SHAPES))
    theirs.load_state_dict(foreign.from_own(own, opt.param_groups, "torch"))
    back = foreign.to_own(through_file(theirs.state_dict()), opt.param_groups)
    assert_same_bits(own["state"], back["state"])
    assert own["param_groups"] == back["param_groups"]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("cls", CLASSES)
def test_torch_gets_what_it_holds_itself_and_steps(cls: OptimizerClass, dtype: torch.dtype) -> None:
    opt = trained(cls, dtype, maximize=True)
    given = copied(opt.state_dict())
    exported = foreign.from_own(given, opt.param_groups, "torch")
    assert_same_bits(copied(opt.state_dict()), given)
    params = make_params(SHAPES, dtype)
    theirs = THEIRS[cls](params, fused=True)  # which goes through memory, whatever the strides
    train(theirs, params, 1)
    real = theirs.state_dict()
    assert list(exported["param_groups"][0]) == list(real["param_groups"][0])
    assert exported["param_groups"][0] == {**real["param_groups"][0], **SETTINGS, "maximize": True, "fused": None}
    for key, state in exported["state"].items():
        for name, value in real["state"][key].items():
            assert (state[name].dtype, state[name].shape) == (value.dtype, value.shape)
            assert state[name].stride() == value.stride()
        assert state["step"].item() == 12
    theirs.load_state_dict(exported)
    assert_same_bits(copied(exported["state"]), copied(theirs.state_dict()["state"]))
    train(theirs, params, 2, start=12)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", ["AdamW8bit", "AdamW"])
def test_bitsandbytes_gets_what_it_holds_itself_and_steps(name: str, dtype: torch.dtype) -> None:
    opt = trained(AdamW8bit, dtype, **(FULL if name == "AdamW" else {}))
    exported = foreign.from_own(opt.state_dict(), opt.param_groups, "bitsandbytes")
    exact = foreign.from_own(opt.state_dict(), opt.param_groups, "torch")["state"]
    params = make_params(SHAPES, dtype)
    theirs = of_bitsandbytes_named(name)(params)
    train(theirs, params, 1)
    real = theirs.state_dict()
    assert exported["param_groups"] == [{**real["param_groups"][0], **SETTINGS}]
    for key, state in exported["state"].items():
        assert {k: (v.dtype, v.shape) for k, v in state[NESTED].items()} == {
            k: (v.dtype, v.shape) for k, v in real["state"][key][NESTED].items()
        }
        assert type(state["step"]) is int
        if dtype == torch.float32:  # where torch's form holds every value
            assert_within_map_spacing(state[NESTED], exact[key])
    theirs.load_state_dict(through_file(exported))
    assert_same_bits(exported["state"], theirs.state_dict()["state"])
    train(theirs, params, 2, start=12)
    assert all(bool(param.isfinite().all()) for param in params)


def assert_within_map_spacing(nested: Mapping[str, Tensor], exact: Mapping[str, Tensor]) -> None:
    """Half the distance to the next value of the map, times the block's largest; 1e-6 of it for rounding to float32."""
    decoded = values_of({NESTED: nested})
    for i, key in enumerate(("exp_avg", "exp_avg_sq")):
        if "qmap1" not in nested:
            assert torch.equal(decoded[i], exact[key])
            continue
        table, codes = nested[f"qmap{i + 1}"], nested[f"state{i + 1}"].flatten().int()
        scale = nested[f"absmax{i + 1}"].repeat_interleave(256)[: len(codes)]
        gap = torch.nn.functional.pad(table.diff(), (1, 1))
        reach = torch.maximum(gap[codes], gap[codes + 1]) / 2
        assert ((decoded[i] - exact[key]).flatten().abs() <= (reach + 1e-6) * scale).all()


def test_32bit_state_goes_to_bitsandbytes_and_back_as_it_is() -> None:
    opt = trained(AdamW8bit, **FULL)
    own = copied(opt.state_dict())
    back = foreign.to_own(foreign.from_own(own, opt.param_groups, "bitsandbytes"), opt.param_groups)
    assert_same_bits(own["state"], back["state"])


@pytest.mark.parametrize("spread", [0.02, 1.0, 3.0, 26.0])
@pytest.mark.parametrize("width", [1, 2, 9, 128])
def test_decoded_moments_are_coded_as_they_were(width: int, spread: float) -> None:
    """Also where rounding has carried a root over an octave, so that the grid looks narrower than it was."""
    generator = torch.Generator().manual_seed(width)
    n_blocks = 4000
    exponent = torch.rand(n_blocks, width, generator=generator) * spread
    root = torch.exp2(exponent + torch.rand(n_blocks, 1, generator=generator) * 3)
    root[torch.rand(root.shape, generator=generator) < 0.1] = 0.0
    m = root * torch.randn(root.shape, generator=generator)
    dither = codec.Dither(Tile(n_blocks, width, 0, 0), 3, 0, torch.device("cpu"))
    codes = codec.encode(m, root, dither)
    values = codec.decode(codes)
    again = moments._nearest_codes(*values)
    assert_same_bits(values, codec.decode(again))
    same = (again.root == codes.root).all(dim=1) & (again.grid.span == codes.grid.span)
    natural = codec.block_grid(values[1])
    moved = (natural.floor != codes.grid.floor) | (natural.span != codes.grid.span)
    assert same.all() if width > 9 else (~same).sum() <= n_blocks / 254 / 2 ** (width - 1)
    assert moved.any() == (width > 1)


@pytest.mark.parametrize("form", ["torch", "bitsandbytes"])
def test_memory_is_bounded(form: str) -> None:
    """By what comes out, a few MiB of tiles, and for bitsandbytes' 8 bits one parameter's moments in fp32."""
    shape, tiles = (512, 2048), 6 * 2**20
    coded, full = 2.02 * 2**20, 8 * 2**20
    opt = AdamW8bit(make_params((Shape("large", shape, True, "transposed"), Shape("other", shape, True))))
    train(opt, params_of(opt), 1)
    with Allocations() as exporting:
        exported = foreign.from_own(opt.state_dict(), opt.param_groups, form)
    with Allocations() as importing:
        foreign.to_own(exported, opt.param_groups)
    assert exporting.peak <= (2 * full if form == "torch" else 2 * coded + full) + tiles
    assert importing.peak <= 2 * coded + tiles
