"""Vision-language fine-tuning: answers to questions about images."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any, ClassVar

import torch
import transformers
from torch import Tensor
from transformers import PretrainedConfig, PreTrainedModel
from transformers.models.auto.modeling_auto import MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES

from ...data.chats.encoder import ChatEncoder
from ...data.chats.messages import images_of
from ...data.chats.packing import ChatPacking
from ...data.chats.processor import load_processor, made_processor, with_image_size
from ...data.chats.recipe import ChatRecipe
from ...data.chats.splits import ChatData, digit_questions, hub_chats
from ...data.embedded.digit_questions import DigitQuestions
from ...data.labels.classes import KnownClasses
from ...data.rows import collate, good_rows
from ...data.splits import Splits
from ...data.text.conversations import WrongRow
from ...data.text.tokenizer import with_template
from ...modules.backbones import families
from ...modules.backbones.llava import Llava
from ...modules.backbones.multimodal import Multimodal
from ...modules.checkpoints.foreign_config import load_config
from ...modules.cost.cost import CostModel
from ...modules.stage import stages_of
from ...modules.tokens.trace import Trace
from ..build.chat_processor import check_processor, image_token_id
from ..build.image_size import load_at_own_size
from ..build.initial_weights import start_of
from ..build.parts import RunParts
from ..losses.answer_loss import AnswerLoss, answer_loss, family_of
from ..losses.distillation import DistillationLoss, Taught, distillation_loss, mean, token_difference, weighted
from ..metrics.answers import AnswerAccuracy, predictions
from ..metrics.kept_places import kept_cells
from ..metrics.predictions import Predictions
from ..metrics.quality import Quality
from ..recipe.schema import DistillationRecipe, ModelRecipe, Recipe
from ..run_folder import PROCESSOR_OF_CHATS, RunFolder
from ..show.pictures import PICTURED, save_kept_tokens, visual_overlays
from ..task_module import TaskModule
from .base import PROBES, Task, check_teacher_itself
from .base_weights import whole_weights

# Pictures whose questions a new tokenizer is trained on.
_READ = 200
_PROBE_TEXT = 16


class VisionLanguage(Task):
    """Learns the answers of chats about images, with a model of transformers that has an image tower, a projector and a language model."""

    metric = "answer_accuracy"
    quality: ClassVar[type[Quality]] = AnswerAccuracy
    unit = "tokens"
    item = "chats"

    @classmethod
    def check(cls, recipe: Recipe) -> None:
        check_teacher_itself(recipe)
        if recipe.model.encoder_of is not None:
            raise ValueError(f"model.encoder_of is for images alone, and task = {recipe.task} has chats: set model.name or model.config")

    @classmethod
    def model_class(cls, model_type: str) -> type[PreTrainedModel]:
        _family(model_type)
        found: type[PreTrainedModel] = getattr(transformers, MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES[model_type])
        return found

    @classmethod
    def loaded_model(cls, recipe: ModelRecipe, config: PretrainedConfig, **options: Any) -> Any:
        def load(of: PretrainedConfig) -> Any:
            return whole_weights(cls.model_class(config.model_type), recipe, of, f"no {config.model_type}", **options)

        if recipe.image_scale == 1:
            return load(config)
        assert recipe.name is not None
        return load_at_own_size(load, config, _image_size(load_config(recipe.name, recipe.revision)))

    @classmethod
    def pooled(cls, recipe: Recipe, keep: float) -> list[str]:
        return ["compression.method=pooled", f"compression.keep={keep}"]

    @classmethod
    def downsampled(cls, recipe: Recipe, scale: float) -> list[str]:
        return [f"model.image_scale={scale}"]

    @classmethod
    def of_run(cls, recipe: Recipe, run: RunFolder) -> Recipe:
        folder = run.with_file(PROCESSOR_OF_CHATS)
        if folder is None:
            return recipe
        # The processor of the run has the template already, and its file may be gone.
        found = {"processor": str(folder), "chat_template": None}
        return recipe.model_copy(update={"data": recipe.data.model_copy(update=found)})

    @classmethod
    def open_data(cls, recipe: Recipe, config: PretrainedConfig, known: KnownClasses | None = None) -> ChatData:
        data = recipe.data
        assert isinstance(data, ChatRecipe)
        processor, family = cls._processor(recipe, data, config), _family(config.model_type)
        if family.tower_at is not None:
            with_image_size(processor, _image_size(config))
        if data.chat_template is not None:
            processor.chat_template = with_template(processor.tokenizer, data.chat_template).chat_template
        if data.name in data.embedded:
            return digit_questions(data.train_samples, data.eval_samples, processor, data.sequence_length, data.kinds)
        folder = Path(data.image_dir or "")
        return hub_chats(data.source, data.splits, processor, data.sequence_length, data.chat_column, data.image_column, folder)

    @classmethod
    def fit_data(cls, recipe: Recipe, data: Splits, config: PretrainedConfig, cost: CostModel | None) -> Splits:
        assert isinstance(data, ChatData)
        assert isinstance(recipe.data, ChatRecipe)
        if not recipe.data.packing:
            return data
        family, alone = _family(config.model_type), "set data.packing=false, which gives each chat a row"
        if family.no_packing is not None:
            raise ValueError(f"data.packing = true is not offered for a {config.model_type}: {family.no_packing}; {alone}")
        for stage in cost.stages if cost is not None else ():
            if stage.scorer.reads_prompt:
                name = stage.config.part("scorer").name
                raise ValueError(
                    f"data.packing = true: scorer {name!r} of stage {stage.config.key!r} reads the end of one prompt a row: {alone}, or take "
                    "scorer 'learned'"
                )
        kept = 1.0 if cost is None else cost().stack_keep[family.stack_name]
        return replace(data, packing=ChatPacking(data.length, tuple(family.placeholder_ids(config)), kept, family.images_by_row))

    @classmethod
    def _processor(cls, recipe: Recipe, data: ChatRecipe, config: PretrainedConfig) -> Any:
        if data.processor is not None:
            return load_processor(data.processor)
        if (start := start_of(recipe.model)) is not None:
            return load_processor(*start.beside(PROCESSOR_OF_CHATS, "data.processor"))
        if data.name not in data.embedded or config.model_type != Llava.model_type:
            raise ValueError(
                "data.processor is missing: a new model needs the processor of its family, unless it is a LLaVA on digit_questions"
            )
        inner: Any = config
        tower = inner.vision_config
        read = DigitQuestions("train", _READ)
        return made_processor(
            [text for index in range(_READ) for text in _texts(read[index]["messages"])],
            inner.get_text_config().vocab_size,
            tower.image_size,
            tower.patch_size,
            inner.vision_feature_select_strategy,
            Llava.class_tokens(config),
        )

    @classmethod
    def fit_config(cls, config: PretrainedConfig, data: Splits) -> None:
        assert isinstance(data, ChatData)
        inner: Any = config
        text: Any = config.get_text_config()
        tokenizer, family = data.tokenizer, _family(config.model_type)
        if len(tokenizer) > text.vocab_size:
            raise ValueError(
                f"the processor's tokenizer has {len(tokenizer)} entries and the model {text.vocab_size}: set data.processor to the model's own"
            )
        if not config.name_or_path:
            # A new model uses the special tokens of its processor instead of the family's default ones.
            inner.image_token_id = image_token_id(data.processor)
            text.bos_token_id, text.eos_token_id, text.pad_token_id = tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.pad_token_id
        if issubclass(family, Llava) and family.image_tokens(config) < family.patches(config):
            raise ValueError(
                f"vision_feature_select_strategy = 'default' drops the first token of the tower, which is a patch in a "
                f"{inner.vision_config.model_type}: set model.config.vision_feature_select_strategy=full"
            )
        check_processor(family, config, data.processor)

    @classmethod
    def module(cls, parts: RunParts) -> TaskModule:
        return TaskModule(cls, parts)

    @classmethod
    def probe(cls, config: PretrainedConfig, tokens: int | None = None) -> dict[str, Tensor]:
        inner, family = config, _family(config.model_type)
        draws, number = torch.Generator().manual_seed(0), inner.image_token_id  # type: ignore[attr-defined]
        ids = torch.randint(inner.get_text_config().vocab_size, (PROBES, _PROBE_TEXT), generator=draws)
        for special in family.placeholder_ids(inner):
            ids = ids.masked_fill(ids == special, 0)
        images = family.plain_images(inner, PROBES)
        tokens = sum(tile.tokens for tile in family.pictures(inner, images)) // PROBES
        ids = torch.cat([ids[:, :2], ids.new_full((PROBES, tokens), number), ids[:, 2:]], 1)
        images["pixel_values"] = torch.randn(images["pixel_values"].shape, generator=draws)
        return family.forward_inputs(inner, {"input_ids": ids, "attention_mask": torch.ones_like(ids), **images})

    @classmethod
    def kept_cells(cls, model: PreTrainedModel, trace: Trace, batch: Mapping[str, Any]) -> dict[str, list[Tensor]]:
        stacks = {name: stage.config.stack for name, stage in stages_of(model).items()}
        return kept_cells(trace, stacks, family_of(model).pictures(model.config, batch))

    @classmethod
    def draw(cls, arms: Mapping[str, RunParts], folder: Path) -> None:
        compressed = {name: parts for name, parts in arms.items() if stages_of(parts.model)}
        if not compressed:
            return
        rows = []
        for name, parts in reversed(compressed.items()):
            _, pictures, titles = cls._shown(parts.model.eval(), parts.data, parts.recipe.seed)
            rows += [(f"{name}, {stage}", shown) for stage, shown in pictures.items()]
        if rows:
            save_kept_tokens(RunFolder(folder).kept_tokens, rows, titles)

    @classmethod
    def _shown(cls, model: PreTrainedModel, data: Any, seed: int, given: str | None = None) -> tuple[Trace, dict[str, Any], list[str]]:
        """Trace of a forward, pictures of the kept tokens by stage, and the title of each picture.

        Args:
            model: compressed model in evaluation mode.
            data: splits with a processor; the first test rows are shown.
            seed: seed of the draws.
            given: file of a picture and a question that are shown instead.
        """
        family = family_of(model)
        with torch.no_grad():
            if given is None:
                batch = collate(good_rows(data.test, PICTURED))
                if "pixel_values" not in batch:
                    raise ValueError("the first held-out rows have no image: give one with --input 'FILE QUESTION'")
                trace = Trace(seed=seed, sample_ids=batch["sample_ids"])
                cls.forward(model, batch, trace=trace)
                tiles = family.pictures(model.config, batch)[:PICTURED]
                titles = [""] * len(tiles)
            else:
                batch, question = _asked(data, given)
                trace = Trace(seed=seed)
                # With a cache the last token of the forward is the end of the prompt.
                model(**family.forward_inputs(model.config, batch), use_cache=True, trace=trace)
                tiles = family.pictures(model.config, batch)
                titles = [question, *([""] * (len(tiles) - 1))]
        stacks = {name: stage.config.stack for name, stage in stages_of(model).items()}
        return trace, visual_overlays(trace, stacks, tiles), titles

    @classmethod
    def inspect(cls, target: str, recipe: Recipe, model: PreTrainedModel, given: str | None, to: Path) -> Mapping[str, float]:
        if to.suffix != ".png":
            raise ValueError(f"--to {to}: pictures of kept tokens need the suffix .png")
        trace, pictures, titles = cls._shown(model, cls.open_data(recipe, model.config), recipe.seed, given)
        if not pictures:
            raise ValueError(f"no stage of {target} can be drawn: where its tokens are in a picture is unknown")
        save_kept_tokens(to, list(pictures.items()), titles)
        return {name: routing.achieved for name, routing in trace.routings.items()}

    @classmethod
    def amount(cls, batch: Mapping[str, Any]) -> int:
        tokens: int = batch["tokens"]
        return tokens

    @classmethod
    def compile(cls, model: PreTrainedModel) -> None:
        model.base_model.compile()

    @classmethod
    def loss(cls, model: PreTrainedModel, batch: Mapping[str, Any], **options: Any) -> Tensor:
        return cls.forward(model, batch, **options).mean

    @classmethod
    def forward(cls, model: PreTrainedModel, batch: Mapping[str, Any], **options: Any) -> AnswerLoss:
        return answer_loss(model, batch, **options)

    @classmethod
    def predictions(cls, model: PreTrainedModel, out: AnswerLoss, batch: Mapping[str, Any]) -> Predictions | None:
        return predictions(out, batch["labels"])

    @classmethod
    def teach(cls, model: PreTrainedModel, batch: Mapping[str, Any], recipe: DistillationRecipe, **options: Any) -> Taught:
        found = answer_loss(model, batch, **options)
        return Taught(found.logits, found.hidden_states if recipe.hidden else None)

    @classmethod
    def learn(
        cls, model: PreTrainedModel, batch: Mapping[str, Any], taught: Taught, recipe: DistillationRecipe, **options: Any
    ) -> DistillationLoss:
        found = answer_loss(model, batch, **options)
        hidden = None if taught.tokens is None else mean(token_difference(found.hidden_states, taught.tokens))
        return weighted(recipe, found.mean, distillation_loss(found.logits, taught.answers, recipe), hidden)


def _family(model_type: str) -> type[Multimodal]:
    """The adapter of a vision-language model. Raises ValueError with the families that there are."""
    known = {name: found for name, found in families().items() if issubclass(found, Multimodal)}
    if model_type not in known:
        raise ValueError(f"{model_type} is no supported vision-language model: use {', '.join(sorted(known))}")
    return known[model_type]


def _asked(data: Any, given: str) -> tuple[dict[str, Tensor], str]:
    """Model inputs of a picture's file and a question, and the question. Raises ValueError if there is no such picture."""
    words = given.split(" ")
    # The longest beginning that is a file: names may have spaces.
    names = [" ".join(words[:number]) for number in range(len(words), 0, -1)]
    name = next((name for name in names if len(name) < 4096 and Path(name).is_file()), words[0])
    question = given[len(name) :].strip()
    if not question:
        raise ValueError(f"--input {given!r}: give the file of a picture and a question, 'photo.png What is this?' for example")
    try:
        (image,) = images_of(name, [None], Path())
    except WrongRow as wrong:
        raise ValueError(f"--input {given!r}: {wrong}") from None
    content = [{"type": "image"}, {"type": "text", "text": question}]
    return ChatEncoder(data.processor, data.length).question([{"role": "user", "content": content}], [image]), question


def _image_size(config: PretrainedConfig) -> int:
    inner: Any = config
    size: int = inner.vision_config.image_size
    return size


def _texts(messages: list[dict[str, Any]]) -> list[str]:
    return [
        text
        for message in messages
        for text in (
            # Roles are in every chat, and few tokens are to be spent on them.
            [message["role"], message["content"]]
            if isinstance(message["content"], str)
            else [message["role"], *(part["text"] for part in message["content"] if part["type"] == "text")]
        )
    ]
