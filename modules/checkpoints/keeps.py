"""Another keep for the stages of a trained model."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

from transformers import PreTrainedModel

from ..config import CompressionConfig
from ..rules.keeps import check_movable
from ..stage import stages_of


def set_keep(model: PreTrainedModel, keep: float | Mapping[str, float]) -> None:
    """Gives the stages of a trained model another keep, in place; the weights stay as they are.

    A model that was trained with keeps drawn per step (``training_keep``) is good at all of them; others lose more the further the keep is
    from the one that they were trained at. The keep is part of the config, and saved with the model.

    Args:
        model: compressed model.
        keep: fraction in (0, 1] for every stage that does not leave its layer out, or fractions by stage name. Stages that take over the
            decision of another one (``share``) have its keep.

    Raises:
        ValueError: a fraction is out of range, a stage does not exist, it keeps what its router learned, or it takes over the
            decision of another one, which keeps another fraction.
    """
    stages = {name: stage for name, stage in stages_of(model).items() if not stage.config.left_out}
    given = dict(keep) if isinstance(keep, Mapping) else dict.fromkeys(stages, float(keep))
    if unknown := sorted(given.keys() - stages.keys()):
        raise ValueError(f"keep names {', '.join(unknown)}, and the stages are {', '.join(stages) or 'none: the model is dense'}")
    for name, stage in stages.items():
        if stage.config.follows is None:
            continue
        leader = str(stage.reads)
        decided = given.get(leader, stages[leader].config.keep)
        if given.get(name, decided) != decided:
            raise ValueError(
                f"keep of stage {name!r} = {given[name]} differs from {decided} of {leader!r}, which decides for both: give {leader!r} a keep"
            )
        if leader in given:
            given[name] = given[leader]
    if not given:
        raise ValueError(
            "keep names no stage: give a keep for all stages, or keeps by the name of a stage"
            if stages
            else "keep is of stages, and the model has none: leave it out"
        )
    for name, value in given.items():
        if not 0 < value <= 1:
            raise ValueError(f"keep of stage {name!r} = {value} must be in (0, 1]: the fraction that is kept, not removed")
        check_movable([stages[name]], "keep", value)
    for name, value in given.items():
        stages[name].selector.move_cut(stages[name].config.keep, value)
        stages[name].config = replace(stages[name].config, keep=value, tokens=None)
    model.config.compression = CompressionConfig.from_dict(model.config.compression).with_keep(given).to_dict()
