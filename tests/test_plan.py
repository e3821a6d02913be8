"""``lowmem_adam.plan`` and ``lowmem-adam plan``: where models come from, other optimizers' bytes, what fits, errors."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import Parameter
from torch.utils._pytree import tree_leaves

from benchmarks.peer_formats import FlashOptim, bytes_held
from lowmem_adam.plan import (
    KINDS,
    Model,
    Row,
    Settings,
    Weight,
    _by_cost,
    cheapest,
    of_count,
    of_shapes,
    plan,
)
from tests.launching import ROOT
from tests.test_memory import gpt2_small

GIB = 2**30
GPT2 = Model("GPT-2 small", [Weight(str(index), shape) for index, shape in enumerate(gpt2_small())])
LLAMA = {
    "model_type": "llama",
    "architectures": ["LlamaForCausalLM"],
    "hidden_size": 8192,
    "intermediate_size": 28672,
    "num_hidden_layers": 80,
    "num_attention_heads": 64,
    "num_key_value_heads": 8,
    "vocab_size": 128256,
    "torch_dtype": "bfloat16",
    "tie_word_embeddings": False,
}
"""Llama 3 70B."""
LLAMA_PARAMETERS = 70_553_706_496


def row_of(model: Model, settings: Settings, name: str) -> Row:
    (row,) = [row for row in plan(model, settings).rows if row.name.startswith(name)]
    return row


# ---------------------------------------------------------------- our own


def test_gpt2_small_takes_what_the_readme_says() -> None:
    own = plan(GPT2, Settings(dtype=torch.bfloat16)).own
    assert own.device.parameters == own.device.gradients == 2 * 124_439_808
    assert round((own.device.moments + own.host.moments) / 124_439_808, 4) == 2.0215
    assert own.host.moments == 8 * 148
    assert (own.device.master, own.device.transient) == (0, 0)


def test_a_rank_takes_its_part() -> None:
    alone = plan(GPT2, Settings()).own
    parts = [plan(GPT2, Settings(world_size=4), rank).own for rank in range(4)]
    # Each rank counts the steps of all parameters.
    assert sum(part.device.moments for part in parts) == alone.device.moments
    assert [part.host.moments for part in parts] == [alone.host.moments] * 4
    held = plan(GPT2, Settings(world_size=4)).own
    assert held.device.moments == max(part.device.moments for part in parts)
    assert held.device.transient > 0
    kept = plan(GPT2, Settings(world_size=4, shard=False)).own
    assert kept.described() == alone.described()


def test_buckets_bound_copies_and_pinned_buffers() -> None:
    for mib in (1.0, 16.0):
        own = plan(GPT2, Settings(world_size=4, bucket_cap_mb=mib)).own
        assert 0 < own.device.transient <= mib * 2**20
        # Of what goes down, a third is nowhere else and does not fill the buffers evenly.
        host = plan(GPT2, Settings(offload="cpu", bucket_cap_mb=mib)).own.host.transient
        assert 0.9 * 2 * mib * 2**20 < host <= 2 * mib * 2**20


@pytest.mark.parametrize("moments", ["8bit", "bnb8bit", "32bit"])
def test_a_flat_partition_under_zero(moments: str) -> None:
    numel = 124_439_808
    own = plan(GPT2, Settings(world_size=8, zero_stage=2, moments=moments)).own
    part = numel // 8
    blocks = {"8bit": 2 * -(-part // 128), "bnb8bit": 8 * -(-part // 256), "32bit": 6 * part}[moments]
    assert own.device.moments == 2 * part + blocks
    assert own.device.master == 4 * part
    theirs = row_of(GPT2, Settings(world_size=8), "DeepSpeed stage 2")
    assert theirs.device.moments == 8 * part
    assert replace_moments(own) == replace_moments(theirs)


def replace_moments(row: Row) -> dict[str, int]:
    return {kind: getattr(row.device, kind) for kind in KINDS if kind != "moments"}


# ---------------------------------------------------------------- others, held against their packages


def held_by(tensors: Iterable[Any]) -> int:
    """Bytes of all storages, each once."""
    plain = [tensor for tensor in tree_leaves(list(tensors)) if isinstance(tensor, Tensor)]
    storages = {tensor.untyped_storage().data_ptr(): tensor.untyped_storage().nbytes() for tensor in plain}
    return sum(storages.values())


SHAPES = ((5000, 64), (300,), (64, 64), (63, 65), (8192,), (7,))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_torch_holds_what_is_planned(dtype: torch.dtype) -> None:
    params = [Parameter(torch.zeros(shape, dtype=dtype)) for shape in SHAPES]
    opt = torch.optim.AdamW(params, fused=True)
    for param in params:
        param.grad = torch.zeros_like(param)
    opt.step()
    row = row_of(Model("shapes", [Weight("", shape) for shape in SHAPES]), Settings(dtype=dtype), "torch AdamW")
    assert held_by(opt.state.values()) == row.device.moments
    assert sum(param.nbytes for param in params) == row.device.parameters == row.device.gradients


def test_bitsandbytes_holds_what_is_planned() -> None:
    optim = pytest.importorskip("bitsandbytes.optim")
    params = [Parameter(torch.zeros(shape)) for shape in SHAPES]
    opt = optim.AdamW8bit(params)
    for param in params:
        param.grad = torch.zeros_like(param)
    opt.step()
    tensors = [tensor for state in opt.state.values() for tensor in state.values()]
    row = row_of(Model("shapes", [Weight("", shape) for shape in SHAPES]), Settings(), "bitsandbytes")
    assert held_by(tensors) == row.device.moments


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_torchao_holds_what_is_planned(dtype: torch.dtype) -> None:
    optim = pytest.importorskip("torchao.optim")
    params = [Parameter(torch.zeros(shape, dtype=dtype)) for shape in SHAPES]
    opt = optim.AdamW8bit(params)
    # What its step makes before the first update, which it would compile for tens of seconds.
    buffers = [opt._new_buffer(param, signed) for param in params for signed in (True, False)]
    held = 0
    for buffer in buffers:
        parts = [getattr(buffer, name) for name in getattr(buffer, "tensor_attrs", ())] or [buffer]
        held += sum(part.nbytes for part in parts)
    row = row_of(Model("shapes", [Weight("", shape) for shape in SHAPES]), Settings(dtype=dtype), "torchao")
    assert held == row.device.moments
    assert row.host.moments == 4 * len(params)


def test_flashoptim_takes_what_its_format_takes() -> None:
    """Written out in benchmarks/peer_formats.py; its package needs a GPU."""
    model = Model("shapes", [Weight("", shape) for shape in SHAPES])
    zeros = [torch.zeros(torch.Size(shape).numel()) for shape in SHAPES]
    coded = sum(bytes_held(FlashOptim().encode(flat, flat, 1)) for flat in zeros)
    numel = sum(flat.numel() for flat in zeros)
    for update, kept in (("nearest", 0), ("stochastic", 1), ("split", 2), ("fp32", 2)):
        row = row_of(model, Settings(low_precision_update=update), "FlashOptim")
        assert (row.device.moments, row.device.master) == (coded, kept * numel)
    assert row_of(model, Settings(dtype=torch.float32, low_precision_update="fp32"), "FlashOptim").device.master == 0


def test_float32_weights_are_given_to_others_too() -> None:
    numel = GPT2.numel
    for name, moments in (("torch AdamW", 8 * numel + 4 * 148), ("bitsandbytes", None)):
        bare = row_of(GPT2, Settings(), name)
        row = row_of(GPT2, Settings(low_precision_update="split"), name)
        assert (row.device.master, row.device.transient) == (4 * numel, 4 * numel)
        assert (bare.device.master, bare.device.transient) == (0, 0)
        assert row.device.moments == (bare.device.moments if moments is None else moments)


# ---------------------------------------------------------------- what fits


WANTED = (
    Settings(),
    Settings(moments="32bit", low_precision_update="fp32"),
    Settings(world_size=4, shard=False, moments="32bit", low_precision_update="fp32"),
    Settings(world_size=8, zero_stage=1),
    Settings(world_size=2, low_precision_update="split", master_bits=24),
)


@pytest.mark.parametrize("wanted", WANTED, ids=str)
@pytest.mark.parametrize("gib", [0.01, 0.3, 0.5, 0.7, 0.9, 1.2, 4.0])
def test_the_cheapest_fits_and_nothing_cheaper_does(wanted: Settings, gib: float) -> None:
    wanted = replace(wanted, zero_bucket=10_000_000)
    limit = int(gib * GIB)
    choice = cheapest(GPT2, wanted, limit)
    candidates = list(_by_cost(GPT2.with_dtypes(None).weights, wanted))
    assert candidates[0] == wanted
    assert len(set(candidates)) == len(candidates)
    totals = [plan(GPT2, candidate).own.device.total for candidate in candidates]
    if choice is None:
        assert min(totals) > limit
        return
    index = candidates.index(choice.settings)
    assert totals[index] == choice.row.device.total <= limit
    assert all(total > limit for total in totals[:index])


def test_what_is_cheap_comes_first() -> None:
    wanted = Settings(world_size=4, shard=False, moments="32bit", low_precision_update="fp32")
    candidates = list(_by_cost(GPT2.with_dtypes(None).weights, wanted))
    assert candidates[1] == replace(wanted, moments="8bit")
    assert candidates[2] == replace(wanted, shard=True)
    first = {
        name: next(index for index, each in enumerate(candidates) if getattr(each, name) == value)
        for name, value in (("zero_stage", 2), ("offload", "cpu"), ("low_precision_update", "stochastic"))
    }
    first["stage 3"] = next(index for index, each in enumerate(candidates) if each.zero_stage == 3)
    assert list(first.values()) == sorted(first.values())
    assert len(set(first.values())) == len(first)
    # One process has no use for ranks, float32 parameters none for another update.
    alone = list(_by_cost(GPT2.with_dtypes(torch.float32).weights, Settings(moments="32bit")))
    assert all((each.zero_stage, each.low_precision_update) == (0, "stochastic") for each in alone)
    assert len(alone) == 6  # moments, by no offload, offload, and offloaded gradients


def test_the_host_counts_where_it_is_limited() -> None:
    limit = plan(GPT2, Settings(offload="cpu")).own.device.total
    choice = cheapest(GPT2, Settings(), limit)
    assert choice is not None
    assert choice.settings == Settings(offload="cpu")
    assert cheapest(GPT2, Settings(), limit, choice.row.host.total) == choice
    assert cheapest(GPT2, Settings(), limit, choice.row.host.total - 1) is None


# ---------------------------------------------------------------- a large model


def test_a_70b_model_is_planned_in_less_than_a_gib() -> None:
    """In a process of its own, whose largest resident size the system tells, with all that it imports.

    Not by getrusage: there a process begins with the largest size of the one that has started it.
    """
    pytest.importorskip("transformers")
    if not Path("/proc/self/status").is_file():
        pytest.skip("the largest resident size of a process's own memory is read from Linux's /proc")
    program = (
        "import json, re, sys\n"
        "from lowmem_adam.plan import Settings, cheapest, of_config, plan\n"
        "model = of_config(json.loads(sys.argv[1]))\n"
        "made = plan(model, Settings(world_size=64, offload='cpu', low_precision_update='split'))\n"
        "choice = cheapest(model, Settings(world_size=64), 80 * 2**30)\n"
        "peak = 1024 * int(re.search(r'VmHWM:\\s+(\\d+) kB', open('/proc/self/status').read())[1])\n"
        "print(json.dumps([model.numel, made.own.device.described(), choice is not None, peak]))\n"
    )
    path = os.pathsep.join(filter(None, (str(ROOT), os.environ.get("PYTHONPATH"))))
    finished = subprocess.run(
        [sys.executable, "-c", program, json.dumps(LLAMA)],
        env={**os.environ, "PYTHONPATH": path},
        capture_output=True,
        text=True,
        timeout=240,
    )
    assert finished.returncode == 0, finished.stderr
    numel, device, fits, peak = json.loads(finished.stdout.splitlines()[-1])
    assert (numel, fits) == (LLAMA_PARAMETERS, True)
    assert device["parameters"] == device["gradients"] == 2 * LLAMA_PARAMETERS
    assert device["moments"] == device["master"] == 0
    assert peak < GIB, peak


# ---------------------------------------------------------------- what is refused


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"moments": "4bit"}, "moments is '4bit'; accepted: '8bit', '32bit', 'bnb8bit'"),
        ({"low_precision_update": "float"}, "low_precision_update is 'float'; accepted: 'nearest'"),
        ({"master_bits": 24}, "master_bits is 24"),
        ({"world_size": 0}, "world_size is 0; accepted: integers from 1"),
        ({"world_size": True}, "world_size is True"),
        ({"offload": "disk"}, "offload is 'disk'; accepted: None, 'cpu'"),
        ({"offload_gradients": True}, "offload_gradients is True, and offload is None"),
        ({"offload": "cpu", "offload_gradients": True, "world_size": 2}, "world_size 2 and zero_stage 0; accepted"),
        ({"zero_stage": 4}, "zero_stage is 4; accepted: 0, 1, 2, 3"),
        ({"bucket_cap_mb": 0}, "bucket_cap_mb is 0; accepted"),
        ({"zero_bucket": -1}, "zero_bucket is -1; accepted"),
        ({"dtype": torch.float64}, "dtype is torch.float64; accepted: float32, bfloat16"),
    ],
)
def test_settings_that_are_refused(settings: dict[str, Any], words: str) -> None:
    for call in (lambda: plan(GPT2, Settings(**settings)), lambda: cheapest(GPT2, Settings(**settings), GIB)):
        with pytest.raises(ValueError, match="accepted") as raised:
            call()
        assert words in str(raised.value)


def test_a_rank_that_there_is_not() -> None:
    with pytest.raises(ValueError, match=r"rank is 2; accepted: 0 to 1"):
        plan(GPT2, Settings(world_size=2), 2)


# ---------------------------------------------------------------- the command


def run(*arguments: str) -> subprocess.CompletedProcess[str]:
    """The program as a user starts it, in a process of its own."""
    program = "import sys; from lowmem_adam.cli import app; sys.argv[0] = 'lowmem-adam'; app()"
    command = [sys.executable, "-c", program, "plan", *arguments]
    return subprocess.run(command, env={**os.environ, "COLUMNS": "200"}, capture_output=True, text=True, timeout=240)


def test_the_table_has_every_optimizer() -> None:
    pytest.importorskip("typer")
    pytest.importorskip("rich")
    finished = run("--parameters", "8B", "--world-size", "4", "--fits", "40", "--offload", "cpu")
    assert (finished.returncode, finished.stderr) == (0, "")
    made = plan(of_count(8 * 10**9), Settings(world_size=4, offload="cpu"))
    lines = finished.stdout.splitlines()
    for row in made.rows:
        on_device, on_host = [line.split() for line in lines if line.startswith(f"{row.name}  ")]
        cells = [f"{nbytes / GIB:.2f}" for nbytes in row.device.described().values()]
        assert on_device[-7:] == [*cells, "yes" if row.device.total <= 40 * GIB else "no"]
        assert on_host[-6:] == [f"{nbytes / GIB:.2f}" for nbytes in row.host.described().values()]
    assert "This setting fits into 40 GiB without activations." in finished.stdout
    assert 'The cheapest that does: moments="8bit"' in finished.stdout


def test_json_says_the_same_and_what_fits() -> None:
    pytest.importorskip("typer")
    pytest.importorskip("rich")
    arguments = ("--shape", "12*4096x4096", "--shape", "4096", "--moments", "32bit", "--dtype", "fp32", "--json")
    finished = run(*arguments, "--fits", "2.5", "--host-fits", "64")
    assert finished.returncode == 1  # it does not fit as it is
    told = json.loads(finished.stdout)
    settings = Settings(dtype=torch.float32, moments="32bit")
    model = of_shapes(["12*4096x4096", "4096"])
    made = plan(model, settings)
    fits = told.pop("fits")
    assert [row.pop("fits") for row in told["rows"]] == [row.device.total <= 2.5 * GIB for row in made.rows]
    assert told == made.described()
    choice = cheapest(model, settings, int(2.5 * GIB), 64 * GIB)
    assert choice is not None
    assert fits == {
        "device_bytes": int(2.5 * GIB),
        "host_bytes": 64 * GIB,
        "fits": False,
        "cheapest": choice.described(),
    }


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ((), "the model is given by nothing; accepted: one of MODEL, --parameters, --shape"),
        (("--parameters", "8B", "--shape", "4x4"), "accepted: one of MODEL, --parameters, --shape"),
        (("/nowhere/config.json",), "No such file"),
        (("--parameters", "8B", "--moments", "4bit"), "moments is '4bit'; accepted: '8bit'"),
        (("--parameters", "8B", "--fits", "-1"), "fits is -1.0; accepted: finite numbers above 0"),
        (("--parameters", "8B", "--host-fits", "4"), "host_fits is 4 and fits None"),
    ],
)
def test_errors_end_with_2(arguments: tuple[str, ...], words: str, capfd: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("typer")
    pytest.importorskip("rich")
    from lowmem_adam.cli import app

    with pytest.raises(SystemExit) as ended:
        app(["plan", *arguments])
    assert ended.value.code == 2
    out, err = capfd.readouterr()
    assert out == ""
    assert words in err
    assert "Traceback" not in err
