"""The architectures that a recipe can build a language model of, and the families of all that are known."""

from typing import Annotated

from pydantic import Field

from recipes.models.base import ModelType, TextFamily
from recipes.models.decoder import DECODER, AnyDecoder, Gpt2, Llama, Qwen3
from recipes.models.encoder import ENCODER, AnyEncoder, Bert
from recipes.models.encoder_decoder import ENCODER_DECODER, T5, AnyEncoderDecoder, Bart
from recipes.models.rnn import RNN, Rnn
from recipes.models.vision_language import VISION_LANGUAGE

Architecture = Annotated[
    Llama | Qwen3 | Gpt2 | AnyDecoder | Rnn | Bert | AnyEncoder | T5 | Bart | AnyEncoderDecoder,
    Field(discriminator="type"),
]
"""Language models; no two families share the name of a type."""

TEXT_FAMILIES: dict[str, TextFamily] = {
    family.name: family for family in (DECODER, RNN, ENCODER, ENCODER_DECODER, VISION_LANGUAGE)
}
"""Families of language models by name."""

TYPES: dict[str, ModelType] = {name: known for family in TEXT_FAMILIES.values() for name, known in family.types.items()}
"""Types of language models by the `model_type` of a configuration file."""

MODEL_TYPES: dict[str, TextFamily] = {name: family for family in TEXT_FAMILIES.values() for name in family.types}
"""`model_type` of a configuration file -> family."""

LINEAR_MODULES: dict[str, tuple[str, ...]] = {
    name: known.linear_modules for name, known in TYPES.items() if known.linear_modules
}
"""Names of the linear modules of each type that an adapter can be put on; a recurrent model has none."""
