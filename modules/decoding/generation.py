"""What a compressed model needs so that ``generate`` of transformers is right."""

from __future__ import annotations

from typing import Any

from transformers import PreTrainedModel
from transformers.cache_utils import Cache

from ..compatibility import check_deployable
from ..selectors.base import Request
from ..stage import stages_of
from .cache import routed_cache


def can_look_ahead(model: PreTrainedModel) -> bool:
    """Some stage of a causal model would decide otherwise if it were shown later tokens (``Trace.lookahead``)."""
    shown = Request(0.5, 1, lookahead=True)
    return any(stage.selector.causal and stage.selector.looks_ahead(shown) for stage in stages_of(model).values())


class Generating:
    """Mixin of generated classes of models that generate."""

    def generate(self: Any, *args: Any, **kwargs: Any) -> Any:
        """transformers' own, with a RoutedCache. Raises ValueError where a stage looks ahead, as all do in training mode."""
        check_deployable(stages_of(self).values())
        if self.training:
            raise ValueError(
                "generate() in training mode would decide as training does, and learn from what it writes: call model.eval() first"
            )
        return super().generate(*args, **kwargs)  # type: ignore[misc]

    def _prepare_cache_for_generation(self: Any, generation_config: Any, model_kwargs: dict[str, Any], *args: Any, **kwargs: Any) -> Any:
        prepared = super()._prepare_cache_for_generation(generation_config, model_kwargs, *args, **kwargs)  # type: ignore[misc]
        if isinstance(model_kwargs.get("past_key_values"), Cache):
            model_kwargs["past_key_values"] = routed_cache(self.config, model_kwargs["past_key_values"])
        return prepared
