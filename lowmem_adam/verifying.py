"""Whether a checkpoint file is whole and fit to be loaded, without a model: everything that is wrong with it, named.

Beside what a load checks: the checksums that ``torch.save`` writes and ``torch.load`` does not look at, and values that
no step leaves behind.
"""

from __future__ import annotations

import tempfile
import zipfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from lowmem_adam import foreign, saved_state, settings, stored
from lowmem_adam.codec import FORMAT, grid_octaves
from lowmem_adam.foreign.moments import coded_state
from lowmem_adam.foreign.of_bitsandbytes import NESTED
from lowmem_adam.saved_state import Owner
from lowmem_adam.spool import Spool
from lowmem_adam.state import FULL_KEYS, MASTER_KEYS, memory_by_kind
from lowmem_adam.stored import Stored

CHUNK = 1 << 22
"""Elements that are looked at, and bytes that are read, at a time."""

Progress = Callable[[int, int], None]
"""Is told the parameters done, and those there are."""


@dataclass
class Report:
    """What is in a checkpoint, and what is wrong with it."""

    kind: str
    """Whose it is, as ``foreign.kind_of``."""
    parameters: int = 0
    """That the param groups list."""
    with_state: int = 0
    elements: int = 0
    """Of parameters that have state."""
    bytes: dict[str, int] = field(default_factory=dict)
    """By kind of tensor."""
    steps: list[int] = field(default_factory=list)
    """The fewest that a parameter has taken, and the most; nothing without state."""
    groups: list[dict[str, Any]] = field(default_factory=list)
    """The settings of each, and ``parameters``, how many it has."""
    faults: list[str] = field(default_factory=list)
    """A sentence each."""


def verify(
    sources: Sequence[Path],
    key: str | None = None,
    progress: Progress = lambda done, there: None,
    reading: Progress = lambda done, there: None,
) -> Report:
    """Look through a checkpoint; files are read only.

    Args:
        sources: as for ``converting.convert``. Parts are put together in the folder for temporary files.
        key: as for ``converting.convert``.
        progress: is called after each parameter.
        reading: is told the bytes whose checksums have been looked at, and those there are, before the parameters.

    Raises:
        stored.NotACheckpointError: not the state of an optimizer that is known here, or too damaged to be read.
        OSError: a file cannot be read, or there is no room for parts.
    """
    with Spool(Path(tempfile.gettempdir())) as spool:
        try:
            found = stored.opened(sources, key, spool)
        except stored.NotACheckpointError:
            raise
        except ValueError as error:  # parts that make no whole
            return Report("lowmem_adam", faults=[str(error)])
        report = _summary(found)
        for path, whole in zip(sources, found.files, strict=True):
            report.faults += _checksum_faults(path, whole, reading)
        report.faults += (_own_faults if found.kind == "lowmem_adam" else _foreign_faults)(found, progress)
        return report


def _summary(found: Stored) -> Report:
    state_dict = found.state_dict
    listed = [list(group["params"]) for group in state_dict["param_groups"]]
    states = [state for state in state_dict["state"].values() if isinstance(state, Mapping) and state]
    flat = [{**state, **_nested(state)} for state in states]
    shapes = (param.numel() for group in stored.own_stand_ins(state_dict) for param in group["params"])
    steps = [int(state["step"]) for state in flat if _is_number(state.get("step"))]
    return Report(
        found.kind,
        parameters=sum(map(len, listed)),
        with_state=len(states),
        elements=sum(shapes),
        bytes=memory_by_kind(flat),
        steps=[min(steps), max(steps)] if steps else [],
        groups=[
            {
                **{name: group[name] for name in ("decoupled_weight_decay", *settings.ALL) if name in group},
                "parameters": len(params),
            }
            for group, params in zip(state_dict["param_groups"], listed, strict=True)
        ],
    )


def _nested(state: Mapping[str, Any]) -> Mapping[str, Any]:
    nested = state.get(NESTED)
    return nested if isinstance(nested, Mapping) else {}


def _is_number(value: Any) -> bool:
    number = value.item() if isinstance(value, Tensor) and value.numel() == 1 else value
    return isinstance(number, int | float) and abs(number) < torch.inf


# ---------------------------------------------------------------- bytes


def _checksum_faults(path: Path, whole: Any, reading: Progress) -> Iterator[str]:
    """Records of a file whose bytes are not those that were written."""
    if path.is_dir():  # torch.distributed.checkpoint's files have none of their own
        return
    try:
        with zipfile.ZipFile(path) as file:
            records = file.infolist()
            where = _storages(whole, [record for record in records if "/data/" in record.filename])
            done, there = 0, sum(record.file_size for record in records)
            for record in records:
                as_written = _is_as_written(file, record, partial(_shifted, reading, done, there))
                done += record.file_size
                if not as_written:
                    yield (
                        f"{path}: the bytes of {where.get(record.filename, record.filename)} are not those that were "
                        "written; accepted: what has the checksum beside it (torch.save writes them unless told not to "
                        "by set_crc32_options)"
                    )
    except zipfile.BadZipFile as error:
        yield f"{path}: {error}; accepted: a whole zip file, as torch.save writes it"


def _shifted(reading: Progress, before: int, there: int, nbytes: int) -> None:
    reading(before + nbytes, there)


def _is_as_written(file: zipfile.ZipFile, record: zipfile.ZipInfo, reading: Callable[[int], None]) -> bool:
    try:
        with file.open(record) as stream:
            done = 0
            while data := stream.read(CHUNK):
                done += len(data)
                reading(done)
    except zipfile.BadZipFile:
        return False
    return True


def _storages(whole: Any, records: Sequence[zipfile.ZipInfo]) -> dict[str, str]:
    """The tensor that lies in each record, by the order in which they lie in the file, which is mapped."""
    tensors: dict[int, str] = {}
    for name, tensor in _tensors(whole, ""):
        if tensor.untyped_storage().nbytes():
            tensors.setdefault(tensor.untyped_storage().data_ptr(), name)
    in_file = sorted((record for record in records if record.file_size), key=lambda record: record.header_offset)
    if len(in_file) != len(tensors):  # other parts of a whole, or more than tensors
        return {}
    return {record.filename: tensors[address] for record, address in zip(in_file, sorted(tensors), strict=True)}


def _tensors(value: Any, name: str) -> Iterator[tuple[str, Tensor]]:
    if isinstance(value, Tensor):
        yield name, value
    entries = (
        value.items() if isinstance(value, Mapping) else enumerate(value) if isinstance(value, list | tuple) else ()
    )
    for key, entry in entries:
        yield from _tensors(entry, f"{name}[{key!r}]")


# ---------------------------------------------------------------- settings and state


def _own_faults(found: Stored, progress: Progress) -> Iterator[str]:
    state_dict = foreign.to_own(found.state_dict, [])  # complete, where an earlier version wrote it
    owners: dict[Any, Owner] = {}
    for index, (saved, group) in enumerate(
        zip(state_dict["param_groups"], stored.own_stand_ins(state_dict), strict=True)
    ):
        try:
            owners |= saved_state.owners_in_group(saved, group, f"state_dict, param group {index}")
        except (ValueError, TypeError) as error:
            yield _unseen(error)
    yield from _faults_by_id(state_dict, owners, progress, _faults_of_own)


def _faults_of_own(state: Mapping[str, Any], owner: Owner) -> Iterator[str]:
    found = list(saved_state.faults(state, owner))
    yield from found or _values_of_no_step(state, owner.label)


def _foreign_faults(found: Stored, progress: Progress) -> Iterator[str]:
    form = foreign.FORMATS[found.kind]
    owners: dict[Any, Owner] = {}
    try:
        cls = stored.class_of(found.state_dict, None)
    except ValueError:  # state of an age that does not say; nothing depends on it here
        cls = "AdamW8bit"
    groups = stored.new_stand_ins(found.state_dict, "32bit", cls, {})
    for index, (saved, group) in enumerate(zip(found.state_dict["param_groups"], groups, strict=True)):
        where = f"state_dict, param group {index}"
        try:
            owners |= saved_state.owners_in_group(foreign.own_group(saved, group, form, where), group, where)
        except (ValueError, TypeError) as error:
            yield _unseen(error)

    def faults_of(state: Mapping[str, Any], owner: Owner) -> Iterator[str]:
        try:
            source = form.read_state(state, owner.param.shape, owner.label)
            coded_state(source, owner.param.shape, "32bit", owner.label)
        except ValueError as error:
            yield str(error)

    yield from _faults_by_id(found.state_dict, owners, progress, faults_of)


def _unseen(error: Exception) -> str:
    return f"{error}; state of this group's parameters was not looked at"


def _faults_by_id(
    state_dict: Mapping[str, Any],
    owners: Mapping[Any, Owner],
    progress: Progress,
    faults_of: Callable[[Mapping[str, Any], Owner], Iterator[str]],
) -> Iterator[str]:
    listed = {key for group in state_dict["param_groups"] for key in group["params"]}
    unseen = listed - set(owners)
    groups = [group for group in state_dict["param_groups"] if not unseen.intersection(group["params"])]
    known = {key: state for key, state in state_dict["state"].items() if key not in unseen}
    yield from saved_state.id_faults({"state": known, "param_groups": groups}, owners)
    for done, (key, state) in enumerate(state_dict["state"].items()):
        if key in owners and isinstance(state, Mapping) and state:
            yield from faults_of(state, owners[key])
        progress(done + 1, len(state_dict["state"]))


def _values_of_no_step(state: Mapping[str, Tensor], label: str) -> Iterator[str]:
    """Of our own state, whose shapes and dtypes are right, what a load does not look for."""
    finite = "finite numbers: the run has diverged, or the file is damaged"
    rules: list[tuple[str, Callable[[Tensor], Tensor], str]] = [
        (FULL_KEYS[0], lambda values: values.abs() < torch.inf, finite),
        (FULL_KEYS[1], lambda values: (values >= 0) & (values < torch.inf), f"from 0, {finite}"),
        (MASTER_KEYS[torch.float32], lambda values: values.abs() < torch.inf, finite),
        (
            "exp_avg_code",
            lambda values: values >= -FORMAT.ratio_limit,
            f"codes from {-FORMAT.ratio_limit} to {FORMAT.ratio_limit}",
        ),
    ]
    for name, good, accepted in rules:
        if name in state:
            flat = state[name].reshape(-1)
            for start in range(0, len(flat), CHUNK):
                values = flat[start : start + CHUNK]
                if not bool((right := good(values)).all()):
                    yield f"{label}: {name} has a value {values[~right][0].item()}; accepted: {accepted}"
                    break
    if "block_floor" in state:
        floor, span = state["block_floor"], state["block_span"]
        empty = floor == 0
        if bool(((empty != (span == 0)) | (empty != (grid_octaves(span) == 0))).any()):
            yield (
                f"{label}: block_floor and block_span are not 0 in the same blocks; accepted: both 0 in a block that "
                "never had a gradient, neither in others"
            )
