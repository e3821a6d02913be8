"""Checkpoint files of optimizers without a model at hand: opened, looked into by key, stand-ins for the parameters.

A parameter's shape is that of its saved moments. One without state has none before its first gradient either, and
whatever shape it has is as good as another.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from lowmem_adam import checkpoint, foreign, joining, saved_state
from lowmem_adam.foreign.of_bitsandbytes import NESTED
from lowmem_adam.optimizer import Adam8bit, AdamW8bit
from lowmem_adam.spool import Spool
from lowmem_adam.state import MASTER_KEYS

OPTIMIZERS: dict[str, type[Adam8bit]] = {"AdamW8bit": AdamW8bit, "Adam8bit": Adam8bit}
DEPTH = 3
"""Levels of a larger dictionary in which optimizers are looked for, to name them."""


class NotACheckpointError(ValueError):
    """A file that cannot be read, or that has no optimizer's state where it is looked for."""


class NoSuchKeyError(NotACheckpointError):
    """An optimizer's state is not under the key that was given, or one has to be given."""


class Stored(NamedTuple):
    """An optimizer's state out of one file or several."""

    files: tuple[Any, ...]
    """All that is in each file."""
    place: tuple[Any, ...]
    """The keys that lead from the first of these to the state_dict; none where it is the file's own."""
    state_dict: dict[str, Any]
    """Of whole parameters."""
    kind: str
    """As ``foreign.kind_of``."""

    def replaced(self, state_dict: dict[str, Any]) -> Any:
        """A copy of what is in the file with another state_dict in its place; tensors are shared."""
        return _with(self.files[0], self.place, state_dict)


def opened(sources: Sequence[Path], key: str | None, spool: Spool) -> Stored:
    """The state_dict in a file, in a folder of ``torch.distributed.checkpoint``, or in files of all parts of a shard.

    Args:
        sources: a file or folder; or one file of every rank's own state_dict.
        key: where it is in a larger dictionary, such as ``"optimizer"`` or ``"optimizer_states.0"``.
        spool: for what has to be put together.

    Raises:
        NotACheckpointError: cannot be read, or there is no optimizer's state at that key.
        ValueError: parts that do not make a whole.
        OSError: there is no such file, or it may not be read.
    """
    if not sources:
        raise NotACheckpointError("sources is []; accepted: a file, or the files of all ranks")
    found = [_read(path, spool) for path in sources]
    places = [_place_of(whole, key, path) for whole, path in zip(found, sources, strict=True)]
    state_dicts = [_at(whole, place) for whole, place in zip(found, places, strict=True)]
    for state_dict, path in zip(state_dicts, sources, strict=True):
        try:
            saved_state.check_form(state_dict)
        except ValueError as error:
            raise NotACheckpointError(f"{path}: {error}") from None
        for index, group in enumerate(state_dict["param_groups"]):
            if wrong := [name for name in group["params"] if not isinstance(name, int | str)]:
                raise NotACheckpointError(
                    f"{path}: param group {index} lists a parameter {wrong[0]!r}; accepted: numbers and names"
                )
    state_dict = state_dicts[0]
    if len(sources) > 1 or joining.is_part(state_dict):
        named = list(zip(map(str, sources), state_dicts, strict=True))
        state_dict = joining.joined(named, own_stand_ins, spool)
    try:
        kind = foreign.kind_of(state_dict)
    except ValueError as error:
        raise NotACheckpointError(f"{sources[0]}: {error}") from None
    return Stored(tuple(found), places[0], state_dict, kind)


def _read(path: Path, spool: Spool) -> Any:
    if path.is_dir() and (path / ".metadata").exists():
        try:
            return joining.read_folder(path, spool)
        except joining.UnreadableError as error:
            raise NotACheckpointError(str(error)) from None
    try:
        return checkpoint.read(path, "a whole file of tensors and plain values, as torch.save writes it")
    except ValueError as error:
        raise NotACheckpointError(str(error)) from None


# ---------------------------------------------------------------- larger dictionaries


def _place_of(whole: Any, key: str | None, path: Path) -> tuple[Any, ...]:
    if key is None and _looks_right(whole):
        return ()
    places = [".".join(map(str, place)) for place in _places(whole, DEPTH)]
    accepted = f"accepted: {', '.join(map(repr, places)) or 'none, as there is no state_dict of an optimizer in it'}"
    if key is None:
        if not places:
            saved_words = f"is a {type(whole).__name__}" + (f" with {_names(whole)}" if _names(whole) else "")
            raise NotACheckpointError(
                f"{path} {saved_words}; accepted: state_dict() of an optimizer, by itself or under a key"
            )
        raise NoSuchKeyError(f"{path}: key is None; {accepted}")
    for place in _leading_to(whole, key):
        return place
    raise NoSuchKeyError(f"{path}: key is {key!r}; {accepted}")


def _names(whole: Any) -> str:
    return ", ".join(map(repr, list(whole)[:8])) if isinstance(whole, Mapping) else ""


def _looks_right(value: Any) -> bool:
    return isinstance(value, Mapping) and {"state", "param_groups"} <= set(value)


def _entries(value: Any) -> Iterator[tuple[Any, Any]]:
    if isinstance(value, Mapping):
        yield from value.items()
    elif isinstance(value, list | tuple):
        yield from enumerate(value)


def _places(value: Any, depth: int) -> Iterator[tuple[Any, ...]]:
    if _looks_right(value):
        yield ()
    elif depth:
        for name, entry in _entries(value):
            yield from ((name, *place) for place in _places(entry, depth - 1))


def _leading_to(value: Any, key: str) -> Iterator[tuple[Any, ...]]:
    """Where a key with dots leads; names may have dots themselves."""
    for name, entry in _entries(value):
        if key == str(name):
            yield (name,)
        elif key.startswith(f"{name}."):
            yield from ((name, *place) for place in _leading_to(entry, key[len(str(name)) + 1 :]))


def _at(value: Any, place: tuple[Any, ...]) -> Any:
    return value if not place else _at(value[place[0]], place[1:])


def _with(value: Any, place: tuple[Any, ...], entry: Any) -> Any:
    if not place:
        return entry
    pairs = ((name, _with(held, place[1:], entry) if name == place[0] else held) for name, held in _entries(value))
    return dict(pairs) if isinstance(value, Mapping) else type(value)(held for _, held in pairs)


# ---------------------------------------------------------------- stand-ins for the optimizer's own param groups


def own_stand_ins(
    state_dict: Mapping[str, Any], shapes: Mapping[Any, Sequence[int]] | None = None
) -> list[dict[str, Any]]:
    """Param groups of the optimizer that has saved our state: with these ``saved_state.check`` looks at it.

    Args:
        state_dict: ours; settings are taken as they are, for a check to look at.
        shapes: of parameters of which ``state_dict`` has a part.
    """
    state = state_dict["state"]
    groups = []
    for saved in state_dict["param_groups"]:
        decoupled = saved.get("decoupled_weight_decay")
        group: dict[str, Any] = {
            "moments": saved.get("moments"),
            "decoupled_weight_decay": decoupled if isinstance(decoupled, bool) else True,
            "backend": None,
            "params": [_stand_in(state.get(key), (shapes or {}).get(key)) for key in saved["params"]],
        }
        names = saved.get("param_names")
        if isinstance(names, list) and len(names) == len(saved["params"]):
            group["param_names"] = names
        groups.append(group)
    return groups


def new_stand_ins(
    state_dict: Mapping[str, Any], moments: str, optimizer: str | None, given: Mapping[str, Any]
) -> list[dict[str, Any]]:
    """Param groups of an optimizer of ours that is to load another optimizer's state.

    Args:
        state_dict: theirs.
        moments: the setting.
        optimizer: the class; None for the one that the state says, see ``class_of``.
        given: other settings.

    Raises:
        ValueError: no such class, settings that are not accepted.
    """
    cls = OPTIMIZERS[class_of(state_dict, optimizer)]
    defaults = cls([torch.nn.Parameter(torch.empty(0))], moments=moments, **given).defaults
    state = state_dict["state"]
    groups = []
    for saved in state_dict["param_groups"]:
        groups.append({**defaults, "params": [_stand_in(state.get(key)) for key in saved["params"]]})
    return groups


def class_of(state_dict: Mapping[str, Any], optimizer: str | None) -> str:
    """Which class of ours goes on with another optimizer's state.

    torch says it since 2.7 (``decoupled_weight_decay``); all of bitsandbytes' Adam classes decouple.

    Raises:
        ValueError: another name; not told, by older state of torch.
    """
    accepted = f"accepted: {', '.join(map(repr, OPTIMIZERS))}"
    if optimizer is not None:
        if optimizer not in OPTIMIZERS:
            raise ValueError(f"optimizer is {optimizer!r}; {accepted}")
        return optimizer
    if foreign.kind_of(state_dict) == "bitsandbytes" or not state_dict["param_groups"]:
        return "AdamW8bit"
    decoupled = state_dict["param_groups"][0].get("decoupled_weight_decay")
    if not isinstance(decoupled, bool):
        raise ValueError(f"optimizer is None, and state of this age does not say whether it is AdamW's; {accepted}")
    return "AdamW8bit" if decoupled else "Adam8bit"


def _stand_in(state: Any, shape: Sequence[int] | None = None) -> Tensor:
    """A parameter without values, of the shape of its moments, and of 16 bits where something is kept beside it."""
    state = state if isinstance(state, Mapping) else {}
    nested = state.get(NESTED)
    held = {**state, **nested} if isinstance(nested, Mapping) else state
    first = next(
        (held[key] for key in ("exp_avg_code", "exp_avg", "state1") if isinstance(held.get(key), Tensor)), None
    )
    if shape is None:
        shape = (0,) if first is None else tuple(first.shape)
    dtype = torch.bfloat16 if any(key in state for key in MASTER_KEYS.values()) else torch.float32
    return torch.empty(tuple(shape), dtype=dtype, device="meta")


def check_settings(given: Mapping[str, Any]) -> None:
    """Check settings that a converted file is to carry, beside ``moments``.

    Raises:
        ValueError: other settings, or what needs the parameters.
    """
    known = ("seed", "nonfinite", "low_precision_update")
    for name, value in given.items():
        if name not in known:
            raise ValueError(f"settings have {name!r}; accepted: {', '.join(map(repr, known))}")
        if value in ("split", "fp32"):
            raise ValueError(
                f"{name} is {value!r}, which keeps something of each 16-bit weight; accepted here: 'nearest', "
                "'stochastic' (an optimizer made with it loads the other optimizer's own file)"
            )
