"""One case that fails and one that takes its process along: the test of ``running`` itself."""

from __future__ import annotations

import os

import pytest


def case_fails() -> None:
    raise AssertionError("1 == 2")


def case_does_not_raise() -> None:
    with pytest.raises(ValueError, match="never"):
        pass


def case_ends() -> None:
    os._exit(7)
