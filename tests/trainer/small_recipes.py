"""Shipped recipes made small enough to run here, where no hub can be reached."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import yaml
from transformers import LlamaConfig, LlamaForCausalLM, ViTConfig, ViTForImageClassification

from laconic.trainer.build.build import build
from laconic.trainer.recipe.files import load, shipped
from tests.data.folders import image_folder
from tests.data.texts import chats, chats_about_images, jsonl, small_tokenizer
from tests.matrix.processors import chat_file

# What the name of a recipe ends with that is laid over another one as a control arm.
ENDINGS = ("_dense", "_static", "_random", "_random_choice", "_uniform", "_energy", "_bipartite", "_last_query", "_learned")
CONTROLS = [name for name, path in shipped().items() if name.endswith(ENDINGS) and "base" in yaml.safe_load(path.read_text())]


def of_files(quick: Sequence[str]) -> list[str]:
    """Overrides of a digit recipe without the sizes of drawn data, for data from files."""
    return [item for item in quick if not item.startswith(("data.train_samples", "data.eval_samples"))]


# A random tower in place of one that was trained before.
OWN_TOWER = [
    "model.tower_of=null",
    *(
        f"model.config.vision_config.{setting}"
        for setting in ("model_type=siglip_vision_model", "image_size=32", "patch_size=4", "vision_use_head=false")
    ),
]


def small(name: str, folder: Path, quick: Sequence[str]) -> list[str]:
    """Overrides of a shipped recipe.

    Args:
        name: of the recipe.
        folder: for models and data that it starts from.
        quick: those of a digit recipe.
    """
    if name.startswith(("llm_", "smollm2_")):
        return _language_model(name, folder, quick)
    if name.startswith("prompt_"):
        lora = _language_model("llm_lora_dense", folder, quick)
        prompts = ["data.lengths=[256]", "data.questions=1", "data.eval_samples=8", "data.eval_batch_size=2"]
        return [*(item for item in lora if not item.startswith("data.eval_")), *prompts]
    if name.startswith("vlm_"):
        return _vision_language(name, folder, quick)
    if name.startswith("text_"):
        return [*quick, "baselines=[]", "model.config.vocab_size=400", "data.sequence_length=48"]
    if name.startswith("mae_digits"):
        tiny = [*quick, "baselines=[]", "model.config.decoder_hidden_size=8", "model.config.decoder_num_hidden_layers=1"]
        if not name.startswith("mae_digits_finetune"):
            return [*tiny, *(["compression.restore.layer=2"] if name == "mae_digits" else [])]
        build(load("mae_digits_dense", tiny).recipe).model.save_pretrained(folder / "pretrained")
        overrides = [item for item in quick if not item.startswith("model.config")]
        return [*overrides, "baselines=[]", f"model.encoder_of={folder / 'pretrained'}"]
    if name.startswith("vit_lora") and name != "vit_lora_base":
        build(load("vit_lora_base", quick).recipe).model.save_pretrained(folder / "base")
        overrides = [item for item in quick if not item.startswith("model.config")]
        return [*overrides, "baselines=[]", f"model.name={folder / 'base'}"]
    if not name.startswith("vit_image_folder"):
        # Restores and stages are at layers that a shallower model does not have.
        deep = ["model.config.num_hidden_layers=6"] if name.startswith("segment") or name.endswith("_learned") else []
        return [*quick, *deep, "baselines=[]"]
    config = ViTConfig(hidden_size=16, num_hidden_layers=10, num_attention_heads=2, intermediate_size=32, image_size=16, patch_size=4)
    ViTForImageClassification(config).save_pretrained(folder / "vit")
    return [
        f"model.name={folder / 'vit'}",
        f"data.data_dir={image_folder(folder / 'images')}",
        "data.batch_size=8",
        "data.workers=0",
        "trainer.max_epochs=null",
        "trainer.max_steps=2",
        "trainer.log_every=1",
        "trainer.bench_rounds=0",
        f"output={folder / 'run'}",
    ]


def _language_model(name: str, folder: Path, quick: Sequence[str]) -> list[str]:
    if name == "llm_finetune":
        tokenizer = small_tokenizer(template=True)
        config = LlamaConfig(
            vocab_size=len(tokenizer), hidden_size=16, intermediate_size=32, num_hidden_layers=2, num_attention_heads=2,
            bos_token_id=None, eos_token_id=tokenizer.eos_token_id, pad_token_id=tokenizer.pad_token_id,
        )  # fmt: skip
        LlamaForCausalLM(config).save_pretrained(folder / "llm")
        tokenizer.save_pretrained(folder / "llm")
        rows = jsonl(folder / "chats.jsonl", chats(24))
        shorter = [item for item in quick if not item.startswith(("model.", "data."))]
        model = [f"model.name={folder / 'llm'}", f"data.data_files={rows}", "data.sequence_length=128", "data.batch_size=2"]
        return [*shorter, *model, "trainer.max_epochs=null"]
    if name.startswith(("llm_lora", "llm_continue", "smollm2_lora")):
        packed = name.startswith("smollm2_")
        # A plan has stages in all of its model's layers.
        depth = ["model.config.num_hidden_layers=30"] if packed else []
        dense = build(load("llm_pretrain_dense", [*_language_model("llm_pretrain_dense", folder, quick), *depth]).recipe)
        dense.model.save_pretrained(folder / "llm")
        dense.data.save_beside(folder / "llm")
        few = ["data.sequence_length=256", "data.train_samples=12", "data.eval_samples=6", "data.batch_size=2"]
        shorter = [item for item in quick if not item.startswith(("model.", "data."))]
        return [
            *shorter,
            "baselines=[]",
            f"model.name={folder / 'llm'}",
            *few,
            *(["model.gguf_file=null"] if packed else []),
            *([] if packed or name.endswith("dense") else ["budget.target=0.8", "budget.schedule=constant"]),
        ]
    # As deep as it ships: its stages are around layers that a shallower model does not have.
    kept = [item for item in quick if "num_hidden_layers" not in item and "_samples" not in item]
    small = ["model.config.vocab_size=400", "data.sequence_length=64", "data.train_samples=6", "data.eval_samples=2"]
    # So narrow a model spends much of its work on routers and head.
    budget = load(name).recipe.budget
    wider = ["budget.target=0.8"] if budget is not None and budget.measure == "macs_ratio" else []
    return [*kept, "baselines=[]", *small, *wider]


def _vision_language(name: str, folder: Path, quick: Sequence[str]) -> list[str]:
    shorter = [item for item in quick if not item.startswith(("model.config", "data.canvas"))]
    sizes = ["hidden_size=16", "num_hidden_layers=2", "num_attention_heads=2", "intermediate_size=32"]
    if name == "vlm_digits_tower":
        return [*shorter, *(f"model.config.vision_config.{size}" for size in sizes)]
    if name == "vlm_digits_base":
        return [
            *shorter,
            *OWN_TOWER,
            *(f"model.config.{part}.{size}" for part in ("vision_config", "text_config") for size in sizes),
            "model.config.text_config.num_key_value_heads=2",
        ]
    if not (folder / "vlm").is_dir():
        dense = build(load("vlm_digits_base", _vision_language("vlm_digits_base", folder, quick)).recipe)
        dense.model.save_pretrained(folder / "vlm")
        dense.data.save_beside(folder / "vlm")
    if name != "vlm_finetune":
        return [*shorter, "baselines=[]", f"model.name={folder / 'vlm'}"]
    return [
        *of_files(shorter),
        f"model.name={folder / 'vlm'}",
        f"data.data_files={chats_about_images(folder / 'rows', 24)}",
        f"data.image_dir={folder / 'rows'}",
        # In two layers, halves of the depth alone are a layer.
        "compression.layer=0.5",
        "trainer.max_epochs=null",
    ]


def of_family(family: str, model: Path, folder: Path) -> list[str]:
    """Overrides of ``vlm_finetune`` for a family's model and chats of its own.

    Args:
        family: ``model_type``.
        model: folder of the model and its processor.
        folder: for the chats and the run.
    """
    # Gemma 3 has no query of a last token.
    method = ["compression.method=dart"] if family == "gemma3" else ["compression.layer=0.5"]
    rows = chat_file(folder / "rows", 9)
    return [
        f"model.name={model}", f"data.data_files={rows}", f"data.image_dir={folder / 'rows'}", "data.batch_size=3",
        "data.eval_batch_size=2", "data.sequence_length=400", "data.workers=0", "trainer.max_epochs=null", "trainer.max_steps=2",
        "trainer.log_every=1", "trainer.precision=fp32", "trainer.bench_rounds=0", f"output={folder / 'run'}", *method,
    ]  # fmt: skip
