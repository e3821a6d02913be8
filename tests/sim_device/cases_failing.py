"""One case that fails and one that takes its process along: the test of ``running`` itself."""

from __future__ import annotations

import os


def case_fails() -> None:
    raise AssertionError("1 == 2")


def case_ends() -> None:
    os._exit(7)
