"""Reinforcement learning: of what a language model answers, and of what a diffusion model draws."""

from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, ClassVar, Literal, Self

from pydantic import model_validator

from recipes.artifact_kinds import OutputKind
from recipes.data.text import Source
from recipes.errors import FieldFinding, Finding, at
from recipes.fields import added_meaning, meaning, placement, refuse
from recipes.models.base import TextFamily
from recipes.models.type_table import Capability
from recipes.problem_codes import Code
from recipes.smoke_sizes import ROWS
from recipes.stages.algorithms import TextAlgorithm
from recipes.stages.answers import (
    Cadence,
    Counts,
    Forward,
    Held,
    Input,
    Pass,
    Progress,
    SharedTokens,
    SourceUse,
    Template,
    needs_decoder,
    template_field,
)
from recipes.stages.base import StageBase, TextStage
from recipes.stages.batch import Batch
from recipes.stages.environments import TERM, AnyEnvironment, Environment
from recipes.stages.lora import Lora
from recipes.stages.rewards.outside import ModelTerm
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
from recipes.stages.rollout import Rollout, Sampling
from recipes.stages.sharding import Shard
from recipes.stages.updates import Updates


class RlStage(StageBase):
    """A stage that learns from what its own model makes, iteration by iteration."""

    if TYPE_CHECKING:
        algorithm: Updates

    def steps(self, rows: int | None = None) -> int:
        return self.algorithm.planned_steps

    @property
    def nominal_length(self) -> int:
        """What Dr. GRPO divides a sample's actions by instead of their number."""
        return 1

    def cadence(self) -> Cadence:
        settings = self.algorithm
        return Cadence(
            save_every=settings.save_every * settings.steps_per_iteration,
            evaluate_every=settings.planned_steps + 1,
            max_skipped_steps=settings.max_skipped_steps,
        )


class RlText(RlStage, TextStage):
    """Reinforcement learning of a language model against a reward."""

    shown: ClassVar[tuple[str, ...]] = ("score", "kl")
    curves: ClassVar[tuple[str, ...]] = (
        "loss",
        "score_mean",
        "kl",
        "entropy",
        "length_mean",
        "eos_rate",
        "policy_loss",
        "value_loss",
        "distinct_2",
    )
    kind: Literal["rl"] = meaning(description="Reinforcement learning from a reward.")
    actor: str = meaning(description="The model to start from; also the reference.")
    rewards: dict[TermName, RewardTerm] = meaning(
        min_length=1,
        max_length=64,
        description="What a response is rewarded for: terms by name, whose weighted sum is its score.",
    )
    probe: Literal["refuse", "warn", "off"] = placement(
        "refuse",
        description="What happens before the first iteration where the reward scores random tokens as high as the "
        "prompts' true answers: the stage is refused, or continues with a warning; off: nothing is asked.",
    )
    lora: Lora | None = meaning(
        None, description="Adapters for what learns on one frozen backbone; null trains full copies."
    )
    merge: bool = meaning(True, description="With lora: also commit the merged actor.")
    prompts: Source = meaning(description="Rows with `prompt` (or `messages`).")
    template: Template | None = template_field("prompts")
    text: Source | None = meaning(
        None,
        description="Text whose language-model loss is mixed into the updates with algorithm.text_coef; null for none.",
    )
    environment: Environment | None = added_meaning(
        None,
        description="What answers the policy's turns, so that a response is a conversation: a tool, or one of yours; "
        "null: a response is one turn.",
    )
    rollout: Rollout = meaning(default_factory=Rollout, description="How experience is drawn.")
    algorithm: TextAlgorithm = meaning(description="How the policy learns, and the settings of that.")
    shard: Shard = meaning(default_factory=Shard, description="Engine, ZeRO stage, precision.")

    @model_validator(mode="after")
    def _text_has_weight(self) -> "RlText":
        if (self.text is None) != (self.algorithm.text_coef == 0):
            found = "text without algorithm.text_coef" if self.text is not None else "algorithm.text_coef without text"
            refuse(Code.UNMET_REQUIREMENT, f"text and an algorithm.text_coef above 0 go together; found {found}")
        return self

    def inputs(self) -> list[Input]:
        return [Input("actor", self.actor, ("model",)), *reward_inputs(self.rewards)]

    def outputs(self) -> dict[str, OutputKind]:
        whole = "model" if self.algorithm.value_model is None else "actor"
        critic: dict[str, OutputKind] = {} if self.algorithm.value_model is None else {"critic": "critic"}
        if self.lora is None:
            return {whole: "model", **critic}
        if self.merge:
            return {whole: "model", **critic, "adapter": "adapter"}
        return {"adapter": "adapter", **critic}

    def sources(self) -> list[SourceUse]:
        text = [] if self.text is None else [SourceUse("text", self.text, "text")]
        columns = (*carried_columns(self.rewards), *(() if self.environment is None else self.environment.carried))
        prompts = SourceUse("prompts", self.prompts, "prompts", carried=tuple(dict.fromkeys(columns)))
        return [prompts, *text]

    def text_start(self) -> str:
        return self.actor

    def batch(self) -> Batch:
        rollout = self.rollout
        return Batch(
            "rollout.prompts_per_iteration",
            rollout.prompts_per_iteration,
            samples=rollout.samples_per_prompt,
            mini_batches=self.algorithm.mini_batches,
            text=0 if self.text is None else self.algorithm.text_batch,
            noun="prompts",
        )

    @property
    def nominal_length(self) -> int:
        return self.rollout.max_new_tokens * (1 if self.environment is None else self.environment.turns)

    @property
    def response_tokens(self) -> int:
        """Most tokens after a prompt: the policy's turns and the observations between them."""
        most = self.rollout.max_new_tokens
        return most if self.environment is None else self.environment.longest(most)

    def refuse_model(self, family: TextFamily | None) -> Finding | None:
        return needs_decoder(self.kind, family)

    def needs(self) -> dict[Capability, tuple[str, str]]:
        needed = super().needs() | {"training": ("actor", ""), "generation": ("actor", "")}
        if (capability := self.rollout.engine.needs) is not None:
            needed[capability] = ("rollout.engine", "engine: {name: local}")
        if self.algorithm.value_model is not None:
            needed["critic"] = ("algorithm.critic", "an algorithm without a critic")
        return needed

    def rules(self) -> Iterator[FieldFinding]:
        yield from super().rules()
        yield from self.algorithm.rules()
        yield from reward_rules(self.rewards)
        yield from self.rollout.engine.rules(self.lora)
        critic = self.algorithm.value_model
        if critic is not None and critic.start == "reward" and self.judge is None:
            message = "the reward has no reward model for the critic to start from"
            yield at("algorithm.critic.start", "reward", Code.UNMET_REQUIREMENT, message, "remove the key, or: actor")
        if self.environment is not None:
            if TERM in self.rewards:
                message = "the environment's own rewards have this name"
                yield at(f"rewards.{TERM}", "", Code.CONFLICTING_KEYS, message, "another name")
            if self.judge is not None:
                name, term = self.judge
                message = "a reward model has learnt from single answers, and reads no conversation with an environment"
                advice = "rules, which read the last turn"
                yield at(f"rewards.{name}.model", term.model, Code.NOT_APPLICABLE, message, advice)
        if self.algorithm.compares_responses and (samples := self.rollout.samples_per_prompt) < 2:
            message = "the algorithm compares responses to one prompt; a lone one has nothing to be compared with"
            yield at("rollout.samples_per_prompt", samples, Code.TOO_FEW_SAMPLES, message, "at least 2, for example 8")

    def missing(self) -> Iterator[FieldFinding]:
        if (finding := self.rollout.engine.missing()) is not None:
            yield FieldFinding("rollout.engine", self.rollout.engine.name, finding)

    @property
    def keeps_samples(self) -> bool:
        return self.rollout.keep != "none"

    @property
    def terms(self) -> Mapping[str, Term]:
        return self.rewards

    @property
    def judge(self) -> tuple[str, ModelTerm] | None:
        """The term that is a reward model, by its name; None: the reward has none."""
        return next(iter(model_terms(self.rewards).items()), None)

    @property
    def critic_start(self) -> Literal["actor", "reward"] | None:
        """Which model initialises the critic; None: the algorithm has none."""
        critic = self.algorithm.value_model
        return None if critic is None else critic.start or ("actor" if self.judge is None else "reward")

    def no_checkpointing(self) -> Finding | None:
        if self.lora is None:
            return None
        message = "gradient checkpointing does not work with several adapters on one network"
        return Finding(Code.CONFLICTING_KEYS, message, "set it to false, or drop lora")

    def no_saved_modules(self, key: str) -> Finding | None:
        if key == "modules_to_save":
            return None
        message = "the reference is the policy without its adapter, which has to be one adapter on the modules' outputs"
        return Finding(Code.NOT_APPLICABLE, message, "remove the key")

    def no_quantised_base(self) -> Finding | None:
        message = "to sample, the adapter is added to the policy's weights, which are then whole"
        return Finding(Code.NOT_APPLICABLE, message, "remove the key; an actor that was tuned with it can learn on")

    def shared_tokens(self) -> Iterator[SharedTokens]:
        if self.judge is not None and self.critic_start == "reward":
            name, term = self.judge
            advice = ", or set algorithm.critic.start: actor"
            yield SharedTokens(f"rewards.{name}.model", term.model, "actor", self.actor, advice)

    @property
    def converses_with(self) -> AnyEnvironment | None:
        return self.environment

    @property
    def sampled(self) -> tuple[str, Sampling]:
        return "rollout", self.rollout

    def progress(self, start_family: TextFamily | None = None) -> Progress:
        responses = self.rollout.prompts_per_iteration * self.rollout.samples_per_prompt
        return Progress("iteration", "responses", self.algorithm.steps_per_iteration, responses)

    def shrunk(self, *, is_built_here: bool) -> Self:
        return self.changed(
            prompts=self.prompts.limited(ROWS),
            text=None if self.text is None else self.text.limited(ROWS),
            environment=None if self.environment is None else self.environment.changed(turns=2),
            rollout=self.rollout.shrunk(),
            algorithm=self.algorithm.shrunk(),
            probe="off" if self.probe == "off" else "warn",  # models that have learnt nothing judge nothing
        )

    def fp32_reason(self) -> str:
        return "in bf16 a policy was measured to gain less by PPO"

    def text_length(self, use: SourceUse) -> int:
        return self.rollout.max_prompt_tokens if use.field_path == "prompts" else self.algorithm.text_length

    def held(self, counts: Counts) -> Held:
        other = num_judges(self.rewards) * counts.full
        keeps_best, has_critic = self.algorithm.kl_limit is not None, self.algorithm.value_model is not None
        critic = counts.valued if has_critic else 0
        if self.lora is None:
            trained = counts.full + critic
            judge = 0 if self.judge is None else counts.scored
            return Held(trained, counts.full + judge + other, trained, keeps_best)
        trainable = counts.adapter + (counts.adapter - counts.saved + counts.width + 1 if has_critic else 0)
        stored = trainable + critic + (counts.full if self.merge else 0)
        judge = 0 if self.judge is None else counts.adapter + counts.width
        # The reference shares no network with a policy whose modules learn whole.
        frozen = counts.frozen + counts.full if self.lora.modules_to_save else counts.full
        return Held(trainable, frozen + judge + other, stored, keeps_best)

    def sampler_bytes(self, parameters: int) -> int:
        return self.rollout.engine.memory_bytes(parameters * self.shard.value_bytes)

    def forward(self) -> Forward:
        length = self.rollout.max_prompt_tokens + self.response_tokens
        copies = 1 if self.algorithm.value_model is None else 2
        return Forward(length, copies=copies, logits="all", has_cache=True)

    def passes(self, steps: int) -> list[Pass]:
        """Every iteration writes, has all models judge and learns; after the last update there is one more rollout."""
        settings, new = self.algorithm, self.nominal_length
        length, samples = self.forward().length, self.rollout.prompts_per_iteration * self.rollout.samples_per_prompt
        rollouts = steps / settings.steps_per_iteration + 1
        critics = 0 if settings.value_model is None else 1
        found = [
            Pass(samples, length, rollouts, new, writes=new),
            Pass(samples, length, 2 * rollouts, new),  # actor and reference
            Pass(samples, length, (1 + critics) * rollouts),  # reward model and critic
            Pass(samples // settings.mini_batches, length, steps, new, trains=True),
        ]
        if critics:
            found.append(Pass(samples // settings.mini_batches, length, steps, trains=True))
        if self.text is not None:
            found.append(Pass(settings.text_batch, settings.text_length, steps, settings.text_length, trains=True))
        return found
