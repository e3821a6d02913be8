"""The documentation: links lead somewhere, pages can be found, code in them is code, options and keywords exist.

Nothing is fetched, and mkdocs is needed by one test only, which builds the site.
"""

from __future__ import annotations

import ast
import importlib
import importlib.util
import inspect
import os
import pkgutil
import re
import subprocess
import sys
import textwrap
from collections.abc import Iterator
from pathlib import Path
from urllib.parse import unquote

import pytest

import lowmem_adam
from lowmem_adam import Adam8bit

ROOT = Path(__file__).resolve().parents[1]
DOCS = sorted((ROOT / "docs").glob("*.md"))
PAGES = [
    ROOT / "README.md",
    ROOT / "CHANGELOG.md",
    *DOCS,
    *sorted(path for name in ("launch", "benchmarks", "tests", ".github") for path in (ROOT / name).rglob("*.md")),
]
LINK = re.compile(r"\]\((?![a-z]+:)([^)\s#]*)(#[^)\s]*)?\)")
HEADING = re.compile(r"^#{1,6} +(.+?) *$")
FENCE = re.compile(r"^( *)```(\w*) *$")
COMMAND = re.compile(r"(?:^ *|`)lowmem-adam ([a-z][a-z-]*)((?:\\\n|[^`\n|])*)", re.MULTILINE)


def name_of(page: Path) -> str:
    return page.relative_to(ROOT).as_posix()


def text_of(page: Path) -> str:
    return page.read_text(encoding="utf-8")


# ---------------------------------------------------------------- what is in a page


def prose(text: str) -> str:
    """The page without its blocks of code."""
    lines, fenced = [], False
    for line in text.splitlines():
        if FENCE.match(line):
            fenced = not fenced
        elif not fenced:
            lines.append(line)
    assert not fenced, "a block of code has no end"
    return "\n".join(lines)


def blocks(text: str, language: str) -> Iterator[str]:
    """The code of all blocks in a language, without the indentation they have in lists."""
    lines: list[str] | None = None
    for line in text.splitlines():
        fence = FENCE.match(line)
        if lines is not None and fence:
            yield textwrap.dedent("\n".join(lines))
            lines = None
        elif lines is not None:
            lines.append(line)
        elif fence and fence[2] == language:
            lines = []
        elif fence:
            lines = None


def anchors(text: str) -> set[str]:
    """What GitHub calls the headings of a page."""
    found: set[str] = set()
    for line in prose(text).splitlines():
        heading = HEADING.match(line)
        if heading:
            words = re.sub(r"\]\([^)]*\)", "]", heading[1])
            slug = re.sub(r"[^\w\- ]", "", words.lower()).replace(" ", "-")
            numbered = slug
            count = 0
            while numbered in found:
                count += 1
                numbered = f"{slug}-{count}"
            found.add(numbered)
    return found


def links(page: Path, text: str) -> Iterator[tuple[str, Path, str]]:
    """Each relative link as it stands there, the file it leads to, and its anchor."""
    for link in LINK.finditer(re.sub(r"`[^`\n]*`", "", prose(text))):
        target = page if not link[1] else Path(os.path.normpath(page.parent / unquote(link[1])))
        yield link[0][2:-1], target, (link[2] or "")[1:]


def broken_links(page: Path, text: str) -> list[str]:
    """Those that lead nowhere."""
    broken = []
    for link, target, anchor in links(page, text):
        if not target.exists():
            broken.append(f"{link}: there is no {target}")
        elif not target.is_relative_to(ROOT):
            broken.append(f"{link}: leaves the repository")
        elif anchor and target.suffix == ".md" and anchor not in anchors(text_of(target) if target != page else text):
            broken.append(f"{link}: {target.name} has no such heading")
    return broken


# ---------------------------------------------------------------- links


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_links_lead_somewhere(page: Path) -> None:
    assert broken_links(page, text_of(page)) == []


@pytest.mark.parametrize(
    "text",
    [
        "[a](nowhere.md)",
        "![a](../benchmarks/results/nowhere.png)",
        "[a](gpu.md#nowhere)",
        "# Here\n[a](#there)",
        "```bash\n# here\n```\n[a](#here)",
        "[a](../../elsewhere)",
    ],
)
def test_broken_link_is_found(text: str) -> None:
    assert len(broken_links(ROOT / "docs/plan.md", text)) == 1


def test_right_links_pass() -> None:
    text = "# Who *is* `x_y`?\n# Again\n# Again\n[a](#who-is-x_y) [b](#again-1) [c](gpu.md#in-a-cuda-graph) `[d](e)`"
    assert broken_links(ROOT / "docs/plan.md", text) == []
    assert len(list(links(ROOT / "docs/plan.md", text))) == 3


def test_every_page_is_two_clicks_from_the_readme() -> None:
    start = ROOT / "README.md"
    reached, last = {start}, {start}
    for _ in range(2):
        last = {target for page in last if page.suffix == ".md" for _, target, _ in links(page, text_of(page))}
        reached |= last
    assert [name_of(page) for page in DOCS if page not in reached] == []


@pytest.mark.parametrize("page", ["migration.md", "bitsandbytes.md", "troubleshooting.md"])
def test_what_a_newcomer_looks_for_is_one_click_away(page: str) -> None:
    start = ROOT / "README.md"
    assert ROOT / "docs" / page in {target for _, target, _ in links(start, text_of(start))}


def navigation() -> list[str]:
    """The pages in the site's navigation, read without YAML, of which mkdocs has tags of its own."""
    _, found, nav = text_of(ROOT / ".mkdocs.yml").partition("\nnav:\n")
    assert found
    return re.findall(r"^ +- (?:.+: )?(\S+\.md)$", nav, flags=re.MULTILINE)


def test_every_page_is_in_the_navigation_once() -> None:
    nav = navigation()
    assert sorted(nav) == sorted(set(nav))
    assert {name_of(page).removeprefix("docs/") for page in DOCS} <= set(nav)
    outside = {"overview.md": "README.md"}
    for page in nav:
        assert (ROOT / "docs" / page).exists() or (ROOT / outside.get(page, page)).exists(), page


def merged_lines(text: str) -> list[str]:
    """Lines at which GitHub begins a list, a table or a block of code and mkdocs' Markdown does not.

    That wants an empty line before them, and within a list an indentation of four blanks.
    """
    found, before, fenced = [], "", False
    for line in text.splitlines():
        fence = FENCE.match(line)
        item = re.match(r"( *)([*-]|\d+\.) ", line)
        starts = [
            fence is not None and (bool(before.strip()) or len(fence[1]) % 4 > 0),
            item is not None and (len(item[1]) % 4 > 0 or not re.match(r"$| |[*-] |\d+\. ", before)),
            line.startswith("|") and before != "" and not before.startswith("|"),
        ]
        if any(starts) and not fenced:
            found.append(line)
        fenced ^= fence is not None
        before = line
    return found


@pytest.mark.parametrize("page", [path for path in PAGES if path.parent.name != "results"], ids=name_of)
def test_pages_read_alike_on_github_and_in_the_site(page: Path) -> None:
    text = re.sub(r"^::: .*\n(    .*\n)*", "", text_of(page), flags=re.MULTILINE)
    assert merged_lines(text) == []


@pytest.mark.parametrize(
    "text", ["a\n* b", "a\n1. b", "a\n| b |", "# a\n| b |", "a\n```text\n```", "* a\n\n  ```text\n  ```", "* a\n  * b"]
)
def test_line_that_mkdocs_merges_is_found(text: str) -> None:
    assert len(merged_lines(text)) == 1


# ---------------------------------------------------------------- code in pages


def wrong_names(code: str) -> list[str]:
    """Keywords and imports of this package in a piece of Python that there are not; what is no Python is an error."""
    keywords, wrong = set(inspect.signature(Adam8bit.__init__).parameters), []
    for node in ast.walk(ast.parse(code)):
        if isinstance(node, ast.Call) and ast.unparse(node.func).rpartition(".")[2] in {"AdamW8bit", "Adam8bit"}:
            theirs = ast.unparse(node.func).startswith(("bnb.", "bitsandbytes.", "torchao."))
            given = {keyword.arg for keyword in node.keywords if keyword.arg is not None}
            wrong += [] if theirs else sorted(given - keywords)
        elif isinstance(node, ast.ImportFrom) and (node.module or "").partition(".")[0] == "lowmem_adam":
            module = importlib.import_module(node.module or "")
            names = [alias.name for alias in node.names]
            there = {name for _, name, _ in pkgutil.iter_modules(getattr(module, "__path__", []))}
            wrong += [f"{node.module}.{name}" for name in names if not hasattr(module, name) and name not in there]
    return wrong


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_python_in_pages(page: Path) -> None:
    for code in blocks(text_of(page), "python"):
        if "integrations" in code:
            pytest.importorskip("transformers")
        assert wrong_names(code) == [], code


def test_wrong_python_is_found() -> None:
    assert wrong_names("AdamW8bit(p, lr=1, moment='8bit')") == ["moment"]
    assert wrong_names("from lowmem_adam.checkpoint import nothing") == ["lowmem_adam.checkpoint.nothing"]
    assert wrong_names("from lowmem_adam import checkpoint, AdamW8bit\nAdamW8bit(p, seed=1, offload='cpu')") == []
    with pytest.raises(SyntaxError):
        wrong_names("AdamW8bit(")


def options_of(command: str) -> dict[str, str]:
    """The options and arguments of a command of ``lowmem-adam``, with their help."""
    typer = pytest.importorskip("typer")
    pytest.importorskip("rich")
    from lowmem_adam.cli import app

    commands = typer.main.get_command(app).commands
    assert command in commands, f"lowmem-adam has no command {command!r}"
    found: dict[str, str] = {}
    for param in commands[command].params:
        names = [*param.opts, *param.secondary_opts] if param.param_type_name == "option" else [param.name]
        found |= dict.fromkeys(names, " ".join((getattr(param, "help", None) or "").split()))
    return found


def wrong_options(text: str) -> list[str]:
    """Commands and options of ``lowmem-adam`` that a page mentions and that there are not."""
    wrong = []
    for command, rest in COMMAND.findall(text):
        known = {*options_of(command), "--help"}
        given = re.findall(r"(?<!\S)--?[a-z][a-z-]*", rest)
        wrong += [f"{command} {option}" for option in given if option not in known]
    return wrong


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_options_in_pages_exist(page: Path) -> None:
    assert wrong_options(text_of(page)) == []


def test_wrong_option_is_found() -> None:
    assert wrong_options("`lowmem-adam plan c.json --fit 40`") == ["plan --fit"]
    assert wrong_options("lowmem-adam convert a.pt \\\n    -o b.pt --too torch") == ["convert --too"]
    with pytest.raises(AssertionError, match="no command"):
        wrong_options("lowmem-adam plane")


def test_reference_of_the_command_line_is_what_the_program_says_of_itself() -> None:
    pytest.importorskip("typer")
    pytest.importorskip("rich")
    spec = importlib.util.spec_from_file_location("write_cli", ROOT / "docs/write_cli.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    assert text_of(module.PAGE) == module.page(), "python docs/write_cli.py writes the page anew"
    for command in re.findall(r"^## lowmem-adam (\S+)$", module.page(), flags=re.MULTILINE):
        for option, words in options_of(command).items():
            assert option.strip("-") in module.page().lower()
            assert words.replace("|", "\\|") in module.page()


def test_every_public_name_is_in_the_reference() -> None:
    text = text_of(ROOT / "docs/api.md")
    entries = re.findall(r"^::: (\S+)$", text, flags=re.MULTILINE)
    there = {entry.removeprefix("lowmem_adam.").partition(".")[0] for entry in entries}
    assert set(lowmem_adam.__all__) - {"__version__"} <= there
    for name in re.findall(r"`(lowmem_adam\.[\w.]+)`", text.partition("::: ")[0]):
        module, _, attribute = name.rpartition(".")
        if "integrations" not in name:
            assert hasattr(importlib.import_module(module), attribute), name


# ---------------------------------------------------------------- the tree, and the site


def test_every_file_of_the_package_is_named() -> None:
    text = text_of(ROOT / "docs/contributing.md")
    (tree,) = (block for block in blocks(text, "text") if block.startswith("lowmem_adam/"))
    named: set[str] = set()
    folders: list[str] = []
    for line in tree.splitlines():
        indent, name = re.match(r"( *)(\S+)", line).groups()  # type: ignore[union-attr]
        folders = folders[: len(indent) // 2]
        if name.endswith("/"):
            folders.append(name)
        else:
            named.add("".join(folders) + name)
    suffixes = {".py", ".cpp", ".h", ".txt", ".typed"}
    there = {name_of(path) for path in (ROOT / "lowmem_adam").rglob("*") if path.suffix in suffixes}
    assert {name for name in named if name.startswith("lowmem_adam/")} == there


@pytest.mark.parametrize("repository", ["", "https://example.org/repository"], ids=["unknown", "known"])
def test_site_is_built_without_a_warning(repository: str, tmp_path: Path) -> None:
    for module in ("mkdocs", "material", "mkdocstrings"):
        pytest.importorskip(module, reason=f"needs {module}: pip install -e '.[docs]'")
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--config-file", ".mkdocs.yml"]
    variables = {name: value for name, value in os.environ.items() if not name.startswith("GITHUB_")}
    finished = subprocess.run(
        [*command, "--site-dir", str(tmp_path)],
        cwd=ROOT,
        env={**variables, "LOWMEM_ADAM_REPOSITORY": repository},
        capture_output=True,
        text=True,
        check=False,
    )
    assert finished.returncode == 0, finished.stdout + finished.stderr
    for page in navigation():
        built = tmp_path / page.removesuffix(".md") / "index.html"
        assert (built if page != "index.md" else tmp_path / page.replace(".md", ".html")).exists(), page
    assert (tmp_path / "benchmarks/results/gpu/index.html").exists()
    assert 'id="lowmem_adam.AdamW8bit"' in (tmp_path / "api/index.html").read_text(encoding="utf-8")
    # Sources are linked to where they are, if that is known, and otherwise lie in the site; folders do not.
    overview, kernels = (
        (tmp_path / name / "index.html").read_text(encoding="utf-8") for name in ("overview", "kernels")
    )
    if repository:
        assert f'href="{repository}/blob/HEAD/lowmem_adam/codec.py"' in overview
        assert f'href="{repository}/tree/HEAD/lowmem_adam/native"' in kernels
    else:
        assert 'href="../lowmem_adam/codec.py"' in overview
        assert (tmp_path / "lowmem_adam/codec.py").read_bytes() == (ROOT / "lowmem_adam/codec.py").read_bytes()
    assert "nowhere:" not in overview + kernels
