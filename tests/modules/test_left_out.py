"""Stages with keep = 0: layers, and halves of layers, that are left out for every token."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig
from transformers import PreTrainedModel

from laconic import CompressionConfig, StageConfig, Trace, add_lora, compress, from_pretrained
from laconic.modules.compress import only_skips, skipped_layers, without_skipped
from laconic.modules.cost.cost import CostModel
from tests import matrix
from tests.matrix import decoders, encoders, stack_of, visual

INPUTS: dict[str, Any] = {
    "llama": {"input_ids": decoders.tokens()},
    "gemma3_text": {"input_ids": decoders.tokens()},
    "gpt2": {"input_ids": decoders.tokens()},
    "bert": {"input_ids": encoders.tokens()},
    "vit": {"pixel_values": matrix.images()},
}


def _dense(family: str) -> PreTrainedModel:
    kind: Any = {"bert": encoders, "vit": matrix}.get(family, decoders)
    model: PreTrainedModel = kind.dense(family)
    return model


def _compressed(family: str, **sites: list[int]) -> PreTrainedModel:
    stages = [StageConfig(layer=layer, site=site, keep=0) for site, layers in sites.items() for layer in layers]
    return compress(_dense(family), CompressionConfig(stages))


@pytest.mark.parametrize("family", INPUTS)
def test_a_layer_left_out_gives_the_answers_and_costs_of_a_model_without_it(family: str) -> None:
    model, shallower = _compressed(family, around=[1, 2]), without_skipped(_compressed(family, around=[1, 2]))
    assert only_skips(model)
    assert len(stack_of(shallower).layers) == shallower.config.num_hidden_layers == len(stack_of(model).layers) - 2
    trace = Trace()
    out = model(**INPUTS[family], trace=trace)
    assert torch.equal(out.logits, shallower(**INPUTS[family]).logits)
    cost, size = CostModel(model, size=24 if "input_ids" in INPUTS[family] else None), trace.flow().dense
    assert cost().macs == CostModel(shallower, size=24 if "input_ids" in INPUTS[family] else None)().macs
    assert cost.achieved(trace) == pytest.approx(cost().macs_ratio)
    assert [(tokens.attention, tokens.mlp) for tokens in cost().layers[:4]] == [(size, size), (0, 0), (0, 0), (size, size)][
        : len(cost().layers)
    ]
    # A teacher with all tokens is the dense model.
    everything = model(**INPUTS[family], trace=Trace(keep={"around_1": 1.0, "around_2": 1.0}))
    assert torch.equal(everything.logits, _dense(family)(**INPUTS[family]).logits)


@pytest.mark.parametrize("family", ["llama", "gemma3_text", "gpt2"])
def test_halves_left_out_generate_alike_with_and_without_a_cache(family: str) -> None:
    model, plain = _compressed(family, around=[2], around_attention=[1], around_mlp=[3]), _dense(family)
    layers, adapter = stack_of(plain).layers, stack_of(plain).adapter
    layers[2].forward = lambda hidden_states, *args, **kwargs: hidden_states
    layers[1].forward = lambda hidden_states, *args, **kwargs: adapter.mlp_half(layers[1], hidden_states)
    layers[3].forward = lambda hidden_states, *args, **kwargs: adapter.attention_half(
        layers[3], hidden_states, **(dict(zip(adapter.positional, args, strict=False)) | kwargs)
    )
    ids = decoders.tokens()
    assert torch.equal(model(ids, use_cache=False).logits, plain(ids, use_cache=False).logits)
    padded = decoders.left_padded()
    made = [model.generate(**padded, max_new_tokens=6, do_sample=False, use_cache=cached) for cached in (True, False)]
    assert torch.equal(*made)


def test_lora_trains_no_layer_that_is_left_out(tmp_path: Path) -> None:
    model = add_lora(_compressed("llama", around=[1]), LoraConfig(r=2))
    assert skipped_layers(model) == ["model.layers.1"]
    adapted = {name.split(".")[2] for name, value in model.named_parameters() if value.requires_grad}
    assert adapted == {"0", "2", "3"}
    model.train()(decoders.tokens(), labels=decoders.tokens()).loss.backward()
    assert all(value.grad is not None for value in model.parameters() if value.requires_grad)
    stored = _compressed("llama", around=[1], around_mlp=[3])
    stored.save_pretrained(tmp_path)
    assert torch.equal(from_pretrained(tmp_path)(decoders.tokens()).logits, stored(decoders.tokens()).logits)


def test_with_a_scope_the_other_tokens_are_processed() -> None:
    model, inputs, trace = visual.dense(), visual.row(0), Trace()
    text = int((inputs["input_ids"] != visual.PLACEHOLDER).sum())
    compress(model, CompressionConfig([StageConfig(layer=2, site="around", keep=0, stack="text", scope="visual")]))
    model(**inputs, trace=trace)
    assert trace.flow("text").layer_tokens[2].attention == text
    assert trace.routings["text.around_2"].achieved == 0
    words = {"input_ids": torch.randint(2, visual.PLACEHOLDER, (2, 9))}
    assert torch.equal(model(**words).logits, visual.dense()(**words).logits)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (
            {"site": "before"},
            r"keep = 0 must be in \(0, 1\].*keep = 0 leaves a layer out, at site around or around_attention or around_mlp",
        ),
        ({"site": "around", "scorer": "linear"}, "scorer = 'linear' has no effect where keep = 0 leaves the layer out: remove it"),
        ({"site": "around_mlp", "estimator": "gate"}, "estimator = 'gate' has no effect"),
    ],
)
def test_what_leaves_nothing_out_is_refused(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        compress(_dense("llama"), CompressionConfig([StageConfig(layer=1, keep=0, **settings)]))
