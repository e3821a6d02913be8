"""The package as it is built and laid out: one version, a pure typed wheel, imports that point one way."""

import email
import json
import re
import subprocess
import sys
import zipfile
from pathlib import Path
from typing import Any

import pytest
from packaging.requirements import Requirement

from tests.import_arrows import PACKAGE, RANKS, wrong_arrows

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

ROOT = Path(__file__).resolve().parents[1]
EXTRAS = {"accelerate", "deepspeed", "bitsandbytes", "train", "bench", "test", "all"}
SOURCES = (".py", ".sh", ".cpp", ".h", ".inl")
MAX_LINES = 500


def project() -> dict[str, Any]:
    table: dict[str, Any] = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    return table


def pins() -> dict[str, Requirement]:
    lines = (ROOT / "launch/constraints.txt").read_text(encoding="utf-8").splitlines()
    pinned = [Requirement(line) for line in lines if line and not line.startswith("#")]
    return {pin.name: pin for pin in pinned if pin.marker is None or pin.marker.evaluate()}


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The wheel as pip builds it, without a network and with no program on the PATH: no compiler, no cmake."""
    folder = tmp_path_factory.mktemp("wheel")
    command = [sys.executable, "-m", "pip", "wheel", "--quiet", "--no-index", "--no-deps", "--no-build-isolation"]
    subprocess.run([*command, "--wheel-dir", str(folder), str(ROOT)], check=True, timeout=200, env={"PATH": ""})
    (built,) = folder.iterdir()
    return built


def wheel_text(wheel: Path, name: str) -> str:
    with zipfile.ZipFile(wheel) as archive:
        (member,) = (member for member in archive.namelist() if member.endswith(f".dist-info/{name}"))
        return archive.read(member).decode()


def test_wheel_is_pure_python(wheel: Path) -> None:
    assert wheel.name.endswith("-py3-none-any.whl")
    tags = email.message_from_string(wheel_text(wheel, "WHEEL"))
    assert tags.get_all("Tag") == ["py3-none-any"]
    assert tags["Root-Is-Purelib"] == "true"


def test_wheel_holds_the_package_and_nothing_else(wheel: Path) -> None:
    with zipfile.ZipFile(wheel) as archive:
        packed = {name for name in archive.namelist() if ".dist-info/" not in name}
        licenses = [name for name in archive.namelist() if name.endswith(".dist-info/licenses/LICENSE")]
    package = (path.relative_to(ROOT).as_posix() for path in (ROOT / PACKAGE).rglob("*.py"))
    assert packed == {*package, f"{PACKAGE}/py.typed"}
    assert licenses


def test_version_has_one_source(wheel: Path) -> None:
    written = re.findall(r'^__version__ = "(.+)"$', (ROOT / PACKAGE / "__init__.py").read_text(), flags=re.MULTILINE)
    assert len(written) == 1
    assert email.message_from_string(wheel_text(wheel, "METADATA"))["Version"] == written[0]
    assert "version" in project()["dynamic"]
    assert "version" not in project()
    elsewhere = [path for path in (ROOT / PACKAGE).rglob("*.py") if f'"{written[0]}"' in path.read_text()]
    assert elsewhere == [ROOT / PACKAGE / "__init__.py"]
    assert f"[{written[0]}]" in (ROOT / "CHANGELOG.md").read_text(encoding="utf-8")


def test_torch_is_the_only_hard_dependency(wheel: Path) -> None:
    required = email.message_from_string(wheel_text(wheel, "METADATA")).get_all("Requires-Dist", [])
    assert [name for name in required if "extra ==" not in name] == ["torch>=2.9"]


def test_extras() -> None:
    extras = project()["optional-dependencies"]
    assert set(extras) == EXTRAS
    (everything,) = extras["all"]
    assert Requirement(everything).extras == EXTRAS - {"all"}


def test_constraints_pin_exactly_and_admit_what_the_extras_ask() -> None:
    pinned = pins()
    assert all(len(pin.specifier) == 1 and str(pin.specifier).startswith("==") for pin in pinned.values())
    extras = {name: lines for name, lines in project()["optional-dependencies"].items() if name != "all"}
    for line in [*project()["dependencies"], *(line for lines in extras.values() for line in lines)]:
        asked = Requirement(line)
        if asked.marker is None or asked.marker.evaluate():
            (pin,) = pinned[asked.name].specifier
            assert asked.specifier.contains(pin.version), f"{line} does not admit {pin}"


def test_environment_installs_the_pinned_torch() -> None:
    named = set(re.findall(r"torch==?\s?([\d.]+\d)", (ROOT / "launch/environment.sh").read_text(encoding="utf-8")))
    assert {f"=={version}" for version in named} == {str(pins()["torch"].specifier)}


def test_imports_point_one_way() -> None:
    assert wrong_arrows(ROOT / PACKAGE) == []


@pytest.mark.parametrize(
    "files",
    [
        {"layout.py": "from lowmem_adam.codec import encode"},
        {"layout.py": "import lowmem_adam.codec"},
        {"layout.py": "from lowmem_adam import codec"},
        {"layout.py": "from .codec import encode"},
        {"layout.py": "from . import codec"},
        {"layout.py": "def lazily():\n    from .codec import encode"},
        {"codec.py": "from lowmem_adam import AdamW8bit"},
        {"codec.py": "import lowmem_adam"},
        {"kernels/cpu.py": "from ..optimizer import AdamW8bit"},
        {"kernels/__init__.py": "from ..shard import cut"},
        {"kernels/__init__.py": "from lowmem_adam.offload import HostBuffer"},
        {"shard.py": "from . import checkpoint", "checkpoint.py": "from .shard import cut"},
        {"optimizer.py": "from .integrations import deepspeed"},
        {"layout.py": "from .helpers import ceil_div"},
        {"helpers.py": ""},
    ],
)
def test_wrong_arrow_is_found(files: dict[str, str], tmp_path: Path) -> None:
    write_package(tmp_path, files)
    assert len(wrong_arrows(tmp_path)) == len(files)


def test_right_arrows_pass(tmp_path: Path) -> None:
    files = {
        "__init__.py": "from lowmem_adam.optimizer import AdamW8bit",
        "layout.py": "import math",
        "codec.py": "from lowmem_adam import layout",
        "kernels/__init__.py": "from . import reference\nfrom .. import codec",
        "kernels/reference.py": "from ..layout import blocks",
        "checkpoint.py": "from .shard import cut",
        "optimizer.py": "from .kernels.reference import step",
        "integrations/deepspeed.py": "from lowmem_adam import AdamW8bit",
        "cli.py": "from . import plan, profile",
    }
    write_package(tmp_path, files)
    assert wrong_arrows(tmp_path) == []
    assert {Path(name).parts[0].removesuffix(".py") for name in files} <= {*RANKS, "__init__"}


def write_package(folder: Path, files: dict[str, str]) -> None:
    for name, text in files.items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text, encoding="utf-8")


def test_source_files_stay_short() -> None:
    folders = [ROOT / name for name in (PACKAGE, "launch", "tests", "benchmarks")]
    sources = [path for folder in folders for path in folder.rglob("*") if path.suffix in SOURCES]
    lengths = {str(path.relative_to(ROOT)): len(path.read_text(encoding="utf-8").splitlines()) for path in sources}
    assert lengths
    assert {path: length for path, length in lengths.items() if length > MAX_LINES} == {}


def test_importing_the_package_imports_no_optional_package() -> None:
    """In a fresh interpreter: what is loaded after `import lowmem_adam` and was not after `import torch`."""
    program = (
        "import json, sys, torch\n"
        "before = {name.partition('.')[0] for name in sys.modules}\n"
        "import lowmem_adam\n"
        "print(json.dumps(sorted({name.partition('.')[0] for name in sys.modules} - before)))\n"
    )
    command = [sys.executable, "-c", program]
    finished = subprocess.run(command, check=True, timeout=200, cwd=ROOT, capture_output=True, text=True)
    loaded = {name for name in json.loads(finished.stdout) if name not in sys.stdlib_module_names}
    # An editable install may load a finder of its own, named after the package.
    assert {name for name in loaded if PACKAGE not in name} == set()
    assert PACKAGE in loaded
