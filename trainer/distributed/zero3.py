"""Models whose parameters are partitioned over ranks (ZeRO-3): building them in shards, and gathering them for saving."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.initialization import no_init_weights

from ...modules.checkpoints.adapter_folder import write_adapter
from ...modules.checkpoints.adapter_saving import adapter_of
from ...modules.checkpoints.base_weights import Base
from ...modules.checkpoints.whole_files import whole_folder, write_hashes
from ...modules.compressed_model import CompressedModel
from ..run_folder import RunFolder
from . import collective
from .deepspeed import join_deepspeed

# Writes files into the folder of the weights.
Beside = Callable[[Path], object]


def nothing_beside(folder: Path) -> None:
    """The default of ``beside``."""


def shape_of(parameter: nn.Parameter) -> torch.Size:
    """Shape of the whole parameter; a parameter partitioned by ZeRO-3 has an empty shape itself."""
    return torch.Size(getattr(parameter, "ds_shape", parameter.shape))


@contextlib.contextmanager
def zero3_init(config: Mapping[str, Any]) -> Iterator[None]:
    """Context in which every new module, routers too, is partitioned at once, so that no rank holds a whole model.

    The parameters have undefined values until ``broadcast_weights`` is called.

    Args:
        config: DeepSpeed's configuration.
    """
    import deepspeed

    join_deepspeed()
    # Initialisation would read parameters that are partitioned already, and draw in another order than a plain build.
    with deepspeed.zero.Init(config_dict_or_path=dict(config)), no_init_weights():
        yield


def broadcast_weights(model: PreTrainedModel, source: PreTrainedModel | None) -> None:
    """Copies the values of a plain model, which only rank 0 has, into a partitioned model.

    The weights therefore equal those of a plain build, random or loaded. While the model is built, rank 0 holds one whole copy in CPU
    memory.

    Raises:
        RuntimeError: the two models have different parameters.
    """
    import deepspeed

    # no_init_weights skips tying: without it a shared tensor would be two parameters here and one in the plain model.
    model.tie_weights()
    values = dict(source.named_parameters()) if source is not None else {}
    names = collective.from_rank_zero(lambda: {name: tuple(value.shape) for name, value in values.items()})
    found = {name: tuple(shape_of(parameter)) for name, parameter in model.named_parameters()}
    if names != found:
        raise RuntimeError(f"the model built in shards differs in parameters from the plain one: {_difference(names, found)}")
    for name, parameter in model.named_parameters():
        with torch.no_grad(), deepspeed.zero.GatheredParameters([parameter], modifier_rank=0):
            if source is not None:
                parameter.data.copy_(values[name])
    buffers = collective.from_rank_zero(lambda: {name: value.cpu() for name, value in source.named_buffers()} if source is not None else {})
    for name, buffer in model.named_buffers():
        buffer.copy_(buffers[name])


def gathered(model: nn.Module, includes: Callable[[str], bool] | None = None) -> dict[str, Tensor]:
    """Every parameter and persistent buffer, whole and on the CPU, on rank 0; empty on other ranks. Every rank must call this.

    Args:
        model: partitioned or whole model.
        includes: predicate for names; None includes all. Tied parameters share memory.

    Raises:
        RuntimeError: raised on every rank if a tensor is missing or differs in shape from the model's.
    """
    state: dict[str, Tensor] = {}
    expected: dict[str, tuple[int, ...]] = {}
    seen: dict[int, str] = {}
    parameters = dict(model.named_parameters(remove_duplicate=False))
    for name, value in model.state_dict(keep_vars=True).items():
        if includes is not None and not includes(name):
            continue
        parameter = parameters.get(name)
        expected[name] = tuple(value.shape if parameter is None else shape_of(parameter))
        if id(value) in seen:
            if collective.rank() == 0:
                state[name] = state[seen[id(value)]]
            continue
        seen[id(value)] = name
        if parameter is None or not hasattr(parameter, "ds_id"):
            whole: contextlib.AbstractContextManager[Any] = contextlib.nullcontext()
        else:
            import deepspeed

            whole = deepspeed.zero.GatheredParameters([parameter])
        with whole:
            if collective.rank() == 0:
                state[name] = (value if parameter is None else parameter).detach().cpu().clone()
    found = {name: tuple(value.shape) for name, value in state.items()}
    if collective.any_rank(collective.rank() == 0 and found != expected):
        raise RuntimeError(f"the model could not be gathered whole, and was not saved: {_difference(expected, found)}")
    return state


def save_model(model: PreTrainedModel, folder: Path, beside: Beside = nothing_beside) -> None:
    """Writes the final weights as safetensors with their config and hashes, on rank 0. Every rank must call this.

    Args:
        model: trained model.
        folder: folder to write; it exists completely or not at all.
        beside: writes further files into the folder.

    Raises:
        RuntimeError: the written files do not hold the whole model.
    """
    unsaved = set(getattr(model, "_keys_to_ignore_on_save", None) or ())
    state = gathered(model, lambda name: name not in unsaved)
    if collective.rank() == 0:
        with whole_folder(folder) as partial:
            # A copy of the mapping, because transformers empties it while writing.
            model.save_pretrained(partial, state_dict=dict(state))
            _check_written(partial, state, by_name=isinstance(model, CompressedModel))
            beside(partial)
            write_hashes(partial)
    collective.wait()


def save_trained(
    model: PreTrainedModel, folder: Path, base: Base | None, ratio: Mapping[str, Any] | None = None, beside: Beside = nothing_beside
) -> None:
    """Writes the weights of a run or checkpoint: ``model/`` with the whole model, or ``adapter/`` with the parts trained on a frozen base.

    Rank 0 writes; every rank must call this.

    Args:
        model: trained model.
        folder: folder of the run or checkpoint.
        base: frozen weights; None if everything trains.
        ratio: ratios for the adapter's manifest.
        beside: writes the files that the model's inputs need, such as a tokenizer, into the folder of the weights.

    Raises:
        RuntimeError: the written files do not hold the whole model, or a tensor was not gathered.
    """
    run = RunFolder(folder)
    if base is None:
        save_model(model, run.written(base), beside)
        return
    names = set(kept_names(model))
    state = gathered(model, lambda name: name in names)
    if collective.rank() == 0:
        with whole_folder(run.written(base)) as partial:
            write_adapter(adapter_of(model, base, state=state, ratio=ratio), partial)
            beside(partial)
            write_hashes(partial)
    collective.wait()


def kept_names(model: nn.Module) -> list[str]:
    """Names of trainable parameters and of all buffers: the content of a checkpoint on frozen weights."""
    frozen = {name for name, parameter in model.named_parameters(remove_duplicate=False) if not parameter.requires_grad}
    return [name for name in model.state_dict(keep_vars=True) if name not in frozen]


def _check_written(folder: Path, state: Mapping[str, Tensor], by_name: bool) -> None:
    """Raises RuntimeError if a folder does not hold the whole state. For a dense model, which transformers may save under names of older
    versions, only the number of values is compared."""
    from safetensors import safe_open

    written: dict[str, tuple[int, ...]] = {}
    for path in folder.glob("*.safetensors"):
        with safe_open(path, "pt") as file:
            written |= {name: tuple(file.get_slice(name).get_shape()) for name in file.keys()}  # noqa: SIM118 - no mapping
    expected = {name: tuple(value.shape) for name, value in state.items()}
    if not by_name:
        tensors = {value.data_ptr(): value.numel() for value in state.values()}
        values = sum(math.prod(shape) for shape in written.values())
        if values != sum(tensors.values()):
            raise RuntimeError(f"{folder} does not hold the whole model: {values} values of {sum(tensors.values())}")
        return
    # Tied tensors are written once.
    shared = {name for name in expected.keys() - written.keys() if any(state[name].equal(state[other]) for other in written)}
    if written != {name: shape for name, shape in expected.items() if name not in shared}:
        raise RuntimeError(f"{folder} does not hold the whole model: {_difference(expected, written)}")


def _difference(expected: Mapping[str, Any], found: Mapping[str, Any]) -> str:
    differing = sorted(name for name in expected.keys() | found.keys() if expected.get(name) != found.get(name))
    return ", ".join(f"{name} {expected.get(name)} → {found.get(name)}" for name in differing[:5]) + (" …" if len(differing) > 5 else "")
