"""Text to image: who reads captions, whether the images have them, and adapters on a diffusion's attention."""

from collections.abc import Iterator

from recipes.data.images import missing_captions
from recipes.errors import Problem
from recipes.loaded_recipe import LoadedRecipe
from recipes.models.images.tally import PROJECTIONS
from recipes.rules.chain import image_builder, image_source
from recipes.rules.models import reference_facts
from recipes.stages.kinds import Stage
from recipes.stages.lora import ModuleNames
from recipes.stages.pretrain import text_encoder_rule

ATTENTION = ModuleNames("the attention of a diffusion", PROJECTIONS)


def check_captions(loaded: LoadedRecipe) -> Iterator[Problem]:
    """Text encoders of another family, sources without captions, adapters on modules that there are not."""
    for name, stage in loaded.recipe.stages.items():
        place = f"stages.{name}"
        for item in stage.inputs():
            if item.field_path == "text_encoder":
                finding = text_encoder_rule(reference_facts(loaded, item.text).family)
                if finding is not None:
                    yield loaded.problem_from(finding, f"{place}.text_encoder", item.text)
        if stage.is_image and stage.adapters is not None:
            yield from loaded.problems(name, stage.adapters.target_rules(ATTENTION))
        reader = _reader(loaded, stage)
        for use in stage.sources() if reader is not None else ():
            key = use.images.caption_key
            if reader is not None and key is not None and not use.held_out:
                field_path = f"{place}.{use.field_path}.{key or 'source'}"
                yield loaded.problem_from(missing_captions(reader, key), field_path, "" if key else use.source.source)


def _reader(loaded: LoadedRecipe, stage: Stage) -> str | None:
    """What of a stage reads captions, as a message names it; None: nothing does, or it is not known here."""
    stages = loaded.recipe.stages
    own = image_builder(stage, stages) if stage.image_start() is None else None
    if own is not None and own.text_encoder is not None:
        return "text_encoder"
    for item in stage.inputs():
        start = image_source(item, stages)
        if start is not None and start.text_encoder is not None:
            return item.text
    return None
