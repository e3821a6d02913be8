"""A simulated accelerator for tests: the torch device ``sim``, with real streams and events and no hardware.

``load()`` builds and registers it, once a process. Its memory is the host's and its operators are the CPU's, but the
work of each stream is done by a thread of the stream's own, so that a forgotten wait is a stale value. README.md
tells how, and what it does not show.
"""

from __future__ import annotations

import atexit
import contextlib
import fcntl
import os
import platform
import shutil
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any, Literal, NamedTuple

import torch
from torch.utils import backend_registration

NAME = "sim"
"""Of the device: ``torch.device("sim")``."""

HERE = Path(__file__).resolve().parent
Direction = Literal["to_host", "to_device"]
DIRECTIONS: tuple[Direction, Direction] = ("to_host", "to_device")

_extension: Any = None
_marks: list[Mark] = []


class Copy(NamedTuple):
    """A copy over the simulated bus. Times are those of ``time.monotonic``; None: not yet.

    The delay is what the settings made of it, in seconds; between begin and end lies at least that.
    """

    direction: Direction
    bytes: int
    stream: int
    blocking: bool
    delay: float
    queued: float
    begin: float | None
    end: float | None


class Mark(NamedTuple):
    """A moment that the caller named."""

    name: str
    time: float


class SimUnavailableError(RuntimeError):
    """The device cannot be built here."""


def why_unavailable() -> str | None:
    """Why the device cannot be built here; None where nothing speaks against it."""
    if platform.system() != "Linux":
        return f"the simulated device is built on Linux only, not on {platform.system()}"
    compiler = os.environ.get("CXX", "c++")
    if shutil.which(compiler) is None:
        return f"the simulated device needs a C++ compiler, and there is no {compiler} on the PATH"
    if shutil.which("ninja", path=_path_with_scripts()) is None:
        return "the simulated device needs ninja, and there is none on the PATH"
    return None


def build_folder() -> Path:
    """Where the extension is built and found again: under TORCH_EXTENSIONS_DIR, else in the checkout."""
    root = os.environ.get("TORCH_EXTENSIONS_DIR")
    base = Path(root) if root else HERE.parent.parent / ".cache"
    return base / f"sim_device-torch{torch.__version__}-py{sys.version_info[0]}{sys.version_info[1]}"


@contextlib.contextmanager
def building() -> Iterator[Path]:
    """The folder of the extension, with no other process that builds or loads it for the length of a block."""
    folder = build_folder()
    folder.mkdir(parents=True, exist_ok=True)
    with open(folder / "building", "w") as held:
        fcntl.flock(held, fcntl.LOCK_EX)
        yield folder


def load() -> None:
    """Build the device where that is not done yet, and register it. Further calls do nothing.

    Raises:
        SimUnavailableError: there is no compiler, or what there is does not build it.
    """
    global _extension
    if _extension is not None:
        return
    if (reason := why_unavailable()) is not None:
        raise SimUnavailableError(reason)
    backend_registration.rename_privateuse1_backend(NAME)
    _extension = _build()
    torch._register_device_module(NAME, _device_module())
    backend_registration.generate_methods_for_privateuse1_backend(for_tensor=True, for_module=True, for_storage=True)
    # Threads that still copy while the interpreter takes itself apart would crash it.
    atexit.register(_extension.shut_down)


def _path_with_scripts() -> str:
    """The PATH with the environment's own programs first, also where the environment is not activated."""
    return os.pathsep.join(filter(None, (str(Path(sys.executable).parent), os.environ.get("PATH"))))


def _build() -> Any:
    os.environ["PATH"] = _path_with_scripts()
    from torch.utils import cpp_extension

    with building() as folder:
        # torch's own lock is a file, which a build that was ended leaves behind, and then everybody waits forever.
        (folder / "lock").unlink(missing_ok=True)
        try:
            return cpp_extension.load(
                "lowmem_adam_sim",
                [str(HERE / f"{source}.cpp") for source in ("engine", "memory", "races", "device")],
                extra_cflags=["-O1", "-std=c++20"],
                build_directory=str(folder),
            )
        except (RuntimeError, OSError, ImportError) as error:
            raise SimUnavailableError(f"the simulated device could not be built: {error}") from error


def _device_module() -> ModuleType:
    """What torch looks for as ``torch.sim``."""
    module = ModuleType(f"torch.{NAME}")
    members: dict[str, Any] = {
        "is_available": lambda: True,
        "is_initialized": lambda: True,
        "_is_in_bad_fork": lambda: False,
        "_lazy_init": lambda: None,
        "device_count": lambda: 1,
        "current_device": lambda: 0,
        "set_device": lambda device: None,
        "device": lambda device: contextlib.nullcontext(),
        "manual_seed": lambda seed: None,  # it draws from the CPU's generator
        "manual_seed_all": lambda seed: None,
        "get_rng_state": lambda device=None: torch.get_rng_state(),
        "set_rng_state": lambda state, device=None: torch.set_rng_state(state),
        "get_amp_supported_dtype": lambda: [torch.float16, torch.bfloat16],
        "synchronize": torch.accelerator.synchronize,
        "current_stream": torch.accelerator.current_stream,
        "Stream": torch.Stream,
        "Event": torch.Event,
    }
    vars(module).update(members)
    return module


def set_delay(
    direction: Direction,
    seconds: float = 0.0,
    *,
    bytes_per_second: float | None = None,
    random_seconds: float = 0.0,
    seed: int | None = None,
) -> None:
    """How long each copy of a direction takes: the sum of what is given, drawn anew for each copy where random.

    Copies of one stream follow one another; those of different streams run side by side, each at the full rate.
    A seed starts the random numbers anew, for both directions.
    """
    if seconds < 0 or random_seconds < 0 or (bytes_per_second is not None and bytes_per_second <= 0):
        raise ValueError("a delay is not negative, and a rate is positive")
    _extension.set_delay(DIRECTIONS.index(direction), seconds, bytes_per_second or 0.0, random_seconds)
    if seed is not None:
        _extension.seed_delays(seed)


def hold() -> None:
    """Queued work is not done before something waits for it, so that a missing wait always is a stale value.

    Waiting is: ``synchronize`` of an event, a stream or the device, a blocking copy, an operator on the work's
    stream, all of these on a stream that waits for an event behind the work, and a ``query`` for the next one.
    """
    _extension.set_hold(True)


def release() -> None:
    """Undo ``hold``: queued work goes on."""
    _extension.set_hold(False)


@contextlib.contextmanager
def holding() -> Iterator[None]:
    """``hold`` for the length of a block."""
    hold()
    try:
        yield
    finally:
        release()


def copies() -> list[Copy]:
    """All copies since the start or the last ``clear_log``, in the order in which they were queued."""
    return [
        Copy(DIRECTIONS[way], size, stream, blocking, delay, queued, *(t if t >= 0 else None for t in (begin, end)))
        for way, size, stream, blocking, delay, queued, begin, end in _extension.copies()
    ]


def mark(name: str) -> None:
    """Note a moment on the clock of the copies."""
    _marks.append(Mark(name, time.monotonic()))


def marks() -> list[Mark]:
    return list(_marks)


def clear_log() -> None:
    """Forget copies and marks.

    Raises:
        RuntimeError: copies are still queued; wait for them first.
    """
    _extension.clear_copies()
    _marks.clear()


def races() -> list[str]:
    """What two streams do to the same bytes in no order, a sentence each; empty where every wait is there.

    Independent of ``hold``, of delays and of what happened to come first. Sees operators, copies and the freeing of
    device memory, but not what the host itself does to pinned memory: that takes ``hold``. A strided tensor counts
    as all from its first byte to its last.
    """
    return list(_extension.races())


def clear_races() -> None:
    _extension.clear_races()


def device_bytes() -> int:
    """Allocated now; ``torch.accelerator.memory_allocated()`` says the same."""
    return int(_extension.memory(False)[0])


def peak_device_bytes() -> int:
    return int(_extension.memory(False)[1])


def pinned_bytes() -> int:
    """Pinned host memory in use; a freed buffer counts until no queued copy uses it any more."""
    return int(_extension.memory(True)[0])


def peak_pinned_bytes() -> int:
    return int(_extension.memory(True)[1])


def reset_peaks() -> None:
    """Both peaks start again from what is in use now."""
    _extension.reset_peak(False)
    _extension.reset_peak(True)


def limit_pinned(limit: int | None) -> None:
    """Pinned memory beyond so many bytes is refused with a RuntimeError; 0: all of it; None: no limit."""
    _extension.set_pinned_limit(-1 if limit is None else limit)


def lose(after_copies: int = 0) -> None:
    """The device is lost after so many further copies: copies, operators and waits raise a RuntimeError."""
    _extension.set_loss(after_copies)


def find_again() -> None:
    """Undo ``lose``."""
    _extension.set_loss(-1)


def poisoned(tensor: torch.Tensor) -> bool:
    """Whether a contiguous tensor's memory is as it was handed out or freed: never written, or no longer to be read.

    Reads what is there, and waits for nothing.
    """
    return poisoned_at(tensor.data_ptr(), tensor.nbytes)


def poisoned_at(address: int, size: int) -> bool:
    """The same of memory that may be freed. What was freed is kept up to the last 16 MiB of it."""
    return bool(_extension.poisoned(address, size))


def reset() -> None:
    """Every setting as after ``load``, with all work done: tests start from it."""
    find_again()
    release()
    for direction in DIRECTIONS:
        set_delay(direction, seed=0)
    limit_pinned(None)
    torch.accelerator.synchronize()
    clear_log()
    clear_races()
    reset_peaks()
