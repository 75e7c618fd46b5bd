"""Rules that `check` and the worker share: both ask the stage, and refuse in the same words."""

import pickle
from typing import Any

import pytest
from pydantic import ValidationError

from recipes.errors import FieldFinding, RequestError, StageError, raise_findings
from recipes.fields import FieldError
from recipes.models.base import Linear
from recipes.models.decoder import DECODER
from recipes.models.encoder import ENCODER
from recipes.models.images.ddpm import Ddpm
from recipes.models.images.vae import Vae
from recipes.problem_codes import Code
from recipes.stages.algorithms import Grpo, ImageAlgorithm, TextAlgorithm
from recipes.stages.answers import Counts, TextFacts
from recipes.stages.ddpo import ActorFacts
from recipes.stages.evaluate import Evaluate, compared_images
from recipes.stages.feedback import Feedback
from recipes.stages.finetune import Finetune
from recipes.stages.kinds import STAGE_CLASSES, members
from recipes.stages.lora import Lora, ModuleNames
from recipes.stages.preference import Preference
from recipes.stages.reward import Reward
from recipes.stages.rl import RlText
from recipes.stages.rl_images import RlImages

LR = {"optimizer": {"lr": 0.1}}
TRAIN = {"steps": 1, "global_batch": 4, "sequence_length": 16, **LR}


def policy(**changes: Any) -> RlImages:
    keys = {"kind": "rl", "actor": "store://a", "reward": {"classifier": "store://j"}}
    algorithm = {"name": "ddpo", "iterations": 1, **LR}
    return RlImages.model_validate({**keys, "algorithm": algorithm, "rollout": {"images_per_iteration": 8}, **changes})


def codes(findings: list[FieldFinding]) -> set[tuple[str, Code]]:
    return {(found.field_path, found.finding.code) for found in findings}


def test_the_warm_up_of_a_reward_model_is_compared_with_the_steps_that_follow_from_its_tokens() -> None:
    train = {**TRAIN, "steps": None, "tokens": 640, "schedule": {"warmup_steps": 10}}
    data = {"source": "python-docs"}
    reward = Reward.model_validate({"kind": "reward", "init_from": "store://a", "data": data, "train": train})
    assert codes([*reward.rules()]) == {
        ("train.tokens", Code.NOT_APPLICABLE),
        ("train.schedule.warmup_steps", Code.WARMUP_TOO_LONG),
    }


GATHERED = ("rules", "text_rules", "needs")
"""Methods that gather what each class of a hierarchy says."""


def test_every_class_adds_to_what_its_base_says() -> None:
    classes = [*STAGE_CLASSES, *members(TextAlgorithm), *members(ImageAlgorithm)]
    hierarchies = {parent for found in classes for parent in found.__mro__}
    silent = {
        f"{owner.__name__}.{name}"
        for owner in hierarchies
        for name in GATHERED
        if name in vars(owner) and any(name in vars(base) for base in owner.__mro__[1:])
        if "super" not in vars(owner)[name].__code__.co_names
    }
    assert silent == set()


def test_a_classifier_must_know_the_classes_that_are_asked_for_or_rewarded() -> None:
    assert codes([*policy().judge_rules(["a"], ["a", "z"])]) == {("reward.label", Code.UNKNOWN_CLASS)}
    labelled = policy(reward={"classifier": "store://j", "label": "a"})
    assert [*labelled.judge_rules(["a"], ["z"])] == []
    assert codes([*labelled.judge_rules(["b"])]) == {("reward.label", Code.UNKNOWN_CLASS)}


def test_captions_need_labels_where_the_reward_needs_the_class_of_their_image() -> None:
    assert codes([*policy().label_rules(has_labels=False)]) == {("prompts", Code.MISSING_LABELS)}
    assert codes([*policy().label_rules(has_labels=False, key="labels")]) == {("prompts.labels", Code.MISSING_LABELS)}
    assert [*policy().label_rules(has_labels=True)] == []
    assert [*policy(reward={"rule": "ink"}).label_rules(has_labels=False)] == []


def test_distances_need_images_on_either_side() -> None:
    assert compared_images(2, 2) is None
    for held_out, others in ((1, 9), (9, 1), (0, 0)):
        finding = compared_images(held_out, others)
        assert finding is not None
        assert finding.code == Code.TOO_FEW_SAMPLES


def test_what_an_actor_cannot_be_asked_for() -> None:
    plain = Ddpm(family="ddpm", timesteps=10, sampling_steps=1)
    found = codes([*policy(rollout={"images_per_iteration": 8, "guidance": 2}).actor_rules(ActorFacts(plain, False))])
    assert found == {
        ("reward.label", Code.MISSING_KEY),
        ("rollout.steps", Code.TOO_FEW_STEPS),
        ("rollout.guidance", Code.UNMET_REQUIREMENT),
    }
    by_class = ActorFacts(Ddpm(family="ddpm", class_conditional=True), False, tuple("abcdefghi"))
    assert codes([*policy().actor_rules(by_class)]) == {("rollout.images_per_iteration", Code.TOO_FEW_SAMPLES)}
    assert codes([*policy().actor_rules(ActorFacts(plain, True))]) >= {("prompts", Code.MISSING_KEY)}


@pytest.mark.parametrize(
    ("workers", "rollout", "mini_batches", "text", "field"),
    [
        (2, {"prompts_per_iteration": 7}, 1, 0, "rollout.prompts_per_iteration"),
        (2, {"prompts_per_iteration": 8, "samples_per_prompt": 2}, 3, 0, "algorithm.mini_batches"),
        (2, {"prompts_per_iteration": 8}, 1, 3, "algorithm.text_batch"),
        (4, {"prompts_per_iteration": 8}, 4, 0, "rollout.prompts_per_iteration"),
        (2, {"prompts_per_iteration": 8}, 2, 0, None),
    ],
)
def test_what_workers_cannot_share(
    workers: int, rollout: dict[str, Any], mini_batches: int, text: int, field: str | None
) -> None:
    keys: dict[str, Any] = {
        "kind": "rl",
        "actor": "a",
        "rewards": {"judge": {"model": "r"}},
        "prompts": {"source": "python-docs"},
    }
    algorithm: dict[str, Any] = {"name": "ppo", "iterations": 1, "mini_batches": mini_batches, **LR}
    if text:
        keys["text"] = {"source": "python-docs"}
        algorithm |= {"text_coef": 1.0, "text_batch": text}
    batch = RlText.model_validate({**keys, "algorithm": algorithm, "rollout": rollout}).batch()
    findings = [*batch.rules(workers)]
    assert [found.field_path for found in findings] == ([] if field is None else [field])
    assert batch.divides(workers) is (field is None)
    if findings:
        with pytest.raises(StageError, match=field) as refused:
            raise_findings(findings, StageError)
        assert pickle.loads(pickle.dumps(refused.value)).codes == tuple(found.finding.code for found in findings)


def test_a_model_of_another_family_is_refused() -> None:
    train = {"steps": 1, "global_batch": 1, "sequence_length": 8, **LR}
    keys = {"kind": "finetune", "init_from": "a", "data": {"source": "python-docs"}, "train": train}
    stage = Finetune.model_validate({**keys, "parts": ["vision"], "dropout": 0.1})
    with pytest.raises(RequestError, match=r"^parts: .*; dropout: ") as refused:
        stage.check_model(TextFacts(DECODER))
    assert refused.value.codes == (Code.NOT_APPLICABLE, Code.NOT_APPLICABLE)
    evaluation = Evaluate.model_validate({"kind": "evaluate", "of": ["a"]})
    with pytest.raises(RequestError) as refused:
        evaluation.check_model(TextFacts(ENCODER))
    assert refused.value.codes == (Code.UNSUPPORTED_FAMILY,)
    evaluation.check_model(TextFacts(DECODER))


def test_a_network_says_which_sizes_it_cannot_halve() -> None:
    drawing = Ddpm(family="ddpm", block_out_channels=[8, 8, 8])
    assert drawing.size_rule(8, 8) is None
    finding = drawing.size_rule(8, 6, "latents")
    assert finding is not None
    assert finding.code == Code.SIZE_NOT_DIVISIBLE
    assert "latents are 8x6" in finding.message
    assert Vae(family="vae", type="mlp", depth=4).size_rule(9, 9) is None
    assert Vae(family="vae", type="mlp").latents_rule() is not None


@pytest.mark.parametrize("lora", [None, Lora(r=2)])
@pytest.mark.parametrize("merge", [True, False])
def test_an_algorithm_without_a_critic_plans_for_none_and_makes_what_a_fine_tuning_makes(
    lora: Lora | None, merge: bool
) -> None:
    keys = {
        "kind": "rl",
        "actor": "store://a",
        "rewards": {"judge": {"model": "store://r"}},
        "prompts": {"source": "jsonl", "files": ["p"]},
    }
    critical = RlText.model_validate({**keys, "algorithm": {"name": "ppo", "iterations": 2, **LR}}).changed(
        lora=lora, merge=merge
    )
    alone = critical.changed(algorithm=Grpo.model_validate({"name": "grpo", "iterations": 2, **LR}))
    tuned = Finetune.model_validate(
        {"kind": "finetune", "init_from": "store://a", "data": keys["prompts"], "train": TRAIN}
    ).changed(lora=lora, merge=merge)
    assert alone.outputs() == tuned.outputs()
    assert critical.outputs().keys() - alone.outputs().keys() >= {"critic"}
    assert [pair.field_path for pair in critical.shared_tokens()] == ["rewards.judge.model"]
    assert [*alone.shared_tokens()] == []
    counts = Counts(full=1000, scored=900, valued=901, adapter=0 if lora is None else 50, width=8)
    more, less = critical.held(counts), alone.held(counts)
    assert more.trainable - less.trainable == (901 if lora is None else 50 + 8 + 1)
    assert less.trainable == tuned.held(counts).trainable
    assert less.stored == tuned.held(counts).stored
    assert (critical.forward().copies, alone.forward().copies) == (2, 1)


@pytest.mark.parametrize(
    ("suites", "pairs"), [(["perplexity"], ["of.1"]), (["generation"], []), (["generation", "comparison"], [])]
)
def test_only_what_is_counted_by_tokens_needs_one_tokenizer(suites: list[str], pairs: list[str]) -> None:
    rewards = {"right": {"rule": "exact"}} if "comparison" in suites else {}
    keys = {"kind": "evaluate", "of": ["./a", "./b"], "rewards": rewards}
    assert [pair.field_path for pair in Evaluate.model_validate({**keys, "suites": suites}).shared_tokens()] == pairs


def preference(**changes: Any) -> Preference:
    keys = {"kind": "preference", "init_from": "store://a", "data": {"source": "jsonl", "files": ["p"]}, "train": TRAIN}
    return Preference.model_validate(keys | changes)


def test_what_a_preference_stage_refuses() -> None:
    tokens = {key: value for key, value in TRAIN.items() if key != "steps"} | {"tokens": 64}
    assert codes([*preference(train=tokens).rules()]) == {("train.tokens", Code.NOT_APPLICABLE)}
    assert codes([*preference(merge=False).rules()]) == {("merge", Code.NO_EFFECT)}
    assert [*preference(merge=False, lora={"r": 2}).rules()] == []
    packing = preference().packing_rule(DECODER)
    assert packing is not None
    assert packing.code is Code.NOT_APPLICABLE
    held_out = preference().held_out_rule()
    assert held_out is not None
    assert held_out.code is Code.MISSING_HELD_OUT
    refused = preference().refuse_model(ENCODER)
    assert refused is not None
    assert refused.code is Code.UNSUPPORTED_FAMILY
    assert preference().refuse_model(DECODER) is None


@pytest.mark.parametrize(("name", "role"), [("dpo", "preferences"), ("orpo", "preferences"), ("kto", "judged")])
def test_what_a_preference_stage_reads_follows_from_its_loss(name: str, role: str) -> None:
    data = {"source": "jsonl", "files": ["p"], "hold_out": 0.1}
    stage = preference(loss={"name": name}, data=data)
    assert [(use.field_path, use.role, use.held_out) for use in stage.sources()] == [
        ("data", role, False),
        ("evaluation", role, True),
    ]


UNTIED = ModuleNames("the model", ("q_proj", "up_proj"), "embed_tokens", "lm_head")
TIED = ModuleNames("the model", ("q_proj", "up_proj"), "embed_tokens", "lm_head", is_tied=True)
SHARED = ModuleNames("the model", ("q_proj", "up_proj"), "shared", "lm_head", is_tied=True, is_shared=True)
SCORED = ModuleNames("the model", ("q_proj", "up_proj"), "embed_tokens", None, ("score",))


@pytest.mark.parametrize(
    ("names", "lora", "found"),
    [
        (TIED, {"modules_to_save": ["lm_head", "model.embed_tokens"], "target_modules": ["mlp.up_proj"]}, set()),
        (TIED, {"target_modules": ["lm_head"]}, {("lora.target_modules.0", Code.CONFLICTING_KEYS)}),
        (UNTIED, {"target_modules": ["q_proj", "lm_head", "embed_tokens"]}, set()),
        (UNTIED, {"target_modules": ["lm_head"], "dora": True}, {("lora.target_modules.0", Code.CONFLICTING_KEYS)}),
        (UNTIED, {"target_modules": r".*\.q_proj", "rank_pattern": {"q_proj": 2}}, set()),
        (UNTIED, {"target_modules": "q_proj"}, {("lora.target_modules", Code.INVALID_FORMAT)}),
        (UNTIED, {"target_modules": "(q_proj"}, {("lora.target_modules", Code.INVALID_FORMAT)}),
        (UNTIED, {"alpha_pattern": {"(q": 1}}, {("lora.alpha_pattern.(q", Code.INVALID_FORMAT)}),
        (UNTIED, {"modules_to_save": ["head"]}, {("lora.modules_to_save.0", Code.UNKNOWN_MODULE)}),
        (
            UNTIED,
            {"modules_to_save": ["q_proj"], "target_modules": ["q_proj"]},
            {("lora.target_modules.0", Code.CONFLICTING_KEYS)},
        ),
        (SHARED, {"modules_to_save": ["lm_head"]}, {("lora.modules_to_save.0", Code.NOT_APPLICABLE)}),
        (SCORED, {"modules_to_save": ["score", "embed_tokens"]}, set()),
        (UNTIED, {"quantize": "nf4", "modules_to_save": ["lm_head"], "init": "pissa", "dora": False}, set()),
        (
            UNTIED,
            {"quantize": "nf4", "modules_to_save": ["up_proj"], "target_modules": ["q_proj"]},
            {("lora.quantize", Code.CONFLICTING_KEYS)},
        ),
        (
            UNTIED,
            {"quantize": "int8", "target_parameters": ["experts.up"]},
            {("lora.quantize", Code.CONFLICTING_KEYS)},
        ),
        (SCORED, {"modules_to_save": ["lm_head"]}, {("lora.modules_to_save.0", Code.UNKNOWN_MODULE)}),
    ],
)
def test_an_adapter_is_about_modules_that_can_learn_so(
    names: ModuleNames, lora: dict[str, Any], found: set[tuple[str, Code]]
) -> None:
    assert codes([*Lora.model_validate(lora).target_rules(names)]) == found


@pytest.mark.parametrize(
    ("lora", "is_tied", "adapter", "saved"),
    [
        ({"target_modules": ["q_proj"], "rank_pattern": {"q_proj": 4}}, False, 3 * 4 * 20, 0),
        ({"target_modules": r".*\.(q|up)_proj"}, False, 3 * 2 * 20 + 3 * 2 * 30, 0),
        ({"modules_to_save": ["lm_head", "embed_tokens"]}, True, 3 * 2 * 20 + 3 * 2 * 30, 1000),
        ({"modules_to_save": ["lm_head", "embed_tokens"]}, False, 3 * 2 * 20 + 3 * 2 * 30, 2000),
        ({"modules_to_save": ["up_proj", "score"]}, False, 3 * 2 * 20, 3 * 200),
        ({"target_modules": ["q_proj", "lm_head"]}, False, 3 * 2 * 20 + 2 * 110, 0),
    ],
)
def test_what_an_adapter_and_its_modules_hold(lora: dict[str, Any], is_tied: bool, adapter: int, saved: int) -> None:
    spec = Lora.model_validate({"r": 2, **lora})
    linears, end = [Linear("q_proj", 10, 10, 3), Linear("up_proj", 10, 20, 3)], Linear("", 100, 10)
    assert spec.num_parameters(linears, end) == adapter
    assert spec.num_saved(linears, end, is_tied=is_tied) == saved


FEEDBACK = {"kind": "feedback", "of": "store://a", "prompts": {"source": "python-docs"}}
RULE = {"short": {"rule": "length", "max": 9}}


@pytest.mark.parametrize(
    ("changes", "code"),
    [
        ({"judge": "reward", "rewards": RULE}, Code.MISSING_KEY),
        ({"judge": "rule"}, Code.MISSING_KEY),
        ({"judge": "rule", "rewards": {"judge": {"model": "store://r"}}}, Code.CONFLICTING_KEYS),
        ({"judge": "rule", "rewards": RULE, "annotators": ["ann"]}, Code.NO_EFFECT),
        ({"margin": 0.5}, Code.NO_EFFECT),
        ({"annotators": ["ann", "ann"]}, Code.DUPLICATE_ITEM),
    ],
)
def test_a_feedback_stage_has_what_its_judge_needs_and_nothing_else(changes: dict[str, Any], code: Code) -> None:
    with pytest.raises(ValidationError) as refused:
        Feedback.model_validate({**FEEDBACK, **changes})
    found = refused.value.errors()[0]["ctx"]["error"]
    assert isinstance(found, FieldError)
    assert code in {finding.code for finding in found.findings}


def test_more_labels_than_annotators_can_give_are_refused() -> None:
    most = {**FEEDBACK, "num_prompts": 10, "labels": 20}
    assert codes([*Feedback.model_validate(most).rules()]) == {("labels", Code.OUT_OF_RANGE)}
    assert codes([*Feedback.model_validate({**most, "annotators": ["ann", "bob"]}).rules()]) == set()
