"""The optimizer with ``backend="triton"``: cases for a process whose device runs Triton (tests/triton_cases.py)."""

from __future__ import annotations

import copy
import gc
import itertools
import warnings
import weakref
from collections.abc import Sequence
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import Parameter

from lowmem_adam import Adam8bit, AdamW8bit
from tests.cases import CLASSES, DTYPES, SHAPES, Shape, assert_same_bits, copied, generator, gradient, make_params
from tests.kernel_cases import UPDATES
from tests.triton_cases import DEVICE, INTERPRETED, few, placed

SMALL = tuple(
    s
    for s in SHAPES
    if s.name
    in (
        "at the limit",
        "below the limit",
        "bias",
        "scalar",
        "no rows",
        "channels last",
        "every other column",
        "one row",
    )
)
SOME, STEPS = (SMALL, 2) if INTERPRETED else (SHAPES, 3)
FEW = tuple(s for s in SHAPES if s.name in ("at the limit", "bias", "scalar", "small transposed", "no rows"))


def there(params: Sequence[Parameter]) -> list[Parameter]:
    """The same parameters on the device."""
    return [Parameter(placed(param.detach())) for param in params]


def set_gradients(params: Sequence[Tensor], step: int, scale: float = 1.0) -> None:
    for index, param in enumerate(params):
        grad = gradient(torch.empty(param.shape, dtype=param.dtype), 0, index, step) * scale
        param.grad = grad.to(param.device)


def results(opt: torch.optim.Optimizer) -> dict[str, Any]:
    """Parameters and state, on the CPU."""

    def on_cpu(value: Any) -> Any:
        if isinstance(value, Tensor):
            return value.detach().cpu()
        if isinstance(value, dict):
            return {key: on_cpu(entry) for key, entry in value.items()}
        return [on_cpu(entry) for entry in value] if isinstance(value, list) else value

    params = [param for group in opt.param_groups for param in group["params"]]
    state = sorted(opt.state_dict()["state"].items())  # which is in the order of first gradients
    return copied({"params": on_cpu(params), "state": on_cpu(dict(state))})


def run(
    shapes: Sequence[Shape],
    dtype: torch.dtype,
    steps: int,
    cls: type[Adam8bit] = AdamW8bit,
    *,
    on_device: bool = True,
    **keywords: Any,
) -> dict[str, Any]:
    params = make_params(shapes, dtype)
    if on_device:
        params = there(params)
    opt = cls(params, **{"lr": 1e-2, "backend": "triton" if on_device else "reference", **keywords})
    for step in range(steps):
        set_gradients(params, step)
        opt.step()
        opt.zero_grad()
    return results(opt)


@pytest.mark.parametrize("update", few(list(UPDATES), 2))
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("cls", few(CLASSES, 1))
def test_the_references_steps(cls: type[Adam8bit], dtype: torch.dtype, update: str) -> None:
    wanted = run(SOME, dtype, STEPS, cls, on_device=False, **UPDATES[update])
    assert_same_bits(wanted, run(SOME, dtype, STEPS, cls, **UPDATES[update]))


@pytest.mark.parametrize(("dtype", "cls"), few(list(itertools.product(DTYPES, CLASSES)), 3))
def test_steps_counted_on_the_device_are_the_same(dtype: torch.dtype, cls: type[Adam8bit]) -> None:
    wanted = run(FEW, dtype, 5, cls, weight_decay=0.1)
    assert_same_bits(wanted, run(FEW, dtype, 5, cls, weight_decay=0.1, capturable=True))
    for kind in (torch.float64, torch.float32):
        lr = torch.tensor(2.0**-7, dtype=kind, device=DEVICE)
        assert_same_bits(
            run(FEW, dtype, 3, cls, lr=2.0**-7, maximize=True),
            run(FEW, dtype, 3, cls, lr=lr, maximize=True, capturable=True),
        )


def test_many_steps_of_a_counter_give_the_powers_that_the_host_has() -> None:
    """Bias corrections of every step number up to 3,000, by doubles that are multiplied alike."""
    numbers = range(1, 3000, 601 if INTERPRETED else 7)
    for betas in ((0.9, 0.999), (0.0, 0.9999), (0.95, 0.5)):
        made = []
        for capturable in (False, True):
            params = there(make_params(FEW[:2]))
            opt = AdamW8bit(params, betas=betas, eps=1e-3, capturable=capturable, backend="triton")
            set_gradients(params, 0)
            opt.step()
            seen = []
            for number in numbers:
                for state in opt.state.values():
                    state["step"].fill_(number)
                opt.step()
                seen.append(results(opt))
            made.append(seen)
        assert_same_bits(made[0], made[1])


def test_settings_may_change_between_steps() -> None:
    made = []
    for capturable in (False, True):
        params = there(make_params(FEW))
        groups: list[dict[str, Any]] = [{"params": params[:2]}, {"params": params[2:], "lr": 0.1, "betas": (0.5, 0.9)}]
        opt = AdamW8bit(groups, lr=0.01, capturable=capturable, backend="triton")
        seen = []
        for step in range(8):
            set_gradients(params, step)
            if step == 2:
                opt.param_groups[0]["lr"] = 0.02
            if step == 3:
                opt.param_groups[1]["weight_decay"] = 0.3
            if step == 4:
                params[0].grad = None
            if step == 5:
                opt.param_groups[0]["nonfinite"] = "propagate"
            if step == 6:
                opt.add_param_group({"params": [extra := Parameter(torch.ones(64, 128, device=DEVICE))], "lr": 0.5})
                params.append(extra)
            opt.step()
            seen.append(results(opt))
        made.append(seen)
    assert_same_bits(made[0], made[1])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_steps_that_are_the_last_one_over_again(dtype: torch.dtype) -> None:
    made = []
    for backend in ("triton", "reference"):
        params = there(make_params(FEW, dtype)) if backend == "triton" else make_params(FEW, dtype)
        groups: list[dict[str, Any]] = [{"params": params[:2]}, {"params": params[2:], "lr": 0.1}]
        opt = Adam8bit(groups, lr=0.01, backend=backend)
        seen = []
        for step in range(9):
            set_gradients(params, step)
            if step in (4, 5):  # not at a multiple of a load
                held = torch.zeros(params[0].numel() + 1, dtype=dtype, device=params[0].device)
                grad = held[1:].view(params[0].shape)
                params[0].grad = grad.copy_(params[0].grad)  # type: ignore[arg-type]
            if step == 6:
                opt.param_groups[0]["weight_decay"] = 0.3
            if step == 7:
                opt.param_groups[1]["lr"] = 0.2
            assert (opt._stepper._repeat is not None) == (step > 1)
            opt.step()
            seen.append(results(opt))
        made.append(seen)
    assert_same_bits(made[0], made[1])


def test_scales_and_clipping_on_the_device() -> None:
    made = []
    for capturable in (False, True):
        params = there(make_params(FEW))
        opt = AdamW8bit(params, lr=0.01, capturable=capturable, backend="triton")
        seen = []
        for step, (scale, found, clips) in enumerate(
            [(None, None, False), (1024.0, 0.0, False), (512.0, 1.0, False), (0.37, 0.0, True), (None, None, True)]
        ):
            set_gradients(params, step)
            if clips:
                opt.clip_grad_norm_(0.05)
            if scale is not None:
                opt.grad_scale = torch.tensor(scale, device=DEVICE)
                opt.found_inf = torch.tensor(found, device=DEVICE)
            opt.step()
            if scale is not None:
                del opt.grad_scale, opt.found_inf
            seen.append(results(opt))
        assert not torch.equal(seen[2]["params"][0], seen[3]["params"][0])
        assert torch.equal(seen[1]["params"][0], seen[2]["params"][0])
        made.append(seen)
    assert_same_bits(made[0], made[1])


def test_state_moves_between_counting_on_the_host_and_on_the_device() -> None:
    params = there(make_params(FEW))
    opts = [AdamW8bit(params, lr=0.01, capturable=capturable, backend="triton") for capturable in (False, True)]
    set_gradients(params, 0)
    opts[0].step()
    for source, target in (opts, opts[::-1]):
        target.load_state_dict(copy.deepcopy(source.state_dict()))
        set_gradients(params, 1)
        target.step()
        counted = [state["step"].device.type for state in target.state.values()]
        assert set(counted) == {DEVICE.type if target is opts[1] else "cpu"}
    assert {int(state["step"]) for state in opts[0].state.values()} == {3}
    assert opts[1].stats() == {"skipped_blocks": 0}


def test_what_is_seen_of_gradients_and_settings_that_change_in_place() -> None:
    """A gradient that becomes a negative view of the same strides; betas that are a list."""
    made = []
    for keywords in ({"backend": "reference"}, {"backend": "triton"}, {"backend": "triton", "capturable": True}):
        params = there(make_params(FEW[:1]))
        opt = AdamW8bit(params, lr=0.01, **keywords)
        opt.param_groups[0]["betas"] = [0.9, 0.999]
        seen = []
        for step in range(4):
            parts = torch.randn(*params[0].shape, 2, generator=generator(step)).to(DEVICE)
            spread = torch.view_as_complex(parts)
            params[0].grad = (spread.conj() if step % 2 else spread).imag
            assert params[0].grad.is_neg() == bool(step % 2)
            if step == 3:
                opt.param_groups[0]["betas"][0] = 0.1
            if not (step % 2 and "capturable" in keywords):
                opt.step()
            else:
                with pytest.raises(ValueError, match="the sign bit of a view"):
                    opt.step()
                params[0].grad = params[0].grad.resolve_neg()
                opt.step()
            seen.append(results(opt)["params"])
        made.append(seen)
    assert_same_bits(made[0], made[1])
    assert_same_bits(made[0], made[2])


def test_a_refused_step_leaves_everything_as_it_was() -> None:
    params = there(make_params(FEW))
    opt = AdamW8bit(params, lr=0.01, capturable=True, backend="triton")
    set_gradients(params, 0)
    opt.step()
    order = (5, 4, 3, 2, 1, 0)
    extra = Parameter(torch.ones(2, 3, 2, 3, 2, 3, device=DEVICE).permute(order).contiguous().permute(order))
    opt.add_param_group({"params": [extra]})
    set_gradients([*params, extra], 1)
    before = results(opt)
    with pytest.raises(ValueError, match=r"param group 1, parameter 0 has strides .* 6 dimensions"):
        opt.step()
    assert_same_bits(before, results(opt))
    extra.grad = None
    opt.param_groups[0]["lr"] = 3e38
    with pytest.raises(ValueError, match=r"param group 0: lr is 3e.38 .* a step or factor of"):
        opt.step()
    assert_same_bits(before, results(opt))


def test_moments_that_a_load_replaces_are_given_up_at_once() -> None:
    params = there(make_params(FEW))
    opt = AdamW8bit(params, lr=0.01, backend="triton")
    set_gradients(params, 0)
    opt.step()
    saved = copy.deepcopy(opt.state_dict())
    held = weakref.ref(opt.state[params[0]]["exp_avg_code"])
    gc.disable()
    try:
        opt.load_state_dict(saved)
        assert held() is None
    finally:
        gc.enable()


def test_copies_count_for_themselves() -> None:
    params = there(make_params(FEW))
    opt = AdamW8bit(params, lr=0.01, capturable=True, backend="triton")
    set_gradients(params, 0)
    opt.step()
    other = copy.deepcopy(opt)
    set_gradients([param for group in other.param_groups for param in group["params"]], 1)
    other.step()
    assert {int(state["step"]) for state in opt.state.values()} == {1}
    assert {int(state["step"]) for state in other.state.values()} == {2}


@pytest.mark.parametrize("capturable", [False, True])
def test_skipped_blocks_are_counted(capturable: bool) -> None:
    params = there(make_params(FEW))
    opt = AdamW8bit(params, capturable=capturable, backend="triton")
    for step in range(3):
        set_gradients(params, step)
        assert params[0].grad is not None
        params[0].grad.view(-1)[:: 1000 if step else 4096] = torch.nan
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # steps on the CPU warn
            opt.step()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        assert opt.stats() == {"skipped_blocks": 11}


def test_refusals_of_capturable() -> None:
    params = there(make_params(FEW))
    for keywords, message in (
        ({"capturable": 1}, "capturable is 1; accepted: True, False"),
        ({"capturable": True, "shard_group": "world"}, "accepted with capturable: shard_group=None"),
        ({"capturable": True, "offload": "cpu"}, "accepted with capturable: offload=None"),
        ({"capturable": True, "nonfinite": "error"}, "nonfinite is 'error' and capturable True"),
        ({"capturable": True, "backend": "reference"}, "is stepped by backend 'reference'"),
        ({"capturable": True, "lr": torch.zeros(2, device=DEVICE)}, "lr is "),
    ):
        with pytest.raises(ValueError, match=message):
            AdamW8bit(params, **keywords)
