"""Protected tokens anywhere in a row, a different number in each: ``Trace(protected=…)``, every method of three kinds of models."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import PreTrainedModel

from laconic import Trace, stages_of
from laconic.modules.cost.count_rules import COUNT_RULES, StageCount
from laconic.modules.decoding.cache import RoutedCache
from laconic.modules.tokens.trace import Routing
from tests import decoders, encoders, matrix
from tests.modules.test_decoders import masked_reference as causal_reference
from tests.modules.test_invariants import _masked_reference as vision_reference

CLOSE: dict[str, Any] = {"atol": 2e-5, "rtol": 1e-4}
# Places that are protected in each of three rows, beside [CLS]; all kinds of rows have at least 24 tokens.
PLACES = ([5, 9, 20], [], [1, 2, 3, 22, 23])


@dataclass(frozen=True)
class Kind:
    """A kind of models.

    Attributes:
        tokens: of a row.
        leading: protected in every row.
        make: method and keeps -> a compressed model.
        run: model, rows to take and what the trace is given -> answers and trace.
        reference: method, model and trace -> the answers of a forward that computes every token in every layer.
    """

    tokens: int
    leading: int
    make: Callable[..., PreTrainedModel]
    run: Callable[..., tuple[Tensor, Trace]]
    reference: Callable[[Any, PreTrainedModel, Trace], Tensor]


def _images(model: PreTrainedModel, rows: slice = slice(None), **given: Any) -> tuple[Tensor, Trace]:
    return matrix.traced(model, matrix.images()[rows], **given)


def _text(model: PreTrainedModel, rows: slice = slice(None), **given: Any) -> tuple[Tensor, Trace]:
    return encoders.traced(model, encoders.tokens()[rows], **given)


def _causal(model: PreTrainedModel, rows: slice = slice(None), **given: Any) -> tuple[Tensor, Trace]:
    return decoders.traced(model, decoders.tokens()[rows], **{"lookahead": True, **given})


KINDS = {
    "vit": Kind(
        37,
        1,
        lambda method, *keeps: matrix.compressed("vit", method, *keeps),
        _images,
        lambda method, model, trace: vision_reference(matrix.dense("vit"), "vit", matrix.images(), trace),
    ),
    "bert": Kind(
        24,
        1,
        lambda method, *keeps: encoders.compressed("bert", method, *keeps),
        _text,
        lambda method, model, trace: encoders.masked_reference(encoders.dense("bert"), encoders.tokens(), trace),
    ),
    "llama": Kind(
        24,
        0,
        lambda method, *keeps: decoders.compressed("llama", method, *keeps),
        _causal,
        lambda method, model, trace: causal_reference(model, decoders.dense("llama"), decoders.tokens(), trace, method),
    ),
}
METHODS = {"vit": matrix.METHODS, "bert": encoders.METHODS, "llama": [*decoders.METHODS, *decoders.CHUNKS]}
PAIRS = [(kind, method) for kind, methods in METHODS.items() for method in methods]
every_method = pytest.mark.parametrize(("kind", "method"), PAIRS, ids=lambda value: getattr(value, "name", value))


def _named(kind: str, *names: str) -> list[Any]:
    return [pytest.param(kind, method, id=f"{kind}-{method.name}") for method in METHODS[kind] if method.name in names]


def _protected(tokens: int) -> Tensor:
    """(3, tokens) bool."""
    mask = torch.zeros(3, tokens, dtype=torch.bool)
    for row, places in enumerate(PLACES):
        mask[row, places] = True
    return mask


def _routable(kind: str) -> Tensor:
    """(3,) int64: tokens of each row that a stage may touch."""
    about = KINDS[kind]
    return about.tokens - about.leading - _protected(about.tokens).sum(-1)


def _kept(routing: Routing, row: int) -> list[int]:
    """Original positions of the tokens that stay, in their order."""
    index, valid = routing.decision.index[row], routing.decision.valid
    return routing.state.position[row][index if valid is None else index[valid[row]]].tolist()


@every_method
def test_protected_tokens_stay_in_their_place_and_nothing_is_merged_into_them(kind: str, method: Any) -> None:
    about = KINDS[kind]
    mask = _protected(about.tokens)
    _, trace = about.run(about.make(method, 0.4, 0.4), protected=mask)
    state = trace.flow().shortest or trace.flow().tokens
    for routing in trace.routings.values():
        assert torch.equal(routing.routable, ~routing.state.protected if routing.state.valid is None else routing.routable)
        index = routing.decision.index
        valid = torch.ones_like(index, dtype=torch.bool) if routing.decision.valid is None else routing.decision.valid
        assert bool(((index[:, 1:] > index[:, :-1]) | ~valid[:, 1:]).all())
        for row, places in enumerate(PLACES):
            assert set(places) <= set(_kept(routing, row))
    first = next(iter(trace.routings.values()))
    assert torch.equal(first.routable, ~mask & (torch.arange(about.tokens) >= about.leading))
    for row, places in enumerate([*range(about.leading), *places] for places in PLACES):
        slots = state.source[row, places]
        assert bool((slots >= 0).all())
        assert state.position[row, slots].tolist() == places
        assert slots.tolist() == sorted(slots.tolist())
        assert bool(state.protected[row, slots].all())
        assert int(state.protected[row].sum()) == len(places)
        # Each stands for itself alone.
        assert state.size[row, slots].tolist() == [1] * len(places)
        assert torch.isin(state.source[row], slots).sum() == len(places)


@pytest.mark.parametrize(
    ("kind", "method"),
    [
        *_named("vit", "learned", "learned_fuse", "dynamicvit", "evit", "tome", "squeeze", "random", "around", "around_mlp"),
        *_named("bert", "learned", "fuse", "tome", "around", "around_attention"),
        *_named("llama", "top_k"),
    ],
)
def test_counts_are_those_of_each_rows_own_routable_tokens(kind: str, method: Any) -> None:
    about, keeps = KINDS[kind], (0.37, 0.61)
    _, trace = about.run(about.make(method, *keeps), protected=_protected(about.tokens))
    keeps = tuple(max(keep, 0.5) if method.parts.get("merger") == "bipartite" else keep for keep in keeps)
    rule = COUNT_RULES[method.parts.get("count", "half" if method.parts["scorer"] == "bipartite" or method.name == "tome" else "round")]
    present = original = _routable(kind)
    for place, (routing, keep) in enumerate(zip(trace.routings.values(), keeps, strict=True)):
        wanted = rule(present, keep, StageCount(original, place))
        assert torch.equal(torch.as_tensor(routing.present), present)
        assert torch.equal(torch.as_tensor(routing.kept), torch.as_tensor(wanted))
        assert routing.achieved == pytest.approx(float(torch.as_tensor(wanted).sum()) / float(present.sum()))
        present = present if routing.bypass else torch.as_tensor(wanted)


@pytest.mark.parametrize(("kind", "method"), [*_named("vit", "threshold"), *_named("bert", "threshold"), *_named("llama", "threshold")])
def test_a_threshold_counts_each_rows_own_tokens_and_in_a_causal_model_trains_on_a_share_of_each(kind: str, method: Any) -> None:
    about = KINDS[kind]
    model, mask = about.make(method, 0.5, 0.5), _protected(about.tokens)
    for stage in stages_of(model).values():
        # A token that is protected does not move it.
        stage.selector.threshold.fill_(0.1)
    _, trace = about.run(model, protected=mask)
    for routing in trace.routings.values():
        above = ((routing.scores > 0.1) & routing.routable).sum(-1)
        assert torch.equal(torch.as_tensor(routing.kept), above if kind == "llama" else above.clamp(min=1))
    _, trace = about.run(model.train(), protected=mask)
    routing = next(iter(trace.routings.values()))
    assert torch.equal(torch.as_tensor(routing.present), _routable(kind))
    expected = COUNT_RULES["round"](_routable(kind), 0.5, StageCount(0, 0))
    if kind == "llama":
        assert torch.equal(torch.as_tensor(routing.kept), expected)
    else:
        assert routing.achieved == pytest.approx(0.5, abs=0.02)


@every_method
def test_a_batch_equals_its_rows_alone(kind: str, method: Any) -> None:
    about, ids = KINDS[kind], torch.tensor([11, 5, 42])
    model, mask = about.make(method, 0.5, 0.6), _protected(about.tokens)
    together, trace = about.run(model, sample_ids=ids, protected=mask)
    for row in range(3):
        one = slice(row, row + 1)
        alone, own = about.run(model, one, sample_ids=ids[one], protected=mask[one])
        torch.testing.assert_close(alone[0], together[row], **CLOSE)
        for name, routing in own.routings.items():
            assert _kept(routing, 0) == _kept(trace.routings[name], row)


@pytest.mark.parametrize(
    ("kind", "method"),
    [*_named("vit", "learned", "learned_fuse", "around"), *_named("bert", "learned", "around"), *_named("llama", "threshold", "top_k")],
)
def test_padding_and_protected_tokens_are_apart(kind: str, method: Any) -> None:
    about = KINDS[kind]
    model, mask, padding = about.make(method, 0.5, 0.6), _protected(about.tokens), torch.ones(3, about.tokens, dtype=torch.long)
    # Padding that is said to be protected is padding.
    padding[0, -3:], padding[2, -1:] = 0, 0
    mask[0, -2:] = True
    together, trace = about.run(model, protected=mask, attention_mask=padding)
    first = next(iter(trace.routings.values()))
    assert torch.equal(torch.as_tensor(first.present), (~mask & padding.bool()).sum(-1) - about.leading)
    for row in range(3):
        one = slice(row, row + 1)
        alone, _ = about.run(model, one, protected=mask[one], attention_mask=padding[one])
        same = padding[row].bool() if kind == "llama" else slice(None)
        torch.testing.assert_close(alone[0][same], together[row][same], **CLOSE)


@every_method
def test_dropping_equals_masking(kind: str, method: Any) -> None:
    about = KINDS[kind]
    model = about.make(method, 0.5, 0.6)
    answers, trace = about.run(model, protected=_protected(about.tokens))
    torch.testing.assert_close(answers, about.reference(method, model, trace), **CLOSE)


@pytest.mark.parametrize(
    ("kind", "method"),
    [*_named("vit", "learned", "threshold", "around"), *_named("bert", "learned", "around"), *_named("llama", "threshold")],
)
def test_at_keep_1_the_model_is_the_dense_one_bit_for_bit(kind: str, method: Any) -> None:
    about = KINDS[kind]
    model = about.make(method, 1.0, 1.0)
    assert torch.equal(about.run(model, protected=_protected(about.tokens))[0], about.run(model)[0])


@pytest.mark.parametrize("method", [method for method in METHODS["llama"] if method.deployed], ids=lambda method: method.name)
def test_what_comes_later_and_whether_it_is_protected_does_not_change_earlier_answers(method: Any) -> None:
    model, ids, mask = decoders.compressed("llama", method, 0.5, 0.6), decoders.tokens(), _protected(24)
    changed = torch.cat([ids[:, :12], decoders.tokens(seed=9)[:, 12:]], 1)
    other = torch.cat([mask[:, :12], ~mask[:, 12:]], 1)
    expected, _ = decoders.traced(model, ids, protected=mask)
    answers, _ = decoders.traced(model, changed, protected=other)
    torch.testing.assert_close(answers[:, :12], expected[:, :12], **CLOSE)


@pytest.mark.parametrize("method", [method for method in METHODS["llama"] if not method.positional], ids=lambda method: method.name)
def test_packed_documents_with_protected_tokens_equal_those_documents_alone(method: Any) -> None:
    model, ids, mask = decoders.compressed("llama", method, 0.5, 0.6), decoders.tokens(), _protected(24)
    position = torch.cat([torch.arange(14), torch.arange(10)]).expand(3, -1)
    packed, _ = decoders.traced(model, ids, position_ids=position, protected=mask, lookahead=True)
    for part in (slice(0, 14), slice(14, 24)):
        alone, _ = decoders.traced(model, ids[:, part], protected=mask[:, part], lookahead=True)
        torch.testing.assert_close(packed[:, part], alone, **CLOSE)


@pytest.mark.parametrize("method", [method for method in METHODS["llama"] if method.deployed], ids=lambda method: method.name)
def test_token_by_token_with_a_cache_as_in_one_forward(method: Any) -> None:
    model, ids, mask = decoders.compressed("llama", method, 0.5, 0.6), decoders.tokens(), _protected(24)
    expected, _ = decoders.traced(model, ids, protected=mask)
    cache, parts = RoutedCache(model.config), []
    for start, stop in [(0, 4), (4, 5), (5, 9), *((at, at + 1) for at in range(9, 24))]:
        part = slice(start, stop)
        parts.append(decoders.traced(model, ids[:, part], protected=mask[:, part], past_key_values=cache, use_cache=True)[0])
    torch.testing.assert_close(torch.cat(parts, 1), expected, **CLOSE)
