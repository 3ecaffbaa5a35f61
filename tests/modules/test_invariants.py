"""DESIGN's invariants, every method × every backbone family."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from laconic import Trace, decompress, stages_of
from laconic.modules.compress import checkpoint_activations
from laconic.modules.config import SITES
from laconic.modules.cost.count_rules import COUNT_RULES, StageCount
from laconic.modules.tokens.state import TokenState
from laconic.modules.tokens.trace import Routing
from tests.clean import CleanProcesses
from tests.matrix import (
    BACKBONES,
    METHODS,
    PAIRS,
    PATCH,
    Method,
    answer,
    compressed,
    dense,
    images,
    inputs,
    loss_of,
    stack_of,
    traced,
)
from tests.thin import thinned

PREFIX = {"vit": 1, "deit": 2, "dinov2": 1, "dinov2_with_registers": 4, "clip": 1, "siglip": 0, "beit": 1, "vit_mae": 1}
AVERAGES = {family: family in ("dinov2", "dinov2_with_registers", "siglip", "beit", "clip") for family in BACKBONES}
# Their towers take no attention_mask, so nobody can hand them padded rows.
UNPADDED = {"clip", "siglip"}
matrix = pytest.mark.parametrize("family", BACKBONES)
pairs = pytest.mark.parametrize(("family", "method"), PAIRS, ids=lambda value: getattr(value, "name", value))
# Each site, merger, kind of selector and of estimator, in every family; all methods in one.
REPRESENTATIVE = ("learned_key_bias", "evidence_fuse", "tome", "squeeze", "gumbel", "around_attention")
representative = pytest.mark.parametrize(
    ("family", "method"), thinned(PAIRS, ["vit"], REPRESENTATIVE), ids=lambda value: getattr(value, "name", value)
)
# Selectors count tokens of a layout and see no family: one protected token in front, none, and patches in random order. One method in
# every family, since that runs in bf16 nowhere else.
layouts = pytest.mark.parametrize(
    ("family", "method"), thinned(PAIRS, ["vit", "siglip", "vit_mae"], ["evidence_fuse"]), ids=lambda value: getattr(value, "name", value)
)
padded = pytest.mark.parametrize(
    ("family", "method"), [pair for pair in PAIRS if pair[0] not in UNPADDED], ids=lambda value: getattr(value, "name", value)
)


def _gradients(model: PreTrainedModel) -> dict[str, Tensor]:
    return {name: p.grad.clone() for name, p in model.named_parameters() if ".stages." not in name and p.grad is not None}


@pairs
def test_1_keep_1_gives_the_dense_outputs_and_backbone_gradients_bit_for_bit(family: str, method: Method) -> None:
    plain, model = dense(family), compressed(family, method, 1.0, 1.0)
    assert torch.equal(traced(model, images())[0], answer(plain(**inputs(plain, images()))))
    plain.train()
    model.train()
    ours = loss_of(model, images(), trace=Trace())
    reference = loss_of(plain, images())
    ours.backward()
    reference.backward()
    expected = _gradients(plain)
    if not method.same_kernel:
        torch.testing.assert_close(ours, reference, atol=1e-6, rtol=1e-6)
        torch.testing.assert_close(_gradients(model), expected, atol=1e-5, rtol=1e-4)
        return
    assert torch.equal(ours, reference)
    if method.detached:
        assert {name: torch.equal(grad, expected[name]) for name, grad in _gradients(model).items()} == dict.fromkeys(expected, True)


@representative
def test_1_decompress_restores_the_original(family: str, method: Method) -> None:
    plain, model = dense(family), compressed(family, method, 0.5, 0.5)
    before = {name: value.clone() for name, value in plain.state_dict().items()}
    restored = decompress(model)
    assert type(restored) is type(plain)
    assert {type(module) for module in restored.modules()} == {type(module) for module in plain.modules()}
    assert {name: torch.equal(value, before[name]) for name, value in restored.state_dict().items()} == dict.fromkeys(before, True)
    assert torch.equal(answer(restored(**inputs(plain, images()))), answer(plain(**inputs(plain, images()))))
    assert restored.config.to_dict() == plain.config.to_dict()


class _Recorded(nn.Module):
    """Stands for all layers: notes what they are given and hands on what it was made with."""

    def __init__(self, out: Tensor | None = None) -> None:
        super().__init__()
        self.out, self.given, self.kwargs = out, torch.empty(0), dict[str, Any]()

    def forward(self, hidden_states: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        self.given, self.kwargs = hidden_states, kwargs
        return hidden_states if self.out is None else self.out


def _with_layers_replaced(plain: PreTrainedModel, out: Tensor | None = None) -> tuple[PreTrainedModel, _Recorded]:
    twin, recorded = copy.deepcopy(plain), _Recorded(out)
    layers = stack_of(twin).layers
    del layers[1:]
    layers[0] = recorded
    return twin, recorded


def _own_bias(layer: nn.Module, kwargs: dict[str, Any], place: Tensor) -> Tensor | float:
    """(B, H, M, M) the bias that a layer or its model gives to pairs of places, 0 for a family without."""
    make, shared = getattr(layer, "relative_position_bias", None), kwargs.get("attention_mask")
    if make is None and shared is None:
        return 0.0
    bias = torch.zeros(()) if shared is None else shared[0]
    if make is not None:
        height, width = kwargs["resolution"]
        down, across = height // PATCH, width // PATCH
        bias = bias + make((down, across), kwargs["interpolate_pos_encoding"], dim_size=down * across + 1)[0]
    return torch.stack([torch.stack([bias[:, i][:, row] for i in row.tolist()], 1) for row in place])


class _Reference:
    """A full-length forward in which what a stage left out is only hidden from attention. A fused token is appended.

    Attributes:
        hidden: (B, N, C) all tokens, merged ones in the place of the one they were merged into.
        alive: (B, N) tokens that others may look at.
        slots: (B, M) where each token of the compressed sequence sits in this one.
        place: (B, N) position that each of these tokens stands for.
        size: (B, N) source tokens that each stands for.
    """

    def __init__(self, hidden: Tensor, adapter: Any, kwargs: dict[str, Any], proportional: bool) -> None:
        self.hidden, self.adapter, self.kwargs, self.proportional = hidden, adapter, kwargs, proportional
        self.alive = torch.ones(hidden.shape[:2], dtype=torch.bool)
        self.slots = self.place = torch.arange(hidden.shape[1]).expand(hidden.shape[0], -1)
        self.size = torch.ones(hidden.shape[:2])

    def shrink(self, routing: Routing, after: TokenState) -> None:
        rows, before = self.hidden.shape[0], routing.state
        left_out = routing.routable & ~routing.kept_mask
        at = torch.zeros_like(self.alive).scatter(1, self.slots, left_out)
        kept = self.slots.gather(1, routing.decision.index)
        if after.tokens > routing.decision.index.shape[1]:
            weights = (routing.scores.masked_fill(~left_out, -torch.inf) + before.size.log()).softmax(-1).nan_to_num(0)
            fused = (weights[..., None] * _take(self.hidden, self.slots)).sum(1, keepdim=True)
            self.hidden = torch.cat([self.hidden, fused], 1)
            self.alive = torch.cat([self.alive & ~at, left_out.any(-1, keepdim=True)], 1)
            kept = torch.cat([kept, torch.full((rows, 1), self.hidden.shape[1] - 1)], 1)
            self.place = torch.cat([self.place, after.position[:, -1:]], 1)
            self.size = torch.cat([self.size, after.size[:, -1:]], 1)
        else:
            self.alive = self.alive & ~at
            self._merge(before, after, kept)
        self.slots = kept

    def _merge(self, before: TokenState, after: TokenState, kept: Tensor) -> None:
        """Means over the originals that the state says went together, each token counted once for each of its sources."""
        hidden, size = self.hidden.clone(), self.size.clone()
        for row in range(len(hidden)):
            for slot in range(after.tokens):
                members = (after.source[row] == slot).nonzero().flatten()
                if len(members):
                    hidden[row, kept[row, slot]] = self.hidden[row, self.slots[row, before.source[row, members]]].mean(0)
                    size[row, kept[row, slot]] = len(members)
        self.hidden, self.size = hidden, size

    def mask(self, layer: nn.Module, alive: Tensor) -> Tensor:
        tokens = self.hidden.shape[1]
        mask = torch.zeros(len(alive), 1, tokens, tokens).masked_fill(~alive[:, None, None], -1e30)
        if self.proportional:
            mask = mask + self.size.log()[:, None, None]
        return mask + _own_bias(layer, self.kwargs, self.place)

    def half(self, layer: nn.Module, half: str, routing: Routing | None) -> None:
        """A half of a layer; with a routing the tokens that it did not choose go around."""
        chosen = self.alive
        if routing is not None:
            chosen = torch.zeros_like(self.alive).scatter(1, self.slots, routing.kept_mask)
        rest = {key: value for key, value in self.kwargs.items() if key != "attention_mask"}
        alone = copy.deepcopy(layer)
        if half == "attention":
            out = self.adapter.attention_half(alone, self.hidden, self.mask(layer, chosen), **rest)
        else:
            out = self.adapter.mlp_half(alone, self.hidden)
        self.hidden = torch.where(chosen[..., None], out, self.hidden)


def _take(hidden: Tensor, slots: Tensor) -> Tensor:
    return hidden.gather(1, slots[..., None].expand(-1, -1, hidden.shape[-1]))


def _masked_reference(plain: PreTrainedModel, family: str, pixels: Tensor, trace: Trace, **how: Any) -> Tensor:
    """Answer of a forward that computes every token in every layer."""
    twin, recorded = _with_layers_replaced(plain)
    twin(**inputs(plain, pixels), **how)
    stack = stack_of(plain)
    assert trace.state is not None
    reference = _Reference(recorded.given, stack.adapter, recorded.kwargs, trace.state.proportional)
    shrinking = [routing for routing in trace.routings.values() if not routing.bypass]
    after = [*(routing.state for routing in shrinking[1:]), trace.state]
    for index, layer in enumerate(stack.layers):
        at = {site: trace.routings.get(f"{site}_{index}") for site in SITES}
        if at["before"] is not None:
            reference.shrink(at["before"], after.pop(0))
        reference.half(layer, "attention", at["around"] or at["around_attention"])
        if at["between"] is not None:
            reference.shrink(at["between"], after.pop(0))
        reference.half(layer, "mlp", at["around"] or at["around_mlp"])
    kept = _take(reference.hidden, reference.slots)
    if AVERAGES[family] and trace.state.proportional:
        # A head that averages counts a merged token as all that it stands for.
        kept = _take(kept, trace.state.source)
    return answer(_with_layers_replaced(plain, kept)[0](**inputs(plain, pixels), **how))


@pytest.mark.parametrize(
    ("family", "method"),
    # Their heads average: with rows of different lengths the plain head would average filler. test_backbones looks at them.
    [pair for pair in PAIRS if not (pair[1].adaptive and AVERAGES[pair[0]])],
    ids=lambda value: getattr(value, "name", value),
)
def test_2_dropping_equals_masking(family: str, method: Method) -> None:
    model = compressed(family, method, 0.5, 0.6)
    logits, trace = traced(model, images())
    assert len(trace.routings) == 2
    torch.testing.assert_close(logits, _masked_reference(dense(family), family, images(), trace), atol=2e-5, rtol=1e-4)


@pairs
def test_3_sizes_add_up_unless_tokens_are_dropped(family: str, method: Method) -> None:
    model = compressed(family, method, 0.5, 0.6)
    _, trace = traced(model, images())
    assert trace.state is not None
    total, originals = trace.state.size.sum(-1), trace.state.source.shape[1]
    whole = method.merges or method.bypass
    assert bool((total == originals).all()) is whole
    alive = trace.state.source >= 0
    assert bool(alive.all()) is whole
    for row in range(3):
        for slot in range(trace.state.tokens):
            assert (trace.state.source[row] == slot).sum() == trace.state.size[row, slot]


@representative
def test_4_protected_tokens_keep_their_place_and_order_is_preserved(family: str, method: Method) -> None:
    model = compressed(family, method, 0.4, 0.4)
    _, trace = traced(model, images())
    prefix = PREFIX[family]
    for routing in trace.routings.values():
        index = routing.decision.index
        assert torch.equal(index[:, :prefix], torch.arange(prefix).expand(3, -1))
        valid = torch.ones_like(index, dtype=torch.bool) if routing.decision.valid is None else routing.decision.valid
        assert bool(((index[:, 1:] > index[:, :-1]) | ~valid[:, 1:]).all())
    assert trace.state is not None
    assert bool(trace.state.protected[:, :prefix].all())
    assert not bool(trace.state.protected[:, prefix:].any())


@pairs
def test_5_a_batch_equals_its_rows_alone(family: str, method: Method) -> None:
    model = compressed(family, method, 0.5, 0.6)
    ids = torch.tensor([11, 5, 42])
    together, trace = traced(model, images(), sample_ids=ids)
    for row in range(3):
        alone, own = traced(model, images()[row : row + 1], sample_ids=ids[row : row + 1])
        torch.testing.assert_close(alone[0], together[row], atol=1e-5, rtol=1e-4)
        for name, routing in own.routings.items():
            # By position: a batch has more filler, before a fused token too.
            assert torch.equal(_kept(routing, 0), _kept(trace.routings[name], row))


def _kept(routing: Routing, row: int) -> Tensor:
    index, valid = routing.decision.index[row], routing.decision.valid
    return routing.state.position[row][index if valid is None else index[valid[row]]]


@padded
def test_5_rows_of_different_lengths_in_a_batch_equal_the_rows_alone(family: str, method: Method) -> None:
    model = compressed(family, method, 0.5, 0.6)
    tokens = 36 + PREFIX[family]
    mask = torch.ones(3, tokens, dtype=torch.long)
    mask[1, -13:] = 0
    mask[2, -20:] = 0
    ids = torch.tensor([3, 1, 2])
    together, trace = traced(model, images(), attention_mask=mask, sample_ids=ids)
    for routing in trace.routings.values():
        assert isinstance(routing.kept, Tensor)
        assert routing.decision.valid is not None
        chosen = routing.decision.valid.sum(-1) - PREFIX[family]
        fused = _extra(routing, model) * (chosen < torch.as_tensor(routing.present)).long()
        assert routing.kept.tolist() == (chosen + fused).tolist()
    for row in range(3):
        alone, own = traced(model, images()[row : row + 1], attention_mask=mask[row : row + 1], sample_ids=ids[row : row + 1])
        torch.testing.assert_close(alone[0], together[row], atol=1e-5, rtol=1e-4)
        for name, routing in own.routings.items():
            assert routing.achieved == pytest.approx(
                float(_row(trace.routings[name].kept, row)) / float(_row(trace.routings[name].present, row))
            )


def _extra(routing: object, model: PreTrainedModel) -> int:
    return stages_of(model)[routing.stage].merger.extra  # type: ignore[attr-defined]


def _row(count: int | Tensor, row: int) -> float:
    return float(count[row]) if isinstance(count, Tensor) else float(count)


class _Given(nn.Module):
    """Stands for the embeddings, so that a test can place padding where it likes."""

    def __init__(self, hidden: Tensor, like: nn.Module) -> None:
        super().__init__()
        self.hidden, self.patch_embeddings = hidden, like.patch_embeddings

    def forward(self, *args: object, **kwargs: object) -> Tensor | tuple[Tensor, None, None]:
        return (self.hidden, None, None) if "noise" in kwargs else self.hidden


@pytest.mark.parametrize(
    ("family", "method"),
    [pair for pair in PAIRS if pair[0] not in UNPADDED and not pair[1].positional],
    ids=lambda value: getattr(value, "name", value),
)
def test_5_left_and_right_padding_are_alike(family: str, method: Method) -> None:
    # A bias by place makes left and right differ by design; BEiT is looked at without.
    model = compressed(family, method, 0.5, 0.6, **({"use_relative_position_bias": False} if family == "beit" else {}))
    prefix, real, padding = PREFIX[family], 9, 4
    base = model.adapter.base(model)
    tokens, filler = torch.randn(2, prefix + real, 16), torch.randn(2, padding, 16)
    embeddings = base.embeddings
    outputs = []
    for order, mask in (
        ([tokens, filler], [1] * (prefix + real) + [0] * padding),
        ([tokens[:, :prefix], filler, tokens[:, prefix:]], [1] * prefix + [0] * padding + [1] * real),
    ):
        base.embeddings = _Given(torch.cat(order, 1), embeddings)
        outputs.append(traced(model, images(2), attention_mask=torch.tensor([mask, mask]))[0])
    base.embeddings = _Given(tokens, embeddings)
    outputs.append(traced(model, images(2))[0])
    torch.testing.assert_close(outputs[0], outputs[1], atol=1e-5, rtol=1e-4)
    torch.testing.assert_close(outputs[0], outputs[2], atol=1e-5, rtol=1e-4)


@pairs
def test_9_gradient_checkpointing_gives_the_same_loss_and_gradients(family: str, method: Method) -> None:
    results = []
    for checkpointing in (False, True):
        model = compressed(family, method, 0.5, 0.6).train()
        if checkpointing:
            checkpoint_activations(model)
        trace = Trace(noise=0.5, step=3)
        loss = loss_of(model, images(), trace=trace)
        loss = loss if trace.auxiliary_loss is None else loss + trace.auxiliary_loss
        if checkpointing:
            assert all(layer.gradient_checkpointing for layer in stack_of(model).layers)
        loss.backward()
        assert len(trace.routings) == 2
        results.append((loss.detach(), {name: p.grad for name, p in model.named_parameters() if p.grad is not None}))
    assert torch.equal(results[0][0], results[1][0])
    assert results[0][1].keys() == results[1][1].keys()
    assert all(torch.equal(results[0][1][name], results[1][1][name]) for name in results[0][1])


@pairs
def test_9_sdpa_and_eager_agree_under_the_same_decisions(family: str, method: Method) -> None:
    fused = compressed(family, method, 0.5, 0.6).train()
    eager = compressed(family, method, 0.5, 0.6, attn_implementation="eager").train()
    first = Trace()
    one = loss_of(fused, images(), trace=first)
    two = loss_of(eager, images(), trace=Trace(replay=first.decisions()))
    torch.testing.assert_close(one, two, atol=1e-5, rtol=1e-5)
    one.backward()
    two.backward()
    expected = {name: p.grad for name, p in eager.named_parameters() if p.grad is not None}
    torch.testing.assert_close({name: p.grad for name, p in fused.named_parameters() if p.grad is not None}, expected, atol=1e-5, rtol=1e-3)


_CLEAN = """
import sys, json, torch
from safetensors.torch import load_file, save_file
import laconic
torch.set_num_threads(1)
root = sys.argv[1]
for name in json.loads(sys.argv[2]):
    model = laconic.from_pretrained(f"{root}/{name}")
    out = model(**load_file(f"{root}/{name}/inputs"))
    logits = out.logits if hasattr(out, "logits") else out.last_hidden_state[:, 0].contiguous()
    save_file({"logits": logits.detach()}, f"{root}/{name}/logits")
"""


def test_10_saved_models_answer_bit_for_bit_in_a_clean_process(tmp_path: Path, clean: CleanProcesses) -> None:
    from safetensors.torch import load_file, save_file

    expected = {}
    for family, method in PAIRS:
        model, name = compressed(family, method, 0.5, 0.6), f"{family}-{method.name}"
        model.save_pretrained(tmp_path / name)
        save_file(inputs(model, images()), tmp_path / name / "inputs")
        expected[name] = traced(model, images())[0]
    done = clean.python(_CLEAN, [str(tmp_path), json.dumps(list(expected))])
    assert done.returncode == 0, done.stderr[-2000:]
    equal = {name: torch.equal(load_file(tmp_path / name / "logits")["logits"], logits) for name, logits in expected.items()}
    assert equal == dict.fromkeys(expected, True)


@layouts
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("ties", [False, True], ids=["distinct", "ties"])
def test_11_achieved_counts_equal_the_count_rule(family: str, method: Method, dtype: torch.dtype, ties: bool) -> None:
    model = compressed(family, method, 0.37, 0.61).to(dtype)
    pixels = torch.zeros_like(images()) if ties else images()
    _, trace = traced(model, pixels.to(dtype))
    present, processed = 36, [36]
    rule = COUNT_RULES[
        method.parts.get("count", "half" if method.parts["scorer"] == "bipartite" or "bipartite" in method.name else "round")
    ]
    assert trace.state is not None
    for position, (routing, keep) in enumerate(zip(trace.routings.values(), (0.37, 0.61), strict=True)):
        if method.adaptive:
            # Above a threshold of 0; a row without any keeps its best.
            above = ((routing.scores > 0) & routing.routable).sum(-1).clamp(min=1)
            if method.parts.get("merger") == "fuse":
                above = above + (above < torch.as_tensor(routing.present)).long()
            assert torch.equal(torch.as_tensor(routing.kept), above)
            assert float(routing.achieved) == pytest.approx(float(above.sum()) / float(torch.as_tensor(routing.present).expand(3).sum()))
            continue
        wanted = rule(present, keep, StageCount(36, position))
        assert (routing.present, routing.kept) == (present, wanted)
        processed.append(int(wanted))
        present = 36 if method.bypass else int(wanted)
    if method.adaptive:
        assert torch.equal(torch.as_tensor(trace.flow().layer_tokens[3].mlp), torch.as_tensor(routing.kept) + PREFIX[family])
        return
    assert trace.state.tokens == present + PREFIX[family]
    processed.append(present)
    kind = "attention" if method.site == "around_attention" else "mlp"
    assert [getattr(trace.flow().layer_tokens[index], kind) for index in range(4)] == [count + PREFIX[family] for count in processed]


@matrix
def test_replaying_decisions_repeats_a_random_forward(family: str) -> None:
    method = next(method for method in METHODS if method.name == "random")
    model = compressed(family, method, 0.5, 0.6)
    logits, trace = traced(model, images(), step=1)
    other, again = traced(model, images(), step=2)
    replayed, _ = traced(model, images(), step=2, replay=trace.decisions())
    assert torch.equal(logits, replayed)
    assert not torch.equal(logits, other)
    assert not torch.equal(again.routings["before_1"].decision.index, trace.routings["before_1"].decision.index)


@matrix
def test_a_deep_copy_is_independent(family: str) -> None:
    model = compressed(family, METHODS[0], 0.5, 0.6)
    twin = copy.deepcopy(model)
    expected, _ = traced(model, images())
    decompress(twin)
    assert torch.equal(traced(model, images())[0], expected)
