"""The ``data`` block of recipes with text: documents that are packed into rows, or texts with one label each."""

from __future__ import annotations

from typing import Annotated, ClassVar, Literal

from pydantic import Field, model_validator

from ..recipe import DataRecipe

_FILES = ("json", "csv", "parquet")


class TextRecipe(DataRecipe):
    """What every kind of text has."""

    data_dir: str | None = Field(None, description="folder of the files of text")
    text_column: str | None = Field(
        None, description="column with the texts; none takes messages, prompt and completion, text, or the only column of strings"
    )
    sequence_length: Annotated[int, Field(ge=8)] = Field(512, description="tokens of a row, at most")
    tokenizer: str | None = Field(
        None,
        description="folder, tokenizer.json or hub name; none takes that of model.name, or trains one of model.config.vocab_size entries",
    )


class DocumentRecipe(TextRecipe):
    """Documents, packed into rows of ``sequence_length`` tokens: plain text, prompts with completions, or chats."""

    holds: ClassVar[str] = "text without labels"
    embedded: ClassVar[tuple[str, ...]] = ("python_library", "python_functions")
    known: ClassVar[tuple[str, ...]] = (*embedded, "text", *_FILES)

    name: str = Field(
        "python_library", description="python_library or python_functions, which come with Laconic; text, json, csv, parquet, or a hub name"
    )
    sample_by: Literal["line", "paragraph", "document"] = Field("document", description="data.name=text: what of a file is one document")
    streaming: bool = Field(False, description="read text as it is needed, in the order of the files, and keep none of it")

    @model_validator(mode="after")
    def _fits_the_name(self) -> DocumentRecipe:
        if self.streaming and self.name in self.embedded:
            raise ValueError(f"data.streaming = true: {self.name} is on this machine and small, leave data.streaming out")
        if self.sample_by != "document" and self.name != "text":
            raise ValueError(f"data.sample_by = {self.sample_by!r} cuts files of data.name = 'text', and it is {self.name!r}")
        return self


class LabelledTextRecipe(TextRecipe):
    """Texts, or pairs of them, with one label each."""

    holds: ClassVar[str] = "texts with one label each"
    known: ClassVar[tuple[str, ...]] = ("python_passages", *_FILES)

    name: str = Field("python_passages", description="python_passages, which come with Laconic; json, csv, parquet, or a hub name")
    second_text_column: str | None = Field(
        None, description="column with texts that stand behind those of text_column, as pairs; none has none"
    )
    label_column: str | None = Field(None, description="column with the labels; found by itself where it has a usual name")
    num_labels: Annotated[int, Field(ge=2)] | None = Field(None, description="number of classes; counted where it is not given")
