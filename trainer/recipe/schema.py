"""What a recipe may say. Every key that is accepted is read; every other key is refused by name."""

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
from ...modules.config import CompressionConfig
from .data_kinds import KINDS, checked

if TYPE_CHECKING:
    from peft import LoraConfig

Positive = Annotated[float, Field(gt=0)]


class ModelRecipe(Block):
    """Where the backbone comes from: a folder or hub name with weights, a config of our own, or a pretraining with masks."""

    name: str | None = Field(
        None, description="hub name or local folder of weights, a run folder, a checkpoint or an adapter; what was trained there goes on"
    )
    revision: str | None = Field(None, description="branch, tag or commit of a hub model")
    encoder_of: str | None = Field(
        None, description="run of masked_image_pretraining, folder or hub name of a vit_mae: its encoder becomes a vit with a new head"
    )
    encoder_routers: bool = Field(False, description="stages start from the weights that they had in encoder_of")
    config: dict[str, Any] | None = Field(None, description="model_type and settings of a model with random weights")
    settings: dict[str, Any] = Field(
        default_factory=dict, description="laid over the model's own config: hidden_dropout_prob, drop_path_rate where the family has it …"
    )
    attention: Literal["sdpa", "eager", "flash_attention_2", "flash_attention_3"] = Field("sdpa", description="attention implementation")

    @model_validator(mode="after")
    def _one_source(self) -> ModelRecipe:
        if sum(source is not None for source in (self.name, self.config, self.encoder_of)) != 1:
            raise ValueError(
                "give one of model.name (a folder or hub name), model.config (random weights) or model.encoder_of (a pretraining with masks)"
            )
        if self.encoder_routers and self.encoder_of is None:
            raise ValueError("model.encoder_routers = true takes routers of model.encoder_of, which is not set: name a pretraining there")
        if self.config is not None and "model_type" not in self.config:
            raise ValueError("model.config.model_type is missing: vit or deit, for example")
        return self


class LoraRecipe(Block):
    """What trains: LoRA and routers on frozen weights, routers alone, or everything."""

    mode: Literal["routers", "lora", "full"] = Field(
        "lora",
        description="lora trains LoRA and routers, routers these alone, full everything; a head that model.name lacks trains in any case",
    )
    r: Count = Field(8, description="rank")
    alpha: Annotated[float, Field(gt=0)] = Field(16.0, description="scale of LoRA is alpha ÷ r, or alpha ÷ √r with rslora")
    dropout: Annotated[float, Field(ge=0, lt=1)] = Field(0.0, description="of LoRA's input")
    targets: list[str] | str | None = Field(
        None,
        description="modules that get LoRA: names or ends of names, a regular expression, or all-linear; none takes the family's default, "
        "which is every linear map of its layers; never routers",
    )
    rslora: bool = Field(False, description="rank-stabilised scale (2312.03732)")
    dora: bool = Field(False, description="magnitude and direction apart (2402.09353)")
    rank_pattern: dict[str, Count] = Field(default_factory=dict, description="r by ends of module names or regular expressions")
    alpha_pattern: dict[str, Annotated[float, Field(gt=0)]] = Field(default_factory=dict, description="alpha, likewise")
    modules_to_save: list[str] = Field(
        default_factory=list, description="modules that train in full beside routers, a head for example; new ones do without being named"
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
                f"lora.{unread[0]} says how LoRA is made, and lora.mode = {self.mode!r} makes none: leave it out, or set lora.mode=lora"
            )
        return self

    @property
    def freezes(self) -> bool:
        """Whether the weights stay as they are."""
        return self.mode != "full"

    def peft(self, full: list[str]) -> LoraConfig:
        """PEFT's config.

        Args:
            full: modules that train in full beside routers.
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


class DistillationRecipe(Block):
    """What the student learns from a dense teacher."""

    teacher: str = Field(
        description="dense_self (model.name itself, without stages), a run folder, a folder of weights, or a hub name: "
        "any dense image classifier of transformers with the same labels"
    )
    revision: str | None = Field(None, description="branch, tag or commit of a hub teacher")
    weight: Annotated[float, Field(ge=0, le=1)] = Field(0.5, description="of the teacher's answers; the labels have the rest")
    temperature: Annotated[float, Field(gt=0)] = Field(2.0, description="softens both answers; their loss is scaled by its square")
    hidden: Annotated[float, Field(ge=0)] = Field(
        0.0, description="weight of matching the last layer's tokens that are left; needs a teacher of the same width and grid"
    )


class OptimizerRecipe(Block):
    """AdamW with a warm-up, then a cosine to a tenth or a straight hold."""

    lr: Positive = Field(1e-3, description="peak learning rate of the backbone")
    router_lr: Positive | None = Field(None, description="peak learning rate of routers and mergers; none takes lr")
    router_weight_decay: Annotated[float, Field(ge=0)] | None = Field(None, description="of routers' matrices; none takes weight_decay")
    lora_lr: Positive | None = Field(None, description="peak learning rate of LoRA; none takes lr")
    lora_weight_decay: Annotated[float, Field(ge=0)] | None = Field(None, description="of LoRA's matrices; none takes weight_decay")
    layer_decay: Annotated[float, Field(gt=0, le=1)] | None = Field(
        None, description="factor on lr from each layer to the one below; head 1, embeddings lowest, routers keep router_lr; none is one lr"
    )
    weight_decay: Annotated[float, Field(ge=0)] = Field(
        0.05, description="of matrices, those of words among them; norms, biases, positions and class tokens have none"
    )
    betas: tuple[Fraction, Fraction] = Field((0.9, 0.999), description="of AdamW")
    warmup: Fraction = Field(0.05, description="fraction of training over which the learning rate grows from 0")
    schedule: Literal["cosine", "linear", "constant"] = Field("cosine", description="after the warm-up")
    final: Fraction = Field(0.0, description="learning rate at the end, as a fraction of the peak")


class TrainerRecipe(Block):
    """How long, on what, and how often to look."""

    max_steps: Count | None = Field(None, description="optimizer steps; give this or max_epochs")
    max_epochs: Count | None = Field(None, description="passes over the training rows")
    precision: Literal["fp32", "bf16"] = Field("fp32", description="bf16 keeps weights in fp32 and computes in bf16")
    accumulate: Count = Field(1, description="batches per optimizer step")
    clip: Annotated[float, Field(ge=0)] = Field(1.0, description="largest norm of the gradient; 0 does not clip")
    ema: Annotated[float, Field(gt=0, lt=1)] | None = Field(
        None,
        description="decay a step of an average of the weights, which validation, test and the saved model then use; none averages nothing",
    )
    gradient_checkpointing: bool = Field(False, description="recompute layers in backward: less memory, more time")
    compile: bool = Field(False, description="torch.compile the model")
    strategy: Literal["auto", "plain", "deepspeed_1", "deepspeed_2", "deepspeed_3"] = Field(
        "auto",
        description="plain (DDP with several processes) or a stage of DeepSpeed's ZeRO; auto is plain on one process, else deepspeed_2",
    )
    devices: Count | Literal["auto"] = Field(1, description="processes on a machine, one a GPU; auto takes every GPU, or 1 on a CPU")
    num_nodes: Count = Field(1, description="machines; started by torchrun, SLURM, or with MASTER_ADDR, MASTER_PORT and NODE_RANK set")
    offload: Literal["none", "optimizer", "all"] = Field(
        "none", description="DeepSpeed: keep optimizer states in CPU memory; all keeps parameters there too (deepspeed_3)"
    )
    deepspeed: str | dict[str, Any] | None = Field(
        None, description="path of a DeepSpeed JSON, or its content; what other keys of the recipe set is refused in it"
    )
    log_every: Count = Field(10, description="steps between log lines and scalars")
    validate_every: Count | None = Field(None, description="steps between validations; none validates at the end only")
    checkpoint_every: Count | None = Field(
        None, description="steps between checkpoints; none writes one at the end. The final weights are in model/ in any case"
    )
    pictures: Annotated[int, Field(ge=0)] = Field(8, description="images whose kept tokens are drawn at each validation")
    bench_rounds: Annotated[int, Field(ge=0)] = Field(40, description="paired rounds of the closing speed measurement; 0 leaves it out")

    @model_validator(mode="after")
    def _one_length(self) -> TrainerRecipe:
        if (self.max_steps is None) == (self.max_epochs is None):
            raise ValueError("give either trainer.max_steps or trainer.max_epochs")
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
                raise ValueError(f"budget.{key} is not a key: Laconic counts what is left; give budget.target = 1 - removed")
    return value


def _task(name: str) -> str:
    # The names alone: the tasks themselves import what trains.
    registry.check_name("task", name, registry.names(f"{__package__.rpartition('.')[0]}.tasks"))
    return name


def _data(value: Any, info: ValidationInfo) -> DataRecipe:
    """The block as the task's kind of data."""
    task = info.data.get("task")
    if task is None:
        # The task is wrong, which is said already; which keys are right depends on it.
        return DataRecipe.model_construct()
    kind = KINDS[task]
    return checked(task, value if isinstance(value, kind) else kind.model_validate(value))


class Recipe(Block):
    """One run."""

    task: Annotated[str, AfterValidator(_task)] = Field("image_classification", description="what is learned: a file of trainer/tasks")
    seed: Annotated[int, Field(ge=0)] = Field(0, description="of weights, data order, augmentation and every draw")
    model: ModelRecipe
    lora: LoraRecipe | None = Field(None, description="train few parameters on frozen weights; none trains everything")
    compression: Annotated[
        CompressionConfig | None, PlainValidator(_compression), PlainSerializer(lambda config: None if config is None else config.to_dict())
    ] = Field(None, description="stages; none trains the dense model")
    budget: Annotated[BudgetConfig | None, BeforeValidator(_no_removed_fraction)] = Field(None, description="what the model may cost")
    distillation: DistillationRecipe | None = Field(None, description="learn from a frozen dense teacher as well")
    data: Annotated[SerializeAsAny[DataRecipe], PlainValidator(_data)] = Field(
        default_factory=dict, validate_default=True, description="what is trained on; its keys are those of the task's kind of data"
    )
    optimizer: OptimizerRecipe = Field(default_factory=OptimizerRecipe)
    trainer: TrainerRecipe
    baselines: list[str] = Field(default_factory=list, description="recipes trained first on the same samples, for the report")
    output: str = Field("runs/{recipe}", description="folder of the run; {recipe} and {seed} are filled in")

    @model_validator(mode="after")
    def _consistent(self) -> Recipe:
        if self.model.encoder_routers and self.compression is None:
            raise ValueError("model.encoder_routers = true needs compression.stages that take the routers over; add them, or leave it out")
        open_stages = [stage.key for stage in self.compression.stages if stage.free] if self.compression else []
        if self.compression is None and self.budget is not None:
            raise ValueError("budget is set but compression is not: a dense model has nothing to budget; add compression.stages")
        if open_stages and self.budget is None:
            raise ValueError(f"stages {', '.join(open_stages)} have no keep and there is no budget: give keep, or budget.target")
        if self.compression is not None and self.budget is not None and not open_stages:
            raise ValueError("budget.target has nothing to decide: every stage has a keep of its own; leave keep out of one of them")
        return self
