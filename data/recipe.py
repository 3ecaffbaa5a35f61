"""The ``data`` block of a recipe: what every kind of data has. The kinds are in ``images/recipe.py`` and ``text/recipe.py``."""

from __future__ import annotations

from typing import Annotated, ClassVar

from pydantic import BaseModel, ConfigDict, Field

from .source import DataSource, SplitNames

Fraction = Annotated[float, Field(ge=0, le=1)]
Count = Annotated[int, Field(ge=1)]
# Builders of ``datasets`` that read files of the user.
_OF_FILES = ("imagefolder", "text", "json", "csv", "parquet")


class Block(BaseModel):
    """A block of a recipe: unknown keys are errors."""

    model_config = ConfigDict(extra="forbid", frozen=True, arbitrary_types_allowed=True)


class DataRecipe(Block):
    """What is trained on: a data set that comes with Laconic, files, or a data set of the hub.

    Attributes:
        holds: what its rows are, in messages.
        known: values of ``name`` that it reads beside hub names: data sets that come with Laconic and builders of files.
    """

    holds: ClassVar[str]
    known: ClassVar[tuple[str, ...]]

    name: str = Field(description="a data set that comes with Laconic, a kind of files, or a hub name")
    data_dir: str | None = Field(None, description="folder of the files")
    data_files: str | list[str] | dict[str, str | list[str]] | None = Field(None, description="files, or files by split")
    config: str | None = Field(None, description="configuration of a hub data set")
    revision: str | None = Field(None, description="revision of a hub data set")
    train_split: str = Field("train", description="split to train on")
    validation_split: str | None = Field(None, description="split to validate on; none takes validation_fraction of the training rows")
    test_split: str | None = Field(None, description="split to report on; none reports on validation")
    validation_fraction: Annotated[float, Field(gt=0, lt=1)] = Field(
        0.1, description="share of training rows held out when there is no split"
    )
    max_bad_fraction: Fraction = Field(0.0, description="share of bad rows past which the run stops")
    batch_size: Count = Field(128, description="rows a step and process, before accumulation")
    eval_batch_size: Count = Field(256, description="rows a step of validation and test")
    workers: Annotated[int, Field(ge=0)] = Field(0, description="loader processes; 0 loads in the training process")
    train_samples: Count = Field(60_000, description="data that come with Laconic: training rows, at most so many where they are files")
    eval_samples: Count = Field(
        2_000, description="data that come with Laconic: validation rows, and as many for test; streaming: rows held out"
    )

    @property
    def source(self) -> DataSource:
        """Where the rows come from.

        Raises:
            ValueError: files are read, and none are named.
        """
        if self.name in _OF_FILES and self.data_dir is None and self.data_files is None:
            folder = "data.data_dir: the folder with one sub-folder of images a class"
            raise ValueError(
                f"data.name = {self.name!r} needs {folder if self.name == 'imagefolder' else 'data.data_files or data.data_dir'}"
            )
        return DataSource(self.name, self.data_dir, self.data_files, self.config, self.revision)

    @property
    def splits(self) -> SplitNames:
        """Which splits are read."""
        return SplitNames(self.train_split, self.validation_split, self.test_split, self.validation_fraction)
