"""check_config: what in a DeepSpeed config keeps our optimizer from stepping, and what DeepSpeed itself says to it."""

from __future__ import annotations

import copy
import json
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch

from lowmem_adam import AdamW8bit
from lowmem_adam.integrations.deepspeed import OPTIMIZERS, check_config, register
from tests.deepspeed_jobs import BASE, BF16, BY_NAME, begin, engine_of, train, without_the_import, zero
from tests.launching import NEEDS_DEEPSPEED
from tests.ranks import NEEDS_GLOO, on_ranks

OFFLOAD = {"offload_optimizer": {"device": "cpu"}}
GOOD = {**BASE, **BY_NAME, **BF16, **zero(2)}
CLIENT = {**BASE, **BF16, **zero(2)}


def changed(config: dict[str, Any], path: str, value: Any) -> dict[str, Any]:
    """With another value at a place; None takes it out."""
    made = copy.deepcopy(config)
    block, *names = made, *path.split(".")
    for name in names[:-1]:
        block = block.setdefault(name, {})
    block.pop(names[-1], None)
    if value is not None:
        block[names[-1]] = value
    return made


@pytest.mark.parametrize(
    ("config", "client"),
    [
        (GOOD, False),
        (CLIENT, True),
        ({**CLIENT, **zero(2, **OFFLOAD), "zero_force_ds_cpu_optimizer": False}, True),
        ({**GOOD, **zero(2, **OFFLOAD)}, False),
        ({**BY_NAME, **zero(0)}, False),
        (BY_NAME, False),
        ({}, True),
        ({**GOOD, **zero(3, **OFFLOAD)}, False),
        ({**GOOD, "optimizer": {"type": "Adam8bit", "params": {"lr": "auto", "weight_decay": "auto"}}}, False),
        (changed(GOOD, "optimizer.params.backend", "triton"), False),
        (changed(GOOD, "optimizer.params.capturable", True), False),
        ({**CLIENT, "optimizer": None}, True),
        (changed(GOOD, "bf16", {"bf16_master_weights_and_grads": True, "bf16_optimizer_states": True}), False),
        (changed(GOOD, "zero_optimization.offload_optimizer", {"device": "none", "ratio": 0.5}), False),
    ],
)
def test_nothing_is_found(config: dict[str, Any], client: bool) -> None:
    assert check_config(config, client_optimizer=client) == []


@pytest.mark.parametrize(
    ("config", "client", "setting", "words"),
    [
        (CLIENT, False, "optimizer.type", "nothing steps"),
        (changed(GOOD, "optimizer.type", "AdamW"), False, "optimizer.type", "its own optimizer"),
        (changed(GOOD, "optimizer.type", "adamw8bit"), False, "optimizer.type", '"AdamW8bit"'),
        (GOOD, True, "optimizer", "DummyOptim"),
        (changed(GOOD, "optimizer.type", ["AdamW8bit"]), False, "optimizer.type", "its own optimizer"),
        (changed(GOOD, "optimizer.params.backend", "gpu"), False, "optimizer.params", "'gpu'"),
        (changed(GOOD, "zero_optimization.stage", "2"), False, "zero_optimization.stage", "0, 1, 2 or 3"),
        (changed(GOOD, "optimizer.params.beta", 0.9), False, "optimizer.params", "beta"),
        (changed(GOOD, "optimizer.params.moments", "4bit"), False, "optimizer.params", "'8bit'"),
        (changed(GOOD, "optimizer.params.torch_adam", True), False, "optimizer.params", "torch_adam"),
        (changed(GOOD, "optimizer.params.max_grad_norm", 1.0), False, "optimizer.params", "max_grad_norm"),
        (changed(GOOD, "optimizer.params.shard_group", "world"), False, "optimizer.params.shard_group", "of its own"),
        (changed(GOOD, "zero_allow_untested_optimizer", None), False, "zero_allow_untested_optimizer", "true"),
        (changed(GOOD, "zero_allow_untested_optimizer", False), False, "zero_allow_untested_optimizer", "true"),
        ({**CLIENT, **zero(2, **OFFLOAD)}, True, "zero_force_ds_cpu_optimizer", "DeepSpeedCPUAdam"),
        (
            {**CLIENT, **zero(1, **OFFLOAD), "zero_force_ds_cpu_optimizer": True},
            True,
            "zero_force_ds_cpu_optimizer",
            '"zero_force_ds_cpu_optimizer": false',
        ),
        (
            {**GOOD, **zero(3, offload_optimizer={"device": "cpu", "super_offload": True})},
            False,
            "zero_optimization.offload_optimizer.super_offload",
            "DeepSpeedCPUAdam steps",
        ),
        (
            {**GOOD, **zero(3, offload_optimizer={"device": "cpu", "ratio": 0.5})},
            False,
            "zero_optimization.offload_optimizer.ratio",
            "torch.optim.AdamW",
        ),
        (
            {**GOOD, **zero(3, offload_optimizer={"device": "nvme"})},
            False,
            "zero_optimization.offload_optimizer.device",
            '"device": "cpu"',
        ),
        ({**GOOD, **zero(2, zenflow={"topk_ratio": 0.1})}, False, "zero_optimization.zenflow", "ZenFlowCPUAdam"),
        (
            changed(GOOD, "bf16.bf16_master_weights_and_grads", True),
            False,
            "bf16.bf16_master_weights_and_grads",
            "DeepSpeedCPUAdam alone",
        ),
        (
            changed(GOOD, "fp16.fp16_master_weights_and_grads", True),
            False,
            "fp16.fp16_master_weights_and_grads",
            "DeepSpeedCPUAdam alone",
        ),
        (
            {**GOOD, **zero(1, elastic_checkpoint=True)},
            False,
            "zero_optimization.elastic_checkpoint",
            "universal checkpoints",
        ),
    ],
)
def test_what_is_found(config: dict[str, Any], client: bool, setting: str, words: str) -> None:
    (finding,) = check_config(config, client_optimizer=client)
    assert finding.setting == setting
    assert words in str(finding)
    assert str(finding).startswith(f"{setting} is ")
    assert "\n" not in finding.mend


def test_all_that_is_found() -> None:
    config = {**zero(2, **OFFLOAD), "optimizer": {"type": "AdamW"}}
    settings = ["optimizer", "zero_allow_untested_optimizer", "zero_force_ds_cpu_optimizer"]
    assert [finding.setting for finding in check_config(config, client_optimizer=True)] == settings


def test_the_config_is_left_as_it_is() -> None:
    config = copy.deepcopy(GOOD)
    check_config(config)
    assert config == GOOD


def test_a_file(tmp_path: Path) -> None:
    file = tmp_path / "ds.json"
    file.write_text(json.dumps(GOOD), encoding="utf-8")
    assert check_config(file) == check_config(str(file)) == []
    file.write_text("{", encoding="utf-8")
    with pytest.raises(ValueError, match=r"ds\.json is no JSON"):
        check_config(file)
    with pytest.raises(ValueError, match="ds_config is a list; accepted: a dictionary"):
        check_config([GOOD])  # type: ignore[arg-type]
    with pytest.raises(FileNotFoundError):
        check_config(tmp_path / "none.json")


def test_names(monkeypatch: pytest.MonkeyPatch) -> None:
    assert {name: getattr(torch.optim, name) for name in OPTIMIZERS} == OPTIMIZERS
    register()
    monkeypatch.setattr(torch.optim, "AdamW8bit", torch.optim.AdamW)
    with pytest.raises(RuntimeError, match=r"torch\.optim\.AdamW8bit is .*accepted: none of that name"):
        register()


# ---------------------------------------------------------------- what DeepSpeed itself does with such a config

REFUSED = {
    "zero_allow_untested_optimizer": (changed(GOOD, "zero_allow_untested_optimizer", None), False),
    "zero_force_ds_cpu_optimizer": ({**CLIENT, **zero(2, **OFFLOAD)}, True),
    "Master weights feature": (changed(GOOD, "bf16.bf16_master_weights_and_grads", True), False),
    "Hybrid Optimizer": ({**GOOD, **zero(3, offload_optimizer={"device": "cpu", "ratio": 0.5})}, False),
    "shard_group is 'world' under DeepSpeed's ZeRO": (changed(GOOD, "optimizer.params.shard_group", "world"), False),
    "is not a supported DeepSpeed Optimizer": (changed(GOOD, "optimizer.type", "adamw8bit"), False),
}
"""The words of the error, and the config that is refused."""


def refusals(rank: int, folder: Path) -> dict[str, Any]:
    begin(rank)
    import accelerate
    from accelerate.utils import DeepSpeedPlugin

    found: dict[str, Any] = {}
    for words, (config, client) in REFUSED.items():
        try:
            train(engine_of(config, {} if client else None), range(1))
        except Exception as error:  # noqa: BLE001 (DeepSpeed has no common class of errors)
            found[words] = str(error)
    ignored = engine_of(changed(GOOD, "optimizer.type", "AdamW"), {})
    found["a block beside a client optimizer"] = type(ignored.basic_optimizer).__name__

    plugin = DeepSpeedPlugin(hf_ds_config={**CLIENT, **zero(2, **OFFLOAD), "gradient_accumulation_steps": 1})
    accelerator = accelerate.Accelerator(
        deepspeed_plugin=plugin, kwargs_handlers=[accelerate.InitProcessGroupKwargs(backend="gloo")]
    )
    module = torch.nn.Linear(8, 8)
    try:
        accelerator.prepare(module, AdamW8bit(module.parameters()))
    except ValueError as error:
        found["replaced by accelerate"] = str(error)
    return found


@NEEDS_GLOO
@NEEDS_DEEPSPEED
def test_deepspeed_refuses_what_is_found_and_nothing_is_replaced_in_silence(tmp_path: Path) -> None:
    pytest.importorskip("accelerate")
    (found,) = on_ranks(1, refusals, tmp_path)
    for words, (config, client) in REFUSED.items():
        assert words in found[words]
        assert check_config(config, client_optimizer=client) != []
    # DeepSpeed steps with ours and ignores the block; accelerate would step with its own and says nothing of it.
    assert found["a block beside a client optimizer"] == "AdamW8bit"
    assert "accelerate would step with DeepSpeedCPUAdam in the place of AdamW8bit" in found["replaced by accelerate"]


@NEEDS_GLOO
@NEEDS_DEEPSPEED
def test_a_name_that_is_not_registered(tmp_path: Path) -> None:
    (found,) = on_ranks(1, partial(without_the_import, config=GOOD), tmp_path)
    assert found == "AdamW8bit is not a supported DeepSpeed Optimizer"
