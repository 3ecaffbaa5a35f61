"""Candidate: a model and the compression to apply to it, which the rules of ``compatibility`` check."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from transformers import PreTrainedModel

from ..backbones.model_adapter import ModelAdapter
from ..backbones.stack import Stack
from ..config import CompressionConfig, StageConfig
from ..stage import Stage


@dataclass(frozen=True)
class Candidate:
    """A model and the compression to apply to it.

    Attributes:
        model: the dense model, or a compressed one under construction.
        adapter: adapter of the model's family.
        config: the stages and restores.
        stages: the built stages; empty in ``check_config``.
    """

    model: PreTrainedModel
    adapter: type[ModelAdapter]
    config: CompressionConfig
    stages: Sequence[Stage] = ()

    @property
    def stacks(self) -> dict[str, Stack]:
        """The model's stacks, by name."""
        return {stack.name: stack for stack in self.adapter.stacks(self.model)}

    def stack(self, stage: Stage | StageConfig) -> Stack:
        """The stack of a stage."""
        return self.stacks[(stage.config if isinstance(stage, Stage) else stage).stack]

    def last_layer(self, stage: Stage) -> int:
        """First layer index after the stage's shortened sequence: the next restore, or else the number of layers of the stack."""
        where = self.config.restores.get(stage.config.stack)
        layers = len(self.stack(stage).layers)
        return where.layer if where is not None and where.layer > stage.config.place else layers


Rule = Callable[[Candidate], None]
