"""What all commands of ``lowmem-adam`` have in common: exit codes, JSON, help, bars, and how they are ended."""

from __future__ import annotations

import errno
import json
import os
import re
import shlex
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("typer")
pytest.importorskip("rich")

import typer
from rich.progress import Progress
from typer.testing import CliRunner

from lowmem_adam import AdamW8bit, __version__, converting
from lowmem_adam import plan as planning
from lowmem_adam.cli import app
from lowmem_adam.commands import outcome, progress
from tests.test_cli import run

ROOT = Path(__file__).resolve().parents[1]
GROUP: Any = typer.main.get_command(app)
COMMANDS: dict[str, Any] = GROUP.commands


def on_shell(*arguments: str, **variables: str) -> Any:
    """A command in this process, which takes a tenth of the time of one of its own."""
    return CliRunner().invoke(app, arguments, env={"COLUMNS": "80", **variables})


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """With a checkpoint that is whole, one that is cut off, one with a fault, and two configs."""
    param = torch.nn.Parameter(torch.ones(64, 128))
    opt = AdamW8bit([param])
    param.grad = torch.ones_like(param)
    opt.step()
    torch.save(opt.state_dict(), tmp_path / "good.pt")
    (tmp_path / "cut.pt").write_bytes((tmp_path / "good.pt").read_bytes()[:2000])
    state_dict = opt.state_dict()
    state_dict["param_groups"][0]["lr"] = float("nan")
    torch.save(state_dict, tmp_path / "fault.pt")
    torch.save({"optimizer": opt.state_dict()}, tmp_path / "inside.pt")
    config = {"optimizer": {"type": "AdamW8bit", "params": {"lr": 1e-3}}, "zero_optimization": {"stage": 1}}
    (tmp_path / "bad.json").write_text(json.dumps(config), encoding="utf-8")
    config["zero_allow_untested_optimizer"] = True
    (tmp_path / "good.json").write_text(json.dumps(config), encoding="utf-8")
    (tmp_path / "no.json").write_text("{", encoding="utf-8")
    return tmp_path


RUNS = {
    0: [
        "info",
        "plan --parameters 1e6",
        "plan --parameters 1e6 --fits 1",
        "profile --shapes 4x4 --steps 2",
        "check-config good.json",
        "convert good.pt -o new.pt --to torch",
        "verify good.pt",
        "--version",
        "--help",
    ],
    1: [
        "plan --parameters 8B --fits 1",
        "check-config bad.json",
        "convert cut.pt -o new.pt --to torch",
        "convert good.json -o new.pt",
        "verify cut.pt",
        "verify fault.pt",
        "verify good.json",
    ],
    2: [
        "info --xml",
        "nonsense",
        "plan",
        "plan none.json",
        "plan no.json",
        "plan --parameters many",
        "plan --parameters 8B --world-size two",
        "profile --shapes 4x4 --moments 7bit",
        "profile --shapes 4x4 --steps 2 --output-dir good.pt",
        "check-config",
        "check-config none.json",
        "check-config no.json",
        "check-config .",
        "convert good.pt",
        "convert none.pt -o new.pt",
        "convert good.pt -o new.pt --to numpy",
        "convert good.pt -o new.pt --nonfinite maybe",
        "convert good.pt -o new.pt --optimizer SGD",
        "convert good.pt -o new.pt --seed -1",
        "convert good.pt -o fault.pt --to torch",
        "convert good.pt -o good.pt --to torch --force",
        "convert good.pt -o nowhere/new.pt --to torch",
        "convert inside.pt -o new.pt --to torch",
        "verify none.pt",
        "verify .",
        "verify inside.pt",
        "verify inside.pt --key model",
        "verify",
    ],
}


@pytest.mark.parametrize(("code", "words"), [(code, words) for code, runs in RUNS.items() for words in runs])
def test_exit_codes(code: int, words: str, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(folder)
    before = {path.name: path.read_bytes() for path in folder.iterdir()}
    finished = on_shell(*shlex.split(words))
    assert finished.exit_code == code, finished.output
    assert "Traceback" not in finished.output
    if code == outcome.DONE:
        assert (finished.stdout != "", finished.stderr) == (True, "")
    else:  # whatever was there is as it was, and nothing is beside it
        assert {path.name: path.read_bytes() for path in folder.iterdir()} == before
    if code == outcome.NOT_DONE:
        assert finished.stdout == ""
        assert finished.stderr.strip()


def test_exit_codes_are_documented() -> None:
    text = (ROOT / "docs/command_line.md").read_text(encoding="utf-8")
    rows = dict(re.findall(r"^\| (\d+) \| (.+) \|$", text, flags=re.MULTILINE))
    assert {int(code): words for code, words in rows.items()} == outcome.EXIT_CODES
    for name in COMMANDS:
        assert f"| `lowmem-adam {name}` | {COMMANDS[name].short_help} " in text


def test_a_fault_of_the_program_is_no_answer(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*_: object) -> None:
        raise ZeroDivisionError("a bug")

    monkeypatch.setattr(planning, "plan", broken)
    finished = on_shell("plan", "--parameters", "8B")
    assert finished.exit_code == outcome.FAULT
    for words in ("Traceback", "a bug", "please report"):
        assert words in finished.stderr


def test_no_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: object) -> None:
        raise torch.OutOfMemoryError("no memory for it")

    monkeypatch.setattr(planning, "plan", full)
    finished = on_shell("plan", "--parameters", "8B")
    assert (finished.exit_code, finished.stderr) == (outcome.NOT_DONE, "lowmem-adam: no memory for it\n")


@pytest.fixture
def without_permissions(folder: Path) -> Iterator[Path]:
    """A folder that this process may neither read nor write in; root gives its rights away meanwhile."""
    for path in (folder / "good.pt", folder / "good.json"):
        path.chmod(0)
    folder.chmod(0o555)
    root = hasattr(os, "geteuid") and os.geteuid() == 0
    if root:
        for name in ("info", "plan", "profile", "check-config", "convert", "verify"):  # what they import, while it may
            on_shell(name, "--help")
        for above in folder.parents[:3]:
            above.chmod(above.stat().st_mode | 0o055)
        os.seteuid(65534)
    try:
        yield folder
    finally:
        if root:
            os.seteuid(0)
        folder.chmod(0o755)


@pytest.mark.parametrize(
    "words",
    [
        "plan good.json",
        "check-config good.json",
        "verify good.pt",
        "convert good.pt -o new.pt",
        "convert fault.pt -o new.pt",
        "profile --shapes 4x4 --steps 2 --output-dir new",
    ],
)
def test_no_permission(words: str, without_permissions: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    if words.startswith("profile"):
        pytest.importorskip("matplotlib")
    monkeypatch.chdir(without_permissions)
    finished = on_shell(*words.split())
    assert finished.exit_code == outcome.NOT_DONE, finished.output
    assert "Permission denied" in finished.stderr
    assert (finished.stdout, "Traceback" in finished.stderr) == ("", False)


# ---------------------------------------------------------------- JSON


@pytest.mark.parametrize(
    ("words", "code"),
    [
        ("info", 0),
        ("plan --parameters 1e6", 0),
        ("plan --parameters 8B --fits 1", 1),
        ("profile --shapes 4x4 --steps 2", 0),
        ("check-config good.json", 0),
        ("check-config bad.json", 1),
        ("convert good.pt -o new.pt --to torch", 0),
        ("verify good.pt", 0),
        ("verify fault.pt", 1),
        ("verify cut.pt", 1),
    ],
)
def test_json_is_one_object(words: str, code: int, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refused(name: str) -> None:
        raise AssertionError(f"{name} is no JSON")

    monkeypatch.chdir(folder)
    finished = on_shell(*words.split(), "--json")
    assert (finished.exit_code, finished.stderr) == (code, "")
    told = json.loads(finished.stdout, parse_constant=refused)
    assert isinstance(told, dict)
    if words.startswith(("verify", "check-config")):
        assert told["holds"] is (code == 0)
    if words == "verify fault.pt":
        assert told["groups"][0]["lr"] == "nan"
    if words.startswith("convert"):
        assert (told["output"], told["kind"], told["to"]) == ("new.pt", "lowmem_adam", "torch")


def test_version() -> None:
    assert on_shell("--version").stdout == f"lowmem-adam {__version__}\n"


# ---------------------------------------------------------------- help


@pytest.mark.parametrize("name", COMMANDS)
def test_help_at_80_columns(name: str) -> None:
    command = COMMANDS[name]
    finished = on_shell(name, "--help", TERMINAL_WIDTH="80")
    assert finished.exit_code == 0
    lines = finished.stdout.splitlines()
    assert max(map(len, lines)) <= 80
    text = " ".join(line.strip("│ ") for line in lines)
    panels: dict[str | None, int] = {}
    for param in command.params:
        if param.param_type_name == "option":
            assert all(option in text for option in param.opts)
            assert param.help
            panel = getattr(param, "rich_help_panel", None)
            panels[panel] = panels.get(panel, 0) + 1
    assert max(panels.values()) <= 9
    assert len(panels) > 1 or sum(panels.values()) <= 8
    for code in outcome.EXIT_CODES:
        assert re.search(rf"^ +{code}  \w", finished.stdout, flags=re.MULTILINE), code
    assert all(f"   lowmem-adam {name}" in line for line in lines if line.startswith("   lowmem-adam"))


@pytest.mark.parametrize("name", COMMANDS)
def test_examples_are_accepted(name: str) -> None:
    """As far as the command line is read: the files of the examples are not there."""
    lines = [line.strip() for line in COMMANDS[name].epilog.splitlines()]
    examples = [line for line in lines if line.startswith("lowmem-adam ")]
    assert examples
    for example in examples:
        _, command, *arguments = shlex.split(example)
        assert command == name
        COMMANDS[name].make_context(name, arguments)


def test_help_tells_which_command_answers_what() -> None:
    finished = on_shell("--help", TERMINAL_WIDTH="80")
    text = " ".join(line.strip("│ ") for line in finished.stdout.splitlines())
    for name, command in COMMANDS.items():
        assert command.short_help.endswith("?")
        assert re.search(rf"{name} +{re.escape(command.short_help)}", text), name


# ---------------------------------------------------------------- bars


def all_of(terminal: int) -> str:
    """What is written to it until nobody has it open any more, which is an error on Linux and an end elsewhere."""
    read = b""
    with os.fdopen(terminal, "rb", buffering=0) as file:
        try:
            while data := file.read(1 << 16):
                read += data
        except OSError as error:
            if error.errno != errno.EIO:
                raise
    return read.decode()


def test_bars_are_on_a_terminal_only(folder: Path) -> None:
    """Also for the last write; what is piped on has none."""
    pty = pytest.importorskip("pty")
    program = "from lowmem_adam.cli import app; app()"
    command = [sys.executable, "-c", program, "convert", "good.pt", "-o", "new.pt", "--to", "torch", "--json"]
    path = os.pathsep.join(filter(None, (str(ROOT), os.environ.get("PYTHONPATH"))))
    env = {**os.environ, "COLUMNS": "80", "TERM": "xterm", "PYTHONPATH": path}
    ours, theirs = pty.openpty()
    process = subprocess.Popen(command, env=env, cwd=folder, stdout=subprocess.PIPE, stderr=theirs)
    os.close(theirs)
    shown = all_of(ours)
    stdout, _ = process.communicate(timeout=120)
    assert process.returncode == 0, shown
    assert json.loads(stdout)["output"] == "new.pt"
    for words in ("converting", "writing", "100%"):
        assert words in shown
    piped = subprocess.run([*command, "--force"], env=env, cwd=folder, capture_output=True, timeout=120)
    assert (piped.returncode, piped.stderr) == (0, b"")


def test_what_bars_are_told(folder: Path) -> None:
    told: dict[str, list[tuple[int, int]]] = {"elements": [], "bytes": []}
    converting.convert(
        [folder / "good.pt"],
        folder / "new.pt",
        "torch",
        progress=lambda *numbers: told["elements"].append(numbers),
        writing=lambda *numbers: told["bytes"].append(numbers),
    )
    assert told["elements"] == [(0, 8192), (8192, 8192)]
    done = [number for number, _ in told["bytes"]]
    assert done == sorted(done)
    assert {there for _, there in told["bytes"]} == {2 * 4 * 8192 + 4}  # two moments and a step
    assert done[-1] == 2 * 4 * 8192 + 4


def test_later_bars_are_not_there_before_their_work(monkeypatch: pytest.MonkeyPatch) -> None:
    made: list[Any] = []

    class Watched(Progress):
        def __init__(self, *arguments: Any, **named: Any) -> None:
            super().__init__(*arguments, **named)
            made.append(self)

    monkeypatch.setattr(progress, "Progress", Watched)
    with progress.shown("first", "second") as (_, second):
        (bars,) = made
        assert [task.visible for task in bars.tasks] == [True, False]
        second(1, 3)
        assert [task.visible for task in bars.tasks] == [True, True]
        assert (bars.tasks[1].completed, bars.tasks[1].total) == (1, 3)


# ---------------------------------------------------------------- ended from outside


ENDED = """
import os, signal, sys
from lowmem_adam import checkpoint
from lowmem_adam.cli import app

signal.signal(signal.SIGINT, signal.default_int_handler)  # as in a shell's foreground
write = checkpoint._Counted.write

def written(self, data):
    count = write(self, data)
    if self._nbytes > 30000:  # in the midst of the output
        print(*os.listdir(), flush=True)
        os.kill(os.getpid(), int(sys.argv.pop()))
    return count

checkpoint._Counted.write = written
number = sys.argv.pop()
sys.argv.append(number)
app(["convert", "good.pt", "-o", "new.pt", "--to", "torch", "--force"])
"""


@pytest.mark.skipif(os.name != "posix", reason="needs signals")
@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_ended_by_a_signal(number: int, code: int, folder: Path) -> None:
    (folder / "new.pt").write_text("what was there")
    before = sorted(path.name for path in folder.iterdir())
    path = os.pathsep.join(filter(None, (str(ROOT), os.environ.get("PYTHONPATH"))))
    command = [sys.executable, "-c", ENDED, str(int(number))]
    env = {**os.environ, "PYTHONPATH": path}
    finished = subprocess.run(command, env=env, cwd=folder, capture_output=True, text=True, timeout=120)
    assert finished.returncode == code, finished.stderr
    words = {130: "interrupted", 143: "terminated"}[code]
    assert finished.stderr == f"lowmem-adam: {words}\n"
    assert ".new.pt." in finished.stdout  # it was being written
    assert sorted(path.name for path in folder.iterdir()) == before
    assert (folder / "new.pt").read_text() == "what was there"


@pytest.mark.skipif(os.name != "posix", reason="needs pipes as those of POSIX")
@pytest.mark.parametrize("words", ["plan --parameters 8B", "info", "plan --help", "--help", "info --json", "--version"])
def test_output_that_nobody_reads(words: str) -> None:
    reading, writing = os.pipe()
    os.close(reading)
    program = "import sys; from lowmem_adam.cli import app; sys.argv[0] = 'lowmem-adam'; app()"
    path = os.pathsep.join(filter(None, (str(ROOT), os.environ.get("PYTHONPATH"))))
    finished = subprocess.run(
        [sys.executable, "-c", program, *words.split()],
        env={**os.environ, "PYTHONPATH": path},
        stdout=writing,
        stderr=subprocess.PIPE,
        text=True,
        timeout=120,
    )
    os.close(writing)
    assert (finished.returncode, finished.stderr) == (outcome.CLOSED, "")


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs /dev/full")
@pytest.mark.parametrize("words", ["info --json", "plan --parameters 8B"])
def test_output_without_room(words: str) -> None:
    program = "import sys; from lowmem_adam.cli import app; sys.argv[0] = 'lowmem-adam'; app()"
    path = os.pathsep.join(filter(None, (str(ROOT), os.environ.get("PYTHONPATH"))))
    with open("/dev/full", "w") as full:
        finished = subprocess.run(
            [sys.executable, "-c", program, *words.split()],
            env={**os.environ, "PYTHONPATH": path},
            stdout=full,
            stderr=subprocess.PIPE,
            text=True,
            timeout=120,
        )
    assert finished.returncode == outcome.NOT_DONE
    assert "No space left on device" in finished.stderr
    assert "Traceback" not in finished.stderr


LITTLE_ROOM = """
import resource, signal, sys
import lowmem_adam.cli

signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
resource.setrlimit(resource.RLIMIT_FSIZE, (40000, 40000))
lowmem_adam.cli.app(sys.argv[1:])
"""


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="needs RLIMIT_FSIZE of Linux")
@pytest.mark.parametrize(
    "words", ["convert good.pt -o new.pt --to torch", "profile --shapes 4x4 --steps 40 --output-dir new"]
)
def test_disk_without_room(words: str, folder: Path) -> None:
    if words.startswith("profile"):
        pytest.importorskip("matplotlib")
        (folder / "new").mkdir()
    before = sorted(str(path) for path in folder.rglob("*"))
    path = os.pathsep.join(filter(None, (str(ROOT), os.environ.get("PYTHONPATH"))))
    command = [sys.executable, "-c", LITTLE_ROOM, *words.split()]
    env = {**os.environ, "PYTHONPATH": path}
    finished = subprocess.run(command, env=env, cwd=folder, capture_output=True, text=True, timeout=120)
    assert finished.returncode == outcome.NOT_DONE, finished.stderr
    assert "File too large" in finished.stderr
    assert "Traceback" not in finished.stderr
    assert sorted(str(path) for path in folder.rglob("*")) == before


def test_run_in_a_process_of_its_own_ends_with_the_same_codes() -> None:
    for words, code in (("plan --parameters 8B --fits 1", 1), ("plan --fits", 2), ("--version", 0)):
        assert run(*words.split()).returncode == code
