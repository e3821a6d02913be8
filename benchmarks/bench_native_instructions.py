"""Instructions that the native step executes for a parameter, counted by valgrind.

    python -m benchmarks.bench_native_instructions [--output FOLDER]

Needs cmake, a compiler and valgrind (Debian: apt-get install valgrind), whose emulated processor has AVX2 and no
AVX-512. A count does not depend on the machine or its load, so what it says of a change is certain where times are not.
"""

from __future__ import annotations

import re
import shutil
import subprocess
import tempfile
from pathlib import Path
from typing import Annotated

import typer

from benchmarks import harness
from lowmem_adam.kernels import cpu

NATIVE = Path(__file__).resolve().parents[1] / "lowmem_adam" / "native"
ELEMENTS = 65536
KINDS = ("none", "fp32", "split", "split in 24 bits")
"""What is kept beside the parameter, by the library's number for it."""
ROWS = [
    (isa, dtype, moments, kept)
    for isa in ("avx2", "scalar")
    for dtype in ("float32", "bfloat16")
    for moments in ("8bit", "32bit")
    for kept in (KINDS if dtype == "bfloat16" else KINDS[:1])
]


def build(folder: Path) -> Path:
    """The driver, linked with a library that is built as the shipped one."""
    subprocess.run(["cmake", "-S", str(NATIVE), "-B", str(folder)], check=True, stdout=subprocess.DEVNULL)
    subprocess.run(["cmake", "--build", str(folder)], check=True, stdout=subprocess.DEVNULL)
    driver = folder / "native_driver"
    source = Path(__file__).with_name("native_driver.cpp")
    link = [f"-L{folder}", "-llowmem_adam", f"-Wl,-rpath,{folder}"]
    subprocess.run(["c++", "-std=c++17", "-O2", str(source), "-o", str(driver), *link], check=True)
    return driver


def counted(driver: Path, isa: str, dtype: str, moments: str, kept: str, steps: int) -> int:
    """Instructions of the whole program."""
    kinds = (int(dtype == "bfloat16"), int(moments == "8bit"), KINDS.index(kept))
    numbers = (cpu.ISAS.index(isa), *kinds, ELEMENTS, steps)
    command = ["valgrind", "--tool=callgrind", "--callgrind-out-file=/dev/null", str(driver), *map(str, numbers)]
    told = subprocess.run(command, check=True, capture_output=True, text=True).stderr
    found = re.search(r"Collected : (\d+)", told)
    assert found is not None, told
    return int(found[1])


def main(
    output: Annotated[Path, typer.Option(help="Folder for the JSON and Markdown files.")] = harness.RESULTS,
) -> None:
    """Count instructions a parameter and step: two more steps than one, over twice the elements."""
    for program in ("cmake", "c++", "valgrind"):
        if shutil.which(program) is None:
            raise typer.BadParameter(f"{program} is not on the PATH; accepted: a machine with cmake, c++ and valgrind")
    rows: list[list[harness.Cell]] = []
    with tempfile.TemporaryDirectory() as folder:
        driver = build(Path(folder))
        for row in ROWS:
            once, thrice = (counted(driver, *row, steps) for steps in (1, 3))
            rows.append([*row, (thrice - once) / 2 / ELEMENTS])
    header = ["instruction set", "parameters", "moments", "kept", "instructions a parameter and step"]
    title = "Instructions of the native step"
    harness.print_table(title, header, rows)
    data = {"rows": [dict(zip(header, row, strict=True)) for row in rows]}
    harness.write_results("native_instructions", data, f"# {title}\n\n{harness.markdown_table(header, rows)}", output)


if __name__ == "__main__":
    typer.run(main)
