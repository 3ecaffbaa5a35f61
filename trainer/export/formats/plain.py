"""``plain``: an ordinary model of transformers without any router, where the method needs none after training."""

from __future__ import annotations

from pathlib import Path

import torch
from transformers import PreTrainedModel

from ....modules.compress import decompress, stages_of
from ....modules.state import Trace
from ...recipe_files import RecipeError
from ..base import ANSWER, Format, auto_class, base_name, compressed
from ..source import Settings, Source


class Plain(Format):
    """The backbone alone. Right where every stage lets all tokens through in evaluation: bypasses of training only, schedules that
    ended at full length. What a model does is asked, not what it is called: it runs, and the trace tells."""

    without = ("laconic",)
    program = f"""
import json, os, transformers
{ANSWER}
def load(folder):
    with open(os.path.join(folder, "config.json")) as file:
        kind = getattr(transformers, json.load(file)["architectures"][0])
    model = whole(kind.from_pretrained(folder, output_loading_info=True, use_safetensors=True))
    return lambda batch: answer(model, batch)
"""

    @classmethod
    def check(cls, source: Source) -> None:
        model = source.model
        import transformers

        if not hasattr(transformers, base_name(model)):
            raise RecipeError(f"--format plain: {base_name(model)} is a class of Laconic, which transformers lacks; take standalone")
        if not compressed(model):
            return
        trace = Trace()
        with torch.no_grad():
            model(**source.batches()[0], trace=trace)
        short = {name: routing.achieved for name, routing in trace.routings.items() if routing.counts()[0] < routing.counts()[1]}
        made = [name for name, (_, stage) in stages_of(model).items() if stage.merger.outputs is not None]
        if short or made:
            told = [f"{name} keeps {achieved:.3f} of its tokens" for name, achieved in short.items()]
            told += [f"{name} makes tokens of its own" for name in made if name not in short]
            raise RecipeError(
                f"--format plain: {', '.join(told)} in evaluation, and a model without routers would answer otherwise. It is for training "
                "that ends at full length (budget.target = 1 with budget.start below it); take standalone, which needs no Laconic either"
            )

    @classmethod
    def write(cls, source: Source, settings: Settings, folder: Path) -> None:
        model = decompress(source.model) if compressed(source.model) else source.model
        model.save_pretrained(folder, max_shard_size=settings.shard_size)

    @classmethod
    def usage(cls, model: PreTrainedModel) -> str:
        return f"from transformers import {auto_class(model)}\n\nmodel = {auto_class(model)}.from_pretrained(folder)"
