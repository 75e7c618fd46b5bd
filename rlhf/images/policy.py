"""The policy that draws and its frozen start as one module: trajectories, and what each says of them.

B images, A denoising steps that are actions, S = A + 1 steps, C channels, H and W pixels or latents.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn

from rlhf.algorithms.denoising import Chain, build_chain, gaussian_kl, gaussian_logprobs, scaled_norms
from rlhf.experience import gather_rows
from rlhf.text.policy import switch_dropout_off
from trainers.data.batches import Texts
from trainers.models.images.ddpm import DdpmFamily, build_scheduler
from trainers.models.images.text_encoder import TextStates
from trainers.models.lora import active_adapters, adapter_layers
from trainers.runtime.observer import Watch
from trainers.runtime.randomness import normals

ImageRole = Literal["actor", "reference"]
DENOISING = 1
"""Stream of an image's noise: its start, then every action's."""


@dataclass(frozen=True)
class Trajectories:
    """Images on their way from noise."""

    states_BSCHW: Tensor
    """The start, then what every action led to."""
    labels_B: Tensor
    """Places of the classes that were asked for; -1 where the model knows none."""
    sample_ids_B: Tensor
    """Numbers of the images among all that the stage draws."""
    captions: Texts | None = None
    """What was asked for in words, where the model reads them; as wide for all images of an iteration."""

    @property
    def action_mask_BA(self) -> Tensor:
        """Every step but the last one of each image is an action."""
        count, steps = self.states_BSCHW.shape[:2]
        return torch.ones(count, steps - 1, dtype=torch.bool, device=self.states_BSCHW.device)

    def rows(self, index: Sequence[int]) -> "Trajectories":
        """These images."""
        chosen = torch.as_tensor(index, device=self.labels_B.device)
        return self._changed(lambda part: part[chosen])

    def gathered(self) -> "Trajectories":
        """Every rank's images in rank order; collective."""
        return self._changed(gather_rows)

    def _changed(self, change: Callable[[Tensor], Tensor]) -> "Trajectories":
        texts = self.captions
        captions = None if texts is None else Texts(change(texts.input_ids_BT), change(texts.attention_mask_BT))
        return Trajectories(change(self.states_BSCHW), change(self.labels_B), change(self.sample_ids_B), captions)


class ImageModels(nn.Module):
    """Two diffusion models over the chain of the actor's sampling steps; the reference is frozen.

    Without a `reference` the actor has adapters, and its network under none of them is the reference.
    """

    def __init__(self, actor: DdpmFamily, reference: DdpmFamily | None, min_sd: float) -> None:
        super().__init__()
        self._families = {"actor": actor}
        self._adapter_layers = adapter_layers(actor.net)
        if reference is not None:
            reference.net.requires_grad_(False)
            self._families["reference"] = reference
        elif not self._adapter_layers:
            raise ValueError("without a reference the actor must have adapters")
        self.networks = nn.ModuleDict({role: family.net for role, family in self._families.items()})
        switch_dropout_off(self)
        scheduler = build_scheduler(actor.settings, "ddpm", is_clipped=True)
        scheduler.set_timesteps(actor.settings.sampling_steps)
        self.chain: Chain = build_chain(scheduler.alphas_cumprod, scheduler.timesteps.long(), min_sd)

    def forward(self, trajectories: Trajectories, roles: tuple[ImageRole, ...]) -> dict[str, Tensor]:
        """Give the fields of `ModelOutputs` that the roles fill as a dict; sharded engines find tensors in one."""
        states, sd_A = trajectories.states_BSCHW, self.chain.sd_S[:-1].to(trajectories.states_BSCHW.device)
        before, actions = states[:, :-1], states[:, 1:]
        text = self._read(trajectories.captions)
        means = {role: self._means(role, before, trajectories.labels_B, text) for role in roles}
        found: dict[str, Tensor] = {}
        if "actor" in means:
            found["logprobs_BA"] = gaussian_logprobs(actions, means["actor"], sd_A)
            found["distances_BA"] = scaled_norms(means["actor"].detach(), sd_A)
        if "reference" in means:
            found["reference_logprobs_BA"] = gaussian_logprobs(actions, means["reference"], sd_A)
        if len(means) == 2:
            found["kl_BA"] = gaussian_kl(means["actor"], means["reference"], sd_A)
        return found

    @torch.no_grad()
    def draw(
        self, seeds: Sequence[int], labels_B: Tensor, captions: Texts | None = None, watch: Watch | None = None
    ) -> tuple[Tensor, Tensor]:
        """Draw from the actor, every parameter in place: states [B, S, C, H, W] and images in [0, 1].

        `watch` hears of every step, and may raise.

        Each image depends on its seed and its label or caption alone.
        """
        actor, chain = self._families["actor"], self.chain
        like = torch.empty(0, device=labels_B.device)
        noise_BSCHW = normals(torch.tensor(list(seeds)), DENOISING, (chain.num_actions + 1, *actor.state_shape), like)
        states, text = [noise_BSCHW[:, 0]], self._read(captions)
        for step in range(chain.num_actions):
            if watch is not None:
                watch(step / chain.num_actions)
            mean = self._means("actor", states[-1][:, None], labels_B, text, first=step)[:, 0]
            states.append(mean + float(chain.sd_S[step]) * noise_BSCHW[:, step + 1])
        last = self._means("actor", states[-1][:, None], labels_B, text, first=chain.num_actions)[:, 0]
        return torch.stack(states, dim=1), actor.images_of(last)

    @contextmanager
    def _playing(self, role: ImageRole) -> Iterator[DdpmFamily]:
        """Give the role's model, with adapters on its network where it is the actor's."""
        if role in self._families:
            yield self._families[role]
            return
        actor = self._families["actor"]
        with active_adapters(actor.net, (), self._adapter_layers):
            yield actor

    def _read(self, captions: Texts | None) -> TextStates | None:
        """Read captions by the frozen text encoder that both models share."""
        return None if captions is None else self._families["actor"].condition(captions)

    def _means(
        self, role: ImageRole, states_BACHW: Tensor, labels_B: Tensor, text: TextStates | None, first: int = 0
    ) -> Tensor:
        """Means of the steps that follow the states, which stand before the steps from `first` on."""
        count, length = states_BACHW.shape[:2]
        device = states_BACHW.device
        steps = slice(first, first + length)
        timesteps = self.chain.timesteps_S[steps].to(device).repeat(count)
        labels = labels_B.repeat_interleave(length) if self._families["actor"].is_conditional else None
        given = None if text is None else text.repeated(length)
        with self._playing(role) as family:
            clean = family.predicted_clean(states_BACHW.flatten(0, 1), timesteps, labels, given)
        shape = (1, -1, 1, 1, 1)
        clean_A, noisy_A = (c[steps].to(device).view(shape) for c in (self.chain.clean_S, self.chain.noisy_S))
        return clean_A * clean.unflatten(0, (count, length)) + noisy_A * states_BACHW
