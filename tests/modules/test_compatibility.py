"""Every rule of what goes together is broken here, for each of its reasons, and is the one that says so."""

from __future__ import annotations

import ast
import inspect
import re
from collections.abc import Callable
from typing import Any

import pytest
from transformers import AutoConfig, AutoModelForMaskedLM, PreTrainedModel

from laconic import CompressionConfig, StageConfig, compress
from laconic.modules import compatibility
from laconic.modules.compatibility import CONFIG_RULES, STAGE_RULES, Rule
from laconic.modules.rules import estimators, neighbours, towers
from laconic.modules.rules.depth import check_depth
from tests.matrix import decoders, encoders, image_text, vision, visual
from tests.modules import test_masked_images as masked_images

Case = tuple[str | Callable[[], PreTrainedModel], list[dict[str, Any]], dict[str, Any] | None, str]


def _flash(family: str) -> Callable[[], PreTrainedModel]:
    def make() -> PreTrainedModel:
        model = _dense(family)
        model.config._attn_implementation = "flash_attention_2"
        return model

    return make


def _masked_lm() -> PreTrainedModel:
    return AutoModelForMaskedLM.from_config(AutoConfig.for_model(**{**encoders.dense("bert").config.to_dict(), "architectures": None}))


_TOWER = {"stack": "vision", "layer": 1, "scorer": "linear"}


def _dense(family: str) -> PreTrainedModel:
    return next(kind.dense(family) for kind in (vision, encoders, decoders, visual, image_text) if family in kind.FAMILIES)


_POOL = {"tokens": 4, "keep": None, "scorer": "uniform_grid", "merger": {"name": "pool", "outputs": 4}}
_PROMPT = {"scorer": "linear", "scope": "prompt"}
_TEXT = {"stack": "text", "scope": "visual", "scorer": "last_query"}
_CHUNKS: dict[str, Any] = {"scorer": "boundary", "selector": "gumbel"}
_AROUND: dict[str, Any] = {"site": "around"}
_LINEAR = {"scorer": "linear"}
END = {"layer": 4, "by": "rejoin"}
# Model, stages (with layer 1 and keep 0.5 unless they say otherwise), restore, message.
CASES: dict[str, list[Case]] = {
    "some_stage": [("vit", [], None, "compression.stages is empty: give at least one stage")],
    "known_stack": [
        ("vit", [{"stack": "text"}], None, "stage 'text.before_1': stack = 'text' does not exist in this model: its stacks are ''"),
        ("llava", [_TEXT], END, "compression.restore: there is no such stack in this model: its stacks are 'vision', 'projector', 'text'"),
        ("vit", [{}], {"text": {"layer": 2}}, "compression.restore.text: there is no such stack in this model: its stacks are ''"),
    ],
    "offered_site": [
        ("vit", [{"site": "betwen"}], None, "site = 'betwen' does not exist: the sites are before, between, around"),
        (masked_images.dense, [{"stack": "decoder"}], None, "stack = 'decoder' has no site for a stage"),
        ("llama", [{"site": "between"}], None, "site = 'between' is not offered by this backbone: it has before, around"),
        ("gpt_neox", [{"site": "around_mlp"}], None, "site = 'around_mlp' is not offered: .*use_parallel_residual"),
    ],
    "offered_scope": [
        (
            family,
            [{"scope": scope}],
            None,
            rf"stage 'before_1': scope = '{scope}' is not offered by this backbone: it has {offered} \(prompt",
        )
        for family, scope, offered in (
            ("vit", "prompt", "all"),
            ("vit", "visual", "all"),
            ("bert", "prompt", "all"),
            ("modernbert", "prompt", "all"),
            ("llama", "visual", "all, prompt"),
        )
    ],
    "first_tokens_of_causal_models": [
        ("vit", [{"protect": {"first": 1}}], None, r"protect = \{'first': 1\} is for causal models, .*: remove it")
    ],
    "existing_layer": [("vit", [{"layer": layer}], None, f"layer = {layer} must be an integer from 0 to 3") for layer in (4, -1)],
    "valid_keep": [
        ("vit", [{"tokens": 9}], None, "give either keep or tokens, not both"),
        ("vit", [{"keep": None}], None, r"keep is not set: give the fraction of tokens kept, in \(0, 1\]"),
        ("vit", [{"keep": 1.2}], None, r"keep = 1.2 must be in \(0, 1\]: the fraction that is kept, not removed"),
        ("vit", [{"count": "ceil"}], None, "count = 'ceil' is no count rule: there are round"),
    ],
    "one_stage_a_site": [("vit", [{}, {"name": "other"}], None, "stage 'other': there are two stages before layer 1: a site holds one")],
    "decided_by_neighbours": [
        ("llama", stages, restore, message)
        for stages, restore, message in (
            ([{"spread": 1.0}], None, "spread = 1.0 is for stages around layers with keep above 0: remove it"),
            (
                [_AROUND | {"layer": 0}, _AROUND | {"follows": 0, "keep": 0}],
                None,
                "follows = 0 is for stages around layers with keep above 0",
            ),
            ([_AROUND | {"follows": 0}], None, "follows = 0: give the layer of an earlier stage around it, which decides by itself"),
            ([_AROUND | {"spread": 1.0}], None, "spread = 1.0: there is no earlier stage around a layer, so remove it"),
            (
                [_AROUND | {"layer": 0}, _CHUNKS, _AROUND | {"layer": 2, "follows": 0}],
                {"layer": 3, "by": "dechunk"},
                "stages before_1 remove tokens since 'around_0' has decided: remove follows = 0",
            ),
            (
                [_AROUND | {"layer": 0}, _AROUND | {"follows": 0, "spread": 1.0}],
                None,
                "spread = 1.0 has no effect on a decision of another",
            ),
            (
                [_AROUND | {"layer": 0}, _AROUND | {"follows": 0, "keep": 0.6}],
                None,
                "keep = 0.6 differs from 0.5 of 'around_0', which decides",
            ),
        )
    ],
    "nothing_inside_a_bypassed_layer": [
        ("vit", [_AROUND, {"site": "between"}], None, "layer 1 has a stage around it, which excludes between_1 inside it")
    ],
    "distinct_names": [("vit", [{"name": "one"}, {"name": "one", "layer": 2}], None, "stage names must differ: one, one")],
    "restore_after_shrinking": [
        ("vit", [_AROUND], END, "compression.restore has no effect: no stage shortens the sequence"),
        ("vit", [{}], {"layer": 1}, "compression.restore.layer = 1 must be from 2"),
    ],
    "served_attention": [
        (_flash(family), [{}], None, "attention 'flash_attention_2' is not supported .* attn_implementation 'sdpa' or 'eager'")
        for family in ("bert", "modernbert")
    ],
    "every_token_restored": [
        (_masked_lm, [{}], None, "compression.restore is needed: .* reads every token, and stages before_1 remove tokens"),
        (masked_images.dense, [{}], None, "compression.restore is needed: the decoder of ViTMAEForPreTraining"),
    ],
    "estimator_for_its_scorer": [
        ("vit", [{"scorer": "random", "estimator": "key_bias"}], None, "scorer 'random' is not trained: leave estimator out"),
        (
            "llama",
            [_AROUND | {"scorer": "linear", "estimator": "confidence"}],
            None,
            "estimator 'confidence' needs a causal model's chunks",
        ),
        ("vit", [{"estimator": "gate"}], None, "estimator 'gate' scales a layer's output at bypass sites: give site = 'around'"),
        (
            "vit",
            [{"estimator": "token_labels"}],
            None,
            "estimator 'token_labels' cannot train scorer 'learned'; take 'straight_through'",
        ),
        (
            "vit",
            [{"layer": 3, "site": "between", "estimator": "key_bias"}],
            None,
            "estimator 'key_bias' learns from attention, and no attention follows",
        ),
        (
            "vit",
            [_AROUND | {"site": "around_mlp", "estimator": "key_bias"}],
            None,
            "estimator 'key_bias' learns from attention, and no attention follows",
        ),
    ],
    "weights_without_merging": [
        (
            "vit",
            [{"scorer": "self_attention", "estimator": {"name": "soft_top_k", "weighted": True}, "merger": "nearest"}],
            None,
            "'soft_top_k' multiplies tokens by weights in training alone, .* give estimator = 'soft_top_k' without weighted",
        )
    ],
    "partner_found": [("vit", [{"merger": "bipartite"}], None, r"merges the pairs that a matching scorer finds \('bipartite'\)")],
    "matching_is_for_shrinking": [
        ("vit", [_AROUND | {"scorer": "bipartite"}], None, "scorer 'bipartite' finds pairs to merge, and around a layer nothing is merged"),
        ("vit", [{"scorer": "bipartite", "keep": 0.3}], None, "keep = 0.3: scorer 'bipartite' can remove at most half of the tokens"),
    ],
    "nothing_merged_around_a_layer": [
        ("vit", [_AROUND | {"merger": "fuse"}], None, "merger = 'fuse': at site 'around' no token goes away; leave merger out")
    ],
    "scores_for_the_selector": [
        ("vit", [{"scorer": "evidence", "selector": "gumbel"}], None, "selector 'gumbel' needs keep probabilities"),
        ("vit", [{"selector": "threshold", "count": "evit"}], None, "count = 'evit' must be left out: selector 'threshold'"),
        (
            "gpt2",
            [_PROMPT | {"selector": "predictor", "count": "cosine"}],
            END,
            "count = 'cosine' is a number of tokens, and in evaluation",
        ),
        ("vit", [{"selector": "threshold", "keep": None, "tokens": 9}], None, "keeps a different number per row, which tokens = 9"),
        ("vit", [{"scorer": "bipartite", "selector": "threshold"}], None, "keeps a different number per row, which scorer 'bipartite'"),
    ],
    "outputs_of_the_merger": [
        ("vit", [{"merger": "pool"}], None, "merger 'pool' makes 16 tokens: give tokens = 16"),
        ("vit", [{"selector": "threshold"}, {"layer": 2, **_POOL}], None, "merger 'pool' needs rows of equal length"),
    ],
    "readable_layer": [
        ("modernbert", [{"scorer": "cls_attention"}], None, "needs the query of CLS, and .*; take 'learned'"),
        ("gpt2", [_PROMPT | {"scorer": "last_query"}], END, "scorer 'last_query' needs the query of a token, and .*; take 'learned'"),
        ("modernbert", [{"scorer": "bipartite", "merger": "bipartite"}], None, "scorer 'bipartite' compares keys, and .*metric: tokens"),
    ],
    "spread_by_scores": [
        (
            "llama",
            [_AROUND | _LINEAR | {"layer": 0}, _AROUND | _LINEAR | {"spread": 1.0, "selector": "predictor"}],
            None,
            "spread = 1.0 changes scores, and selector 'predictor' decides without them when deployed: take 'threshold'",
        )
    ],
    "prompt_of_a_language_model": [
        ("vit", [{"scorer": "query_similarity"}], None, "'query_similarity' reads where the prompt of a row ends.*take scorer 'learned'"),
        (
            "llava",
            [_TOWER | {"layer": 0, "scorer": "query_similarity"}],
            None,
            "take stack = 'text', scope = 'visual', or scorer 'learned'",
        ),
        ("gpt2", [_AROUND | {"scorer": "query_similarity"}], None, "take scope = 'prompt', or scorer 'linear'"),
    ],
    "pixels_of_patches": [
        (
            "llava",
            [_TEXT | {"scorer": "patch_energy"}],
            None,
            "'patch_energy' reads the pixels .*take stack = 'vision' or stack = 'projector' or a",
        ),
        ("qwen3_vl", [_TOWER | {"scorer": "patch_energy"}], None, "no patches of images of one size: take a scorer of tokens, 'learned'"),
    ],
    "attention_for_rows_of_unequal_length": [
        (_flash("vit"), [{"selector": "threshold"}], None, "selector 'threshold' makes rows of different lengths, which attention 'flash")
    ],
    "layers_without_mask": [
        (
            "internvl",
            [_TOWER | {"estimator": "key_bias"}],
            None,
            "estimator = 'key_bias' weighs keys, and layers of an InternVL's tower take no mask",
        ),
        ("internvl", [_TOWER | {"merger": {"name": "squeeze", "proportional": True}}], None, "merger with proportional = true weighs keys"),
        ("internvl", [_TOWER | {"selector": "threshold"}], None, "'threshold' makes rows of different lengths, .*no mask: take 'top_k'"),
    ],
    "whole_units": [
        (
            "smolvlm",
            [_TOWER | {"scorer": "bipartite", "merger": "bipartite"}],
            None,
            "4 patches are joined .*, and scorer 'bipartite' .*'squeeze'",
        ),
        ("smolvlm", [_TOWER | {"merger": "fuse"}], None, "merger 'fuse' makes tokens that are no patches: take 'drop'"),
    ],
    "causal_shrinking": [
        ("vit", [{}], {"layer": 4, "by": "dechunk"}, "compression.restore.by = 'dechunk' is for chunks of causal models"),
        ("llama", [_CHUNKS | {"merger": "squeeze"}], {"layer": 3, "by": "dechunk"}, "merger 'squeeze' may mix later tokens into earlier"),
        ("llama", [_PROMPT | {"merger": "chunk_mean"}], END, "scope 'prompt' goes with merger 'drop', not 'chunk_mean'"),
        *(
            (name, [stage], restore, rf"compression.restore{of}: tokens .* only \{{layer: 4, by: rejoin\}} is possible: leave it out")
            for name, stage, of, wrap in (
                ("llama", _PROMPT, "", lambda where: where),
                ("llava", _TEXT, ".text", lambda where: {"text": where}),
                ("llava", {"layer": 0, "stack": "projector", "scorer": "random"}, ".text", lambda where: {"text": where}),
            )
            for restore in map(wrap, ({"layer": 3, "by": "rejoin"}, {"layer": 4, "by": "unmerge"}))
        ),
        ("llama", [{"scorer": "linear"}], {"layer": 3, "by": "dechunk"}, "scorer 'linear' with selector 'top_k' is non-causal"),
        ("llama", [_CHUNKS], END, "the head of a causal model answers at every place: give .*by: dechunk"),
        ("llama", [_CHUNKS, _CHUNKS | {"layer": 2}], {"layer": 3, "by": "dechunk"}, "one stage makes chunks, and 2 were given"),
    ],
}


def _broken(case: Case) -> tuple[str, int]:
    """The function that refuses a case, and the line that does."""
    model, stages, restore, message = case
    made = _dense(model) if isinstance(model, str) else model()
    config = CompressionConfig([StageConfig(**{"layer": 1, "keep": 0.5, **stage}) for stage in stages], restore)
    original = type(made)
    with pytest.raises(ValueError, match=message) as caught:
        compress(made, config)
    assert type(made) is original
    assert not hasattr(made.config, "compression")
    return caught.traceback[-1].name, caught.traceback[-1].lineno + 1


@pytest.mark.parametrize("rule", [*CONFIG_RULES, *STAGE_RULES], ids=lambda rule: rule.__name__)
def test_a_rule_refuses_what_breaks_it_for_each_of_its_reasons(rule: Rule) -> None:
    assert rule.__name__ in CASES, "a rule without a case: add what breaks it to CASES"
    lines, first = inspect.getsourcelines(rule)
    reasons = [node for node in ast.walk(ast.parse("".join(lines))) if isinstance(node, ast.Raise)]
    refused = set()
    for case in CASES[rule.__name__]:
        name, line = _broken(case)
        assert name == rule.__name__, case
        refused |= {node.lineno for node in reasons if node.lineno <= line - first + 1 <= (node.end_lineno or 0)}
    assert refused == {node.lineno for node in reasons}


def test_a_rule_asks_for_properties_and_no_case_is_of_a_rule_that_is_gone() -> None:
    assert list(CASES) == [rule.__name__ for rule in (*CONFIG_RULES, *STAGE_RULES)]
    # Parts of other packages are held to the same rules: no part is compared with a name.
    source = "".join(map(inspect.getsource, (compatibility, estimators, neighbours, towers)))
    assert not re.search(
        r"(==|!=|\bin\b) *\(?[\"'](learned|bipartite|evidence|top_k|threshold|gumbel|drop|pool|gate|token_labels)[\"']", source
    )
    assert "isinstance(stage.s" not in source


def test_a_restore_that_alone_is_possible_may_be_left_out_and_fractions_of_the_depth_become_layers() -> None:
    model = compress(_dense("llama"), CompressionConfig([StageConfig(**(_PROMPT | {"layer": 0.5, "keep": 0.5}))]))
    assert model.config.compression["restore"] == END
    assert [(stage["layer"], stage["name"]) for stage in model.config.compression["stages"]] == [(2, "before_2")]
    given = CompressionConfig(
        [{"layer": [1 / 3, 0.5, 0.75], "stack": "text", "scope": "visual", "scorer": "random", "keep": 0.5, "name": None}]
    )
    assert [stage.layer for stage in compress(_dense("llava"), given).adapter.resolved(given, _dense("llava").config).stages] == [1, 2, 3]
    (named,) = StageConfig(layer=0.5, keep=0.5, name="middle").at_depth(4)
    assert (named.layer, named.key) == (2, "middle")
    spans = {":": [0, 1, 2, 3], "0.5:": [2, 3], ":.5": [0, 1], "1:3": [1, 2], "1:0.75": [1, 2]}
    assert {span: [stage.layer for stage in StageConfig(layer=span, keep=0.5).at_depth(4)] for span in spans} == spans
    assert [stage.key for stage in StageConfig(layer="0.5:", keep=0.5, stack="text").at_depth(4)] == ["text.before_2", "text.before_3"]
    # HiDrop's stages: four fractions between two spans.
    hidrop: dict[str, list[float | str]] = {"around": [":0.28125", "0.78125:"], "before": [0.3125, 0.4375, 0.5, 0.5625]}
    for depth in (15, 16, 32):
        check_depth(hidrop, depth, "text")
    with pytest.raises(
        ValueError, match=r"0.5625: text has 12 layers, too few .*: 15 layers or more are needed; take a deeper model, another"
    ):
        check_depth(hidrop, 12, "text")
    with pytest.raises(ValueError, match="text has 4 layers, too few for a layer of each: 5 layers or more are needed"):
        compress(_dense("llava"), CompressionConfig([StageConfig(**(_TEXT | {"layer": layer, "keep": 0.5})) for layer in (0.5, 0.7)]))
    with pytest.raises(ValueError, match="too few for a layer of each; take a deeper model"):
        check_depth({"before": [0.5, 0.5]}, 8, "")
    with pytest.raises(ValueError, match=r"layer = '0.1:0.2' has no layer in a stack of 4"):
        StageConfig(layer="0.1:0.2", keep=0.5).at_depth(4)
    with pytest.raises(ValueError, match=r"name = 'mine' would be that of all layers ':': leave it out"):
        StageConfig(layer=":", keep=0.5, name="mine")
    for wrong in (0.0, 1.0, 1.5, -0.5, True, "2", "1.5:", "a:b"):
        with pytest.raises(ValueError, match=r"compression.stages\[\].layer = .* a fraction of the layers between 0 and 1"):
            StageConfig(layer=wrong, keep=0.5)
