"""Configs that others wrote: loaded without running code, of a possible size, and with errors that name the place."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from transformers import AutoConfig, PretrainedConfig

from .whole_files import DamagedFile

# Far above any model, and still quick to build on the meta device.
LAYERS, PARAMETERS, NUMBER = 10_000, 10**13, 2**31
_DEPTHS = ("num_hidden_layers", "decoder_num_hidden_layers", "decoder_layers", "encoder_layers")
# Names that transformers offers for the sizes of most families.
_SIZES = (*_DEPTHS, "hidden_size", "intermediate_size", "vocab_size")


@contextlib.contextmanager
def settings_errors(where: str, kind: type[ValueError] = ValueError) -> Iterator[None]:
    """Context in which a model is built from settings: errors of other types become ValueErrors.

    Wrong settings raise errors of many types in torch, transformers and PEFT.

    Args:
        where: beginning of the message: the place of the settings.
        kind: class of the errors.
    """
    try:
        yield
    except (ValueError, FileNotFoundError, ImportError):
        raise
    except Exception as error:
        raise kind(f"{where}: {type(error).__name__}: {' '.join(str(error).split())[:500]}") from error


def load_config(place: str | Path, revision: str | None = None, **options: Any) -> PretrainedConfig:
    """The config of a folder or hub model.

    Args:
        place: folder or hub name.
        revision: revision of a hub model.
        options: other arguments of transformers' ``from_pretrained``.

    Raises:
        DamagedFile: there is no config, it cannot be used, or a size in it is absurd; the message names the place.
    """
    try:
        config = AutoConfig.from_pretrained(str(place), revision=revision, trust_remote_code=False, **options)
    except OSError as error:
        raise DamagedFile(f"{place} cannot be loaded: {str(error).splitlines()[0]}") from None
    except Exception as error:
        # transformers checks its configs with errors of many types.
        raise DamagedFile(f"{_file(place)} cannot be used: {type(error).__name__}: {' '.join(str(error).split())[:500]}") from None
    assert isinstance(config, PretrainedConfig)
    check_size(config, _file(place))
    return config


def architecture(config: PretrainedConfig, where: str) -> str:
    """Name of the class that a config names first. Raises DamagedFile if it names none."""
    given: Any = config.architectures
    name = given[0] if isinstance(given, list) and given else None
    if not isinstance(name, str):
        raise DamagedFile(f"{_file(where)}: architectures = {given!r} must be a list with the name of a model class")
    return name


def check_size(config: PretrainedConfig, where: str) -> None:
    """Raises DamagedFile if a model of a config could not be built anywhere, before memory is allocated or layers are counted one by one.

    Args:
        config: config of a model, which may contain others.
        where: place of the config, for the message.
    """
    for name, value in vars(config).items():
        if isinstance(value, PretrainedConfig):
            check_size(value, f"{where}: {name}")
        elif isinstance(value, int) and abs(value) > NUMBER and not name.startswith("_"):
            raise DamagedFile(f"{where}: {name} = {value} is larger than any model has: correct it")
    sizes = {name: value for name in _SIZES if isinstance(value := getattr(config, name, None), int)}
    for name in _DEPTHS:
        if sizes.get(name, 0) > LAYERS:
            raise DamagedFile(f"{where}: {name} = {sizes[name]} is deeper than any model: at most {LAYERS:,} layers can be built")
    hidden = sizes.get("hidden_size", 0)
    layer = 4 * hidden**2 + 2 * hidden * sizes.get("intermediate_size", 0)
    parameters = max(sizes.get(name, 0) for name in _DEPTHS) * layer + sizes.get("vocab_size", 0) * hidden
    if parameters > PARAMETERS:
        raise DamagedFile(
            f"{where}: hidden_size = {hidden} and the other sizes are those of about {parameters / 1e9:,.0f} billion parameters, "
            f"{4 * parameters / 2**40:,.0f} TiB: correct them"
        )


def _file(place: str | Path) -> str:
    return str(Path(place) / "config.json") if Path(place).is_dir() else str(place)
