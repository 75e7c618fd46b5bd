"""docs/extending.md, performed: a decoder type, a data source, an evaluation suite, a kind of stage and an algorithm
join a copy of the tree by the files that the page names, and recipes that use them run.
"""

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from recipes.errors import Preempted
from trainers.store.store import Store

PROJECT = Path(__file__).resolve().parents[2]
PACKAGES = ("recipes", "trainers", "rlhf", "launch", "cluster")

READER = '''"""YAML files: a document a row."""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import yaml

from recipes.data.text import Yaml
from recipes.problem_codes import Code
from trainers.data.sources.local_files import file_parts, files_digest, find_sorted, require
from trainers.data.sources.reader import Part, RawRow, RowFiles, SourceError


@dataclass(frozen=True, slots=True)
class YamlReader:
    """Reads YAML files."""

    source: Yaml
    base_dir: Path
    is_remote = False

    def parts(self) -> Iterator[Part]:
        """Yield the files."""
        return file_parts(find_sorted(self.source.files, self.base_dir), lambda path, _: read_yaml(path))

    def digest(self) -> str:
        """Hash the files' bytes."""
        return files_digest(self.files().paths)

    def files(self) -> RowFiles:
        """Return the files."""
        return RowFiles(require(find_sorted(self.source.files, self.base_dir)))


def read_yaml(path: Path) -> Iterator[RawRow]:
    """Yield a row for each document."""
    for number, row in enumerate(yaml.safe_load_all(path.read_text()), start=1):
        if not isinstance(row, dict):
            raise SourceError(Code.ROWS_NOT_USABLE, f"{path}: document {number} is no mapping")
        yield RawRow(f"{path.name}:{number}", f"{path}: document {number}", row, path.parent)
'''

SUITE = '''"""Suite `next_token`: the share of held-out tokens that are the model's likeliest guess."""

from collections.abc import Sequence
from typing import Any

import torch

from recipes.stages.evaluate import Evaluate
from trainers.data.batches import evaluation_batches
from trainers.data.tokenizer import load_tokenization
from trainers.evaluation.suite import Measured, Parts, open_measured
from trainers.runtime import distributed
from trainers.runtime.observer import counted
from trainers.training.context import StageContext, text_request, model_folder, open_dataset


@torch.no_grad()
def measure_next_token(spec: Evaluate, context: StageContext, labels: Sequence[str], parts: Parts) -> Measured:
    """Guess every token from those before it; collective."""
    metrics = {}
    for index, label in enumerate(labels):
        tokenization = load_tokenization(model_folder(context, f"of.{index}"))
        request = text_request(context, spec.get_source("text"), tokenization, spec.sequence_length)
        dataset = open_dataset(context, request)
        model: Any = open_measured(spec, context, f"of.{index}", "language_model")
        rows, ranks = min(spec.num_prompts, len(dataset)), context.ranks
        read = evaluation_batches(dataset, rows, ranks.world_size, ranks.rank, 8)
        right = total = 0.0
        for batch in counted(read, context.observer, "next_token", rows, **parts.place(index)):
            guesses_BT = model(input_ids=batch.input_ids_BT).logits[:, :-1].argmax(-1)
            is_target_BT = batch.loss_mask_BT[:, 1:]
            right += float((guesses_BT == batch.input_ids_BT[:, 1:])[is_target_BT].sum())
            total += float(is_target_BT.sum())
        right, total = distributed.all_sum([right, total])
        metrics[f"{label}.next_token"] = right / total
    return Measured(metrics)
'''

STAGE = '''"""Preference optimisation without a reward model."""

from collections.abc import Iterator
from typing import ClassVar, Literal, Self

from recipes.artifact_kinds import OutputKind
from recipes.data.text import Source
from recipes.errors import FieldFinding, Finding, at
from recipes.fields import meaning
from recipes.models.base import TextFamily
from recipes.problem_codes import Code
from recipes.stages.answers import Counts, Forward, Held, Input, Progress, Role, Template, needs_decoder, template_field
from recipes.stages.base import TextTraining
from recipes.stages.sharding import Shard
from recipes.stages.train import Train


class Dpo(TextTraining):
    """Direct preference optimisation (Rafailov et al. 2023): the model itself learns from preference pairs."""

    data_role: ClassVar[Role] = "preferences"
    shown: ClassVar[tuple[str, ...]] = ("loss", "accuracy")
    curves: ClassVar[tuple[str, ...]] = ("loss", "accuracy", "margin")
    kind: Literal["dpo"] = meaning(description="Direct preference optimisation.")
    init_from: str = meaning(description="The model to start from, which is also the reference.")
    template: Template | None = template_field("a `prompt` and its answers")
    data: Source = meaning(description="Rows with `chosen` and `rejected`, `prompt` optional.")
    evaluation: Source | None = meaning(None, description="Held-out pairs; None: hold_out.")
    beta: float = meaning(0.1, gt=0, le=100, description="Weight of the divergence from the reference.")
    train: Train = meaning(description="Steps, batch (in pairs), optimiser, cadences.")
    shard: Shard = meaning(default_factory=Shard, description="Engine, ZeRO stage, precision.")

    def inputs(self) -> list[Input]:
        return [Input("init_from", self.init_from, ("model",))]

    def outputs(self) -> dict[str, OutputKind]:
        return {"model": "model"}

    def text_start(self) -> str:
        return self.init_from

    def refuse_model(self, family: TextFamily | None) -> Finding | None:
        return needs_decoder(self.kind, family)

    def rules(self) -> Iterator[FieldFinding]:
        if self.train.tokens is not None:
            message = "a dpo stage counts pairs, not tokens"
            yield at("train.tokens", self.train.tokens, Code.NOT_APPLICABLE, message, "give steps or epochs")

    def packing_rule(self, family: TextFamily | None) -> Finding | None:
        return Finding(Code.NOT_APPLICABLE, "pairs are never packed", "remove the key") if self.train.packing else None

    def progress(self, start_family: TextFamily | None = None) -> Progress:
        return Progress("step", "pairs")

    def shrunk(self, *, is_built_here: bool) -> Self:
        return self._fewer_rows(train=self.train.shrunk())

    def held(self, counts: Counts) -> Held:
        return Held(counts.full, counts.full, counts.full)

    def forward(self) -> Forward:
        return Forward(self.train.sequence_length, copies=2, logits="all")
'''

TASK = '''"""The dpo stage: a reward model's objective on the rewards that a policy implies against its start.

The reward of an answer is beta times its log-probability under the policy over that under the reference (equation 5 of
Rafailov et al. 2023), up to a term of the prompt, which is the same on both sides of a pair.
"""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from recipes.stages.dpo import Dpo
from rlhf.text.reward_model import RewardObjective, evaluate_pairs
from trainers.data.batches import BatchPlan, PairBatch, SequenceBatch, evaluation_batches
from trainers.data.dataset import Dataset
from trainers.data.tokenizer import Tokenization, load_tokenization
from trainers.models.stack import load_exact
from trainers.runtime.observer import interruptible
from trainers.runtime.precision import dtype_of
from trainers.training.context import Candidate, StageContext, model_folder, model_weights, open_sets, text_request
from trainers.training.outcome import Evaluation, Outcome
from trainers.training.steps import PlannedBatches, TrainingPlan, single_phase
from trainers.training.task import Course, run_training
from trainers.training.text_candidate import TrainedText, write_text_candidate


class ImpliedReward(nn.Module):
    """The reward of each row's response that the policy implies against a frozen reference."""

    def __init__(self, policy: nn.Module, reference: nn.Module, beta: float) -> None:
        super().__init__()
        self.policy = policy
        self._reference = (reference,)  # no submodule: nothing of it is trained or stored
        self._beta = beta

    def forward(self, sequences: SequenceBatch) -> Tensor:
        """One reward per row."""
        with torch.no_grad():
            before = _logprobs(self._reference[0], sequences)
        return self._beta * (_logprobs(self.policy, sequences) - before)


def _logprobs(model: Any, sequences: SequenceBatch) -> Tensor:
    """Log-probability of each row's response [B]."""
    logits = model(input_ids=sequences.input_ids_BT, attention_mask=sequences.attention_mask_BT).logits[:, :-1]
    chosen = logits.float().log_softmax(-1).gather(-1, sequences.input_ids_BT[:, 1:, None])[..., 0]
    return (chosen * sequences.response_mask_BT[:, 1:]).sum(dim=1)


@dataclass(frozen=True)
class PairData:
    """Preference pairs, and how they are read."""

    tokenization: Tokenization
    training: Dataset
    held_out: Dataset | None


@dataclass(frozen=True)
class DpoTask:
    """Training of a policy on preference pairs."""

    spec: Dpo
    context: StageContext

    def open_data(self) -> PairData:
        spec, context = self.spec, self.context
        tokenization = load_tokenization(model_folder(context, "init_from"))
        length = spec.train.sequence_length
        training, held_out = open_sets(
            spec, context, lambda use: text_request(context, use, tokenization, length, spec.template)
        )
        return PairData(tokenization, training, held_out)

    def build(self, data: PairData) -> "DpoTrainee":
        weights = model_weights(self.context, "init_from")
        policy, reference = (
            load_exact(weights, "language_model", device=self.context.ranks.device) for _ in ("policy", "reference")
        )
        return DpoTrainee(self.spec, self.context, data, policy, reference.eval().requires_grad_(False))


@dataclass(frozen=True)
class DpoTrainee:
    """A policy and its reference on preference pairs."""

    spec: Dpo
    context: StageContext
    data: PairData
    policy: Any
    reference: Any

    @property
    def num_rows(self) -> int:
        return len(self.data.training)

    def course(self, training: TrainingPlan[Dpo]) -> Course:
        spec, data = self.spec, self.data
        rewards = ImpliedReward(self.policy, self.reference, spec.beta)
        phase = single_phase(training, rewards, RewardObjective(0.0))
        measured = data.training if data.held_out is None else data.held_out
        rows, layout, context = spec.train.evaluation_rows, training.layout, self.context

        def evaluate() -> Evaluation:
            engine = phase.engine
            engine.module.eval()
            batches = evaluation_batches(measured, rows, layout.workers, context.ranks.rank, layout.micro_batch)
            pairs = (batch for batch in batches if isinstance(batch, PairBatch))
            shown = interruptible(pairs, context.observer, "evaluate", min(rows, len(measured)))
            found = evaluate_pairs(engine.module, shown, engine.device)
            engine.module.train()
            return Evaluation({name: found.metrics()[name] for name in ("loss", "accuracy", "margin")})

        plan = BatchPlan(data.training, context.seed, **training.share)
        return Course([phase], PlannedBatches(plan, training.steps), evaluate)

    def candidate(self, training: TrainingPlan[Dpo], course: Course, outcome: Outcome) -> Candidate | None:
        data, dtype = self.data, dtype_of(self.spec.shard.precision)
        return write_text_candidate(
            TrainedText("language_model", self.policy, "policy.", data.tokenization, dtype),
            self.context,
            course.phases[0].engine,
            training.checkpoint,
            outcome,
            artifact="model",
            metrics={
                **outcome.amounts(),
                "evaluation": outcome.evaluation.finite(),
                "data": data.training.report.to_json(),
            },
        )


def run_dpo(spec: Dpo, context: StageContext) -> Candidate | None:
    """Train a policy on preference pairs; the candidate comes from rank 0. Collective."""
    return run_training(DpoTask(spec, context))
'''

TYPE = '''

class Qwen2(_Rotary):
    """transformers' Qwen2Config: llama's block with biases on queries, keys and values."""

    family: Literal["decoder"] = meaning(description="Decoder-only transformer.")
    type: Literal["qwen2"] = meaning(description="transformers' model_type.")

    def _further_in_block(self, shape: Shape) -> int:
        """Biases of queries, keys and values."""
        return (shape.heads + 2 * shape.kv_heads) * shape.head_dim
'''

SOURCE = '''

class Yaml(_Rows, Patterns):
    """YAML documents, one a row."""

    source: Literal["yaml"] = meaning(description="Reads YAML files with a document for each row.")
'''

STOCK = """            case "qwen2":
                from transformers.models.qwen2 import modeling_qwen2 as qwen2

                classes = (
                    qwen2.Qwen2ForCausalLM,
                    qwen2.Qwen2ForSequenceClassification,
                    qwen2.Qwen2ForTokenClassification,
                )
"""

RLOO = """

class Rloo(TokenUpdates):
    \"\"\"REINFORCE leave-one-out (Ahmadian et al. 2024, equation 5), without a critic.\"\"\"

    algorithm: Literal["rloo"] = meaning(description="Advantages: less the mean of the prompt's other responses.")
"""

CREDIT = '''"""Leave-one-out: a sample is compared with the others of its group."""

import torch

from rlhf.algorithms.advantages import Credit, Rewarded


def leave_one_out(rewarded: Rewarded) -> Credit:
    """A sample's total reward less the mean of its group's others, at all of its actions; 0 where there are none."""
    totals_N, groups_N = rewarded.totals_N, rewarded.groups_N
    is_same_NN = groups_N[:, None] == groups_N
    others_N = is_same_NN.sum(1) - 1
    means_N = (torch.where(is_same_NN, totals_N, 0.0).sum(1) - totals_N) / others_N.clamp(min=1)
    advantages_N = torch.where(others_N > 0, totals_N - means_N, 0.0)
    return Credit(torch.where(rewarded.action_mask_NA, advantages_N[:, None], 0.0), None)
'''

CASE = """        case Rloo():
            return Algorithm(leave_one_out, clipped_surrogate(settings), entropy_coef=settings.entropy_coef)
"""

FLOW_KEYS = '''"""Rectified flows: the keys of their configuration."""

from typing import ClassVar, Literal, Self

from recipes.data.images import ImageSetFacts
from recipes.fields import meaning
from recipes.models.images.base import SETTINGS, ImageModel, Names
from recipes.models.images.tally import Tally, TextSizes, count_decoder, count_encoder


class Flow(ImageModel):
    """Rectified flow (Liu et al. 2022): the velocity of straight paths from noise to images."""

    noun: ClassVar[str] = "a rectified flow"
    draws: ClassVar[bool] = True
    family: Literal["flow"] = meaning(description="Rectified flow.")
    width: int = meaning(256, ge=1, le=65_536, description="Units of a hidden layer.")
    depth: int = meaning(2, ge=1, le=12, description="Hidden layers on either side.")
    sampling_steps: int = meaning(20, ge=1, le=10_000, description="Steps of Euler's method from noise to an image.")

    def tally(
        self, facts: ImageSetFacts, autoencoder: ImageModel | None = None, text: TextSizes | None = None
    ) -> Tally:
        """The network."""
        net = Tally()
        count_encoder(net, "mlp", facts, self.width, self.depth, self.width)
        count_decoder(net, "mlp", facts, self.width, self.depth, self.width + 1)
        return net

    def files(self, *, is_latent: bool) -> tuple[Names, Names]:
        """Weights and configurations of its folder."""
        return ("model.safetensors",), (SETTINGS,)

    def shrunk(self) -> Self:
        """The smoke form."""
        return self.changed(width=min(self.width, 32), sampling_steps=min(self.sampling_steps, 8))
'''

FLOW = '''"""Rectified flow (Liu et al. 2022): a network learns the velocity of straight paths from noise to images.

B samples, C channels, H and W pixels.
"""

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn

from recipes.models.images.flow import Flow
from trainers.data.dataset import Dataset
from trainers.models.images.networks import build_decoder, build_encoder
from trainers.models.images.protocol import ImageFacts, ImageFamily, Part
from trainers.runtime.randomness import normals, uniforms

NOISE, TIME, INITIAL = 1, 2, 3


class Velocity(nn.Module):
    """The velocity at points of paths, and times in [0, 1]."""

    def __init__(self, settings: Flow, facts: ImageFacts) -> None:
        super().__init__()
        self.encoder = build_encoder("mlp", facts.shape, settings.width, settings.depth, settings.width)
        self.decoder = build_decoder("mlp", facts.shape, settings.width, settings.depth, settings.width + 1)

    def forward(self, points_BCHW: Tensor, times_B1: Tensor) -> Tensor:
        """Return velocities [B, C, H, W]."""
        hidden = self.encoder(points_BCHW.to(next(self.parameters()).dtype))
        return self.decoder(torch.cat([hidden, times_B1.to(hidden.dtype)], dim=1)).float()


class FlowLosses(nn.Module):
    """Squared error of the velocity per sample."""

    def __init__(self, net: Velocity) -> None:
        super().__init__()
        self.net = net

    def forward(self, images_BCHW: Tensor, labels_B: Tensor, noise_seeds_B: Tensor, step: int) -> dict[str, Tensor]:
        """Return `loss`, and the mean square of the velocity itself."""
        clean = 2 * images_BCHW.float() - 1
        noise = normals(noise_seeds_B, NOISE, tuple(clean.shape[1:]), clean)
        times_B1 = uniforms(noise_seeds_B, TIME, (1,), clean)
        share = times_B1[:, :, None, None]
        velocity = clean - noise
        found = self.net((1 - share) * noise + share * clean, times_B1)
        return {
            "loss": (found - velocity).square().flatten(1).mean(1),
            "target_square": velocity.square().flatten(1).mean(1),
        }


class FlowFamily(ImageFamily):
    """A rectified flow."""

    settings: Flow

    def __init__(self, settings: Flow, facts: ImageFacts) -> None:
        self.settings, self.facts = settings, facts
        self.net = Velocity(settings, facts)
        self.module = FlowLosses(self.net)

    def parts(self) -> list[Part]:
        """One network of our own class."""
        return [Part("", "net.", "model.safetensors", None)]

    @torch.no_grad()
    def outputs(self, images_BCHW: Tensor, labels_B: Tensor) -> Tensor:
        """Return the velocity half-way."""
        return self.net(2 * images_BCHW - 1, torch.full_like(images_BCHW[:, :1, 0, 0], 0.5))

    @torch.no_grad()
    def sample(
        self, seeds: Sequence[int], labels: Sequence[int] | None = None, captions: Sequence[str] | None = None
    ) -> Tensor:
        """Follow the velocity from each seed's noise."""
        self.demand_known(labels, captions)
        like = torch.empty(0, device=next(self.net.parameters()).device)
        points = normals(torch.tensor(list(seeds)), INITIAL, self.facts.shape, like)
        for step in range(self.settings.sampling_steps):
            times = torch.full_like(points[:, :1, 0, 0], step / self.settings.sampling_steps)
            points = points + self.net(points, times) / self.settings.sampling_steps
        return ((points + 1) / 2).clamp(0, 1)

    def gate_reasons(self, metrics: Mapping[str, float], dataset: Dataset) -> list[str]:
        """The velocity must be better than zero everywhere."""
        if "loss" not in metrics or metrics["loss"] < metrics["target_square"]:
            return []
        return [f"held-out error {metrics['loss']:.3f} is not below that of predicting 0"]
'''

FLOW_RECIPE = """\
name: flow
seed: 0

stages:
  flow:
    kind: pretrain
    architecture: {family: flow, width: 256, depth: 2}
    data: {source: digits, hold_out: 0.2}
    train:
      epochs: 100
      global_batch: 64
      optimizer: {lr: 1e-3}
      schedule: {name: constant}
"""

FLOW_CASE = """        case Flow():
            from trainers.models.images.flow import FlowFamily

            return FlowFamily(architecture, facts)
"""

# By section of the page, by file: what stands before the addition, and the addition; None: the file is new.
ADDITIONS: dict[str, dict[str, list[tuple[str | None, str]]]] = {
    "A decoder type": {
        "recipes/models/decoder.py": [
            ("        return 2 * shape.head_dim\n", TYPE),
            (
                '        "qwen3": ModelType("Qwen3", Qwen3, ROTARY_MODULES),\n',
                '        "qwen2": ModelType("Qwen2", Qwen2, ROTARY_MODULES),\n',
            ),
        ],
        "recipes/models/architecture.py": [("DECODER, ", "Qwen2, "), ("Annotated[", "Qwen2 | ")],
        "trainers/models/decoder.py": [("        match model_type:\n", STOCK)],
    },
    "A data source": {
        "recipes/data/text.py": [
            ('description="Reads Apache Parquet files.")\n', SOURCE),
            ("Source = Annotated[\n    ", "Yaml | "),
        ],
        "trainers/data/sources/yaml_files.py": [(None, READER)],
        "trainers/data/sources/open.py": [
            (
                "from trainers.data.sources.text import TextReader\n",
                "from trainers.data.sources.yaml_files import YamlReader\n",
            ),
            ("from recipes.data.text import ", "Yaml, "),
            ("    match source:\n", "        case Yaml():\n            return YamlReader(source, base_dir)\n"),
        ],
    },
    "An evaluation suite": {
        "recipes/stages/suites.py": [
            ("SuiteName = Literal[", '"next_token", '),
            (
                "SUITES: dict[SuiteName, SuiteSpec] = {\n",
                '    "next_token": SuiteSpec("language models", ("next_token",), source=("text", "text")),\n',
            ),
        ],
        "recipes/models/decoder.py": [("    suites=(", '"next_token", ')],
        "trainers/evaluation/suites/next_token.py": [(None, SUITE)],
        "launch/runs/suites.py": [
            (
                "from trainers.evaluation.suite import Measured, Parts, Suite\n",
                "from trainers.evaluation.suites.next_token import measure_next_token\n",
            ),
            ("MEASURES: dict[SuiteName, Suite] = {\n", '    "next_token": measure_next_token,\n'),
        ],
    },
    "A kind of stage": {
        "recipes/stages/dpo.py": [(None, STAGE)],
        "recipes/stages/kinds.py": [
            ("from recipes.stages.base import StageBase\n", "from recipes.stages.dpo import Dpo\n"),
            ("Stage = Annotated[", "Dpo | "),
            ("SEMANTICS = {", '"dpo": 1, '),
        ],
        "rlhf/text/dpo_stage.py": [(None, TASK)],
        "launch/runs/stage_entry.py": [
            ("from recipes.stages.base import ImageTraining, TextTraining\n", "from recipes.stages.dpo import Dpo\n"),
            (
                "    match spec:\n",
                "        case Dpo():\n"
                "            from rlhf.text.dpo_stage import run_dpo\n\n"
                "            return run_dpo(spec, context)\n",
            ),
        ],
    },
    "An algorithm of reinforcement learning": {
        "recipes/stages/algorithms.py": [
            ("small.changed(critic=self.critic.changed(warmup=min(self.critic.warmup, small.iterations - 1)))\n", RLOO),
            ("TextAlgorithm = Annotated[\n    ", 'Annotated[Rloo, Tag("rloo")] | '),
        ],
        "recipes/stages/kinds.py": [('Annotated[PpoStage, Tag("ppo")]', ' | Annotated[PpoStage, Tag("rloo")]')],
        "rlhf/algorithms/leave_one_out.py": [(None, CREDIT)],
        "rlhf/algorithm.py": [
            ("from recipes.stages.algorithms import ", "Rloo, "),
            (
                "from rlhf.algorithms.advantages import CreditAssignment, Gae, GroupNormalised\n",
                "from rlhf.algorithms.leave_one_out import leave_one_out\n",
            ),
            ("    match settings:\n", CASE),
        ],
    },
    "A family of image models": {
        "recipes/models/images/flow.py": [(None, FLOW_KEYS)],
        "recipes/models/images/architecture.py": [
            ("from recipes.models.images.ddpm import Ddpm\n", "from recipes.models.images.flow import Flow\n"),
            ("ImageArchitecture = Annotated[", "Flow | "),
        ],
        "trainers/models/images/flow.py": [(None, FLOW)],
        "trainers/models/images/families.py": [
            ("from recipes.models.images.ddpm import Ddpm\n", "from recipes.models.images.flow import Flow\n"),
            ("    match architecture:\n", FLOW_CASE),
        ],
        "recipes/image/flow.yaml": [(None, FLOW_RECIPE)],
    },
}

RECIPE: dict[str, Any] = {
    "name": "extended",
    "stages": {
        "base": {
            "kind": "pretrain",
            "architecture": {
                "family": "decoder", "type": "qwen2", "num_hidden_layers": 2, "hidden_size": 64,
                "intermediate_size": 128, "num_attention_heads": 4, "max_position_embeddings": 128,
            },
            "tokenizer": {"train": "bpe", "vocab_size": 300},
            "data": {"source": "yaml", "files": ["rows.yaml"], "hold_out": 0.2},
            "train": {
                "steps": 30, "global_batch": 4, "sequence_length": 64, "optimizer": {"lr": 1e-2},
                "schedule": {"name": "constant"},
            },
        },
        "preferring": {
            "kind": "dpo", "init_from": "base",
            "data": {"source": "jsonl", "files": ["pairs.jsonl"], "hold_out": 0.2},
            "train": {
                "steps": 200, "global_batch": 8, "sequence_length": 64, "optimizer": {"lr": 1e-3},
                "schedule": {"name": "constant"}, "save_every": 5, "evaluate_every": 100,
            },
        },
        "measured": {
            "kind": "evaluate", "of": ["base", "preferring"], "suites": ["perplexity", "next_token"],
            "sequence_length": 64,
            "text": {"source": "yaml", "files": ["rows.yaml"], "hold_out": 0.2},
            "gates": [{"metric": "base.next_token", "min": 0.1}],
        },
    },
    "cluster": {"workers": 1, "gpus_per_worker": 0},
}  # fmt: skip


TUNED: dict[str, Any] = {
    "name": "tuned",
    "stages": {
        "base": {
            "kind": "pretrain",
            "architecture": {
                "family": "decoder", "type": "llama", "num_hidden_layers": 2, "hidden_size": 64,
                "intermediate_size": 128, "num_attention_heads": 4, "max_position_embeddings": 128,
            },
            "tokenizer": {"train": "bpe", "vocab_size": 300},
            "data": {"source": "jsonl", "files": ["texts.jsonl"]},
            "train": {"steps": 20, "global_batch": 4, "sequence_length": 64, "optimizer": {"lr": 1e-2}},
        },
        "reward": {
            "kind": "reward", "init_from": "base", "lora": {"r": 4}, "min_accuracy": 0,
            "data": {"source": "jsonl", "files": ["pairs.jsonl"], "hold_out": 0.3},
            "train": {"steps": 20, "global_batch": 4, "sequence_length": 64, "optimizer": {"lr": 1e-2}},
        },
        "policy": {
            "kind": "ppo", "actor": "base", "reward": "reward", "lora": {"r": 4},
            "prompts": {"source": "jsonl", "files": ["pairs.jsonl"]},
            "rollout": {
                "prompts_per_iteration": 4, "samples_per_prompt": 4, "max_prompt_tokens": 48, "max_new_tokens": 16,
            },
            "ppo": {"algorithm": "rloo", "iterations": 4, "optimizer": {"lr": 1e-2}},
        },
    },
    "cluster": {"workers": 1, "gpus_per_worker": 0},
}  # fmt: skip


def files_of(section: str) -> set[str]:
    """The files that the page names for an addition."""
    page = (PROJECT / "docs" / "extending.md").read_text()
    (part,) = re.findall(rf"^## {section}\n(.*?)(?=^## |\Z)", page, re.DOTALL | re.MULTILINE)
    return set(re.findall(r"^\| `([\w/.]+)` \|", part, re.MULTILINE))


@pytest.fixture
def tree(tmp_path: Path) -> Path:
    """A copy of the packages with all additions."""
    folder = tmp_path / "tree"
    for package in PACKAGES:
        shutil.copytree(PROJECT / package, folder / package, ignore=shutil.ignore_patterns("__pycache__"))
    for additions in ADDITIONS.values():
        for name, edits in additions.items():
            path = folder / name
            for before, added in edits:
                text = "" if before is None else path.read_text()
                assert before is None or before in text, f"{name} has no {before!r}"
                path.write_text(added if before is None else text.replace(before, before + added, 1))
    return folder


@pytest.mark.parametrize("section", ADDITIONS)
def test_an_addition_takes_the_files_that_the_page_names(section: str) -> None:
    assert files_of(section) == set(ADDITIONS[section])
    assert sum(not name.endswith(".yaml") for name in ADDITIONS[section]) <= 4  # and the recipe


Call = Callable[..., str]
Start = Callable[..., "subprocess.Popen[str]"]


@pytest.fixture
def start(tree: Path, tmp_path: Path) -> Start:
    """Starts a command of the extended tree next to the recipe."""
    environment = {**os.environ, "PYTHONPATH": str(tree), "TRAINWRIGHT_STORE": str(tmp_path / "store")}

    def start(*arguments: str) -> "subprocess.Popen[str]":
        return subprocess.Popen(
            [sys.executable, "-m", "launch.cli", *arguments], env=environment, cwd=tmp_path, stdout=subprocess.PIPE,
            stderr=subprocess.PIPE, text=True,
        )  # fmt: skip

    return start


@pytest.fixture
def call(start: Start) -> Call:
    """Runs a command of the extended tree next to the recipe; returns what it prints."""

    def call(*arguments: str) -> str:
        process = start(*arguments)
        out, errors = process.communicate(timeout=400)
        assert process.returncode == 0, out + errors
        return out

    return call


def made(call: Call) -> dict[str, str]:
    """The kind of each stage's artifact."""
    return {item["stage"]: item["kind"] for item in json.loads(call("store", "ls", "--json"))}


def test_a_recipe_uses_a_type_a_source_a_suite_and_a_kind_of_stage(call: Call, start: Start, tmp_path: Path) -> None:
    """Checked, planned, run, stopped in the new kind of stage, resumed from its state, verified and committed."""
    rows = [{"text": " ".join(f"{word} and {word + 1}" for word in range(row, row + 12))} for row in range(60)]
    (tmp_path / "rows.yaml").write_text("---\n".join(json.dumps(row) + "\n" for row in rows))
    pairs = [
        {"prompt": f"{row} and {row + 1}", "chosen": f"yes, {row + 1}", "rejected": f"no, {row + 1}"}
        for row in range(60)
    ]
    (tmp_path / "pairs.jsonl").write_text("".join(json.dumps(pair) + "\n" for pair in pairs))
    (tmp_path / "recipe.yaml").write_text(json.dumps(RECIPE))
    call("check", "recipe.yaml", "--smoke")
    assert "preferring" in call("plan", "recipe.yaml")
    driver, store, deadline = start("run", "recipe.yaml"), tmp_path / "store", time.monotonic() + 300
    while not any("manifest" in state.read_text() for state in store.glob("refs/states/*/preferring/*")):
        assert driver.poll() is None, driver.communicate()
        assert time.monotonic() < deadline
        time.sleep(0.05)
    driver.send_signal(signal.SIGTERM)
    out, errors = driver.communicate(timeout=100)
    assert driver.returncode == Preempted.exit_code, out + errors

    call("resume", "last")
    (run,) = Store.open(str(store)).runs()
    lines = list(Store.open(str(store)).run(run).read_lines("metrics/preferring/2"))
    assert lines[0]["step"] > 1
    assert made(call) == {"base": "model", "preferring": "model", "measured": "report"}
    artifact = json.loads(call("store", "show", "last/preferring", "--json"))
    assert artifact["verification"]["how"] == "clean-process"
    assert artifact["metrics"]["evaluation"]["accuracy"] > 0.8


def test_an_algorithm_without_a_critic_makes_an_artifact_without_one(call: Call, tmp_path: Path) -> None:
    pairs = [
        {"prompt": f"count from {row}: ", "chosen": f"{row + 1}, {row + 2}", "rejected": f"{row}, {row}, {row}"}
        for row in range(60)
    ]
    (tmp_path / "pairs.jsonl").write_text("".join(json.dumps(row) + "\n" for row in pairs))
    texts = [{"text": row["prompt"] + row["chosen"]} for row in pairs]
    (tmp_path / "texts.jsonl").write_text("".join(json.dumps(row) + "\n" for row in texts))
    (tmp_path / "recipe.yaml").write_text(json.dumps(TUNED))
    call("check", "recipe.yaml")
    call("run", "recipe.yaml", "--smoke")
    assert made(call) == {"base": "model", "reward": "reward_model", "policy": "adapter"}

    store = Store.open(str(tmp_path / "store"))
    (artifact,) = [item for item in store.list_artifacts() if item.stage == "policy"]
    assert {name.split("/")[0] for name in artifact.files} == {"model", "adapter"}
    (run,) = store.runs()
    lines = [line["values"] for line in store.run(run).read_lines("metrics/policy")]
    names = {name for values in lines for name in values}
    assert {"score_mean", "policy_loss", "lr"} <= names
    assert not {name for name in names if "value" in name or "critic" in name}


def test_an_added_image_family_trains_is_verified_and_draws(call: Call, tree: Path, tmp_path: Path) -> None:
    recipe = str(tree / "recipes" / "image" / "flow.yaml")
    call("check", recipe)
    call("run", recipe, "--smoke")
    assert made(call) == {"flow": "flow"}
    (artifact,) = json.loads(call("store", "ls", "--json"))
    address = f"store://{artifact['fingerprint']}"
    assert json.loads(call("store", "show", address, "--json"))["verification"]["how"] == "clean-process"
    call("sample", address, "--grid", "grid.png", "--num-samples", "9")
    with Image.open(tmp_path / "grid.png") as grid:
        assert len(grid.getcolors(1 << 16) or ()) > 16
