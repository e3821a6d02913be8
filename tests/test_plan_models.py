"""Where plans get their models from: transformers configs, safetensors files and indices, numbers and shapes."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from lowmem_adam.plan import (
    Settings,
    Weight,
    count_of,
    dtype_of,
    of_config,
    of_count,
    of_shapes,
    plan,
    read_model,
)
from tests.test_plan import GPT2, LLAMA

TINY = {**LLAMA, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "vocab_size": 500}
TINY |= {"num_attention_heads": 4, "num_key_value_heads": 2}


def test_a_config_is_built_without_memory(tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers")
    model = of_config(TINY)
    real = transformers.LlamaForCausalLM(transformers.LlamaConfig(**TINY))
    assert [weight.shape for weight in model.weights] == [tuple(param.shape) for param in real.parameters()]
    assert {weight.dtype for weight in model.weights} == {torch.bfloat16}
    tied = of_config({**TINY, "tie_word_embeddings": True})
    assert tied.numel == model.numel - 500 * 64
    (tmp_path / "config.json").write_text(json.dumps({**TINY, "architectures": None}), encoding="utf-8")
    for path in (tmp_path, tmp_path / "config.json"):
        read = read_model(path)
        assert [weight.shape for weight in read.weights] == [weight.shape for weight in model.weights]


def safetensors_file(path: Path, tensors: dict[str, tuple[str, list[int]]]) -> None:
    """A file of zeros, by the format's description."""
    sizes = {"F32": 4, "BF16": 2, "F16": 2, "I64": 8, "F8_E4M3": 1}
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    offset = 0
    for name, (dtype, shape) in tensors.items():
        end = offset + torch.Size(shape).numel() * sizes[dtype]
        header[name] = {"dtype": dtype, "shape": shape, "data_offsets": [offset, end]}
        offset = end
    raw = json.dumps(header).encode()
    path.write_bytes(len(raw).to_bytes(8, "little") + raw + bytes(offset))


def test_a_safetensors_file_tells_names_shapes_and_dtypes(tmp_path: Path) -> None:
    file = tmp_path / "model.safetensors"
    safetensors_file(file, {"a": ("BF16", [40, 300]), "norm": ("F32", [40]), "positions": ("I64", [10])})
    for path in (file, tmp_path):
        model = read_model(path)
        assert model.weights == [Weight("a", (40, 300), torch.bfloat16), Weight("norm", (40,), torch.float32)]
        assert "positions" in model.notes[0]
    assert plan(model).own.device.parameters == 2 * 12000 + 4 * 40
    assert plan(model, Settings(dtype=torch.float16)).own.device.parameters == 2 * 12040
    torch_file = pytest.importorskip("safetensors.torch")
    torch_file.save_file({"b": torch.zeros(3, 5)}, tmp_path / "b.safetensors")
    assert read_model(tmp_path / "b.safetensors").weights == [Weight("b", (3, 5), torch.float32)]


def test_an_index_reads_its_files_or_counts(tmp_path: Path) -> None:
    index = tmp_path / "model.safetensors.index.json"
    content = {"metadata": {"total_size": 2 * 12040}, "weight_map": {"a": "1.safetensors", "b": "2.safetensors"}}
    index.write_text(json.dumps(content), encoding="utf-8")
    counted = read_model(index)
    assert (counted.numel, len(counted.weights)) == (12040, 1)
    assert "1.safetensors is not there" in counted.notes[0]
    assert read_model(index, torch.float32).numel == 6020
    safetensors_file(tmp_path / "1.safetensors", {"a": ("BF16", [40, 300])})
    safetensors_file(tmp_path / "2.safetensors", {"b": ("BF16", [40])})
    assert [weight.name for weight in read_model(tmp_path).weights] == ["a", "b"]


def test_numbers_and_shapes() -> None:
    texts = ("8B", "8e9", "1.5M", "124439808", "124_439_808", "9007199254740993", "0.5k")
    assert [count_of(text) for text in texts] == [
        *(8 * 10**9, 8 * 10**9, 1_500_000, 124_439_808, 124_439_808, 9007199254740993, 500)
    ]
    assert of_count(8 * 10**9).numel == 8 * 10**9
    model = of_shapes(["50257x768", "3*768", "2*4x5x6"])
    assert [weight.shape for weight in model.weights] == [(50257, 768), *[(768,)] * 3, *[(4, 5, 6)] * 2]
    # Shapes decide on little: rows' shorter last blocks, and vectors in float32.
    whole, counted = plan(GPT2).own.device.total, plan(of_count(GPT2.numel)).own.device.total
    assert abs(counted - whole) < 0.002 * whole


# ---------------------------------------------------------------- what is refused


@pytest.mark.parametrize("text", ["", "0", "-5", "8X", "B", "1e99", "nan", "0.0001"])
def test_numbers_that_are_refused(text: str) -> None:
    with pytest.raises(ValueError, match="accepted: a number from 1"):
        count_of(text)


@pytest.mark.parametrize("text", ["", "0x5", "4x", "axb", "0*4", "4*", "4 x 5", "-4x5"])
def test_shapes_that_are_refused(text: str) -> None:
    with pytest.raises(ValueError, match="accepted: sizes from 1"):
        of_shapes([text])


def test_more_than_any_model_and_dtypes_that_are_refused() -> None:
    with pytest.raises(ValueError, match="parameters; accepted: 1 to"):
        of_shapes(["9999999999x9999999999"])
    with pytest.raises(ValueError, match="dtype is 'float64'; accepted: float32, bfloat16"):
        dtype_of("float64")


def test_files_that_are_refused(tmp_path: Path) -> None:
    def refused(name: str, content: bytes | None, words: str) -> None:
        if content is not None:
            (tmp_path / name).write_bytes(content)
        with pytest.raises((ValueError, OSError)) as raised:
            read_model(tmp_path / name)
        assert words in str(raised.value)

    refused("none.json", None, "No such file")
    refused("text.json", b"parameters: 5", "is no JSON file")
    refused("bytes.json", b"\xff\xfe\x00", "is no JSON file")
    refused("list.json", b"[1, 2]", "neither a weight_map nor a model_type")
    refused("empty.safetensors", b"", "damaged or no safetensors file")
    refused("short.safetensors", (1000).to_bytes(8, "little") + b"{}", "damaged or no safetensors file")
    refused("huge.safetensors", (2**62).to_bytes(8, "little") + b"{}", "damaged or no safetensors file")
    refused("list.safetensors", (2).to_bytes(8, "little") + b"[]", "damaged or no safetensors file")
    refused("odd.safetensors", (8).to_bytes(8, "little") + b'{"a": 1}', "damaged or no safetensors file")
    negative = b'{"a": {"dtype": "F32", "shape": [-4, 5], "data_offsets": [0, 0]}}'
    refused("negative.safetensors", len(negative).to_bytes(8, "little") + negative, "sizes below 0")
    refused("nothing.safetensors", (2).to_bytes(8, "little") + b"{}", "has 0 parameters; accepted: 1 to")
    for size in (b"{}", b'{"total_size": "12"}', b'{"total_size": 0}', b"[]"):
        refused("i.json", b'{"metadata": ' + size + b', "weight_map": {"a": "x.safetensors"}}', "x.safetensors is not")
    safetensors_file(tmp_path / "f8.safetensors", {"a": ("F8_E4M3", [64, 64])})
    refused("f8.safetensors", None, "a is stored as F8_E4M3; accepted: F32, BF16, F16")
    assert read_model(tmp_path / "f8.safetensors", torch.bfloat16).numel == 4096
    (tmp_path / "folder").mkdir()
    refused("folder", None, "is a folder; accepted: one with model.safetensors.index.json")


def test_configs_that_are_refused(tmp_path: Path) -> None:
    pytest.importorskip("transformers")
    with pytest.raises(ValueError, match=r"model_type is 'nonsense'; accepted"):
        of_config({"model_type": "nonsense"})
    with pytest.raises(ValueError, match=r"dtype is 'int8'; accepted: float32"):
        of_config({**TINY, "torch_dtype": "int8"})
    with pytest.raises(ValueError, match="transformers builds no model of it"):
        of_config({**TINY, "hidden_size": "wide"})
