"""bf16 against fp32, family by family on this machine: the measurement behind `shard.precision: auto`.

    python benchmarks/precision.py [--shapes decoder-1m decoder-30m encoder ...] [--sides bf16 fp32] [--steps 20]

The sides train the same model from the same weights on the same rows on one thread; they take turns. `bf16` and `fp32`
run under the plain engine, `fp32-zero2` under DeepSpeed's ZeRO 2, which was the default before. Printed are CPU time of
a step, its ratio to that of the first side, and the mean loss of the last quarter of the steps, which tells a precision
that hurts from one that does not.
"""

import argparse
import statistics
import tempfile
import time
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import torch
import translation
from families import ARCHITECTURES, CLIP, SIZES, Quiet
from families import BATCH as IMAGE_BATCH
from text_rows import BERT, HIDDEN_SHARE, LANES, LENGTH, LSTM, read_words

from recipes.data.images import Digits
from recipes.models.encoder import Corruption
from recipes.stages.optim import AdamW
from recipes.stages.sharding import Shard
from trainers.data.batches import BatchPlan
from trainers.data.encoding import TextSettings
from trainers.data.layouts.images import Images
from trainers.data.layouts.packed import Packed
from trainers.data.masking import Masker
from trainers.data.materialise import DataRequest, materialise
from trainers.data.streams import LaneStates, StreamBatches
from trainers.engine.build import build_engine, parameter_group
from trainers.models.encoder_decoder import TargetLosses
from trainers.models.families import build_language_model
from trainers.models.images.build import Blueprint
from trainers.models.images.protocol import ImageFacts
from trainers.models.protocol import TokenizerFacts
from trainers.models.token_losses import CarriedTokenLosses, MaskedTokenLosses, TokenLosses
from trainers.objectives.carried_language_model import CarriedLanguageModelObjective
from trainers.objectives.language_model import LanguageModelObjective
from trainers.objectives.masked_language_model import MaskedLanguageModelObjective
from trainers.objectives.seq2seq import Seq2SeqObjective
from trainers.runtime.precision import use_fast_matmul
from trainers.store.store import Store
from trainers.training.loop import Cadence, train
from trainers.training.optimiser_step import Phase
from trainers.training.steps import PlannedBatches

CPU, LR, GROUP = torch.device("cpu"), 1e-3, "model"
SIDES = {
    "bf16": Shard(engine="plain", precision="bf16"),
    "fp32": Shard(engine="plain", precision="fp32"),
    "fp32-zero2": Shard(engine="deepspeed", zero=2, precision="fp32"),
}
QUICKSTART = {"num_hidden_layers": 4, "hidden_size": 128, "intermediate_size": 384, "num_attention_heads": 4}
WIDE = {"num_hidden_layers": 8, "hidden_size": 512, "intermediate_size": 1408, "num_attention_heads": 8}
BASE = {"hidden_size": 384, "num_hidden_layers": 6, "num_attention_heads": 6, "intermediate_size": 1536}


class Losses(Quiet):
    """Keeps the losses."""

    def __init__(self) -> None:
        self.losses: list[float] = []

    def metrics(self, step: int, values: Mapping[str, float]) -> None:
        """Note a step's."""
        loss = values.get("loss", values.get("generator_loss"))
        if loss is not None:
            self.losses.append(loss)


def run(phases: list[Phase], source: Any) -> tuple[float, float]:
    """CPU seconds of a step, and the mean loss of the last quarter."""
    observer = Losses()
    first, *further = phases
    started = time.process_time()
    train(
        first.engine,
        first.objective,
        source,
        learning_rates=first.learning_rates,
        cadence=Cadence(10**9, 10**9),
        checkpoint=observer,
        evaluate=None,
        observer=observer,
        seed=0,
        further=further,
    )
    seconds = (time.process_time() - started) / source.steps_planned
    last = observer.losses[-max(1, len(observer.losses) // 4) :]
    return seconds, statistics.mean(last)


def phase(module: Any, objective: Any, side: str, name: str = "") -> Phase:
    """One module under a side's engine."""
    group = parameter_group(GROUP, module, AdamW(lr=LR))
    engine = build_engine(module, [group], SIDES[side], clip=CLIP, device=CPU)
    engine.module.train()
    return Phase(name, engine, objective, lambda step: {GROUP: LR})


class Work:
    """Data of all shapes, made once."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.store = Store.open(f"{folder}/store")
        self.words = read_words(folder, self.store)

    def rows(self, length: int) -> Any:
        """The documentation, packed."""
        from recipes.data.text import PythonDocs

        source = PythonDocs(source="python-docs", split="train")
        layout = Packed(TextSettings(self.words.tokenization, length), "text")
        return materialise(DataRequest(source, self.folder, layout, 0), self.store)

    def model(self, architecture: dict[str, Any]) -> Any:
        """A model of text for the documentation's tokenizer."""
        known = self.words.tokenization
        facts = TokenizerFacts(known.vocab_size, known.eos_id, known.pad_id)
        return build_language_model(architecture, facts, seed=0, device=CPU)

    def decoder(self, shape: dict[str, Any], batch: int, length: int, steps: int, side: str) -> tuple[float, float]:
        """A llama on packed rows."""
        model = self.model({"family": "decoder", "type": "llama", "max_position_embeddings": length, **shape})
        plan = BatchPlan(self.rows(length), 0, batch, 1, 0, batch)
        return run([phase(TokenLosses(model), LanguageModelObjective(), side)], PlannedBatches(plan, steps))

    def encoder(self, shape: dict[str, Any], batch: int, length: int, steps: int, side: str) -> tuple[float, float]:
        """BERT restoring hidden words."""
        model = self.model({**BERT, "max_position_embeddings": length, **shape})
        masker = Masker(Corruption(share=HIDDEN_SHARE), self.words.tokenization, 0)
        source = PlannedBatches(BatchPlan(self.rows(length), 0, batch, 1, 0, batch), steps, masker.batch)
        return run([phase(MaskedTokenLosses(model), MaskedLanguageModelObjective(), side)], source)

    def rnn(self, kind: str, width: int, steps: int, side: str) -> tuple[float, float]:
        """A recurrent model on the stream."""
        model = self.model({**LSTM, "type": kind, "hidden_size": width})
        part = phase(CarriedTokenLosses(model), CarriedLanguageModelObjective(), side)
        states = LaneStates(model.base_model.zero_state(LANES).detach())
        share = {"global_batch": LANES, "workers": 1, "rank": 0, "micro_batch": LANES}
        source = StreamBatches(self.words.stream, states, seed=0, sequence_length=LENGTH, steps_planned=steps, **share)
        return run([part], source)

    def translation(self, steps: int, side: str) -> tuple[float, float]:
        """An encoder-decoder."""
        work = translation.Translation(self.store)
        source = PlannedBatches(BatchPlan(work.dataset, 0, translation.BATCH, 1, 0, translation.BATCH), steps)
        return run([phase(TargetLosses(work.model()), Seq2SeqObjective(), side)], source)

    def images(self, name: str, size: int, steps: int, side: str) -> tuple[float, float]:
        """A family of images on the digits."""
        data = Digits(source="digits", size=size)
        dataset = materialise(DataRequest(data, self.folder, Images(), 0), self.store)
        family = Blueprint(ARCHITECTURES[name], ImageFacts.of(dataset)).build(0)
        phases = [phase(part.module, part.objective, side, part.name) for part in family.phases()]
        plan = BatchPlan(dataset, 0, IMAGE_BATCH, 1, 0, IMAGE_BATCH)
        source = PlannedBatches(plan, steps)
        return run(phases, source)


def shapes(work: Work) -> dict[str, Callable[[int, str], tuple[float, float]]]:
    """Every shape: takes steps and precision."""
    found: dict[str, Callable[[int, str], tuple[float, float]]] = {
        "decoder-1m": partial(work.decoder, QUICKSTART, 16, 256),
        "decoder-30m": partial(work.decoder, WIDE, 4, 512),
        "encoder-small": partial(work.encoder, {}, 16, 128),
        "encoder-11m": partial(work.encoder, BASE, 16, 128),
        "lstm-256": partial(work.rnn, "lstm", 256),
        "lstm-512": partial(work.rnn, "lstm", 512),
        "gru-256": partial(work.rnn, "gru", 256),
        "translation": work.translation,
    }
    for name in ARCHITECTURES:
        for size in sorted({SIZES[name], 28}):
            found[f"{name}-{size}"] = partial(work.images, name, size)
    return found


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--shapes", nargs="+")
    parser.add_argument("--sides", nargs="+", default=["bf16", "fp32"], choices=list(SIDES))
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--rounds", type=int, default=3)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    torch.distributed.init_process_group("gloo", store=torch.distributed.HashStore(), rank=0, world_size=1)
    use_fast_matmul(CPU)
    with tempfile.TemporaryDirectory() as folder:
        known = shapes(Work(Path(folder)))
        for name in arguments.shapes or known:
            for side in arguments.sides:
                known[name](2, side)
            rounds = [
                {side: known[name](arguments.steps, side) for side in arguments.sides} for _ in range(arguments.rounds)
            ]
            told = []
            for side in arguments.sides:
                seconds = statistics.median(found[side][0] for found in rounds)
                ratio = statistics.median(found[side][0] / found[arguments.sides[0]][0] for found in rounds)
                told.append(f"{side} {1e3 * seconds:8.1f} ms x{ratio:.2f} loss {rounds[-1][side][1]:.4f}")
            print(f"{name:<14} {'  '.join(told)}", flush=True)


if __name__ == "__main__":
    main()
