"""The shared parts of text tasks: tokenizer, row length, page of kept tokens."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor
from transformers import PretrainedConfig, PreTrainedModel

from ...data.splits import Splits
from ...data.text.recipe import TextRecipe
from ...data.text.tokenizer import load_tokenizer, trained_tokenizer
from ...modules.tokens.trace import Trace
from ..build.initial_weights import start_of
from ..metrics.kept_places import kept_parts
from ..recipe.schema import Recipe
from ..run_folder import TOKENIZER, RunFolder
from ..show.inspection import inspect_text
from .base import PROBES, Task, check_teacher_itself

_PROBE_TOKENS = 32


class TextTask(Task):
    """A task whose model input is ``input_ids``.

    Attributes:
        framed: whether texts have a first and a last token, as encoders require; otherwise a token ends each document.
    """

    unit: ClassVar[str] = "tokens"
    controls: ClassVar[tuple[str, ...]] = ("random", "uniform_grid")
    framed: ClassVar[bool] = False

    @classmethod
    def check(cls, recipe: Recipe) -> None:
        check_teacher_itself(recipe)
        if recipe.model.encoder_of is not None:
            raise ValueError(f"model.encoder_of is for images, and task = {recipe.task} has text: set model.name or model.config")

    @classmethod
    def of_run(cls, recipe: Recipe, run: RunFolder) -> Recipe:
        # The tokenizer beside the weights: a new one would depend on the files of this Python version.
        folder = run.with_file(TOKENIZER)
        if folder is None:
            return recipe
        return recipe.model_copy(update={"data": recipe.data.model_copy(update={"tokenizer": str(folder)})})

    @classmethod
    def size(cls, recipe: Recipe) -> int:
        data = recipe.data
        assert isinstance(data, TextRecipe)
        return data.sequence_length

    @classmethod
    def tokenizer_of(cls, recipe: Recipe, config: PretrainedConfig) -> Callable[[Iterable[str] | None], Any]:
        """A function from the training texts (None if rows have prompts) to the tokenizer: the recipe's, that of the weights, or a new one.

        Args:
            recipe: recipe that names a tokenizer or weights.
            config: config of the model; a new tokenizer has its vocabulary size.
        """

        def tokenizer(texts: Iterable[str] | None) -> Any:
            data = recipe.data
            assert isinstance(data, TextRecipe)
            if data.tokenizer is not None:
                return load_tokenizer(data.tokenizer, ends=not cls.framed)
            if (start := start_of(recipe.model)) is not None:
                return load_tokenizer(*start.beside(TOKENIZER), ends=not cls.framed)
            if texts is None:
                raise ValueError("data.tokenizer is missing: a tokenizer can be trained on plain texts only, and these rows have prompts")
            size: int = config.get_text_config().vocab_size
            return trained_tokenizer(texts, size, framed=cls.framed)

        return tokenizer

    @classmethod
    def fit_config(cls, config: PretrainedConfig, data: Splits) -> None:
        text: Any = data
        inner: Any = config.get_text_config()
        entries = len(text.tokenizer)
        if inner.vocab_size < entries:
            cure = "model.resize_vocabulary=true" if config.name_or_path else f"model.config.vocab_size={entries} or more"
            raise ValueError(
                f"the tokenizer has {entries} entries and the model {inner.vocab_size}: set {cure}, or data.tokenizer to the model's own"
            )
        longest = getattr(inner, "max_position_embeddings", None)
        if longest is not None and longest < text.length:
            raise ValueError(f"data.sequence_length = {text.length} is more than the model's max_position_embeddings = {longest}: lower it")

    @classmethod
    def probe(cls, config: PretrainedConfig, tokens: int | None = None) -> dict[str, Tensor]:
        size: int = config.get_text_config().vocab_size
        return {"input_ids": torch.randint(size, (PROBES, tokens or _PROBE_TOKENS), generator=torch.Generator().manual_seed(0))}

    @classmethod
    def at_length(cls, recipe: Recipe, config: PretrainedConfig, length: int) -> list[str]:
        longest = getattr(config.get_text_config(), "max_position_embeddings", None)
        given = [f"data.sequence_length={length}"]
        if longest is None or length <= longest:
            return given
        if recipe.model.config is None:
            raise ValueError(f"rows of text may have as many tokens as the model's max_position_embeddings = {longest}")
        return [*given, f"model.config.max_position_embeddings={length}"]

    @classmethod
    def noise(cls, config: PretrainedConfig, rows: int, length: int) -> dict[str, Any]:
        size: int = config.get_text_config().vocab_size
        ids = torch.randint(size, (rows, length), generator=torch.Generator().manual_seed(0))
        return {"input_ids": ids, "attention_mask": torch.ones_like(ids), "sample_ids": torch.arange(rows), "tokens": ids.numel()}

    @classmethod
    def kept_cells(cls, model: PreTrainedModel, trace: Trace, batch: Mapping[str, Any]) -> dict[str, list[Tensor]]:
        real = batch["attention_mask"] if "attention_mask" in batch else batch["documents"] >= 0
        return kept_parts(trace, real.sum(1))

    @classmethod
    def inspect(cls, target: str, recipe: Recipe, model: PreTrainedModel, given: str | None, to: Path) -> Mapping[str, float]:
        if to.suffix != ".html":
            raise ValueError(f"--to {to}: kept tokens of a text need the suffix .html")
        data: Any = cls.open_data(recipe, model.config)
        text = cls.held_out(data) if given is None else cls.given_text(given)
        return inspect_text(model, data.tokenizer, text, data.length, f"{target}: tokens by stage", to)

    @classmethod
    def held_out(cls, data: Any) -> str:
        """The first text of the test split."""
        raise NotImplementedError

    @classmethod
    def given_text(cls, given: str) -> str:
        """The text of a file, or ``given`` itself if it is not the name of a file."""
        # A long text is not a file name, and asking the system about it would raise an error.
        path = Path(given) if len(given) < 255 and "\n" not in given else None
        return path.read_text("utf-8-sig", "replace") if path is not None and path.is_file() else given
