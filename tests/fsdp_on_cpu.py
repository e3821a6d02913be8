"""Runs a script as accelerate would run it under FSDP2 if it had that on a CPU: ``fsdp_on_cpu.py SCRIPT ARGUMENTS``.

accelerate 1.15 chooses FSDP for kinds of accelerators only (``AcceleratorState.__init__`` in accelerate/state.py, the
branch for ``DistributedType.MULTI_GPU`` and its like); processes on a CPU are ``MULTI_CPU`` and get plain data
parallelism. Here that one choice is made as on a GPU; all that follows from it is accelerate's own.
"""

from __future__ import annotations

import os
import runpy
import sys
from pathlib import Path
from typing import Any

from accelerate.state import AcceleratorState, DistributedType, PartialState

_init = AcceleratorState.__init__


def _init_with_fsdp(self: Any, *arguments: Any, fsdp_plugin: Any = None, **keywords: Any) -> None:
    first = AcceleratorState._shared_state == {}
    _init(self, *arguments, fsdp_plugin=fsdp_plugin, **keywords)
    if first and self.distributed_type == DistributedType.MULTI_CPU and os.environ.get("ACCELERATE_USE_FSDP") == "true":
        self.distributed_type = DistributedType.FSDP
        if self._mixed_precision != "no":
            fsdp_plugin.set_mixed_precision(self._mixed_precision)
        self.fsdp_plugin = fsdp_plugin
        PartialState._shared_state["distributed_type"] = self.distributed_type


def choose_fsdp() -> None:
    """In this process, from the next ``Accelerator`` on."""
    AcceleratorState.__init__ = _init_with_fsdp


def main() -> None:
    choose_fsdp()
    del sys.argv[0]
    sys.path.insert(0, str(Path(sys.argv[0]).resolve().parent))
    runpy.run_path(sys.argv[0], run_name="__main__")


if __name__ == "__main__":
    main()
