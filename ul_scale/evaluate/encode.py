"""Write the latents z_clean of a data set as shards, for stage 2."""

import fcntl
import math
from pathlib import Path

import torch

from ul_scale.config import AutoencoderRun
from ul_scale.data.index import Index, open_index
from ul_scale.data.latents import LatentWriter
from ul_scale.data.stream import iterate
from ul_scale.evaluate.restore import newest_step, restore_autoencoder
from ul_scale.stages.autoencoder import AutoencoderStage
from ul_scale.train.prepare import latents_dir

BATCH_SIZE = 100


def is_encoded(run_dir: Path, step: int, split: str) -> bool:
    return LatentWriter.is_complete(str(latents_dir(str(run_dir.parent), run_dir.name, step, split)))


def encode(run_dir: Path, step: int | None = None, splits: tuple[str, ...] = ("train", "val")) -> list[Path]:
    """Encode a run's own data with the first EMA of its encoder; skip the splits that are there.

    Args:
        run_dir: of an autoencoder.
        step: its checkpoint; the newest complete one by default.
        splits: which of ``data.train`` and ``data.val``.

    Returns:
        the folders of latent shards. Their index also says the latents' shape, their std over all
        entries, the pixels that one stands for, and the noise level that the decoder expects.
    """
    step = newest_step(run_dir) if step is None else step
    config, stage = restore_autoencoder(run_dir, step)
    folders = []
    for split in splits:
        url = getattr(config.data, split)
        if url is None:
            continue
        folder = latents_dir(str(run_dir.parent), run_dir.name, step, split)
        folders.append(folder)
        folder.parent.mkdir(parents=True, exist_ok=True)
        with (folder.parent / f"{split}.lock").open("w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)  # a second encoder waits, and then finds it done
            if not is_encoded(run_dir, step, split):
                _encode_split(stage, config, open_index(url), folder, {"run": run_dir.name, "step": step})
    return folders


@torch.no_grad()
def _encode_split(
    stage: AutoencoderStage,
    config: AutoencoderRun,
    index: Index,
    folder: Path,
    autoencoder: dict[str, object],
) -> None:
    device = next(stage.parameters()).device
    total, total_square, count, last_class = 0.0, 0.0, 0, -1
    with LatentWriter(str(folder), dataset=index.dataset) as writer:
        for batch in iterate(index, config.data, batch_size=BATCH_SIZE):
            z_clean = stage.encode(batch["x"].to(device)).cpu()
            total += z_clean.double().sum().item()
            total_square += z_clean.double().square().sum().item()
            count += z_clean.numel()
            last_class = max(last_class, int(batch["label"].max()))
            for name, z, label in zip(batch["keys"], z_clean.numpy(), batch["label"].tolist()):
                # Its image's shard and key: unique in the set, and says where a latent came from.
                writer.write(name.removeprefix(f"{index.dataset}/"), z, label=label)
        mean = total / count
        variance = total_square / count - mean**2
        if variance <= 0:
            raise ValueError(f"{folder}: every latent is the same: the autoencoder has collapsed; raise c_lf")
        writer.extra = {
            "autoencoder": autoencoder,
            "source": index.identity,
            "shape": list(stage.latent_shape),
            "num_pixels": stage.num_pixels,
            "num_classes": last_class + 1,
            "mean": mean,
            "std": math.sqrt(variance),
            "log_snr_max": stage.loss.log_snr_max,
        }
