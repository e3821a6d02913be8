"""A hook of mkdocs: links of pages that leave ``docs/`` work in the site as they do on GitHub.

Pages link to each other and to files of the repository by relative paths, as GitHub takes them. In the site

* Markdown and pictures outside of ``docs/`` that a page links to, and what those link to in turn, become parts of the
  site at their own path (README.md as ``overview.md``);
* other files and folders are links to the repository, where its address is known: ``repo_url`` of the configuration
  (the variable ``LOWMEM_ADAM_REPOSITORY``), ``[project.urls]`` of pyproject.toml, or the variables that GitHub sets
  for its workflows. Where it is not, files are copied into the site as they are, and folders are no links.
"""

from __future__ import annotations

import os
import re
import sys
from collections.abc import Iterator
from pathlib import Path
from posixpath import normpath, relpath
from urllib.parse import unquote

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files, InclusionLevel
from mkdocs.structure.pages import Page

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

ROOT = Path(__file__).resolve().parents[1]
DOCS = "docs"
RENAMED = {"README.md": "overview.md"}
"""mkdocs takes a README.md for the index of its folder."""
PART_OF_THE_SITE = (".md", ".png")
FIRST = ("README.md", "CHANGELOG.md", "launch/multi_node.md")
"""What stands outside of ``docs/`` and in the navigation."""

FENCE = re.compile(r"^ *(```|~~~)")
LINK = re.compile(r"(?<=\]\()(?![a-z]+:|#|/)([^)\s#]+)(#[^)\s]*)?(?=\))")
"""The target and the anchor of an inline link or picture that is relative."""


def on_config(config: MkDocsConfig) -> MkDocsConfig:
    """Find out where the repository is."""
    if not config.repo_url:
        urls = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"].get("urls", {})
        named = {name.lower(): url for name, url in urls.items()}
        config.repo_url = named.get("repository") or named.get("source") or _of_workflow()
    if config.repo_url and not config.repo_name:
        config.repo_name = config.repo_url.rstrip("/").rpartition("/")[2]
    return config


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Add what pages link to outside of ``docs/``, from page to page."""
    pages = [f"{DOCS}/{file.src_uri}" for file in files.documentation_pages()]
    waiting, seen = [*pages, *FIRST], {*pages, *FIRST}
    while waiting:
        path = waiting.pop()
        if not path.startswith(f"{DOCS}/"):
            level = InclusionLevel.INCLUDED if path in FIRST else InclusionLevel.NOT_IN_NAV
            files.append(File.generated(config, _in_site(path), abs_src_path=str(ROOT / path), inclusion=level))
        if path.endswith(".md"):
            text = (ROOT / path).read_text(encoding="utf-8")
            found = {target for target in _targets(text, path) if _is_copied(target, config)}
            waiting += sorted(found - seen)
            seen |= found
    return files


def on_page_markdown(markdown: str, page: Page, config: MkDocsConfig, files: Files) -> str:
    """Rewrite links from the place of the page in the repository to its place in the site."""
    here = _in_repository(page.file.src_uri)

    def rewritten(link: re.Match[str]) -> str:
        target, anchor = _resolved(link[1], here), link[2] or ""
        if target.startswith("..") or not (ROOT / target).exists():
            return link[0]  # for mkdocs to warn of
        if target.startswith(f"{DOCS}/") or files.get_file_from_path(_in_site(target)) is not None:
            return relpath(_in_site(target), os.path.dirname(page.file.src_uri)) + anchor
        kind = "tree" if (ROOT / target).is_dir() else "blob"
        return f"{config.repo_url.rstrip('/')}/{kind}/HEAD/{target}{anchor}" if config.repo_url else _NOWHERE

    lines = [LINK.sub(rewritten, line) if prose else line for line, prose in _lines(markdown)]
    return re.sub(rf"\[([^\]]*)\]\({_NOWHERE}\)", r"\1", "\n".join(lines))


_NOWHERE = "nowhere:"


def _of_workflow() -> str | None:
    server, repository = os.environ.get("GITHUB_SERVER_URL"), os.environ.get("GITHUB_REPOSITORY")
    return f"{server}/{repository}" if server and repository else None


def _in_site(path: str) -> str:
    return RENAMED.get(path, path.removeprefix(f"{DOCS}/"))


def _in_repository(uri: str) -> str:
    outside = {renamed: path for path, renamed in RENAMED.items()}
    path = outside.get(uri, uri)
    return path if path != uri or not (ROOT / DOCS / uri).exists() else f"{DOCS}/{uri}"


def _resolved(link: str, page: str) -> str:
    return normpath(os.path.join(os.path.dirname(page), unquote(link)))


def _lines(markdown: str) -> Iterator[tuple[str, bool]]:
    """Each line, and whether it is prose and no code."""
    fenced = False
    for line in markdown.split("\n"):
        fence = FENCE.match(line) is not None
        yield line, not fenced and not fence
        fenced ^= fence


def _targets(markdown: str, page: str) -> Iterator[str]:
    for line, prose in _lines(markdown):
        if prose:
            yield from (_resolved(link[1], page) for link in LINK.finditer(line))


def _is_copied(target: str, config: MkDocsConfig) -> bool:
    if target.startswith((f"{DOCS}/", "..")) or not (ROOT / target).is_file():
        return False
    return target.endswith(PART_OF_THE_SITE) or not config.repo_url
