"""What ``laconic inspect`` shows of a language model: which tokens of a text every stage kept or processed, as a page to look at."""

from __future__ import annotations

import html
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ...modules.tokens.trace import Trace

_STYLE = """
body { font: 15px/1.7 ui-monospace, monospace; max-width: 70em; margin: 2em auto; padding: 0 1em; color: #111; background: #fff }
table { border-collapse: collapse; margin-bottom: 1.5em } td, th { padding: .1em .8em; text-align: right; border-bottom: 1px solid #ddd }
td:first-child, th:first-child { text-align: left } span { border-radius: 2px; white-space: pre-wrap }
"""


def kept_by_stage(trace: Trace) -> dict[str, Tensor]:
    """(B, N) bool by stage: original tokens, protected ones included, that a stage kept, or sent through where it is a bypass.

    Args:
        trace: of a forward.
    """
    found: dict[str, Tensor] = {}
    for name, routing in trace.routings.items():
        state = routing.state
        kept = routing.kept_mask
        if state.valid is not None:
            kept = kept & state.valid
        whole = kept.new_zeros(kept.shape[0], state.source.shape[1])
        # Filler may stand at any position, and must not overwrite what is there.
        found[name] = whole.long().scatter_add(1, state.position, kept.long()) > 0
    return found


def page(title: str, tokens: Sequence[str], kept: Mapping[str, Sequence[bool]], requested: Mapping[str, float]) -> str:
    """One HTML page, nothing outside it: stages in a table, and the text with each token the darker the fewer stages kept it.

    Args:
        title: over it.
        tokens: the text, token by token.
        kept: by stage, one a token.
        requested: keep or capacity by stage.
    """
    rows = "".join(
        f"<tr><td>{html.escape(name)}</td><td>{requested[name]:.3f}</td><td>{sum(flags) / max(1, len(flags)):.3f}</td>"
        f"<td>{sum(flags)} of {len(flags)}</td></tr>"
        for name, flags in kept.items()
    )
    spans = []
    for number, token in enumerate(tokens):
        names = [name for name, flags in kept.items() if flags[number]]
        share = len(names) / max(1, len(kept))
        note = f"token {number}: {', '.join(names) or 'no stage'}"
        spans.append(f'<span style="background: {_colour(share)}" title="{html.escape(note)}">{html.escape(token)}</span>')
    return (
        f"<!doctype html><html><head><meta charset='utf-8'><title>{html.escape(title)}</title><style>{_STYLE}</style></head><body>"
        f"<h1>{html.escape(title)}</h1><table><tr><th>stage</th><th>requested</th><th>achieved</th><th>tokens</th></tr>{rows}</table>"
        "<p>Orange: every stage kept the token or sent it through; white: none did. Point at a token to see which.</p>"
        f"<p>{''.join(spans)}</p></body></html>\n"
    )


def _colour(share: float) -> str:
    """White for 0, orange for 1."""
    return "#" + "".join(f"{round(255 + (part - 255) * share):02x}" for part in (255, 170, 60))


@torch.no_grad()
def inspect_text(model: Any, tokenizer: Any, text: str, limit: int, title: str, to: Path) -> dict[str, Any]:
    """Writes the page for one text; returns achieved shares by stage.

    Args:
        model: compressed, in evaluation mode.
        tokenizer: its own.
        text: to look at.
        limit: tokens of it at most.
        title: of the page.
        to: file to write.
    """
    ids = tokenizer(text)["input_ids"][:limit]
    if not ids:
        raise ValueError("--input has no text: give some, or the path of a file with some")
    # As if it had just been read and an answer were to follow: all of it but its last token is a prompt.
    trace = Trace(prompt=torch.arange(len(ids), device=model.device)[None] < len(ids) - 1)
    model(input_ids=torch.tensor([ids], device=model.device), use_cache=False, trace=trace)
    kept = {name: flags[0].tolist() for name, flags in kept_by_stage(trace).items()}
    requested = {name: routing.requested for name, routing in trace.routings.items()}
    to.write_text(page(title, [tokenizer.decode([token]) for token in ids], kept, requested))
    return {name: sum(flags) / len(flags) for name, flags in kept.items()}
