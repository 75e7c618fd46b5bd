"""Families of text for `families.py`: our loop, a loop by hand, and transformers' Trainer where it has the model.

Both rows read the documentation that Python carries, with a tokenizer of 2,048 entries. `lstm`: a language model in the
form of PyTorch's word_language_model example (batchify, a carried and detached state, tied embeddings, clipping; AdamW
instead of its SGD). `masked_lm`: BERT in the form of transformers' run_mlm_no_trainer by hand, and of run_mlm by
Trainer, both with its collator that hides tokens.
"""

import functools
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from recipes.data.text import PythonDocs
from recipes.data.tokenizers import TrainTokenizer
from recipes.models.encoder import Corruption
from recipes.stages.optim import AdamW
from recipes.stages.sharding import Shard
from trainers.data.batches import BatchPlan
from trainers.data.dataset import Dataset
from trainers.data.encoding import TextSettings
from trainers.data.layouts.packed import Packed
from trainers.data.layouts.stream import Stream
from trainers.data.masking import Masker
from trainers.data.materialise import DataRequest, build_tokenization, materialise
from trainers.data.streams import LaneStates, StreamBatches
from trainers.data.tokenizer import Tokenization
from trainers.engine.build import build_engine, parameter_group
from trainers.models.families import build_language_model
from trainers.models.protocol import TokenizerFacts
from trainers.models.token_losses import CarriedTokenLosses, MaskedTokenLosses
from trainers.objectives.carried_language_model import CarriedLanguageModelObjective
from trainers.objectives.masked_language_model import MaskedLanguageModelObjective
from trainers.store.store import Store
from trainers.training.loop import Cadence, train
from trainers.training.steps import GROUP, PlannedBatches

LR, CLIP, HIDDEN_SHARE = 1e-3, 1.0, 0.15
LANES, LENGTH = 32, 35
"""Of the LSTM: rows of a batch, and tokens that gradients go back, as the example has them."""
ROWS, TOKENS = 16, 128
"""Of the masked language model."""
LSTM: dict[str, Any] = {"family": "rnn", "type": "lstm", "hidden_size": 256, "num_hidden_layers": 2, "dropout": 0.2}
BERT: dict[str, Any] = {
    "family": "encoder",
    "type": "bert",
    "hidden_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "intermediate_size": 512,
    "max_position_embeddings": TOKENS,
}


@dataclass(frozen=True)
class Words:
    """The text in both forms."""

    tokenization: Tokenization
    stream: Dataset
    packed: Dataset

    def model(self, architecture: dict[str, Any]) -> Any:
        """Build a model for the text."""
        facts = TokenizerFacts(self.tokenization.vocab_size, self.tokenization.eos_id, self.tokenization.pad_id)
        return build_language_model(architecture, facts, seed=0, device=torch.device("cpu"))

    @functools.cached_property
    def blocks(self) -> torch.Tensor:
        """The text as equal pieces, as run_mlm groups it."""
        tokens = np.array(self.stream.arrays["tokens"], dtype=np.int64)
        return torch.from_numpy(tokens[: len(tokens) // TOKENS * TOKENS]).view(-1, TOKENS)


def read_words(folder: Path, store: Store) -> Words:
    """Train the tokenizer and pack the text."""
    source = PythonDocs(source="python-docs", split="train")
    special = {"cls_token": "<|cls|>", "mask_token": "<|mask|>"}
    tokenization = build_tokenization(TrainTokenizer(train="bpe", vocab_size=2048, **special), source, folder, 0, store)
    settings = TextSettings(tokenization, TOKENS)
    stream, packed = (
        materialise(DataRequest(source, folder, layout, 0), store)
        for layout in (Stream(settings), Packed(settings, "text"))
    )
    return Words(tokenization, stream, packed)


def ours(name: str, words: Words, steps: int, quiet: Any) -> float:
    """Steps per CPU second of the loop with the plain engine."""
    model = words.model(LSTM if name == "lstm" else BERT)
    source: Any
    if name == "lstm":
        module, objective = CarriedTokenLosses(model), CarriedLanguageModelObjective()
        states = LaneStates(model.base_model.zero_state(LANES).detach())
        places = {"global_batch": LANES, "workers": 1, "rank": 0, "micro_batch": LANES}
        source = StreamBatches(words.stream, states, seed=0, sequence_length=LENGTH, steps_planned=steps, **places)
    else:
        module, objective = MaskedTokenLosses(model), MaskedLanguageModelObjective()
        masker = Masker(Corruption(share=HIDDEN_SHARE), words.tokenization, 0)
        source = PlannedBatches(BatchPlan(words.packed, 0, ROWS, 1, 0, ROWS), steps, masker.batch)
    group = parameter_group(GROUP, module, AdamW(lr=LR))
    engine = build_engine(
        module, [group], Shard(engine="plain", precision="fp32"), clip=CLIP, device=torch.device("cpu")
    )
    engine.module.train()
    started = time.process_time()
    train(
        engine,
        objective,
        source,
        learning_rates=lambda step: {GROUP: LR},
        cadence=Cadence(10**9, 10**9),
        checkpoint=quiet,
        evaluate=None,
        observer=quiet,
        seed=0,
    )
    return steps / (time.process_time() - started)


class ExampleLstm(nn.Module):
    """The model of PyTorch's example, tied."""

    def __init__(self, vocab_size: int) -> None:
        super().__init__()
        width = LSTM["hidden_size"]
        self.drop = nn.Dropout(LSTM["dropout"])
        self.encoder = nn.Embedding(vocab_size, width)
        self.rnn = nn.LSTM(width, width, LSTM["num_hidden_layers"], dropout=LSTM["dropout"])
        self.decoder = nn.Linear(width, vocab_size)
        self.decoder.weight = self.encoder.weight

    def forward(self, tokens: torch.Tensor, hidden: Any) -> tuple[torch.Tensor, Any]:
        """Logits [T x B, V] and the state after."""
        output, hidden = self.rnn(self.drop(self.encoder(tokens)), hidden)
        return self.decoder(self.drop(output)).flatten(0, 1), hidden


def lstm_by_hand(words: Words, steps: int) -> float:
    """Steps per CPU second of the example's loop."""
    model = ExampleLstm(words.tokenization.vocab_size).train()
    tokens = torch.from_numpy(np.array(words.stream.arrays["tokens"], dtype=np.int64))
    data = tokens[: len(tokens) // LANES * LANES].view(LANES, -1).t().contiguous()
    optimizer = torch.optim.AdamW(model.parameters(), lr=LR)
    zero = torch.zeros(LSTM["num_hidden_layers"], LANES, LSTM["hidden_size"])
    hidden: Any = (zero, zero)
    started = time.process_time()
    for step in range(steps):
        first = step * LENGTH % (len(data) - LENGTH - 1)
        inputs, targets = data[first : first + LENGTH], data[first + 1 : first + 1 + LENGTH].flatten()
        hidden = tuple(part.detach() for part in hidden)
        optimizer.zero_grad()
        logits, hidden = model(inputs, hidden)
        loss = nn.functional.cross_entropy(logits, targets)
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), CLIP)
        optimizer.step()
        float(loss.detach())
    return steps / (time.process_time() - started)


def _collator(words: Words) -> Any:
    """transformers' own, over the tokenizer as it is exported."""
    from transformers import AutoTokenizer, DataCollatorForLanguageModeling

    with tempfile.TemporaryDirectory() as folder:
        for name, content in words.tokenization.files().items():
            Path(folder, name).write_bytes(content)
        tokenizer = AutoTokenizer.from_pretrained(folder)
    return DataCollatorForLanguageModeling(tokenizer=tokenizer, mlm_probability=HIDDEN_SHARE)


def plain_loop(model: Any, loader: Any, steps: int) -> float:
    """Steps per CPU second of a loop by hand over a model of transformers, which gives its own loss."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=LR)
    done = 0
    started = time.process_time()
    while done < steps:
        for batch in loader:
            optimizer.zero_grad()
            loss = model(**batch).loss
            loss.backward()
            nn.utils.clip_grad_norm_(model.parameters(), CLIP)
            optimizer.step()
            float(loss.detach())
            done += 1
            if done == steps:
                break
    return steps / (time.process_time() - started)


def masked_by_hand(words: Words, steps: int) -> float:
    """Steps per CPU second of a loop over transformers' model and collator."""
    model = words.model(BERT).train()
    rows = [{"input_ids": row} for row in words.blocks]
    loader = torch.utils.data.DataLoader(rows, batch_size=ROWS, shuffle=True, collate_fn=_collator(words))
    return plain_loop(model, loader, steps)


def masked_by_trainer(words: Words, steps: int) -> float:
    """Steps per CPU second of transformers' Trainer."""
    from transformers import Trainer, TrainingArguments

    rows = [{"input_ids": row} for row in words.blocks]
    with tempfile.TemporaryDirectory() as folder:
        arguments = TrainingArguments(
            output_dir=folder,
            max_steps=steps,
            per_device_train_batch_size=ROWS,
            learning_rate=LR,
            lr_scheduler_type="constant",
            max_grad_norm=CLIP,
            logging_steps=10,
            save_strategy="no",
            report_to=[],
            use_cpu=True,
            disable_tqdm=True,
        )
        model = words.model(BERT)
        trainer = Trainer(model=model, args=arguments, train_dataset=rows, data_collator=_collator(words))
        started = time.process_time()
        trainer.train()
        return steps / (time.process_time() - started)


PEERS: dict[str, dict[str, Callable[[Words, int], float]]] = {
    "lstm": {"by hand": lstm_by_hand},
    "masked_lm": {"by hand": masked_by_hand, "Trainer": masked_by_trainer},
}
"""What each row is held against."""
