"""Folders whose tokenizer is a sentencepiece model become folders with a tokenizer.json."""

import os
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from recipes.errors import RequestError
from trainers.store.hf_loaders import open_sentencepiece

PROBES = (
    "The cat sat on the mat, and 12 dogs barked at it.",
    "Two  spaces, a\ttab\nand a line of its\u00e9lf: caf\u00e9 \u2013 \u201cna\u00efve\u201d.",
    "def f(x):\n    return x ** 2 + 3.14  # \u03c0",
    "\u4f60\u597d, \u043c\u0438\u0440 \U0001f642",
)
"""Texts whose tokens sentencepiece itself and the converted tokenizer must agree on; of spaces before the first word
transformers makes one token less.
"""


def write_folder(folder: Path, name: str, target: Path) -> None:
    """Write a folder of the same files with a tokenizer.json, made by transformers of the sentencepiece model `name`.

    Raises RequestError where the package is not installed, and where the two split one of `PROBES` differently.
    """
    if find_spec("sentencepiece") is None:
        raise RequestError(
            f"{folder / name} is a sentencepiece model; to convert it: pip install 'trainwright[sentencepiece]'"
        )
    from transformers import AutoTokenizer

    tokenizer: Any = open_sentencepiece(AutoTokenizer, folder, name)
    _demand_same(folder / name, tokenizer)
    target.mkdir(parents=True)
    tokenizer.save_pretrained(target)
    for path in folder.iterdir():
        if path.is_file() and not (target / path.name).exists():
            _place(path.resolve(), target / path.name)


def _place(source: Path, target: Path) -> None:
    """Link a file where its disk allows it, else copy it."""
    import shutil

    try:
        os.link(source, target)
    except OSError:
        shutil.copyfile(source, target)


def _demand_same(file: Path, tokenizer: Any) -> None:
    from sentencepiece import SentencePieceProcessor

    processor = SentencePieceProcessor(model_file=str(file))
    for text in PROBES:
        wanted, found = processor.encode(text), tokenizer.encode(text, add_special_tokens=False)
        if wanted != found:
            place = next((at for at, (one, other) in enumerate(zip(wanted, found, strict=False)) if one != other), 0)
            raise RequestError(
                f"{file}: converted, {text!r} becomes {found[place : place + 4]} where sentencepiece has "
                f"{wanted[place : place + 4]}; its normaliser is not one that transformers carries over"
            )
