"""Checks of every setting of a param group: an error names the value given and the values accepted."""

from __future__ import annotations

from collections.abc import Mapping
from numbers import Integral, Real
from typing import Any, TypedDict

import torch

from lowmem_adam.codec import FORMAT


class Keywords(TypedDict, total=False):
    """The keyword-only arguments of the optimizers."""

    maximize: bool
    moments: str
    low_precision_update: str
    master_bits: int
    nonfinite: str
    seed: int
    backend: str | None
    shard_group: Any
    offload: str | None
    offload_gradients: bool
    bucket_cap_mb: float
    capturable: bool


FLOAT32_MAX = torch.finfo(torch.float32).max

CHOICES: dict[str, tuple[object, ...]] = {
    "moments": ("8bit", "32bit", "bnb8bit"),
    "low_precision_update": ("nearest", "stochastic", "split", "fp32"),
    "master_bits": (32, 24),
    "nonfinite": ("skip", "error", "propagate"),
    "backend": (None, "cpu", "triton", "reference", "bitsandbytes"),
    "maximize": (False, True),
}

ALL = (
    "lr",
    "betas",
    "eps",
    "weight_decay",
    "maximize",
    "moments",
    "low_precision_update",
    "master_bits",
    "nonfinite",
    "seed",
)
"""Settings that saved state carries, in their order in a group; ``backend`` is the machine's own."""

SINCE: dict[str, object] = {"master_bits": 32}
"""Settings that state saved by an earlier version does not have, and what they were then."""

REQUIRED = tuple(name for name in ALL if name not in SINCE)
"""Settings that all saved state must carry."""

ACCEPTED = f"accepted settings: {', '.join(ALL)}, backend"

INSTEAD: dict[str, str] = {
    "amsgrad": "there is no AMSGrad variant; drop it",
    "fused": "drop it: every step runs in one pass over the parameter",
    "foreach": "drop it: one call steps all parameters",
    "differentiable": "drop it: the step is not differentiable",
    "decoupled_weight_decay": "take AdamW8bit for decoupled weight decay, Adam8bit for L2",
    "adamw_mode": "take AdamW8bit for decoupled weight decay, Adam8bit for L2",
    "bias_correction": "drop it: moments are always bias-corrected",
    "optim_bits": 'moments="8bit" or moments="32bit"',
    "block_wise": "drop it: moments are always stored by blocks, of 128 or 256 elements",
    "block_size": 'drop it: blocks have 128 elements, 256 with moments="bnb8bit"',
    "min_8bit_size": 'put parameters into a group with moments="32bit" to keep them in fp32',
    "percentile_clipping": "clip with this optimizer's clip_grad_norm_",
    "max_unorm": "clip with this optimizer's clip_grad_norm_",
    "skip_zeros": "drop it",
    "is_paged": "drop it: moments are not paged",
    "bf16_stochastic_round": 'low_precision_update="stochastic", which is the default',
    "master_weight_bits": 'low_precision_update="split" with master_bits=24 or 32',
    "correct_bias": "drop it: moments are always bias-corrected",
}
"""Keywords of other optimizers and what to use here."""

WHOLE = ("shard_group", "offload", "offload_gradients", "bucket_cap_mb", "capturable")
"""Keywords of the whole optimizer: no setting of a param group."""

NEUTRAL: dict[str, tuple[object, ...]] = {
    "amsgrad": (False,),
    "foreach": (None, False),
    "fused": (None, False),
    "capturable": (False,),
    "differentiable": (False,),
    "shard_group": (None,),
    "offload": (None,),
    "offload_gradients": (False,),
}
"""Values of torch's own keywords that ask for nothing: taken and forgotten, so that scripts need no change."""


def check_capturable(capturable: object, shard_group: object, offload: object) -> None:
    """Check the setting ``capturable``.

    Raises:
        ValueError: no bool; True together with what a CUDA graph cannot hold.
    """
    if not isinstance(capturable, bool):
        raise ValueError(f"capturable is {capturable!r}; accepted: True, False")
    for name, value in (("shard_group", shard_group), ("offload", offload)):
        if capturable and value is not None:
            raise ValueError(
                f"capturable is True and {name} {value!r}; accepted with capturable: {name}=None, since ranks and the "
                "host take part in such a step"
            )


def refuse_keywords(keywords: Mapping[str, object]) -> None:
    """Refuse constructor keywords that are not ours.

    Raises:
        TypeError: a keyword that is not a setting of this optimizer; says what to use instead.
    """
    for name, value in keywords.items():
        if not _is_neutral(name, value):
            raise TypeError(f"{name}={value!r} is not a setting of this optimizer; {INSTEAD.get(name, ACCEPTED)}")


def normalised(group: Mapping[str, Any]) -> dict[str, Any]:
    """Checked settings as plain Python numbers, so that they survive a load with ``weights_only=True``."""
    plain = dict(group)
    for name in ("lr", "eps", "weight_decay"):
        if not isinstance(plain[name], torch.Tensor):
            plain[name] = float(plain[name])
    plain["betas"] = (float(plain["betas"][0]), float(plain["betas"][1]))
    plain["seed"] = int(plain["seed"])
    return {name: value for name, value in plain.items() if not _is_neutral(name, value)}


def completed(group: Mapping[str, Any]) -> dict[str, Any]:
    """A saved group with the settings that an earlier version did not have."""
    return {**group, **{name: value for name, value in SINCE.items() if name not in group}}


def check_group(group: Mapping[str, Any], where: str, *, capturable: bool = False) -> None:
    """Check every setting of a param group.

    Args:
        group: the settings, complete with defaults.
        where: names the group in errors, such as ``"param group 0"``.
        capturable: nothing may wait for the device: of a learning rate that lies there, the value is not checked.

    Raises:
        ValueError: a value that is not accepted.
        TypeError: a setting that is another optimizer's.
    """
    lr = group["lr"]
    if not (capturable and isinstance(lr, torch.Tensor) and not lr.is_cpu and _is_real_scalar(lr)):
        _check_number(group, "lr", where, allow_tensor=True)
    if capturable and group["nonfinite"] == "error":
        raise ValueError(
            f"{where}: nonfinite is 'error' and capturable True; accepted with capturable: 'skip', 'propagate', since "
            "nothing may wait for the device"
        )
    _check_number(group, "eps", where)
    _check_number(group, "weight_decay", where)
    _check_betas(group["betas"], where)
    for name, accepted in CHOICES.items():
        _check_choice(name, group[name], accepted, where)
    if group["master_bits"] != 32 and group["low_precision_update"] != "split":
        raise ValueError(
            f"{where}: master_bits is {group['master_bits']!r} and low_precision_update "
            f"{group['low_precision_update']!r}; accepted: 32, and 24 with low_precision_update='split'"
        )
    seed = group["seed"]
    if isinstance(seed, bool) or not isinstance(seed, Integral) or not 0 <= int(seed) < 2**63:
        raise ValueError(f"{where}: seed is {seed!r}; accepted: integers from 0 below 2**63")
    for name in WHOLE:
        if name in group and not _is_neutral(name, group[name]):
            raise ValueError(
                f"{where}: {name} is {group[name]!r}; accepted: {name} given to the constructor, for all groups"
            )
    for name in group:
        if name in INSTEAD and name != "decoupled_weight_decay" and not _is_neutral(name, group[name]):
            raise TypeError(f"{where}: {name}={group[name]!r} is not a setting of this optimizer; {INSTEAD[name]}")


def check_max_norm(value: object) -> None:
    """Check the largest norm that gradients are to have.

    Raises:
        ValueError: no number, or one below 0 (infinity clips nothing).
    """
    if not _is_number(value) or not float(value) >= 0:  # type: ignore[arg-type]
        raise ValueError(f"max_norm is {value!r}; accepted: numbers from 0, infinity included")


def check_version(version: object, where: str) -> None:
    """Check the format version of saved state.

    Raises:
        ValueError: another version than this code reads.
    """
    if type(version) is not int or not FORMAT.oldest_version <= version <= FORMAT.version:
        accepted = ", ".join(map(str, range(FORMAT.oldest_version, FORMAT.version + 1)))
        raise ValueError(
            f"{where}: format version {version!r}; accepted: {accepted} "
            "(state of a newer version needs a newer lowmem_adam)"
        )


def _is_number(value: object) -> bool:
    return not isinstance(value, bool) and isinstance(value, Real)


def _check_number(group: Mapping[str, Any], name: str, where: str, *, allow_tensor: bool = False) -> None:
    value = group[name]
    if allow_tensor and isinstance(value, torch.Tensor):
        good = _is_real_scalar(value) and 0 <= float(value.detach()) <= FLOAT32_MAX
    else:
        good = _is_number(value) and 0 <= value <= FLOAT32_MAX
    if not good:
        kinds = f"finite numbers from 0 to {FLOAT32_MAX:g}" + (", or a tensor of one element" if allow_tensor else "")
        raise ValueError(f"{where}: {name} is {value!r}; accepted: {kinds}")


def _is_real_scalar(value: torch.Tensor) -> bool:
    return value.numel() == 1 and not value.is_complex() and value.dtype != torch.bool


def _is_neutral(name: str, value: object) -> bool:
    return any(value is neutral for neutral in NEUTRAL.get(name, ()))


def _check_betas(betas: object, where: str) -> None:
    good = (
        isinstance(betas, tuple | list) and len(betas) == 2 and all(_is_number(b) and 0 <= float(b) < 1 for b in betas)
    )
    if not good:
        raise ValueError(f"{where}: betas is {betas!r}; accepted: two numbers from 0 below 1")


def _check_choice(name: str, value: object, accepted: tuple[object, ...], where: str) -> None:
    # `in` alone would take 1 for True.
    comparable = isinstance(value, str) or type(value) is int
    if any(value is choice or (comparable and not isinstance(choice, bool) and value == choice) for choice in accepted):
        return
    raise ValueError(f"{where}: {name} is {value!r}; accepted: {', '.join(map(repr, accepted))}")
