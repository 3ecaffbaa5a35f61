"""Base class of the models for semantic segmentation."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn
from torch.nn import functional
from transformers.modeling_outputs import SemanticSegmenterOutput

from ..tokens.labels import IGNORE_PIXEL


class PatchSegmentation:
    """Mixin for models with a linear classifier on every patch, whose logits are interpolated to the image size.

    The head needs all patches, in reading order, after the protected tokens: a compressed model restores them after its last layer.
    The model has the attributes ``classifier`` and, under its ``base_model_prefix``, a backbone.
    """

    config: Any
    base_model_prefix: str
    classifier: nn.Linear

    def forward(self, pixel_values: Tensor, labels: Tensor | None = None, **kwargs: Any) -> SemanticSegmenterOutput:
        """
        Args:
            pixel_values: (B, channels, height, width).
            labels: (B, height, width) int64 class of each pixel, IGNORE_PIXEL for an unlabelled pixel; None computes no loss.
            kwargs: arguments of the backbone.

        Returns:
            ``logits`` (B, classes, height, width), and ``loss``, the mean cross-entropy over labelled pixels.

        Raises:
            ValueError: patches are missing, or the labels differ in size from the image.
        """
        outputs = getattr(self, self.base_model_prefix)(pixel_values, **kwargs)
        hidden_states: Tensor = outputs.last_hidden_state
        sides, patch = pixel_values.shape[-2:], self.config.patch_size
        down, across = (side // cells for side, cells in zip(sides, (patch, patch) if isinstance(patch, int) else patch, strict=True))
        if hidden_states.shape[1] < down * across:
            raise ValueError(
                f"{type(self).__name__} reads {down * across} patches and {hidden_states.shape[1]} tokens are left: give "
                f"compression.restore = {{layer: {self.config.num_hidden_layers}, by: unmerge}}"
            )
        logits = self.classifier(hidden_states[:, -down * across :])
        logits = logits.transpose(1, 2).unflatten(2, (down, across))
        logits = functional.interpolate(logits, size=tuple(sides), mode="bilinear", align_corners=False)
        loss = None
        if labels is not None:
            if labels.shape != (logits.shape[0], *sides):
                raise ValueError(
                    f"labels of shape {tuple(labels.shape)} must be a class for each pixel, {(logits.shape[0], *sides)} for these images"
                )
            labelled = (labels != IGNORE_PIXEL).sum().clamp(min=1)
            # The loss of a batch without labelled pixels is 0, not NaN.
            loss = functional.cross_entropy(logits.float(), labels, ignore_index=IGNORE_PIXEL, reduction="sum") / labelled
        return SemanticSegmenterOutput(loss=loss, logits=logits, hidden_states=outputs.hidden_states, attentions=outputs.attentions)

    @classmethod
    def is_custom_code(cls) -> bool:
        # transformers renames the weights of older checkpoints only for its own classes.
        return False
