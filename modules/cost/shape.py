"""What the forward of a stack of layers costs, from the tokens that its layers process.

Multiply-accumulates (MACs) follow the convention of DiffRate (arXiv 2305.17997), EViT (2202.07800) and ToMe (2210.09461):
one MAC counts once; normalisation, activation functions and softmax count nothing.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class LayerTokens:
    """Tokens of a row that one layer processes, protected ones included; no whole numbers where rows differ and this is a mean.

    Attributes:
        attention: in its attention half.
        mlp: in its MLP half.
    """

    attention: float
    mlp: float


@dataclass(frozen=True)
class StackShape:
    """What the cost of a stack of layers depends on. Channel counts, not bytes.

    Attributes:
        hidden: width C of the residual stream.
        intermediate: width of the MLP's hidden layer.
        layers: number of transformer layers.
        heads: attention heads of a layer.
        protected: protected tokens of a row (CLS, distillation, registers).
        routable: routable tokens of a row at the configured input size.
        embed_macs: MACs of what precedes the layers, the patch embedding, per row.
        head_macs: MACs of what follows the layers per row.
        head_macs_per_token: the same for every token that leaves the last layer, protected ones included (attention pooling).
        query_width: channels of all queries of a token; None takes C.
        key_width: channels of its keys, and of its values; None takes C. Smaller where heads share them.
        gated: the MLP has three matrices instead of two.
        windows: of each layer, how many tokens back a token looks; None, or empty for all layers, looks at all.
    """

    hidden: int
    intermediate: int
    layers: int
    heads: int
    protected: int
    routable: int
    embed_macs: int
    head_macs: int
    head_macs_per_token: int = 0
    query_width: int | None = None
    key_width: int | None = None
    gated: bool = False
    windows: tuple[int | None, ...] = ()

    def layer_macs(self, tokens: LayerTokens, window: int | None = None) -> float:
        """4NC² + 2N²C with N tokens in attention, plus 2N'C·I with N' in the MLP of hidden width I.

        With heads that share keys, 2NC(Q + K) + 2N²Q for widths Q and K; with a gate, 3N'C·I. A causal mask halves nothing: published
        counts are of the full square. A sliding ``window`` is a share of it.
        """
        attention = tokens.attention
        queries = self.hidden if self.query_width is None else self.query_width
        keys = self.hidden if self.key_width is None else self.key_width
        projections, products = 2 * attention * self.hidden * (queries + keys), 2 * attention**2 * queries
        if window is not None:
            # A layer that processes a part of the tokens has as small a part of them in its window.
            whole = self.protected + self.routable
            products = products * min(1.0, window / whole)
        return projections + products + (3 if self.gated else 2) * tokens.mlp * self.hidden * self.intermediate

    def kv_bytes(self, layers: Sequence[LayerTokens], bytes_per_value: int = 4) -> float:
        """Bytes of the keys and values that a row leaves in a cache, of which a sliding layer keeps what its window may see."""
        keys = self.hidden if self.key_width is None else self.key_width
        whole = self.protected + self.routable
        windows = self.windows or (None,) * self.layers
        shares = [1.0 if window is None else min(1.0, window / whole) for window in windows]
        return 2 * keys * bytes_per_value * sum(tokens.attention * share for tokens, share in zip(layers, shares, strict=True))

    def model_macs(self, layers: Sequence[LayerTokens], leaving: float | None = None) -> float:
        """MACs of one row's forward, embedding and head included, stages excluded.

        Args:
            layers: tokens of every layer.
            leaving: tokens that leave the last one; None takes those of its MLP.
        """
        if len(layers) != self.layers:
            raise ValueError(f"token counts for {len(layers)} layers were given, the stack has {self.layers}")
        head = self.head_macs + self.head_macs_per_token * (layers[-1].mlp if leaving is None else leaving)
        windows = self.windows or (None,) * self.layers
        return self.embed_macs + sum(map(self.layer_macs, layers, windows)) + head

    def dense_layers(self) -> list[LayerTokens]:
        """Token counts of the uncompressed forward."""
        tokens = self.protected + self.routable
        return [LayerTokens(tokens, tokens)] * self.layers

    def activation_bytes(self, layers: Sequence[LayerTokens], bytes_per_value: int = 4) -> float:
        """Estimated bytes a training step holds for backward per row with fused attention, without checkpointing.

        Per token of a layer: inputs and outputs of two norms, queries, keys, values, attention output and its projection's
        input (8C) and the MLP's hidden layer before and after its activation (2I). An estimate for planning: the bench
        measures.
        """
        per_attention, per_mlp = 6 * self.hidden, 2 * self.hidden + 2 * self.intermediate
        return bytes_per_value * sum(t.attention * per_attention + t.mlp * per_mlp for t in layers)
