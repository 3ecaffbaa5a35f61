"""Chats of a batch packed into rows by kept length: ``data.packing``."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import AutoConfig

from laconic import CompressionConfig, StageConfig, Trace, compress
from laconic.data.chats.packing import ChatPacking
from laconic.data.chats.splits import ChatData
from laconic.data.rows import collate
from laconic.modules.backbones import families
from laconic.modules.cost.cost import CostModel
from laconic.trainer.build.build import build
from laconic.trainer.distributed import collective
from laconic.trainer.losses.answer_loss import answer_loss
from laconic.trainer.recipe.files import load
from laconic.trainer.tasks.vision_language import VisionLanguage
from tests.matrix import image_text, visual
from tests.matrix.decoders import spread
from tests.trainer.conftest import QUICK
from tests.trainer.small_recipes import small

PLACEHOLDER = 47
_LEARNED = {"name": "learned", "detach": True}
STAGES: dict[str, list[dict[str, Any]]] = {
    "learned": [{"stack": "text", "layer": 2, "scope": "visual", "scorer": _LEARNED}],
    "several": [
        {"stack": "projector", "layer": 0, "scorer": _LEARNED},
        *({"stack": "text", "layer": layer, "scope": "visual", "count": "dynamicvit", "scorer": "pivots", "keep": 0.7} for layer in (1, 2)),
    ],
    "diversity": [{"stack": "text", "layer": 2, "scope": "visual", "scorer": "diversity"}],
    "mqt": [{"stack": "projector", "layer": 0, "scorer": "first", "merger": "queries"}],
}


def _item(family: str, number: int) -> dict[str, Any]:
    """An encoded chat: one image amid text, two images, or text alone."""
    given = visual.row(number) if family == "llava" else image_text.row(family, number)
    (ids,), adapter = given["input_ids"], families()[family]
    answers = (visual.labels if family == "llava" else image_text.labels_of)(ids[None])[0]
    images = {name: value.double() if value.is_floating_point() else value for name, value in given.items() if name in adapter.image_inputs}  # type: ignore[attr-defined]
    return {
        "input_ids": ids, "labels": answers, "attention_mask": torch.ones_like(ids), "turns": (answers >= 0).long() - 1,
        "images": images, "kinds": torch.tensor([0]), "sample_ids": torch.tensor(number),
        "tokens": len(ids), "predicted": int((answers >= 0).sum()),
    }  # fmt: skip


def _model(family: str, stages: str) -> Any:
    plain = visual.dense() if family == "llava" else image_text.dense(family)
    made = [StageConfig(**{"keep": 0.5, **stage}) for stage in STAGES[stages]] if stages else []
    return (spread(compress(plain, CompressionConfig(made))) if made else plain).double().train()


def _gradients(model: Any, batches: list[dict[str, Any]]) -> tuple[Tensor, dict[str, Tensor], list[int]]:
    """Summed loss of batches, gradients, and the tokens that each stage kept of all that it could touch."""
    model.zero_grad()
    total, kept = torch.zeros((), dtype=torch.float64), [0, 0]
    for batch in batches:
        trace = Trace(sample_ids=batch["sample_ids"])
        found = answer_loss(model, batch, **({"trace": trace} if hasattr(model.config, "compression") else {})).total
        found.backward()
        total += found.detach()
        for routing in trace.routings.values():
            kept = [before + now for before, now in zip(kept, routing.counts(), strict=True)]
    return total, {name: value.grad.clone() for name, value in model.named_parameters() if value.grad is not None}, kept


_CASES = [("llava", "several"), ("llava", ""), *(("llava", name) for name in STAGES if name != "several")]
_CASES += [(family, "learned") for family in image_text.FAMILIES if families()[family].no_packing is None]  # type: ignore[attr-defined]


@pytest.mark.parametrize(
    ("family", "stages"), [pytest.param(*case, marks=[] if case == _CASES[0] else pytest.mark.slow) for case in _CASES]
)
def test_a_packed_row_is_its_chats_alone_in_loss_gradients_and_tokens(family: str, stages: str) -> None:
    model, items = _model(family, stages), [_item(family, number) for number in (1, 2, 0, 2)]
    packing = ChatPacking(10**6, (PLACEHOLDER,), 0.5, families()[family].images_by_row)  # type: ignore[attr-defined]
    packed = packing(items)
    assert len(packed["input_ids"]) == 1
    alone, expected, kept = _gradients(model, [collate([item]) for item in items])
    total, found, together = _gradients(model, [packed])
    torch.testing.assert_close(total, alone)
    assert found.keys() == expected.keys()
    for name, value in found.items():
        # Norms and positions are computed in float32.
        torch.testing.assert_close(value, expected[name], atol=1e-6, rtol=1e-4)
    assert together == kept
    assert packed["terms"] == sum(item["predicted"] for item in items)


def test_padding_behind_a_packed_row_and_a_blank_image_change_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    model = _model("llava", "several")
    # Rows of different lengths: both chats with images do not fit one.
    rows = ChatPacking(45, (PLACEHOLDER,), 0.9)([_item("llava", number) for number in (0, 1, 2)])
    assert rows["documents"].tolist()[1][-1] == -1 or rows["documents"].tolist()[0][-1] == -1
    total, _, kept = _gradients(model, [rows])
    alone, _, expected = _gradients(model, [collate([_item("llava", number)]) for number in (0, 1, 2)])
    torch.testing.assert_close(total, alone)
    assert kept == expected
    texts = ChatPacking(45, (PLACEHOLDER,), 1.0)([_item("llava", 2)] * 2)
    plain, _, _ = _gradients(model, [texts])
    monkeypatch.setattr(collective, "world_size", lambda: 2)
    torch.testing.assert_close(_gradients(model, [texts])[0], plain)


def test_rows_hold_what_fits_by_kept_length_and_chats_keep_their_order() -> None:
    packing = ChatPacking(20, (PLACEHOLDER,), 0.25)
    chat = {"input_ids": torch.tensor([1, 2] + [PLACEHOLDER] * 8 + [3])}
    assert packing.kept_length(chat) == 3 + 2
    # 15 + 5, 12 + 7, 9: the first row with room, longest chats first.
    assert packing.plan([5, 12, 15, 9, 7]) == [[0, 2], [1, 4], [3]]
    # A chat that is too long even alone has a row.
    assert packing.plan([21, 20]) == [[0], [1]]
    assert packing.plan([]) == []


def _fitted(config: Any, cost: CostModel | None) -> ChatData:
    recipe = load("vlm_digits_base", ["data.packing=true"]).recipe
    made = ChatData([], [], [], processor=None, length=99)  # type: ignore[arg-type]
    fitted = VisionLanguage.fit_data(recipe, made, config, cost)
    assert isinstance(fitted, ChatData)
    return fitted


def test_visual_tokens_count_by_the_layers_that_process_them_and_what_cannot_be_packed_is_refused() -> None:
    plain = visual.dense()
    early = CostModel(plain, CompressionConfig([StageConfig(layer=0, keep=4 / 9, scorer="random", stack="projector")]))
    late = CostModel(plain, CompressionConfig([StageConfig(layer=2, keep=4 / 9, scorer="random", stack="text", scope="visual")]))
    # Two of four layers have all tokens.
    for cost, kept in ((early, 4 / 9), (late, (1 + 4 / 9) / 2), (CostModel(plain), 1)):
        packing = _fitted(plain.config, cost).packing
        assert packing is not None
        assert (packing.length, packing.placeholders, packing.kept) == (99, (PLACEHOLDER,), pytest.approx(kept))
    last = CostModel(plain, CompressionConfig([StageConfig(layer=1, keep=0.5, scorer="last_query", stack="text", scope="visual")]))
    for config, refused, message in (
        (plain.config, last, "scorer 'last_query' of stage 'text.before_1' reads the end of one prompt a row: set data.packing=false"),
        (AutoConfig.for_model("gemma3"), None, "is not offered for a gemma3: .* see tokens of each other's images; set data.packing=false"),
    ):
        with pytest.raises(ValueError, match=f"data.packing = true.*{message}"):
            _fitted(config, refused)


@pytest.mark.slow
def test_a_run_with_packing_trains_on_packed_rows_with_the_loss_of_the_same_chats(tmp_path: Path) -> None:
    given = [*small("vlm_digits_base", tmp_path, QUICK), "trainer.max_steps=1", "data.sequence_length=256", "data.packing=true"]
    parts = build(load("vlm_digits_base", [*given, "compression.method=pooled"]).recipe)
    (batch,) = parts.data_module().train_dataloader()
    number = len(parts.data.train)  # type: ignore[arg-type]
    unpacked = collate([parts.data.train[int(index) % number] for index in _order(parts)])
    assert len(batch["input_ids"]) < len(unpacked["input_ids"])
    losses = [
        VisionLanguage.loss(parts.model.train(), each, trace=Trace(sample_ids=each["sample_ids"])).detach() for each in (batch, unpacked)
    ]
    torch.testing.assert_close(*losses, atol=1e-4, rtol=1e-4)


def _order(parts: Any) -> list[int]:
    (indices,) = parts.data.train_batches(parts.recipe.data.batch_size, 1, parts.recipe.seed)
    return list(indices)
