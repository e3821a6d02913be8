"""A model's parameters by name, shape and dtype, read from files without reading their values."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from lowmem_adam.plan.settings import dtype_of

STORED = {"F32": torch.float32, "BF16": torch.bfloat16, "F16": torch.float16}
"""Of parameters, by their names in safetensors files (github.com/huggingface/safetensors, "Format")."""

NO_PARAMETERS = ("I64", "I32", "I16", "BOOL")
"""Of buffers that lie beside parameters: positions, masks, counters."""

MAX_HEADER = 100_000_000
"""Bytes, of the format itself."""

INDEX, WHOLE, CONFIG = "model.safetensors.index.json", "model.safetensors", "config.json"
"""What a folder is read by, the first of them that it has."""

MAX_NUMEL = 2**60
"""Far above any model: their bytes fit into 64 bits."""

SCALES = {"": 1, "K": 10**3, "M": 10**6, "B": 10**9, "T": 10**12}


@dataclass(frozen=True, slots=True)
class Weight:
    """A parameter; ``dtype`` is None where its source does not say."""

    name: str
    shape: tuple[int, ...]
    dtype: torch.dtype | None = None

    @property
    def numel(self) -> int:
        """Elements."""
        return math.prod(self.shape)


@dataclass(slots=True)
class Model:
    """All parameters of a model, and what is to be known of how they were found."""

    source: str
    weights: list[Weight]
    notes: list[str] = field(default_factory=list)

    @property
    def numel(self) -> int:
        """Elements of all parameters."""
        return sum(weight.numel for weight in self.weights)

    def with_dtypes(self, dtype: torch.dtype | None) -> Model:
        """The same with a dtype for every parameter: this one, else its own, else bfloat16."""
        weights = [
            Weight(weight.name, weight.shape, dtype or weight.dtype or torch.bfloat16) for weight in self.weights
        ]
        return Model(self.source, weights, self.notes)


def read_model(path: Path, dtype: torch.dtype | None = None) -> Model:
    """The model of a folder, a transformers config, a safetensors file or a safetensors index.

    Args:
        path: the file; or a folder, of which the index, the safetensors file or the config is taken, in this order.
        dtype: that the parameters are to have; an index without its files is counted by it, bfloat16 without.

    Raises:
        OSError: the file cannot be read.
        ValueError: it is none of these, or damaged; parameters of a dtype that no optimizer of ours steps.
    """
    if path.is_dir():
        found = next((path / name for name in (INDEX, WHOLE, CONFIG) if (path / name).is_file()), None)
        if found is None:
            raise ValueError(f"{path} is a folder; accepted: one with {INDEX}, {WHOLE} or {CONFIG}")
        path = found
    if path.suffix == ".safetensors":
        notes: list[str] = []
        return _complete(Model(str(path), _of_header(path, dtype, notes), notes))
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{path} is no JSON file ({error}); accepted: a JSON or a .safetensors file") from error
    if isinstance(content, Mapping) and isinstance(content.get("weight_map"), Mapping):
        return _complete(_of_index(path, content, dtype))
    if isinstance(content, Mapping) and isinstance(content.get("model_type"), str):
        return _complete(of_config(content, str(path)))
    raise ValueError(
        f"{path} has neither a weight_map nor a model_type; accepted: a safetensors index, a transformers config"
    )


def _complete(model: Model) -> Model:
    if not 0 < model.numel < MAX_NUMEL:
        raise ValueError(f"{model.source} has {model.numel} parameters; accepted: 1 to {MAX_NUMEL - 1}")
    return model


# ---------------------------------------------------------------- safetensors


def _of_header(path: Path, dtype: torch.dtype | None, notes: list[str]) -> list[Weight]:
    """The parameters that a safetensors file has, without reading more than its header."""
    with path.open("rb") as file:
        size = int.from_bytes(file.read(8), "little")
        raw = file.read(size) if size <= MAX_HEADER else b""
    try:
        if len(raw) != size or size == 0:
            raise ValueError(f"a header of {size} bytes")
        header = json.loads(raw)
        tensors = {name: entry for name, entry in header.items() if name != "__metadata__"}
        if any(size < 0 for entry in tensors.values() for size in entry["shape"]):
            raise ValueError("sizes below 0")
        found = [(name, str(entry["dtype"]), tuple(int(n) for n in entry["shape"])) for name, entry in tensors.items()]
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"{path} is damaged or no safetensors file ({error}); accepted: a whole one") from error
    left_out = [name for name, stored, _ in found if stored in NO_PARAMETERS]
    if left_out:
        notes.append(f"{path.name}: {len(left_out)} integer tensor(s) left out, such as {left_out[0]}")
    weights = []
    for name, stored, shape in found:
        if stored in NO_PARAMETERS:
            continue
        if stored not in STORED and dtype is None:
            raise ValueError(
                f"{path}: {name} is stored as {stored}; accepted: {', '.join(STORED)}, others where the dtype that "
                "parameters are to have is given"
            )
        weights.append(Weight(name, shape, STORED.get(stored)))
    return weights


def _of_index(path: Path, content: Mapping[str, Any], dtype: torch.dtype | None) -> Model:
    files = [path.parent / str(name) for name in sorted(set(content["weight_map"].values()), key=str)]
    notes: list[str] = []
    missing = [file for file in files if not file.is_file()]
    if not missing:
        return Model(str(path), [weight for file in files for weight in _of_header(file, dtype, notes)], notes)
    metadata = content.get("metadata")
    total = metadata.get("total_size") if isinstance(metadata, Mapping) else None
    if isinstance(total, bool) or not isinstance(total, int | float) or not 0 < total < MAX_NUMEL:
        raise ValueError(
            f"{path}: {missing[0].name} is not there, and total_size is {total!r}; accepted: all files that the index "
            "names, or a total_size above 0"
        )
    stored = dtype or torch.bfloat16
    model = of_count(int(total) // stored.itemsize)
    notes.append(
        f"{missing[0].name} is not there: parameters counted from total_size {int(total)} as if stored in "
        f"{str(stored).removeprefix('torch.')}, all in one tensor"
    )
    return Model(str(path), model.weights, notes)


# ---------------------------------------------------------------- transformers


def of_config(content: Mapping[str, Any], source: str = CONFIG) -> Model:
    """The parameters of a model of transformers, which is built on the meta device.

    Args:
        content: of a config.json, with ``model_type``.
        source: names it in errors.

    Raises:
        ValueError: transformers is not installed, does not know the type, or cannot build the model.
    """
    try:
        import transformers
        from huggingface_hub.errors import StrictDataclassError
        from transformers.models.auto.configuration_auto import CONFIG_MAPPING
    except ImportError as error:
        raise ValueError(
            f"{source} is a transformers config, and transformers cannot be imported ({error}); accepted: "
            "pip install 'lowmem-adam[transformers]', a safetensors file or index, a number of parameters, shapes"
        ) from error
    kind = content["model_type"]
    if kind not in CONFIG_MAPPING:
        raise ValueError(
            f"{source}: model_type is {kind!r}; accepted: those of transformers {transformers.__version__}, which runs "
            "no code of a model's own here"
        )
    given = content.get("dtype", content.get("torch_dtype"))
    dtype = None if given is None or given == "auto" else dtype_of(str(given), f"{source}: dtype")
    wrong = (ValueError, TypeError, RuntimeError, AttributeError, LookupError, ArithmeticError, ImportError)
    try:
        config = CONFIG_MAPPING[kind](**{key: value for key, value in content.items() if key != "model_type"})
        with torch.device("meta"):
            model = _class_of(transformers, content, config)._from_config(config)
    except (*wrong, StrictDataclassError) as error:
        told = " ".join(str(error).split())
        raise ValueError(f"{source}: transformers builds no model of it ({told}); accepted: a whole config") from error
    weights = [Weight(name, tuple(param.shape), dtype) for name, param in model.named_parameters()]
    return Model(source, weights, [f"built as {type(model).__name__} of transformers {transformers.__version__}"])


def _class_of(transformers: Any, content: Mapping[str, Any], config: Any) -> Any:
    """The first architecture named that transformers has, else the causal language model, or the base."""
    names = content.get("architectures")
    for name in names if isinstance(names, Sequence) and not isinstance(names, str) else ():
        found = getattr(transformers, str(name), None)
        if isinstance(found, type) and issubclass(found, transformers.PreTrainedModel):
            return found
    for auto in (transformers.AutoModelForCausalLM, transformers.AutoModel):
        if type(config) in auto._model_mapping:
            return auto._model_mapping[type(config)]
    raise ValueError("it names no architecture of transformers")


# ---------------------------------------------------------------- numbers and shapes


def of_count(numel: int) -> Model:
    """A model of so many parameters, all in one tensor: shapes decide on less than a hundredth of the bytes."""
    return Model(f"{numel} parameters", [Weight("parameters", (1, numel))])


def count_of(text: str) -> int:
    """A number of parameters: ``8e9``, ``8B``, ``1.5M``, ``124439808``.

    Raises:
        ValueError: none, or below 1.
    """
    match = re.fullmatch(r"(\d+(?:\.\d*)?(?:[eE]\+?\d{1,2})?)([KMBT]?)", text.strip().replace("_", "").upper())
    numel = 0 if match is None else round(float(match[1]) * SCALES[match[2]])
    if match is not None and match[1].isdigit():
        numel = int(match[1]) * SCALES[match[2]]
    if not 1 <= numel < MAX_NUMEL:
        raise ValueError(f"parameters is {text!r}; accepted: a number from 1, such as 124439808, 8e9, 8B, 1.5M")
    return numel


def of_shapes(texts: Sequence[str]) -> Model:
    """A model of these shapes: ``4096x1024``, ``768``, and ``12*768x3072`` for twelve of them.

    Raises:
        ValueError: a text that is no shape.
    """
    weights = []
    for text in texts:
        match = re.fullmatch(r"(?:([1-9]\d{0,6})\*)?([1-9]\d{0,15}(?:x[1-9]\d{0,15})*)", text.strip())
        if match is None:
            raise ValueError(f"shape is {text!r}; accepted: sizes from 1 as in 4096x1024, or 12*768x3072 for twelve")
        shape = tuple(int(size) for size in match[2].split("x"))
        weights += [Weight(f"shape {text} {index}", shape) for index in range(int(match[1] or 1))]
    return _complete(Model(f"{len(weights)} shape(s)", weights))
