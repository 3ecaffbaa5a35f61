"""The ``data`` block of a recipe: keys of every kind of data. The kinds are in ``images/recipe.py`` and ``text/recipe.py``."""

from __future__ import annotations

import types
import typing
from collections.abc import Iterator
from dataclasses import is_dataclass
from typing import Annotated, Any, ClassVar

from pydantic import BaseModel, ConfigDict, Field, ValidationInfo, field_validator

from .source import OF_FILES, DataSource, SplitNames

Fraction = Annotated[float, Field(ge=0, le=1)]
Count = Annotated[int, Field(ge=1, le=2**53)]
# Rows of data that come with Laconic; some keep a number for each.
Rows = Annotated[int, Field(ge=1, le=10**8)]


class Block(BaseModel):
    """A block of a recipe; unknown keys are errors, and so are true, infinity and NaN in place of a number."""

    model_config = ConfigDict(extra="forbid", frozen=True, arbitrary_types_allowed=True, allow_inf_nan=False)

    @field_validator("*", mode="before")
    @classmethod
    def _no_flag_as_number(cls, value: Any, info: ValidationInfo) -> Any:
        # pydantic takes true for 1.
        for path, flag in _flags(value, cls.model_fields[str(info.field_name)].annotation, str(info.field_name)):
            place = "" if path == info.field_name else f" ({path})"
            raise ValueError(f"{str(flag).lower()} is neither a number nor a text{place}")
        return value


def _flags(value: Any, annotation: Any, path: str) -> Iterator[tuple[str, bool]]:
    """Path and value of every bool in a value whose annotation does not allow one. Blocks check their own keys."""
    options = _options(annotation)
    if isinstance(value, bool):
        if bool not in options and Any not in options:
            yield path, value
    elif isinstance(value, list | tuple):
        inner = [item for option in options if typing.get_origin(option) in (list, tuple) for item in typing.get_args(option)]
        for index, item in enumerate(value) if inner else ():
            yield from _flags(item, typing.Union[tuple(inner)], f"{path}.{index}")  # noqa: UP007 - of a tuple
    elif isinstance(value, dict):
        for option in options:
            if is_dataclass(option):
                fields = typing.get_type_hints(option)
                for key in value.keys() & fields.keys():
                    yield from _flags(value[key], fields[key], f"{path}.{key}")
            elif typing.get_origin(option) is dict:
                for key, item in value.items():
                    yield from _flags(item, typing.get_args(option)[1], f"{path}.{key}")


def _options(annotation: Any) -> list[Any]:
    """Members of a union; the type itself if it is none. Constraints are removed."""
    origin = typing.get_origin(annotation)
    if origin is Annotated:
        return _options(typing.get_args(annotation)[0])
    if origin is typing.Union or origin is types.UnionType:
        return [option for member in typing.get_args(annotation) for option in _options(member)]
    return [annotation]


class DataRecipe(Block):
    """The training data: a data set that comes with Laconic, files, or a data set of the hub.

    Attributes:
        holds: description of the rows, used in messages.
        known: values of ``name`` besides hub names: data sets that come with Laconic, and builders of files.
        predicts_next: whether every token of the rows predicts the next one.
    """

    holds: ClassVar[str]
    known: ClassVar[tuple[str, ...]]
    predicts_next: ClassVar[bool] = False

    name: str = Field(description="a data set that comes with Laconic, a type of files, or a hub name")
    data_dir: str | None = Field(None, description="folder of the files")
    data_files: str | list[str] | dict[str, str | list[str]] | None = Field(None, description="files, or a mapping of split to files")
    config: str | None = Field(None, description="configuration of a hub data set")
    revision: str | None = Field(None, description="revision of a hub data set")
    train_split: str = Field("train", description="split for training")
    validation_split: str | None = Field(None, description="split for validation; null holds out validation_fraction of the training rows")
    test_split: str | None = Field(None, description="split for the final report; null reports on validation")
    validation_fraction: Annotated[float, Field(gt=0, lt=1)] = Field(
        0.1, description="share of the training rows held out if there is no validation split"
    )
    max_bad_fraction: Fraction = Field(0.0, description="largest allowed share of bad rows; the run stops above it")
    batch_size: Count = Field(128, description="rows per step and process, before accumulation")
    eval_batch_size: Count = Field(256, description="rows per step in validation and test")
    workers: Annotated[int, Field(ge=0)] = Field(0, description="loader processes; 0 loads in the training process")
    train_samples: Rows = Field(60_000, description="data that come with Laconic: training rows; an upper limit if they are files")
    eval_samples: Rows = Field(
        2_000, description="data that come with Laconic: validation rows, and as many test rows; streaming: rows held out"
    )

    @property
    def source(self) -> DataSource:
        """Name, files and revision of the data set.

        Raises:
            ValueError: the data are files, and no files are named.
        """
        if self.name in OF_FILES and self.data_dir is None and self.data_files is None:
            folder = "data.data_dir: the folder with one sub-folder of images for each class"
            raise ValueError(
                f"data.name = {self.name!r} needs {folder if self.name == 'imagefolder' else 'data.data_files or data.data_dir'}"
            )
        return DataSource(self.name, self.data_dir, self.data_files, self.config, self.revision)

    @property
    def splits(self) -> SplitNames:
        """Names of the splits."""
        return SplitNames(self.train_split, self.validation_split, self.test_split, self.validation_fraction)
