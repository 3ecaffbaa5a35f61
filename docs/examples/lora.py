"""LoRA and routers on frozen weights in a plain loop, saved as an adapter and loaded again."""

from __future__ import annotations

import tempfile
from pathlib import Path

import torch
from peft import LoraConfig
from transformers import AutoModelForImageClassification, ViTConfig, ViTForImageClassification

from laconic import CompressionConfig, StageConfig, Trace, add_lora, compress, from_pretrained, save_adapter


def main(steps: int = 20) -> float:
    """Trains and returns the share of tokens that the model keeps."""
    torch.manual_seed(0)
    folder = Path(tempfile.mkdtemp())
    config = ViTConfig(hidden_size=32, num_hidden_layers=4, num_attention_heads=2, intermediate_size=64, image_size=32, patch_size=4)
    ViTForImageClassification(config).save_pretrained(folder / "base")

    model = AutoModelForImageClassification.from_pretrained(folder / "base")
    compress(model, CompressionConfig([StageConfig(layer=1, keep=0.36, scorer="learned")]))
    add_lora(model, LoraConfig(r=4, modules_to_save=["classifier"]))
    optimizer = torch.optim.AdamW([parameter for parameter in model.parameters() if parameter.requires_grad], lr=1e-3)
    model.train()
    trace = Trace()
    for step in range(steps):
        trace = Trace(step=step)
        loss = model(pixel_values=torch.randn(8, 3, 32, 32), labels=torch.randint(2, (8,)), trace=trace).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()

    save_adapter(model.eval(), folder / "adapter", base=folder / "base")
    loaded = from_pretrained(folder / "adapter")
    probe = torch.randn(2, 3, 32, 32)
    with torch.no_grad():
        assert torch.equal(loaded(probe).logits, model(probe).logits)
    routing = trace.routings["before_1"]
    return float(routing.kept / routing.present)


if __name__ == "__main__":
    print(f"kept {main():.2f} of the tokens")
