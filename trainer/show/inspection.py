"""The page of ``laconic inspect`` for a language model: the tokens of a text that every stage keeps or processes."""

from __future__ import annotations

import html
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ...modules.checkpoints.whole_files import write_file
from ...modules.tokens.trace import Trace

_STYLE = """
body { font: 15px/1.7 ui-monospace, monospace; max-width: 70em; margin: 2em auto; padding: 0 1em; color: #111; background: #fff }
table { border-collapse: collapse; margin-bottom: 1.5em } td, th { padding: .1em .8em; text-align: right; border-bottom: 1px solid #ddd }
td:first-child, th:first-child { text-align: left } span { border-radius: 2px; white-space: pre-wrap }
"""


def kept_by_stage(trace: Trace) -> dict[str, Tensor]:
    """(B, N) bool by stage: original tokens, protected ones included, that a shrinking stage keeps or a bypass processes.

    Args:
        trace: trace of a forward.
    """
    found: dict[str, Tensor] = {}
    for name, routing in trace.routings.items():
        state = routing.state
        kept = routing.kept_mask
        if state.valid is not None:
            kept = kept & state.valid
        whole = kept.new_zeros(kept.shape[0], state.source.shape[1])
        # Padding may have any position; adding keeps it from overwriting a kept token.
        found[name] = whole.long().scatter_add(1, state.position, kept.long()) > 0
    return found


def page(title: str, tokens: Sequence[str], kept: Mapping[str, Sequence[bool]], requested: Mapping[str, float]) -> str:
    """A self-contained HTML page: a table of stages, and the text with a darker background for tokens that more stages keep.

    Args:
        title: title of the page.
        tokens: the text, token by token.
        kept: for each stage, one flag a token.
        requested: keep by stage.
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
        "<p>Orange: every stage keeps or processes the token; white: no stage does. Hover over a token to see its stages.</p>"
        f"<p>{''.join(spans)}</p></body></html>\n"
    )


def _colour(share: float) -> str:
    """White for 0, orange for 1."""
    return "#" + "".join(f"{round(255 + (part - 255) * share):02x}" for part in (255, 170, 60))


@torch.no_grad()
def inspect_text(model: Any, tokenizer: Any, text: str, limit: int, title: str, to: Path) -> dict[str, Any]:
    """Writes the page for one text; returns achieved shares by stage.

    Args:
        model: compressed model in evaluation mode.
        tokenizer: the model's tokenizer.
        text: the text to show.
        limit: largest number of tokens; the rest is cut.
        title: title of the page.
        to: file to write.
    """
    ids = tokenizer(text)["input_ids"][:limit]
    if not ids:
        raise ValueError("--input has no text: give a text, or the path of a file with text")
    # As at the start of generation: all tokens but the last are the prompt.
    trace = Trace(prompt=torch.arange(len(ids), device=model.device)[None] < len(ids) - 1)
    model(input_ids=torch.tensor([ids], device=model.device), use_cache=False, trace=trace)
    kept = {name: flags[0].tolist() for name, flags in kept_by_stage(trace).items()}
    requested = {name: routing.requested for name, routing in trace.routings.items()}
    write_file(to, page(title, [tokenizer.decode([token]) for token in ids], kept, requested))
    return {name: sum(flags) / len(flags) for name, flags in kept.items()}
