"""The same weights with a control scorer in place of their own."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from dataclasses import replace

from transformers import PreTrainedModel

from ...modules.compress import compress, decompress
from ...modules.config import COMPLETE, CompressionConfig, PartConfig
from ...modules.stage import stages_of


def with_scorer(model: PreTrainedModel, scorer: str, kept: Mapping[str, float]) -> PreTrainedModel:
    """The same weights, shortcuts among them, with a control scorer; each stage keeps as many tokens as the model did on average, equally
    many in every row."""
    config = CompressionConfig.from_dict(model.config.compression)
    built, stages = stages_of(model), []
    for stage in config.stages:
        trained = built[stage.key]
        if stage.left_out:
            stages.append(stage)
            continue
        # In a causal model the selection must not depend on later tokens, unless the scope is complete before generation.
        by_threshold = trained.adapter.causal and stage.scope not in COMPLETE
        stages.append(
            replace(
                stage,
                scorer=PartConfig(scorer),
                estimator=None,
                # Only matching scorers find pairs; other scorers need a merger that drops.
                merger="drop" if trained.merger.needs_partner else stage.merger,
                selector="threshold" if by_threshold else "top_k",
                count=None if by_threshold else "round",
                # Control scorers are compared with a threshold for scores that are uniform.
                spread=0.0,
            )
        )
    fixed = [stage.key for stage in stages if stage.tokens is not None or stage.left_out]
    # 0 is not a valid keep, so a stage that kept nothing gets a tiny one.
    given = config.with_stages(stages).with_keep({key: max(keep, 1e-6) for key, keep in kept.items() if key not in fixed})
    variant = compress(decompress(copy.deepcopy(model)), given).to(model.device)
    for name, control in stages_of(variant).items():
        if (trained_shortcut := built[name].shortcut) is not None and control.shortcut is not None:
            control.shortcut.load_state_dict(trained_shortcut.state_dict())
        # The control scorers of causal models are uniform in (0, 1), so a threshold needs no calibration.
        control.selector.set_cut(kept[name])
    return variant
