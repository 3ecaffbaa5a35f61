"""``protect``: the first tokens of each document, and those that begin or end a text, are processed by every layer."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from transformers import PreTrainedModel

from laconic import CompressionConfig, StageConfig, Trace, compress, stages_of
from laconic.modules.cost.cost import CostModel
from tests import matrix
from tests.matrix import decoders
from tests.matrix.decoders import dense, spread, tokens

FIRST = 2


def _model(family: str = "llama", **parts: Any) -> PreTrainedModel:
    settings = {"scorer": "linear", "selector": "threshold", "keep": 0.4, "protect": {"first": FIRST}, **parts}
    return spread(compress(dense(family), CompressionConfig([StageConfig(layer=layer, site="around", **settings) for layer in (1, 2)])))


@pytest.mark.parametrize("selector", ["threshold", "predictor", "top_k", "random"])
def test_the_first_tokens_pass_and_are_no_part_of_the_count(selector: str) -> None:
    model, trace = _model(selector=selector).train(), Trace()
    model(tokens(), trace=trace)
    for routing in trace.routings.values():
        assert bool(routing.kept_mask[:, :FIRST].all())
        assert routing.present == decoders.LENGTH - FIRST
        # Nine of 22, and with thresholds of a batch nine a row in the mean.
        assert float(torch.as_tensor(routing.kept).float().mean()) == pytest.approx(9, abs=1)


@pytest.mark.parametrize("family", ["llama", "gemma3_text"])
def test_rows_padded_in_front_generate_alike_with_and_without_a_cache_and_alone(family: str) -> None:
    model, padded = _model(family), decoders.left_padded()
    made = [model.generate(**padded, max_new_tokens=6, do_sample=False, use_cache=cached) for cached in (True, False)]
    assert torch.equal(*made)
    for row in range(3):
        real = padded["input_ids"][row : row + 1, padded["attention_mask"][row].bool()]
        assert torch.equal(model.generate(real, max_new_tokens=6, do_sample=False)[0, -6:], made[0][row, -6:])
    # Shorter than what is protected: the cache counts what it has seen.
    one = tokens(1, 1)
    steps = [model.generate(one, max_new_tokens=6, do_sample=False, use_cache=cached) for cached in (True, False)]
    assert torch.equal(*steps)


def test_each_packed_document_has_first_tokens_of_its_own() -> None:
    model, ids, trace = _model(), tokens(1), Trace()
    position = torch.cat([torch.arange(10), torch.arange(14)])[None]
    logits = model(ids, position_ids=position, trace=trace).logits
    assert bool(trace.routings["around_1"].kept_mask[0, [0, 1, 10, 11]].all())
    torch.testing.assert_close(logits[:, 10:], model(ids[:, 10:]).logits, atol=2e-5, rtol=1e-4)


def test_costs_count_the_first_tokens() -> None:
    model, trace = _model(scorer="random"), Trace()
    cost = CostModel(model, size=decoders.LENGTH)
    assert [layer.attention for layer in cost().layers] == pytest.approx([24, 2 + 0.4 * 22, 2 + 0.4 * 22, 24])
    model(tokens(), trace=trace)
    kept = sum(float(torch.as_tensor(routing.kept).float().mean()) for routing in trace.routings.values()) / 2
    assert trace.flow().layer_tokens[1].attention.float().mean() == pytest.approx(2 + kept, abs=2)
    assert cost.achieved(trace) < 1


@pytest.mark.parametrize(
    ("given", "message"),
    [
        *(
            (given, r"must have first, last, special or several of them")
            for given in ({"first": -1}, {"middle": 1}, {"first": True}, {"special": 1}, {})
        ),
        ({"first": 1, "last": 1}, "the last tokens are those of a prompt, and scope = 'all': set scope = prompt, or remove last"),
    ],
)
def test_other_values_are_refused(given: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        StageConfig(layer=1, protect=given)


@pytest.mark.parametrize("protect", [{"first": 1}, {"special": True}])
def test_models_without_sinks_refuse_it(protect: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match="is for causal models"):
        compress(matrix.dense("vit"), CompressionConfig([StageConfig(layer=1, keep=0.5, protect=protect)]))


@pytest.mark.parametrize(
    ("protect", "kept"), [(None, [0, 7, 12]), ({"first": 0}, []), ({"first": 1}, [0]), ({"special": True}, [7, 12])], ids=str
)
def test_the_first_token_and_the_ends_of_texts_are_protected_by_default(protect: dict[str, Any] | None, kept: list[int]) -> None:
    ids, trace = tokens(1).clamp(min=7), Trace()
    ids[0, 7], ids[0, 12] = 5, 6
    stage = StageConfig(layer=1, site="around", scorer="linear", selector="threshold", keep=0.5, protect=protect)
    model = compress(dense("llama", eos_token_id=[5, 6]), CompressionConfig([stage]))
    # No score reaches the threshold.
    (built,) = stages_of(model).values()
    built.selector.threshold.fill_(1e9)
    built.selector.batches.fill_(1)
    model(ids, trace=trace)
    assert trace.routings["around_1"].kept_mask[0].nonzero().flatten().tolist() == kept
    whole = model(ids, use_cache=False).logits
    start = model(ids[:, :10], use_cache=True)
    rest = model(ids[:, 10:], past_key_values=start.past_key_values, use_cache=True)
    torch.testing.assert_close(torch.cat([start.logits, rest.logits], 1), whole, atol=2e-5, rtol=1e-4)
    assert model.config.compression["stages"][0]["protect"] == (protect or {"first": 1, "special": True})


@pytest.mark.parametrize("special", [False, True])
@pytest.mark.parametrize("masked", [False, True])
def test_numbers_of_a_generation_step_are_known_on_the_host_unless_a_row_protects_its_token(special: bool, masked: bool) -> None:
    model = spread(compress(dense("llama", eos_token_id=5), CompressionConfig([StageConfig(1, 0.4, site="around", scorer="linear")])))
    ids = tokens(3, 9).clamp(min=6)
    if special:
        ids[1, -1] = 5
    mask = {"attention_mask": torch.ones_like(ids)} if masked else {}
    start = model(ids[:, :-1], use_cache=True, trace=Trace(lookahead=True))
    trace = Trace(lookahead=True)
    model(ids[:, -1:], past_key_values=start.past_key_values, use_cache=True, trace=trace, **mask)
    routing = trace.routings["around_1"]
    assert torch.as_tensor(routing.present).expand(3).tolist() == [1, 0 if special else 1, 1]
    assert isinstance(routing.present, int) is not special


@pytest.mark.parametrize(
    "stage",
    [
        {"site": "around", "keep": 0},
        {"site": "before", "keep": 0.5, "scope": "prompt", "scorer": "linear"},
    ],
)
def test_other_stages_protect_nothing_by_default(stage: dict[str, Any]) -> None:
    model = compress(dense("llama"), CompressionConfig([StageConfig(layer=1, **stage)]))
    assert model.config.compression["stages"][0]["protect"] is None
