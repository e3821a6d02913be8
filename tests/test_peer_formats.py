"""The emulated peer formats against the packages they stand for, and the oracle against torch's own Adam."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from benchmarks.peer_formats import (
    DynamicMap,
    FlashOptim,
    Float8,
    Float32,
    FormatAdamW,
    FourBits,
    Linear,
    bitsandbytes_format,
    bytes_held,
    dynamic_map,
    torchao_format,
)
from tests.oracle import TextbookAdam
from tests.peer_cases import Exact, allowed_bnb8bit, mixed_gradients

KEYS = {"exp_avg": True, "exp_avg_sq": False}


def moments(numel: int = 4096 + 100, decades: float = 3.0) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(3)
    scale = 10 ** ((torch.rand(numel, generator=generator) - 0.5) * decades)
    m = scale * torch.randn(numel, generator=generator)
    v = (scale * torch.randn(numel, generator=generator)).square()
    m[256:512], v[256:512] = 0.0, 0.0
    return {"exp_avg": m, "exp_avg_sq": v}


def assert_same_rounding(ours: torch.Tensor, theirs: torch.Tensor, want: torch.Tensor, share: float) -> None:
    """Same decoded values, but for the share that lies on the middle of two, where either is as near."""
    differ = ours != theirs
    assert differ.float().mean() < share
    torch.testing.assert_close((ours - want)[differ].abs(), (theirs - want)[differ].abs(), rtol=2e-2, atol=1e-9)


@pytest.mark.parametrize("key", KEYS)
def test_bitsandbytes_table_and_round_trip(key: str) -> None:
    """Held against the installed CPU kernel above a tenth of the maximum.

    That kernel searches in bins 3e-5 wide, too coarse for the nearest of the small values (a zero becomes 2e-5 of
    the maximum). bitsandbytes' default kernel takes the nearest, and torchao's test covers the whole range.
    """
    functional = pytest.importorskip("bitsandbytes.functional")
    table = functional.create_dynamic_map(signed=KEYS[key])
    torch.testing.assert_close(dynamic_map(KEYS[key]), table, rtol=1e-6, atol=0)
    data = moments()
    codes, state = functional.quantize_blockwise(data[key], code=table, blocksize=256)
    theirs = functional.dequantize_blockwise(codes, state)
    emulated = DynamicMap()
    emulated.tables[key] = table
    coded = emulated.encode(**data, step=1)
    ours = emulated.decode(coded)[list(KEYS).index(key)]
    assert torch.equal(coded[f"{key}.absmax"], state.absmax)
    large = data[key].abs() > 0.1 * state.absmax.repeat_interleave(256)[: len(data[key])]
    assert large.sum() > 200
    assert_same_rounding(ours[large], theirs[large], data[key][large], share=0.02)


@pytest.mark.parametrize("key", KEYS)
def test_torchao_table_and_round_trip(key: str) -> None:
    quant = pytest.importorskip("torchao.optim.quant_utils")
    table = torch.tensor(quant.create_dynamic_map(signed=KEYS[key]))
    torch.testing.assert_close(dynamic_map(KEYS[key]), table, rtol=1e-6, atol=0)
    data = {name: flat[:4096] for name, flat in moments().items()}
    scaled, scale = quant.scale_tensor(data[key], 256)
    theirs = quant.dequant_with_qmap(quant.quantize_8bit_with_qmap(scaled, table), table, scale)
    emulated = torchao_format()
    emulated.tables[key] = table
    coded = emulated.encode(**data, step=1)
    ours = emulated.decode(coded)[list(KEYS).index(key)]
    assert torch.equal(coded[f"{key}.absmax"], scale)
    assert_same_rounding(ours, theirs, data[key], share=1e-3)


@pytest.mark.parametrize("key", KEYS)
@pytest.mark.parametrize("make", [FourBits, Float8])
def test_torchaos_coarse_formats(make: type, key: str) -> None:
    """Table, codes, scales and decoded values are those of the installed package's state tensors."""
    optim = pytest.importorskip("torchao.optim")
    data = {name: flat[:4096] for name, flat in moments().items()}
    kind, settings = (optim.subclass_4bit.OptimState4bit, (KEYS[key],)) if make is FourBits else (
        optim.subclass_fp8.OptimStateFp8, ()
    )  # fmt: skip
    theirs = kind.zeros((4096,), *settings)
    theirs.copy_(data[key])
    emulated = make()
    coded = emulated.encode(**data, step=1)
    scale = coded.get(f"{key}.absmax", coded.get(f"{key}.scale"))
    assert scale is not None
    assert torch.equal(scale, theirs.scale)
    if make is FourBits:
        torch.testing.assert_close(emulated.tables[key], theirs.qmap, rtol=1e-6, atol=0)
        emulated.tables[key] = theirs.qmap
        assert coded[f"{key}.codes"].shape == theirs.codes.shape == (2048,)
    ours = emulated.decode(coded)[list(KEYS).index(key)]
    assert_same_rounding(ours, theirs.dequantize(), data[key], share=1e-3)


@pytest.mark.parametrize(
    ("make", "bytes_wanted", "error_of_m", "error_of_root"),
    [
        (bitsandbytes_format, 2 + 8 / 256, 0.03, 0.02),
        (torchao_format, 2 + 8 / 256, 0.03, 0.02),
        (FlashOptim, 2 + 4 / 32, 0.02, 0.02),
        (Float8, 2 + 8 / 256, 0.04, 0.03),
        (Linear, 2 + 8 / 256, 0.03, 0.1),
    ],
)
def test_round_trip_keeps_most_and_takes_the_bytes_it_says(
    make: type, bytes_wanted: float, error_of_m: float, error_of_root: float
) -> None:
    data = {name: flat[:4096] for name, flat in moments().items()}
    coder = make()
    coded = coder.encode(**data, step=1)
    assert bytes_held(coded) == bytes_wanted * 4096
    m, v = coder.decode(coded)
    assert (m - data["exp_avg"]).norm() < error_of_m * data["exp_avg"].norm()
    assert (v.sqrt() - data["exp_avg_sq"].sqrt()).norm() < error_of_root * data["exp_avg_sq"].sqrt().norm()
    assert not m[256:512].any()
    assert not v[256:512].any()


@pytest.mark.parametrize("make", [Float32, DynamicMap, FlashOptim, Linear])
def test_the_shared_step_follows_the_oracle_over_one_step(make: type) -> None:
    """The first step uses no coded value, so every format must take the textbook step."""
    generator = torch.Generator().manual_seed(0)
    param = torch.nn.Parameter(torch.randn(64, 64, generator=generator))
    oracle = TextbookAdam(param, lr=1e-2, weight_decay=0.1)
    param.grad = torch.randn(64, 64, generator=generator)
    FormatAdamW([param], make, lr=1e-2, weight_decay=0.1).step()
    torch.testing.assert_close(param.detach().double(), oracle.step(param.grad), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("maximize", [False, True])
@pytest.mark.parametrize(
    ("torch_class", "decoupled"), [(torch.optim.Adam, False), (torch.optim.AdamW, True)], ids=["adam", "adamw"]
)
def test_oracle_agrees_with_torch_in_float64(torch_class: type, decoupled: bool, maximize: bool) -> None:
    generator = torch.Generator().manual_seed(1)
    param = torch.nn.Parameter(torch.randn(33, dtype=torch.float64, generator=generator))
    settings: dict[str, Any] = {
        "lr": 3e-3,
        "betas": (0.8, 0.99),
        "eps": 1e-6,
        "weight_decay": 0.05,
        "maximize": maximize,
    }
    optimizer = torch_class([param], **settings)
    oracle = TextbookAdam(param, decoupled=decoupled, **settings)
    for _ in range(20):
        param.grad = torch.randn(33, dtype=torch.float64, generator=generator)
        optimizer.step()
        oracle.step(param.grad)
    torch.testing.assert_close(param.detach(), oracle.param, rtol=1e-12, atol=1e-14)
    torch.testing.assert_close(optimizer.state[param]["exp_avg_sq"], oracle.exp_avg_sq, rtol=1e-12, atol=0)


@pytest.mark.parametrize(("make", "holds"), [(bitsandbytes_format, True), (torchao_format, True), (Linear, False)])
def test_the_bounds_on_a_step_of_bitsandbytes_format_hold_for_it_and_not_for_another(make: type, holds: bool) -> None:
    """Those of tests/peer_cases.py, as the scenarios ask them of ours: all elements, at each step, all gradients."""
    param = torch.nn.Parameter(torch.randn(42, 300, generator=torch.Generator().manual_seed(2)))
    settings: dict[str, Any] = {"lr": 1e-3, "weight_decay": 0.01}
    optimizer = FormatAdamW([param], make, **settings)
    grad_at = mixed_gradients(42, 300, 30, torch.float32, "cpu")

    def held() -> tuple[torch.Tensor, ...]:
        coded = optimizer.coder.decode(optimizer.state[param]["coded"])
        return tuple(values.double().view_as(param) for values in coded)

    outside = 0
    for t in range(1, 31):
        oracle = TextbookAdam(param, **settings)
        oracle.t = t - 1
        if t > 1:
            oracle.exp_avg, oracle.exp_avg_sq = held()
        param.grad = grad_at(t - 1)
        exact = Exact.step(oracle, param.grad)
        optimizer.step()
        exp_avg, exp_avg_sq = held()
        first, root = allowed_bnb8bit(exact)
        outside += int((~first.holds(exp_avg) | ~root.holds(exp_avg_sq.sqrt())).sum())
    assert (outside == 0) == holds
