"""Nothing that an adapter learned is lost when the next stage starts, however small: bf16 models whose adapter moves
every weight by less than bf16 can tell, so that the merged files are the base's."""

import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from torch import Tensor, nn
from transformers import AutoModelForCausalLM

from launch.runs.suites import suites_of
from launch.sampling.text import opened
from recipes.stages.evaluate import Evaluate
from recipes.stages.finetune import Finetune
from recipes.stages.reward import Reward
from recipes.stages.rl import RlText
from rlhf.task import run_rl
from rlhf.text.build_policy import SharedModels, build_models
from rlhf.text.reward_inputs import same_tokens
from rlhf.text.reward_stage import run_reward
from rlhf.text.stage import reward_source
from tests.integration.rlhf.workshop import CPU, WORDS, Workshop, jsonl, open_workshop, sizes_of
from trainers.evaluation.evaluate_stage import run_evaluate
from trainers.models.decoder import build_decoder
from trainers.models.folders import write_model
from trainers.models.protocol import TokenizerFacts
from trainers.models.stack import load_exact, load_stack
from trainers.store.adapters import weights_of
from trainers.store.collection import Keep, collect
from trainers.store.export import export
from trainers.store.manifest import ArtifactManifest, files_digest
from trainers.tasks.language_model import run_language_model
from trainers.tasks.language_start import build_stage_model
from trainers.training.context import model_weights

TOKENS = torch.randint(5, 300, (2, 24), generator=torch.Generator().manual_seed(0))
NOISE = 2e-5
"""Relative to the logits' size: what fp32 forwards of equal weights may differ by."""
SHARD = {"engine": "plain", "precision": "bf16"}
TRAIN = {"steps": 3, "global_batch": 8, "sequence_length": 64, "optimizer": {"lr": 3e-5}, "evaluation_rows": 4}


def tune_spec(start: str = "root", precision: str = "bf16", **settings: Any) -> Finetune:
    return Finetune.model_validate(
        {
            "kind": "finetune",
            "init_from": start,
            "lora": {"r": 4, "alpha": 8},
            "data": {"source": "jsonl", "files": ["answers.jsonl"], "hold_out": 0.2},
            "train": TRAIN,
            "shard": {**SHARD, "precision": precision},
        }
        | settings
    )


def reward_spec() -> Reward:
    return Reward.model_validate(
        {
            "kind": "reward",
            "init_from": "chat",
            "lora": {"r": 4, "alpha": 8},
            "data": {"source": "jsonl", "files": ["pairs.jsonl"], "hold_out": 0.2},
            "min_accuracy": 0.0,
            "train": TRAIN,
            "shard": SHARD,
        }
    )


def ppo_spec(lora: bool = True, precision: str = "bf16", critic: str = "reward") -> RlText:
    return RlText.model_validate(
        {
            "kind": "rl",
            "actor": "chat",
            "rewards": {"judge": {"model": "judge"}},
            "lora": {"r": 4, "alpha": 8} if lora else None,
            "prompts": {"source": "jsonl", "files": ["prompts.jsonl"]},
            "rollout": {"prompts_per_iteration": 8, "max_prompt_tokens": 48, "max_new_tokens": 8},
            "algorithm": {"name": "ppo", "iterations": 1, "critic": {"start": critic}, "optimizer": {"lr": 3e-5}},
            "shard": {**SHARD, "precision": precision},
        }
    )


@pytest.fixture(scope="module")
def workshop(tmp_path_factory: pytest.TempPathFactory) -> Workshop:
    """A base in bf16 whose weights are coarse, a chat adapter on it, a reward adapter on that."""
    made = open_workshop(tmp_path_factory.mktemp("unmerged"), width=64)
    jsonl(
        made.folder / "answers.jsonl",
        [{"prompt": f"What is {a}?", "completion": f"{a} {b}."} for a in WORDS for b in WORDS],
    )
    facts = TokenizerFacts(made.tokenization.vocab_size, made.tokenization.eos_id, made.tokenization.pad_id)
    sizes = {"type": "llama", "max_position_embeddings": 128, **sizes_of(64)}
    model: Any = build_decoder(sizes, facts, seed=1, device=CPU)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim == 2:
                quarters = 4 + (parameter * 1e4).long() % 4
                parameter.copy_(parameter.sign() * quarters / 64)
    made.made["root"] = commit(made, "root", model, torch.bfloat16)
    given = {"init_from": "root"}
    made.keep("chat", run_language_model(tune_spec(), made.context("chat", given)), given)
    given = {"init_from": "chat"}
    made.keep("judge", run_reward(reward_spec(), made.context("judge", given)), given)
    return made


def commit(workshop: Workshop, stage: str, model: Any, dtype: torch.dtype) -> ArtifactManifest:
    """Commit a whole model."""
    folder = workshop.folder / stage
    files = workshop.tokenization.files()
    write_model(folder / "model", "language_model", model.config, model.named_parameters(), files, dtype=dtype)
    entries = workshop.store.objects.put_folder(folder)
    digest = files_digest(entries)
    manifest = ArtifactManifest(fingerprint=digest, digest=digest, kind="model", stage=stage, files=entries)
    return workshop.store.put_artifact(manifest).manifest


@torch.no_grad()
def logits(model: nn.Module) -> Tensor:
    found: Tensor = model.eval()(input_ids=TOKENS, use_cache=False).logits
    return found


def live(workshop: Workshop, *adapters: str) -> Tensor:
    """What stock peft makes of the base and adapters in fp32."""
    model = stock_root(workshop, torch.float32)
    for name in adapters:
        folder = workshop.store.folder(workshop.made[name], "adapter")
        model = PeftModel.from_pretrained(model, folder).merge_and_unload()
    return logits(model)


def stock_root(workshop: Workshop, dtype: torch.dtype) -> Any:
    return AutoModelForCausalLM.from_pretrained(workshop.store.folder(workshop.made["root"], "model"), dtype=dtype)


def is_live(found: Tensor, workshop: Workshop, *adapters: str) -> bool:
    """Whether logits are those of the base with adapters, to fp32's noise; without the last they would not be."""
    wanted, before = live(workshop, *adapters), live(workshop, *adapters[:-1])
    size = wanted.std()
    assert (wanted - before).abs().max() / size > 10 * NOISE, "the adapter does nothing"
    return bool((found - wanted).abs().max() / size < NOISE)


def test_the_merged_files_are_the_bases(workshop: Workshop) -> None:
    chat = workshop.made["chat"]
    assert chat.files["model/model.safetensors"] == workshop.made["root"].files["model/model.safetensors"]
    assert chat.verification is not None
    assert chat.verification.merge_unchanged == 1.0


@pytest.mark.parametrize("lora", [True, False])
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_fine_tuning_starts_from_what_was_learned(workshop: Workshop, lora: bool, precision: str) -> None:
    context = workshop.context("next", {"init_from": "chat"})
    spec = tune_spec("chat", precision, **({} if lora else {"lora": None}))
    model, weights = build_stage_model(spec, context, workshop.tokenization)
    assert is_live(logits(model), workshop, "chat")
    assert weights is not None
    assert weights.stack == (workshop.made["root"].digest, workshop.made["chat"].digest)
    assert any("lora_" in name for name, _ in model.named_parameters()) == lora
    assert lora or all(parameter.requires_grad for parameter in model.parameters())


@contextmanager
def playing(shared: SharedModels, role: Any) -> Iterator[nn.Module]:
    with shared.models.playing(role) as network:
        yield network


@pytest.mark.parametrize(("lora", "precision"), [(True, "bf16"), (True, "fp32"), (False, "bf16"), (False, "fp32")])
@pytest.mark.parametrize("critic", ["reward", "actor"])
def test_ppo_starts_from_what_was_learned(workshop: Workshop, lora: bool, precision: str, critic: str) -> None:
    context = workshop.context("policy", {"actor": "chat", "rewards.judge.model": "judge"})
    spec = ppo_spec(lora, precision, critic)
    reward = reward_source(context, "rewards.judge.model")
    parts: dict[str, Any] = {"reading": same_tokens((0,)), "num_tokens": 320, "seed": 0, "device": CPU}
    shared = build_models(spec, model_weights(context, "actor", spec.lora), reward, **parts)
    assert set(shared.models.networks) == ({"policy"} if lora else {"policy", "reference", "judge", "critic"})
    for role in ("reference", "actor"):
        with playing(shared, role) as network:
            assert is_live(logits(network), workshop, "chat"), role
    scorer: Any = load_exact(reward.weights, "score_model", device=CPU).eval()
    assert len(reward.weights.adapters) == 2
    with torch.no_grad():
        wanted = scorer.base_model(input_ids=TOKENS).last_hidden_state
        for role in ("reward", "critic"):
            with playing(shared, role) as network:
                found = network.eval().base_model(input_ids=TOKENS).last_hidden_state  # type: ignore[operator]
            is_same = bool((found - wanted).abs().max() / wanted.std() < NOISE)
            assert is_same == (role == "reward" or critic == "reward"), role
    torch.testing.assert_close(shared.models.score_head.weight, scorer.score.weight, rtol=0, atol=0)


def test_evaluation_measures_what_was_learned(workshop: Workshop) -> None:
    model: Any = load_exact(weights_of(workshop.store, workshop.made["chat"]), "language_model", device=CPU)
    workshop.made["exact"] = commit(workshop, "exact", model, torch.float32)
    spec = Evaluate.model_validate(
        {
            "kind": "evaluate",
            "of": ["root", "chat", "exact"],
            "suites": ["perplexity"],
            "text": {"source": "text", "files": ["text.txt"], "documents": "paragraph"},
            "sequence_length": 64,
            "shard": {"engine": "plain", "precision": "fp32"},
        }
    )
    given = {f"of.{place}": name for place, name in enumerate(spec.of)}
    candidate = run_evaluate(spec, workshop.context("eval", given), suites_of(spec))
    assert candidate is not None
    found = {name: candidate.metrics[f"{name}.perplexity"] for name in spec.of}
    assert found["chat"] == pytest.approx(found["exact"], rel=1e-7)
    assert found["root"] != pytest.approx(found["exact"], rel=1e-6)


def test_in_bf16_the_next_stage_computes_the_live_models_bits(workshop: Workshop) -> None:
    chat = workshop.made["chat"]
    opened = load_stack(weights_of(workshop.store, chat), "language_model", device=CPU, dtype=torch.bfloat16)
    root, folder = stock_root(workshop, torch.bfloat16), workshop.store.folder(chat, "adapter")
    adapted = PeftModel.from_pretrained(root, folder, autocast_adapter_dtype=False)
    opened.set_attn_implementation("eager")
    adapted.base_model.model.set_attn_implementation("eager")
    assert torch.equal(logits(opened), logits(adapted))


@pytest.mark.parametrize("precision", ["bf16", "fp32"])
def test_adapters_on_adapters_are_verified_and_opened(workshop: Workshop, precision: str) -> None:
    given, name = {"init_from": "chat"}, f"tuned-{precision}"
    workshop.keep(name, run_language_model(tune_spec("chat", precision), workshop.context(name, given)), given)
    tuned = workshop.made[name]
    digests = [workshop.made[stage].digest for stage in ("root", "chat")]
    assert (tuned.stack, tuned.base) == (digests, digests[-1])
    weights = weights_of(workshop.store, tuned)
    assert len(weights.adapters) == (2 if precision == "bf16" else 0)
    assert is_live(logits(load_exact(weights, "language_model", device=CPU)), workshop, "chat", name)
    if precision == "bf16":
        assert is_live(logits(load_stack(weights, "language_model", device=CPU)), workshop, "chat", name)


@pytest.mark.parametrize("dora", [False, True])
def test_an_exported_adapter_on_an_adapter_opens_with_stock_peft(
    workshop: Workshop, dora: bool, tmp_path: Path
) -> None:
    lower, upper = ("dora", "on-dora") if dora else ("lora", "on-lora")
    first = tune_spec(lora={"r": 2, "alpha": 3, "dora": dora, "target_modules": ["q_proj", "up_proj"]})
    given = {"init_from": "root"}
    workshop.keep(lower, run_language_model(first, workshop.context(lower, given)), given)
    given = {"init_from": lower}
    second = tune_spec(
        lower, lora={"r": 3, "alpha": 7, "rank_stabilised": True, "target_modules": ["q_proj", "v_proj"]}
    )
    workshop.keep(upper, run_language_model(second, workshop.context(upper, given)), given)
    assert len(workshop.made[upper].stack) == 2
    folder = export(workshop.store, workshop.made[upper], tmp_path / "out")
    base = AutoModelForCausalLM.from_pretrained(folder / "base", dtype=torch.float32)
    assert is_live(logits(PeftModel.from_pretrained(base, folder)), workshop, lower, upper)
    config = json.loads((folder / "adapter_config.json").read_text())
    assert (config["r"], config["base_model_name_or_path"]) == (3 if dora else 5, str(folder / "base"))
    stored = json.loads((folder / "base" / "config.json").read_text())["dtype"]
    assert stored == ("float32" if dora else "bfloat16")


def test_what_is_sampled_is_what_was_learned(workshop: Workshop) -> None:
    workshop.store.name_artifact("chat", workshop.made["chat"].fingerprint)
    with opened("store://chat", workshop.store.uri) as sampler:
        assert is_live(logits(sampler.model), workshop, "chat")


@pytest.mark.parametrize("lora", [True, False])
@pytest.mark.parametrize("precision", ["bf16", "fp32"])
def test_ppo_on_adapters_is_verified(workshop: Workshop, lora: bool, precision: str) -> None:
    given, name = {"actor": "chat", "rewards.judge.model": "judge"}, f"policy-{'lora' if lora else 'full'}-{precision}"
    workshop.keep(name, run_rl(ppo_spec(lora, precision), workshop.context(name, given)), given)
    policy = workshop.made[name]
    assert policy.stack == ([workshop.made[stage].digest for stage in ("root", "chat")] if lora else [])
    if lora:
        found = load_exact(weights_of(workshop.store, policy), "language_model", device=CPU)
        assert is_live(logits(found), workshop, "chat", name)


def test_without_the_base_the_merged_model_is_opened_and_said_so(workshop: Workshop) -> None:
    lost = workshop.made["chat"].model_copy(update={"base": "0" * 64, "parents": {}})
    weights = weights_of(workshop.store, lost)
    assert (weights.adapters, weights.folder) == ((), workshop.store.folder(lost, "model"))
    workshop.made["lost"] = lost
    context = workshop.context("next", {"init_from": "lost"})
    model_weights(context, "init_from")
    (told,) = context.observer.told  # type: ignore[attr-defined]
    assert "100% " in told
    assert "0000000000000000, " in told


def test_dora_starts_from_the_merged_model_and_says_so(workshop: Workshop) -> None:
    context = workshop.context("next", {"init_from": "chat"})
    spec = tune_spec("chat", lora={"r": 2, "dora": True})
    weights = model_weights(context, "init_from", spec.lora)
    assert weights.adapters == ()
    assert "DoRA " in context.observer.told[0]  # type: ignore[attr-defined]


def test_a_collection_keeps_what_an_adapter_lies_on(workshop: Workshop) -> None:
    judge = workshop.made["judge"]
    for _ in range(2):
        collect(workshop.store, grace_s=0, keep=Keep([judge.fingerprint], []))
    assert len(weights_of(workshop.store, judge).adapters) == 2
    with pytest.raises(AssertionError):
        assert workshop.store.find_artifact(workshop.made["exact"].fingerprint) is not None
