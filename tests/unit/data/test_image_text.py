"""Rows with images: places, tokens and targets by hand, pixels as the stock processor makes them, each kept once."""

import base64
import io
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from pydantic import TypeAdapter

from recipes.data.text import Source
from recipes.errors import RequestError
from trainers.data.batches import ImageTextBatch, build_batch
from trainers.data.dataset import Dataset
from trainers.data.encoding import TextSettings
from trainers.data.image_inputs import image_inputs, joined
from trainers.data.image_processor import ImageProcessor, load_image_processor
from trainers.data.image_text import encode_question
from trainers.data.image_text_digest import image_text_digest
from trainers.data.layouts.image_text import ImageText
from trainers.data.layouts.packed import Packed
from trainers.data.materialise import DataRequest, materialise
from trainers.data.row_images import open_row_images
from trainers.data.tokenizer import Tokenization, load_tokenization
from trainers.evaluation.image_text_responses import image_text_prompts
from trainers.models.small_llava import write_small_llava
from trainers.store.store import Store

ADAPTER: TypeAdapter[Any] = TypeAdapter(Source)
TOKENS = 4
QUESTION = [{"role": "user", "content": "Which?"}]
ANSWER = [{"role": "assistant", "content": "Two."}]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    place = tmp_path_factory.mktemp("llava")
    write_small_llava(place, ["Which? Two."], image_size=8, patch_size=4, width=8, layers=1)
    return place


@pytest.fixture(scope="module")
def processor(folder: Path) -> ImageProcessor:
    return load_image_processor(folder)


@pytest.fixture(scope="module")
def tokens(folder: Path) -> Tokenization:
    return load_tokenization(folder)


def draw(number: int, *, size: tuple[int, int] = (8, 8)) -> Image.Image:
    pixels = np.random.default_rng(number).integers(0, 256, (*size, 3), dtype=np.uint8)
    return Image.fromarray(pixels)


def encoded(image: Image.Image) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, "PNG")
    return buffer.getvalue()


@pytest.fixture
def build(tmp_path: Path, store: Store, tokens: Tokenization, processor: ImageProcessor) -> Any:
    (tmp_path / "images").mkdir()
    for number in range(4):
        draw(number, size=(8 + number, 10)).save(tmp_path / "images" / f"{number}.png")

    def build(rows: list[Any], length: int = 64, **changes: Any) -> Dataset:
        (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
        columns = changes.pop("columns", {})
        source = ADAPTER.validate_python({"source": "jsonl", "files": ["rows.jsonl"], "columns": columns})
        layout = ImageText(TextSettings(tokens, length, **changes), processor)
        return materialise(DataRequest(source, tmp_path, layout, 0), store)

    return build


def shown(dataset: Dataset, tokens: Tokenization, row: int = 0) -> tuple[str, str]:
    """Return a sequence's text without padding, and that of its targets."""
    ids = np.asarray(dataset.arrays["input_ids"][row])
    is_real = np.asarray(dataset.arrays["segment_ids"][row]) > 0
    targets = ids[np.asarray(dataset.arrays["loss_mask"][row])]
    return tokens.decode(ids[is_real], skip_special=False), tokens.decode(targets, skip_special=False)


@pytest.mark.parametrize(
    ("row", "text"),
    [
        (
            {"images": ["images/0.png"], "messages": QUESTION + ANSWER},
            f"<|user|>\n{'<image>' * TOKENS}\nWhich?\n<|assistant|>\nTwo.<|end|>",
        ),
        (
            {"image": "images/0.png", "prompt": QUESTION, "completion": "Two."},
            f"<|user|>\n{'<image>' * TOKENS}\nWhich?\n<|assistant|>\nTwo.<|end|>",
        ),
        (
            {"image": "images/0.png", "prompt": "Which? ", "completion": "Two."},
            f"{'<image>' * TOKENS}\nWhich? Two.<|end|>",
        ),
        (
            {"image": "images/0.png", "prompt": "See <image>: ", "completion": "Two."},
            f"See {'<image>' * TOKENS}: Two.<|end|>",
        ),
        (
            {
                "messages": [
                    {
                        "role": "user",
                        "content": [
                            {"type": "text", "text": "Here: "},
                            {"type": "image", "image": "images/1.png"},
                            {"type": "text", "text": "Which?"},
                        ],
                    },
                    *ANSWER,
                ]
            },
            f"<|user|>\nHere: {'<image>' * TOKENS}\nWhich?\n<|assistant|>\nTwo.<|end|>",
        ),
        ({"images": [], "messages": QUESTION + ANSWER}, "<|user|>\nWhich?\n<|assistant|>\nTwo.<|end|>"),
    ],
)
def test_a_row_s_text_and_targets(build: Any, tokens: Tokenization, row: dict[str, Any], text: str) -> None:
    other = {"images": ["images/3.png"], "messages": QUESTION + ANSWER}
    dataset = build([row, other], packing=False)
    assert shown(dataset, tokens) == (text, "Two.<|end|>")


def test_tokens_are_those_of_the_stock_processor(build: Any, folder: Path) -> None:
    from transformers import AutoProcessor

    stock = AutoProcessor.from_pretrained(folder, local_files_only=True)
    content = [{"type": "image"}, {"type": "image"}, {"type": "text", "text": "Which?"}]
    written = stock.apply_chat_template([{"role": "user", "content": content}, *ANSWER], tokenize=False)
    images = [draw(number, size=(8 + number, 10)) for number in range(2)]
    wanted = stock(images=images, text=written, return_tensors="np")
    dataset = build([{"images": ["images/0.png", "images/1.png"], "messages": QUESTION + ANSWER}], packing=False)
    length = wanted["input_ids"].shape[1]
    np.testing.assert_array_equal(dataset.arrays["input_ids"][0][:length], wanted["input_ids"][0])
    assert not (dataset.arrays["segment_ids"][0][length:] > 0).any()
    batch = build_batch(dataset, [0])
    assert isinstance(batch, ImageTextBatch)
    np.testing.assert_allclose(batch.images["pixel_values"], wanted["pixel_values"], atol=1e-6)


def test_an_image_is_stored_once_and_follows_its_rows(build: Any, tokens: Tokenization) -> None:
    names = [[0], [1, 0], [], [2], [1]]
    rows = [
        {
            "images": [f"images/{name}.png" for name in numbers],
            "prompt": f"{place} ",
            "completion": "Two.",
        }
        for place, numbers in enumerate(names)
    ]
    dataset = build(rows, length=48)
    assert dataset.arrays["images"].shape == (3, 3, 8, 8)
    assert len(dataset) < len(rows)
    seen = {}
    for prompt in image_text_prompts(dataset, tokens.token_id("<image>")):
        text = tokens.decode(prompt.ids, skip_special=True).strip()
        seen[int(text)] = [int(number) for number in prompt.images]
        assert tokens.decode(prompt.answer, skip_special=False) == "Two.<|end|>"
    by_pixels = {
        place: [float(image_inputs(dataset, [number])["pixel_values"].sum()) for number in numbers]
        for place, numbers in seen.items()
    }
    assert {place: len(numbers) for place, numbers in seen.items()} == {0: 1, 1: 2, 2: 0, 3: 1, 4: 1}
    assert by_pixels[0][0] == by_pixels[1][1]
    assert by_pixels[4][0] == by_pixels[1][0]
    assert len({by_pixels[0][0], by_pixels[3][0], by_pixels[4][0]}) == 3


def test_an_image_comes_by_path_bytes_and_data_url(
    build: Any, tmp_path: Path, store: Store, tokens: Tokenization, processor: ImageProcessor
) -> None:
    import pyarrow
    import pyarrow.parquet

    data = encoded(draw(0))
    (tmp_path / "one.png").write_bytes(data)
    url = "data:image/png;base64," + base64.b64encode(data).decode()
    question = {"prompt": "Which? ", "completion": "Two."}
    by_path = build([{"images": ["one.png"], **question}, {"images": url, **question}])
    rows = [{"images": [{"bytes": data, "path": None}], **question}]
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), tmp_path / "rows.parquet")
    source = ADAPTER.validate_python({"source": "parquet", "files": ["rows.parquet"]})
    by_bytes = materialise(DataRequest(source, tmp_path, ImageText(TextSettings(tokens, 64), processor), 0), store)
    assert by_path.arrays["images"].shape[0] == 1
    np.testing.assert_array_equal(by_path.arrays["images"], by_bytes.arrays["images"])


def test_a_changed_image_is_another_set(build: Any, tmp_path: Path) -> None:
    source = ADAPTER.validate_python({"source": "jsonl", "files": ["rows.jsonl"], "columns": {"image": "shot"}})
    row = {"shot": "images/0.png", "prompt": "Which? ", "completion": "Two."}
    first = build([row], columns={"image": "shot"})
    before = image_text_digest(source, tmp_path)
    draw(9).save(tmp_path / "images" / "0.png")
    assert image_text_digest(source, tmp_path) != before
    assert build([row], columns={"image": "shot"}).digest != first.digest


def test_equal_questions_about_other_images_are_held_out_apart(tmp_path: Path) -> None:
    from trainers.data.rows import read_rows

    (tmp_path / "images").mkdir()
    rows = []
    for number in range(40):
        draw(number).save(tmp_path / "images" / f"{number}.png")
        rows.append({"images": [f"images/{number}.png"], "messages": QUESTION + ANSWER})
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    source = ADAPTER.validate_python({"source": "jsonl", "files": ["rows.jsonl"], "hold_out": 0.5})
    kept, held = (list(read_rows(source, tmp_path, "image_text", 0, held_out=held_out)) for held_out in (False, True))
    assert len(kept) + len(held) == 40
    assert min(len(kept), len(held)) > 8


def test_a_row_that_would_lose_an_image_is_left_out(build: Any) -> None:
    long = {"images": ["images/0.png"], "prompt": "words " * 12 + "<image> ", "completion": "Two."}
    short = {"images": ["images/1.png"], "prompt": "Which? ", "completion": "Two. " * 30}
    dataset = build([long, short], length=24)
    assert dataset.report.fate.dropped == {"too_long": 1}
    assert dataset.report.fate.truncated == 1


@pytest.mark.parametrize(
    ("row", "said"),
    [
        ({"messages": QUESTION + ANSWER}, r"rows.jsonl:1: no column 'images' or 'image'"),
        ({"images": ["no.png"], "messages": QUESTION + ANSWER}, r"rows.jsonl:1: image .*no.png cannot be read"),
        ({"images": ["bad.png"], "messages": QUESTION + ANSWER}, r"bad.png: "),
        ({"images": ["empty.png"], "messages": QUESTION + ANSWER}, r"rows.jsonl:1: image 'empty.png' is empty"),
        ({"images": ["http://a/b.png"], "messages": QUESTION + ANSWER}, r"rows.jsonl:1: image .* is a URL"),
        ({"images": [3], "messages": QUESTION + ANSWER}, r"rows.jsonl:1: an image .*, not int"),
        (
            {"images": ["images/0.png"], "prompt": "<image><image> ", "completion": "Two."},
            r"rows.jsonl:1: .* 2 places .* 1 images",
        ),
        (
            {"images": ["images/0.png"], "messages": ANSWER},
            r"rows.jsonl:1: no user's turn",
        ),
        ({"images": ["images/0.png"], "text": "Two."}, r"rows.jsonl:1: needs messages"),
        ({"images": [], "messages": QUESTION + ANSWER}, r"has an image; "),
    ],
)
def test_what_is_wrong_is_named(build: Any, tmp_path: Path, row: dict[str, Any], said: str) -> None:
    (tmp_path / "bad.png").write_bytes(b"\x89PNG\r\n\x1a\nbut no more")
    (tmp_path / "empty.png").write_bytes(b"")
    with pytest.raises(RequestError, match=said):
        build([row])


def test_text_models_refuse_rows_with_images(tmp_path: Path, store: Store, tokens: Tokenization) -> None:
    row = {"images": ["a.png"], "messages": QUESTION + ANSWER}
    (tmp_path / "rows.jsonl").write_text(json.dumps(row) + "\n")
    source = ADAPTER.validate_python({"source": "jsonl", "files": ["rows.jsonl"]})
    with pytest.raises(RequestError, match=r"rows\.jsonl:1: .*vision-language"):
        materialise(DataRequest(source, tmp_path, Packed(TextSettings(tokens, 64), "instructions"), 0), store)


def test_a_question_is_tokenized_as_a_row_is(
    build: Any, tmp_path: Path, tokens: Tokenization, processor: ImageProcessor
) -> None:
    dataset = build([{"images": ["images/0.png"], "messages": QUESTION + ANSWER}])
    (prompt,) = image_text_prompts(dataset, processor.image_id)
    images = open_row_images(["images/0.png"], tmp_path, "here")
    assert encode_question(QUESTION, images, tokens, processor) == prompt.ids.tolist()


def test_arrays_are_joined_along_the_axis_in_which_they_differ() -> None:
    shapes = [((2, 3), (4, 3), (6, 3)), ((1, 2, 3), (1, 5, 3), (1, 7, 3)), ((1, 3), (1, 3), (2, 3))]
    for first, second, both in shapes:
        assert joined([{"a": np.zeros(first)}, {"a": np.ones(second)}])["a"].shape == both
    with pytest.raises(RequestError, match="2x3, 3x4"):
        joined([{"a": np.zeros((2, 3))}, {"a": np.zeros((3, 4))}])
