"""Steps in functions that torch.compile traces: one graph, compiled once, with the bits of a step outside of them."""

from __future__ import annotations

import copy
import gc
import math
import pickle
import subprocess
import sys
import warnings
import weakref
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
import torch._dynamo
from torch import Tensor, nn
from torch._dynamo.utils import counters
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Shard, distribute_tensor

from lowmem_adam import AdamW8bit
from tests.cases import FEW, assert_same_bits, differ, everything, gradient, make_params, set_gradients
from tests.ranks import NEEDS_GLOO, on_ranks
from tests.shard_jobs import small

BACKENDS = ["eager", "aot_eager", pytest.param("inductor", marks=pytest.mark.slow)]
"""The optimizer's own tensors go into a graph of ``eager``, copies in one of ``aot_eager``; ``inductor`` may do both."""


@pytest.fixture(autouse=True)
def compiled_once() -> Iterator[None]:
    """No compiled code of other tests, counts from zero, and an error where something is compiled a second time."""
    torch._dynamo.reset()
    counters.clear()
    with torch._dynamo.config.patch(error_on_recompile=True), warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*record_function.*")
        yield
    torch._dynamo.reset()


def graphs() -> int:
    return int(counters["stats"]["unique_graphs"])


def breaks() -> list[str]:
    return [reason for reason, count in counters["graph_break"].items() for _ in range(count)]


def of_all_dtypes() -> AdamW8bit:
    """Groups of every dtype and kind of update, of several layouts, one parameter of each frozen."""
    kinds: list[tuple[torch.dtype, dict[str, Any]]] = [
        (torch.float32, {"lr": 0.01}),
        (torch.bfloat16, {"weight_decay": 0.1}),
        (torch.bfloat16, {"low_precision_update": "split", "moments": "32bit"}),
        (torch.float16, {"low_precision_update": "fp32", "betas": (0.8, 0.9)}),
    ]
    groups = []
    for seed, (dtype, settings) in enumerate(kinds):
        frozen = nn.Parameter(torch.ones(3, dtype=dtype), requires_grad=False)
        groups.append({"params": [*make_params(FEW, dtype, seed=seed), frozen], **settings})
    return AdamW8bit(groups, lr=1e-3)


def trainable(opt: torch.optim.Optimizer) -> list[Tensor]:
    return [param for group in opt.param_groups for param in group["params"] if param.requires_grad]


class Twins:
    """Two equal models with their optimizers, one to be compiled."""

    def __init__(self, **settings: Any) -> None:
        torch.manual_seed(0)
        self.nets = [nn.Sequential(nn.Linear(70, 80), nn.Tanh(), nn.Linear(80, 5))]
        self.nets.append(copy.deepcopy(self.nets[0]))
        self.opts = [AdamW8bit(net.parameters(), lr=0.01, **settings) for net in self.nets]

    def run(self, make: Callable[[nn.Module, AdamW8bit], Callable[[Tensor], Any]], steps: int, **how: Any) -> None:
        """Call what ``make`` makes as it is and compiled, with the same inputs; compare results and everything held."""
        plain, traced = (make(net, opt) for net, opt in zip(self.nets, self.opts, strict=True))
        traced = torch.compile(traced, **how)
        for _ in range(steps):
            batch = torch.randn(4, 70)
            assert_same_bits(plain(batch), traced(batch))
        assert_same_bits(everything(self.opts[0]), everything(self.opts[1]))
        assert any(step["step"] for step in self.opts[0].state.values())


def loss_of(net: nn.Module, batch: Tensor) -> Tensor:
    loss: Tensor = net(batch).square().mean()
    return loss


# ---------------------------------------------------------------- one graph


@pytest.mark.parametrize("backend", BACKENDS)
def test_ten_steps_are_one_graph_compiled_once(backend: str) -> None:
    """While a scheduler changes learning rates, step numbers rise and gradients are other tensors."""
    opts = [of_all_dtypes() for _ in range(2)]
    schedulers = [torch.optim.lr_scheduler.ExponentialLR(opt, 0.9) for opt in opts]

    @torch.compile(backend=backend, fullgraph=True)
    def step() -> None:
        opts[1].step()
        opts[1].zero_grad()

    kept = []  # so that no gradient lies where one lay before
    for number in range(10):
        for opt in opts:
            set_gradients(trainable(opt), number)
            kept += [param.grad for param in trainable(opt)]
        opts[0].step()
        opts[0].zero_grad()
        step()
        for scheduler in schedulers:
            scheduler.step()
        assert graphs() == 1
    assert not breaks()
    assert all(param.grad is None for param in trainable(opts[1]))
    assert_same_bits(everything(opts[0]), everything(opts[1]))


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_step_method_that_is_compiled(backend: str) -> None:
    opts = [of_all_dtypes() for _ in range(2)]
    steps = [opts[0].step, torch.compile(opts[1].step, backend=backend, fullgraph=True)]
    for number in range(4):
        for opt, step in zip(opts, steps, strict=True):
            set_gradients(trainable(opt), number)
            assert step() is None
    assert graphs() == 1
    assert_same_bits(everything(opts[0]), everything(opts[1]))


@pytest.mark.parametrize("backend", BACKENDS)
def test_what_comes_before_between_and_after_steps(backend: str) -> None:
    """Parameters read before and after, and changed in between; gradients that are made and changed there."""

    def make(net: nn.Module, opt: AdamW8bit) -> Callable[[Tensor], Any]:
        params = list(net.parameters())

        def function(batch: Tensor) -> Any:
            with torch.no_grad():
                before = params[0] * 2.0
                for param in params:
                    param.grad = param.sign() * batch[0, 0]  # exact, whatever compiles it
                    param.mul_(0.5)
                opt.step()
                between = params[0] * 2.0
                for param in params:
                    assert param.grad is not None
                    param.grad.mul_(2.0)
                    param.add_(1.0)
                opt.step()
                after = params[0] * 2.0
                params[1].neg_()
            opt.zero_grad()
            return before, between, after

        return function

    Twins().run(make, 4, backend=backend, fullgraph=True)
    assert (graphs(), breaks()) == (1, [])


def training(net: nn.Module, opt: AdamW8bit) -> Callable[[Tensor], Any]:
    def function(batch: Tensor) -> Tensor:
        opt.zero_grad()
        loss = loss_of(net, batch)
        loss.backward()
        opt.step()
        return loss.detach()

    return function


@pytest.mark.parametrize("backend", ["eager", "aot_eager"])
def test_a_training_step_breaks_only_where_torch_does(backend: str) -> None:
    Twins().run(training, 5, backend=backend)
    assert graphs() == 2  # up to the backward pass, and from there on
    (reason,) = breaks()
    assert "backward" in reason


def train_in_one_graph() -> None:
    """Training steps with their backward pass; called in a process of its own."""
    with torch._dynamo.config.patch(trace_autograd_ops=True, error_on_recompile=True):
        for backend in ("eager", "aot_eager"):
            torch._dynamo.reset()
            counters.clear()
            Twins().run(training, 5, backend=backend, fullgraph=True)
            assert (graphs(), breaks()) == (1, [])


@pytest.mark.skipif(not hasattr(torch._dynamo.config, "trace_autograd_ops"), reason="this torch breaks at backward()")
def test_a_training_step_with_its_backward_pass_is_one_graph() -> None:
    # In a process that compiles nothing afterwards: torch 2.13, having traced a backward pass, gives another function
    # that returns None a tensor to return.
    program = "from tests.test_compile import train_in_one_graph; train_in_one_graph()"
    subprocess.run([sys.executable, "-c", program], check=True, cwd=Path(__file__).parents[1])


def test_a_compiled_model_with_a_step_outside() -> None:
    def make(net: nn.Module, opt: AdamW8bit) -> Callable[[Tensor], Any]:
        return lambda batch: loss_of(net, batch)

    twins = Twins()
    plain, traced = (make(net, opt) for net, opt in zip(twins.nets, twins.opts, strict=True))
    traced = torch.compile(traced, backend="aot_eager", fullgraph=True)
    for _ in range(3):
        batch = torch.randn(4, 70)
        for forward, opt in zip((plain, traced), twins.opts, strict=True):
            forward(batch).backward()
            opt.step()
            opt.zero_grad()
    assert_same_bits(everything(twins.opts[0]), everything(twins.opts[1]))
    assert graphs() == 1


# ---------------------------------------------------------------- clipping and scaling


@pytest.mark.parametrize("backend", ["eager", "aot_eager"])
@pytest.mark.parametrize("within", [True, False])
def test_clipping(backend: str, within: bool) -> None:
    """In the function, for which its graph breaks once, and outside before a function that steps."""

    def make(net: nn.Module, opt: AdamW8bit) -> Callable[[Tensor], Any]:
        def function(batch: Tensor) -> Any:
            norm = opt.clip_grad_norm_(0.01) if within else None
            opt.step()
            return norm

        return function

    twins = Twins()
    functions = [make(net, opt) for net, opt in zip(twins.nets, twins.opts, strict=True)]
    functions[1] = torch.compile(functions[1], backend=backend, fullgraph=not within)
    for _ in range(4):
        batch = torch.randn(4, 70)
        found = []
        for net, opt, function in zip(twins.nets, twins.opts, functions, strict=True):
            opt.zero_grad()
            loss_of(net, batch).backward()
            norm = None if within else opt.clip_grad_norm_(0.01)
            found.append([norm, function(batch)])
        assert_same_bits(*found)
    assert_same_bits(everything(twins.opts[0]), everything(twins.opts[1]))
    assert len(breaks()) == within


def test_clipping_of_other_gradients_is_an_error() -> None:
    """Clipped outside, changed in the function: it cannot be told whether the clipping is of what is stepped."""
    opt = Twins().opts[0]
    params = trainable(opt)

    @torch.compile(backend="aot_eager", fullgraph=True)
    def step() -> None:
        for param in params:
            assert param.grad is not None
            param.grad.mul_(2.0)
        opt.step()

    set_gradients(params, 0)
    opt.clip_grad_norm_(1e-3)
    before = everything(opt)
    with pytest.raises(RuntimeError, match="clip_grad_norm_ was called before a compiled function"):
        step()
    assert_same_bits(before, everything(opt))


@pytest.mark.parametrize("backend", ["eager", "aot_eager"])
def test_a_gradient_scaler_steps_by_a_compiled_function(backend: str) -> None:
    twins = Twins()
    twins.opts[1].step = torch.compile(twins.opts[1].step, backend=backend, fullgraph=True)  # type: ignore[method-assign]
    scalers = [torch.amp.GradScaler("cpu", init_scale=1024.0) for _ in range(2)]
    for step in range(4):
        batch = torch.randn(4, 70) * (math.inf if step == 1 else 1.0)
        for net, opt, scaler in zip(twins.nets, twins.opts, scalers, strict=True):
            opt.zero_grad()
            scaler.scale(loss_of(net, batch)).backward()
            scaler.step(opt)
            scaler.update()
    assert_same_bits(everything(twins.opts[0]), everything(twins.opts[1]))
    assert (graphs(), breaks()) == (1, [])
    assert not {"grad_scale", "found_inf"} & set(twins.opts[1].__dict__)


@pytest.mark.parametrize("backend", ["eager", "aot_eager"])
def test_attributes_of_a_scaler(backend: str) -> None:
    """Set in the function itself, before its graph has run, and outside."""
    for within in (True, False):
        torch._dynamo.reset()

        def make(net: nn.Module, opt: AdamW8bit, within: bool = within) -> Callable[[Tensor], Any]:
            params = list(net.parameters())

            def function(batch: Tensor) -> None:
                for param in params:
                    param.grad = param.detach() * 8.0
                if within:
                    opt.grad_scale, opt.found_inf = batch.new_tensor(4.0), (batch[0, 0] > 0.0).float()
                opt.step()

            return function

        twins = Twins()
        for opt in twins.opts if not within else []:
            opt.grad_scale, opt.found_inf = torch.tensor(4.0), torch.tensor(0.0)
        twins.run(make, 5, backend=backend, fullgraph=True)


# ---------------------------------------------------------------- errors


@pytest.mark.parametrize("backend", BACKENDS)
def test_an_error_is_that_of_a_step_outside_and_changes_nothing(backend: str) -> None:
    twins = Twins(nonfinite="error")
    plain, opt = twins.opts
    step = torch.compile(opt.step, backend=backend, fullgraph=True)

    def take(number: int, factor: float) -> list[str]:
        said = []
        for stepped, call in ((plain, plain.step), (opt, step)):
            set_gradients(trainable(stepped), number)
            last = trainable(stepped)[-1].grad
            assert last is not None
            last.mul_(factor)
            before = everything(stepped)
            try:
                with torch.enable_grad():  # as torch's backend "eager" leaves it off after an error under no_grad
                    call()
            except ValueError as error:
                said.append(str(error))
                assert_same_bits(before, everything(stepped))
        return said

    assert not take(0, 1.0)
    plain_says, opt_says = take(1, math.nan)
    assert plain_says == opt_says
    assert "5 of 5 gradient elements are not finite" in opt_says
    assert not take(2, 1.0)
    assert_same_bits(everything(plain), everything(opt))
    assert graphs() == 1


def test_a_sparse_gradient() -> None:
    param = nn.Parameter(torch.ones(8, 8))
    opt = AdamW8bit([param])
    param.grad = torch.eye(8).to_sparse()
    with pytest.raises(ValueError, match="its gradient has layout torch.sparse_coo"):
        torch.compile(opt.step, backend="eager")()
    assert not opt.state


def test_calls_of_the_operator_that_are_refused() -> None:
    opt = AdamW8bit(make_params(FEW))
    params = trainable(opt)
    none: list[Tensor | None] = [None] * len(params)
    number = opt._number
    with pytest.raises(RuntimeError, match=f"{len(params) - 1} parameters were given, and the optimizer has"):
        torch.ops.lowmem_adam.step(number, params[1:], none[1:], None, None)
    del opt
    gc.collect()
    with pytest.raises(RuntimeError, match=f"there is no optimizer {number} any more"):
        torch.ops.lowmem_adam.step(number, params, none, None, None)


# ---------------------------------------------------------------- what the operator is given


def test_the_operator_steps_what_it_is_given() -> None:
    """Copies of parameters and gradients: the optimizer's own stay, and it keeps nothing of the copies."""
    opt, twin = of_all_dtypes(), of_all_dtypes()
    own = [param for group in opt.param_groups for param in group["params"]]
    for number in range(2):
        copies = [param.detach().clone() for param in own]
        grads = [gradient(param, 0, index, number) for index, param in enumerate(own)]
        for param, grad in zip((p for group in twin.param_groups for p in group["params"]), grads, strict=True):
            param.grad = grad
        before = [param.detach().clone() for param in own]
        torch.ops.lowmem_adam.step(opt._number, copies, grads, None, None)
        twin.step()
        assert_same_bits(before, [param.detach() for param in own])
        assert all(param.grad is None for param in own)
        assert_same_bits(copies, everything(twin)["params"])
        with torch.no_grad():
            for param, given in zip(own, copies, strict=True):
                param.copy_(given)
        places = {given.data_ptr() for given in copies if given.numel()}
        del copies, given
        gc.collect()
        left = [held for held in gc.get_objects() if type(held) is Tensor and held.data_ptr() in places]
        assert not left
    assert_same_bits(everything(opt), everything(twin))


def test_the_operator_is_what_its_schema_says() -> None:
    opt = AdamW8bit(make_params(FEW))
    params = trainable(opt)
    grads: list[Tensor | None] = [gradient(param, 0, index, 0) for index, param in enumerate(params)]
    grads[1] = None
    args = (opt._number, [param.detach() for param in params], grads, None, torch.tensor(0.0))
    torch.library.opcheck(torch.ops.lowmem_adam.step.default, args, test_utils=("test_schema", "test_faketensor"))


@pytest.mark.parametrize("backend", ["eager", "aot_eager"])
def test_parameters_without_gradients(backend: str) -> None:
    """Which have gradients is compiled in; another set of them is compiled once more, and no more than that."""
    opts = [of_all_dtypes() for _ in range(2)]
    steps = [opts[0].step, torch.compile(opts[1].step, backend=backend, fullgraph=True)]
    with torch._dynamo.config.patch(error_on_recompile=False):
        for number in range(6):
            for opt, step in zip(opts, steps, strict=True):
                set_gradients(trainable(opt), number)
                for param in trainable(opt)[:: 2 + number % 2]:
                    param.grad = None
                step()
    assert graphs() == 2
    assert not breaks()
    assert_same_bits(everything(opts[0]), everything(opts[1]))
    stepped = [param in opts[1].state for param in trainable(opts[1])]
    assert stepped == [index % 6 > 0 for index in range(len(stepped))]


# ---------------------------------------------------------------- what is left to Python


def closing(net: nn.Module, opt: AdamW8bit) -> Callable[[Tensor], Any]:
    def function(batch: Tensor) -> Any:
        def closure() -> Tensor:
            opt.zero_grad()
            loss = loss_of(net, batch)
            loss.backward()
            return loss.detach()

        return opt.step(closure)  # type: ignore[arg-type]

    return function


def zeroing(net: nn.Module, opt: AdamW8bit) -> Callable[[Tensor], Any]:
    def function(batch: Tensor) -> None:
        loss_of(net, batch).backward()
        opt.step()
        opt.zero_grad(set_to_none=False)

    return function


@pytest.mark.parametrize("make", [closing, zeroing])
@pytest.mark.parametrize("settings", [{}, {"offload": "cpu", "offload_gradients": True}])
def test_what_breaks_the_graph_is_stepped_outside(
    make: Callable[[nn.Module, AdamW8bit], Callable[[Tensor], Any]], settings: dict[str, Any]
) -> None:
    found = []
    for steps in (3, 6):
        torch._dynamo.reset()
        counters.clear()
        with torch._dynamo.config.patch(error_on_recompile=False):
            Twins(**settings).run(make, steps, backend="aot_eager")
        assert breaks()
        found.append(graphs())
    assert found[0] == found[1]


def steps_of_dtensors(rank: int, folder: Path) -> dict[str, Any]:
    """On each rank: eager and compiled steps of DTensors, and of plain parameters whose moments ranks share."""
    found: dict[str, Any] = {}
    mesh = init_device_mesh("cpu", (torch.distributed.get_world_size(),))
    for kind in ("eager", "compiled"):
        values = [gradient(torch.empty(64, 130), 0, 0, 0), gradient(torch.empty(12), 0, 1, 0)]
        params: Sequence[nn.Parameter] = [nn.Parameter(distribute_tensor(value, mesh, [Shard(0)])) for value in values]
        sharded = small("world")
        for name, opt in (("dtensors", AdamW8bit(params)), ("sharded", sharded)):
            step = opt.step if kind == "eager" else torch.compile(opt.step, backend="aot_eager")
            torch._dynamo.reset()
            for number in range(4):
                torch._dynamo.config.error_on_recompile = number > 1
                for index, param in enumerate(trainable(opt)):
                    grad = gradient(torch.empty(param.shape), 0, index, number)
                    param.grad = distribute_tensor(grad, mesh, [Shard(0)]) if isinstance(param, DTensor) else grad
                step()
            local = [p.to_local() if isinstance(p, DTensor) else p for p in trainable(opt)]
            found[f"{name}, {kind}"] = [param.detach().clone() for param in local]
    return found


@NEEDS_GLOO
def test_ranks(tmp_path: Path) -> None:
    for found in on_ranks(2, steps_of_dtensors, tmp_path):
        for name in ("dtensors", "sharded"):
            assert_same_bits(found[f"{name}, eager"], found[f"{name}, compiled"])


# ---------------------------------------------------------------- lives of optimizers


def test_nothing_keeps_an_optimizer_alive() -> None:
    opt = AdamW8bit(make_params(FEW))
    set_gradients(trainable(opt), 0)
    step = torch.compile(opt.step, backend="aot_eager", fullgraph=True)
    step()
    alive = weakref.ref(opt)
    del opt, step
    gc.collect()
    assert alive() is None


@pytest.mark.parametrize("copier", [copy.deepcopy, lambda opt: pickle.loads(pickle.dumps(opt))])
def test_copies_step_their_own_parameters(copier: Callable[[AdamW8bit], AdamW8bit]) -> None:
    opt = AdamW8bit(make_params(FEW))
    set_gradients(trainable(opt), 0)
    torch.compile(opt.step, backend="aot_eager", fullgraph=True)()
    twin, before = copier(opt), everything(opt)
    assert twin._number != opt._number
    set_gradients(trainable(twin), 1)
    torch._dynamo.reset()
    torch.compile(twin.step, backend="aot_eager", fullgraph=True)()
    assert_same_bits(before, everything(opt))
    set_gradients(trainable(opt), 1)
    opt.step()
    assert_same_bits(everything(twin), everything(opt))


def test_a_scheduler_warns_as_of_other_optimizers() -> None:
    """It is told of steps without the wrapper that it puts around those of others."""
    for early in (True, False):
        opt = AdamW8bit(make_params(FEW))
        scheduler = torch.optim.lr_scheduler.ExponentialLR(opt, 0.9)
        assert "step" not in opt.__dict__
        with warnings.catch_warnings(record=True) as said:
            warnings.simplefilter("always")
            if not early:
                opt.step()
            scheduler.step()
        assert ["before `optimizer.step()`" in str(warning.message) for warning in said] == [True] * early


def test_the_compiler_is_not_imported_with_the_package() -> None:
    program = (
        "import sys, lowmem_adam; "
        "print([name for name in sys.modules if name in ('torch._dynamo', 'torch._inductor', 'sympy')])"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_a_step_that_is_not_taken_shows() -> None:
    """The comparisons above can fail."""
    opts = [of_all_dtypes() for _ in range(2)]
    set_gradients(trainable(opts[0]), 0)
    torch.compile(opts[0].step, backend="aot_eager", fullgraph=True)()
    assert differ(everything(opts[0]), everything(opts[1]))
