"""Stage 1: encoder, diffusion prior and diffusion decoder, trained together (Unified Latents, section 3)."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from ul_scale.diffusion import losses, samplers
from ul_scale.diffusion.process import add_noise, v_from_x_eps
from ul_scale.diffusion.schedule import Schedule, latent_schedule, pixel_schedule
from ul_scale.models.encoder import Encoder, EncoderConfig
from ul_scale.models.flops import forward_flops, meta
from ul_scale.models.uvit import UViT, UViTConfig
from ul_scale.stages.noise import NoiseSpec


@dataclass(frozen=True, kw_only=True)
class AutoencoderModel:
    """Section ``model`` of an autoencoder; ``size`` fills in what is not given."""

    size: str | None = None
    latent_channels: int
    encoder: EncoderConfig
    prior: UViTConfig
    decoder: UViTConfig


@dataclass(frozen=True, kw_only=True)
class AutoencoderLoss:
    """Section ``loss`` of an autoencoder."""

    loss_factor: float
    """c_lf, the weight of the decoder's loss: the dial of the bitrate. At c_lf ≤ 1 the latent collapses."""
    loss_bias: float
    """b of sigmoid(b − λ), nats; a higher b also raises the bitrate."""
    log_snr_max: float = 5.0
    """λ_z(0): the encoder's fixed noise, which is the prior's lowest noise level, nats."""
    log_snr_min: float = -10.0
    """λ_z(1), nats."""
    loss_factor_start: float | None = None
    """c_lf at step 0, from where it falls to ``loss_factor``; null: no warm start, the paper's objective."""
    loss_factor_warmup_steps: int = 0
    """Steps of that fall, linear in the logarithm. Short runs at a low bitrate need it: before the decoder
    has learned to use z_0, the prior's gradient shrinks the latent to nothing."""
    target_bits_per_pixel: float | None = field(default=None, metadata={"legacy": None})
    """Hold the latent at this bitrate by adapting c_lf, from ``loss_factor`` on; null: c_lf stays as set."""
    target_start: float = field(default=0.3, metadata={"legacy": 0.3})
    """Share of ``train.steps`` from which c_lf is adapted; until then it is as set, with its warm start."""
    target_end: float = field(default=0.95, metadata={"legacy": 0.95})
    """Share of ``train.steps`` after which c_lf stays where it settled."""

    def __post_init__(self) -> None:
        for name in ("loss_factor", "loss_factor_start"):
            value = getattr(self, name)
            if value is not None and not 0 < value < math.inf:
                raise ValueError(f"loss.{name} is {value}; expected a number above 0")
        if (self.loss_factor_start is None) != (self.loss_factor_warmup_steps == 0):
            raise ValueError(
                f"loss.loss_factor_start is {self.loss_factor_start} and loss.loss_factor_warmup_steps is "
                f"{self.loss_factor_warmup_steps}; expected both or neither"
            )

    def loss_factor_at(self, step: int) -> float:
        """Return c_lf at a step (from 0)."""
        if self.loss_factor_start is None or step >= self.loss_factor_warmup_steps:
            return self.loss_factor
        left = 1 - step / self.loss_factor_warmup_steps
        return self.loss_factor * (self.loss_factor_start / self.loss_factor) ** left


class AutoencoderStage(nn.Module):
    """Map (batch, noise, step) to per-example losses in bits per pixel.

    Args:
        model: shapes of the three networks.
        loss: weights of the objective.
        image_size: H = W of the images, pixels.
        channels: colour channels of the images.
    """

    def __init__(self, model: AutoencoderModel, loss: AutoencoderLoss, *, image_size: int, channels: int):
        super().__init__()
        downsampling = model.encoder.downsampling
        for name, factor in (
            ("encoder", downsampling),
            ("prior", downsampling * model.prior.downsampling),
            ("decoder", model.decoder.downsampling),
        ):
            if image_size % factor:
                raise ValueError(
                    f"data.image_size is {image_size}; model.{name} needs a multiple of {factor}"
                )
        self.loss = loss
        self.num_pixels = image_size**2
        self.image_shape = (channels, image_size, image_size)
        self.latent_shape = (model.latent_channels, image_size // downsampling, image_size // downsampling)
        self.latent_schedule = latent_schedule(loss.log_snr_max, loss.log_snr_min)
        self.pixel_schedule = pixel_schedule(image_size)
        self.encoder = Encoder(model.encoder, channels, model.latent_channels)
        self.prior = UViT(model.prior, model.latent_channels)
        self.decoder = UViT(
            model.decoder, channels, z_channels=model.latent_channels, z_downsampling=downsampling
        )

    @property
    def noise_spec(self) -> NoiseSpec:
        return NoiseSpec(
            times=("prior", "decoder"),
            eps={"z_0": self.latent_shape, "prior": self.latent_shape, "decoder": self.image_shape},
        )

    @property
    def timed_losses(self) -> dict[str, tuple[str, Schedule]]:
        """Which loss is drawn at which times, and their schedule."""
        return {
            "prior": ("loss/prior", self.latent_schedule),
            "decoder": ("loss/decoder", self.pixel_schedule),
        }

    def forward_flops(self) -> dict[str, int]:
        """Return the forward FLOPs of one example by network."""
        x, z, log_snr = meta(self.image_shape), meta(self.latent_shape), meta(())
        return {
            "encoder": forward_flops(self.encoder, lambda net: net(x)),
            "prior": forward_flops(self.prior, lambda net: net(z, log_snr)),
            "decoder": forward_flops(self.decoder, lambda net: net(x, log_snr, z=z)),
        }

    def forward(
        self, batch: Mapping[str, Tensor], noise: Mapping[str, Tensor], step: int
    ) -> dict[str, Tensor]:
        x = batch["x"]
        z_clean = self.encoder(x)

        # Never detached: the prior's gradient reaches the encoder through z_t and through its target.
        diffusion, kl = self._prior_terms(z_clean, noise["t/prior"], noise["eps/prior"])
        z_0 = self.add_encoder_noise(z_clean, noise["eps/z_0"])
        t, eps = noise["t/decoder"], noise["eps/decoder"]
        log_snr = self.pixel_schedule.log_snr(t)
        v_hat = self.decoder(add_noise(x, eps, log_snr), log_snr, z=z_0)
        decoder = losses.decoder_loss(
            v_from_x_eps(x, eps, log_snr),
            v_hat,
            t,
            self.pixel_schedule,
            loss_factor=self.loss.loss_factor_at(step),
            loss_bias=self.loss.loss_bias,
        )

        prior = losses.bits_per_pixel(diffusion + kl, self.num_pixels)
        decoder = losses.bits_per_pixel(decoder, self.num_pixels)
        return {
            "loss": prior + decoder,
            "loss/prior": prior,
            "loss/decoder": decoder,
            "bits_per_pixel": prior.detach(),
            "bits_per_pixel/kl": losses.bits_per_pixel(kl.detach(), self.num_pixels),
            "z_clean_square": z_clean.detach().square().flatten(1).mean(1),
        }

    def _prior_terms(self, z_clean: Tensor, t: Tensor, eps: Tensor) -> tuple[Tensor, Tensor]:
        log_snr = self.latent_schedule.log_snr(t)
        v_hat = self.prior(add_noise(z_clean, eps, log_snr), log_snr)
        v = v_from_x_eps(z_clean, eps, log_snr)
        diffusion = losses.prior_elbo(v, v_hat, t, self.latent_schedule)
        return diffusion, losses.kl_at_t1(z_clean, self.loss.log_snr_min)

    def latent_nats(self, z_clean: Tensor, t: Tensor, eps: Tensor, label: Tensor | None = None) -> Tensor:
        """Return the prior's estimate of each latent's bitrate at times t, (b,) nats; it takes no label."""
        diffusion, kl = self._prior_terms(z_clean, t, eps)
        return diffusion + kl

    def add_encoder_noise(self, z_clean: Tensor, eps: Tensor) -> Tensor:
        """Return z_0 = α_0 z_clean + σ_0 ε, in the encoder's units: z_clean is never normalised first."""
        return add_noise(z_clean, eps, z_clean.new_full((len(z_clean),), self.loss.log_snr_max))

    def encode(self, x: Tensor) -> Tensor:
        """Return z_clean (b, latent_channels, h, w) of images (b, c, H, W)."""
        return self.encoder(x)

    def decode(self, z_0: Tensor, *, num_steps: int, generators: Sequence[torch.Generator]) -> Tensor:
        """Return images sampled from the diffusion decoder given the *noisy* z_0.

        Args:
            z_0: (b, latent_channels, h, w), at λ = 5.
            num_steps: ancestral steps.
            generators: one for each example, on z_0's device.
        """
        x_1 = torch.stack([torch.randn(self.image_shape, generator=g, device=z_0.device) for g in generators])
        return samplers.ancestral(
            lambda x_t, log_snr: self.decoder(x_t, log_snr, z=z_0),
            x_1,
            self.pixel_schedule,
            num_steps=num_steps,
            generators=generators,
        )
