"""Baselines: autoencoders that are not trained here, for the same base models on their latents."""

import hashlib
import math
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ul_scale.diffusion.process import add_noise
from ul_scale.diffusion.schedule import check_nats
from ul_scale.models.flops import forward_flops, meta

SOURCES = ("pixels", "diffusers")


@dataclass(frozen=True, kw_only=True)
class FixedModel:
    """Section ``model`` of an autoencoder that is not trained."""

    source: str
    """pixels: z_clean are the pixels themselves, patch by patch; diffusers: a pretrained AutoencoderKL."""
    patch: int = 16
    """Of pixels: H / h."""
    weights: str | None = field(default=None, metadata={"identity": False})
    """Of diffusers: a local folder with config.json and diffusion_pytorch_model.safetensors."""
    weights_sha256: str | None = None
    """Of that file; filled in, or checked where it is given."""

    def __post_init__(self) -> None:
        if self.source not in SOURCES:
            raise ValueError(f"model.source is {self.source!r}; expected one of {', '.join(SOURCES)}")
        if self.patch < 1:
            raise ValueError(f"model.patch is {self.patch}; expected at least 1")
        if (self.source == "diffusers") != (self.weights is not None):
            raise ValueError(
                f"model.source is {self.source} and model.weights is {self.weights}; expected a folder of "
                "weights for diffusers, and none for pixels"
            )


@dataclass(frozen=True, kw_only=True)
class FixedLoss:
    """Section ``loss`` of an autoencoder that is not trained."""

    log_snr_max: float = 10.0
    """λ(0) at which its decoder is given z_0, nats: nearly clean, for it has never seen noise."""

    def __post_init__(self) -> None:
        check_nats("loss", self, "log_snr_max")


class FixedAutoencoder(nn.Module):
    """What base models, encoding and evaluation need of an autoencoder; it has no prior and no bitrate.

    Args:
        model: which one.
        loss: the noise that its z_0 have.
        image_size: H = W of the images, pixels.
        channels: colour channels of the images.

    Raises:
        ValueError: if it is not there, or does not fit the images.
    """

    def __init__(self, model: FixedModel, loss: FixedLoss, *, image_size: int, channels: int):
        super().__init__()
        self.loss = loss
        self.image_shape = (channels, image_size, image_size)
        self.num_pixels = image_size**2
        self.codec: PixelCodec | VaeCodec
        self.codec = (
            PixelCodec(model.patch, channels) if model.source == "pixels" else _load_vae(model, channels)
        )
        factor = self.codec.downsampling
        if image_size % factor:
            raise ValueError(f"data.image_size is {image_size}; the autoencoder needs a multiple of {factor}")
        side = image_size // factor
        self.latent_shape = (self.codec.channels, side, side)

    @property
    def encoder(self) -> nn.Module:
        return self.codec

    def forward_flops(self) -> dict[str, int]:
        """Return the forward FLOPs of one example by network."""
        x, z = meta(self.image_shape), meta(self.latent_shape)
        return {
            "encoder": forward_flops(self.codec, lambda net: net(x)),
            "decoder": forward_flops(_Decoding(self.codec), lambda net: net(z)),
        }

    def encode(self, x: Tensor) -> Tensor:
        """Return z_clean (b, c, h, w) of images (b, C, H, W)."""
        return self.codec(x)

    def add_encoder_noise(self, z_clean: Tensor, eps: Tensor) -> Tensor:
        """Return z_0 = α_0 z_clean + σ_0 ε."""
        return add_noise(z_clean, eps, z_clean.new_full((len(z_clean),), self.loss.log_snr_max))

    def decode(self, z_0: Tensor, **_: Any) -> Tensor:
        """Return images (b, C, H, W) of z_0; nothing is sampled."""
        return self.codec.decode(z_0 * math.sqrt(1 + math.exp(-self.loss.log_snr_max)))


class PixelCodec(nn.Module):
    """Space to depth and back."""

    def __init__(self, patch: int, channels: int):
        super().__init__()
        self.downsampling, self.channels = patch, channels * patch**2

    def forward(self, x: Tensor) -> Tensor:
        return F.pixel_unshuffle(x, self.downsampling)

    def decode(self, z: Tensor) -> Tensor:
        return F.pixel_shuffle(z, self.downsampling)


class VaeCodec(nn.Module):
    """A diffusers AutoencoderKL: the mean of its posterior, in its own scaling."""

    def __init__(self, vae: Any):
        super().__init__()
        self.vae = vae
        config = vae.config
        self.downsampling, self.channels = 2 ** (len(config.block_out_channels) - 1), config.latent_channels
        self.scale, self.shift = config.scaling_factor, config.get("shift_factor") or 0.0

    def forward(self, x: Tensor) -> Tensor:
        return (self.vae.encode(x).latent_dist.mode() - self.shift) * self.scale

    def decode(self, z: Tensor) -> Tensor:
        return self.vae.decode(z / self.scale + self.shift).sample


class _Decoding(nn.Module):
    def __init__(self, codec: "PixelCodec | VaeCodec"):
        super().__init__()
        self.codec = codec

    def forward(self, z: Tensor) -> Tensor:
        return self.codec.decode(z)


WEIGHTS_FILE = "diffusion_pytorch_model.safetensors"


def weights_sha256(model: FixedModel) -> str | None:
    """Return the hash of a model's weights, None if it has none.

    Raises:
        ValueError: if they are not there, or not those that ``model.weights_sha256`` names.
    """
    if model.weights is None:
        return None
    path = Path(model.weights) / WEIGHTS_FILE
    if not path.is_file():
        raise ValueError(
            f"model.weights is {model.weights}; expected a folder with config.json and {WEIGHTS_FILE}"
        )
    with path.open("rb") as file:
        found = hashlib.file_digest(file, "sha256").hexdigest()
    if model.weights_sha256 not in (None, found):
        raise ValueError(f"{path} has sha256 {found}; model.weights_sha256 is {model.weights_sha256}")
    return found


def _load_vae(model: FixedModel, channels: int) -> VaeCodec:
    try:
        from diffusers import AutoencoderKL
    except ImportError as error:
        raise ImportError(f"model.source=diffusers needs {error.name}: pip install 'ul-scale[vae]'") from None
    weights_sha256(model)
    try:
        if torch.get_default_device().type == "meta":  # where only shapes are asked for
            vae = AutoencoderKL.from_config(AutoencoderKL.load_config(model.weights, local_files_only=True))
        else:
            vae = AutoencoderKL.from_pretrained(model.weights, local_files_only=True, use_safetensors=True)
    except (OSError, ValueError) as error:
        raise ValueError(
            f"model.weights {model.weights}: no AutoencoderKL: {str(error).splitlines()[0]}"
        ) from None
    if vae.config.in_channels != channels:
        raise ValueError(f"data.channels is {channels}; the autoencoder takes {vae.config.in_channels}")
    return VaeCodec(vae.eval())
