"""How a command ends: exit codes, the same for all, and what is said of what went wrong."""

from __future__ import annotations

import json
import math
import os
import signal
import sys
import threading
import traceback
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, NoReturn

import torch
import typer
from typer.core import TyperGroup

DONE, NO, NOT_DONE, FAULT = 0, 1, 2, 3
INTERRUPTED, CLOSED, TERMINATED = (128 + number for number in (2, 13, 15))
"""As the shell has them for SIGINT, SIGPIPE and SIGTERM; there is no SIGPIPE on some systems."""

EXIT_CODES = {
    DONE: "done; the answer is yes",
    NO: "the answer is no: does not fit, is refused, damaged, not convertible",
    NOT_DONE: "not done: wrong usage, or a file that cannot be read or written",
    FAULT: "a fault of the program, with a traceback to report",
    INTERRUPTED: "interrupted by Ctrl-C; nothing is left half-written",
    CLOSED: "what reads the output has closed it",
    TERMINATED: "terminated by SIGTERM; nothing is left half-written",
}
"""Of all commands."""


def epilog(*examples: str) -> str:
    """What stands under a command's help: examples, a line each, and exit codes."""
    codes = [f"{code:3}  {words}" for code, words in EXIT_CODES.items()]
    parts = [["Examples:", *(f"  {example}" for example in examples)], ["Exit codes:", *codes]]
    return "\n\n".join("\b\n" + "\n".join(part) for part in parts if len(part) > 1)


def say(words: object) -> None:
    """A line on stderr."""
    typer.echo(f"lowmem-adam: {words}", err=True)


def refuse(error: object, code: int = NOT_DONE) -> NoReturn:
    """End the command with a line on stderr.

    Raises:
        typer.Exit: with the code.
    """
    say(error)
    raise typer.Exit(code) from (error if isinstance(error, BaseException) else None)


def check_choice(name: str, value: object, accepted: Sequence[object]) -> None:
    """Check an option that may be left out.

    Raises:
        ValueError: names the value given and the values accepted.
    """
    if value is not None and value not in accepted:
        raise ValueError(f"{name} is {value!r}; accepted: {', '.join(map(repr, accepted))}")


def print_json(told: Mapping[str, Any]) -> None:
    """One JSON object on stdout; numbers that JSON lacks are words."""
    typer.echo(json.dumps(_spoken(told), indent=1, allow_nan=False))


def _spoken(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {str(name): _spoken(entry) for name, entry in value.items()}
    if isinstance(value, list | tuple):
        return [_spoken(entry) for entry in value]
    if isinstance(value, torch.Tensor) and value.numel() == 1:  # a learning rate
        value = value.item()
    if isinstance(value, float) and not math.isfinite(value):
        return str(value)
    return value if value is None or isinstance(value, str | int | float) else str(value)


class _TerminatedError(BaseException):
    """SIGTERM, so that what is half-written is removed on the way out."""


def _terminate(number: int, frame: object) -> NoReturn:
    raise _TerminatedError


@contextmanager
def ended() -> Iterator[None]:
    """Turn what comes out of a command into its exit code and a line on stderr; ``typer.Exit`` and wrong usage pass.

    Raises:
        typer.Exit: with a code of ``EXIT_CODES``.
    """
    main = threading.current_thread() is threading.main_thread()
    before = signal.signal(signal.SIGTERM, _terminate) if main else None
    try:
        yield
        sys.stdout.flush()
    except OSError as error:
        if _of_stdout(error):
            raise typer.Exit(CLOSED) from error
        refuse(error)
    except SystemExit as error:  # so rich says that nobody reads on
        if isinstance(error.__context__, BrokenPipeError):
            raise typer.Exit(CLOSED) from error
        raise
    except (MemoryError, torch.OutOfMemoryError) as error:
        refuse(str(error) or "out of memory")
    except KeyboardInterrupt:
        refuse("interrupted", INTERRUPTED)
    except _TerminatedError:
        refuse("terminated", TERMINATED)
    except Exception as error:
        if isinstance(error, typer.Abort) or hasattr(error, "exit_code"):  # Exit, and the parser's errors
            raise
        traceback.print_exc()
        refuse("this is a fault of the program; please report it with what stands above", FAULT)
    finally:
        if before is not None:
            signal.signal(signal.SIGTERM, before)


def _of_stdout(error: OSError) -> bool:
    """Whether nobody reads stdout any more. One that takes no more is left alone, also at the interpreter's end."""
    try:
        sys.stdout.flush()
    except OSError:
        with open(os.devnull, "w") as nowhere:
            os.dup2(nowhere.fileno(), sys.stdout.fileno())
    return isinstance(error, BrokenPipeError)


class Commands(TyperGroup):
    """All commands, which end in the same ways; help, too, may be read to its first line only."""

    def make_context(self, *arguments: Any, **named: Any) -> Any:
        """Read the command line."""
        with ended():
            return super().make_context(*arguments, **named)

    def invoke(self, ctx: Any) -> Any:
        """Run the command."""
        with ended():
            return super().invoke(ctx)
