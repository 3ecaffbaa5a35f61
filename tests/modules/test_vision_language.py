"""What vision-language models alone have: visual tokens amid text, the query that scores them, positions and cache of the whole row."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode
from transformers import LlavaForConditionalGeneration, PreTrainedModel

from laconic import (
    Budget,
    BudgetConfig,
    CompressionConfig,
    StageConfig,
    Trace,
    add_lora,
    compress,
    decompress,
    from_pretrained,
    save_adapter,
    stages_of,
)
from laconic.modules.cost.cost import CostModel
from laconic.modules.cost.count_rules import tokens_kept
from laconic.modules.decoding.cache import RoutedCache
from laconic.modules.tokens.flow import Flow
from laconic.modules.tokens.scope import last_of_prompt
from laconic.modules.tokens.state import TokenState
from tests.matrix.visual import LAYERS, LENGTH, METHODS, PAIRS, PLACEHOLDER, VISUAL, batch, compressed, dense, labels, pixels, row, whole

CLOSE = {"atol": 2e-5, "rtol": 1e-4}
BY_NAME = {method.name: method for method in METHODS}
SHRINKING = [method.name for method in METHODS if not method.bypass]


def _model(name: str = "last_query", *keeps: float, family: str = "llava") -> PreTrainedModel:
    return compressed(family, BY_NAME[name], *(keeps or (0.5, 0.6)))


def _run(model: PreTrainedModel, inputs: dict[str, Tensor], **given: Any) -> tuple[Tensor, Trace]:
    trace = Trace(**given)
    return model(**inputs, trace=trace, use_cache=not given.keys() & {"prompt", "labels"}).logits, trace


# Which tokens a stage may touch.


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("name", ["last_query", "learned", "around", "pyramiddrop"])
def test_counts_are_of_the_visual_tokens_of_each_row_and_text_keeps_its_place(name: str, dtype: torch.dtype) -> None:
    given = {key: value.to(dtype) if value.is_floating_point() else value for key, value in batch(left=True).items()}
    _, trace = _run(_model(name, 0.5, 0.5).to(dtype), given)
    visual, numbers = given["input_ids"] == PLACEHOLDER, torch.tensor([VISUAL, 2 * VISUAL, 0])
    assert torch.equal(visual.sum(-1), numbers)
    kept = numbers
    for index, routing in enumerate(trace.routings.values()):
        entering = numbers if name == "around" else kept
        assert torch.equal(torch.as_tensor(routing.present), entering)
        kept = numbers // 2 ** (index + 1) if name == "pyramiddrop" else torch.as_tensor(tokens_kept(entering, 0.5))
        assert torch.equal(torch.as_tensor(routing.kept), kept)
        text = given["attention_mask"].bool() & ~visual
        stays = routing.kept_mask & (torch.ones_like(routing.kept_mask) if routing.state.valid is None else routing.state.valid)
        places = [routing.state.position[at, mask] for at, mask in enumerate(stays)]
        assert all(bool((place[1:] > place[:-1]).all()) for place in places)
        assert all(set(text[at].nonzero().flatten().tolist()) <= set(place.tolist()) for at, place in enumerate(places))
    # After the last layer all tokens are there again.
    assert trace.state is not None
    assert trace.state.tokens == LENGTH


def test_every_image_of_a_row_may_keep_tokens_and_the_budget_is_of_the_row() -> None:
    _, trace = _run(_model("random", 0.5), whole())
    routing = trace.routings["text.before_1"]
    places = routing.state.position[1][routing.decision.index[1][routing.decision.valid[1]]]  # type: ignore[index]
    first, second = ((places >= start) & (places < start + VISUAL) for start in (1, 2 + VISUAL))
    assert int(first.sum()) + int(second.sum()) == VISUAL
    assert min(int(first.sum()), int(second.sum())) > 0


@pytest.mark.parametrize("name", ["last_query", "around"])
def test_rows_of_text_and_batches_without_any_image_are_the_dense_model(name: str) -> None:
    given, model = row(2), _model(name)
    logits, trace = _run(model, given)
    torch.testing.assert_close(logits, dense()(**given, use_cache=False).logits, **CLOSE)
    assert [routing.counts() for routing in trace.routings.values()] == [(0, 0), (0, 0)]


def test_the_callers_protected_tokens_are_added_to_the_text() -> None:
    given = whole()
    protected = torch.zeros(3, LENGTH, dtype=torch.bool)
    protected[0, 2:6] = True
    _, trace = _run(_model("last_query", 0.5), given, protected=protected)
    assert torch.as_tensor(trace.routings["text.before_1"].present).tolist() == [VISUAL - 4, 2 * VISUAL, 0]
    assert bool(trace.routings["text.before_1"].kept_mask[0, 2:6].all())


def test_embeddings_with_placeholders_are_the_same_input_and_without_images_are_refused() -> None:
    given, model = whole(), _model()
    embeds = model.get_input_embeddings()(given["input_ids"])
    out = model(inputs_embeds=embeds, pixel_values=given["pixel_values"]).logits
    assert torch.equal(out, _run(model, given)[0])
    with pytest.raises(
        ValueError, match="inputs_embeds without pixel_values: the places of visual tokens are unknown; call the model with"
    ):
        model(inputs_embeds=embeds)


# The query that scores them.


@pytest.mark.parametrize("family", list(dict.fromkeys(family for family, _ in PAIRS)))
@pytest.mark.parametrize("left", [False, True], ids=["right", "left"])
def test_last_query_is_the_row_of_eager_attention_of_the_last_token(family: str, left: bool) -> None:
    given = batch(left)
    model = compressed(family, BY_NAME["last_query"], 0.5, sliding_window=None)
    _, trace = _run(model, given)
    plain = dense(family, attn_implementation="eager", sliding_window=None)
    attentions = plain(**given, use_cache=False, output_attentions=True).attentions[1].mean(1)
    scores = trace.routings["text.before_1"].scores
    assert not scores.requires_grad
    for at, mask in enumerate(given["attention_mask"].bool()):
        last = int(mask.nonzero().max())
        torch.testing.assert_close(scores[at, mask], attentions[at, last, mask], atol=1e-6, rtol=1e-4)


def test_last_query_of_a_shortened_row_meets_the_keys_that_are_left() -> None:
    _, trace = _run(_model("last_query", 0.5, 0.6), whole())
    scores, state = trace.routings["text.before_2"].scores, trace.routings["text.before_2"].state
    assert state.valid is not None
    torch.testing.assert_close((scores * state.valid).sum(-1), torch.ones(3))
    assert bool((scores.masked_fill(state.valid, 0) < 1e-6).all())


@pytest.mark.parametrize("left", [False, True], ids=["right", "left"])
def test_query_similarity_is_the_cosine_with_the_mean_of_the_prompts_words_whatever_is_answered(left: bool) -> None:
    given, model = batch(left, rows=(0, 1)), _model("query_similarity", 0.5)
    real, visual = given["attention_mask"].bool(), given["input_ids"] == PLACEHOLDER
    hidden = dense()(**given, use_cache=False, output_hidden_states=True).hidden_states[1]
    # Rows are answered from the second word behind their last image on.
    answers = labels(given["input_ids"]).masked_fill(~real, -100)
    scores = _run(model, given, labels=answers)[1].routings["text.before_1"].scores
    for at in range(2):
        asked = int((answers[at] != -100).byte().argmax())
        words = real[at] & ~visual[at] & (torch.arange(LENGTH) < asked)
        assert int(words.sum()) < int((real[at] & ~visual[at]).sum())
        expected = torch.nn.functional.cosine_similarity(hidden[at, visual[at]], hidden[at, words].mean(0), dim=-1)
        torch.testing.assert_close(scores[at, visual[at]], expected, **CLOSE)


def _last(visual: list[int], marks: Tensor | None = None, **given: Any) -> list[int]:
    flow = Flow(carry={} if marks is None else None, visual=torch.tensor([[at in visual for at in range(8)]]), **given)
    flow.begin(TokenState.initial(1, 8, 0, flow.valid, torch.device("cpu")), torch.zeros(1, 8, 1))
    return last_of_prompt(Trace(labels=marks), flow)[0].tolist()


def test_the_last_token_of_the_prompt_is_that_before_the_first_label_behind_the_images() -> None:
    no = -100
    assert _last([1, 2]) == [7]
    assert _last([1, 2], valid=torch.tensor([[1, 1, 1, 1, 1, 0, 0, 0]]).bool()) == [4]
    assert _last([1, 2], torch.tensor([[no, no, no, no, 5, 6, no, no]])) == [3]
    # Two turns, an image in each: every image is behind the query.
    assert _last([1, 4], torch.tensor([[no, no, no, 5, no, no, 6, 7]])) == [5]
    assert _last([1, 7], torch.tensor([[no, no, no, 5, no, no, no, no]])) == [7]
    prompt = torch.tensor([[1, 1, 1, 1, 0, 0, 0, 0]])
    flow = Flow(visual=torch.zeros(1, 8, dtype=torch.bool))
    flow.begin(TokenState.initial(1, 8, 0, None, torch.device("cpu")), torch.zeros(1, 8, 1))
    assert last_of_prompt(Trace(prompt=prompt), flow)[0].tolist() == [4]
    with pytest.raises(ValueError, match="nothing says where the prompt ends.*use_cache=True, or give Trace.labels=….* or Trace.prompt=…"):
        last_of_prompt(Trace(), flow)


def test_packed_documents_have_no_single_query() -> None:
    given = whole()
    documents = (torch.arange(LENGTH) >= 20).long().expand(3, -1)
    with pytest.raises(ValueError, match="scorer 'last_query' reads the end of one prompt a row, and these rows contain packed"):
        _run(_model(), given, documents=documents)


def test_training_decides_by_the_prompt_alone_and_teaches_a_scorer() -> None:
    given, model = whole(), _model("learned_attached", 0.5).train()
    answers = labels(given["input_ids"])
    trace = Trace(labels=answers)
    model(**given, labels=answers, trace=trace).loss.backward()
    assert any(bool(p.grad.any()) for name, p in model.named_parameters() if ".scorer." in name and p.grad is not None)
    assert bool(model.model.multi_modal_projector.linear_1.weight.grad.any())
    other, query = given["input_ids"].clone(), _model().train()
    # Tokens of the answers, the query's own prediction included.
    other[answers != -100] = 3
    first, second = (_run(query, {**given, "input_ids": ids}, labels=answers) for ids in (given["input_ids"], other))
    for name in first[1].routings:
        assert torch.equal(first[1].routings[name].kept_mask, second[1].routings[name].kept_mask)
    asked = (answers == -100).unsqueeze(-1)
    torch.testing.assert_close(first[0] * asked, second[0] * asked, **CLOSE)


# Positions and cache are those of the whole row.


@pytest.mark.parametrize("name", SHRINKING)
def test_trap_2_gaps_in_positions_are_no_document_borders(name: str) -> None:
    given, model = row(0), _model(name, 0.3, 0.5)
    length = given["input_ids"].shape[1]
    plain, prompt = _run(model, given)[0], torch.arange(length)[None] < length - 1
    for more in ({"position_ids": torch.arange(length)[None]}, {"attention_mask": torch.ones(1, length, dtype=torch.long)}, {}):
        torch.testing.assert_close(_run(model, {**given, **more}, prompt=prompt)[0], plain, **CLOSE)
    # The first token, in front of the gap, is seen by the last.
    embeds = model.get_input_embeddings()(given["input_ids"]).detach().requires_grad_()
    inputs = {"inputs_embeds": embeds, "pixel_values": given["pixel_values"], "position_ids": torch.arange(length)[None]}
    out, _ = _run(model, inputs, prompt=prompt)
    out[0, -1].square().sum().backward()
    assert embeds.grad is not None
    assert float(embeds.grad[0, 0].abs().max()) > 1e-4


@pytest.mark.parametrize("name", ["last_query", "learned", "threshold", "around", "around_gate", "around_mlp"])
@pytest.mark.parametrize("left", [False, True], ids=["right", "left"])
def test_trap_4_the_cache_answers_with_the_logical_length_and_decoding_equals_one_forward(name: str, left: bool) -> None:
    given = batch(left) if left else whole()
    mask = given.get("attention_mask", torch.ones(3, LENGTH, dtype=torch.long))
    position = (mask.cumsum(-1) - 1).clamp(min=0)
    model, split = _model(name), 22
    prompt = (mask.bool() & (torch.arange(LENGTH) < split - 1)).long()
    whole_logits, trace = _run(model, {**given, "attention_mask": mask, "position_ids": position}, prompt=prompt)
    cache, parts = RoutedCache(model.config), []
    for start, stop in ((0, split), (split, split + 1), (split + 1, LENGTH)):
        images = {"pixel_values": given["pixel_values"]} if start == 0 else {}
        out = model(
            given["input_ids"][:, start:stop],
            attention_mask=mask[:, :stop],
            position_ids=position[:, start:stop],
            past_key_values=cache,
            use_cache=True,
            **images,
        )
        assert out.past_key_values.get_seq_length() == stop
        parts.append(out.logits)
    real = mask.bool()
    torch.testing.assert_close(torch.cat(parts, 1)[real], whole_logits[real], **CLOSE)
    if name != "around_mlp":
        stored = [trace.flow("text").layer_tokens[layer].attention for layer in range(1, LAYERS)]
        # What left a layer is in no cache behind it; padding is stored by layers that see whole rows.
        ours = [int(torch.as_tensor(count).sum()) if isinstance(count, Tensor) else 3 * count for count in stored]
        assert cache.tokens_stored()[1 : 3 if BY_NAME[name].bypass else LAYERS] == (ours[:2] if BY_NAME[name].bypass else ours)


@pytest.mark.parametrize("name", ["last_query", "learned", "around"])
def test_greedy_generation_of_a_mixed_batch_is_that_of_each_row_and_of_no_cache(name: str) -> None:
    model, given = _model(name), batch(left=True)
    how: dict[str, Any] = {"max_new_tokens": 5, "do_sample": False}
    made = model.generate(**given, **how)
    for number in range(3):
        assert torch.equal(model.generate(**row(number), **how)[0, -5:], made[number, -5:])
    # The same without a cache, where the caller says what the prompt is.
    text, mask = given["input_ids"], given["attention_mask"]
    prompt = mask.bool() & (torch.arange(LENGTH) < LENGTH - 1)
    for step in range(5):
        seen = torch.nn.functional.pad(mask, (0, step), value=1)
        inputs = {"input_ids": text, "attention_mask": seen, "position_ids": (seen.cumsum(-1) - 1).clamp(min=0)}
        logits, _ = _run(model, {**inputs, "pixel_values": given["pixel_values"]}, prompt=torch.nn.functional.pad(prompt, (0, step)))
        text = torch.cat([text, logits[:, -1:].argmax(-1)], 1)
    assert torch.equal(text, made)
    assert model.generate(**given, num_beams=3, **how).shape == made.shape


def test_a_second_turn_sees_what_the_first_one_kept() -> None:
    model, cache, first = _model("last_query"), RoutedCache(_model().config), row(0)
    model(**first, past_key_values=cache, use_cache=True)
    stored = cache.tokens_stored()
    ids = torch.cat([torch.tensor([[5]]), torch.full((1, VISUAL), PLACEHOLDER), torch.tensor([[6, 7, 8]])], 1)
    trace = Trace()
    out = model(ids, pixel_values=pixels(1, 5), past_key_values=cache, use_cache=True, trace=trace)
    assert out.logits.shape[1] == ids.shape[1]
    assert cache.get_seq_length() == first["input_ids"].shape[1] + ids.shape[1]
    gone = [ids.shape[1] - (after - before) for before, after in zip(stored, cache.tokens_stored(), strict=True)]
    assert gone == [0, VISUAL - 5, VISUAL - 3, VISUAL - 3]
    assert [routing.counts() for routing in trace.routings.values()] == [(5, VISUAL), (3, 5)]


# The model around the language model.


def test_the_model_without_its_head_is_compressed_too() -> None:
    given, inner = whole(), dense().model
    expected = inner(**given, use_cache=False).last_hidden_state
    model = compress(inner, BY_NAME["last_query"].config(1.0))
    assert torch.equal(model(**given).last_hidden_state, expected)
    assert type(decompress(model)) is type(dense().model)
    model = compress(inner, BY_NAME["last_query"].config(0.5))
    assert model(**given).last_hidden_state.shape == expected.shape
    assert CostModel(model).shapes["text"].head_macs_per_token == 0


def test_lora_is_in_the_language_model_beside_routers(tmp_path: Path) -> None:
    dense().save_pretrained(tmp_path / "base")
    model = LlavaForConditionalGeneration.from_pretrained(tmp_path / "base")
    add_lora(compress(model, BY_NAME["learned"].config(0.5, 0.5)), LoraConfig(r=2))
    trained = [name for name, parameter in model.named_parameters() if parameter.requires_grad]
    assert {name.split(".")[1] for name in trained} == {"language_model"}
    assert {name.split(".")[4] for name in trained} == {"self_attn", "mlp", "stages"}
    save_adapter(model.eval(), tmp_path / "adapter", base=tmp_path / "base")
    assert torch.equal(from_pretrained(tmp_path / "adapter")(**whole()).logits, model(**whole()).logits)


def test_a_budget_finds_keeps_and_training_meets_it() -> None:
    given, stages = row(0), [StageConfig(layer=layer, scorer="learned", stack="text", scope="visual") for layer in (1, 2)]
    compression = CompressionConfig(stages, {"text": {"layer": LAYERS, "by": "rejoin"}})
    budget = Budget(BudgetConfig(target=0.9), dense(), compression, size=given["input_ids"].shape[1] - VISUAL)
    answers, model = labels(given["input_ids"]), compress(dense(), budget.compression).train()
    trace = budget.trace(0, labels=answers)
    (model(**given, labels=answers, trace=trace).loss + budget.loss(trace, 0).total).backward()
    achieved = budget.cost.achieved(trace)
    assert 0.8 < achieved <= 0.9
    assert achieved == pytest.approx(budget.cost(budget.keep(0)).macs_ratio, rel=1e-9)


@pytest.mark.parametrize("key", ["text_config", "vision_config"])
def test_an_unknown_language_model_or_tower_is_refused_by_name(key: str) -> None:
    model = dense()
    getattr(model.config, key).model_type = "other"
    with pytest.raises(ValueError, match=rf"{key}.model_type = 'other' is not supported in a llava: it must be one of "):
        compress(model, BY_NAME["learned"].config(0.5))


# Cost.


@pytest.mark.parametrize("family", list(dict.fromkeys(family for family, _ in PAIRS)))
@pytest.mark.parametrize("name", ["last_query", "pyramiddrop", "learned", "around", "around_last_query"])
def test_analytic_macs_equal_a_counter_on_the_real_module(family: str, name: str) -> None:
    # Rows of the length that they keep: no padding to a multiple of 16, which the counter sees and is no token. No sliding window, of which
    # a share of the square counts, and eager attention computes it whole.
    method, how = BY_NAME[name], {"attn_implementation": "eager", "sliding_window": None}
    method = replace(method, parts={**method.parts, "selector": {"name": "top_k", "bucket": 1}})
    model, given = compressed(family, method, 0.5, 0.6, **how), row(0)
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        _, trace = _run(model, given)
    cost = CostModel(model, size=given["input_ids"].shape[1] - VISUAL)
    counted = counter.get_total_flops() / 2
    plain = dense(family, **how)
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        plain(**given, use_cache=False)
    # transformers 5.17 computes the angles of RoPE as a matrix product.
    assert cost().dense_macs == pytest.approx(counter.get_total_flops() / 2, rel=2e-4)
    # What is no matrix product, the means of the learned scorer for example, counts for us and not for the counter.
    assert cost().macs == pytest.approx(counted, rel=0.006)
    assert cost.achieved(trace) == pytest.approx(cost().macs_ratio, rel=1e-6)


def test_achieved_macs_count_the_images_and_the_text_of_the_batch() -> None:
    model = _model("last_query", 0.5)
    two, trace = row(1), Trace()
    model(**two, trace=trace)
    cost = CostModel(model, size=6)
    shape = cost.shapes["text"]
    text = two["input_ids"].shape[1] - 2 * VISUAL
    left = [
        replace(tokens, attention=text + kept, mlp=text + kept) for tokens, kept in zip(shape.dense_layers(), (18, 9, 9, 9), strict=True)
    ]
    dense_layers = [replace(tokens, attention=text + 18, mlp=text + 18) for tokens in shape.dense_layers()]
    scorer = stages_of(model)["text.before_1"].macs(shape, text + 18, text + 9)
    # Two images a row; the dense model runs a layer of the tower that nothing reads.
    images = 2 * sum(cost.shapes[name].model_macs(cost.shapes[name].dense_layers()) for name in ("vision", "projector"))
    unread = 2 * cost.shapes["vision"].dense_only_macs
    expected = (shape.model_macs(left, text + 18) + images + scorer) / (shape.model_macs(dense_layers) + images + unread)
    assert cost.achieved(trace) == pytest.approx(expected, rel=1e-9)


def test_the_inputs_of_a_forward_are_bound_once(monkeypatch: pytest.MonkeyPatch) -> None:
    model, plain, times = _model(), type(_model()).adapter.bind_inputs, []
    monkeypatch.setattr(model.adapter, "bind_inputs", lambda *given: times.append(given[0]) or plain(*given))
    _run(model, whole())
    assert times == [model.model]
