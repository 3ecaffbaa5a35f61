"""Vision-language models: every method × every family. A new method is one more line in METHODS; a new family one more in FAMILIES."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, ClassVar

import torch
from torch import Tensor
from transformers import AutoConfig, LlavaForConditionalGeneration, PreTrainedModel

from laconic import CompressionConfig, StageConfig, Trace, compress
from laconic.modules.tokens.trace import Routing

from .bypassed import causal_mask, hide_and_keep
from .case import Batch, Case, stack_of
from .decoders import _COMMON as TEXT
from .decoders import neutral, spread
from .method import Family, Method

LAYERS, LENGTH, IMAGE, PATCH, PLACEHOLDER = 4, 24, 12, 4, 47
# Tokens of one image.
VISUAL = (IMAGE // PATCH) ** 2
# Images of each row: one amid text, two, and text alone.
ROWS = ((17, 1), (24, 2), (9, 0))


@dataclass(frozen=True)
class VisualMethod(Method):
    """A method whose stages touch the visual tokens of the language model.

    Attributes:
        once: it runs over one family, since nothing of it depends on the family.
    """

    once: bool = False

    def config(self, *keeps: float, layers: tuple[int, ...] = (1, 2)) -> CompressionConfig:
        stages = [
            StageConfig(layer=layer, site=self.site, keep=keep, stack="text", scope="visual", **self.parts)
            for layer, keep in zip(layers, keeps, strict=False)
        ]
        return CompressionConfig(stages, None if self.bypass else {"text": {"layer": LAYERS, "by": "rejoin"}})


_around = partial(VisualMethod, site="around")
_LEARNED, _LINEAR = ({"scorer": {"name": name, "detach": True}} for name in ("learned", "linear"))
METHODS = [
    VisualMethod("last_query", {"scorer": "last_query"}),
    VisualMethod("pyramiddrop", {"scorer": "last_query", "count": "dynamicvit"}),
    VisualMethod("divprune", {"scorer": "diversity"}),
    VisualMethod("dart", {"scorer": {"name": "pivots", "pivots": 3}}),
    VisualMethod("density_peaks", {"scorer": "density_peaks"}, once=True),
    VisualMethod("query_similarity", {"scorer": "query_similarity"}, once=True),
    VisualMethod("learned", _LEARNED),
    VisualMethod("vision_selector", {"scorer": {"name": "self_attention", "detach": True}}, once=True),
    VisualMethod("learned_attached", {"scorer": "learned"}, detached=False),
    VisualMethod("threshold", {**_LEARNED, "selector": "threshold"}, adaptive=True),
    VisualMethod("random", {"scorer": "random"}, positional=True),
    _around("around", {**_LINEAR, "selector": "top_k"}),
    _around("around_last_query", {"scorer": "last_query"}),
    _around("around_gate", {**_LINEAR, "selector": "threshold", "estimator": "gate"}),
    _around("around_symmetric", {**_LINEAR, "estimator": "symmetric_gate"}, once=True),
    _around("around_mlp", {**_LINEAR, "selector": "predictor"}, site="around_mlp"),
]

_TOWER = {
    "hidden_size": 16,
    "intermediate_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "image_size": IMAGE,
    "patch_size": PATCH,
}
_SIGLIP = {**_TOWER, "model_type": "siglip_vision_model", "vision_use_head": False}
_FULL = {"vision_config": _SIGLIP, "vision_feature_select_strategy": "full"}
FAMILIES = {
    "llava": Family({}, model_type="llama"),
    "llava_mistral": Family({"text_config": {"sliding_window": 7}}, model_type="mistral"),
    "llava_qwen2": Family(_FULL, model_type="qwen2"),
    "llava_qwen3": Family({**_FULL, "text_config": {"head_dim": 8}}, model_type="qwen3"),
}
PAIRS: list[tuple[str, Method]] = [(family, method) for family in FAMILIES for method in METHODS if family == "llava" or not method.once]


def dense(family: str = "llava", **settings: Any) -> LlavaForConditionalGeneration:
    """A tiny random model in evaluation mode. What reads images is not tiny, so that answers depend on them."""
    torch.manual_seed(1)
    attention, about = settings.pop("attn_implementation", "sdpa"), FAMILIES[family].settings | settings.pop("vision", {})
    config = AutoConfig.for_model(
        "llava",
        vision_config=about.get("vision_config", {**_TOWER, "model_type": "clip_vision_model"}),
        text_config={**TEXT, "model_type": FAMILIES[family].model_type, **about.get("text_config", {}), **settings},
        image_token_id=PLACEHOLDER,
        image_token_index=PLACEHOLDER,
        vision_feature_select_strategy=about.get("vision_feature_select_strategy", "default"),
    )
    model: LlavaForConditionalGeneration = LlavaForConditionalGeneration._from_config(config, attn_implementation=attention).eval()
    with torch.no_grad():
        for parameter in model.model.multi_modal_projector.parameters():
            parameter.normal_(0, 0.5)
    return model


def row(number: int) -> dict[str, Tensor]:
    """One of ROWS, alone: words between and after its images."""
    length, images = ROWS[number]
    ids = torch.randint(2, PLACEHOLDER, (1, length), generator=torch.Generator().manual_seed(number))
    for image in range(images):
        start = 1 + image * (VISUAL + 1)
        ids[:, start : start + VISUAL] = PLACEHOLDER
    return {"input_ids": ids} | ({"pixel_values": pixels(images, number)} if images else {})


def pixels(images: int, seed: int = 0) -> Tensor:
    return torch.randn(images, 3, IMAGE, IMAGE, generator=torch.Generator().manual_seed(seed))


def batch(left: bool = False, rows: Sequence[int] = (0, 1, 2)) -> dict[str, Tensor]:
    """Rows of ROWS, padded on one side, as generate takes them."""
    alone = [row(number) for number in rows]
    ids, mask = torch.zeros(len(rows), LENGTH, dtype=torch.long), torch.zeros(len(rows), LENGTH, dtype=torch.long)
    for at, one in enumerate(alone):
        length = one["input_ids"].shape[1]
        where = slice(LENGTH - length, LENGTH) if left else slice(0, length)
        ids[at, where], mask[at, where] = one["input_ids"][0], 1
    images = [one["pixel_values"] for one in alone if "pixel_values" in one]
    given = {"input_ids": ids, "attention_mask": mask}
    return given | ({"pixel_values": torch.cat(images)} if images else {})


def whole(seed: int = 0) -> dict[str, Tensor]:
    """Three rows of 24 tokens: one image, two, none."""
    ids = torch.randint(2, PLACEHOLDER, (3, LENGTH), generator=torch.Generator().manual_seed(seed))
    for number, start in ((0, 2), (1, 1), (1, 2 + VISUAL)):
        ids[number, start : start + VISUAL] = PLACEHOLDER
    return {"input_ids": ids, "pixel_values": pixels(3, seed)}


def labels(input_ids: Tensor) -> Tensor:
    """Labels of the words that follow a row's last image and one more word; of all words but the first two in a row of text."""
    place = torch.arange(input_ids.shape[1])
    last = torch.where(input_ids == PLACEHOLDER, place, 0).amax(1, keepdim=True)
    return input_ids.masked_fill(place <= last + 1, -100)


class VisualCase(Case):
    """Rows have images amid text, or text alone."""

    saved = "left"
    causal = True
    # The end of the prompt is that of what a cache is filled with, where nothing else says it.
    arguments: ClassVar[dict[str, Any]] = {"use_cache": True}

    @property
    def about(self) -> Family:
        return FAMILIES[self.family]

    @property
    def load(self) -> dict[str, Any]:
        return {"attn_implementation": "sdpa"}

    def dense(self, **settings: Any) -> PreTrainedModel:
        return dense(self.family, **settings)

    def spread(self, model: PreTrainedModel) -> PreTrainedModel:
        return spread(model)

    def neutral(self, model: PreTrainedModel) -> PreTrainedModel:
        return neutral(model)

    def inputs(self, layout: str = "", seed: int = 0) -> dict[str, Tensor]:
        return batch(left=True) if layout == "left" else whole(seed)

    def lengths(self) -> Tensor:
        return torch.full((3,), LENGTH)

    def batches(self) -> list[Batch]:
        alone = [row(number) for number in range(3)]
        found = []
        for left in (False, True):
            given = batch(left)
            # As generate does it.
            position = (given["attention_mask"].cumsum(-1) - 1).clamp(min=0)
            found.append(Batch({**given, "position_ids": position}, alone, moves=left))
        return found

    def tied(self, inputs: dict[str, Tensor]) -> dict[str, Tensor]:
        return inputs

    def labels(self, inputs: dict[str, Tensor]) -> Tensor:
        return labels(inputs["input_ids"])

    def run(self, model: PreTrainedModel, inputs: Mapping[str, Tensor], **kwargs: Any) -> Any:
        # Labels say where the prompt ends, and training has no cache.
        return super().run(model, inputs, **({"use_cache": False} if "labels" in kwargs else {}), **kwargs)

    def reference(self, model: PreTrainedModel, plain: PreTrainedModel, trace: Trace) -> Tensor:
        given, language = whole(), plain.model.language_model
        hide_and_keep(model, stack_of(plain), trace, self.method)
        logits: Tensor = plain(**given, use_cache=False, attention_mask=causal_mask(given["input_ids"], language)).logits
        return logits

    def exact(self, training: bool, padded: bool) -> bool:
        return True

    def tokens_of(self, answer: Tensor, row: int, inputs: dict[str, Tensor]) -> Tensor:
        return answer[row, self._real(inputs, row)]

    def kept_of(self, routing: Routing, row: int, inputs: dict[str, Tensor]) -> Tensor:
        first = self._real(inputs, row).byte().argmax()
        return super().kept_of(routing, row, inputs) - first

    def _real(self, inputs: dict[str, Tensor], row: int) -> Tensor:
        return inputs.get("attention_mask", torch.ones_like(inputs["input_ids"]))[row].bool()


def compressed(family: str, method: Method, *keeps: float, **settings: Any) -> PreTrainedModel:
    return spread(compress(dense(family, **settings), method.config(*keeps)))


CASES = [VisualCase(*pair) for pair in PAIRS]
