"""What causal models have beside the invariants that all kinds of models share: causality, generation, packing."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch
from torch import Tensor

from laconic import CompressionConfig, StageConfig, Trace, compress, stages_of
from laconic.modules.decoding.cache import RoutedCache
from tests import thin
from tests.matrix import Method, stack_of
from tests.matrix.decoders import DEPLOYED, FAMILIES, METHODS, PAIRS, VOCABULARY, compressed, dense, left_padded, tokens, traced
from tests.thin import thinned

names = {"ids": lambda value: getattr(value, "name", value)}
families = pytest.mark.parametrize("family", FAMILIES)
# Each kind of selector, of estimator and of site with every family.
KINDS = ("threshold", "gate_random", "gate_predictor_mlp", "gumbel", "threshold_attention", "chunk_mean")
pairs = thin.pairs(PAIRS, often=thinned(PAIRS, ["llama"], KINDS))
deployed = thin.pairs(DEPLOYED, often=thinned(DEPLOYED, ["llama"], KINDS))
# Generation is a loop around the steps that test_7_prefill takes with every pair.
generating = pytest.mark.parametrize(
    ("family", "method"), thinned(DEPLOYED, ["llama"], ("predictor", "gate_random", "threshold_attention", "chunk_mean")), **names
)
CLOSE = {"atol": 2e-5, "rtol": 1e-4}


def _ahead(method: Method) -> dict[str, Any]:
    return {} if method.deployed else {"lookahead": True}


@deployed
def test_6_no_logit_depends_on_a_later_token(family: str, method: Method) -> None:
    model, ids = compressed(family, method, 0.5, 0.6), tokens()
    logits, _ = traced(model, ids)
    for place in (5, 14):
        other = ids.clone()
        other[:, place:] = tokens(seed=9)[:, place:]
        torch.testing.assert_close(traced(model, other)[0][:, :place], logits[:, :place], **CLOSE)


@families
def test_6_fails_for_bare_top_k(family: str) -> None:
    model, ids = compressed(family, METHODS[0], 0.5, 0.6), tokens()
    logits, _ = traced(model, ids, lookahead=True)
    other = ids.clone()
    other[:, 14:] = tokens(seed=9)[:, 14:]
    changed = (traced(model, other, lookahead=True)[0][:, :14] - logits[:, :14]).abs().max()
    assert changed > 1e-2
    with pytest.raises(ValueError, match="is non-causal.*predictor"):
        traced(model, ids)
    with pytest.raises(ValueError, match="are non-causal.*predictor"):
        model.generate(ids, max_new_tokens=2)


def _rows(method: Method) -> tuple[Tensor, Tensor]:
    """Token ids and attention_mask of rows padded in front, where the method allows it."""
    if method.positional:
        return tokens(), torch.ones(3, 24, dtype=torch.long)
    padded = left_padded()
    return padded["input_ids"], padded["attention_mask"]


@deployed
def test_7_prefill_equals_a_shorter_prefill_and_decoding(family: str, method: Method) -> None:
    model = compressed(family, method, 0.5, 0.6)
    if model.config._attn_implementation == "sdpa":
        # In float32 the rounding of some processors reaches the bound. Eager attention masks with a number that float64 takes for infinite.
        model = model.double()
    ids, mask = _rows(method)
    position = (mask.cumsum(-1) - 1).clamp(min=0)
    whole = model(ids, attention_mask=mask, position_ids=position, use_cache=False).logits
    cache, parts, steps = RoutedCache(model.config), [], [0, 15, 16, 17, 20, 21, 24]
    for start, stop in itertools.pairwise(steps):
        out = model(
            ids[:, start:stop], attention_mask=mask[:, :stop], position_ids=position[:, start:stop], past_key_values=cache, use_cache=True
        )
        assert out.past_key_values is cache
        parts.append(out.logits)
    assert cache.get_seq_length() == 24
    real = mask.bool()
    torch.testing.assert_close(torch.cat(parts, 1)[real], whole[real], **CLOSE)


@generating
def test_7_greedy_generation_with_and_without_cache_agrees(family: str, method: Method) -> None:
    model = compressed(family, method, 0.5, 0.6)
    ids, mask = _rows(method)
    how = {"attention_mask": mask, "max_new_tokens": 8, "do_sample": False}
    with_cache = model.generate(ids, **how)
    assert torch.equal(with_cache, model.generate(ids, use_cache=False, **how))
    if not method.positional:
        for row in range(3):
            alone = model.generate(ids[row : row + 1][:, mask[row].bool()], **{**how, "attention_mask": None})
            assert torch.equal(alone[0, -8:], with_cache[row, -8:])


@pairs
def test_8_packed_documents_equal_documents_alone(family: str, method: Method) -> None:
    model, ids = compressed(family, method, 0.5, 0.6), tokens(2)
    if method.positional:
        pytest.skip("draws belong to places in a row")
    borders = [[0, 9, 11, 24], [0, 1, 16, 24]]
    position = torch.stack([torch.cat([torch.arange(b - a) for a, b in itertools.pairwise(row)]) for row in borders])
    packed, trace = traced(model, ids, position_ids=position, **_ahead(method))
    for row, edges in enumerate(borders):
        for start, stop in itertools.pairwise(edges):
            alone, own = traced(model, ids[row : row + 1, start:stop], **_ahead(method))
            torch.testing.assert_close(packed[row, start:stop], alone[0], **CLOSE)
            for name, routing in own.routings.items():
                assert torch.equal(trace.routings[name].kept_mask[row, start:stop], routing.kept_mask[0])


@families
def test_12_a_row_that_chooses_nothing_runs_one_token_that_counts_nothing(family: str) -> None:
    model, ids = compressed(family, METHODS[1], 0.5, 0.5).train(), tokens()
    for stage in stages_of(model).values():
        stage.selector.threshold.fill_(1e9)
        stage.selector.calibrate = False
    trace = Trace()
    out = model(ids, labels=ids, trace=trace, use_cache=False)
    out.loss.backward()
    assert [routing.counts() for routing in trace.routings.values()] == [(0, 72), (0, 72)]
    for index in (1, 2):
        layer = stack_of(model).layers[index]
        gradients = [p.grad for name, p in layer.named_parameters() if ".stages." not in f".{name}"]
        assert all(grad is not None and not grad.any() for grad in gradients)
    plain = dense(family)
    layers = stack_of(plain).layers
    for index in (1, 2):
        layers[index].forward = lambda hidden_states, *args, **kwargs: hidden_states
    torch.testing.assert_close(out.logits, plain(ids, use_cache=False).logits, **CLOSE)


def test_sites_without_halves_are_refused() -> None:
    with pytest.raises(ValueError, match="use_parallel_residual"):
        compress(dense("gpt_neox"), CompressionConfig([StageConfig(layer=1, site="around_mlp", keep=0.5)]))
    with pytest.raises(ValueError, match="not offered"):
        compress(dense("llama"), CompressionConfig([StageConfig(layer=1, keep=0.5, site="between")]))


def test_a_predictor_learns_whom_top_k_chooses() -> None:
    model, ids = compressed("llama", METHODS[2], 0.5, 0.5).train(), tokens(8, 32)
    optimizer = torch.optim.Adam([p for name, p in model.named_parameters() if ".selector." in name], lr=0.02)
    agreement = []
    for step in range(60):
        trace = Trace(step=step)
        model(ids, trace=trace, use_cache=False)
        assert trace.auxiliary_loss is not None
        trace.auxiliary_loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        agreement.append(float(torch.stack([routing.agreement for routing in trace.routings.values()]).mean()))
    assert agreement[0] < 0.75
    assert agreement[-1] > 0.9
    causal, ahead = (traced(model.eval(), ids, lookahead=look)[1] for look in (False, True))
    assert [routing.lookahead for routing in causal.routings.values()] == [False, False]
    assert [routing.lookahead for routing in ahead.routings.values()] == [True, True]
    assert abs(causal.routings["around_1"].achieved - 0.5) < 0.05


def test_vocabulary_of_the_matrix_is_used() -> None:
    assert dense("llama").config.vocab_size == VOCABULARY
