"""What a reward-tuned diffusion asks of the model that it starts from."""

from collections.abc import Iterator

from recipes.chain import diffusion_of
from recipes.ddpo import ClassReward
from recipes.errors import Problem
from recipes.image_models import Ddpm
from recipes.loaded import LoadedRecipe
from recipes.stages import PpoImages


def check_reward_tuning(loaded: LoadedRecipe, place: str, stage: PpoImages) -> Iterator[Problem]:
    """Steps, guidance and classes that the actor cannot be asked for; groups too small for a deviation."""
    rollout = stage.rollout
    if len(set(rollout.classes)) < len(rollout.classes):
        yield loaded.problem(f"{place}.rollout.classes", rollout.classes, "a class stands more than once")
    source = diffusion_of(stage.actor, loaded.recipe.stages)
    actor = source.architecture if source is not None else None
    if source is None or not isinstance(actor, Ddpm):
        return
    if source.text_encoder is not None:
        message = "the actor draws from captions; reward tuning asks for classes, or for nothing"
        yield loaded.problem(f"{place}.actor", stage.actor, message, "an actor without text_encoder")
        return
    if rollout.steps is not None and rollout.steps > actor.timesteps:
        message = f"the actor's noising process has {actor.timesteps} steps"
        yield loaded.problem(f"{place}.rollout.steps", rollout.steps, message, f"at most {actor.timesteps}")
    if rollout.steps is None and actor.sampling_steps < 2:
        message = "the last denoising step is no action; the actor's sampling_steps is 1, so that nothing can be learnt"
        yield loaded.problem(f"{place}.rollout.steps", None, message, "give at least 2")
    if rollout.guidance not in (None, 1) and not actor.is_guidable:
        message = "the actor was never trained without its label, so that it cannot be guided"
        yield loaded.problem(f"{place}.rollout.guidance", rollout.guidance, message, "remove the key")
    if not actor.class_conditional:
        if rollout.classes:
            message = "the actor is not class-conditional: no class can be asked for"
            yield loaded.problem(f"{place}.rollout.classes", rollout.classes, message, "remove the key")
        if isinstance(stage.reward, ClassReward) and stage.reward.label is None:
            message = "the actor is not class-conditional: say which class is rewarded"
            yield loaded.problem(f"{place}.reward.label", None, message, "for example label: 7")
    pictures, classes = rollout.pictures_per_iteration, len(rollout.classes)
    if stage.ppo.normalise == "classes" and pictures < 2 * classes:
        message = f"an iteration draws {pictures} pictures of {classes} classes: too few of each for a deviation"
        yield loaded.problem(
            f"{place}.rollout.pictures_per_iteration", pictures, message, f"at least {2 * classes}, or normalise: all"
        )
