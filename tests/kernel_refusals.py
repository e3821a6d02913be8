"""What the native library and its binding are to refuse, as rows of data: wrong fragments, fields and libraries."""

from __future__ import annotations

import ctypes
import dataclasses
import struct
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from lowmem_adam.codec import FORMAT
from lowmem_adam.dynamic_map import dynamic_map
from lowmem_adam.kernels import cpu
from lowmem_adam.kernels.fragment import Fragment, Work
from lowmem_adam.kernels.records import RECORD
from tests.kernel_cases import random_moments, whole


def good_fragment(moments: str = "8bit") -> Fragment:
    fragment = whole(torch.randn(4, 300), torch.randn(4, 300), moments)
    return fragment._replace(moments=random_moments(fragment.layout, moments, 1))


def held(name: str, change: Callable[[Tensor], Tensor]) -> Callable[[Fragment], Fragment]:
    def changed(fragment: Fragment) -> Fragment:
        moments: Any = fragment.moments
        return fragment._replace(moments=moments._replace(**{name: change(getattr(moments, name))}))

    return changed


TENSORS = {
    "8bit": ("exp_avg_code", "exp_avg_sq_code", "block_floor", "block_span"),
    "32bit": ("exp_avg", "exp_avg_sq"),
    "bnb8bit": ("state1", "state2", "absmax1", "absmax2"),
}
SPOILED: dict[str, Callable[[Tensor], Tensor]] = {
    "short": lambda x: x.view(-1)[:-1],
    "long": lambda x: torch.cat([x.view(-1), x.view(-1)]),
    "not contiguous": lambda x: torch.stack([x.view(-1)] * 2, dim=1)[:, 0],
    "of another dtype": lambda x: x.to(torch.float64),
    "elsewhere": lambda x: x.to("meta"),
}


def replaced(name: str, how: str) -> Callable[[Fragment], Fragment]:
    def changed(fragment: Fragment) -> Fragment:
        spoiled: Any = {name: SPOILED[how](getattr(fragment, name))}
        return fragment._replace(**spoiled)

    return changed


def with_master(change: Callable[[Tensor], Tensor]) -> Callable[[Fragment], Fragment]:
    return lambda f: f._replace(param=f.param.bfloat16(), master=change(torch.zeros(4, 300, dtype=torch.int16)))


def with_blocks_of(size: int) -> Callable[[Fragment], Fragment]:
    """Of the same number of elements: a layout of another size of blocks, and what is held for it."""

    def changed(fragment: Fragment) -> Fragment:
        layout = dataclasses.replace(fragment.layout, block_size=size)
        held: Any = fragment.moments
        resized = {
            name: value.new_zeros(layout.n_blocks) if name.startswith(("block", "absmax")) else value
            for name, value in held._asdict().items()
        }
        return fragment._replace(layout=layout, end_block=layout.n_blocks, moments=held._replace(**resized))

    return changed


REFUSED: dict[str, tuple[str, Callable[[Fragment], Fragment]]] = {
    **{
        f"{name}, {how}": (moments, held(name, change))
        for moments, names in TENSORS.items()
        for name in names
        for how, change in SPOILED.items()
    },
    **{
        f"{name}, {how}": ("8bit", replaced(name, how))
        for name in ("param", "grad")
        for how in SPOILED
        if "not" not in how
    },
    "16-bit gradient of a 32-bit parameter": ("32bit", lambda f: f._replace(grad=f.grad.bfloat16())),
    "float16 gradient of a bfloat16 parameter": (
        "8bit",
        lambda f: f._replace(param=f.param.bfloat16(), grad=f.grad.half()),
    ),
    "signed root codes": ("8bit", held("exp_avg_sq_code", lambda x: x.view(torch.int8))),
    **{f"master, {how}": ("8bit", with_master(change)) for how, change in SPOILED.items()},
    "master of a float32 parameter": ("8bit", lambda f: f._replace(master=torch.zeros(4, 300))),
    "fewer blocks": ("8bit", lambda f: f._replace(end_block=f.end_block - 1)),
    **{
        f"{moments} in blocks of {size}": (moments, with_blocks_of(size))
        for moments, size in (("8bit", 256), ("bnb8bit", 128), ("32bit", 64), ("8bit", 64), ("bnb8bit", 512))
    },
}


PARAM_DATA, PARAM_SHAPE, PARAM_DTYPE, PARAM_DIMS, GRAD_DATA, GRAD_SHAPE, GRAD_DTYPE, GRAD_DIMS = range(8)
EXP_AVG, EXP_AVG_SQ, FLOOR, SPAN, ABSMAX1, ABSMAX2, MASTER, KIND, ROWS, COLS, SIZE, FIRST, END, SCALARS = range(8, 22)
BAD_DTYPE, BAD_LAYOUT, BAD_POINTER, BAD_ISA, BAD_THREADS = range(1, 6)

FIELDS = [
    *((field, value, BAD_DTYPE) for field in (PARAM_DTYPE, GRAD_DTYPE) for value in (-1, 3)),
    (GRAD_DTYPE, 1, BAD_DTYPE),  # of a float32 parameter
    *((KIND, value, BAD_DTYPE) for value in (-1, 1, 2, 3, 4)),  # of a float32 parameter as well
    (MASTER, 8, BAD_POINTER),  # of no kind
    *((field, -1, BAD_LAYOUT) for field in (ROWS, COLS, FIRST, END, SCALARS, PARAM_DIMS, GRAD_DIMS)),
    *((field, 9, BAD_LAYOUT) for field in (PARAM_DIMS, GRAD_DIMS)),
    *((field, 1, BAD_LAYOUT) for field in (PARAM_DIMS, GRAD_DIMS, SCALARS)),  # dimensions without a shape
    *((FIRST, 13, BAD_LAYOUT), (END, 13, BAD_LAYOUT), (ROWS, 3, BAD_LAYOUT), (COLS, 256, BAD_LAYOUT)),
    *((SIZE, value, BAD_LAYOUT) for value in (-128, 0, 1, 127, 256, 512)),
    *((field, 8, BAD_POINTER) for field in (ABSMAX1, ABSMAX2)),  # one without the other
    *((field, 0, BAD_POINTER) for field in (PARAM_DATA, GRAD_DATA, EXP_AVG, EXP_AVG_SQ, FLOOR, SPAN)),
]


def call(work: list[Work], change: tuple[int, int] | None = None, **given: Any) -> int:
    """The C function on packed work, with one field of the last fragment changed, or one argument."""
    packed = cpu._Packed(work)
    if change is not None:
        at = (len(work) - 1) * cpu._FRAGMENT.size
        values = list(cpu._FRAGMENT.unpack_from(packed.fragments, at))
        values[change[0]] = change[1]
        cpu._FRAGMENT.pack_into(packed.fragments, at, *values)
    arguments = {
        "fragments": packed.fragments,
        "count": packed.count,
        "scalars": packed.scalars,
        "scalars_count": packed.scalars_count,
        "num_threads": 1,
        "isa": -1,
        "skipped": ctypes.byref(ctypes.c_int64()),
    }
    assert set(given) <= set(arguments)
    return int(cpu.load().handle.lowmem_adam_step(*{**arguments, **given}.values()))


def fake_library_source() -> str:
    """A library with interface version FAKE_ABI, the format's constants but for bits FAKE_FLIP of word FAKE_WORD, and
    without a step.
    """
    form = cpu._Format(fragment_bytes=cpu._FRAGMENT.size, scalars_bytes=RECORD.size)
    for field in cpu._Format._fields_[2:]:
        name, kind = field[0], field[1]
        value = getattr(FORMAT, name)
        setattr(form, name, kind(*value) if isinstance(value, tuple) else value)
    words = struct.unpack(f"{ctypes.sizeof(form) // 4}I", bytes(form))
    maps = [dynamic_map(signed).view(torch.int32).tolist() for signed in (False, True)]
    rows = ", ".join(f"{{{', '.join(f'{word & 0xFFFFFFFF}u' for word in row)}}}" for row in maps)
    return (
        "#include <stdlib.h>\n"
        f"static unsigned maps[2][256] = {{{rows}}};\n"
        "const float *lowmem_adam_dynamic_map(int is_signed) {\n"
        '    if (getenv("FAKE_MAP")) maps[is_signed][200] ^= 1;\n'
        "    return (const float *)maps[is_signed];\n}\n"
        f"struct words {{ unsigned word[{len(words)}]; }};\n"
        'int lowmem_adam_abi_version(void) { return atoi(getenv("FAKE_ABI")); }\n'
        "struct words lowmem_adam_format(void) {\n"
        f"    struct words all = {{{{{', '.join(f'{word}u' for word in words)}}}}};\n"
        '    all.word[atoi(getenv("FAKE_WORD"))] ^= atoi(getenv("FAKE_FLIP"));\n'
        "    return all;\n}\n"
    )
