"""Text encoders: every method × every family. A new method is one more line in METHODS; a new family one more in FAMILIES."""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import Tensor
from transformers import AutoConfig, AutoModelForSequenceClassification, PreTrainedModel

from laconic import CompressionConfig, Trace, compress

from .case import Batch, Case, spread, stack_of, traced_outputs
from .masked import Recorded, Reference, take
from .method import Family, Method, outside

LAYERS, VOCABULARY, CLASSES, LENGTH = 4, 48, 5, 24
LENGTHS = (24, 17, 9)

_DETACHED = {"scorer": {"name": "learned", "detach": True}}
METHODS = [
    Method("learned", _DETACHED),
    Method("learned_key_bias", {**_DETACHED, "estimator": "key_bias"}, same_kernel=False),
    Method("evidence", {"scorer": "evidence"}),
    Method("fuse", {**_DETACHED, "merger": "fuse"}),
    Method("random", {"scorer": "random"}, positional=True),
    Method("cls_attention", {"scorer": "cls_attention"}, site="between"),
    Method("tome", {"scorer": "bipartite", "merger": "bipartite"}, site="between"),
    Method("bipartite_tokens", {"scorer": {"name": "bipartite", "metric": "tokens"}, "merger": "bipartite"}),
    Method("squeeze", {**_DETACHED, "merger": {"name": "squeeze", "proportional": True}}),
    Method("threshold", {**_DETACHED, "selector": "threshold"}, adaptive=True),
    Method("gumbel", {**_DETACHED, "selector": "gumbel"}, site="between", adaptive=True),
    Method("around", _DETACHED, site="around"),
    Method("around_attention", _DETACHED, site="around_attention"),
    Method("around_mlp", {"scorer": "evidence"}, site="around_mlp"),
    *outside(),
]

_COMMON = {
    "vocab_size": VOCABULARY,
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": LAYERS,
    "num_attention_heads": 2,
    "max_position_embeddings": 64,
    "initializer_range": 0.3,
    "pad_token_id": 0,
}
_SPECIAL = ("bos_token_id", "eos_token_id", "cls_token_id", "sep_token_id")
# Windows of 3 tokens to each side, of 24; layers 0 and 3 look at all.
_MODERN = {"local_attention": 6, "initializer_cutoff_factor": 3.0, **dict.fromkeys(_SPECIAL)}
_BERT = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0, "type_vocab_size": 2}
_REFUSES = ("cls_attention", "tome")
# The head alone is another: methods after which there is something else to average.
_AVERAGED = ("learned", "fuse", "squeeze", "threshold", "around", "norm")
_MEAN = {**_MODERN, "classifier_pooling": "mean"}
FAMILIES = {
    "bert": Family(_BERT, prefix=1),
    "modernbert": Family(_MODERN, prefix=1, refuses=_REFUSES),
    "modernbert_mean": Family(_MEAN, model_type="modernbert", prefix=1, averages=True, refuses=_REFUSES, only=_AVERAGED),
}
PAIRS = [(family, method) for family in FAMILIES for method in METHODS if FAMILIES[family].tests(method)]


def dense(family: str, **settings: Any) -> PreTrainedModel:
    """A tiny random classifier in evaluation mode."""
    torch.manual_seed(1)
    attention = settings.pop("attn_implementation", "sdpa")
    about = FAMILIES[family]
    config = AutoConfig.for_model(about.model_type or family, num_labels=CLASSES, **{**_COMMON, **about.settings, **settings})
    model: PreTrainedModel = AutoModelForSequenceClassification.from_config(config, attn_implementation=attention).eval()
    with torch.no_grad():
        # Behind a fresh LayerNorm of BERT all tokens have one length, which a scorer by length takes for ties.
        for name, parameter in model.named_parameters():
            if name.endswith("LayerNorm.weight"):
                parameter.normal_(1, 0.2)
    return model


def compressed(family: str, method: Method, *keeps: float, **settings: Any) -> PreTrainedModel:
    return spread(compress(dense(family, **settings), method.config(*keeps)))


def tokens(rows: int = 3, length: int = LENGTH, seed: int = 0) -> Tensor:
    return torch.randint(2, VOCABULARY, (rows, length), generator=torch.Generator().manual_seed(seed))


def labels(rows: int = 3) -> Tensor:
    return torch.arange(rows) % CLASSES


def lengths_mask(*lengths: int) -> Tensor:
    """(B, LENGTH) int64 attention_mask of rows of these lengths, padded behind the text."""
    return (torch.arange(LENGTH) < torch.tensor(lengths)[:, None]).long()


def traced(model: PreTrainedModel, input_ids: Tensor, **kwargs: Any) -> tuple[Tensor, Trace]:
    """Logits and trace of one forward; keyword arguments that Trace knows go to it."""
    outputs, trace = traced_outputs(model, {"input_ids": input_ids}, kwargs, own=("labels",))
    return outputs.logits, trace


class _TextReference(Reference):
    """Every token through every layer, each with the rotations and the window of its type; what was left out is hidden."""

    recorded: list[Recorded]

    def begin_layer(self, index: int) -> None:
        self.kwargs = {key: value for key, value in self.recorded[index].kwargs.items() if key != "attention_mask"}

    def half(self, layer: Any, half: str, routing: Any) -> None:
        whole = self.kwargs
        if "position_embeddings" in whole:
            place = self.place[..., None]
            turned = [part.expand(len(place), -1, -1) for part in whole["position_embeddings"]]
            self.kwargs = whole | {"position_embeddings": tuple(part.gather(1, place.expand(-1, -1, part.shape[-1])) for part in turned)}
        super().half(layer, half, routing)
        self.kwargs = whole

    def mask(self, layer: Any, alive: Tensor) -> Tensor:
        mask = super().mask(layer, alive)
        if getattr(layer, "attention_type", "full_attention") == "full_attention":
            return mask
        distance = (self.place[:, :, None] - self.place[:, None]).abs()
        return mask.masked_fill((distance > layer.config.sliding_window)[:, None], -1e30)


def masked_reference(plain: PreTrainedModel, ids: Tensor, trace: Trace) -> Tensor:
    """Logits of a forward that computes every token in every layer."""
    stack = stack_of(plain)
    twin = copy.deepcopy(plain)
    recorded = _replace_layers(twin)
    twin(input_ids=ids)
    assert trace.state is not None
    reference = _TextReference(recorded[0].given, stack.adapter, {}, trace.state.proportional)
    reference.recorded = recorded
    kept = reference.run(stack.layers, trace)
    if trace.state.proportional:
        # A head that averages counts a merged token as all that it stands for.
        kept = take(kept, trace.state.source)
    _replace_layers(twin, kept)
    return twin(input_ids=ids).logits


def _replace_layers(twin: PreTrainedModel, out: Tensor | None = None) -> list[Recorded]:
    """Every layer notes what it is given and hands on ``out``, or what it was given."""
    layers = stack_of(twin).layers
    for index, layer in enumerate(layers):
        recorded = Recorded(out)
        recorded.attention_type = getattr(layer, "attention_type", None)
        layers[index] = recorded
    return list(layers)


def restored(layer: int = LAYERS, by: str = "rejoin") -> CompressionConfig:
    """A stage whose tokens come back."""
    return CompressionConfig([{"layer": 1, "keep": 0.5, **_DETACHED}], {"layer": layer, "by": by})


class TextCase(Case):
    """Rows are texts of 24 tokens, or padded behind texts of 24, 17 and 9."""

    usual = saved = "padded"

    @property
    def about(self) -> Family:
        return FAMILIES[self.family]

    def dense(self, **settings: Any) -> PreTrainedModel:
        return dense(self.family, **settings)

    def inputs(self, layout: str = "", seed: int = 0) -> dict[str, Tensor]:
        mask = {"attention_mask": lengths_mask(*LENGTHS)} if (layout or self.usual) == "padded" else {}
        return {"input_ids": tokens(seed=seed), **mask}

    def lengths(self) -> Tensor:
        return torch.tensor(LENGTHS)

    def batches(self) -> list[Batch]:
        padded = self.inputs()
        alone = [{"input_ids": padded["input_ids"][row : row + 1, :length]} for row, length in enumerate(LENGTHS)]
        # What is in the padding does not matter.
        other = padded | {"input_ids": padded["input_ids"].where(padded["attention_mask"].bool(), 1)}
        return [Batch(padded, alone), Batch(other, alone)]

    def tied(self, inputs: dict[str, Tensor]) -> dict[str, Tensor]:
        ids = inputs["input_ids"].clone()
        ids[1] = 7
        return inputs | {"input_ids": ids}

    def reference(self, model: PreTrainedModel, plain: PreTrainedModel, trace: Trace) -> Tensor:
        return masked_reference(plain, tokens(), trace)

    def exact(self, training: bool, padded: bool) -> bool:
        # A bias with gradient, and sizes that are all 1, are a mask all the same: another kernel.
        return self.method.same_kernel and self.method.parts.get("merger", "drop") in ("drop", "fuse") and not padded


CASES = [TextCase(*pair) for pair in PAIRS]
