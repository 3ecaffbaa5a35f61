"""Rules of which models, stacks, sites, scopes, parts and restores go together, in one ordered list.

A rule raises ValueError; the message names the stage, the key, the allowed values and the cure. It reads properties of parts and adapters,
never their names, so it holds for parts of other packages too. All rules run before the model is changed.
"""

from __future__ import annotations

from collections.abc import Iterable

from .config import BYPASS, COMPLETE, SITES, restore_key
from .cost.count_rules import COUNT_RULES
from .rules.candidate import Candidate, Rule
from .rules.estimators import estimator_for_its_scorer, weights_without_merging
from .rules.inputs import pixels_of_patches, prompt_of_a_language_model
from .rules.neighbours import decided_by_neighbours, spread_by_scores
from .rules.towers import layers_without_mask, whole_units
from .stage import Stage
from .tokens.ragged import ATTENTION


def check_config(candidate: Candidate) -> None:
    """Raises ValueError at the first broken rule among those that need no built stage."""
    candidate.adapter.check(candidate.model)
    for rule in CONFIG_RULES:
        rule(candidate)


def check_stages(candidate: Candidate) -> None:
    """Raises ValueError at the first broken rule among those that need built stages."""
    for rule in STAGE_RULES:
        rule(candidate)


# Rules for the config.


def some_stage(candidate: Candidate) -> None:
    if not candidate.config.stages:
        raise ValueError("compression.stages is empty: give at least one stage, or leave compression out for a dense model")


def known_stack(candidate: Candidate) -> None:
    known, names = candidate.stacks, ", ".join(map(repr, candidate.stacks))
    cure = (
        ""
        if len(known) > 1
        else "; stages of other stacks, as of methods for images, are for models of several, such as LLaVA: leave stack out"
    )
    for stage in candidate.config.stages:
        if stage.stack not in known:
            raise ValueError(f"stage {stage.key!r}: stack = {stage.stack!r} does not exist in this model: its stacks are {names}{cure}")
    candidate.adapter.check_stages(candidate.model, candidate.config)
    for stack in candidate.config.restores:
        if stack not in known:
            raise ValueError(f"{restore_key(stack)}: there is no such stack in this model: its stacks are {names}")


def offered_site(candidate: Candidate) -> None:
    for stage in candidate.config.stages:
        where, stack = f"stage {stage.key!r}", candidate.stack(stage)
        refused = stack.adapter.refused_sites(stack.config)
        if stage.site not in SITES:
            raise ValueError(f"{where}: site = {stage.site!r} does not exist: the sites are {', '.join(SITES)}")
        if not stack.adapter.sites:
            raise ValueError(f"{where}: stack = {stage.stack!r} has no site for a stage: {stack.adapter.__doc__}")
        if stage.site not in stack.adapter.sites:
            raise ValueError(f"{where}: site = {stage.site!r} is not offered by this backbone: it has {', '.join(stack.adapter.sites)}")
        if stage.site in refused:
            raise ValueError(f"{where}: site = {stage.site!r} is not offered: {refused[stage.site]}")


def offered_scope(candidate: Candidate) -> None:
    for stage in candidate.config.stages:
        scopes = candidate.stack(stage).scopes
        if stage.scope not in scopes:
            raise ValueError(
                f"stage {stage.key!r}: scope = {stage.scope!r} is not offered by this backbone: it has {', '.join(scopes)} (prompt needs a "
                "causal model, visual a vision-language model)"
            )


def first_tokens_of_causal_models(candidate: Candidate) -> None:
    for stage in candidate.config.stages:
        if (stage.first or stage.special) and not candidate.stack(stage).adapter.causal:
            raise ValueError(
                f"stage {stage.key!r}: protect = {dict(stage.protect or {})} is for causal models, whose first tokens are attention sinks: "
                "remove it; class tokens are protected in any case"
            )


def existing_layer(candidate: Candidate) -> None:
    for stage in candidate.config.stages:
        layers = len(candidate.stack(stage).layers)
        if not 0 <= stage.place < layers:
            raise ValueError(
                f"stage {stage.key!r}: layer = {stage.layer!r} must be an integer from 0 to {layers - 1}, {stage.stack or 'the backbone'} has {layers} layers"
            )


def valid_keep(candidate: Candidate) -> None:
    for stage in candidate.config.stages:
        where = f"stage {stage.key!r}"
        if stage.tokens is not None and stage.keep is not None:
            raise ValueError(f"{where}: give either keep or tokens, not both")
        if stage.free:
            raise ValueError(f"{where}: keep is not set: give the fraction of tokens kept, in (0, 1], or use a budget")
        if stage.keep is not None and not 0 < stage.keep <= 1 and not stage.left_out:
            hint = f"; keep = 0 leaves a layer out, at site {' or '.join(BYPASS)}" if stage.keep == 0 else ""
            raise ValueError(f"{where}: keep = {stage.keep} must be in (0, 1]: the fraction that is kept, not removed{hint}")
        if stage.count is not None and stage.count not in COUNT_RULES:
            raise ValueError(f"{where}: count = {stage.count!r} is no count rule: there are {', '.join(COUNT_RULES)}")


def one_stage_a_site(candidate: Candidate) -> None:
    seen: set[tuple[str, str, int | float | str]] = set()
    for stage in candidate.config.stages:
        place = (stage.stack, stage.site, stage.layer)
        if place in seen:
            raise ValueError(f"stage {stage.key!r}: there are two stages {stage.site} layer {stage.layer}: a site holds one")
        seen.add(place)


def nothing_inside_a_bypassed_layer(candidate: Candidate) -> None:
    stages = candidate.config.stages
    for whole in (stage for stage in stages if stage.site == "around"):
        same = [stage for stage in stages if (stage.stack, stage.layer) == (whole.stack, whole.layer)]
        inner = [stage.key for stage in same if stage.site not in ("around", "before")]
        if inner:
            raise ValueError(f"layer {whole.layer} has a stage around it, which excludes {', '.join(inner)} inside it: remove one of them")


def distinct_names(candidate: Candidate) -> None:
    names = [stage.key for stage in candidate.config.stages]
    if len(set(names)) < len(names):
        raise ValueError(f"stage names must differ: {', '.join(names)}")


def restore_after_shrinking(candidate: Candidate) -> None:
    for stack, restore in candidate.config.restores.items():
        where, shrinking = restore_key(stack), [stage for stage in candidate.config.of_stack(stack) if not stage.bypass]
        if not shrinking and candidate.adapter.begins_short(stack, candidate.config):
            continue
        if not shrinking:
            raise ValueError(f"{where} has no effect: no stage shortens the sequence")
        first = min(stage.place + (stage.site == "between") for stage in shrinking)
        layers = len(candidate.stacks[stack].layers)
        if not first < restore.layer <= layers:
            raise ValueError(
                f"{where}.layer = {restore.layer} must be from {first + 1} (after the first stage) to {layers} (after the last layer)"
            )


def served_attention(candidate: Candidate) -> None:
    for name in candidate.config.stacks:
        stack = candidate.stacks[name]
        served = stack.adapter.attentions
        if served is not None and stack.attention not in served:
            raise ValueError(
                f"attention {stack.attention!r} is not supported in a {candidate.adapter.model_type} with stages, whose layers get a mask "
                f"of the current tokens: load it with attn_implementation {' or '.join(map(repr, served))}"
            )


def every_token_restored(candidate: Candidate) -> None:
    for name in candidate.config.stacks:
        stack = candidate.stacks[name]
        reader = candidate.adapter.every_token(candidate.model, stack)
        short = [stage.key for stage in candidate.config.left_short(name)]
        if reader is not None and short:
            raise ValueError(
                f"{restore_key(name)} is needed: {reader}, and stages {', '.join(short)} remove tokens; give {restore_key(name)} = "
                f"{{layer: {len(stack.layers)}, by: unmerge}} (after the last layer), or 'by: rejoin', or stages around layers"
            )


# Rules for built stages.


def partner_found(candidate: Candidate) -> None:
    for stage in candidate.stages:
        scorer, merger = (stage.config.part(kind).name for kind in ("scorer", "merger"))
        if stage.merger.needs_partner and not stage.scorer.matches:
            raise ValueError(
                f"stage {stage.config.key!r}: merger {merger!r} merges the pairs that a matching scorer finds ('bipartite'), not those of "
                f"{scorer!r}; try 'squeeze'"
            )


def matching_is_for_shrinking(candidate: Candidate) -> None:
    for stage in candidate.stages:
        where, scorer = f"stage {stage.config.key!r}", stage.config.part("scorer").name
        if stage.scorer.matches and stage.bypass:
            raise ValueError(f"{where}: scorer {scorer!r} finds pairs to merge, and around a layer nothing is merged; take another one")
        if stage.scorer.matches and stage.config.keep is not None and stage.config.keep < 0.5:
            raise ValueError(
                f"{where}: keep = {stage.config.keep}: scorer {scorer!r} can remove at most half of the tokens: give at least 0.5"
            )


def nothing_merged_around_a_layer(candidate: Candidate) -> None:
    for stage in candidate.stages:
        if stage.bypass and not stage.merger.drops:
            raise ValueError(
                f"stage {stage.config.key!r}: merger = {stage.config.part('merger').name!r}: at site {stage.config.site!r} no token "
                "goes away; leave merger out"
            )


def scores_for_the_selector(candidate: Candidate) -> None:
    for stage in candidate.stages:
        where = f"stage {stage.config.key!r}"
        scorer, selector, merger = (stage.config.part(kind).name for kind in ("scorer", "selector", "merger"))
        if stage.selector.needs_probabilities and not stage.scorer.probabilities:
            raise ValueError(f"{where}: selector {selector!r} needs keep probabilities, which scorer {scorer!r} does not give")
        if not stage.selector.adaptive:
            if stage.selector.calibrates and stage.config.count not in (None, "round"):
                raise ValueError(
                    f"{where}: count = {stage.config.count!r} is a number of tokens, and in evaluation selector {selector!r} has a threshold, "
                    "which follows keep: leave count out and give each stage its own keep, or take top_k"
                )
            continue
        if stage.config.count is not None:
            raise ValueError(
                f"{where}: count = {stage.config.count!r} must be left out: selector {selector!r} keeps a varying number of tokens"
            )
        limited = stage.merger.outputs is not None or stage.merger.most is not None
        if stage.scorer.matches or limited or stage.config.tokens is not None:
            fixed = stage.config.tokens
            what = f"tokens = {fixed}" if fixed is not None else f"scorer {scorer!r} with merger {merger!r}"
            raise ValueError(
                f"{where}: selector {selector!r} keeps a different number per row, which {what} does not allow; take 'top_k', or give keep"
            )


def outputs_of_the_merger(candidate: Candidate) -> None:
    uneven: dict[str, bool] = {}
    for stage in candidate.stages:
        where, merger, stack = f"stage {stage.config.key!r}", stage.config.part("merger").name, stage.config.stack
        restore = candidate.config.restores.get(stack)
        if restore is not None and stage.config.place >= restore.layer:
            uneven[stack] = False
        if stage.merger.outputs is not None:
            if stage.config.tokens != stage.merger.outputs:
                raise ValueError(f"{where}: merger {merger!r} makes {stage.merger.outputs} tokens: give tokens = {stage.merger.outputs}")
            if uneven.get(stack):
                raise ValueError(f"{where}: merger {merger!r} needs rows of equal length: take selector 'top_k' in the stages before it")
        uneven[stack] = uneven.get(stack, False) or (stage.selector.adaptive and not stage.bypass)


def readable_layer(candidate: Candidate) -> None:
    for stage in candidate.stages:
        where, adapter = f"stage {stage.config.key!r}", stage.adapter
        reads, scorer = stage.scorer, stage.config.part("scorer").name
        for needed, of, missing in ((reads.reads_cls, "CLS", adapter.no_cls_query), (reads.reads_query, "a token", adapter.no_query)):
            if needed and missing is not None:
                raise ValueError(f"{where}: scorer {scorer!r} needs the query of {of}, and {missing}; take 'learned'")
        for kind, part in (("scorer", stage.scorer), ("merger", stage.merger)):
            if part.reads_keys and adapter.no_keys is not None:
                name = stage.config.part(kind).name
                raise ValueError(f"{where}: {kind} {name!r} compares keys, and {adapter.no_keys}: take {{name: {name}, metric: tokens}}")


def attention_for_rows_of_unequal_length(candidate: Candidate) -> None:
    for stage in candidate.stages:
        attention = candidate.stack(stage).attention
        if stage.selector.adaptive and attention not in ("sdpa", "eager", ATTENTION):
            raise ValueError(
                f"stage {stage.config.key!r}: selector {stage.config.part('selector').name!r} makes rows of different lengths, which "
                f"attention {attention!r} does not support here: load the model with attn_implementation 'sdpa' or 'eager'"
            )


def causal_shrinking(candidate: Candidate) -> None:
    """A causal model must answer at every position of the text, without using later tokens."""
    for name, stack in candidate.stacks.items():
        shrinking = [stage for stage in candidate.stages if stage.config.stack == name and not stage.bypass]
        restore, layers = candidate.config.restores.get(name), len(stack.layers)
        by = None if restore is None else restore.by
        if not stack.adapter.causal:
            if by == "dechunk":
                raise ValueError("compression.restore.by = 'dechunk' is for chunks of causal models; take unmerge or rejoin")
            continue
        complete = [stage for stage in shrinking if stage.config.scope in COMPLETE]
        at_end = restore is not None and by == "rejoin" and restore.layer == layers
        if (complete or candidate.adapter.begins_short(name, candidate.config)) and not at_end:
            raise ValueError(
                f"{restore_key(name)}: tokens of a prompt or an image are removed, and the head answers at every place, so that only "
                f"{{layer: {layers}, by: rejoin}} is possible: leave it out, or give that"
            )
        for stage in shrinking:
            where = f"stage {stage.config.key!r}"
            scorer, selector, merger = (stage.config.part(kind).name for kind in ("scorer", "selector", "merger"))
            if not stage.merger.causal:
                raise ValueError(f"{where}: merger {merger!r} may mix later tokens into earlier ones: take drop or chunk_mean")
            if stage.config.scope in COMPLETE:
                if not stage.merger.drops:
                    raise ValueError(f"{where}: scope {stage.config.scope!r} goes with merger 'drop', not {merger!r}")
            elif stage.lookahead:
                raise ValueError(
                    f"{where}: scorer {scorer!r} with selector {selector!r} is non-causal: earlier tokens would depend on later ones; "
                    "take scorer 'boundary' or 'linear' with selector 'threshold' or 'gumbel', or scope 'prompt'"
                )
            elif by != "dechunk":
                raise ValueError(
                    f"{where}: the head of a causal model answers at every place: give compression.restore = {{layer: j, by: dechunk}}, "
                    f"j up to {layers}, which gives each token the layers' output for its chunk; or take scope 'prompt'"
                )
            elif len(shrinking) > 1:
                raise ValueError(f"{where}: only one stage makes chunks, and {len(shrinking)} were given: leave one of them")


CONFIG_RULES: tuple[Rule, ...] = (
    some_stage,
    known_stack,
    offered_site,
    offered_scope,
    first_tokens_of_causal_models,
    existing_layer,
    valid_keep,
    one_stage_a_site,
    decided_by_neighbours,
    nothing_inside_a_bypassed_layer,
    distinct_names,
    restore_after_shrinking,
    served_attention,
    every_token_restored,
)
STAGE_RULES: tuple[Rule, ...] = (
    estimator_for_its_scorer,
    weights_without_merging,
    partner_found,
    matching_is_for_shrinking,
    nothing_merged_around_a_layer,
    scores_for_the_selector,
    outputs_of_the_merger,
    readable_layer,
    spread_by_scores,
    prompt_of_a_language_model,
    pixels_of_patches,
    attention_for_rows_of_unequal_length,
    layers_without_mask,
    whole_units,
    causal_shrinking,
)


def check_deployable(stages: Iterable[Stage]) -> None:
    """Raises ValueError if a stage of a causal model cannot run token by token."""
    noncausal = [stage.config.key for stage in stages if not stage.deployable]
    if noncausal:
        raise ValueError(
            f"stages {', '.join(noncausal)} are non-causal: their decisions depend on tokens that are not generated yet. Train with scorer "
            "'linear' and selector 'threshold' or 'predictor' (top-k in training, a causal predictor in evaluation), or call "
            "decompress(model)"
        )


def check_held(stages: Iterable[Stage], held: bool) -> None:
    """Raises ValueError if a stage's selector does not hold the requested keep and no budget does.

    Args:
        stages: stages of a model.
        held: a budget's controller or regularizer holds it.
    """
    unheld = [stage.config.key for stage in stages if stage.selector.needs_probabilities]
    if unheld and not held:
        raise ValueError(
            f"the selectors of {', '.join(unheld)} keep tokens with probability above 0.5, and nothing brings that to the requested keep: "
            "leave keep out and give budget.target (its controller holds it; controller 'fixed' needs budget.regularizer: macs_squared, "
            "ratio_mse or another one), or take selector 'threshold', or 'top_k' if the model is not causal"
        )


def check_noise(stages: Iterable[Stage], noise: float) -> None:
    """Raises ValueError if a budget has exploration noise, and no stage's decisions would have it.

    Args:
        stages: stages of a model.
        noise: strength of the noise.
    """
    routers = [stage for stage in stages if not stage.config.left_out]
    if noise and all(stage.estimator is None or stage.selector.ignores_noise for stage in routers):
        raise ValueError(
            f"budget.noise = {noise} has no effect: exploration noise is for trained scorers with selector 'top_k', 'predictor', 'gumbel', or "
            "'threshold' with calibrate: false, and no stage has these: remove it, or take such a selector"
        )
