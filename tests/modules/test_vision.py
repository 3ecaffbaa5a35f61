"""What the invariants of images have beside those that all kinds of models share."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor, nn

from laconic import decompress
from tests.matrix import BACKBONES, FAMILIES, METHODS, PAIRS, Method, compressed, images, traced
from tests.thin import pairs, thinned

each_family = pytest.mark.parametrize("family", BACKBONES)


class _Given(nn.Module):
    """Stands for the embeddings, so that a test can place padding anywhere."""

    def __init__(self, hidden: Tensor, like: nn.Module) -> None:
        super().__init__()
        self.hidden, self.patch_embeddings = hidden, like.patch_embeddings

    def forward(self, *args: object, **kwargs: object) -> Tensor | tuple[Tensor, None, None]:
        return (self.hidden, None, None) if "noise" in kwargs else self.hidden


PADDED = [pair for pair in PAIRS if FAMILIES[pair[0]].padded and not pair[1].positional]


@pairs(PADDED, thinned(PADDED, ["vit"], ["learned"]))
def test_5_left_and_right_padding_are_alike(family: str, method: Method) -> None:
    # A bias by place makes left and right differ by design; BEiT is tested without it.
    model = compressed(family, method, 0.5, 0.6, **({"use_relative_position_bias": False} if family == "beit" else {}))
    prefix, real, padding = FAMILIES[family].prefix, 9, 4
    base = model.adapter.base(model)
    tokens, filler = torch.randn(2, prefix + real, 16), torch.randn(2, padding, 16)
    embeddings = base.embeddings
    outputs = []
    for order, mask in (
        ([tokens, filler], [1] * (prefix + real) + [0] * padding),
        ([tokens[:, :prefix], filler, tokens[:, prefix:]], [1] * prefix + [0] * padding + [1] * real),
    ):
        base.embeddings = _Given(torch.cat(order, 1), embeddings)
        outputs.append(traced(model, images(2), attention_mask=torch.tensor([mask, mask]))[0])
    base.embeddings = _Given(tokens, embeddings)
    outputs.append(traced(model, images(2))[0])
    torch.testing.assert_close(outputs[0], outputs[1], atol=1e-5, rtol=1e-4)
    torch.testing.assert_close(outputs[0], outputs[2], atol=1e-5, rtol=1e-4)


@each_family
def test_replaying_decisions_repeats_a_random_forward(family: str) -> None:
    method = next(method for method in METHODS if method.name == "random")
    model = compressed(family, method, 0.5, 0.6)
    logits, trace = traced(model, images(), step=1)
    other, again = traced(model, images(), step=2)
    replayed, _ = traced(model, images(), step=2, replay=trace.decisions())
    assert torch.equal(logits, replayed)
    assert not torch.equal(logits, other)
    assert not torch.equal(again.routings["before_1"].decision.index, trace.routings["before_1"].decision.index)


@each_family
def test_a_deep_copy_is_independent(family: str) -> None:
    model = compressed(family, METHODS[0], 0.5, 0.6)
    twin = copy.deepcopy(model)
    expected, _ = traced(model, images())
    decompress(twin)
    assert torch.equal(traced(model, images())[0], expected)
