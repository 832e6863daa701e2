"""Stage 2: a class-conditional base model on the latents of a frozen autoencoder (UL, section 4)."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from ul_scale.diffusion import losses, samplers
from ul_scale.diffusion.process import add_noise, precondition_v, v_from_x_eps
from ul_scale.diffusion.schedule import Schedule, latent_schedule
from ul_scale.models.flops import forward_flops, meta
from ul_scale.models.uvit import UViT, UViTConfig
from ul_scale.stages.noise import NoiseSpec


@dataclass(frozen=True, kw_only=True)
class BaseModel:
    """Section ``model`` of a base model; ``size`` fills in what is not given."""

    size: str | None = None
    num_classes: int | None = None
    """Classes of the labels; null for an unconditional model."""
    net: UViTConfig


@dataclass(frozen=True, kw_only=True)
class BaseLoss:
    """Section ``loss`` of a base model."""

    loss_bias: float = 0.0
    """b of sigmoid(b − λ), nats."""
    label_dropout: float = 0.1
    """Share of samples trained without their label."""
    log_snr_max: float = 5.0
    """λ(0), nats: must be the autoencoder's, whose decoder expects z_0 at that noise."""
    log_snr_min: float = -10.0
    """λ(1), nats."""

    def __post_init__(self) -> None:
        if not 0 <= self.label_dropout <= 1:
            raise ValueError(f"loss.label_dropout is {self.label_dropout}; expected a share from 0 to 1")


class BaseStage(nn.Module):
    """Map (batch, noise, step) to per-example losses in bits per pixel.

    Args:
        model: shape of the network.
        loss: weights of the objective.
        latent_shape: (c, h, w) of z_clean.
        num_pixels: pixels of the image that a latent stands for.
        z_std: measured std of z_clean. It scales the network's input and output, nothing else.
        encoder: of the autoencoder, to encode images on the fly; frozen here, and not part of what is saved.
    """

    z_std: Tensor
    net: UViT
    encoder: nn.Module | None

    def __init__(
        self,
        model: BaseModel,
        loss: BaseLoss,
        *,
        latent_shape: tuple[int, ...],
        num_pixels: int,
        z_std: float,
        encoder: nn.Module | None = None,
    ):
        super().__init__()
        if latent_shape[-1] % model.net.downsampling:
            raise ValueError(
                f"latents of {latent_shape[-1]} × {latent_shape[-1]} do not divide by the base model's "
                f"{model.net.downsampling}× (patch and levels of model.net)"
            )
        self.loss = loss
        self.latent_shape = latent_shape
        self.num_pixels = num_pixels
        self.num_classes = model.num_classes
        self.schedule = latent_schedule(loss.log_snr_max, loss.log_snr_min)
        self.encoder = encoder.requires_grad_(False) if encoder is not None else None
        self.net = UViT(model.net, latent_shape[0], num_classes=model.num_classes)
        self.register_buffer("z_std", torch.tensor(float(z_std)))

    @property
    def noise_spec(self) -> NoiseSpec:
        return NoiseSpec(times=("base",), eps={"base": self.latent_shape})

    @property
    def timed_losses(self) -> dict[str, tuple[str, Schedule]]:
        """Which loss is drawn at which times, and their schedule."""
        return {"base": ("loss", self.schedule)}

    def forward_flops(self) -> dict[str, int]:
        """Return the forward FLOPs of one example by network that is trained."""
        z, log_snr, label = meta(self.latent_shape), meta(()), meta((), dtype=torch.long)
        return {"base": forward_flops(self.net, lambda net: net(z, log_snr, label))}

    def denoise(self, z_t: Tensor, log_snr: Tensor, label: Tensor | None) -> Tensor:
        """Return v̂ of z_t in the encoder's units; ``label`` −1 means none."""
        c_in, c_skip, c_out = precondition_v(log_snr, self.z_std, z_t)
        if label is not None and self.num_classes is not None:
            label = torch.where(label < 0, self.num_classes, label)
        return c_skip * z_t + c_out * self.net(c_in * z_t, log_snr, label)

    def forward(
        self, batch: Mapping[str, Tensor], noise: Mapping[str, Tensor], step: int
    ) -> dict[str, Tensor]:
        z_clean = batch["z_clean"] if self.encoder is None else self._encode(batch["x"])
        label = torch.where(batch["uniform"] < self.loss.label_dropout, -1, batch["label"])
        v, v_hat = self._predict(z_clean, noise["t/base"], noise["eps/base"], label)
        loss = losses.base_loss(v, v_hat, noise["t/base"], self.schedule, loss_bias=self.loss.loss_bias)
        nats = self._elbo(z_clean, v, v_hat.detach(), noise["t/base"])
        return {
            "loss": losses.bits_per_pixel(loss, self.num_pixels),
            "bits_per_pixel": losses.bits_per_pixel(nats, self.num_pixels),
        }

    @torch.no_grad()
    def _encode(self, x: Tensor) -> Tensor:
        assert self.encoder is not None
        return self.encoder(x)

    def _predict(
        self, z_clean: Tensor, t: Tensor, eps: Tensor, label: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        log_snr = self.schedule.log_snr(t)
        v_hat = self.denoise(add_noise(z_clean, eps, log_snr), log_snr, label)
        return v_from_x_eps(z_clean, eps, log_snr), v_hat

    def _elbo(self, z_clean: Tensor, v: Tensor, v_hat: Tensor, t: Tensor) -> Tensor:
        return losses.prior_elbo(v, v_hat, t, self.schedule) + losses.kl_at_t1(z_clean, self.loss.log_snr_min)

    def latent_nats(self, z_clean: Tensor, t: Tensor, eps: Tensor, label: Tensor | None = None) -> Tensor:
        """Return the unweighted estimate of each latent's bitrate at times t, (b,) nats."""
        return self._elbo(z_clean, *self._predict(z_clean, t, eps, label), t)

    def sample(
        self, label: Tensor | None, *, num_steps: int, generators: Sequence[torch.Generator]
    ) -> Tensor:
        """Return z_0 (b, c, h, w): noisy, at λ = 5, as the decoder expects it.

        Args:
            label: (b,) classes, or None.
            num_steps: ancestral steps.
            generators: one for each sample, on the model's device.
        """
        device = self.z_std.device
        z_1 = torch.stack([torch.randn(self.latent_shape, generator=g, device=device) for g in generators])
        return samplers.ancestral(
            lambda z_t, log_snr: self.denoise(z_t, log_snr, label),
            z_1,
            self.schedule,
            num_steps=num_steps,
            generators=generators,
        )
