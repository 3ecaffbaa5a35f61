"""Scores of a stage's tokens, recomputed in backward where its layer is."""

from __future__ import annotations

import copy
from dataclasses import replace

import torch
from torch.utils.checkpoint import checkpoint

from ..scorers.base import Scored, Scorer
from ..site import SiteInput


def scores_of(scorer: Scorer, site: SiteInput) -> Scored:
    """What a scorer says about the tokens of a site.

    With gradient checkpointing it is recomputed in backward: what it holds in float32 is more than what is left of a layer then.
    """
    if not (scorer.training and torch.is_grad_enabled() and getattr(site.layer, "gradient_checkpointing", False)):
        scored: Scored = scorer(site)
        return scored
    # As it is now, without what the forward adds later: the graph holds the inputs, and what holds the graph would never be freed.
    flow, trace = copy.copy(site.flow), replace(site.trace, routings={}, flows={})
    flow.left = list(flow.left)
    recomputed: Scored = checkpoint(scorer, replace(site, flow=flow, trace=trace), use_reentrant=False)
    return recomputed
