"""State as DeepSpeed's ZeRO sees it, without DeepSpeed: codes read as fp32 moments, and moments written past us."""

from __future__ import annotations

import copy
import io
from typing import Any

import pytest
import torch

from lowmem_adam import Adam8bit, AdamW8bit, checkpoint
from lowmem_adam.decoded import DecodedMoment
from lowmem_adam.state import FULL_KEYS
from tests.cases import assert_same_bits

NUMEL = 65536 + 100
"""A partition that keeps codes, with a last block that is shorter."""

ASKED_BY_ZERO = "deepspeed.runtime.zero.stage_1_and_2"


def called_as(module: str, function: Any, *arguments: Any) -> Any:
    """What a function returns to code of another module."""
    names: dict[str, Any] = {"__name__": module, "function": function, "arguments": arguments}
    exec("result = function(*arguments)", names)
    return names["result"]


def partitions(**settings: Any) -> AdamW8bit:
    """Two flat parameters, one of which is too small for codes, after three steps."""
    generator = torch.Generator().manual_seed(0)
    params = [torch.nn.Parameter(torch.randn(size, generator=generator)) for size in (NUMEL, 100)]
    opt = AdamW8bit(params, lr=1e-2, **settings)
    for _ in range(3):
        step(opt, generator)
    return opt


def step(opt: torch.optim.Optimizer, generator: torch.Generator) -> None:
    for param in opt.param_groups[0]["params"]:
        param.grad = torch.randn(param.shape, generator=generator) * 10.0 ** torch.randint(
            -3, 3, (), generator=generator
        )
    opt.step()


def fresh(opt: torch.optim.Optimizer, kind: Any = AdamW8bit, **settings: Any) -> Any:
    """Another optimizer of copies of the parameters."""
    return kind([torch.nn.Parameter(p.detach().clone()) for p in opt.param_groups[0]["params"]], lr=1e-2, **settings)


def moments_of(opt: AdamW8bit) -> list[dict[str, torch.Tensor]]:
    """In fp32, by the way that checkpoint.export takes."""
    exported = checkpoint.export(opt)
    assert exported is not None
    return list(exported["state"].values())


def saved_and_read(state_dict: Any) -> Any:
    file = io.BytesIO()
    torch.save(state_dict, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


@pytest.mark.parametrize("moments", ["8bit", "bnb8bit", "32bit"])
class TestSavedState:
    def test_values_are_those_of_an_export(self, moments: str) -> None:
        opt = partitions(moments=moments)
        given = called_as(ASKED_BY_ZERO, opt.state_dict)
        for state, exported in zip(given["state"].values(), moments_of(opt), strict=True):
            assert set(state) == {"step", *FULL_KEYS}
            assert state["step"].dtype == torch.float32
            for key in FULL_KEYS:
                assert torch.is_tensor(state[key])
                assert torch.equal(state[key].clone(), exported[key])

    def test_any_slice(self, moments: str) -> None:
        opt = partitions(moments=moments)
        state = called_as(ASKED_BY_ZERO, opt.state_dict)["state"][0]
        for key in FULL_KEYS:
            whole = moments_of(opt)[0][key]
            for start, size in ((0, NUMEL), (0, 1), (127, 2), (128, 128), (300, 1000), (NUMEL - 1, 1), (NUMEL, 0)):
                assert torch.equal(state[key].narrow(0, start, size).clone(), whole[start : start + size])
            assert torch.equal(state[key][5:4000:7], whole[5:4000:7])

    def test_through_a_file_back_into_ours(self, moments: str) -> None:
        opt = partitions(moments=moments)
        given = saved_and_read(called_as(ASKED_BY_ZERO, opt.state_dict))
        other = fresh(opt, moments=moments)
        other.load_state_dict(given)
        assert_same_state(opt, other)

    def test_into_torch(self, moments: str) -> None:
        opt = partitions(moments=moments)
        given = saved_and_read(called_as(ASKED_BY_ZERO, opt.state_dict))
        other = fresh(opt, torch.optim.AdamW)
        exported = moments_of(opt)
        other.load_state_dict(given)
        for state, wanted in zip(other.state.values(), exported, strict=True):
            for key in FULL_KEYS:
                assert type(state[key]) is torch.Tensor
                assert torch.equal(state[key], wanted[key])
        step(other, torch.Generator().manual_seed(1))

    def test_others_get_codes(self, moments: str) -> None:
        opt = partitions(moments=moments)
        for module in ("deepspeed.runtime.engine", "deepspeed.runtime.zerofold", "somebody"):
            state = called_as(module, opt.state_dict)["state"][0]
            assert state["step"].dtype == torch.int64
            assert not any(isinstance(value, DecodedMoment) for value in state.values())


def assert_same_state(one: torch.optim.Optimizer, other: torch.optim.Optimizer) -> None:
    for state, held in zip(one.state.values(), other.state.values(), strict=True):
        assert set(state) == set(held)
        for key, value in state.items():
            assert_same_bits(held[key], value, key)


def test_a_file_holds_codes() -> None:
    file = io.BytesIO()
    opt = partitions()
    torch.save(called_as(ASKED_BY_ZERO, opt.state_dict), file)
    assert len(file.getvalue()) < 2.05 * NUMEL + 8 * 100 + 8000


def test_settings_that_are_not_the_checkpoints_to_change() -> None:
    """DeepSpeed writes all that it finds in the groups of a universal checkpoint over the optimizer's."""
    opt = partitions(backend="reference", seed=5)
    other = partitions(moments="32bit")
    (group,) = called_as(ASKED_BY_ZERO, opt.state_dict)["param_groups"]
    other.param_groups[0].update({name: value for name, value in group.items() if name != "params"})
    assert [other.param_groups[0][name] for name in ("moments", "backend", "seed")] == ["32bit", None, 5]
    with pytest.raises(ValueError, match="moments is '8bit'; accepted: '32bit'"):
        other.load_state_dict(called_as(ASKED_BY_ZERO, opt.state_dict))


def test_a_decoded_moment_is_read_only() -> None:
    moment = called_as(ASKED_BY_ZERO, partitions().state_dict)["state"][0]["exp_avg"]
    before = moment.clone()
    for write in (
        lambda: moment.zero_(),
        lambda: moment.copy_(before),
        lambda: torch.add(before, 1.0, out=moment),
        lambda: torch._foreach_mul_([moment], [2.0]),
    ):
        with pytest.raises(RuntimeError, match="would write to DecodedMoment"):
            write()
    assert torch.equal(moment.clone(), before)
    assert torch.equal(copy.deepcopy(moment).clone(), before)
    assert torch.equal(torch.cat([moment, moment]), torch.cat([before, before]))
    with pytest.raises(ValueError, match="key is 'momentum'; accepted: 'exp_avg', 'exp_avg_sq'"):
        DecodedMoment("momentum", moment.state, NUMEL, "8bit")


def test_many_steps_are_counted_exactly() -> None:
    opt = partitions()
    for state in opt.state.values():
        state["step"].fill_(2**24 + 1)
    given = called_as(ASKED_BY_ZERO, opt.state_dict)
    assert [int(state["step"]) for state in given["state"].values()] == [2**24 + 1] * 2
    other = fresh(opt)
    other.load_state_dict(given)
    assert_same_state(opt, other)


class TestMomentsThatWereWritten:
    """As DeepSpeed's loader of universal checkpoints writes them."""

    @staticmethod
    def written(opt: AdamW8bit, other: AdamW8bit, **settings: Any) -> AdamW8bit:
        for param, state in zip(other.param_groups[0]["params"], moments_of(opt), strict=True):
            other.state[param].update(state)
        other.param_groups[0].update(settings)
        return other

    @pytest.mark.parametrize("moments", ["8bit", "32bit"])
    @pytest.mark.parametrize("stepped", [False, True])
    def test_next_step_is_that_of_the_codes(self, moments: str, stepped: bool) -> None:
        opt = partitions(moments=moments)
        other = fresh(opt, moments=moments)
        if stepped:
            step(other, torch.Generator().manual_seed(9))
            for param, held in zip(opt.param_groups[0]["params"], other.param_groups[0]["params"], strict=True):
                held.data.copy_(param)
        self.written(opt, other)
        for each in (opt, other):
            step(each, torch.Generator().manual_seed(1))
        for param, held in zip(opt.param_groups[0]["params"], other.param_groups[0]["params"], strict=True):
            assert_same_bits(held, param, "param")
        assert_same_state(opt, other)
        assert other.memory_report()["bytes"] == opt.memory_report()["bytes"]

    def test_saved_before_the_next_step(self) -> None:
        opt = partitions()
        saved = self.written(opt, fresh(opt)).state_dict()
        for state, wanted in zip(saved["state"].values(), opt.state_dict()["state"].values(), strict=True):
            assert all(torch.equal(state[key], wanted[key]) for key in wanted)

    def test_step_as_a_number_or_in_the_group(self) -> None:
        opt = partitions()
        for where in ("state", "group"):
            other = self.written(opt, fresh(opt))
            for state in other.state.values():
                state["step"] = 3
                if where == "group":
                    del state["step"]
                    other.param_groups[0]["step"] = 3
            assert_same_state(opt, loaded(other))

    def test_host_keeps_them_under_offload(self) -> None:
        opt = partitions()
        other = self.written(opt, fresh(opt, offload="cpu"))
        assert_same_state(opt, loaded(other))

    @pytest.mark.parametrize("update", ["split", "fp32"])
    def test_what_was_kept_of_another_weight_goes(self, update: str) -> None:
        """bf16 partitions: the next step begins with the parameter, whatever lay beside the moments before."""
        found = []
        for stepped in (False, True):
            generator = torch.Generator().manual_seed(3)
            param = torch.nn.Parameter(torch.randn(NUMEL, generator=generator).bfloat16())
            opt = AdamW8bit([param], lr=1e-2, low_precision_update=update)
            if stepped:
                param.grad = torch.ones_like(param)
                opt.step()
                param.data.copy_(torch.randn(NUMEL, generator=torch.Generator().manual_seed(3)))
            moments = {key: torch.rand(NUMEL, generator=generator) for key in FULL_KEYS}
            opt.state[param].update(step=torch.tensor(7.0), **moments)
            param.grad = torch.randn(NUMEL, generator=generator).bfloat16()
            opt.step()
            found.append(opt.master_weight(param))
        assert_same_bits(found[0], found[1], "weights")

    @pytest.mark.parametrize(
        ("settings", "message"),
        [
            ({"amsgrad": True}, "comes with amsgrad=True; accepted: False"),
            ({"decoupled_weight_decay": False}, "comes with decoupled_weight_decay=False; accepted: True"),
            ({"bias_correction": False}, "comes with bias_correction=False; accepted: True"),
        ],
    )
    def test_settings_of_others(self, settings: dict[str, Any], message: str) -> None:
        opt = partitions()
        self.refused(self.written(opt, fresh(opt), **settings), message)

    @pytest.mark.parametrize(
        ("change", "message"),
        [
            (lambda state: state.update(exp_avg=torch.zeros(7)), r"exp_avg has shape \(7,\)"),
            (lambda state: state["exp_avg_sq"].fill_(-1.0), "exp_avg_sq"),
            (lambda state: state["exp_avg"].fill_(float("nan")), "exp_avg"),
            (lambda state: state.pop("exp_avg_sq"), "has state"),
            (lambda state: state.pop("step"), "step is None; accepted: integers from 0"),
            (lambda state: state.update(step=torch.tensor(1.5)), "step is tensor"),
        ],
    )
    def test_what_is_no_moments(self, change: Any, message: str) -> None:
        opt = partitions()
        other = self.written(opt, fresh(opt))
        change(other.state[other.param_groups[0]["params"][0]])
        self.refused(other, message)

    @staticmethod
    def refused(opt: AdamW8bit, message: str) -> None:
        params = [param.detach().clone() for param in opt.param_groups[0]["params"]]
        states = [dict(state) for state in opt.state.values()]
        with pytest.raises(ValueError, match=message):
            step(opt, torch.Generator().manual_seed(1))
        with pytest.raises(ValueError, match=message):
            opt.state_dict()
        for param, before in zip(opt.param_groups[0]["params"], params, strict=True):
            assert torch.equal(param, before)
        for state, held in zip(opt.state.values(), states, strict=True):
            assert all(state[key] is value for key, value in held.items())
            assert set(state) == set(held)

    def test_other_class_of_weight_decay(self) -> None:
        opt = partitions()
        self.refused(self.written(opt, fresh(opt, Adam8bit), decoupled_weight_decay=True), "accepted: False")


def loaded(opt: AdamW8bit) -> AdamW8bit:
    """After it was asked for its state, which takes over what was written."""
    opt.state_dict()
    return opt


class TestRefusals:
    def test_shards_under_zero(self) -> None:
        opt = AdamW8bit([torch.nn.Parameter(torch.randn(NUMEL))], shard_group="world")
        opt.param_groups[0]["params"][0].grad = torch.randn(NUMEL)
        before = opt.param_groups[0]["params"][0].detach().clone()
        with pytest.raises(ValueError, match="shard_group is 'world' under DeepSpeed's ZeRO"):
            called_as(ASKED_BY_ZERO, opt.step)
        assert torch.equal(opt.param_groups[0]["params"][0], before)
        called_as("deepspeed.runtime.engine", opt.step)

    @pytest.mark.parametrize("before", ["load_state_dict", "check_replicas", "consolidate_state_dict"])
    def test_shards_that_were_cut_before(self, before: str) -> None:
        param = torch.nn.Parameter(torch.randn(300, 300))
        opt = AdamW8bit([param], shard_group="world")
        if before == "load_state_dict":
            opt.load_state_dict(opt.state_dict())
        else:
            getattr(opt, before)()
        flat = param.detach().flatten().requires_grad_()
        opt.param_groups[0]["params"] = [flat]
        flat.grad = torch.randn_like(flat)
        with pytest.raises(ValueError, match="shard_group is 'world' under DeepSpeed's ZeRO"):
            called_as(ASKED_BY_ZERO, opt.step)

    def test_state_of_parameters_that_zero_has_replaced(self) -> None:
        param = torch.nn.Parameter(torch.randn(300, 300))
        opt = AdamW8bit([param])
        param.grad = torch.randn(300, 300)
        opt.step()
        flat = param.detach().flatten().requires_grad_()
        opt.param_groups[0]["params"] = [flat]
        flat.grad = torch.randn_like(flat)
        before = flat.detach().clone()
        with pytest.raises(ValueError, match="state is of 1 parameters in whose place DeepSpeed's ZeRO has put"):
            called_as(ASKED_BY_ZERO, opt.step)
        assert torch.equal(flat, before)
        opt.state.clear()
        called_as(ASKED_BY_ZERO, opt.step)
        assert not torch.equal(flat, before)

    def test_accelerate_about_to_replace_it(self) -> None:
        opt = partitions()
        with pytest.raises(ValueError, match='"zero_force_ds_cpu_optimizer": false'):
            called_as("accelerate.utils.deepspeed", getattr, opt, "defaults")
        assert opt.defaults["lr"] == 1e-2
        assert copy.deepcopy(opt).defaults == opt.defaults
