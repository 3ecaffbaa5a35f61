"""``plain``: an ordinary transformers model without routers, for methods that need none after training."""

from __future__ import annotations

from pathlib import Path

from transformers import PreTrainedModel

from ...errors import RecipeError
from ..base import ANSWER, Format, auto_class, base_name
from ..source import ExportSource, Settings


class Plain(Format):
    """The backbone alone. Correct if every stage keeps all tokens in evaluation, as after a schedule that ended at full length.

    If all that the stages do is to leave whole layers out, it is the backbone without these layers.
    """

    without = ("laconic",)
    program = f"""
import json, os, transformers
{ANSWER}
def load(folder):
    with open(os.path.join(folder, "config.json")) as file:
        kind = getattr(transformers, json.load(file)["architectures"][0])
    model = whole(kind.from_pretrained(folder, output_loading_info=True, use_safetensors=True, trust_remote_code=False))
    return lambda batch: answer(model, batch)
"""

    @classmethod
    def check(cls, source: ExportSource) -> None:
        model = source.model
        import transformers

        if not hasattr(transformers, base_name(model)):
            raise RecipeError(f"--format plain: {base_name(model)} is a class of Laconic, which transformers lacks; use standalone")
        if effects := source.left_out():
            raise RecipeError(
                f"--format plain: {', '.join(effects)} in evaluation, so a model without routers would give other answers. The "
                "format is for training that ends at full length (budget.target = 1 with budget.start below it), or for stages around whole "
                "layers with keep = 0; use standalone, which does not need Laconic either"
            )

    @classmethod
    def write(cls, source: ExportSource, settings: Settings, folder: Path) -> None:
        source.backbone().save_pretrained(folder, max_shard_size=settings.shard_size)

    @classmethod
    def usage(cls, model: PreTrainedModel) -> str:
        return f"from transformers import {auto_class(model)}\n\nmodel = {auto_class(model)}.from_pretrained(folder)"
