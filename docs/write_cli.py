"""Writes docs/cli.md, the command line as the program describes itself: ``python docs/write_cli.py``."""

from __future__ import annotations

import inspect
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import typer

PAGE = Path(__file__).with_name("cli.md")
OPENING = """# Commands and options

Every command with its arguments and options, written by `python docs/write_cli.py` from what `--help` says. Exit codes,
`--json` and completion in the shell are on a page of their own: [command_line.md](command_line.md).
"""


def page() -> str:
    """The whole page."""
    from lowmem_adam.cli import app

    group: Any = typer.main.get_command(app)
    table = ["| command | |", "|---|---|"]
    table += [
        f"| [{name}](#lowmem-adam-{name}) | {_cell(command.get_short_help_str(200))} |"
        for name, command in group.commands.items()
    ]
    parts = [OPENING, "\n".join(table) + "\n", *_epilog(group.epilog)]
    for name, command in group.commands.items():
        parts += [f"## lowmem-adam {name}\n", f"{inspect.cleandoc(command.help or '')}\n", *_params(command)]
        parts += _epilog((command.epilog or "").replace(group.epilog or "\0", ""))
    return "\n".join(parts)


def _params(command: Any) -> Iterator[str]:
    rows = [
        f"| {_names(param)} | {_cell(getattr(param, 'help', None) or '')} | {_default(param)} |"
        for param in command.params
        if not getattr(param, "hidden", False)
    ]
    yield "\n".join(["| argument or option | | default |", "|---|---|---|", *rows]) + "\n"


def _names(param: Any) -> str:
    if param.param_type_name == "argument":
        return f"`{param.name.upper()}{' ...' if param.nargs == -1 or param.multiple else ''}`"
    value = "" if param.is_flag else " ..."
    return ", ".join(f"`{name}{value}`" for name in [*param.opts, *param.secondary_opts])


def _default(param: Any) -> str:
    if param.required:
        return "required"
    if param.param_type_name == "option" and param.is_flag:
        return f"`{(param.opts if param.default else param.secondary_opts)[0]}`" if param.secondary_opts else ""
    return "" if param.default in (None, [], ()) else f"`{param.default}`"


def _epilog(words: str | None) -> list[str]:
    text = inspect.cleandoc((words or "").replace("\b", ""))
    return [f"```text\n{text}\n```\n"] if text else []


def _cell(text: str) -> str:
    return " ".join(text.split()).replace("|", "\\|")


if __name__ == "__main__":
    PAGE.write_text(page(), encoding="utf-8")
