"""What a reward-tuned diffusion asks of the model that it starts from."""

from collections.abc import Iterator

from recipes.chain import diffusion_of
from recipes.ddpo import ClassReward
from recipes.errors import Problem
from recipes.image_data import known_classes
from recipes.image_models import Ddpm
from recipes.loaded import LoadedRecipe
from recipes.locate import nearest
from recipes.references import StageRef, parse_reference
from recipes.stages import PpoImages, PretrainImages


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
    known = known_classes(source.data) if actor.class_conditional else []
    for index, asked in enumerate(rollout.classes if known else []):
        if known and asked not in known:
            yield _unknown_class(loaded, f"{place}.rollout.classes.{index}", asked, known)
    judge = _classifier(loaded, stage)
    judged = None if judge is None else known_classes(judge.data)
    if isinstance(stage.reward, ClassReward) and judged and stage.reward.label not in (None, *judged):
        yield _unknown_class(loaded, f"{place}.reward.label", stage.reward.label or "", judged)
    pictures, classes = rollout.pictures_per_iteration, len(rollout.classes)
    if stage.ppo.normalise == "classes" and pictures < 2 * classes:
        message = f"an iteration draws {pictures} pictures of {classes} classes: too few of each for a deviation"
        yield loaded.problem(
            f"{place}.rollout.pictures_per_iteration", pictures, message, f"at least {2 * classes}, or normalise: all"
        )
    if stage.ppo.normalise == "classes" and not classes and known and pictures <= len(known):
        message = f"an iteration draws none of the {len(known)} classes twice, so that no reward is above another"
        advice = f"at least {2 * len(known)}, rollout.classes, or normalise: all"
        yield loaded.problem(f"{place}.rollout.pictures_per_iteration", pictures, message, advice)


def _unknown_class(loaded: LoadedRecipe, place: str, name: str, known: list[str]) -> Problem:
    guess = nearest(name, known)
    return loaded.problem(
        place, name, "no such class", f"did you mean {guess}?" if guess else "one of " + ", ".join(known)
    )


def _classifier(loaded: LoadedRecipe, stage: PpoImages) -> PretrainImages | None:
    """The stage that makes the classifier of the reward; None: none of the recipe's."""
    if not isinstance(stage.reward, ClassReward):
        return None
    try:
        reference = parse_reference(stage.reward.classifier)
    except ValueError:
        return None
    found = loaded.recipe.stages.get(reference.stage) if isinstance(reference, StageRef) else None
    return found if isinstance(found, PretrainImages) else None
