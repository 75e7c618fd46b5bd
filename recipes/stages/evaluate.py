"""Evaluations."""

from collections.abc import Iterator, Mapping
from dataclasses import replace
from typing import ClassVar, Literal, Self

from pydantic import model_validator

from recipes.artifact_kinds import OutputKind
from recipes.data.images import ImageSource
from recipes.data.text import PythonDocs, Source
from recipes.errors import FieldFinding, Finding, at
from recipes.fields import Strict, added_meaning, meaning, raise_all, refuse
from recipes.models.base import TextFamily
from recipes.models.images.architecture import CLASSIFYING_KINDS, DRAWING_KINDS
from recipes.problem_codes import Code
from recipes.smoke_sizes import EVALUATION_PROMPTS, HELD_OUT_ROWS, ROWS, SEQUENCE
from recipes.stages.answers import (
    Counts,
    Forward,
    Held,
    Input,
    Pass,
    Progress,
    SharedTokens,
    SourceUse,
    Template,
    held_out_use,
    template_field,
)
from recipes.stages.base import TextStage
from recipes.stages.benchmarks.union import AnyBenchmark, BenchmarkName
from recipes.stages.rewards.term import Term
from recipes.stages.rewards.union import (
    RewardTerm,
    TermName,
    carried_columns,
    model_terms,
    num_judges,
    reward_inputs,
    weights_of,
)
from recipes.stages.rollout import Sampling
from recipes.stages.sharding import Shard
from recipes.stages.suites import (
    BEATS_TRUTH,
    GAIN,
    INTERVAL,
    NOISE,
    NUM_CASES,
    SUITES,
    TRUTH,
    WINS,
    SuiteName,
    SuiteSpec,
    report_labels,
)


class Bound(Strict):
    """A gate on one metric."""

    metric: str = meaning(
        pattern=r"^[a-z0-9_]+(\.[a-z0-9_]+)*$", description="Dotted name in the report, for example policy.win_rate."
    )
    min: float | None = meaning(None, description="Smallest value that passes.")
    max: float | None = meaning(None, description="Largest value that passes.")

    @model_validator(mode="after")
    def _some_bound(self) -> "Bound":
        if self.min is None and self.max is None:
            refuse(Code.MISSING_KEY, f"gate on {self.metric}: give min, max or both")
        return self


EXPECTED_ROWS = 1000
"""Of a benchmark whose data has no limit, for the plan's times."""
MIN_COMPARED = 2
"""Images that a distance needs on either side."""


def compared_images(held_out: int, others: int) -> Finding | None:
    """The rule that there are images to compare, of so many at most; None: there are."""
    if min(held_out, others) >= MIN_COMPARED:
        return None
    message = f"distances need {MIN_COMPARED} held-out images and {MIN_COMPARED} others, not {held_out} and {others}"
    return Finding(Code.TOO_FEW_SAMPLES, message, "more images, or another hold_out or limit")


class Evaluate(TextStage):
    """Measure models: perplexity, answers, what a reward says of them next to the truth and to noise; or targets of
    encoder-decoders; or models of images.
    """

    trains: ClassVar[bool] = False
    compares_models: ClassVar[bool] = True
    curves: ClassVar[tuple[str, ...]] = (
        "loss",
        "score_mean",
        "kl",
        "length_mean",
        "eos_rate",
        "perplexity",
        "ngram_perplexity",
        "distinct_2",
    )
    kind: Literal["evaluate"] = meaning(description="Evaluation; makes a report.")
    of: list[str] = meaning(
        min_length=1,
        max_length=16,
        description="Models to measure; for perplexity, which counts tokens, they need one tokenizer. The first is the "
        "start that others are compared with.",
    )
    rewards: dict[TermName, RewardTerm] = added_meaning(
        {},
        max_length=64,
        description="Terms of a reward as in an rl stage, reward models among them, also several: the one that a "
        "policy learnt from, and another that shares neither data nor start with it. Each is reported as reward_NAME, "
        "its mean over the answers.",
    )
    benchmarks: dict[BenchmarkName, AnyBenchmark] = added_meaning(
        {},
        max_length=64,
        description="Questions and pairs with known answers, by name: multiple choice, written answers, pairs of "
        "sentences. Their figures are NAME.METRIC of each model, with NAME.n rows and a 95 % interval.",
    )
    features: str | None = meaning(None, description="images: the classifier whose features measure images.")
    suites: list[SuiteName] = meaning(
        default_factory=lambda: ["perplexity", "generation"],
        description="perplexity of held-out text; generation: length, EOS rate, distinct-2, KL, real words, samples; "
        "comparison: wins over the first model and over the truth, by each term of `rewards`; targets, alone, for "
        "encoder-decoders: loss, BLEU and chrF of held-out targets; images, alone: distances of drawn images to real "
        "ones, classes, copies.",
    )
    text: Source | None = meaning(
        None,
        description="Held-out text for perplexity; with hold_out the rows that it keeps away from training. null: "
        "python-docs' test split.",
    )
    prompts: Source | None = meaning(
        None,
        description="Held-out prompts, for targets with their completions; with hold_out the rows that it keeps away "
        "from training. null: python-docs' test split.",
    )
    images: ImageSource | None = meaning(
        None,
        description="images: real images; its hold_out is what drawn ones are compared with, the rest what may have "
        "been copied.",
    )
    num_images: int = meaning(
        1000, ge=8, le=10**6, description="images: most images of a draw; never more than are held out."
    )
    num_draws: int = meaning(
        5, ge=2, le=10, description="images: independent draws of each model; intervals are those of their means."
    )
    num_prompts: int = meaning(
        200,
        ge=1,
        le=10**6,
        description="At most this many prompts to answer, drawn by the seed; targets: the rows that a finetune's "
        "evaluation takes.",
    )
    num_sequences: int | None = added_meaning(
        None,
        ge=1,
        le=10**9,
        description="At most this many sequences of the perplexity text; null: as many as num_prompts.",
    )
    template: Template | None = template_field("prompts")
    num_samples: int = meaning(8, ge=0, le=1000, description="Responses of each model kept in the report.")
    sequence_length: int = meaning(
        256,
        ge=8,
        le=10**7,
        description="Tokens per sequence of the perplexity text, which recurrent models read on in; targets: the most "
        "that a source, a target and what is written may have, longer rows are left out and counted.",
    )
    num_beams: int = meaning(
        1, ge=1, le=64, description="targets: beams of the search that BLEU and chrF are measured by; 1: greedily."
    )
    sampling: Sampling = meaning(default_factory=Sampling, description="How responses are drawn.")
    gates: list[Bound] = meaning(
        default_factory=list, description="Bounds that the report must meet for its gate to pass."
    )
    shard: Shard = meaning(
        default_factory=Shard, description="Precision of the forward passes; engine and ZeRO stage have no effect."
    )

    @model_validator(mode="after")
    def _suites_have_what_they_need(self) -> "Evaluate":
        raise_all(self._misfits())
        return self

    def _misfits(self) -> Iterator[Finding]:
        for name, suite in self._chosen.items():
            missing = [key for key in suite.needs if not getattr(self, key)]
            if missing or len(self.of) < suite.num_models:
                models = f" and at least {suite.num_models} models in `of`" if suite.num_models > 1 else ""
                keys = " and ".join(f"`{key}`" for key in suite.needs)
                yield Finding(Code.MISSING_KEY, f"suite {name!r} needs {keys}{models}")
            if suite.is_alone and len(self.suites) > 1:
                yield Finding(
                    Code.CONFLICTING_KEYS,
                    f"suite {name!r} cannot be combined with other suites: it measures {suite.measures}",
                )
        for name, suite in SUITES.items():
            given = [key for key in suite.takes if getattr(self, key) != type(self).model_fields[key].get_default()]
            if name not in self.suites and given:
                yield Finding(Code.NO_EFFECT, f"{' and '.join(given)} has no effect without suites: [{name}]")
        if not self.suites and not self.benchmarks:
            yield Finding(Code.MISSING_KEY, "there is nothing to measure: name `suites` or `benchmarks`")
        if self.benchmarks and any(suite.is_alone for suite in self._chosen.values()):
            yield Finding(Code.CONFLICTING_KEYS, "benchmarks measure language models; these suites do not")
        if self.rewards and not self.writes_answers:
            yield Finding(Code.NO_EFFECT, "rewards has no effect without suites: [generation]")
        if self.is_image and self.images is not None and self.images.hold_out == 0:
            yield Finding(Code.MISSING_KEY, "suite 'images' needs `images` with a hold_out above 0")

    @property
    def _chosen(self) -> dict[SuiteName, SuiteSpec]:
        return {name: suite for name, suite in SUITES.items() if name in self.suites}

    def labels(self) -> list[str]:
        """Return the names of the models in the report's metrics."""
        return report_labels(self.of)

    def metrics(self) -> set[str]:
        """Return the name of every metric that the report can hold; raises ValueError for an invalid reference."""
        labels, known = self.labels(), [TRUTH, NOISE] if self.writes_answers else []
        names = {f"{label}.reward_{name}" for label in [*labels, *known] for name in weights_of(self.rewards)}
        for suite in self._chosen.values():
            names |= {f"{label}.{metric}" for label in labels for metric in suite.metrics} | set(suite.totals)
            names |= {f"{label}.{metric}" for label in known for metric in suite.of_known}
            if suite.counts_wins:
                others = [*labels[1:], *known]
                names |= {f"{label}.score_gain_sd" for label in others}
                names |= {f"{label}.{wins.format(name)}" for label in others for wins in WINS for name in self.rewards}
                judged = [f"{name}_{figure}" for name, term in self.rewards.items() for figure in term.measures]
                names |= {f"{label}.{figure}" for label in others for figure in judged}
                rivals = [*labels, NOISE]
                names |= {f"{label}.{BEATS_TRUTH.format(name)}" for label in rivals for name in self.rewards}
        for name, benchmark in self.benchmarks.items():
            figures = [f"{metric}{end}" for metric in benchmark.metrics for end in ("", *INTERVAL)]
            names |= {
                f"{label}.{name}.{figure}"
                for label in labels
                for figure in (*figures, *benchmark.references, NUM_CASES)
            }
            names |= {
                f"{label}.{name}.{figure}{end}" for label in labels[1:] for figure in benchmark.metrics for end in GAIN
            }
        return names

    def refuse_model(self, family: TextFamily | None) -> Finding | None:
        if family is None:
            return None
        refused = next((name for name, item in self.benchmarks.items() if item.suite not in family.suites), None)
        if refused is not None:
            message = f"benchmark {refused!r} measures decoders; this model is {family.noun}"
            return Finding(Code.UNSUPPORTED_FAMILY, message, f"remove benchmarks.{refused}")
        if set(self._chosen) <= set(family.suites):
            return None
        if not family.suites:
            message = f"no suite measures {family.plural}; their own finetune reports how they do"
            return Finding(Code.UNSUPPORTED_FAMILY, message, "remove it")
        refusing = next(name for name in self._chosen if name not in family.suites)
        own = [name for name in SUITES if name in family.suites]
        message = f"suite {refusing!r} measures {SUITES[refusing].measures}; this model is {family.noun}"
        return Finding(Code.UNSUPPORTED_FAMILY, message, f"suites: [{', '.join(own)}]")

    def inputs(self) -> list[Input]:
        wants: tuple[OutputKind, ...] = DRAWING_KINDS if self.is_image else ("model",)
        inputs = [Input(f"of.{index}", text, wants) for index, text in enumerate(self.of)]
        if self.features is not None:
            inputs.append(Input("features", self.features, CLASSIFYING_KINDS))
        return [*inputs, *reward_inputs(self.rewards)]

    def outputs(self) -> dict[str, OutputKind]:
        return {"report": "report"}

    def sources(self) -> list[SourceUse]:
        default = PythonDocs(source="python-docs", split="test")
        read = dict.fromkeys(suite.source for suite in self._chosen.values() if suite.source is not None)
        uses = [held_out_use(key, getattr(self, key) or default, role) for key, role in read]
        columns = carried_columns(self.rewards)
        uses = [replace(use, carried=columns) if use.facts.is_asked else use for use in uses]
        if self.images is not None:
            uses.append(SourceUse("images", self.images, "images"))
        return [*uses, *(use for name, item in self.benchmarks.items() for use in item.sources(f"benchmarks.{name}"))]

    @property
    def is_image(self) -> bool:
        return "images" in self.suites

    @property
    def terms(self) -> Mapping[str, Term]:
        return self.rewards

    def placed_terms(self) -> Iterator[tuple[str, Term]]:
        yield from super().placed_terms()
        for name, item in self.benchmarks.items():
            yield from ((f"benchmarks.{name}.scorers.{scorer}", term) for scorer, term in item.terms.items())

    @property
    def writes_answers(self) -> bool:
        """Whether models answer prompts."""
        return "generation" in self.suites or "comparison" in self.suites

    def text_start(self) -> str | None:
        return None if self.is_image else self.of[0]

    def steps(self, rows: int | None = None) -> int:
        return 0

    def batch(self) -> None:
        return None

    def rules(self) -> Iterator[FieldFinding]:
        yield from super().rules()
        for index, text in enumerate(self.of):
            if text in self.of[:index]:
                yield at(f"of.{index}", text, Code.DUPLICATE_ITEM, "listed twice in `of`", "remove one")
        scorers: dict[str, str] = {}
        for name, term in model_terms(self.rewards).items():
            if (first := scorers.setdefault(term.model, name)) != name:
                message = f"`{first}` is the same reward model"
                yield at(f"rewards.{name}.model", term.model, Code.DUPLICATE_ITEM, message, "remove one")
        limit = None if self.images is None else self.images.limit  # of the held-out images, and of the others
        if limit is not None and (finding := compared_images(limit, limit)) is not None:
            yield FieldFinding("images.limit", limit, finding)

    def image_reference(self) -> tuple[str, ImageSource | str] | None:
        return None if self.images is None else ("images", self.images)

    def lengths(self) -> Iterator[tuple[str, int]]:
        if "perplexity" in self.suites or "targets" in self.suites:
            yield "sequence_length", self.sequence_length
        for name, item in self.benchmarks.items():
            yield f"benchmarks.{name}.max_tokens", item.max_tokens

    def shared_tokens(self) -> Iterator[SharedTokens]:
        if "perplexity" in self.suites:  # of a token; answers and targets are compared as text
            for index, text in enumerate(self.of[1:], start=1):
                yield SharedTokens(f"of.{index}", text, "of.0", self.of[0], ", or leave out suite perplexity")

    @property
    def sampled(self) -> tuple[str, Sampling] | None:
        return ("sampling", self.sampling) if self.writes_answers else None

    def progress(self, start_family: TextFamily | None = None) -> Progress:
        return Progress("part", "images" if self.is_image else "responses")

    def shrunk(self, *, is_built_here: bool) -> Self:
        return self.changed(
            text=None if self.text is None else self.text.limited(HELD_OUT_ROWS),
            prompts=None if self.prompts is None else self.prompts.limited(ROWS),
            num_prompts=min(self.num_prompts, EVALUATION_PROMPTS),
            num_samples=min(self.num_samples, 2),
            images=None if self.images is None else self.images.limited(ROWS),
            num_images=min(self.num_images, EVALUATION_PROMPTS),
            num_draws=2,
            sequence_length=min(self.sequence_length, SEQUENCE),
            sampling=self.sampling.shrunk(),
            benchmarks={name: item.shrunk() for name, item in self.benchmarks.items()},
            gates=[],
        )

    def text_length(self, use: SourceUse) -> int:
        if use.form is not None:
            return self.benchmarks[use.field_path.split(".")[1]].max_tokens
        return self.sampling.max_prompt_tokens if use.facts.is_asked else self.sequence_length

    def held(self, counts: Counts) -> Held:
        scorers = len(model_terms(self.rewards))
        return Held(0, (len(self.of) + num_judges(self.rewards)) * counts.full + scorers * counts.scored, 0)

    def forward(self) -> Forward:
        if "targets" in self.suites:
            length, copies = 2 * self.sequence_length, self.num_beams
        elif not self.writes_answers and self.benchmarks:
            length, copies = max(item.max_tokens for item in self.benchmarks.values()), 1
        else:
            length, copies = self.sampling.max_prompt_tokens + self.sampling.max_new_tokens, 1
        return Forward(length, copies=copies, logits="all", has_cache=True, has_backward=False)

    def passes(self, steps: int) -> list[Pass]:
        """Each model reads the text, answers every prompt, and is compared with the first; scorers read the answers."""
        found, models, length = [], len(self.of), self.sequence_length
        if "perplexity" in self.suites:
            found.append(Pass(self.num_sequences or self.num_prompts, length, models, length))
        if "targets" in self.suites:
            found.append(Pass(self.num_prompts, length, models, length))
            found.append(Pass(self.num_prompts * self.num_beams, length, models, length, writes=length))
        if self.writes_answers:
            new = self.sampling.max_new_tokens
            whole = self.sampling.max_prompt_tokens + new
            scorers, answered = len(model_terms(self.rewards)), models + 2  # the truth and noise are scored too
            found.append(Pass(self.num_prompts, whole, models, new, writes=new))
            found.append(Pass(self.num_prompts, whole, 2 * models, new))
            found.append(Pass(self.num_prompts, whole, scorers * answered))
        for item in self.benchmarks.values():
            rows = getattr(item.data, "limit", None) or EXPECTED_ROWS
            found.append(
                Pass(rows * item.draws, item.max_tokens // 4, models, logits=item.max_tokens // 8, writes=item.writes)
            )
        return found
