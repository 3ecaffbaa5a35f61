"""The cache of a compressed causal model, and generating with it: step by step, in rows, cropped, picked, handed on."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from transformers import DynamicCache

from laconic import RoutedCache, Trace
from laconic.modules.compress import checkpoint_activations
from tests.matrix import Method
from tests.matrix.decoders import FAMILIES, METHODS, SHRINKING, compressed, dense, tokens

names = {"ids": lambda value: getattr(value, "name", value)}
families = pytest.mark.parametrize("family", FAMILIES)
CLOSE = {"atol": 2e-5, "rtol": 1e-4}


def test_a_step_of_generating_runs_a_layer_on_those_rows_alone_that_go_through_it() -> None:
    model, ids = compressed("llama", METHODS[1], 0.5, 0.5), tokens(8)
    cache = RoutedCache(model.config)
    model(ids[:, :9], past_key_values=cache, use_cache=True)
    whole = model(ids, use_cache=False).logits
    seen: list[int] = []
    model.model.layers[1].mlp.register_forward_hook(lambda _, given, __: seen.append(given[0].shape[0]))
    went: list[int] = []
    for place in range(9, 24):
        trace, before = Trace(), cache.layers[1].tokens_stored()
        out = model(ids[:, place : place + 1], past_key_values=cache, use_cache=True, trace=trace).logits
        torch.testing.assert_close(out[:, 0], whole[:, place], **CLOSE)
        went.append(trace.routings["around_1"].counts()[0])
        assert cache.layers[1].tokens_stored() - before == went[-1]
    # A layer that nobody needs is not run at all.
    assert seen == [rows for rows in went if rows]
    assert 0 < min(seen) < 8


@pytest.mark.parametrize("rows", [1, pytest.param(2, marks=pytest.mark.slow), 8])
@pytest.mark.parametrize("family", ["llama", "mistral", "gemma2", "gpt2"])
def test_token_by_token_from_nothing(family: str, rows: int) -> None:
    # With one row a layer sees everything of a step or nothing, and it may be nothing at first.
    for seed in range(4):
        model, ids = compressed(family, METHODS[1], 0.5, 0.5), tokens(rows, seed=seed)
        with torch.no_grad():
            whole, cache = model(ids, use_cache=False).logits, RoutedCache(model.config)
            steps = [model(ids[:, place : place + 1], past_key_values=cache, use_cache=True).logits for place in range(24)]
        torch.testing.assert_close(torch.cat(steps, 1), whole, **CLOSE)


def test_a_cache_that_begins_late_can_be_cropped() -> None:
    for seed in range(4):
        model, ids = compressed("llama", METHODS[1], 0.5, 0.5), tokens(1, seed=seed)
        cache = RoutedCache(model.config)
        for place in range(12):
            model(ids[:, place : place + 1], past_key_values=cache, use_cache=True)
        cache.crop(-3)
        rest = model(ids[:, 9:], past_key_values=cache, use_cache=True).logits
        torch.testing.assert_close(rest, model(ids, use_cache=False).logits[:, 9:], **CLOSE)


def test_rows_of_a_cache_are_picked_by_number_or_by_mask() -> None:
    model, ids = compressed("llama", METHODS[1], 0.5, 0.5), tokens()
    stays = torch.tensor([False, True, True])
    for pick in (stays, stays.nonzero().flatten()):
        cache = RoutedCache(model.config)
        model(ids[:, :20], past_key_values=cache, use_cache=True)
        cache.batch_select_indices(pick)
        rest = model(ids[stays][:, 20:], past_key_values=cache, use_cache=True).logits
        torch.testing.assert_close(rest, model(ids[stays], use_cache=False).logits[:, 20:], **CLOSE)


def test_a_cache_goes_from_inference_to_gradients_and_back() -> None:
    model, ids = compressed("llama", METHODS[1], 0.5, 0.5), tokens()
    cache, parts = RoutedCache(model.config), []
    for start, how in ((0, torch.inference_mode), (8, torch.enable_grad), (12, torch.no_grad), (13, torch.enable_grad)):
        with how():
            parts.append(model(ids[:, start : {0: 8, 8: 12, 12: 13, 13: 24}[start]], past_key_values=cache, use_cache=True).logits)
    (parts[1].sum() + parts[3].sum()).backward()
    torch.testing.assert_close(torch.cat(parts, 1), model(ids, use_cache=False).logits, **CLOSE)


@pytest.mark.parametrize("family", ["llama", "mistral"])
def test_a_compressed_model_assists_and_is_assisted(family: str) -> None:
    model, plain, ids = compressed(family, METHODS[1], 0.5, 0.6), dense(family), tokens(1)
    for main, assistant in ((model, plain), (plain, compressed(family, METHODS[1], 0.5, 0.6))):
        alone = main.generate(ids, max_new_tokens=10, do_sample=False)
        assert torch.equal(main.generate(ids, assistant_model=assistant, max_new_tokens=10, do_sample=False), alone)


def test_hidden_states_of_a_step_are_of_every_row() -> None:
    model, ids = compressed("llama", METHODS[1], 0.5, 0.5), tokens(8)
    cache = RoutedCache(model.config)
    model(ids[:, :23], past_key_values=cache, use_cache=True)
    states = model(ids[:, 23:], past_key_values=cache, use_cache=True, output_hidden_states=True).hidden_states
    assert [tuple(state.shape) for state in states] == [(8, 1, 32)] * 5


def test_a_mask_of_four_dimensions_goes_with_a_cache() -> None:
    model, ids = compressed("llama", METHODS[1], 0.5, 0.5), tokens()
    mask = torch.ones(24, 24, dtype=torch.bool).tril().expand(3, 1, 24, 24)
    cache, parts = RoutedCache(model.config), []
    for start, stop in ((0, 16), (16, 17), (17, 24)):
        parts.append(model(ids[:, start:stop], attention_mask=mask[:, :, start:stop, :stop], past_key_values=cache, use_cache=True).logits)
    torch.testing.assert_close(torch.cat(parts, 1), model(ids, use_cache=False).logits, **CLOSE)


@pytest.mark.parametrize(("family", "method"), [*((family, METHODS[1]) for family in FAMILIES), *SHRINKING[:2], SHRINKING[-1]], **names)
def test_beams_sampling_and_continuing_from_a_cache(family: str, method: Method) -> None:
    model, ids = compressed(family, method, 0.5, 0.6), tokens()
    beams = {"max_new_tokens": 6, "num_beams": 3, "do_sample": False}
    assert torch.equal(model.generate(ids, **beams), model.generate(ids, use_cache=False, **beams))
    drawn = []
    for use_cache in (True, False):
        torch.manual_seed(0)
        drawn.append(model.generate(ids, max_new_tokens=6, do_sample=True, use_cache=use_cache))
    assert torch.equal(drawn[0], drawn[1])
    cache = RoutedCache(model.config)
    with torch.no_grad():
        model(ids[:, :20], past_key_values=cache, use_cache=True)
    continued = model.generate(ids, past_key_values=cache, max_new_tokens=6, do_sample=False)
    assert torch.equal(continued, model.generate(ids, max_new_tokens=6, do_sample=False))


@families
def test_a_cache_can_be_cropped(family: str) -> None:
    model, ids = compressed(family, METHODS[1], 0.5, 0.6), tokens()
    cache = RoutedCache(model.config)
    cache.activate_past_recording()
    model(ids[:, :20], past_key_values=cache, use_cache=True)
    cache.crop(-6)
    assert cache.get_seq_length() == 14
    rest = model(ids[:, 14:], past_key_values=cache, use_cache=True).logits
    torch.testing.assert_close(rest, model(ids, use_cache=False).logits[:, 14:], **CLOSE)


def test_a_cache_stores_what_was_processed() -> None:
    model, ids = compressed("llama", METHODS[1], 0.5, 0.5), tokens()
    cache, trace = RoutedCache(model.config), Trace()
    model(ids, past_key_values=cache, use_cache=True, trace=trace)
    kept = [routing.counts()[0] for routing in trace.routings.values()]
    assert cache.tokens_stored() == [72, *kept, 72]
    # Two key heads of 8 channels, keys and values, float32.
    assert cache.bytes_stored() == sum(cache.tokens_stored()) * 2 * 2 * 8 * 4


def test_caches_of_other_kinds_are_refused_by_name() -> None:
    model, ids = compressed("llama", METHODS[1], 0.5, 0.5), tokens()
    full = DynamicCache(config=model.config)
    dense("llama")(ids, past_key_values=full, use_cache=True)
    with pytest.raises(ValueError, match=r"DynamicCache that holds 24 tokens.*RoutedCache"):
        model(ids, past_key_values=full, use_cache=True)
    with pytest.raises(ValueError, match=r"StaticCache.*cache_implementation"):
        model.generate(ids, max_new_tokens=2, cache_implementation="static")


def test_continuous_batching_is_refused_by_name() -> None:
    """Its paged cache holds every token in every layer: the answers would be empty."""
    model: Any = compressed("llama", METHODS[1], 0.5, 0.5)
    with pytest.raises(ValueError, match=r"CompressedLlamaForCausalLM does not support continuous batching \(generate_batch\)"):
        model.generate_batch([[3, 4, 5]], max_new_tokens=2)
    with pytest.raises(ValueError, match="call generate"):
        model.init_continuous_batching()


def test_steps_with_a_cache_leave_out_the_kernels_that_plan_for_every_shape() -> None:
    model, enabled = compressed("llama", METHODS[1], 0.5, 0.5), torch.backends.cuda.cudnn_sdp_enabled
    seen: list[bool] = []
    model.model.layers[1].mlp.register_forward_hook(lambda *_: seen.append(enabled()))
    assert enabled()
    model(tokens(8), use_cache=False)
    model(tokens(8), use_cache=True)
    with pytest.raises(IndexError):
        model(tokens(8) + 10**6, use_cache=True)
    assert seen == [True, False]
    assert enabled()


@pytest.mark.parametrize("name", ["threshold_attention", "threshold"])
def test_a_cache_requested_in_training_with_checkpointing_changes_no_gradient(name: str) -> None:
    method, found = next(method for method in METHODS if method.name == name), []
    for requested in (False, True):
        model = compressed("mistral", method, 0.5, 0.5).train()
        checkpoint_activations(model)
        out = model(tokens(), labels=tokens(), use_cache=requested, trace=Trace(seed=3))
        out.loss.backward()
        assert out.past_key_values is None
        found.append({key: value.grad for key, value in model.named_parameters() if value.grad is not None})
    assert found[0].keys() == found[1].keys()
    assert all(torch.equal(found[0][key], found[1][key]) for key in found[0])
    full = RoutedCache(model.config)
    model.eval()(tokens()[:, :4], past_key_values=full, use_cache=True)
    with pytest.raises(ValueError, match="past_key_values with tokens, in training with gradient checkpointing"):
        model.train()(tokens()[:, 4:], past_key_values=full)
