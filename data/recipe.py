"""The ``data`` block of a recipe: keys of every kind of data. The kinds are in ``images/recipe.py`` and ``text/recipe.py``."""

from __future__ import annotations

from typing import Annotated, ClassVar

from pydantic import BaseModel, ConfigDict, Field

from .source import DataSource, SplitNames

Fraction = Annotated[float, Field(ge=0, le=1)]
Count = Annotated[int, Field(ge=1)]
# Builders of ``datasets`` that read the user's files.
_OF_FILES = ("imagefolder", "text", "json", "csv", "parquet")


class Block(BaseModel):
    """A block of a recipe; unknown keys are errors."""

    model_config = ConfigDict(extra="forbid", frozen=True, arbitrary_types_allowed=True)


class DataRecipe(Block):
    """The training data: a data set that comes with Laconic, files, or a data set of the hub.

    Attributes:
        holds: description of the rows, used in messages.
        known: values of ``name`` besides hub names: data sets that come with Laconic, and builders of files.
    """

    holds: ClassVar[str]
    known: ClassVar[tuple[str, ...]]

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
    train_samples: Count = Field(60_000, description="data that come with Laconic: training rows; an upper limit if they are files")
    eval_samples: Count = Field(
        2_000, description="data that come with Laconic: validation rows, and as many test rows; streaming: rows held out"
    )

    @property
    def source(self) -> DataSource:
        """Name, files and revision of the data set.

        Raises:
            ValueError: the data are files, and no files are named.
        """
        if self.name in _OF_FILES and self.data_dir is None and self.data_files is None:
            folder = "data.data_dir: the folder with one sub-folder of images for each class"
            raise ValueError(
                f"data.name = {self.name!r} needs {folder if self.name == 'imagefolder' else 'data.data_files or data.data_dir'}"
            )
        return DataSource(self.name, self.data_dir, self.data_files, self.config, self.revision)

    @property
    def splits(self) -> SplitNames:
        """Names of the splits."""
        return SplitNames(self.train_split, self.validation_split, self.test_split, self.validation_fraction)
