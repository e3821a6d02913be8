"""What sft_lm.py learns from: functions of Python sources, split behind the docstring, and a tokenizer of bytes.

Nothing is downloaded. A prompt is a function's head with its docstring, which the completion, its body, follows.
"""

from __future__ import annotations

import ast
import warnings
from collections.abc import Iterator, Sequence
from pathlib import Path

from datasets import Dataset
from lm_data import find_text_files
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

PAD, END = SPECIAL_TOKENS = ("<|pad|>", "<|end|>")
HELD_OUT = 20
"""Of so many functions one is held out."""


def byte_tokenizer() -> PreTrainedTokenizerFast:
    """A token for every byte, which byte-level BPE without merges comes to, and two for padding and end."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE(vocab={sign: index for index, sign in enumerate(alphabet)}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token=PAD, eos_token=END)


def load_functions(data: Sequence[Path], most: int, longest_prompt: int) -> tuple[Dataset, Dataset]:
    """Functions to learn from, and those held out, in an order that is the same everywhere.

    Args:
        data: files and folders; none for the standard library.
        most: functions, at most.
        longest_prompt: bytes; what has a longer one is left out, since its body would be cut off.

    Raises:
        ValueError: fewer than two such functions are found.
    """
    if most < 2:
        raise ValueError(f"examples must be at least 2, got {most}")
    found: list[tuple[str, str]] = []
    for path in find_text_files(data):
        found.extend((prompt, body) for prompt, body in functions_in(path) if len(prompt.encode()) <= longest_prompt)
        if len(found) >= most:
            break
    found = found[:most]
    if len(found) < 2:
        raise ValueError(
            f"{len(found)} functions in the text whose head and docstring take at most {longest_prompt} bytes; give "
            "more Python sources or a longer --seq-len"
        )
    held_out = {index for index in range(len(found)) if index % HELD_OUT == HELD_OUT - 1} or {len(found) - 1}
    parts = [[found[i] for i in range(len(found)) if (i in held_out) == chosen] for chosen in (False, True)]
    learnt, kept = (
        Dataset.from_dict({"prompt": [p for p, _ in part], "completion": [c for _, c in part]}) for part in parts
    )
    return learnt, kept


def functions_in(path: Path) -> Iterator[tuple[str, str]]:
    """Head with docstring, and body, of every function of a file that Python can read."""
    try:
        source = path.read_text(encoding="utf-8")
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", SyntaxWarning)  # tests of the standard library contain them on purpose
            tree = ast.parse(source)
    except (SyntaxError, ValueError):  # of another version of Python, no UTF-8, or a zero byte
        return
    lines = source.splitlines(keepends=True)
    for node in ast.walk(tree):
        if not isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef) or not ast.get_docstring(node):
            continue
        last_of_docstring = node.body[0].end_lineno
        if len(node.body) < 2 or last_of_docstring is None or node.body[1].lineno <= last_of_docstring:
            continue
        yield (
            "".join(lines[node.lineno - 1 : last_of_docstring]),
            "".join(lines[last_of_docstring : node.end_lineno]),
        )
