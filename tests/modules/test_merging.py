"""Mergers, restoring, and what they leave in the state."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional

from laconic import CompressionConfig, StageConfig, Trace, compress, decompress
from laconic.modules.backbones.projector import ProjectorLayers
from laconic.modules.backbones.vit import ViTLayers
from laconic.modules.mergers.bipartite import BipartiteMerger
from laconic.modules.mergers.squeeze import SqueezeMerger
from laconic.modules.scorers.base import Scored
from laconic.modules.scorers.bipartite import BipartiteScorer
from laconic.modules.selectors.base import Request
from laconic.modules.selectors.top_k import TopKSelector
from laconic.modules.site import SiteInput, TokenSpec
from laconic.modules.stage import Stage
from laconic.modules.tokens.state import TokenState
from tests.matrix import BACKBONES, answer, dense, images, labels

SPEC = TokenSpec(hidden_size=2, classes=0)


class _Angles(ViTLayers):
    """Layers whose keys are given."""

    angles: Tensor

    @classmethod
    def mean_keys(cls, layer: torch.nn.Module, hidden_states: Tensor) -> Tensor:
        radians = torch.deg2rad(cls.angles)
        return torch.stack([radians.cos(), radians.sin()], -1)[None]


def _site(values: Tensor, angles: list[float], leading: int = 1) -> SiteInput:
    _Angles.angles = torch.tensor(angles)
    state = TokenState.initial(1, len(angles), leading, None, torch.device("cpu"))
    return _at(values, state, torch.nn.Identity(), _Angles)


def _at(values: Tensor, state: TokenState, layer: torch.nn.Module, adapter: type[ViTLayers]) -> SiteInput:
    trace = Trace()
    return SiteInput(values, state, trace, trace.flow(), 0, layer, adapter)


@pytest.mark.parametrize(
    ("removed", "expected", "sizes"),
    # ToMe writes the tokens of set A first, here they stay in their order.
    [(1, [0, 1, 2, 3, 4, 5.5], [1, 1, 1, 1, 1, 2]), (3, [0, 1.5, 3.5, 5.5], [1, 2, 2, 2])],
)
def test_bipartite_matching_merges_the_pairs_worked_out_on_paper(removed: int, expected: list[float], sizes: list[float]) -> None:
    values = torch.arange(7.0)[None, :, None]
    site = _site(values, [90, 0, 5, 40, 42, 120, 119])
    scored = BipartiteScorer(SPEC)(site)
    assert scored.partner is not None
    assert {slot: int(scored.partner[0, slot]) for slot in (2, 4, 6)} == {2: 1, 4: 3, 6: 5}
    torch.testing.assert_close(-scored.scores[0, [2, 4, 6]], torch.tensor([0.9962, 0.9994, 0.9998]), atol=5e-5, rtol=0)
    decision = TopKSelector(SPEC)(scored.scores, site.state, Request(1.0, 6 - removed))
    merged = BipartiteMerger(SPEC)(site, scored, decision)
    assert merged.hidden_states.flatten().tolist() == pytest.approx(expected)
    assert merged.state.size.flatten().tolist() == sizes
    assert float((merged.state.size * merged.hidden_states.squeeze(-1)).sum()) == pytest.approx(21)


@pytest.mark.parametrize("tokens", [7, 8, 9, 50])
@pytest.mark.parametrize("removed", [1, 3, 24, 100])
def test_bipartite_matching_never_takes_away_more_than_half(tokens: int, removed: int) -> None:
    plain = dense("vit")
    stage = StageConfig(layer=1, tokens=max(1, tokens - 1 - removed), scorer="bipartite", merger="bipartite")
    model = compress(plain, CompressionConfig([stage]))
    trace = Trace()
    hidden = torch.randn(2, tokens, 16)
    trace.flow().begin(TokenState.initial(2, tokens, 1, None, hidden.device), hidden)
    out = model.vit.layers[1].stages["before"](hidden, model.vit.layers[1], trace)
    assert out.shape[1] == tokens - min(removed, (tokens - 1) // 2)


def test_merged_copies_with_proportional_attention_equal_attention_over_all_of_them() -> None:
    """Duplicates merged, log(size) as a key bias, SDPA on."""
    plain = dense("vit").eval()
    distinct = torch.randn(2, 1 + 4, 16)
    doubled = torch.cat([distinct[:, :1], distinct[:, 1:].repeat_interleave(2, 1)], 1)
    layer = plain.vit.layers[1]
    expected = layer(doubled)
    state = TokenState.initial(2, 9, 1, None, doubled.device)
    site = _at(doubled, state, layer, ViTLayers)
    scored = BipartiteScorer(TokenSpec(16, 0))(site)
    decision = TopKSelector(SPEC)(scored.scores, state, Request(0.5, 4))
    merged = BipartiteMerger(TokenSpec(16, 0))(site, scored, decision)
    torch.testing.assert_close(merged.hidden_states, distinct, atol=1e-6, rtol=1e-6)
    out = layer(merged.hidden_states, ViTLayers.gather_mask(None, merged.state, torch.float32))
    torch.testing.assert_close(out[:, :1], expected[:, :1], atol=1e-5, rtol=1e-5)
    restored = out.gather(1, merged.state.source[..., None].expand(-1, -1, 16))
    torch.testing.assert_close(restored, expected, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("family", [family for family in BACKBONES if family not in ("vit_mae", "beit")])
def test_heads_count_a_merged_token_as_all_that_it_stands_for(family: str) -> None:
    """Merged copies answer as the copies do, from the pixels to the logits."""
    plain = dense(family)
    with torch.no_grad():
        for name, parameter in plain.named_parameters():
            if "position_embedding" in name:
                parameter.zero_()
    # 12 patches of one kind and 24 of another, side by side: pairs of equal neighbours.
    pixels = torch.randn(2, 3, 4, 8, generator=torch.Generator().manual_seed(3)).repeat(1, 1, 6, 3)
    pixels = pixels[..., [*range(4), *range(4), *range(4, 8), *range(4, 8), *range(4, 8), *range(4, 8)]]
    expected = answer(plain(pixel_values=pixels))
    stages = [StageConfig(layer=layer, keep=0.5, scorer="bipartite", merger="bipartite") for layer in (1, 2)]
    model = compress(plain, CompressionConfig(stages))
    trace = Trace()
    got = answer(model(pixel_values=pixels, trace=trace))
    assert trace.state is not None
    assert trace.state.tokens < 20
    torch.testing.assert_close(got, expected, atol=2e-4, rtol=1e-3)


def test_squeeze_merges_each_token_into_its_most_similar_kept_one() -> None:
    angles = [0.0, 0.0, 10.0, 90.0, 100.0, 12.0]
    values = torch.tensor([[100.0, 1, 2, 3, 4, 5]]).unsqueeze(-1)
    site = _site(values, angles)
    # Slots 1 and 4 stay; 2 and 5 point like 1, 3 like 4.
    decision = TopKSelector(SPEC)(torch.tensor([[0.0, 9, 1, 1, 9, 1]]), site.state, Request(0.4, 2))
    merged = SqueezeMerger(SPEC, metric="keys")(site, Scored(torch.zeros(1, 6)), decision)
    assert merged.hidden_states.flatten().tolist() == pytest.approx([100.0, (1 + 2 + 5) / 3, 3.5])
    assert merged.state.size.tolist() == [[1, 3, 2]]
    assert merged.state.source.tolist() == [[0, 1, 1, 2, 2, 1]]


def _with_images() -> Trace:
    """What the model would note of its input, for layers that are called one by one."""
    trace = Trace()
    flow = trace.flow()
    flow.leading, flow.pixel_values, flow.grid = 1, images(), (6, 6)
    return trace


MERGES = {
    "bipartite": {"scorer": "bipartite", "merger": "bipartite"},
    "squeeze": {"scorer": "patch_energy", "merger": "squeeze"},
    "nearest": {"scorer": "patch_energy", "merger": "nearest"},
    "fuse": {"scorer": "patch_energy", "merger": "fuse"},
}


@pytest.mark.parametrize(("keep", "side"), [(0.25, 12), (0.0625, 6), (0.015625, 3), (0.0017361, 1)])
def test_corners_of_a_uniform_grid_are_average_pooling_at_every_scale_of_m3(keep: float, side: int) -> None:
    hidden, trace = torch.randn(2, 577, 16), _with_images()
    trace.flow().grid, trace.flow().leading = (24, 24), 1
    parts: dict[str, Any] = {"scorer": "uniform_grid", "merger": {"name": "nearest", "corners": True}}
    model = compress(dense("vit"), CompressionConfig([StageConfig(layer=1, keep=keep, **parts)]))
    trace.flow().begin(TokenState.initial(2, 577, 1, None, hidden.device), hidden)
    layer = model.vit.layers[1]
    pooled = layer.stages["before"](hidden, layer, trace)
    squares = torch.nn.functional.avg_pool2d(hidden[:, 1:].view(2, 24, 24, 16).permute(0, 3, 1, 2), 24 // side)
    torch.testing.assert_close(pooled[:, 1:], squares.flatten(2).transpose(1, 2))
    assert torch.equal(pooled[:, 0], hidden[:, 0])


@pytest.mark.parametrize("by_square", [False, True], ids=["in reading order", "square by square"])
@pytest.mark.parametrize(("side", "keep", "across"), [(2, 0.25, 2), (2, 0.0625, 4), (3, 0.25, 2), (4, 0.0625, 4)])
def test_where_squares_of_patches_are_joined_corners_are_the_mean_of_whole_squares(
    side: int, keep: float, across: int, by_square: bool
) -> None:
    width, unit = 8 * side, side**2
    order = torch.arange(width**2).view(8, side, 8, side).transpose(1, 2).flatten() if by_square else torch.arange(width**2)
    of_square = (torch.arange(width)[:, None] // side * 8 + torch.arange(width) // side).flatten()
    hidden, trace = torch.randn(2, width, width, 4), Trace()
    flow = trace.flow("projector")
    flow.grid, flow.places, flow.units = (width, width), order.expand(2, -1), of_square[order][None]
    given = hidden.flatten(1, 2)[:, order]
    flow.begin(TokenState.initial(2, width**2, 0, None, hidden.device), given)
    config = StageConfig(layer=0, stack="projector", keep=keep, scorer="uniform_grid", merger={"name": "nearest", "corners": True})
    stage = Stage(config, TokenSpec(4, 0, unit=unit), 0, ProjectorLayers)
    pooled = stage(given, torch.nn.Linear(4, 4), trace)
    # Means over squares, for each place inside of them.
    apart = hidden.view(2, 8, side, 8, side, 4).permute(0, 2, 4, 5, 1, 3).flatten(1, 3)
    expected = torch.nn.functional.avg_pool2d(apart, across).unflatten(1, (side, side, 4))
    place = order[flow.tokens.position]
    row, column = place // width, place % width
    for number in range(2):
        at = row[number] % side, column[number] % side, slice(None), row[number] // side // across, column[number] // side // across
        torch.testing.assert_close(pooled[number], expected[number][at])


@pytest.mark.parametrize("parts", MERGES.values(), ids=MERGES)
def test_size_weighted_sums_are_conserved_over_two_stages(parts: dict[str, str]) -> None:
    model = compress(dense("vit"), CompressionConfig([StageConfig(layer=1, keep=0.6, **parts), StageConfig(layer=2, keep=0.6, **parts)]))
    layers = model.vit.layers
    hidden, trace = torch.randn(3, 37, 16), _with_images()
    trace.flow().begin(TokenState.initial(3, 37, 1, None, hidden.device), hidden)
    once = layers[1].stages["before"](hidden, layers[1], trace)
    twice = layers[2].stages["before"](once, layers[2], trace)
    assert trace.state is not None
    assert bool((trace.state.size.sum(-1) == 37).all())
    if parts["merger"] != "fuse":  # whose weights are scores
        sums = (trace.state.size.unsqueeze(-1) * twice).sum(1)
        torch.testing.assert_close(sums, hidden.sum(1), atol=1e-4, rtol=1e-4)
    # unmerge(merge(x)) = x where x is constant over what was merged.
    flat = torch.randn(3, twice.shape[1], 16)
    spread = flat.gather(1, trace.state.source[..., None].expand(-1, -1, 16))
    for row in range(3):
        for slot in range(twice.shape[1]):
            members = spread[row][trace.state.source[row] == slot]
            assert torch.equal(members.mean(0).float(), flat[row, slot]) or torch.allclose(members.mean(0), flat[row, slot])


def _restored(by: str, layer: int, merger: str = "drop") -> tuple[Tensor, Trace]:
    stages = [StageConfig(layer=1, keep=0.5, scorer="patch_energy", merger=merger), StageConfig(layer=2, keep=0.5, scorer="patch_energy")]
    model = compress(dense("vit"), CompressionConfig(stages, restore={"layer": layer, "by": by}))
    trace = Trace()
    return model.vit(pixel_values=images(), trace=trace).last_hidden_state, trace


@pytest.mark.parametrize("by", ["unmerge", "rejoin"])
def test_dropped_tokens_rejoin_with_their_last_state(by: str) -> None:
    plain = dense("vit").vit
    out, trace = _restored(by, 4)
    assert out.shape == (3, 37, 16)
    assert trace.state is not None
    assert bool((trace.state.source == torch.arange(37)).all())
    gone = trace.routings["before_1"].routable & ~trace.routings["before_1"].kept_mask
    # They saw the first layer alone; then only the model's closing norm.
    expected = plain.layernorm(plain.layers[0](plain.embeddings(images())))
    torch.testing.assert_close(out[gone], expected[gone], atol=1e-6, rtol=1e-6)


def test_a_restore_before_the_last_layer_lets_it_see_all_tokens() -> None:
    _, trace = _restored("unmerge", 3)
    assert [trace.flow().layer_tokens[index].mlp for index in range(4)] == [37, 19, 10, 37]


def test_unmerging_gives_sources_the_state_of_their_merged_token() -> None:
    config = CompressionConfig([StageConfig(layer=1, keep=0.5, scorer="bipartite", merger="bipartite")], restore={"layer": 4})
    model = compress(dense("vit"), config)
    short = compress(dense("vit"), CompressionConfig(config.stages))
    full, merged, trace = Trace(), Trace(), None
    out = model.vit(pixel_values=images(), trace=full).last_hidden_state
    seen = short.vit(pixel_values=images(), trace=merged).last_hidden_state
    trace = merged.state
    assert trace is not None
    torch.testing.assert_close(out, seen.gather(1, trace.source[..., None].expand(-1, -1, 16)))
    assert out.shape[1] == 37


@pytest.mark.parametrize("by", ["unmerge", "rejoin"])
def test_restoring_sends_gradients_to_dropped_and_kept_tokens(by: str) -> None:
    config = CompressionConfig([StageConfig(layer=1, keep=0.5, scorer="patch_energy")], restore={"layer": 4, "by": by})
    model = compress(dense("vit"), config)
    hidden = model.vit.embeddings(images()).detach().requires_grad_()
    trace = _with_images()
    tokens = hidden
    for layer in model.vit.layers:
        tokens = layer(tokens, trace=trace)
    tokens[:, 1:].square().sum().backward()
    assert hidden.grad is not None
    assert bool((hidden.grad.abs().sum(-1) > 0).all())


def test_pooling_makes_learned_outputs_and_conserves_size() -> None:
    stage = StageConfig(layer=1, tokens=5, scorer="uniform_grid", merger={"name": "pool", "outputs": 5})
    model = compress(dense("vit"), CompressionConfig([stage])).train()
    trace = Trace()
    loss = model(pixel_values=images(), labels=labels(), trace=trace).loss
    loss.backward()
    assert trace.state is not None
    assert trace.state.tokens == 6
    torch.testing.assert_close(trace.state.size.sum(-1), torch.full((3,), 37.0))
    share = model.vit.layers[1].stages["before"].merger.share
    assert float(share.weight.grad.abs().sum()) > 0
    assert sum(parameter.numel() for parameter in decompress(model).parameters()) == sum(p.numel() for p in dense("vit").parameters())


RESTORES = [
    ({"layer": 1}, "restore.layer = 1 must be from 2 .after the first stage. to 4"),
    ({"layer": 5}, "must be from 2"),
    ({"by": "unmerge"}, "restore.layer is missing"),
    ({"layer": 3, "by": "magic"}, "restore.by = 'magic' must be one of unmerge, rejoin"),
    ({"layer": 3, "how": "x"}, "restore.how is not a key"),
]


@pytest.mark.parametrize(("restore", "message"), RESTORES, ids=[str(item) for item, _ in RESTORES])
def test_a_wrong_restore_is_refused(restore: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        compress(dense("vit"), CompressionConfig([StageConfig(layer=1, keep=0.5)], restore=restore))


def test_a_merge_is_a_mean_weighted_by_size() -> None:
    values = torch.tensor([[0.0, 10.0, 20.0, 50.0, 60.0]]).unsqueeze(-1)
    site = _site(values, [0, 0, 1, 90, 91])
    first = SqueezeMerger(SPEC, metric="keys")
    decision = TopKSelector(SPEC)(torch.tensor([[0.0, 5, 1, 5, 5]]), site.state, Request(0.75, 3))
    merged = first(site, Scored(torch.zeros(1, 5)), decision)
    _Angles.angles = torch.tensor([0.0, 0.0, 2.0, 3.0])
    again = _at(merged.hidden_states, merged.state, torch.nn.Identity(), _Angles)
    decision = TopKSelector(SPEC)(torch.tensor([[0.0, 5, 1, 1]]), again.state, Request(0.3, 1))
    last = first(again, Scored(torch.zeros(1, 4)), decision)
    assert last.hidden_states.flatten().tolist() == pytest.approx([0.0, 35.0])
    assert functional.l1_loss(last.state.size, torch.tensor([[1.0, 4.0]])) == 0
