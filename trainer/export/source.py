"""The model to export, with its recipe, its report and inputs for a comparison."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor
from transformers import PreTrainedModel

from ...modules.checkpoints.foreign_config import settings_errors
from ...modules.checkpoints.keeps import set_keep
from ...modules.compatibility import check_deployable
from ...modules.compress import decompress, only_skips, without_skipped
from ...modules.stage import stages_of
from ...modules.tokens.trace import Trace
from ..errors import RecipeError
from ..recipe.schema import Recipe
from ..run_folder import RunFolder, load_model
from ..tasks.base import PROBES, task_named

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
# Number of new tokens on which a generating model is compared.
NEW_TOKENS = 8


@dataclass(frozen=True)
class Settings:
    """How an export is written.

    Attributes:
        dtype: dtype of the weights, a key of ``DTYPES``.
        shard_size: largest size of a weight file, in transformers' form (``500MB``, ``5GB``).
    """

    dtype: str = "fp32"
    shard_size: str = "5GB"

    def __post_init__(self) -> None:
        if self.dtype not in DTYPES:
            raise RecipeError(f"--dtype {self.dtype} does not exist: the dtypes are {', '.join(DTYPES)}")
        number, unit = self.shard_size[:-2], self.shard_size[-2:].upper()
        if unit not in ("KB", "MB", "GB") or not number.isdecimal() or not int(number):
            raise RecipeError(f"--shard-size {self.shard_size} must be a whole number and KB, MB or GB, such as 500MB")


@dataclass(frozen=True)
class ExportSource:
    """A trained model with its recipe and report.

    Attributes:
        run: folder of the run or of an earlier export.
        recipe: recipe of the training.
        model: model with its stages, in evaluation mode, float32; a format may change it while writing.
        report: report of the run; None if there is none.
        inputs: a few rows on which answers are compared.
        keep: another keep of all stages than the trained one, which the model has; None if it is the trained one.
    """

    run: RunFolder
    recipe: Recipe
    model: PreTrainedModel
    report: Mapping[str, Any] | None
    inputs: Mapping[str, Tensor]
    keep: float | None = None

    @staticmethod
    def open(folder: str, whole: bool = False, keep: float | None = None) -> ExportSource:
        """The model of a run folder or an export.

        Args:
            folder: the folder.
            whole: the inputs have the recipe's length, not only some tokens: a graph is fixed to the length of its inputs.
            keep: another keep for all stages; what the run measured is then left out, as it was measured with its own.

        Raises:
            RecipeError: the folder has no trained model.
        """
        run = RunFolder.open(folder)
        recipe = run.read_recipe()
        model = load_model(run.trained()).eval()
        task, report = task_named(recipe.task), run.read_report()
        if keep is not None:
            with settings_errors("--keep", RecipeError):
                set_keep(model, keep)
            report = None if report is None else {"versions": report.get("versions")}
        size = task.size(recipe)
        return ExportSource(
            run=run,
            recipe=recipe,
            model=model,
            report=report,
            inputs=task.probe(model.config, size if whole and isinstance(size, int) else None),
            keep=keep,
        )

    def batches(self) -> list[dict[str, Tensor]]:
        """Two batches: all rows of the inputs, and the first row alone. Floating-point inputs have the model's dtype."""
        given = {key: value.to(self.model.dtype) if value.is_floating_point() else value for key, value in self.inputs.items()}
        # An input may have several entries for a row, as many for each.
        return [given, {key: value[: len(value) // PROBES] for key, value in given.items()}]

    @torch.no_grad()
    def left_out(self) -> list[str]:
        """Effects of stages on the tokens in evaluation, one entry each; empty if the backbone, or some of its layers, gives the same answers.

        Found from the trace of a forward, not from the names of parts.
        """
        stages = stages_of(self.model)
        if not stages or only_skips(self.model):
            return []
        trace = Trace()
        self.model(**self.batches()[0], trace=trace)
        effects = []
        for name, routing in trace.routings.items():
            kept, present = routing.counts()
            if kept < present:
                effects.append(f"{name} keeps {routing.achieved:.3f} of its tokens")
            elif stages[name].whole and not stages[name].idle:
                effects.append(f"{name} weighs the output of its layer (estimator {stages[name].config.part('estimator').name!r})")
            elif stages[name].merger.outputs is not None:
                effects.append(f"{name} makes new tokens")
        return effects

    def backbone(self) -> PreTrainedModel:
        """The model without stages if they have no effect in evaluation, or without the layers that they leave out; otherwise unchanged.

        Removes them in place.
        """
        if only_skips(self.model):
            return without_skipped(self.model)
        return decompress(self.model) if stages_of(self.model) and not self.left_out() else self.model


def generates(model: PreTrainedModel) -> bool:
    """True if the model can generate; models with non-causal stages cannot."""
    if not model.can_generate():
        return False
    try:
        check_deployable(stages_of(model).values())
    except ValueError:
        return False
    return True


@torch.no_grad()
def answers(model: PreTrainedModel, batches: list[dict[str, Tensor]]) -> list[dict[str, Tensor]]:
    """Float32 ``logits`` of each batch and, for models that generate, ``generated`` token ids."""
    found, generation = [], cast(Any, model)
    for batch in batches:
        answer = {"logits": model(**batch).logits.float().contiguous()}
        if generates(model):
            answer["generated"] = generation.generate(**batch, max_new_tokens=NEW_TOKENS, do_sample=False)
        found.append(answer)
    return found
