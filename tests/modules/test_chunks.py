"""Chunks of a causal model: their router, their means, and how they are spread again."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from laconic import CompressionConfig, StageConfig, Trace, compress, stages_of
from laconic.modules.backbones.llama import LlamaLayers
from laconic.modules.budget.budget import Budget
from laconic.modules.budget.config import BudgetConfig
from laconic.modules.budget.regularizers.h_net import ratio_loss
from laconic.modules.cost.cost import CostModel
from laconic.modules.decoding.cache import RoutedCache
from laconic.modules.mergers.chunk_mean import ChunkMeanMerger
from laconic.modules.scorers.base import Scored
from laconic.modules.scorers.boundary import BoundaryScorer
from laconic.modules.site import SiteInput, TokenSpec
from laconic.modules.tokens.dechunk import BLOCK, dechunk, smooth
from laconic.modules.tokens.decision import Decision
from laconic.modules.tokens.flow import Chunks, Flow
from laconic.modules.tokens.state import TokenState
from tests.matrix import dense as vision
from tests.matrix import stack_of
from tests.matrix.decoders import CHUNKS, compressed, dense, spread, tokens, traced

SPEC = TokenSpec(2, 0, causal=True)
END = {"layer": 3, "by": "dechunk"}


def _site(hidden_states: Tensor, document: Tensor | None = None, valid: Tensor | None = None, carry: Any = None) -> SiteInput:
    rows, number, _ = hidden_states.shape
    state = TokenState.initial(rows, number, 0, valid, hidden_states.device, document)
    trace = Trace()
    trace.flow().carry = carry
    return SiteInput(hidden_states, state, trace, trace.flow(), 0, nn.Identity(), LlamaLayers)


def _probabilities(**inputs: Any) -> Tensor:
    return BoundaryScorer(SPEC)(_site(**inputs)).scores.sigmoid()


# Like the one before, at right angles to it, and its opposite.
_TURNS = torch.tensor([[[1.0, 0.0], [3.0, 0.0], [0.0, 2.0], [0.0, -1.0], [0.0, -1.0]]])


def test_a_boundary_is_where_a_token_turns_from_the_one_before() -> None:
    expected = torch.tensor([[1, 0, 0.5, 1, 0]])
    torch.testing.assert_close(_probabilities(hidden_states=_TURNS), expected, atol=2e-4, rtol=0)
    # At right angles is no boundary yet.
    assert BoundaryScorer(SPEC)(_site(_TURNS)).scores[0, 2] <= 0


def test_the_first_token_of_a_document_and_behind_padding_is_a_boundary() -> None:
    documents = _probabilities(hidden_states=_TURNS, document=torch.tensor([[0, 1, 1, 1, 2]]))
    torch.testing.assert_close(documents, torch.tensor([[1, 1, 0.5, 1, 1]]), atol=2e-4, rtol=0)
    padded = _probabilities(hidden_states=_TURNS, valid=torch.tensor([[False, True, True, False, True]]))
    torch.testing.assert_close(padded[0, [1, 2, 4]], torch.tensor([1, 0.5, 1]), atol=2e-4, rtol=0)


def test_a_boundary_is_found_across_forwards() -> None:
    carry: dict[str, Tensor] = {}
    parts = [_probabilities(hidden_states=_TURNS[:, at], carry=carry) for at in (slice(0, 2), slice(2, 3), slice(3, 5))]
    assert torch.equal(torch.cat(parts, 1), _probabilities(hidden_states=_TURNS))


def _means(hidden_states: Tensor, boundaries: list[int], carry: Any = None) -> Any:
    index = torch.tensor([[place for place, boundary in enumerate(boundaries) if boundary]], dtype=torch.long)
    site = _site(hidden_states, carry=carry)
    decision = (
        Decision(index, torch.ones_like(index, dtype=torch.bool))
        if index.numel()
        else Decision(torch.zeros(1, 1, dtype=torch.long), torch.zeros(1, 1, dtype=torch.bool), True)
    )
    return site, decision, ChunkMeanMerger(SPEC)(site, Scored(torch.zeros(1, len(boundaries))), decision)


def test_dynamic_pooling_by_hand_down_and_up() -> None:
    values = torch.arange(1.0, 7).view(1, 6, 1)
    site, decision, merged = _means(values, [0, 0, 1, 0, 1, 0])
    assert merged.hidden_states.flatten().tolist() == [2, 4.5]
    assert merged.state.size.tolist() == [[3, 2]]
    assert merged.state.source.tolist() == [[0, 0, 0, 1, 1, -1]]
    # What is spread is what layers add: here the means themselves, to tokens that were 0.
    chunks = Chunks(0, torch.zeros(1, 2, 1), decision, None, None)
    flow = Flow(state=merged.state, left=[(torch.zeros(1, 6, 1), site.state)], chunks=chunks)
    updates = merged.hidden_states.requires_grad_()
    spread = dechunk(updates, flow)
    assert spread.flatten().tolist() == [0, 0, 2, 2, 4.5, 4.5]
    # Each of the two tokens that a chunk is given to pulls on it.
    spread.backward(torch.tensor([1.0, 2, 4, 8, 16, 32]).view(1, 6, 1))
    assert updates.grad is not None
    assert updates.grad.flatten().tolist() == [12, 48]


def test_means_do_not_depend_on_where_a_forward_ends() -> None:
    values, boundaries = torch.randn(1, 12, 2), [0, 1, 0, 0, 1, 1, 0, 0, 0, 0, 1, 0]
    whole = _means(values, boundaries)[2]
    for cuts in ([0, 3, 12], [0, 1, 2, 7, 9, 10, 12]):
        carry: dict[str, Tensor] = {}
        parts = [_means(values[:, a:b], boundaries[a:b], carry) for a, b in itertools.pairwise(cuts)]
        made = torch.cat([merged.hidden_states[:, : int(decision.valid.sum())] for _, decision, merged in parts], 1)
        torch.testing.assert_close(made, whole.hidden_states)
        assert sum(float(merged.state.size.sum()) for *_, merged in parts) == float(whole.state.size.sum())


def test_smoothing_by_hand() -> None:
    probability = torch.tensor([[1, 0.5, 0.75]]).clamp(1e-4, 1 - 1e-4)
    assert smooth(torch.tensor([[[1.0], [2], [4]]]), probability).flatten().tolist() == pytest.approx([0.9999, 1.49995, 3.3749875])


def test_smoothing_many_chunks_is_repeated_steps_with_the_same_gradients() -> None:
    number = 2 * BLOCK + 5
    results = []
    for by_steps in (False, True):
        generator = torch.Generator().manual_seed(0)
        z = torch.randn(2, number, 3, generator=generator).requires_grad_()
        logits = (3 * torch.randn(2, number, generator=generator)).requires_grad_()
        p, first = logits.sigmoid().clamp(1e-4, 1 - 1e-4), torch.rand(2, number, generator=generator) < 0.05
        carried = torch.randn(2, 3, generator=generator)
        if by_steps:
            means, mean = [], carried
            for k in range(number):
                # One step is the same function.
                mean = smooth(z[:, k : k + 1], p[:, k : k + 1], first[:, k : k + 1], mean)[:, 0]
                expected = p[:, k, None] * z[:, k] + (1 - p[:, k, None]) * (~first[:, k, None] * (means[-1] if means else carried))
                torch.testing.assert_close(mean, expected)
                means.append(mean)
            out = torch.stack(means, 1)
        else:
            out = smooth(z, p, first, carried)
        (out * torch.linspace(0, 1, out.numel()).view_as(out)).sum().backward()
        results.append((out.detach(), z.grad, logits.grad))
    torch.testing.assert_close(results[0], results[1], atol=2e-5, rtol=1e-4)


def test_the_ratio_loss_by_hand() -> None:
    rows = {1 / 6: 1.0, 0.5: 1.8, 1.0: 6.0, 0.0: 1.2}
    for share, expected in rows.items():
        assert float(ratio_loss(torch.tensor(share), torch.tensor(share), 1 / 6)) == pytest.approx(expected)
    soft = torch.tensor(0.3, requires_grad=True)
    ratio_loss(torch.tensor(0.5), soft, 1 / 6).backward()
    assert float(soft.grad) == pytest.approx(2.4)
    # It can be gamed.
    assert float(ratio_loss(torch.tensor(1.0), torch.tensor(0.0), 1 / 6)) == 0


@pytest.mark.parametrize(
    "selector",
    [pytest.param("threshold", marks=pytest.mark.slow), {"name": "threshold", "calibrate": False}, "gumbel"],
    ids=["calibrated", "half", "gumbel"],
)
@pytest.mark.parametrize("merger", ["drop", pytest.param("chunk_mean", marks=pytest.mark.slow)])
def test_training_holds_the_ratio_and_teaches_the_router(selector: Any, merger: str) -> None:
    stages = CompressionConfig([StageConfig(layer=1, scorer="boundary", selector=selector, merger=merger)], END)
    model = dense("llama")
    budget = Budget(
        BudgetConfig(target=0.4, measure="keep", regularizer={"name": "h_net", "weight": 1.0}, ramp_until=0.0), model, stages, 60
    )
    model = compress(model, budget.compression).train()
    ids = tokens(8, 32)
    router = [p for name, p in model.named_parameters() if ".scorer." in name]
    optimizer = torch.optim.Adam(router, lr=0.02)
    for step in range(60):
        trace = budget.trace(step)
        loss = model(ids, labels=ids, trace=trace, use_cache=False).loss
        if step == 0:
            # Without the regularizer too.
            own = torch.autograd.grad(loss, router, retain_graph=True)
            assert all(bool(gradient.any()) for gradient in own)
        (loss + budget.loss(trace, step).total).backward()
        optimizer.step()
        optimizer.zero_grad()
    routing = traced(model.eval(), ids)[1].routings["before_1"]
    assert routing.achieved == pytest.approx(0.4, abs=0.1)


def test_a_chunk_is_as_sure_as_it_is_above_the_threshold() -> None:
    model = compressed("llama", CHUNKS[1], 0.5).train()
    for step in range(3):
        trace = Trace(step=step)
        model(tokens(), trace=trace, use_cache=False)
    chunks, threshold = trace.flow().chunks, stages_of(model)["before_1"].selector.threshold
    assert float(threshold) != 0
    assert bool((chunks.probability[chunks.decision.valid] >= 0.5).all())


@pytest.mark.parametrize("method", CHUNKS[:2], ids=lambda method: method.name)
def test_steps_that_end_no_chunk_run_no_layer_between(method: Any) -> None:
    model, ids = compressed("llama", method, 0.5), tokens(1)
    ran: list[int] = []
    layers = stack_of(model).layers
    for index, layer in enumerate(layers):
        layer.mlp.register_forward_hook(lambda *_, index=index: ran.append(index))
    cache, trace = RoutedCache(model.config), Trace()
    model(ids, past_key_values=cache, use_cache=True, trace=trace)
    kept = trace.routings["before_1"].counts()[0]
    assert cache.tokens_stored() == [24, kept, kept, 24]
    for _ in range(20):
        ran.clear()
        before, trace = cache.tokens_stored(), Trace()
        ids = model(ids[:, -1:], past_key_values=cache, use_cache=True, trace=trace).logits.argmax(-1)
        new = trace.routings["before_1"].counts()[0]
        assert ran == ([0, 1, 2, 3] if new else [0, 3])
        assert cache.tokens_stored() == [before[0] + 1, before[1] + new, before[2] + new, before[3] + 1]


def test_chunks_may_go_around_layers_in_between() -> None:
    stages = [
        StageConfig(layer=1, keep=0.6, scorer="boundary", selector="gumbel"),
        StageConfig(layer=2, site="around", keep=0.5, scorer="linear", selector="threshold"),
    ]
    model = spread(compress(dense("llama"), CompressionConfig(stages, END)))
    how = {"max_new_tokens": 8, "do_sample": False}
    assert torch.equal(model.generate(tokens(), **how), model.generate(tokens(), use_cache=False, **how))


def test_a_row_without_a_chunk_is_what_the_other_layers_make_of_it() -> None:
    model, ids = compressed("llama", CHUNKS[1], 0.5).train(), tokens()
    stage = stages_of(model)["before_1"]
    stage.selector.threshold.fill_(1e9)
    stage.selector.calibrate = False
    out = model(ids, labels=ids, use_cache=False)
    out.loss.backward()
    # Every weight has a gradient, so that ranks wait for none; those of the layers between are 0.
    for index in (1, 2):
        gradients = [p.grad for name, p in stack_of(model).layers[index].named_parameters() if "stages." not in name]
        assert all(grad is not None and not grad.any() for grad in gradients)
    plain = dense("llama")
    for index in (1, 2):
        plain.model.layers[index].forward = lambda hidden_states, *args, **kwargs: hidden_states
    torch.testing.assert_close(out.logits, plain(ids, use_cache=False).logits)


def test_cost_counts_chunks_between_and_the_whole_text_elsewhere() -> None:
    config = CHUNKS[0].config(0.25)
    cost = CostModel(dense("llama"), config, size=64)({})
    assert [layer.attention for layer in cost.layers] == [64, 16, 16, 64]
    model = spread(compress(dense("llama"), config))
    _, trace = traced(model, tokens(2, 64))
    kept = trace.routings["before_1"].achieved
    expected = CostModel(model, size=64)({"before_1": kept}).macs_ratio
    assert CostModel(model, size=64).achieved(trace) == pytest.approx(expected, rel=0.02)


def test_a_cache_with_chunks_cannot_go_back() -> None:
    model, ids = compressed("llama", CHUNKS[0], 0.5), tokens()
    cache = RoutedCache(model.config)
    model(ids, past_key_values=cache, use_cache=True)
    with pytest.raises(RuntimeError, match=r"crop\(-2\): this model makes chunks.*assistant"):
        cache.crop(-2)
    cache.reset()
    assert not cache.carry
    assert cache.get_seq_length() == 0


_BOUNDARY: dict[str, Any] = {"scorer": "boundary", "selector": "gumbel"}
_REFUSED = {
    r"answers at every place.*by: dechunk.*scope 'prompt'": ([_BOUNDARY], None),
    r"answers at every place.*by: dechunk\}": ([_BOUNDARY], {"layer": 4, "by": "rejoin"}),
    r"is non-causal.*boundary": ([{"scorer": "linear", "selector": "top_k"}], END),
    r"one stage makes chunks, and 2 were given": ([_BOUNDARY, _BOUNDARY | {"layer": 2}], END),
    r"merger 'squeeze' may mix later tokens.*chunk_mean": ([_BOUNDARY | {"merger": "squeeze"}], END),
    r"tokens of a prompt .*\{layer: 4, by: rejoin\}": ([{"scorer": "linear", "scope": "prompt"}], END),
    r"scope 'prompt' goes with merger 'drop'": (
        [{"scorer": "linear", "scope": "prompt", "merger": "chunk_mean"}],
        {"layer": 4, "by": "rejoin"},
    ),
    r"estimator 'confidence' needs a causal model's chunks": (
        [{"scorer": "linear", "selector": "threshold", "site": "around", "estimator": "confidence"}],
        None,
    ),
}


@pytest.mark.parametrize("message", _REFUSED)
def test_what_would_answer_wrongly_is_refused_with_the_cure(message: str) -> None:
    stages, restore = _REFUSED[message]
    made = [{"layer": 1, "keep": 0.5} | stage for stage in stages]
    plain = dense("llama")
    with pytest.raises(ValueError, match=message):
        compress(plain, CompressionConfig(made, restore))
    assert type(plain).__name__ == "LlamaForCausalLM"


def test_chunks_are_for_causal_models() -> None:
    with pytest.raises(ValueError, match="dechunk' is for chunks of causal models"):
        compress(vision("vit"), CompressionConfig([StageConfig(layer=1, keep=0.5)], END))
    with pytest.raises(ValueError, match="chunk_mean' is for causal models.*squeeze"):
        compress(vision("vit"), CompressionConfig([StageConfig(layer=1, keep=0.5, merger="chunk_mean")]))
