"""DDPO of a diffusion that reads captions, with adapters: what is drawn, who is the reference, its state."""

import contextlib
import shutil
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from recipes.errors import RequestError, StageError
from recipes.stages.lora import Lora
from rlhf.images.conditions import CaptionPrompts
from trainers.checkpoint import checkpoint as checkpoint_module
from trainers.engine.protocol import STATE_GROUPS
from trainers.store.store import Store

sys.path.insert(0, str(Path(__file__).parent))
from small_ddpo import CAPTIONS, Listener, Words, build, caption_prompts, captioned_set
from state_items import LOOP, Fatal, Killed, Made, Part, items, leave_out, saved_step, train_once

sys.path.pop(0)

LORA = Lora(r=2, dropout=0.3)


def test_captions_are_drawn_by_the_seed_each_for_its_samples(tmp_path: Path) -> None:
    prompts = caption_prompts(tmp_path)
    first, again, second = prompts.asked(0), caption_prompts(tmp_path).asked(0), prompts.asked(1)
    other = caption_prompts(tmp_path, seed=1).asked(0)
    assert first.captions is not None
    assert again.captions is not None
    ids = first.captions.input_ids_BT
    assert ids.shape[0] == 12
    assert torch.equal(ids, again.captions.input_ids_BT)
    assert torch.equal(ids[0::3], ids[2::3])
    assert first.labels_B.tolist() != second.labels_B.tolist() or first.labels_B.tolist() != other.labels_B.tolist()
    # Twenty draws of four are whole epochs of the five captions that are not empty.
    drawn = [tuple(row) for number in range(5) for row in _read(prompts.asked(number))[::3]]
    assert len(drawn) == 20
    assert sorted(drawn) == sorted([_text(caption) for caption in CAPTIONS if caption] * 4)


def _read(asked: Any) -> list[tuple[int, ...]]:
    """The tokens of each caption without padding."""
    texts = asked.captions
    return [tuple(ids[mask].tolist()) for ids, mask in zip(texts.input_ids_BT, texts.attention_mask_BT, strict=True)]


def _text(caption: str) -> tuple[int, ...]:
    return tuple(Words().tokenize([caption], ["it"])[0])


def test_captions_of_one_text_are_one_group_and_labels_are_their_images(tmp_path: Path) -> None:
    dataset = captioned_set(tmp_path, ("thin", "thick", "thin", "thin"))
    asked = CaptionPrompts(dataset, Words(), images=8, samples=2, seed=0).asked(0)
    texts = _read(asked)
    assert len(set(texts)) == 2
    for text, group in zip(texts, asked.groups_B.tolist(), strict=True):
        assert {g for t, g in zip(texts, asked.groups_B.tolist(), strict=True) if t == text} == {group}
    assert sorted(asked.labels_B.tolist()) == [0, 0, 0, 0, 1, 1, 1, 1]


@pytest.mark.parametrize(
    ("captions", "said"), [((), "captions, which text_encoder reads"), (("", ""), r"empty \(2 images\)")]
)
def test_images_without_captions_are_refused(tmp_path: Path, captions: tuple[str, ...], said: str) -> None:
    with pytest.raises(RequestError, match=said):
        CaptionPrompts(captioned_set(tmp_path, captions), Words(), images=4, samples=2, seed=0)


@pytest.mark.parametrize("guidance", [1.0, 2.0])
@pytest.mark.parametrize("lora", [LORA, None])
def test_at_the_start_every_ratio_is_one_and_kl_is_zero(tmp_path: Path, guidance: float, lora: Lora | None) -> None:
    ddpo = build(guidance=guidance, micro_batch=4, prompts=caption_prompts(tmp_path), lora=lora)
    (first, *_) = ddpo.source.micro_batches(0)
    value, weight = ddpo.objective.loss(ddpo.engine.module, first).metrics["ratio"]
    assert float(value) / float(weight) == pytest.approx(1.0, abs=1e-5)
    assert ddpo.listener.heard[0]["kl"] == pytest.approx(0, abs=1e-9)


def test_a_caption_changes_the_image_and_its_neighbours_do_not(tmp_path: Path) -> None:
    ddpo = build(guidance=3.0, prompts=caption_prompts(tmp_path), lora=LORA)
    asked = caption_prompts(tmp_path).asked(0)
    rollouts = ddpo.policy
    rollouts.sync(0)
    all_of_them = rollouts.draw(range(12), asked, range(12)).images_BCHW
    one = rollouts.draw([7], asked.rows(slice(7, 8)), [7]).images_BCHW
    torch.testing.assert_close(all_of_them[7], one[0], rtol=1e-4, atol=1e-5)
    other = rollouts.draw([7], asked.rows(slice(0, 1)), [7]).images_BCHW
    assert not torch.equal(asked.captions.input_ids_BT[7], asked.captions.input_ids_BT[0])  # type: ignore[union-attr]
    assert not torch.allclose(other[0], one[0], atol=1e-4)


def test_advantages_are_normalised_within_a_caption(tmp_path: Path) -> None:
    ddpo = build(prompts=caption_prompts(tmp_path), lora=LORA)
    experience = ddpo.source._begin(0).estimate.experience
    groups = caption_prompts(tmp_path).asked(0).groups_B
    assert len(groups.unique()) >= 3
    for group in groups.unique():
        own = experience.credit.advantages_NA[groups == group, 0]
        assert float(own.mean()) == pytest.approx(0, abs=1e-5)
        assert float(own.std(correction=0)) == pytest.approx(1, abs=1e-2)


def test_adapters_learn_ink_and_nothing_else_moves(tmp_path: Path) -> None:
    prompts = caption_prompts(tmp_path, images=192, samples=48)
    ddpo = build(images=192, micro_batch=48, iterations=6, epochs=2, mini_batches=4, prompts=prompts, lora=Lora(r=4))
    before = ddpo.parameters()
    ddpo.run(rate=3e-2)
    reports = ddpo.listener.heard
    assert reports[-1]["score_mean"] > reports[0]["score_mean"] + 0.25 * reports[0]["score_std"]
    assert reports[-1]["kl"] > 0.1
    assert [report["kl_alarm"] for report in reports] == [0.0] * 7
    moved = {name for name, tensor in ddpo.parameters().items() if not torch.equal(before[name], tensor)}
    assert moved
    assert all("lora_" in name for name in moved)


# The state: adapters with their moments, the controller, the best policy so far; captions are none of it

VALUES = ("kl_coef", "start", "best_score", "best_iteration")
PARTS = ("lora_A", "lora_B")
STEPS = 6


def ddpo_part(folder: Path, stop_at: int | None = None) -> Part:
    controller = {"name": "adaptive", "target": 0.01, "horizon": 50}
    options = {"iterations": 3, "kl_coef": 0.1, "kl_limit": 50.0, "kl_controller": controller, "kl_in": "loss"}
    made = build(
        images=8, micro_batch=4, guidance=2.0, prompts=caption_prompts(folder, 8, 2), lora=LORA,
        listener=Listener(stop_at=stop_at), **options,
    )  # fmt: skip
    return Part(made.engine, made.source, made.objective, made.listener)


def run(part: Part, uri: Path) -> Made:
    return train_once(part, uri, {"actor": 1e-2}, part.source.steps_per_iteration)


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> tuple[Made, Path]:
    """What a straight run makes, and a store with the state after its second iteration."""
    folder = tmp_path_factory.mktemp("ddpo")
    straight = run(ddpo_part(folder), folder / "straight")
    run(ddpo_part(folder, stop_at=3), folder / "store")
    return straight, folder / "store"


def test_the_items_of_a_ddpo_are_all_tried(made: tuple[Made, Path], tmp_path: Path) -> None:
    straight, store = made[0], Path(shutil.copytree(made[1], tmp_path / "store"))
    manifest = Store.open(str(store)).latest_state("run", "stage")
    assert manifest is not None
    assert manifest.step == 4
    assert set(manifest.values["source"]) == set(VALUES)  # type: ignore[arg-type]
    assert set(manifest.tensors) == {*STATE_GROUPS, checkpoint_module.SOURCE_GROUP}
    for entry in manifest.tensors["param"]:
        assert sum(part in entry.name for part in PARTS) == 1, entry.name
    assert run(ddpo_part(tmp_path), store) == straight


@pytest.mark.parametrize("step", range(1, STEPS))
def test_a_kill_in_any_step_of_a_ddpo_changes_nothing(made: tuple[Made, Path], tmp_path: Path, step: int) -> None:
    killed = ddpo_part(tmp_path)
    killed.objective = Fatal(killed.objective, killed.listener, step, call=1)
    with pytest.raises(Killed):
        run(killed, tmp_path)
    assert saved_step(tmp_path) == step // 2 * 2
    assert run(ddpo_part(tmp_path), tmp_path) == made[0]


@pytest.mark.parametrize(
    "item",
    ["source kl_coef", "source start", *(f"loop {name}" for name in LOOP), *items(PARTS), "engine steps_applied"],
)
def test_leaving_an_item_of_a_ddpo_out_is_noticed(
    made: tuple[Made, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, item: str
) -> None:
    straight, store = made[0], Path(shutil.copytree(made[1], tmp_path / "store"))
    part = ddpo_part(tmp_path)
    leave_out(monkeypatch, item, part.source.state())
    with contextlib.suppress(StageError):  # a refusal is notice, too
        assert run(part, store) != straight


def test_the_set_holds_what_the_tests_say() -> None:
    assert len([caption for caption in CAPTIONS if caption]) == 5
    assert len(set(CAPTIONS)) == 5
    assert np.unique([len(caption) for caption in CAPTIONS]).size > 3
