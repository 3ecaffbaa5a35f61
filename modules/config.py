"""CompressionConfig: the stages of a model. Plain data, stored in ``config.compression`` of the model; needs no torch."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, fields, replace
from typing import Any

from . import registry
from .rules.depth import check_layer, check_neighbours, layers_at
from .rules.keys import check_keys
from .rules.protected import check_protect

# Sites that shorten the sequence for all layers after them.
SHRINKING = ("before", "between")
# Sites at which selected tokens are processed and the others bypass the layer, or half of it; the sequence keeps its length.
BYPASS = ("around", "around_attention", "around_mlp")
SITES = (*SHRINKING, *BYPASS)
# Running order of the sites of one layer.
_ORDER = {site: index for index, site in enumerate(("before", "around", "around_attention", "between", "around_mlp"))}
# Sets of tokens that a stage may touch.
SCOPES = ("all", "prompt", "visual")
# Scopes that are complete before the first new token is generated: inside them a causal model may use non-causal decisions.
COMPLETE = ("prompt", "visual")
RESTORE = ("unmerge", "rejoin", "dechunk")
PARTS = ("scorer", "selector", "merger", "estimator", "shortcut")
_NAME = re.compile(r"[\w.\-]{1,100}")


@dataclass(frozen=True)
class PartConfig:
    """A scorer, selector, merger, estimator or shortcut by name, with its options.

    Attributes:
        name: name of the part's file in its folder, or of its entry point in another package.
        options: keyword arguments of the part's constructor.
        given: the class or object that Python code gave instead of a name; None otherwise.
    """

    name: str
    options: Mapping[str, Any] = field(default_factory=dict)
    given: Any = field(default=None, repr=False)

    __pydantic_config__ = {"extra": "forbid"}  # noqa: RUF012 - read by pydantic where a recipe holds a part

    @staticmethod
    def of(value: Any, kind: str) -> PartConfig:
        """A PartConfig from ``"top_k"``, ``{"name": "top_k", "bucket": 16}``, a class or an object; a PartConfig is returned as is.

        Args:
            value: one of these forms.
            kind: ``scorer``, ``selector``, ``merger``, ``estimator``, ``shortcut``, ``regularizer`` or ``controller``.
        """
        if isinstance(value, PartConfig):
            return value
        if isinstance(value, str):
            return PartConfig(value)
        if isinstance(value, type) or callable(value):
            cls = value if isinstance(value, type) else type(value)
            return PartConfig(registry.name_of(kind, cls) or cls.__qualname__, given=value)
        if not isinstance(value, Mapping) or not isinstance(value.get("name"), str):
            raise ValueError(f"a {kind} must be a name, a mapping with 'name' and options, or a Python class or object, not {value!r}")
        nested = isinstance(value.get("options"), Mapping) and set(value) == {"name", "options"}
        options = dict(value["options"]) if nested else {key: item for key, item in value.items() if key != "name"}
        for key in options:
            if not isinstance(key, str):
                raise ValueError(f"{kind} {value['name']!r}: the option {key!r} must be text")
        return PartConfig(value["name"], options)

    def to_dict(self) -> dict[str, Any]:
        """JSON-able form, the inverse of ``of``. A given class or object is stored by its name only."""
        return {"name": self.name, "options": dict(self.options)}

    def unsaved(self, kind: str) -> str | None:
        """The reason why a saved config cannot name the part; None if it can."""
        if self.given is None:
            return None
        if not isinstance(self.given, type):
            return f"{kind} {self.name!r} was given as an object, whose options cannot be saved: give its name and options"
        if registry.name_of(kind, self.given) is None:
            return (
                f"{kind} {self.name!r} was given as a class without a registered name: declare it as an entry point in group "
                f"{registry.KINDS[kind].group!r} of its package, and give that name"
            )
        return None


@dataclass(frozen=True)
class StageConfig:
    """One stage: a router (scorer and selector) and a merger at a site.

    Attributes:
        layer: index of the layer that the site belongs to, from 0; or a fraction between 0 and 1 of the stack's layers, rounded down;
            or a span of layers, each with a stage, ``"2:"``, ``":0.5"``.
        keep: fraction in (0, 1]; None leaves it to the budget. At a shrinking site, routable tokens leaving ÷ entering; at a bypass
            site, routable tokens processed ÷ present (the capacity of Mixture-of-Depths). Only tokens in ``scope`` are routable.
            At a bypass site 0 leaves the layer or its half out: no token of the scope is processed, with scope ``all`` no token at all.
            Such a stage has no parts but a shortcut.
        tokens: number of routable tokens kept, at any input size; replaces ``keep``.
        site: position at the layer. ``before`` the layer and ``between`` its attention and its MLP shorten the sequence for all later
            layers. ``around`` the layer, ``around_attention`` and ``around_mlp`` process only the selected tokens in the layer or its half.
        scorer: gives every token a score. Each part is a name, a mapping of name and options, or a Python class or object.
        selector: turns scores into a decision.
        merger: removes or merges the tokens that are not kept; unused at bypass sites.
        estimator: gives a trained scorer its gradient in training; None uses the scorer's default.
        shortcut: what tokens that bypass the layer or its half get in place of its update; None adds nothing to them. Protected tokens get
            nothing.
        count: rule that turns ``keep`` into a number of tokens, a key of ``COUNT_RULES``; None uses the scorer's, mostly ``round``.
        scope: tokens that the stage may touch: ``all``, ``prompt`` (those before the first predicted token) or ``visual``.
        protect: for causal models. ``first: n`` protects the first n tokens of each document, ``special: true`` those that begin or end a
            text by the model's config, and in scope ``prompt`` ``last: n`` the last n tokens of each prompt, a question for example. None
            is ``{first: 1, special: true}`` at bypass sites of causal models, and protects none elsewhere.
        share: one decision for all layers of a span, or of a mapping's list: the first one's stage decides, and the others follow it.
        follows: layer of the earlier stage at the same site that decides for this one too, as ``share`` sets it; None decides by itself.
        spread: added to the scores of tokens that the last stage around a layer has left out, so that neighbouring layers process others.
        stack: stack that ``layer`` counts in, for a model with several (``vision``, ``text``); "" if the model has one.
        name: name in logs and reports; None builds it from stack, site and layer.
    """

    layer: int | float | str
    keep: float | None = None
    tokens: int | None = None
    site: str = "before"
    scorer: Any = PartConfig("learned")
    selector: Any = PartConfig("top_k")
    merger: Any = PartConfig("drop")
    estimator: Any = None
    shortcut: Any = None
    count: str | None = None
    scope: str = "all"
    protect: Mapping[str, int | bool] | None = None
    share: bool = False
    follows: int | float | None = None
    spread: float = 0.0
    stack: str = ""
    name: str | None = None

    def __post_init__(self) -> None:
        for kind in PARTS:
            if getattr(self, kind) is not None:
                object.__setattr__(self, kind, PartConfig.of(getattr(self, kind), kind))
        if self.keep is not None and (isinstance(self.keep, bool) or not isinstance(self.keep, int | float)):
            raise ValueError(f"compression.stages[].keep = {self.keep!r} must be a number in (0, 1]")
        if self.tokens is not None and (isinstance(self.tokens, bool) or not isinstance(self.tokens, int) or self.tokens < 1):
            raise ValueError(f"compression.stages[].tokens = {self.tokens!r} must be an integer of at least 1")
        check_layer(self.layer)
        if isinstance(self.layer, str) and self.name is not None and self.name != self._default_name:
            raise ValueError(f"compression.stages[].name = {self.name!r} would be that of all layers {self.layer!r}: leave it out")
        _check_texts(self)
        check_neighbours(self.layer, self.share, self.follows, self.spread)
        if self.scope not in SCOPES:
            raise ValueError(f"compression.stages[].scope = {self.scope!r} must be one of {', '.join(SCOPES)}")
        if self.name is None:
            object.__setattr__(self, "name", self._default_name)
        if self.left_out:
            self._check_left_out()
        if self.protect is not None:
            check_protect(self.protect, self.scope)

    def _check_left_out(self) -> None:
        if self.protect is not None and self.shortcut is None:
            raise ValueError("compression.stages[].protect has no effect where keep = 0 leaves the layer out without a shortcut: remove it")
        for kind in PARTS:
            if kind != "shortcut" and getattr(self, kind) != type(self).__dataclass_fields__[kind].default:
                raise ValueError(
                    f"compression.stages[].{kind} = {getattr(self, kind).name!r} has no effect where keep = 0 leaves the layer out: "
                    "remove it, or give keep in (0, 1]"
                )

    @property
    def _default_name(self) -> str:
        return f"{self.stack}{'.' if self.stack else ''}{self.site}_{self.layer}".replace(":", "-")

    @property
    def place(self) -> float:
        """Number that stages are ordered by: the layer; spans, which are replaced by their layers, come first."""
        return -1.0 if isinstance(self.layer, str) else self.layer

    @property
    def key(self) -> str:
        """The stage's name."""
        assert self.name is not None
        return self.name

    @property
    def bypass(self) -> bool:
        """Tokens that are not selected bypass the layer or its half and stay in the sequence."""
        return self.site in BYPASS

    @property
    def left_out(self) -> bool:
        """No token of the scope is processed: a static stage, without parts but a shortcut."""
        return self.keep == 0 and self.bypass

    @property
    def treats_some(self) -> bool:
        """A bypass stage whose router or shortcut treats some tokens unlike others."""
        return self.bypass and not (self.left_out and self.shortcut is None)

    @property
    def first(self) -> int:
        """Protected tokens at the start of each document."""
        return 0 if self.protect is None else self.protect.get("first", 0)

    @property
    def last(self) -> int:
        """Protected tokens at the end of each prompt, the one from which the answer starts included."""
        return 0 if self.protect is None else self.protect.get("last", 0)

    @property
    def special(self) -> bool:
        """Tokens that begin or end a text are protected."""
        return self.protect is not None and bool(self.protect.get("special", False))

    @property
    def free(self) -> bool:
        """Neither ``keep`` nor ``tokens`` is set: a budget must set ``keep``."""
        return self.keep is None and self.tokens is None

    def at_depth(self, layers: int) -> list[StageConfig]:
        """The stage in a stack of so many layers, with an index in place of a fraction; a stage for each layer of a span."""
        name, found = None if self.name == self._default_name else self.name, layers_at(self.layer, layers)
        follows = None if self.follows is None else layers_at(self.follows, layers)[0]
        made = [replace(self, layer=layer, name=name, share=False, follows=follows) for layer in found]
        return _followers(made) if self.share else made

    def part(self, kind: str) -> PartConfig:
        """The stage's part of a kind: ``scorer``, ``selector``, ``merger``, ``estimator`` or ``shortcut``."""
        return PartConfig.of(getattr(self, kind), kind)

    def to_dict(self) -> dict[str, Any]:
        """JSON-able form."""
        plain = {item.name: getattr(self, item.name) for item in fields(self)}
        return plain | {kind: plain[kind].to_dict() for kind in PARTS if plain[kind] is not None}


@dataclass(frozen=True)
class RestoreConfig:
    """Where and how the sequence of a stack is restored to its full length.

    Attributes:
        layer: index of the layer before which it is restored; the number of layers means after the last one.
        by: ``unmerge`` gives every original token the hidden state of the token that represents it; a dropped token gets the hidden state
            that it had when it was dropped. ``rejoin`` does this for merged tokens too. ``dechunk``, for causal models, gives every token
            its hidden state from before the stage, plus what the layers added to the newest chunk at or before it.
    """

    layer: int
    by: str = "unmerge"

    def __post_init__(self) -> None:
        if isinstance(self.layer, bool) or not isinstance(self.layer, int):
            raise ValueError(f"compression.restore.layer = {self.layer!r} must be an integer, the index of a layer")
        if self.by not in RESTORE:
            raise ValueError(f"compression.restore.by = {self.by!r} must be one of {', '.join(RESTORE)}")


@dataclass(frozen=True)
class CompressionConfig:
    """The stages of a model, in any order; they run in the order of their sites.

    Attributes:
        stages: StageConfigs, at most one per site, in running order.
        restores: RestoreConfig by stack name; a stack without one stays short.

    Args:
        stages: StageConfigs, or mappings of their attributes. A mapping may list several layers, ``layer: [1, 2, 3]``, and gives a stage
            for each.
        restore: a RestoreConfig or a mapping of its attributes, for a model with one stack; or a mapping from stack name to these.
    """

    stages: tuple[StageConfig, ...]
    restores: Mapping[str, RestoreConfig]

    def __init__(self, stages: Iterable[StageConfig | Mapping[str, Any]], restore: RestoreConfig | Mapping[str, Any] | None = None) -> None:
        if not isinstance(stages, Iterable) or isinstance(stages, str | Mapping):
            raise ValueError(f"compression.stages must be a list of stages, not {stages!r}")
        made = [one for stage in stages for one in ([stage] if isinstance(stage, StageConfig) else stages_from_dict(stage))]
        stacks = list(dict.fromkeys(stage.stack for stage in made))
        in_order = sorted(made, key=lambda stage: (stacks.index(stage.stack), stage.place, _ORDER.get(stage.site, 0)))
        object.__setattr__(self, "stages", tuple(in_order))
        object.__setattr__(self, "restores", _restores(restore))

    @property
    def stacks(self) -> tuple[str, ...]:
        """Names of the stacks that have stages."""
        return tuple(dict.fromkeys(stage.stack for stage in self.stages))

    @property
    def restore(self) -> RestoreConfig | None:
        """The restore of a model with one stack; None without one."""
        return self.restores.get("")

    def of_stack(self, stack: str) -> tuple[StageConfig, ...]:
        """The stages of one stack, in running order."""
        return tuple(stage for stage in self.stages if stage.stack == stack)

    def to_dict(self) -> dict[str, Any]:
        """JSON-able form, the inverse of ``from_dict``."""
        restores = {stack: {"layer": where.layer, "by": where.by} for stack, where in self.restores.items()}
        restore = None if not restores else restores[""] if list(restores) == [""] else restores
        return {"stages": [stage.to_dict() for stage in self.stages], "restore": restore}

    @staticmethod
    def from_dict(data: Mapping[str, Any]) -> CompressionConfig:
        """A config from the output of ``to_dict``. Raises ValueError for an unknown key or another type."""
        if not isinstance(data, Mapping):
            raise ValueError(f"compression must be a mapping with 'stages' and 'restore', not {data!r}")
        check_keys(data, ["stages", "restore"], "compression")
        if "stages" not in data:
            raise ValueError("compression.stages is missing: give at least one stage, or leave compression out for a dense model")
        return CompressionConfig(data["stages"], data.get("restore"))

    def with_stages(self, stages: Iterable[StageConfig]) -> CompressionConfig:
        """A copy with other stages."""
        return CompressionConfig(stages, self.restores or None)

    def with_restores(self, restores: Mapping[str, RestoreConfig]) -> CompressionConfig:
        """A copy with other restores."""
        return CompressionConfig(self.stages, restores or None)

    def with_keep(self, keep: Mapping[str, float]) -> CompressionConfig:
        """A copy in which the named stages have the given keep."""
        return self.with_stages(replace(stage, tokens=None, keep=keep[stage.key]) if stage.key in keep else stage for stage in self.stages)

    def left_short(self, stack: str = "") -> list[StageConfig]:
        """Stages whose shortening of the stack's sequence no later restore reverts."""
        where = self.restores.get(stack)
        end = 0 if where is None else where.layer
        return [stage for stage in self.of_stack(stack) if not stage.bypass and stage.place >= end]


def restore_key(stack: str) -> str:
    """The key of a stack's restore, for messages."""
    return f"compression.restore.{stack}" if stack else "compression.restore"


def _restores(given: RestoreConfig | Mapping[str, Any] | None) -> dict[str, RestoreConfig]:
    if given is None:
        return {}
    if isinstance(given, RestoreConfig):
        return {"": given}
    if not isinstance(given, Mapping):
        raise ValueError(f"compression.restore must have 'layer' and 'by', or a mapping of these by stack, not {given!r}")
    if given and all(isinstance(value, Mapping | RestoreConfig) for value in given.values()):
        return {stack: _restore(value, restore_key(stack)) for stack, value in given.items()}
    return {"": _restore(given, "compression.restore")}


def _restore(given: RestoreConfig | Mapping[str, Any], where: str) -> RestoreConfig:
    if isinstance(given, RestoreConfig):
        return given
    check_keys(given, [item.name for item in fields(RestoreConfig)], where)
    if "layer" not in given:
        raise ValueError(f"{where}.layer is missing: give the layer before which to restore; the number of layers means after the last")
    return RestoreConfig(**given)


def stages_from_dict(data: Mapping[str, Any]) -> list[StageConfig]:
    """StageConfigs from a mapping, one for each layer it lists. Raises ValueError for an unknown key or one of a removed fraction."""
    if not isinstance(data, Mapping):
        raise ValueError(f"compression.stages[] must be a mapping with 'layer', not {data!r}")
    check_keys(data, [item.name for item in fields(StageConfig)], "compression.stages[]")
    if "layer" not in data:
        raise ValueError("compression.stages[].layer is missing: give the index of the stage's layer, from 0")
    layers = data["layer"] if isinstance(data["layer"], list | tuple) else [data["layer"]]
    if not layers:
        raise ValueError("compression.stages[].layer is an empty list: give the indices of the stage's layers, from 0")
    if len(layers) > 1 and data.get("name") is not None:
        raise ValueError(f"compression.stages[].name = {data['name']!r} would be that of {len(layers)} stages: leave it out")
    if not data.get("share") or len(layers) < 2:
        return [StageConfig(**{**data, "layer": layer}) for layer in layers]
    if any(isinstance(layer, str) for layer in layers):
        raise ValueError(f"compression.stages[].share = true: layer = {layers!r} must be one span, or a list of layers without spans")
    return _followers([StageConfig(**{**data, "layer": layer, "share": False}) for layer in sorted(layers)])


def _followers(stages: list[StageConfig]) -> list[StageConfig]:
    """Stages of which the first decides for all."""
    first = stages[0]
    assert not isinstance(first.layer, str)
    return [first, *(replace(stage, follows=first.layer) for stage in stages[1:])]


def _check_texts(stage: StageConfig) -> None:
    """Raises ValueError if a text of a stage has another type, or its name or stack characters with a meaning in other formats."""
    for key in ("site", "stack", "scope"):
        if not isinstance(getattr(stage, key), str):
            raise ValueError(f"compression.stages[].{key} = {getattr(stage, key)!r} must be text")
    for key in ("count", "name"):
        if not isinstance(getattr(stage, key), str | None):
            raise ValueError(f"compression.stages[].{key} = {getattr(stage, key)!r} must be text")
    for key, value in (("name", stage.name), ("stack", stage.stack or None)):
        # They are in model cards, pages, and tags of curves.
        if value is not None and not _NAME.fullmatch(value):
            raise ValueError(f"compression.stages[].{key} = {value!r} must have letters, digits and . _ - only, 1 to 100 of them")
