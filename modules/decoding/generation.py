"""What a compressed model needs so that ``generate`` of transformers is right."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from transformers import PreTrainedModel
from transformers.cache_utils import Cache, DynamicCache

from ..selectors.base import Request
from ..stage import Stage
from .cache import RoutedCache


def routed_cache(config: Any, given: Any) -> RoutedCache:
    """The cache for a forward that wants one.

    Args:
        config: of the model.
        given: what the caller brought; None or an empty DynamicCache is replaced.

    Raises:
        ValueError: it holds tokens that a compressed model cannot tell apart, or is of a kind that cannot hold rows of
            different lengths.
    """
    if isinstance(given, RoutedCache):
        return given
    if given is None or (type(given) is DynamicCache and not given.offloading and given.get_seq_length() == 0):
        cache = RoutedCache(config)
        if given is not None and any(getattr(layer, "record_past", False) for layer in given.layers):
            # Who means to crop it, as for an assistant's tokens, has said so to the cache that he brought.
            cache.activate_past_recording()  # type: ignore[no-untyped-call]
        return cache
    if type(given) is DynamicCache and not given.offloading:
        raise ValueError(
            f"past_key_values is a DynamicCache that holds {given.get_seq_length()} tokens: it does not say which tokens each layer "
            "processed. Fill a laconic.RoutedCache(model.config) with this model instead"
        )
    kind = "an offloaded cache" if getattr(given, "offloading", False) else type(given).__name__
    raise ValueError(
        f"past_key_values is {kind}, which cannot hold rows with different numbers of keys: leave cache_implementation out (or set it "
        "to 'dynamic'), and the compressed model makes a RoutedCache"
    )


def check_deployable(stages: Iterable[Stage]) -> None:
    """Raises ValueError where a stage of a causal model cannot run token by token."""
    ahead = [stage.config.key for stage in stages if not stage.deployable]
    if ahead:
        raise ValueError(
            f"stages {', '.join(ahead)} look ahead: which tokens they choose hangs on tokens that are not generated yet. Train with "
            "scorer 'linear' and selector 'threshold' or 'predictor' (top-k in training, a causal predictor afterwards), or call "
            "decompress(model)"
        )


def can_look_ahead(model: PreTrainedModel) -> bool:
    """Some stage of a causal model would decide otherwise if it were shown later tokens (``Trace.lookahead``)."""
    from ..compress import stages_of

    shown = Request(0.5, 1, lookahead=True)
    return any(stage.selector.causal and stage.selector.looks_ahead(shown) for _, stage in stages_of(model).values())


class Generating:
    """Mixin of generated classes of models that generate."""

    def generate(self: Any, *args: Any, **kwargs: Any) -> Any:
        """transformers' own, with a RoutedCache. Raises ValueError where a stage looks ahead, as all do in training mode."""
        from ..compress import stages_of

        check_deployable(stage for _, stage in stages_of(self).values())
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
