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
        scorer: which tokens these are, in measurements: those of a scorer that is fitted, or random ones.
        shortcut: what the others get in place of the layer's update; None for nothing.
    """

    layer: int
    site: str
    keep: float = 0.0
    scorer: str = "random"
    shortcut: str | None = None

    @property
    def key(self) -> str:
        """Name in the record: ``around_3=0`` for example, ``around_3=0.5:update`` or ``around_3=0+linear``."""
        chosen = "" if self.keep == 0 or self.scorer == "random" else f":{self.scorer}"
        return f"{self.site}_{self.layer}={self.keep:g}{chosen}{'' if self.shortcut is None else f'+{self.shortcut}'}"

    @property
    def fitted(self) -> bool:
        """It has a part that is fitted."""
        return self.shortcut is not None or (self.keep > 0 and self.scorer != "random")

    def measured(self, stack: Stack, scope: str) -> StageConfig:
        """The stage of a measurement: a fitted scorer chooses exactly the share of each row."""
        return self.stage(stack, scope, self.scorer, None if self.scorer == "random" else "top_k")

    def stage(
        self, stack: Stack, scope: str, scorer: str = "random", selector: str | None = None, estimator: str | None = None
    ) -> StageConfig:
        """The stage of the part; one that is left out has no parts of its own but the shortcut.

        Args:
            stack: stack of the layer.
            scope: scope of the stage.
            scorer: which tokens are processed, if some are.
            selector: None takes ``threshold`` where decisions must be causal, otherwise ``top_k``.
            estimator: None takes the scorer's default.
        """
        shortcut = None if self.shortcut is None else PartConfig(self.shortcut)
        settings = {
            "layer": self.layer, "site": self.site, "keep": self.keep, "stack": stack.name, "scope": scope, "shortcut": shortcut,
        }  # fmt: skip
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
