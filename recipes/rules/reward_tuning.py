"""What a reward-tuned diffusion asks of the model that it starts from."""

from collections.abc import Iterator

from recipes.errors import Problem
from recipes.loading.document import LoadedRecipe
from recipes.loading.schema_paths import nearest
from recipes.models.image_models import Ddpm
from recipes.problem_codes import Code
from recipes.references import StageRef, parse_reference
from recipes.rules.chain import diffusion_of
from recipes.stages.ddpo import ClassReward
from recipes.stages.pretrain import PretrainImages
from recipes.stages.rl import PpoImages


def check_reward_tuning(loaded: LoadedRecipe, place: str, stage: PpoImages) -> Iterator[Problem]:
    """Steps, guidance, classes and captions that the actor cannot be asked for; groups too small for a deviation."""
    rollout = stage.rollout
    if len(set(rollout.classes)) < len(rollout.classes):
        yield loaded.problem(
            Code.DUPLICATE_ITEM, f"{place}.rollout.classes", rollout.classes, "class listed more than once"
        )
    source = diffusion_of(stage.actor, loaded.recipe.stages)
    actor = source.architecture if source is not None else None
    if source is None or not isinstance(actor, Ddpm):
        return
    is_captioned = source.text_encoder is not None
    yield from _check_prompts(loaded, place, stage, is_captioned)
    if rollout.steps is not None and rollout.steps > actor.timesteps:
        message = f"the actor's noising process has {actor.timesteps} steps"
        yield loaded.problem(
            Code.TOO_MANY_STEPS, f"{place}.rollout.steps", rollout.steps, message, f"at most {actor.timesteps}"
        )
    if rollout.steps is None and actor.sampling_steps < 2:
        message = "the last denoising step is not an action; the actor's sampling_steps (1) leave none to learn from"
        yield loaded.problem(Code.TOO_FEW_STEPS, f"{place}.rollout.steps", None, message, "give at least 2")
    if rollout.guidance not in (None, 1) and not (actor.is_guidable or (is_captioned and actor.label_dropout > 0)):
        message = "classifier-free guidance needs label_dropout > 0 in pretraining"
        yield loaded.problem(
            Code.UNMET_REQUIREMENT, f"{place}.rollout.guidance", rollout.guidance, message, "remove the key"
        )
    if not actor.class_conditional:
        if rollout.classes:
            what = "generates from captions" if is_captioned else "is not class-conditional"
            message = f"the actor {what}: classes cannot be requested"
            yield loaded.problem(
                Code.NOT_APPLICABLE, f"{place}.rollout.classes", rollout.classes, message, "remove the key"
            )
        if isinstance(stage.reward, ClassReward) and stage.reward.label is None and not is_captioned:
            message = "the actor is not class-conditional: name the rewarded class"
            yield loaded.problem(Code.MISSING_KEY, f"{place}.reward.label", None, message, "for example label: 7")
    known = source.data.known_classes if actor.class_conditional else []
    for index, asked in enumerate(rollout.classes if known else []):
        if known and asked not in known:
            yield _unknown_class(loaded, f"{place}.rollout.classes.{index}", asked, known)
    judge = _classifier(loaded, stage)
    judged = None if judge is None else judge.data.known_classes
    if isinstance(stage.reward, ClassReward) and judged and stage.reward.label not in (None, *judged):
        yield _unknown_class(loaded, f"{place}.reward.label", stage.reward.label or "", judged)
    pictures, classes = rollout.pictures_per_iteration, len(rollout.classes)
    if stage.ppo.normalise == "classes" and pictures < 2 * classes:
        message = f"{pictures} images of {classes} classes an iteration: too few of each for a standard deviation"
        yield loaded.problem(
            Code.TOO_FEW_SAMPLES,
            f"{place}.rollout.pictures_per_iteration",
            pictures,
            message,
            f"at least {2 * classes}, or normalise: all",
        )
    if stage.ppo.normalise == "classes" and not classes and known and pictures <= len(known):
        message = f"each of the {len(known)} classes is sampled once at most, so rewards cannot be normalised per class"
        advice = f"at least {2 * len(known)}, rollout.classes, or normalise: all"
        yield loaded.problem(Code.TOO_FEW_SAMPLES, f"{place}.rollout.pictures_per_iteration", pictures, message, advice)


def _check_prompts(loaded: LoadedRecipe, place: str, stage: PpoImages, is_captioned: bool) -> Iterator[Problem]:
    """Captions for an actor that reads none, none for one that does, and rewards that they leave open."""
    rollout, prompts = stage.rollout, stage.prompts
    if not is_captioned:
        for key, found, is_idle in (
            ("prompts", "", prompts is None),
            ("rollout.samples_per_prompt", rollout.samples_per_prompt, rollout.samples_per_prompt == 1),
        ):
            if not is_idle:
                message = "the actor does not read captions"
                yield loaded.problem(Code.NOT_APPLICABLE, f"{place}.{key}", found, message, "remove the key")
        return
    if prompts is None:
        message = "the actor reads captions: name the images that have them"
        yield loaded.problem(
            Code.MISSING_KEY, f"{place}.prompts", "", message, "the images that it was trained on, or others"
        )
        return
    if stage.ppo.normalise == "classes" and rollout.samples_per_prompt < 2:
        message = "one image per caption has zero standard deviation"
        advice = "at least 2, or normalise: all"
        yield loaded.problem(
            Code.TOO_FEW_SAMPLES, f"{place}.rollout.samples_per_prompt", rollout.samples_per_prompt, message, advice
        )
    missing = prompts.label_key
    if isinstance(stage.reward, ClassReward) and stage.reward.label is None and missing is not None:
        message = "these images have no labels, and the reward needs the class of a caption's image"
        yield loaded.problem(
            Code.MISSING_LABELS, f"{place}.prompts.{missing}", "", message, f"set {missing}, or reward.label"
        )


def _unknown_class(loaded: LoadedRecipe, place: str, name: str, known: list[str]) -> Problem:
    guess = nearest(name, known)
    return loaded.problem(
        Code.UNKNOWN_CLASS,
        place,
        name,
        "no such class",
        f"did you mean {guess}?" if guess else "one of " + ", ".join(known),
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
