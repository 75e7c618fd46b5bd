"""Operations that plans predict against those that torch counts."""

from typing import Any

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from recipes.data.images import ImageSetFacts
from recipes.models.base import LanguageArchitecture
from recipes.models.decoder import Gpt2, Llama
from recipes.models.images.classifier import Classifier
from recipes.models.images.ddpm import Ddpm
from recipes.models.images.gan import Gan
from recipes.models.images.vae import Vae
from recipes.planning.cost import text_flops
from recipes.stages.finetune import Finetune
from trainers.models.decoder import build_decoder
from trainers.models.images.build import Blueprint
from trainers.models.images.protocol import ImageFacts
from trainers.models.lora import add_adapter
from trainers.models.protocol import TokenizerFacts

VOCABULARY, LENGTH, ROWS = 512, 48, 4
LLAMA = Llama(
    family="decoder", type="llama", hidden_size=64, intermediate_size=160, num_hidden_layers=3, num_attention_heads=4,
    num_key_value_heads=2,
)  # fmt: skip
GPT2 = Gpt2(family="decoder", type="gpt2", n_embd=64, n_layer=2, n_head=4)


def tuning(**stage: Any) -> Finetune:
    """One step of a few sequences without held-out rows."""
    train = {"steps": 1, "global_batch": ROWS, "sequence_length": LENGTH, "optimizer": {"lr": 1e-3}}
    data = {"source": "text", "files": ["a.txt"]}
    return Finetune.model_validate({"kind": "finetune", "init_from": "m", "data": data, "train": train, **stage})


def counted(model: Any) -> int:
    """What torch counts of a forward and a backward pass, the loss of every token included."""
    model.set_attn_implementation("eager")  # torch's own kernel on CPUs is not counted
    ids = torch.randint(2, VOCABULARY, (ROWS, LENGTH))
    with FlopCounterMode(display=False) as counter:
        model(input_ids=ids, labels=ids).loss.backward()
    return counter.get_total_flops()


@pytest.mark.parametrize("architecture", [LLAMA, GPT2], ids=["llama", "gpt2"])
@pytest.mark.parametrize("is_adapted", [False, True], ids=["full", "lora"])
def test_a_step_of_a_language_model(architecture: LanguageArchitecture, is_adapted: bool) -> None:
    model: Any = build_decoder(
        architecture.model_dump(exclude_none=True), TokenizerFacts(VOCABULARY, 0, 1), seed=0, device=torch.device("cpu")
    )
    stage = tuning(lora={"r": 4}) if is_adapted else tuning()
    if stage.lora is not None:
        add_adapter(model, stage.lora, seed=0)
    predicted = text_flops(stage, architecture, VOCABULARY, 1).total
    # What goes into the first layer needs no gradient where embeddings do not learn: up to a layer's share too much.
    assert predicted == pytest.approx(counted(model), rel=0.05 if is_adapted else 0.02)


NETS: dict[str, Any] = {
    "ddpm": Ddpm(family="ddpm", block_out_channels=[16, 32, 32], layers_per_block=1, class_conditional=True),
    "classifier": Classifier(family="classifier", width=8, depth=3, features=12),
    "vae": Vae(family="vae", type="autoencoder_kl", width=16, depth=2, latent=3, likelihood="gaussian"),
    "vae-convnet": Vae(family="vae", type="convnet", width=8, depth=2, latent=4),
    "gan": Gan(family="gan", width=8, depth=2, latent=6),
}


@pytest.mark.parametrize("name", NETS)
def test_a_forward_pass_of_an_image(name: str) -> None:
    net = NETS[name].tally(ImageSetFacts(3, 16, 16, 7))
    family: Any = Blueprint(NETS[name], ImageFacts(3, 16, 16, tuple("abcdefg"))).build(0)
    total = 0
    for phase in family.phases():
        phase.module.train()
        batch = (torch.rand(ROWS, 3, 16, 16), torch.arange(ROWS), torch.arange(ROWS))
        with FlopCounterMode(display=False) as counter:
            phase.module(*batch, 0)
        total += counter.get_total_flops()
    assert ROWS * net.flops == pytest.approx(total, rel=0.05)
