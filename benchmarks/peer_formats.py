"""The moment formats that are in use, written out in plain torch so that one simulation can run them all.

Each format turns flat float32 `exp_avg` and `exp_avg_sq` into the tensors an optimizer would keep, and back.
The emulations follow the published code: bitsandbytes 0.50 (`create_dynamic_map`, blocks of 256), torchao 0.18
(`subclass_8bit.py`: the same map and blocks, the scale kept above 1e-12; `subclass_4bit.py` and `subclass_fp8.py`, see
below), FlashOptim (arXiv 2602.23349, `flashoptim/optimizers.py`: groups of 32, fp16 scales). tests/test_peer_formats.py
holds the first two against the installed packages.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any, Protocol

import torch
from torch import Tensor

from lowmem_adam.layout import is_coded

Coded = dict[str, Tensor]


class MomentFormat(Protocol):
    name: str

    def encode(self, exp_avg: Tensor, exp_avg_sq: Tensor, step: int) -> Coded: ...

    def decode(self, coded: Coded) -> tuple[Tensor, Tensor]: ...


def bytes_held(coded: Coded) -> int:
    return sum(t.numel() * t.element_size() for t in coded.values())


def as_blocks(flat: Tensor, size: int) -> Tensor:
    """Rows of `size`, the last one filled up with zeros."""
    missing = -flat.numel() % size
    return torch.nn.functional.pad(flat, (0, missing)).view(-1, size)


class Float32:
    """No coding at all: the yardstick."""

    name = "float32"

    def encode(self, exp_avg: Tensor, exp_avg_sq: Tensor, step: int) -> Coded:
        return {"exp_avg": exp_avg.clone(), "exp_avg_sq": exp_avg_sq.clone()}

    def decode(self, coded: Coded) -> tuple[Tensor, Tensor]:
        return coded["exp_avg"].clone(), coded["exp_avg_sq"].clone()


def dynamic_map(signed: bool, decades: int = 7) -> Tensor:
    """The values of the dynamic tree type (Dettmers et al., arXiv 2110.02861): 256, or signed 16 in three decades.

    Seven decades below 1, or fewer; decade i (from the smallest) is cut into 2^i equal parts for each sign, or 2^(i+1)
    without one, whose middles are the values; 0 and 1 complete the table.
    """
    values = [torch.tensor([0.0, 1.0])]
    for i in range(decades):
        edges = torch.linspace(0.1, 1, 2 ** (i if signed else i + 1) + 1)
        middles = 10.0 ** (i - decades + 1) * (edges[:-1] + edges[1:]) / 2
        values += [middles, -middles] if signed else [middles]
    return torch.cat(values).sort().values


class DynamicMap:
    """bitsandbytes' and torchao's format: nearest value of a dynamic map, scaled by the block's absolute maximum."""

    def __init__(self, name: str = "bitsandbytes", block: int = 256, least_scale: float = 0.0) -> None:
        self.name, self.block, self.least_scale = name, block, least_scale
        self.tables = {"exp_avg": dynamic_map(signed=True), "exp_avg_sq": dynamic_map(signed=False)}

    def _encode_one(self, flat: Tensor, key: str) -> Coded:
        rows = as_blocks(flat, self.block)
        absmax = rows.abs().amax(1).clamp_min(self.least_scale)
        scaled = rows / torch.where(absmax > 0, absmax, 1.0)[:, None]
        table = self.tables[key].to(flat.device)
        codes = torch.bucketize(scaled, (table[1:] + table[:-1]) / 2)
        return {f"{key}.codes": codes.to(torch.uint8).flatten()[: flat.numel()], f"{key}.absmax": absmax}

    def _decode_one(self, coded: Coded, key: str) -> Tensor:
        codes, absmax = coded[f"{key}.codes"], coded[f"{key}.absmax"]
        values = self.tables[key].to(codes.device)[codes.int()]
        return (as_blocks(values, self.block) * absmax[:, None]).flatten()[: codes.numel()]

    def encode(self, exp_avg: Tensor, exp_avg_sq: Tensor, step: int) -> Coded:
        return self._encode_one(exp_avg, "exp_avg") | self._encode_one(exp_avg_sq, "exp_avg_sq")

    def decode(self, coded: Coded) -> tuple[Tensor, Tensor]:
        return self._decode_one(coded, "exp_avg"), self._decode_one(coded, "exp_avg_sq")


def bitsandbytes_format() -> DynamicMap:
    return DynamicMap("bitsandbytes")


def torchao_format() -> DynamicMap:
    return DynamicMap("torchao", least_scale=1e-12)


class FourBits(DynamicMap):
    """torchao's 4 bits (Li et al., arXiv 2309.01507): m by a map of three decades, v linear in sixteenths, never zero.

    Two codes lie in a byte, the first one above; blocks of 128.
    """

    def __init__(self) -> None:
        super().__init__("torchao 4bit", block=128, least_scale=1e-12)
        self.tables = {"exp_avg": dynamic_map(signed=True, decades=3), "exp_avg_sq": torch.arange(1, 17) / 16}

    def _encode_one(self, flat: Tensor, key: str) -> Coded:
        coded = super()._encode_one(flat, key)
        first, second = coded[f"{key}.codes"].view(-1, 2).unbind(1)
        return coded | {f"{key}.codes": (first << 4) | second}

    def _decode_one(self, coded: Coded, key: str) -> Tensor:
        packed = coded[f"{key}.codes"]
        codes = torch.stack([packed >> 4, packed & 15], dim=1).flatten()
        return super()._decode_one(coded | {f"{key}.codes": codes}, key)


class Float8:
    """torchao's fp8: m and v each as float8 e4m3 over 1/448 of the block's absolute maximum; blocks of 256."""

    name = "torchao fp8"
    block = 256
    dtype = torch.float8_e4m3fn

    def encode(self, exp_avg: Tensor, exp_avg_sq: Tensor, step: int) -> Coded:
        coded: Coded = {}
        for key, flat in (("exp_avg", exp_avg), ("exp_avg_sq", exp_avg_sq)):
            rows = as_blocks(flat, self.block)
            scale = rows.abs().amax(1).clamp_min(1e-12) / torch.finfo(self.dtype).max
            coded[f"{key}.codes"] = (rows / scale[:, None]).to(self.dtype).flatten()[: flat.numel()]
            coded[f"{key}.scale"] = scale
        return coded

    def decode(self, coded: Coded) -> tuple[Tensor, Tensor]:
        out = []
        for key in ("exp_avg", "exp_avg_sq"):
            codes = coded[f"{key}.codes"]
            rows = as_blocks(codes.float(), self.block) * coded[f"{key}.scale"][:, None]
            out.append(rows.flatten()[: codes.numel()])
        return out[0], out[1]


class FlashOptim:
    """FlashOptim's: m companded by 2x / (1 + |x|) to int8, sqrt(v) linear in uint8, one fp16 scale per 32 each."""

    name = "flashoptim"
    group = 32

    def encode(self, exp_avg: Tensor, exp_avg_sq: Tensor, step: int) -> Coded:
        numel = exp_avg.numel()
        m, root = as_blocks(exp_avg, self.group), as_blocks(exp_avg_sq.sqrt(), self.group)
        m_scale, root_scale = (rows.abs().amax(1).clamp_min(1e-12) for rows in (m, root))
        x = m / m_scale[:, None]
        companded = 2 * x / (1 + x.abs())
        return {
            "exp_avg.codes": (companded * 127 + 0.5).floor().to(torch.int8).flatten()[:numel],
            "exp_avg.scale": m_scale.half(),
            "root.codes": (root / root_scale[:, None] * 255 + 0.5).floor().to(torch.uint8).flatten()[:numel],
            "root.scale": root_scale.half(),
        }

    def decode(self, coded: Coded) -> tuple[Tensor, Tensor]:
        numel = coded["exp_avg.codes"].numel()
        y = as_blocks(coded["exp_avg.codes"].float() / 127, self.group)
        m = y / (2 - y.abs()) * coded["exp_avg.scale"].float()[:, None]
        root = as_blocks(coded["root.codes"].float() / 255, self.group) * coded["root.scale"].float()[:, None]
        return m.flatten()[:numel], root.square().flatten()[:numel]


class Linear:
    """The negative control: m and v each linear between 0 and the block's maximum, 256 elements a block."""

    name = "linear"
    block = 256

    def encode(self, exp_avg: Tensor, exp_avg_sq: Tensor, step: int) -> Coded:
        coded: Coded = {}
        for key, flat, top, dtype in (
            ("exp_avg", exp_avg, 127, torch.int8),
            ("exp_avg_sq", exp_avg_sq, 255, torch.uint8),
        ):
            rows = as_blocks(flat, self.block)
            absmax = rows.abs().amax(1)
            scaled = rows / torch.where(absmax > 0, absmax, 1.0)[:, None]
            coded[f"{key}.codes"] = (scaled * top).round().to(dtype).flatten()[: flat.numel()]
            coded[f"{key}.absmax"] = absmax
        return coded

    def decode(self, coded: Coded) -> tuple[Tensor, Tensor]:
        out = []
        for key, top in (("exp_avg", 127), ("exp_avg_sq", 255)):
            codes = coded[f"{key}.codes"]
            rows = as_blocks(codes.float() / top, self.block) * coded[f"{key}.absmax"][:, None]
            out.append(rows.flatten()[: codes.numel()])
        return out[0], out[1]


def adam_update_(
    param: Tensor,
    grad: Tensor,
    exp_avg: Tensor,
    exp_avg_sq: Tensor,
    step: int,
    lr: float,
    betas: tuple[float, float],
    eps: float,
    weight_decay: float = 0.0,
) -> None:
    """One AdamW step in float32 on plain tensors, in torch's order; all the formats share it."""
    beta1, beta2 = betas
    exp_avg.lerp_(grad, 1 - beta1)
    exp_avg_sq.mul_(beta2).addcmul_(grad, grad, value=1 - beta2)
    denominator = exp_avg_sq.sqrt().div_((1 - beta2**step) ** 0.5).add_(eps)
    param.mul_(1 - lr * weight_decay).addcdiv_(exp_avg, denominator, value=-lr / (1 - beta1**step))


class FormatAdamW(torch.optim.Optimizer):
    """float32 AdamW whose moments pass through a format after every step, in the tensors that 8-bit optimizers code."""

    def __init__(
        self,
        params: Iterable[Any],
        make_format: Callable[[], MomentFormat],
        lr: float = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 1e-2,
    ) -> None:
        super().__init__(params, {"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay})
        self.coder, self.exact = make_format(), Float32()

    @torch.no_grad()
    def step(self, closure: Any = None) -> Any:
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            settings = {key: group[key] for key in ("lr", "betas", "eps", "weight_decay")}
            for p in group["params"]:
                if p.grad is not None:
                    self._step_one(p, settings)
        return loss

    def _step_one(self, p: Tensor, settings: dict[str, Any]) -> None:
        state = self.state[p]
        coder: MomentFormat = self.coder if is_coded(p.shape) else self.exact
        state.setdefault("step", 0)
        state["step"] += 1
        if "coded" in state:
            exp_avg, exp_avg_sq = (t.view_as(p) for t in coder.decode(state["coded"]))
        else:
            exp_avg, exp_avg_sq = torch.zeros_like(p), torch.zeros_like(p)
        assert p.grad is not None
        adam_update_(p, p.grad, exp_avg, exp_avg_sq, state["step"], **settings)
        state["coded"] = coder.encode(exp_avg.flatten(), exp_avg_sq.flatten(), state["step"])
