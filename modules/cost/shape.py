"""StackShape: MACs and bytes of a stack's forward, from the number of tokens that its layers process.

Multiply-accumulates (MACs) follow the convention of DiffRate (arXiv 2305.17997), EViT (2202.07800) and ToMe (2210.09461):
one MAC counts once; normalisation, activation functions and softmax count as 0.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field


@dataclass(frozen=True)
class LayerTokens:
    """Tokens per row that one layer processes, protected tokens included; a mean, which may be fractional, if rows differ.

    Attributes:
        attention: tokens in the attention half.
        mlp: tokens in the MLP half.
    """

    attention: float
    mlp: float


@dataclass(frozen=True)
class StackShape:
    """The sizes of a stack of layers that its cost depends on. Widths are numbers of channels.

    Attributes:
        hidden: width C of the residual stream.
        intermediate: width of the MLP's hidden layer.
        layers: number of transformer layers.
        heads: number of attention heads per layer.
        protected: protected tokens per row (CLS, distillation, registers).
        routable: routable tokens per row at the configured input size.
        embed_macs: MACs per row before the layers (patch embedding).
        head_macs: MACs per row after the layers.
        head_macs_per_token: MACs after the layers for every token that leaves the last layer, protected tokens included.
        query_width: width of all queries of a token; None means C.
        key_width: width of all keys of a token, and of all values; None means C. Smaller if heads share them.
        gated: the MLP has three matrices instead of two.
        macs_per_token: MACs of each layer for every token of its MLP, in place of attention and MLP, if it is a map of each token alone;
            None in a transformer layer.
        dense_only_macs: MACs per row that the dense model spends and a compressed one does not, such as layers whose output nothing reads.
        rows: rows of the stack for each row of the model, such as the tiles of an image in a tower.
        joined: tokens that the next stack reads as one.
        taps: MACs of a further reader of each token that leaves a layer, by layer.
        windows: attention window of each layer in tokens, None for full attention; empty means full attention in all layers.
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
    macs_per_token: float | None = None
    dense_only_macs: float = 0.0
    rows: float = 1
    joined: int = 1
    taps: Mapping[int, float] = field(default_factory=dict)
    windows: tuple[int | None, ...] = ()

    @property
    def tokens(self) -> int:
        """Tokens per row at the configured input size, protected ones included."""
        return self.protected + self.routable

    def layer_macs(self, tokens: LayerTokens, window: int | None = None) -> float:
        """MACs of one layer: 4NC² + 2N²C with N tokens in attention, plus 2N'C·I with N' tokens in the MLP of hidden width I.

        If heads share keys, 2NC(Q + K) + 2N²Q for widths Q and K; with a gate, 3N'C·I. A causal mask does not halve the square: published
        counts use the full square. A sliding ``window`` counts its fraction of the square.
        """
        if self.macs_per_token is not None:
            return tokens.mlp * self.macs_per_token
        attention = tokens.attention
        queries = self.hidden if self.query_width is None else self.query_width
        keys = self.hidden if self.key_width is None else self.key_width
        projections, products = 2 * attention * self.hidden * (queries + keys), 2 * attention**2 * queries
        if window is not None:
            # If a layer processes a part of the tokens, its window contains the same part of its tokens.
            products = products * min(1.0, window / self.tokens)
        return projections + products + (3 if self.gated else 2) * tokens.mlp * self.hidden * self.intermediate

    def kv_bytes(self, layers: Sequence[LayerTokens], bytes_per_value: int = 4) -> float:
        """Bytes of a row's keys and values in a cache; a sliding layer stores only its window."""
        keys = self.hidden if self.key_width is None else self.key_width
        whole = self.protected + self.routable
        windows = self.windows or (None,) * self.layers
        shares = [1.0 if window is None else min(1.0, window / whole) for window in windows]
        return 2 * keys * bytes_per_value * sum(tokens.attention * share for tokens, share in zip(layers, shares, strict=True))

    def model_macs(self, layers: Sequence[LayerTokens], leaving: float | None = None) -> float:
        """MACs of one row's forward, embedding and head included, stages excluded.

        Args:
            layers: tokens of every layer.
            leaving: tokens that leave the last layer; None takes those of its MLP.
        """
        if len(layers) != self.layers:
            raise ValueError(f"token counts for {len(layers)} layers were given, the stack has {self.layers}")
        head = self.head_macs + self.head_macs_per_token * (layers[-1].mlp if leaving is None else leaving)
        windows = self.windows or (None,) * self.layers
        tapped = sum(macs * layers[index].mlp for index, macs in self.taps.items())
        return self.embed_macs + sum(map(self.layer_macs, layers, windows)) + tapped + head

    def dense_layers(self) -> list[LayerTokens]:
        """Tokens of every layer in the dense forward."""
        tokens = self.protected + self.routable
        return [LayerTokens(tokens, tokens)] * self.layers

    def activation_bytes(self, layers: Sequence[LayerTokens], bytes_per_value: int = 4) -> float:
        """Estimated bytes per row that a training step holds for backward, with fused attention and without checkpointing.

        Per token of a layer: inputs and outputs of two norms, queries, keys, values, attention output and the input of its projection
        (8C), and the MLP's hidden layer before and after its activation (2I). An estimate for planning; the bench measures.
        """
        per_attention, per_mlp = 6 * self.hidden, 2 * self.hidden + 2 * self.intermediate
        return bytes_per_value * sum(t.attention * per_attention + t.mlp * per_mlp for t in layers)
