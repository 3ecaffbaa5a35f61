"""The Trainer of transformers: the budget's loss joins its own, at the right scale and step."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import Trainer, TrainingArguments

from laconic import Budget, BudgetConfig, BudgetTrainer, CompressionConfig, StageConfig, compress
from tests.matrix import decoders, dense, images, labels, visual

STAGES = CompressionConfig([StageConfig(layer=1, scorer="evidence")])


def _trainer(folder: Path, batch: int, accumulate: int = 1, steps: int = 1, **settings: Any) -> BudgetTrainer:
    model = dense("vit")
    budget = Budget(BudgetConfig(target=0.7, schedule="linear", schedule_until=1.0), model, STAGES, total_steps=4)
    model = compress(model, budget.compression).train()
    pixels, targets = images(16), labels(16)
    rows = [{"pixel_values": pixels[i], "labels": targets[i], "sample_ids": torch.tensor(100 + i)} for i in range(16)]
    arguments = TrainingArguments(
        str(folder),
        max_steps=steps,
        per_device_train_batch_size=batch,
        gradient_accumulation_steps=accumulate,
        logging_steps=1,
        max_grad_norm=0,
        lr_scheduler_type="constant",
        report_to="none",
        use_cpu=True,
        disable_tqdm=True,
        save_strategy="no",
        **settings,
    )
    optimizer = torch.optim.SGD(model.parameters(), lr=0.5)
    return BudgetTrainer(model=model, args=arguments, train_dataset=rows, eval_dataset=rows, optimizers=(optimizer, None), budget=budget)  # type: ignore[arg-type]


@pytest.mark.parametrize("settings", [{}, {"label_smoothing_factor": 0.1}])
def test_accumulated_batches_train_like_one_batch(tmp_path: Path, settings: dict[str, Any]) -> None:
    whole, parts = _trainer(tmp_path, 16, **settings), _trainer(tmp_path, 8, accumulate=2, **settings)
    before = {name: value.clone() for name, value in whole.model.state_dict().items()}
    whole.train()
    parts.train()
    for name, value in whole.model.state_dict().items():
        torch.testing.assert_close(parts.model.state_dict()[name], value, atol=2e-6, rtol=1e-4)
        if ".stages." in name:
            assert not torch.equal(value, before[name]), name


def test_accumulated_parts_of_texts_weigh_by_their_predicted_tokens(tmp_path: Path) -> None:
    """As the Trainer counts them: the budget's mixin passes the count of the whole step on."""
    torch.manual_seed(0)
    ids = torch.randint(3, 48, (4, 12))
    learned = torch.arange(12) >= torch.tensor([[1], [5], [9], [11]])
    rows = [{"input_ids": row, "labels": row.where(kept, -100)} for row, kept in zip(ids, learned, strict=True)]
    trained = []
    for batch, accumulate in ((4, 1), (1, 4)):
        torch.manual_seed(1)
        model = decoders.dense("llama")
        compressed = compress(
            model, CompressionConfig([StageConfig(layer=1, site="around", scorer="random", selector="threshold", keep=1.0)])
        )
        arguments = TrainingArguments(
            str(tmp_path), max_steps=1, per_device_train_batch_size=batch, gradient_accumulation_steps=accumulate, max_grad_norm=0,
            lr_scheduler_type="constant", report_to="none", use_cpu=True, disable_tqdm=True, save_strategy="no",
        )  # fmt: skip
        optimizer = torch.optim.SGD(compressed.parameters(), lr=0.5)
        BudgetTrainer(model=compressed.train(), args=arguments, train_dataset=rows, optimizers=(optimizer, None)).train()  # type: ignore[arg-type]
        trained.append(compressed.state_dict())
    for name, value in trained[0].items():
        torch.testing.assert_close(trained[1][name], value, atol=2e-6, rtol=1e-4)


def test_the_trace_knows_the_step_and_the_rows_and_the_budget_joins_the_loss(tmp_path: Path) -> None:
    trainer, traces = _trainer(tmp_path, 8, steps=3), []
    budget = trainer.budget
    assert budget is not None
    made = budget.trace

    def noted(*args: Any, **kwargs: Any) -> Any:
        traces.append(made(*args, **kwargs))
        return traces[-1]

    budget.trace = noted  # type: ignore[method-assign]
    trainer.train()
    assert [trace.step for trace in traces] == [0, 1, 2]
    assert all(int(trace.sample_ids.min()) >= 100 for trace in traces)
    assert traces[0].keep != traces[1].keep
    logs = [line for line in trainer.state.log_history if "loss" in line]
    assert [line["keep/before_1"] for line in logs] == [trace.routings["before_1"].achieved for trace in traces]
    again, model = made(0, traces[0].sample_ids), _trainer(tmp_path, 8).model
    rows = again.sample_ids - 100
    again.labels = labels(16)[rows]
    loss = model(pixel_values=images(16)[rows], labels=again.labels, trace=again).loss + budget.loss(again, 0).total
    assert logs[0]["loss"] == pytest.approx(loss.item(), abs=1e-4)


def test_a_budget_that_was_not_given_the_number_of_steps_learns_it_from_the_trainer(tmp_path: Path) -> None:
    trainer = _trainer(tmp_path, 8, steps=4)
    budget = Budget(BudgetConfig(target=0.7, noise=1.0, noise_until=1.0), dense("vit"), STAGES)
    trainer.budget, noises, trace = budget, [], budget.trace
    budget.trace = lambda *args: noises.append(trace(*args).noise) or trace(*args)  # type: ignore[method-assign, func-returns-value]
    trainer.train()
    assert noises == pytest.approx([1.0, 0.75, 0.5, 0.25])


def test_evaluation_adds_no_loss_and_reports_what_was_kept(tmp_path: Path) -> None:
    trainer = _trainer(tmp_path, 8)
    metrics = trainer.evaluate()
    plain = Trainer(model=trainer.model, args=trainer.args, eval_dataset=trainer.eval_dataset).evaluate()
    assert metrics["eval_loss"] == pytest.approx(plain["eval_loss"], abs=1e-6)
    keep = trainer.model.config.compression["stages"][0]["keep"]
    assert metrics["eval_keep/before_1"] == pytest.approx(keep, abs=0.5 / 36)
    assert "probe_keep/before_1" in trainer.evaluate(metric_key_prefix="probe")


def test_a_dense_model_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="the model is not compressed: call laconic.compress"):
        BudgetTrainer(model=dense("vit"), args=TrainingArguments(str(tmp_path), use_cpu=True, report_to="none"))


def test_stages_of_a_tower_train_nothing_in_a_batch_without_an_image(tmp_path: Path) -> None:
    stages = CompressionConfig([StageConfig(layer=0, stack="vision", scorer="learned", selector="gumbel")])
    budget = Budget(BudgetConfig(target=0.5, measure="keep"), visual.dense(), stages, total_steps=1)
    model = compress(visual.dense(), budget.compression).train()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    rows = [{"input_ids": ids, "labels": ids} for ids in torch.randint(2, visual.PLACEHOLDER, (2, 8))]
    arguments = TrainingArguments(str(tmp_path), max_steps=1, report_to="none", use_cpu=True, disable_tqdm=True, save_strategy="no")
    BudgetTrainer(model=model, args=arguments, train_dataset=rows, budget=budget).train()
    moved = {name for name, value in model.state_dict().items() if not torch.equal(value, before[name])}
    assert moved
    assert not any(".stages." in name for name in moved)
    assert budget.controls == {}


def test_a_controller_goes_on_where_the_trainers_checkpoint_left_it(tmp_path: Path) -> None:
    def trained(folder: Path, resume: bool, steps: int) -> tuple[dict[str, Any], dict[str, torch.Tensor]]:
        model = dense("vit")
        stages = CompressionConfig([StageConfig(layer=1, scorer="learned", selector="gumbel")])
        budget = Budget(BudgetConfig(target=0.6, measure="keep", noise=1.0, ramp_until=0.0), model, stages, total_steps=4)
        model = compress(model, budget.compression).train()
        rows = [{"pixel_values": image, "labels": label} for image, label in zip(images(8), labels(8), strict=True)]
        arguments = TrainingArguments(
            str(folder), max_steps=steps, per_device_train_batch_size=4, save_steps=2, lr_scheduler_type="constant", report_to="none",
            use_cpu=True, disable_tqdm=True,
        )  # fmt: skip
        BudgetTrainer(model=model, args=arguments, train_dataset=rows, budget=budget).train(resume_from_checkpoint=resume)
        return budget.state_dict(), model.state_dict()

    state, weights = trained(tmp_path / "whole", False, 4)
    trained(tmp_path / "broken", False, 2)
    # A checkpoint that a Trainer without a budget wrote.
    saved = tmp_path / "broken" / "checkpoint-2" / "budget.pt"
    saved.rename(tmp_path / "budget.pt")
    with pytest.raises(ValueError, match="the checkpoint's state of the budget lacks controller, controls, step, gaps"):
        trained(tmp_path / "broken", True, 4)
    (tmp_path / "budget.pt").rename(saved)
    again, resumed = trained(tmp_path / "broken", True, 4)
    assert float(state["controls"]["before_1"]["multiplier"]) != 0
    assert str(again) == str(state)
    assert all(torch.equal(value, resumed[name]) for name, value in weights.items())
