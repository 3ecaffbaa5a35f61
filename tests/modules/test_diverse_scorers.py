"""Scorers that compare tokens with each other, against naive searches."""

from __future__ import annotations

import math
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional

from laconic.modules.scorers.density_peaks import DensityPeaksScorer
from laconic.modules.scorers.diversity import DiversityScorer
from laconic.modules.scorers.pivots import PivotsScorer
from laconic.modules.site import TokenSpec
from laconic.modules.tokens.state import TokenState

SPEC = TokenSpec(8, 0, causal=True)


def _site(protected: int, rows: int = 3, tokens: int = 14) -> Any:
    """Protected tokens in front, and rows with padding behind."""
    hidden_states = torch.randn(rows, tokens, 8, generator=torch.Generator().manual_seed(0))
    valid = torch.arange(tokens) < torch.tensor([tokens, tokens - 5, 4])[:rows, None]
    state = TokenState.initial(rows, tokens, protected, valid, hidden_states.device)
    return SimpleNamespace(hidden_states=hidden_states, state=state)


def _kept(scores: Tensor, routable: Tensor, count: int) -> set[int]:
    return set(scores.masked_fill(~routable, -torch.inf).argsort(descending=True, stable=True)[:count].tolist())


def _farthest(features: Tensor, candidates: list[int], count: int) -> set[int]:
    distance = 1 - features @ features.T
    first = max(candidates, key=lambda one: min((float(distance[one, other]) for other in candidates if other != one), default=0))
    taken = [first]
    while len(taken) < count:
        left = [one for one in candidates if one not in taken]
        taken.append(max(left, key=lambda one: min(float(distance[one, other]) for other in taken)))
    return set(taken)


@pytest.mark.parametrize("protected", [0, 2])
def test_diversity_takes_tokens_as_the_greedy_max_min_search(protected: int) -> None:
    site = _site(protected)
    scores = DiversityScorer(SPEC)(site).scores
    features = functional.normalize(site.hidden_states, dim=-1)
    for row in range(3):
        routable = site.state.routable[row]
        candidates = routable.nonzero().flatten().tolist()
        for count in range(1, len(candidates) + 1):
            assert _kept(scores[row], routable, count) == _farthest(features[row], candidates, count)


@pytest.mark.parametrize("protected", [0, 2])
def test_pivots_add_in_turn_the_token_least_similar_to_each(protected: int) -> None:
    site = _site(protected)
    for number in (1, 3):
        scores = PivotsScorer(SPEC, pivots=number)(site).scores
        features = functional.normalize(site.hidden_states, dim=-1)
        for row in range(3):
            routable = site.state.routable[row]
            candidates = routable.nonzero().flatten().tolist()
            norms = site.hidden_states[row].norm(dim=-1)
            pivots = sorted(candidates, key=lambda one: -float(norms[one]))[:number]
            lists = [sorted(candidates, key=lambda one, pivot=pivot: float(features[row, pivot] @ features[row, one])) for pivot in pivots]
            taken = list(pivots)
            for place in range(len(candidates)):
                for ranked in lists:
                    if ranked[place] not in taken:
                        taken.append(ranked[place])
            for count in range(1, len(candidates) + 1):
                assert _kept(scores[row], routable, count) == set(taken[:count])
    with pytest.raises(ValueError, match="pivots = 0 must be at least 1"):
        PivotsScorer(SPEC, pivots=0)


@pytest.mark.parametrize("protected", [0, 2])
def test_density_peaks_are_density_times_distance_to_the_nearest_denser_token_of_a_row(protected: int) -> None:
    site = _site(protected)
    # Tokens that are the same: the first is denser than the second, which is at distance 0.
    site.hidden_states[0, 6] = site.hidden_states[0, 5]
    for k in (1, 5):
        scores = DensityPeaksScorer(SPEC, k=k)(site).scores
        for row in range(3):
            candidates = site.state.routable[row].nonzero().flatten().tolist()
            tokens = site.hidden_states[row]
            distance = torch.cdist(tokens, tokens, compute_mode="donot_use_mm_for_euclid_dist") / 8**0.5
            density = {}
            for one in candidates:
                nearest = sorted(float(distance[one, other]) ** 2 for other in candidates if other != one)[:k]
                density[one] = math.exp(-sum(nearest) / len(nearest))
            for one in candidates:
                denser = [other for other in candidates if (density[other], -other) > (density[one], -one)]
                far = min(distance[one, other] for other in denser) if denser else max(distance[one, other] for other in candidates)
                torch.testing.assert_close(float(scores[row, one].exp()), density[one] * float(far), atol=1e-5, rtol=1e-3)
    with pytest.raises(ValueError, match="k = 0 must be at least 1"):
        DensityPeaksScorer(SPEC, k=0)
