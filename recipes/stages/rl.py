"""Reinforcement learning: of what a language model answers, and of what a diffusion model draws."""

from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, ClassVar, Literal, Self

from pydantic import model_validator

from recipes.artifact_kinds import OutputKind
from recipes.data.images import ImageSource
from recipes.data.text import Source
from recipes.errors import FieldFinding, Finding, at
from recipes.fields import added_meaning, meaning, placement, refuse
from recipes.models.base import TextFamily
from recipes.models.images.architecture import CLASSIFYING_KINDS
from recipes.models.images.base import ImageModel
from recipes.models.images.ddpm import Ddpm
from recipes.models.type_table import Capability
from recipes.problem_codes import Code
from recipes.smoke_sizes import ROWS
from recipes.stages.algorithms import ImageAlgorithm, TextAlgorithm
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
from recipes.stages.base import ImageStage, StageBase, TextStage
from recipes.stages.batch import Batch
from recipes.stages.ddpo import ActorFacts, ClassReward, ImageReward, ImageRollout, unknown_class
from recipes.stages.environments import TERM, AnyEnvironment, Environment
from recipes.stages.lora import Lora
from recipes.stages.rewards.outside import ModelTerm
from recipes.stages.rewards.term import Term
from recipes.stages.rewards.union import (
    RewardTerm,
    TermName,
    carried_columns,
    model_terms,
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

    def no_saved_modules(self) -> Finding | None:
        message = "the reference is the policy without its adapter, and has every other module in common with it"
        return Finding(Code.NOT_APPLICABLE, message, "remove the key")

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
        keeps_best, has_critic = self.algorithm.kl_limit is not None, self.algorithm.value_model is not None
        critic = counts.valued if has_critic else 0
        if self.lora is None:
            trained = counts.full + critic
            judge = 0 if self.judge is None else counts.scored
            return Held(trained, counts.full + judge, trained, keeps_best)
        trainable = counts.adapter + (counts.adapter + counts.width + 1 if has_critic else 0)
        stored = trainable + critic + (counts.full if self.merge else 0)
        judge = 0 if self.judge is None else counts.adapter + counts.width
        return Held(trainable, counts.full + judge, stored, keeps_best)

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


class RlImages(RlStage, ImageStage):
    """Reinforcement learning of a diffusion model: what it draws, step by step, against a reward."""

    shown: ClassVar[tuple[str, ...]] = ("score", "kl")
    curves: ClassVar[tuple[str, ...]] = ("loss", "score_mean", "kl", "policy_loss")
    kind: Literal["rl"] = meaning(description="Reinforcement learning from a reward of images.")
    actor: str = meaning(description="The diffusion model to start from; also the reference.")
    reward: ImageReward = meaning(description="What an image is rewarded for.")
    lora: Lora | None = added_meaning(
        None, description="Train adapters on the network's attention; null trains every parameter."
    )
    prompts: ImageSource | None = added_meaning(
        None,
        description="Of an actor that draws from captions: images whose captions are drawn from, by the seed; their "
        "labels are the classes that a reward asks for.",
    )
    rollout: ImageRollout = meaning(default_factory=ImageRollout, description="How experience is drawn.")
    algorithm: ImageAlgorithm = meaning(description="How the policy learns, and the settings of that.")
    shard: Shard = meaning(default_factory=Shard, description="Engine, ZeRO stage, precision.")

    def inputs(self) -> list[Input]:
        inputs = [Input("actor", self.actor, (Ddpm.kind(),))]
        if isinstance(self.reward, ClassReward):
            inputs.append(Input("reward.classifier", self.reward.classifier, CLASSIFYING_KINDS))
        return inputs

    def outputs(self) -> dict[str, OutputKind]:
        model: dict[str, OutputKind] = {"model": Ddpm.kind()}
        return model if self.lora is None else {**model, "adapter": "adapter"}

    def sources(self) -> list[SourceUse]:
        return [] if self.prompts is None else [SourceUse("prompts", self.prompts, "images")]

    def image_start(self) -> str:
        return self.actor

    def batch(self) -> Batch:
        images = self.rollout.images_per_iteration
        return Batch("rollout.images_per_iteration", images, mini_batches=self.algorithm.mini_batches, noun="images")

    def held(self, counts: Counts) -> Held:
        """With adapters the network without them is the start; else the start is kept as a whole."""
        keeps_best = self.algorithm.kl_limit is not None
        trained = counts.full if self.lora is None else counts.adapter
        stored = counts.fixed + counts.full + (0 if self.lora is None else counts.adapter)
        return Held(trained, counts.full + counts.fixed, stored, keeps_best)

    def filled_in(self, start: ImageModel, *, is_captioned: bool) -> Self:
        """With the denoising steps and the guidance of its actor."""
        assert isinstance(start, Ddpm)
        guidance = start.guidance if self.rollout.guidance is None else self.rollout.guidance
        is_guidable = start.class_conditional or is_captioned
        steps = self.rollout.steps or start.sampling_steps
        return self.changed(rollout=self.rollout.changed(steps=steps, guidance=guidance if is_guidable else 1.0))

    @property
    def _learnt_steps(self) -> int:
        """Passes of an image through the network when it is learnt from: all denoising steps but the last."""
        denoising = self.rollout.steps
        assert denoising is not None, "the actor's steps are filled in first"
        return (denoising - 1) * (1 if self.rollout.guidance in (None, 1) else 2)

    def forward(self) -> Forward:
        """An iteration's images wait at every step, of all workers and of their own part."""
        waiting = 2 * self.rollout.images_per_iteration * ((self.rollout.steps or 0) + 1)
        return Forward(1, copies=self._learnt_steps, logits="none", waiting=waiting)

    def passes(self, steps: int) -> list[Pass]:
        """Every iteration draws step by step, asks the start, and learns from all steps but the last."""
        settings, images, denoising = self.algorithm, self.rollout.images_per_iteration, self.rollout.steps
        assert denoising is not None, "the actor's steps are filled in first"
        asked = self._learnt_steps * images
        images *= 1 if self.rollout.guidance in (None, 1) else 2
        rollouts = steps / settings.steps_per_iteration + 1
        return [
            Pass(images, times=rollouts, writes=denoising),
            Pass(asked, times=rollouts),
            Pass(asked // settings.mini_batches, times=steps, trains=True),
        ]

    def rules(self) -> Iterator[FieldFinding]:
        yield from super().rules()
        yield from self.algorithm.rules()
        if len(set(self.rollout.classes)) < len(self.rollout.classes):
            yield at("rollout.classes", self.rollout.classes, Code.DUPLICATE_ITEM, "class listed more than once")

    def image_reference(self) -> tuple[str, ImageSource | str]:
        return "the actor", self.actor

    def actor_rules(self, actor: ActorFacts) -> Iterator[FieldFinding]:
        """Steps, guidance, classes and captions that the actor cannot be asked for; too few samples to normalise."""
        rollout, settings = self.rollout, actor.settings
        yield from self._caption_rules(actor) if actor.is_captioned else self._class_rules(actor)
        if rollout.steps is not None and rollout.steps > settings.timesteps:
            message = f"the actor's noising process has {settings.timesteps} steps"
            yield at("rollout.steps", rollout.steps, Code.TOO_MANY_STEPS, message, f"at most {settings.timesteps}")
        if rollout.steps is None and settings.sampling_steps < 2:
            message = (
                "the last denoising step is not an action; the actor's sampling_steps (1) leave none to learn from"
            )
            yield at("rollout.steps", None, Code.TOO_FEW_STEPS, message, "give at least 2")
        if rollout.guidance not in (None, 1) and not actor.is_guidable:
            message = "classifier-free guidance needs label_dropout > 0 in pretraining"
            yield at("rollout.guidance", rollout.guidance, Code.UNMET_REQUIREMENT, message, "remove the key")
        if rollout.classes and not settings.class_conditional:
            what = "generates from captions" if actor.is_captioned else "is not class-conditional"
            message = f"the actor {what}: classes cannot be requested"
            yield at("rollout.classes", rollout.classes, Code.NOT_APPLICABLE, message, "remove the key")

    def _class_rules(self, actor: ActorFacts) -> Iterator[FieldFinding]:
        rollout, is_conditional = self.rollout, actor.settings.class_conditional
        images, asked = rollout.images_per_iteration, rollout.classes
        for key, found, is_default in (
            ("prompts", "", self.prompts is None),
            ("rollout.samples_per_prompt", rollout.samples_per_prompt, rollout.samples_per_prompt == 1),
        ):
            if not is_default:
                yield at(key, found, Code.NOT_APPLICABLE, "the actor does not read captions", "remove the key")
        if isinstance(self.reward, ClassReward) and self.reward.label is None and not is_conditional:
            message = "the actor is not class-conditional: name the rewarded class"
            yield at("reward.label", None, Code.MISSING_KEY, message, "for example label: 7")
        for index, name in enumerate(asked if is_conditional and actor.classes else []):
            if (finding := unknown_class(name, actor.classes)) is not None:
                yield FieldFinding(f"rollout.classes.{index}", name, finding)
        if self.algorithm.normalise != "classes":
            return
        if images < 2 * len(asked):
            message = f"{images} images of {len(asked)} classes an iteration: too few of each for a standard deviation"
            advice = f"at least {2 * len(asked)}, or normalise: all"
            yield at("rollout.images_per_iteration", images, Code.TOO_FEW_SAMPLES, message, advice)
        elif is_conditional and not asked and images <= len(actor.classes):
            known = len(actor.classes)
            message = f"each of the {known} classes is sampled once at most, so rewards cannot be normalised per class"
            advice = f"at least {2 * known}, rollout.classes, or normalise: all"
            yield at("rollout.images_per_iteration", images, Code.TOO_FEW_SAMPLES, message, advice)

    def _caption_rules(self, actor: ActorFacts) -> Iterator[FieldFinding]:
        samples = self.rollout.samples_per_prompt
        if self.prompts is None:
            message = "the actor reads captions: name the images that have them"
            yield at("prompts", "", Code.MISSING_KEY, message, "the images that it was trained on, or others")
            return
        if self.algorithm.normalise == "classes" and samples < 2:
            message, advice = "one image per caption has zero standard deviation", "at least 2, or normalise: all"
            yield at("rollout.samples_per_prompt", samples, Code.TOO_FEW_SAMPLES, message, advice)
        missing = self.prompts.label_key
        if missing is not None:
            yield from self.label_rules(has_labels=False, key=missing)

    def label_rules(self, *, has_labels: bool, key: str = "") -> Iterator[FieldFinding]:
        """Images of captions without the labels that the reward needs; `key` would give them."""
        if isinstance(self.reward, ClassReward) and self.reward.label is None and not has_labels:
            message = "these images have no labels, and the reward needs the class of a caption's image"
            advice = f"set {key}, or reward.label" if key else "set reward.label"
            yield at(f"prompts.{key}" if key else "prompts", "", Code.MISSING_LABELS, message, advice)

    def judge_rules(self, known: Sequence[str], asked: Sequence[str] = ()) -> Iterator[FieldFinding]:
        """Classes that the reward's classifier does not know: the one that is rewarded, or those that are asked for."""
        if isinstance(self.reward, ClassReward):
            wanted = asked if self.reward.label is None else (self.reward.label,)
            for name in wanted:
                if (finding := unknown_class(name, known)) is not None:
                    yield FieldFinding("reward.label", name, finding)

    def progress(self, start_family: TextFamily | None = None) -> Progress:
        images = self.rollout.images_per_iteration
        return Progress("iteration", "images", self.algorithm.steps_per_iteration, images)

    def shrunk(self, *, is_built_here: bool) -> Self:
        return self.changed(
            prompts=None if self.prompts is None else self.prompts.limited(ROWS),
            rollout=self.rollout.shrunk(),
            algorithm=self.algorithm.shrunk(),
        )
