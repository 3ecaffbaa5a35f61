"""CompressionConfig: which stages a model has. Plain data, kept in ``config.compression`` of the model."""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, field, fields, replace
from typing import Any

from . import registry
from .cost.count_rules import COUNT_RULES
from .estimators.base import Estimator
from .mergers.base import Merger
from .scorers.base import Scorer
from .selectors.base import Selector
from .sites import BYPASS, SITES

RESTORE = ("unmerge", "rejoin", "dechunk")
_PACKAGE = __name__.rpartition(".")[0]
_KINDS: dict[str, type[Scorer | Selector | Merger | Estimator]] = {
    "scorer": Scorer,
    "selector": Selector,
    "merger": Merger,
    "estimator": Estimator,
}
# Arguments that the stage itself gives to a part's constructor.
_GIVEN = {"scorer": ("spec",), "selector": ("spec",), "merger": ("spec",), "estimator": ()}
# What users of other systems write; each would silently mean the opposite here.
_REMOVED_FRACTION = (
    "ratio",
    "drop",
    "drop_rate",
    "drop_ratio",
    "prune",
    "prune_rate",
    "pruning_rate",
    "removed",
    "reduction",
    "sparsity",
    "r",
)


@dataclass(frozen=True)
class PartConfig:
    """A scorer, selector, merger or estimator by name, with its options.

    Attributes:
        name: the part's file name in its folder.
        options: keyword arguments of its constructor.
    """

    name: str
    options: Mapping[str, Any] = field(default_factory=dict)

    __pydantic_config__ = {"extra": "forbid"}  # noqa: RUF012 - read by pydantic where a recipe holds a part

    @staticmethod
    def of(value: str | Mapping[str, Any] | PartConfig) -> PartConfig:
        """From ``"top_k"``, from ``{"name": "top_k", "noise": 1.0}``, or as it is."""
        if isinstance(value, PartConfig):
            return value
        if isinstance(value, str):
            return PartConfig(value)
        if not isinstance(value, Mapping) or not isinstance(value.get("name"), str):
            raise ValueError(f"a part is a name or a mapping with 'name' and its options, not {value!r}")
        if isinstance(value.get("options"), Mapping) and set(value) == {"name", "options"}:
            return PartConfig(value["name"], dict(value["options"]))
        return PartConfig(value["name"], {key: item for key, item in value.items() if key != "name"})

    def build(self, kind: str, *given: Any) -> Any:
        """The part itself.

        Args:
            kind: ``scorer``, ``selector``, ``merger`` or ``estimator``.
            given: what the stage gives to every part of this kind.

        Raises:
            ValueError: an unknown name or option, or a value out of its range.
        """
        cls = registry.find(f"{_PACKAGE}.{kind}s", self.name, _KINDS[kind])
        registry.check_options(cls, kind, self.name, dict(self.options), _GIVEN[kind])
        try:
            return cls(*given, **self.options)
        except TypeError as error:
            raise ValueError(f"{kind} {self.name!r}: an option is of the wrong type: {error}") from None


@dataclass(frozen=True)
class StageConfig:
    """One stage: a router (scorer and selector) and a merger at a site.

    Attributes:
        layer: layer that the site belongs to, from 0.
        keep: of a shrinking site, routable tokens leaving ÷ entering, in (0, 1]; None leaves it to the budget.
        capacity: of a bypass site, routable tokens processed ÷ present, in (0, 1]; None leaves it to the budget.
        tokens: instead of ``keep`` or ``capacity``, how many routable tokens, whatever the size of the input.
        site: where at the layer. ``before`` it and ``between`` its attention and its MLP the sequence gets shorter for all that
            follows; ``around`` it, ``around_attention`` and ``around_mlp`` only the chosen tokens go through the layer or its half.
        scorer: gives every token a score.
        selector: turns scores into a decision.
        merger: what becomes of the tokens left out; a bypass site has none.
        estimator: how a gradient reaches a trained scorer in training; None takes the one that the scorer is made for.
        count: rule from ``keep`` to a number of tokens, a key of ``COUNT_RULES``; None takes the scorer's, which is mostly ``round``.
        name: name in logs and reports; None makes one of site and layer.
    """

    layer: int
    keep: float | None = None
    capacity: float | None = None
    tokens: int | None = None
    site: str = "before"
    scorer: PartConfig | str | Mapping[str, Any] = PartConfig("learned")
    selector: PartConfig | str | Mapping[str, Any] = PartConfig("top_k")
    merger: PartConfig | str | Mapping[str, Any] = PartConfig("drop")
    estimator: PartConfig | str | Mapping[str, Any] | None = None
    count: str | None = None
    name: str | None = None

    def __post_init__(self) -> None:
        for kind in _KINDS:
            if getattr(self, kind) is not None:
                object.__setattr__(self, kind, PartConfig.of(getattr(self, kind)))
        for key in ("keep", "capacity"):
            value = getattr(self, key)
            if value is not None and (isinstance(value, bool) or not isinstance(value, int | float)):
                raise ValueError(f"compression.stages[].{key} = {value!r} must be a number in (0, 1]")
        if self.tokens is not None and (isinstance(self.tokens, bool) or not isinstance(self.tokens, int) or self.tokens < 1):
            raise ValueError(f"compression.stages[].tokens = {self.tokens!r} must be an integer of at least 1")
        if isinstance(self.layer, bool) or not isinstance(self.layer, int):
            raise ValueError(f"compression.stages[].layer = {self.layer!r} must be an integer, the number of a layer from 0")
        if self.name is None:
            object.__setattr__(self, "name", f"{self.site}_{self.layer}")

    @property
    def key(self) -> str:
        """The stage's name."""
        assert self.name is not None
        return self.name

    @property
    def bypass(self) -> bool:
        """Tokens that are not chosen go around instead of away."""
        return self.site in BYPASS

    @property
    def fraction(self) -> float | None:
        """``keep`` of a shrinking site, ``capacity`` of a bypass site."""
        return self.capacity if self.bypass else self.keep

    @property
    def free(self) -> bool:
        """Nothing says how many tokens: a budget must."""
        return self.fraction is None and self.tokens is None

    def part(self, kind: str) -> PartConfig:
        """The stage's ``scorer``, ``selector``, ``merger`` or ``estimator``."""
        return PartConfig.of(getattr(self, kind))

    def check(self, layers: int, sites: tuple[str, ...]) -> None:
        """Raises ValueError, naming the stage, the key and what is allowed, unless the stage can be built.

        Args:
            layers: number of layers of the backbone.
            sites: sites that the backbone offers.
        """
        where, key = f"stage {self.key!r}", "capacity" if self.bypass else "keep"
        if self.site not in SITES:
            raise ValueError(f"{where}: site = {self.site!r} does not exist: the sites are {', '.join(SITES)}")
        if self.site not in sites:
            raise ValueError(f"{where}: site = {self.site!r} is not offered by this backbone: it has {', '.join(sites)}")
        if not 0 <= self.layer < layers:
            raise ValueError(f"{where}: layer = {self.layer!r} must be an integer from 0 to {layers - 1}, the backbone has {layers} layers")
        other = "keep" if self.bypass else "capacity"
        if getattr(self, other) is not None:
            raise ValueError(f"{where}: {other} belongs to another kind of site; at site {self.site!r} give {key}")
        if self.tokens is not None and self.fraction is not None:
            raise ValueError(f"{where}: give either {key} or tokens, not both")
        if self.free:
            raise ValueError(f"{where}: {key} is not set: give the fraction of tokens kept, in (0, 1], or let a budget decide it")
        if self.fraction is not None and not 0 < self.fraction <= 1:
            raise ValueError(f"{where}: {key} = {self.fraction} must be in (0, 1]: the fraction that is kept, not removed")
        if self.count is not None and self.count not in COUNT_RULES:
            raise ValueError(f"{where}: count = {self.count!r} is no count rule: there are {', '.join(COUNT_RULES)}")
        if self.bypass and self.part("merger").name != "drop":
            raise ValueError(f"{where}: merger = {self.part('merger').name!r}: at site {self.site!r} no token goes away; leave merger out")


@dataclass(frozen=True)
class RestoreConfig:
    """Where the sequence gets its full length back.

    Attributes:
        layer: before this layer; the number of layers means after the last.
        by: ``unmerge`` gives every original token the state of the token that stands for it, and one that was dropped the state
            that it had then; ``rejoin`` gives merged tokens their own last state too; ``dechunk``, of a causal model, gives every
            token the state that it had, and what layers added to the newest chunk at or before it.
    """

    layer: int
    by: str = "unmerge"

    def __post_init__(self) -> None:
        if isinstance(self.layer, bool) or not isinstance(self.layer, int):
            raise ValueError(f"compression.restore.layer = {self.layer!r} must be an integer, the number of a layer")
        if self.by not in RESTORE:
            raise ValueError(f"compression.restore.by = {self.by!r} must be one of {', '.join(RESTORE)}")


@dataclass(frozen=True)
class CompressionConfig:
    """The stages of a model, in any order; they run in the order of their sites.

    Attributes:
        stages: at most one a site. One that is given as a mapping may name several layers, a stage for each: ``layer: [1, 2, 3]``.
        restore: where the sequence gets its full length back; None leaves it short.
    """

    stages: tuple[StageConfig, ...]
    restore: RestoreConfig | None = None

    def __init__(self, stages: Iterable[StageConfig | Mapping[str, Any]], restore: RestoreConfig | Mapping[str, Any] | None = None) -> None:
        if not isinstance(stages, Iterable) or isinstance(stages, str | Mapping):
            raise ValueError(f"compression.stages must be a list of stages, not {stages!r}")
        made = [one for stage in stages for one in ([stage] if isinstance(stage, StageConfig) else stages_from_dict(stage))]
        order = {site: index for index, site in enumerate(("before", "around", "around_attention", "between", "around_mlp"))}
        object.__setattr__(self, "stages", tuple(sorted(made, key=lambda stage: (stage.layer, order.get(stage.site, 0)))))
        if isinstance(restore, Mapping):
            _check_keys(restore, [item.name for item in fields(RestoreConfig)], "compression.restore")
            if "layer" not in restore:
                raise ValueError("compression.restore.layer is missing: before which layer; the number of layers means after the last")
            restore = RestoreConfig(**restore)
        object.__setattr__(self, "restore", restore)

    def to_dict(self) -> dict[str, Any]:
        """JSON-able form, the inverse of ``from_dict``."""
        return {"stages": [asdict(stage) for stage in self.stages], "restore": None if self.restore is None else asdict(self.restore)}

    @staticmethod
    def from_dict(data: Mapping[str, Any]) -> CompressionConfig:
        """From what ``to_dict`` gave. Raises ValueError for an unknown key."""
        _check_keys(data, ["stages", "restore"], "compression")
        if "stages" not in data:
            raise ValueError("compression.stages is missing: give at least one stage, or leave compression out for a dense model")
        return CompressionConfig(data["stages"], data.get("restore"))

    def with_keep(self, keep: Mapping[str, float]) -> CompressionConfig:
        """A copy whose stages keep (or process) what the mapping says, by stage name."""

        def told(stage: StageConfig) -> StageConfig:
            if stage.key not in keep:
                return stage
            return replace(stage, tokens=None, **{"capacity" if stage.bypass else "keep": keep[stage.key]})  # type: ignore[arg-type]

        return CompressionConfig(map(told, self.stages), self.restore)

    def check(self, layers: int, sites: tuple[str, ...]) -> None:
        """Raises ValueError, naming the stage, the key and what is allowed, unless every stage can be built.

        Args:
            layers: number of layers of the backbone.
            sites: sites that the backbone offers.
        """
        if not self.stages:
            raise ValueError("compression.stages is empty: give at least one stage, or leave compression out for a dense model")
        seen: set[tuple[str, int]] = set()
        for stage in self.stages:
            stage.check(layers, sites)
            if (stage.site, stage.layer) in seen:
                raise ValueError(f"stage {stage.key!r}: there are two stages {stage.site} layer {stage.layer}: a site holds one")
            seen.add((stage.site, stage.layer))
        for layer in {stage.layer for stage in self.stages if stage.site == "around"}:
            inner = [stage.key for stage in self.stages if stage.layer == layer and stage.site not in ("around", "before")]
            if inner:
                raise ValueError(f"layer {layer} has a stage around it: {', '.join(inner)} inside it cannot run on the chosen tokens alone")
        names = [stage.key for stage in self.stages]
        if len(set(names)) < len(names):
            raise ValueError(f"stage names must differ: {', '.join(names)}")
        self._check_restore(layers)

    def left_short(self) -> list[StageConfig]:
        """Stages that shorten the sequence for good: no restore comes after them."""
        end = 0 if self.restore is None else self.restore.layer
        return [stage for stage in self.stages if not stage.bypass and stage.layer >= end]

    def _check_restore(self, layers: int) -> None:
        if self.restore is None:
            return
        shrinking = [stage for stage in self.stages if not stage.bypass]
        if not shrinking:
            raise ValueError("compression.restore has nothing to do: no stage makes the sequence shorter")
        first = min(stage.layer + (stage.site == "between") for stage in shrinking)
        if not first < self.restore.layer <= layers:
            raise ValueError(
                f"compression.restore.layer = {self.restore.layer} must be from {first + 1} (after the first stage) to {layers} "
                "(after the last layer)"
            )


def stages_from_dict(data: Mapping[str, Any]) -> list[StageConfig]:
    """A stage from plain data, or one for each of several layers. Raises ValueError for an unknown key, or a removed fraction's."""
    if not isinstance(data, Mapping):
        raise ValueError(f"compression.stages[] must be keys and values with 'layer', not {data!r}")
    _check_keys(data, [item.name for item in fields(StageConfig)], "compression.stages[]")
    if "layer" not in data:
        raise ValueError("compression.stages[].layer is missing: which layer does the stage belong to, from 0")
    layers = data["layer"] if isinstance(data["layer"], list | tuple) else [data["layer"]]
    if not layers:
        raise ValueError("compression.stages[].layer is an empty list: name the layers that the stage is for, from 0")
    if len(layers) > 1 and data.get("name") is not None:
        raise ValueError(f"compression.stages[].name = {data['name']!r} would be that of {len(layers)} stages: leave it out")
    return [StageConfig(**{**data, "layer": layer}) for layer in layers]


def _check_keys(data: Mapping[str, Any], allowed: list[str], where: str) -> None:
    for key in data:
        if key in allowed:
            continue
        if key in _REMOVED_FRACTION:
            raise ValueError(f"{where}.{key} is not a key: Laconic counts what is kept; give keep = 1 - removed, in (0, 1]")
        near = difflib.get_close_matches(key, allowed, 1)
        hint = f"; did you mean {near[0]!r}?" if near else ""
        raise ValueError(f"{where}.{key} is not a key: there are {', '.join(allowed)}{hint}")
