"""Rules for scorers that read more than the tokens of a site."""

from __future__ import annotations

from ..config import COMPLETE
from .candidate import Candidate


def prompt_of_a_language_model(candidate: Candidate) -> None:
    """Only rows of a language model have a prompt, and only where it is complete are scores by its end the same in generation."""
    for stage in candidate.stages:
        if not stage.scorer.reads_prompt or (stage.adapter.causal and stage.config.scope in COMPLETE):
            continue
        where, scorer = f"stage {stage.config.key!r}", stage.config.part("scorer").name
        scopes = [(name, scope) for name, stack in candidate.stacks.items() for scope in stack.scopes if scope in COMPLETE]
        cure = " or ".join(f"{f'stack = {name!r}, ' if name else ''}scope = {scope!r}" for name, scope in scopes)
        other = f"scorer {'linear' if stage.adapter.causal else 'learned'!r}"
        raise ValueError(
            f"{where}: scorer {scorer!r} reads where the prompt of a row ends, which rows of a language model alone have, and scope 'prompt' or "
            f"'visual' alone may read: take {f'{cure}, or {other}' if cure else other}"
        )


def pixels_of_patches(candidate: Candidate) -> None:
    """Pixels are read where tokens are patches of images of one size."""
    for stage in candidate.stages:
        if not stage.scorer.reads_pixels or candidate.adapter.token_spec(candidate.model, candidate.stack(stage)).patch_values:
            continue
        where, scorer = f"stage {stage.config.key!r}", stage.config.part("scorer").name
        with_pixels = [
            f"stack = {name!r}"
            for name, stack in candidate.stacks.items()
            if stack.adapter.sites and candidate.adapter.token_spec(candidate.model, stack).patch_values
        ]
        raise ValueError(
            f"{where}: scorer {scorer!r} reads the pixels of patches, and tokens here are no patches of images of one size: take "
            f"{' or '.join([*with_pixels, 'a scorer of tokens'])}, 'learned' for example"
        )
