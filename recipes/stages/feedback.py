"""Feedback: pairs of answers that people, a reward model or a rule judge; what comes out is a set of preferences."""

from collections.abc import Iterator, Mapping
from dataclasses import replace
from importlib.util import find_spec
from typing import Annotated, ClassVar, Literal, Self

from pydantic import StringConstraints, model_validator

from recipes.artifact_kinds import OutputKind
from recipes.data.text import Source
from recipes.errors import FieldFinding, Finding, at
from recipes.fields import Strict, added_meaning, meaning, placement, raise_all
from recipes.models.base import TextFamily
from recipes.models.type_table import Capability
from recipes.problem_codes import Code
from recipes.smoke_sizes import EVALUATION_PROMPTS, ROWS
from recipes.stages.answers import (
    Counts,
    Forward,
    Held,
    Input,
    Labelling,
    Pass,
    Progress,
    SourceUse,
    Template,
    held_out_use,
    template_field,
)
from recipes.stages.base import TextStage
from recipes.stages.rewards.term import Term
from recipes.stages.rewards.union import (
    RewardTerm,
    TermName,
    carried_columns,
    model_terms,
    num_judges,
    reward_inputs,
    reward_rules,
)
from recipes.stages.rollout import Sampling
from recipes.stages.sharding import Shard

ANNOTATOR = r"^[A-Za-z0-9][A-Za-z0-9._-]{0,62}$"
Annotator = Annotated[str, StringConstraints(pattern=ANNOTATOR)]
PAGE_PACKAGES = ("starlette", "uvicorn")
"""Packages that serve the page."""
LABELLED = ("chosen", "rejected", "annotator")
"""Columns of a pair that is judged already, next to its prompt."""
ANSWERS = 2
"""Of each prompt."""


class PairChoice(Strict):
    """Which of the pairs are judged: those from which most is learnt."""

    by: Literal["margin", "disagreement"] = meaning(
        description="margin: those whose scores differ least; disagreement: those on which two terms of `rewards` "
        "differ most about which answer is better, each divided by the root mean square of its differences.",
    )
    pairs: int = meaning(ge=1, le=10**6, description="How many are judged; the others are left out.")
    between: list[TermName] = meaning(
        default_factory=list, max_length=2, description="by: disagreement: the names of the two terms."
    )


class Feedback(TextStage):
    """A model answers every prompt twice, and people, a reward model or a rule say which answer is better."""

    trains: ClassVar[bool] = False
    curves: ClassVar[tuple[str, ...]] = ()
    kind: Literal["feedback"] = meaning(description="Judged pairs of answers; makes a set of preferences.")
    of: str = meaning(description="The model that answers.")
    prompts: Source = meaning(
        description="Rows with `prompt` (or `messages`); with hold_out the rows that it keeps away from training."
    )
    num_prompts: int = meaning(
        200, ge=1, le=10**6, description="At most this many prompts, drawn by the seed; each makes a pair."
    )
    template: Template | None = template_field("prompts")
    sampling: Sampling = meaning(default_factory=Sampling, description="How answers are drawn.")
    judge: Literal["people", "reward", "rule"] = meaning(
        "people",
        description="people: a page asks annotators, and the run waits for them without workers; reward: the score of "
        "`rewards` decides, a reward model among them; rule: the same without a model.",
    )
    rewards: dict[TermName, RewardTerm] = meaning(
        default_factory=dict,
        max_length=64,
        description="Terms of a reward as in an rl stage, whose weighted sum decides. judge: people: the terms are "
        "only kept with the pairs.",
    )
    margin: float = meaning(
        0.0, ge=0, le=10**6, description="judge: reward, rule: scores that differ by no more than this are a tie."
    )
    choose: PairChoice | None = added_meaning(
        None, description="Judge only some of the pairs, chosen by `rewards`; null: all."
    )
    labelled: Source | None = added_meaning(
        None,
        description="Pairs that are judged already, as the page of `trainwright rollouts` saves them: rows with "
        "`prompt`, `chosen`, `rejected`, `annotator`. They join the set of preferences.",
    )
    labels: int | None = meaning(
        None,
        ge=1,
        le=10**7,
        description="judge: people: judgements that the run waits for; null: of every pair, and `twice` again.",
    )
    twice: float = meaning(
        0.1,
        ge=0,
        le=1,
        description="judge: people: share of the pairs that two annotators judge; their agreement is measured there.",
    )
    min_kappa: float | None = meaning(
        None, ge=-1, le=1, description="judge: people: gate on the annotators' agreement, Cohen's kappa; null: none."
    )
    annotators: list[Annotator] = placement(
        default_factory=lambda: ["annotator"],
        min_length=1,
        max_length=1000,
        description="judge: people: names; each gets a link with a token, and stands with what they have judged.",
    )
    host: str = placement(
        "127.0.0.1",
        description="judge: people: address that the page is served at. Others than the own machine's carry tokens and "
        "texts without encryption.",
    )
    port: int = placement(0, ge=0, le=65535, description="judge: people: port of the page; 0: any that is free.")
    shard: Shard = meaning(
        default_factory=Shard, description="Precision of the forward passes; engine and ZeRO stage have no effect."
    )

    @model_validator(mode="after")
    def _judged_by_what_is_there(self) -> "Feedback":
        raise_all(self._misfits())
        return self

    def _misfits(self) -> Iterator[Finding]:
        models = model_terms(self.rewards)
        if self.judge == "reward" and not models:
            yield Finding(Code.MISSING_KEY, "judge: reward needs a term with a `model` in `rewards`")
        if self.judge == "rule" and not self.rewards:
            yield Finding(Code.MISSING_KEY, "judge: rule needs `rewards`")
        if self.judge == "rule" and models:
            message = f"judge: rule works without reward models, and rewards.{next(iter(models))} is one"
            yield Finding(Code.CONFLICTING_KEYS, message, "judge: reward")
        yield from self._choice_misfits()
        only_people = () if self.judge == "people" else ("labels", "twice", "min_kappa", "annotators", "host", "port")
        for key in (*only_people, *(("margin",) if self.judge == "people" else ())):
            if getattr(self, key) != type(self).model_fields[key].get_default(call_default_factory=True):
                yield Finding(Code.NO_EFFECT, f"{key} has no effect with judge: {self.judge}", "remove the key")
        repeated = sorted({name for name in self.annotators if self.annotators.count(name) > 1})
        if repeated:
            yield Finding(Code.DUPLICATE_ITEM, f"annotator {repeated[0]!r} is listed twice")

    def _choice_misfits(self) -> Iterator[Finding]:
        if (choice := self.choose) is None:
            return
        if not self.rewards:
            yield Finding(Code.MISSING_KEY, "choose needs `rewards`, by which pairs are chosen")
        if choice.pairs > self.num_prompts:
            message = f"choose.pairs ({choice.pairs}) is more than num_prompts ({self.num_prompts})"
            yield Finding(Code.OUT_OF_RANGE, message)
        if choice.by == "margin" and choice.between:
            yield Finding(Code.NO_EFFECT, "choose.between has no effect with by: margin", "remove the key")
        elif choice.by == "disagreement" and (len(set(choice.between)) != 2 or set(choice.between) - set(self.rewards)):
            message = f"choose.between ({choice.between}) must name two terms of rewards ({list(self.rewards)})"
            yield Finding(Code.UNKNOWN_CHOICE, message)

    @property
    def most_pairs(self) -> int:
        """As many pairs are judged at most."""
        return self.num_prompts if self.choose is None else self.choose.pairs

    @property
    def labelling(self) -> Labelling | None:
        if self.judge != "people":
            return None
        who = tuple(self.annotators)
        return Labelling(who, self.twice, self.labels, self.min_kappa, self.host, self.port)

    def inputs(self) -> list[Input]:
        return [Input("of", self.of, ("model",)), *reward_inputs(self.rewards)]

    def outputs(self) -> dict[str, OutputKind]:
        return {"preferences": "preferences"}

    def sources(self) -> list[SourceUse]:
        uses = [replace(held_out_use("prompts", self.prompts, "prompts"), carried=carried_columns(self.rewards))]
        if self.labelled is not None:
            uses.append(replace(held_out_use("labelled", self.labelled, "prompts"), carried=LABELLED))
        return uses

    @property
    def terms(self) -> Mapping[str, Term]:
        return self.rewards

    def text_start(self) -> str:
        return self.of

    def steps(self, rows: int | None = None) -> int:
        return 0

    def batch(self) -> None:
        return None

    def refuse_model(self, family: TextFamily | None) -> Finding | None:
        if family is None or "generation" in family.suites:
            return None
        message = f"kind: {self.kind} needs a model that answers prompts; this one is {family.noun}"
        return Finding(Code.UNSUPPORTED_FAMILY, message)

    def needs(self) -> dict[Capability, tuple[str, str]]:
        return {**super().needs(), "generation": ("of", "")}

    def rules(self) -> Iterator[FieldFinding]:
        yield from super().rules()
        yield from reward_rules(self.rewards)
        most = self.most_pairs * (1 if len(self.annotators) == 1 else ANSWERS)
        if self.labels is not None and self.labels > most:
            message = f"there are at most {most} judgements of {self.most_pairs} pairs"
            yield at(
                "labels", self.labels, Code.OUT_OF_RANGE, message, "more num_prompts or annotators, or fewer labels"
            )

    def missing(self) -> Iterator[FieldFinding]:
        lacking = [name for name in PAGE_PACKAGES if find_spec(name) is None] if self.labelling is not None else []
        if lacking:
            message = f"{' and '.join(lacking)} must be installed to serve the page"
            advice = "pip install 'trainwright[label]'"
            yield at("judge", self.judge, Code.MISSING_PACKAGE, message, advice)

    @property
    def sampled(self) -> tuple[str, Sampling]:
        return "sampling", self.sampling

    def progress(self, start_family: TextFamily | None = None) -> Progress:
        return Progress("part", "responses")

    def shrunk(self, *, is_built_here: bool) -> Self:
        most = min(self.num_prompts, 4 * EVALUATION_PROMPTS)  # so that some of its pairs are held out
        choice = self.choose
        return self.changed(
            choose=None if choice is None else choice.changed(pairs=min(choice.pairs, most)),
            prompts=self.prompts.limited(ROWS),
            num_prompts=most,
            labels=None if self.labelling is None else min(self.labels or most, EVALUATION_PROMPTS),
            sampling=self.sampling.shrunk(),
            min_kappa=None,
        )

    def text_length(self, use: SourceUse) -> int:
        return self.sampling.max_prompt_tokens

    def held(self, counts: Counts) -> Held:
        return Held(0, counts.full * (1 + num_judges(self.rewards)) + len(model_terms(self.rewards)) * counts.scored, 0)

    def forward(self) -> Forward:
        length = self.sampling.max_prompt_tokens + self.sampling.max_new_tokens
        return Forward(length, logits="all", has_cache=True, has_backward=False)

    def passes(self, steps: int) -> list[Pass]:
        new, answers = self.sampling.max_new_tokens, ANSWERS * self.num_prompts
        whole = self.sampling.max_prompt_tokens + new
        return [
            Pass(answers, whole, 1, new, writes=new),
            Pass(answers, whole, len(model_terms(self.rewards))),
        ]
