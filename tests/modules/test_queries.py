"""Merger ``queries``: the first m of M learned queries in the places of the tokens that stay."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from laconic import CompressionConfig, StageConfig, Trace, compress, stages_of
from laconic.modules.backbones.vit import ViTLayers
from laconic.modules.cost.cost import CostModel
from laconic.modules.mergers.queries import QueriesMerger
from laconic.modules.scorers.first import FirstScorer
from laconic.modules.selectors.base import Request
from laconic.modules.selectors.top_k import TopKSelector
from laconic.modules.site import SiteInput, TokenSpec
from laconic.modules.tokens.state import TokenState
from tests.matrix import decoders, image_text, vision, visual
from tests.modules.test_before_text_families import CLOSE

_STAGE: dict[str, Any] = {"layer": 0, "scorer": "first", "merger": {"name": "queries", "queries": 8}}


def _model(family: str, keep: float = 0.5, **merger: Any) -> Any:
    stage = {**_STAGE, "merger": _STAGE["merger"] | merger}
    if family == "vit":
        return compress(vision.dense(family), CompressionConfig([StageConfig(**stage, keep=keep)]))
    plain = visual.dense() if family == "llava" else image_text.dense(family)
    return compress(plain, CompressionConfig([StageConfig(**stage, keep=keep, stack="projector")]))


def _kept(model: Any, given: dict[str, Tensor], keep: float) -> list[Tensor]:
    """For each image the features of the tokens that stay with this keep."""
    made = model.adapter.images(model.model, Trace(keep={"projector.before_0": keep}), "image", given)
    assert made.gone is not None
    return [part[~gone] for part, gone in zip(made.features, made.gone, strict=True)]


@pytest.mark.parametrize(("family", "few", "more"), [("llava", 2, 5), *[pytest.param(family, 1, 2, marks=pytest.mark.slow) for family in ("qwen2_vl", "smolvlm")]])  # fmt: skip
def test_tokens_of_a_low_keep_are_the_first_ones_of_a_higher_keep(family: str, few: int, more: int) -> None:
    model, given = _model(family), visual.whole() if family == "llava" else image_text.given_of(image_text.row(family, 0))
    low, high = (_kept(model, given, keep / 9) for keep in (few, more))
    for one, other in zip(low, high, strict=True):
        assert (len(one), len(other)) == (few, more)
        torch.testing.assert_close(other[:few], one, **CLOSE)
        # Each query has read something else.
        assert not torch.allclose(other[0], other[1], atol=1e-4)


def test_each_query_reads_all_tokens_of_its_row_and_no_padding() -> None:
    torch.manual_seed(0)
    merger = QueriesMerger(spec := TokenSpec(12, classes=0), queries=4, heads=3)
    with torch.no_grad():
        merger.value.weight.normal_()
    hidden, valid = torch.randn(2, 6, 12), torch.tensor([[True] * 6, [True] * 4 + [False] * 2])
    state, trace = TokenState.initial(2, 6, 1, valid, hidden.device), Trace()
    trace.flow().leading, trace.flow().grid = 1, (2, 3)
    site = SiteInput(hidden, state, trace, trace.flow(), 0, torch.nn.Identity(), ViTLayers)
    scored = FirstScorer(spec)(site)
    merged = merger(site, scored, TopKSelector(spec)(scored.scores, state, Request(0.4, torch.tensor([2, 2]))))
    norm = torch.nn.functional.layer_norm
    for row, count in ((0, 6), (1, 4)):
        tokens = hidden[row, 1:count]
        codes = []
        for cell in range(count - 1):
            angles = [place * 10000.0 ** (-wave / 3) for place in divmod(cell, 3) for wave in range(3)]
            codes.append([torch.tensor(angles[axis : axis + 3]) for axis in (0, 3)])
        code = torch.stack([torch.cat([part for axis in (down, across) for part in (axis.sin(), axis.cos())]) for down, across in codes])
        keys, values = merger.key(norm(tokens, (12,)) + code), merger.value(tokens)
        for query in range(2):
            asked = merger.query(norm(merger.queries[query], (12,)))
            read = [((keys[:, part] @ asked[part]) / 2).softmax(0) @ values[:, part] for part in (slice(0, 4), slice(4, 8), slice(8, 12))]
            torch.testing.assert_close(merged.hidden_states[row, 1 + query], merger.out(torch.cat(read)), **CLOSE)
        assert torch.equal(merged.hidden_states[row, 0], hidden[row, 0])


def test_queries_that_stay_learn_and_rows_that_keep_all_are_the_dense_model() -> None:
    model, given = _model("vit"), vision.inputs(vision.dense("vit"), vision.images())
    for keep in (0.1, 1.0):
        model.train().zero_grad()
        trace = Trace(keep={"before_0": keep})
        loss = model(**given, labels=vision.labels(), trace=trace).loss
        loss.backward()
        merger = model.vit.layers[0].stages["before"].merger
        if keep == 1:
            plain = vision.dense("vit").train()
            assert torch.equal(loss, plain(**given, labels=vision.labels()).loss)
            assert merger.queries.grad is None or not bool(merger.queries.grad.any())
        else:
            assert merger.queries.grad.any(-1).tolist() == [True] * 4 + [False] * 4
            # A bias of the keys shifts all logits of a query alike.
            rest = [value for name, value in merger.named_parameters() if name not in ("queries", "key.bias")]
            assert all(bool(value.grad.any()) for value in rest)


def test_no_more_tokens_stay_than_there_are_queries_and_cost_and_counter_agree() -> None:
    plain = vision.dense("vit", attn_implementation="eager")
    model = compress(plain, CompressionConfig([StageConfig(**_STAGE, keep=0.9)]))
    trace = Trace()
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        model(**vision.inputs(model, vision.images(1)), trace=trace)
    assert dict(CostModel(model)().kept) == {"before_0": 8}
    assert trace.routings["before_0"].counts() == (8, vision.PATCHES)
    assert CostModel(model)().macs == pytest.approx(counter.get_total_flops() / 2, rel=0.006)
    # Under ZeRO-3 a parameter is empty between forwards, and the counts stay what they are.
    merger = stages_of(model)["before_0"].merger
    merger.queries.data = torch.empty(0)
    assert merger.most == 8


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"merger": {"name": "queries", "queries": 0}}, "queries = 0 must be an integer of at least 1"),
        ({"merger": {"name": "queries", "heads": 3}}, "heads = 3 must divide the width of a token, 16"),
        ({"selector": "threshold"}, "keeps a different number per row, which scorer 'first' with merger 'queries' does not allow"),
    ],
)
def test_wrong_settings_are_refused(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        compress(vision.dense("vit"), CompressionConfig([StageConfig(**{**_STAGE, **settings}, keep=0.5)]))


def test_causal_models_are_refused_since_queries_mix_later_tokens_into_earlier_ones() -> None:
    with pytest.raises(ValueError, match="merger 'queries' may mix later tokens into earlier ones"):
        compress(decoders.dense("llama"), CompressionConfig([StageConfig(**{**_STAGE, "layer": 1}, keep=0.5, scope="prompt")]))
