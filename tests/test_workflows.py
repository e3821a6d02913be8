"""The workflows, hooks and wheels' settings that a host of the repository runs, as far as they can be checked here."""

from __future__ import annotations

import re
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from packaging.specifiers import SpecifierSet
from packaging.version import Version

from tests.test_package import pins, project

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

yaml = pytest.importorskip("yaml")

ROOT = Path(__file__).resolve().parents[1]
WORKFLOWS = sorted((ROOT / ".github/workflows").glob("*.yml"))
PYTHONS = ["3.10", "3.11", "3.12", "3.13"]


def read(path: Path) -> Any:
    return yaml.safe_load(path.read_text(encoding="utf-8"))


def jobs() -> Iterator[tuple[str, Any]]:
    for path in WORKFLOWS:
        for name, job in read(path)["jobs"].items():
            yield f"{path.name}, {name}", job


def steps() -> Iterator[tuple[str, Any]]:
    for where, job in jobs():
        for step in job["steps"]:
            yield where, step


def matrix() -> Any:
    return read(ROOT / ".github/workflows/ci.yml")["jobs"]["tests"]["strategy"]["matrix"]


def settings() -> Any:
    return tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))


def torch_pin() -> str:
    (pin,) = pins()["torch"].specifier
    return pin.version


def test_there_are_workflows() -> None:
    assert [path.name for path in WORKFLOWS] == ["ci.yml", "wheels.yml"]


def test_least_permissions_and_bounds() -> None:
    for path in WORKFLOWS:
        assert read(path)["permissions"] == {"contents": "read"}
        assert read(path)["concurrency"]["group"]
    for where, job in jobs():
        assert isinstance(job["timeout-minutes"], int), where
        asked = {name for name, right in job.get("permissions", {}).items() if right == "write"}
        assert asked == ({"id-token"} if where == "wheels.yml, publish" else set()), where


def test_actions_are_pinned_to_commits_and_say_which_version() -> None:
    """A version has one commit everywhere."""
    commits: dict[str, set[str]] = {}
    for path in WORKFLOWS:
        for line in path.read_text(encoding="utf-8").splitlines():
            if "uses:" in line:
                found = re.fullmatch(r" +-? ?uses: ([\w./-]+)@([0-9a-f]{40}) # v\d+\.\d+\.\d+", line)
                assert found is not None, line
                commits.setdefault(found[1], set()).add(found[2])
    assert {action for action, pinned in commits.items() if len(pinned) > 1} == set()
    for where, step in steps():
        if step.get("uses", "").startswith("actions/checkout"):
            assert step["with"]["persist-credentials"] is False, where


def test_every_python_of_the_package_is_tested_and_no_other() -> None:
    admitted = SpecifierSet(project()["requires-python"])
    assert [f"3.{minor}" for minor in range(20) if Version(f"3.{minor}") in admitted] == PYTHONS
    assert matrix()["python"] == PYTHONS
    rows = matrix()["include"]
    assert {row["python"] for row in rows} <= set(PYTHONS)
    named = {line.rpartition(" ")[2] for line in project()["classifiers"] if "Python :: 3." in line}
    assert named == set(PYTHONS)
    for where, step in steps():
        if step.get("uses", "").startswith("actions/setup-python"):
            version = step["with"]["python-version"]
            assert version == "${{ matrix.python }}" or version in PYTHONS, where
    built = settings()["tool"]["cibuildwheel"]["build"]
    assert built == [f"cp{version.replace('.', '')}-*" for version in (PYTHONS[0], PYTHONS[-1])]


def test_the_oldest_torch_and_the_pinned_one_are_tested() -> None:
    (dependency,) = project()["dependencies"]
    oldest = re.fullmatch(r"torch>=([\d.]+)", dependency)
    assert oldest is not None
    assert matrix()["torch"] == [torch_pin()]
    versions = {row.get("name"): row["torch"] for row in matrix()["include"]}
    assert Version(versions.pop("oldest torch")).release[:2] == Version(oldest[1]).release[:2]
    assert set(versions.values()) == {torch_pin()}


def test_systems() -> None:
    """The ones that wheels are built for are those that tests run on."""
    systems = {*matrix()["os"], *(row["os"] for row in matrix()["include"])}
    wheels = read(ROOT / ".github/workflows/wheels.yml")["jobs"]["wheels"]["strategy"]["matrix"]["os"]
    assert systems == set(wheels)
    assert any(system.startswith("macos") for system in systems)
    assert any(system.endswith("-arm") for system in systems)
    (without,) = (row for row in matrix()["include"] if row.get("library"))
    assert without["library"] == "none"


def test_files_that_are_called_exist() -> None:
    called = set()
    for _, step in steps():
        called |= set(re.findall(r"(?<![\w$/.])(?:launch|tests|\.mkdocs)[\w/]*\.(?:sh|py|yml|txt)", str(step)))
    assert {"tests/run.sh", "launch/environment.sh", "tests/wheel_smoke.py", "launch/constraints.txt"} <= called
    missing = {name for name in called if not (ROOT / name).is_file()}
    assert missing <= ({".mkdocs.yml"} if not (ROOT / ".mkdocs.yml").exists() else set())
    for path in WORKFLOWS:
        for pattern in read(path).get(True, {}).get("pull_request", {}).get("paths", []):  # "on" is true in YAML 1.1
            assert list(ROOT.glob(pattern.replace("/**", ""))), pattern


def test_extras_that_are_installed_exist() -> None:
    extras = {*project()["optional-dependencies"]}
    for where, step in steps():
        for asked in re.findall(r"source launch/environment\.sh ([\w ]+)", step.get("run", "")):
            known = extras | ({"docs"} if not (ROOT / ".mkdocs.yml").exists() else set())
            assert set(asked.split()) <= known, where


def test_what_is_installed_is_pinned() -> None:
    """Also of torch and what builds: the versions of launch/constraints.txt where that has them."""
    for where, step in steps():
        for line in re.findall(r"pip install (.*)", step.get("run", "")):
            names = [word for word in line.split() if not word.startswith("-") and "dist/" not in word]
            for word in names:
                if word == "wheel.cmake=true":
                    continue
                name, _, version = word.partition("==")
                assert version, f"{where}: {word}"
                if name in pins():
                    assert str(pins()[name].specifier) == f"=={version}", where
    assert settings()["tool"]["cibuildwheel"]["test-requires"] == [f"torch=={torch_pin()}"]


def test_hooks_have_the_versions_of_the_constraints() -> None:
    config = read(ROOT / ".pre-commit-config.yaml")
    (ruff,) = (repo for repo in config["repos"] if "ruff" in repo["repo"])
    assert {"ruff-check", "ruff-format"} <= {hook["id"] for hook in ruff["hooks"]}
    assert str(pins()["ruff"].specifier) == f"=={ruff['rev'].removeprefix('v')}"
    (local,) = (repo for repo in config["repos"] if repo["repo"] == "local")
    assert [hook["entry"] for hook in local["hooks"]] == ["python -m mypy"]  # that of the environment
    for repo in config["repos"]:
        assert repo["repo"] == "local" or re.fullmatch(r"v\d+\.\d+\.\d+", repo["rev"])


def test_wheels() -> None:
    """One without the library is an error, and torch's libgomp is not copied into one."""
    table = settings()["tool"]["cibuildwheel"]
    for where in (table, table["macos"]):
        assert where["config-settings"]["wheel.cmake"] == "true"
    assert "--exclude libgomp.so.1" in table["linux"]["repair-wheel-command"]
    assert table["macos"]["config-settings"]["cmake.define.LOWMEM_ADAM_OPENMP"] == "OFF"
    assert {table[f"manylinux-{kind}-image"] for kind in ("x86_64", "aarch64")} == {"manylinux_2_28"}
    assert (ROOT / table["test-command"].removeprefix("python {project}/")).is_file()
