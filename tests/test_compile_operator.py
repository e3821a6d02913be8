"""The operator that a compiled step is: its errors, what it is given, what is left to Python, lives of optimizers."""

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
from tests.compile_cases import BACKENDS, Twins, breaks, compiled_once, graphs, loss_of, of_all_dtypes, trainable
from tests.ranks import NEEDS_GLOO, on_ranks
from tests.shard_jobs import small


@pytest.fixture(autouse=True)
def fresh() -> Iterator[None]:
    with compiled_once():
        yield


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
    with pytest.raises(ValueError, match=r"its gradient has layout torch\.sparse_coo"):
        torch.compile(opt.step, backend="eager")()
    assert not opt.state


def test_calls_of_the_operator_that_are_refused() -> None:
    opt = AdamW8bit(make_params(FEW))
    params = trainable(opt)
    none: list[Tensor | None] = [None] * len(params)
    number = opt._traced.number
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
        torch.ops.lowmem_adam.step(opt._traced.number, copies, grads, None, None)
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
    args = (opt._traced.number, [param.detach() for param in params], grads, None, torch.tensor(0.0))
    torch.library.opcheck(torch.ops.lowmem_adam.step.default, args, test_utils=("test_schema", "test_faketensor"))


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
    assert twin._traced.number != opt._traced.number
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
