"""Arms of a comparison: from the names of ``--arms`` to recipes."""

from __future__ import annotations

import difflib
import re
from collections.abc import Sequence
from dataclasses import dataclass

from ..distributed.resume import differences
from ..errors import RecipeError
from ..recipe.baselines import check_alike, defines, incomparable, scaled_length, shared
from ..recipe.files import SHIPPED, LoadedRecipe, find, load
from ..recipe.methods import methods
from ..recipe.schema import Recipe
from .derived import DERIVED, ITSELF, NAMES, at_ratio, dense, smaller_input, with_scorer

_NAME = re.compile(r"[\w.\-@]{1,60}")


@dataclass(frozen=True)
class Arm:
    """One arm of a comparison.

    Attributes:
        name: its name in the table, and that of its run folders.
        kind: its name without the ratio: arms of one kind at several ratios are one curve.
        source: recipe that it is made from, a name or a path.
        overrides: overrides of that recipe; ``{seed}`` in them stands for the run's seed.
    """

    name: str
    kind: str
    source: str
    overrides: tuple[str, ...]

    def of_seed(self, seed: int) -> list[str]:
        """The overrides of a run."""
        return [*(item.replace("{seed}", str(seed)) for item in self.overrides), f"seed={seed}"]

    def load(self, seed: int, more: Sequence[str] = ()) -> Recipe:
        """The recipe of a run, with further overrides. Raises RecipeError that names the arm."""
        try:
            return load(self.source, [*self.of_seed(seed), *more]).recipe
        except RecipeError as error:
            raise RecipeError(f"arm {self.name}: {error}") from None


def arms_of(source: str, names: Sequence[str], overrides: Sequence[str]) -> tuple[LoadedRecipe, list[Arm]]:
    """The recipe of a comparison, with the overrides that all arms can have, and its arms.

    Args:
        source: name or path of the recipe.
        names: ``NAME``, ``NAME@RATIO`` (at another ``macs_ratio`` than the recipe's) or ``LABEL=NAME``. NAME is an arm of the recipe (a file
            RECIPE_NAME.yaml beside its own), one that is made from it (``DERIVED``), a method, or a recipe's name or path.
        overrides: ``key.path=value`` for every arm that can have it, as ``laconic train`` gives them to control arms; with ``LABEL:`` in
            front, for that arm alone.

    Raises:
        RecipeError: an arm does not exist or is not comparable with the recipe, by its own overrides for example.
    """
    labels = [_label(name) for name in names]
    if len(set(labels)) < len(labels) or not labels:
        raise RecipeError(f"--arms {','.join(names)}: give each arm once; LABEL=NAME gives an arm another label")
    common: list[str] = []
    own: dict[str, list[str]] = {label: [] for label in labels}
    for item in overrides:
        label, colon, rest = item.partition("=")[0].partition(":")
        if not colon:
            common.append(item)
        elif label in own:
            own[label].append(item.partition(":")[2])
        else:
            raise RecipeError(f"override {item!r} is for the arm {label}, which is not among --arms {','.join(labels)}")
        if (rest or label).split(".")[0] in ("output", "baselines"):
            raise RecipeError(f"override {item!r}: a comparison has its own arms and folders; remove it, or give --output")
        if (rest or label) == "trainer.bench_rounds" and item.partition("=")[2] != "0":
            raise RecipeError(f"override {item!r} has no effect: runs of a comparison measure no speed by themselves; remove it")
        if rest == "seed":
            raise RecipeError(
                f"override {item!r}: arms are compared seed by seed; give seed={item.partition('=')[2]} for all arms, or --seeds"
            )
    main = load(source, _of_first(common, source))
    return main, [_arm(main, label, name, common, own[label]) for label, name in zip(labels, names, strict=True)]


def _of_first(overrides: Sequence[str], source: str) -> list[str]:
    """Overrides with the seed of the first run in place of ``{seed}``."""
    seed = load(source, [item for item in overrides if "{seed}" not in item]).recipe.seed
    return [item.replace("{seed}", str(seed)) for item in overrides]


def _label(name: str) -> str:
    label, equals, _ = name.partition("=")
    label = label if equals else name.rpartition("/")[2].removesuffix(".yaml")
    if not _NAME.fullmatch(label):
        raise RecipeError(f"--arms {name!r}: a label has letters, digits, '.', '-', '_' and '@': give LABEL={name}")
    return label


def _arm(main: LoadedRecipe, label: str, name: str, common: Sequence[str], own: Sequence[str]) -> Arm:
    wanted, at, text = name.rpartition("=")[2].partition("@")
    try:
        ratio = _ratio(text) if at else None
        source, overrides = _made(main, wanted, ratio, common)
    except ValueError as error:
        raise RecipeError(f"--arms {name}: {error}") from None
    arm = Arm(label, label.partition("@")[0], source, (*overrides, *own))
    if own:
        _check_same_data(main.recipe, arm)
    return arm


def _check_same_data(main: Recipe, arm: Arm) -> None:
    """Raises RecipeError if an arm's own overrides give it another task or other samples; lengths may differ, and the table has them."""
    ours, its = (recipe.model_dump(mode="json", include={"task", "data"}) for recipe in (main, arm.load(main.seed)))
    for key, old, new in differences(ours, its):
        raise RecipeError(f"arm {arm.name}: {key} is {new!r}, and the recipe's is {old!r}: arms see the same samples; set it for all arms")


def _ratio(text: str) -> float:
    try:
        ratio = float(text)
    except ValueError:
        ratio = 0.0
    if not 0 < ratio < 1:
        raise RecipeError(f"@{text} must be a macs_ratio between 0 and 1, such as @0.3")
    return ratio


def _made(main: LoadedRecipe, name: str, ratio: float | None, common: Sequence[str]) -> tuple[str, list[str]]:
    """Recipe and overrides of an arm."""
    if name in NAMES:
        # The size of a smaller input is that of the recipe at this ratio.
        there = list(common) if ratio is None else at_ratio(main.source, common, ratio)
        return main.source, smaller_input(load(main.source, _of_first(there, main.source)), name, common)
    source, overrides = _at_own_ratio(main, name, common)
    if ratio is None:
        return source, overrides
    return source, at_ratio(source, overrides, ratio)


def _at_own_ratio(main: LoadedRecipe, name: str, common: Sequence[str]) -> tuple[str, list[str]]:
    stages = main.recipe.compression
    plain = stages is None and main.recipe.phases is None
    if name in ITSELF and plain:
        raise RecipeError(f"{main.name} has no compression, so that it is the arm dense")
    if name in ITSELF or (name == "dense" and plain):
        return main.source, list(common)
    replaced = any(defines(item.partition("=")[0]) for item in common)
    if (file := _beside(main, name)) is not None and not (replaced and name in DERIVED):
        return _of_file(main, file, common, replaced)
    if name == "dense":
        return main.source, dense(common)
    if name in DERIVED and stages is not None:
        return main.source, with_scorer(main, DERIVED[name], common)
    if name in methods() and stages is not None:
        kept = [item for item in common if not item.startswith(("compression.", "compression=", "budget"))]
        return main.source, [f"compression.method={name}", "budget=null", *kept]
    try:
        find(name)
    except RecipeError:
        raise RecipeError(_unknown(main, name)) from None
    return _of_file(main, name, common, False)


def _beside(main: LoadedRecipe, name: str) -> str | None:
    """The overlay of an arm: RECIPE_NAME.yaml beside the recipe's own file; None of a path."""
    if "/" in name or name.endswith((".yaml", ".yml")):
        return None
    path = find(main.source)
    file = path.with_name(f"{path.stem}_{name}.yaml")
    if not file.is_file():
        return None
    return file.stem if path.parent == SHIPPED else str(file)


def _of_file(main: LoadedRecipe, source: str, common: Sequence[str], replaced: bool) -> tuple[str, list[str]]:
    """An arm with a recipe of its own. Raises RecipeError if it has other samples or another length."""
    written = load(source).recipe
    overrides = [item for item in common if shared(item, written.compression is None)] + scaled_length(main, written, common)
    arm = load(source, _of_first(overrides, source))
    if replaced and (reason := incomparable(main.recipe, arm.recipe)) is not None:
        raise RecipeError(f"not comparable with the stages of the overrides: {reason}")
    check_alike(main, arm, otherwise="leave the arm out")
    return source, overrides


def _unknown(main: LoadedRecipe, name: str) -> str:
    """Message for a name that is no arm of a recipe."""
    path = find(main.source)
    files = sorted(file.stem.removeprefix(f"{path.stem}_") for file in path.parent.glob(f"{path.stem}_*.yaml"))
    derived = [*ITSELF, *DERIVED, *NAMES] if main.recipe.compression is not None else []
    known = list(dict.fromkeys(["dense", *derived, *files]))
    near = difflib.get_close_matches(name, known, 1)
    hint = f"; did you mean {near[0]}?" if near else ""
    return f"{main.name} has no such arm: there are {', '.join(known)}, methods, and LABEL=FILE.yaml with 'base: {main.name}'{hint}"
