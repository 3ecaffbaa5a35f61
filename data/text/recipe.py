"""The ``data`` block of recipes with text: documents packed into rows, or texts with one label each."""

from __future__ import annotations

from typing import Annotated, ClassVar, Literal

from pydantic import Field, model_validator

from ..recipe import DataRecipe, Rows

_FILES = ("json", "csv", "parquet")


class TextRecipe(DataRecipe):
    """Keys of every kind of text."""

    data_dir: str | None = Field(None, description="folder of the text files")
    text_column: str | None = Field(
        None,
        description="column with the texts or chats; null uses messages, conversations, prompt and completion, text, or the only one that fits",
    )
    sequence_length: Annotated[int, Field(ge=8)] = Field(512, description="largest number of tokens of a row")
    tokenizer: str | None = Field(
        None,
        description="folder, tokenizer.json or hub name; null uses that of model.name, or trains one of model.config.vocab_size entries",
    )


class DocumentRecipe(TextRecipe):
    """Documents packed into rows of ``sequence_length`` tokens: plain text, prompts with completions, or chats."""

    holds: ClassVar[str] = "text without labels"
    predicts_next: ClassVar[bool] = True
    embedded: ClassVar[tuple[str, ...]] = ("python_library", "python_functions")
    known: ClassVar[tuple[str, ...]] = (*embedded, "text", *_FILES)

    name: str = Field(
        "python_library", description="python_library, python_functions (come with Laconic), text, json, csv, parquet, or a hub name"
    )
    sample_by: Literal["line", "paragraph", "document"] = Field("document", description="data.name=text: unit of a file that is a document")
    chat_template: str | None = Field(
        None,
        description="chat template in Jinja, a file or the text itself; null uses that of the tokenizer. It is saved with the tokenizer",
    )
    streaming: bool = Field(False, description="read text during training, in the order of the files, without storing it")

    @model_validator(mode="after")
    def _fits_the_name(self) -> DocumentRecipe:
        if self.streaming and self.name in self.embedded:
            raise ValueError(f"data.streaming = true is not supported for {self.name}, which is small and local: remove data.streaming")
        if self.sample_by != "document" and self.name != "text":
            raise ValueError(f"data.sample_by = {self.sample_by!r} applies to data.name = 'text', and data.name = {self.name!r}")
        return self


class PromptRecipe(TextRecipe):
    """Long prompts with short answers, one a row."""

    holds: ClassVar[str] = "prompts with answers"
    embedded: ClassVar[tuple[str, ...]] = ("function_prompts",)
    known: ClassVar[tuple[str, ...]] = (*embedded, *_FILES)

    name: str = Field("function_prompts", description="function_prompts (comes with Laconic), json, csv, parquet, or a hub name")
    sequence_length: Annotated[int, Field(ge=8)] = Field(1024, description="largest number of tokens of a row; a longer row is bad")
    chat_template: str | None = Field(
        None,
        description="chat template in Jinja, a file or the text itself; null uses that of the tokenizer. It is saved with the tokenizer",
    )
    lengths: Annotated[list[Annotated[int, Field(ge=64)]], Field(min_length=1)] = Field(
        [256, 512, 1024], description="tokens of the prompts of function_prompts, in turns"
    )
    questions: Annotated[int, Field(ge=1, le=16)] = Field(2, description="questions that function_prompts asks about the same functions")
    batch_size: Annotated[int, Field(ge=1, le=2**53)] = Field(8, description="rows per step and process, before accumulation")
    eval_batch_size: Annotated[int, Field(ge=1, le=2**53)] = Field(8, description="rows per step in validation and test")
    eval_samples: Rows = Field(600, description="function_prompts: validation rows, and as many test rows")

    @model_validator(mode="after")
    def _fits_the_length(self) -> PromptRecipe:
        if self.name in self.embedded and max(self.lengths) > self.sequence_length:
            raise ValueError(
                f"data.lengths = {self.lengths} has prompts of more tokens than data.sequence_length = {self.sequence_length}: raise it, or "
                "lower the lengths"
            )
        return self


class LabelledTextRecipe(TextRecipe):
    """Texts or pairs of texts, with one label each."""

    holds: ClassVar[str] = "texts with one label each"
    known: ClassVar[tuple[str, ...]] = ("python_passages", *_FILES)

    name: str = Field("python_passages", description="python_passages (comes with Laconic), json, csv, parquet, or a hub name")
    second_text_column: str | None = Field(None, description="column with the second text of each pair; null: rows are single texts")
    label_column: str | None = Field(None, description="column with the labels; null looks for a usual name")
    num_labels: Annotated[int, Field(ge=2)] | None = Field(None, description="number of classes; null counts them")
