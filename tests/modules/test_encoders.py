"""What text encoders have beside the invariants that all kinds of models share."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode
from transformers import (
    AutoConfig,
    AutoModelForMaskedLM,
    AutoModelForSequenceClassification,
    BertConfig,
    BertLMHeadModel,
    BertModel,
    PreTrainedModel,
)

from laconic import CompressionConfig, StageConfig, Trace, compress, pooled
from laconic.modules.cost.cost import CostModel
from laconic.modules.cost.count_rules import tokens_kept
from laconic.modules.tokens.state import TokenState
from tests.matrix import stack_of
from tests.matrix.encoders import (
    FAMILIES,
    LENGTH,
    LENGTHS,
    METHODS,
    compressed,
    dense,
    lengths_mask,
    restored,
    spread,
    tokens,
    traced,
)

families = pytest.mark.parametrize("family", FAMILIES)
CLOSE = {"atol": 2e-5, "rtol": 1e-4}
ROUTABLE = LENGTH - 1


@families
def test_5_padding_in_front_is_refused_since_the_first_token_is_the_head_s(family: str) -> None:
    model = compressed(family, METHODS[0], 0.5, 0.6)
    with pytest.raises(ValueError, match="hides the first token.*pad behind the text"):
        traced(model, tokens(), attention_mask=lengths_mask(*LENGTHS).flip(1))
    with pytest.raises(ValueError, match=r"attention_mask of shape \(3, 1, 24, 24\)"):
        traced(model, tokens(), attention_mask=torch.ones(3, 1, 24, 24))


@families
@pytest.mark.parametrize("training", [False, True], ids=["eval", "train"])
def test_the_two_halves_are_the_layer_bit_for_bit(family: str, training: bool) -> None:
    dropout = {"bert": "hidden_dropout_prob"}.get(family, "mlp_dropout")
    model = dense(family, **{dropout: 0.3}).train(training)
    adapter = stack_of(model).adapter
    for layer in stack_of(model).layers:
        given: list[Any] = []
        hook = layer.register_forward_pre_hook(lambda _, args, kwargs, to=given: to.append((args, kwargs)), with_kwargs=True)
        model(tokens(), attention_mask=lengths_mask(*LENGTHS))
        hook.remove()
        (hidden, *args), kwargs = given[0]
        kwargs = dict(zip(adapter.positional, args, strict=False)) | kwargs
        torch.manual_seed(5)
        whole = layer(hidden, **kwargs)
        torch.manual_seed(5)
        halves = adapter.mlp_half(layer, adapter.attention_half(layer, hidden, **kwargs))
        assert torch.equal(halves, whole)


@pytest.mark.parametrize(("family", "keeps"), [("bert", (0.5, 0.6)), ("bert", (1.0, 1.0)), ("modernbert_mean", (0.5, 0.6))])
@pytest.mark.parametrize("name", ["learned", "evidence", "squeeze", "around_attention"])
def test_cost_equals_a_counter_on_the_real_module(family: str, name: str, keeps: tuple[float, ...]) -> None:
    method = next(method for method in METHODS if method.name == name)
    # Windows as wide as the row: fused attention computes what a window hides.
    settings = {} if family == "bert" else {"local_attention": 2 * LENGTH}
    model = compressed(family, method, *keeps, attn_implementation="eager", **settings)
    counter = FlopCounterMode(display=False)
    with torch.no_grad(), counter:
        _, trace = traced(model, tokens(1))
    cost = CostModel(model, size=LENGTH)
    assert cost().macs == pytest.approx(counter.get_total_flops() / 2, rel=6e-3)
    assert cost.achieved(trace) == pytest.approx(cost().macs_ratio, rel=1e-6)
    if keeps == (1.0, 1.0):
        # Stages that keep every token run no router.
        assert cost().macs == cost().dense_macs


@pytest.mark.parametrize(("family", "method"), [(family, name) for family in FAMILIES for name in FAMILIES[family].refuses])
def test_methods_that_a_family_cannot_have_are_refused_with_the_cure(family: str, method: str) -> None:
    parts = next(item for item in METHODS if item.name == method)
    model = dense(family)
    with pytest.raises(ValueError, match="metric: tokens|take 'learned'"):
        compress(model, parts.config(0.5, 0.6))
    assert torch.equal(model(tokens()).logits, dense(family)(tokens()).logits)


@families
def test_a_mask_that_only_flash_attention_reads_is_refused(family: str) -> None:
    model = dense(family)
    model.config._attn_implementation = "flash_attention_2"
    with pytest.raises(ValueError, match="'flash_attention_2' is not supported.*'sdpa' or 'eager'"):
        compress(model, METHODS[0].config(0.5, 0.5))


@pytest.mark.parametrize("model_type", ["bert", "modernbert"])
def test_a_head_that_reads_every_token_needs_them_back(model_type: str) -> None:
    classifier = dense(model_type).config.to_dict()
    config = AutoConfig.for_model(**{**classifier, "architectures": None})

    def masked_lm() -> PreTrainedModel:
        torch.manual_seed(3)
        return AutoModelForMaskedLM.from_config(config).eval()

    with pytest.raises(ValueError, match=r"reads every token.*restore = \{layer: 4, by: unmerge\}.*'by: rejoin'"):
        compress(masked_lm(), METHODS[0].config(0.5, 0.6))
    around = spread(compress(masked_lm(), next(method for method in METHODS if method.name == "around").config(0.5, 0.6)))
    model = spread(compress(masked_lm(), restored()))
    for one in (around, model):
        logits = one(tokens(), attention_mask=lengths_mask(*LENGTHS), labels=tokens(seed=1)).logits
        assert logits.shape == (3, LENGTH, config.vocab_size)
        alone = one(tokens()[1:2, :17]).logits
        torch.testing.assert_close(logits[1, :17], alone[0], **CLOSE)
    cost = CostModel(model, size=LENGTH)
    # One square matrix and the vocabulary, for every token.
    assert cost.shape.head_macs_per_token == 16 * 16 + 16 * config.vocab_size
    assert cost().kept == {"before_1": 12}


def test_what_is_no_plain_encoder_is_refused() -> None:
    settings = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 16, "vocab_size": 8}
    with pytest.raises(ValueError, match="BertLMHeadModel cannot be compressed: it is a decoder"):
        compress(BertLMHeadModel(BertConfig(**settings, is_decoder=True)), METHODS[0].config(0.5, layers=(1,)))
    for wrong, message in (({"is_decoder": True}, "is a decoder"), ({"chunk_size_feed_forward": 4}, "set it to 0")):
        model = AutoModelForSequenceClassification.from_config(BertConfig(**settings, **wrong))
        with pytest.raises(ValueError, match=message):
            compress(model, CompressionConfig([StageConfig(layer=1, keep=0.5)]))


def test_segments_and_places_are_those_of_the_whole_text() -> None:
    model = compressed("bert", METHODS[0], 0.5, 0.6)
    segments = (torch.arange(LENGTH) > 11).long().expand(3, -1)
    plain, _ = traced(model, tokens())
    with_segments, trace = traced(model, tokens(), token_type_ids=segments)
    assert not torch.equal(plain, with_segments)
    again, _ = traced(model, tokens(), token_type_ids=segments, position_ids=torch.arange(LENGTH)[None])
    assert torch.equal(with_segments, again)
    assert isinstance(trace.state, TokenState)
    assert trace.state.tokens == 1 + tokens_kept(tokens_kept(ROUTABLE, 0.5), 0.6)


@pytest.mark.parametrize("merging", [False, True])
def test_a_pooled_row_of_a_padded_batch_is_the_mean_of_its_own_tokens_each_for_as_many_as_it_stands_for(merging: bool) -> None:
    torch.manual_seed(0)
    config = BertConfig(vocab_size=64, hidden_size=16, intermediate_size=32, num_hidden_layers=2, num_attention_heads=2)
    stage = StageConfig(layer=1, keep=0.6, **({"site": "between", "scorer": "bipartite", "merger": "bipartite"} if merging else {"scorer": "cls_attention"}))  # fmt: skip
    model, trace, mask = compress(BertModel(config).eval(), CompressionConfig([stage])), Trace(), lengths_mask(*LENGTHS)
    ids = torch.randint(64, (3, LENGTH))
    with torch.no_grad():
        found = pooled(model(ids, attention_mask=mask, trace=trace).last_hidden_state, trace)
        for row, length in enumerate(LENGTHS):
            own = Trace()
            states = model(ids[row : row + 1, :length], trace=own).last_hidden_state[0]
            assert states.shape[0] < length
            weight = own.flow().tokens.size[0] if merging else torch.ones(states.shape[0])
            assert weight.sum() == (length if merging else states.shape[0])
            torch.testing.assert_close(found[row], (weight @ states) / weight.sum(), **CLOSE)
        with pytest.raises(ValueError, match="have 24 tokens a row, and the trace has seen no tokens: give the last_hidden_state"):
            pooled(torch.zeros(1, 24, 16), Trace())
