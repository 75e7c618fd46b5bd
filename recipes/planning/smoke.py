"""The tiny CPU form of any recipe: the same stages, engines and seams, small models, few rows and steps (pure)."""

from typing import Any, TypeVar

from recipes.data.images import ImageSource
from recipes.data.text import Source, Tokenizer, TrainTokenizer
from recipes.fields import Strict
from recipes.models.architecture import Architecture, Gpt2, Llama, Qwen3
from recipes.models.encoder import Bert, PseudoLabels
from recipes.models.encoder_decoder import T5, Bart
from recipes.models.image_models import VENDI_PICTURES, Classifier, Ddpm, Gan, ImageArchitecture, Vae
from recipes.models.rnn import Rnn
from recipes.recipe import Recipe
from recipes.rules.chain import origin
from recipes.stages.ddpo import Ddpo, PictureRollout
from recipes.stages.kinds import (
    Evaluate,
    Finetune,
    FinetuneImages,
    PpoImages,
    PpoStage,
    Pretrain,
    PretrainImages,
    Reward,
    Stage,
)
from recipes.stages.ppo import Ppo, Rollout, Sampling
from recipes.stages.train import ImageTrain, Train

LAYERS, WIDTH, HEADS, INTERMEDIATE = 2, 64, 4, 128
VOCABULARY, SEQUENCE, POSITIONS = 512, 96, 128
STEPS, BATCH, ROWS, HELD_OUT_ROWS = 8, 8, 400, 16
ITERATIONS, PROMPTS, PROMPT_TOKENS, RESPONSE_TOKENS, EXAM_PROMPTS = 2, 8, 80, 16, 16
DENOISING_STEPS = 5

T = TypeVar("T", bound=Strict)


def shrink(recipe: Recipe) -> Recipe:
    """The recipe's smoke form; shrinking it again changes nothing. A few steps teach nothing: gates do not refuse."""
    stages = {name: _with(_shrink_stage(stage, recipe), gate="ignore") for name, stage in recipe.stages.items()}
    return _with(recipe, stages=stages)


def _with(model: T, **changes: Any) -> T:
    """A copy with other values; the caller's types are right, validation would drop nothing."""
    return model.model_copy(update=changes)


def _shrink_stage(stage: Stage, recipe: Recipe) -> Stage:
    match stage:
        case Pretrain():
            return _with(
                _fewer_rows(stage),
                architecture=_shrink_architecture(stage.architecture),
                tokenizer=_shrink_tokenizer(stage.tokenizer),
                train=_shrink_train(stage.train),
            )
        case PretrainImages():
            return _with(
                _fewer_rows(stage),
                architecture=_shrink_pictures(stage.architecture),
                train=_shrink_image_train(stage.train),
            )
        case FinetuneImages():
            return _with(_fewer_rows(stage), train=_shrink_image_train(stage.train))
        case Finetune():
            # A model from outside the recipe keeps its size, and the length that its rows and pictures need.
            is_built_here = isinstance(origin(stage.init_from, recipe.stages), Pretrain)
            train = _shrink_train(stage.train)
            length = train.sequence_length if is_built_here else stage.train.sequence_length
            return _with(
                _fewer_rows(stage),
                pseudo_labels=_shrink_pseudo_labels(stage.pseudo_labels),
                train=_with(train, sequence_length=length),
            )
        case Reward():
            return _with(_fewer_rows(stage), train=_shrink_train(stage.train), min_accuracy=0.0)
        case PpoStage():
            return _with(
                stage,
                prompts=_limit(stage.prompts, ROWS),
                text=_limit(stage.text, ROWS),
                rollout=_shrink_rollout(stage.rollout),
                ppo=_shrink_ppo(stage.ppo),
            )
        case PpoImages():
            return _with(
                stage,
                prompts=_limit(stage.prompts, ROWS),
                rollout=_shrink_picture_rollout(stage.rollout),
                ppo=_with(_shrink_updates(stage.ppo), grid=10),
            )
        case Evaluate():
            return _shrink_exam(stage)


L = TypeVar("L", Pretrain, PretrainImages, Finetune, FinetuneImages, Reward)


def _fewer_rows(stage: L) -> L:
    return _with(stage, data=_limit(stage.data, ROWS), evaluation=_limit(stage.evaluation, HELD_OUT_ROWS))


def _shrink_exam(exam: Evaluate) -> Evaluate:
    return _with(
        exam,
        text=_limit(exam.text, HELD_OUT_ROWS),
        prompts=_limit(exam.prompts, ROWS),
        num_prompts=min(exam.num_prompts, EXAM_PROMPTS),
        num_samples=min(exam.num_samples, 2),
        images=_limit(exam.images, ROWS),
        num_images=min(exam.num_images, EXAM_PROMPTS),
        num_draws=2,
        sequence_length=min(exam.sequence_length, SEQUENCE),
        sampling=_shrink_sampling(exam.sampling),
        gates=[],
    )


def _shrink_architecture(architecture: Architecture | None) -> Architecture | None:
    match architecture:
        case None:
            return None
        case Rnn(embedding_size=embedding):
            return _with(
                architecture,
                num_hidden_layers=min(architecture.num_hidden_layers, LAYERS),
                hidden_size=min(architecture.hidden_size, WIDTH),
                embedding_size=None if embedding is None else min(embedding, WIDTH),
            )
        case Gpt2():
            return _with(
                architecture,
                n_layer=min(architecture.n_layer, LAYERS),
                n_embd=WIDTH,
                n_head=HEADS,
                n_inner=None if architecture.n_inner is None else INTERMEDIATE,
                n_positions=POSITIONS,
            )
        case T5():
            return _with(
                architecture,
                num_layers=1,
                num_decoder_layers=1,
                d_model=WIDTH,
                d_kv=WIDTH // HEADS,
                d_ff=INTERMEDIATE,
                num_heads=HEADS,
            )
        case Bart():
            return _with(
                architecture,
                encoder_layers=1,
                decoder_layers=1,
                d_model=WIDTH,
                encoder_ffn_dim=INTERMEDIATE,
                decoder_ffn_dim=INTERMEDIATE,
                encoder_attention_heads=HEADS,
                decoder_attention_heads=HEADS,
                max_position_embeddings=POSITIONS,
            )
        case Bert() | Llama() | Qwen3():
            small = _with(
                architecture,
                num_hidden_layers=min(architecture.num_hidden_layers, LAYERS),
                hidden_size=WIDTH,
                intermediate_size=INTERMEDIATE,
                num_attention_heads=HEADS,
                max_position_embeddings=POSITIONS,
            )
            if isinstance(architecture, Bert):
                return small
            grouped = architecture.num_key_value_heads not in (None, architecture.num_attention_heads)
            return _with(
                small,
                num_key_value_heads=HEADS // 2 if grouped else None,
                head_dim=None if architecture.head_dim is None else WIDTH // HEADS,
            )


def _shrink_pictures(architecture: ImageArchitecture) -> ImageArchitecture:
    match architecture:
        case Classifier():
            return _with(architecture, width=min(architecture.width, 16), features=min(architecture.features, 16))
        case Vae():
            small = WIDTH if architecture.type == "mlp" else 8
            return _with(
                architecture,
                width=min(architecture.width, small),
                latent=min(architecture.latent, 8),
                kl_warmup_steps=min(architecture.kl_warmup_steps, STEPS),
            )
        case Gan():
            return _with(architecture, width=min(architecture.width, 8), latent=min(architecture.latent, 8))
        case Ddpm():
            groups = min(architecture.norm_num_groups, 4)
            return _with(
                architecture,
                block_out_channels=[8 for _ in architecture.block_out_channels],
                layers_per_block=1,
                norm_num_groups=groups if 8 % groups == 0 else 1,
                timesteps=min(architecture.timesteps, 100),
                sampling_steps=min(architecture.sampling_steps, 10),
            )


def _shrink_tokenizer(tokenizer: Tokenizer | None) -> Tokenizer | None:
    if isinstance(tokenizer, TrainTokenizer):
        needed = 256 + len(tokenizer.names)
        return _with(tokenizer, vocab_size=min(tokenizer.vocab_size, max(VOCABULARY, needed + 64)))
    return tokenizer


def _shrink_pseudo_labels(pseudo_labels: PseudoLabels | None) -> PseudoLabels | None:
    if pseudo_labels is None:
        return None
    return _with(pseudo_labels, ratio=min(pseudo_labels.ratio, 2), warmup_steps=min(pseudo_labels.warmup_steps, 2))


S = TypeVar("S", bound=Source | ImageSource | None)


def _limit(source: S, rows: int) -> S:
    if source is None:
        return source
    return _with(source, limit=rows if source.limit is None else min(source.limit, rows))


V = TypeVar("V", Train, ImageTrain)


def _shrink_course(train: V, batch: int) -> V:
    steps = min(train.steps or STEPS, STEPS)
    return _with(
        train,
        steps=steps,
        epochs=None,
        global_batch=min(train.global_batch, batch),
        schedule=_with(train.schedule, warmup_steps=min(train.schedule.warmup_steps, steps // 4)),
        save_every=min(train.save_every, 4),
        evaluate_every=min(train.evaluate_every, 4),
        evaluation_rows=min(train.evaluation_rows, HELD_OUT_ROWS),
    )


def _shrink_train(train: Train) -> Train:
    return _with(_shrink_course(train, BATCH), tokens=None, sequence_length=min(train.sequence_length, SEQUENCE))


def _shrink_image_train(train: ImageTrain) -> ImageTrain:
    return _with(_shrink_course(train, 2 * BATCH), grid=min(train.grid, VENDI_PICTURES))


def _shrink_sampling(sampling: Sampling) -> Sampling:
    response = min(sampling.max_new_tokens, RESPONSE_TOKENS)
    return _with(
        sampling,
        max_new_tokens=response,
        max_prompt_tokens=min(sampling.max_prompt_tokens, PROMPT_TOKENS),
    )


def _shrink_rollout(rollout: Rollout) -> Rollout:
    sampled = _shrink_sampling(rollout)
    samples = min(rollout.samples_per_prompt, 2)
    prompts = min(rollout.prompts_per_iteration, PROMPTS)
    assert isinstance(sampled, Rollout)
    return _with(sampled, prompts_per_iteration=prompts, samples_per_prompt=samples)


def _shrink_picture_rollout(rollout: PictureRollout) -> PictureRollout:
    pictures = min(rollout.pictures_per_iteration, max(2 * BATCH, 2 * len(rollout.classes)))
    is_smaller = pictures < rollout.pictures_per_iteration
    return _with(
        rollout,
        pictures_per_iteration=pictures,
        samples_per_prompt=min(rollout.samples_per_prompt, 2) if is_smaller else rollout.samples_per_prompt,
        steps=min(rollout.steps or DENOISING_STEPS, DENOISING_STEPS),
    )


U = TypeVar("U", Ppo, Ddpo)


def _shrink_updates(ppo: U) -> U:
    iterations = min(ppo.iterations, ITERATIONS)
    epochs, mini_batches = min(ppo.epochs, 2), min(ppo.mini_batches, 2)
    steps = iterations * epochs * mini_batches
    return _with(
        ppo,
        iterations=iterations,
        epochs=epochs,
        mini_batches=mini_batches,
        kl_limit=None,
        schedule=_with(ppo.schedule, warmup_steps=min(ppo.schedule.warmup_steps, steps // 4)),
        save_every=1,
    )


def _shrink_ppo(ppo: Ppo) -> Ppo:
    return _with(
        _shrink_updates(ppo),
        text_batch=min(ppo.text_batch, 4),
        text_length=min(ppo.text_length, SEQUENCE),
        critic_warmup=min(ppo.critic_warmup, min(ppo.iterations, ITERATIONS) - 1),
    )
