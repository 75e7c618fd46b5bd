"""The variational bound on the likelihood of a diffusion (Ho et al. 2020, equation 5), term by term (pure).

B samples, C channels, H and W pixels, T steps of the noising process. abar: the product of 1 - beta.
"""

from itertools import pairwise

import torch
from torch import Tensor


def strata(num_steps: int) -> list[tuple[int, int]]:
    """Cut the timesteps into [0, 1), [1, 2), [2, 4), [4, 8) and so on."""
    edges = [0, *(1 << power for power in range(num_steps.bit_length()) if 1 << power < num_steps), num_steps]
    return list(pairwise(edges))


def bound_terms(abar_T: Tensor, timesteps_B: Tensor, clean: Tensor, recovered: Tensor) -> Tensor:
    """Return the terms [B] of the variational bound (Ho et al. 2020, equation 5) at the timesteps, in nats.

    Term t > 0 is a KL between Gaussians of the posterior's variance; term 0 the likelihood of 8-bit values.
    """
    shape = (-1, 1, 1, 1)
    abar = abar_T[timesteps_B].view(shape)
    before = torch.where(timesteps_B > 0, abar_T[(timesteps_B - 1).clamp(min=0)], torch.ones_like(abar_T[0])).view(
        shape
    )
    beta = 1 - abar / before
    posterior_variance = beta * (1 - before) / (1 - abar)
    factor = before.sqrt() * beta / (1 - abar)
    kl = (factor * (clean - recovered)).square() / (2 * posterior_variance.clamp(min=1e-20))
    sd = beta.sqrt()
    upper, lower = (recovered.new_tensor(edge) / 255 for edge in (1, -1))
    normal = torch.distributions.Normal(0.0, 1.0)
    above = torch.where(clean > 0.999, torch.ones_like(clean), normal.cdf((clean + upper - recovered) / sd))
    below = torch.where(clean < -0.999, torch.zeros_like(clean), normal.cdf((clean + lower - recovered) / sd))
    decoder = -(above - below).clamp(min=1e-12).log()
    return torch.where(timesteps_B > 0, kl.flatten(1).sum(1), decoder.flatten(1).sum(1))


def prior_term(abar_T: Tensor, clean: Tensor) -> Tensor:
    """Return the bound's last term [B] in nats: how far the noisiest image still is from noise alone."""
    last = abar_T[-1]
    return 0.5 * (last * clean.square() - last - (1 - last).log()).flatten(1).sum(1)
