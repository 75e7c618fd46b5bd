"""Reinforcement learning: of what a language model answers, and of what a diffusion model draws."""

from typing import ClassVar, Literal, Self

from pydantic import model_validator

from recipes.artifact_kinds import OutputKind
from recipes.data.images import ImageSource
from recipes.data.text import Source
from recipes.fields import added_meaning, meaning, refuse
from recipes.problem_codes import Code
from recipes.smoke_sizes import ROWS
from recipes.stages.base import (
    Batch,
    Counts,
    Forward,
    Held,
    ImageStage,
    Input,
    Progress,
    SourceUse,
    Template,
    TextStage,
    template_field,
)
from recipes.stages.ddpo import ClassReward, Ddpo, PictureReward, PictureRollout
from recipes.stages.lora import Lora
from recipes.stages.ppo import Ppo, Rollout
from recipes.stages.sharding import Shard


class PpoStage(TextStage):
    """Proximal policy optimisation of a model against a reward model."""

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
    kind: Literal["ppo"] = meaning(description="Reinforcement learning from a reward model.")
    actor: str = meaning(description="The model to start from; also the reference.")
    reward: str = meaning(description="The reward model.")
    critic: Literal["actor", "reward"] = meaning("reward", description="Whose weights the critic starts from.")
    lora: Lora | None = meaning(
        None, description="Adapters for actor and critic on one frozen backbone; None trains full copies."
    )
    merge: bool = meaning(True, description="With lora: also commit the merged actor.")
    prompts: Source = meaning(description="Rows with `prompt` (or `messages`).")
    template: Template | None = template_field("prompts")
    text: Source | None = meaning(
        None, description="Text whose language-model loss is mixed into the updates with ppo.text_coef; None for none."
    )
    rollout: Rollout = meaning(default_factory=Rollout, description="How experience is drawn.")
    ppo: Ppo = meaning(description="The algorithm's settings.")
    shard: Shard = meaning(default_factory=Shard, description="Engine, ZeRO stage, precision.")

    @model_validator(mode="after")
    def _text_has_weight(self) -> "PpoStage":
        if (self.text is None) != (self.ppo.text_coef == 0):
            found = "text without ppo.text_coef" if self.text is not None else "ppo.text_coef without text"
            refuse(Code.UNMET_REQUIREMENT, f"text and a ppo.text_coef above 0 go together; found {found}")
        return self

    def inputs(self) -> list[Input]:
        return [Input("actor", self.actor, ("model",)), Input("reward", self.reward, ("reward_model",))]

    def outputs(self) -> dict[str, OutputKind]:
        if self.lora is None:
            return {"actor": "model", "critic": "critic"}
        if self.merge:
            return {"actor": "model", "critic": "critic", "adapter": "adapter"}
        return {"adapter": "adapter", "critic": "critic"}

    def sources(self) -> list[SourceUse]:
        text = [] if self.text is None else [SourceUse("text", self.text, "text")]
        return [SourceUse("prompts", self.prompts, "prompts"), *text]

    def text_start(self) -> str:
        return self.actor

    def steps(self, rows: int | None = None) -> int:
        return self.ppo.planned_steps

    def batch(self) -> Batch:
        rollout = self.rollout
        return Batch(
            "rollout.prompts_per_iteration",
            rollout.prompts_per_iteration,
            samples=rollout.samples_per_prompt,
            mini_batches=self.ppo.mini_batches,
            text=0 if self.text is None else self.ppo.text_batch,
        )

    def progress(self, start_family: str | None = None) -> Progress:
        responses = self.rollout.prompts_per_iteration * self.rollout.samples_per_prompt
        return Progress("iteration", "responses", self.ppo.steps_per_iteration, responses)

    def shrunk(self, *, is_built_here: bool) -> Self:
        return self.changed(
            prompts=self.prompts.limited(ROWS),
            text=None if self.text is None else self.text.limited(ROWS),
            rollout=self.rollout.shrunk(),
            ppo=self.ppo.shrunk(),
        )

    def fp32_reason(self) -> str:
        return "in bf16 a policy was measured to gain less by PPO"

    def text_length(self, use: SourceUse) -> int:
        return self.rollout.max_prompt_tokens if use.field_path == "prompts" else self.ppo.text_length

    def held(self, counts: Counts) -> Held:
        keeps_best = self.ppo.kl_limit is not None
        if self.lora is None:
            trained = counts.full + counts.valued
            return Held(trained, counts.full + counts.scored, trained, keeps_best)
        trainable = 2 * counts.adapter + counts.width + 1
        stored = trainable + counts.valued + (counts.full if self.merge else 0)
        return Held(trainable, counts.full + counts.adapter + counts.width, stored, keeps_best)

    def forward(self) -> Forward:
        length = self.rollout.max_prompt_tokens + self.rollout.max_new_tokens
        return Forward(length, copies=2, logits="all", has_cache=True)


class PpoImages(ImageStage):
    """Reward-tuned diffusion: proximal policy optimisation of what a model draws, step by step, against a reward."""

    shown: ClassVar[tuple[str, ...]] = ("score", "kl")
    curves: ClassVar[tuple[str, ...]] = ("loss", "score_mean", "kl", "policy_loss")
    kind: Literal["ppo"] = meaning(description="Reinforcement learning from a reward of pictures.")
    actor: str = meaning(description="The diffusion model to start from; also the reference.")
    reward: PictureReward = meaning(description="What a picture is rewarded for.")
    lora: Lora | None = added_meaning(
        None, description="Train adapters on the network's attention; None trains every parameter."
    )
    prompts: ImageSource | None = added_meaning(
        None,
        description="Of an actor that draws from captions: pictures whose captions are drawn from, by the seed; their "
        "labels are the classes that a reward asks for.",
    )
    rollout: PictureRollout = meaning(default_factory=PictureRollout, description="How experience is drawn.")
    ppo: Ddpo = meaning(description="The algorithm's settings.")
    shard: Shard = meaning(default_factory=Shard, description="Engine, ZeRO stage, precision.")

    def inputs(self) -> list[Input]:
        inputs = [Input("actor", self.actor, ("ddpm",))]
        if isinstance(self.reward, ClassReward):
            inputs.append(Input("reward.classifier", self.reward.classifier, ("classifier",)))
        return inputs

    def outputs(self) -> dict[str, OutputKind]:
        return {"model": "ddpm"} if self.lora is None else {"model": "ddpm", "adapter": "adapter"}

    def sources(self) -> list[SourceUse]:
        return [] if self.prompts is None else [SourceUse("prompts", self.prompts, "images")]

    def image_start(self) -> str:
        return self.actor

    def steps(self, rows: int | None = None) -> int:
        return self.ppo.planned_steps

    def batch(self) -> Batch:
        images = self.rollout.pictures_per_iteration
        return Batch("rollout.pictures_per_iteration", images, mini_batches=self.ppo.mini_batches)

    def progress(self, start_family: str | None = None) -> Progress:
        images = self.rollout.pictures_per_iteration
        return Progress("iteration", "pictures", self.ppo.steps_per_iteration, images)

    def shrunk(self, *, is_built_here: bool) -> Self:
        return self.changed(
            prompts=None if self.prompts is None else self.prompts.limited(ROWS),
            rollout=self.rollout.shrunk(),
            ppo=self.ppo.shrunk(),
        )
