"""Engine ``deepspeed``: ZeRO stages 1, 2 and 3 behind the same interface as the others."""

import json
import os
import sys
import warnings
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from ul_scale.parallel.engine import OptimizerFactory, ParallelConfig, Process

FILES = "deepspeed"
"""The directory of DeepSpeed's own files inside a checkpoint."""
_ABOUT = "about.json"
_BUCKET_NUMEL = 2**26  # 256 MiB, twice, beside the model while it is gathered.
MOMENTS = ("exp_avg", "exp_avg_sq")


@dataclass(frozen=True)
class Fragment:
    """Where this rank's piece of a parameter lies.

    Attributes:
        shape: of the whole parameter.
        start: first element of the piece in the flattened parameter.
        numel: elements in the piece; 0 where this rank holds none of it.
        flat: the fp32 master tensor that DeepSpeed's optimizer updates; it holds many pieces.
        offset: first element of the piece in ``flat``.
    """

    shape: torch.Size
    start: int
    numel: int
    flat: Tensor
    offset: int

    def of(self, flat: Tensor) -> Tensor:
        """Return the piece in a tensor laid out like ``flat``."""
        return flat.detach().narrow(0, self.offset, self.numel)

    def cut(self, whole: Tensor) -> Tensor:
        """Return the piece of a whole parameter."""
        return whole.flatten().narrow(0, self.start, self.numel)


class DeepSpeedEngine:
    """Let DeepSpeed shard the optimizer's state (1), gradients (2) and parameters (3).

    Numbers are those of engine ``none``: weights, gradients and their reductions stay in fp32, bf16 is
    autocast's, and the loss is a sum, so that DeepSpeed divides neither by ranks (undone here) nor by
    micro-batches. A non-finite gradient norm skips the step on all ranks.

    A checkpoint is in two parts: ``state_dict`` holds the whole weights, for evaluation and export;
    ``save_files`` writes DeepSpeed's own files, from which only the same world size and stage resume.
    ``load_state_dict`` takes the whole state of a converted checkpoint, or of engines ``none`` and
    ``fsdp``, at any world size.

    Args:
        stage: the same on every rank, its initial weights too. Parameters that need no gradient stay as
            they are; stage 3 shards them as well.
        make_optimizer: called with the stage; makes a ``torch.optim.AdamW``.
        config: ``zero_stage``, ``offload_optimizer`` and ``accumulation_steps`` are read.
        clip_norm: largest global gradient norm.
        precision: ``fp32`` or ``bf16``.
        process: this process; a process group must exist.
        samples_per_rank: samples of a step on this rank.
    """

    checkpoint_format = "deepspeed"

    def __init__(
        self,
        stage: nn.Module,
        make_optimizer: OptimizerFactory,
        *,
        config: ParallelConfig,
        clip_norm: float,
        precision: str,
        process: Process,
        samples_per_rank: int,
    ):
        deepspeed = import_deepspeed(process.device.type)
        os.environ.setdefault("LOCAL_RANK", str(process.device.index or 0))
        self.stage = stage.to(process.device)
        self.process = process
        self.zero_stage = config.zero_stage
        shapes = {name: p.shape for name, p in stage.named_parameters()}
        self._engine = deepspeed.initialize(
            model=self.stage,
            optimizer=make_optimizer(self.stage),
            config=deepspeed_config(config, clip_norm, precision, process, samples_per_rank),
        )[0]
        self._gathered = deepspeed.zero.GatheredParameters
        self._fragments = {
            name: self._fragment(p, shapes[name])
            for name, p in self.stage.named_parameters()
            if p.requires_grad
        }

    def _fragment(self, parameter: nn.Parameter, shape: torch.Size) -> Fragment:
        zero: Any = self._engine.optimizer
        if self.zero_stage == 3:
            group, offset, size = zero.grad_position[zero.get_param_id(parameter)]
            start = min(self.process.rank * size, shape.numel())
            # Equal pieces: the last ones may reach beyond the parameter's end.
            numel = min(size, shape.numel() - start)
            return Fragment(shape, start, numel, zero.fp32_partitioned_groups_flat[group], offset)
        piece: Any = parameter._hp_mapping  # type: ignore[attr-defined]
        if piece is None:
            return Fragment(shape, 0, 0, zero.single_partition_of_fp32_groups[0], 0)
        flat = zero.single_partition_of_fp32_groups[piece.param_group_index]
        here, there = piece.lp_fragment_address, piece.hp_fragment_address
        return Fragment(shape, here.start, here.numel, flat, there.start)

    def forward(self, batch: Mapping[str, Any], noise: Mapping[str, Tensor], step: int) -> dict[str, Tensor]:
        return self._engine(batch, noise, step)

    def backward(self, loss: Tensor, *, last: bool) -> None:
        self._engine.set_gradient_accumulation_boundary(last)
        # DeepSpeed averages gradients over ranks; the loss is a sum over them. One that is not finite makes
        # every gradient NaN, or an infinite loss with finite gradients on one rank would pass unseen.
        scale = self.process.world_size + 0 * loss.detach()
        self._engine.backward(scale * loss, scale_wrt_gas=False)

    def step(self, lr: float) -> Tensor:
        for group in self._engine.optimizer.param_groups:
            group["lr"] = lr
        self._engine.step()
        return torch.tensor(float(self._engine.get_global_grad_norm()), device=self.process.device)

    def parameters(self) -> dict[str, Tensor]:
        """Return this rank's pieces of the fp32 master weights, flat; empty where it holds none."""
        return {name: fragment.of(fragment.flat) for name, fragment in self._fragments.items()}

    def whole(self, values: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Return values laid out like ``parameters()`` as whole CPU tensors on rank 0, {} elsewhere.

        Collective.
        """
        gathered: dict[str, Tensor] = {}
        for names in self._buckets(list(values)):
            sizes = [self._fragments[name].shape.numel() for name in names]
            buffer = values[names[0]].new_zeros(sum(sizes))
            for name, part in zip(names, buffer.split(sizes)):
                self._fragments[name].cut(part).copy_(values[name])
            # As integers, so that the zeros of the other ranks change no bit.
            dist.reduce(buffer.view(torch.int32), dst=0)
            if self.process.rank == 0:
                parts = buffer.cpu().split(sizes)
                gathered |= {
                    name: part.view(self._fragments[name].shape).clone() for name, part in zip(names, parts)
                }
        return gathered

    def _buckets(self, names: list[str]) -> Iterator[list[str]]:
        """Cut names into runs of at most ``_BUCKET_NUMEL`` elements, or of one larger parameter."""
        bucket: list[str] = []
        size = 0
        for name in names:
            numel = self._fragments[name].shape.numel()
            if bucket and size + numel > _BUCKET_NUMEL:
                yield bucket
                bucket, size = [], 0
            bucket.append(name)
            size += numel
        if bucket:
            yield bucket

    def saved(self, values: Mapping[str, Tensor]) -> Mapping[str, Tensor]:
        return self.whole(values)

    def blank(self, values: Mapping[str, Tensor]) -> Mapping[str, Tensor]:
        return {name: torch.zeros(self._fragments[name].shape) for name in values}

    def restore(self, values: Mapping[str, Tensor], loaded: Mapping[str, Tensor]) -> None:
        for name, value in values.items():
            value.copy_(self._fragments[name].cut(loaded[name]))

    def state_dict(self) -> dict[str, Any]:
        """Return ``model``: whole trained weights and buffers on rank 0, nothing elsewhere. Collective."""
        model = self.whole(self.parameters())
        return {"model": model | self._buffers_on_cpu() if self.process.rank == 0 else {}}

    def blank_state(self, checkpoint_format: str) -> dict[str, Any]:
        """Return whole CPU tensors for ``dcp``; nothing for its own format: see ``load_files``.

        The learning rate and the like are not among them: they are the config's.
        """
        if checkpoint_format == self.checkpoint_format:
            return {}
        moments = {
            name: {"step": torch.zeros(()), **{key: torch.zeros(fragment.shape) for key in MOMENTS}}
            for name, fragment in self._fragments.items()
        }
        model = {**self.blank(self.parameters()), **self._buffers_on_cpu()}
        return {"model": model, "optim": {"state": moments}}

    @torch.no_grad()
    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take what was loaded into ``blank_state``, the same on every rank. Collective."""
        if not state:
            return
        model, moments = state["model"], state["optim"]["state"]
        for name, parameter in self.stage.named_parameters():
            if name in self._fragments:
                with self._gathered([parameter], modifier_rank=0):
                    parameter.copy_(model[name])
        for name, buffer in self._buffers().items():
            buffer.copy_(model[name])
        self._engine.optimizer.refresh_fp32_params()
        optimizer = self._engine.basic_optimizer
        on_device = any(optimizer.param_groups[0].get(key) for key in ("fused", "capturable"))
        for name, fragment in self._fragments.items():
            flat = fragment.flat
            if not optimizer.state[flat]:
                step = moments[name]["step"].to(flat.device if on_device else "cpu", copy=True)
                optimizer.state[flat] = {"step": step, **{key: torch.zeros_like(flat) for key in MOMENTS}}
            for key in MOMENTS:
                fragment.of(optimizer.state[flat][key]).copy_(fragment.cut(moments[name][key]))

    def _buffers(self) -> dict[str, Tensor]:
        parameters = dict(self.stage.named_parameters())
        state = self.stage.state_dict(keep_vars=True)
        return {name: value for name, value in state.items() if name not in parameters}

    def _buffers_on_cpu(self) -> dict[str, Tensor]:
        return {name: buffer.detach().to("cpu", copy=True) for name, buffer in self._buffers().items()}

    def save_files(self, directory: Path) -> None:
        """Write DeepSpeed's own files of this rank into ``directory/deepspeed``; collective.

        Args:
            directory: local; shared, or one per rank.
        """
        folder = directory / FILES
        folder.mkdir(parents=True, exist_ok=True)
        self._engine.save_checkpoint(str(directory), tag=FILES, save_latest=False)
        if self.process.rank == 0:
            about = {"world_size": self.process.world_size, "zero_stage": self.zero_stage}
            (folder / _ABOUT).write_text(json.dumps(about))
            for script in directory.glob("zero_to_*.py"):  # its own converters
                script.unlink()

    def load_files(self, directory: Path) -> None:
        """Restore weights and optimizer state from ``save_files``, bit for bit. Collective.

        The files are pickles: call this only after their hashes were compared with those in COMMIT, and
        only for files from the run's own root.

        Raises:
            ValueError: if they were saved at another world size or ZeRO stage.
        """
        check_fits(directory, self.process.world_size, self.zero_stage)
        self._engine.load_checkpoint(str(directory), tag=FILES)


def check_fits(directory: Path, world_size: int, zero_stage: int) -> None:
    """Compare the files of ``save_files`` with the processes and the stage that are to load them.

    Raises:
        ValueError: if they do not fit.
    """
    about = json.loads((directory / FILES / _ABOUT).read_text())
    if (about["world_size"], about["zero_stage"]) != (world_size, zero_stage):
        raise ValueError(
            f"{directory}: DeepSpeed saved it with {about['world_size']} processes and "
            f"parallel.zero_stage={about['zero_stage']}, but this run has {world_size} and {zero_stage}; "
            "expected the same, or first run: ul-scale checkpoint convert RUN"
        )


def import_deepspeed(device_type: str) -> Any:
    """Import the library for a kind of device, quiet on standard output."""
    # Otherwise it guesses the accelerator, with a warning on standard output.
    os.environ.setdefault("DS_ACCELERATOR", device_type)
    import deepspeed

    # Read only to decide whether to compile a shared-memory collective, which gloo makes needless: two
    # minutes at the first start, and a C++ compiler.
    deepspeed.ops.__compatible_ops__ = {}
    warnings.filterwarnings("ignore", message=r".*_single` instead", category=FutureWarning)
    for handler in deepspeed.utils.logger.handlers:
        if getattr(handler, "stream", None) is sys.stdout:
            handler.setStream(sys.stderr)
    return deepspeed


def deepspeed_config(
    config: ParallelConfig, clip_norm: float, precision: str, process: Process, samples_per_rank: int
) -> dict[str, Any]:
    """Return DeepSpeed's config for a run's."""
    # DeepSpeed's own linear layer adds the bias in place: to what selective checkpointing has kept, twice.
    zero: dict[str, Any] = {"stage": config.zero_stage, "memory_efficient_linear": False}
    if config.offload_optimizer:
        zero["offload_optimizer"] = {"device": "cpu", "pin_memory": process.device.type == "cuda"}
    result: dict[str, Any] = {
        "train_micro_batch_size_per_gpu": samples_per_rank // config.accumulation_steps,
        "gradient_accumulation_steps": config.accumulation_steps,
        "gradient_clipping": clip_norm,
        "zero_optimization": zero,
        # torch's AdamW also where the state is offloaded: DeepSpeed's own needs a compiler.
        "zero_force_ds_cpu_optimizer": False,
    }
    if precision == "bf16":
        # No module is "safe" to communicate in bf16: gradients are reduced in fp32.
        result["torch_autocast"] = {
            "enabled": True,
            "dtype": "bfloat16",
            "lower_precision_safe_modules": [],
        }
    return result
