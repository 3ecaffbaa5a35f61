"""Generating: ``generate`` of transformers for compressed models."""

from __future__ import annotations

import inspect
from typing import Any

from transformers import PreTrainedModel
from transformers.cache_utils import Cache

from ..compatibility import check_deployable
from ..selectors.base import Request
from ..stage import stages_of
from .cache import routed_cache


def can_look_ahead(model: PreTrainedModel) -> bool:
    """True if a stage of a causal model decides differently with ``Trace.lookahead``."""
    with_lookahead = Request(0.5, 1, lookahead=True)
    return any(stage.selector.causal and stage.selector.is_noncausal(with_lookahead) for stage in stages_of(model).values())


class Generating:
    """Mixin of generated classes for models that generate."""

    def generate(self: Any, *args: Any, **kwargs: Any) -> Any:
        """``generate`` of transformers with a RoutedCache.

        Raises:
            ValueError: in training mode, if a stage is non-causal, or if a threshold was never set.
        """
        check_deployable(stages_of(self).values())
        if unset := [name for name, stage in stages_of(self).items() if stage.needs_threshold]:
            raise ValueError(
                f"the thresholds of stages {', '.join(unset)} have seen no score, so that any number of tokens would pass: train the model, "
                "call laconic.start_routers(model, batches), or run laconic calibrate on its folder"
            )
        if self.training:
            raise ValueError("generate() in training mode would use training decisions and update thresholds: call model.eval() first")
        return super().generate(*args, **kwargs)  # type: ignore[misc]

    def init_continuous_batching(self: Any, *args: Any, **kwargs: Any) -> Any:
        """Refuses continuous batching (``generate_batch``): its paged cache holds every token in every layer. Raises ValueError."""
        raise ValueError(
            f"{type(self).__name__} does not support continuous batching (generate_batch), whose paged cache holds every token in every "
            "layer: call generate() with a batch that is padded on the left"
        )

    def _prepare_multimodal_encoder_kwargs_for_generation(self: Any, model_kwargs: dict[str, Any]) -> dict[str, Any]:
        encoded = self.adapter.encoded_images(self, model_kwargs)
        if encoded is None:
            prepared: dict[str, Any] = super()._prepare_multimodal_encoder_kwargs_for_generation(model_kwargs)  # type: ignore[misc]
            return prepared
        # As transformers does: inputs that only the features need would be repeated for beams.
        functions = (getattr(self.base_model, f"get_{kind}_features", None) for kind in encoded)
        used = {name for function in functions if function is not None for name in inspect.signature(function).parameters}
        return {key: value for key, value in model_kwargs.items() if key not in used} | {"mm_encoder_outputs": encoded}

    def _prepare_cache_for_generation(self: Any, generation_config: Any, model_kwargs: dict[str, Any], *args: Any, **kwargs: Any) -> Any:
        prepared = super()._prepare_cache_for_generation(generation_config, model_kwargs, *args, **kwargs)  # type: ignore[misc]
        if isinstance(model_kwargs.get("past_key_values"), Cache):
            model_kwargs["past_key_values"] = routed_cache(self.config, model_kwargs["past_key_values"])
        return prepared
