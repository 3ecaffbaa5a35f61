"""The invariants for images, text encoders, causal and vision-language models: every method × every family. What one kind alone has is
in test_vision.py, test_encoders.py, test_decoders.py and test_vision_language.py."""

from __future__ import annotations

import functools
import json
from collections.abc import Collection
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import PreTrainedModel

from laconic import Trace, decompress, stages_of
from laconic.modules.compress import checkpoint_activations
from laconic.modules.cost.count_rules import COUNT_RULES, StageCount
from laconic.modules.tokens import gather, merging
from laconic.modules.tokens.trace import Routing
from tests.clean import CleanProcesses
from tests.matrix import Case, Method, decoders, encoders, stack_of, vision, visual
from tests.thin import thinned

Pairs = list[tuple[str, Method]]
SAMPLES = torch.tensor([11, 5, 42])


def _cases(
    images: Pairs = vision.PAIRS, texts: Pairs = encoders.PAIRS, causal: Pairs = decoders.PAIRS, both: Pairs = visual.PAIRS
) -> list[Case]:
    return [
        *(vision.ImageCase(*pair) for pair in images),
        *(encoders.TextCase(*pair) for pair in texts),
        *(decoders.CausalCase(*pair) for pair in causal),
        *(visual.VisualCase(*pair) for pair in both),
    ]


# Each site, merger, kind of selector, of estimator and of draw, in every family; all methods in one.
IMAGES = thinned(vision.PAIRS, ["vit"], ("learned_key_bias", "evidence_fuse", "tome", "squeeze", "gumbel", "around_attention"))
CAUSAL = thinned(
    decoders.PAIRS, ["llama"], ("threshold", "gate_random", "gate_predictor_mlp", "gumbel", "threshold_attention", "chunk_mean")
)
TEXTS = thinned(encoders.PAIRS, ["bert"], ("learned", "fuse", "threshold"))
VISUAL = thinned(visual.PAIRS, ["llava"], ("last_query", "around"))
OFTEN = {str(case) for case in _cases(IMAGES, TEXTS, CAUSAL, VISUAL)}


# What a model of two parts adds where its methods choose alike.
FEW_VISUAL = thinned(visual.PAIRS, [], ("last_query", "threshold", "around"))
FEWER = {str(case) for case in _cases(IMAGES, TEXTS, CAUSAL, FEW_VISUAL)}
# Every method in one family: for what no family changes.
EVERY = _cases(
    thinned(vision.PAIRS, ["vit"]), thinned(encoders.PAIRS, ["bert"]), thinned(decoders.PAIRS, ["llama"]), thinned(visual.PAIRS, ["llava"])
)


def param(case: Case, *more: str, often: Collection[str] = OFTEN) -> Any:
    """A case; slow if other cases show the same property in the same family and with the same method."""
    return pytest.param(case, *more, id="-".join([str(case), *more]), marks=() if str(case) in often else pytest.mark.slow)


def over(cases: list[Case], often: list[Case] | None = None) -> pytest.MarkDecorator:
    named = OFTEN if often is None else {str(case) for case in often}
    return pytest.mark.parametrize("case", [param(case, often=named) for case in cases])


def _gradients(model: PreTrainedModel, parts: bool = False) -> dict[str, Tensor]:
    """Of the backbone, and of the parts where requested."""
    found = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    return {name: grad for name, grad in found.items() if parts or ".stages." not in name}


def _equal(ours: dict[str, Tensor], expected: dict[str, Tensor]) -> bool:
    return ours.keys() == expected.keys() and all(torch.equal(ours[name], expected[name]) for name in expected)


@pytest.mark.parametrize(
    ("case", "layout"),
    [
        param(case, layout, often=FEWER if layout == case.usual else ())
        for case in _cases()
        for layout in (("whole", "padded") if case.usual == "padded" else ("whole",))
    ],
)
def test_1_keep_1_gives_the_dense_outputs_and_backbone_gradients_bit_for_bit(case: Case, layout: str) -> None:
    plain, model, batch = case.dense(), case.neutral(case.compressed(1.0, 1.0)), case.inputs(layout)
    answer, expected = case.traced(model, batch)[0], case.answer(case.run(plain, batch))
    assert torch.equal(answer, expected) if case.exact(False, layout == "padded") else _close(answer, expected, **case.close)
    plain.train()
    model.train()
    ours, reference = case.loss(model, batch, Trace()), case.loss(plain, batch)
    ours.backward()
    reference.backward()
    assert _gradients(model).keys() == _gradients(plain).keys()
    if case.exact(True, layout == "padded"):
        assert torch.equal(ours, reference)
        if case.method.detached:
            assert _equal(_gradients(model), _gradients(plain))
    else:
        torch.testing.assert_close(ours, reference, atol=1e-6, rtol=1e-6)
        torch.testing.assert_close(_gradients(model), _gradients(plain), **case.close)


def _close(ours: Tensor, expected: Tensor, **tolerances: float) -> bool:
    torch.testing.assert_close(ours, expected, **tolerances)
    return True


@over(_cases(IMAGES, causal=[pair for pair in decoders.PAIRS if pair[1].name == "threshold"], both=FEW_VISUAL))
def test_1_decompress_restores_the_original(case: Case) -> None:
    plain, model, batch = case.dense(), case.compressed(0.5, 0.5), case.inputs("whole")
    before = {name: value.clone() for name, value in plain.state_dict().items()}
    restored = decompress(model)
    assert type(restored) is type(plain)
    assert {type(module) for module in restored.modules()} == {type(module) for module in plain.modules()}
    assert _equal(restored.state_dict(), before)
    assert torch.equal(case.answer(case.run(restored, batch)), case.answer(case.run(plain, batch)))
    assert restored.config.to_dict() == plain.config.to_dict()


# Heads that average: with rows of different lengths the plain head would average padding. test_backbones tests them.
@over([case for case in _cases() if not (case.method.adaptive and case.about.averages)])
def test_2_dropping_and_bypassing_equal_masking(case: Case) -> None:
    model = case.compressed(0.5, 0.6)
    answer, trace = case.traced(model, case.inputs("whole"))
    assert len(trace.routings) == (2 if case.method.restore is None else 1)
    torch.testing.assert_close(answer, case.reference(model, case.dense(), trace), atol=2e-5, rtol=1e-4)


@over(_cases(causal=[], both=[]))
def test_3_sizes_add_up_unless_tokens_are_dropped(case: Case) -> None:
    _, trace = case.traced(case.compressed(0.5, 0.6), case.inputs())
    assert trace.state is not None
    whole, lengths, source = case.method.merges or case.method.bypass, case.lengths(), trace.state.source
    assert bool((trace.state.size.sum(-1) == lengths).all()) is whole
    assert bool(((source >= 0).sum(-1) == lengths).all()) is whole
    for slot in range(trace.state.tokens):
        assert torch.equal((source == slot).sum(-1), trace.state.size[:, slot].long())


@over(_cases(IMAGES, causal=CAUSAL, both=[]))
def test_4_protected_tokens_keep_their_place_and_order_is_preserved(case: Case) -> None:
    _, trace = case.traced(case.compressed(0.4, 0.4), case.inputs())
    prefix = case.about.prefix
    for routing in trace.routings.values():
        index, valid = routing.decision.index, routing.decision.valid
        assert (valid is not None) or case.usual != "padded"
        valid = torch.ones_like(index, dtype=torch.bool) if valid is None else valid
        assert torch.equal(index[:, :prefix], torch.arange(prefix).expand(3, -1))
        assert bool(valid[:, :prefix].all())
        assert bool(((index[:, 1:] > index[:, :-1]) | ~valid[:, 1:]).all())
    assert trace.state is not None
    assert bool(trace.state.protected[:, :prefix].all())
    assert not bool(trace.state.protected[:, prefix:].any())


@over(_cases())
def test_5_a_batch_whole_or_padded_equals_its_rows_alone(case: Case) -> None:
    model = case.compressed(0.5, 0.6)
    for batch in case.batches():
        if batch.moves and case.method.positional:
            continue
        together, trace = case.traced(model, batch.inputs, sample_ids=SAMPLES)
        for routing in trace.routings.values():
            if not case.causal and routing.decision.valid is not None:
                chosen = routing.decision.valid.sum(-1) - case.about.prefix
                fused = stages_of(model)[routing.stage].merger.extra * (chosen < torch.as_tensor(routing.present)).long()
                assert torch.equal(_rows(routing.kept), chosen + fused)
        for row, inputs in enumerate(batch.alone):
            alone, own = case.traced(model, inputs, sample_ids=SAMPLES[row : row + 1])
            torch.testing.assert_close(case.tokens_of(together, row, batch.inputs), case.tokens_of(alone, 0, inputs), **case.close)
            for name, routing in own.routings.items():
                among = trace.routings[name]
                assert torch.equal(case.kept_of(routing, 0, inputs), case.kept_of(among, row, batch.inputs))
                kept, present = (int(_rows(count)[row]) for count in (among.kept, among.present))
                # A row without routable tokens keeps all of them.
                assert routing.achieved == pytest.approx(kept / present if present else 1.0)


def _rows(count: int | Tensor, rows: int = 3) -> Tensor:
    """(B,) int64 a count of each row."""
    return torch.as_tensor(count).expand(rows)


@over(_cases(), often=[case for case in EVERY if str(case) in FEWER])
def test_9_checkpointing_and_eager_give_the_same_loss_and_gradients(case: Case) -> None:
    results: list[tuple[Tensor, dict[str, Tensor]]] = []
    replay: dict[str, Any] = {}
    for how in ("sdpa", "checkpointing", "eager"):
        model = case.compressed(0.5, 0.6, attn_implementation="eager" if how == "eager" else "sdpa").train()
        if how == "checkpointing":
            checkpoint_activations(model)
            assert all(layer.gradient_checkpointing for layer in stack_of(model).layers)
        # The same decisions with the other kernel.
        trace = Trace(step=3, noise=0.5, replay=replay if how == "eager" else {})
        loss = case.loss(model, case.inputs(), trace)
        replay = trace.decisions()
        assert len(trace.routings) == (2 if case.method.restore is None else 1)
        loss = loss if trace.auxiliary_loss is None else loss + trace.auxiliary_loss
        loss.backward()
        results.append((loss.detach(), _gradients(model, parts=True)))
    (sdpa, gradients), (checkpointed, of_checkpointed), (eager, of_eager) = results
    assert torch.equal(sdpa, checkpointed)
    assert _equal(of_checkpointed, gradients)
    torch.testing.assert_close(eager, sdpa, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(of_eager, gradients, **case.close_gradients)


_CLEAN = """
import sys, json, torch
from safetensors.torch import load_file, save_file
import laconic
torch.set_num_threads(1)
root = sys.argv[1]
for name, how in json.loads(sys.argv[2]).items():
    model = laconic.from_pretrained(f"{root}/{name}", **how["load"])
    given = load_file(f"{root}/{name}/inputs")
    trace = {"trace": laconic.Trace(**how["trace"])} if how["trace"] else {}
    out = model(**given, **how["arguments"], **trace)
    answer = out.logits if hasattr(out, "logits") else out.last_hidden_state[:, 0].contiguous()
    made = {"made": model.generate(**given, max_new_tokens=5, do_sample=False)} if how["generates"] else {}
    save_file({"answer": answer.detach(), **made}, f"{root}/{name}/answer")
"""
SAVED = {
    "images": _cases(texts=[], causal=[], both=[]),
    # Every method in a BERT; what ModernBERT adds has no weights.
    "texts": _cases(images=[], texts=thinned(encoders.PAIRS, ["bert"], ["learned"]), causal=[], both=[]),
    # Every family, and every method: what is saved does not depend on the pair.
    "causal": _cases(images=[], texts=[], causal=thinned(decoders.PAIRS, ["llama"], ["predictor"]), both=[]),
    "both": _cases(images=[], texts=[], causal=[], both=VISUAL),
}


@pytest.mark.parametrize("kind", [kind if kind == "causal" else pytest.param(kind, marks=pytest.mark.slow) for kind in SAVED])
def test_10_saved_models_answer_and_generate_bit_for_bit_in_a_clean_process(kind: str, tmp_path: Path, clean: CleanProcesses) -> None:
    from safetensors.torch import load_file, save_file

    expected: dict[str, dict[str, Tensor]] = {}
    how: dict[str, dict[str, Any]] = {}
    for case in SAVED[kind]:
        model, name, batch = case.compressed(0.5, 0.6), str(case), case.inputs(case.saved)
        model.save_pretrained(tmp_path / name)
        save_file(batch, tmp_path / name / "inputs")
        expected[name] = {"answer": case.traced(model, batch, **case.saved_trace)[0]}
        if case.generates:
            expected[name]["made"] = model.generate(**batch, max_new_tokens=5, do_sample=False)
        how[name] = {"load": case.load, "trace": case.saved_trace, "arguments": case.arguments, "generates": case.generates}
    done = clean.python(_CLEAN, [str(tmp_path), json.dumps(how)])
    assert done.returncode == 0, done.stderr[-2000:]
    assert {name: _equal(load_file(tmp_path / name / "answer"), answers) for name, answers in expected.items()} == dict.fromkeys(
        expected, True
    )


# Selectors count tokens of a row and see no family: one protected token in front, none, and patches in random order; with and without
# sliding windows. One method or two in every family, since those run in bf16 nowhere else.
COUNTED = _cases(
    thinned(vision.PAIRS, ["vit", "siglip", "vit_mae"], ["evidence_fuse"]),
    thinned(encoders.PAIRS, ["bert"], ["fuse"]),
    thinned(decoders.PAIRS, ["llama", "gemma3_text"], ["gate_predictor_mlp", "predictor"]),
    both=[],
)


@over(COUNTED)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
def test_11_achieved_counts_equal_the_count_rule_of_each_row(case: Case, dtype: torch.dtype) -> None:
    model, method, prefix = case.compressed(0.37, 0.61).to(dtype), case.method, case.about.prefix
    # The tokens of the second row are alike: its scores are ties.
    batch = {key: value.to(dtype) if value.is_floating_point() else value for key, value in case.tied(case.inputs()).items()}
    _, trace = case.traced(model, batch)
    lengths = case.lengths()
    present, processed = lengths - prefix, [lengths]
    for position, (routing, keep) in enumerate(zip(trace.routings.values(), (0.37, 0.61), strict=method.restore is None)):
        assert torch.equal(_rows(routing.present), present)
        kept = _rows(routing.kept)
        wanted = _wanted(case, stages_of(model)[routing.stage], routing, present, keep, StageCount(lengths - prefix, position))
        assert wanted is None or torch.equal(kept, wanted)
        assert float(routing.achieved) == pytest.approx(float(kept.sum()) / float(present.sum()))
        processed.append(kept + prefix)
        present = present if method.bypass else kept
    assert trace.state is not None
    left = lengths if method.restore is not None else present + prefix
    assert torch.equal(_rows(trace.state.tokens_per_row), left)
    processed += [processed[-1]] * (method.restore is not None) + [left]
    half = "attention" if method.site == "around_attention" else "mlp"
    for index, tokens in enumerate(processed):
        assert torch.equal(_rows(getattr(trace.flow().layer_tokens[index], half)), tokens)


@over(EVERY)
def test_a_training_step_under_autocast_is_finite(case: Case) -> None:
    model, inputs = case.compressed(0.5, 0.6).train(), case.inputs()
    trace = Trace()
    with torch.autocast("cpu", torch.bfloat16):
        loss = case.loss(model, inputs, trace)
    (loss if trace.auxiliary_loss is None else loss + trace.auxiliary_loss).backward()
    assert torch.isfinite(loss)
    assert all(bool(torch.isfinite(gradient).all()) for gradient in _gradients(model, parts=True).values())


@over(EVERY)
def test_no_slot_is_taken_twice_where_backward_copies(case: Case, monkeypatch: pytest.MonkeyPatch) -> None:
    taken: list[Tensor] = []
    for kind in (gather._Take, gather._TakeOut):
        inner = kind.apply
        monkeypatch.setattr(kind, "apply", functools.partial(lambda inner, values, flat: taken.append(flat) or inner(values, flat), inner))
    merge = merging._Merge.apply
    monkeypatch.setattr(
        merging._Merge, "apply", lambda values, kept, gone, *more: taken.append(torch.cat([kept, gone])) or merge(values, kept, gone, *more)
    )
    trace = Trace()
    case.loss(case.compressed(0.5, 0.6).train(), case.inputs(), trace)
    assert taken
    assert all(len(flat.unique()) == len(flat) for flat in taken)


def _wanted(case: Case, stage: Any, routing: Routing, present: Tensor, keep: float, count: StageCount) -> Tensor | None:
    """(B,) int64 tokens that leave a stage; None where the scores are not what is compared with a threshold."""
    method = case.method
    if not method.adaptive and not (case.causal and method.deployed):
        return torch.as_tensor(COUNT_RULES[method.count](present, keep, count))
    if hasattr(stage.selector, "logits") or (stage.selector.draws and case.causal):
        return None
    above = ((routing.scores > getattr(stage.selector, "threshold", 0.0)) & routing.routable).sum(-1)
    # A row without any keeps its best; of a causal model it keeps none.
    above = above if case.causal else above.clamp(min=1)
    return above + stage.merger.extra * (above < present).long() if method.merges and not case.causal else above
