"""Models whose parameters are spread over ranks (ZeRO-3): built in shards, and gathered again to be saved."""

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
from ...modules.compressed_model import CompressedModel
from ..run_folder import RunFolder
from . import collective
from .deepspeed import join_deepspeed


def shape_of(parameter: nn.Parameter) -> torch.Size:
    """The whole parameter's shape; one that ZeRO-3 has partitioned looks empty and of one dimension."""
    return torch.Size(getattr(parameter, "ds_shape", parameter.shape))


@contextlib.contextmanager
def zero3_init(config: Mapping[str, Any]) -> Iterator[None]:
    """Inside, every module is partitioned as soon as it is made, routers too, so that no rank ever holds a whole model.

    What it is initialised with is not defined; ``broadcast_weights`` comes next.

    Args:
        config: DeepSpeed's.
    """
    import deepspeed

    join_deepspeed()
    # Initialising would look at parameters that are gone already, and would draw in another order than a plain build.
    with deepspeed.zero.Init(config_dict_or_path=dict(config)), no_init_weights():
        yield


def broadcast_weights(model: PreTrainedModel, source: PreTrainedModel | None) -> None:
    """Gives a partitioned model the values of a plain one, which only rank 0 has.

    So the weights are those of a plain build by construction, drawn or loaded; the price is one whole copy in rank 0's CPU memory
    while the model is built.

    Raises:
        RuntimeError: the two do not have the same parameters.
    """
    import deepspeed

    # What was skipped with the initialising: without it a shared tensor would be two, of which the plain model has one.
    model.tie_weights()
    values = dict(source.named_parameters()) if source is not None else {}
    names = collective.from_rank_zero(lambda: {name: tuple(value.shape) for name, value in values.items()})
    ours = {name: tuple(shape_of(parameter)) for name, parameter in model.named_parameters()}
    if names != ours:
        raise RuntimeError(f"the model built in shards has other parameters than the plain one: {_difference(names, ours)}")
    for name, parameter in model.named_parameters():
        with torch.no_grad(), deepspeed.zero.GatheredParameters([parameter], modifier_rank=0):
            if source is not None:
                parameter.data.copy_(values[name])
    buffers = collective.from_rank_zero(lambda: {name: value.cpu() for name, value in source.named_buffers()} if source is not None else {})
    for name, buffer in model.named_buffers():
        buffer.copy_(buffers[name])


def gathered(model: nn.Module, wanted: Callable[[str], bool] | None = None) -> dict[str, Tensor]:
    """Every parameter and persistent buffer, whole and on the CPU, on rank 0; empty elsewhere. Called on every rank.

    Args:
        model: spread over ranks or whole.
        wanted: which names; None takes all. Tied ones share memory.

    Raises:
        RuntimeError: something is missing or of another shape than the model's, on every rank.
    """
    state: dict[str, Tensor] = {}
    expected: dict[str, tuple[int, ...]] = {}
    seen: dict[int, str] = {}
    parameters = dict(model.named_parameters(remove_duplicate=False))
    for name, value in model.state_dict(keep_vars=True).items():
        if wanted is not None and not wanted(name):
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


def save_model(model: PreTrainedModel, folder: Path) -> None:
    """The final weights as safetensors with their config, written by rank 0. Called on every rank.

    Raises:
        RuntimeError: what was written is not the whole model.
    """
    unsaved = set(getattr(model, "_keys_to_ignore_on_save", None) or ())
    state = gathered(model, lambda name: name not in unsaved)
    if collective.rank() == 0:
        # A copy of the mapping: transformers empties it as it writes.
        model.save_pretrained(folder, state_dict=dict(state))
        _check_written(folder, state, by_name=isinstance(model, CompressedModel))
    collective.wait()


def save_trained(model: PreTrainedModel, folder: Path, base: Base | None, ratio: Mapping[str, Any] | None = None) -> None:
    """What a run or checkpoint keeps of its model: ``model/`` whole, or ``adapter/`` with what was trained on frozen weights.

    Written by rank 0, called on every rank. What an earlier run left there is removed.

    Args:
        model: that is or was trained.
        folder: of the run or checkpoint.
        base: its frozen weights; None where everything trains.
        ratio: for the adapter's manifest.

    Raises:
        RuntimeError: what was written is not the whole model, or a tensor was not gathered.
    """
    run = RunFolder(folder)
    if collective.rank() == 0:
        run.remove_weights()
    if base is None:
        save_model(model, run.written(base))
        return
    names = set(kept_names(model))
    state = gathered(model, lambda name: name in names)
    if collective.rank() == 0:
        write_adapter(adapter_of(model, base, state=state, ratio=ratio), run.written(base))
    collective.wait()


def kept_names(model: nn.Module) -> list[str]:
    """Names of what trains, and of all buffers: what a checkpoint on frozen weights holds."""
    frozen = {name for name, parameter in model.named_parameters(remove_duplicate=False) if not parameter.requires_grad}
    return [name for name in model.state_dict(keep_vars=True) if name not in frozen]


def _check_written(folder: Path, state: Mapping[str, Tensor], by_name: bool) -> None:
    """Raises RuntimeError where a folder does not hold the whole state; of a dense model, which transformers may save under the names of
    its older versions, where the number of values differs."""
    from safetensors import safe_open

    written: dict[str, tuple[int, ...]] = {}
    for path in folder.glob("*.safetensors"):
        with safe_open(path, "pt") as file:
            written |= {name: tuple(file.get_slice(name).get_shape()) for name in file.keys()}  # noqa: SIM118 - no mapping
    wanted = {name: tuple(value.shape) for name, value in state.items()}
    if not by_name:
        tensors = {value.data_ptr(): value.numel() for value in state.values()}
        values = sum(math.prod(shape) for shape in written.values())
        if values != sum(tensors.values()):
            raise RuntimeError(f"{folder} does not hold the whole model: {values} values of {sum(tensors.values())}")
        return
    # Tied tensors are written once.
    shared = {name for name in wanted.keys() - written.keys() if any(state[name].equal(state[other]) for other in written)}
    if written != {name: shape for name, shape in wanted.items() if name not in shared}:
        raise RuntimeError(f"{folder} does not hold the whole model: {_difference(wanted, written)}")


def _difference(wanted: Mapping[str, Any], found: Mapping[str, Any]) -> str:
    differing = sorted(name for name in wanted.keys() | found.keys() if wanted.get(name) != found.get(name))
    return ", ".join(f"{name} {wanted.get(name)} → {found.get(name)}" for name in differing[:5]) + (" …" if len(differing) > 5 else "")
