"""Checkpoints as files, and state for other optimizers: what is done with an optimizer from outside."""

from __future__ import annotations

import os
import pickle
import re
from collections.abc import Callable
from pathlib import Path
from typing import IO, Any, cast

import torch

from lowmem_adam import agreement, foreign
from lowmem_adam.optimizer import Adam8bit


def save(opt: Adam8bit, path: str | os.PathLike[str], to: int = 0) -> None:
    """Write the whole state to a file; a collective where the moments are sharded, and one rank writes.

    The file is there whole or not at all: it is written beside its place, then renamed. What was there before stays
    until then. All ranks return when it is there. Of an optimizer without shards every process that calls this writes.

    Args:
        opt: the optimizer.
        path: of the file; its folder exists.
        to: the rank that puts the state together and writes it.

    Raises:
        OSError: it cannot be written, a RuntimeError on ranks that do not write; a file that was there is as it was.
    """
    whole = opt.consolidate_state_dict(to)
    opt._forget_consolidated()
    failure: Exception | None = None
    if whole is not None:
        try:
            write(whole, Path(path))
        except Exception as error:  # noqa: BLE001 (raised below, after the others have been told)
            failure = error
    agreement.agree([], opt._cut().world, failure)


class _Counted:
    """A file that says how many bytes it has been given."""

    def __init__(self, file: IO[bytes], wrote: Callable[[int], None]) -> None:
        self._file, self._wrote, self._nbytes = file, wrote, 0

    def write(self, data: bytes) -> int:
        """As a file's."""
        self._nbytes += self._file.write(data)
        self._wrote(self._nbytes)
        return len(data)

    def flush(self) -> None:
        """As a file's."""
        self._file.flush()


def write(whole: dict[str, Any], target: Path, wrote: Callable[[int], None] | None = None) -> None:
    """Write a file, there whole or not at all: beside its place first, and what was there stays until it is renamed.

    Args:
        whole: what ``torch.save`` takes.
        target: of the file.
        wrote: is told the bytes written, as they come.

    Raises:
        OSError: it cannot be written.
    """
    beside = target.with_name(f".{target.name}.{os.getpid()}")
    try:
        with beside.open("wb") as file:
            torch.save(whole, file if wrote is None else cast("IO[bytes]", _Counted(file, wrote)))
            file.flush()
            os.fsync(file.fileno())
        os.replace(beside, target)
    except BaseException as error:
        beside.unlink(missing_ok=True)
        if isinstance(error, RuntimeError) and error.__context__ is not None:
            # Closing its archive, torch finds that not all is there, and says that instead of what had happened.
            raise error.__context__ from None
        raise


def load(opt: Adam8bit, path: str | os.PathLike[str]) -> None:
    """Load what ``save`` wrote, or another file that ``load_state_dict`` takes, on any number of ranks.

    The file is mapped, so that a rank reads its own part of it. Where the moments are sharded all ranks call it, each
    with a path of its own if need be, and what one of them cannot load none loads.

    Raises:
        FileNotFoundError: there is no such file; PermissionError: it may not be read.
        ValueError: it is damaged or no checkpoint, or its state does not fit; nothing has changed then.
        RuntimeError: another rank raises one of these; nothing has changed then.
    """
    try:
        state_dict = read(path)
    except (OSError, ValueError) as error:
        opt._refuse_load(error)
    opt.load_state_dict(state_dict)


def read(path: str | os.PathLike[str], accepted: str = "a whole file made by save") -> Any:
    """What is in a file, mapped: tensors take no memory until they are looked at.

    Args:
        path: of the file.
        accepted: for the error of a damaged one.

    Raises:
        FileNotFoundError: there is no such file; PermissionError, IsADirectoryError: it may not or cannot be read.
        ValueError: it is damaged or holds more than tensors and plain values.
    """
    try:
        return torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    except (FileNotFoundError, IsADirectoryError, PermissionError):
        raise
    except (RuntimeError, EOFError, OSError, ValueError, pickle.UnpicklingError) as error:
        # What torch says of a damaged file does not name it, and of an object it says a page.
        found = re.search(r"Unsupported global: GLOBAL (\S+)", str(error))
        words = f"it has a {found[1]} in it" if found else str(error)
        raise ValueError(f"{os.fspath(path)} cannot be read: {words}; accepted: {accepted}") from None


def export(opt: Adam8bit, format: str = "torch", to: int = 0) -> dict[str, Any] | None:  # noqa: A002
    """The state as another optimizer's ``load_state_dict`` takes it; a collective where the moments are sharded.

    Args:
        opt: the optimizer.
        format: ``"torch"`` for ``torch.optim.AdamW`` (``Adam`` of an ``Adam8bit``), ``"bitsandbytes"`` for its AdamW
            and Adam classes in 8 bits.
        to: the rank that gets it.

    Returns:
        A state_dict on rank ``to``, None on others.

    Raises:
        ValueError: another format; settings that the other optimizer does not have, see ``foreign.from_own``.
    """
    if format not in foreign.FORMATS:
        raise ValueError(f"format is {format!r}; accepted: {', '.join(map(repr, foreign.FORMATS))}")
    whole = opt.consolidate_state_dict(to)
    opt._forget_consolidated()
    return None if whole is None else foreign.from_own(whole, opt.param_groups, format)
