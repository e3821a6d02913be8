"""``moments="bnb8bit"`` against bitsandbytes itself: one step, free running, and its operator as our backend."""

from __future__ import annotations

import sys
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import Parameter

from lowmem_adam import Adam8bit, AdamW8bit, dynamic_map, kernels
from lowmem_adam.kernels import bitsandbytes as backend
from tests.bnb_cases import (
    GRADIENTS,
    SETTINGS,
    SHAPES,
    THEIRS,
    bins,
    bitsandbytes,
    blocks_of,
    codes_by_bins,
    gradient,
)
from tests.cases import DTYPES, assert_same_bits, copied, generator, make_params

every_dtype = pytest.mark.parametrize("dtype", DTYPES, ids=lambda dtype: str(dtype).removeprefix("torch."))
every_gradient = pytest.mark.parametrize("kind", GRADIENTS)

UNIT = 2.0**-24
"""Half a unit in the last place of 1: the relative error of one rounding."""


def pair(dtype: torch.dtype = torch.float32, **changes: Any) -> tuple[torch.optim.Optimizer, AdamW8bit]:
    """Bitsandbytes' optimizer and ours, of the same parameters."""
    theirs = bitsandbytes().optim.AdamW8bit(make_params(SHAPES, dtype), **SETTINGS)
    return theirs, AdamW8bit(make_params(SHAPES, dtype), **SETTINGS, **{**THEIRS, **changes})


def step(opt: torch.optim.Optimizer, kind: str, number: int) -> None:
    for index, param in enumerate(opt.param_groups[0]["params"]):
        param.grad = gradient(kind, tuple(param.shape), param.dtype, index, number)
    opt.step()


def state_of(opt: torch.optim.Optimizer, index: int) -> dict[str, Tensor]:
    """Moments of a parameter under bitsandbytes' names, without its maps."""
    state = opt.state[opt.param_groups[0]["params"][index]]
    named = {"state1": state["exp_avg"], "state2": state["exp_avg_sq"]} if "exp_avg" in state else state
    return {key: named[key] for key in ("state1", "state2", "absmax1", "absmax2") if key in named}


# ---------------------------------------------------------------- one step from the same state


@every_gradient
def test_codes_of_one_step_from_the_same_state(kind: str) -> None:
    """Bitsandbytes' codes are those of its bins, exactly; ours the nearest; they part only where a bin explains it."""
    theirs, ours = pair()
    for number in range(3):
        step(theirs, kind, number)
    ours.load_state_dict(theirs.state_dict())
    for there, here in zip(theirs.param_groups[0]["params"], ours.param_groups[0]["params"], strict=True):
        here.data.copy_(there.data)
    before = [copied(state_of(theirs, index)) for index in range(len(SHAPES))]
    step(theirs, kind, 3)
    step(ours, kind, 3)
    parted = 0
    for index, shape in enumerate(SHAPES):
        if not shape.coded:
            continue
        grad = gradient(kind, shape.shape, torch.float32, index, 3)
        after, own = state_of(theirs, index), state_of(ours, index)
        for number, beta in ((1, 0.8), (2, 0.99)):
            signed = number == 1
            code, absmax = blocks_of(before[index][f"state{number}"]), before[index][f"absmax{number}"]
            old = dynamic_map.decode(code, absmax, signed)
            added = blocks_of(grad) if signed else blocks_of(grad * grad)
            # As its operator computes them.
            new = old.clone().mul_(beta)
            g = blocks_of(grad)
            new = new.add_(g, alpha=1.0 - beta) if signed else new.addcmul_(g, g, value=1.0 - beta)
            there, here = (blocks_of(each[f"state{number}"]) for each in (after, own))
            real = (blocks_of(torch.ones(shape.shape)) > 0) & torch.ones_like(new, dtype=torch.bool)
            new = torch.where(real, new, 0.0)
            assert torch.equal(there[real], codes_by_bins(new, signed)[real])
            # Each of us rounds at most three times, by half a unit of what is summed.
            summed = old.abs() * beta + added.abs() * (1.0 - beta)
            scale = own[f"absmax{number}"]
            assert bool(((scale - after[f"absmax{number}"]).abs() <= 6 * UNIT * summed.amax(dim=1)).all())
            # Where no middle of two values lies within the width that a bin and roundings move a value by, both have
            # the same code.
            safe_scale = torch.where(scale > 0, scale, 1.0)[:, None]
            scaled = new / safe_scale
            limits = dynamic_map.thresholds(signed)
            near = (scaled.abs()[..., None] - limits).abs().amin(dim=-1)
            reach = 1 / 65535 + 12 * UNIT * (summed / safe_scale + 1.0)
            parts = real & (there != here)
            assert not bool((parts & (near > reach)).any())
            parted += int(parts.sum())
    assert parted > 0 or kind == "all zero"


def test_zero_becomes_a_bin_in_bitsandbytes_and_stays_zero_here() -> None:
    grad = torch.zeros(4096)
    grad[::2] = 1.0
    theirs = bitsandbytes().optim.AdamW8bit([Parameter(torch.zeros(4096))], lr=0.0)
    ours = AdamW8bit([Parameter(torch.zeros(4096))], lr=0.0, moments="bnb8bit")
    for opt in (theirs, ours):
        opt.param_groups[0]["params"][0].grad = grad.clone()
        opt.step()
    for number, signed, code, value in ((1, True, 131, 2.125e-5), (2, False, 7, 1.5625e-5)):
        assert set(state_of(theirs, 0)[f"state{number}"][1::2].tolist()) == {code}
        assert float(dynamic_map.dynamic_map(signed)[code]) == pytest.approx(value)
        assert set(state_of(ours, 0)[f"state{number}"][1::2].tolist()) == {dynamic_map.ZERO_CODE[signed]}


def test_bins_move_no_value_by_more_than_half_of_one() -> None:
    values = blocks_of(torch.rand(1 << 16, generator=generator(1)) * 2 - 1)
    scaled = values / values.abs().amax(dim=1, keepdim=True)
    assert bool(((bins(values) - scaled).abs() <= 1 / 65535 + 4 * UNIT).all())


# ---------------------------------------------------------------- free running


@pytest.fixture
def _exact_quantizer(monkeypatch: pytest.MonkeyPatch) -> None:
    """Bitsandbytes' own fallback for other dtypes, which compares with all values of the map, in its optimizer too."""
    ops = bitsandbytes() and pytest.importorskip("bitsandbytes.backends.cpu.ops")

    def quantize(values: Tensor, code: Tensor, absmax: Tensor, out: Tensor, blocksize: int) -> None:
        codes, scales = torch.ops.bitsandbytes.quantize_blockwise(values.double(), code, blocksize)
        out.copy_(codes)
        absmax.copy_(scales)

    monkeypatch.setattr(ops, "_quant_blockwise_fp32_direct", quantize)


@every_gradient
@pytest.mark.usefixtures("_exact_quantizer")
def test_free_running_beside_bitsandbytes_with_an_exact_quantizer(kind: str) -> None:
    """30 steps of its real optimizer, whose quantizer compares with every value, and of ours, each on its own state.

    They round apart in the last places of float32, so a code goes the other way where a value lies within some 2^-22 of
    itself from a middle. Neighbouring values of a decade are at least 1/128 of themselves apart, so that meets one
    element in 2^15 a step and moment: 30 steps part less than one in a thousand. Where codes agree, weights agree to
    the roundings of the steps; all others together move by less than a thousandth of what all have moved.
    """
    theirs, ours = pair()
    start = [copied(param) for param in ours.param_groups[0]["params"]]
    for number in range(30):
        step(theirs, kind, number)
        step(ours, kind, number)
    for index, shape in enumerate(SHAPES):
        there, here = (state_of(opt, index) for opt in (theirs, ours))
        if shape.coded:
            for key in ("state1", "state2"):
                assert int((there[key] != here[key]).sum()) <= there[key].numel() / 1000
        moved = [opt.param_groups[0]["params"][index].detach() - start[index] for opt in (theirs, ours)]
        assert float((moved[1] - moved[0]).norm()) <= 0.001 * float(moved[0].norm())


@every_dtype
@every_gradient
def test_backend_bitsandbytes_is_its_optimizer_to_the_bit(kind: str, dtype: torch.dtype) -> None:
    """On the CPU, where it has an operator too."""
    theirs, ours = pair(dtype, backend="bitsandbytes")
    for number in range(10):
        step(theirs, kind, number)
        step(ours, kind, number)
    for index in range(len(SHAPES)):
        assert_same_bits(state_of(ours, index), state_of(theirs, index))
        assert_same_bits(*(opt.param_groups[0]["params"][index].detach() for opt in (ours, theirs)))


@pytest.mark.gpu
@every_dtype
@every_gradient
def test_on_cuda_its_operator_is_chosen_and_gives_its_bits(kind: str, dtype: torch.dtype) -> None:
    def on_cuda() -> list[Parameter]:
        return [Parameter(param.detach().cuda()) for param in make_params(SHAPES, dtype)]

    theirs = bitsandbytes().optim.AdamW8bit(on_cuda(), **SETTINGS)
    ours = AdamW8bit(on_cuda(), **SETTINGS, **THEIRS)
    assert kernels.choose(None, torch.device("cuda"), ours.param_groups[0], dtype) == "bitsandbytes"
    for number in range(10):
        for opt in (theirs, ours):
            for index, param in enumerate(opt.param_groups[0]["params"]):
                param.grad = gradient(kind, tuple(param.shape), dtype, index, number).cuda()
            opt.step()
    for index in range(len(SHAPES)):
        here, there = ({key: t.cpu() for key, t in state_of(opt, index).items()} for opt in (ours, theirs))
        assert_same_bits(here, there)
        assert_same_bits(*(opt.param_groups[0]["params"][index].detach().cpu() for opt in (ours, theirs)))


def test_backend_bitsandbytes_takes_parameters_in_any_order_of_memory() -> None:
    bitsandbytes()
    values = torch.randn(80, 60, generator=generator(5))
    results = []
    for weight in (values.clone(), values.t().contiguous().t()):
        opt = AdamW8bit([Parameter(weight)], backend="bitsandbytes", **THEIRS)
        param = opt.param_groups[0]["params"][0]
        for number in range(3):
            param.grad = gradient("normal", (80, 60), torch.float32, number)
            opt.step()
        assert param.stride() == weight.stride()
        results.append([param.detach(), *state_of(opt, 0).values()])
    assert_same_bits(results[0], results[1])


def test_backend_bitsandbytes_ascends() -> None:
    bitsandbytes()
    results = []
    for maximize, sign in ((False, 1.0), (True, -1.0)):
        opt = AdamW8bit(make_params(SHAPES), backend="bitsandbytes", maximize=maximize, **THEIRS)
        for index, param in enumerate(opt.param_groups[0]["params"]):
            param.grad = sign * gradient("normal", tuple(param.shape), torch.float32, index)
        opt.step()
        results.append([copied(param) for param in opt.param_groups[0]["params"]])
    assert_same_bits(results[0], results[1])


# ---------------------------------------------------------------- what the format promises


def test_state_takes_two_bytes_and_two_scales_of_256_elements() -> None:
    opt = AdamW8bit([Parameter(torch.zeros(512, 512))], moments="bnb8bit")
    opt.param_groups[0]["params"][0].grad = torch.ones(512, 512)
    opt.step()
    report = opt.memory_report()
    assert report["bytes"] == {"step": 8, "state1": 2**18, "state2": 2**18, "absmax1": 2**12, "absmax2": 2**12}
    assert report["bytes_per_parameter"] == pytest.approx(2 + 8 / 256, abs=1e-4)


def test_new_state_is_bitsandbytes_own() -> None:
    theirs = bitsandbytes().optim.AdamW8bit(make_params(SHAPES))
    ours = AdamW8bit(make_params(SHAPES), moments="bnb8bit")
    ours._make_all_state()
    for index, param in enumerate(theirs.param_groups[0]["params"]):
        theirs.init_state(theirs.param_groups[0], param, 0, index)
        assert_same_bits(state_of(ours, index), state_of(theirs, index))


@every_dtype
def test_a_step_with_zero_gradients_and_no_lr_changes_nothing(dtype: torch.dtype) -> None:
    params = make_params(SHAPES, dtype)
    opt = AdamW8bit(params, moments="bnb8bit", lr=0.0)
    opt._make_all_state()
    before = copied([{k: v for k, v in state.items() if k != "step"} for state in opt.state.values()])
    weights = copied(params)
    for param in params:
        param.grad = torch.zeros_like(param)
    opt.step()
    assert_same_bits([{k: v for k, v in state.items() if k != "step"} for state in opt.state.values()], before)
    assert_same_bits(params, weights)


def test_a_nonfinite_gradient_skips_its_256_elements() -> None:
    param = Parameter(torch.zeros(5000))
    opt = AdamW8bit([param], moments="bnb8bit")
    param.grad = torch.ones(5000)
    param.grad[300] = torch.inf
    with pytest.warns(RuntimeWarning, match="1 blocks of at most 256"):
        opt.step()
    assert opt.stats() == {"skipped_blocks": 1}
    moved = param.detach() != 0
    assert not moved[256:512].any()
    assert moved[:256].all()
    assert moved[512:].all()
    assert opt.state[param]["absmax1"][1] == 0


# ---------------------------------------------------------------- refusals


@pytest.mark.parametrize(
    ("changes", "dtype", "words"),
    [
        ({"moments": "8bit"}, torch.float32, "moments is '8bit'; accepted: 'bnb8bit'"),
        ({"nonfinite": "skip"}, torch.float32, "nonfinite is 'skip'; accepted: 'error' and 'propagate'"),
        ({"low_precision_update": "stochastic"}, torch.bfloat16, "'stochastic' for a torch.bfloat16 parameter"),
        ({"low_precision_update": "split"}, torch.float16, "'split' for a torch.float16 parameter"),
    ],
    ids=str,
)
def test_backend_bitsandbytes_refuses_what_it_cannot_do(
    changes: dict[str, Any], dtype: torch.dtype, words: str
) -> None:
    with pytest.raises(ValueError, match=words):
        AdamW8bit([Parameter(torch.zeros(64, 64, dtype=dtype))], backend="bitsandbytes", **{**THEIRS, **changes})


def test_backend_bitsandbytes_refuses_l2_decay() -> None:
    with pytest.raises(ValueError, match=r"weight_decay is 0\.1 as L2; accepted: 0, or AdamW8bit"):
        Adam8bit([Parameter(torch.zeros(64, 64))], weight_decay=0.1, backend="bitsandbytes", **THEIRS)


def test_backend_bitsandbytes_refuses_gradients_of_another_dtype() -> None:
    param, grad = torch.ones(64, dtype=torch.bfloat16), torch.ones(64)
    assert kernels.of_gradient("bitsandbytes", None, param, grad, "p") == "reference"
    assert kernels.of_gradient("bitsandbytes", "bitsandbytes", param, grad.bfloat16(), "p") == "bitsandbytes"
    with pytest.raises(ValueError, match=r"p: its gradient has dtype torch.float32 .* accepted: torch.bfloat16"):
        kernels.of_gradient("bitsandbytes", "bitsandbytes", param, grad, "p")


def test_backend_chosen_for_a_device() -> None:
    """On CUDA bitsandbytes' operator, where it is and can do what is asked for; on the CPU never by itself."""
    bitsandbytes()
    group = {**THEIRS, "weight_decay": 0.0}
    cuda, cpu = torch.device("cuda"), torch.device("cpu")
    assert kernels.choose(None, cuda, group, torch.float32) == "bitsandbytes"
    kernels._bitsandbytes_or_warning.cache_clear()
    with pytest.warns(
        RuntimeWarning, match="hundreds of times slower than bitsandbytes' operator: nonfinite is 'skip'"
    ):
        assert kernels.choose(None, cuda, {**group, "nonfinite": "skip"}, torch.float32) == "reference"
    assert kernels.choose(None, cpu, group, torch.float32) in ("cpu", "reference")
    with pytest.raises(ValueError, match="backend is 'triton' and moments is 'bnb8bit'; accepted: None"):
        kernels.choose("triton", cuda, group, torch.float32)


def test_backend_bitsandbytes_where_it_is_missing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "bitsandbytes", None)
    backend._problem.cache_clear()
    try:
        with pytest.raises(RuntimeError, match=r"bitsandbytes cannot be imported .* accepted: backend="):
            AdamW8bit([Parameter(torch.zeros(64, 64))], backend="bitsandbytes", **THEIRS)
        assert backend.why_not({**THEIRS, "weight_decay": 0.0}, torch.float32) is not None
    finally:
        backend._problem.cache_clear()


def test_a_change_of_moments_after_the_first_step_is_refused() -> None:
    params = [Parameter(torch.ones(64, 64)), Parameter(torch.ones(64, 64))]
    opt = AdamW8bit(params, moments="8bit")
    params[0].grad = torch.ones(64, 64)
    opt.step()
    opt.param_groups[0]["moments"] = "bnb8bit"
    params[0].grad, params[1].grad = None, torch.ones(64, 64)
    with pytest.raises(ValueError, match="parameter 1: moments is 'bnb8bit', and its blocks were cut for another"):
        opt.step()
