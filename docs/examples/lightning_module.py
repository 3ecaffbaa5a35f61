"""Laconic in your own LightningModule: the lines marked + are what compression adds."""

import lightning
import torch
from torch.utils.data import DataLoader
from transformers import ViTConfig, ViTForImageClassification

from laconic import Budget, BudgetConfig, CompressionConfig, StageConfig, compress
from laconic.data.embedded.scattered_digits import ScatteredDigits
from laconic.trainer.build.optimization import parameter_groups

STEPS = 20


class Classifier(lightning.LightningModule):
    def __init__(self, steps: int) -> None:
        super().__init__()
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
        self.budget = Budget(BudgetConfig(target=0.4), model, stages, total_steps=steps)  # +
        self.model = compress(model, self.budget.compression)  # +

    def training_step(self, batch, batch_index):
        trace = self.budget.trace(self.global_step, batch["sample_ids"], batch["labels"])  # +
        out = self.model(pixel_values=batch["pixel_values"], labels=batch["labels"], trace=trace)
        self.log("keep", trace.routings["before_0"].achieved)
        return out.loss + self.budget.loss(trace, self.global_step).total  # +

    def configure_optimizers(self):
        return torch.optim.AdamW(parameter_groups(self.model, lr=1e-3, router_lr=1e-2))


def main(steps: int = STEPS) -> float:
    lightning.seed_everything(0, verbose=False)
    trainer = lightning.Trainer(max_steps=steps, accelerator="cpu", logger=False, enable_checkpointing=False, enable_progress_bar=False)
    trainer.fit(Classifier(steps), DataLoader(ScatteredDigits("train", steps * 32), batch_size=32))
    print(f"keep achieved {float(trainer.callback_metrics['keep']):.3f}")
    return float(trainer.callback_metrics["keep"])


if __name__ == "__main__":
    main()
