"""Denoising as a Markov decision process (Black et al. 2023, section 4.2): the ancestral sampler's steps as Gaussians.

B images, A denoising steps that are actions, C channels, H and W pixels or latents. abar: the product of 1 - beta.
"""

import math
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Chain:
    """Every step from noise to image: x_next ~ N(clean_S * x0 + noisy_S * x, sd_S^2), x0 predicted at `timesteps_S`.

    The last step has no noise; it is no action.
    """

    timesteps_S: Tensor
    clean_S: Tensor
    noisy_S: Tensor
    sd_S: Tensor

    @property
    def num_actions(self) -> int:
        """Steps with noise."""
        return len(self.sd_S) - 1


def build_chain(abar_T: Tensor, timesteps_S: Tensor, min_sd: float) -> Chain:
    """The chain over these timesteps, from the noisiest on (Ho et al. 2020, equations 6 and 7, over steps left out).

    The posterior's variance is DDIM's with eta 1 (Song et al. 2021, equation 16). No action has a deviation below
    `min_sd`, in sampling as in log-probabilities.
    """
    abar_S = abar_T.double()[timesteps_S]
    before_S = torch.cat([abar_S[1:], abar_S.new_ones(1)])
    if not bool((before_S > abar_S).all()):
        raise ValueError("timesteps must fall, and every step must take noise away")
    beta_S = 1 - abar_S / before_S
    sd_S = (beta_S * (1 - before_S) / (1 - abar_S)).sqrt()
    return Chain(
        timesteps_S=timesteps_S,
        clean_S=(before_S.sqrt() * beta_S / (1 - abar_S)).float(),
        noisy_S=((abar_S / before_S).sqrt() * (1 - before_S) / (1 - abar_S)).float(),
        sd_S=torch.cat([sd_S[:-1].clamp(min=max(min_sd, 1e-10)), sd_S[-1:]]).float(),
    )


def gaussian_logprobs(actions_BACHW: Tensor, means_BACHW: Tensor, sd_A: Tensor) -> Tensor:
    """Log-density [B, A] in nats of what was drawn, summed over an image's values."""
    sd = sd_A.double()
    scaled = (actions_BACHW - means_BACHW).double() / sd.view(1, -1, 1, 1, 1)
    size = math.prod(actions_BACHW.shape[2:])
    constant_A = size * (sd.log() + 0.5 * math.log(2 * math.pi))
    return -0.5 * scaled.square().flatten(2).sum(2) - constant_A


def scaled_norms(means_BACHW: Tensor, sd_A: Tensor) -> Tensor:
    """Norm [B, A] of each mean in deviations."""
    return (means_BACHW.double() / sd_A.double().view(1, -1, 1, 1, 1)).flatten(2).norm(dim=2)


def gaussian_kl(means_BACHW: Tensor, reference_means_BACHW: Tensor, sd_A: Tensor) -> Tensor:
    """KL [B, A] in nats between Gaussians of one deviation: half the squared distance of the means in deviations."""
    scaled = (means_BACHW - reference_means_BACHW).double() / sd_A.double().view(1, -1, 1, 1, 1)
    return 0.5 * scaled.square().flatten(2).sum(2)
