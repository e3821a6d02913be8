"""Steps that are the last one over again: taken as such where nothing has changed, and only there.

Every change is made to two optimizers, of which one forgets before each step what it knows and so takes all phases.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor
from torch.nn import Parameter

from lowmem_adam import AdamW8bit, looks
from lowmem_adam.looks import Look
from lowmem_adam.stepping import Stepper
from tests.cases import (
    CLASSES,
    FEW,
    SHAPES,
    OptimizerClass,
    assert_same_bits,
    everything,
    make_params,
    params_of,
    set_gradients,
)

KINDS = pytest.mark.parametrize(
    ("backend", "dtype", "comparison"),
    [
        (None, torch.float32, "torch's"),
        (None, torch.bfloat16, "torch's"),
        (None, torch.float32, "our own"),
        ("reference", torch.float32, "torch's"),
    ],
    indirect=["comparison"],
)
BEFORE = 4
"""Steps before a change: the first makes state, the second is remembered."""


@pytest.fixture(params=["torch's", "our own"])
def comparison(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """Tensors are compared by torch, or where it cannot one by one."""
    kind: str = request.param
    if kind == "our own":
        monkeypatch.setattr(looks, "GUARDS", None)
    return kind


@pytest.fixture
def repeated(monkeypatch: pytest.MonkeyPatch) -> list[bool]:
    """Of every step, whether it was a repetition."""
    seen: list[bool] = []
    repeat = Stepper.repeat

    def noted(self: Stepper, *args: Any) -> bool:
        seen.append(False)
        seen[-1] = repeat(self, *args)
        return seen[-1]

    monkeypatch.setattr(Stepper, "repeat", noted)
    return seen


def optimizer(cls: OptimizerClass = AdamW8bit, dtype: torch.dtype = torch.float32, **keywords: Any) -> Any:
    params = make_params(FEW, dtype)
    groups: list[dict[str, Any]] = [{"params": params[:3]}, {"params": params[3:], "lr": 0.02}]
    return cls(groups, lr=0.01, **keywords)


def take(opt: Any, steps: range) -> None:
    for step in steps:
        set_gradients(params_of(opt), step)
        opt.step()


# ---------------------------------------------------------------- the same bits


@KINDS
@pytest.mark.parametrize("update", ["stochastic", "split", "fp32"])
@pytest.mark.parametrize("cls", CLASSES)
def test_repeated_steps_give_the_same_bits(
    cls: OptimizerClass, update: str, dtype: torch.dtype, backend: str | None, comparison: str, repeated: list[bool]
) -> None:
    made = []
    for forgets in (False, True):
        params = make_params(SHAPES, dtype)
        opt = cls(params, lr=0.01, low_precision_update=update, backend=backend)
        for step in range(6):
            set_gradients(params, step)
            if forgets:
                opt._stepper.forget()
            opt.step()
        made.append(everything(opt))
    # At the first step of each it is not asked.
    assert repeated == [False, *[True] * 4, *[False] * 5]
    assert_same_bits(made[0], made[1])


def test_gradients_are_not_kept(repeated: list[bool]) -> None:
    opt = optimizer()
    for step in range(4):
        set_gradients(params_of(opt), step)
        opt.step()
        kept = [weakref.ref(param.grad) for param in params_of(opt)]
        opt.zero_grad()
        assert [ref() for ref in kept] == [None] * len(kept), step
    assert repeated[-2:] == [True, True]


# ---------------------------------------------------------------- changes between steps


class Change(NamedTuple):
    """What is done before a step, and whether that may be a repetition for all that."""

    make: Callable[[Any], None]
    same: bool = False


def first(opt: Any) -> Any:
    return params_of(opt)[0]


def of_gradients(change: Callable[[Tensor], Tensor | None]) -> Callable[[Any], None]:
    def made(opt: Any) -> None:
        first(opt).grad = change(first(opt).grad)

    return made


def of_data(change: Callable[[Tensor], Tensor]) -> Callable[[Any], None]:
    def made(opt: Any) -> None:
        first(opt).data = change(first(opt).data)

    return made


def of_state(key: str, change: Callable[[Tensor], Tensor]) -> Callable[[Any], None]:
    def made(opt: Any) -> None:
        state = opt.state[first(opt)]
        state[key] = change(state[key])

    return made


def setting(name: str, value: Any) -> Callable[[Any], None]:
    def made(opt: Any) -> None:
        opt.param_groups[1][name] = value

    return made


def _another_backend(opt: Any) -> None:
    group = opt.param_groups[1]
    group["backend"] = None if group["backend"] == "reference" else "reference"


def _share(opt: Any) -> None:
    first(opt).data.untyped_storage().share_memory_()
    opt.state[first(opt)]["exp_avg_code"].untyped_storage().share_memory_()


def _point_elsewhere(opt: Any) -> None:
    code = opt.state[first(opt)]["exp_avg_code"]
    code.set_(code.clone())


def _swap_dictionary(opt: Any) -> None:
    opt.state[first(opt)] = {key: value.clone() for key, value in opt.state[first(opt)].items()}


def _swap_names(opt: Any) -> None:
    state = opt.state[params_of(opt)[2]]  # one with fp32 moments
    state["exp_avg"], state["exp_avg_sq"] = state["exp_avg_sq"].clone(), state["exp_avg"].abs()


def _rename(opt: Any) -> None:
    state = opt.state[params_of(opt)[2]]
    state.update(exp_avg=state["exp_avg_sq"], exp_avg_sq=state["exp_avg"].abs_())


def _load(opt: Any) -> None:
    opt.load_state_dict(opt.state_dict())


def _new_group(opt: Any) -> None:
    opt.add_param_group({"params": [extra := Parameter(torch.ones(64, 128))]})
    extra.grad = torch.full_like(extra, 0.5)


def _move_to_other_group(opt: Any) -> None:
    opt.param_groups[1]["params"].append(opt.param_groups[0]["params"].pop())


def _take_out(opt: Any) -> None:
    opt.state.pop(opt.param_groups[0]["params"].pop(0))


def _cut_anew(opt: Any) -> None:
    opt._partition = opt._partition.copied()


def _set_step(opt: Any) -> None:
    opt.state[first(opt)]["step"].fill_(100)


def _set_step_unseen(opt: Any) -> None:
    opt.state[first(opt)]["step"].data.fill_(100)  # the tensor's version stays


def _lose_state(opt: Any) -> None:
    opt.state.pop(first(opt))


def _clip(opt: Any) -> None:
    opt.clip_grad_norm_(1e-3)


def _scale(opt: Any) -> None:
    opt.grad_scale = torch.tensor(4.0)


def _decay_in_place(opt: Any) -> None:
    first(opt).data.mul_(0.5)


def _unaligned(grad: Tensor) -> Tensor:
    held = torch.empty(grad.numel() + 1, dtype=grad.dtype)
    held[1:] = grad.view(-1)
    return held[1:].view(grad.shape)


CHANGES = {
    "nothing": Change(lambda opt: None, same=True),
    "gradient elsewhere": Change(of_gradients(Tensor.clone), same=True),
    "gradient not aligned": Change(of_gradients(_unaligned), same=True),
    "gradient with other strides": Change(of_gradients(lambda grad: grad.t().contiguous().t())),
    "gradient that requires one": Change(of_gradients(lambda grad: grad.clone().requires_grad_())),
    "gradient with a sign bit": Change(of_gradients(lambda grad: torch._neg_view(grad.clone()))),
    "no gradient": Change(of_gradients(lambda grad: None)),
    "learning rate": Change(setting("lr", 0.5), same=True),
    "learning rate, a tensor": Change(setting("lr", torch.tensor(0.5)), same=True),
    "betas": Change(setting("betas", (0.5, 0.75)), same=True),
    "eps": Change(setting("eps", 1e-2), same=True),
    "weight decay": Change(setting("weight_decay", 0.5), same=True),
    "no weight decay": Change(setting("weight_decay", 0.0), same=True),
    "maximize": Change(setting("maximize", True), same=True),
    "seed": Change(setting("seed", 5), same=True),
    "nonfinite": Change(setting("nonfinite", "propagate")),
    "nonfinite, checked first": Change(setting("nonfinite", "error")),
    "master": Change(setting("low_precision_update", "fp32")),
    "backend": Change(_another_backend),
    "clipping": Change(_clip, same=True),
    "scale of gradients": Change(_scale, same=True),
    "parameter's values": Change(_decay_in_place, same=True),
    "parameter elsewhere": Change(of_data(Tensor.clone)),
    "parameter with other strides": Change(of_data(lambda data: data.t().contiguous().t())),
    "parameter frozen": Change(lambda opt: first(opt).requires_grad_(False)),
    "moved memory": Change(_share),
    "state elsewhere": Change(of_state("exp_avg_sq_code", Tensor.clone)),
    "step elsewhere": Change(of_state("step", Tensor.clone)),
    "another step": Change(_set_step),
    "another step, not counted as a change": Change(_set_step_unseen),
    "another dictionary": Change(_swap_dictionary),
    "state points elsewhere": Change(_point_elsewhere),
    "moments in each other's place": Change(_swap_names),
    "moments under each other's name": Change(_rename),
    "state lost": Change(_lose_state),
    "last state lost": Change(lambda opt: opt.state.pop(params_of(opt)[-1])),
    "load": Change(_load),
    "new group": Change(_new_group),
    "parameter in another group": Change(_move_to_other_group),
    "parameter taken out": Change(_take_out),
    "another cut": Change(_cut_anew),
}


@KINDS
@pytest.mark.parametrize("name", CHANGES)
def test_what_changes_between_steps_is_seen(
    name: str, dtype: torch.dtype, backend: str | None, comparison: str, repeated: list[bool]
) -> None:
    change = CHANGES[name]
    made: list[dict[str, Any]] = []
    for cls in (AdamW8bit, AdamW8bit):
        opt = optimizer(cls, dtype, backend=backend)
        take(opt, range(BEFORE))
        assert repeated[-2:] == [True, True]
        set_gradients(params_of(opt), BEFORE)
        change.make(opt)
        if made:
            opt._stepper.forget()
        repeated.clear()
        opt.step()
        assert any(repeated) is (change.same and not made)
        opt.grad_scale = None
        take(opt, range(BEFORE + 1, BEFORE + 5))
        made.append(everything(opt))
    assert repeated[-1] is (name != "nonfinite, checked first")
    assert_same_bits(made[0], made[1])


def test_a_parameter_that_had_no_gradient_is_stepped_with_its_first_one(repeated: list[bool]) -> None:
    opt = optimizer()
    params = params_of(opt)
    for step in range(BEFORE):
        set_gradients(params[1:], step)
        opt.step()
    assert repeated[-1]
    assert params[0] not in opt.state
    set_gradients(params, BEFORE)
    opt.step()
    assert not repeated[-1]
    assert int(opt.state[params[0]]["step"]) == 1


def test_parameters_in_turn_are_stepped_by_the_phases(repeated: list[bool]) -> None:
    opt = optimizer()
    for step in range(6):
        set_gradients(params_of(opt), step)
        first(opt).grad = None if step % 2 else first(opt).grad
        opt.step()
    assert not any(repeated)
    assert int(opt.state[first(opt)]["step"]) == 3


def test_steps_that_always_change_are_prepared_for_ever_less_often() -> None:
    opt = optimizer()
    prepared = []
    for step in range(40):
        set_gradients(params_of(opt), step)
        of_data(Tensor.clone)(opt)
        opt.step()
        prepared.append(opt._stepper._repeat is not None)
    assert [step for step, known in enumerate(prepared) if known] == [1, 3, 7, 15, 31]
    take(opt, range(40, 80))  # nothing changes any more
    assert opt._stepper._repeat is not None
    of_data(Tensor.clone)(opt)
    opt.step()
    assert opt._stepper._repeat is not None


# ---------------------------------------------------------------- errors


def _step_too_far(opt: Any) -> None:
    opt.param_groups[1].update(lr=1e38, weight_decay=1e3)


def _other_dtype(opt: Any) -> None:
    first(opt).data = first(opt).data.double()


ERRORS = {
    "setting": (setting("lr", -1.0), "lr is -1.0"),
    "step that leaves float32": (_step_too_far, "param group 1, parameter 0: lr is 1e[+]38"),
    "tensor setting": (setting("lr", torch.tensor(-1.0)), "lr is "),
    "sparse gradient": (of_gradients(Tensor.to_sparse), "layout torch.sparse"),
    "parameter of another dtype": (_other_dtype, "dtype torch.float64"),
    "state of another dtype": (of_state("exp_avg_code", Tensor.float), "exp_avg_code has shape"),
    "step of another dtype": (of_state("step", Tensor.float), "step has shape"),
}


@pytest.mark.parametrize("name", ERRORS)
def test_what_is_not_accepted_is_refused_and_changes_nothing(name: str, repeated: list[bool]) -> None:
    change, words = ERRORS[name]
    opt = optimizer()
    take(opt, range(BEFORE))
    assert repeated[-1]
    set_gradients(params_of(opt), BEFORE)
    change(opt)
    before = everything(opt)
    with pytest.raises(ValueError, match=words):
        opt.step()
    assert_same_bits(everything(opt), before)


def test_skipped_blocks_are_counted_and_warned_of(repeated: list[bool]) -> None:
    opt = optimizer()
    take(opt, range(BEFORE))
    set_gradients(params_of(opt), BEFORE)
    first(opt).grad[0, 0] = torch.inf
    with pytest.warns(RuntimeWarning, match="1 blocks") as seen:
        opt.step()
    assert repeated[-1]
    assert opt.stats() == {"skipped_blocks": 1}
    assert seen[0].filename == __file__


# ---------------------------------------------------------------- how tensors look


OTHERS: dict[str, Callable[[], Any]] = {
    "shape": lambda: torch.ones(4, 7),
    "dimensions": lambda: torch.ones(24),
    "strides": lambda: torch.ones(6, 4).t(),
    "dtype": lambda: torch.ones(4, 6, dtype=torch.bfloat16),
    "layout": lambda: torch.ones(4, 6).to_sparse(),
    "device": lambda: torch.ones(4, 6, device="meta"),
    "class": lambda: Parameter(torch.ones(4, 6), requires_grad=False),
    "requires_grad": lambda: torch.ones(4, 6, requires_grad=True),
    "sign bit": lambda: torch._neg_view(torch.ones(4, 6)),
    "none": lambda: None,
    "no tensor": lambda: 1.0,
}


@pytest.mark.parametrize("name", OTHERS)
def test_what_looks_otherwise(name: str, comparison: str) -> None:
    one = torch.zeros(3)
    look = Look([one, torch.zeros(4, 6)])
    assert look.fits([one, torch.ones(4, 6)])
    assert not look.fits([one, OTHERS[name]()])
    assert not look.fits([OTHERS[name](), torch.ones(4, 6)])


def test_as_many_tensors(comparison: str) -> None:
    look = Look([torch.zeros(3), torch.zeros(3)])
    assert look.fits([torch.ones(3), torch.ones(3)])
    assert not look.fits([torch.ones(3)])
    assert not look.fits([torch.ones(3), torch.ones(3), torch.ones(3)])


def test_tensors_of_inference_mode_look_otherwise(comparison: str) -> None:
    look = Look([torch.zeros(3)])
    with torch.inference_mode():
        other = torch.zeros(3)
    assert not look.fits([other])


def test_torch_has_its_comparison(comparison: str) -> None:
    """Or steps would be slow without anybody's knowledge."""
    assert (looks.GUARDS is not None) == (comparison != "our own")
