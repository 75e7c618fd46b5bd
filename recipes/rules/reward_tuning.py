"""Reward-tuned diffusions against what is known of their actor and of the classifier that rewards them."""

from collections.abc import Callable, Iterator, Sequence

from recipes.data.images import ImageSource
from recipes.errors import Problem
from recipes.loaded_recipe import LoadedRecipe
from recipes.models.images.ddpm import Ddpm
from recipes.rules.chain import image_builder, image_stage_of, stage_of
from recipes.stages.ddpo import ActorFacts, ClassReward
from recipes.stages.rl_images import RlImages

ClassesOf = Callable[[ImageSource], Sequence[str]]
"""Tells classes that a source's images have, all of them or some; none: none are known."""


def known_classes(source: ImageSource) -> Sequence[str]:
    """The classes that every installation has."""
    return source.known_classes or ()


def check_reward_tuning(loaded: LoadedRecipe, classes_of: ClassesOf = known_classes) -> Iterator[Problem]:
    """What the stage's own rules find where the recipe builds its actor; `classes_of` is asked of captions' images."""
    stages = loaded.recipe.stages
    for name, stage in stages.items():
        if not isinstance(stage, RlImages):
            continue
        source = image_stage_of(stage, stages)
        if source is None or not isinstance(source.architecture, Ddpm):
            continue
        classes = source.data.known_classes if source.architecture.class_conditional else None
        actor = ActorFacts(source.architecture, source.text_encoder is not None, classes or ())
        yield from loaded.problems(name, stage.actor_rules(actor))
        judge = stage_of(stage.reward.classifier, stages) if isinstance(stage.reward, ClassReward) else None
        built = image_builder(judge, stages)
        if built is not None:
            asked = () if stage.prompts is None else classes_of(stage.prompts)
            yield from loaded.problems(name, stage.judge_rules(built.data.known_classes or (), asked))
