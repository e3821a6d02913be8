"""What bitsandbytes and torchao ask of their 8-bit Adam in tests, asked of this one, in other words and more sharply.

Their scenarios are those of bitsandbytes' ``tests/test_optim.py`` and torchao's ``test/test_low_bit_optim.py``, read at
commits a24aae3 and bd9aed7. Tolerances there are tuned, some elements may miss them, and state and parameters are
copied over after each step; here bounds follow from the format, hold for every element, and nothing is copied.

| scenario of theirs | here |
|---|---|
| 32-bit and 8-bit steps against torch, state tolerances | ``test_every_step_is_adams_up_to_one_coding`` |
| the same, free of resynchronisation, hundreds of steps | test_peer_free_running.py; test_against_torch.py |
| save and reload every few steps | ``test_saved_and_reloaded_every_few_steps`` |
| resume without NaN, state loaded onto a device from a CPU file | the same |
| GlobalOptimManager: overrides before and after registration | ``test_an_override_...`` |
| arguments that would be ignored are refused | test_bad_input.py |
| smoke of every class, dtype and setting | ``test_a_small_model_learns`` |
| param groups, schedulers, lr as a tensor | ``test_the_same_script_drives_torch_and_this`` |
| bf16 stochastic rounding, tiny learning rates | test_peer_free_running.py; test_reference.py |
| nearest code of a map, slices of the state subclass | test_codec.py; test_shard_checkpoints.py, test_dtensor.py |
| torchao against bitsandbytes | benchmarks/peer_formats.py with test_peer_formats.py; test_foreign.py |
| quantization under torch.compile | test_optimizer.py (a compiled training step) |
| CPUOffloadOptimizer: gradients on the host, accumulation, frozen parts, schedulers, save and load | test_offload.py, \
test_offload_host_step.py, offload_cases.py, host_gradient_cases.py (on a simulated device) |
| FSDP2 against one process, CPU offload policy, uneven shards, distributed checkpoints | test_dtensor.py |
| paged optimizers, speed | benchmarks/bench_offload.py, benchmarks/bench_step_time.py |
| Lion, LARS, LAMB, AdEMAMix, SGD, RMSprop, Adagrad; 4 bits and fp8 | not part of this package |
"""

from __future__ import annotations

import copy
import io
import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import Parameter
from torch.optim import lr_scheduler

from lowmem_adam.layout import Layout, is_coded
from lowmem_adam.state import expected_tensors
from tests.cases import CLASSES, DTYPES, OptimizerClass, assert_same_bits, bits, copied, everything, generator
from tests.oracle import TextbookAdam
from tests.peer_cases import (
    FORMATS,
    MOMENTS,
    Exact,
    allowed_moments,
    allowed_param,
    decoded,
    mixed_gradients,
    on_every_device,
    with_all_moments,
)

every_class = pytest.mark.parametrize("cls", CLASSES, ids=lambda cls: cls.__name__)
every_dtype = pytest.mark.parametrize("dtype", DTYPES, ids=str)
TORCHS = dict(zip(CLASSES, (torch.optim.AdamW, torch.optim.Adam), strict=True))


def some_values(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=generator(seed)) * 0.1


# ---------------------------------------------------------------- one step after another, against the paper


class Stepped:
    """An optimizer of one parameter that is held against the float64 textbook step from whatever it held before."""

    def __init__(
        self, cls: OptimizerClass, values: Tensor, moments: str, low_precision_update: str = "stochastic"
    ) -> None:
        self.param = Parameter(values.clone())
        self.moments, self.update = moments, low_precision_update
        self.settings: dict[str, Any] = {"lr": 1e-3, "weight_decay": 0.01}
        self.opt = cls([self.param], moments=moments, low_precision_update=low_precision_update, **self.settings)
        self.decoupled = cls is CLASSES[0]

    def exact(self, grad: Tensor, t: int) -> Exact:
        """What step t should come to from the state and the parameter as they are."""
        oracle = TextbookAdam(self.param, decoupled=self.decoupled, **self.settings)
        oracle.exp_avg, oracle.exp_avg_sq = decoded(self.opt, self.param)
        oracle.t = t - 1
        return Exact.step(oracle, grad)

    def step(self, grad: Tensor, t: int) -> Exact:
        exact = self.exact(grad, t)
        self.param.grad = grad
        self.opt.step()
        return exact

    def outside(self, exact: Exact) -> dict[str, int]:
        """How many elements lie outside of what is allowed, by what they are of."""
        exp_avg, exp_avg_sq = decoded(self.opt, self.param)
        first, root = allowed_moments(self.moments, exact)
        param = allowed_param(exact, self.param.dtype, self.update)
        found = {
            "exp_avg": first.holds(exp_avg),
            "root": root.holds(exp_avg_sq.sqrt()),
            "param": param.holds(self.param),
        }
        return {name: int((~inside).sum()) for name, inside in found.items() if not bool(inside.all())}


@on_every_device
@pytest.mark.parametrize("update", ["stochastic", "nearest"])
@with_all_moments
@every_dtype
@every_class
def test_every_step_is_adams_up_to_one_coding(
    cls: OptimizerClass, dtype: torch.dtype, moments: str, update: str, device: str
) -> None:
    """Parameters and dequantised states, all elements, at each of 60 steps: no tolerance that was tuned."""
    steps, rows, cols = 60, 42, 300
    stepped = Stepped(cls, some_values(rows, cols).to(dtype).to(device), moments, update)
    grad_at = mixed_gradients(rows, cols, steps, dtype, device)
    for t in range(1, steps + 1):
        exact = stepped.step(grad_at(t - 1), t)
        assert not stepped.outside(exact), f"step {t}"


@pytest.mark.parametrize(("key", "name", "by"), [("exp_avg_code", "exp_avg", 12), ("exp_avg_sq_code", "root", 3)])
def test_a_code_that_is_off_by_more_than_one_coding_is_seen(key: str, name: str, by: int) -> None:
    """The negative control of the bounds: half of the elements get a code further up, within what the format holds.

    Of a root three are seen. Of a first moment, which is decoded with its root, what that may be off comes on top: in a
    block of 20 octaves 8% either way, while 12 codes are at least a third of its value.
    """
    stepped = Stepped(CLASSES[0], some_values(42, 300), "8bit")
    grad_at = mixed_gradients(42, 300, 10, torch.float32, "cpu")
    for t in range(1, 11):
        exact = stepped.step(grad_at(t - 1), t)
    assert not stepped.outside(exact)
    codes = stepped.opt.state[stepped.param][key]
    moved = (codes > 0) & (codes < 110) & (torch.rand(codes.shape, generator=generator(1)) < 0.5)
    codes[moved] += by
    assert int(moved.sum()) > 1000
    assert stepped.outside(exact)[name] == int(moved.sum())


@pytest.mark.parametrize(
    "wrong", [{"lr": 1.001e-3}, {"weight_decay": 0.011}, {"eps": 1.2e-8}, {"betas": (0.9, 0.9985)}]
)
@with_all_moments
def test_a_slightly_wrong_setting_is_seen(moments: str, wrong: dict[str, Any]) -> None:
    stepped = Stepped(CLASSES[0], some_values(42, 300), moments)
    stepped.opt.param_groups[0].update(wrong)
    grad_at = mixed_gradients(42, 300, 3, torch.float32, "cpu")
    found = [stepped.outside(stepped.step(grad_at(t - 1) * 1e-3, t)) for t in range(1, 4)]
    assert all("param" in outside for outside in found[1:])


# ---------------------------------------------------------------- save and reload


@on_every_device
@pytest.mark.parametrize("where", ["cpu", "as saved"])
@with_all_moments
@every_dtype
@every_class
def test_saved_and_reloaded_every_few_steps(
    cls: OptimizerClass, dtype: torch.dtype, moments: str, where: str, device: str
) -> None:
    """Every four steps into a new model and a new optimizer with other settings: the bits of a run never stopped."""
    shapes, steps = ((40, 300), (7,), (32, 128), ()), 25
    kept = [Parameter(some_values(*shape, seed=i).to(dtype).to(device)) for i, shape in enumerate(shapes)]
    own = [Parameter(param.detach().clone()) for param in kept]
    settings: dict[str, Any] = {"lr": 3e-3, "betas": (0.8, 0.99), "weight_decay": 0.03, "moments": moments, "seed": 11}
    never_stopped, opt = cls(kept, **settings), cls(own, **settings)
    grad_at = mixed_gradients(40, 300, steps, dtype, device)
    for t in range(steps):
        large = grad_at(t)
        for params in (kept, own):
            for param in params:
                param.grad = large if param.shape == large.shape else large.flatten()[: param.numel()].view(param.shape)
        never_stopped.step()
        opt.step()
        assert_same_bits(everything(opt), everything(never_stopped), f"step {t}")
        if t % 4 == 3:
            file = io.BytesIO()
            torch.save({"params": [param.detach() for param in own], "optimizer": opt.state_dict()}, file)
            file.seek(0)
            loaded = torch.load(file, map_location="cpu" if where == "cpu" else None, weights_only=True)
            own = [Parameter(values.to(device)) for values in loaded["params"]]
            opt = cls(own, lr=1.0, moments=moments)
            opt.load_state_dict(loaded["optimizer"])
            held = [value for param in own for name, value in opt.state[param].items() if name != "step"]
            assert {value.device.type for value in held} == {device}


# ---------------------------------------------------------------- overrides


class Words(nn.Module):
    """An embedding, most of whose rows have no gradient in a batch, below a layer."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(5)
        self.embedding, self.out = nn.Embedding(300, 48), nn.Linear(48, 96)

    def forward(self, words: Tensor) -> Tensor:
        result: Tensor = self.out(self.embedding(words)).square().mean()
        return result


class Replayed:
    """The gradients that a run had, given to a twin whose parameters all have one kind of moments."""

    def __init__(self, params: list[Tensor], moments: str) -> None:
        self.params = [Parameter(param.detach().clone()) for param in params]
        self.opt = CLASSES[0](self.params, lr=0.01, moments=moments)

    def step(self, grads: list[Tensor]) -> None:
        for param, grad in zip(self.params, grads, strict=True):
            param.grad = grad.clone()
        self.opt.step()


@on_every_device
@every_dtype
@pytest.mark.parametrize("when", ["at construction", "on the group", "in a group added later"])
@pytest.mark.parametrize(("of_first", "of_others"), [("32bit", "8bit"), ("8bit", "32bit")])
def test_an_override_is_exact_and_touches_nothing_else(
    of_first: str, of_others: str, when: str, dtype: torch.dtype, device: str
) -> None:
    """The parameter with its own moments takes the bits of a run where all have them; so do all others."""
    model = Words().to(dtype).to(device)
    first: list[Tensor] = [model.embedding.weight]
    others: list[Tensor] = list(model.out.parameters())
    if when == "in a group added later":
        opt = CLASSES[0](others, lr=0.01, moments=of_others)
        opt.add_param_group({"params": first, "moments": of_first})
    else:
        given = of_first if when == "at construction" else of_others
        groups: list[dict[str, Any]] = [{"params": first, "moments": given}, {"params": others}]
        opt = CLASSES[0](groups, lr=0.01, moments=of_others)
        opt.param_groups[0]["moments"] = of_first
    twins = [Replayed(params, moments) for params, moments in ((first, of_first), (others, of_others))]
    for step in range(20):
        words = torch.randint(0, 300, (16,), generator=generator(step)).to(device)
        opt.zero_grad()
        model(words).backward()
        for twin, params in zip(twins, (first, others), strict=True):
            twin.step([param.grad for param in params if param.grad is not None])
        opt.step()
    for twin, params in zip(twins, (first, others), strict=True):
        for own, mine in zip(twin.params, params, strict=True):
            assert_same_bits(mine.detach(), own.detach())
            assert_same_bits(opt.state[mine], twin.opt.state[own])
    for param, moments in ((first[0], of_first), (others[0], of_others)):
        held = {key: (tuple(value.shape), value.dtype) for key, value in opt.state[param].items()}
        assert held == expected_tensors(param.shape, moments)


@with_all_moments
def test_an_override_that_comes_too_late_is_refused(moments: str) -> None:
    """An override, and a load of other moments, of a parameter that has state already: nothing changes."""
    model = Words()
    groups: list[dict[str, Any]] = [{"params": [part.weight]} for part in (model.embedding, model.out)]
    opt, other = CLASSES[0](groups, moments=moments), CLASSES[0](copy.deepcopy(groups), moments=moments)
    (wanted, *_) = (name for name in MOMENTS if name != moments)
    other.param_groups[0]["moments"] = wanted
    model(torch.arange(16)).backward()
    opt.step()
    before, untouched = everything(opt), everything(other)
    with pytest.raises(ValueError, match=f"moments is '{moments}'; accepted: '{wanted}'"):
        other.load_state_dict(opt.state_dict())
    assert_same_bits(everything(other), untouched)
    opt.param_groups[0]["moments"] = wanted
    with pytest.raises(ValueError, match=f"state|moments is '{wanted}'"):
        opt.step()
    opt.param_groups[0]["moments"] = moments
    assert_same_bits(everything(opt), before)


# ---------------------------------------------------------------- smoke

SETTINGS: tuple[dict[str, Any], ...] = (
    {},
    {"low_precision_update": "nearest"},
    {"low_precision_update": "fp32"},
    {"low_precision_update": "split"},
    {"low_precision_update": "split", "master_bits": 24},
    {"nonfinite": "propagate", "betas": (0.0, 0.9), "weight_decay": 0.0},
    {"nonfinite": "error", "betas": (0.95, 0.99), "eps": 1e-6, "seed": 2**40, "lr": torch.tensor(5e-3)},
    {"backend": "reference"},
    {"offload": "cpu"},
)


@pytest.mark.filterwarnings("ignore:offload steps on the host")
@on_every_device
@pytest.mark.parametrize("settings", SETTINGS, ids=lambda settings: ", ".join(settings) or "defaults")
@with_all_moments
@every_dtype
@every_class
def test_a_small_model_learns(
    cls: OptimizerClass, dtype: torch.dtype, moments: str, settings: dict[str, Any], device: str
) -> None:
    """Its loss falls to a third, and its state has the bytes, shapes and dtypes that are documented."""
    torch.manual_seed(1)
    model = nn.Sequential(nn.Linear(32, 256), nn.ReLU(), nn.Linear(256, 32)).to(dtype).to(device)
    data, wanted = (torch.randn(16, 32, generator=generator(i)).to(dtype).to(device) for i in (1, 2))
    opt = cls(model.parameters(), **{"lr": 5e-3, "moments": moments, **settings})
    losses = []
    for _ in range(40):
        opt.zero_grad()
        loss = (model(data) - wanted).float().square().mean()
        loss.backward()
        opt.step()
        losses.append(float(loss.detach()))
    assert all(map(math.isfinite, losses))
    assert losses[-1] < losses[0] / 3

    correction = {"fp32": 4, "split": settings.get("master_bits", 32) // 8 - 2}.get(
        settings.get("low_precision_update", "stochastic"), 0
    )
    home = "cpu" if settings.get("offload") == "cpu" else device
    total = 0
    for param in model.parameters():
        state = opt.state[param]
        assert {tensor.device.type for key, tensor in state.items() if key != "step"} == {home}
        rows = Layout.of(param.shape)
        if moments == "32bit" or not is_coded(param.shape):
            own = 8 * param.numel()
            assert {state[key].dtype for key in ("exp_avg", "exp_avg_sq")} == {torch.float32}
        else:
            own = FORMATS[moments].nbytes(rows)
        own += 8 + (correction * param.numel() if dtype != torch.float32 else 0)  # 8: the step, int64
        assert sum(tensor.nbytes for tensor in state.values()) == own
        total += own
    assert opt.memory_report()["total_bytes"] == total


# ---------------------------------------------------------------- param groups


def pair(
    cls: OptimizerClass, groups: Callable[[list[Parameter]], Any], moments: str, device: str, **settings: Any
) -> Any:
    """Our optimizer and torch's on equal parameters, and these."""
    kept = [[Parameter(some_values(64, 128, seed=i).to(device)) for i in range(3)] for _ in range(2)]
    made = []
    for own, params in zip((True, False), kept, strict=True):
        extra = {"moments": moments} if own else {"foreach": False}
        made.append((cls if own else TORCHS[cls])(groups(params), **settings, **extra))
    return made, kept


def scripted(name: str, opt: torch.optim.Optimizer, params: list[Parameter]) -> Callable[[int], None]:
    """What a training script does with an optimizer: after making it, and at each step behind ``opt.step()``."""
    if name == "added later":

        def add(t: int) -> None:
            if t == 5:
                opt.add_param_group({"params": [params[2]], "lr": 5e-3, "weight_decay": 0.1})

        return add
    if name == "by hand":

        def change(t: int) -> None:
            opt.param_groups[0]["lr"] *= 0.9
            opt.param_groups[1]["betas"] = (0.9 - 0.02 * t, 0.99)
            opt.param_groups[1]["weight_decay"] = 0.01 * t

        return change
    if name == "lr tensors in place":

        def shrink(t: int) -> None:
            for group in opt.param_groups:
                group["lr"].mul_(0.9)

        return shrink
    schedulers: dict[str, Callable[[], Any]] = {
        "a function a group": lambda: lr_scheduler.LambdaLR(opt, [lambda t: 0.9**t, lambda t: 1 / (1 + t)]),
        "one cycle": lambda: lr_scheduler.OneCycleLR(opt, [0.01, 0.03], total_steps=30),
        "warm-up, then cosine": lambda: lr_scheduler.SequentialLR(
            opt, [lr_scheduler.LinearLR(opt, 0.1, total_iters=5), lr_scheduler.CosineAnnealingLR(opt, 20)], [5]
        ),
    }
    scheduler = schedulers[name]()
    return lambda t: scheduler.step()


SCRIPTS = (
    "added later",
    "by hand",
    "lr tensors in place",
    "a function a group",
    "one cycle",
    "warm-up, then cosine",
)


@on_every_device
@pytest.mark.parametrize("script", SCRIPTS)
@with_all_moments
@every_class
def test_the_same_script_drives_torch_and_this(cls: OptimizerClass, moments: str, script: str, device: str) -> None:
    """Settings of all groups equal torch's at each step, and parameters follow them."""
    rates: tuple[Any, Any] = (3e-3, 3e-4)
    if script == "lr tensors in place":
        rates = (torch.tensor(3e-3), torch.tensor(3e-4))

    def groups(params: list[Parameter]) -> list[dict[str, Any]]:
        lrs = [copy.copy(rate) if isinstance(rate, float) else rate.clone() for rate in rates]
        made: list[dict[str, Any]] = [
            {"params": [params[0]], "lr": lrs[0], "betas": (0.8, 0.99)},
            {"params": [params[1]], "lr": lrs[1], "weight_decay": 0.0},
        ]
        return made if script == "added later" else [*made[:1], {**made[1], "params": params[1:]}]

    (opt, full), kept = pair(cls, groups, moments, device)
    starts = [param.detach().clone() for param in kept[0]]
    after = [scripted(script, *each) for each in zip((opt, full), kept, strict=True)]
    for t in range(25):
        noise = generator(7, t)
        for params in zip(*kept, strict=True):
            grad = (torch.randn(params[0].shape, generator=noise) * 0.01).to(device)
            for param in params:
                param.grad = grad
        for each, then in zip((opt, full), after, strict=True):
            each.step()
            then(t)
        for mine, theirs in zip(opt.param_groups, full.param_groups, strict=True):
            for key in ("lr", "betas", "eps", "weight_decay"):
                assert mine[key] == theirs[key], f"{key} after step {t}"
    for mine, theirs, start in zip(*kept, starts, strict=True):
        error = float((mine - theirs).detach().norm() / (theirs.detach() - start).norm())
        # Scales are equal: the documented figure, of which the first 25 steps, where roots rise fast, may have twice.
        figures = FORMATS[moments].figures
        assert error <= (2 * figures[0][1] if figures else 1e-4)


# ---------------------------------------------------------------- parameters of every kind


@on_every_device
@with_all_moments
@every_dtype
def test_unused_frozen_odd_and_empty_parameters_beside_others(dtype: torch.dtype, moments: str, device: str) -> None:
    """What gets no gradient keeps its bits and takes no state; everything else steps as it would alone."""
    shapes = ((), (1,), (3, 1), (1, 1, 1, 1), (0,), (0, 7), (4097, 1), (1, 4099), (17, 241), (2, 3, 5, 7, 31))
    params = [Parameter(some_values(*shape, seed=i).to(dtype).to(device)) for i, shape in enumerate(shapes)]
    unused, frozen = (Parameter(some_values(64, 128, seed=seed).to(dtype).to(device)) for seed in (20, 21))
    frozen.requires_grad_(False)
    alone = [Parameter(param.detach().clone()) for param in params]
    before = copied([unused.detach(), frozen.detach()])
    opt = CLASSES[0]([unused, *params, frozen], moments=moments)
    others = [CLASSES[0]([param], moments=moments) for param in alone]
    for t in range(4):
        for i, (param, twin) in enumerate(zip(params, alone, strict=True)):
            grad = torch.randn(param.shape, generator=generator(8, i, t)).to(dtype).to(device)
            # A parameter's gradient may be missing at a step, as of a layer that was not called.
            param.grad = twin.grad = None if (i + t) % 3 == 0 else grad
        for each in (opt, *others):
            each.step()
    assert_same_bits([unused.detach(), frozen.detach()], before)
    assert unused not in opt.state
    assert frozen not in opt.state
    for param, twin, other in zip(params, alone, others, strict=True):
        assert_same_bits(param.detach(), twin.detach())
        assert_same_bits(opt.state[param], other.state[twin])
        assert int(opt.state[param]["step"]) in (2, 3)
        assert bool(param.isfinite().all())
        assert {value.device.type for key, value in opt.state[param].items() if key != "step"} == {device}


@on_every_device
@with_all_moments
def test_a_model_that_moves_before_its_first_step_takes_its_state_along(moments: str, device: str) -> None:
    """Parameters that were on the CPU when bitsandbytes registers them, and moved: state follows at the first step."""
    model = nn.Linear(128, 64)
    opt = CLASSES[0](model.parameters(), moments=moments)
    model.to(device=device, dtype=torch.bfloat16)
    model(torch.ones(2, 128, dtype=torch.bfloat16, device=device)).sum().backward()
    start = bits(model.weight).clone()
    opt.step()
    assert not torch.equal(bits(model.weight), start)
    for param in model.parameters():
        assert {value.device.type for key, value in opt.state[param].items() if key != "step"} == {device}
