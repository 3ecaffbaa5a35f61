"""Finds a model class by its name in a config, among the model classes of transformers and Laconic only."""

from __future__ import annotations

import transformers
from transformers import PreTrainedModel

from ..heads import own_models
from ..layer import CLASS_PREFIX


def class_named(name: str, where: str) -> type[PreTrainedModel]:
    """The class that a config names; for a compressed model its original class.

    Args:
        name: name of the architecture.
        where: location of the config, for the message.

    Raises:
        ValueError: there is no model class of that name.
    """
    plain = name.removeprefix(CLASS_PREFIX) if isinstance(name, str) else ""
    found = own_models().get(plain) or getattr(transformers, plain, None)
    if not (isinstance(found, type) and issubclass(found, PreTrainedModel)):
        raise ValueError(f"{where} names the architecture {name!r}, which neither transformers {transformers.__version__} nor Laconic has")
    return found
