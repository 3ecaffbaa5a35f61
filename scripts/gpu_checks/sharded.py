"""DeepSpeed's ZeRO on one GPU, with the configuration and the engine of training."""

from __future__ import annotations

import copy
import importlib.util
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import distributed, nn

from laconic.trainer.distributed.deepspeed import check_deepspeed, deepspeed_config, join_deepspeed
from laconic.trainer.errors import RecipeError
from laconic.trainer.measure.bench import sliced, token_counts
from laconic.trainer.recipe.schema import TrainerRecipe

from .measuring import milliseconds, ratio_of, rounds_of, timed
from .models import DEVICE, flash, llm, loss_of, tokens
from .part import NotHereError, Setting


def deepspeed_zero_2(setting: Setting) -> dict[str, Any]:
    """Training step of a Llama under ZeRO-2: dense, routed, and the routed one's oracle."""
    return _under(setting, 2)


def deepspeed_zero_3(setting: Setting) -> dict[str, Any]:
    """The same under ZeRO-3."""
    return _under(setting, 3)


def _under(setting: Setting, stage: int) -> dict[str, Any]:
    if importlib.util.find_spec("deepspeed") is None:
        raise NotHereError("the package deepspeed is not installed: pip install deepspeed")
    size = setting.sizes["zero"]
    precision = "bf16" if DEVICE == "cuda" else "fp32"
    settings = TrainerRecipe(strategy=f"deepspeed_{stage}", precision=precision, max_steps=1)
    try:
        check_deepspeed(settings, size["rows"])
    except RecipeError as error:
        raise NotHereError(str(error)) from None
    batch = tokens(size)
    dense, routed = (llm(size, compressed, torch.float32) for compressed in (False, True))
    oracle = sliced(copy.deepcopy(dense), *token_counts(routed, batch))  # type: ignore[arg-type]
    models: dict[str, nn.Module] = {"dense": dense, "around": routed, "oracle": oracle}
    with _process_group(), flash():
        config = deepspeed_config(settings, size["rows"])
        engines = {name: _engine(model.train(), config) for name, model in models.items()}

        def step(name: str) -> Callable[[], None]:
            def call() -> None:
                engines[name].backward(loss_of(engines[name], batch, name == "around"))
                engines[name].step()

            return call

        times = timed(setting, {name: step(name) for name in engines})
        for engine in engines.values():
            engine.destroy()
    return {
        "ms": {name: milliseconds(seconds) for name, seconds in times.items()},
        "speedup": ratio_of(times["dense"], times["around"]),
        "of_oracle": ratio_of(times["oracle"], times["around"]),
        **rounds_of(setting, len(times["dense"])),
    }


def _engine(model: nn.Module, config: dict[str, Any]) -> Any:
    import deepspeed

    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=1e-5, fused=True)
    engine, *_ = deepspeed.initialize(
        model=model, model_parameters=trained, optimizer=optimizer, config=copy.deepcopy(config), dist_init_required=False
    )
    return engine


@contextmanager
def _process_group() -> Iterator[None]:
    """A process group of this process alone, which stays: DeepSpeed keeps it for its next engine."""
    alone = {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1"}
    before = {name: os.environ.get(name) for name in alone}
    os.environ.update(alone)
    try:
        if not distributed.is_initialized():
            backend = "nccl" if DEVICE == "cuda" else "gloo"
            distributed.init_process_group(backend, store=distributed.HashStore(), rank=0, world_size=1)
            join_deepspeed()
        yield
    finally:
        for name, value in before.items():
            os.environ.pop(name)
            if value is not None:
                os.environ[name] = value


PARTS = (deepspeed_zero_2, deepspeed_zero_3)
