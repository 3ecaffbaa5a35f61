"""Matching of tokens in pairs, whole and in windows, and the merging of what it finds."""

from __future__ import annotations

import itertools
import json
import runpy
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode

from laconic import StageConfig, Trace
from laconic.modules.backbones.vit import ViTLayers
from laconic.modules.cost.shape import StackShape
from laconic.modules.mergers.base import merge_into
from laconic.modules.scorers.bipartite import BipartiteScorer
from laconic.modules.site import SiteInput, TokenSpec
from laconic.modules.stage import Stage
from laconic.modules.tokens import closest as matching
from laconic.modules.tokens.decision import Decision
from laconic.modules.tokens.state import TokenState

ROOT = Path(__file__).resolve().parents[2]
WIDTH = 8
SPEC = TokenSpec(WIDTH, 0)


def _site(values: Tensor, state: TokenState) -> SiteInput:
    trace = Trace()
    return SiteInput(values, state, trace, trace.flow(), 0, nn.Identity(), ViTLayers)


def _states(tokens: int) -> dict[str, TokenState]:
    """Three rows of every kind: leading tokens only, padding at either end, protected tokens amid others."""
    device, numbers = torch.device("cpu"), torch.tensor([tokens, tokens - 4, 3])
    slots = torch.arange(tokens).expand(3, -1)
    scattered = torch.rand(3, tokens, generator=torch.Generator().manual_seed(2)) < 0.2
    behind, ahead = slots < numbers[:, None], slots >= tokens - numbers[:, None]
    states = {f"leading {first}": TokenState.initial(3, tokens, first, None, device) for first in (0, 1, 4)}
    states |= {
        "padding behind": TokenState.initial(3, tokens, 1, behind, device),
        "ahead": TokenState.initial(3, tokens, scattered, ahead, device),
    }
    return states | {"amid": TokenState.initial(3, tokens, scattered, None, device)}


def _expected(values: Tensor, state: TokenState, window: int | None) -> tuple[Tensor, Tensor]:
    """Token by token: cosine to the best partner and that partner, -inf and itself where there is none."""
    unit = values.double() / values.double().norm(dim=-1, keepdim=True)
    best = torch.full(state.position.shape, -torch.inf, dtype=torch.float64)
    partner = torch.arange(state.tokens).repeat(state.rows, 1)
    for row in range(state.rows):
        real = range(state.tokens) if state.valid is None else state.valid[row].nonzero().flatten().tolist()
        rank = {slot: number for number, slot in enumerate(real)}
        last = max(0, len(rank) - 2)
        home = {slot: 0 if window is None else min(number // window, last // window) for slot, number in rank.items()}
        free = [slot for slot in rank if not state.protected[row, slot]]
        for slot in free:
            for other in free:
                cosine = unit[row, slot] @ unit[row, other]
                if rank[slot] % 2 == 0 and rank[other] % 2 == 1 and home[slot] == home[other] and cosine > best[row, slot]:
                    best[row, slot], partner[row, slot] = cosine, other
    return best, partner


@pytest.mark.parametrize("window", [None, 2, 6, 20, 64])
@pytest.mark.parametrize("tokens", [21, 24])
def test_every_token_finds_the_partner_that_a_plain_search_of_its_window_finds(tokens: int, window: int | None) -> None:
    values = torch.randn(3, tokens, WIDTH)
    for name, state in _states(tokens).items():
        scored = BipartiteScorer(SPEC, metric="tokens", window=window)(_site(values, state))
        best, partner = _expected(values, state, window)
        assert scored.partner is not None
        found = best > -torch.inf
        assert torch.equal(scored.partner[found], partner[found]), name
        expected = torch.where(best == -torch.inf, torch.finfo(torch.float32).max, -best).float()
        torch.testing.assert_close(scored.scores, expected, msg=name)


def test_half_of_the_tokens_have_a_partner_in_windows_too() -> None:
    for tokens, first in itertools.product(range(2, 20), (0, 1, 3)):
        state = TokenState.initial(1, tokens, min(first, tokens - 1), None, torch.device("cpu"))
        scored = BipartiteScorer(SPEC, metric="tokens", window=4)(_site(torch.randn(1, tokens, WIDTH), state))
        assert int((scored.scores < 2).sum()) >= int(state.present) // 2


def test_blocks_of_products_find_the_same_target(monkeypatch: pytest.MonkeyPatch) -> None:
    sources, targets, allowed = torch.randn(3, 50, WIDTH), torch.randn(3, 301, WIDTH), torch.rand(3, 301) < 0.5
    allowed[2] = False
    for mask in (None, allowed):
        products = sources @ targets.transpose(1, 2)
        best, which = (products if mask is None else products.masked_fill(~mask[:, None], -torch.inf)).max(-1)
        for block, least in ((1 << 21, 512), (301 * 60, 7), (10, 7)):
            monkeypatch.setattr(matching, "_BLOCK", block)
            monkeypatch.setattr(matching, "_LEAST", least)
            found = matching.closest(sources, targets, mask)
            torch.testing.assert_close(found[0], best)
            rows = slice(None) if mask is None else slice(2)
            assert torch.equal(found[1][rows], which[rows])


def test_equal_targets_give_the_first_one() -> None:
    targets = torch.ones(1, 300, WIDTH)
    targets[:, :5] = -1
    assert bool((matching.closest(torch.ones(1, 2, WIDTH), targets)[1] == 5).all())


class _Largest(TorchDispatchMode):
    """Elements of the largest tensor that an operation makes."""

    elements = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        for tensor in out if isinstance(out, list | tuple) else [out]:
            if isinstance(tensor, Tensor):
                self.elements = max(self.elements, tensor.untyped_storage().nbytes() // tensor.element_size())
        return out


def _stage(tokens: int, removed: int, window: int | None) -> Stage:
    scorer = {"name": "bipartite", "metric": "tokens", "window": window}
    return Stage(StageConfig(layer=0, tokens=tokens - removed, scorer=scorer, merger="bipartite"), SPEC, 0, ViTLayers)


def test_in_windows_no_tensor_grows_faster_than_the_row_and_no_pair_crosses_them() -> None:
    largest = {}
    for tokens in (1024, 4096):
        values, trace = torch.randn(1, tokens, WIDTH, requires_grad=True), Trace()
        trace.flow().begin(TokenState.initial(1, tokens, 0, None, values.device), values)
        with _Largest() as mode:
            _stage(tokens, tokens // 4, 64)(values, nn.Identity(), trace).sum().backward()
        largest[tokens] = mode.elements
        home = torch.arange(tokens) // 64
        assert trace.state is not None
        source, at = trace.state.source[0], trace.state.position[0]
        assert torch.equal(home, at[source] // 64)
    assert largest[4096] <= 4096 * WIDTH + 1


def test_whole_matching_holds_a_part_of_the_products(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(matching, "_BLOCK", 1 << 14)
    monkeypatch.setattr(matching, "_LEAST", 16)
    values = torch.randn(1, 2048, WIDTH)
    with _Largest() as mode:
        BipartiteScorer(SPEC, metric="tokens")(_site(values, TokenState.initial(1, 2048, 1, None, values.device)))
    assert mode.elements <= 2048 * 16 < 1024**2


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_merging_known_numbers_of_tokens_is_merging_any_number(dtype: torch.dtype) -> None:
    """With a mask of padding that marks none, every token is computed; without one, those that merge."""
    rows, tokens = 3, 20
    index = torch.stack([torch.cat([torch.tensor([0]), 1 + torch.randperm(tokens - 1)[:7]]).sort().values for _ in range(rows)])
    state = TokenState.initial(rows, tokens, 1, None, torch.device("cpu"))
    state = replace(state, size=torch.randint(1, 5, (rows, tokens)).float(), source=torch.randint(-1, tokens, (rows, 31)))
    # Several tokens have one target.
    partner = index.gather(1, torch.randint(1, 5, (rows, tokens)))
    gradient, merged, gradients = torch.randn(rows, 8, WIDTH).to(dtype), [], []
    values = torch.randn(rows, tokens, WIDTH).to(dtype)
    for valid in (None, torch.ones(rows, tokens, dtype=torch.bool)):
        given = values.clone().requires_grad_()
        of = state if valid is None else replace(state, valid=valid, counts=None)
        out = merge_into(_site(given, of), Decision(index, None if valid is None else valid[:, :8]), partner, True)
        out.hidden_states.backward(gradient)
        merged.append(out)
        gradients.append(given.grad)
    torch.testing.assert_close(merged[0].hidden_states, merged[1].hidden_states)
    torch.testing.assert_close(*gradients)
    for name in ("size", "source", "position", "protected", "proportional"):
        assert torch.equal(*(torch.as_tensor(getattr(item.state, name)) for item in merged)), name
    untouched = merged[0].state.size == state.size.gather(1, index)
    assert bool(untouched.any())
    assert torch.equal(merged[0].hidden_states[untouched], values.gather(1, index[..., None].expand(-1, -1, WIDTH))[untouched])


def test_predicted_products_are_those_of_the_windows() -> None:
    shape = StackShape(hidden=WIDTH, intermediate=16, layers=1, heads=2, protected=1, routable=44, embed_macs=0, head_macs=0)
    for window in (None, 10, 44):
        scorer = BipartiteScorer(SPEC, metric="tokens", window=window)
        with FlopCounterMode(display=False) as counter:
            scorer(_site(torch.randn(1, 45, WIDTH), TokenState.initial(1, 45, 1, None, torch.device("cpu"))))
        assert counter.get_total_flops() == 2 * scorer.macs(shape, 45)


_STAND_IN = """
import torch

def bipartite_soft_matching(metric, r, class_token=False):
    def merge(x, mode="sum"):
        return x[:, r:]
    return merge, None

def merge_wavg(merge, x, size):
    return merge(x), merge(size)
"""


def test_the_script_that_measures_merging_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "tome").mkdir()
    (tmp_path / "tome" / "merge.py").write_text(_STAND_IN)
    monkeypatch.setattr(torch, "set_num_threads", lambda number: None)
    main = runpy.run_path(str(ROOT / "scripts" / "merging"))["main"]
    small = ["--width", "8", "--rounds", "2"]
    main([*small, "--cases", "2,17,3", "2,33,5,8", "--json"])
    assert [(item["window"], item["tome_over_ours"]) for item in json.loads(capsys.readouterr().out)] == [(None, None), (8, None)]
    main([*small, "--cases", "2,33,5,8", "--tome", str(tmp_path)])
    assert "ToMe" in capsys.readouterr().out
    # The stand-in merges nothing: that the tokens differ is seen before anything is timed.
    with pytest.raises(AssertionError):
        main([*small, "--cases", "2,17,3", "--tome", str(tmp_path)])
