"""Random augmentation: sizes and modes stay, strength 0 does nothing, and everything is drawn by the row."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from laconic.data.images.augmentation import NAMES, OPERATIONS, erase
from laconic.data.images.random_augment import RandomAugment
from laconic.data.images.transform import ImageTransform
from tests.data.folders import picture

STRENGTHLESS = {"auto_contrast", "equalize"}


@pytest.mark.parametrize("mode", ["RGB", "L"])
@pytest.mark.parametrize("name", NAMES)
def test_an_operation_keeps_size_and_mode_and_its_strength_counts(name: str, mode: str) -> None:
    # Not square, so that width and height cannot be confused.
    image = picture(0, 24).crop((0, 0, 24, 16)).convert(mode)
    fill = (10, 20, 30) if mode == "RGB" else 10
    weak, strong, other = (OPERATIONS[name](image, strength, sign, fill) for strength, sign in ((0.0, 1.0), (1.0, 1.0), (1.0, -1.0)))
    for result in (weak, strong, other):
        assert (result.size, result.mode) == ((24, 16), mode)
    if name not in STRENGTHLESS:
        assert weak.tobytes() == image.tobytes()
    if name not in STRENGTHLESS | {"identity", "color"}:
        assert strong.tobytes() != image.tobytes()
    if name.startswith(("rotate", "shear", "translate", "contrast", "brightness", "sharpness")):
        assert strong.tobytes() != other.tobytes()


def test_translation_moves_by_the_share_it_says_and_fills_with_the_colour() -> None:
    image = picture(0, 20)
    moved = np.asarray(OPERATIONS["translate_x"](image, 1.0, 1.0, (1, 2, 3)))
    assert np.array_equal(moved[:, :11], np.asarray(image)[:, 9:])
    assert (moved[:, 11:] == (1, 2, 3)).all()


def test_augmentation_is_drawn_by_the_row() -> None:
    transform, image = ImageTransform(16, random_augment=RandomAugment(2, 9), erase=0.5), picture(0, 40)
    draws = [transform(image, np.random.default_rng(seed)) for seed in (1, 1, 2, 3, 4)]
    assert torch.equal(draws[0], draws[1])
    assert len({item.numpy().tobytes() for item in draws}) > 2
    assert torch.equal(transform(image, None), ImageTransform(16)(image, None))


def test_erasing_covers_one_box_of_a_moderate_area() -> None:
    pixels, shares = np.zeros((30, 30, 3), np.float32), []
    for seed in range(200):
        covered = (erase(pixels, 0.5, np.random.default_rng(seed)) != 0).any(-1)
        assert np.array_equal(covered, covered.any(1)[:, None] & covered.any(0)[None])
        shares.append(covered.mean())
    hit = [share for share in shares if share]
    assert len(hit) / len(shares) == pytest.approx(0.5, abs=0.1)
    assert 0.01 < min(hit) < max(hit) < 0.37
    assert not pixels.any()


@pytest.mark.parametrize(("settings", "message"), [({"operations": 0}, "must be at least 1"), ({"magnitude": 11}, "must be from 0 to 10")])
def test_what_cannot_be_is_refused(settings: dict[str, int], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        RandomAugment(**settings)
