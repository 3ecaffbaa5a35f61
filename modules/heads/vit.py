"""ViT with a head for semantic segmentation."""

from __future__ import annotations

from torch import nn
from transformers import ViTConfig, ViTModel
from transformers.models.vit.modeling_vit import ViTPreTrainedModel

from .base import PatchSegmentation


class ViTForSemanticSegmentation(PatchSegmentation, ViTPreTrainedModel):  # type: ignore[no-untyped-call]
    """A ViT with a classifier on every patch, whose logits are interpolated to the image size.

    Args:
        config: config of the backbone; ``num_labels`` is the number of classes.
    """

    def __init__(self, config: ViTConfig) -> None:
        super().__init__(config)
        self.num_labels = config.num_labels or 1
        self.vit = ViTModel(config, add_pooling_layer=False)
        self.classifier = nn.Linear(config.hidden_size, self.num_labels)
        self.post_init()  # type: ignore[no-untyped-call]
