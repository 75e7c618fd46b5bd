"""Stages of preference learning in one process: candidates that stock classes open, sharing, gates, best policies."""

import json
from dataclasses import replace
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from launch.runs.suites import suites_of
from recipes.data.text import JsonLines
from recipes.data.tokenizers import TrainTokenizer
from recipes.errors import RequestError
from recipes.problem_codes import Code
from recipes.stages.algorithms import Grpo
from recipes.stages.evaluate import Evaluate
from recipes.stages.optim import AdamW
from recipes.stages.rewards.outside import ModelTerm
from recipes.stages.rollout import Sampling
from rlhf.task import run_rl
from rlhf.text.build_policy import build_models
from rlhf.text.replay import replay
from rlhf.text.responses import Responses
from rlhf.text.reward_inputs import same_tokens
from rlhf.text.reward_stage import run_reward
from rlhf.text.stage import reward_source
from tests.integration.rlhf.workshop import (
    CPU,
    PLAIN,
    WORDS,
    Workshop,
    ppo_spec,
    reward_spec,
)
from trainers.data.tokenizer import train_tokenizer
from trainers.evaluation.evaluate_stage import run_evaluate
from trainers.models.decoder import build_decoder
from trainers.models.folders import write_model
from trainers.models.load import load_model
from trainers.models.protocol import TokenizerFacts
from trainers.store.manifest import files_digest
from trainers.training.context import model_folder, model_weights

OTHER_TEMPLATE = (
    "{% for message in messages %}{{ ('[A]' if message['role'] == 'assistant' else '[Q]') + message['content'] }}"
    "{% if message['role'] == 'assistant' %}{{ eos_token }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ '[A]' }}{% endif %}"
)


@pytest.mark.parametrize("lora", [True, False])
def test_reward_then_ppo_then_evaluation(workshop: Workshop, lora: bool) -> None:
    suffix = "lora" if lora else "full"
    judge, policy = f"judge-{suffix}", f"policy-{suffix}"
    given = {"init_from": "chat"}
    candidate = run_reward(reward_spec(lora), workshop.context(judge, given))
    workshop.keep(judge, candidate, given)
    made = workshop.made[judge]
    assert made.kind == "reward_model"
    assert {name.split("/")[0] for name in made.files} == ({"model", "adapter"} if lora else {"model"})
    assert made.base == (workshop.made["chat"].digest if lora else None)
    scores: Any = made.metrics["scores"]
    assert scores["std"] > 0
    evaluation: Any = made.metrics["evaluation"]
    assert evaluation["held_out"] is True
    assert evaluation["pairs"] > 0

    given = {"actor": "chat", "rewards.judge.model": judge}
    candidate = run_rl(ppo_spec(lora), workshop.context(policy, given))
    workshop.keep(policy, candidate, given)
    made = workshop.made[policy]
    parts = {name.split("/")[0] for name in made.files}
    assert parts == ({"actor", "critic", "adapter"} if lora else {"actor", "critic"})
    start: Any = made.metrics["start"]
    assert abs(start["kl"]) < 1e-5
    lines = list(workshop.store.run("run").read_lines(f"samples/{policy}"))
    assert {line["step"] for line in lines} == {0, 4, 8}
    assert all(line["prompt"] and line.keys() == {"step", "prompt", "response", "score", "rewards"} for line in lines)
    again = replay(ppo_spec(lora), workshop.context(policy, given), 2)
    assert again.is_equal
    assert again.rewards.keys() == {"judge"}
    assert "logprobs" in again.drawn

    spec = Evaluate.model_validate(
        {
            "kind": "evaluate",
            "of": ["chat", "policy", "chat"],
            "rewards": {"judge": {"model": "judge"}},
            "suites": ["perplexity", "generation", "comparison"],
            "text": {"source": "text", "files": ["text.txt"], "documents": "paragraph"},
            "prompts": {"source": "jsonl", "files": ["prompts.jsonl"]},
            "num_prompts": 12,
            "num_samples": 3,
            "sequence_length": 32,
            "sampling": {"max_new_tokens": 8, "max_prompt_tokens": 48},
            "shard": PLAIN,
            "gates": [{"metric": "policy.kl", "max": 100}, {"metric": "policy.win_rate_judge", "min": 0.99}],
        }
    )
    given = {"of.0": "chat", "of.1": policy, "of.2": "chat", "rewards.judge.model": judge}
    report = run_evaluate(spec, workshop.context("eval", given), suites_of(spec))
    assert report is not None
    metrics = report.metrics
    assert metrics["prompts"] == 12
    assert metrics["chat_n2.kl"] == pytest.approx(0.0, abs=1e-6)
    assert metrics["chat_n2.win_rate_judge"] == 0.5
    assert metrics["chat_n2.perplexity"] == metrics["chat.perplexity"]
    assert metrics["policy.perplexity"] != metrics["chat.perplexity"]
    assert [reason.split()[0] for reason in report.gate_reasons] == ["policy.win_rate_judge"]
    samples = json.loads(workshop.store.objects.get_bytes(report.files["samples.json"].sha256))
    assert [line["model"] for line in samples] == ["chat", "policy", "chat_n2"] * 3
    shown = list(workshop.store.run("run").read_lines("samples/eval"))
    assert samples == shown[-len(samples) :]


def test_a_model_of_another_family_is_refused(workshop: Workshop) -> None:
    folder = workshop.folder / "encoder"
    (folder / "model").mkdir(parents=True)
    (folder / "model" / "config.json").write_text('{"model_type": "bert"}')
    files = workshop.store.objects.put_folder(folder)
    workshop.made["encoder"] = workshop.made["chat"].model_copy(update={"files": files, "digest": files_digest(files)})
    with pytest.raises(RequestError, match=r"kind: reward ") as refused:
        run_reward(reward_spec(False), workshop.context("bad-judge", {"init_from": "encoder"}))
    assert refused.value.codes == (Code.UNSUPPORTED_FAMILY,)
    with pytest.raises(RequestError, match=r"kind: rl ") as refused:
        run_rl(ppo_spec(False), workshop.context("bad-policy", {"actor": "encoder", "rewards.judge.model": "encoder"}))
    assert refused.value.codes == (Code.UNSUPPORTED_FAMILY,)


def test_a_reward_model_on_the_actors_base_shares_its_network(workshop: Workshop) -> None:
    context = workshop.context("policy", {"actor": "chat", "rewards.judge.model": "judge-lora"})
    reward = reward_source(context, "rewards.judge.model")
    parts = {"reading": same_tokens((0,)), "num_tokens": 320, "seed": 0, "device": CPU}
    actor = model_weights(context, "actor")
    other = replace(actor, stack=("0" * 64,))
    shared = build_models(ppo_spec(True), actor, reward, **parts)
    assert set(shared.models.networks) == {"policy"}
    apart = build_models(ppo_spec(True), other, reward, **parts)
    assert set(apart.models.networks) == {"policy", "judge"}
    whole = build_models(ppo_spec(False), other, reward, **parts)
    assert set(whole.models.networks) == {"policy", "reference", "critic", "judge"}
    without_critic = Grpo(name="grpo", iterations=2, optimizer=AdamW(lr=1e-2))
    for lora, networks in ((True, {"policy"}), (False, {"policy", "reference", "judge"})):
        spec = ppo_spec(lora).model_copy(update={"algorithm": without_critic})
        built = build_models(spec, actor, reward, **parts)
        assert (set(built.models.networks), set(built.models.routes)) == (networks, {"actor", "reference", "reward"})
        assert (built.models.value_head, built.critic_parameters) == (None, ())
    sizes = [sum(p.numel() for p in built.models.parameters()) for built in (shared, apart, whole)]
    assert sizes[0] < sizes[1] < sizes[2]


def test_shared_and_separate_networks_give_the_same_scores(workshop: Workshop) -> None:
    context = workshop.context("policy", {"actor": "chat", "rewards.judge.model": "judge-lora"})
    reward = reward_source(context, "rewards.judge.model")
    parts = {"reading": same_tokens((0,)), "num_tokens": 320, "seed": 0, "device": CPU}
    prompt = torch.randint(5, 200, (4, 6), generator=torch.Generator().manual_seed(0))
    tokens = torch.cat([prompt, prompt], dim=1)
    is_action = (torch.arange(12) >= 6).expand(4, 12)
    ended = torch.tensor([True, False, True, False])
    responses = Responses(tokens, torch.ones_like(is_action), is_action, ended, torch.arange(4))
    found = []
    actor = model_weights(context, "actor")
    for start in (actor, replace(actor, stack=("0" * 64,))):
        built = build_models(ppo_spec(True), start, reward, **parts)
        with torch.no_grad():
            found.append(built.models(responses, ("reward", "critic"), False, 6))
    torch.testing.assert_close(found[0]["scores_B"], found[1]["scores_B"], rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(found[0]["values_BA"], found[1]["values_BA"], rtol=1e-4, atol=1e-4)


def test_modules_of_a_policy_learn_whole_next_to_its_start(workshop: Workshop) -> None:
    keys = ppo_spec(True).model_dump(mode="json", by_alias=True)
    keys["lora"]["modules_to_save"] = ["lm_head", "embed_tokens"]
    spec, given = type(ppo_spec(True)).model_validate(keys), {"actor": "chat", "rewards.judge.model": "judge-lora"}
    context = workshop.context("policy-saved", given)
    reward = reward_source(context, "rewards.judge.model")
    parts = {"reading": same_tokens((0,)), "num_tokens": 320, "seed": 0, "device": CPU}
    built = build_models(spec, model_weights(context, "actor"), reward, **parts)
    routes = {role: route.network for role, route in built.models.routes.items()}
    assert routes == {"actor": "policy", "reference": "reference", "reward": "reference", "critic": "reference"}
    names = set(built.models.policy_names())
    assert names == {name for name, _ in built.actor_parameters}
    whole = {name.removeprefix("networks.policy.") for name in names if "lora_" not in name}
    assert whole == {"lm_head.weight", "model.embed_tokens.weight"}
    assert not any(name in names or "embed" in name for name, _ in built.critic_parameters)
    workshop.keep("policy-saved", run_rl(spec, context), given)
    made = workshop.made["policy-saved"]
    start, end = (made.metrics[key] for key in ("start", "end"))
    assert isinstance(start, dict)
    assert isinstance(end, dict)
    assert abs(start["kl"]) < 1e-5 < end["kl"]
    base = load_file(workshop.store.folder(workshop.made["chat"], "model") / "model.safetensors")
    saved = load_file(workshop.store.folder(made, "adapter") / "adapter_model.safetensors")
    for name in ("lm_head.weight", "model.embed_tokens.weight"):
        assert not torch.equal(saved[f"base_model.model.{name}"], base[name])
    again = replay(spec, workshop.context("policy-saved", given), 2)
    assert again.is_equal


def test_a_stopped_stage_commits_the_policy_that_it_kept(workshop: Workshop) -> None:
    given = {"actor": "chat", "rewards.judge.model": "judge-lora"}
    settings = {"iterations": 10, "kl_coef": 0.0, "kl_limit": 0.02, "epochs": 4, "optimizer": {"lr": 5e-2}}
    candidate = run_rl(ppo_spec(True, **settings), workshop.context("stopped", given))
    assert candidate is not None
    assert candidate.outcome["state"] == "stopped_by"
    assert candidate.outcome["rule"] == "kl_limit"
    assert candidate.metrics["end"]["kl"] > 0.02
    workshop.keep("stopped", candidate, given)


def test_a_reward_model_with_another_tokenizer_reads_the_text(workshop: Workshop) -> None:
    """A judge of another width, vocabulary and template scores what the policy wrote, and no critic starts from it."""
    spec = TrainTokenizer(train="bpe", vocab_size=300, special_tokens=["[Q]", "[A]"], chat_template=OTHER_TEMPLATE)
    other = train_tokenizer(spec, WORDS * 5)
    facts = TokenizerFacts(other.vocab_size, other.eos_id, other.pad_id)
    sizes = {"num_hidden_layers": 1, "hidden_size": 24, "intermediate_size": 32, "num_attention_heads": 2}
    start = build_decoder({"type": "llama", "max_position_embeddings": 256, **sizes}, facts, seed=4, device=CPU)
    folder = workshop.folder / "foreign"
    parameters = list(start.named_parameters())
    write_model(folder / "model", "language_model", start.config, parameters, other.files(), dtype=torch.float32)
    files = workshop.store.objects.put_folder(folder)
    workshop.made["foreign"] = workshop.made["chat"].model_copy(update={"files": files, "digest": files_digest(files)})
    candidate = run_reward(reward_spec(False), workshop.context("foreign-judge", {"init_from": "foreign"}))
    workshop.keep("foreign-judge", candidate, {"init_from": "foreign"})

    given = {"actor": "chat", "rewards.judge.model": "foreign-judge"}
    with pytest.raises(RequestError, match=r"set algorithm.critic.start: actor"):
        run_rl(ppo_spec(True), workshop.context("refused", given))
    of = Evaluate.model_validate(
        {
            "kind": "evaluate",
            "of": ["chat", "foreign"],
            "suites": ["perplexity"],
            "text": {"source": "text", "files": ["text.txt"], "documents": "paragraph"},
            "shard": PLAIN,
        }
    )
    with pytest.raises(RequestError, match=r"of\.1: foreign and chat "):
        run_evaluate(of, workshop.context("refused", {"of.0": "chat", "of.1": "foreign"}), suites_of(of))
    chats = JsonLines(source="jsonl", files=["chats.jsonl"])
    answers = of.changed(
        suites=["comparison"],
        text=None,
        rewards={"judge": ModelTerm(model="foreign-judge")},
        prompts=chats,
        num_prompts=6,
        sampling=Sampling(max_new_tokens=8, max_prompt_tokens=48),
    )
    inputs = {"of.0": "chat", "of.1": "foreign", "rewards.judge.model": "foreign-judge"}
    report = run_evaluate(answers, workshop.context("texts", inputs), suites_of(answers))
    assert report is not None
    assert report.metrics["prompts"] == 6
    assert report.metrics.keys() >= {
        "foreign.win_rate_judge",
        "foreign.score_mean",
        "chat.kl",
        "random_tokens.win_rate_judge",
    }
    assert "foreign.kl" not in report.metrics
    for lora, name in ((True, "policy-foreign-lora"), (False, "policy-foreign-full")):
        spec_of_policy = ppo_spec(lora, critic={"start": "actor"}).model_copy(update={"prompts": chats})
        candidate = run_rl(spec_of_policy, workshop.context(name, given))
        workshop.keep(name, candidate, given)

    lines = list(workshop.store.run("run").read_lines("samples/policy-foreign-lora"))
    context = workshop.context("judging", given)
    judge = load_model(model_folder(context, "rewards.judge.model"), "score_model", device=CPU).eval()
    for line in lines:
        text = f"[Q]{line['prompt'].strip()}[A]{line['response']}<|end|>"
        ids = torch.tensor([other.encode(text)])
        with torch.no_grad():
            score = judge(input_ids=ids, attention_mask=torch.ones_like(ids)).logits.item()
        assert line["score"] == pytest.approx(score, abs=1e-4), text
