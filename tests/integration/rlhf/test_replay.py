"""Replay: what the store keeps of an iteration gives every reward and every draw again, to the bit."""

from dataclasses import replace
from typing import Any

import pytest

from recipes.errors import Preempted, RequestError
from recipes.stages.rl import RlText
from rlhf.task import run_rl
from rlhf.text.kept_rollouts import read_rollouts
from rlhf.text.replay import replay
from rlhf.text.samples import Sample, pack, unpack
from tests.integration.rlhf.workshop import PLAIN, Listener, Workshop, jsonl, open_workshop
from trainers.store.manifest import RolloutsManifest

GIVEN = {"actor": "chat"}


@pytest.fixture(scope="module")
def workshop(tmp_path_factory: pytest.TempPathFactory) -> Workshop:
    """A tiny chat model and sums."""
    made = open_workshop(tmp_path_factory.mktemp("replay"), width=16)
    jsonl(made.folder / "sums.jsonl", [{"prompt": f"What is {n}?", "answer": n} for n in range(20)])
    return made


def spec(**rollout: Any) -> RlText:
    return RlText.model_validate(
        {
            "kind": "rl",
            "actor": "chat",
            "rewards": {"short": {"rule": "length", "max": 8, "unit": "characters"}, "right": {"rule": "number"}},
            "prompts": {"source": "jsonl", "files": ["sums.jsonl"]},
            "rollout": {"prompts_per_iteration": 4, "samples_per_prompt": 2, "max_new_tokens": 6, **rollout},
            "algorithm": {"name": "grpo", "iterations": 3, "optimizer": {"lr": 1e-2}, "save_every": 2},
            "shard": PLAIN,
        }
    )


def kept(workshop: Workshop, stage: str) -> dict[int, RolloutsManifest]:
    found = {at: workshop.store.find_rollouts("run", stage, at) for at in workshop.store.list_rollouts("run", stage)}
    return {iteration: manifest for iteration, manifest in found.items() if manifest is not None}


def samples(workshop: Workshop, manifest: RolloutsManifest) -> list[Sample]:
    return unpack(workshop.store.objects.get_bytes(manifest.files["samples.safetensors"].sha256))


def test_an_iteration_comes_out_again_to_the_bit(workshop: Workshop) -> None:
    run_rl(spec(), workshop.context("policy", GIVEN))
    manifests = kept(workshop, "policy")
    assert list(manifests) == [0, 1, 2, 3]
    for iteration, manifest in manifests.items():
        found = samples(workshop, manifest)
        assert len(found) == 8
        assert {(s.version.iteration, s.version.steps_applied) for s in found} == {(iteration, 2 * iteration)}
        assert len({(s.row, s.occurrence) for s in found}) == 8
        assert all(s.rewards.keys() == {"short", "right"} and s.prompt_id.startswith("sums.jsonl:") for s in found)
    assert len({samples(workshop, manifest)[0].version.digest for manifest in manifests.values()}) == 4
    context = workshop.context("policy", GIVEN)
    again = {iteration: replay(spec(), context, iteration) for iteration in (0, 1, 3)}
    for found_again in again.values():
        assert found_again.is_equal
        assert found_again.rewards.keys() == {"short", "right"}
        assert found_again.conditions == {}
    drawn = {
        "tokens",
        "actions",
        "logprobs",
        "stop_reason",
        "version",
        "text",
        "prompt_id",
        "row",
        "occurrence",
        "turn_rewards",
    }
    assert again[0].drawn.keys() == again[3].drawn.keys() == drawn
    assert (again[1].drawn, bool(again[1].not_drawn)) == ({}, True)  # its training state was never saved
    with pytest.raises(RequestError):
        replay(spec(), context, 4)


def test_what_was_altered_shows(workshop: Workshop) -> None:
    context = workshop.context("altered", GIVEN)
    run_rl(spec(), context)
    manifest = kept(workshop, "altered")[3]
    first, second, *others = samples(workshop, manifest)
    changed = [replace(first, rewards={**first.rewards, "short": 9.0}), replace(second, logprobs=second.logprobs * 2)]
    entry = workshop.store.objects.put_chunks([pack([*changed, *others])])
    workshop.store.put_rollouts(manifest.model_copy(update={"files": {"samples.safetensors": entry}}), context.lease)
    found = replay(spec(), context, 3)
    assert not found.is_equal
    assert {name for name, compared in found.rewards.items() if compared.differing} == {"short"}
    assert {name: compared.differing for name, compared in found.drawn.items() if compared.differing} == {"logprobs": 1}


@pytest.mark.parametrize(("keep", "iterations"), [(2, [2, 3]), ("none", []), ("all", [0, 1, 2, 3])])
def test_samples_are_neither_lost_nor_doubled_by_a_stop(
    workshop: Workshop, keep: int | str, iterations: list[int]
) -> None:
    """Stopped in iteration 2, before its update: iterations 0 to 2 are there, and 2 is drawn again."""
    straight, broken = f"straight-{keep}", f"broken-{keep}"
    run_rl(spec(keep=keep), workshop.context(straight, GIVEN))
    context = workshop.context(broken, GIVEN)
    stopping = Stopping(at_step=5)
    with pytest.raises(Preempted):
        run_rl(spec(keep=keep), replace(context, observer=stopping))
    run_rl(spec(keep=keep), workshop.context(broken, GIVEN))
    one, other = kept(workshop, straight), kept(workshop, broken)
    assert list(one) == list(other) == iterations
    assert [manifest.files for manifest in one.values()] == [manifest.files for manifest in other.values()]
    folder = f"refs/rollouts/run/{broken}"
    assert len(list(workshop.store.files.walk(folder))) == len(iterations)


class Stopping(Listener):
    """Requests a stop after a number of steps."""

    def __init__(self, at_step: int) -> None:
        super().__init__()
        self._at_step, self._done = at_step, 0

    def phase(self, name: str, **progress: float) -> None:
        """Follow the steps."""
        super().phase(name, **progress)
        self._done = int(progress.get("step", self._done))

    def stop_requested(self) -> bool:
        """From the chosen step on."""
        return self._done >= self._at_step


def test_kept_rollouts_are_shown_token_by_token_with_log_ratios_to_the_start(workshop: Workshop) -> None:
    run_rl(spec(), workshop.context("shown", GIVEN))
    context = workshop.context("shown", GIVEN)
    found = read_rollouts(spec(), context, 16, log_ratios=True)
    assert (found["iterations"], found["kept"], len(found["samples"])) == ([0, 3], 4, 16)
    records = [sample for at in (0, 3) for sample in samples(workshop, kept(workshop, "shown")[at])]
    for line, sample in zip(found["samples"], records, strict=True):
        written = workshop.tokenization.decode(sample.action_ids, skip_special=False)
        assert "".join(text for text, _ in line["tokens"]) == written.rstrip("\ufffd")
        assert line["sum"] == pytest.approx(sum(value for _, value in line["tokens"]), abs=1e-2)
        assert line["rewards"] == pytest.approx(dict(sample.rewards), abs=1e-4)
    first, last = (sum(abs(line["sum"]) for line in found["samples"] if line["iteration"] == at) for at in (0, 3))
    assert first < 1e-2 < last  # nothing is learnt before iteration 0
    plain = read_rollouts(spec(), context, 1, log_ratios=False)
    assert [line["sum"] for line in plain["samples"]] == pytest.approx(
        [float(sample.logprobs.sum()) for sample in records[8:]], abs=1e-3
    )


def test_a_stage_without_kept_rollouts_shows_none(workshop: Workshop) -> None:
    with pytest.raises(RequestError):
        read_rollouts(spec(), workshop.context("nothing", GIVEN), 10, log_ratios=False)
