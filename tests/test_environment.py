"""launch/environment.sh and quickstart.sh, as far as they can be tested without installing: what they refuse."""

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
ENVIRONMENT = ROOT / "launch" / "environment.sh"
QUICKSTART = ENVIRONMENT.with_name("quickstart.sh")


def source_environment(*extras: str, script: Path = ENVIRONMENT, **variables: str) -> subprocess.CompletedProcess[str]:
    bash = shutil.which("bash")
    assert bash is not None
    command = [bash, "-c", 'set -euo pipefail; source "$0" "$@"; echo ready', str(script), *extras]
    return subprocess.run(command, env=variables, capture_output=True, text=True, timeout=60)


@pytest.fixture
def tools(tmp_path: Path) -> Path:
    """A PATH with the few programs the script needs, and no Python."""
    folder = tmp_path / "bin"
    folder.mkdir()
    for name in ("dirname", "basename", "mkdir"):
        found = shutil.which(name)
        assert found is not None
        (folder / name).symlink_to(found)
    return folder


def test_says_so_when_no_python_fits(tools: Path, tmp_path: Path) -> None:
    too_old = tools / "python3"
    too_old.write_text("#!/bin/sh\nexit 1\n")
    dead_shim = tools / "python3.11"
    dead_shim.write_text("#!/bin/sh\necho 'python3.11: command not found' >&2\nexit 127\n")
    for program in (too_old, dead_shim):
        program.chmod(0o755)
    finished = source_environment("test", PATH=str(tools), LOWMEM_ADAM_VENV=str(tmp_path / "venv"))
    assert finished.returncode != 0
    assert "No Python from 3.10 to 3.13" in finished.stderr
    assert "ready" not in finished.stdout
    assert not (tmp_path / "venv").exists()


def test_leaves_a_folder_alone_that_is_no_environment(tmp_path: Path) -> None:
    folder = tmp_path / "precious"
    folder.mkdir()
    (folder / "notes.txt").write_text("keep me")
    finished = source_environment("test", PATH=os.environ["PATH"], LOWMEM_ADAM_VENV=str(folder))
    assert finished.returncode != 0
    assert "is no virtual environment" in finished.stderr
    assert [path.name for path in folder.iterdir()] == ["notes.txt"]


def test_says_so_when_the_environment_has_another_python(tmp_path: Path) -> None:
    """A stand-in for the interpreter of an environment that was made with Python 3.9."""
    python = tmp_path / "venv" / "bin" / "python"
    python.parent.mkdir(parents=True)
    python.write_text(
        "#!/bin/sh\ncase \"$*\" in\n    -V) echo 'Python 3.9.2' ;;\n    *version_info*) exit 1 ;;\nesac\n"
    )
    python.chmod(0o755)
    finished = source_environment("test", PATH=os.environ["PATH"], LOWMEM_ADAM_VENV=str(tmp_path / "venv"))
    assert finished.returncode != 0
    assert "has Python 3.9.2, the project needs Python 3.10 to 3.13" in finished.stderr
    assert "ready" not in finished.stdout
    assert "installing" not in finished.stdout


def write_program(path: Path, text: str) -> None:
    path.write_text(f"#!/bin/sh\n{text}\n")
    path.chmod(0o755)


def test_installs_anew_when_the_native_library_could_be_another(tools: Path, tmp_path: Path) -> None:
    """A checkout with a stand-in for its environment's interpreter, whose pip "builds" a library if told to."""
    checkout, venv = tmp_path / "checkout", tmp_path / "venv"
    native = checkout / "lowmem_adam" / "native"
    for name in ("launch/environment.sh", "launch/constraints.txt", "pyproject.toml"):
        (checkout / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(ROOT / name, checkout / name)
    shutil.copytree(ROOT / ".build_backend", checkout / ".build_backend")
    native.mkdir(parents=True)
    source, library = native / "dispatch.cpp", native / "liblowmem_adam.so"
    source.write_text("int one;\n")
    (venv / "bin").mkdir(parents=True)
    (venv / "bin" / "activate").touch()
    build = f'case "$*" in *pip*install*) if [ -n "$BUILDS" ]; then : >{library}; fi; exit 0 ;; esac'
    write_program(venv / "bin" / "python", f'{build}\nexec {sys.executable} "$@"')
    write_program(tools / "python3", f'exec {sys.executable} "$@"')

    def source_it(**variables: str) -> str:
        script = checkout / "launch" / "environment.sh"
        finished = source_environment("test", script=script, PATH=str(tools), LOWMEM_ADAM_VENV=str(venv), **variables)
        assert finished.returncode == 0, finished.stderr
        return finished.stdout

    def is_up_to_date(said: str) -> bool:
        assert ("up to date" in said) != ("installing lowmem-adam" in said)
        return "up to date" in said

    for seen in (False, True):
        said = source_it()
        assert is_up_to_date(said) == seen
        assert "native library was not built, as no C++ compiler" in said
    write_program(tools / "c++", "exit 1")
    for seen in (False, True):  # what has failed is not tried again
        said = source_it()
        assert is_up_to_date(said) == seen
        assert "native library was not built: steps will be slow" in said
    source.write_text("int two;\n")
    for seen in (False, True):
        said = source_it(BUILDS="yes")
        assert is_up_to_date(said) == seen
        assert "not built" not in said
    library.unlink()
    assert not is_up_to_date(source_it())
    # Another torch is another install, with the other pins as they are.
    pins = (ROOT / "launch/constraints.txt").read_text(encoding="utf-8")
    used = venv / ".lowmem_adam_constraints.txt"
    assert used.read_text(encoding="utf-8") == pins
    said = source_it(LOWMEM_ADAM_TORCH="2.9.1")
    assert not is_up_to_date(said)
    assert "installing torch==2.9.1" in said
    changed = re.sub(r"^torch==.*$", "torch==2.9.1", pins, flags=re.MULTILINE)
    assert used.read_text(encoding="utf-8") == changed != pins
    assert is_up_to_date(source_it(LOWMEM_ADAM_TORCH="2.9.1"))
    assert not is_up_to_date(source_it())


@pytest.mark.parametrize("option", ["--optimizer", "--shard", "--output-dir=elsewhere", "--expect-world-size"])
def test_quickstart_refuses_options_that_it_sets_itself(option: str, tools: Path) -> None:
    bash = shutil.which("bash")
    assert bash is not None
    command = [bash, str(QUICKSTART), "--steps", "20", option, "1"]
    finished = subprocess.run(command, env={"PATH": str(tools)}, capture_output=True, text=True, timeout=60)
    assert finished.returncode == 2
    assert f"{option}: quickstart.sh sets {option.partition('=')[0]} itself" in finished.stderr
    assert finished.stdout == ""


def test_asks_for_an_extra() -> None:
    finished = source_environment(PATH=os.environ["PATH"])
    assert finished.returncode != 0
    assert "usage: source launch/environment.sh" in finished.stderr
