"""The masked reference: a forward in which every layer computes every token, and tokens that a stage left out are hidden from attention."""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from laconic import Trace
from laconic.modules.config import SITES
from laconic.modules.tokens.state import TokenState
from laconic.modules.tokens.trace import Routing

from .case import stack_of


class Recorded(nn.Module):
    """Stands for all layers: notes what they are given and hands on what it was made with."""

    def __init__(self, out: Tensor | None = None) -> None:
        super().__init__()
        self.out, self.given, self.kwargs = out, torch.empty(0), dict[str, Any]()

    def forward(self, hidden_states: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        self.given, self.kwargs = hidden_states, kwargs
        return hidden_states if self.out is None else self.out


def with_layers_replaced(plain: PreTrainedModel, out: Tensor | None = None) -> tuple[PreTrainedModel, Recorded]:
    twin, recorded = copy.deepcopy(plain), Recorded(out)
    layers = stack_of(twin).layers
    del layers[1:]
    layers[0] = recorded
    return twin, recorded


class Reference:
    """A full-length forward in which what a stage left out is only hidden from attention. A fused token is appended.

    Attributes:
        hidden: (B, N, C) all tokens, merged ones in the place of the one they were merged into.
        alive: (B, N) tokens that others may look at.
        slots: (B, M) where each token of the compressed sequence sits in this one.
        place: (B, N) position that each of these tokens stands for.
        size: (B, N) source tokens that each stands for.
    """

    def __init__(self, hidden: Tensor, adapter: Any, kwargs: dict[str, Any], proportional: bool) -> None:
        self.hidden, self.adapter, self.kwargs, self.proportional = hidden, adapter, kwargs, proportional
        self.alive = torch.ones(hidden.shape[:2], dtype=torch.bool)
        self.slots = self.place = torch.arange(hidden.shape[1]).expand(hidden.shape[0], -1)
        self.size = torch.ones(hidden.shape[:2])

    def run(self, layers: nn.ModuleList, trace: Trace) -> Tensor:
        """(B, K, C) hidden states of the compressed sequence after all layers, with the decisions of a trace."""
        assert trace.state is not None
        shrinking = [routing for routing in trace.routings.values() if not routing.bypass]
        after = [*(routing.state for routing in shrinking[1:]), trace.state]
        for index, layer in enumerate(layers):
            at = {site: trace.routings.get(f"{site}_{index}") for site in SITES}
            self.begin_layer(index)
            if at["before"] is not None:
                self.shrink(at["before"], after.pop(0))
            self.half(layer, "attention", at["around"] or at["around_attention"])
            if at["between"] is not None:
                self.shrink(at["between"], after.pop(0))
            self.half(layer, "mlp", at["around"] or at["around_mlp"])
        return take(self.hidden, self.slots)

    def begin_layer(self, index: int) -> None:
        """Called before each layer; a kind whose layers are given different arguments sets ``kwargs``."""

    def shrink(self, routing: Routing, after: TokenState) -> None:
        rows, before = self.hidden.shape[0], routing.state
        left_out = routing.routable & ~routing.kept_mask
        at = torch.zeros_like(self.alive).scatter(1, self.slots, left_out)
        kept = self.slots.gather(1, routing.decision.index)
        if after.tokens > routing.decision.index.shape[1]:
            weights = (routing.scores.masked_fill(~left_out, -torch.inf) + before.size.log()).softmax(-1).nan_to_num(0)
            fused = (weights[..., None] * take(self.hidden, self.slots)).sum(1, keepdim=True)
            self.hidden = torch.cat([self.hidden, fused], 1)
            self.alive = torch.cat([self.alive & ~at, left_out.any(-1, keepdim=True)], 1)
            kept = torch.cat([kept, torch.full((rows, 1), self.hidden.shape[1] - 1)], 1)
            self.place = torch.cat([self.place, after.position[:, -1:]], 1)
            self.size = torch.cat([self.size, after.size[:, -1:]], 1)
        else:
            self.alive = self.alive & ~at
            self._merge(before, after, kept)
        self.slots = kept

    def _merge(self, before: TokenState, after: TokenState, kept: Tensor) -> None:
        """Means over the originals that the state says went together, each token counted once for each of its sources."""
        hidden, size = self.hidden.clone(), self.size.clone()
        for row in range(len(hidden)):
            for slot in range(after.tokens):
                members = (after.source[row] == slot).nonzero().flatten()
                if len(members):
                    hidden[row, kept[row, slot]] = self.hidden[row, self.slots[row, before.source[row, members]]].mean(0)
                    size[row, kept[row, slot]] = len(members)
        self.hidden, self.size = hidden, size

    def mask(self, layer: nn.Module, alive: Tensor) -> Tensor:
        tokens = self.hidden.shape[1]
        mask = torch.zeros(len(alive), 1, tokens, tokens).masked_fill(~alive[:, None, None], -1e30)
        if self.proportional:
            mask = mask + self.size.log()[:, None, None]
        return mask + self.own_bias(layer)

    def own_bias(self, layer: nn.Module) -> Tensor | float:
        """(B, H, M, M) the bias that a layer or its model gives to pairs of places, 0 for a family without."""
        return 0.0

    def half(self, layer: nn.Module, half: str, routing: Routing | None) -> None:
        """A half of a layer; with a routing the tokens that it did not choose go around."""
        chosen = self.alive
        if routing is not None:
            chosen = torch.zeros_like(self.alive).scatter(1, self.slots, routing.kept_mask)
        rest = {key: value for key, value in self.kwargs.items() if key != "attention_mask"}
        alone = copy.deepcopy(layer)
        if half == "attention":
            out = self.adapter.attention_half(alone, self.hidden, self.mask(layer, chosen), **rest)
        else:
            out = self.adapter.mlp_half(alone, self.hidden)
        self.hidden = torch.where(chosen[..., None], out, self.hidden)


def take(hidden: Tensor, slots: Tensor) -> Tensor:
    return hidden.gather(1, slots[..., None].expand(-1, -1, hidden.shape[-1]))
