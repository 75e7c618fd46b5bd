"""LSTM and GRU language models: torch's own layers under a head, in transformers' file layout.

A document starts from a zero state that has read the end token, as it does where documents follow each other in a
training stream. B rows, T tokens, D width of the embeddings, H width of the state, L layers, S tensors of a state (an
LSTM's hidden and cell, a GRU's hidden), V vocabulary, N documents.
"""

from collections.abc import Mapping
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedConfig, PreTrainedModel
from transformers.modeling_outputs import BaseModelOutput, CausalLMOutput

from recipes.models.model_kinds import ModelKind
from recipes.stages.answers import ROLES
from recipes.stages.finetune import Finetune
from recipes.stages.pretrain import Pretrain
from trainers.data.tokenizer import Tokenization
from trainers.models.protocol import FamilyRuntime, TokenizerFacts, initialised, library_keys
from trainers.models.token_losses import CarriedTokenLosses, TokenLosses
from trainers.objectives.carried_language_model import CarriedLanguageModelObjective
from trainers.objectives.language_model import LanguageModelObjective
from trainers.objectives.protocol import Learning

MODEL_TYPE = "rnn"
ROWS_AT_ONCE = 32
"""Documents that run side by side; sorted by length, so that little of them is padding."""


class RnnConfig(PreTrainedConfig):
    """Configuration of a recurrent language model."""

    model_type = MODEL_TYPE

    cell: str = "lstm"
    vocab_size: int = 256
    hidden_size: int = 128
    embedding_size: int | None = None
    num_hidden_layers: int = 1
    dropout: float = 0.0
    initializer_range: float = 0.05
    tie_word_embeddings: bool = True
    bos_token_id: int | None = None
    eos_token_id: int | None = None
    pad_token_id: int | None = None

    @property
    def width(self) -> int:
        """Width of the embeddings."""
        return self.embedding_size or self.hidden_size


class RnnBackbone(nn.Module):
    """Embedding, recurrent layers, and a projection where the head's width is another."""

    def __init__(self, config: RnnConfig) -> None:
        super().__init__()
        self.config = config
        self.embedding = nn.Embedding(config.vocab_size, config.width)
        layers = nn.LSTM if config.cell == "lstm" else nn.GRU
        between = config.dropout if config.num_hidden_layers > 1 else 0.0
        self.layers = layers(
            config.width, config.hidden_size, config.num_hidden_layers, batch_first=True, dropout=between
        )
        self.projection: nn.Module = nn.Identity()
        if config.width != config.hidden_size:
            self.projection = nn.Linear(config.hidden_size, config.width, bias=False)

    def forward(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        segment_ids: Tensor | None = None,
        use_cache: bool = False,
    ) -> BaseModelOutput:
        """Read documents from their start: each row is one, or holds those that `segment_ids` tells apart (0: none).

        A padded row's states after its end are of no use; `attention_mask` is for transformers' callers.
        """
        if segment_ids is None:
            segment_ids = torch.ones_like(input_ids)
        return BaseModelOutput(last_hidden_state=self._documents(input_ids, segment_ids))

    def run(self, input_ids_BT: Tensor, state_SLBH: Tensor) -> tuple[Tensor, Tensor]:
        """Go on from a state; returns the states to predict from [B, T, D], and the state after the last token."""
        dropped = nn.functional.dropout(self.embedding(input_ids_BT), self.config.dropout, self.training)
        state: Any = tuple(part.contiguous() for part in state_SLBH)
        hidden, after = self.layers(dropped, state if len(state) == 2 else state[0])
        hidden = self.projection(nn.functional.dropout(hidden, self.config.dropout, self.training))
        return hidden, torch.stack(tuple(after)) if isinstance(after, tuple) else after[None]

    def zero_state(self, rows: int) -> Tensor:
        """Return the state before anything was read."""
        weight = self.embedding.weight
        kinds = 2 if self.config.cell == "lstm" else 1
        shape = (kinds, self.config.num_hidden_layers, rows, self.config.hidden_size)
        return torch.zeros(shape, dtype=weight.dtype, device=weight.device)

    def read_prompts(self, prompt_ids_BP: Tensor, prompt_mask_BP: Tensor) -> tuple[Tensor, Tensor]:
        """Read left-padded documents; returns the last hidden state [B, D] and the state after it, of each."""
        hidden, states = [], []
        for ids, mask in zip(prompt_ids_BP, prompt_mask_BP.bool(), strict=True):
            document = torch.cat([ids.new_full((1,), self._start), ids[mask]])[None]
            found, state = self.run(document, self.zero_state(1))
            hidden.append(found[:, -1])
            states.append(state)
        return torch.cat(hidden), torch.cat(states, dim=2)

    @property
    def _start(self) -> int:
        return int(self.config.eos_token_id or 0)

    def _documents(self, input_ids_BT: Tensor, segment_ids_BT: Tensor) -> Tensor:
        """Run every document of every row from its start; padding gets zeros."""
        is_real_BT = segment_ids_BT > 0
        is_first_BT = is_real_BT.clone()
        is_first_BT[:, 1:] &= segment_ids_BT[:, 1:] != segment_ids_BT[:, :-1]
        document_M = (is_first_BT[is_real_BT].cumsum(0) - 1).tolist()  # of each real token
        tokens_M = input_ids_BT[is_real_BT]
        starts_N = is_first_BT[is_real_BT].nonzero()[:, 0].tolist()
        ends_N = [*starts_N[1:], len(document_M)]
        order = sorted(range(len(starts_N)), key=lambda number: ends_N[number] - starts_N[number])
        parts: list[Tensor] = []
        places: list[int] = []
        for first in range(0, len(order), ROWS_AT_ONCE):
            group = order[first : first + ROWS_AT_ONCE]
            longest = max(ends_N[number] - starts_N[number] for number in group)
            ids = tokens_M.new_full((len(group), longest + 1), self._start)
            mask = torch.zeros(len(group), longest + 1, dtype=torch.bool, device=ids.device)
            for row, number in enumerate(group):
                length = ends_N[number] - starts_N[number]
                ids[row, 1 : length + 1] = tokens_M[starts_N[number] : ends_N[number]]
                mask[row, 1 : length + 1] = True
                places += range(starts_N[number], ends_N[number])
            hidden, _ = self.run(ids, self.zero_state(len(group)))
            parts.append(hidden[mask])
        output = self.embedding.weight.new_zeros(*input_ids_BT.shape, self.config.width)
        back = torch.tensor(places, device=output.device).argsort()
        output[is_real_BT] = torch.cat(parts)[back]
        return output


class RnnForCausalLM(PreTrainedModel):
    """Recurrent backbone and language-model head without bias."""

    config_class = RnnConfig
    base_model_prefix = "backbone"
    _supports_sdpa = True  # it has no attention: every implementation suits it
    _tied_weights_keys: ClassVar[dict[str, str]] = {"lm_head.weight": "backbone.embedding.weight"}

    def __init__(self, config: RnnConfig) -> None:
        super().__init__(config)
        self.backbone = RnnBackbone(config)
        self.lm_head = nn.Linear(config.width, config.vocab_size, bias=False)
        self.post_init()

    def get_input_embeddings(self) -> nn.Module:
        """Return the embedding of the tokens."""
        return self.backbone.embedding

    def get_output_embeddings(self) -> nn.Linear:
        """Return the head."""
        return self.lm_head

    def forward(
        self, input_ids: Tensor, attention_mask: Tensor | None = None, use_cache: bool = False
    ) -> CausalLMOutput:
        """Return the logits [B, T, V] of right-padded documents, each read from its start."""
        return CausalLMOutput(logits=self.lm_head(self.backbone(input_ids).last_hidden_state))

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        """Embeddings and head normal; torch's own ranges for the layers; forget gates open (Jozefowicz et al. 2015)."""
        if isinstance(module, nn.Embedding) or module is self.lm_head:
            nn.init.normal_(module.weight, std=self.config.initializer_range)  # type: ignore[arg-type]
        elif isinstance(module, nn.LSTM | nn.GRU | nn.Linear):
            bound = self.config.hidden_size**-0.5
            for name, parameter in module.named_parameters():
                nn.init.uniform_(parameter, -bound, bound)
                if isinstance(module, nn.LSTM) and name.startswith("bias_hh"):
                    size = self.config.hidden_size
                    parameter[size : 2 * size] = 1.0


AutoConfig.register(MODEL_TYPE, RnnConfig)
AutoModelForCausalLM.register(RnnConfig, RnnForCausalLM)


class RnnRuntime(FamilyRuntime):
    """Recurrent language models: pretrained on one stream with a carried state, tuned on rows."""

    kinds: ClassVar[tuple[ModelKind, ...]] = ("language_model",)

    def build(
        self, architecture: Mapping[str, Any], facts: TokenizerFacts, *, seed: int, device: torch.device
    ) -> nn.Module:
        """Build a language model."""
        config = RnnConfig(**library_keys(architecture), cell=architecture["type"], **facts.config_keys())
        return initialised(RnnForCausalLM, config, seed)

    def stock_class(self, model_type: str, kind: ModelKind) -> Any:
        """Return the class above."""
        return RnnForCausalLM

    def attention(self, device: torch.device, model_type: str) -> str:
        """Return any name: there is no attention."""
        return "sdpa"

    def learning(self, spec: Pretrain | Finetune, model: nn.Module, tokenization: Tokenization, seed: int) -> Learning:
        """Return the next token's loss: over a stream's batches in pretraining, else over packed rows."""
        if ROLES[spec.data_role].is_plain:
            return Learning(CarriedTokenLosses(model), CarriedLanguageModelObjective())
        return Learning(TokenLosses(model), LanguageModelObjective())
