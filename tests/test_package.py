"""The package as it is built and laid out: one version, typed wheels, imports that point one way.

The wheel with the native library is looked at in test_native_isas.py, which builds it.
"""

import email
import json
import os
import re
import shutil
import subprocess
import sys
import tarfile
import zipfile
from collections.abc import Mapping
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
TOOLS = {"accelerate", "bitsandbytes", "deepspeed", "integrations", "lightning", "transformers"}
EXTRAS = TOOLS | {"cli", "train", "bench", "docs", "test", "all"}
SOURCES = (".py", ".sh", ".cpp", ".h", ".inl")
MAX_LINES = 500


def project() -> dict[str, Any]:
    table: dict[str, Any] = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    return table


def pins() -> dict[str, Requirement]:
    lines = (ROOT / "launch/constraints.txt").read_text(encoding="utf-8").splitlines()
    pinned = [Requirement(line) for line in lines if line and not line.startswith("#")]
    return {pin.name: pin for pin in pinned if pin.marker is None or pin.marker.evaluate()}


def run(command: list[str], env: Mapping[str, str], cwd: Path = ROOT, timeout: float = 280) -> None:
    finished = subprocess.run(command, timeout=timeout, cwd=cwd, env=env, capture_output=True, text=True)
    assert finished.returncode == 0, finished.stdout + finished.stderr


def build_wheel(folder: Path, env: Mapping[str, str], *settings: str, timeout: float = 280) -> Path:
    """As pip builds it, without a network."""
    command = [sys.executable, "-m", "pip", "wheel", "--quiet", "--no-index", "--no-deps", "--no-build-isolation"]
    options = [f"--config-settings={setting}" for setting in settings]
    run([*command, *options, "--wheel-dir", str(folder), str(ROOT)], env, timeout=timeout)
    (built,) = folder.iterdir()
    return built


def run_backend(hook: str, argument: Path, env: Mapping[str, str], cwd: Path, **settings: str) -> None:
    program = f"import sys; from lowmem_adam_backend import {hook}; {hook}(sys.argv[1], {settings!r})"
    run([sys.executable, "-c", program, str(argument)], {**env, "PYTHONPATH": str(cwd / ".build_backend")}, cwd)


# What a machine may lack. No program is on the PATH in either case, but cmake and ninja may lie beside this Python.
LACKS = {
    "cmake": {"PATH": "", "CMAKE_EXECUTABLE": "/nonexistent/cmake"},
    "compiler": {"PATH": "", "CXX": "/nonexistent/c++"},
}


@pytest.fixture(scope="module", params=LACKS)
def wheel(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The wheel where the native library cannot be built."""
    return build_wheel(tmp_path_factory.mktemp("wheel"), LACKS[request.param])


@pytest.fixture(scope="module")
def compiler() -> None:
    if not any(shutil.which(name) for name in (os.environ.get("CXX", "c++"), "g++", "clang++")):
        pytest.skip("needs a C++ compiler, and there is none on the PATH")


def wheel_text(wheel: Path, name: str) -> str:
    with zipfile.ZipFile(wheel) as archive:
        (member,) = (member for member in archive.namelist() if member.endswith(f".dist-info/{name}"))
        return archive.read(member).decode()


def packed_files(wheel: Path) -> set[str]:
    with zipfile.ZipFile(wheel) as archive:
        return {name for name in archive.namelist() if ".dist-info/" not in name}


def package_files() -> set[str]:
    return {f"{PACKAGE}/py.typed", *(path.relative_to(ROOT).as_posix() for path in (ROOT / PACKAGE).rglob("*.py"))}


def test_wheel_without_the_library_is_pure_python(wheel: Path) -> None:
    assert wheel.name.endswith("-py3-none-any.whl")
    tags = email.message_from_string(wheel_text(wheel, "WHEEL"))
    assert tags.get_all("Tag") == ["py3-none-any"]
    assert tags["Root-Is-Purelib"] == "true"


def test_wheel_holds_the_package_and_nothing_else(wheel: Path) -> None:
    """Not the library either that an editable install has put among the sources."""
    assert packed_files(wheel) == package_files()
    assert wheel_text(wheel, "licenses/LICENSE")


def copy_of_sources(folder: Path) -> Path:
    """What an install reads, without what earlier ones left."""
    for name in (PACKAGE, ".build_backend"):
        ignored = shutil.ignore_patterns("__pycache__", "*.so", "*.dylib")
        shutil.copytree(ROOT / name, folder / name, ignore=ignored)
    for name in ("pyproject.toml", "README.md", "LICENSE", ".gitignore"):
        shutil.copy(ROOT / name, folder / name)
    return folder


@pytest.mark.usefixtures("compiler")
def test_editable_install_puts_the_library_among_the_sources(tmp_path: Path) -> None:
    """And nothing else, and as a file of its own: a process may be running the one that was there."""
    sources, wheels = copy_of_sources(tmp_path / "sources"), tmp_path / "wheels"
    native = sources / PACKAGE / "native"
    for path in native.glob("*.cpp"):
        path.write_text("")  # where it goes does not depend on what is in it
    library = native / f"liblowmem_adam.{'dylib' if sys.platform == 'darwin' else 'so'}"
    library.write_bytes(b"of other sources")
    (tmp_path / "in_use").hardlink_to(library)
    before = set(sources.rglob("*"))
    run_backend(
        "build_editable", wheels, {**os.environ, "PYTHONDONTWRITEBYTECODE": "1"}, sources, **{"wheel.cmake": "true"}
    )
    assert set(sources.rglob("*")) == before
    assert len(library.read_bytes()) > 1000
    assert (tmp_path / "in_use").read_bytes() == b"of other sources"


def test_editable_install_leaves_no_library_of_other_sources(tmp_path: Path) -> None:
    sources, wheels = copy_of_sources(tmp_path / "sources"), tmp_path / "wheels"
    old = sources / PACKAGE / "native" / "liblowmem_adam.so"
    old.write_bytes(b"of other sources")
    run_backend("build_editable", wheels, LACKS["compiler"], sources)
    (built,) = wheels.iterdir()
    assert built.name.endswith("-py3-none-any.whl")
    assert not old.exists()


def test_library_that_was_asked_for_must_be_built(tmp_path: Path) -> None:
    """And where it cannot, the error says why."""
    with pytest.raises(AssertionError, match=r"/nonexistent/c\+\+"):
        build_wheel(tmp_path, LACKS["compiler"], "wheel.cmake=true")


def test_source_distribution_can_build_the_library(tmp_path: Path) -> None:
    run_backend("build_sdist", tmp_path, {"PATH": ""}, ROOT)
    (built,) = tmp_path.iterdir()
    with tarfile.open(built) as archive:
        packed = {name.partition("/")[2] for name in archive.getnames()}
    native = {path.name for path in (ROOT / PACKAGE / "native").iterdir() if path.suffix in {".cpp", ".h", ".txt"}}
    assert {f"{PACKAGE}/native/{name}" for name in native} <= packed
    assert ".build_backend/lowmem_adam_backend.py" in packed
    assert [name for name in packed if name.endswith((".so", ".dylib"))] == []


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
    named = set(
        re.findall(r"LOWMEM_ADAM_TORCH:-([\d.]+\d)", (ROOT / "launch/environment.sh").read_text(encoding="utf-8"))
    )
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
        {"shard.py": "from . import resharding", "resharding.py": "from .shard import cut"},
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
        "resharding.py": "from .shard import cut",
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
    folders = [ROOT / name for name in (PACKAGE, ".build_backend", "launch", "tests", "benchmarks")]
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
