"""The list of ``laconic recipes``: the shipped recipes by task, from their YAML files alone."""

from __future__ import annotations

from .files import read, shipped
from .schema import Recipe

_CONTROL_ARM = "Control arm of "


def listed(controls: bool = False) -> dict[str, dict[str, str]]:
    """First comment line of every shipped recipe, by task and by name.

    Args:
        controls: whether to include control arms: recipes that another recipe names in ``baselines``, and overlays whose first line
            begins with "Control arm of".
    """
    lines = {name: path.read_text().splitlines()[0].lstrip("# ") for name, path in shipped().items()}
    recipes = {name: read(path) for name, path in shipped().items()}
    arms = {arm for data in recipes.values() for arm in data.get("baselines", ())}
    arms |= {name for name, line in lines.items() if line.startswith(_CONTROL_ARM)}
    found: dict[str, dict[str, str]] = {}
    for name, data in recipes.items():
        if controls or name not in arms:
            found.setdefault(data.get("task", Recipe.model_fields["task"].default), {})[name] = lines[name]
    return dict(sorted(found.items()))
