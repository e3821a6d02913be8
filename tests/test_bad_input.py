"""Bad settings, parameters and gradients: an error that helps, and everything as it was before.

Every test of a running optimizer ends with it going on to the same bits as a twin that never met the error.
"""

from __future__ import annotations

import copy
import math
import re
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import Parameter

from lowmem_adam import Adam8bit, AdamW8bit
from tests.cases import (
    CLASSES,
    FEW,
    OptimizerClass,
    assert_same_bits,
    everything,
    make_params,
    need_other_gradients,
    params_of,
    set_gradients,
    train,
)

ACCEPTED = {
    "lr": "finite numbers from 0",
    "eps": "finite numbers from 0",
    "weight_decay": "finite numbers from 0",
    "betas": "two numbers from 0 below 1",
    "seed": "integers from 0 below 2**63",
    "moments": "'8bit', '32bit'",
    "low_precision_update": "'nearest', 'stochastic', 'split', 'fp32'",
    "master_bits": "32, 24",
    "nonfinite": "'skip', 'error', 'propagate'",
    "backend": "None, ",
    "maximize": "False, True",
}
"""What an error must name as accepted, by setting."""

NUMBERS = (-1e-3, math.nan, math.inf, -math.inf, 1e39, 10**400, "0.1", None, True, 1j, [0.1])
BAD_VALUES: dict[str, tuple[Any, ...]] = {
    "lr": (
        *NUMBERS,
        torch.tensor([0.1, 0.2]),
        torch.tensor(math.nan),
        torch.tensor(-1.0),
        torch.tensor(1j),
        torch.tensor(True),
    ),
    "eps": NUMBERS,
    "weight_decay": NUMBERS,
    "betas": (
        *((0.9, 1.0), (1.0, 0.9), (-0.1, 0.9), (0.9, -0.1), (math.nan, 0.9), (0.9, math.inf)),
        *((0.9,), (0.9, 0.99, 0.999), (), 0.9, "ab", None, ("0.9", "0.99"), (True, 0.9), {0.8, 0.9}),
    ),
    "seed": (-1, 1.5, True, None, 2**63, "0", 0.0),
    "moments": ("4bit", 8, None, "8BIT", "bnb4bit", True),
    "low_precision_update": ("kahan", None, "SPLIT", False),
    "master_bits": (16, 8, 0, -32, 32.0, "24", None, True),
    "nonfinite": ("ignore", True, None),
    "backend": ("cuda", "", 0, "bnb"),
    "maximize": (1, 0, "no", None),
}
BAD_SETTINGS = [(name, value) for name, values in BAD_VALUES.items() for value in values]


def message_for(name: str, value: Any) -> str:
    """What the error must match: the setting, the value given, the values accepted, in this order."""
    return f"(?s){name}.*{re.escape(repr(value))}.*accepted.*{re.escape(ACCEPTED[name])}"


class Running:
    """An optimizer in the middle of its work, and a twin that nothing happens to."""

    def __init__(self, cls: OptimizerClass = AdamW8bit, steps: int = 2, **settings: Any) -> None:
        self.opt, self.twin = self._new(cls, settings), self._new(cls, settings)
        self.params = params_of(self.opt)
        self.steps = 0
        self.go_on(steps)
        self.before = everything(self.opt)

    @staticmethod
    def _new(cls: OptimizerClass, settings: dict[str, Any]) -> Adam8bit:
        groups: list[dict[str, Any]] = [
            {"params": make_params(FEW, torch.bfloat16), "lr": 0.01},
            {"params": make_params(FEW, seed=1)},
        ]
        return cls(groups, **settings)

    def go_on(self, steps: int) -> None:
        for opt in (self.opt, self.twin):
            train(opt, params_of(opt), steps, start=self.steps)
        self.steps += steps

    def assert_unharmed(self) -> None:
        assert_same_bits(self.before, everything(self.opt))
        self.go_on(2)
        assert_same_bits(everything(self.twin), everything(self.opt))


# ---------------------------------------------------------------- settings


@pytest.mark.parametrize("cls", CLASSES)
@pytest.mark.parametrize(("name", "value"), BAD_SETTINGS, ids=lambda x: str(x)[:30])
def test_constructor_refuses(cls: OptimizerClass, name: str, value: Any) -> None:
    with pytest.raises(ValueError, match=message_for(name, value)):
        cls(make_params(FEW), **{name: value})
    with pytest.raises(ValueError, match="param group 1.*" + message_for(name, value)[4:]):
        cls([{"params": make_params(FEW)}, {"params": make_params(FEW), name: value}])


@pytest.mark.parametrize(("name", "value"), BAD_SETTINGS, ids=lambda x: str(x)[:30])
def test_a_bad_value_written_later_stops_the_step(name: str, value: Any) -> None:
    running = Running()
    group = running.opt.param_groups[1]
    good, group[name] = group[name], value
    set_gradients(running.params, running.steps)
    with pytest.raises(ValueError, match="param group 1.*" + message_for(name, value)[4:]):
        running.opt.step()
    group[name] = good
    running.assert_unharmed()


@pytest.mark.parametrize(("name", "value"), BAD_SETTINGS[::3], ids=lambda x: str(x)[:30])
def test_a_group_with_a_bad_value_is_not_added(name: str, value: Any) -> None:
    running = Running()
    with pytest.raises(ValueError, match="param group 2.*" + message_for(name, value)[4:]):
        running.opt.add_param_group({"params": make_params(FEW, seed=5), name: value})
    assert len(running.opt.param_groups) == 2
    running.assert_unharmed()


def test_moments_of_a_running_parameter_cannot_change() -> None:
    running = Running()
    running.opt.param_groups[1]["moments"] = "32bit"
    set_gradients(running.params, running.steps)
    with pytest.raises(ValueError, match=r"param group 1, parameter 0.*moments is '32bit'.*accepted: \['exp_avg'"):
        running.opt.step()
    running.opt.param_groups[1]["moments"] = "8bit"
    running.assert_unharmed()


@pytest.mark.parametrize(
    ("name", "value", "error", "words"),
    [
        ("amsgrad", True, TypeError, "AMSGrad"),
        ("fused", True, TypeError, "drop it"),
        ("foreach", True, TypeError, "drop it"),
        ("differentiable", True, TypeError, "drop it"),
        ("block_wise", True, TypeError, "128"),
        ("optim_bits", 8, TypeError, 'moments="8bit"'),
        ("min_8bit_size", 4096, TypeError, 'moments="32bit"'),
        ("is_paged", True, TypeError, "not paged"),
        ("percentile_clipping", 5, TypeError, "clip_grad_norm_"),
        ("adamw_mode", True, TypeError, "AdamW8bit"),
        ("master_weight_bits", 24, TypeError, 'low_precision_update="split" with master_bits=24'),
        ("master_bits", 24, ValueError, "accepted: 32, and 24 with low_precision_update='split'"),
        ("learning_rate", 0.1, TypeError, "accepted settings: lr, betas"),
        ("weightdecay", 0.1, TypeError, "weight_decay"),
        ("shard_group", "all", ValueError, "accepted: None, 'world', a ProcessGroup"),
        ("shard_group", 2, ValueError, "accepted: None, 'world', a ProcessGroup"),
        ("bucket_cap_mb", 0, ValueError, "accepted: finite numbers above 0"),
        ("bucket_cap_mb", "64", ValueError, "accepted: finite numbers above 0"),
        ("offload", "gpu", ValueError, "accepted: None, 'cpu'"),
        ("offload_gradients", 1, ValueError, "accepted: True, False"),
        ("offload_gradients", True, ValueError, "accepted with it: offload='cpu'"),
    ],
)
@pytest.mark.parametrize("cls", CLASSES)
def test_other_optimizers_keywords(
    cls: OptimizerClass, name: str, value: Any, error: type[Exception], words: str
) -> None:
    with pytest.raises(error, match=f"{name}.*{re.escape(repr(value))}.*{re.escape(words)}"):
        cls(make_params(FEW), **{name: value})


@pytest.mark.parametrize(("name", "nothing"), [("shard_group", None), ("offload", None), ("offload_gradients", False)])
def test_keywords_of_the_whole_optimizer_ask_for_nothing_in_a_group(name: str, nothing: Any) -> None:
    keywords: dict[str, Any] = {name: nothing}
    assert name not in AdamW8bit(make_params(FEW), **keywords).param_groups[0]
    assert name not in AdamW8bit([{"params": make_params(FEW), **keywords}]).param_groups[0]
    with pytest.raises(ValueError, match=f"param group 0: {name} is 'world'.*accepted: "):
        AdamW8bit([{"params": make_params(FEW), name: "world"}])


def test_products_of_settings_beyond_float32_are_refused() -> None:
    running = Running()
    set_gradients(running.params, running.steps)
    for settings in ({"lr": 3e38, "betas": (0.99, 0.9)}, {"lr": 1e30, "weight_decay": 1e30}):
        kept = {name: running.opt.param_groups[1][name] for name in settings}
        running.opt.param_groups[1].update(settings)
        with pytest.raises(ValueError, match=r"param group 1, parameter 0.*lr is.*accepted: steps and factors up to"):
            running.opt.step()
        running.opt.param_groups[1].update(kept)
    running.assert_unharmed()


# ---------------------------------------------------------------- parameters


class Sharded(Tensor):
    """A tensor class that wraps another, as DTensor and quantized tensors do."""

    @staticmethod
    def __new__(cls) -> Sharded:
        made: Sharded = Tensor._make_wrapper_subclass(cls, (64, 128), requires_grad=True)
        return made

    @classmethod
    def __torch_dispatch__(  # type: ignore[override]
        cls, func: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        return cls() if func is torch.ops.aten.detach.default else NotImplemented


def parameter(dtype: torch.dtype = torch.float32) -> Parameter:
    return Parameter(torch.zeros(64, 128, dtype=dtype), requires_grad=False)


def of_fsdp1(mark: str) -> Parameter:
    """A parameter as ``FullyShardedDataParallel`` marks its flat ones and the views into them."""
    param = parameter()
    setattr(param, mark, True)
    return param


SHARED = parameter()
BAD_PARAMS: list[tuple[str, Callable[[], Any], type[Exception], str]] = [
    ("float64", lambda: [parameter(torch.float64)], ValueError, "parameter 0 has dtype torch.float64.*torch.float32"),
    ("int", lambda: [parameter(torch.int32)], ValueError, "torch.int32; accepted: torch.float32, torch.bfloat16"),
    ("complex", lambda: [parameter(), parameter(torch.complex64)], ValueError, "parameter 1 has dtype torch.complex64"),
    ("float8", lambda: [parameter(torch.float8_e4m3fn)], ValueError, "float8_e4m3fn; accepted"),
    ("named", lambda: [("head.weight", parameter(torch.float64))], ValueError, "head.weight.*float64"),
    ("subclass", lambda: [Sharded()], ValueError, "Sharded; accepted: plain tensors"),
    ("sparse", lambda: [torch.zeros(9, 9).to_sparse()], ValueError, "sparse_coo; accepted: torch.strided"),
    ("overlapping", lambda: [torch.zeros(1, 128).expand(64, 128)], ValueError, "parameter 0.*accepted"),
    ("non-leaf", lambda: [torch.zeros(9, 9, requires_grad=True) + 1], ValueError, "non-leaf"),
    ("twice in a group", lambda: [SHARED, SHARED], ValueError, "parameter 1.*each parameter once"),
    ("FSDP1 flat", lambda: [of_fsdp1("_is_flat_param")], ValueError, "FSDP1.*accepted"),
    ("FSDP1 view", lambda: [of_fsdp1("_fsdp_flattened")], ValueError, "FSDP1.*accepted"),
    ("not tensors", lambda: [5], TypeError, "parameter 0 is a int; accepted: tensors"),
    ("half a pair", lambda: [("weight",)], TypeError, "parameter 0.*accepted"),
    ("a set", lambda: {parameter()}, TypeError, "ordered collections"),
]


@pytest.mark.parametrize(("name", "params", "error", "words"), BAD_PARAMS, ids=[row[0] for row in BAD_PARAMS])
def test_parameters_that_are_refused(name: str, params: Callable[[], Any], error: type[Exception], words: str) -> None:
    if name != "a set":  # as the whole argument, a set has an order of its own making all the same
        with pytest.raises(error, match=words):
            AdamW8bit(params())
    running = Running()
    with pytest.raises(error, match=words):
        running.opt.add_param_group({"params": params()})
    assert len(running.opt.param_groups) == 2
    running.assert_unharmed()


def test_a_parameter_of_two_groups_is_refused() -> None:
    params = make_params(FEW)
    with pytest.raises(ValueError, match=r"param group 1, parameter 0 is already in param group 0.*accepted"):
        AdamW8bit([{"params": params}, {"params": params[:1]}])


@pytest.mark.parametrize("group", [5, None, [torch.zeros(3)], [torch.zeros(2, 2)], "params"], ids=repr)
def test_a_group_that_is_no_dictionary(group: Any) -> None:
    running = Running()
    with pytest.raises(TypeError, match="dict"):
        running.opt.add_param_group(group)
    running.assert_unharmed()


def test_no_parameters() -> None:
    with pytest.raises(ValueError, match="empty"):
        AdamW8bit([])
    with pytest.raises(TypeError, match="iterable"):
        AdamW8bit(torch.zeros(3))


# ---------------------------------------------------------------- gradients and parameters that changed


def sparse_gradient(param: Tensor) -> None:
    param.grad = torch.ones_like(param).to_sparse()


def half_gradient(param: Tensor) -> None:
    need_other_gradients()
    param.grad = None
    param.grad_dtype = torch.float16
    param.grad = torch.ones_like(param, dtype=torch.float16)


def gradient_of_another_shape(param: Tensor) -> None:
    param.data = param.data[:, :64]


def replaced_by(change: Callable[[Tensor], Tensor]) -> Callable[[Tensor], None]:
    def replace(param: Tensor) -> None:
        param.grad = None
        param.data = change(param.data)
        param.grad = torch.ones_like(param)

    return replace


CHANGES: list[tuple[str, Callable[[Tensor], None], str]] = [
    ("sparse gradient", sparse_gradient, "layout torch.sparse_coo; accepted: dense"),
    ("gradient of another dtype", half_gradient, "dtype torch.float16; accepted: torch.float32"),
    ("gradient of another shape", gradient_of_another_shape, r"shape \(64, 128\); accepted: \(64, 64\)"),
    ("parameter became float64", replaced_by(lambda p: p.double()), "float64.*accepted"),
    ("parameter became smaller", replaced_by(lambda p: p[:32].clone()), "shape.*accepted"),
    ("parameter was reshaped", replaced_by(lambda p: p.reshape(128, 64).clone()), "shape.*accepted"),
    ("parameter lost its codes' size", replaced_by(lambda p: p[:2].clone()), "accepted"),
]


@pytest.mark.parametrize(("name", "change", "words"), CHANGES, ids=[row[0] for row in CHANGES])
def test_gradients_and_changed_parameters_that_are_refused(
    name: str, change: Callable[[Tensor], None], words: str
) -> None:
    running = Running()
    victim = params_of(running.opt)[len(FEW)]  # the matrix of the second group: others come before and after
    data = victim.data
    set_gradients(running.params, running.steps)
    change(victim)
    with pytest.raises(ValueError, match=f"(?s)param group 1, parameter 0.*{words}"):
        running.opt.step()
    victim.grad = None
    victim.data = data
    victim.grad_dtype = torch.float32
    running.assert_unharmed()


@pytest.mark.parametrize(
    ("key", "change"),
    [
        ("exp_avg_code", lambda t: t.to("meta")),  # as after model.to(device) with an optimizer that has state
        ("exp_avg_code", lambda t: t.float()),
        ("exp_avg_sq_code", lambda t: t[:, :64]),
        ("block_span", lambda t: None),
    ],
    ids=["device", "dtype", "shape", "not a tensor"],
)
def test_state_that_was_tampered_with_is_refused(key: str, change: Callable[[Tensor], Any]) -> None:
    running = Running()
    state = running.opt.state[params_of(running.opt)[len(FEW) + 1]]
    good, state[key] = state[key], change(state[key])
    set_gradients(running.params, running.steps)
    with pytest.raises(ValueError, match=f"(?s)param group 1, parameter 1.*{key}.*accepted"):
        running.opt.step()
    state[key] = good
    running.assert_unharmed()


def test_a_closure_that_fails_changes_nothing() -> None:
    running = Running()
    set_gradients(running.params, running.steps)

    def closure() -> float:
        raise RuntimeError("mine")

    with pytest.raises(RuntimeError, match="mine"):
        running.opt.step(closure)
    running.assert_unharmed()


def test_a_failed_first_step_leaves_no_trace_in_the_state() -> None:
    running = Running(steps=0)
    set_gradients(running.params, 0)
    running.opt.param_groups[1]["lr"] = -1.0
    with pytest.raises(ValueError, match=r"lr is -1\.0"):
        running.opt.step()
    running.opt.param_groups[1]["lr"] = 1e-3
    running.opt.load_state_dict(copy.deepcopy(running.opt.state_dict()))
    running.assert_unharmed()
