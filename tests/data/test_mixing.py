"""Mixup and cutmix: pixels and labels go together, and a row's draw is its own."""

from __future__ import annotations

import pytest
import torch

from laconic.data.images.mixing import Mixing, _beta_quantiles, soft_labels

CLASSES, SIZE = 6, 12


def _batch(rows: int = 48) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Images whose channel c is 1 where the label is c: the mean of a channel is how much of that class is in the picture."""
    labels = torch.arange(rows) % CLASSES
    pixels = torch.nn.functional.one_hot(labels, CLASSES).float()[:, :, None, None].expand(-1, -1, SIZE, SIZE)
    return pixels.contiguous(), labels, torch.arange(rows) + 1000


@pytest.mark.parametrize("settings", [{"mixup": 0.8}, {"cutmix": 1.0}, {"mixup": 0.3, "cutmix": 0.7, "probability": 0.7}])
def test_a_rows_label_is_what_its_picture_shows(settings: dict[str, float]) -> None:
    pixels, labels, ids = _batch()
    mixed = Mixing(**settings, seed=3)(pixels, soft_labels(labels, CLASSES), 5, ids)
    torch.testing.assert_close(mixed.labels, mixed.pixel_values.mean((2, 3)), atol=1e-6, rtol=0)
    torch.testing.assert_close(mixed.labels.sum(1), torch.ones(len(labels)))
    assert int((mixed.labels.amax(1) < 0.999).sum()) > len(labels) // 3


def test_every_row_is_the_partner_of_one_other() -> None:
    pixels, labels, ids = _batch(6)
    mixed = Mixing(mixup=0.8)(pixels, soft_labels(labels, CLASSES), 0, ids)
    own = mixed.labels.gather(1, labels[:, None])[:, 0]
    theirs = mixed.labels.gather(1, labels.roll(1)[:, None])[:, 0]
    torch.testing.assert_close(own + theirs, torch.ones(6))


def test_a_row_draws_alike_in_any_batch_and_anew_each_step() -> None:
    pixels, labels, ids = _batch()
    mixing = Mixing(mixup=0.8, cutmix=1.0, probability=0.8, seed=1)

    def own(rows: slice, step: int = 7) -> torch.Tensor:
        mixed = mixing(pixels[rows], soft_labels(labels[rows], CLASSES), step, ids[rows])
        return mixed.labels.gather(1, labels[rows][:, None])[:, 0]

    whole = own(slice(None))
    assert torch.equal(whole, torch.cat([own(slice(0, 24)), own(slice(24, 48))]))
    assert not torch.equal(whole, own(slice(None), step=8))


def test_rows_that_are_not_mixed_stay_bit_for_bit() -> None:
    _, labels, ids = _batch(400)
    pixels = torch.randn(400, 1, SIZE, SIZE)
    soft = soft_labels(labels, CLASSES)
    mixed = Mixing(mixup=1.0, cutmix=1.0, probability=0.25)(pixels, soft, 0, ids)
    same = (mixed.pixel_values == pixels).flatten(1).all(1)
    assert torch.equal((mixed.labels == soft).all(1), same)
    assert float(same.float().mean()) == pytest.approx(0.75, abs=0.08)


def test_cutmix_pastes_one_rectangle_of_the_partner() -> None:
    _, labels, ids = _batch()
    pixels = torch.randn(48, 1, SIZE, SIZE)
    mixed = Mixing(cutmix=1.0)(pixels, soft_labels(labels, CLASSES), 2, ids).pixel_values
    pasted = (mixed != pixels)[:, 0]
    assert torch.equal(mixed[:, 0][pasted], pixels.roll(1, 0)[:, 0][pasted])
    assert torch.equal(pasted, pasted.any(2)[:, :, None] & pasted.any(1)[:, None, :])
    for side in (pasted.any(1), pasted.any(2)):
        assert int(side.int().diff(dim=1).abs().sum(1).max()) <= 2


@pytest.mark.parametrize("alpha", [0.2, 1.0, 4.0])
def test_shares_follow_beta(alpha: float) -> None:
    table = _beta_quantiles(alpha)
    assert float(table.mean()) == pytest.approx(0.5, abs=1e-3)
    assert float(table.var()) == pytest.approx(1 / (4 * (2 * alpha + 1)), rel=1e-2)


def test_smoothing_spreads_its_share_over_all_classes() -> None:
    expected = torch.tensor([[0.025, 0.925, 0.025, 0.025]])
    torch.testing.assert_close(soft_labels(torch.tensor([1]), 4, 0.1), expected)
