"""Vision-language families beside LLaVA: stages in the language model."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode
from transformers import PreTrainedModel

from laconic import CompressionConfig, StageConfig, Trace, compress, decompress, from_pretrained
from laconic.modules.cost.cost import CostModel
from laconic.modules.decoding.cache import RoutedCache
from tests.matrix.decoders import spread
from tests.matrix.image_text import FAMILIES, IMAGES, PLACEHOLDER, attend_to, batch, dense, given_of, labels_of, language_layers, row

CLOSE = {"atol": 2e-5, "rtol": 1e-4}
METHODS: dict[str, dict[str, Any]] = {
    "random": {"scorer": "random"},
    "learned": {"scorer": {"name": "learned", "detach": True}},
    "last_query": {"scorer": "last_query", "count": "dynamicvit"},
    "around": {"scorer": {"name": "linear", "detach": True}, "site": "around"},
}


# Where positions have three axes, and where a mask looks both ways; the others run behind --all.
_DEFAULT = (("qwen3_vl", "last_query"), ("gemma3", "random"))


def _pairs(*names: str) -> list[Any]:
    every = [(family, name) for family in FAMILIES for name in names or METHODS if not (family == "gemma3" and name == "last_query")]
    return [pytest.param(*pair, marks=[] if pair in _DEFAULT else pytest.mark.slow) for pair in every]


def _families() -> list[Any]:
    default = {family for family, _ in _DEFAULT}
    return [pytest.param(family, marks=[] if family in default else pytest.mark.slow) for family in FAMILIES]


def _model(family: str, name: str, keep: float = 0.5, layers: tuple[int, ...] = (1, 2), **settings: Any) -> PreTrainedModel:
    stages = [StageConfig(layer=layer, keep=keep, stack="text", scope="visual", **METHODS[name]) for layer in layers]
    return spread(compress(dense(family, **settings), CompressionConfig(stages)))


@pytest.mark.parametrize(("family", "name"), _pairs())
def test_keep_1_is_the_dense_model_bit_for_bit_loss_and_gradients(family: str, name: str) -> None:
    given = batch(family)
    answers, losses = labels_of(given["input_ids"]), []
    model, plain = _model(family, name, 1.0), dense(family)
    for each in (model, plain):
        trace = {"trace": Trace(labels=answers)} if each is model else {}
        losses.append(each(**given, labels=answers, use_cache=False, **trace).loss)
        losses[-1].backward()
    assert torch.equal(*losses)
    ours = {key: value.grad for key, value in model.named_parameters() if ".stages." not in key}
    for key, value in plain.named_parameters():
        assert (ours[key] is None and value.grad is None) or torch.equal(ours[key], value.grad), key


@pytest.mark.parametrize("family", _families())
def test_a_row_without_a_mask_is_seen_as_by_the_dense_model(family: str) -> None:
    given = given_of(row(family, 1))
    ours = _model(family, "random", 1.0)(**given, trace=Trace(), use_cache=False).logits
    assert torch.equal(ours, dense(family)(**given, use_cache=False).logits)


@pytest.mark.parametrize(("family", "name"), _pairs("random", "last_query"))
def test_a_real_drop_equals_a_mask_in_every_layer_behind_it(family: str, name: str) -> None:
    given, model, plain = given_of(row(family, 1)), _model(family, name), dense(family)
    trace = Trace()
    logits = model(**given, trace=trace, use_cache=True).logits
    hidden = torch.ones_like(given["input_ids"], dtype=torch.bool)
    for index, layer in enumerate(language_layers(plain)):
        routing = trace.routings.get(f"text.before_{index}")
        if routing is not None:
            hidden = torch.zeros_like(hidden).scatter(1, routing.state.position, routing.kept_mask) & hidden

        attend_to(layer, hidden)
    expected = plain(**given, use_cache=False).logits
    words = given["input_ids"] != PLACEHOLDER
    assert int(hidden.sum()) < hidden.numel() - FAMILIES[family].tokens
    torch.testing.assert_close(logits[words], expected[words], **CLOSE)


@pytest.mark.parametrize(("family", "name"), _pairs())
def test_a_mixed_batch_is_each_row_alone_and_decoding_equals_one_forward(family: str, name: str) -> None:
    model, given = _model(family, name), batch(family)
    how: dict[str, Any] = {"max_new_tokens": 4, "do_sample": False}
    made = model.generate(**given, **how)
    counts = {}
    for number in range(3):
        if name != "random":
            assert torch.equal(model.generate(**given_of(row(family, number)), **how)[0, -4:], made[number, -4:])
        trace = Trace()
        model(**given_of(row(family, number)), trace=trace, use_cache=True)
        counts[number] = [routing.counts() for routing in trace.routings.values()]
    visual = FAMILIES[family].routable
    assert [counts[number][0][1] for number in range(3)] == [images * visual for images in IMAGES]
    one = given_of(row(family, 0))
    prompt = torch.arange(one["input_ids"].shape[1])[None] < one["input_ids"].shape[1] - 4
    whole = model(**one, trace=Trace(prompt=prompt), use_cache=False).logits
    cache, split = RoutedCache(model.config), one["input_ids"].shape[1] - 3
    first = {key: value[:, :split] if value.shape[:2] == one["input_ids"].shape else value for key, value in one.items()}
    parts = [model(**first, past_key_values=cache, use_cache=True).logits]
    assert cache.get_seq_length() == split
    for at in range(split, one["input_ids"].shape[1]):
        ids = one["input_ids"][:, at : at + 1]
        more = {key: torch.zeros_like(ids) for key in ("token_type_ids", "mm_token_type_ids") if key in one}
        parts.append(model(ids, past_key_values=cache, use_cache=True, **more).logits)
    if not family.startswith("qwen"):
        # Positions of these follow the attention mask, which generate keeps.
        torch.testing.assert_close(torch.cat(parts, 1), whole, **CLOSE)
    assert model.generate(**given, num_beams=2, **how).shape == made.shape


@pytest.mark.parametrize("family", _families())
def test_it_is_saved_loaded_taken_back_and_trained_with_checkpointing(family: str, tmp_path: Path) -> None:
    given, model = given_of(batch(family)), _model(family, "learned")
    answers = labels_of(given["input_ids"])
    expected = model(**given, use_cache=True).logits
    model.save_pretrained(tmp_path)
    assert torch.equal(from_pretrained(tmp_path)(**given, use_cache=True).logits, expected)
    model.train()
    model(**given, labels=answers, trace=Trace(labels=answers), use_cache=False).loss.backward()
    assert any(bool(p.grad.any()) for name, p in model.named_parameters() if ".scorer." in name and p.grad is not None)
    assert type(decompress(model.eval())) is type(dense(family))


@pytest.mark.parametrize("family", _families())
def test_analytic_macs_are_those_of_a_counter(family: str) -> None:
    model, given = _model(family, "random", attn_implementation="eager"), given_of(row(family, 0))
    # 64 tokens beside the visual ones, to which the ends of lines do not belong.
    words = 64 - (given["input_ids"].shape[1] - FAMILIES[family].routable)
    longer = {key: torch.nn.functional.pad(value, (0, words), value=3 * (key == "input_ids")) if value.shape == given["input_ids"].shape else value
              for key, value in given.items()}  # fmt: skip
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        dense(family, attn_implementation="eager")(**longer, use_cache=False)
    cost = CostModel(model, size=(24, 24))
    assert cost.shapes["text"].routable == FAMILIES[family].routable
    assert cost().dense_macs == pytest.approx(counter.get_total_flops() / 2, rel=0.01)
    trace = Trace()
    model(**longer, trace=trace, use_cache=True)
    assert cost.achieved(trace) == pytest.approx(cost().macs_ratio, rel=0.02)


def test_deepstack_keeps_all_visual_tokens_until_its_last_layer() -> None:
    with pytest.raises(
        ValueError, match="stages text.before_0 remove tokens before layer 1, and DeepStack adds .*: take layer 1 or a later one"
    ):
        _model("qwen3_vl", "random", layers=(0,))
    assert _model("qwen3_vl", "around", layers=(0,)) is not None
