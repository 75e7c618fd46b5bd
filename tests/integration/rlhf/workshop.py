"""What tests of the stages of preference learning share: a store, a tiny chat model, data, and contexts of stages."""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from recipes.data.tokenizers import TrainTokenizer
from recipes.stages.reward import Reward
from recipes.stages.rl import RlText
from tests.observers import Quiet
from trainers.data.tokenizer import Tokenization, train_tokenizer
from trainers.models.decoder import build_decoder
from trainers.models.folders import write_model
from trainers.models.protocol import TokenizerFacts
from trainers.runtime.distributed import Ranks
from trainers.store.manifest import ArtifactManifest, Parent, Verification, files_digest, sha256_hex
from trainers.store.store import Store
from trainers.training.context import Candidate, StageContext, verify_checks

CPU = torch.device("cpu")
WORDS = ["open", "close", "read", "write", "file", "list", "name", "value", "key", "path"]
PLAIN = {"engine": "plain", "precision": "fp32"}


class Listener(Quiet):
    """Remembers metrics, phases and what it is told."""

    def __init__(self) -> None:
        self.heard: list[tuple[int, dict[str, float]]] = []
        self.phases: list[tuple[str, dict[str, float]]] = []
        self.told: list[str] = []

    def phase(self, name: str, **progress: float) -> None:
        """Remember."""
        self.phases.append((name, progress))

    def metrics(self, step: int, values: Mapping[str, float]) -> None:
        """Remember."""
        self.heard.append((step, dict(values)))

    def notify(self, text: str) -> None:
        """Remember."""
        self.told.append(text)


@dataclass
class Workshop:
    """A store, its data folder and what was made so far."""

    store: Store
    folder: Path
    tokenization: Tokenization
    made: dict[str, ArtifactManifest]

    def context(self, stage: str, inputs: Mapping[str, str]) -> StageContext:
        """Where a stage of this workshop runs."""
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
            observer=Listener(),
            ranks=Ranks(0, 1, 0, CPU),
        )

    def keep(self, stage: str, candidate: Candidate | None, inputs: Mapping[str, str]) -> None:
        """Verify a candidate as the driver does and commit it; raises VerificationError past what rounding explains."""
        assert candidate is not None
        given = {path: self.made[name] for path, name in inputs.items()}
        found = verify_checks(self.store, candidate.files, list(candidate.checks), given, self.store.uri)
        merge = (
            {} if found.merge is None else {"merge_lost": found.merge.lost, "merge_unchanged": found.merge.unchanged}
        )
        digest = files_digest(candidate.files)
        manifest = ArtifactManifest(
            fingerprint=sha256_hex(f"{stage} {digest}".encode()),
            digest=digest,
            kind=candidate.kind,
            stage=stage,
            files=dict(candidate.files),
            parents={path: Parent(fingerprint=item.fingerprint, digest=item.digest) for path, item in given.items()},
            contract=candidate.contract,
            base=candidate.base,
            stack=list(candidate.stack),
            quantized=candidate.quantized,
            architecture=dict(candidate.architecture) if candidate.architecture else None,
            metrics=dict(candidate.metrics),
            verification=Verification(how="clean-process", max_logit_difference=found.difference, **merge),
        )
        self.made[stage] = self.store.put_artifact(manifest).manifest


def sizes_of(width: int) -> dict[str, int]:
    """A decoder's sizes."""
    return {"num_hidden_layers": 2, "hidden_size": width, "intermediate_size": 2 * width, "num_attention_heads": 2}


def jsonl(path: Path, rows: list[dict[str, Any]]) -> None:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


def open_workshop(folder: Path, width: int) -> Workshop:
    """A chat model of a width and 320 tokens, preferences and prompts."""
    texts = [f"{a} the {b} of {c}." for a in WORDS for b in WORDS for c in WORDS[:3]]
    prompts = [f"What does {a}_{b} do?" for a in WORDS for b in WORDS[:5]]
    answers = [(f"{a} the {b}.", f"{b} {b} {b} {b}") for a in WORDS for b in WORDS[:5]]
    jsonl(
        folder / "pairs.jsonl",
        [{"prompt": p, "chosen": c, "rejected": r} for p, (c, r) in zip(prompts, answers, strict=True)],
    )
    jsonl(folder / "prompts.jsonl", [{"prompt": p} for p in prompts])
    jsonl(folder / "chats.jsonl", [{"prompt": [{"role": "user", "content": p}]} for p in prompts])
    (folder / "text.txt").write_text("\n\n".join(texts[:40]))
    tokenization = train_tokenizer(TrainTokenizer(train="bpe", vocab_size=320), texts + prompts)
    facts = TokenizerFacts(tokenization.vocab_size, tokenization.eos_id, tokenization.pad_id)
    sizes = sizes_of(width)
    model = build_decoder({"type": "llama", "max_position_embeddings": 128, **sizes}, facts, seed=0, device=CPU)
    store = Store.open(str(folder / "store"))
    write_model(
        folder / "chat" / "model",
        "language_model",
        model.config,
        list(model.named_parameters()),
        tokenization.files(),
        dtype=torch.float32,
    )
    files = store.objects.put_folder(folder / "chat")
    chat = ArtifactManifest(fingerprint="c" * 64, digest=files_digest(files), kind="model", stage="chat", files=files)
    return Workshop(store, folder, tokenization, {"chat": store.put_artifact(chat).manifest})


def reward_spec(lora: bool) -> Reward:
    return Reward.model_validate(
        {
            "kind": "reward",
            "init_from": "chat",
            "lora": {"r": 4, "alpha": 8} if lora else None,
            "data": {"source": "jsonl", "files": ["pairs.jsonl"], "hold_out": 0.2},
            "min_accuracy": 0.0,
            "train": {"steps": 12, "global_batch": 8, "sequence_length": 64, "optimizer": {"lr": 1e-2}},
            "shard": PLAIN,
        }
    )


def ppo_spec(lora: bool, **settings: Any) -> RlText:
    return RlText.model_validate(
        {
            "kind": "rl",
            "actor": "chat",
            "rewards": {"judge": {"model": "judge"}},
            "lora": {"r": 4, "alpha": 8} if lora else None,
            "prompts": {"source": "jsonl", "files": ["prompts.jsonl"]},
            "rollout": {"prompts_per_iteration": 8, "max_prompt_tokens": 48, "max_new_tokens": 8},
            "algorithm": {"name": "ppo", "iterations": 2, "optimizer": {"lr": 1e-2}} | settings,
            "shard": PLAIN,
        }
    )
