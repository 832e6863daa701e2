"""From a batch of images or clips, with captions, to what is stored of each sample beside its class."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch

from ul_scale.models.text import TextEncoder
from ul_scale.stages.autoencoder import AutoencoderStage
from ul_scale.stages.conditions import first_frames
from ul_scale.stages.fixed import FixedAutoencoder


@dataclass(frozen=True)
class Encoders:
    """What encodes a batch.

    Attributes:
        stage: images or clips.
        text: captions; None if they are not embedded.
        given_frames: the first so many frames of clips are encoded alone, too; None: they are not.
        flipped: whether mirror images are encoded, too.
        device: of the networks.
    """

    stage: AutoencoderStage | FixedAutoencoder
    text: TextEncoder | None
    given_frames: int | None
    flipped: bool
    device: torch.device

    @torch.no_grad()
    def encode(self, batch: Mapping[str, Any]) -> list[dict[str, Any]]:
        """Return for each sample the arguments of ``LatentShard.write``, all but its key."""
        x = batch["x"].to(self.device)
        parts = {"label": batch["label"].tolist(), **self._latents(x, "z_clean", "given")}
        if self.flipped:
            parts |= self._latents(x.flip(-1), "flipped", "flipped_given")
        if "text" in batch:
            parts["text"] = batch["text"]
        if self.text is not None:
            embedding, mask = (tensor.cpu() for tensor in self.text.encode(batch["text"]))
            parts["embedding"] = [tokens[real].numpy() for tokens, real in zip(embedding, mask)]
        return [{part: values[row] for part, values in parts.items()} for row in range(len(x))]

    def _latents(self, x: torch.Tensor, whole: str, given: str) -> dict[str, Any]:
        z_clean = self.stage.encode(x)
        latents = {whole: z_clean.cpu().numpy()}
        if self.given_frames is not None:
            alone = first_frames(x, self.given_frames, x.shape[2] // z_clean.shape[2])
            latents[given] = self.stage.encode(alone).cpu().numpy()
        return latents
