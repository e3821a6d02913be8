"""Betas whose ratios m / sqrt(v) exceed what a code reaches: ratio octaves of blocks, from the codec to saved state."""

from __future__ import annotations

import math
import pickle
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import Parameter

from lowmem_adam import AdamW8bit, codec, foreign
from lowmem_adam.codec import FORMAT, MAX_RATIO, Dither, Grid
from lowmem_adam.foreign import moments
from lowmem_adam.kernels import fragment, reference
from lowmem_adam.kernels.fragment import CodedMoments
from lowmem_adam.layout import Tile
from tests import kernel_cases as cases
from tests.cases import assert_same_bits, copied, generator
from tests.kernel_cases import Case, Step, assert_same, isas, native, one_step, play, scalars, whole
from tests.oracle import TextbookAdam

WIDE = [(0.9, 0.9999), (0.0, 0.999), (0.5, 0.999), (0.95, 0.9)]
RATIO_MIDDLE = torch.tensor(128.5)
NEAREST = torch.tensor(True)
WIDTH = (1 + MAX_RATIO) ** 2 / (143 * MAX_RATIO)
"""Of the widest ratio code that is used, relative to its ratio: 0.070, whatever the ratio octaves are."""
ALL_CODES = torch.arange(-FORMAT.ratio_limit, FORMAT.ratio_limit + 1, dtype=torch.int8)
ALL_OCTAVES = torch.arange(8, dtype=torch.uint8)
STEPS: dict[str, Step] = {"reference": reference.adam_step_, **{isa: native(isa) for isa in isas()}}

every_step = pytest.mark.parametrize("name", STEPS)


def dither(n_blocks: int, step: int = 1, width: int = 128) -> Dither:
    return Dither(Tile(n_blocks, width, 0, 0), step, 0, torch.device("cpu"))


def octaves_of(span: Tensor) -> list[int]:
    return codec.ratio_octaves(span).flatten().tolist()


# ---------------------------------------------------------------- the codec


@pytest.mark.parametrize("betas", [(0.9, 0.999), (0.9, 0.95), (0.95, 0.99), (0.8, 0.99), (0.9, 0.9991), *WIDE])
def test_betas_decide_by_the_bound_on_the_ratio(betas: tuple[float, float]) -> None:
    beta1, beta2 = betas
    bounded = beta1**2 < beta2
    bound = (1 - beta1) / math.sqrt((1 - beta2) * (1 - beta1**2 / beta2)) if bounded else math.inf
    assert codec.exceeds(*betas) == (bound > MAX_RATIO) == (betas in WIDE)


def test_extreme_betas() -> None:
    assert codec.exceeds(0.0, 0.0)  # beta1^2 is not below beta2
    assert not codec.exceeds(1 - 2**-53, 1 - 2**-53)  # the bound is 1
    assert not codec.exceeds(0.0, 2.0**-1000)


def test_thresholds_are_the_codes_of_the_largest_ratios() -> None:
    exact = [MAX_RATIO * 2**i for i in range(7)]
    assert FORMAT.ratio_thresholds == tuple(torch.tensor([143 * r / (1 + r) for r in exact]).tolist())
    assert FORMAT.max_octaves < 1 << FORMAT.octave_bits
    assert len(FORMAT.ratio_thresholds) < 1 << 8 - FORMAT.octave_bits


@pytest.mark.parametrize("floor", [2, 60, 127, 185])
def test_every_code_with_every_count_of_octaves_survives_a_round_trip(floor: int) -> None:
    octaves = ALL_OCTAVES
    grid = codec.with_ratio_octaves(Grid(octaves * 0 + floor, octaves * 0 + 5), octaves)
    root_codes = torch.arange(1, 256, dtype=torch.uint8).repeat_interleave(255).expand(8, -1)
    codes = ALL_CODES.repeat(255).expand(8, -1)
    root = codec.decode_root(root_codes, grid)
    assert torch.equal(root, codec.decode_root(root_codes, Grid(grid.floor, codec.grid_octaves(grid.span))))
    decoded = codec.decode(codec.Codes(codes, root_codes, grid))
    assert torch.equal(decoded[1], root)
    # A power of two is exact: the same numbers as of a block without, that much larger.
    assert torch.equal(decoded[0], codec.decode_ratio(codes, root) * 2.0 ** octaves[:, None].float())
    assert torch.equal(codec.encode_ratio(decoded[0], root, RATIO_MIDDLE, NEAREST, octaves), codes)
    # Codes that no smaller count could hold find their own. The last one lies on the threshold, within rounding.
    for code in (-126, -115, 115, 126):
        at = codes[0] == code
        for column in at.nonzero().flatten().tolist()[::25]:
            part = slice(column, column + 1)
            assert torch.equal(codec.find_ratio_octaves(decoded[0][:, part], root[:, part]), octaves)


def test_the_least_octaves_that_hold_the_largest_ratio() -> None:
    root = torch.ones(1, 128)
    for exponent in range(8):
        reach = MAX_RATIO * 2**exponent
        for factor, wanted in ((0.999, exponent), (1.001, min(exponent + 1, 7))):
            for sign in (1, -1):
                exp_avg = torch.linspace(-1, 1, 128)[None].clone()
                exp_avg[0, 77] = sign * reach * factor
                codes = codec.encode(exp_avg, root, dither(1), wide=True)
                assert octaves_of(codes.grid.span) == [wanted]
                decoded = codec.decode(codes)[0][0, 77].item()
                saturated = sign * MAX_RATIO * 128
                error = abs(decoded - exp_avg[0, 77].item()) if factor * reach < 1016 else abs(decoded - saturated)
                # A code's width there is 16 / 143 of the ratio over the power of two, squared over 16.
                assert error <= 1.01 * 2**wanted * (1 + abs(decoded) / 2**wanted) ** 2 / 143


def test_without_wide_and_below_the_first_threshold_nothing_changes() -> None:
    random = generator(1)
    root = torch.rand(300, 128, generator=random) + 0.5
    exp_avg = root * torch.randn(300, 128, generator=random) * 2
    assert exp_avg.abs().div(root).max() < MAX_RATIO * 1.5
    plain, wide = (codec.encode(exp_avg, root, dither(300, 3), wide=wide) for wide in (False, True))
    same = (exp_avg.abs() / root).amax(dim=1) < MAX_RATIO
    assert 0.1 < same.float().mean() < 1
    for a, b in zip((*plain[:2], *plain[2]), (*wide[:2], *wide[2]), strict=True):
        assert torch.equal(a[same], b[same])
    assert not plain.grid.span.gt(FORMAT.max_octaves).any()
    assert (codec.ratio_octaves(wide.grid.span)[~same] == 1).all()


BROKEN = {
    "a zero root": (5.0, 0.0),
    "an infinite root": (5.0, math.inf),
    "a root that is NaN": (5.0, math.nan),
    "an infinite moment": (math.inf, 1.0),
    "a moment that is NaN": (math.nan, 1.0),
    "both": (-math.inf, math.nan),
}


@pytest.mark.parametrize("kind", BROKEN)
def test_what_is_broken_does_not_count(kind: str) -> None:
    exp_avg, root = torch.linspace(-1, 1, 128)[None].clone(), torch.ones(1, 128)
    exp_avg[0, 9], root[0, 9] = BROKEN[kind]
    codes = codec.encode(exp_avg, root, dither(1), wide=True)
    plain = codec.encode(exp_avg, root, dither(1))
    assert octaves_of(codes.grid.span) == [0]
    assert torch.equal(codes.exp_avg, plain.exp_avg)
    exp_avg[0, 10] = 20.0
    assert octaves_of(codec.encode(exp_avg, root, dither(1), wide=True).grid.span) == [2]
    nothing = torch.full((1, 128), BROKEN[kind][0]), torch.full((1, 128), BROKEN[kind][1])
    assert octaves_of(codec.find_ratio_octaves(*nothing) << FORMAT.octave_bits) == [0]


# ---------------------------------------------------------------- the step


def blocks_with_octaves(rows: int, cols: int, *key: int) -> CodedMoments:
    """All counts of octaves, in blocks of any codes."""
    made = cases.random_moments(cases.layout_of(rows, cols, "8bit"), "8bit", *key)
    assert isinstance(made, CodedMoments)
    assert set(octaves_of(made.block_span)) == set(range(8))
    return made


@every_step
def test_all_codes_and_octaves_decode_alike(name: str) -> None:
    """With a gradient of zero and a rate of 1 the step shows m: with betas that keep it, and next to others."""
    for betas in ((0.9, 0.999), *WIDE):
        for eps in (1e-8, 0.0):
            held = blocks_with_octaves(256, 300, 3)
            zero = torch.zeros(256, 300)
            case = one_step(zero, zero, held, 5, betas=betas, eps=eps, lr=1.0, weight_decay=0.0)
            assert_same(play(case), play(case, STEPS[name]), name)


@every_step
@pytest.mark.parametrize("betas", WIDE, ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_many_steps_give_the_same_bits(dtype: torch.dtype, betas: tuple[float, float], name: str) -> None:
    """Of steady gradients, some zero, some of which the squares underflow, and some that are not finite."""
    random, steps = generator(4), []
    size = 10.0 ** (torch.rand(24, 300, generator=random) * 12 - 9)
    size[:, ::7] = 0.0
    size[3] = 1e-23
    for step in range(1, 13):
        grad = (size * (1 + 0.2 * torch.randn(24, 300, generator=random))).to(dtype)
        grad[5, step], grad[6, step + 150] = math.inf, math.nan
        nonfinite = "propagate" if step % 2 else "skip"
        steps.append((grad, scalars(step, betas=betas, nonfinite=nonfinite)))
    start = whole(torch.randn(24, 300, generator=random).to(dtype), steps[0][0])
    wanted = play(Case(start, steps))
    assert max(octaves_of(torch.cat([seen["block_span"] for seen in wanted]))) >= 1
    assert_same(wanted, play(Case(start, steps), STEPS[name]), name)


@every_step
def test_a_broken_element_of_a_step_does_not_count(name: str) -> None:
    """A square that underflows, one that overflows, a gradient that is not finite: the block has no ratio octaves."""
    for value in (1e-25, 1e25, math.inf, math.nan):
        grad = torch.full((2, 128), 0.01)
        grad[0, 31] = value
        record = scalars(1, betas=(0.9, 0.99), nonfinite="propagate")
        assert not record.wide
        record = scalars(1, betas=(0.95, 0.9), nonfinite="propagate")
        assert record.wide
        [seen] = play(Case(whole(torch.ones(2, 128), grad), [(grad, record)]), STEPS[name])
        assert octaves_of(seen["block_span"]) == [0, 0]


@every_step
def test_changed_betas_read_what_others_wrote(name: str) -> None:
    """Ratios of 14 and more, written with betas that allow them, are read by the next step whatever its betas are."""
    grad = torch.full((8, 128), 0.01)
    steps = [(grad, scalars(step, betas=(0.9, 0.9999), weight_decay=0.0)) for step in range(1, 8)]
    start = whole(torch.zeros(8, 128), grad)
    before = play(Case(start, steps), STEPS[name])[-1]
    assert set(octaves_of(before["block_span"])) == {1, 2} or set(octaves_of(before["block_span"])) == {2}
    held = CodedMoments(*(before[key] for key in CodedMoments._fields))
    exp_avg, root = codec.decode(
        codec.Codes(
            held.exp_avg_code.view(8, 128), held.exp_avg_sq_code.view(8, 128), Grid(held.block_floor, held.block_span)
        )
    )
    assert (exp_avg / root > MAX_RATIO).all()
    after = scalars(8, betas=(0.9, 0.999), lr=1.0, eps=0.0, weight_decay=0.0)
    assert not after.wide
    [seen] = play(Case(whole(torch.zeros(8, 128), grad, held), [(grad, after)]), STEPS[name])
    moment = exp_avg.double() * 0.9 + 0.1 * 0.01
    second = root.double() ** 2 * 0.999 + 0.001 * 0.01**2
    update = moment / (1 - 0.9**8) / (second / (1 - 0.999**8)).sqrt()
    torch.testing.assert_close(seen["param"].view(8, 128).double(), -update, rtol=1e-6, atol=0)
    assert octaves_of(seen["block_span"]) == [0] * 8


# ---------------------------------------------------------------- saved state


def trained(betas: tuple[float, float] = (0.9, 0.9999), steps: int = 8) -> AdamW8bit:
    param = Parameter(torch.zeros(32, 300))
    opt = AdamW8bit([param], lr=1e-3, betas=betas)
    random = generator(7)
    size = 10.0 ** (torch.rand(32, 300, generator=random) * -4)
    for _ in range(steps):
        param.grad = size * (1 + 0.2 * torch.randn(32, 300, generator=random))
        opt.step()
    return opt


def with_version(saved: dict[str, Any], version: int) -> dict[str, Any]:
    return {**saved, "param_groups": [{**group, "format_version": version} for group in saved["param_groups"]]}


def loaded(saved: dict[str, Any]) -> AdamW8bit:
    opt = AdamW8bit([Parameter(torch.zeros(32, 300))])
    opt.load_state_dict(copied(saved))
    return opt


def test_state_of_version_1_loads_to_the_same_bits_and_is_saved_as_version_2() -> None:
    saved = trained((0.9, 0.999)).state_dict()
    assert FORMAT.version == 2
    assert [group["format_version"] for group in saved["param_groups"]] == [2]
    assert not codec.ratio_octaves(saved["state"][0]["block_span"]).any()
    for version in (1, 2):
        assert_same_bits(loaded(with_version(saved, version)).state_dict(), saved)


def test_state_of_version_1_has_no_ratio_octaves() -> None:
    saved = trained().state_dict()
    spans = saved["state"][0]["block_span"]
    assert codec.ratio_octaves(spans).any()
    assert_same_bits(loaded(saved).state_dict(), saved)
    with pytest.raises(ValueError, match=f"block_span reaches {int(spans.max())}; accepted: 0 to 24 octaves"):
        loaded(with_version(saved, 1))
    with pytest.raises(ValueError, match="format version 3; accepted: 1, 2 "):
        loaded(with_version(saved, 3))


def test_octaves_of_roots_are_checked_below_ratio_octaves() -> None:
    saved = copied(trained().state_dict())
    saved["state"][0]["block_span"][3, 1] = 25 + (2 << 5)
    with pytest.raises(ValueError, match="block_span reaches 25; accepted: 0 to 24 octaves"):
        loaded(saved)


def test_a_pickled_optimizer_of_version_1_saves_version_2() -> None:
    opt = trained((0.9, 0.999))
    opt.param_groups[0]["format_version"] = 1
    assert pickle.loads(pickle.dumps(opt)).param_groups[0]["format_version"] == 2


def test_torch_state_keeps_what_the_octaves_hold() -> None:
    """There and back every bit, also where a dithered largest ratio has crossed a threshold; and from torch itself."""
    for steps in range(1, 40):
        opt = trained(steps=steps)
        params = [torch.zeros(32, 300)]
        theirs = foreign.from_own(opt.state_dict(), opt.param_groups, "torch")
        back = foreign.to_own(theirs, opt.param_groups)
        assert_same_bits(back["state"], opt.state_dict()["state"])
    param = Parameter(torch.zeros(32, 300))
    torchs = torch.optim.AdamW([param], betas=(0.9, 0.9999))
    for _ in range(10):
        param.grad = torch.ones(32, 300)
        torchs.step()
    state = torchs.state_dict()
    ratio = (state["state"][0]["exp_avg"] / state["state"][0]["exp_avg_sq"].sqrt())[0, 0].item()
    assert ratio > 2 * MAX_RATIO
    held = foreign.to_own(state, AdamW8bit(params).param_groups)["state"][0]
    assert set(octaves_of(held["block_span"])) == {2}
    values = [torch.empty(32, 300) for _ in range(2)]
    moments.decode_into({key: value for key, value in held.items() if key != "step"}, *values)
    assert (values[0] / values[1].sqrt() / ratio - 1).abs().max() < WIDTH / 2


# ---------------------------------------------------------------- free running


def steady_gradients(steps: int) -> Iterator[Tensor]:
    """Of one sign an element, four decades apart, a fifth of their size of noise."""
    random = generator(6)
    size = 10.0 ** (torch.rand(32, 128, generator=random) * -4) * torch.randn(32, 128, generator=random).sign()
    for _ in range(steps):
        yield size * (1 + 0.2 * torch.randn(32, 128, generator=random)).clamp_(min=0.1)


def errors(betas: tuple[float, float], steps: int = 200) -> tuple[float, float]:
    """Distances from float64 Adam, the largest at any step, each relative: of the way since the start (Frobenius norms)
    and of stored first moments (root mean square).
    """
    param = Parameter(torch.zeros(32, 128))
    opt = AdamW8bit([param], lr=1e-3, betas=betas, weight_decay=0.0)
    oracle = TextbookAdam(param, lr=1e-3, betas=betas)
    way = moment = 0.0
    for grad in steady_gradients(steps):
        param.grad = grad
        opt.step()
        exact = oracle.step(grad)
        way = max(way, ((param.double() - exact).norm() / exact.norm()).item())
        held = [torch.empty(param.shape) for _ in range(2)]
        moments.decode_into({key: value for key, value in opt.state[param].items() if key != "step"}, *held)
        moment = max(moment, (held[0] / oracle.exp_avg - 1).square().mean().sqrt().item())
    return way, moment


INTERVAL = 16 / 254
"""Of the widest root code, relative to its root, where gradients of four decades spread over up to 16 octaves."""
CODED_ONCE = math.sqrt((WIDTH**2 + INTERVAL**2) / 6)
"""Root mean square of one coding's error, 0.039: dithered at a fraction f of a code it is f (1 - f) codes squared."""


@pytest.mark.parametrize("betas", [(0.9, 0.999), *WIDE], ids=str)
def test_free_running_stays_with_float64_adam(betas: tuple[float, float]) -> None:
    """No step is further off than one coding; a first moment has those of its past too, each times beta1 a step."""
    way, moment = errors(betas)
    assert way < CODED_ONCE
    assert moment < CODED_ONCE / math.sqrt(1 - betas[0] ** 2)


@pytest.mark.parametrize(("betas", "moves"), [((0.9, 0.9999), True), ((0.5, 0.999), True), ((0.0, 0.999), False)])
def test_without_ratio_octaves_it_would_not(
    betas: tuple[float, float], moves: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The figures themselves: they see moments that saturate, and steps where these enter into them (beta1 > 0)."""
    monkeypatch.setattr(fragment, "exceeds", lambda beta1, beta2: False)
    way, moment = errors(betas)
    assert (way > 4 * CODED_ONCE) == moves
    assert moment > 10 * CODED_ONCE
