"""Predicted parameters and kept values of image models against the built networks."""

from typing import Any

import pytest
import torch

from recipes.data.images import ImageSetFacts
from recipes.models.images.classifier import Classifier
from recipes.models.images.ddpm import Ddpm
from recipes.models.images.gan import Gan
from recipes.models.images.known_model import KnownImageModel
from recipes.models.images.tally import TextSizes
from recipes.models.images.vae import Vae
from recipes.planning.memory import predict_sizes
from recipes.stages.lora import Lora
from recipes.stages.rl_images import RlImages
from rlhf.algorithm import algorithm_of
from rlhf.experience import RlBatch
from rlhf.images.policy import ImageModels, Trajectories
from rlhf.images.sampling import ImagePolicy
from rlhf.objective import RlObjective
from trainers.data.batches import Texts
from trainers.models.images.build import Blueprint
from trainers.models.images.latents import LatentCodec
from trainers.models.images.protocol import ImageFacts
from trainers.models.images.text_encoder import TextStates
from trainers.tasks.image_start import adapt

KL = Vae(family="vae", type="autoencoder_kl", width=16, depth=2, latent=3, likelihood="gaussian")
CASES: dict[str, Any] = {
    "classifier": Classifier(family="classifier", width=8, depth=3, features=12),
    "classifier-mlp": Classifier(family="classifier", type="mlp", width=20, depth=2, features=12),
    "vae": Vae(family="vae", type="convnet", width=8, depth=2, latent=4),
    "vae-mlp": Vae(family="vae", type="mlp", width=50, depth=2, latent=4),
    "vae-kl": KL,
    "gan": Gan(family="gan", width=8, depth=2, latent=6, class_conditional=True),
    "gan-penalised": Gan(family="gan", width=8, depth=2, latent=6, r1_gamma=1.0),
    "gan-mlp": Gan(family="gan", type="mlp", width=30, depth=2, latent=6),
    "ddpm": Ddpm(family="ddpm", block_out_channels=[16, 32, 32], attention_levels=[1], class_conditional=True),
    "ddpm-small": Ddpm(family="ddpm", block_out_channels=[16, 32], layers_per_block=1),
    "captioned": Ddpm(family="ddpm", block_out_channels=[16, 32, 32], attention_levels=[1]),
    "captioned-middle": Ddpm(family="ddpm", block_out_channels=[8, 16], layers_per_block=1),
    "latent": Ddpm(family="ddpm", block_out_channels=[16, 32], layers_per_block=1, class_conditional=True),
}
BATCH = 4
TEXT_WIDTH, TOKENS = 24, 32


class Words:
    """Stands for a text encoder: hidden states without a model."""

    width = TEXT_WIDTH

    def without(self, texts: Texts, is_dropped_B: torch.Tensor) -> Texts:
        return texts

    def states(self, texts: Texts) -> TextStates:
        return TextStates(torch.randn(*texts.input_ids_BT.shape, TEXT_WIDTH), texts.attention_mask_BT)


@pytest.mark.parametrize("name", CASES)
def test_parameters_are_exact_and_kept_values_are_near(name: str) -> None:
    architecture = CASES[name]
    facts = ImageFacts(3, 16, 16, tuple("abcdefg"))
    codec = None
    if name == "latent":
        autoencoder: Any = Blueprint(KL, facts).build(0)
        codec = LatentCodec(autoencoder, 1.0)
    is_captioned = name.startswith("captioned")
    words: Any = Words() if is_captioned else None
    family = Blueprint(architecture, facts, codec, words).build(0)
    text = TextSizes(TEXT_WIDTH, 0) if is_captioned else None
    net = architecture.tally(ImageSetFacts(3, 16, 16, 7), KL if codec is not None else None, text)
    parameters, kept = net.parameters, net.kept
    assert parameters == sum(parameter.numel() for parameter in family.module.parameters())

    given = {"captions": Texts(torch.ones(BATCH, TOKENS).long(), torch.ones(BATCH, TOKENS).bool())}
    given = given if is_captioned else {}
    own = {parameter.untyped_storage().data_ptr() for parameter in family.module.parameters()}
    largest = 0
    for phase in family.phases():
        storages: dict[int, int] = {}

        def note(tensor: torch.Tensor, storages: dict[int, int] = storages) -> torch.Tensor:
            storage = tensor.untyped_storage()
            if storage.data_ptr() not in own:
                storages[storage.data_ptr()] = storage.nbytes()
            return tensor

        phase.module.train()
        batch = (torch.rand(BATCH, *facts.shape), torch.arange(BATCH), torch.arange(BATCH))
        with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
            found = phase.module(*batch, 0, **given)
        largest = max(largest, sum(storages.values()) if found else 0)
    assert 0.7 * largest < 4 * BATCH * kept < 3 * largest


@pytest.mark.parametrize("name", ["ddpm", "captioned"])
@pytest.mark.parametrize("lora", [Lora(r=3), Lora(r=2, dora=True, target_modules=["to_k", "to_out.0"])])
def test_an_adapter_s_parameters_are_exact(name: str, lora: Lora) -> None:
    words: Any = Words() if name == "captioned" else None
    family: Any = Blueprint(CASES[name], ImageFacts(3, 16, 16, tuple("abcdefg")), None, words).build(0)
    adapt(family, lora, 0)
    net = CASES[name].tally(ImageSetFacts(3, 16, 16, 7), None, None if words is None else TextSizes(TEXT_WIDTH, 0))
    trained = sum(parameter.numel() for parameter in family.module.parameters() if parameter.requires_grad)
    assert lora.num_parameters(net.projections) == trained


@pytest.mark.parametrize("guidance", [1.0, 2.0])
def test_the_prediction_of_a_reward_tuned_image_is_near(guidance: float) -> None:
    actor = Ddpm(
        family="ddpm", block_out_channels=[16, 32], layers_per_block=1, class_conditional=True, sampling_steps=5,
        guidance=guidance,
    )  # fmt: skip
    stage = RlImages.model_validate(
        {
            "kind": "rl",
            "actor": "ddpm",
            "reward": {"rule": "ink"},
            "algorithm": {"name": "ddpo", "iterations": 1, "optimizer": {"lr": 1e-3}},
        }
    )
    planned, model = stage.filled_in(actor, is_captioned=False), KnownImageModel(actor, ImageSetFacts(3, 16, 16, 7))
    one, two = (predict_sizes(planned, model, 1, micro).memory_per_worker_bytes for micro in (1, 2))

    families: list[Any] = [Blueprint(actor, ImageFacts(3, 16, 16, tuple("abcdefg"))).build(0) for _ in range(2)]
    models = ImageModels(families[0], families[1], 0.01)
    own = {parameter.untyped_storage().data_ptr() for parameter in models.parameters()}
    storages: dict[int, int] = {}

    def note(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            storages[storage.data_ptr()] = storage.nbytes()
        return tensor

    states, zeros = torch.randn(1, 5, 3, 16, 16), torch.zeros(1, dtype=torch.long)
    unused: Any = None
    policy, algorithm = ImagePolicy(unused, 1, unused, unused), algorithm_of(stage.algorithm)
    old = torch.zeros(1, 4)
    batch = RlBatch(
        Trajectories(states, zeros, zeros), torch.ones(1, 4, dtype=torch.bool), torch.ones(1, 4), old, old, None, old,
        None, kl_coef=0.0, actor_learns=True, is_untouched=False,
    )  # fmt: skip
    with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
        loss = RlObjective(policy, algorithm, 1e-4).loss(models, batch).loss_sum
    assert loss.requires_grad
    assert 0.7 * sum(storages.values()) < two - one < 3 * sum(storages.values())
