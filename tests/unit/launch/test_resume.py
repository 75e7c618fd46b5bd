"""What `resume` goes on with, and what it refuses."""

from typing import Any

import pytest

from launch import api
from launch.capacity.workers import Workers
from launch.inputs.changes import differing_values
from launch.inputs.resolve import resolve
from launch.inputs.resolved import Resolved
from launch.records.new_run import record_of
from launch.runs.resume import resumable, with_placement
from recipes.errors import Preempted, RecipeError, RequestError
from recipes.loading.load import load_recipe
from recipes.planning.settle import Hardware
from tests.unit.launch.bench import Bench
from trainers.store.manifest import Layout, StateManifest


@pytest.fixture
def stopped(bench: Bench) -> Any:
    """A run that was stopped in its second stage."""

    def stop(job: dict[str, Any], worker: Any) -> None:
        if job["stage"] == "chat":
            raise Preempted("state saved")

    bench.stages.hook = stop
    record = bench.record(bench.resolve())
    with pytest.raises(Preempted):
        bench.drive(record=record)
    bench.stages.hook = lambda job, worker: None
    return record


def test_the_resolved_recipe_is_read_back_as_it_was_written(bench: Bench) -> None:
    resolved = bench.resolve("seed=7")
    assert Resolved.from_json(resolved.to_json()) == resolved


def test_a_completed_run_has_nothing_to_resume(bench: Bench) -> None:
    record, _ = bench.drive()
    said: list[str] = []

    class Listener(api.SilentView):
        def say(self, text: str) -> None:
            said.append(text)

    result = api.resume(record.run, store=bench.store.uri, view=Listener())
    assert [text.partition(" ")[0] for text in said] == [record.run]
    assert set(result.stages) == {"base", "chat", "eval"}


def test_unchanged_inputs_are_accepted(stopped: Any) -> None:
    resolved = resumable(stopped, None, (), None)
    assert resolved is not None
    assert resolved == stopped.resolved()


def test_changed_data_are_refused_by_name(stopped: Any, recipe: Any) -> None:
    (recipe.parent / "text.txt").write_text("other words\n" * 20)
    with pytest.raises(RequestError, match=r"stages\.base\.data\.data: ") as refused:
        resumable(stopped, None, (), None)
    assert "stages.chat.data.data" in str(refused.value)
    assert refused.value.exit_code == 2


def test_missing_data_are_refused(stopped: Any, recipe: Any) -> None:
    (recipe.parent / "text.txt").unlink()
    with pytest.raises(RecipeError, match=r"stages\.base\.data"):
        resumable(stopped, None, (), None)


def test_placement_may_change(stopped: Any) -> None:
    resolved = resumable(stopped, None, ["stages.chat.train.save_every=3", "cluster.max_retries=0"], None)
    assert resolved is not None
    assert resolved.recipe.stages["chat"].train.save_every == 3
    assert resolved.recipe.cluster.max_retries == 0


def test_a_resume_elsewhere_keeps_precision_and_engine(bench: Bench) -> None:
    settled = resolve(load_recipe(bench.recipe), bench.store, Workers(2, 0), Hardware(fast_bf16="amx_bf16"))
    record = bench.record(settled)
    # This machine's own hardware is not asked, whether single settings are changed or the recipe is given again.
    for recipe, overrides in ((None, ["stages.base.train.save_every=2"]), (bench.recipe, [])):
        resumed = with_placement(record.resolved(), recipe, overrides)
        for name, stage in resumed.recipe.stages.items():
            assert stage.shard == settled.recipe.stages[name].shard
            assert stage.shard.precision == "bf16"
        assert resumed.settled_by == settled.settled_by
    moved = with_placement(record.resolved(), None, ["stages.base.shard.engine=plain", "stages.base.shard.zero=0"])
    assert moved.recipe.stages["base"].shard.engine_text == "plain"
    assert moved.plan(None).stages[0].fingerprint == settled.plan(None).stages[0].fingerprint
    with pytest.raises(RecipeError, match=r"stages.base.shard: zero 2 .* engine: deepspeed") as refused:
        with_placement(record.resolved(), None, ["stages.base.shard.engine=plain"])
    assert refused.value.codes == ("no-effect",)


def test_meaning_may_not_change(stopped: Any) -> None:
    with pytest.raises(RequestError, match=r"stages\.chat\.train\.steps: 4 in the run, 5 at present"):
        resumable(stopped, None, ["stages.chat.train.steps=5"], None)


def test_a_recipe_that_differs_is_refused_with_its_keys(stopped: Any, recipe: Any) -> None:
    assert resumable(stopped, recipe, (), None) is not None
    recipe.write_text(recipe.read_text().replace("lr: 1e-3", "lr: 2e-3", 1))
    with pytest.raises(RequestError, match=r"stages\.base\.train\.optimizer\.lr: 0\.001 in the run, 0\.002 at present"):
        resumable(stopped, recipe, (), None)


def test_mathematics_that_were_mended_are_refused(stopped: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    from recipes.stages.kinds import SEMANTICS

    before = SEMANTICS["finetune"]
    monkeypatch.setitem(SEMANTICS, "finetune", before + 1)
    with pytest.raises(RequestError, match=rf"stages\.chat\.semantics: {before} in the run, {before + 1} at present"):
        resumable(stopped, None, (), None)


def test_a_run_that_is_still_driven_is_refused(bench: Bench) -> None:
    from launch.records.journal import this_driver

    record = bench.record(bench.resolve())
    record.journal().write("run_started", driver=this_driver(), next_s=5)
    with pytest.raises(RequestError, match="is running on"):
        resumable(record, None, (), None)


def test_a_run_whose_driver_was_killed_is_lost_and_can_be_resumed(bench: Bench) -> None:
    from launch.records.journal import this_driver

    record = bench.record(bench.resolve())
    record.journal().write("run_started", driver={**this_driver(), "start_ticks": 1}, next_s=5)
    assert record.summary().state == "lost"
    assert resumable(record, None, (), None) is not None


def test_differing_values_are_dotted_and_show_both_values() -> None:
    before, after = {"a": {"b": 1, "c": [1]}, "d": 2}, {"a": {"b": 2, "c": [1]}, "e": 3}
    assert [str(change) for change in differing_values(before, after)] == [
        "a.b: 1 in the run, 2 at present",
        "d: 2 in the run, null at present",
        "e: null in the run, 3 at present",
    ]


def commit_state(record: Any, stage: str, fingerprint: str, step: int) -> None:
    """Leave a training state of the run's stage in the store."""
    lease = record.store.take_lease(record.run, stage)
    manifest = StateManifest(
        run=record.run, stage=stage, fingerprint=fingerprint, step=step, lease=lease,
        layout=Layout(workers=1, micro_batch=1, accumulation=1),
    )  # fmt: skip
    record.store.commit_state(manifest, lease)


def test_a_change_that_is_allowed_is_recorded_and_makes_an_id_of_its_own(stopped: Any, bench: Bench) -> None:
    old = {entry["name"]: entry["fingerprint"] for entry in stopped.raw["plan"]}
    commit_state(stopped, "chat", old["chat"], 2)
    override = ["stages.chat.train.steps=5", "stages.chat.train.optimizer.lr=0.5"]
    with pytest.raises(RequestError, match=r"stages\.chat\.train\.optimizer\.lr: .* in the run, 0\.5") as refused:
        resumable(stopped, None, override, None, ["stages.chat.train.steps"])
    assert "stages.chat.train.steps" not in str(refused.value)
    with pytest.raises(RequestError, match=r"--allow-change stages\.base: nothing changed there"):
        resumable(stopped, None, override, None, ["stages.chat.train", "stages.base"])
    found = resumable(stopped, None, override, None, ["stages.chat.train"])
    assert found is not None
    assert [(change["field"], change["after"]) for change in found.changes["chat"]] == [
        ("stages.chat.train.optimizer.lr", 0.5),
        ("stages.chat.train.steps", 5),
    ]
    new = {stage.name: stage.fingerprint for stage in found.plan(None).stages}
    fresh = {stage.name: stage.fingerprint for stage in bench.resolve(*override).plan(None).stages}
    assert new["base"] == old["base"]
    assert len({old["chat"], new["chat"], fresh["chat"]}) == 3, "what was changed on the way is no other run's artifact"
    assert found.accepts == {"chat": [old["chat"]]}
    assert found.replaced == {"eval": [old["eval"]]}
    assert Resolved.from_json(found.to_json()) == found


def test_a_stage_that_has_not_begun_is_simply_another(stopped: Any, bench: Bench) -> None:
    override = ["stages.chat.train.steps=5"]
    found = resumable(stopped, None, override, None, ["stages.chat.train.steps"])
    assert found is not None
    assert found.changes == {}
    new = {stage.name: stage.fingerprint for stage in found.plan(None).stages}
    assert new == {stage.name: stage.fingerprint for stage in bench.resolve(*override).plan(None).stages}


def test_an_allowed_change_reaches_the_workers_and_later_resumes(stopped: Any, bench: Bench) -> None:
    commit_state(stopped, "chat", stopped.raw["plan"][1]["fingerprint"], 2)
    jobs: list[dict[str, Any]] = []

    def fail_in_chat(job: dict[str, Any], worker: Any) -> None:
        jobs.append(job)
        if job["stage"] == "chat" and len(jobs) == 1:
            raise Preempted("state saved")

    bench.stages.hook = fail_in_chat
    found = resumable(stopped, None, ["stages.chat.train.steps=5"], None, ["stages.chat.train.steps"])
    assert found is not None
    stopped.revise(record_of(found))
    with pytest.raises(Preempted):
        bench.drive(record=stopped)
    assert stopped.resolved() == found
    assert resumable(stopped, None, (), None) == found
    bench.drive(record=stopped)
    chat = [job for job in jobs if job["stage"] == "chat"]
    assert [job["changes"][0]["field"] for job in chat] == ["stages.chat.train.steps"] * 2
    assert stopped.summary().state == "completed"
    assert resumable(stopped, None, (), None) is None
