"""Write the latents z_clean of a data set as shards, for stage 2."""

import math
from pathlib import Path

import torch

from ul_scale.data.index import open_index
from ul_scale.data.latents import LatentWriter
from ul_scale.data.stream import iterate
from ul_scale.evaluate.restore import newest_step, restore_autoencoder
from ul_scale.train.worker import latents_dir

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
    device = next(stage.parameters()).device
    folders = []
    for split in splits:
        url = getattr(config.data, split)
        if url is None:
            continue
        folder = latents_dir(str(run_dir.parent), run_dir.name, step, split)
        folders.append(folder)
        if is_encoded(run_dir, step, split):
            continue
        index = open_index(url)
        total, total_square, count = 0.0, 0.0, 0
        with LatentWriter(str(folder), dataset=index.dataset) as writer, torch.no_grad():
            for batch in iterate(index, config.data, batch_size=BATCH_SIZE):
                z_clean = stage.encode(batch["x"].to(device)).cpu()
                total += z_clean.double().sum().item()
                total_square += z_clean.double().square().sum().item()
                count += z_clean.numel()
                for name, z, label in zip(batch["keys"], z_clean.numpy(), batch["label"].tolist()):
                    # Its image's shard and key: unique in the set, and says where a latent came from.
                    writer.write(name.removeprefix(f"{index.dataset}/"), z, label=label)
            mean = total / count
            writer.extra = {
                "autoencoder": {"run": run_dir.name, "step": step},
                "shape": list(stage.latent_shape),
                "num_pixels": stage.num_pixels,
                "mean": mean,
                "std": math.sqrt(total_square / count - mean**2),
                "log_snr_max": stage.loss.log_snr_max,
            }
    return folders
