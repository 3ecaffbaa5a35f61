"""Inference: reading a prompt with images, and decoding."""

from __future__ import annotations

import statistics
from typing import Any

import torch
from torch import nn

from laconic import RoutedCache, Trace
from laconic.modules.cost.cost import CostModel

from .measuring import milliseconds, ratio_of, rounds_of, timed
from .models import DEVICE, fastv, llm, pyramid, tokens, vlm, vlm_batch
from .part import Setting


def vlm_prefill_at_7b(setting: Setting) -> dict[str, Any]:
    """Time to read an image and a question with a model of LLaVA 1.5 7B's shape."""
    size, tower = setting.sizes["vlm_7b"], setting.sizes["vlm"]
    batch = vlm_batch(size, tower, size["rows"])
    del batch["labels"]
    arms = {
        "dense": vlm(size, tower).eval(),
        "fastv": vlm(size, tower, fastv(size)).eval(),
        "pyramiddrop": vlm(size, tower, pyramid(size)).eval(),
    }

    def reading(model: nn.Module) -> Any:
        return lambda: model(**batch, use_cache=True, logits_to_keep=1)

    with torch.inference_mode():
        times = timed(setting, {name: reading(model) for name, model in arms.items()})
    found: dict[str, Any] = {"dense_ms": milliseconds(times["dense"])} | rounds_of(setting, len(times["dense"]))
    for name in ("fastv", "pyramiddrop"):
        macs = CostModel(arms[name], size=tower["text"])().macs_ratio  # type: ignore[arg-type]
        found[name] = {"ms": milliseconds(times[name]), "speedup": ratio_of(times["dense"], times[name]), "macs_ratio": macs}
    return found


def decoding(setting: Setting) -> dict[str, Any]:
    """Greedy decoding with a cache: dense, routed, and as oracle a dense model with as many layers as a token is processed by on average."""
    size, how = setting.sizes["llm"], setting.sizes["decoding"]
    fewer = {**size, "depth": size["depth"] - size["depth"] // 4}
    models: dict[str, Any] = {"dense": llm(size).eval(), "around": llm(size, True, deployed=True).eval(), "oracle": llm(fewer).eval()}
    with torch.no_grad():
        # Thresholds that let half of the tokens through, as after training: two training forwards settle them.
        models["around"].train()
        for _ in range(2):
            models["around"](**tokens(size), trace=Trace())
        models["around"].eval()
    found: dict[str, Any] = {"oracle_layers": fewer["depth"]}
    for place, rows in enumerate(how["rows"]):
        ids = torch.randint(0, size["vocab"], (rows, how["prompt"]), device=DEVICE)

        def generating(name: str, ids: torch.Tensor = ids) -> Any:
            def generate() -> None:
                cache = {"past_key_values": RoutedCache(config=models[name].config)} if name == "around" else {}
                models[name].generate(ids, max_new_tokens=how["new"], min_new_tokens=how["new"], do_sample=False, pad_token_id=0, **cache)

            return generate

        times = timed(setting, {name: generating(name) for name in models}, 1 / (len(how["rows"]) - place))
        found[f"{rows} rows"] = {
            "tokens_per_second": {name: rows * how["new"] / statistics.median(seconds) for name, seconds in times.items()},
            "ratio": ratio_of(times["dense"], times["around"]),
            "of_oracle": ratio_of(times["oracle"], times["around"]),
            **rounds_of(setting, len(times["dense"])),
        }
    return found


PARTS = (vlm_prefill_at_7b, decoding)
