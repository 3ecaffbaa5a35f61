"""What every format shares."""

from __future__ import annotations

from pathlib import Path
from typing import ClassVar

from transformers import PreTrainedModel

from ...modules import registry
from ...modules.stage import stages_of
from ..errors import RecipeError
from .source import DTYPES, ExportSource, Settings

_FOLDER = f"{__package__}.formats"

# Answers of a model of transformers, for programs of clean processes, which know how many NEW_TOKENS are asked for.
ANSWER = """
import torch

@torch.no_grad()
def answer(model, batch):
    for parameter in model.parameters():
        # A mapped file lies at any address, and matrix products round by address: fresh memory answers bit for bit.
        parameter.data = parameter.data.clone()
    found = {"logits": model(**batch).logits.float().contiguous()}
    if NEW_TOKENS:
        found["generated"] = model.generate(**batch, max_new_tokens=NEW_TOKENS, do_sample=False)
    return found

def whole(loaded):
    model, report = loaded
    wrong = {key: sorted(map(str, report[key])) for key in ("missing_keys", "unexpected_keys", "mismatched_keys") if report.get(key)}
    if wrong:
        raise SystemExit(f"the weights do not fit: {wrong}")
    return model.eval()
"""


class Format:
    """One way to write a trained model. Stateless, used as a class; its name is its file's, with hyphens.

    Attributes:
        tolerance: largest difference between the answers of the export and of the model as it stood here.
        dtypes: that its weights can have.
        hugging_face: the folder is one of transformers: with the recipe, and as a model for ``laconic evaluate``.
        without: packages that the verifying process does not have, so that the export is seen to need none of them.
        program: of the verifying process: Python that defines ``load(folder)``, which gives a function from the tensors of a batch,
            by name, to those of the answer.
        tensors: kind of tensor that the program works with, ``torch`` or ``numpy``.
    """

    tolerance: ClassVar[float] = 1e-5
    dtypes: ClassVar[tuple[str, ...]] = tuple(DTYPES)
    hugging_face: ClassVar[bool] = True
    without: ClassVar[tuple[str, ...]] = ()
    program: ClassVar[str]
    tensors: ClassVar[str] = "torch"

    @classmethod
    def requirements(cls) -> None:
        """Raises RecipeError, with the cure, where a package is missing that writing or verifying needs."""

    @classmethod
    def check(cls, source: ExportSource) -> None:
        """Raises RecipeError, with the reason, where this very model cannot be written so. Called before anything is written."""

    @classmethod
    def write(cls, source: ExportSource, settings: Settings, folder: Path) -> None:
        """Writes the model, whose dtype has been set; the format may leave it changed."""
        raise NotImplementedError

    @classmethod
    def usage(cls, model: PreTrainedModel) -> str:
        """Python that loads the export from ``folder`` and answers, for the model card.

        Args:
            model: as it was before writing.
        """
        raise NotImplementedError


def names() -> list[str]:
    """The formats there are, as the command line calls them."""
    return [name.replace("_", "-") for name in registry.names(_FOLDER)]


def format_named(name: str) -> type[Format]:
    """A format by its name. Raises RecipeError naming those there are."""
    if name not in names():
        raise RecipeError(f"--format {name}: there are {', '.join(names())}")
    return registry.find(_FOLDER, name.replace("-", "_"), Format)


def auto_class(model: PreTrainedModel) -> str:
    """Name of the Auto class of transformers that loads models of this kind."""
    import transformers
    from transformers.models import auto

    name = base_name(model)
    # Most classes, and all of our own, say in their names what they are for.
    said = f"AutoModelFor{name.partition('For')[2]}"
    if hasattr(transformers, said):
        return said
    for candidate in sorted(item for item in auto.__all__ if item.startswith("AutoModelFor")):
        known = getattr(auto, candidate)._model_mapping._model_mapping.get(model.config.model_type, ())
        if name in ((known,) if isinstance(known, str) else known):
            return candidate
    return "AutoModel"


def base_name(model: PreTrainedModel) -> str:
    """Name of the class that a model, compressed or not, has in transformers."""
    from ...modules.layer import CLASS_PREFIX

    return type(model).__name__.removeprefix(CLASS_PREFIX)


def compressed(model: PreTrainedModel) -> bool:
    """Whether the model has stages."""
    return bool(stages_of(model))
