"""DESIGN's invariants for causal language models, every method × every family."""

from __future__ import annotations

import itertools
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import PreTrainedModel

from laconic import CompressionConfig, StageConfig, Trace, compress, decompress, stages_of
from laconic.modules.compress import checkpoint_activations
from laconic.modules.cost.count_rules import tokens_kept
from laconic.modules.decoding.cache import RoutedCache
from laconic.modules.tokens.trace import Routing
from tests.decoders import DEPLOYED, FAMILIES, METHODS, PAIRS, VOCABULARY, compressed, dense, neutral, tokens, traced
from tests.decoders import Method as Row

names = {"ids": lambda value: getattr(value, "name", value)}
families = pytest.mark.parametrize("family", FAMILIES)
pairs = pytest.mark.parametrize(("family", "method"), PAIRS, **names)
deployed = pytest.mark.parametrize(("family", "method"), DEPLOYED, **names)
CLOSE = {"atol": 2e-5, "rtol": 1e-4}


def _ahead(method: Row) -> dict[str, Any]:
    return {} if method.deployed else {"lookahead": True}


def _gradients(model: PreTrainedModel) -> dict[str, Tensor]:
    return {name: p.grad.clone() for name, p in model.named_parameters() if ".stages." not in name and p.grad is not None}


@pairs
def test_1_capacity_1_gives_the_dense_outputs_and_gradients_bit_for_bit(family: str, method: Row) -> None:
    plain, model = dense(family), neutral(compressed(family, method, 1.0, 1.0))
    ids = tokens()
    assert torch.equal(traced(model, ids)[0], plain(input_ids=ids, use_cache=False).logits)
    plain.train()
    model.train()
    ours, reference = (one(input_ids=ids, labels=ids, use_cache=False).loss for one in (model, plain))
    ours.backward()
    reference.backward()
    assert torch.equal(ours, reference)
    if method.detached:
        expected = _gradients(plain)
        assert {name: torch.equal(grad, expected[name]) for name, grad in _gradients(model).items()} == dict.fromkeys(expected, True)


@families
def test_1_decompress_restores_the_original(family: str) -> None:
    plain, model = dense(family), compressed(family, METHODS[1], 0.5, 0.5)
    restored = decompress(model)
    assert {type(module) for module in restored.modules()} == {type(module) for module in plain.modules()}
    assert torch.equal(restored(tokens()).logits, plain(tokens()).logits)
    assert restored.config.to_dict() == plain.config.to_dict()


@pairs
def test_2_going_around_equals_masking(family: str, method: Row) -> None:
    model, plain, ids = compressed(family, method, 0.5, 0.6), dense(family), tokens()
    logits, trace = traced(model, ids, **_ahead(method))
    if method.restore is not None:
        torch.testing.assert_close(logits, chunked_reference(model, plain, ids, trace), **CLOSE)
        return
    routed = {int(name.rsplit("_", 1)[1]): routing.kept_mask for name, routing in trace.routings.items()}
    weights = {int(name.rsplit("_", 1)[1]): _gate(stages_of(model)[name], routing) for name, routing in trace.routings.items()}
    # Every token goes through every layer; who was not chosen is hidden as a key, and keeps what it was.
    for index, layer in enumerate(model.backbone.layers(plain)):
        if index in routed:
            layer.register_forward_pre_hook(_hide(routed[index], method.site), with_kwargs=True)
            _keep_as_it_was(layer, routed[index], weights[index], method.site, model.backbone)
    torch.testing.assert_close(logits, plain(ids, use_cache=False, attention_mask=_causal(ids, plain)).logits, **CLOSE)


def _causal(ids: Tensor, model: PreTrainedModel) -> Any:
    """The masks that a model makes by itself, written out, since SDPA's own leave nothing to hide keys in."""
    length = ids.shape[1]
    place = torch.arange(length)
    full = (place[:, None] >= place[None]).expand(len(ids), 1, -1, -1)
    window = getattr(model.config, "sliding_window", None)
    near = full if not window else full & (place[:, None] - place[None] < window)
    if model.config._attn_implementation == "eager":
        full, near = (torch.zeros(mask.shape).masked_fill(~mask, -1e30) for mask in (full, near))
    kinds = getattr(model.config, "layer_types", None)
    if kinds is not None:
        return {"full_attention": full, "sliding_attention": near}
    return near if window and model.config.model_type == "mistral" else full


def _hide(chosen: Tensor, site: str) -> Any:
    def hook(layer: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        if site == "around_mlp":
            return None
        own = torch.eye(chosen.shape[1], dtype=torch.bool)

        def hidden(mask: Tensor) -> Tensor:
            seen = chosen[:, None, None] | own
            return mask & seen if mask.dtype == torch.bool else mask.masked_fill(~seen, -1e30)

        if "attention_mask" in kwargs:
            return args, kwargs | {"attention_mask": hidden(kwargs["attention_mask"])}
        return (args[0], args[1], hidden(args[2]), *args[3:]), kwargs

    return hook


def _gate(stage: Any, routing: Routing) -> Tensor | float:
    strength = getattr(stage.estimator, "strength", None)
    return 1.0 if strength is None else (1 + strength * (2 * routing.scores.sigmoid() - 1)).unsqueeze(-1)


def _keep_as_it_was(layer: Any, chosen: Tensor, weight: Tensor | float, site: str, backbone: Any) -> None:
    original = layer.forward

    def forward(hidden_states: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        stays = chosen[..., None]
        if site == "around":
            return torch.where(stays, hidden_states + weight * (original(hidden_states, *args, **kwargs) - hidden_states), hidden_states)
        given = dict(zip(backbone.positional, args, strict=False)) | kwargs
        attended = backbone.attention_half(layer, hidden_states, **given)
        if site == "around_attention":
            attended = torch.where(stays, hidden_states + weight * (attended - hidden_states), hidden_states)
        out = backbone.mlp_half(layer, attended)
        return torch.where(stays, attended + weight * (out - attended), attended) if site == "around_mlp" else out

    layer.forward = forward


def chunked_reference(model: PreTrainedModel, plain: PreTrainedModel, ids: Tensor, trace: Trace) -> Tensor:
    """Logits of a dense model whose middle layers see every token, those that are no chunk hidden as keys."""
    routing = trace.routings["before_1"]
    kept, stage = routing.kept_mask, stages_of(model)["before_1"]
    means = stage.config.part("merger").name == "chunk_mean"
    entered: dict[str, Tensor] = {}
    if routing.decision.cut is None or not stage.scorer.probabilities:
        sure = torch.ones_like(routing.scores)
    else:
        sure = torch.sigmoid(routing.scores - routing.decision.cut).clamp(1e-4, 1 - 1e-4)

    def enter(layer: Any, args: tuple[Tensor, ...], kwargs: dict[str, Any]) -> Any:
        made = args[0].clone()
        for row, place in kept.nonzero().tolist():
            since = int(kept[row, :place].nonzero()[-1]) + 1 if bool(kept[row, :place].any()) else 0
            made[row, place] = args[0][row, since : place + 1].mean(0) if means else args[0][row, place]
        entered["tokens"], entered["made"] = args[0], made
        return (made, *args[1:]), kwargs

    def leave(layer: Any, args: tuple[Tensor, ...], kwargs: dict[str, Any]) -> Any:
        out = entered["tokens"].clone()
        for row in range(len(out)):
            mean = torch.zeros_like(out[row, 0])
            for place in range(out.shape[1]):
                if kept[row, place]:
                    added = args[0][row, place] - entered["made"][row, place]
                    mean = sure[row, place] * added + (1 - sure[row, place]) * mean
                out[row, place] += mean
        return (out, *args[1:]), kwargs

    layers = model.backbone.layers(plain)
    layers[1].register_forward_pre_hook(enter, with_kwargs=True)
    for index in (1, 2):
        layers[index].register_forward_pre_hook(_hide(kept, "around"), with_kwargs=True)
    layers[3].register_forward_pre_hook(leave, with_kwargs=True)
    logits: Tensor = plain(ids, use_cache=False, attention_mask=_causal(ids, plain)).logits
    return logits


@pairs
def test_4_chosen_tokens_are_in_order(family: str, method: Row) -> None:
    _, trace = traced(compressed(family, method, 0.4, 0.4), tokens(), **_ahead(method))
    for routing in trace.routings.values():
        index, valid = routing.decision.index, routing.decision.valid
        valid = torch.ones_like(index, dtype=torch.bool) if valid is None else valid
        assert bool(((index[:, 1:] > index[:, :-1]) | ~valid[:, 1:]).all())


@pairs
def test_5_a_batch_padded_left_or_right_equals_its_rows_alone(family: str, method: Row) -> None:
    model, ids = compressed(family, method, 0.5, 0.6), tokens()
    samples, lengths = torch.tensor([11, 5, 42]), (24, 17, 9)
    rows = [ids[row : row + 1, :length] for row, length in enumerate(lengths)]
    alone = [traced(model, row, sample_ids=samples[i : i + 1], **_ahead(method)) for i, row in enumerate(rows)]
    for left in (False, True):
        if left and method.positional:
            continue
        padded, mask = torch.zeros(3, 24, dtype=torch.long), torch.zeros(3, 24, dtype=torch.long)
        for row, length in enumerate(lengths):
            where = slice(24 - length, 24) if left else slice(0, length)
            padded[row, where], mask[row, where] = rows[row][0], 1
        # As generate does it.
        position = (mask.cumsum(-1) - 1).clamp(min=0)
        together, trace = traced(model, padded, attention_mask=mask, position_ids=position, sample_ids=samples, **_ahead(method))
        for row, (logits, own) in enumerate(alone):
            torch.testing.assert_close(together[row, mask[row].bool()], logits[0], **CLOSE)
            for name, routing in own.routings.items():
                kept = trace.routings[name].kept_mask[row, mask[row].bool()]
                assert torch.equal(kept, routing.kept_mask[0])


@deployed
def test_6_no_logit_depends_on_a_later_token(family: str, method: Row) -> None:
    model, ids = compressed(family, method, 0.5, 0.6), tokens()
    logits, _ = traced(model, ids)
    for place in (5, 14):
        other = ids.clone()
        other[:, place:] = tokens(seed=9)[:, place:]
        torch.testing.assert_close(traced(model, other)[0][:, :place], logits[:, :place], **CLOSE)


@families
def test_6_fails_for_bare_top_k(family: str) -> None:
    model, ids = compressed(family, METHODS[0], 0.5, 0.6), tokens()
    logits, _ = traced(model, ids, lookahead=True)
    other = ids.clone()
    other[:, 14:] = tokens(seed=9)[:, 14:]
    changed = (traced(model, other, lookahead=True)[0][:, :14] - logits[:, :14]).abs().max()
    assert changed > 1e-2
    with pytest.raises(ValueError, match="is non-causal.*predictor"):
        traced(model, ids)
    with pytest.raises(ValueError, match="are non-causal.*predictor"):
        model.generate(ids, max_new_tokens=2)


def _left_padded() -> tuple[Tensor, Tensor]:
    ids, mask = tokens(), torch.ones(3, 24, dtype=torch.long)
    ids[1, :5], mask[1, :5] = 0, 0
    ids[2, :11], mask[2, :11] = 0, 0
    return ids, mask


@deployed
def test_7_prefill_equals_a_shorter_prefill_and_decoding(family: str, method: Row) -> None:
    model = compressed(family, method, 0.5, 0.6)
    ids, mask = (tokens(), torch.ones(3, 24, dtype=torch.long)) if method.positional else _left_padded()
    position = (mask.cumsum(-1) - 1).clamp(min=0)
    whole = model(ids, attention_mask=mask, position_ids=position, use_cache=False).logits
    cache, parts, steps = RoutedCache(model.config), [], [0, 15, 16, 17, 20, 21, 24]
    for start, stop in itertools.pairwise(steps):
        out = model(
            ids[:, start:stop], attention_mask=mask[:, :stop], position_ids=position[:, start:stop], past_key_values=cache, use_cache=True
        )
        assert out.past_key_values is cache
        parts.append(out.logits)
    assert cache.get_seq_length() == 24
    real = mask.bool()
    torch.testing.assert_close(torch.cat(parts, 1)[real], whole[real], **CLOSE)


@deployed
def test_7_greedy_generation_with_and_without_cache_agrees(family: str, method: Row) -> None:
    model = compressed(family, method, 0.5, 0.6)
    ids, mask = (tokens(), torch.ones(3, 24, dtype=torch.long)) if method.positional else _left_padded()
    how = {"attention_mask": mask, "max_new_tokens": 12, "do_sample": False}
    with_cache = model.generate(ids, **how)
    assert torch.equal(with_cache, model.generate(ids, use_cache=False, **how))
    if not method.positional:
        for row in range(3):
            alone = model.generate(ids[row : row + 1][:, mask[row].bool()], **{**how, "attention_mask": None})
            assert torch.equal(alone[0, -12:], with_cache[row, -12:])


@pairs
def test_8_packed_documents_equal_documents_alone(family: str, method: Row) -> None:
    model, ids = compressed(family, method, 0.5, 0.6), tokens(2)
    if method.positional:
        pytest.skip("draws belong to places in a row")
    borders = [[0, 9, 11, 24], [0, 1, 16, 24]]
    position = torch.stack([torch.cat([torch.arange(b - a) for a, b in itertools.pairwise(row)]) for row in borders])
    packed, trace = traced(model, ids, position_ids=position, **_ahead(method))
    for row, edges in enumerate(borders):
        for start, stop in itertools.pairwise(edges):
            alone, own = traced(model, ids[row : row + 1, start:stop], **_ahead(method))
            torch.testing.assert_close(packed[row, start:stop], alone[0], **CLOSE)
            for name, routing in own.routings.items():
                assert torch.equal(trace.routings[name].kept_mask[row, start:stop], routing.kept_mask[0])


@pairs
def test_9_gradient_checkpointing_and_eager_give_the_same_loss_and_gradients(family: str, method: Row) -> None:
    results, ids = [], tokens()
    replay: dict[str, Any] = {}
    for how in ("sdpa", "checkpointing", "eager"):
        model = compressed(family, method, 0.5, 0.6, attn_implementation="eager" if how == "eager" else "sdpa").train()
        if how == "checkpointing":
            checkpoint_activations(model)
        trace = Trace(step=3, replay=replay if how == "eager" else {})
        loss = model(ids, labels=ids, trace=trace, use_cache=False).loss
        replay = trace.decisions()
        loss = loss if trace.auxiliary_loss is None else loss + trace.auxiliary_loss
        loss.backward()
        results.append((loss.detach(), {name: p.grad for name, p in model.named_parameters() if p.grad is not None}))
    assert torch.equal(results[0][0], results[1][0])
    assert results[0][1].keys() == results[1][1].keys()
    assert all(torch.equal(results[0][1][name], results[1][1][name]) for name in results[0][1])
    torch.testing.assert_close(results[2][0], results[0][0], atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(results[2][1], results[0][1], atol=1e-4, rtol=1e-2)


_CLEAN = """
import sys, json, torch
from safetensors.torch import load_file, save_file
import laconic
torch.set_num_threads(1)
root = sys.argv[1]
for name in json.loads(sys.argv[2]):
    # transformers 5.17 loads Gemma 2 with sdpa, which has no soft caps.
    model = laconic.from_pretrained(f"{root}/{name}", attn_implementation="eager" if "gemma2" in name else "sdpa")
    given = load_file(f"{root}/{name}/inputs")
    logits = model(**given, use_cache=False, trace=laconic.Trace(lookahead=True)).logits.detach()
    made = {} if "top_k" in name else {"made": model.generate(**given, max_new_tokens=5, do_sample=False)}
    save_file({"logits": logits, **made}, f"{root}/{name}/answer")
"""


def test_10_saved_models_answer_and_generate_alike_in_a_clean_process(tmp_path: Path) -> None:
    from safetensors.torch import load_file, save_file

    expected = {}
    given = dict(zip(("input_ids", "attention_mask"), _left_padded(), strict=True))
    # Every family, and every method: what is saved does not hang on the pair.
    for family, method in [pair for pair in PAIRS if pair[0] == "llama" or pair[1].name == "predictor"]:
        model, name = compressed(family, method, 0.5, 0.6), f"{family}-{method.name}"
        model.save_pretrained(tmp_path / name)
        save_file(given, tmp_path / name / "inputs")
        expected[name] = {"logits": traced(model, **given, lookahead=True)[0]}
        if method.deployed:
            expected[name]["made"] = model.generate(**given, max_new_tokens=5, do_sample=False)
    done = subprocess.run([sys.executable, "-c", _CLEAN, str(tmp_path), json.dumps(list(expected))], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    for name, answers in expected.items():
        found = load_file(tmp_path / name / "answer")
        assert {key: torch.equal(found[key], value) for key, value in answers.items()} == dict.fromkeys(answers, True), name


@pairs
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
def test_11_achieved_counts_equal_the_count_rule(family: str, method: Row, dtype: torch.dtype) -> None:
    model = compressed(family, method, 0.37, 0.61).to(dtype)
    _, trace = traced(model, tokens(), **_ahead(method))
    for routing, capacity in zip(trace.routings.values(), (0.37, 0.61), strict=False):
        stage = stages_of(model)[routing.stage]
        if not method.deployed:
            assert (routing.present, routing.kept) == (24, tokens_kept(24, capacity))
            continue
        scores = routing.scores
        if hasattr(stage.selector, "logits") or stage.selector.draws:
            # It is not the scores that are cut.
            continue
        above = (scores > getattr(stage.selector, "threshold", 0.0)).sum(-1)
        assert torch.equal(torch.as_tensor(routing.kept), above)


@families
def test_12_a_row_that_chooses_nothing_runs_one_token_that_counts_nothing(family: str) -> None:
    model, ids = compressed(family, METHODS[1], 0.5, 0.5).train(), tokens()
    for stage in stages_of(model).values():
        stage.selector.threshold.fill_(1e9)
        stage.selector.calibrate = False
    trace = Trace()
    out = model(ids, labels=ids, trace=trace, use_cache=False)
    out.loss.backward()
    assert [routing.counts() for routing in trace.routings.values()] == [(0, 72), (0, 72)]
    for index in (1, 2):
        layer = model.backbone.layers(model)[index]
        gradients = [p.grad for name, p in layer.named_parameters() if ".stages." not in f".{name}"]
        assert all(grad is not None and not grad.any() for grad in gradients)
    plain = dense(family)
    layers = model.backbone.layers(plain)
    for index in (1, 2):
        layers[index].forward = lambda hidden_states, *args, **kwargs: hidden_states
    torch.testing.assert_close(out.logits, plain(ids, use_cache=False).logits, **CLOSE)


def test_sites_without_halves_are_refused() -> None:
    with pytest.raises(ValueError, match="use_parallel_residual"):
        compress(dense("gpt_neox"), CompressionConfig([StageConfig(layer=1, site="around_mlp", keep=0.5)]))
    with pytest.raises(ValueError, match="not offered"):
        compress(dense("llama"), CompressionConfig([StageConfig(layer=1, keep=0.5, site="between")]))


def test_a_predictor_learns_whom_top_k_chooses() -> None:
    model, ids = compressed("llama", METHODS[2], 0.5, 0.5).train(), tokens(8, 32)
    optimizer = torch.optim.Adam([p for name, p in model.named_parameters() if ".selector." in name], lr=0.02)
    agreement = []
    for step in range(60):
        trace = Trace(step=step)
        model(ids, trace=trace, use_cache=False)
        assert trace.auxiliary_loss is not None
        trace.auxiliary_loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        agreement.append(float(torch.stack([routing.agreement for routing in trace.routings.values()]).mean()))
    assert agreement[0] < 0.75
    assert agreement[-1] > 0.9
    causal, ahead = (traced(model.eval(), ids, lookahead=look)[1] for look in (False, True))
    assert [routing.lookahead for routing in causal.routings.values()] == [False, False]
    assert [routing.lookahead for routing in ahead.routings.values()] == [True, True]
    assert abs(causal.routings["around_1"].achieved - 0.5) < 0.05


def test_vocabulary_of_the_matrix_is_used() -> None:
    assert dense("llama").config.vocab_size == VOCABULARY
