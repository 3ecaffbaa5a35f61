"""Causal language models: every method × every family. A new method is one more line in METHODS or CHUNKS; a new family one more in FAMILIES."""

from __future__ import annotations

from functools import partial
from typing import Any, ClassVar

import torch
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

from laconic import Trace, compress, stages_of
from laconic.modules.tokens.trace import Routing

from . import case
from .bypassed import masked_reference
from .case import Batch, Case, traced_outputs
from .method import Family, Method, outside

LAYERS, VOCABULARY, LENGTH = 4, 48, 24
LENGTHS = (24, 17, 9)


def _around(name: str, parts: dict[str, Any], **how: Any) -> Method:
    # Tokens that are protected by default have tests of their own.
    return Method(name, {**parts, "protect": {"first": 0}}, **{"site": "around", **how})


_LINEAR = {"scorer": {"name": "linear", "detach": True}}
METHODS = [
    _around("top_k", {**_LINEAR, "selector": "top_k"}, deployed=False),
    _around("threshold", {**_LINEAR, "selector": "threshold"}),
    _around("predictor", {**_LINEAR, "selector": "predictor"}),
    _around("gate", {**_LINEAR, "selector": "threshold", "estimator": "gate"}),
    _around("shortcut", {**_LINEAR, "selector": "threshold", "shortcut": {"name": "linear", "rank": 4}}),
    _around("gate_random", {**_LINEAR, "selector": "random", "estimator": "gate"}, positional=True),
    _around("gate_predictor_mlp", {**_LINEAR, "selector": "predictor", "estimator": "gate"}, site="around_mlp"),
    _around("predictor_attached", {"scorer": "linear", "selector": "predictor"}, detached=False),
    _around("gumbel", {**_LINEAR, "selector": "gumbel"}, adaptive=True),
    _around("random", {"scorer": "random", "selector": "threshold"}, positional=True),
    _around("uniform", {"scorer": "uniform_grid", "selector": "threshold"}, positional=True),
    _around("threshold_attention", {**_LINEAR, "selector": "threshold"}, site="around_attention"),
    _around("predictor_mlp", {**_LINEAR, "selector": "predictor"}, site="around_mlp"),
    *outside(site="around", parts={"selector": "top_k", "protect": {"first": 0}}, deployed=False),
]


_chunks = partial(Method, restore="dechunk")
_DETACHED = {"name": "boundary", "detach": True}
CHUNKS = [
    _chunks("chunk", {"scorer": _DETACHED, "selector": "gumbel"}, adaptive=True),
    _chunks("chunk_mean", {"scorer": _DETACHED, "selector": "threshold", "merger": "chunk_mean"}),
    _chunks("chunk_predictor", {"scorer": "linear", "selector": "predictor", "merger": "chunk_mean"}, detached=False),
    _chunks("chunk_random", {"scorer": "random", "selector": "threshold"}, positional=True),
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
_GEMMA = {"head_dim": 8, "sliding_window": 7, "layer_types": _SLIDING, "query_pre_attn_scalar": 8}
# Layers without halves.
_HALVES = tuple(method.name for method in METHODS if method.site != "around")
FAMILIES = {
    "llama": Family({}),
    "mistral": Family({"sliding_window": 7}),
    "qwen2": Family({"use_sliding_window": True, "sliding_window": 7, "max_window_layers": 2}),
    "qwen3": Family({"head_dim": 8}),
    # Its soft caps on the logits of attention are served by eager alone.
    "gemma2": Family(_GEMMA, implementation="eager"),
    "gemma3_text": Family(_GEMMA),
    "gpt2": Family({"resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0}),
    "gpt_neox": Family({"use_parallel_residual": True}, refuses=_HALVES),
    "gpt_neox_serial": Family({"use_parallel_residual": False}, model_type="gpt_neox"),
}
PAIRS = [(family, method) for family in FAMILIES for method in METHODS if FAMILIES[family].tests(method)]
# Rotary, sliding beside full, and learned positions.
SHRINKING = [
    (family, method) for family in ("llama", "gemma3_text", "gpt2") for method in CHUNKS if family == "llama" or method in CHUNKS[:2]
]
PAIRS += SHRINKING
DEPLOYED = [pair for pair in PAIRS if pair[1].deployed]


def dense(family: str, **settings: Any) -> PreTrainedModel:
    """A tiny random model in evaluation mode."""
    torch.manual_seed(1)
    about = FAMILIES[family]
    attention = settings.pop("attn_implementation", "sdpa")
    config = AutoConfig.for_model(about.model_type or family, **{**_COMMON, **about.settings, **settings})
    model: PreTrainedModel = AutoModelForCausalLM.from_config(config, attn_implementation=about.implementation or attention).eval()
    return model


def spread(model: PreTrainedModel, seed: int = 2) -> PreTrainedModel:
    """Scores that differ, thresholds that have followed them, and gates that have learned."""
    case.spread(model, seed)
    scorer = str(model.config.compression["stages"][0])
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith("estimator.strength"):
                parameter.fill_(0.8)
        for name, buffer in model.named_buffers():
            if name.endswith("selector.threshold") and ("random" in scorer or "uniform_grid" in scorer):
                buffer.fill_(0.5)
    return model


def neutral(model: PreTrainedModel) -> PreTrainedModel:
    """The same with gates as they are at first: a gate that has learned weighs what layers add, at keep 1 too."""
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith("estimator.strength"):
                parameter.zero_()
        for stage in stages_of(model).values():
            if stage.estimator is not None and stage.estimator.of_bypassed:
                for parameter in stage.scorer.parameters():
                    parameter.zero_()
    return model


def compressed(family: str, method: Method, *keeps: float, **settings: Any) -> PreTrainedModel:
    return spread(compress(dense(family, **settings), method.config(*keeps)))


def tokens(rows: int = 3, length: int = LENGTH, seed: int = 0) -> Tensor:
    return torch.randint(2, VOCABULARY, (rows, length), generator=torch.Generator().manual_seed(seed))


def traced(model: PreTrainedModel, input_ids: Tensor, **kwargs: Any) -> tuple[Tensor, Trace]:
    """Logits and trace of one forward without a cache; keyword arguments that Trace knows go to it."""
    outputs, trace = traced_outputs(model, {"input_ids": input_ids}, {"use_cache": False, **kwargs})
    return outputs.logits, trace


def left_padded() -> dict[str, Tensor]:
    """Rows of 24, 19 and 13 tokens, as generate takes them."""
    ids, mask = tokens(), torch.ones(3, LENGTH, dtype=torch.long)
    ids[1, :5], mask[1, :5] = 0, 0
    ids[2, :11], mask[2, :11] = 0, 0
    return {"input_ids": ids, "attention_mask": mask}


class CausalCase(Case):
    """Rows are texts of 24 tokens, or padded to it on either side."""

    saved = "left"
    causal = True
    arguments: ClassVar[dict[str, Any]] = {"use_cache": False}
    saved_trace: ClassVar[dict[str, Any]] = {"lookahead": True}

    @property
    def about(self) -> Family:
        return FAMILIES[self.family]

    @property
    def load(self) -> dict[str, Any]:
        # transformers 5.17 loads Gemma 2 with sdpa, which has no soft caps.
        return {"attn_implementation": self.about.implementation or "sdpa"}

    def dense(self, **settings: Any) -> PreTrainedModel:
        return dense(self.family, **settings)

    def spread(self, model: PreTrainedModel) -> PreTrainedModel:
        return spread(model)

    def neutral(self, model: PreTrainedModel) -> PreTrainedModel:
        return neutral(model)

    def inputs(self, layout: str = "", seed: int = 0) -> dict[str, Tensor]:
        return left_padded() if layout == "left" else {"input_ids": tokens(seed=seed)}

    def lengths(self) -> Tensor:
        return torch.full((3,), LENGTH)

    def batches(self) -> list[Batch]:
        rows = [tokens()[row : row + 1, :length] for row, length in enumerate(LENGTHS)]
        return [self._padded(rows, left) for left in (False, True)]

    def _padded(self, rows: list[Tensor], left: bool) -> Batch:
        padded, mask = torch.zeros(3, LENGTH, dtype=torch.long), torch.zeros(3, LENGTH, dtype=torch.long)
        for row, length in enumerate(LENGTHS):
            where = slice(LENGTH - length, LENGTH) if left else slice(0, length)
            padded[row, where], mask[row, where] = rows[row][0], 1
        # As generate does it.
        position = (mask.cumsum(-1) - 1).clamp(min=0)
        return Batch(
            {"input_ids": padded, "attention_mask": mask, "position_ids": position}, [{"input_ids": row} for row in rows], moves=left
        )

    def tied(self, inputs: dict[str, Tensor]) -> dict[str, Tensor]:
        ids = inputs["input_ids"].clone()
        ids[1] = 7
        return inputs | {"input_ids": ids}

    def loss(self, model: PreTrainedModel, inputs: dict[str, Tensor], trace: Trace | None = None) -> Tensor:
        given = {} if trace is None else {"trace": trace}
        loss: Tensor = self.run(model, inputs, labels=inputs["input_ids"], **given).loss
        return loss

    def reference(self, model: PreTrainedModel, plain: PreTrainedModel, trace: Trace) -> Tensor:
        return masked_reference(model, plain, tokens(), trace, self.method)

    def exact(self, training: bool, padded: bool) -> bool:
        return True

    def tokens_of(self, answer: Tensor, row: int, inputs: dict[str, Tensor]) -> Tensor:
        return answer[row, _real(inputs, row)]

    def kept_of(self, routing: Routing, row: int, inputs: dict[str, Tensor]) -> Tensor:
        return routing.kept_mask[row, _real(inputs, row)]


def _real(inputs: dict[str, Tensor], row: int) -> Tensor:
    """(N,) bool, the tokens of a row that are no padding."""
    return inputs.get("attention_mask", torch.ones_like(inputs["input_ids"]))[row].bool()


CASES = [CausalCase(*pair) for pair in PAIRS]
