"""The mathematics of the image families against numbers worked out by hand and slow references."""

import math
from typing import Any

import numpy as np
import pytest
import torch

from recipes.models.images.classifier import Classifier
from recipes.models.images.ddpm import Ddpm
from recipes.models.images.gan import Gan
from recipes.models.images.vae import Vae
from trainers.engine.joint import JointState
from trainers.models.images.build import Blueprint
from trainers.models.images.gan import SpectralNorm, discriminator_loss
from trainers.models.images.networks import build_decoder, build_encoder, sizes_of
from trainers.models.images.protocol import ImageFacts
from trainers.models.images.vae import gaussian_kl, kl_weight, pixel_log_likelihood
from trainers.runtime.randomness import normals, uniforms

FACTS = ImageFacts(1, 6, 5, ("a", "b", "c"))
SEEDS = torch.tensor([3, 4, 5])
LABELS = torch.tensor([0, 2, 1])


def images() -> torch.Tensor:
    """Three images with values in [0, 1]."""
    return torch.rand(3, 1, 6, 5, generator=torch.Generator().manual_seed(0))


def build(architecture: Any, facts: ImageFacts = FACTS) -> Any:
    """Build a family."""
    return Blueprint(architecture, facts).build(0)


def test_noise_is_a_function_of_seed_and_stream() -> None:
    like = torch.empty(0)
    drawn = normals(torch.tensor([1, 2, 3]), 7, (50, 40), like)
    torch.testing.assert_close(normals(torch.tensor([3]), 7, (50, 40), like)[0], drawn[2])
    assert not torch.allclose(normals(torch.tensor([3]), 8, (50, 40), like)[0], drawn[2])
    assert abs(float(drawn.mean())) < 0.05
    assert abs(float(drawn.std()) - 1) < 0.05
    flat = uniforms(torch.tensor([1, 2]), 7, (2000,), like)
    assert 0 <= float(flat.min()) < 0.01 < 0.99 < float(flat.max()) < 1


def test_sizes_and_shapes_at_odd_sizes() -> None:
    assert sizes_of(7, 5, 2) == [(7, 5), (4, 3), (2, 2)]
    encoder, decoder = build_encoder("convnet", (2, 7, 5), 4, 2, 9), build_decoder("convnet", (2, 7, 5), 4, 2, 9)
    assert encoder(torch.zeros(3, 2, 7, 5)).shape == (3, 9)
    assert decoder(torch.zeros(3, 9)).shape == (3, 2, 7, 5)


def test_gaussian_kl_by_hand() -> None:
    # KL(N(m, s^2) || N(0, 1)) = (m^2 + s^2 - 1 - log s^2) / 2
    found = gaussian_kl(torch.tensor([0.0, 2.0]), torch.tensor([0.0, math.log(4.0)]))
    assert found.tolist() == pytest.approx([0.0, 0.5 * (4 + 4 - 1 - math.log(4))])


def test_the_kl_weight_rises_to_its_value() -> None:
    settings = Vae(family="vae", kl_weight=2.0, kl_warmup_steps=4)
    assert [kl_weight(settings, step) for step in (0, 1, 2, 4, 99)] == [0, 0.5, 1, 2, 2]


def test_pixel_likelihoods_by_hand() -> None:
    raw, target = torch.tensor([math.log(3.0)]), torch.tensor([1.0])
    assert float(pixel_log_likelihood(raw, target, Vae(family="vae"))) == pytest.approx(math.log(0.75))
    gaussian = Vae(family="vae", likelihood="gaussian", sd=0.5)
    density = math.exp(-0.5) / (0.5 * math.sqrt(2 * math.pi))
    assert float(pixel_log_likelihood(torch.tensor([0.0]), target, gaussian)) == pytest.approx(math.log(density))


def test_the_bound_is_reconstruction_and_kl_and_free_bits_cost_nothing() -> None:
    plain, free = (build(Vae(family="vae", type="mlp", width=8, latent=3, free_bits=bits)) for bits in (0.0, 100.0))
    found, spared = (vae.module(images(), LABELS, SEEDS, 0) for vae in (plain, free))
    torch.testing.assert_close(found["elbo"], -(found["reconstruction"] + found["kl"]))
    torch.testing.assert_close(found["loss"], -found["elbo"])
    torch.testing.assert_close(spared["loss"], spared["reconstruction"] + 3 * 100.0)
    torch.testing.assert_close(spared["elbo"], found["elbo"])


def test_the_bound_is_below_the_importance_weighted_likelihood() -> None:
    vae = build(Vae(family="vae", type="mlp", width=8, latent=2)).module
    binary = (images() > 0.5).float()
    with torch.no_grad():
        draws = torch.stack([vae(binary, LABELS, SEEDS + 100 * draw, 9)["elbo"] for draw in range(200)])
        mean, log_variance = vae.net.posterior(2 * binary - 1)
        noise = torch.randn(4000, 3, 2, generator=torch.Generator().manual_seed(0))
        latents = mean + noise * (0.5 * log_variance).exp()
        raw = vae.net.raw_pixels(latents.flatten(0, 1)).view(4000, 3, 1, 6, 5)
        likelihood = pixel_log_likelihood(raw, binary.expand_as(raw), vae.settings).flatten(2).sum(2)
        prior = -0.5 * latents.square().sum(2)
        posterior = -0.5 * (noise.square() + log_variance).sum(2)
        evidence = torch.logsumexp(likelihood + prior - posterior, 0) - math.log(4000)
    assert bool((draws.mean(0) < evidence).all())
    assert bool((draws.mean(0) > evidence - 5).all())


def test_binarised_images_are_drawn_anew_with_their_grey_value() -> None:
    vae = build(Vae(family="vae", type="mlp", width=8, latent=2, binarize=True))
    kept: list[torch.Tensor] = []
    vae.net.encoder.register_forward_pre_hook(lambda module, inputs: kept.append(inputs[0]))
    image = torch.full((1, 1, 6, 5), 0.3)
    for seed in range(100):
        vae.module(image, LABELS[:1], torch.tensor([seed]), 0)
    drawn = torch.cat(kept)
    assert set(drawn.unique().tolist()) == {-1.0, 1.0}
    assert float((drawn > 0).float().mean()) == pytest.approx(0.3, abs=0.03)


def test_interpolation_ends_at_its_inputs() -> None:
    vae = build(Vae(family="vae", type="mlp", width=8, latent=2))
    first, second = images()[:2]
    row = vae.interpolate(first, second, 5)
    ends = vae.decode(vae.encode(images()[:2])[0])
    torch.testing.assert_close(row[0], ends[0])
    torch.testing.assert_close(row[-1], ends[1])


def test_the_classifier_s_smoothing_is_off_in_evaluation() -> None:
    smooth = build(Classifier(family="classifier", width=4, depth=1, features=4, label_smoothing=0.5)).module
    trained = smooth.train()(images(), LABELS, SEEDS, 0)["loss"]
    measured = smooth.eval()(images(), LABELS, SEEDS, 0)["loss"]
    logits, _ = smooth.net(images())
    torch.testing.assert_close(measured, -logits.log_softmax(-1).gather(1, LABELS[:, None])[:, 0])
    assert not torch.allclose(trained, measured)


def test_discriminator_losses_by_hand() -> None:
    real, drawn = torch.tensor([2.0]), torch.tensor([-0.5])
    assert float(discriminator_loss("hinge", real, drawn)) == pytest.approx(0.5)
    assert float(discriminator_loss("wasserstein_gp", real, drawn)) == pytest.approx(-2.5)
    wanted = math.log(1 + math.exp(-2)) + math.log(1 + math.exp(-0.5))
    assert float(discriminator_loss("non_saturating", real, drawn)) == pytest.approx(wanted)


@pytest.mark.parametrize("shape", [(6, 4), (3, 8), (4, 2, 3, 3)])
def test_spectral_norm_divides_by_the_largest_singular_value(shape: tuple[int, ...]) -> None:
    weight = torch.randn(shape, generator=torch.Generator().manual_seed(1), requires_grad=True)
    found = SpectralNorm()(weight)
    torch.testing.assert_close(found, weight / torch.linalg.matrix_norm(weight.flatten(1), 2))
    direction = torch.randn(shape, generator=torch.Generator().manual_seed(2))
    (ours,) = torch.autograd.grad((found * direction).sum(), weight)
    exact = weight / torch.linalg.matrix_norm(weight.flatten(1), 2)
    (theirs,) = torch.autograd.grad((exact * direction).sum(), weight)
    torch.testing.assert_close(ours, theirs, atol=1e-4, rtol=1e-4)


def gan(**keys: Any) -> Any:
    """Build a small GAN."""
    return build(Gan(family="gan", width=4, depth=1, latent=3, **keys))


def test_each_phase_moves_its_own_network_alone() -> None:
    family = gan(spectral_norm=True, class_conditional=True)
    for phase, own, other in zip(
        family.phases(), ("discriminator", "generator"), ("generator", "discriminator"), strict=True
    ):
        family.module.zero_grad(set_to_none=True)
        phase.module.train()(images(), LABELS, SEEDS, 0)["loss"].sum().backward()
        assert all(parameter.grad is not None for parameter in getattr(family, own).parameters())
        assert all(parameter.grad is None for parameter in getattr(family, other).parameters())
        names = [name for name, _ in phase.module.named_parameters()]
        assert names == [name for name, _ in family.module.named_parameters() if name.startswith(own)]


@pytest.mark.parametrize("keys", [{"r1_gamma": 2.0}, {"loss": "wasserstein_gp", "gradient_penalty": 2.0}])
def test_penalties_are_of_each_sample_s_own_gradient(keys: dict[str, Any]) -> None:
    family = gan(**keys)
    phase = family.phases()[0].module
    penalised = phase.train()(images(), LABELS, SEEDS, 0)["loss"]
    plain = phase.eval()(images(), LABELS, SEEDS, 0)["loss"]
    assert bool((penalised > plain).all())
    if "r1_gamma" in keys:
        real = (2 * images() - 1).requires_grad_(True)
        (slope,) = torch.autograd.grad(family.discriminator(real, None).sum(), real)
        torch.testing.assert_close(penalised - plain, slope.flatten(1).square().sum(1))
    alone = phase.train()(images()[1:2], LABELS[1:2], SEEDS[1:2], 0)["loss"]
    torch.testing.assert_close(alone[0], penalised[1])


def test_several_engines_count_their_steps_apart() -> None:
    class Counter:
        def __init__(self, steps: int) -> None:
            self.steps_applied = steps

        def state_out(self) -> Any:
            yield from ()

        def state_in(self, read: Any, *, steps_applied: int) -> None:
            self.steps_applied = steps_applied

    saved = JointState([Counter(7), Counter(5)]).steps_applied
    engines = [Counter(0), Counter(0)]
    JointState(engines).state_in(lambda *_: torch.empty(0), steps_applied=saved)
    assert [engine.steps_applied for engine in engines] == [7, 5]


DDPM: dict[str, Any] = {
    "family": "ddpm",
    "block_out_channels": [4],
    "layers_per_block": 1,
    "norm_num_groups": 2,
    "timesteps": 10,
    "sampling_steps": 10,
}


def test_schedules_are_those_of_the_papers() -> None:
    from trainers.models.images.ddpm import build_scheduler

    linear = build_scheduler(Ddpm(**{**DDPM, "timesteps": 1000}), "ddpm", is_clipped=True)
    np.testing.assert_allclose(linear.betas, np.linspace(1e-4, 2e-2, 1000), rtol=1e-5)
    cosine = build_scheduler(Ddpm(**{**DDPM, "timesteps": 1000, "betas": "cosine"}), "ddpm", is_clipped=True)

    def wanted(step: int) -> float:
        return math.cos((step / 1000 + 0.008) / 1.008 * math.pi / 2) ** 2

    for step in (10, 500, 900):
        assert float(cosine.alphas_cumprod[step - 1]) == pytest.approx(wanted(step) / wanted(0), rel=1e-3)


@pytest.mark.parametrize("prediction", ["epsilon", "v", "x0"])
def test_a_perfect_prediction_gives_the_image_back(prediction: str) -> None:
    from trainers.models.images.ddpm import clean_of, target_of

    clean, noise = torch.randn(2, 2, 1, 3, 3, generator=torch.Generator().manual_seed(0))
    abar = torch.tensor([0.9, 0.2]).view(-1, 1, 1, 1)
    noisy = abar.sqrt() * clean + (1 - abar).sqrt() * noise
    torch.testing.assert_close(clean_of(prediction, target_of(prediction, clean, noise, abar), noisy, abar), clean)


@pytest.mark.parametrize("prediction", ["epsilon", "v", "x0"])
def test_min_snr_weights_are_the_same_error_of_the_image(prediction: str) -> None:
    from trainers.models.images.ddpm import clean_of, loss_weights, target_of

    settings = Ddpm(**DDPM, prediction=prediction, min_snr_gamma=5.0)  # type: ignore[arg-type]
    clean, noise, error = torch.randn(3, 2, 1, 3, 3, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    abar_B = torch.tensor([0.95, 0.3], dtype=torch.float64)
    abar = abar_B.view(-1, 1, 1, 1)
    noisy = abar.sqrt() * clean + (1 - abar).sqrt() * noise
    target = target_of(prediction, clean, noise, abar)
    weighted = loss_weights(abar_B, settings) * error.square().flatten(1).mean(1)
    of_image = (clean_of(prediction, target + error, noisy, abar) - clean).square().flatten(1).mean(1)
    torch.testing.assert_close(weighted, torch.tensor([5.0, 0.3 / 0.7], dtype=torch.float64) * of_image)


def test_the_likelihood_bound_is_the_sum_of_its_terms() -> None:
    from trainers.models.images.ddpm import build_scheduler
    from trainers.models.images.likelihood_bound import bound_terms, prior_term

    abar = build_scheduler(Ddpm(**DDPM), "ddpm", is_clipped=True).alphas_cumprod.double()
    clean = torch.full((1, 1, 1, 1), 0.2, dtype=torch.float64)
    recovered = torch.full_like(clean, 0.1)
    found = [float(bound_terms(abar, torch.tensor([step]), clean, recovered)) for step in range(10)]
    beta = 1 - abar / torch.cat([torch.ones(1, dtype=torch.float64), abar[:-1]])
    prior = 0.5 * (abar[-1] * 0.04 - abar[-1] - math.log(1 - abar[-1]))
    total = float(prior)
    for step in range(1, 10):
        before = abar[step - 1]
        mean_gap = before.sqrt() * beta[step] / (1 - abar[step]) * 0.1
        total += float(mean_gap**2 / (2 * beta[step] * (1 - before) / (1 - abar[step])))
    sd = float(beta[0].sqrt())
    edges = [0.5 * (1 + math.erf((0.1 + side / 255) / (sd * math.sqrt(2)))) for side in (1, -1)]
    total += -math.log(edges[0] - edges[1])
    assert sum(found) + float(prior_term(abar, clean)) == pytest.approx(total, rel=1e-6)


def test_the_bound_of_many_draws_is_that_of_every_timestep() -> None:
    """A network that always answers 0 recovers what the noisy image alone says."""
    from trainers.models.images.likelihood_bound import bound_terms, prior_term, strata

    family = build(Ddpm(**{**DDPM, "prediction": "v"}), ImageFacts(1, 4, 4, ()))
    for parameter in family.net.conv_out.parameters():
        torch.nn.init.zeros_(parameter)
    losses = family.module.eval()
    abar = losses._abar_T
    assert strata(10) == [(0, 1), (1, 2), (2, 4), (4, 8), (8, 10)]
    images = torch.full((4000, 1, 4, 4), 0.6)
    with torch.no_grad():
        found = losses(images, torch.zeros(4000, dtype=torch.long), torch.arange(4000), 0)["bits_per_dim"]
    clean = 2 * images - 1
    noise = torch.randn(clean.shape, generator=torch.Generator().manual_seed(0))
    wanted = prior_term(abar, clean)
    for step in range(len(abar)):
        noisy = abar[step].sqrt() * clean + (1 - abar[step]).sqrt() * noise
        recovered = (abar[step].sqrt() * noisy).clamp(-1, 1)
        wanted = wanted + bound_terms(abar, torch.full((4000,), step), clean, recovered)
    wanted = wanted / (16 * math.log(2))
    limit = 4.5 * math.hypot(float(found.std()), float(wanted.std())) / math.sqrt(4000)
    assert abs(float(found.mean() - wanted.mean())) < limit
    assert limit < 0.05 * float(wanted.mean())


def test_guidance_extrapolates_from_no_class_to_the_class() -> None:
    facts = ImageFacts(1, 4, 4, ("a", "b"))
    settings = Ddpm(**DDPM, class_conditional=True, guidance=3.0)
    from trainers.models.images.ddpm import predict

    family = build(settings, facts)
    noisy, steps = torch.randn(2, 1, 4, 4, generator=torch.Generator().manual_seed(0)), torch.tensor([5, 5])
    classes = torch.tensor([0, 1])
    with torch.no_grad():
        found = family._guided(noisy, steps, classes)
        aware = predict(family.net, noisy, steps, classes)
        blind = predict(family.net, noisy, steps, torch.tensor([2, 2]))
    torch.testing.assert_close(found, blind + 3 * (aware - blind))
    assert not torch.allclose(aware, blind)


@pytest.mark.parametrize("sampler", ["ddpm", "ddim", "dpm_solver"])
def test_samplers_recover_a_single_image(sampler: str) -> None:
    """The network that knows the only image there is leads every sampler to it."""
    facts = ImageFacts(1, 4, 4, ())
    settings = Ddpm(**{**DDPM, "timesteps": 100, "sampling_steps": 20}, sampler=sampler, prediction="x0")  # type: ignore[arg-type]
    family = build(settings, facts)
    wanted = torch.linspace(0.1, 0.9, 16).view(1, 4, 4)

    class Knows(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.scale = torch.nn.Parameter(torch.ones(()))

        def forward(self, noisy: torch.Tensor, steps: torch.Tensor, class_labels: Any) -> Any:
            from types import SimpleNamespace

            return SimpleNamespace(sample=(2 * wanted - 1).expand_as(noisy) * self.scale)

    family.net = Knows()
    for image in family.sample([1, 2]):
        torch.testing.assert_close(image, wanted, atol=0.05, rtol=0)
