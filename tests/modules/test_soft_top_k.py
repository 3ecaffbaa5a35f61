"""VisionSelector: scores of one trained head, and the mask that adds up to the number of kept tokens."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional

from laconic import CompressionConfig, StageConfig, Trace, compress
from laconic.modules.estimators.confidence import ConfidenceEstimator
from laconic.modules.estimators.soft_top_k import SoftTopKEstimator, shift
from laconic.modules.estimators.straight_through import StraightThroughEstimator
from laconic.modules.scorers.base import Scored
from laconic.modules.scorers.self_attention import SelfAttentionScorer
from laconic.modules.site import TokenSpec
from laconic.modules.stage import stages_of
from laconic.modules.tokens.decision import Decision
from laconic.modules.tokens.state import TokenState
from tests.matrix import vision

_SCORES = torch.tensor([[2.0, 1.0, 0.0, -1.0]])


def _site(rows: int, tokens: int, protected: int = 0, valid: Tensor | None = None, progress: float = 1.0) -> Any:
    state = TokenState.initial(rows, tokens, protected, valid, torch.device("cpu"))
    hidden_states = torch.randn(rows, tokens, 8, generator=torch.Generator().manual_seed(0))
    return SimpleNamespace(state=state, hidden_states=hidden_states, trace=SimpleNamespace(progress=progress))


def test_mask_gradient_and_cross_entropy_are_the_published_numbers() -> None:
    scores = _SCORES.clone().requires_grad_()
    estimate = SoftTopKEstimator(start=0.1, end=2.0, weighted=True)(_site(1, 4), Scored(scores), Decision(torch.tensor([[0, 1]]), None))
    torch.testing.assert_close(estimate.scale, torch.tensor([[0.817574, 0.622459, 0.377541, 0.182426]]), atol=1e-6, rtol=0)
    assert estimate.loss is not None
    assert estimate.scale is not None
    assert float(estimate.loss.detach()) == pytest.approx(2 * 0.337745, abs=2e-6)
    (gradient,) = torch.autograd.grad(estimate.scale[0, 0], scores)
    torch.testing.assert_close(gradient, torch.tensor([[0.120193, -0.045620, -0.045620, -0.028953]]), atol=1e-6, rtol=0)
    assert float(gradient.sum()) == pytest.approx(0, abs=1e-7)
    for progress, weight in ((0.0, 0.1), (0.5, 1.05)):
        early = SoftTopKEstimator()(_site(1, 4, progress=progress), Scored(scores), Decision(torch.tensor([[0, 1]]), None))
        assert float(early.loss.detach()) == pytest.approx(weight * 0.337745, abs=2e-6)


@pytest.mark.parametrize(("progress", "temperature"), [(0.0, 4.0), (0.5, 1.0), (1.0, 0.25)])
def test_the_temperature_of_soft_decisions_falls_by_the_same_factor_at_each_step(progress: float, temperature: float) -> None:
    scores, given = _SCORES.clone().requires_grad_(), {"temperature": 4.0, "final_temperature": 0.25}
    site, decision = _site(1, 4, progress=progress), Decision(torch.tensor([[0, 1]]), None)
    soft = (_SCORES / temperature).sigmoid()
    for estimate, sign in (
        (StraightThroughEstimator(**given)(site, Scored(scores), decision).scale, [1, 1, 1, 1]),
        (ConfidenceEstimator(**given)(site, Scored(scores), decision).confidence, [1, 1, -1, -1]),
    ):
        assert estimate is not None
        assert torch.equal(estimate, torch.ones(1, 4))
        (gradient,) = torch.autograd.grad(estimate.sum(), scores)
        torch.testing.assert_close(gradient, torch.tensor(sign) * soft * (1 - soft) / temperature)
    mask = SoftTopKEstimator(weighted=True, **given)(site, Scored(scores), decision).scale
    expected = SoftTopKEstimator(weighted=True)(site, Scored(scores / temperature), decision).scale
    assert mask is not None
    torch.testing.assert_close(mask, expected)


def test_a_temperature_that_divides_by_nothing_is_refused() -> None:
    for wrong in (0, -1.0, True, float("inf")):
        with pytest.raises(ValueError, match="estimator 'straight_through': final_temperature = .* must be a number above 0"):
            StraightThroughEstimator(final_temperature=wrong)


@pytest.mark.parametrize("merger", ["drop", "nearest"])
def test_a_stage_computes_in_training_what_it_does_in_use_and_every_score_has_a_gradient(merger: str) -> None:
    torch.manual_seed(0)
    config = CompressionConfig([StageConfig(layer=1, scorer="self_attention", merger=merger, keep=0.25)])
    model = compress(vision.dense("vit"), config)
    (stage,) = stages_of(model).values()
    pixels = torch.randn(2, 3, vision.IMAGE, vision.IMAGE)
    with torch.no_grad():
        used = model.eval()(pixels).logits
    trace = Trace(noise=0.0)
    learned = model.train()(pixels, trace=trace).logits
    torch.testing.assert_close(learned, used, rtol=0, atol=1e-6)
    routing = trace.routings[stage.config.key]
    of_task = torch.autograd.grad(learned.square().sum(), routing.scores)[0]
    # Those of removed tokens too: what one token gains the others lose.
    assert bool((of_task[routing.routable] != 0).all())


def test_the_mask_adds_up_to_the_number_of_routable_kept_tokens_of_each_row_however_large_the_scores() -> None:
    valid = torch.arange(9) < torch.tensor([[9], [6], [9]])
    site = _site(3, 9, 1, valid)
    scores = 30 * torch.randn(3, 9, generator=torch.Generator().manual_seed(1))
    routable, count = site.state.routable, torch.tensor([[3], [4], [7]])
    mask = (scores + shift(scores, routable, count)).sigmoid() * routable
    torch.testing.assert_close(mask.sum(-1, keepdim=True), count.float(), atol=1e-4, rtol=0)


def test_rows_that_keep_every_token_or_have_none_are_not_weighted_and_learn_nothing() -> None:
    valid = torch.ones(2, 4, dtype=torch.bool)
    state = TokenState.initial(2, 4, torch.tensor([[False] * 4, [True] * 4]), valid, torch.device("cpu"))
    scores = _SCORES.repeat(2, 1).requires_grad_()
    site = SimpleNamespace(state=state, trace=SimpleNamespace(progress=1.0))
    estimate = SoftTopKEstimator()(site, Scored(scores), Decision(torch.arange(4).expand(2, -1), None))  # type: ignore[arg-type]
    assert estimate.scale is not None
    assert estimate.loss is not None
    assert torch.equal(estimate.scale, torch.ones(2, 4))
    (estimate.loss + estimate.scale.sum()).backward()
    assert scores.grad is not None
    assert torch.equal(scores.grad, torch.zeros(2, 4))


def test_scores_are_the_mean_of_all_pairs_of_queries_and_keys_of_routable_tokens() -> None:
    valid = torch.arange(6) < torch.tensor([[6], [4]])
    site, scorer = _site(2, 6, 1, valid), SelfAttentionScorer(TokenSpec(8, 0), width=3)
    tokens = functional.layer_norm(site.hidden_states, (8,))
    pairs = scorer.query(tokens) @ scorer.key(tokens).transpose(1, 2) / 3**0.5
    routable = site.state.routable[:, None]
    expected = (pairs * routable).sum(-1) / routable.sum(-1)
    torch.testing.assert_close(scorer(site).scores, expected)
    # The published number of parameters, for the width of a 7B model.
    assert sum(p.numel() for p in SelfAttentionScorer(TokenSpec(3584, 0)).parameters()) == pytest.approx(12.85e6, rel=1e-3)
