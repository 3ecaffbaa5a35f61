"""The matrix of causal language models. A new family is one more line in FAMILIES; a new method one more in METHODS."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

from laconic import CompressionConfig, StageConfig, Trace, compress

LAYERS, VOCABULARY = 4, 48


@dataclass(frozen=True)
class Method:
    """A row of parts.

    Attributes:
        deployed: it runs in evaluation without looking ahead.
        detached: the scorer sends no gradient into the backbone.
        positional: scores depend on where a token stands in its row.
        site: where its stages sit.
        restore: how the sequence gets its length back, before layer 3; None where stages do not shorten it.
    """

    name: str
    parts: dict[str, Any]
    deployed: bool = True
    detached: bool = True
    positional: bool = False
    site: str = "around"
    restore: str | None = None

    def config(self, *keeps: float, layers: tuple[int, ...] = (1, 2)) -> CompressionConfig:
        if self.restore is not None:
            stage = StageConfig(layer=1, site=self.site, keep=keeps[0], **self.parts)
            return CompressionConfig([stage], {"layer": 3, "by": self.restore})
        return CompressionConfig(
            StageConfig(layer=layer, site=self.site, keep=keep, **self.parts) for layer, keep in zip(layers, keeps, strict=False)
        )


_LINEAR = {"scorer": {"name": "linear", "detach": True}}
METHODS = [
    Method("top_k", {**_LINEAR, "selector": "top_k"}, deployed=False),
    Method("threshold", {**_LINEAR, "selector": "threshold"}),
    Method("predictor", {**_LINEAR, "selector": "predictor"}),
    Method("gate", {**_LINEAR, "selector": "threshold", "estimator": "gate"}),
    Method("gate_random", {**_LINEAR, "selector": "random", "estimator": "gate"}, positional=True),
    Method("gate_predictor_mlp", {**_LINEAR, "selector": "predictor", "estimator": "gate"}, site="around_mlp"),
    Method("predictor_attached", {"scorer": "linear", "selector": "predictor"}, detached=False),
    Method("gumbel", {**_LINEAR, "selector": "gumbel"}),
    Method("random", {"scorer": "random", "selector": "threshold"}, positional=True),
    Method("uniform", {"scorer": "uniform_grid", "selector": "threshold"}, positional=True),
    Method("threshold_attention", {**_LINEAR, "selector": "threshold"}, site="around_attention"),
    Method("predictor_mlp", {**_LINEAR, "selector": "predictor"}, site="around_mlp"),
]


def _chunks(name: str, *, positional: bool = False, detached: bool = True, **parts: Any) -> Method:
    return Method(name, parts, positional=positional, detached=detached, site="before", restore="dechunk")


_DETACHED = {"name": "boundary", "detach": True}
CHUNKS = [
    _chunks("chunk", scorer=_DETACHED, selector="gumbel"),
    _chunks("chunk_mean", scorer=_DETACHED, selector="threshold", merger="chunk_mean"),
    _chunks("chunk_predictor", scorer="linear", selector="predictor", merger="chunk_mean", detached=False),
    _chunks("chunk_random", scorer="random", selector="threshold", positional=True),
]

_COMMON = {
    "vocab_size": VOCABULARY,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": LAYERS,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 96,
    "initializer_range": 0.3,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": None,
}
_SLIDING = ["sliding_attention", "full_attention", "sliding_attention", "full_attention"]
FAMILIES: dict[str, dict[str, Any]] = {
    "llama": {},
    "mistral": {"sliding_window": 7},
    "qwen2": {"use_sliding_window": True, "sliding_window": 7, "max_window_layers": 2},
    "qwen3": {"head_dim": 8},
    "gemma2": {"head_dim": 8, "sliding_window": 7, "layer_types": _SLIDING, "query_pre_attn_scalar": 8},
    "gemma3_text": {"head_dim": 8, "sliding_window": 7, "layer_types": _SLIDING, "query_pre_attn_scalar": 8},
    "gpt2": {"resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0},
    "gpt_neox": {"use_parallel_residual": True},
    "gpt_neox_serial": {"use_parallel_residual": False},
}
# Soft caps on the logits of attention are served by eager alone.
EAGER = ("gemma2",)
# Layers without halves.
WHOLE = ("gpt_neox",)
PAIRS = [(family, method) for family in FAMILIES for method in METHODS if not (family in WHOLE and method.site != "around")]
# Rotary, sliding beside full, and learned positions.
SHRINKING = [
    (family, method) for family in ("llama", "gemma3_text", "gpt2") for method in CHUNKS if family == "llama" or method in CHUNKS[:2]
]
PAIRS += SHRINKING
DEPLOYED = [pair for pair in PAIRS if pair[1].deployed]


def dense(family: str, **settings: Any) -> PreTrainedModel:
    """A tiny random model in evaluation mode."""
    torch.manual_seed(1)
    attention = "eager" if family in EAGER else settings.pop("attn_implementation", "sdpa")
    config = AutoConfig.for_model(family.removesuffix("_serial"), **{**_COMMON, **FAMILIES[family], **settings})
    model: PreTrainedModel = AutoModelForCausalLM.from_config(config, attn_implementation=attention).eval()
    return model


def spread(model: PreTrainedModel, seed: int = 2) -> PreTrainedModel:
    """Scores of fresh parts are nearly equal; spread them, so that decisions mean something, and thresholds have been followed."""
    torch.manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if ".stages." in name and parameter.ndim > 1:
                parameter.normal_(0, 0.5)
            if name.endswith("estimator.strength"):
                parameter.fill_(0.8)
        for name, buffer in model.named_buffers():
            if name.endswith("selector.batches"):
                buffer.fill_(1)
            if name.endswith("selector.threshold") and any(
                part in str(model.config.compression["stages"][0]) for part in ("random", "uniform_grid")
            ):
                buffer.fill_(0.5)
    return model


def neutral(model: PreTrainedModel) -> PreTrainedModel:
    """The same with gates as they are at first: a gate that has learned weighs what layers add, at keep 1 too."""
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith("estimator.strength"):
                parameter.zero_()
    return model


def compressed(family: str, method: Method, *keeps: float, **settings: Any) -> PreTrainedModel:
    return spread(compress(dense(family, **settings), method.config(*keeps)))


def tokens(rows: int = 3, length: int = 24, seed: int = 0) -> Tensor:
    return torch.randint(2, VOCABULARY, (rows, length), generator=torch.Generator().manual_seed(seed))


def traced(model: PreTrainedModel, input_ids: Tensor, **kwargs: Any) -> tuple[Tensor, Trace]:
    """Logits and trace of one forward without a cache; keyword arguments that Trace knows go to it."""
    known = Trace.__dataclass_fields__
    trace = Trace(**{key: kwargs.pop(key) for key in list(kwargs) if key in known})
    return model(input_ids=input_ids, trace=trace, **{"use_cache": False, **kwargs}).logits, trace
