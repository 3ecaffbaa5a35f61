"""Paired measurement of reading prompts: time, and what a cache holds afterwards."""

from __future__ import annotations

import copy
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor
from transformers import PreTrainedModel
from transformers.cache_utils import Cache

from ...modules.compress import decompress
from ...modules.decoding.cache import RoutedCache
from ..build.build import build
from ..build.routers import started
from ..errors import RecipeError
from ..recipe.files import LoadedRecipe
from ..tasks.base import task_named
from .bench import WARM_UP_ROUNDS, Ratio, paired_ratio

# Prompts that are read in turns.
_PROMPTS = 8


@dataclass(frozen=True)
class Prefill:
    """Result of a measurement, by model; ``dense`` is one of them.

    Attributes:
        tokens: mean number of tokens of a prompt.
        seconds: median time of the forward that reads a prompt and gives the first new token.
        speedup: dense ÷ this, from pairs of the same prompt and round.
        cache_bytes: mean bytes of keys and values after a prompt.
        rounds: number of paired rounds.
    """

    tokens: float
    seconds: Mapping[str, float]
    speedup: Mapping[str, Ratio]
    cache_bytes: Mapping[str, float]
    rounds: int


@torch.no_grad()
def prefill(
    models: Mapping[str, PreTrainedModel],
    prompts: Sequence[Tensor],
    rounds: int = 40,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> Prefill:
    """Times the forward that fills a cache, in one process, interleaved, in rotating order.

    Args:
        models: ``dense`` and others, in evaluation mode, on one device.
        prompts: (B, N) int64 token ids of each forward, in turns.
        rounds: number of rounds; at least 30 for reported results.
        progress: called with the number of finished rounds and of all rounds.
    """
    device = next(models["dense"].parameters()).device
    given = [prompt.to(device) for prompt in prompts]
    held = {name: statistics.mean(_bytes(_read(model, prompt)) for prompt in given) for name, model in models.items()}
    times: dict[str, list[float]] = {name: [] for name in models}
    order = list(models)
    for round_index in range(-WARM_UP_ROUNDS, rounds):
        shift = round_index % len(order)
        for name in order[shift:] + order[:shift]:
            seconds = _timed(models[name], given[round_index % len(given)])
            if round_index >= 0:
                times[name].append(seconds)
        progress(max(0, round_index + 1), rounds)
    return Prefill(
        tokens=statistics.mean(prompt.shape[1] for prompt in given),
        seconds={name: statistics.median(found) for name, found in times.items()},
        speedup={name: paired_ratio(times["dense"], found) for name, found in times.items()},
        cache_bytes=held,
        rounds=rounds,
    )


def _read(model: PreTrainedModel, prompt: Tensor) -> Cache:
    # As generate() reads a prompt: the head runs on the last token alone.
    cache: Cache = model(prompt, use_cache=True, logits_to_keep=1).past_key_values
    return cache


def _timed(model: PreTrainedModel, prompt: Tensor) -> float:
    if prompt.device.type == "cuda":
        torch.cuda.synchronize()
    start = time.perf_counter()
    _read(model, prompt)
    if prompt.device.type == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - start


def _bytes(cache: Cache) -> int:
    if isinstance(cache, RoutedCache):
        return cache.bytes_stored()
    parts = [part for layer in cache.layers for part in (layer.keys, layer.values)]
    return sum(part.numel() * part.element_size() for part in parts if part is not None)


def prefill_recipe(loaded: LoadedRecipe, rounds: int, console: Console) -> dict[str, Any]:
    """Measures a recipe's model, as it is before training, on its longest held-out prompts, and prints the table.

    Raises:
        RecipeError: the task has no prompts.
    """
    task = task_named(loaded.recipe.task)
    parts = build(loaded.recipe)
    try:
        prompts = task.prompts(parts.data, _PROMPTS)
    except ValueError as error:
        raise RecipeError(f"--prefill: {error}") from None
    # Thresholds that have seen no score would keep any number of tokens.
    started(parts)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    compressed = parts.model.eval().to(device)
    dense = decompress(copy.deepcopy(compressed)).eval()
    with console.status(f"reading prompts: {rounds} paired rounds"):
        found = prefill({"dense": dense, "compressed": compressed}, [prompt[None] for prompt in prompts], rounds)
    table = Table(title=f"reading a prompt of {found.tokens:,.0f} tokens, {rounds} paired rounds")
    for column in ("arm", "median", "dense ÷ this", "cache"):
        table.add_column(column, justify="left" if column == "arm" else "right")
    for name, seconds in found.seconds.items():
        ratio = found.speedup[name]
        faster = "1.00×" if name == "dense" else f"{ratio.median:.2f}× ({ratio.low:.2f}–{ratio.high:.2f})"
        table.add_row(name, f"{seconds * 1000:.0f} ms", faster, f"{found.cache_bytes[name] / 2**20:.2f} MiB")
    console.print(table)
    return asdict(found)
