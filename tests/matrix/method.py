"""Rows of the matrix: Method, the parts of a stage, and Family, a tiny model."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from laconic import CompressionConfig, StageConfig
from laconic.modules import registry


@dataclass(frozen=True)
class Method:
    """Parts of a stage.

    Attributes:
        name: of the method, unique in its kind.
        parts: of each stage, as StageConfig takes them.
        site: where its stages are.
        detached: the scorer sends no gradient into the backbone.
        positional: scores depend on the place of a token in its row, so that padding in front of it changes them.
        same_kernel: training runs the same attention kernel as the dense model; a bias with gradient does not.
        adaptive: rows keep different numbers of tokens, which the host reads in training too.
        deployed: it runs in evaluation and decides causally; False needs ``Trace(lookahead=True)``. For causal models.
        restore: how the sequence gets its length back, before layer 3; None where it does not.
    """

    name: str
    parts: dict[str, Any]
    site: str = "before"
    detached: bool = True
    positional: bool = False
    same_kernel: bool = True
    adaptive: bool = False
    deployed: bool = True
    restore: str | None = None

    @property
    def bypass(self) -> bool:
        return self.site.startswith("around")

    @property
    def merges(self) -> bool:
        return self.parts.get("merger", "drop") != "drop"

    @property
    def pairs(self) -> bool:
        """It merges in pairs, which leaves at least half of the tokens."""
        return self.parts.get("merger") == "bipartite"

    @property
    def count(self) -> str:
        """Name of the count rule of its static counts."""
        return str(self.parts.get("count", "half" if self.pairs else "round"))

    def config(self, *keeps: float, layers: tuple[int, ...] = (1, 2)) -> CompressionConfig:
        """Stages with these keeps at these layers; only the first where the length is restored."""
        stages = [
            StageConfig(layer=layer, site=self.site, keep=max(keep, 0.5 if self.pairs else 0.0), **self.parts)
            for layer, keep in zip(layers, keeps, strict=False)
        ]
        return CompressionConfig(stages) if self.restore is None else CompressionConfig(stages[:1], {"layer": 3, "by": self.restore})


@dataclass(frozen=True)
class Family:
    """A tiny model of a family.

    Attributes:
        settings: of its config, beside those that its kind has in common.
        model_type: of transformers; empty where it is the family's name.
        architecture: class of the model; empty where the kind's Auto class decides.
        implementation: the only attention implementation that serves it; empty where all do.
        tower: the settings belong to the vision tower of an image-text model.
        prefix: protected tokens at the start of each row.
        averages: its head averages tokens.
        padded: rows with padding can be given to it.
        refuses: methods that it cannot have; each is tested to be refused.
        only: methods that it is tested with; empty for all.
    """

    settings: dict[str, Any]
    model_type: str = ""
    architecture: str = ""
    implementation: str = ""
    tower: bool = False
    prefix: int = 0
    averages: bool = False
    padded: bool = True
    refuses: tuple[str, ...] = ()
    only: tuple[str, ...] = ()

    def tests(self, method: Method) -> bool:
        """A pair of this family and the method is tested."""
        return method.name not in self.refuses and (not self.only or method.name in self.only)


def outside(**how: Any) -> list[Method]:
    """A method with the scorer of docs/examples/outside_part where that is installed; none elsewhere."""
    parts = {"scorer": "norm", **how.pop("parts", {})}
    return [Method("norm", parts, **how)] if "norm" in registry.part_names("scorer") else []
