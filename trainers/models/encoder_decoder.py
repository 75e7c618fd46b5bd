"""Encoder-decoders by transformers' own classes: built from a recipe, and the loss of their targets.

B rows, S source tokens, T target tokens, D width.
"""

from collections.abc import Mapping
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from recipes.errors import StageError
from recipes.models.encoder_decoder import SpanCorruption
from recipes.models.model_kinds import ModelKind
from recipes.models.type_table import type_records
from recipes.stages.finetune import Finetune
from recipes.stages.pretrain import Pretrain
from trainers.data.batches import Seq2SeqBatch
from trainers.data.span_corruption import SpanCorrupter
from trainers.data.tokenizer import Tokenization
from trainers.models.protocol import (
    FamilyRuntime,
    TokenizerFacts,
    initialised,
    library_class,
    library_config,
    library_keys,
)
from trainers.models.token_losses import head_factors, linear_cross_entropy
from trainers.objectives.protocol import Learning
from trainers.objectives.seq2seq import Seq2SeqObjective


class EncoderDecoderRuntime(FamilyRuntime):
    """T5 and BART: hidden spans in pretraining, targets of sources in fine-tuning; rows are never packed."""

    kinds: ClassVar[tuple[ModelKind, ...]] = ("seq2seq_model",)

    def build(
        self, architecture: Mapping[str, Any], facts: TokenizerFacts, *, seed: int, device: torch.device
    ) -> nn.Module:
        """Build from `type` and transformers' configuration keys.

        A target starts with the pad token (t5) or with the end token (bart), as in the published models.
        """
        kind, keys = architecture["type"], library_keys(architecture)
        keys["decoder_start_token_id"] = facts.pad_id if type_records()[kind].start == "pad" else facts.eos_id
        config = library_config(kind, keys, facts, self.attention(device, kind))
        return initialised(self.stock_class(kind, "seq2seq_model"), config, seed)

    def stock_class(self, model_type: str, kind: ModelKind) -> Any:
        """Return transformers' class."""
        return library_class(model_type, kind)

    def attention(self, device: torch.device, model_type: str) -> str:
        """Return torch's own kernel on GPUs; on CPUs plain products are faster, since positions have a gradient."""
        record = type_records()[model_type]
        return record.cpu_attention if device.type == "cpu" else record.attention

    def learning(self, spec: Pretrain | Finetune, model: nn.Module, tokenization: Tokenization, seed: int) -> Learning:
        """Return the loss of targets: in pretraining of hidden spans, drawn from the seed."""
        module, objective = TargetLosses(model), Seq2SeqObjective()
        if isinstance(spec, Finetune):
            return Learning(module, objective, predicts_next=False)
        corrupter = SpanCorrupter(spec.span_corruption or SpanCorruption(), tokenization, seed)
        return Learning(module, objective, corrupter.batch, predicts_next=False)


class TargetLosses(nn.Module):
    """An encoder-decoder whose forward returns the loss sum over the tokens of the targets."""

    def __init__(self, model: nn.Module) -> None:
        """Raise StageError for a model whose logits have a bias of their own, which no file of ours would hold."""
        super().__init__()
        self.model = model
        bias = getattr(model, "final_logits_bias", None)
        if bias is not None and bool(bias.any()):
            raise StageError("the model's final_logits_bias is not zero; such models are not trained")

    def forward(self, batch: Seq2SeqBatch) -> Tensor:
        """Return the summed negative log-likelihood of the targets."""
        model: Any = self.model
        states_BSD = encode(model, batch.source_ids_BS, batch.source_mask_BS)
        hidden_BTD = decode(model, shifted_right(model, batch.target_ids_BT), states_BSD, batch.source_mask_BS)
        mask = batch.target_mask_BT
        factors = head_factors(model.get_output_embeddings(), hidden_BTD[mask])
        return linear_cross_entropy(*factors, batch.target_ids_BT[mask])


def shifted_right(model: Any, target_ids_BT: Tensor) -> Tensor:
    """Return what the decoder reads: the start token, then the targets without their last."""
    start = start_token(model)
    return torch.cat([torch.full_like(target_ids_BT[:, :1], start), target_ids_BT[:, :-1]], dim=1)


def start_token(model: Any) -> int:
    """Return the id that a target starts with; raises StageError where the configuration names none."""
    found = model.config.decoder_start_token_id
    if found is None:
        raise StageError("the model's config.json names no decoder_start_token_id")
    return int(found)


def encode(model: Any, source_ids_BS: Tensor, source_mask_BS: Tensor) -> Tensor:
    """Run the encoder; returns its last states [B, S, D]."""
    states: Tensor = model.get_encoder()(input_ids=source_ids_BS, attention_mask=source_mask_BS).last_hidden_state
    return states


def decode(model: Any, decoder_ids_BT: Tensor, states_BSD: Tensor, source_mask_BS: Tensor, **cache: Any) -> Tensor:
    """Run the decoder; returns the states [B, T, D] that the head predicts from."""
    hidden: Tensor = model.get_decoder()(
        input_ids=decoder_ids_BT,
        encoder_hidden_states=states_BSD,
        encoder_attention_mask=source_mask_BS,
        use_cache=bool(cache),
        **cache,
    ).last_hidden_state
    # T5 scales tied outputs (Raffel et al. 2020's code); version 1.1 says in its configuration that it does not.
    if getattr(model.config, "scale_decoder_outputs", False):
        hidden = hidden * model.config.d_model**-0.5
    return hidden
