"""Who is calling: asked where a caller means something else than others, and has no other way of saying so."""

from __future__ import annotations

import sys
from types import FrameType


def called_from(*modules: str) -> bool:
    """Whether a call from one of these modules, or from a module below one, is under way in this thread.

    Args:
        modules: full names, such as ``"torch.distributed.checkpoint"``.
    """
    frame: FrameType | None = sys._getframe(1)
    below = tuple(f"{module}." for module in modules)
    while frame is not None:
        name = str(frame.f_globals.get("__name__", ""))
        if name in modules or name.startswith(below):
            return True
        frame = frame.f_back
    return False
