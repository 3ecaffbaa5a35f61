"""DESIGN's invariants for text encoders, every method × every family."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode
from transformers import AutoConfig, AutoModelForMaskedLM, AutoModelForSequenceClassification, BertConfig, BertLMHeadModel, PreTrainedModel

from laconic import CompressionConfig, StageConfig, Trace, compress, decompress
from laconic.modules.compress import checkpoint_activations
from laconic.modules.cost.cost import CostModel
from laconic.modules.cost.count_rules import tokens_kept
from laconic.modules.tokens.state import TokenState
from laconic.modules.tokens.trace import Routing
from tests.encoders import (
    FAMILIES,
    LENGTH,
    METHODS,
    PAIRS,
    REFUSES,
    compressed,
    dense,
    labels,
    masked_reference,
    restored,
    spread,
    tokens,
    traced,
)
from tests.matrix import Method

names = {"ids": lambda value: getattr(value, "name", value)}
families = pytest.mark.parametrize("family", FAMILIES)
pairs = pytest.mark.parametrize(("family", "method"), PAIRS, **names)
CLOSE = {"atol": 2e-5, "rtol": 1e-4}
ROUTABLE = LENGTH - 1


def _mask(*lengths: int) -> Tensor:
    return (torch.arange(LENGTH) < torch.tensor(lengths)[:, None]).long()


def _gradients(model: PreTrainedModel) -> dict[str, Tensor]:
    return {name: p.grad.clone() for name, p in model.named_parameters() if ".stages." not in name and p.grad is not None}


@pytest.mark.parametrize("padded", [False, True], ids=["whole", "padded"])
@pairs
def test_1_keep_1_gives_the_dense_outputs_and_gradients_bit_for_bit(family: str, method: Method, padded: bool) -> None:
    plain, model = dense(family), compressed(family, method, 1.0, 1.0)
    batch = {"input_ids": tokens(), **({"attention_mask": _mask(24, 17, 9)} if padded else {})}
    # A bias with gradient, and sizes that are all 1, are a mask all the same: another kernel.
    exact = method.same_kernel and method.name != "squeeze" and method.parts.get("merger") != "bipartite" and not padded
    equal: Any = torch.equal if exact else lambda ours, theirs: torch.testing.assert_close(ours, theirs, **CLOSE) is None
    assert equal(traced(model, **batch)[0], plain(**batch).logits)
    plain.train()
    model.train()
    ours, reference = (one(**batch, labels=labels()).loss for one in (model, plain))
    ours.backward()
    reference.backward()
    assert equal(ours, reference)
    expected, found = _gradients(plain), _gradients(model)
    assert found.keys() == expected.keys()
    assert all(equal(found[name], expected[name]) for name in expected)


@pairs
def test_1_decompress_restores_the_original(family: str, method: Method) -> None:
    plain, model = dense(family), compressed(family, method, 0.5, 0.5)
    original = decompress(model)
    assert {type(module) for module in original.modules()} == {type(module) for module in plain.modules()}
    assert torch.equal(original(tokens()).logits, plain(tokens()).logits)
    assert original.config.to_dict() == plain.config.to_dict()


@pytest.mark.parametrize(
    ("family", "method"),
    # With rows of different lengths a plain head would average filler; the rows alone are looked at below.
    [pair for pair in PAIRS if not (pair[1].adaptive and pair[0] == "modernbert_mean")],
    **names,
)
def test_2_dropping_equals_masking(family: str, method: Method) -> None:
    model = compressed(family, method, 0.5, 0.6)
    logits, trace = traced(model, tokens())
    assert len(trace.routings) == 2
    torch.testing.assert_close(logits, masked_reference(dense(family), tokens(), trace), **CLOSE)


@pairs
def test_3_sizes_add_up_unless_tokens_are_dropped(family: str, method: Method) -> None:
    _, trace = traced(compressed(family, method, 0.5, 0.6), tokens(), attention_mask=_mask(24, 17, 9))
    assert trace.state is not None
    whole = method.merges or method.bypass
    assert bool((trace.state.size.sum(-1) == torch.tensor([24, 17, 9])).all()) is whole


@pairs
def test_4_cls_keeps_its_place_and_order_is_preserved(family: str, method: Method) -> None:
    _, trace = traced(compressed(family, method, 0.4, 0.4), tokens(), attention_mask=_mask(24, 17, 9))
    for routing in trace.routings.values():
        index, valid = routing.decision.index, routing.decision.valid
        assert valid is not None
        assert bool((index[:, 0] == 0).all())
        assert bool(valid[:, 0].all())
        assert bool(((index[:, 1:] > index[:, :-1]) | ~valid[:, 1:]).all())
    assert trace.state is not None
    assert trace.state.protected.sum(-1).tolist() == [1, 1, 1]


@pairs
def test_5_a_padded_batch_equals_its_rows_alone(family: str, method: Method) -> None:
    model, ids, lengths = compressed(family, method, 0.5, 0.6), tokens(), (24, 17, 9)
    samples = torch.tensor([11, 5, 42])
    together, trace = traced(model, ids, attention_mask=_mask(*lengths), sample_ids=samples)
    for row, length in enumerate(lengths):
        alone, own = traced(model, ids[row : row + 1, :length], sample_ids=samples[row : row + 1])
        torch.testing.assert_close(together[row], alone[0], **CLOSE)
        for name, routing in own.routings.items():
            assert torch.equal(_kept(trace.routings[name], row), _kept(routing, 0))
    # What stands in the padding does not matter.
    other = torch.where(_mask(*lengths).bool(), ids, torch.ones_like(ids))
    torch.testing.assert_close(traced(model, other, attention_mask=_mask(*lengths), sample_ids=samples)[0], together, **CLOSE)


def _kept(routing: Routing, row: int) -> Tensor:
    index, valid = routing.decision.index[row], routing.decision.valid
    return routing.state.position[row][index if valid is None else index[valid[row]]]


@families
def test_5_padding_in_front_is_refused_since_the_first_token_is_the_head_s(family: str) -> None:
    model = compressed(family, METHODS[0], 0.5, 0.6)
    with pytest.raises(ValueError, match="hides the first token.*pad behind the text"):
        traced(model, tokens(), attention_mask=_mask(24, 17, 9).flip(1))
    with pytest.raises(ValueError, match=r"attention_mask of shape \(3, 1, 24, 24\)"):
        traced(model, tokens(), attention_mask=torch.ones(3, 1, 24, 24))


@pairs
def test_9_checkpointing_and_eager_give_the_same_loss_and_gradients(family: str, method: Method) -> None:
    results: list[tuple[Tensor, dict[str, Any]]] = []
    replay: dict[str, Any] = {}
    batch = {"input_ids": tokens(), "attention_mask": _mask(24, 17, 9), "labels": labels()}
    for how in ("sdpa", "checkpointing", "eager"):
        model = compressed(family, method, 0.5, 0.6, attn_implementation="eager" if how == "eager" else "sdpa").train()
        if how == "checkpointing":
            checkpoint_activations(model)
        trace = Trace(step=3, noise=0.5, replay=replay if how == "eager" else {})
        loss = model(**batch, trace=trace).loss
        replay = trace.decisions()
        loss = loss if trace.auxiliary_loss is None else loss + trace.auxiliary_loss
        loss.backward()
        results.append((loss.detach(), {name: p.grad for name, p in model.named_parameters() if p.grad is not None}))
    assert torch.equal(results[0][0], results[1][0])
    assert results[0][1].keys() == results[1][1].keys()
    assert all(torch.equal(results[0][1][name], results[1][1][name]) for name in results[0][1])
    torch.testing.assert_close(results[2][0], results[0][0], atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(results[2][1], results[0][1], atol=1e-4, rtol=1e-2)


_CLEAN = """
import sys, json, torch
from safetensors.torch import load_file, save_file
import laconic
torch.set_num_threads(1)
root = sys.argv[1]
for name in json.loads(sys.argv[2]):
    logits = laconic.from_pretrained(f"{root}/{name}")(**load_file(f"{root}/inputs")).logits
    save_file({"logits": logits.detach()}, f"{root}/{name}/logits")
"""


def test_10_saved_models_answer_bit_for_bit_in_a_clean_process(tmp_path: Path) -> None:
    from safetensors.torch import load_file, save_file

    expected, batch = {}, {"input_ids": tokens(), "attention_mask": _mask(24, 17, 9)}
    save_file(batch, tmp_path / "inputs")
    # Every method in a BERT; what ModernBERT adds has no weights.
    for family, method in [pair for pair in PAIRS if pair[0] == "bert" or pair[1] is METHODS[0]]:
        model, name = compressed(family, method, 0.5, 0.6), f"{family}-{method.name}"
        model.save_pretrained(tmp_path / name)
        expected[name] = traced(model, **batch)[0]
    done = subprocess.run([sys.executable, "-c", _CLEAN, str(tmp_path), json.dumps(list(expected))], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    equal = {name: torch.equal(load_file(tmp_path / name / "logits")["logits"], logits) for name, logits in expected.items()}
    assert equal == dict.fromkeys(expected, True)


@pairs
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
def test_11_achieved_counts_equal_the_count_rule_of_each_row(family: str, method: Method, dtype: torch.dtype) -> None:
    model = compressed(family, method, 0.37, 0.61).to(dtype)
    # The second row is one token many times: its scores are ties.
    ids = torch.stack([tokens(1)[0], torch.full((LENGTH,), 7), tokens(1, seed=3)[0]])
    _, trace = traced(model, ids, attention_mask=_mask(24, 17, 9))
    present = torch.tensor([23, 16, 8])
    for routing, keep in zip(trace.routings.values(), (0.37, 0.61), strict=True):
        assert torch.equal(torch.as_tensor(routing.present), present)
        if method.adaptive:
            wanted = ((routing.scores > 0) & routing.routable).sum(-1).clamp(min=1)
        else:
            wanted = tokens_kept(present, keep)
            if "bipartite" in str(method.parts["scorer"]):
                wanted = torch.maximum(wanted, present - present // 2)
        assert torch.equal(torch.as_tensor(routing.kept), wanted)
        present = present if method.bypass else wanted
    assert trace.state is not None
    if not method.bypass:
        assert torch.equal(torch.as_tensor(trace.state.tokens_per_row), present + 1)


@families
@pytest.mark.parametrize("training", [False, True], ids=["eval", "train"])
def test_the_two_halves_are_the_layer_bit_for_bit(family: str, training: bool) -> None:
    dropout = {"bert": "hidden_dropout_prob"}.get(family, "mlp_dropout")
    model = dense(family, **{dropout: 0.3}).train(training)
    backbone: Any = compressed(family, METHODS[0], 1.0, 1.0).backbone
    for layer in backbone.layers(model):
        given: list[Any] = []
        hook = layer.register_forward_pre_hook(lambda _, args, kwargs, to=given: to.append((args, kwargs)), with_kwargs=True)
        model(tokens(), attention_mask=_mask(24, 17, 9))
        hook.remove()
        (hidden, *args), kwargs = given[0]
        kwargs = dict(zip(backbone.positional, args, strict=False)) | kwargs
        torch.manual_seed(5)
        whole = layer(hidden, **kwargs)
        torch.manual_seed(5)
        halves = backbone.mlp_half(layer, backbone.attention_half(layer, hidden, **kwargs))
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
    if keeps == (1.0, 1.0) and name == "squeeze":
        assert cost().dense_macs < cost().macs


@pytest.mark.parametrize(("family", "method"), [(family, name) for family in REFUSES for name in REFUSES[family]])
def test_methods_that_a_family_cannot_have_are_refused_with_the_cure(family: str, method: str) -> None:
    parts = next(item for item in METHODS if item.name == method)
    model = dense(family)
    with pytest.raises(ValueError, match="metric: tokens|take 'learned' or 'evidence'"):
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

    with pytest.raises(ValueError, match=r"reads every token.*restore = \{layer: 4, by: rejoin\}"):
        compress(masked_lm(), METHODS[0].config(0.5, 0.6))
    around = spread(compress(masked_lm(), METHODS[-3].config(0.5, 0.6)))
    model = spread(compress(masked_lm(), restored()))
    for one in (around, model):
        logits = one(tokens(), attention_mask=_mask(24, 17, 9), labels=tokens(seed=1)).logits
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
