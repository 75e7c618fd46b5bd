"""Digests of sets stay what they were: artifacts name them, and the order of training follows from them."""

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from pydantic import TypeAdapter

from recipes.data.images import ImageSource
from recipes.data.text import Source
from trainers.data.dataset import DataLayout
from trainers.data.encoding import TextSettings
from trainers.data.layouts.image_text import ImageText
from trainers.data.layouts.images import Images
from trainers.data.layouts.registry import text_layout
from trainers.data.layouts.stream import Stream
from trainers.data.materialise import DataRequest
from trainers.data.tokenizer import Tokenization

TEXT, IMAGES = TypeAdapter[Any](Source).validate_python, TypeAdapter[Any](ImageSource).validate_python
ROWS = TEXT({"source": "jsonl", "files": ["a.jsonl"]})
SELECTED = {"limit": 5, "hold_out": 0.25, "part": "1/2", "columns": {"text": "t"}}
DIGITS = IMAGES({"source": "digits", "hold_out": 0.2})
CONTENT = "0" * 64
ALL = {"loss_on": "all"}


def by_role(role: Any, **keys: Any) -> Any:
    return lambda tokenization: text_layout(role, TextSettings(tokenization, 64, **keys))


def stream(tokenization: Tokenization) -> DataLayout:
    return Stream(TextSettings(tokenization, 64))


def image_text(tokenization: Tokenization) -> DataLayout:
    processor: Any = SimpleNamespace(digest="1" * 64)
    return ImageText(TextSettings(tokenization, 64, loss_on="all"), processor)


def images(tokenization: Tokenization) -> DataLayout:
    return Images()


@pytest.mark.parametrize(
    ("layout", "source", "held_out", "digest"),
    [
        pytest.param(
            by_role("text"), ROWS, False, "205681f11154938141c42e29a96391ae0d64f0d9ca54f6aac353a301719e2f57", id="text"
        ),
        pytest.param(
            by_role("text", packing=False),
            ROWS,
            False,
            "efaad9bf7d9e957995640e529ee323b7210787f7512f0cac08d2c0993e32c082",
            id="text unpacked",
        ),
        pytest.param(
            stream, ROWS, False, "474831e72fee6bf4d5096f5125e9166499486035c99d879df7a49ced9f45e788", id="stream"
        ),
        pytest.param(
            by_role("labels"),
            ROWS,
            False,
            "d1d43c236d8958c32a637bb048d969c1c9c1fe375ef256627e5748cdf79d9aa7",
            id="labels",
        ),
        pytest.param(
            by_role("instructions"),
            ROWS,
            False,
            "cac45efb3e575dac3968c95a002588f93224f07810fcb5dd57bb70c4842ee10a",
            id="instructions",
        ),
        pytest.param(
            by_role("instructions", packing=False, template="chat", **ALL),
            ROWS,
            False,
            "afbf0cfeeb042e87b8ee139974272339ca5cd9bd66f42055dee0bb207952793f",
            id="instructions all chat",
        ),
        pytest.param(
            by_role("seq2seq", template="chat"),
            ROWS,
            False,
            "f8d46b73c2c283e9f4586f14cc33a72de5d21f1302a5bcef1cfa04fba3b3ba28",
            id="seq2seq",
        ),
        pytest.param(
            by_role("preferences"),
            ROWS,
            False,
            "b5fa67d24fca1f477c4229fec4c31c765194822b7deb37712c3ded48a5fd267f",
            id="preferences",
        ),
        pytest.param(
            by_role("judged"),
            ROWS,
            False,
            "0c0c678371dd76a63f0689763992d9edf3d632c07c6f7db05f94455d714f5291",
            id="judged",
        ),
        pytest.param(
            by_role("prompts"),
            ROWS,
            True,
            "10f26c197019e859556986e59c2d8927cc897069d8c640cfb041d0b9d71d3c20",
            id="prompts held out",
        ),
        pytest.param(
            by_role("text"),
            TEXT({"source": "csv", "files": ["b.csv"], **SELECTED}),
            False,
            "d6be502c6c6c48a9f27fcbaaac2d8d4cb101468b58625a9c7c9e108e130bc66a",
            id="limited",
        ),
        pytest.param(
            image_text, ROWS, False, "06c40d2a9f5a7a54bf67574cda8904266319bd11a9b3fb01ed772fab9f4076b2", id="image_text"
        ),
        pytest.param(
            images, DIGITS, False, "7aed0935977005942b41e1566609655b9ebcb9726a506c2fbcc9c01535a5146d", id="images"
        ),
        pytest.param(
            images,
            DIGITS,
            True,
            "2c0544b509c40fc5f95440bf956c94c9526b5b108ef65bb9e2709f87012f7d2f",
            id="images held out",
        ),
        pytest.param(
            images,
            IMAGES({"source": "idx", "files": ["i.gz"], "label_files": ["l.gz"], "limit": 7, "size": 16}),
            False,
            "25b05db78450663385db111a908ad3caf3abd7649cb85cf22023a5555ff7626a",
            id="images limited",
        ),
    ],
)
def test_the_digest_of_a_set_is_what_it_was(
    tokenization: Tokenization, layout: Any, source: Any, held_out: bool, digest: str
) -> None:
    made = layout(tokenization)
    request = DataRequest(source, Path(), made, 3, held_out=held_out, source_digest=CONTENT)
    assert request.digest() == digest
