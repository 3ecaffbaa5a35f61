"""The ``data`` block of recipes with chats about images."""

from __future__ import annotations

from typing import Annotated, ClassVar

from pydantic import Field

from ..embedded.question_kinds import QUESTIONS
from ..recipe import DataRecipe


class ChatRecipe(DataRecipe):
    """Chats about images: questions and answers that come with Laconic, files, or a data set of the hub."""

    holds: ClassVar[str] = "chats about images"
    embedded: ClassVar[tuple[str, ...]] = ("digit_questions",)
    known: ClassVar[tuple[str, ...]] = (*embedded, "json", "parquet")

    name: str = Field("digit_questions", description="digit_questions (comes with Laconic), json, parquet, or a hub name")
    data_dir: str | None = Field(None, description="folder of the files")
    kinds: list[str] = Field(
        list(QUESTIONS), description="kinds of questions that digit_questions asks: reading, counting, locating, presence, listing, naming"
    )
    chat_column: str | None = Field(None, description="column with the chats; null uses messages, conversations or conversation")
    image_column: str | None = Field(None, description="column with the image or the images of a row; null uses images or image")
    image_dir: str | None = Field(None, description="folder that the paths of images in rows start from; null is the current one")
    sequence_length: Annotated[int, Field(ge=8)] = Field(
        2048, description="largest number of tokens of a row, those of its images included; a longer row is bad"
    )
    packing: bool = Field(
        False,
        description="true packs the chats of a training batch into rows of sequence_length, counting of visual tokens those that the "
        "language model's layers keep on average; chats of a row do not see each other",
    )
    processor: str | None = Field(
        None, description="folder or hub name of the processor; null uses that of model.name, or makes one for a new model"
    )
    chat_template: str | None = Field(
        None, description="chat template in Jinja, a file or the text itself; null uses that of the processor. It is saved with it"
    )
    batch_size: Annotated[int, Field(ge=1, le=2**53)] = Field(32, description="rows per step and process, before accumulation")
    eval_batch_size: Annotated[int, Field(ge=1, le=2**53)] = Field(64, description="rows per step in validation and test")
