"""Steps per CPU second of a translation: ours, a loop written by hand, transformers' Seq2SeqTrainer; see families.py.

All train the same T5 from the same weights with AdamW on the shipped example's sentences in random batches of 64,
padded to the longest, on one process; the tokenizer's work is done before. By hand: a DataLoader, the model's own loss,
zero_grad, backward, clip, step. No side evaluates or saves.
"""

import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from text_rows import CLIP, LR, plain_loop
from torch import nn
from torch.utils.data import DataLoader

from recipes.data.text import Csv
from recipes.data.tokenizers import TrainTokenizer
from recipes.stages.optim import AdamW
from recipes.stages.sharding import Shard
from trainers.data.batches import BatchPlan
from trainers.data.dataset import Dataset
from trainers.data.encoding import TextSettings
from trainers.data.layouts.seq2seq import Seq2Seq
from trainers.data.materialise import DataRequest, build_tokenization, materialise
from trainers.data.tokenizer import Tokenization
from trainers.engine.build import build_engine, parameter_group
from trainers.models.encoder_decoder import TargetLosses
from trainers.models.families import build_language_model
from trainers.models.protocol import TokenizerFacts
from trainers.objectives.seq2seq import Seq2SeqObjective
from trainers.store.store import Store
from trainers.training.loop import Cadence, train
from trainers.training.steps import PlannedBatches

BATCH = 64
FILES = Path(__file__).resolve().parents[1] / "recipes" / "text" / "files"
CPU = torch.device("cpu")
ARCHITECTURE: dict[str, Any] = {
    "type": "t5",
    "d_model": 128,
    "d_kv": 32,
    "d_ff": 384,
    "num_layers": 2,
    "num_heads": 4,
    "dropout_rate": 0.1,
}


class Translation:
    """The data and the model of all sides."""

    def __init__(self, store: Store) -> None:
        columns: dict[Any, str] = {"prompt": "english", "completion": "spanish"}
        source = Csv(
            source="csv", files=["sentences.tsv"], header=["english", "spanish"], quotes=False, columns=columns
        )
        spec = TrainTokenizer(train="bpe", vocab_size=2048)
        self.tokenization: Tokenization = build_tokenization(spec, source, FILES, 0, store)
        self.dataset: Dataset = materialise(
            DataRequest(source, FILES, Seq2Seq(TextSettings(self.tokenization, 64)), 0), store
        )
        sides = ("source", "target")
        self.rows = [
            {side: torch.from_numpy(self.dataset.cut(f"{side}_ids", row).astype("int64")) for side in sides}
            for row in range(len(self.dataset))
        ]

    def model(self) -> Any:
        """Build the model, in the mode of training."""
        facts = TokenizerFacts(self.tokenization.vocab_size, self.tokenization.eos_id, self.tokenization.pad_id)
        return build_language_model({"family": "encoder_decoder", **ARCHITECTURE}, facts, seed=0, device=CPU).train()

    def collate(self, rows: list[dict[str, torch.Tensor]]) -> dict[str, torch.Tensor]:
        """Pad as the model's own forward wants it."""
        pad_id = self.tokenization.pad_id
        sources = nn.utils.rnn.pad_sequence([row["source"] for row in rows], batch_first=True, padding_value=pad_id)
        labels = nn.utils.rnn.pad_sequence([row["target"] for row in rows], batch_first=True, padding_value=-100)
        return {"input_ids": sources, "attention_mask": (sources != pad_id).long(), "labels": labels}


def sides(store: Store, folder: str, quiet: Any) -> dict[str, Callable[[int], float]]:
    """Return the sides, ours first; each takes a number of steps."""
    work = Translation(store)
    return {
        "ours": partial(ours, work, quiet=quiet),
        "by hand": partial(by_hand, work),
        "Trainer": partial(by_trainer, work, folder=folder),
    }


def ours(work: Translation, steps: int, quiet: Any) -> float:
    """Steps per CPU second of the loop."""
    module = TargetLosses(work.model())
    group = parameter_group("model", module, AdamW(lr=LR))
    engine = build_engine(module, [group], Shard(engine="plain", precision="fp32"), clip=CLIP, device=CPU)
    engine.module.train()
    started = time.process_time()
    train(
        engine,
        Seq2SeqObjective(),
        PlannedBatches(BatchPlan(work.dataset, 0, BATCH, 1, 0, BATCH), steps),
        learning_rates=lambda step: {"model": LR},
        cadence=Cadence(10**9, 10**9),
        checkpoint=quiet,
        evaluate=None,
        observer=quiet,
        seed=0,
    )
    return steps / (time.process_time() - started)


def by_hand(work: Translation, steps: int) -> float:
    """Steps per CPU second of a plain loop over transformers' own model and loss."""
    model = work.model()
    model.set_attn_implementation("sdpa")
    loader: Any = DataLoader(work.rows, BATCH, shuffle=True, drop_last=True, collate_fn=work.collate)  # type: ignore[arg-type]
    return plain_loop(model, loader, steps)


def by_trainer(work: Translation, steps: int, folder: str) -> float:
    """Steps per CPU second of transformers' Seq2SeqTrainer."""
    from transformers import Seq2SeqTrainer, Seq2SeqTrainingArguments

    arguments = Seq2SeqTrainingArguments(
        folder,
        max_steps=steps,
        per_device_train_batch_size=BATCH,
        dataloader_drop_last=True,
        learning_rate=LR,
        lr_scheduler_type="constant",
        max_grad_norm=CLIP,
        logging_steps=1,
        save_strategy="no",
        report_to=[],
        use_cpu=True,
        disable_tqdm=True,
        remove_unused_columns=False,
    )
    model = work.model()
    model.set_attn_implementation("sdpa")
    trainer = Seq2SeqTrainer(model, arguments, data_collator=work.collate, train_dataset=work.rows)
    trainer.log = lambda *_: None  # logs are kept, not printed
    started = time.process_time()
    trainer.train()
    return steps / (time.process_time() - started)
