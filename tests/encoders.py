"""The matrix of text encoders. A new family is one more line in FAMILIES; a new method one more in METHODS."""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import Tensor
from transformers import AutoConfig, AutoModelForSequenceClassification, PreTrainedModel

from laconic import CompressionConfig, Trace, compress
from laconic.modules.config import SITES
from tests.matrix import Method, settle, stack_of
from tests.modules.test_invariants import _Recorded, _Reference, _take

LAYERS, VOCABULARY, CLASSES, LENGTH = 4, 48, 5, 24

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
FAMILIES: dict[str, dict[str, Any]] = {
    "bert": {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0, "type_vocab_size": 2},
    "modernbert": _MODERN,
    "modernbert_mean": {**_MODERN, "classifier_pooling": "mean"},
}
REFUSES = {"modernbert": ("cls_attention", "tome"), "modernbert_mean": ("cls_attention", "tome")}
# The head alone is another: methods after which there is something else to average.
_AVERAGED = ("learned", "fuse", "squeeze", "threshold", "around")
PAIRS = [
    (family, method)
    for family in FAMILIES
    for method in METHODS
    if method.name not in REFUSES.get(family, ()) and (family != "modernbert_mean" or method.name in _AVERAGED)
]


def dense(family: str, **settings: Any) -> PreTrainedModel:
    """A tiny random classifier in evaluation mode."""
    torch.manual_seed(1)
    attention = settings.pop("attn_implementation", "sdpa")
    config = AutoConfig.for_model(family.removesuffix("_mean"), num_labels=CLASSES, **{**_COMMON, **FAMILIES[family], **settings})
    model: PreTrainedModel = AutoModelForSequenceClassification.from_config(config, attn_implementation=attention).eval()
    return model


def spread(model: PreTrainedModel) -> PreTrainedModel:
    """Scores of fresh parts are nearly equal; spread them, so that decisions mean something."""
    torch.manual_seed(2)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if ".stages." in name and parameter.ndim > 1:
                parameter.normal_(0, 0.5)
    settle(model)
    return model


def compressed(family: str, method: Method, *keeps: float, **settings: Any) -> PreTrainedModel:
    return spread(compress(dense(family, **settings), method.config(*keeps)))


def tokens(rows: int = 3, length: int = LENGTH, seed: int = 0) -> Tensor:
    return torch.randint(2, VOCABULARY, (rows, length), generator=torch.Generator().manual_seed(seed))


def labels(rows: int = 3) -> Tensor:
    return torch.arange(rows) % CLASSES


def traced(model: PreTrainedModel, input_ids: Tensor, **kwargs: Any) -> tuple[Tensor, Trace]:
    """Logits and trace of one forward; keyword arguments that Trace knows go to it."""
    known = Trace.__dataclass_fields__
    trace = Trace(**{key: kwargs.pop(key) for key in list(kwargs) if key in known and key != "labels"})
    return model(input_ids=input_ids, trace=trace, **kwargs).logits, trace


class _TextReference(_Reference):
    """Every token through every layer, each with the rotations and the window of its type; who was left out is hidden."""

    def half(self, layer: Any, half: str, routing: Any) -> None:
        whole = self.kwargs
        if "position_embeddings" in whole:
            place = self.place[..., None]
            turned = [part.expand(len(place), -1, -1) for part in whole["position_embeddings"]]
            self.kwargs = whole | {"position_embeddings": tuple(part.gather(1, place.expand(-1, -1, part.shape[-1])) for part in turned)}
        super().half(layer, half, routing)
        self.kwargs = whole

    def mask(self, layer: Any, alive: Tensor) -> Tensor:
        own, self.kwargs = self.kwargs, {}
        mask = super().mask(layer, alive)
        self.kwargs = own
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
    shrinking = [routing for routing in trace.routings.values() if not routing.bypass]
    after = [*(routing.state for routing in shrinking[1:]), trace.state]
    for index, layer in enumerate(stack.layers):
        at = {site: trace.routings.get(f"{site}_{index}") for site in SITES}
        reference.kwargs = {key: value for key, value in recorded[index].kwargs.items() if key != "attention_mask"}
        if at["before"] is not None:
            reference.shrink(at["before"], after.pop(0))
        reference.half(layer, "attention", at["around"] or at["around_attention"])
        if at["between"] is not None:
            reference.shrink(at["between"], after.pop(0))
        reference.half(layer, "mlp", at["around"] or at["around_mlp"])
    kept = _take(reference.hidden, reference.slots)
    if trace.state.proportional:
        # A head that averages counts a merged token as all that it stands for.
        kept = _take(kept, trace.state.source)
    last = _replace_layers(twin, kept)
    assert last
    return twin(input_ids=ids).logits


def _replace_layers(twin: PreTrainedModel, out: Tensor | None = None) -> list[_Recorded]:
    """Every layer notes what it is given and hands on ``out``, or what it was given."""
    layers = stack_of(twin).layers
    for index, layer in enumerate(layers):
        recorded = _Recorded(out)
        recorded.attention_type = getattr(layer, "attention_type", None)
        layers[index] = recorded
    return list(layers)


def restored(layer: int = LAYERS, by: str = "rejoin") -> CompressionConfig:
    """A stage whose tokens come back."""
    return CompressionConfig([{"layer": 1, "keep": 0.5, **_DETACHED}], {"layer": layer, "by": by})
