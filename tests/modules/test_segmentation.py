"""Heads for semantic segmentation, and tokens that learn the labels of their own pixels."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional
from transformers import AutoConfig, PreTrainedModel

from laconic import CompressionConfig, StageConfig, Trace, compress, decompress, from_pretrained
from laconic.modules.backbones.vit import ViTLayers
from laconic.modules.cost.cost import CostModel
from laconic.modules.estimators.token_labels import TokenLabelsEstimator, patch_labels
from laconic.modules.heads import own_models
from laconic.modules.scorers.base import Scored
from laconic.modules.site import SiteInput
from laconic.modules.tokens.decision import Decision
from laconic.modules.tokens.state import TokenState
from tests.matrix import BACKBONES, images

CLASSES, LAYERS = 5, 3
HEADS = [name for name in sorted(own_models()) if own_models()[name].config_class.model_type in BACKBONES]


def _model(name: str) -> PreTrainedModel:
    torch.manual_seed(0)
    cls = own_models()[name]
    config = AutoConfig.for_model(
        cls.config_class.model_type, image_size=24, patch_size=4, hidden_size=16, num_hidden_layers=LAYERS, num_attention_heads=2,
        num_labels=CLASSES, initializer_range=0.3,
    )  # fmt: skip
    config.intermediate_size, config.mlp_ratio = 32, 2
    return cls(config).eval()


def _labels(rows: int = 3) -> Tensor:
    labels = torch.randint(0, CLASSES, (rows, 24, 24), generator=torch.Generator().manual_seed(0))
    labels[:, :5] = 255
    return labels


def _stage(keep: float, scorer: object = "random", merger: str = "drop") -> CompressionConfig:
    return CompressionConfig([StageConfig(layer=1, keep=keep, scorer=scorer, merger=merger)], restore={"layer": LAYERS})  # type: ignore[arg-type]


@pytest.mark.parametrize("name", HEADS)
def test_logits_are_one_a_pixel_and_the_loss_leaves_ignored_pixels_out(name: str) -> None:
    model, labels = _model(name), _labels()
    out = model(pixel_values=images(), labels=labels)
    assert out.logits.shape == (3, CLASSES, 24, 24)
    torch.testing.assert_close(out.loss, functional.cross_entropy(out.logits, labels, ignore_index=255))
    torch.testing.assert_close(model(pixel_values=images(), labels=torch.full_like(labels, 255)).loss, torch.tensor(0.0))
    with pytest.raises(ValueError, match=r"labels of shape \(3, 12, 12\) must be a class for each pixel"):
        model(pixel_values=images(), labels=labels[:, ::2, ::2])


@pytest.mark.parametrize("name", HEADS)
@pytest.mark.parametrize(("scorer", "merger"), [("random", "drop"), ("bipartite", "bipartite")])
def test_a_model_that_keeps_all_answers_as_the_dense_one_does(name: str, scorer: str, merger: str) -> None:
    model = _model(name)
    before = model(pixel_values=images()).logits
    assert torch.equal(compress(model, _stage(1.0, scorer, merger))(pixel_values=images()).logits, before)
    assert torch.equal(decompress(model)(pixel_values=images()).logits, before)


@pytest.mark.parametrize("name", HEADS)
def test_a_dropped_token_answers_with_the_state_that_it_had(name: str) -> None:
    model = compress(_model(name), _stage(0.5))
    trace = Trace()
    hidden: list[Tensor] = []
    base = model.adapter.base(model)  # type: ignore[attr-defined]
    base.layernorm.register_forward_hook(lambda module, given, out: hidden.append(given[0]))
    model(pixel_values=images(), trace=trace)
    gone = ~trace.routings["before_1"].kept_mask
    assert trace.flow().shortest is not None
    assert trace.flow().shortest.tokens < hidden[0].shape[1] == 37
    plain: list[Tensor] = []
    dense = decompress(model)
    model.base_model.layernorm._forward_hooks.clear()
    layers = dense.base_model.layers if hasattr(dense.base_model, "layers") else dense.base_model.encoder.layer
    layers[1].register_forward_pre_hook(lambda module, given: plain.append(given[0]))
    dense(pixel_values=images())
    assert torch.equal(hidden[0][gone], plain[0][gone])
    assert not torch.equal(hidden[0][~gone], plain[0][~gone])


@pytest.mark.parametrize("name", HEADS)
def test_a_segmentation_model_is_saved_loaded_and_costed(name: str, tmp_path: Path) -> None:
    model = _model(name)
    dense = CostModel(model)()
    assert (
        dense.dense_macs - CostModel(model).shape.embed_macs
        == sum(map(CostModel(model).shape.layer_macs, dense.layers)) + 36 * 16 * CLASSES
    )
    model.save_pretrained(tmp_path / "dense")
    again = own_models()[name].from_pretrained(tmp_path / "dense").eval()
    assert torch.equal(again(pixel_values=images()).logits, model(pixel_values=images()).logits)
    compress(model, _stage(0.5, {"name": "evidence", "reads": "pixels"})).save_pretrained(tmp_path / "short")
    loaded = from_pretrained(tmp_path / "short")
    assert torch.equal(loaded(pixel_values=images()).logits, model(pixel_values=images()).logits)


@pytest.mark.parametrize("name", HEADS)
def test_a_head_of_all_patches_refuses_stages_that_leave_it_short(name: str) -> None:
    stages = [StageConfig(layer=layer, keep=0.5, scorer="random") for layer in (1, 2)]
    for restore, short in ((None, "before_1, before_2"), ({"layer": 2}, "before_2")):
        with pytest.raises(ValueError, match=rf"stages {short} remove tokens; give compression.restore = {{layer: 3"):
            compress(_model(name), CompressionConfig(stages, restore))  # type: ignore[arg-type]


def test_a_patch_s_label_is_the_share_of_each_class_among_its_labelled_pixels() -> None:
    labels = torch.tensor([[[0, 0, 1, 255, 9], [2, 0, 255, 255, 9], [255, 255, 2, 2, 9], [255, 255, 1, 0, 9]]])
    expected = torch.tensor([[0, 0, 0], [0.75, 0, 0.25], [0, 1, 0], [0, 0, 0], [0.25, 0.25, 0.5]])
    # The fifth column fills no patch.
    assert torch.equal(patch_labels(labels, (2, 2), 3), expected[None, 1:])


def test_tokens_learn_their_own_labels_wherever_earlier_stages_have_moved_them() -> None:
    state = TokenState.initial(2, 5, 1, None, torch.device("cpu")).select(torch.tensor([[0, 2, 4], [0, 1, 3]]), None)
    answers = torch.randn(2, 3, 3).log_softmax(1)
    own = torch.zeros(2, 5, 3)
    own[0, 2, 1], own[0, 4, 0], own[1, 1] = 1, 1, torch.tensor([0.5, 0.0, 0.5])
    trace = Trace(labels=own)
    site = SiteInput(torch.zeros(2, 3, 1), state, trace, trace.flow(), 0, nn.Identity(), ViTLayers)
    decision = Decision(torch.zeros(2, 1, dtype=torch.long), None)
    estimate = TokenLabelsEstimator(weight=2.0)(site, Scored(torch.zeros(2, 3), answers=answers), decision)
    # The token at position 3 of row 1 has no label.
    heard = [answers[0, 1, 1], answers[0, 0, 2], 0.5 * answers[1, 0, 1] + 0.5 * answers[1, 2, 1]]
    torch.testing.assert_close(estimate.loss, -2.0 * torch.stack(heard).mean())


def test_evidence_trained_on_pixels_finds_the_patches_that_are_not_like_the_rest() -> None:
    model = compress(_model("ViTForSemanticSegmentation"), _stage(0.25, {"name": "evidence", "reads": "pixels"})).train()
    pixels, labels = torch.randn(64, 3, 24, 24) * 0.1, torch.zeros(64, 24, 24, dtype=torch.long)
    for row in range(64):
        top, left = 4 * (row % 6), 4 * (row // 6 % 6)
        pixels[row, :, top : top + 4, left : left + 4] += torch.linspace(-2, 2, 4)
        labels[row, top : top + 4, left : left + 4] = 3
    optimizer = torch.optim.Adam([p for name, p in model.named_parameters() if ".stages." in name], lr=0.05)
    for _ in range(30):
        trace = Trace(labels=labels)
        model(pixel_values=pixels, trace=trace)
        assert trace.auxiliary_loss is not None
        optimizer.zero_grad()
        trace.auxiliary_loss.backward()
        optimizer.step()
    best = trace.routings["before_1"].scores[:, 1:].argmax(1)
    assert torch.equal(best, patch_labels(labels, (6, 6), CLASSES)[..., 3].argmax(1))
