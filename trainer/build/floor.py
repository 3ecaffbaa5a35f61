"""The floor of a keep: at least one token of an image stays, whatever a recipe requests."""

from __future__ import annotations

from ...modules.cost.cost import CostModel
from ..errors import RecipeError
from ..recipe.schema import Recipe


def check_floor(recipe: Recipe, cost: CostModel) -> None:
    """Raises RecipeError if a stage's own keep leaves less than one visual token of an image of the usual size; keeps of a budget have
    their floor in its target."""
    if recipe.compression is None or not cost.by_stack:
        return
    own = {stage.key for stage in recipe.compression.stages if stage.keep is not None}
    present = cost().present
    for stage in cost.stages:
        key, keep = stage.config.key, stage.config.keep
        if key not in own or stage.bypass or keep is None:
            continue
        # This rule counts from the tokens before the first stage.
        by_power = (stage.config.count or stage.scorer.count) == "dynamicvit"
        entering = (cost.shapes[stage.config.stack].routable if by_power else present[key]) / stage.unit
        left = entering * (keep ** (stage.place + 1) if by_power else keep)
        if left < 0.5:
            lowest = (1 / entering) ** (1 / (stage.place + 1)) if by_power else 1 / entering
            raise RecipeError(
                f"stage {key}: keep = {keep:g} leaves {left:.2g} of {entering:g} visual tokens of an image, and one always stays: set keep "
                f"to {lowest:.4f} or more"
            )
