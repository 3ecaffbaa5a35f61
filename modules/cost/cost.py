"""CostModel: the cost of a compressed forward, computed from token counts without running a forward."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any

from torch import Tensor
from transformers import PreTrainedModel

from ..backbones import adapter_of
from ..compressed_model import CompressedModel, build_stages
from ..config import CompressionConfig
from ..stage import Stage, stages_of
from ..tokens.trace import Trace
from .shape import LayerTokens, StackShape
from .stack_use import StackUse, ratio_of


@dataclass(frozen=True)
class Cost:
    """Cost of one row's forward.

    Attributes:
        stacks: tokens of each layer, protected tokens included, by name of each stack with stages.
        dense: tokens of every layer of the dense model, by name of each stack with stages.
        macs: multiply-accumulates of all stacks, including routers, mergers, embedding and head.
        dense_macs: multiply-accumulates of the dense model.
        stage_macs: multiply-accumulates of each stage's router and merger, by stage name.
        keep: requested keep, by stage name.
        present: routable tokens entering each stage, by stage name.
        kept: routable tokens leaving each stage (a bypass: processed), by stage name; the mean if rows differ.
        activation_bytes: estimated bytes that a training step holds for backward, at 4 bytes a value.
        dense_activation_bytes: the same for the dense model.
        stack_keep: routable tokens processed ÷ those of the dense model, mean over the layers of each stack with stages; of a
            vision-language model these are its visual tokens.
        stack_macs_ratio: MACs ÷ dense MACs of each stack with stages.
        kv_bytes: bytes of a row's keys and values in a causal model's cache, at 4 bytes a value; 0 for other models.
        dense_kv_bytes: the same for the dense model.
    """

    stacks: Mapping[str, tuple[LayerTokens, ...]]
    dense: Mapping[str, int]
    macs: int
    dense_macs: int
    stage_macs: Mapping[str, int]
    keep: Mapping[str, float]
    present: Mapping[str, float]
    kept: Mapping[str, float]
    activation_bytes: int
    dense_activation_bytes: int
    stack_keep: Mapping[str, float]
    stack_macs_ratio: Mapping[str, float]
    kv_bytes: int = 0
    dense_kv_bytes: int = 0

    @property
    def layers(self) -> tuple[LayerTokens, ...]:
        """Tokens of each layer of the stacks with stages, one stack after the other."""
        return tuple(tokens for layers in self.stacks.values() for tokens in layers)

    @property
    def dense_tokens(self) -> int:
        """Tokens of every layer of the dense model, in the first stack with stages."""
        return next(iter(self.dense.values()))

    @property
    def macs_ratio(self) -> float:
        """MACs of the compressed forward ÷ MACs of the dense forward: the compression ratio."""
        return self.macs / self.dense_macs

    @property
    def mean_token_fraction(self) -> float:
        """Mean over layers of tokens processed ÷ tokens processed in the dense model."""
        layers = len(self.layers)
        processed = {name: sum(tokens.attention + tokens.mlp for tokens in stack) for name, stack in self.stacks.items()}
        return sum(tokens / (2 * self.dense[name] * layers) for name, tokens in processed.items())


class CostModel:
    """Cost as a function of the keeps of a model's stages.

    Args:
        model: dense or compressed model.
        config: stages for a dense model; None for a compressed model, which has its own.
        size: input size, (height, width) in pixels or a number of text tokens; None means the configured image size, or 1024 tokens.

    Attributes:
        shapes: StackShape by stack name.
        stages: stages of the model, in running order.
    """

    def __init__(self, model: PreTrainedModel, config: CompressionConfig | None = None, size: tuple[int, int] | int | None = None) -> None:
        self.stages: list[Stage] = []
        adapter = adapter_of(model)
        if isinstance(model, CompressedModel):
            config = CompressionConfig.from_dict(model.config.compression)
            self.stages = list(stages_of(model).values())
        elif config is not None:
            config = adapter.resolved(config, model.config)
            # Stages whose keep a budget will set keep everything for now.
            filled = config.with_keep({stage.key: 1.0 for stage in config.stages if stage.free})
            self.stages = build_stages(model, filled, adapter)
        self._restores = {} if config is None else {stack: restore.layer for stack, restore in config.restores.items()}
        self._causal = {stack.name for stack in adapter.stacks(model) if stack.adapter.causal}
        self.shapes: dict[str, StackShape] = adapter.shapes(model, size)
        self._adapter = adapter
        # The main stack is reported without stages too, if an earlier one shortens it or if no stack has stages.
        staged = {stage.config.stack for stage in self.stages}
        fed = {adapter.feeds[name] for name in staged if name in adapter.feeds}
        self._shown = [name for name in self.shapes if name in staged | fed | self._fed_by(fed)] or [adapter.stack_name]

    @property
    def shape(self) -> StackShape:
        """StackShape of the first stack that is reported."""
        return self.shapes[self._shown[0]]

    @property
    def main(self) -> StackShape:
        """StackShape of the main stack, from which the head reads."""
        return self.shapes[self._adapter.stack_name]

    def __call__(self, keep: Mapping[str, float] | None = None) -> Cost:
        """The Cost with the given keep by stage name; other stages use their own."""
        requested = keep or {}

        def kept(stage: Stage, present: float, entering: float) -> float:
            return stage.expected(present, entering, requested.get(stage.config.key))

        def idle(stage: Stage) -> bool:
            return stage.idle_at(requested.get(stage.config.key, stage.config.keep))

        walks = self._walks(kept, idle)
        macs, dense_macs, activations, dense_activations, cached, dense_cached = 0.0, 0.0, 0.0, 0.0, 0.0, 0.0
        tokens: dict[str, tuple[LayerTokens, ...]] = {}
        stage_macs: dict[str, float] = {}
        ratios: dict[str, float] = {}
        for name, shape in self.shapes.items():
            walk, dense = walks[name], shape.dense_layers()
            layers = tokens[name] = tuple(LayerTokens(shape.protected + attention, shape.protected + mlp) for attention, mlp in walk.layers)
            own = shape.rows * (shape.model_macs(layers, shape.protected + walk.leaving) + sum(walk.stage_macs.values()))
            own += 0.0 if self.stages else shape.rows * shape.dense_only_macs
            whole = shape.rows * (shape.model_macs(dense) + shape.dense_only_macs)
            macs, dense_macs, ratios[name] = macs + own, dense_macs + whole, own / whole if whole else 1.0
            activations += shape.rows * shape.activation_bytes(layers)
            dense_activations += shape.rows * shape.activation_bytes(dense)
            stage_macs |= {stage: shape.rows * value for stage, value in walk.stage_macs.items()}
            if name in self._causal:
                cached += shape.kv_bytes(layers)
                dense_cached += shape.kv_bytes(dense)
        present = {name: number for walk in walks.values() for name, number in walk.present.items()}
        leaving = {name: number for walk in walks.values() for name, number in walk.kept.items()}
        return Cost(
            stacks={name: tokens[name] for name in self._shown},
            dense={name: self.shapes[name].protected + self.shapes[name].routable for name in self._shown},
            macs=round(macs),
            dense_macs=round(dense_macs),
            stage_macs={name: round(value) for name, value in stage_macs.items()},
            keep={
                stage.config.key: leaving[stage.config.key] / present[stage.config.key]
                if stage.config.keep is None
                else stage.share(requested.get(stage.config.key, stage.config.keep))
                for stage in self.stages
            },
            present=present,
            kept=leaving,
            activation_bytes=round(activations),
            dense_activation_bytes=round(dense_activations),
            stack_keep={name: self._kept(walks[name], self.shapes[name]) for name in self._shown},
            stack_macs_ratio={name: ratios[name] for name in self._shown},
            kv_bytes=round(cached),
            dense_kv_bytes=round(dense_cached),
        )

    def soft(self, keep: Mapping[str, Tensor], measure: str = "macs_ratio") -> Tensor:
        """``macs_ratio`` or ``mean_token_fraction`` for keeps that are tensors, with gradient; token counts are fractional.

        Args:
            keep: by stage name, a scalar or (B,), one for each row; other stages use their own keep or number.
            measure: which of the two.

        Returns:
            A scalar, or (B,).
        """

        def kept(stage: Stage, present: Any, entering: Any) -> Any:
            given = keep.get(stage.config.key)
            return stage.expected(_mean(present), _mean(entering)) if given is None else present * given

        def idle(stage: Stage) -> bool:
            return stage.config.key not in keep and stage.idle

        used: Any = 0.0
        whole: Any = 0.0
        walks = self._walks(kept, idle)
        tokens_alone = measure == "mean_token_fraction"
        for name, shape in self.shapes.items():
            walk, dense = walks[name], shape.dense_layers()
            layers = [LayerTokens(shape.protected + attention, shape.protected + mlp) for attention, mlp in walk.layers]
            if tokens_alone:
                # A stack counts by its layers, as in Cost.mean_token_fraction.
                if name in self._shown:
                    used = used + sum(tokens.attention + tokens.mlp for tokens in layers) / (2 * dense[0].mlp)
                    whole += len(dense)
                continue
            used = used + shape.rows * (shape.model_macs(layers, shape.protected + walk.leaving) + sum(walk.stage_macs.values()))
            whole += shape.rows * (shape.model_macs(dense) + shape.dense_only_macs)
        ratio = used / whole
        assert isinstance(ratio, Tensor)
        return ratio

    def achieved(self, trace: Trace, measure: str = "macs_ratio") -> float:
        """Achieved ``macs_ratio`` or ``mean_token_fraction`` of a forward: MACs or tokens of its rows, each with its own counts, ÷ those in
        the dense model.
        """
        return self.ratio(self.uses(trace), measure)

    def ratio(self, uses: Mapping[str, StackUse], measure: str) -> float:
        """``macs_ratio`` or ``mean_token_fraction`` of what the stacks did."""
        return ratio_of(uses, measure, self.layers)

    @property
    def layers(self) -> dict[str, int]:
        """Number of layers of each stack with stages, by name."""
        return {name: self.shapes[name].layers for name in self._shown}

    def as_configured(self, trace: Trace) -> bool:
        """The model is one stack, and every row of a forward has the configured number of tokens and no padding."""
        tokens = trace.flow(self._adapter.stack_name).dense
        return len(self.shapes) == 1 and not isinstance(tokens, Tensor) and tokens == self.main.tokens

    @property
    def row_macs(self) -> float:
        """MACs of a row of the configured size in the dense model."""
        return sum(shape.rows * (shape.model_macs(shape.dense_layers()) + shape.dense_only_macs) for shape in self.shapes.values())

    def uses(self, trace: Trace) -> dict[str, StackUse]:
        """The StackUse of each stack in a forward."""
        found: dict[str, StackUse] = {}
        batch = trace.flow(self._adapter.stack_name).tokens.rows
        for name, configured in self.shapes.items():
            # Rows of the stack, the images of a tower for example; none without an image.
            rows, flow = self._adapter.rows_ratio(trace, name) * batch, trace.flow(name)
            unread = rows * configured.dense_only_macs
            if name not in self._shown or not rows or flow.state is None:
                dense = rows * configured.model_macs(configured.dense_layers())
                routable, tokens = rows * configured.routable, rows * configured.tokens
                found[name] = StackUse(routable, routable, dense, dense + unread, tokens, tokens)
                continue
            compressed, whole = self._achieved(name, trace)
            present, dense_tokens = _mean(flow.original + flow.gone), _mean(flow.dense)
            layers: Any = sum(tokens.attention + tokens.mlp for tokens in flow.layer_tokens.values())
            tokens = _mean(layers) / (2 * len(flow.layer_tokens))
            processed = tokens - (dense_tokens - present)
            found[name] = StackUse(
                rows * processed, rows * present, rows * compressed, rows * whole + unread, rows * tokens, rows * dense_tokens
            )
        return found

    @staticmethod
    def _kept(walk: _Walk, shape: StackShape) -> float:
        return sum(attention + mlp for attention, mlp in walk.layers) / (2 * len(walk.layers) * shape.routable) if shape.routable else 1.0

    @property
    def by_stack(self) -> tuple[str, ...]:
        """Names of the stacks that are reported one by one; empty for a model that is one stack."""
        return tuple(self._shown) if self._adapter.stack_name else ()

    def _achieved(self, name: str, trace: Trace) -> tuple[float, float]:
        """Mean MACs of a row of a stack in a forward, and those in the dense model."""
        flow, configured = trace.flow(name), self.shapes[name]
        original: Any = flow.original + flow.gone
        whole: Any = flow.dense
        shape = replace(configured, protected=round(_mean(whole - original)), routable=max(1, round(_mean(original))))
        layers = [LayerTokens(tokens.attention, tokens.mlp) for _, tokens in sorted(flow.layer_tokens.items())]  # type: ignore[arg-type]
        # The costs of the actual input, which may differ in size from the configured one.
        embedding = shape.embed_macs * (original / configured.routable - 1)
        total: Any = shape.model_macs(layers, flow.tokens.tokens_per_row) + embedding  # type: ignore[arg-type]
        dense: Any = shape.model_macs([LayerTokens(whole, whole)] * shape.layers) + embedding
        for stage in self.stages:
            if stage.config.stack == name:
                routing = trace.routings[stage.config.key]
                if not routing.routed:
                    continue
                protected = routing.state.protected_real
                total = total + stage.macs(shape, protected + routing.present, protected + routing.kept)  # type: ignore[arg-type]
        return _mean(total), _mean(dense)

    def _fed_by(self, names: set[str]) -> set[str]:
        """The stacks after these ones, through which their tokens go."""
        after = {self._adapter.feeds[name] for name in names if name in self._adapter.feeds}
        return after | self._fed_by(after) if after else after

    def _walks(self, kept: Callable[[Stage, Any, Any], Any], idle: Callable[[Stage], bool]) -> dict[str, _Walk]:
        """The walk of every stack; the tokens that leave one enter the stack that it feeds.

        Args:
            kept: number of tokens that a stage keeps or processes, of the routable tokens present and of those that entered the stack.
            idle: a stage keeps every token and costs nothing.
        """
        walks: dict[str, _Walk] = {}
        entering: dict[str, Any] = {}
        for name, shape in self.shapes.items():
            walks[name] = self._walk(name, kept, idle, entering.get(name, shape.routable))
            if (fed := self._adapter.feeds.get(name)) is not None:
                # What leaves is a part of what would leave the dense stack; the stacks may differ in their protected tokens.
                share = shape.rows / (shape.joined * self.shapes[fed].rows)
                entering[fed] = share * (walks[name].leaving - shape.routable) + self.shapes[fed].routable
        return walks

    def _walk(self, stack: str, kept: Callable[[Stage, Any, Any], Any], idle: Callable[[Stage], bool], begin: Any) -> _Walk:
        """Visits a stack's sites in running order, from ``begin`` routable tokens on."""
        shape, restore = self.shapes[stack], self._restores.get(stack)
        at = {(stage.config.layer, stage.config.site): stage for stage in self.stages if stage.config.stack == stack}
        present: Any = begin
        walk = _Walk([], {}, {}, {}, present)

        def visit(layer: int, site: str, entering: Any) -> Any:
            stage = at.get((layer, site))
            if stage is None:
                return entering
            # Of a row with one document; these tokens are no choice of the stage.
            apart: Any = stage.config.first + stage.config.last
            if apart:
                apart = entering.clamp(max=apart) if isinstance(entering, Tensor) else min(apart, entering)
            leaving = kept(stage, entering - apart, begin)
            own = 0 if idle(stage) else stage.macs(shape, shape.protected + entering, shape.protected + apart + leaving)
            walk.stage_macs[stage.config.key] = own
            walk.present[stage.config.key], walk.kept[stage.config.key] = entering - apart, leaving
            # Protected tokens are added to the result.
            return -shape.protected if stage.skips and not isinstance(leaving, Tensor) and leaving == 0 else apart + leaving

        for layer in range(shape.layers):
            if layer == restore:
                present = shape.routable
            present = visit(layer, "before", present)
            inner = visit(layer, "around", present)
            attention = visit(layer, "around_attention", inner)
            if (layer, "between") in at:
                present = inner = visit(layer, "between", present)
            walk.layers.append((attention, visit(layer, "around_mlp", inner)))
        walk.leaving = shape.routable if restore == shape.layers else present
        return walk


def _mean(macs: float | Tensor) -> float:
    return float(macs.double().mean()) if isinstance(macs, Tensor) else float(macs)


@dataclass
class _Walk:
    """Routable tokens in the attention and the MLP of every layer; MACs, tokens present and tokens kept of every stage; tokens that
    leave the last layer."""

    layers: list[tuple[Any, Any]]
    stage_macs: dict[str, Any]
    present: dict[str, Any]
    kept: dict[str, Any]
    leaving: Any
