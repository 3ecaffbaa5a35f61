"""Part: a layer, or half of one, with the share of its tokens that it still processes."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from ...modules.backbones.stack import Stack
from ...modules.config import COMPLETE, PartConfig, StageConfig

# Sites of the parts, in the order of the table.
SITES = {"around": "layer left out", "around_attention": "attention left out", "around_mlp": "MLP left out"}


@dataclass(frozen=True, order=True)
class Part:
    """A stage that is measured.

    Attributes:
        layer: index of the layer.
        site: ``around`` for the layer, ``around_attention`` or ``around_mlp`` for a half.
        keep: share of the tokens that it processes; 0 leaves it out.
    """

    layer: int
    site: str
    keep: float = 0.0

    @property
    def key(self) -> str:
        """Name in the record, ``around_3=0`` for example."""
        return f"{self.site}_{self.layer}={self.keep:g}"

    def stage(
        self, stack: Stack, scope: str, scorer: str = "random", selector: str | None = None, estimator: str | None = None
    ) -> StageConfig:
        """The stage of the part; one that is left out has no parts of its own.

        Args:
            stack: stack of the layer.
            scope: scope of the stage.
            scorer: which tokens are processed, if some are.
            selector: None takes ``threshold`` where decisions must be causal, otherwise ``top_k``.
            estimator: None takes the scorer's default.
        """
        settings = {"layer": self.layer, "site": self.site, "keep": self.keep, "stack": stack.name, "scope": scope}
        if self.keep == 0:
            return StageConfig(**settings)  # type: ignore[arg-type]
        causal = stack.adapter.causal and scope not in COMPLETE
        chosen = selector or ("threshold" if causal else "top_k")
        given = None if estimator is None else PartConfig(estimator)
        parts = {"scorer": PartConfig(scorer), "selector": PartConfig(chosen), "estimator": given}
        return StageConfig(**settings, **parts)  # type: ignore[arg-type]


def state_key(parts: Iterable[Part]) -> str:
    """Name of several parts together in the record; "" for the model as it is."""
    return " ".join(part.key for part in sorted(parts))


def offered(stack: Stack, taken: Iterable[int] = ()) -> list[Part]:
    """The parts of a stack that can be left out, layer by layer.

    Args:
        stack: the stack.
        taken: layers that have stages already.
    """
    refused, busy = stack.adapter.refused_sites(stack.config), set(taken)
    sites = [site for site in SITES if site in stack.adapter.sites and site not in refused]
    return [Part(layer, site) for layer in range(len(stack.layers)) if layer not in busy for site in sites]
