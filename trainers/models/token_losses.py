"""Cross-entropy of selected tokens without the B x T x V logits: head product, softmax and their gradients in chunks.

B batch, T tokens, N selected tokens, D width, V vocabulary.
"""

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

from recipes.planning.memory import CHUNK_ELEMENTS
from trainers.data.masking import MaskedBatch
from trainers.data.streams import StreamBatch
from trainers.models.forward_forms import encoder_inputs, packed_inputs, scaled, softcap_of


class TokenLosses(nn.Module):
    """A causal language model whose forward returns the loss sum over target tokens."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(
        self, input_ids_BT: Tensor, segment_ids_BT: Tensor, position_ids_BT: Tensor, loss_mask_BT: Tensor
    ) -> Tensor:
        """Return the summed negative log-likelihood of the tokens where `loss_mask_BT` is True."""
        return token_losses(self.model, input_ids_BT, segment_ids_BT, position_ids_BT, loss_mask_BT)


class CarriedTokenLosses(nn.Module):
    """A recurrent language model whose forward continues from a carried state."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, batch: StreamBatch, state_SLBH: Tensor) -> tuple[Tensor, Tensor]:
        """Return the summed negative log-likelihood of the targets, and the state to carry on without its gradient."""
        model: Any = self.model
        hidden_BTD, after_SLBH = model.base_model.run(batch.input_ids_BT, state_SLBH)
        mask = batch.loss_mask_BT
        losses = linear_cross_entropy(hidden_BTD[mask], model.get_output_embeddings().weight, batch.target_ids_BT[mask])
        return losses, after_SLBH.detach()


def token_losses(
    model: Any, input_ids_BT: Tensor, segment_ids_BT: Tensor, position_ids_BT: Tensor, loss_mask_BT: Tensor
) -> Tensor:
    """Return the summed negative log-likelihood of the tokens where `loss_mask_BT` is True."""
    hidden_BTD = hidden_states(model, input_ids_BT, segment_ids_BT, position_ids_BT)
    mask = loss_mask_BT[:, 1:]
    return head_cross_entropy(model, hidden_BTD[:, :-1][mask], input_ids_BT[:, 1:][mask])


def head_cross_entropy(model: Any, hidden_ND: Tensor, targets_N: Tensor) -> Tensor:
    """Return the summed negative log-likelihood of targets under the model's head."""
    head = model.get_output_embeddings()
    factors = head_factors(head, scaled(model, hidden_ND).to(head.weight.dtype))  # some types add up in fp32
    return linear_cross_entropy(*factors, targets_N, softcap_of(model))


def head_factors(head: Any, hidden_ND: Tensor) -> tuple[Tensor, Tensor]:
    """Return the two matrices whose product is a head's logits, [N, D'] and [V, D']: its bias and its adapters too."""
    weight_VD, updates = head.weight, list(_low_rank_updates(head, hidden_ND))
    if getattr(head, "bias", None) is not None:
        updates.insert(0, (torch.ones_like(hidden_ND[:, :1]), head.bias[:, None]))
    for low_NR, high_VR in updates:
        hidden_ND, weight_VD = torch.cat([hidden_ND, low_NR], dim=1), torch.cat([weight_VD, high_VR], dim=1)
    return hidden_ND, weight_VD


def _low_rank_updates(head: Any, hidden_ND: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
    """Yield the factors of what each adapter that is on adds to a head's logits: [N, R], scaled, and [V, R]."""
    if getattr(head, "disable_adapters", True):
        return
    for name in head.active_adapters:
        if name in head.lora_A:
            low_NR = head.lora_A[name](head.lora_dropout[name](hidden_ND)) * head.scaling[name]
            yield low_NR, head.lora_B[name].weight


def is_recurrent(model: Any) -> bool:
    """Tell whether a model continues from a state instead of attending to what it has read."""
    return hasattr(model.base_model, "zero_state")


def hidden_states(model: Any, input_ids_BT: Tensor, segment_ids_BT: Tensor, position_ids_BT: Tensor) -> Tensor:
    """Run the backbone over packed rows; no token sees another segment."""
    backbone = model.base_model
    if is_recurrent(model):
        states: Tensor = backbone(input_ids_BT, segment_ids=segment_ids_BT).last_hidden_state
        return states
    output = backbone(input_ids=input_ids_BT, use_cache=False, **packed_inputs(model, segment_ids_BT, position_ids_BT))
    last: Tensor = output.last_hidden_state
    return last


def linear_cross_entropy(
    hidden_ND: Tensor, weight_VD: Tensor, targets_N: Tensor, softcap: float | None = None
) -> Tensor:
    """Return the fp32 sum over N of -log softmax(hidden @ weight.T)[target]; no targets give a zero with a gradient.

    With `softcap` logits are bounded by it: c * tanh(x / c) (Gemma team 2024, section 2).
    """
    result: Tensor = _LinearCrossEntropy.apply(hidden_ND, weight_VD, targets_N, softcap, torch.is_grad_enabled())
    return result


class _LinearCrossEntropy(torch.autograd.Function):
    """Gradients are computed with the loss, chunk by chunk; the backward pass only scales them."""

    @staticmethod
    def forward(
        ctx: Any, hidden: Tensor, weight: Tensor, targets: Tensor, softcap: float | None, with_gradients: bool
    ) -> Tensor:
        wants_hidden, wants_weight = (needed and with_gradients for needed in ctx.needs_input_grad[:2])
        total = hidden.new_zeros((), dtype=torch.float64 if hidden.device.type == "cpu" else torch.float32)
        grad_hidden = torch.empty_like(hidden) if wants_hidden else None
        grad_weight = torch.zeros_like(weight, dtype=torch.float32) if wants_weight else None
        chunk = max(1, CHUNK_ELEMENTS // weight.shape[0])
        for start in range(0, hidden.shape[0], chunk):
            part, wanted = hidden[start : start + chunk], targets[start : start + chunk, None]
            logits = torch.mm(part, weight.t()).float()
            if softcap is not None:
                logits = torch.tanh(logits / softcap) * softcap
            gradient = torch.softmax(logits, dim=-1)
            # The likeliest token's probability is 1 / sum(exp(logits - max)): its log completes the log of the sum.
            log_sum = logits.amax(dim=-1, keepdim=True) - gradient.amax(dim=-1, keepdim=True).log()
            total += (log_sum - logits.gather(1, wanted)).sum(dtype=total.dtype)
            if grad_hidden is None and grad_weight is None:
                continue
            gradient.scatter_add_(1, wanted, gradient.new_full((1, 1), -1.0).expand_as(wanted))
            if softcap is not None:
                gradient *= 1 - (logits / softcap) ** 2
            gradient = gradient.to(hidden.dtype)
            if grad_hidden is not None:
                torch.mm(gradient, weight, out=grad_hidden[start : start + chunk])
            if grad_weight is not None and weight.dtype == torch.float32:
                grad_weight.addmm_(gradient.t(), part)
            elif grad_weight is not None:
                grad_weight += torch.mm(gradient.t(), part)
        ctx.save_for_backward(grad_hidden, grad_weight)
        ctx.weight_dtype = weight.dtype
        return total.float()

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        grad_hidden, grad_weight = ctx.saved_tensors
        factor = gradients[0]
        return (
            None if grad_hidden is None else grad_hidden * factor.to(grad_hidden.dtype),
            None if grad_weight is None else (grad_weight * factor).to(ctx.weight_dtype),
            None,
            None,
            None,
        )


class MaskedTokenLosses(nn.Module):
    """A masked language model of transformers whose forward returns the loss sum over hidden tokens, and the hits."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, batch: MaskedBatch) -> tuple[Tensor, Tensor]:
        """Return the summed negative log-likelihood of the hidden tokens and how many were the likeliest."""
        model: Any = self.model
        inputs = encoder_inputs(model, batch.segment_ids_BT, batch.position_ids_BT)
        if hasattr(model, "cls"):  # whose head can be computed for the hidden tokens alone
            states_BTD = model.base_model(input_ids=batch.input_ids_BT, **inputs).last_hidden_state
            logits_NV = model.cls(states_BTD[batch.hidden_mask_BT]).float()
        else:
            logits_NV = model(input_ids=batch.input_ids_BT, **inputs).logits[batch.hidden_mask_BT].float()
        targets_N = batch.target_ids_BT[batch.hidden_mask_BT]
        loss = nn.functional.cross_entropy(logits_NV, targets_N, reduction="sum")
        return loss, (logits_NV.argmax(dim=1) == targets_N).sum()
