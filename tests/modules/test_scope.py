"""Which tokens a stage may touch. Of a prompt alone: which tokens it is, what becomes of them, and that generating knows of it."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import PreTrainedModel

from laconic import CompressionConfig, StageConfig, Trace, compress
from laconic.modules.cost.count_rules import tokens_kept
from laconic.modules.decoding.cache import RoutedCache
from laconic.modules.tokens.flow import Flow
from laconic.modules.tokens.scope import in_scope
from laconic.modules.tokens.state import TokenState
from tests.matrix.decoders import dense, spread, tokens, traced

CLOSE = {"atol": 2e-5, "rtol": 1e-4}
families = pytest.mark.parametrize("family", ["llama", "gemma3_text", "gpt2"])


def _model(family: str, *keeps: float, **settings: Any) -> PreTrainedModel:
    stages = [StageConfig(layer=layer, keep=keep, scope="prompt", **settings) for layer, keep in enumerate(keeps, 1)]
    return spread(compress(dense(family), CompressionConfig(stages, {"layer": 4, "by": "rejoin"})))


def _padded() -> tuple[Tensor, Tensor]:
    ids, mask = tokens(), torch.ones(3, 24, dtype=torch.long)
    ids[1, :5], mask[1, :5] = 0, 0
    ids[2, :11], mask[2, :11] = 0, 0
    return ids, mask


def _prompt(labels: Tensor | None = None, first: int = 0, last: int = 0, **noted: Any) -> Tensor:
    """(1, N) which tokens the prompt is, by the caller's labels and by what the model noted of its input."""
    trace, flow = Trace(labels=labels), Flow(**noted)
    number = 6 if labels is None else labels.shape[1]
    flow.begin(TokenState.initial(1, number, 0, flow.valid, torch.device("cpu")), torch.zeros(1, number, 1))
    return in_scope("prompt", trace, flow, first, last).routable.int()


def test_the_prompt_is_what_comes_before_the_token_that_answers() -> None:
    no = -100
    assert _prompt(labels=torch.tensor([[no, no, no, 7, 8, no]])).tolist() == [[1, 1, 0, 0, 0, 0]]
    assert _prompt(labels=torch.tensor([[no, 7, 8, 9]])).tolist() == [[0, 0, 0, 0]]
    packed = torch.tensor([[0, 0, 0, 0, 0, 1, 1, 1, 1, -1]])
    labels = torch.tensor([[no, no, no, 7, no, no, no, no, 8, no]])
    expected = [[1, 1, 0, 0, 0, 1, 1, 0, 0, 0]]
    assert _prompt(labels=labels, documents=packed, valid=packed >= 0).tolist() == expected
    # A cache that is filled holds the prompt; one that holds something has had it.
    left = torch.tensor([[False, False, True, True, True, True]])
    assert _prompt(carry={}, valid=left).tolist() == [[0, 0, 1, 1, 1, 0]]
    assert _prompt(carry={}, seen=3).tolist() == [[0] * 6]
    with pytest.raises(ValueError, match="nothing says which tokens are the prompt.*use_cache.*Trace.labels.*Trace.prompt"):
        _prompt()


def test_the_last_tokens_of_each_prompt_are_those_up_to_the_one_that_answers() -> None:
    no = -100
    packed = torch.tensor([[0, 0, 0, 0, 0, 0, 1, 1, 1, 1, 1, -1]])
    labels = torch.tensor([[no, no, no, no, no, 7, no, no, no, no, 8, no]])
    shown = {"labels": labels, "documents": packed, "valid": packed >= 0}
    assert _prompt(**shown, last=1).tolist() == [[1, 1, 1, 1, 0, 0, 1, 1, 1, 0, 0, 0]]
    assert _prompt(**shown, last=3).tolist() == [[1, 1, 0, 0, 0, 0, 1, 0, 0, 0, 0, 0]]
    assert _prompt(**shown, first=1, last=3).tolist() == [[0, 1, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0]]
    assert _prompt(carry={}, last=4).tolist() == [[1, 1, 0, 0, 0, 0]]


@families
def test_kept_counts_are_of_each_prompt_and_nothing_else_goes(family: str) -> None:
    model, (ids, mask) = _model(family, 0.5), _padded()
    prompt = mask.bool() & (torch.arange(24) < 20)
    _, trace = traced(model, ids, attention_mask=mask, prompt=prompt)
    routing, numbers = trace.routings["before_1"], prompt.sum(-1)
    assert torch.equal(routing.kept, tokens_kept(numbers, 0.5))
    assert torch.equal(routing.present, numbers)
    assert bool(routing.kept_mask[:, 20:].all())
    assert routing.lookahead


@families
def test_keep_1_is_the_dense_model_and_packed_documents_are_apart(family: str) -> None:
    ids = tokens(2)
    assert torch.equal(traced(_model(family, 1.0), ids)[0], dense(family)(ids, use_cache=False).logits)
    model, position = _model(family, 0.5), torch.cat([torch.arange(14), torch.arange(10)]).expand(2, -1)
    prompt = (position < 8) & (position >= 0)
    packed, _ = traced(model, ids, position_ids=position, prompt=prompt)
    for part in (slice(0, 14), slice(14, 24)):
        alone, _ = traced(model, ids[:, part], prompt=prompt[:, part])
        torch.testing.assert_close(packed[:, part], alone, **CLOSE)


@pytest.mark.parametrize(
    ("family", "settings"),
    [
        *((family, {}) for family in ("llama", "gemma3_text", "gpt2")),
        ("llama", {"scorer": "last_query", "protect": {"first": 1, "last": 4}}),
    ],
)
def test_what_follows_the_prompt_never_sees_ahead_and_decodes_as_it_was_trained(family: str, settings: dict[str, Any]) -> None:
    model, (ids, mask) = _model(family, 0.5, 0.7, **settings), _padded()
    position = (mask.cumsum(-1) - 1).clamp(min=0)
    prompt = mask.bool() & (torch.arange(24) < 17)
    whole, trace = traced(model, ids, attention_mask=mask, position_ids=position, prompt=prompt)
    changed = torch.cat([ids[:, :20], tokens(seed=9)[:, 20:]], 1)
    other, _ = traced(model, changed, attention_mask=mask, position_ids=position, prompt=prompt)
    torch.testing.assert_close(other[:, :20], whole[:, :20], **CLOSE)
    # The prompt and the first token that answers it, then one token after the other.
    cache, parts = RoutedCache(model.config), []
    for start, stop in [(0, 18), *((at, at + 1) for at in range(18, 24))]:
        out = model(
            ids[:, start:stop],
            attention_mask=mask[:, :stop],
            position_ids=position[:, start:stop],
            past_key_values=cache,
            use_cache=True,
        )
        parts.append(out.logits)
    real = mask.bool()
    torch.testing.assert_close(torch.cat(parts, 1)[real], whole[real], **CLOSE)
    left = [int(torch.as_tensor(trace.flow().layer_tokens[layer].attention).sum()) for layer in range(4)]
    assert left[3] == left[2] < left[1] < left[0]
    ends = settings.get("protect", {}).get("last", 1)
    assert bool(trace.routings["before_1"].kept_mask[:, 18 - ends :].all())
    # Padding is stored by layers that see whole rows.
    assert cache.tokens_stored()[1:] == left[1:]


@families
def test_generating_reduces_the_prompt_alone_in_a_batch_as_by_itself(family: str) -> None:
    model, (ids, mask) = _model(family, 0.5), _padded()
    how: dict[str, Any] = {"max_new_tokens": 5, "do_sample": False}
    made = model.generate(ids, attention_mask=mask, **how)
    for row in range(3):
        alone = model.generate(ids[row : row + 1][:, mask[row].bool()], **how)
        assert torch.equal(alone[0, -5:], made[row, -5:])
    # The same, without a cache, where the caller says what the prompt is.
    prompt = mask.bool() & (torch.arange(24) < 23)
    text = ids
    for _ in range(5):
        seen = torch.cat([mask, torch.ones(3, text.shape[1] - 24, dtype=torch.long)], 1)
        of = torch.nn.functional.pad(prompt, (0, text.shape[1] - 24))
        position = (seen.cumsum(-1) - 1).clamp(min=0)
        logits, _ = traced(model, text, attention_mask=seen, position_ids=position, prompt=of)
        text = torch.cat([text, logits[:, -1:].argmax(-1)], 1)
    assert torch.equal(text, made)
    beams = model.generate(ids, attention_mask=mask, num_beams=3, **how)
    assert beams.shape == made.shape
    with pytest.raises(ValueError, match="nothing says which tokens"):
        model.generate(ids, use_cache=False, **how)


def test_fine_tuning_reduces_what_has_no_label_and_teaches_the_scorer() -> None:
    model, ids = _model("llama", 0.5).train(), tokens()
    labels = ids.clone()
    labels[0, :10], labels[1, :5], labels[2, :1] = -100, -100, -100
    trace = Trace(labels=labels)
    model(ids, labels=labels, trace=trace, use_cache=False).loss.backward()
    assert torch.as_tensor(trace.routings["before_1"].present).tolist() == [9, 4, 0]
    assert torch.as_tensor(trace.routings["before_1"].kept).tolist() == [5, 2, 0]
    # What comes later than the prompt does not move its choice.
    other, again = ids.clone(), Trace(labels=labels)
    other[:, 12:] = tokens(seed=9)[:, 12:]
    model.train()(other, labels=labels, trace=again, use_cache=False)
    assert torch.equal(again.routings["before_1"].kept_mask, trace.routings["before_1"].kept_mask)
    scorer = [p.grad for name, p in model.named_parameters() if ".scorer." in name]
    assert any(grad is not None and bool(grad.any()) for grad in scorer)
