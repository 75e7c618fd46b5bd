"""Rewards of images: named rules on the pixels, or what a frozen classifier says.

B images with pixels [B, C, H, W] in [0, 1].
"""

import zlib
from collections.abc import Callable

import torch
from torch import Tensor

from recipes.data.images import shape_rule
from recipes.errors import RequestError
from recipes.stages.ddpo import ClassReward, RuleReward
from trainers.inference.image_grid import to_pixels
from trainers.models.images.classifier import ClassifierFamily
from trainers.models.images.protocol import ImageFacts

ImageScorer = Callable[[Tensor, Tensor], Tensor]
"""Scores [B] of images [B, C, H, W], given the places of the classes that were asked for, -1 for none."""


def rule_scorer(reward: RuleReward) -> ImageScorer:
    """The scorer of a named rule."""
    rule = {"ink": ink, "symmetry": symmetry, "compressibility": compressibility}[reward.rule]
    sign = 1.0 if reward.direction == "more" else -1.0
    return lambda images_BCHW, labels_B: sign * rule(images_BCHW)


def ink(images_BCHW: Tensor) -> Tensor:
    """Mean of the pixels."""
    return images_BCHW.float().flatten(1).mean(1)


def symmetry(images_BCHW: Tensor) -> Tensor:
    """1 less the mean difference of a pixel and its mirror image."""
    images = images_BCHW.float()
    return 1 - (images - images.flip(3)).abs().flatten(1).mean(1)


def compressibility(images_BCHW: Tensor) -> Tensor:
    """Minus the bits of each 8-bit pixel in zlib's best compression."""
    pixels = to_pixels(images_BCHW).flatten(1).numpy()
    bits = [8 * len(zlib.compress(row.tobytes(), 9)) / row.size for row in pixels]
    return -torch.tensor(bits, device=images_BCHW.device)


def classifier_scorer(reward: ClassReward, judge: ClassifierFamily, actor: ImageFacts) -> ImageScorer:
    """The scorer of what a classifier says; raises RequestError for images of another shape."""
    if (finding := shape_rule(judge.facts.shape, actor.shape, "the actor")) is not None:
        raise RequestError(f"reward.classifier: {finding}")
    known = judge.facts.classes
    wanted = actor.classes if reward.label is None else (reward.label,)
    places = torch.tensor([known.index(name) for name in wanted])
    is_log = reward.value == "log_probability"

    @torch.no_grad()
    def score(images_BCHW: Tensor, labels_B: Tensor) -> Tensor:
        logits, _ = judge.net(images_BCHW)
        logprobs_BK = logits.float().log_softmax(-1)
        asked_B = torch.zeros_like(labels_B) if reward.label is not None else labels_B
        found = logprobs_BK.gather(1, places.to(labels_B.device)[asked_B][:, None])[:, 0]
        return found if is_log else found.exp()

    return score
