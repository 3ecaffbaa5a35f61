"""Lightning's DeepSpeed strategy, also on CPU, with checkpoint folders that have a completeness marker."""

from __future__ import annotations

import argparse
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch.strategies.deepspeed import DeepSpeedStrategy, remove_module_hooks
from lightning.pytorch.strategies.parallel import ParallelStrategy
from torch import Tensor
from torch.nn import Module

from ...modules.checkpoints.whole_files import hashes_of, write_json
from . import collective
from .deepspeed import join_deepspeed, set_accelerator, told_of_builds
from .resume import MARKER, remove_checkpoint

# Attribute of a model of transformers whose recording hooks are installed.
_INSTALLED = "_output_capturing_hooks_installed"


class LaconicDeepSpeed(DeepSpeedStrategy):
    """ZeRO in an existing process group.

    Args:
        config: DeepSpeed's configuration.
        frozen: True if most weights are frozen; checkpoints then leave frozen weights out.
    """

    def __init__(self, config: Mapping[str, Any], frozen: bool = False) -> None:
        # Lightning imports DeepSpeed here.
        set_accelerator()
        super().__init__(config=dict(config), exclude_frozen_parameters=frozen)
        # Removed, because Lightning sets this key from the Trainer's gradient_clip_val.
        self.config.pop("gradient_clipping", None)

    @property
    def root_device(self) -> torch.device:
        return torch.device("cuda", self.local_rank) if torch.cuda.is_available() else torch.device("cpu")

    def setup_environment(self) -> None:
        # Skips the methods of DeepSpeedStrategy and DDPStrategy, which require CUDA; their other steps are done here.
        ParallelStrategy.setup_environment(self)
        self.setup_distributed()

    def setup_distributed(self) -> None:
        self.set_world_ranks()
        join_deepspeed()

    def backward(self, closure_loss: Tensor, optimizer: Any, *args: Any, **kwargs: Any) -> Tensor:
        # Lightning has divided the loss by the number of accumulated batches. Without scale_wrt_gas=False DeepSpeed would divide again,
        # and the gradients would be too small, which matters for clipping and for optimizers other than Adam.
        return super().backward(closure_loss, optimizer, *args, scale_wrt_gas=False, **kwargs)

    def optimizer_state(self, optimizer: Any) -> dict[str, Any]:
        # DeepSpeed writes each rank's shard itself; Lightning would build this dictionary without using it.
        return {}

    def _setup_model_and_optimizer(self, model: Module, optimizer: Any, lr_scheduler: Any = None) -> tuple[Any, Any]:
        assert isinstance(self.config, dict)
        trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
        return self._engine(self.config, model, model_parameters=trained, optimizer=optimizer, lr_scheduler=lr_scheduler)

    def _engine(self, config: dict[str, Any], model: Module, **settings: Any) -> tuple[Any, Any]:
        import deepspeed

        # Lightning would pass on the device's index, which a CPU device does not have.
        arguments = argparse.Namespace(device_rank=self.local_rank)
        # DeepSpeed would cache the bf16 copies of weights for a whole forward. A copy that was made when a layer's weights were read for
        # the first time, by a scorer for example, would give its gradient only after ZeRO-3 has freed the weight.
        model.register_forward_pre_hook(_without_copies)
        model.register_forward_hook(_with_copies, always_call=True)
        with told_of_builds():
            engine, optimizer, *_ = deepspeed.initialize(args=arguments, config=config, model=model, dist_init_required=False, **settings)
        return engine, optimizer

    def _initialize_deepspeed_inference(self, model: Module) -> None:
        assert isinstance(self.config, dict)
        config: dict[str, Any] = {"train_micro_batch_size_per_gpu": 1}
        # Lightning's own configuration lacks autocast, so that test would use another precision than validation.
        for key in ("torch_autocast", *(("zero_allow_untested_optimizer", "zero_optimization") if self.zero_stage_3 else ())):
            if key in self.config:
                config[key] = self.config[key]
        if self.zero_stage_3:
            # Without an optimizer DeepSpeed refuses offload_optimizer.
            config["zero_optimization"] = {k: v for k, v in config["zero_optimization"].items() if k != "offload_optimizer"}
            # Lightning moves the model to the CPU after training, and DeepSpeed moves back none whose weights are sharded already: its
            # buffers and the small weights that every process holds would stay there.
            model.to(self.root_device)
        remove_hooks(model)
        self.model, _ = self._engine(config, model, model_parameters=[])

    def teardown(self) -> None:
        engine, self.model = self.model, self.lightning_module
        if engine is not None and hasattr(engine, "destroy"):
            # Its hooks gather and free parameters, and would run beside those of the next engine.
            engine.destroy()
        self.optimizers = []
        super().teardown()

    def save_checkpoint(self, checkpoint: dict[str, Any], filepath: Any, storage_options: Any = None) -> None:
        """Writes a folder. Its marker is removed first and written last, after every rank has written its part.

        The folder also holds the whole weights as safetensors, in ``model/`` or ``adapter/`` as a finished run does: frozen and tied
        weights are included, any number of processes can load them, and no pickle is read.
        """
        folder = Path(collective.from_rank_zero(lambda: str(filepath)))
        if self.is_global_zero and folder.exists():
            remove_checkpoint(folder)
        collective.wait()
        super().save_checkpoint(checkpoint, folder, storage_options)
        module: Any = self.lightning_module
        module.save_weights(folder)
        if self.is_global_zero:
            about = {"world_size": self.world_size, "stage": self._stage, "step": checkpoint["global_step"]}
            write_json(folder / MARKER, {**about, "files": hashes_of(folder)})
        collective.wait()

    @property
    def _stage(self) -> int:
        assert isinstance(self.config, dict)
        stage: int = self.config["zero_optimization"]["stage"]
        return stage


def _without_copies(model: Module, inputs: Any) -> None:
    torch.set_autocast_cache_enabled(False)


def _with_copies(model: Module, inputs: Any, output: Any) -> None:
    torch.set_autocast_cache_enabled(True)


def remove_hooks(model: Module) -> None:
    """Removes the hooks of an earlier engine, and all others.

    transformers records hidden states by hooks, which it installs once: it is told to do so again, or the tower of a LLaVA would have
    no features.
    """
    remove_module_hooks(model)
    for module in model.modules():
        if getattr(module, _INSTALLED, False):
            setattr(module, _INSTALLED, False)
