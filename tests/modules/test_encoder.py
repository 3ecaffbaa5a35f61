"""From a pretrained ViT-MAE to a ViT: every weight of the encoder arrives, and nothing else does."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from transformers import ViTConfig, ViTForImageClassification, ViTMAEForPreTraining, ViTModel

from laconic import CompressionConfig, StageConfig, compress
from laconic.modules.checkpoints.from_mae import encoder_config, load_encoder, load_routers
from tests.modules.test_masked_images import PATCHES, dense, images, stages


def _classifier(folder: Path) -> ViTForImageClassification:
    torch.manual_seed(9)
    config = encoder_config(folder)
    config.num_labels = 4
    return ViTForImageClassification(config)


@pytest.mark.parametrize("compressed", [False, True])
def test_every_weight_of_the_encoder_arrives_and_the_head_stays(tmp_path: Path, compressed: bool) -> None:
    mae = compress(dense(), stages(0.5, scorer="learned")) if compressed else dense()
    mae.save_pretrained(tmp_path)
    vit = _classifier(tmp_path)
    before = vit.classifier.weight.clone()
    assert not torch.equal(vit.vit.layers[0].mlp.fc1.weight, mae.vit.layers[0].mlp.fc1.weight)
    load_encoder(vit, tmp_path)
    theirs = {name: value for name, value in mae.vit.named_parameters() if ".stages." not in name}
    assert theirs.keys() == dict(vit.vit.named_parameters()).keys()
    assert all(torch.equal(value, theirs[name]) for name, value in vit.vit.named_parameters())
    assert torch.equal(vit.classifier.weight, before)
    assert vit.vit.embeddings.position_embeddings.requires_grad


def test_the_vit_computes_what_the_encoder_does_without_masking(tmp_path: Path) -> None:
    mae = dense(mask_ratio=0.0)
    mae.save_pretrained(tmp_path)
    vit = ViTModel(encoder_config(tmp_path), add_pooling_layer=False).eval()
    load_encoder(vit, tmp_path)
    in_order = torch.arange(float(PATCHES)).expand(3, -1)
    torch.testing.assert_close(vit(images()).last_hidden_state, mae.vit(images(), noise=in_order).last_hidden_state)


def test_an_encoder_without_its_decoder_and_a_vit_with_a_pooler_do_too(tmp_path: Path) -> None:
    mae = dense()
    mae.vit.save_pretrained(tmp_path)
    vit = ViTModel(encoder_config(tmp_path))
    load_encoder(vit, tmp_path)
    assert torch.equal(vit.layernorm.weight, mae.vit.layernorm.weight)
    assert torch.equal(vit.layers[2].attention.q_proj.weight, mae.vit.layers[2].attention.q_proj.weight)


def test_routers_of_the_pretraining_can_be_taken_over(tmp_path: Path) -> None:
    mae = compress(dense(), stages(0.5, 0.5, scorer="learned"))
    mae.save_pretrained(tmp_path)
    vit = _classifier(tmp_path)
    load_encoder(vit, tmp_path)
    # With another keep: that is no weight.
    kept = compress(vit, CompressionConfig([StageConfig(layer=1, keep=0.25, scorer="learned")]))
    load_routers(kept, tmp_path)
    ours, theirs = (dict(model.vit.layers[1].stages.before.named_parameters()) for model in (kept, mae))
    assert ours
    assert all(torch.equal(value, theirs[name]) for name, value in ours.items())
    other = compress(_classifier(tmp_path), CompressionConfig([StageConfig(layer=2, keep=0.25, scorer="learned")]))
    with pytest.raises(ValueError, match="stage 'before_2' was not there in the pretraining of .*: its stages are before_0, before_1"):
        load_routers(other, tmp_path)
    other = compress(_classifier(tmp_path), CompressionConfig([StageConfig(layer=1, keep=0.25, scorer="random")]))
    with pytest.raises(ValueError, match="stage 'before_1': its scorer differ"):
        load_routers(other, tmp_path)


def test_what_is_no_pretrained_encoder_is_refused_by_name(tmp_path: Path) -> None:
    vit = ViTForImageClassification(ViTConfig(hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=32))
    vit.save_pretrained(tmp_path / "vit")
    with pytest.raises(ValueError, match="is a vit model, and only a vit_mae has an encoder .*give a folder or hub name of one"):
        encoder_config(tmp_path / "vit")
    (tmp_path / "empty").mkdir()
    for name in ("empty", "nowhere"):
        with pytest.raises(ValueError, match="is no folder of weights here and cannot be loaded"):
            encoder_config(tmp_path / name)
    dense().save_pretrained(tmp_path / "mae")
    with pytest.raises(ValueError, match="hidden_size 16 there and 32 here"):
        load_encoder(ViTModel(ViTConfig(**{**encoder_config(tmp_path / "mae").to_dict(), "hidden_size": 32})), tmp_path / "mae")
    with pytest.raises(ValueError, match="pretrained without stages"):
        load_routers(vit, tmp_path / "mae")


def test_a_folder_that_lacks_weights_is_refused_instead_of_starting_from_noise(tmp_path: Path) -> None:
    mae: ViTMAEForPreTraining = dense()
    state = {name: value for name, value in mae.state_dict().items() if "layers.1.mlp.fc1" not in name}
    mae.save_pretrained(tmp_path, state_dict=state)
    with pytest.raises(RuntimeError, match=r"lacks weights of its encoder: layers.1.mlp.fc1.bias"):
        load_encoder(_classifier(tmp_path), tmp_path)
