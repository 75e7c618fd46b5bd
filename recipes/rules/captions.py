"""Text to image: who reads captions, whether the pictures have them, and adapters on a diffusion's attention."""

from collections.abc import Iterator

from recipes.data.images import ImageSource
from recipes.errors import Problem
from recipes.loading.document import LoadedRecipe
from recipes.loading.schema_paths import nearest
from recipes.models.image_models import Ddpm
from recipes.models.tally import PROJECTIONS
from recipes.problem_codes import Code
from recipes.references import StageRef, parse_reference
from recipes.rules.chain import picture_stage_of
from recipes.rules.models import NOUN_OF, reference_facts
from recipes.stages.evaluate import Evaluate
from recipes.stages.finetune import FinetuneImages
from recipes.stages.kinds import Stage
from recipes.stages.pretrain import PretrainImages
from recipes.stages.rl import PpoImages

READERS = ("encoder", "decoder")
"""Families of language models that read captions."""


def check_captions(loaded: LoadedRecipe) -> Iterator[Problem]:
    """Text encoders of another family, sources without captions, adapters on modules that there are not."""
    for name, stage in loaded.recipe.stages.items():
        place = f"stages.{name}"
        if isinstance(stage, PretrainImages) and stage.text_encoder is not None:
            family = reference_facts(loaded, stage.text_encoder).family
            if family not in (None, *READERS):
                message = f"{NOUN_OF[family]} cannot be a text_encoder"
                yield loaded.problem(
                    Code.UNSUPPORTED_FAMILY,
                    f"{place}.text_encoder",
                    stage.text_encoder,
                    message,
                    "an encoder or a decoder",
                )
        lora = stage.lora if isinstance(stage, FinetuneImages | PpoImages) else None
        if lora is not None and lora.target_modules != "all-linear":
            for index, target in enumerate(lora.target_modules):
                if target not in PROJECTIONS:
                    guess = nearest(target, list(PROJECTIONS))
                    advice = f"did you mean {guess}?" if guess else "there are: " + ", ".join(PROJECTIONS)
                    message = "adapters are for the linear modules of the network's attention"
                    yield loaded.problem(
                        Code.UNKNOWN_MODULE, f"{place}.lora.target_modules.{index}", target, message, advice
                    )
        reader = _reader(loaded, stage)
        if reader is not None:
            for use in stage.sources():
                yield from _check_source(loaded, f"{place}.{use.field_path}", use.pictures, reader, use.held_out)


def _reader(loaded: LoadedRecipe, stage: Stage) -> str | None:
    """What of a stage reads captions, as a message names it; None: nothing does, or it is not known here."""
    stages = loaded.recipe.stages
    match stage:
        case PretrainImages() if stage.text_encoder is not None:
            return "text_encoder"
        case FinetuneImages() | PpoImages():
            start = picture_stage_of(stage, stages)
            name = stage.actor if isinstance(stage, PpoImages) else stage.init_from
            return name if start is not None and start.text_encoder is not None else None
        case Evaluate() if stage.images is not None:
            for text in stage.of:
                try:
                    reference = parse_reference(text)
                except ValueError:
                    continue
                found = stages.get(reference.stage) if isinstance(reference, StageRef) else None
                start = None if found is None else picture_stage_of(found, stages)
                if start is not None and isinstance(start.architecture, Ddpm) and start.text_encoder is not None:
                    return text
    return None


def _check_source(
    loaded: LoadedRecipe, place: str, source: ImageSource, reader: str, is_held_out: bool
) -> Iterator[Problem]:
    key = source.caption_key
    if key is None or is_held_out:
        return
    message = f"these images have no captions, which {reader} reads"
    advice = f"set {key}" if key else "a source of another kind holds captions: image-folder, arrays, jsonl, parquet"
    yield loaded.problem(
        Code.MISSING_CAPTIONS,
        f"{place}.{key}" if key else f"{place}.source",
        "" if key else source.source,
        message,
        advice,
    )
