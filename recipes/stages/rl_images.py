"""Reinforcement learning of diffusion models."""

from collections.abc import Iterator, Sequence
from typing import ClassVar, Literal, Self

from recipes.artifact_kinds import OutputKind
from recipes.data.images import ImageSource
from recipes.errors import FieldFinding, at
from recipes.fields import added_meaning, meaning
from recipes.models.base import TextFamily
from recipes.models.images.architecture import CLASSIFYING_KINDS
from recipes.models.images.base import ImageModel
from recipes.models.images.ddpm import Ddpm
from recipes.problem_codes import Code
from recipes.smoke_sizes import ROWS
from recipes.stages.algorithms import ImageAlgorithm
from recipes.stages.answers import (
    Counts,
    Forward,
    Held,
    Input,
    Pass,
    Progress,
    SourceUse,
)
from recipes.stages.base import ImageStage
from recipes.stages.batch import Batch
from recipes.stages.ddpo import ActorFacts, ClassReward, ImageReward, ImageRollout, unknown_class
from recipes.stages.lora import Lora
from recipes.stages.rl import RlStage
from recipes.stages.sharding import Shard


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
