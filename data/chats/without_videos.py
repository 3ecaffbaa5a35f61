"""Processors of families that read videos too, loaded without their part for videos, which needs torchvision."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, ClassVar

from transformers import AutoConfig, ProcessorMixin
from transformers.models.auto.processing_auto import PROCESSOR_MAPPING, processor_class_from_name
from transformers.models.auto.video_processing_auto import get_video_processor_config
from transformers.utils import cached_file

_VIDEOS = "video_processor"
# Files that name the class of a processor, in the order in which transformers reads them.
_NAMED_IN = ("processor_config.json", "preprocessor_config.json", "tokenizer_config.json")


class WithoutVideos(ProcessorMixin):  # type: ignore[misc]
    """Goes before the class of a processor. Reads images and text; the settings for videos are kept, and saved with the rest.

    Attributes:
        video_settings: settings of the part for videos, as they were saved.
    """

    video_settings: ClassVar[dict[str, Any]] = {}

    @classmethod
    def get_attributes(cls) -> list[str]:
        return [name for name in super().get_attributes() if name != _VIDEOS]

    @classmethod
    def _get_arguments_from_pretrained(cls, *args: Any, **kwargs: Any) -> list[Any]:
        found = iter(super()._get_arguments_from_pretrained(*args, **kwargs))
        return [None if name == _VIDEOS else next(found) for name in super().get_attributes()]

    def to_dict(self) -> dict[str, Any]:
        found: dict[str, Any] = super().to_dict()
        return found | ({_VIDEOS: self.video_settings} if self.video_settings else {})


def without_videos(of_images: type[Any], settings: dict[str, Any]) -> type[Any]:
    """A class of processors without its part for videos.

    Args:
        of_images: class of processors, of transformers.
        settings: settings of the part for videos, as they were saved.
    """
    # Saved under the name of the class that others load it with.
    return type(of_images.__name__, (WithoutVideos, of_images), {"__module__": __name__, "video_settings": settings})


def load_without_videos(source: str, revision: str | None) -> Any:
    """The processor of a folder or hub name without its part for videos; None if it has no such part.

    Args:
        source: folder or hub name.
        revision: revision on the hub.

    Raises:
        OSError, ValueError, ImportError: it cannot be loaded.
    """
    of_images = _class_of(source, revision)
    if of_images is None or _VIDEOS not in of_images.get_attributes():
        return None
    reduced = without_videos(of_images, get_video_processor_config(source, revision=revision))
    return reduced.from_pretrained(source, revision=revision or "main", trust_remote_code=False, backend="pil")


def _class_of(source: str, revision: str | None) -> Any:
    """Class of a saved processor; None if no file says it."""
    for name in _NAMED_IN:
        file = cached_file(
            source,
            name,
            revision=revision,
            _raise_exceptions_for_missing_entries=False,
            _raise_exceptions_for_connection_errors=False,
            _raise_exceptions_for_gated_repo=False,
        )
        named = None if file is None else json.loads(Path(file).read_text("utf-8")).get("processor_class")
        if named is not None:
            return processor_class_from_name(named)
    try:
        config = AutoConfig.from_pretrained(source, revision=revision, trust_remote_code=False)
    except ValueError:
        return None
    return PROCESSOR_MAPPING.get(type(config), None)
