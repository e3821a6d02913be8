"""Shell completion of ``lowmem-adam``: what the shell is told, and bash with the script that is installed for it."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from lowmem_adam import settings
from tests.test_cli import run

pytest.importorskip("typer")
pytest.importorskip("rich")

COMMANDS = ["info", "plan", "check-config", "profile", "convert", "verify"]


def completed(*words: str) -> list[str]:
    """What bash is told for the last word."""
    line = ["lowmem-adam", *words]
    told = run(_LOWMEM_ADAM_COMPLETE="complete_bash", COMP_WORDS="\n".join(line), COMP_CWORD=str(len(words)))
    assert told.returncode == 0, told.stderr
    assert told.stderr == ""
    return told.stdout.split()


def test_commands() -> None:
    assert completed("") == COMMANDS
    assert completed("p") == ["plan", "profile"]


def test_options() -> None:
    assert completed("plan", "--mo") == ["--moments"]
    assert set(completed("verify", "--")) == {"--key", "--json", "--help"}


@pytest.mark.parametrize(
    ("words", "values"),
    [
        (("plan", "--moments", ""), ["8bit", "32bit", "bnb8bit"]),
        (("plan", "--parameters", "8B", "--moments", "b"), ["bnb8bit"]),
        (("plan", "--dtype", ""), ["float32", "bfloat16", "float16", "fp32", "bf16", "fp16"]),
        (("plan", "--master-bits", ""), ["32", "24"]),
        (("plan", "--zero-stage", ""), ["0", "1", "2", "3"]),
        (("profile", "--low-precision-update", "s"), ["stochastic", "split"]),
        (("profile", "--backend", ""), [str(name) for name in settings.CHOICES["backend"] if name is not None]),
        (("profile", "--device", "c"), ["cpu"]),
        (("convert", "in.pt", "--to", ""), ["torch", "bitsandbytes", "8bit", "32bit", "bnb8bit"]),
        (("convert", "--optimizer", "AdamW"), ["AdamW8bit"]),
    ],
)
def test_values(words: tuple[str, ...], values: list[str]) -> None:
    found = completed(*words)
    assert found[: len(values)] == values
    assert len(found) == len(values) or "--device" in words  # where there is an accelerator


@pytest.mark.parametrize(
    "words", [("plan", "conf"), ("verify", ""), ("convert", "-o", "ou"), ("profile", "--output-dir", "")]
)
def test_files_are_left_to_the_shell(words: tuple[str, ...]) -> None:
    """Bash completes files where it is told nothing (``complete -o default``)."""
    assert completed(*words) == []


def test_zsh_and_fish() -> None:
    zsh = run(_LOWMEM_ADAM_COMPLETE="complete_zsh", _TYPER_COMPLETE_ARGS="lowmem-adam plan --moments ")
    assert all(value in zsh.stdout for value in ("8bit", "32bit", "bnb8bit"))
    files = run(_LOWMEM_ADAM_COMPLETE="complete_zsh", _TYPER_COMPLETE_ARGS="lowmem-adam verify opt")
    assert files.stdout.strip() == "_files"
    fish = run(
        _LOWMEM_ADAM_COMPLETE="complete_fish",
        _TYPER_COMPLETE_ARGS="lowmem-adam plan --moments ",
        _TYPER_COMPLETE_FISH_ACTION="get-args",
    )
    assert fish.stdout.split() == ["8bit", "32bit", "bnb8bit"]


PROGRAM = """#!{python}
import sys
from lowmem_adam.cli import app
sys.exit(app())
"""


def test_installed_in_bash(tmp_path: Path) -> None:
    """The script that --install-completion leaves, run by bash as the Tab key runs it."""
    bash = shutil.which("bash")
    if bash is None:
        pytest.skip("needs bash")
    program = tmp_path / "bin" / "lowmem-adam"
    program.parent.mkdir()
    program.write_text(PROGRAM.format(python=sys.executable), encoding="utf-8")
    program.chmod(0o755)
    root = Path(__file__).resolve().parents[1]
    path = os.pathsep.join(filter(None, (str(root), os.environ.get("PYTHONPATH"))))
    env = {
        **os.environ,
        "HOME": str(tmp_path),
        "PATH": f"{program.parent}{os.pathsep}{os.environ['PATH']}",
        "PYTHONPATH": path,
    }

    def in_bash(script: str) -> str:
        finished = subprocess.run([bash, "-c", script], env=env, capture_output=True, text=True, timeout=120)
        assert finished.returncode == 0, finished.stderr
        return finished.stdout

    installed = in_bash("lowmem-adam --install-completion; exit $?")
    assert "bash completion installed" in installed.replace("\n", " ")
    (script,) = (found for found in tmp_path.rglob("*lowmem-adam*") if found != program and found.is_file())
    assert str(script) in (tmp_path / ".bashrc").read_text(encoding="utf-8")
    tab = f"""
        source {script}
        COMP_WORDS=(lowmem-adam plan --moments b) COMP_CWORD=3
        _lowmem_adam_completion lowmem-adam
        echo "${{COMPREPLY[@]}}"
        complete -p lowmem-adam
    """
    values, registered = in_bash(tab).splitlines()
    assert values == "bnb8bit"
    assert registered == "complete -o default -F _lowmem_adam_completion lowmem-adam"
    shown = in_bash("lowmem-adam --show-completion; exit $?")
    assert shown.strip() == script.read_text(encoding="utf-8").strip()
