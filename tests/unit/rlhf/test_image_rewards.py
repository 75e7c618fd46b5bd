"""Rewards of images against numbers worked out by hand."""

import zlib
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from recipes.errors import RequestError
from recipes.stages.ddpo import ClassReward, RuleReward
from rlhf.images.rewards import classifier_scorer, rule_scorer
from trainers.models.images.protocol import ImageFacts

LEFT = torch.tensor([[1.0, 0.0], [1.0, 0.5]])
EVEN = torch.tensor([[0.25, 0.25], [0.5, 0.5]])
IMAGES = torch.stack([LEFT, EVEN])[:, None]
NONE = torch.full((2,), -1)


def test_rules_by_hand() -> None:
    ink = rule_scorer(RuleReward(rule="ink"))(IMAGES, NONE)
    assert ink.tolist() == pytest.approx([0.625, 0.375])
    symmetry = rule_scorer(RuleReward(rule="symmetry"))(IMAGES, NONE)
    assert symmetry.tolist() == pytest.approx([1 - (1 + 0.5) / 2, 1.0])
    less = rule_scorer(RuleReward(rule="ink", direction="less"))(IMAGES, NONE)
    assert torch.equal(less, -ink)


def test_an_even_image_takes_fewer_bits_than_noise() -> None:
    noise = torch.rand(1, 1, 16, 16, generator=torch.Generator().manual_seed(0))
    images = torch.cat([noise, torch.full_like(noise, 0.5)])
    found = rule_scorer(RuleReward(rule="compressibility"))(images, NONE)
    assert found[1] == pytest.approx(-8 * len(zlib.compress(bytes([128] * 256), 9)) / 256)
    assert found[0] < found[1] < 0


def judge(*classes: str) -> Any:
    """A classifier of one pixel whose logits are that pixel times 0, 1, 2, ..."""

    def net(images: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        return images.flatten(1)[:, :1] * torch.arange(len(classes)), images

    return SimpleNamespace(facts=ImageFacts(1, 2, 2, classes), net=net)


def test_the_class_is_found_by_its_name() -> None:
    actor = ImageFacts(1, 2, 2, ("b", "c"))
    score = classifier_scorer(ClassReward(classifier="judge", value="probability"), judge("a", "b", "c"), actor)
    shares = torch.tensor([0.0, 1.0, 2.0]).softmax(0)
    found = score(IMAGES[:1].repeat(2, 1, 1, 1), torch.tensor([1, 0]))
    assert found.tolist() == pytest.approx([float(shares[2]), float(shares[1])])
    fixed = classifier_scorer(ClassReward(classifier="judge", label="a"), judge("a", "b", "c"), actor)
    assert float(fixed(IMAGES[:1], NONE[:1])) == pytest.approx(float(shares[0].log()))


def test_a_classifier_of_images_of_another_shape_is_refused() -> None:
    with pytest.raises(RequestError, match=r"^reward.classifier: .* 2x2 with 1 channel .* 8x8 with 1 channel"):
        classifier_scorer(ClassReward(classifier="judge"), judge("a"), ImageFacts(1, 8, 8, ("a",)))
