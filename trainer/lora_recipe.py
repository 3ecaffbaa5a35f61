"""The ``lora`` block of a recipe."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, model_validator

if TYPE_CHECKING:
    from peft import LoraConfig

Rank = Annotated[int, Field(ge=1)]


class LoraRecipe(BaseModel):
    """What trains: LoRA and routers on frozen weights, routers alone, or everything."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    mode: Literal["routers", "lora", "full"] = Field(
        "lora",
        description="lora trains LoRA and routers, routers these alone, full everything; a head that model.name lacks trains in any case",
    )
    r: Rank = Field(8, description="rank")
    alpha: Annotated[float, Field(gt=0)] = Field(16.0, description="scale of LoRA is alpha ÷ r, or alpha ÷ √r with rslora")
    dropout: Annotated[float, Field(ge=0, lt=1)] = Field(0.0, description="of LoRA's input")
    targets: list[str] | str | None = Field(
        None,
        description="modules that get LoRA: names or ends of names, a regular expression, or all-linear; none takes the family's default, "
        "which is every linear map of its layers; never routers",
    )
    rslora: bool = Field(False, description="rank-stabilised scale (2312.03732)")
    dora: bool = Field(False, description="magnitude and direction apart (2402.09353)")
    rank_pattern: dict[str, Rank] = Field(default_factory=dict, description="r by ends of module names or regular expressions")
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
