"""The loss of language models: in parts, without all logits in memory, of packed documents; and perplexity."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
import transformers
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

from laconic.modules.tokens.labels import IGNORE_TOKEN
from laconic.trainer.losses.distillation import divergence
from laconic.trainer.losses.token_loss import TokenLoss, check_model, loss_of, read, token_loss
from laconic.trainer.metrics.perplexity import Perplexity

VOCAB, ROWS, LENGTH = 97, 3, 24
SHARED = {"vocab_size": VOCAB, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
GROUPED = {**SHARED, "num_key_value_heads": 2, "head_dim": 8, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
FAMILIES: dict[str, dict[str, Any]] = {
    "llama": {**GROUPED, "tie_word_embeddings": False},
    "qwen3": {**GROUPED, "tie_word_embeddings": True},
    "mistral": {**GROUPED, "sliding_window": 5},
    "gemma2": {**GROUPED, "sliding_window": 5, "final_logit_softcapping": 0.05},
    "gemma3_text": {**GROUPED, "sliding_window": 5, "layer_types": ["sliding_attention", "full_attention"]},
    "cohere": {**GROUPED, "logit_scale": 0.25},
    "granite": {**GROUPED, "logits_scaling": 4.0},
    "phi": {**SHARED, "bos_token_id": 1, "eos_token_id": 2},
    "gpt2": {"vocab_size": VOCAB, "n_embd": 32, "n_layer": 2, "n_head": 4, "bos_token_id": 1, "eos_token_id": 2},
    "gpt_neox": {**SHARED, "bos_token_id": 1, "eos_token_id": 2},
}


def _model(family: str) -> Any:
    config = transformers.AutoConfig.for_model(family, **FAMILIES[family])
    model: Any = AutoModelForCausalLM.from_config(config)
    if family == "phi":
        # Fresh biases are zero, which would hide one that is forgotten.
        torch.nn.init.normal_(model.lm_head.bias)
    return model.eval()


def _batch() -> tuple[Tensor, Tensor, Tensor]:
    """Token ids, labels and positions of rows with documents of 9, 1 and 14 tokens."""
    ids = torch.randint(3, VOCAB, (ROWS, LENGTH))
    positions = torch.cat([torch.arange(size) for size in (9, 1, 14)]).expand(ROWS, -1)
    labels = ids.masked_fill(positions == 0, IGNORE_TOKEN)
    labels[:, 4:7] = IGNORE_TOKEN
    return ids, labels, positions


@pytest.mark.parametrize("family", FAMILIES)
def test_the_loss_in_parts_is_the_models_own_with_its_gradients(family: str) -> None:
    model, (ids, labels, positions) = _model(family), _batch()
    own = model(input_ids=ids, labels=labels, position_ids=positions, use_cache=False).loss
    own.backward()
    expected = {name: parameter.grad.clone() for name, parameter in model.named_parameters()}
    for part in (VOCAB * LENGTH * ROWS, VOCAB * 7):
        model.zero_grad()
        loss = token_loss(model, ids, labels, positions, whole=0, part=part)
        loss.mean.backward()
        torch.testing.assert_close(loss.mean, own, atol=1e-5, rtol=1e-5)
        assert int(loss.count) == int((labels[:, 1:] != IGNORE_TOKEN).sum())
        for name, parameter in model.named_parameters():
            torch.testing.assert_close(parameter.grad, expected[name], atol=1e-5, rtol=1e-4, msg=name)


class _Largest(TorchDispatchMode):
    """Notes the size of the largest tensor that anything returns."""

    values = 0

    def __torch_dispatch__(self, function: Any, kinds: Any, arguments: Any = (), options: Any = None) -> Any:
        out = function(*arguments, **(options or {}))
        for item in out if isinstance(out, tuple | list) else [out]:
            self.values = max(self.values, item.numel() if isinstance(item, Tensor) else 0)
        return out


def test_logits_are_never_there_as_a_whole() -> None:
    config = LlamaConfig(**{**GROUPED, "vocab_size": 2000, "num_hidden_layers": 1})
    model, ids = LlamaForCausalLM(config), torch.randint(2000, (4, 128))
    with _Largest() as whole:
        token_loss(model, ids, ids).mean.backward()
    with _Largest() as parts:
        token_loss(model, ids, ids, whole=0, part=2000 * 16).mean.backward()
    assert whole.values >= 4 * 128 * 2000
    # What is left as the largest is the embedding's own gradient.
    assert parts.values <= 2000 * 32


@pytest.mark.parametrize("family", FAMILIES)
def test_documents_packed_into_a_row_answer_as_alone(family: str) -> None:
    model, (ids, _, positions) = _model(family), _batch()
    with torch.no_grad():
        packed = model(input_ids=ids, position_ids=positions, use_cache=False).logits
        start = 0
        for size in (9, 1, 14):
            alone = model(input_ids=ids[:, start : start + size], use_cache=False).logits
            torch.testing.assert_close(packed[:, start : start + size], alone, atol=1e-5, rtol=1e-4)
            start += size
    check_model(model)


class _Warmer(LlamaForCausalLM):
    def forward(self, *args: Any, **kwargs: Any) -> Any:
        out = super().forward(*args, **kwargs)
        out.logits = out.logits * 3
        return out


class _Leaking(LlamaForCausalLM):
    def forward(self, *args: Any, position_ids: Any = None, **kwargs: Any) -> Any:
        return super().forward(*args, **kwargs)


def test_a_family_that_cannot_be_trained_here_is_found_out() -> None:
    config = LlamaConfig(**GROUPED)
    with pytest.raises(ValueError, match="_Warmer computes its logits in an unsupported way"):
        check_model(_Warmer(config))
    leaking = _Leaking(config)
    leaking.model.register_forward_pre_hook(lambda _, args, kwargs: (args, {**kwargs, "position_ids": None}), with_kwargs=True)
    with pytest.raises(ValueError, match="_Leaking lets documents packed into one row attend to each other"):
        check_model(leaking)


def test_perplexity_sums_tokens_of_all_batches_and_ranks_before_it_divides() -> None:
    ranks = [Perplexity(), Perplexity()]
    for rank, nats, tokens, size in ((0, 10.0, 4, 8), (0, 2.0, 6, 20), (1, 6.0, 2, 4)):
        ranks[rank].add(TokenLoss(torch.tensor(nats), torch.tensor(tokens)), {"bytes": size})
    ranks[0].merge(ranks[1])
    assert ranks[0].value == pytest.approx(math.exp(18 / 12))
    assert ranks[0].details(None) == {  # type: ignore[arg-type]
        "loss": 1.5, "bits_per_byte": pytest.approx(18 / math.log(2) / 32), "tokens": 12, "bytes": 32,
    }  # fmt: skip


def test_the_divergence_from_a_teacher_in_parts_is_that_of_all_logits_with_its_gradients() -> None:
    model, (ids, labels, positions) = _model("gemma2"), _batch()
    teacher = torch.randn(ROWS * LENGTH, SHARED["hidden_size"])
    with torch.no_grad():
        expected = model.lm_head(teacher).float()
        expected = (0.05 * torch.tanh(expected / 0.05)).view(ROWS, LENGTH, -1)[:, :-1]
    there = labels[:, 1:] != IGNORE_TOKEN
    own = model(input_ids=ids, position_ids=positions, use_cache=False).logits[:, :-1]
    apart = divergence(own[there], expected[there], 0.5).sum()
    apart.backward()
    gradients = {name: parameter.grad.clone() for name, parameter in model.named_parameters()}
    for most in (2 * VOCAB * LENGTH * ROWS, VOCAB * 7):
        model.zero_grad()
        given = read(model, ids, labels, positions)
        found = loss_of(model, given, teacher, lambda logits, other: divergence(logits, other, 0.5), whole=most, part=most)
        torch.testing.assert_close(found.apart, apart, atol=1e-4, rtol=1e-4)
        assert found.apart is not None
        found.apart.backward()
        for name, parameter in model.named_parameters():
            torch.testing.assert_close(parameter.grad, gradients[name], atol=1e-4, rtol=1e-3, msg=name)
