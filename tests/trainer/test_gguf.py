"""GGUF files as starting weights."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from laconic.trainer.build.gguf import ordinary_folder
from laconic.trainer.build.initial_weights import start_of
from laconic.trainer.errors import RecipeError
from laconic.trainer.recipe.schema import ModelRecipe

HIDDEN, INNER, HEADS = 64, 96, 4


def _file(path: Path) -> dict[str, Any]:
    """Writes a llama of one layer with a byte-level tokenizer; returns its tensors."""
    gguf: Any = pytest.importorskip("gguf")
    draw = np.random.default_rng(0)
    words = ["<|endoftext|>", *"abcdefgh", "ab", "cd", "Ġ"]
    shapes = {
        "token_embd": (len(words), HIDDEN), "output_norm": (HIDDEN,), "blk.0.attn_norm": (HIDDEN,), "blk.0.ffn_norm": (HIDDEN,),
        **{f"blk.0.attn_{name}": (HIDDEN, HIDDEN) for name in ("q", "k", "v", "output")},
        **{f"blk.0.ffn_{name}": (INNER, HIDDEN) for name in ("gate", "up")}, "blk.0.ffn_down": (HIDDEN, INNER),
    }  # fmt: skip
    tensors = {f"{name}.weight": draw.standard_normal(shape).astype(np.float32) for name, shape in shapes.items()}
    writer = gguf.GGUFWriter(str(path), "llama")
    writer.add_context_length(64)
    writer.add_embedding_length(HIDDEN)
    writer.add_block_count(1)
    writer.add_feed_forward_length(INNER)
    writer.add_head_count(HEADS)
    writer.add_head_count_kv(HEADS)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_vocab_size(len(words))
    writer.add_tokenizer_model("gpt2")
    writer.add_token_list(words)
    writer.add_token_types([3, *[1] * (len(words) - 1)])
    writer.add_token_merges(["a b", "c d"])
    for name in ("bos", "eos"):
        getattr(writer, f"add_{name}_token_id")(0)
    for name, value in tensors.items():
        writer.add_tensor(name, value)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return tensors


def test_a_gguf_file_becomes_an_ordinary_folder_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LACONIC_CACHE", str(tmp_path / "cache"))
    tensors = _file(tmp_path / "tiny.gguf")
    start = start_of(ModelRecipe(gguf_file=str(tmp_path / "tiny.gguf")))
    assert start is not None
    assert start.weights == ordinary_folder(str(tmp_path / "tiny.gguf"))
    model = AutoModelForCausalLM.from_pretrained(start.weights)
    assert torch.equal(model.model.embed_tokens.weight, torch.from_numpy(tensors["token_embd.weight"]))
    assert torch.equal(model.model.layers[0].mlp.down_proj.weight, torch.from_numpy(tensors["blk.0.ffn_down.weight"]))
    assert AutoTokenizer.from_pretrained(start.weights)("abcd").input_ids == [9, 10]
    assert [path.name.startswith("tiny-") for path in (tmp_path / "cache" / "gguf").iterdir()] == [True]


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ("no.gguf", "does not exist: give the path of a GGUF file, or PACKAGE:FILE"),
        ("llm_none:x.gguf", "the package llm_none is not installed; pip install gguf && pip install --no-deps llm-none"),
        ("json:x.gguf", "the package json has no file x.gguf"),
        (__file__, "is no GGUF file: set model.name for other weights"),
    ],
)
def test_what_is_no_gguf_file_is_refused(given: str, message: str) -> None:
    with pytest.raises(RecipeError, match=message):
        ordinary_folder(given)
