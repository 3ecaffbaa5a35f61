"""Laconic in a plain training loop: the lines marked + are what compression adds."""

import torch
from transformers import ViTConfig, ViTForImageClassification

from laconic import Budget, BudgetConfig, CompressionConfig, StageConfig, compress
from laconic.data.embedded.scattered_digits import ScatteredDigits
from laconic.trainer.build.optimization import parameter_groups

STEPS, BATCH = 20, 32


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
    model = compress(model, budget.compression).train()  # +
    optimizer = torch.optim.AdamW(parameter_groups(model, lr=1e-3, router_lr=1e-2))
    data, loss = ScatteredDigits("train", steps * BATCH), torch.zeros(())
    for step in range(steps):
        rows = [data[index] for index in range(step * BATCH, (step + 1) * BATCH)]
        pixels, labels, ids = (torch.stack([row[key] for row in rows]) for key in ("pixel_values", "labels", "sample_ids"))
        trace = budget.trace(step, ids, labels)  # +
        out = model(pixel_values=pixels, labels=labels, trace=trace)
        loss = out.loss + budget.loss(trace, step).total  # +
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    kept = trace.routings["before_0"]
    print(f"loss {loss.item():.3f}, keep requested {kept.requested:.3f}, achieved {kept.achieved:.3f}")
    return kept.achieved


if __name__ == "__main__":
    main()
