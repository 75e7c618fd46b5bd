"""What pretraining and fine-tuning start from: the family, the tokenizer and the model of a stage."""

from torch import nn

from recipes.data.tokenizers import ExistingTokenizer, TrainTokenizer
from recipes.models.architecture import TEXT_FAMILIES
from recipes.models.base import TextFamily
from recipes.models.model_kinds import MODEL_KINDS
from recipes.stages.finetune import Finetune
from recipes.stages.pretrain import Pretrain
from trainers.data.materialise import build_tokenization
from trainers.data.tokenizer import Tokenization, load_tokenization
from trainers.models.families import build_language_model, runtime_of
from trainers.models.grown import add_tokens
from trainers.models.load import model_family, text_facts
from trainers.models.protocol import TokenizerFacts, initialised
from trainers.models.stack import load_trained
from trainers.runtime import distributed
from trainers.runtime.randomness import stream_seed
from trainers.store.adapters import Weights
from trainers.training.context import StageContext, model_folder, model_weights


def stage_family(spec: Pretrain | Finetune, context: StageContext) -> TextFamily:
    """Return the family of the model that the stage builds or starts from."""
    if spec.own_architecture is not None:
        return TEXT_FAMILIES[spec.own_architecture.family]
    return model_family(model_folder(context, "init_from"))


def stage_type(spec: Pretrain | Finetune, context: StageContext) -> str | None:
    """Return the type of the model that the stage builds or starts from."""
    if spec.own_architecture is not None:
        return spec.own_architecture.type
    return text_facts(model_folder(context, "init_from")).type


def build_stage_tokenization(spec: Pretrain | Finetune, context: StageContext) -> Tokenization:
    """Train the stage's tokenizer (rank 0 first), or take the input's. Collective."""
    if spec.init_from is not None:
        return load_tokenization(model_folder(context, "init_from")).with_tokens(spec.added_tokens)
    if isinstance(spec.own_tokenizer, ExistingTokenizer):
        manifest = context.inputs["tokenizer.from"]
        prefix = "model" if any(name.startswith("model/") for name in manifest.files) else ""
        return load_tokenization(context.store.folder(manifest, prefix), spec.own_tokenizer)
    assert isinstance(spec.own_tokenizer, TrainTokenizer)
    observer = context.observer
    observer.phase("tokenizer")
    arguments = (spec.own_tokenizer, spec.data, context.base_dir, context.seed, context.store)
    return distributed.first_rank_first(
        lambda: build_tokenization(*arguments, lambda rows: observer.phase("tokenizer", rows=rows))
    )


def build_stage_model(
    spec: Pretrain | Finetune, context: StageContext, tokenization: Tokenization
) -> tuple[nn.Module, Weights | None]:
    """Build from random weights or load the input, whole and equal on every rank.

    Returns what it was opened from, too: the input, or a whole model and the adapters on it up to the input's, which
    stay unmerged where the stage trains another.
    """
    if spec.init_from is not None:
        folder = model_folder(context, "init_from")
        kind = runtime_of(model_family(folder).name).kind
        head = stream_seed(context.seed, "head") if MODEL_KINDS[kind].fills_masks else None
        lora = spec.adapters
        weights = model_weights(context, "init_from", lora, continues=True)
        model = load_trained(weights, kind, lora, spec.shard, device=context.ranks.device, new_head_seed=head)
        if spec.added_tokens:
            add_tokens(model, load_tokenization(folder).vocab_size, tokenization.vocab_size)
        if spec.draws_weights:
            model = initialised(type(model), model.config, stream_seed(context.seed, "weights"))
        return model, weights
    assert spec.own_architecture is not None
    facts = TokenizerFacts(tokenization.vocab_size, tokenization.eos_id, tokenization.pad_id, tokenization.bos_id)
    architecture = spec.own_architecture.model_dump(exclude_none=True)
    seed = stream_seed(context.seed, "weights")
    return build_language_model(architecture, facts, seed=seed, device=context.ranks.device), None
