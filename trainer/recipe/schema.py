"""The schema of recipes. Every accepted key is used; every other key is refused by name."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Any, Literal

from pydantic import (
    AfterValidator,
    BeforeValidator,
    Field,
    PlainSerializer,
    PlainValidator,
    SerializeAsAny,
    ValidationInfo,
    model_validator,
)

from ...data.recipe import Block, Count, DataRecipe, Fraction
from ...modules import registry
from ...modules.budget.config import BudgetConfig
from ...modules.budget.drawn_keep import DrawnKeep
from ...modules.config import CompressionConfig
from .data_kinds import KINDS, checked
from .phases import PhaseRecipe, check_phases

if TYPE_CHECKING:
    from peft import LoraConfig

# The teacher that is the trained model itself, with more of its tokens.
ITSELF = "self"
Positive = Annotated[float, Field(gt=0)]


class ModelRecipe(Block):
    """Source of the backbone: a folder or hub name with weights, a config with random weights, or a masked-image pretraining."""

    name: str | None = Field(
        None, description="hub name or local folder of weights, a run folder, a checkpoint or an adapter, from which training continues"
    )
    gguf_file: str | None = Field(
        None,
        description="path of a GGUF file of a causal language model, or PACKAGE:FILE for one in a Python package: its weights, dequantised "
        "once into the cache",
    )
    revision: str | None = Field(None, description="branch, tag or commit of a hub model")
    encoder_of: str | None = Field(
        None, description="run of masked_image_pretraining, folder or hub name of a vit_mae: its encoder becomes a vit with a new head"
    )
    encoder_routers: bool = Field(False, description="initialise stages with their weights in encoder_of")
    config: dict[str, Any] | None = Field(None, description="model_type and settings of a model with random weights")
    tower_of: str | None = Field(
        None,
        description="image model whose vision tower a new vision-language model takes, sizes and weights: a run, a folder or a hub name",
    )
    resize_vocabulary: bool = Field(
        False, description="give the embeddings of model.name as many entries as the tokenizer has, if it has more; new entries are random"
    )
    image_scale: Annotated[float, Field(gt=0, le=2)] = Field(
        1.0,
        description="side of the images as a factor on that of the model, in whole patches: of image classifiers and LLaVA, whose position "
        "embeddings are interpolated",
    )
    settings: dict[str, Any] = Field(
        default_factory=dict, description="changes to the model's own config: hidden_dropout_prob, drop_path_rate if the family has it …"
    )
    new_head: bool = Field(False, description="train a new head for the classes of the data in place of the one that model.name has")
    attention: Literal["sdpa", "eager", "flash_attention_2", "flash_attention_3"] = Field("sdpa", description="attention implementation")

    @model_validator(mode="after")
    def _one_source(self) -> ModelRecipe:
        if sum(source is not None for source in (self.name, self.gguf_file, self.config, self.encoder_of)) != 1:
            raise ValueError(
                "set one of model.name (a folder or hub name), model.gguf_file (a GGUF file), model.config (random weights) or "
                "model.encoder_of (a masked pretraining)"
            )
        if self.encoder_routers and self.encoder_of is None:
            raise ValueError("model.encoder_routers = true needs model.encoder_of, which is not set: set it to a masked pretraining")
        if self.tower_of is not None and self.config is None:
            raise ValueError("model.tower_of is for a new model, and model.config is not set: remove model.tower_of, or set model.config")
        if self.new_head and self.name is None:
            raise ValueError("model.new_head = true replaces the head of model.name, which is not set: remove model.new_head")
        if self.resize_vocabulary and not self.has_weights:
            raise ValueError("model.resize_vocabulary = true needs model.name, which is not set: with model.config set its vocab_size")
        if self.config is not None and not isinstance(model_type := self.config.get("model_type"), str):
            given = "is missing" if model_type is None else f"= {model_type!r} is no family of models"
            raise ValueError(f"model.config.model_type {given}: vit or deit, for example")
        return self

    @property
    def has_weights(self) -> bool:
        """The whole model starts from weights, of ``name`` or ``gguf_file``."""
        return self.name is not None or self.gguf_file is not None


class LoraRecipe(Block):
    """Trained parameters: LoRA and routers on frozen weights, routers alone, or everything."""

    mode: Literal["routers", "lora", "full"] = Field(
        "lora",
        description="lora trains LoRA and routers, routers only these, full everything; a head that model.name lacks is always trained",
    )
    r: Count = Field(8, description="rank")
    alpha: Annotated[float, Field(gt=0)] = Field(16.0, description="scale of LoRA is alpha ÷ r, or alpha ÷ √r with rslora")
    dropout: Annotated[float, Field(ge=0, lt=1)] = Field(0.0, description="dropout of LoRA's input")
    targets: list[str] | str | None = Field(
        None,
        description="modules that get LoRA: names or ends of names, a regular expression, or all-linear; null uses the family's default, "
        "every linear map of its layers; routers are never included",
    )
    parts: list[str] | None = Field(
        None,
        description="parts of a model of several parts that get LoRA (vision, projector, text), at their targets or at every linear map; "
        "null is text, or where targets say",
    )
    rslora: bool = Field(False, description="rank-stabilised scale (2312.03732)")
    dora: bool = Field(False, description="separate magnitude and direction (2402.09353)")
    rank_pattern: dict[str, Count] = Field(default_factory=dict, description="r by ends of module names or regular expressions")
    alpha_pattern: dict[str, Annotated[float, Field(gt=0)]] = Field(
        default_factory=dict, description="alpha by ends of module names or regular expressions"
    )
    modules_to_save: list[str] = Field(
        default_factory=list, description="modules trained in full besides routers, a head for example; new modules are included"
    )
    quantize: Literal["4bit"] | None = Field(None, description="frozen weights in 4 bits by bitsandbytes (QLoRA, 2305.14314); needs a GPU")

    @model_validator(mode="after")
    def _read(self) -> LoraRecipe:
        if self.mode == "lora":
            return self
        unread = sorted(self.model_fields_set - {"mode"} - ({"modules_to_save"} if self.mode == "routers" else set()))
        unread = [key for key in unread if getattr(self, key) != type(self).model_fields[key].get_default(call_default_factory=True)]
        if unread:
            raise ValueError(
                f"lora.{unread[0]} is a setting of LoRA, and lora.mode = {self.mode!r} has no LoRA: remove it, or set lora.mode=lora"
            )
        return self

    @property
    def freezes(self) -> bool:
        """True if the base weights are frozen."""
        return self.mode != "full"

    def peft(self, full: list[str]) -> LoraConfig:
        """PEFT's config of the block.

        Args:
            full: modules that train in full besides routers.
        """
        from peft import LoraConfig

        settings: dict[str, Any] = {
            "r": self.r,
            "lora_alpha": self.alpha,
            "lora_dropout": self.dropout,
            "target_modules": self.targets,
            "use_rslora": self.rslora,
            "use_dora": self.dora,
            "rank_pattern": dict(self.rank_pattern),
            "alpha_pattern": dict(self.alpha_pattern),
            "modules_to_save": full or None,
        }
        return LoraConfig(**settings)


class MilderRecipe(Block):
    """How many more tokens the teacher self keeps than the student, as a difference of their keeps that moves on a straight line."""

    start: Annotated[float, Field(ge=0, lt=1)] = Field(0.05, description="difference at step 0")
    end: Annotated[float, Field(ge=0, lt=1)] = Field(0.3, description="difference at the last step")


class DistillationRecipe(Block):
    """Distillation from a dense teacher, or from the model itself with other keeps."""

    teacher: str = Field(
        description="self: the trained model with more of its tokens, in every task with labels. In image classification also dense_self "
        "(model.name without stages), a run folder, a folder of weights, or a hub name: any dense classifier with the same labels"
    )
    keep: Annotated[float, Field(gt=0, le=1)] = Field(
        1.0,
        description="keep of every stage in the teacher self; 1 is the dense model. Steps in which the student has this keep have no teacher",
    )
    milder: MilderRecipe | None = Field(None, description="keep of the teacher self as that of the student plus a difference (EPIC)")
    revision: str | None = Field(None, description="branch, tag or commit of a hub teacher")
    weight: Annotated[float, Field(ge=0, le=1)] = Field(0.5, description="weight of the teacher's answers")
    labels: Annotated[float, Field(ge=0, le=1)] | None = Field(None, description="weight of the labels; null is 1 - weight")
    temperature: Annotated[float, Field(gt=0)] = Field(2.0, description="softens both answers; their loss is × its square")
    reverse: bool = Field(False, description="KL(student ‖ teacher) in place of KL(teacher ‖ student)")
    hidden: Annotated[float, Field(ge=0)] = Field(
        0.0,
        description="weight of matching the remaining tokens of the last layer, in language models those before a label; needs a teacher of "
        "the same width and grid, with all tokens",
    )

    @property
    def label_weight(self) -> float:
        """Weight of the labels' loss."""
        return 1 - self.weight if self.labels is None else self.labels


class OptimizerRecipe(Block):
    """AdamW with a warm-up, then a cosine, linear or constant schedule."""

    lr: Positive = Field(1e-3, description="peak learning rate of the backbone")
    router_lr: Positive | None = Field(None, description="peak learning rate of routers and mergers; null uses lr")
    router_weight_decay: Annotated[float, Field(ge=0)] | None = Field(
        None, description="weight decay of routers' matrices; null uses weight_decay"
    )
    lora_lr: Positive | None = Field(None, description="peak learning rate of LoRA; null uses lr")
    lora_weight_decay: Annotated[float, Field(ge=0)] | None = Field(
        None, description="weight decay of LoRA's matrices; null uses weight_decay"
    )
    part_lr: dict[str, Annotated[float, Field(ge=0)]] = Field(
        default_factory=dict,
        description="peak learning rate by part of a model of several parts (vision, projector, text), of LoRA in it too; 0 freezes the "
        "part; other parts use lr, routers router_lr",
    )
    layer_decay: Annotated[float, Field(gt=0, le=1)] | None = Field(
        None, description="factor on lr from each layer to the one below; head 1, embeddings lowest, routers keep router_lr; null: one lr"
    )
    weight_decay: Annotated[float, Field(ge=0)] = Field(
        0.05, description="weight decay of matrices, word embeddings too; norms, biases, positions and class tokens have none"
    )
    betas: tuple[Fraction, Fraction] = Field((0.9, 0.999), description="betas of AdamW")
    warmup: Fraction = Field(0.05, description="fraction of training in which the learning rate rises from 0")
    schedule: Literal["cosine", "linear", "constant"] = Field("cosine", description="schedule after the warm-up")
    final: Fraction = Field(0.0, description="final learning rate, as a fraction of the peak")

    @model_validator(mode="after")
    def _one_rate(self) -> OptimizerRecipe:
        if self.part_lr and self.layer_decay is not None:
            raise ValueError(
                f"optimizer.part_lr and optimizer.layer_decay = {self.layer_decay} both decide the learning rate of a layer: remove one"
            )
        return self


def _once(names: list[str]) -> list[str]:
    if len(set(names)) < len(names):
        raise ValueError(f"trainer.loggers = {names} has a name twice: name each logger once")
    return names


class TrainerRecipe(Block):
    """Length of training, hardware, and intervals of logs, validations and checkpoints."""

    max_steps: Count | None = Field(None, description="optimizer steps; set this or max_epochs")
    max_epochs: Count | None = Field(None, description="passes over the training rows")
    precision: Literal["fp32", "bf16"] = Field("fp32", description="bf16 keeps weights in fp32 and computes in bf16")
    accumulate: Count = Field(1, description="batches per optimizer step, whose tokens, pixels or rows weigh alike")
    clip: Annotated[float, Field(ge=0)] = Field(1.0, description="largest norm of the gradient; 0 turns clipping off")
    ema: Annotated[float, Field(gt=0, lt=1)] | None = Field(
        None,
        description="decay per step of an average of the weights, which validation, test and the saved model use; null turns it off",
    )
    gradient_checkpointing: bool = Field(False, description="recompute layers in backward: less memory, more time")
    compile: bool = Field(False, description="torch.compile the model")
    strategy: Literal["auto", "plain", "deepspeed_1", "deepspeed_2", "deepspeed_3"] = Field(
        "auto",
        description="plain (DDP with several processes) or a stage of DeepSpeed's ZeRO; auto is plain on one process, else deepspeed_2",
    )
    devices: Count | Literal["auto"] = Field(1, description="processes per machine, one a GPU; auto uses every GPU, or 1 on a CPU")
    num_nodes: Count = Field(1, description="machines; started by torchrun, SLURM, or with MASTER_ADDR, MASTER_PORT and NODE_RANK set")
    offload: Literal["none", "optimizer", "all"] = Field(
        "none", description="DeepSpeed: keep optimizer states in CPU memory; all keeps parameters there too (deepspeed_3)"
    )
    deepspeed: str | dict[str, Any] | None = Field(
        None, description="path of a DeepSpeed JSON, or its content; keys that the recipe sets are refused in it"
    )
    log_every: Count = Field(10, description="steps between log lines and scalars")
    loggers: Annotated[list[Literal["tensorboard", "csv", "trackio", "wandb", "mlflow"]], AfterValidator(_once)] = Field(
        ["tensorboard"], description="where scalars go; pictures and histograms go to tensorboard alone"
    )
    validate_every: Count | None = Field(None, description="steps between validations; null validates at the end only")
    start_rows: Annotated[int, Field(ge=0)] = Field(
        32,
        description="training rows to which scorer update is fitted, and causal models' thresholds set, before the first step; 0: none",
    )
    checkpoint_every: Count | None = Field(
        None, description="steps between checkpoints; null writes one every 5 minutes, and the last step always does"
    )
    pictures: Annotated[int, Field(ge=0)] = Field(8, description="images whose kept tokens are drawn at each validation")
    bench_rounds: Annotated[int, Field(ge=0)] = Field(40, description="paired rounds of the final speed measurement; 0 skips it")
    bench_seconds: Annotated[float, Field(gt=0, allow_inf_nan=False)] = Field(
        300.0, description="the final speed measurement ends after so many seconds, and not before 8 rounds"
    )

    @model_validator(mode="after")
    def _one_length(self) -> TrainerRecipe:
        if (self.max_steps is None) == (self.max_epochs is None):
            raise ValueError("set either trainer.max_steps or trainer.max_epochs")
        return self


def _compression(value: Any) -> CompressionConfig | None:
    if value is None or isinstance(value, CompressionConfig):
        return value
    if not isinstance(value, dict):
        raise ValueError(f"compression is a block with stages, not {value!r}")
    return CompressionConfig.from_dict(value)


def _no_removed_fraction(value: Any) -> Any:
    if isinstance(value, dict):
        for key in value:
            if key in ("drop", "drop_rate", "drop_ratio", "prune_rate", "sparsity", "reduction"):
                raise ValueError(f"budget.{key} is not a key: Laconic counts the kept share; set budget.target = 1 - removed")
    return value


def _task(name: str) -> str:
    # Only the names of tasks: the tasks themselves import torch.
    registry.check_name("task", name, registry.names(f"{__package__.rpartition('.')[0]}.tasks"))
    return name


def _data(value: Any, info: ValidationInfo) -> DataRecipe:
    """The block as the task's kind of data."""
    task = info.data.get("task")
    if task is None:
        # A wrong task is reported already; the valid keys depend on it.
        return DataRecipe.model_construct()
    kind = KINDS[task]
    return checked(task, value if isinstance(value, kind) else kind.model_validate(value))


def _output(folder: str) -> str:
    left = folder.replace("{recipe}", "").replace("{seed}", "")
    if "{" in left or "}" in left:
        raise ValueError(f"output = {folder!r}: only {{recipe}} and {{seed}} are replaced: remove other braces")
    if not folder.strip() or "\0" in folder:
        raise ValueError(f"output = {folder!r} must be the name of a folder, runs/{{recipe}} for example")
    return folder


class Recipe(Block):
    """One run."""

    task: Annotated[str, AfterValidator(_task)] = Field("image_classification", description="name of the task, a file of trainer/tasks")
    seed: Annotated[int, Field(ge=0, lt=2**32)] = Field(0, description="seed of weights, data order, augmentation and all other draws")
    model: ModelRecipe
    lora: LoraRecipe | None = Field(None, description="train few parameters on frozen weights; null trains everything")
    compression: Annotated[
        CompressionConfig | None, PlainValidator(_compression), PlainSerializer(lambda config: None if config is None else config.to_dict())
    ] = Field(None, description="stages; null trains the dense model")
    budget: Annotated[BudgetConfig | None, BeforeValidator(_no_removed_fraction)] = Field(None, description="allowed cost of the model")
    training_keep: DrawnKeep | None = Field(
        None, description="keep of every stage drawn anew for each training step; evaluation and the saved model have the stages' own"
    )
    phases: list[PhaseRecipe] | None = Field(
        None, description="phases of training, each with its share of the steps; the last is ordinary training"
    )
    distillation: DistillationRecipe | None = Field(None, description="learn from a teacher too")
    data: Annotated[SerializeAsAny[DataRecipe], PlainValidator(_data)] = Field(
        default_factory=dict, validate_default=True, description="training data; the keys depend on the task's kind of data"
    )
    optimizer: OptimizerRecipe = Field(default_factory=OptimizerRecipe)
    trainer: TrainerRecipe
    baselines: list[str] = Field(
        default_factory=list, description="control arms: recipes trained first on the same samples, for the report"
    )
    output: Annotated[str, AfterValidator(_output)] = Field(
        "runs/{recipe}", description="folder of the run; {recipe} and {seed} are replaced"
    )

    @model_validator(mode="after")
    def _consistent(self) -> Recipe:
        if self.model.encoder_routers and self.compression is None:
            raise ValueError("model.encoder_routers = true needs compression.stages that use these routers; add them, or remove the key")
        if self.training_keep is not None and (self.compression is None or self.budget is not None):
            raise ValueError(
                "training_keep is the keep of stages, and compression is not set: remove it, or add compression.stages"
                if self.compression is None
                else "training_keep and budget both set the keep of a training step: remove one of them"
            )
        check_phases(self)
        open_stages = [stage.key for stage in self.compression.stages if stage.free] if self.compression else []
        if self.compression is None and self.budget is not None:
            raise ValueError("budget is set but compression is not: a dense model has no budget; add compression.stages")
        if open_stages and self.budget is None and all(phase.keep is None for phase in self.phases or ()):
            raise ValueError(f"stages {', '.join(open_stages)} have no keep and there is no budget: set keep, or budget.target")
        if self.compression is not None and self.budget is not None and not open_stages:
            raise ValueError("budget.target has no effect: every stage has its own keep; remove keep from one of them")
        return self
