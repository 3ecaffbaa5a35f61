"""The interface of export formats, and what they share."""

from __future__ import annotations

from pathlib import Path
from typing import ClassVar

from transformers import PreTrainedModel

from ...modules import registry
from ...modules.stage import stages_of
from ..errors import RecipeError
from .source import DTYPES, ExportSource, Settings

_FOLDER = f"{__package__}.formats"

# Program text for clean processes: a transformers model's answers. NEW_TOKENS is set by the process; 0 generates nothing.
ANSWER = """
import torch

@torch.no_grad()
def answer(model, batch):
    for parameter in model.parameters():
        # Memory-mapped weights have any alignment, which changes the rounding of matrix products: copies give bit-equal answers.
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
    """One file format of a trained model. Stateless, used as a class; its name is that of its file, with hyphens.

    Attributes:
        tolerance: largest allowed difference between the logits of the export and of the original model, ÷ the largest logit.
        dtypes: dtypes that the weights can have.
        hugging_face: whether the folder is a transformers folder, which has the recipe and works with ``laconic evaluate``.
        with_code: whether the folder may have Python code.
        without: packages that are blocked in the verifying process, to prove that the export does not need them.
        program: Python of the verifying process; defines ``load(folder)``, which returns a function from a batch's tensors by name to
            the answer's tensors by name.
        tensors: tensor library of the program, ``torch`` or ``numpy``.
    """

    tolerance: ClassVar[float] = 1e-5
    dtypes: ClassVar[tuple[str, ...]] = tuple(DTYPES)
    hugging_face: ClassVar[bool] = True
    with_code: ClassVar[bool] = True
    without: ClassVar[tuple[str, ...]] = ()
    program: ClassVar[str]
    tensors: ClassVar[str] = "torch"

    @classmethod
    def requirements(cls) -> None:
        """Raises RecipeError, with the cure, if a package is missing that writing or verifying needs."""

    @classmethod
    def check(cls, source: ExportSource) -> None:
        """Raises RecipeError, with the reason, if this model cannot be written in the format. Called before writing."""

    @classmethod
    def reference(cls, source: ExportSource) -> PreTrainedModel:
        """The model whose answers the export must give, as the export computes them."""
        return source.model

    @classmethod
    def write(cls, source: ExportSource, settings: Settings, folder: Path) -> None:
        """Writes the model, which has the requested dtype already; the format may change the model."""
        raise NotImplementedError

    @classmethod
    def usage(cls, model: PreTrainedModel) -> str:
        """Python code for the model card that loads the export from ``folder``.

        Args:
            model: the model before writing.
        """
        raise NotImplementedError


def names() -> list[str]:
    """Names of the formats, as on the command line."""
    return [name.replace("_", "-") for name in registry.names(_FOLDER)]


def format_named(name: str) -> type[Format]:
    """The format of a name. Raises RecipeError with the existing names."""
    if name not in names():
        raise RecipeError(f"--format {name} does not exist: the formats are {', '.join(names())}")
    return registry.find(_FOLDER, name.replace("-", "_"), Format)


def auto_class(model: PreTrainedModel) -> str:
    """Name of the transformers Auto class that loads this kind of model."""
    import transformers
    from transformers.models import auto

    name = base_name(model)
    # Most class names, and all of Laconic's own, contain the name of the Auto class.
    guess = f"AutoModelFor{name.partition('For')[2]}"
    if hasattr(transformers, guess):
        return guess
    for candidate in sorted(item for item in auto.__all__ if item.startswith("AutoModelFor")):
        known = getattr(auto, candidate)._model_mapping._model_mapping.get(model.config.model_type, ())
        if name in ((known,) if isinstance(known, str) else known):
            return candidate
    return "AutoModel"


def base_name(model: PreTrainedModel) -> str:
    """Name of the transformers class of a compressed or dense model."""
    from ...modules.layer import CLASS_PREFIX

    return type(model).__name__.removeprefix(CLASS_PREFIX)


def compressed(model: PreTrainedModel) -> bool:
    """True if the model has stages."""
    return bool(stages_of(model))
