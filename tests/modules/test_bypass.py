"""Tokens around a layer, small enough for paper."""

from __future__ import annotations

import gc
import weakref
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding, apply_rotary_pos_emb

from laconic import CompressionConfig, StageConfig, Trace, compress, from_pretrained, stages_of
from laconic.modules.compress import checkpoint_activations
from laconic.modules.estimators.base import Estimate
from laconic.modules.scorers.base import Scored
from laconic.modules.selectors.base import Request
from laconic.modules.selectors.predictor import PredictorSelector
from laconic.modules.selectors.threshold import ThresholdSelector
from laconic.modules.selectors.top_k import TopKSelector
from laconic.modules.site import SiteInput, TokenSpec
from laconic.modules.tokens.decision import Decision
from laconic.modules.tokens.gather import put_back, take_out
from laconic.modules.tokens.state import TokenState
from tests.matrix.decoders import METHODS, compressed, dense, tokens, traced

SPEC = TokenSpec(hidden_size=4, classes=0, causal=True)


def _state(rows: int, length: int) -> TokenState:
    return TokenState.initial(rows, length, 0, None, torch.device("cpu"))


def test_the_predictor_s_loss_by_hand(monkeypatch: pytest.MonkeyPatch) -> None:
    selector = PredictorSelector(SPEC, bucket=1).train()
    monkeypatch.setattr(selector, "logits", lambda hidden_states: torch.tensor([[2.0, -1, 0.5, -3]]))
    state, request = _state(1, 4), Request(0.5, 2, torch.zeros(1, 4, 4), False)
    decision = selector(torch.tensor([[3.0, 0, 2, -5]]), state, request)
    assert decision.index.tolist() == [[0, 2]]
    taught = selector.auxiliary(decision, state, request)
    assert float(taught.loss) == pytest.approx(0.2407135, abs=1e-7)  # type: ignore[arg-type]


def test_a_weight_of_one_half_is_half_of_what_the_block_added() -> None:
    model = compress(
        dense("llama"), CompressionConfig([StageConfig(layer=1, site="around", scorer="linear", keep=0.5, protect={"first": 0})])
    ).train()
    (stage,) = stages_of(model).values()
    trace = Trace()
    trace.flow().begin(_state(1, 4), torch.zeros(1, 4, 1))

    class Half(nn.Module):
        def forward(self, inputs: SiteInput, scored: Scored, decision: Decision) -> Estimate:
            return Estimate(scale=torch.full_like(scored.scores, 0.5))

    stage.estimator = Half()
    x = torch.ones(1, 4, 32)
    # A block of transformers returns x + f(x), with f(x) = 10.
    out = stage.around(x, model.model.layers[1], trace, lambda before, inside: before + 10)
    chosen = trace.routings["around_1"].kept_mask[0]
    assert int(chosen.sum()) == 2
    assert out[0, chosen].unique().tolist() == [6.0]
    assert out[0, ~chosen].unique().tolist() == [1.0]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_exactly_k_run_in_order_where_scores_tie(dtype: torch.dtype) -> None:
    scores = torch.tensor([[1.0, 1.001, 1.0, 1.002, 1.0, 1.0], [0.0, 0.0, 0.0, 0.0, 0.0, 0.0]]).to(dtype).float()
    decision = TopKSelector(SPEC, bucket=1).train()(scores, _state(2, 6), Request(0.5, 3, None, False))
    assert decision.index.shape == (2, 3)
    assert decision.valid is None
    assert bool((decision.index.diff(dim=1) > 0).all())


def test_rotating_what_was_gathered_is_gathering_what_was_rotated() -> None:
    config = dense("llama").config
    rotary, keys = LlamaRotaryEmbedding(config), torch.randn(1, 2, 24, 8)
    positions, index = torch.arange(24)[None], torch.tensor([[1, 5, 6, 17, 23]])

    def rotated(values: Tensor, at: Tensor) -> Tensor:
        cos, sin = rotary(values, at)
        return apply_rotary_pos_emb(values, values, cos, sin)[1]

    assert torch.equal(rotated(keys, positions)[:, :, index[0]], rotated(keys[:, :, index[0]], index))


def _suffix(rows: int, length: int, prefix: int) -> Decision:
    return Decision(torch.arange(prefix, length).expand(rows, -1), None)


@pytest.mark.parametrize("family", ["llama", "mistral", "gpt_neox"])
def test_a_suffix_where_it_stands_answers_like_a_text_of_its_own(family: str) -> None:
    prefix = 9
    stages = [StageConfig(layer=layer, site="around", scorer="linear", selector="threshold", keep=0.5) for layer in range(4)]
    # Large weights would make much of what float32 rounds.
    plain = dense(family, initializer_range=0.1)
    model, ids = compress(dense(family, initializer_range=0.1), CompressionConfig(stages)), tokens()
    with torch.no_grad():
        alone = plain(ids[:, prefix:]).logits
        decision = _suffix(*ids.shape, prefix)
        trace = Trace(replay={f"around_{layer}": decision for layer in range(4)})
        ours = model(ids, trace=trace, use_cache=False).logits[:, prefix:]
        # Positions are those of before, which rotary embeddings do not mind; counted anew among the rest of a prefix, they would.
        wrong = plain(ids[:, prefix:], position_ids=torch.arange(ids.shape[1] - prefix).mul(2).expand(len(ids), -1)).logits
    assert (ours - alone).abs().max() < 1e-6
    assert (wrong - alone).abs().max() > 0.01


def test_a_window_counts_positions_and_not_the_tokens_that_are_left() -> None:
    """A mask that is sliced is right for a purely causal one alone: here every other token goes through layers with a window of 7."""
    model, ids = compressed("mistral", METHODS[1], 0.5, 0.5), tokens()
    every_other = Decision(torch.arange(0, ids.shape[1], 2).expand(len(ids), -1), None)
    replay = dict.fromkeys(("around_1", "around_2"), every_other)
    logits, _ = traced(model, ids, replay=replay)
    seen: list[Tensor] = []
    layer = model.model.layers[1]
    original = layer.self_attn.forward

    def watched(*args: Any, **kwargs: Any) -> Any:
        seen.append(kwargs["attention_mask"])
        return original(*args, **kwargs)

    layer.self_attn.forward = watched
    again, _ = traced(model, ids, replay=replay)
    assert torch.equal(logits, again)
    place = torch.arange(ids.shape[1])
    whole = (place[:, None] >= place) & (place[:, None] - place < 7)
    index = every_other.index[0]
    assert torch.equal(seen[0][0, 0], whole[index][:, index])
    assert not torch.equal(seen[0][0, 0], whole[: len(index), : len(index)])


def test_a_threshold_stays_finite_where_nearly_every_token_goes_through() -> None:
    selector = ThresholdSelector(SPEC).train()
    valid = torch.arange(6) < torch.tensor([[6], [4]])
    state = TokenState.initial(2, 6, 0, valid, torch.device("cpu"))
    for keep in (0.98, 0.02):
        selector(torch.randn(2, 6), state, Request(keep, torch.tensor([5, 3]), None, False))
        assert bool(selector.threshold.isfinite())
    nothing = TokenState.initial(1, 6, 0, torch.zeros(1, 6, dtype=torch.bool), torch.device("cpu"))
    selector(torch.randn(1, 6), nothing, Request(0.5, torch.tensor([0]), None, False))
    assert bool(selector.threshold.isfinite())


def test_rows_of_training_are_equally_long_and_deployed_ones_as_long_as_they_score() -> None:
    selector = ThresholdSelector(SPEC, bucket=1).train()
    scores = torch.cat([torch.randn(1, 40) - 3, torch.randn(1, 40) + 3])
    assert selector(scores, _state(2, 40), Request(0.25, 10, None, False)).index.shape == (2, 10)
    assert selector.is_noncausal(Request(0.25, 10, None, False))
    deployed = selector.eval()(scores, _state(2, 40), Request(0.25, 10, None, False, own=0.25))
    assert deployed.kept_mask(40).sum(-1).tolist() == [0, 20]


def test_gradients_of_taking_out_and_putting_back_are_those_of_indexing() -> None:
    index = torch.tensor([[0, 2, 5], [1, 3, 4]])
    results = []
    for own in (True, False):
        values = torch.randn(2, 6, 4, generator=torch.Generator().manual_seed(0), dtype=torch.float64).requires_grad_()
        if own:
            taken, rest = take_out(values, index)
            out = put_back(rest, index, taken.sin() + taken)
        else:
            taken = values.gather(1, index[..., None].expand(-1, -1, 4))
            out = values.scatter(1, index[..., None].expand(-1, -1, 4), taken.sin() + taken)
        (out * torch.arange(48.0).view(2, 6, 4)).sum().backward()
        results.append((out.detach(), values.grad))
    torch.testing.assert_close(results[0], results[1])


def test_training_mode_does_not_generate() -> None:
    with pytest.raises(ValueError, match=r"call model.eval\(\) first"):
        compressed("llama", METHODS[1], 0.5, 0.5).train().generate(tokens(1), max_new_tokens=2)


def test_a_threshold_is_not_rounded_by_loading_in_bf16(tmp_path: Path) -> None:
    model = compressed("llama", METHODS[1], 0.5, 0.5)
    for stage in stages_of(model).values():
        stage.selector.threshold.fill_(-0.59751)
    model.save_pretrained(tmp_path)
    loaded = from_pretrained(tmp_path, dtype=torch.bfloat16)
    assert loaded.model.layers[1].self_attn.q_proj.weight.dtype == torch.bfloat16
    for stage in stages_of(loaded).values():
        assert stage.selector.threshold.dtype == torch.float32
        assert float(stage.selector.threshold) == float(torch.tensor(-0.59751))


def _held(model: Any, ids: Tensor) -> int:
    """Bytes that a bf16 forward with recomputed layers holds for backward, beside the weights."""
    checkpoint_activations(model.train())
    held: dict[int, Tensor] = {}

    def pack(tensor: Tensor) -> Tensor:
        held[tensor.untyped_storage().data_ptr()] = tensor
        return tensor

    weights = {parameter.untyped_storage().data_ptr() for parameter in model.parameters()}
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor), torch.autocast("cpu", torch.bfloat16):
        hidden = model.base_model(input_ids=ids, use_cache=False).last_hidden_state
    assert hidden.requires_grad
    return sum(tensor.untyped_storage().nbytes() for place, tensor in held.items() if place not in weights)


@pytest.mark.parametrize("scorer", ["linear", "update"])
def test_stages_hold_little_where_layers_are_recomputed(scorer: str) -> None:
    size: dict[str, Any] = {"hidden_size": 128, "intermediate_size": 352}
    stages = [StageConfig(layer=layer, site="around", keep=0.5, scorer=scorer, selector="threshold", estimator="gate") for layer in (1, 3)]
    ids = torch.arange(1024)[None] % 40 + 2
    dense_bytes, found = (
        _held(model, ids) for model in (dense("llama", **size), compress(dense("llama", **size), CompressionConfig(stages)))
    )
    # Without recomputation a scorer holds every token in float32, twice.
    assert found < 1.25 * dense_bytes, (found, dense_bytes)


def test_a_recomputed_scorer_holds_no_graph_that_nobody_needs() -> None:
    model = compress(
        dense("llama"), CompressionConfig([StageConfig(layer=1, site="around", keep=0.5, scorer="linear", selector="threshold")])
    )
    checkpoint_activations(model.train())
    traces = []
    for step in range(3):
        trace = Trace(step=step)
        out = model(input_ids=tokens(), labels=tokens(), trace=trace)
        if step == 1:
            out.loss.backward()
        traces.append(weakref.ref(trace))
        del trace, out
    gc.collect()
    assert [trace() for trace in traces] == [None] * 3


def test_a_recomputed_scorer_draws_the_same_numbers() -> None:
    gradients = []
    for recomputed in (False, True):
        model = compress(
            dense("llama"), CompressionConfig([StageConfig(layer=1, site="around", keep=0.5, scorer="linear", selector="top_k")])
        )
        stage = stages_of(model)["around_1"]
        stage.scorer.norm = nn.Sequential(stage.scorer.norm, nn.Dropout(0.3))
        if recomputed:
            checkpoint_activations(model)
        torch.manual_seed(0)
        model.train()(input_ids=tokens(), labels=tokens(), trace=Trace(lookahead=True)).loss.backward()
        gradients.append(stage.scorer.score.weight.grad)
    assert float(gradients[0].abs().sum()) > 0
    torch.testing.assert_close(gradients[0], gradients[1])
