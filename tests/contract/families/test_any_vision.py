"""Every kind of vision-language model: rows with images as the stock processor and model take them, written alike.

Small random weights; what a type can do is read off the generated table, and is tried here.
"""

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from pydantic import TypeAdapter

from launch.checks.further import FurtherCheck
from launch.sampling.text import sample_texts
from recipes.data.text import Source
from recipes.errors import RecipeError
from recipes.loading.load import load_recipe
from recipes.models.folders import read_folder
from recipes.models.type_table import type_records
from recipes.models.vision_language import read_vision
from tests.tiers import tiered
from trainers.data.batches import build_batch
from trainers.data.dataset import Dataset
from trainers.data.encoding import TextSettings
from trainers.data.image_processor import load_image_processor, open_processor
from trainers.data.layouts.image_text import ImageText
from trainers.data.materialise import DataRequest, materialise
from trainers.data.tokenizer import load_tokenization
from trainers.evaluation.image_text_responses import image_text_prompts
from trainers.models.load import load_model
from trainers.models.small_vision import SMALL, write_small_vision
from trainers.models.vision_language import ImageTextTokenLosses
from trainers.store.store import Store

TEXTS = ["Which is it? One or two? It is three."] * 3
SIZES = [(20, 31), (9, 40), (64, 24), (16, 16)]
SHOWN = [[0], [1, 2], [], [3]]
"""Images of each row."""


def content(images: list[int]) -> list[dict[str, str]]:
    return [
        *({"type": "image", "path": f"{number}.png"} for number in images),
        {"type": "text", "text": "Which is it?"},
    ]


def turns(row: int) -> list[dict[str, Any]]:
    answer = {"role": "assistant", "content": [{"type": "text", "text": f"It is {'three' if row % 2 else 'one'}."}]}
    return [{"role": "user", "content": content(SHOWN[row])}, answer]


@pytest.fixture(scope="module", params=tiered(sorted(SMALL), ("qwen2_vl", "idefics3")))
def folder(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model of the type, images of several sizes and rows that show none, one or two of them."""
    place = tmp_path_factory.mktemp(request.param)
    write_small_vision(place / "model", request.param, TEXTS)
    for number, (height, width) in enumerate(SIZES):
        pixels = np.random.default_rng(number).integers(0, 256, (height, width, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(place / f"{number}.png")
    rows = [{"images": [f"{number}.png" for number in SHOWN[row]], "messages": turns(row)} for row in range(len(SHOWN))]
    (place / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return place


@pytest.fixture(scope="module")
def dataset(folder: Path) -> Dataset:
    return materialised(folder, "fp32")


def materialised(folder: Path, precision: str) -> Dataset:
    record = type_records()[model_type(folder)]
    settings = TextSettings(load_tokenization(folder / "model"), 256, packing=record.packing is not None)
    source: Any = TypeAdapter[Any](Source).validate_python({"source": "jsonl", "files": ["rows.jsonl"]})
    layout = ImageText(settings, load_image_processor(folder / "model").kept_in(precision))
    return materialise(DataRequest(source, folder, layout, 0), Store.open(str(folder / "store")))


def model_type(folder: Path) -> str:
    return str(json.loads((folder / "model" / "config.json").read_text())["model_type"])


def opened(folder: Path) -> Any:
    return load_model(folder / "model", "vision_language_model", device=torch.device("cpu")).eval()


def stock_inputs(folder: Path, processor: Any, turns: list[dict[str, Any]], images: list[int], **options: Any) -> Any:
    """What the folder's own processor makes of messages by its chat template."""
    text = processor.apply_chat_template(turns, tokenize=False, **options)
    pictures = [Image.open(folder / f"{number}.png") for number in images]
    return processor(images=pictures or None, text=[text], return_tensors="pt", add_special_tokens=False)


def test_the_loss_of_a_batch_is_that_of_the_stock_processor_and_model(folder: Path, dataset: Dataset) -> None:
    model, processor = opened(folder), open_processor(folder / "model")
    wanted, targets = 0.0, 0
    with torch.no_grad():
        for row, images in enumerate(SHOWN):
            asked = stock_inputs(folder, processor, turns(row)[:1], images, add_generation_prompt=True)
            whole = stock_inputs(folder, processor, turns(row), images)
            start, ids = asked["input_ids"].shape[1], whole["input_ids"][0]
            logits = model(**whole, use_cache=False).logits[0, start - 1 : -1]
            wanted += float(torch.nn.functional.cross_entropy(logits, ids[start:], reduction="sum"))
            targets += len(ids) - start
        batch = build_batch(dataset, range(len(dataset)))
        found = float(ImageTextTokenLosses(model)(batch))
    assert int(batch.tokens.loss_mask_BT[:, 1:].sum()) == targets  # type: ignore[union-attr]
    assert found == pytest.approx(wanted, rel=1e-5)


def test_every_parameter_learns_also_where_a_batch_has_no_image(folder: Path, dataset: Dataset) -> None:
    model = opened(folder)
    shown = [len(dataset.cut("image_numbers", row)) for row in range(len(dataset))]
    blank = [row for row, images in enumerate(shown) if not images]
    for rows in ([0], blank):
        if not rows:  # packed together with rows that have images
            continue
        model.zero_grad()
        batch: Any = build_batch(dataset, rows)
        loss = ImageTextTokenLosses(model)(batch)
        loss.backward()
        assert all(parameter.grad is not None for parameter in model.parameters())
    if blank:  # after a batch with images
        ids, mask = batch.tokens.input_ids_BT, batch.tokens.loss_mask_BT[:, 1:]
        logits = opened(folder)(input_ids=ids, use_cache=False).logits[:, :-1][mask]
        wanted = torch.nn.functional.cross_entropy(logits, ids[:, 1:][mask], reduction="sum")
        assert float(loss.detach()) == pytest.approx(float(wanted.detach()), rel=1e-5)


def test_values_in_the_precision_of_the_model_are_those_that_it_takes(folder: Path, dataset: Dataset) -> None:
    half = materialised(folder, "bf16")
    kept: list[Any] = [build_batch(rows, range(len(rows))).images for rows in (dataset, half)]  # type: ignore[union-attr]
    assert kept[0].keys() == kept[1].keys()
    for name, whole in kept[0].items():
        wanted = whole.bfloat16().float() if whole.is_floating_point() else whole
        assert torch.equal(kept[1][name], wanted)
    assert half.arrays["image_bytes"].nbytes < 0.7 * dataset.arrays["image_bytes"].nbytes


def test_held_out_questions_get_their_own_images(folder: Path, dataset: Dataset) -> None:
    processor = load_image_processor(folder / "model")
    asked = [len(prompt.images) for prompt in image_text_prompts(dataset, processor.image_id)]
    assert sorted(asked) == sorted(map(len, SHOWN))


def test_an_answer_is_that_of_the_stock_processor_and_model(folder: Path) -> None:
    model, processor = opened(folder), open_processor(folder / "model")
    for images in ([0], [1, 2], []):
        question = [{"role": "user", "content": content(images)}]
        inputs = stock_inputs(folder, processor, question, images, add_generation_prompt=True)
        answer = model.generate(**inputs, max_new_tokens=8, do_sample=False)[0][inputs["input_ids"].shape[1] :]
        shown = [folder / f"{number}.png" for number in images]
        options = {"chat": True, "images": shown, "max_new_tokens": 8, "temperature": 0.0}
        ours = sample_texts(str(folder / "model"), ["Which is it?"], **options)  # type: ignore[arg-type]
        assert ours[0]["response"] == processor.decode(answer, skip_special_tokens=True)


RECIPE = """\
name: eyes
stages:
  see:
    kind: finetune
    init_from: ./model
    data: {source: jsonl, files: [rows.jsonl]}
    train: {steps: 4, global_batch: 4, sequence_length: 128, packing: false, optimizer: {lr: 1e-3}}
"""


def problems(folder: Path, text: str = RECIPE) -> list[tuple[str, str]]:
    """Codes and fields of what `check` says of a recipe next to the rows."""
    read_folder.cache_clear()
    (folder / "recipe.yaml").write_text(text)
    try:
        load_recipe(folder / "recipe.yaml", [], False, FurtherCheck(None))
    except RecipeError as error:
        return [(problem.code.value, problem.field) for problem in error.problems]
    return []


def rows_with(folder: Path, change: dict[str, Any]) -> Path:
    """A copy of the folder with one row, changed."""
    place = Path(shutil.copytree(folder, folder.parent / f"{folder.name}-changed", dirs_exist_ok=True))
    row = {"images": ["0.png"], "prompt": "Which is it?", "completion": "One."} | change
    (place / "rows.jsonl").write_text(json.dumps(row) + "\n")
    return place


def test_a_right_recipe_is_right(folder: Path) -> None:
    assert problems(folder) == []


def test_what_a_type_lacks_is_refused(folder: Path) -> None:
    record = type_records()[model_type(folder)]
    found = problems(folder, RECIPE.replace(" packing: false,", ""))
    assert (("unsupported-model", "stages.see.train.packing") in found) == (record.packing is None)
    rewarded = RECIPE + RECIPE.partition("stages:\n")[2].replace("see:", "judge:").replace("finetune", "reward")
    assert ("unsupported-family", "stages.judge.init_from") in problems(folder, rewarded)


def test_an_image_larger_than_a_sequence_is_refused(folder: Path) -> None:
    place = rows_with(folder, {"images": ["2.png"]})
    found = problems(place, RECIPE.replace("128", "10"))
    counted = model_type(folder) != "idefics3"  # whose images only the processor counts
    assert (("rows-not-usable", "stages.see.data") in found) == counted


def test_rows_that_do_not_fit_are_named(folder: Path) -> None:
    token = SMALL[model_type(folder)].image
    assert problems(rows_with(folder, {"prompt": token * 2})) == [("rows-not-usable", "stages.see.data")]
    (rows_with(folder, {}) / "0.png").write_bytes((folder / "0.png").read_bytes()[:60])
    place = folder.parent / f"{folder.name}-changed"
    assert problems(place) == [("unreadable-image", "stages.see.data.files.0")]


def test_a_folder_without_a_processor_is_refused(folder: Path) -> None:
    place = rows_with(folder, {})
    (place / "model" / "preprocessor_config.json").unlink()
    assert ("missing-model-file", "stages.see.init_from") in problems(place)


def test_tokens_are_counted_from_the_files_as_the_processor_writes_them(folder: Path) -> None:
    config = json.loads((folder / "model" / "config.json").read_text())
    tokenization = load_tokenization(folder / "model")
    facts, problems = read_vision(folder / "model", config, tokenization.facts.vocabulary)
    assert not problems
    processor = load_image_processor(folder / "model")
    for number, (height, width) in enumerate(SIZES):
        written = processor.see((folder / f"{number}.png").read_bytes(), "").ids
        assert facts.tokens(height, width) in (None, len(written))
    assert (facts.tokens(9, 9) is None) == (model_type(folder) == "idefics3")


def test_a_type_whose_processor_does_not_open_is_refused_by_name(folder: Path) -> None:
    place = rows_with(folder, {})
    config = place / "model" / "config.json"
    content = json.loads(config.read_text())
    classes = ["SmolVLMForConditionalGeneration"]
    config.write_text(json.dumps(content | {"model_type": "smolvlm", "architectures": classes}))
    assert ("unsupported-model", "stages.see.init_from") in problems(place)
    assert "training" in type_records()["smolvlm"].lacks
