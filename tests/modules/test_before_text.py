"""Stages in the tower and at the projector of a vision-language model: the language model has fewer visual tokens from its first layer on."""

from __future__ import annotations

import copy
from dataclasses import astuple
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode
from transformers import PreTrainedModel

from laconic import CompressionConfig, StageConfig, Trace, compress, decompress, from_pretrained
from laconic.modules.compress import checkpoint_activations
from laconic.modules.cost.cost import CostModel
from laconic.modules.decoding.cache import RoutedCache
from laconic.modules.tokens.keep_count import KeepCount
from tests.matrix.bypassed import causal_mask
from tests.matrix.decoders import spread
from tests.matrix.visual import FAMILIES, LAYERS, LENGTH, PLACEHOLDER, VISUAL, batch, dense, labels, pixels, row, whole


def _of(names: Any, *families: str) -> list[Any]:
    """Cases, of which two methods in one family run by default."""
    default = ("tower_learned", "all")
    return [
        pytest.param(*(family, name)[not families :], marks=[] if name in default and family == "llava" else pytest.mark.slow)
        for family in families or ("llava",)
        for name in names
    ]


CLOSE = {"atol": 2e-5, "rtol": 1e-4}
_LAST = {"stack": "text", "layer": 1, "scope": "visual", "scorer": "last_query", "keep": 0.5}
# Stages by name; keep 0.5 unless they say otherwise.
METHODS: dict[str, list[dict[str, Any]]] = {
    "projector_learned": [{"stack": "projector", "layer": 0, "scorer": {"name": "learned", "detach": True}}],
    "projector_vision_selector": [{"stack": "projector", "layer": 0, "scorer": {"name": "self_attention", "detach": True}}],
    "projector_random": [{"stack": "projector", "layer": 0, "scorer": "random"}],
    "projector_divprune": [{"stack": "projector", "layer": 0, "scorer": "diversity"}],
    "projector_squeeze": [{"stack": "projector", "layer": 0, "scorer": "random", "merger": {"name": "squeeze", "metric": "tokens"}}],
    "projector_pooled": [{"stack": "projector", "layer": 0, "scorer": "uniform_grid", "merger": "nearest"}],
    "projector_queries": [{"stack": "projector", "layer": 0, "scorer": "first", "merger": {"name": "queries", "queries": 8}}],
    "tower_learned": [{"stack": "vision", "layer": 1, "scorer": {"name": "learned", "detach": True}}],
    "tower_tome": [{"stack": "vision", "layer": 1, "scorer": "bipartite", "merger": "bipartite"}],
    "tower_around": [{"stack": "vision", "layer": 1, "site": "around", "scorer": "random"}],
    "tower_threshold": [{"stack": "vision", "layer": 1, "scorer": {"name": "linear", "detach": True}, "selector": "threshold"}],
    "all": [
        {"stack": "vision", "layer": 1, "scorer": "random", "keep": 0.7},
        {"stack": "projector", "layer": 0, "scorer": "random", "keep": 0.7},
        {**_LAST, "layer": 2},
    ],
}


def _dense(family: str = "llava", **settings: Any) -> PreTrainedModel:
    """A model whose tower has three layers, of which the last is not read."""
    about = FAMILIES[family].settings
    tower = {**about.get("vision_config", dense().config.vision_config.to_dict()), "num_hidden_layers": 3}
    return dense(family, vision={"vision_config": tower}, **settings)


def _model(name: str, keep: float | None = None, family: str = "llava", **settings: Any) -> PreTrainedModel:
    stages = [StageConfig(**{"keep": 0.5, **stage, **({} if keep is None else {"keep": keep})}) for stage in METHODS[name]]
    restore = {"text": {"layer": LAYERS, "by": "rejoin"}} if any(stage.stack == "text" for stage in stages) else None
    return spread(compress(_dense(family, **settings), CompressionConfig(stages, restore)))


def _run(model: PreTrainedModel, inputs: dict[str, Tensor], **given: Any) -> tuple[Tensor, Trace]:
    trace = Trace(**given)
    return model(**inputs, trace=trace, use_cache=True).logits, trace


@pytest.mark.parametrize(("family", "name"), _of([name for name in METHODS if name != "tower_tome"], "llava", "llava_qwen3"))
def test_keep_1_is_the_dense_model_bit_for_bit_loss_and_gradients(family: str, name: str) -> None:
    given = whole()
    answers = labels(given["input_ids"])
    model, plain = _model(name, 1.0, family), _dense(family)
    losses = []
    for each in (model, plain):
        options = {"trace": Trace(labels=answers)} if each is model else {}
        losses.append(each(**given, labels=answers, use_cache=False, **options).loss)
        losses[-1].backward()
    assert torch.equal(losses[0], losses[1])
    ours = {key: value.grad for key, value in model.named_parameters() if ".stages." not in key}
    for key, value in plain.named_parameters():
        assert (ours[key] is None and value.grad is None) or torch.equal(ours[key], value.grad), key


def _features(plain: PreTrainedModel, trace: Trace) -> tuple[Tensor, Tensor]:
    """(images, VISUAL, C) features of all patches, and (images, VISUAL) those that are left, by masks alone."""
    tower, given = copy.deepcopy(plain.model.vision_tower), whole()["pixel_values"]
    skipped = int(plain.config.vision_feature_select_strategy == "default")
    hidden = tower.embeddings(given)
    hidden = tower.pre_layrnorm(hidden) if hasattr(tower, "pre_layrnorm") else hidden
    seen = torch.ones(hidden.shape[:2], dtype=torch.bool)
    for index, layer in enumerate(tower.encoder.layers[:-1]):
        routing = trace.routings.get(f"vision.before_{index}")
        if routing is not None:
            seen = _left(routing.state.position, routing.kept_mask, seen)
        hidden = layer(hidden, torch.zeros(len(seen), 1, 1, seen.shape[1]).masked_fill(~seen[:, None, None], -1e30))
    features, seen = plain.model.multi_modal_projector(hidden[:, skipped:]), seen[:, skipped:]
    routing = trace.routings.get("projector.before_0")
    if routing is not None:
        positions = seen.nonzero()[:, 1].view(len(seen), -1).gather(1, routing.state.position)
        seen = _left(positions, routing.kept_mask, seen)
    return features, seen


def _left(position: Tensor, kept: Tensor, seen: Tensor) -> Tensor:
    return torch.zeros_like(seen).scatter(1, position, kept) & seen


@pytest.mark.parametrize(
    ("family", "name"),
    _of(["projector_learned", "projector_divprune", "tower_learned", "tower_threshold", "all"], "llava", "llava_mistral", "llava_qwen2"),
)
def test_a_real_drop_equals_a_mask_in_every_layer_behind_it(family: str, name: str) -> None:
    given, model, plain = whole(), _model(name, family=family, sliding_window=None), _dense(family, sliding_window=None)
    logits, trace = _run(model, given)
    with torch.no_grad():
        features, seen = _features(plain, trace)
        ids, language = given["input_ids"], plain.model.language_model
        embeds = language.embed_tokens(ids)
        visual = ids == PLACEHOLDER
        embeds[visual] = features.flatten(0, 1)
        hidden = ~torch.zeros_like(visual).masked_scatter(visual, ~seen)
        mask = causal_mask(ids, language)
        rotary = language.rotary_emb(embeds, torch.arange(LENGTH)[None])
        for index, layer in enumerate(language.layers):
            routing = trace.routings.get(f"text.before_{index}")
            if routing is not None:
                here = torch.zeros_like(hidden).scatter(1, routing.state.position, routing.kept_mask)
                hidden = hidden & here
            both = mask["full_attention"] if isinstance(mask, dict) else mask
            embeds = layer(embeds, attention_mask=both & hidden[:, None, None], position_embeddings=rotary)
        expected = plain.lm_head(language.norm(embeds))
    assert 0 < int(seen.sum()) < seen.numel()
    words = ~visual
    torch.testing.assert_close(logits[words], expected[words], **CLOSE)


@pytest.mark.parametrize(
    "name",
    _of(
        [
            "projector_learned",
            "projector_squeeze",
            "projector_queries",
            "tower_learned",
            "tower_tome",
            "tower_threshold",
            "tower_around",
            "all",
        ]
    ),
)
def test_a_batch_of_mixed_rows_is_each_row_alone_and_decoding_equals_one_forward(name: str) -> None:
    model, given = _model(name), batch(left=True)
    mask = given["attention_mask"]
    position = (mask.cumsum(-1) - 1).clamp(min=0)
    ids = torch.arange(3)
    logits, trace = _run(model, {**given, "position_ids": position}, sample_ids=ids)
    # Draws of a tower are those of its images.
    drawn = any(stage.get("scorer") == "random" for stage in METHODS[name])
    for number in range(0 if drawn else 3):
        alone = model(**row(number)).logits[0]
        torch.testing.assert_close(logits[number, -alone.shape[0] :], alone, **CLOSE)
    cache, parts = RoutedCache(model.config), []
    for start, stop in ((0, 22), (22, 23), (23, LENGTH)):
        images = {"pixel_values": given["pixel_values"]} if start == 0 else {}
        out = model(
            given["input_ids"][:, start:stop], attention_mask=mask[:, :stop], position_ids=position[:, start:stop],
            past_key_values=cache, trace=Trace(sample_ids=ids), **images,
        )  # fmt: skip
        assert out.past_key_values.get_seq_length() == stop
        parts.append(out.logits)
    if "last_query" not in str(METHODS[name]):
        torch.testing.assert_close(torch.cat(parts, 1)[mask.bool()], logits[mask.bool()], **CLOSE)
    gone = 0 if name == "tower_around" else int(torch.as_tensor(trace.flow("text").gone).sum())
    assert (gone > 0) == (name != "tower_around")
    assert cache.tokens_stored()[0] == 3 * LENGTH - int((mask == 0).sum()) - gone if gone else True


def test_images_of_rows_with_none_or_several_have_draws_of_their_own() -> None:
    model = _model("projector_random")
    first, again, other = (_run(model, batch(rows=(0, 1)), sample_ids=torch.tensor(ids))[1] for ids in ((3, 4), (3, 4), (5, 4)))
    kept, repeated, differs = (trace.routings["projector.before_0"].scores for trace in (first, again, other))
    assert torch.equal(kept, repeated)
    assert len({str(row) for row in (*kept.tolist(), *differs.tolist())}) == 6


@pytest.mark.parametrize("name", _of(["projector_learned", "tower_learned", "tower_tome", "all"]))
def test_generation_of_a_batch_is_that_of_each_row_with_beams_and_a_second_turn(name: str) -> None:
    model, given = _model(name), batch(left=True)
    how: dict[str, Any] = {"max_new_tokens": 5, "do_sample": False}
    made = model.generate(**given, **how)
    for number in range(3):
        alone = model.generate(**row(number), **how)
        assert torch.equal(alone[0, -5:], made[number, -5:]) or "random" in str(METHODS[name])
    assert model.generate(**given, num_beams=3, **how).shape == made.shape
    cache, first = RoutedCache(model.config), row(0)
    model(**first, past_key_values=cache)
    stored = cache.tokens_stored()
    ids = torch.cat([torch.tensor([[5]]), torch.full((1, VISUAL), PLACEHOLDER), torch.tensor([[6, 7, 8]])], 1)
    out = model(ids, pixel_values=pixels(1, 5), past_key_values=cache)
    assert out.logits.shape[1] == ids.shape[1]
    assert cache.get_seq_length() == first["input_ids"].shape[1] + ids.shape[1]
    assert all(after - before < ids.shape[1] for before, after in zip(stored, cache.tokens_stored(), strict=True))


def test_beams_of_rows_with_several_images_see_their_own() -> None:
    model = _model("projector_learned", 0.6)
    one, how = row(1), {"max_new_tokens": 3, "do_sample": False, "num_beams": 2}
    both = batch(left=True, rows=(1, 0))
    assert torch.equal(model.generate(**both, **how)[0, -3:], model.generate(**one, **how)[0, -3:])


@pytest.mark.parametrize("name", _of(["projector_learned", "projector_vision_selector", "projector_queries", "tower_learned", "all"]))
def test_gradient_checkpointing_changes_no_gradient_and_routers_learn(name: str) -> None:
    given = whole()
    answers, found = labels(given["input_ids"]), []
    for checkpoint in (False, True):
        model = _model(name).train()
        if checkpoint:
            checkpoint_activations(model)
        model(**given, labels=answers, trace=Trace(labels=answers, seed=3), use_cache=False).loss.backward()
        found.append({key: value.grad for key, value in model.named_parameters() if value.grad is not None})
    assert found[0].keys() == found[1].keys()
    assert all(torch.allclose(found[0][key], found[1][key], atol=1e-6) for key in found[0])
    assert bool(found[0]["model.multi_modal_projector.linear_1.weight"].any())
    if "learned" in name or "selector" in name:
        assert any(bool(value.any()) for key, value in found[0].items() if ".scorer." in key)


@pytest.mark.parametrize("name", _of(list(METHODS)))
def test_it_is_saved_loaded_and_taken_back(name: str, tmp_path: Path) -> None:
    given, model = whole(), _model(name)
    trace = {"seed": 1, "sample_ids": torch.arange(3)}
    expected = _run(model, given, **trace)[0]
    model.save_pretrained(tmp_path)
    assert torch.equal(_run(from_pretrained(tmp_path), given, **trace)[0], expected)
    plain = decompress(model)
    assert type(plain) is type(dense())
    assert not any("stages" in key for key in plain.state_dict())


@pytest.mark.parametrize(
    ("family", "name"), _of(["projector_learned", "projector_vision_selector", "tower_learned"], "llava", "llava_qwen2")
)
def test_analytic_macs_of_all_stacks_equal_a_counter(family: str, name: str) -> None:
    how = {"attn_implementation": "eager", "sliding_window": None}
    METHODS["counted"] = [{**stage, "selector": {"name": "top_k", "bucket": 1}} for stage in METHODS[name]]
    model, given = _model("counted", family=family, **how), row(0)
    del METHODS["counted"]
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        _, trace = _run(model, given)
    cost = CostModel(model, size=given["input_ids"].shape[1] - VISUAL)
    counted = counter.get_total_flops() / 2
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        _dense(family, **how)(**given, use_cache=False)
    assert cost().dense_macs == pytest.approx(counter.get_total_flops() / 2, rel=2e-4)
    assert cost().macs == pytest.approx(counted, rel=0.012)
    assert cost.achieved(trace) == pytest.approx(cost().macs_ratio, rel=1e-6)


def test_text_alone_and_images_given_as_features_are_served() -> None:
    model = _model("projector_learned")
    torch.testing.assert_close(model(**row(2)).logits, _dense()(**row(2)).logits, **CLOSE)


def test_what_cannot_shorten_a_tower_is_refused_with_what_can() -> None:
    model = dense("llava_qwen2")
    model.config.vision_feature_layer = [0, -1]
    with pytest.raises(ValueError, match=r"stack = 'vision' is not offered: vision_feature_layer = \[0, -1\] joins .* stack = 'text'"):
        compress(model, CompressionConfig([StageConfig(layer=0, keep=0.5, scorer="random", stack="vision")]))
    model.config.vision_feature_layer, model.config.vision_feature_select_strategy = -1, "default"
    with pytest.raises(ValueError, match="stack = 'projector' is not offered: .*drops the first patch of a tower without class token"):
        compress(model, CompressionConfig([StageConfig(layer=0, keep=0.5, scorer="random", stack="projector")]))
    with pytest.raises(ValueError, match="compares keys, and a projector has no attention: take .*metric: tokens"):
        compress(dense(), CompressionConfig([StageConfig(layer=0, keep=0.5, scorer="bipartite", stack="projector")]))
    with pytest.raises(ValueError, match="vision_feature_layer = -1 in a forward: a compressed llava uses that of its config"):
        _model("projector_learned")(**whole(), vision_feature_layer=-1)


def test_a_class_token_that_the_projector_reads_is_protected() -> None:
    model = dense(vision={"vision_feature_select_strategy": "full"})
    model.config.vision_feature_select_strategy = "full"
    tokens = VISUAL + 1
    ids = torch.randint(2, PLACEHOLDER, (2, 1 + tokens + 4), generator=torch.Generator().manual_seed(0))
    ids[:, 1 : 1 + tokens] = PLACEHOLDER
    given = {"input_ids": ids, "pixel_values": pixels(2)}
    stages = [
        StageConfig(layer=0, keep=0.3, stack="projector", scorer="uniform_grid", merger="nearest"),
        StageConfig(layer=1, keep=0.5, stack="text", scope="visual", scorer="random"),
    ]
    trace = Trace()
    compress(model, CompressionConfig(stages))(**given, trace=trace)
    first, second = trace.routings.values()
    assert first.counts() == (2 * 3, 2 * VISUAL)
    assert bool(first.state.protected[:, 0].all())
    # Only itself stands for the class token.
    state = trace.flow("projector").tokens
    assert bool(((state.source == state.source[:, :1]).sum(-1) == 1).all())
    assert second.counts() == (2 * 2, 2 * 3)
    assert CostModel(model, size=5).shapes["text"].routable == VISUAL


def test_broken_weights_are_no_patches_that_are_gone() -> None:
    model = _model("projector_learned")
    with torch.no_grad():
        model.model.vision_tower.encoder.layers[0].mlp.fc1.bias[0] = torch.nan
    assert bool(model(**whole()).logits.isnan().any())


def test_a_row_of_one_token_is_decided_as_in_a_batch() -> None:
    stages = [
        StageConfig(layer=0, keep=0.5, stack="projector", scorer={"name": "linear"}, selector="threshold"),
        StageConfig(layer=1, keep=0.5, stack="text", scope="visual", scorer={"name": "linear"}, selector="threshold"),
    ]
    model, given = spread(compress(_dense(), CompressionConfig(stages))), batch(left=True)
    logits = model(**given, position_ids=(given["attention_mask"].cumsum(-1) - 1).clamp(min=0)).logits
    for number in range(3):
        alone = model(**row(number)).logits[0]
        torch.testing.assert_close(logits[number, -alone.shape[0] :], alone, **CLOSE)


_ODD: dict[str, list[dict[str, Any]]] = {
    "fuse": [{"stack": "vision", "layer": 0, "scorer": "cls_attention", "count": "evit", "merger": "fuse"}],
    "pool": [
        {"stack": "vision", "layer": 0, "scorer": "uniform_grid", "merger": {"name": "pool", "outputs": 4}, "tokens": 4, "keep": None}
    ],
    "predictor": [{"stack": "vision", "layer": 1, "scorer": "learned", "selector": "predictor"}],
    "gate": [{"stack": "vision", "layer": 1, "site": "around", "scorer": "learned", "selector": "threshold", "estimator": "gate"}],
}


@pytest.mark.parametrize("name", [pytest.param(name, marks=[] if name in ("tower_threshold", "all", "predictor") else pytest.mark.slow) for name in (*METHODS, *_ODD)])  # fmt: skip
def test_a_blank_image_counts_for_nothing_and_moves_no_threshold_and_no_router(name: str) -> None:
    stages = [StageConfig(**{"keep": 0.5, **stage}) for stage in (METHODS | _ODD)[name]]
    model = compress(_dense(), CompressionConfig(stages)).train()
    words, blank = row(2)["input_ids"], torch.full((1, VISUAL), PLACEHOLDER)
    given = {
        "input_ids": torch.cat([words, blank], 1),
        "attention_mask": torch.cat([torch.ones_like(words), torch.zeros_like(blank)], 1),
        "pixel_values": torch.zeros(1, 3, 12, 12),
    }
    buffers = {key: value.clone() for key, value in model.named_buffers()}
    trace = Trace(labels=given["input_ids"].masked_fill(given["input_ids"] == PLACEHOLDER, -100), blank=True)
    logits = model(**given, trace=trace, use_cache=False).logits[:, : words.shape[1]]
    torch.testing.assert_close(logits, _dense()(words).logits, **CLOSE)
    assert [routing.counts() for routing in trace.routings.values()] == [(0, 0)] * len(stages)
    alone = Trace(labels=words)
    model(words, trace=alone, use_cache=False)
    assert CostModel(model).achieved(trace) == CostModel(model).achieved(alone)
    (logits.logsumexp(-1).sum() + torch.as_tensor(trace.auxiliary_loss or 0.0)).backward()
    assert all(torch.equal(value, buffers[key]) for key, value in model.named_buffers())
    # Routers take part, so that all processes have gradients of the same parameters, and these are 0.
    routers = [value.grad for key, value in model.named_parameters() if ".stages." in key]
    assert not any(bool(gradient.any()) for gradient in routers if gradient is not None)


def test_evidence_is_refused_since_no_visual_token_has_a_label() -> None:
    for stack, scope in (("vision", "all"), ("projector", "all"), ("text", "visual")):
        with pytest.raises(ValueError, match="'evidence' learns the label of the task .*: take scorer 'learned'"):
            compress(dense(), CompressionConfig([StageConfig(layer=0, keep=0.5, scorer="evidence", stack=stack, scope=scope)]))


def test_visual_keep_and_macs_are_counted_by_stack_over_all_images_of_a_batch() -> None:
    model = _model("projector_learned")
    cost, counts = CostModel(model), KeepCount()
    for number in range(3):
        counts.add(_run(model, row(number))[1], cost, 1)
    # Five of nine patches of each image pass the projector, and no more are in any layer behind it.
    assert {name: use.keep for name, use in counts.uses.items() if name in cost.by_stack} == pytest.approx(
        {"projector": 5 / 9, "text": 5 / 9}
    )
    assert counts.uses["text"].present == 3 * VISUAL
    assert cost().stack_keep == pytest.approx({"projector": 5 / 9, "text": 5 / 9})
    together = cost.uses(_run(model, batch())[1])
    for name, use in counts.uses.items():
        assert astuple(together[name]) == pytest.approx(astuple(use))
    half = _model("all")
    halved = CostModel(half, size=row(0)["input_ids"].shape[1] - VISUAL)
    uses = halved.uses(_run(half, row(0))[1])
    # The tower's last layer that runs, the projector, and the layers before and behind the stage of the language model.
    assert halved().stack_keep == pytest.approx({"vision": (9 + 6) / 18, "projector": 4 / 9, "text": (4 + 4 + 2 + 2) / 36})
    assert {name: use.keep for name, use in uses.items()} == pytest.approx(halved().stack_keep)
    assert {name: use.macs_ratio for name, use in uses.items()} == pytest.approx(halved().stack_macs_ratio, rel=1e-6)
    around = _model("tower_around")
    assert CostModel(around).uses(_run(around, row(0))[1])["projector"].macs_ratio == 1
