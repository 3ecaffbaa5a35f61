"""What is exported: a trained model with all that is known about it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor
from transformers import PreTrainedModel

from ...modules.compatibility import check_deployable
from ...modules.compress import decompress
from ...modules.stage import stages_of
from ...modules.tokens.trace import Trace
from ..errors import RecipeError
from ..recipe.schema import Recipe
from ..run_folder import RunFolder, load_model
from ..tasks.base import task_named

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
# How many new tokens a model that generates is compared on.
NEW_TOKENS = 8


@dataclass(frozen=True)
class Settings:
    """How an export is written.

    Attributes:
        dtype: of the weights, a key of ``DTYPES``.
        shard_size: largest file of weights, as transformers reads it (``500MB``, ``5GB``).
    """

    dtype: str = "fp32"
    shard_size: str = "5GB"

    def __post_init__(self) -> None:
        if self.dtype not in DTYPES:
            raise RecipeError(f"--dtype {self.dtype}: there are {', '.join(DTYPES)}")
        number, unit = self.shard_size[:-2], self.shard_size[-2:].upper()
        if unit not in ("KB", "MB", "GB") or not number.isdecimal() or not int(number):
            raise RecipeError(f"--shard-size {self.shard_size}: give a whole number and KB, MB or GB, such as 500MB")


@dataclass(frozen=True)
class ExportSource:
    """A trained model and what is known about it.

    Attributes:
        run: the run, or an earlier export.
        recipe: that it was trained with.
        model: with its stages, in evaluation mode, float32; a format may change it as it writes.
        report: of the run; None where there is none.
        inputs: to compare answers on, a few rows.
    """

    run: RunFolder
    recipe: Recipe
    model: PreTrainedModel
    report: Mapping[str, Any] | None
    inputs: Mapping[str, Tensor]

    @staticmethod
    def open(folder: str) -> ExportSource:
        """From a run folder or an export. Raises RecipeError where it holds no trained model."""
        run = RunFolder.open(folder)
        recipe = run.read_recipe()
        model = load_model(run.trained()).eval()
        return ExportSource(
            run=run,
            recipe=recipe,
            model=model,
            report=run.read_report(),
            inputs=task_named(recipe.task).probe(model.config),
        )

    def batches(self) -> list[dict[str, Tensor]]:
        """The inputs together and the first of them alone, floating-point ones in the model's dtype."""
        given = {key: value.to(self.model.dtype) if value.is_floating_point() else value for key, value in self.inputs.items()}
        return [given, {key: value[:1] for key, value in given.items()}]

    @torch.no_grad()
    def left_out(self) -> list[str]:
        """What stages do to the tokens of an evaluation, one entry each; empty where the model answers as its backbone alone would.

        What it does is asked, not what it is called: it runs, and the trace tells.
        """
        stages = stages_of(self.model)
        if not stages:
            return []
        trace = Trace()
        self.model(**self.batches()[0], trace=trace)
        told = []
        for name, routing in trace.routings.items():
            kept, present = routing.counts()
            if kept < present:
                told.append(f"{name} keeps {routing.achieved:.3f} of its tokens")
            elif stages[name].whole and not stages[name].idle:
                told.append(f"{name} weighs what its layer adds (estimator {stages[name].config.part('estimator').name!r})")
            elif stages[name].merger.outputs is not None:
                told.append(f"{name} makes tokens of its own")
        return told

    def backbone(self) -> PreTrainedModel:
        """The model without stages where they do nothing in evaluation, else as it is. Changes it in place."""
        return decompress(self.model) if stages_of(self.model) and not self.left_out() else self.model


def generates(model: PreTrainedModel) -> bool:
    """Whether the model can generate, which stages that look ahead do not let it."""
    if not model.can_generate():
        return False
    try:
        check_deployable(stages_of(model).values())
    except ValueError:
        return False
    return True


@torch.no_grad()
def answers(model: PreTrainedModel, batches: list[dict[str, Tensor]]) -> list[dict[str, Tensor]]:
    """For each batch float32 ``logits`` and, of a model that generates, the ``generated`` token ids."""
    found, generation = [], cast(Any, model)
    for batch in batches:
        answer = {"logits": model(**batch).logits.float().contiguous()}
        if generates(model):
            answer["generated"] = generation.generate(**batch, max_new_tokens=NEW_TOKENS, do_sample=False)
        found.append(answer)
    return found
