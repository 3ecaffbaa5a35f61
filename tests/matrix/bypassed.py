"""The masked reference of causal models: every layer computes every token; tokens that bypass it are hidden as keys and stay as they were."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from laconic import Trace, stages_of
from laconic.modules.backbones.stack import Stack
from laconic.modules.tokens.trace import Routing

from .case import stack_of
from .method import Method


def masked_reference(model: PreTrainedModel, plain: PreTrainedModel, ids: Tensor, trace: Trace, method: Method) -> Tensor:
    """Logits of a dense model that computes every token in every layer; it is changed."""
    if method.restore is not None:
        return chunked_reference(model, plain, ids, trace)
    hide_and_keep(model, stack_of(plain), trace, method)
    logits: Tensor = plain(ids, use_cache=False, attention_mask=causal_mask(ids, plain)).logits
    return logits


def hide_and_keep(model: PreTrainedModel, stack: Stack, trace: Trace, method: Method) -> None:
    """Every token goes through every layer of a dense stack; who was not chosen is hidden as a key, and keeps what it was: in the layer of
    the stage, or in all layers from it on where the stage takes tokens away."""
    alive: Tensor | None = None
    for index, layer in enumerate(stack.layers):
        routing = next((one for name, one in trace.routings.items() if name.endswith(f"_{index}")), None)
        weight: Tensor | float = 1.0
        outside: Any = _unchanged
        if routing is not None and method.bypass:
            stage = stages_of(model)[routing.stage]
            alive, weight, outside = routing.kept_mask, _gate(stage, routing), _outside(stage, routing)
        elif routing is not None:
            kept = routing.decision.kept_mask(routing.state.tokens)
            places = routing.state.position.masked_fill(~kept, routing.state.source.shape[1])
            alive = torch.zeros(len(kept), routing.state.source.shape[1] + 1, dtype=torch.bool).scatter(1, places, True)[:, :-1]
        elif method.bypass:
            alive = None
        if alive is not None:
            site = method.site if method.bypass else "around"
            layer.register_forward_pre_hook(_hide(alive, site), with_kwargs=True)
            _keep_as_it_was(layer, alive, weight, outside, site, stack.adapter)


def causal_mask(ids: Tensor, model: PreTrainedModel) -> Any:
    """The masks that a model makes by itself, written out, since SDPA's own leave nothing to hide keys in."""
    length = ids.shape[1]
    place = torch.arange(length)
    full = (place[:, None] >= place[None]).expand(len(ids), 1, -1, -1)
    window = getattr(model.config, "sliding_window", None)
    near = full if not window else full & (place[:, None] - place[None] < window)
    if model.config._attn_implementation == "eager":
        full, near = (torch.zeros(mask.shape).masked_fill(~mask, -1e30) for mask in (full, near))
    kinds = getattr(model.config, "layer_types", None)
    if kinds is not None:
        return {"full_attention": full, "sliding_attention": near}
    return near if window and model.config.model_type == "mistral" else full


def _hide(chosen: Tensor, site: str) -> Any:
    def hook(layer: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        if site == "around_mlp":
            return None
        own = torch.eye(chosen.shape[1], dtype=torch.bool)

        def hidden(mask: Tensor) -> Tensor:
            seen = chosen[:, None, None] | own
            return mask & seen if mask.dtype == torch.bool else mask.masked_fill(~seen, -1e30)

        if "attention_mask" in kwargs:
            return args, kwargs | {"attention_mask": hidden(kwargs["attention_mask"])}
        return (args[0], args[1], hidden(args[2]), *args[3:]), kwargs

    return hook


def _gate(stage: Any, routing: Routing) -> Tensor | float:
    strength = getattr(stage.estimator, "strength", None)
    if strength is None:
        return 1.0
    gate = routing.scores.tanh() if stage.estimator.of_bypassed else 2 * routing.scores.sigmoid() - 1
    return (1 + strength * gate).masked_fill(~routing.routable, 1.0).unsqueeze(-1)


def _unchanged(tokens: Tensor) -> Tensor:
    return tokens


def _outside(stage: Any, routing: Routing) -> Any:
    """What becomes of the tokens that were not chosen."""
    weighed = _gate(stage, routing) if stage.estimator is not None and stage.estimator.of_bypassed else 1.0

    def become(tokens: Tensor) -> Tensor:
        if stage.shortcut is None:
            return weighed * tokens
        down, up, length = stage.shortcut.down.weight, stage.shortcut.up, tokens.pow(2).mean(-1, keepdim=True).sqrt()
        return tokens + length * (tokens / length @ down.T @ up.weight.T + up.bias)

    return become


def _keep_as_it_was(layer: Any, chosen: Tensor, weight: Tensor | float, outside: Any, site: str, adapter: Any) -> None:
    original = layer.forward

    def forward(hidden_states: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        stays = chosen[..., None]
        if site == "around":
            out = hidden_states + weight * (original(hidden_states, *args, **kwargs) - hidden_states)
            return torch.where(stays, out, outside(hidden_states))
        given = dict(zip(adapter.positional, args, strict=False)) | kwargs
        attended = adapter.attention_half(layer, hidden_states, **given)
        if site == "around_attention":
            attended = torch.where(stays, hidden_states + weight * (attended - hidden_states), hidden_states)
        out = adapter.mlp_half(layer, attended)
        return torch.where(stays, attended + weight * (out - attended), attended) if site == "around_mlp" else out

    layer.forward = forward


def chunked_reference(model: PreTrainedModel, plain: PreTrainedModel, ids: Tensor, trace: Trace) -> Tensor:
    """Logits of a dense model whose middle layers see every token, those that are no chunk hidden as keys."""
    routing = trace.routings["before_1"]
    kept, routable, stage = routing.kept_mask, routing.routable, stages_of(model)["before_1"]
    means = stage.config.part("merger").name == "chunk_mean"
    entered: dict[str, Tensor] = {}
    if routing.decision.cut is None or not stage.scorer.probabilities:
        sure = torch.ones_like(routing.scores)
    else:
        sure = torch.sigmoid(routing.scores - routing.decision.cut).masked_fill(~routable, 1.0).clamp(1e-4, 1 - 1e-4)

    def enter(layer: Any, args: tuple[Tensor, ...], kwargs: dict[str, Any]) -> Any:
        made = args[0].clone()
        for row, place in kept.nonzero().tolist():
            ended = (kept & routable)[row, :place].nonzero().flatten().tolist()
            since = ended[-1] + 1 if ended else 0
            # A protected token is no part of a chunk.
            members = [at for at in range(since, place + 1) if routable[row, at]] if means and routable[row, place] else [place]
            made[row, place] = args[0][row, members].mean(0)
        entered["tokens"], entered["made"] = args[0], made
        return (made, *args[1:]), kwargs

    def leave(layer: Any, args: tuple[Tensor, ...], kwargs: dict[str, Any]) -> Any:
        out = entered["tokens"].clone()
        for row in range(len(out)):
            mean = torch.zeros_like(out[row, 0])
            for place in range(out.shape[1]):
                if kept[row, place]:
                    added = args[0][row, place] - entered["made"][row, place]
                    mean = sure[row, place] * added + (1 - sure[row, place]) * mean
                out[row, place] += mean
        return (out, *args[1:]), kwargs

    layers = stack_of(plain).layers
    layers[1].register_forward_pre_hook(enter, with_kwargs=True)
    for index in (1, 2):
        layers[index].register_forward_pre_hook(_hide(kept, "around"), with_kwargs=True)
    layers[3].register_forward_pre_hook(leave, with_kwargs=True)
    logits: Tensor = plain(ids, use_cache=False, attention_mask=causal_mask(ids, plain)).logits
    return logits
