"""bitsandbytes' choices for single parameters, as param groups: ``GlobalOptimManager`` and what its checkpoints show.

There an override changes a parameter's settings, ``optim_bits`` above all, whatever group it is in. Here settings are
of groups, so a group with overridden parameters becomes several.

Source: bitsandbytes 0.50.2, ``optim/optimizer.py``: ``get_config``, ``check_overrides``, ``init_state``.
"""

from __future__ import annotations

import sys
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from torch import Tensor

from lowmem_adam.foreign.of_bitsandbytes import NESTED
from lowmem_adam.layout import MIN_FLAT_CODED_NUMEL

SETTINGS = ("lr", "betas", "eps", "weight_decay")
"""Overrides that are settings of a group here as well."""

SIZES = ("optim_bits", "min_8bit_size")
"""Overrides that choose between 8 and 32 bits."""

Overrides = tuple[tuple[str, Any], ...]


def split_overrides(
    params: Iterable[Any], state_dict: Mapping[str, Any] | None = None, moments: str = "8bit"
) -> tuple[list[dict[str, Any]], dict[str, Any] | None]:
    """Param groups that keep the choices for single parameters that a run with bitsandbytes has made.

    Taken from its ``GlobalOptimManager``, where bitsandbytes is imported in this process (``override_config``,
    ``register_module_override``), and from a checkpoint, in which parameters of at least 4,096 elements have fp32 state
    beside others in 8 bits. Parameters that are to stay in 32 bits come into a group with ``moments="32bit"``.

    Args:
        params: as the optimizer of bitsandbytes was given them: parameters, named ones, or param groups, in its order.
        state_dict: of that optimizer; None where the run begins.
        moments: the setting of the other parameters.

    Returns:
        The param groups for ``AdamW8bit`` or ``Adam8bit``, and the state_dict in the same groups, which that optimizer
        loads; None without one. Tensors and entries are those given, neither argument is changed.

    Raises:
        ValueError: an override that is no setting here; a state_dict of other groups or numbers of parameters.
    """
    groups = _as_groups(params)
    saved_groups = None if state_dict is None else _saved_groups(state_dict, groups)
    state = {} if state_dict is None else state_dict["state"]
    some_coded = any(_is_coded(entry) for entry in state.values())
    manager, modules = _manager()
    out: list[dict[str, Any]] = []
    out_saved: list[dict[str, Any]] = []
    for group_index, group in enumerate(groups):
        saved = None if saved_groups is None else saved_groups[group_index]
        parts: dict[Overrides, list[int]] = {}
        for index, entry in enumerate(group["params"]):
            param = entry[1] if isinstance(entry, tuple) else entry
            config = _config_of(param, group_index, index, manager, modules)
            held = None if saved is None else state.get(saved["params"][index])
            label = f"param group {group_index}, parameter {index}"
            chosen = _settings_of(param, config, held, some_coded, group.get("moments", moments), label)
            parts.setdefault(chosen, []).append(index)
        for overrides, indices in parts.items():
            settings = dict(overrides)
            out.append({**group, **settings, "params": [group["params"][index] for index in indices]})
            if saved is not None:
                theirs = {name: value for name, value in settings.items() if name in SETTINGS}
                out_saved.append({**saved, **theirs, "params": [saved["params"][index] for index in indices]})
    return out, None if state_dict is None else {**state_dict, "param_groups": out_saved}


def _as_groups(params: Iterable[Any]) -> list[dict[str, Any]]:
    entries: list[Any] = [params] if isinstance(params, Tensor) else list(params)
    if not entries or not isinstance(entries[0], Mapping):
        entries = [{"params": entries}]
    return [{**group, "params": _as_list(group["params"])} for group in entries]


def _as_list(params: Any) -> list[Any]:
    return [params] if isinstance(params, Tensor) else list(params)


def _saved_groups(state_dict: Mapping[str, Any], groups: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    saved: list[dict[str, Any]] = state_dict["param_groups"]
    counts, wanted = ([len(group["params"]) for group in each] for each in (saved, groups))
    if counts != wanted:
        raise ValueError(f"state_dict has param groups of {counts} parameters; accepted: {wanted}, as params has")
    return saved


def _is_coded(state: Mapping[str, Any]) -> bool:
    return "absmax1" in state or "absmax1" in state.get(NESTED, {})


def _manager() -> tuple[Any, list[tuple[Any, str, dict[str, Any]]]]:
    """The one instance, which holds nothing where bitsandbytes was not imported, and what it knows of modules."""
    module = sys.modules.get("bitsandbytes")
    if module is None:
        return None, []
    manager = module.optim.GlobalOptimManager.get_instance()
    return manager, manager.module_weight_config_triple


def _config_of(
    param: Tensor, group_index: int, index: int, manager: Any, modules: Sequence[tuple[Any, str, dict[str, Any]]]
) -> dict[str, Any]:
    """A parameter's overrides, later ones over earlier ones in the order of ``get_config``."""
    if manager is None:
        return {}
    config = dict(manager.index2config.get((group_index, index), {}))
    config |= manager.pid2config.get(id(param), {})
    for module, name, of_module in modules:
        if getattr(module, name) is param:
            config = dict(of_module)  # which takes the place of others at its optimizers' first step
    return config


def _settings_of(
    param: Tensor, config: Mapping[str, Any], held: Any, some_coded: bool, moments: str, label: str
) -> Overrides:
    unknown = [name for name, value in config.items() if name not in (*SETTINGS, *SIZES) and value]
    if unknown:
        raise ValueError(
            f"{label}: bitsandbytes' override {unknown[0]}={config[unknown[0]]!r} is no setting here; accepted: "
            f"{', '.join((*SIZES, *SETTINGS))}"
        )
    bits = config.get("optim_bits", 32 if moments == "32bit" else 8)
    if bits not in (8, 32):
        raise ValueError(f"{label}: bitsandbytes' override optim_bits is {bits!r}; accepted: 8, 32")
    large = param.numel() >= MIN_FLAT_CODED_NUMEL
    stays_full = bits == 32 or param.numel() < config.get("min_8bit_size", 0)
    if held and some_coded:  # what the run has is what it goes on with
        stays_full = not _is_coded(held)
    overrides = {name: config[name] for name in SETTINGS if name in config}
    if "betas" in overrides:
        overrides["betas"] = tuple(overrides["betas"])
    if large and stays_full != (moments == "32bit"):
        moments = "32bit" if stays_full else "8bit"
    return (("moments", moments), *overrides.items())
