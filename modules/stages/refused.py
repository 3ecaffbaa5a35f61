"""What a causal stage refuses in evaluation."""

from __future__ import annotations


def refused_noncausal(stage: str) -> ValueError:
    """Its decisions read later tokens."""
    return ValueError(
        f"stage {stage!r} is non-causal: its decisions depend on later tokens, which do not exist yet in generation. "
        "Train with scorer 'linear' and selector 'predictor' or 'threshold', or pass Trace(lookahead=True) to allow non-causal "
        "decisions in evaluation"
    )


def refused_unset(stage: str) -> ValueError:
    """Its threshold has seen no score."""
    return ValueError(
        f"stage {stage!r}: its threshold has seen no score, so that any number of tokens would pass: train the model, call "
        "laconic.start_routers(model, batches), or run laconic calibrate on its folder"
    )
