"""Models whose parameters are spread over ranks (ZeRO-3): built in shards, and gathered again to be saved."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.initialization import no_init_weights

from . import collective


def shape_of(parameter: nn.Parameter) -> torch.Size:
    """The whole parameter's shape; one that ZeRO-3 has partitioned looks empty and of one dimension."""
    return torch.Size(getattr(parameter, "ds_shape", parameter.shape))


@contextlib.contextmanager
def shell(config: Mapping[str, Any]) -> Iterator[None]:
    """Inside, every module is partitioned as soon as it is made, routers too, so that no rank ever holds a whole model.

    What it is initialised with is not defined; ``fill`` comes next.

    Args:
        config: DeepSpeed's.
    """
    import deepspeed

    from .strategies import join_deepspeed

    join_deepspeed()
    # Initialising would look at parameters that are gone already, and would draw in another order than a plain build.
    with deepspeed.zero.Init(config_dict_or_path=dict(config)), no_init_weights():
        yield


def fill(model: PreTrainedModel, source: PreTrainedModel | None) -> None:
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


def gathered(model: nn.Module) -> dict[str, Tensor]:
    """Every parameter and persistent buffer, whole and on the CPU, on rank 0; empty elsewhere. Called on every rank.

    Raises:
        RuntimeError: something is missing or of another shape than the model's, on every rank.
    """
    import deepspeed

    state: dict[str, Tensor] = {}
    expected: dict[str, tuple[int, ...]] = {}
    parameters = dict(model.named_parameters(remove_duplicate=False))
    for name, value in model.state_dict(keep_vars=True).items():
        parameter = parameters.get(name)
        expected[name] = tuple(value.shape if parameter is None else shape_of(parameter))
        if parameter is None or not hasattr(parameter, "ds_id"):
            whole: contextlib.AbstractContextManager[Any] = contextlib.nullcontext()
        else:
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
    state = gathered(model) if any(hasattr(parameter, "ds_id") for parameter in model.parameters()) else None
    if collective.rank() == 0:
        if state is None:
            model.to("cpu").save_pretrained(folder)
        else:
            # A copy of the mapping: transformers empties it as it writes.
            model.save_pretrained(folder, state_dict=dict(state))
            _check_written(folder, state)
    collective.wait()


def _check_written(folder: Path, state: Mapping[str, Tensor]) -> None:
    from safetensors import safe_open

    written: dict[str, tuple[int, ...]] = {}
    for path in folder.glob("*.safetensors"):
        with safe_open(path, "pt") as file:
            written |= {name: tuple(file.get_slice(name).get_shape()) for name in file.keys()}  # noqa: SIM118 - no mapping
    wanted = {name: tuple(value.shape) for name, value in state.items()}
    # Tied tensors are written once.
    shared = {name for name in wanted.keys() - written.keys() if any(state[name].equal(state[other]) for other in written)}
    if written != {name: shape for name, shape in wanted.items() if name not in shared}:
        raise RuntimeError(f"{folder} does not hold the whole model: {_difference(wanted, written)}")


def _difference(wanted: Mapping[str, Any], found: Mapping[str, Any]) -> str:
    differing = sorted(name for name in wanted.keys() | found.keys() if wanted.get(name) != found.get(name))
    return ", ".join(f"{name} {wanted.get(name)} → {found.get(name)}" for name in differing[:5]) + (" …" if len(differing) > 5 else "")
