"""Stages in the tower and at the projector of vision-language families beside LLaVA."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode
from transformers import AttentionInterface, PreTrainedModel
from transformers.integrations.sdpa_attention import sdpa_attention_forward

from laconic import CompressionConfig, StageConfig, Trace, compress, decompress, from_pretrained
from laconic.modules.compress import checkpoint_activations
from laconic.modules.cost.cost import CostModel
from tests.matrix.decoders import spread
from tests.matrix.image_text import FAMILIES, IMAGES, PLACEHOLDER, SIDE, attend_to, batch, dense, given_of, labels_of, language_layers, row

CLOSE = {"atol": 2e-5, "rtol": 1e-4}
_LEARNED = {"name": "learned", "detach": True}
# Stages by name; keep 0.5 unless they say otherwise.
METHODS: dict[str, list[dict[str, Any]]] = {
    "projector": [{"stack": "projector", "layer": 0, "scorer": _LEARNED}],
    "tower": [{"stack": "vision", "layer": 1, "scorer": _LEARNED}],
    "merged": [{"stack": "projector", "layer": 0, "scorer": "uniform_grid", "merger": "nearest"}],
    "sites": [
        {"stack": "vision", "layer": 0, "site": "around", "scorer": _LEARNED},
        {"stack": "vision", "layer": 1, "site": "between", "scorer": _LEARNED},
    ],
    "adaptive": [
        {"stack": "vision", "layer": 1, "scorer": {"name": "linear", "detach": True}, "selector": "threshold", "merger": "squeeze"},
        {"stack": "projector", "layer": 0, "scorer": {"name": "linear", "detach": True}, "selector": "threshold"},
    ],
    "all": [
        {"stack": "vision", "layer": 1, "scorer": "uniform_grid", "keep": 0.7},
        {"stack": "projector", "layer": 0, "scorer": _LEARNED, "keep": 0.7},
        {"stack": "text", "layer": 2, "scope": "visual", "scorer": "last_query"},
    ],
}
STAGED = ("llava_next", "llava_onevision", "smolvlm", "idefics3", "internvl", "gemma3", "qwen2_vl", "qwen2_5_vl", "qwen3_vl")
# These run by default: tiles, and images of any size with DeepStack.
_DEFAULT = ("llava_next", "qwen3_vl")


# Models of these differ little from those of another family.
_ALIKE = ("llava_onevision", "idefics3", "qwen2_vl")


def _families(*default: str, without: tuple[str, ...] = ()) -> list[Any]:
    """Families, of which those not in ``default`` run behind --all."""
    return [pytest.param(family, marks=[] if family in default else pytest.mark.slow) for family in STAGED if family not in without]


def _model(family: str, name: str, keep: float | None = None, **settings: Any) -> PreTrainedModel:
    stages = [StageConfig(**{"keep": 0.5, **stage, **({} if keep is None else {"keep": keep})}) for stage in METHODS[name]]
    if family == "gemma3":
        stages = [replace(stage, scorer=_LEARNED) if stage.part("scorer").name == "last_query" else stage for stage in stages]
    return spread(compress(dense(family, **settings), CompressionConfig(stages)))


@pytest.mark.parametrize("family", _families(*_DEFAULT))
def test_keep_1_is_the_dense_model_bit_for_bit_loss_and_gradients(family: str) -> None:
    given = batch(family)
    answers, losses = labels_of(given["input_ids"]), []
    model, plain = _model(family, "all", 1.0), dense(family)
    for each in (model, plain):
        trace = {"trace": Trace(labels=answers)} if each is model else {}
        losses.append(each(**given, labels=answers, use_cache=False, **trace).loss)
        losses[-1].backward()
    assert torch.equal(*losses)
    ours = {key: value.grad for key, value in model.named_parameters() if ".stages." not in key}
    for key, value in plain.named_parameters():
        assert (ours[key] is None and value.grad is None) or torch.equal(ours[key], value.grad), key


def _attend_to_seen(module: Any, query: Tensor, key: Tensor, value: Tensor, attention_mask: Any, **kwargs: Any) -> Any:
    """Attention to the tokens that ``module.seen`` gives: (rows, tokens), or the tokens of one image or window after the other."""
    seen = module.seen
    if seen.ndim == 1:
        module.seen, seen = seen[key.shape[2] :], seen[None, : key.shape[2]]
    mask = seen[:, None, None] if bool(seen.any()) else None
    return sdpa_attention_forward(module, query, key, value, mask, **kwargs)


AttentionInterface.register("seen", _attend_to_seen)


@pytest.mark.parametrize("family", _families(*_DEFAULT))
def test_a_real_drop_equals_a_mask_in_every_layer_behind_it(family: str) -> None:
    given, model, plain = given_of(row(family, 1)), _model(family, "all"), dense(family)
    trace = Trace()
    logits = model(**given, trace=trace, use_cache=True).logits
    inner: Any = plain.model
    tower = inner.get_submodule(model.adapter.vision_at)
    tower.config._attn_implementation = "seen"
    seen: Tensor | None = None
    for index, layer in enumerate(inner.get_submodule(model.adapter.blocks_at)):
        routing = trace.routings.get(f"vision.before_{index}")
        if seen is None:
            flow = trace.flow("vision")
            seen = torch.ones(flow.rows, FAMILIES[family].patches, dtype=torch.bool)
        if routing is not None:
            seen = torch.zeros_like(seen).scatter(1, routing.state.position, routing.kept_mask) & seen
        attention = next(getattr(layer, name) for name in ("self_attn", "attention", "attn") if hasattr(layer, name))
        attention.seen = seen.flatten() if family.startswith("qwen") else seen
    hidden = torch.ones_like(given["input_ids"], dtype=torch.bool)
    absent = trace.flow("text").absent
    assert absent is not None
    for index, layer in enumerate(language_layers(plain)):
        hidden = hidden & ~absent
        routing = trace.routings.get(f"text.before_{index}")
        if routing is not None:
            hidden = torch.zeros_like(hidden).scatter(1, routing.state.position, routing.kept_mask) & hidden

        attend_to(layer, hidden)
    expected = plain(**given, use_cache=False).logits
    words = given["input_ids"] != PLACEHOLDER
    torch.testing.assert_close(logits[words], expected[words], **CLOSE)


@pytest.mark.parametrize(
    ("family", "name"),
    [
        *(pytest.param(*case.values, "all", marks=case.marks) for case in _families("qwen3_vl", without=_ALIKE)),
        pytest.param("smolvlm", "adaptive", marks=pytest.mark.slow),
    ],
)
def test_a_mixed_batch_is_each_row_alone_and_generation_equals_recomputing(family: str, name: str) -> None:
    model, given = _model(family, name), batch(family)
    how: dict[str, Any] = {"max_new_tokens": 3, "do_sample": False, "output_logits": True, "return_dict_in_generate": True}
    made = model.generate(**given, **how)
    for number in range(3):
        one = given_of(row(family, number))
        alone = model.generate(**one, **how)
        assert torch.equal(alone.sequences[0, -3:], made.sequences[number, -3:])
        for ours, theirs in zip(alone.logits, made.logits, strict=True):
            torch.testing.assert_close(ours[0], theirs[number], **CLOSE)
        trace = Trace()
        model(**one, trace=trace, use_cache=True)
        assert IMAGES[number] == 0 or int(torch.as_tensor(trace.flow("text").gone).sum()) > 0
    one, beams = given_of(row(family, 1)), {**how, "num_beams": 2}
    both = model.generate(**batch(family, (1, 0)), **beams).sequences
    assert torch.equal(both[0, -3:], model.generate(**one, **beams).sequences[0, -3:])
    # Recomputed without a cache: nothing says where the prompt ends, so that the last token of the prompt is given.
    prompt = torch.ones_like(one["input_ids"], dtype=torch.bool)
    prompt[:, -1] = False
    logits = model(**one, trace=Trace(prompt=prompt), use_cache=False).logits
    torch.testing.assert_close(logits[:, -1], model.generate(**one, **how).logits[0], **CLOSE)


@pytest.mark.parametrize("family", _families(without=(*_ALIKE, "smolvlm", "qwen3_vl")))
def test_it_is_saved_loaded_taken_back_and_trained_with_checkpointing(family: str, tmp_path: Any) -> None:
    given, model = given_of(batch(family)), _model(family, "all")
    answers, found = labels_of(given["input_ids"]), []
    expected = model(**given, use_cache=True).logits
    model.save_pretrained(tmp_path)
    assert torch.equal(from_pretrained(tmp_path)(**given, use_cache=True).logits, expected)
    model.train()
    for checkpoint in (False, True):
        if checkpoint:
            checkpoint_activations(model)
        model.zero_grad()
        model(**given, labels=answers, trace=Trace(labels=answers, seed=3), use_cache=False).loss.backward()
        found.append({key: value.grad for key, value in model.named_parameters() if value.grad is not None})
    assert found[0].keys() == found[1].keys()
    assert all(torch.allclose(found[0][key], found[1][key], atol=1e-6) for key in found[0])
    assert any(bool(value.any()) for key, value in found[0].items() if ".scorer." in key)
    assert any(bool(value.any()) for key, value in found[0].items() if "vision" in key or "visual" in key)
    assert type(decompress(model.eval())) is type(dense(family))


@pytest.mark.parametrize("family", _families("qwen3_vl", without=_ALIKE))
def test_analytic_macs_of_all_stacks_equal_a_counter(family: str) -> None:
    how, given = {"attn_implementation": "eager"}, given_of(row(family, 0))
    words = 64 - (given["input_ids"].shape[1] - FAMILIES[family].routable)
    longer = {key: torch.nn.functional.pad(value, (0, words), value=3 * (key == "input_ids")) if value.shape == given["input_ids"].shape else value
              for key, value in given.items()}  # fmt: skip
    METHODS["counted"] = [{**stage, "selector": {"name": "top_k", "bucket": 1}} for stage in METHODS["all"]]
    model, trace = _model(family, "counted", **how), Trace()
    del METHODS["counted"]
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        model(**longer, trace=trace, use_cache=True)
    cost, counted = CostModel(model, size=(SIDE, SIDE)), counter.get_total_flops() / 2
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        dense(family, **how)(**longer, use_cache=False)
    assert cost().dense_macs == pytest.approx(counter.get_total_flops() / 2, rel=0.01)
    assert cost().macs == pytest.approx(counted, rel=0.01)
    assert cost.achieved(trace) == pytest.approx(cost().macs_ratio, rel=0.02)


def test_padding_of_tiles_is_neither_kept_nor_gone_and_features_go_to_their_places() -> None:
    plain, model = dense("llava_next"), _model("llava_next", "projector")
    for each in (plain, model):
        each.config.image_grid_pinpoints = each.model.config.image_grid_pinpoints = [[SIDE, 2 * SIDE]]
    # The whole image, and two tiles whose first and last lines are padding; the second image fills its tiles.
    images = torch.randn(2, 3, 3, SIDE, SIDE, generator=torch.Generator().manual_seed(0))
    given = {"pixel_values": images, "image_sizes": torch.tensor([[8, 2 * SIDE], [SIDE, 2 * SIDE]])}
    expected = plain.model.get_image_features(**given).pooler_output
    assert [len(part) for part in expected] == [9 + 6 + 1, 9 + 18 + 3]
    ids = torch.full((1, sum(map(len, expected)) + 1), PLACEHOLDER)
    ids[:, -1] = 3
    trace = Trace()
    model(ids, **given, trace=trace)
    routing = trace.routings["projector.before_0"]
    assert torch.as_tensor(routing.present).tolist() == [9, 3, 3, 9, 9, 9]
    assert torch.as_tensor(routing.kept).tolist() == [5, 2, 2, 5, 5, 5]
    assert int(torch.as_tensor(trace.flow("text").gone)) == 15 + 27 - 24
    marked = model.adapter.encoded_images(model, given)["image"].pooler_output
    for ours, theirs in zip(marked, expected, strict=True):
        here = ~ours.isnan().all(-1)
        torch.testing.assert_close(ours[here], theirs[here], **CLOSE)
        ends = (theirs == plain.model.image_newline).all(-1)
        assert bool(here[ends].all())
    assert [int((~part.isnan().all(-1)).sum()) for part in marked] == [9 + 1, 15 + 3]


@pytest.mark.parametrize("merger", ["nearest", pytest.param("squeeze", marks=pytest.mark.slow)])
def test_stages_in_the_tower_merge_no_patch_into_padding_and_leave_padding_as_it_is(merger: str) -> None:
    METHODS["joined"] = [{"stack": "vision", "layer": 1, "scorer": _LEARNED, "merger": merger}]
    plain, model = dense("llava_next"), _model("llava_next", "joined")
    del METHODS["joined"]
    for each in (plain, model):
        each.config.image_grid_pinpoints = each.model.config.image_grid_pinpoints = [[SIDE, 2 * SIDE]]
    # The whole image, and two tiles of which only the middle lines are of the image.
    pixels = torch.randn(1, 3, 3, SIDE, SIDE, generator=torch.Generator().manual_seed(0))
    given = {"pixel_values": pixels, "image_sizes": torch.tensor([[8, 2 * SIDE]])}
    ids, trace = torch.full((1, 9 + 6 + 1 + 1), PLACEHOLDER), Trace()
    ids[:, -1] = 3
    model(ids, **given, trace=trace)
    routing, state = trace.routings["vision.before_1"], trace.flow("vision").state
    assert state is not None
    assert torch.as_tensor(routing.present).tolist() == [9, 3, 3]
    assert torch.as_tensor(routing.kept).tolist() == [5, 2, 2]
    (marked,) = model.adapter.encoded_images(model, given)["image"].pooler_output
    tower, inner = plain.model.vision_tower, plain.model
    hidden, found = tower.encoder.layers[0](tower.embeddings(pixels[0]), None), []
    for tile in range(3):
        # What became of each patch: one of the image is in a kept one, padding is alone.
        slot, used = state.source[tile], routing.routable[tile]
        stays = routing.kept_mask[tile].nonzero().flatten()
        assert bool(used[state.position[tile][slot]][used].all())
        assert torch.equal(state.position[tile][slot][~used], (~used).nonzero().flatten())
        means = torch.stack([hidden[tile][slot == number].mean(0) for number in range(len(stays))])
        after = inner.multi_modal_projector(tower.encoder.layers[1](means[None], None))[0]
        found.append(after[used[stays]])
    here = ~marked.isnan().all(-1)
    assert int(here.sum()) == 5 + 4 + 1
    # Behind the five of the whole image, the line of both tiles and its end.
    torch.testing.assert_close(marked[here], torch.cat([*found, inner.image_newline[None]]), **CLOSE)


def test_images_and_videos_that_are_interpolated_are_refused_with_what_works() -> None:
    model = _model("llava_onevision", "projector")
    given = given_of(row("llava_onevision", 0))
    for each in (model.config, model.model.config):
        each.image_grid_pinpoints, each.vision_aspect_ratio = [[SIDE, 2 * SIDE]], "anyres_max_1"
    images = given["pixel_values"].repeat(1, 2, 1, 1, 1)[:, :3]
    with pytest.raises(ValueError, match="an image of 2 tiles is interpolated to fewer patches by llava_onevision.*stack = 'text'"):
        model(given["input_ids"], pixel_values=images, image_sizes=torch.tensor([[SIDE, 2 * SIDE]]))
    with pytest.raises(ValueError, match="the frames of a video are interpolated to a quarter .*stack = 'text'"):
        model(torch.full((1, 6), 46), pixel_values_videos=torch.randn(1, 1, 3, SIDE, SIDE))
    plain, text = dense("llava_onevision"), {"stack": "text", "layer": 1, "scope": "visual", "scorer": "random", "keep": 1.0}
    video = {"input_ids": torch.tensor([[2, *[46] * 5, 4]]), "pixel_values_videos": torch.randn(1, 1, 3, SIDE, SIDE)}
    expected = plain(**video).logits
    assert torch.equal(compress(plain, CompressionConfig([StageConfig(**text)]))(**video).logits, expected)


@pytest.mark.parametrize("name", ["tower", "projector", "adaptive"])
def test_patches_that_are_joined_behind_the_tower_stay_or_leave_together(name: str) -> None:
    model, trace = _model("smolvlm", name), Trace()
    given = given_of(row("smolvlm", 1))
    model(**given, trace=trace)
    for routing in trace.routings.values():
        state, kept = routing.state, routing.kept_mask
        numbers = trace.flow(routing.stage.split(".")[0]).units
        assert numbers is not None
        unit = numbers.expand(state.rows, -1).gather(1, state.position)
        for image in range(2):
            # Nine squares of four patches, of which half stay, rounded up.
            here = torch.bincount(unit[image][kept[image]], minlength=9)
            assert set(here.tolist()) <= {0, 4}
            assert name == "adaptive" or here.tolist().count(4) == 5
        scores = torch.stack([routing.scores[0][unit[0] == one] for one in unit[0].unique()])
        assert torch.equal(scores, scores[:, :1].expand_as(scores))
    assert int(torch.as_tensor(trace.flow("text").gone).sum()) == 18 - int(kept.sum()) // 4


def test_images_with_padding_are_refused_with_what_works() -> None:
    model, given = _model("smolvlm", "projector"), given_of(row("smolvlm", 0))
    hidden = torch.ones(1, 1, SIDE, SIDE, dtype=torch.bool)
    hidden[..., 12:] = False
    with pytest.raises(ValueError, match="pixel_attention_mask hides a part of an image.*do_image_splitting = True.*stack = 'text'"):
        model(**given, pixel_attention_mask=hidden)


def test_images_and_videos_in_one_forward_are_refused_with_what_works() -> None:
    model, image, video = _model("qwen3_vl", "projector"), _image(4, 4, 0), _image(4, 4, 1, frames=2)
    given = image | {"pixel_values_videos": video["pixel_values"], "video_grid_thw": video["image_grid_thw"]}
    with pytest.raises(
        ValueError, match="pixel_values and pixel_values_videos in one forward: .* split a batch of such rows, or .* 'text'"
    ):
        model.adapter.encoded_images(model, given)


def _image(down: int, across: int, seed: int, frames: int = 1) -> dict[str, Tensor]:
    values = torch.randn(frames * down * across, 96, generator=torch.Generator().manual_seed(seed))
    return {"pixel_values": values, "image_grid_thw": torch.tensor([[frames, down, across]])}


@pytest.mark.parametrize("family", ["qwen2_5_vl", *(pytest.param(one, marks=pytest.mark.slow) for one in ("qwen2_vl", "qwen3_vl"))])
def test_images_of_different_sizes_and_frames_are_each_alone_and_dense_where_all_is_kept(family: str) -> None:
    alone = [_image(4, 6, 0), _image(8, 2, 1), _image(6, 8, 2, frames=2)]
    both = {key: torch.cat([image[key] for image in alone]) for key in alone[0]}
    expected = dense(family).model.get_image_features(**both)
    for name in ("tower", "projector", "merged", "adaptive", "sites"):
        whole, model = _model(family, name, 1.0), _model(family, name)
        made = whole.adapter.encoded_images(whole, both)["image"]
        for ours, theirs in zip(made.pooler_output, expected.pooler_output, strict=True):
            # In halves, a layer's MLP runs on padded rows, whose sums may be in another order.
            assert torch.equal(ours, theirs) or name == "sites"
            torch.testing.assert_close(ours, theirs, **CLOSE)
        together, marked = model.adapter.encoded_images(model, both)["image"], []
        for number, image in enumerate(alone):
            one = model.adapter.encoded_images(model, image)["image"]
            marked.append(one.pooler_output[0])
            torch.testing.assert_close(together.pooler_output[number], one.pooler_output[0], equal_nan=True, **CLOSE)
            for deep, single in zip(getattr(together, "deepstack_features", []), getattr(one, "deepstack_features", []), strict=True):
                torch.testing.assert_close(deep[number], single[0], **CLOSE)
        kept = [int((~part.isnan().all(-1)).sum()) for part in marked]
        # Half of 6, of 4, and of 12 twice.
        assert kept == [3, 2, 12] or name == "adaptive"
        if family == "qwen3_vl" and name == "projector":
            # DeepStack reads layer 0, before this stage.
            for ours, theirs in zip(together.deepstack_features[0], expected.deepstack_features[0], strict=True):
                torch.testing.assert_close(ours, theirs, **CLOSE)
