"""Laconic in the Trainer of transformers: the lines marked + are what compression adds."""

import tempfile

import torch
from transformers import TrainingArguments, ViTConfig, ViTForImageClassification

from laconic import Budget, BudgetConfig, BudgetTrainer, CompressionConfig, StageConfig, compress, from_pretrained
from laconic.data.embedded.scattered_digits import ScatteredDigits
from laconic.trainer.build.optimization import parameter_groups

STEPS, BATCH = 20, 32


def accuracy(prediction):
    return {"accuracy": float((prediction.predictions.argmax(-1) == prediction.label_ids).mean())}


def main(steps: int = STEPS) -> float:
    torch.manual_seed(0)
    config = ViTConfig(
        image_size=32,
        patch_size=4,
        num_channels=1,
        hidden_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        intermediate_size=96,
        num_labels=10,
    )
    model = ViTForImageClassification(config)
    stages = CompressionConfig([StageConfig(layer=0, scorer="evidence")])  # +
    budget = Budget(BudgetConfig(target=0.4), model, stages, total_steps=steps)  # +
    model = compress(model, budget.compression)  # +
    with tempfile.TemporaryDirectory() as folder:
        trainer = BudgetTrainer(  # + instead of Trainer
            model=model,
            args=TrainingArguments(
                folder, max_steps=steps, per_device_train_batch_size=BATCH, logging_steps=max(1, steps // 4), report_to="none", use_cpu=True
            ),
            train_dataset=ScatteredDigits("train", 1_000),
            eval_dataset=ScatteredDigits("validation", 100),
            compute_metrics=accuracy,
            optimizers=(torch.optim.AdamW(parameter_groups(model, lr=1e-3, router_lr=1e-2)), None),
            budget=budget,  # +
        )
        trainer.train()
        metrics = trainer.evaluate()
        trainer.save_model(folder)
        again = from_pretrained(folder)  # + instead of ViTForImageClassification.from_pretrained
    pixels = torch.stack([ScatteredDigits("test", 8)[index]["pixel_values"] for index in range(8)])
    with torch.no_grad():
        assert torch.equal(again(pixels).logits, model.eval()(pixels).logits)
    print(f"accuracy {metrics['eval_accuracy']:.3f}, keep achieved {metrics['eval_keep/before_0']:.3f}")
    return metrics["eval_keep/before_0"]


if __name__ == "__main__":
    main()
