"""DINOv2 with a head for semantic segmentation."""

from __future__ import annotations

from torch import nn
from transformers import Dinov2Config, Dinov2Model
from transformers.models.dinov2.modeling_dinov2 import Dinov2PreTrainedModel

from .base import PatchSegmentation


class Dinov2ForSemanticSegmentation(PatchSegmentation, Dinov2PreTrainedModel):  # type: ignore[no-untyped-call]
    """A DINOv2 with a classifier on every patch, whose logits are interpolated to the image size.

    Args:
        config: config of the backbone; ``num_labels`` is the number of classes.
    """

    def __init__(self, config: Dinov2Config) -> None:
        super().__init__(config)
        self.num_labels = config.num_labels or 1
        self.dinov2 = Dinov2Model(config)
        self.classifier = nn.Linear(config.hidden_size, self.num_labels)
        self.post_init()  # type: ignore[no-untyped-call]
