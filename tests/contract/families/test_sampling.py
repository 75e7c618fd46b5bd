"""What the families draw, write and name depends on what is asked and on the seed alone."""

import base64
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from trainers.store.store import Store

sys.path.insert(0, str(Path(__file__).parent))
from family_kit import result
from family_stages import CLASSIFIED, DRAWING, LANGUAGE

sys.path.pop(0)


@pytest.mark.parametrize("family", DRAWING)
def test_an_image_depends_on_its_seed_alone(finished: Path, family: str) -> None:
    from trainers.models.images.build import open_family

    store = Store.open(str(finished / "store"))
    opened: Any = open_family(store.folder(store.resolve(family), "model"))
    labels = [0, 1, 2, 3] if opened.is_conditional else None
    four = opened.sample([5, 6, 7, 8], labels)
    again = opened.sample([7], None if labels is None else [2])
    assert four.shape == (4, 1, 8, 8)
    assert float(four.min()) >= 0
    assert float(four.max()) <= 1
    np.testing.assert_allclose(again[0], four[2], atol=1e-5)
    assert not np.allclose(opened.sample([9], None if labels is None else [2])[0], four[2], atol=1e-2)


@pytest.mark.parametrize("family", LANGUAGE)
def test_an_answer_depends_on_its_seed_alone(finished: Path, family: str) -> None:
    from launch.sampling.text import sample_texts

    gaps = {
        "encoder": "The <|mask|> 5 comes <|mask|> 6.<|mask|><|mask|>",
        "encoder_decoder": "The number comes before 6.",
    }
    prompt = gaps.get(family, "The")
    options: dict[str, Any] = {"store": str(finished / "store"), "max_new_tokens": 8}
    first, same, other = (sample_texts(f"store://{family}", [prompt], seed=seed, **options) for seed in (3, 3, 4))
    assert first == same
    assert first != other


@pytest.mark.parametrize("name", CLASSIFIED)
def test_a_classifier_of_texts_names_the_class(finished: Path, name: str) -> None:
    from launch.sampling.text import sample_texts

    prompts, store = ["The number 3 comes before 4."], str(finished / "store")
    (found,) = sample_texts(f"store://{name}", prompts, store=store)
    shares = dict(part.split(" ") for part in found["response"].split(", "))
    assert set(shares) == {"early", "late"}
    assert sum(map(float, shares.values())) == pytest.approx(1, abs=2e-3)
    assert sample_texts(f"store://{name}", prompts, store=store, seed=5) == [found]


@pytest.mark.parametrize("family", DRAWING)
def test_grids_over_training_are_drawn_at_fixed_seeds(finished: Path, family: str) -> None:
    straight = result(finished, "straight", family)["grids"]
    assert [line["step"] for line in straight] == [4, 6]
    assert straight[0]["image"] != straight[1]["image"]
    head, _, data = straight[0]["image"].partition(",")
    assert head == "data:image/png;base64"
    assert base64.b64decode(data).startswith(b"\x89PNG")
