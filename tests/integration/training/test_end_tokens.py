"""Models whose tokenizer, template and embedding differ as published ones do, through the stages in one process.

The base model's eos token ends documents, its chat template ends turns with another token (Qwen2.5); its embedding has
more rows than its tokenizer has tokens.
"""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch

from launch.runs.suites import suites_of
from launch.sampling.text import sample_texts
from recipes.data.text import JsonLines
from recipes.stages.evaluate import Evaluate
from recipes.stages.finetune import Finetune
from recipes.stages.rl import RlText
from rlhf.task import run_rl
from rlhf.text.responses import Responses
from rlhf.text.reward_inputs import reading_of
from tests.chat_models import DOCUMENT_END, END, chat, chat_tokenizer, write_chat_model, write_rows
from tests.observers import Quiet
from trainers.data.batches import build_batch
from trainers.data.encoding import TextSettings
from trainers.data.layouts.pairs import Pairs
from trainers.data.layouts.prompts import Prompts
from trainers.data.materialise import DataRequest, materialise
from trainers.data.tokenizer import load_tokenization
from trainers.evaluation.evaluate_stage import run_evaluate
from trainers.models.imports import import_folder
from trainers.runtime.distributed import Ranks
from trainers.store.export import export
from trainers.store.manifest import ArtifactManifest, files_digest
from trainers.store.store import Store
from trainers.tasks.language_model import run_language_model
from trainers.training.context import Candidate, StageContext, verify_checks

CPU = torch.device("cpu")
ROWS = 512
PLAIN = {"engine": "plain", "precision": "fp32"}


class Shop:
    """A store with what was made so far, and a folder of data."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.store = Store.open(str(folder / "store"))
        self.made: dict[str, ArtifactManifest] = {}

    def context(self, stage: str, inputs: Mapping[str, str]) -> StageContext:
        return StageContext(
            store=self.store,
            run="run",
            stage=stage,
            fingerprint="f" * 64,
            lease=self.store.take_lease("run", stage),
            seed=0,
            base_dir=self.folder,
            inputs={path: self.made[name] for path, name in inputs.items()},
            data={},
            observer=Quiet(),
            ranks=Ranks(0, 1, 0, CPU),
        )

    def keep(self, stage: str, candidate: Candidate | None, inputs: Mapping[str, str]) -> ArtifactManifest:
        """Verify and remember a candidate as the driver does."""
        assert candidate is not None
        given = {path: self.made[name] for path, name in inputs.items()}
        verify_checks(self.store, candidate.files, list(candidate.checks), given, self.store.uri)
        made = ArtifactManifest(
            fingerprint="e" * 64,
            digest=files_digest(candidate.files),
            kind=candidate.kind,
            stage=stage,
            files=dict(candidate.files),
            contract=candidate.contract,
            metrics=dict(candidate.metrics),
        )
        self.made[stage] = made
        return made


@pytest.fixture(scope="module")
def shop(tmp_path_factory: pytest.TempPathFactory) -> Shop:
    """A base model tuned to answer "ok", and a reward model whose embedding has no rows to spare."""
    shop = Shop(tmp_path_factory.mktemp("shop"))
    base = chat_tokenizer(eos=DOCUMENT_END)
    folder = write_chat_model(shop.folder / "base", base, rows=ROWS, ends=[base.convert_tokens_to_ids(DOCUMENT_END)])
    shop.made["base"] = import_folder(shop.store, folder)
    judge = write_chat_model(shop.folder / "judge", base, scores=True)
    shop.made["judge"] = import_folder(shop.store, judge)
    write_rows(shop.folder / "chats.jsonl", [{"messages": chat(f"q{i}", "ok")} for i in range(16)])
    write_rows(shop.folder / "prompts.jsonl", [{"prompt": chat(f"say {i}", "")[:1]} for i in range(8)])
    data = {"source": "jsonl", "files": ["chats.jsonl"]}
    train = {"steps": 60, "global_batch": 16, "sequence_length": 64, "optimizer": {"lr": 1e-2}}
    spec = Finetune.model_validate(
        {"kind": "finetune", "init_from": "base", "data": data, "evaluation": data, "train": train, "shard": PLAIN}
    )
    inputs = {"init_from": "base"}
    shop.keep("chat", run_language_model(spec, shop.context("chat", inputs)), inputs)
    return shop


def _ends(folder: Path) -> list[int]:
    tokenization = load_tokenization(folder)
    return [tokenization.token_id(END), tokenization.token_id(DOCUMENT_END)]


def test_a_base_model_tuned_on_chats_stops_at_its_templates_end_token(shop: Shop) -> None:
    responses: Any = shop.made["chat"].metrics["responses"]
    assert responses["eos_rate"] > 0.9
    assert responses["mean_length"] < 6


def test_the_export_names_every_end_token(shop: Shop) -> None:
    folder = shop.folder / "export"
    export(shop.store, shop.made["chat"], folder)
    (path,) = folder.rglob("generation_config.json")
    assert json.loads(path.read_text())["eos_token_id"] == _ends(path.parent)
    (answer,) = sample_texts(str(path.parent), ["q3"], chat=True, temperature=0.0, max_new_tokens=16)
    assert answer["response"] == "ok"


def test_ppo_draws_no_row_without_a_token(shop: Shop) -> None:
    """The reward model has no rows for those; with a random policy of 512 rows one of 64 draws was sure to hit them."""
    spec = RlText.model_validate(
        {
            "kind": "rl", "actor": "base", "rewards": {"judge": {"model": "judge"}}, "shard": PLAIN,
            "prompts": {"source": "jsonl", "files": ["prompts.jsonl"]},
            "rollout": {"max_new_tokens": 8, "max_prompt_tokens": 48, "prompts_per_iteration": 8},
            "algorithm": {"name": "ppo", "iterations": 2, "epochs": 1, "mini_batches": 1, "optimizer": {"lr": 1e-3}},
        }
    )  # fmt: skip
    inputs = {"actor": "base", "rewards.judge.model": "judge"}
    made = shop.keep("policy", run_rl(spec, shop.context("policy", inputs)), inputs)
    assert made.metrics["response_tokens"] > 0


@pytest.mark.parametrize("template", ["chat", "none"])
def test_an_unfinished_response_is_closed_as_the_reward_model_learned(template: str, shop: Shop) -> None:
    """Its pairs end with the template's end of turn, or of plain text with the tokenizer's end token."""
    writer = load_tokenization(shop.folder / "base")
    write_rows(shop.folder / "pairs.jsonl", [{"prompt": "Say two.", "chosen": "two", "rejected": "one"}] * 4)
    source = JsonLines.model_validate({"source": "jsonl", "files": ["pairs.jsonl"]})
    settings = TextSettings(writer, 64, template=template)
    pairs, prompts = (
        materialise(DataRequest(source, shop.folder, layout, 0), shop.store)
        for layout in (Pairs(settings), Prompts(settings))
    )
    batch: Any = build_batch(pairs, [0])
    whole = batch.chosen.input_ids_BT[:, : int(batch.chosen.attention_mask_BT.sum())]
    cut = Responses(
        input_ids_BT=whole[:, :-1],
        attention_mask_BT=torch.ones_like(whole[:, :-1], dtype=torch.bool),
        action_mask_BT=torch.arange(whole.shape[1] - 1)[None] >= len(prompts.cut("prompt_ids", 0)),
        ended_B=torch.tensor([False]),
        sample_ids_B=torch.tensor([0]),
    )
    assert int(whole[0, -1]) == writer.token_id(END if template == "chat" else DOCUMENT_END)
    assert reading_of(prompts, writer, writer, None)(cut).input_ids_BT.tolist() == whole.tolist()


def test_an_evaluation_ends_answers_at_the_templates_end_token(shop: Shop) -> None:
    spec = Evaluate.model_validate(
        {
            "kind": "evaluate", "of": ["chat", "chat"], "suites": ["generation"], "num_prompts": 8,
            "prompts": {"source": "jsonl", "files": ["prompts.jsonl"]}, "shard": PLAIN,
            "sampling": {"max_prompt_tokens": 48, "max_new_tokens": 16, "temperature": 0.1},
        }
    )  # fmt: skip
    candidate = run_evaluate(spec, shop.context("eval", {"of.0": "chat", "of.1": "chat"}), suites_of(spec))
    assert candidate is not None
    assert candidate.metrics["chat.eos_rate"] > 0.8
