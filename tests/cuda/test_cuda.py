"""Every method × every family on a CUDA device: the same answers, decisions and gradients as on the CPU, and bf16 as autocast computes it.

Without such a device the whole file is skipped; ``scripts/gpu_check`` runs it.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import PreTrainedModel

from laconic import Trace
from laconic.modules.tokens.ragged import Packing, packed_attention
from laconic.modules.tokens.state import TokenState
from tests.matrix import Case, decoders, encoders, vision, visual

if not torch.cuda.is_available():
    pytest.skip("no CUDA device", allow_module_level=True)

CASES: list[Case] = [
    *(vision.ImageCase(*pair) for pair in vision.PAIRS),
    *(encoders.TextCase(*pair) for pair in encoders.PAIRS),
    *(decoders.CausalCase(*pair) for pair in decoders.PAIRS),
    *visual.CASES,
]


@pytest.fixture(autouse=True)
def _whole_precision() -> Iterator[None]:
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("highest")
    torch.backends.cudnn.allow_tf32 = False
    yield
    torch.set_float32_matmul_precision(before)


def _on(device: str, inputs: Mapping[str, Any]) -> dict[str, Any]:
    return {name: value.to(device) if isinstance(value, Tensor) else value for name, value in inputs.items()}


def _step(case: Case, model: PreTrainedModel, inputs: dict[str, Tensor], device: str) -> Tensor:
    """A training step's loss, which pulls on every number of the answer and on the parts, after its backward."""
    labels = case.labels(inputs).to(device)
    trace = Trace(labels=labels, step=3, **({} if case.method.deployed else {"lookahead": True}))
    # Where a prompt ends is said by the labels.
    given = {"labels": labels} if isinstance(case, visual.VisualCase) else {}
    answer = case.answer(case.run(model, _on(device, inputs), trace=trace, **given)).float()
    loss = answer.square().mean()
    if trace.auxiliary_loss is not None:
        loss = loss + trace.auxiliary_loss
    loss.backward()
    return loss.detach()


def over(cases: list[Case]) -> pytest.MarkDecorator:
    return pytest.mark.parametrize("case", cases, ids=str)


@over(CASES)
def test_answers_and_decisions_are_those_of_the_cpu(case: Case) -> None:
    model, inputs = case.compressed(0.5, 0.6), case.inputs()
    expected, trace = case.traced(model, inputs)
    answer, ours = case.traced(copy.deepcopy(model).cuda(), _on("cuda", inputs))
    for key, routing in trace.routings.items():
        assert torch.equal(ours.routings[key].decision.index.cpu(), routing.decision.index)
    for row in range(len(expected)):
        torch.testing.assert_close(case.tokens_of(answer.cpu(), row, inputs), case.tokens_of(expected, row, inputs), atol=1e-4, rtol=1e-3)


@over(CASES)
def test_a_training_step_is_that_of_the_cpu(case: Case) -> None:
    model, inputs = case.compressed(0.5, 0.6).train(), case.inputs()
    there = copy.deepcopy(model).cuda()
    loss = _step(case, model, inputs, "cpu")
    ours = _step(case, there, inputs, "cuda")
    torch.testing.assert_close(ours.cpu(), loss, atol=1e-4, rtol=1e-3)
    expected = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    found = {name: p.grad.cpu() for name, p in there.named_parameters() if p.grad is not None}
    assert found.keys() == expected.keys()
    for name, gradient in expected.items():
        scale = float(gradient.abs().max())
        torch.testing.assert_close(
            found[name], gradient, atol=max(1e-4, 2e-3 * scale), rtol=1e-2, msg=lambda text, name=name: f"{name}: {text}"
        )


@over(CASES)
@pytest.mark.parametrize("weights", [torch.float32, torch.bfloat16], ids=["autocast", "bf16_weights"])
def test_bf16_trains(case: Case, weights: torch.dtype) -> None:
    model = case.compressed(0.5, 0.6).to("cuda", weights).train()
    inputs = {
        name: value.to(weights) if value.is_floating_point() and weights == torch.bfloat16 else value
        for name, value in case.inputs().items()
    }
    with torch.autocast("cuda", torch.bfloat16, enabled=weights == torch.float32):
        loss = _step(case, model, inputs, "cuda")
    assert torch.isfinite(loss)
    assert all(torch.isfinite(p.grad).all() for p in model.parameters() if p.grad is not None)


@over([case for case in CASES if case.generates])
def test_generation_with_a_cache_is_that_of_the_cpu(case: Case) -> None:
    model = case.compressed(0.5, 0.6).eval()
    inputs = case.inputs("left") if case.saved == "left" else case.inputs()
    options = {"max_new_tokens": 6, "do_sample": False, "pad_token_id": 0}
    expected: Any = model.generate(**inputs, **options)
    there: Any = copy.deepcopy(model).cuda()
    cached = there.generate(**_on("cuda", inputs), **options)
    assert torch.equal(cached.cpu(), expected)


def test_the_kernel_for_rows_of_different_lengths_agrees_with_padded_rows() -> None:
    torch.manual_seed(0)
    valid = torch.arange(40, device="cuda") < torch.tensor([[3], [40], [17], [1], [29]], device="cuda")
    packing = Packing.in_spans(TokenState.initial(5, 40, 1, valid, valid.device))
    assert packing.spans is not None
    biased = replace(packing, spans=replace(packing.spans, bias=torch.zeros(valid.shape, device="cuda")))
    tokens = torch.randn(3, 1, 2, int(valid.sum()), 16, device="cuda", dtype=torch.bfloat16)
    module, results = torch.nn.Module(), []
    for layout in (packing, biased):
        given = tokens.clone().requires_grad_()
        output, _ = packed_attention(module, *given, layout, is_causal=False)
        output.float().square().sum().backward()
        assert given.grad is not None
        results.append((output.float(), given.grad.float()))
    torch.testing.assert_close(results[0], results[1], atol=3e-2, rtol=3e-2)
