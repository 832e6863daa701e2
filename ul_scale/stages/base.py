"""Stage 2: a base model on the latents of a frozen autoencoder (UL, section 4)."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ul_scale.diffusion import losses, samplers
from ul_scale.diffusion.process import add_noise, precondition_v, v_from_x_eps
from ul_scale.diffusion.schedule import Schedule, check_nats, latent_schedule
from ul_scale.models.flops import Call, forward_flops, meta
from ul_scale.models.text import TextConfig
from ul_scale.models.uvit import UViT, UViTConfig
from ul_scale.stages.conditions import UNTOLD, Conditions, first_frames
from ul_scale.stages.noise import NoiseSpec, check_time_sampling, time_density


@dataclass(frozen=True, kw_only=True)
class BaseModel:
    """Section ``model`` of a base model; ``size`` fills in what is not given."""

    size: str | None = None
    num_classes: int | None = None
    """Classes of the labels; null for a model that takes none."""
    text: TextConfig | None = field(default=None, metadata={"legacy": None})
    """How texts are told to the model; null for a model that takes none."""
    given_frames: int | None = field(default=None, metadata={"legacy": None})
    """Of videos: the first so many frames are given, the model generates the others."""
    net: UViTConfig

    def __post_init__(self) -> None:
        for name in ("num_classes", "given_frames"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ValueError(f"model.{name} is {value}; expected at least 1, or none")


@dataclass(frozen=True, kw_only=True)
class BaseLoss:
    """Section ``loss`` of a base model."""

    loss_bias: float = 0.0
    """b of sigmoid(b − λ), nats."""
    label_dropout: float = 0.1
    """Share of samples trained without their label, text and given frames, for guidance."""
    log_snr_max: float = 5.0
    """λ(0), nats: must be the autoencoder's, whose decoder expects z_0 at that noise."""
    log_snr_min: float = -10.0
    """λ(1), nats."""
    log_snr_shift: float = field(default=0.0, metadata={"legacy": 0.0})
    """Of the cosine schedule, whose end points stay; 2 ln(64 / H) where z are pixels of H × H images."""
    time_sampling: str = field(default="uniform", metadata={"legacy": "uniform"})
    """uniform in t, or importance: more often where the loss of data of std 1 is large, with weights that
    undo it in expectation."""

    def __post_init__(self) -> None:
        check_time_sampling(self.time_sampling)
        check_nats("loss", self, "loss_bias", "log_snr_max", "log_snr_min", "log_snr_shift")
        # Refuses end points that it cannot hold.
        latent_schedule(self.log_snr_max, self.log_snr_min, self.log_snr_shift)
        if not 0 <= self.label_dropout <= 1:
            raise ValueError(f"loss.label_dropout is {self.label_dropout}; expected a share from 0 to 1")


@dataclass(frozen=True, kw_only=True)
class Sampling:
    """How z_0 is drawn from a base model."""

    sampler: str = "ancestral"
    """ancestral, ddim or dpmpp_2m."""
    num_steps: int = 32
    guidance: float = 1.0
    """Scale of classifier-free guidance; 1: none."""
    guidance_interval: tuple[float, float] = (-math.inf, math.inf)
    """log-SNR from and to which there is guidance, nats (arXiv 2404.07724)."""
    gamma: float = 0.0
    """Of ancestral: interpolates the posterior's log-variance."""


class BaseStage(nn.Module):
    """Map (batch, noise, step) to per-example losses in bits per pixel.

    Given frames enter as the paper does not say: their latent, encoded alone and divided by the std of
    latents, stands in further channels beside the first latent frames of z_t, 0 elsewhere, with one channel
    that is 1 where it stands. The model learns the whole latent, those frames included.

    Args:
        model: shape of the network.
        loss: weights of the objective.
        latent_shape: (c, h, w) or (c, t, h, w) of z_clean.
        num_pixels: pixels of the image, or of all frames, that a latent stands for.
        z_std: measured std of z_clean. It scales the network's input and output, nothing else.
        encoder: maps a batch to its z_clean and z_given on the fly; frozen, and not part of what is saved.
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
        if any(size % model.net.downsampling for size in latent_shape[-2:]):
            raise ValueError(
                f"latents of {latent_shape[-2]} × {latent_shape[-1]} do not divide by the base model's "
                f"{model.net.downsampling}× (patch and levels of model.net)"
            )
        video = len(latent_shape) == 4
        if video and latent_shape[1] % model.net.time_downsampling:
            raise ValueError(
                f"latents of {latent_shape[1]} frames do not divide by the base model's "
                f"{model.net.time_downsampling}× (time_strides of model.net)"
            )
        if model.given_frames is not None and not video:
            raise ValueError(f"model.given_frames is {model.given_frames}, but the latents are of images")
        self.loss = loss
        self.latent_shape = latent_shape
        self.num_pixels = num_pixels
        self.num_classes = model.num_classes
        self.text, self.given_frames = model.text, model.given_frames
        self.schedule = latent_schedule(loss.log_snr_max, loss.log_snr_min, loss.log_snr_shift)
        self.encoder = encoder.requires_grad_(False) if encoder is not None else None
        self.net = UViT(
            model.net,
            latent_shape[0],
            video=video,
            num_classes=model.num_classes,
            text_width=model.text.width if model.text is not None else None,
            extra_channels=latent_shape[0] + 1 if video and model.given_frames else 0,
        )
        self.register_buffer("z_std", torch.tensor(float(z_std)))

    @property
    def noise_spec(self) -> NoiseSpec:
        density = time_density(self.loss.time_sampling, self.schedule, self.loss.loss_bias)
        return NoiseSpec(times={"base": density}, eps={"base": self.latent_shape})

    @property
    def timed_losses(self) -> dict[str, tuple[str, Schedule]]:
        """Which loss is drawn at which times, and their schedule."""
        return {"base": ("loss", self.schedule)}

    def calls(self) -> dict[str, tuple[nn.Module, Call]]:
        """Return the trained network, with a call of it for one example on the meta device."""
        z, log_snr = meta(self.latent_shape), meta(())
        inputs = self._inputs(z, self.blank_conditions(z))
        return {"base": (self.net, lambda net: net(z, log_snr, **inputs))}

    def forward_flops(self) -> dict[str, int]:
        """Return the forward FLOPs of one example by network that is trained."""
        return {name: forward_flops(*call) for name, call in self.calls().items()}

    def blank_conditions(self, like: Tensor) -> Conditions:
        """Return conditions of which none is told, for as many samples and on the same device as ``like``."""
        size, device = len(like), like.device
        label = text = mask = z_given = is_given = None
        if self.num_classes is not None:
            label = torch.full((size,), -1, device=device)
        if self.text is not None:
            text = torch.zeros(size, self.text.max_tokens, self.text.width, device=device)
            mask = torch.zeros(size, self.text.max_tokens, dtype=torch.bool, device=device)
        if self.given_frames is not None:
            z_given = like[:, :, :1] * 0
            is_given = torch.zeros(size, dtype=torch.bool, device=device)
        return Conditions(label, text, mask, z_given, is_given)

    def denoise(self, z_t: Tensor, log_snr: Tensor, conditions: Conditions) -> Tensor:
        """Return v̂ of z_t in the encoder's units."""
        c_in, c_skip, c_out = precondition_v(log_snr, self.z_std, z_t)
        return c_skip * z_t + c_out * self.net(c_in * z_t, log_snr, **self._inputs(z_t, conditions))

    def _inputs(self, z_t: Tensor, given: Conditions) -> dict[str, Tensor]:
        """Return the network's further arguments."""
        inputs = {}
        if self.num_classes is not None:
            assert given.label is not None
            inputs["label"] = torch.where(given.label < 0, self.num_classes, given.label)
        if self.text is not None:
            assert given.text is not None and given.text_mask is not None
            inputs |= {"text": given.text, "text_mask": given.text_mask}
        if self.given_frames is not None:
            assert given.z_given is not None and given.is_given is not None
            stands = given.is_given.view(-1, 1, 1, 1, 1).to(z_t.dtype)
            known = torch.cat([given.z_given / self.z_std, torch.ones_like(given.z_given[:, :1])], dim=1)
            later = z_t.shape[2] - known.shape[2]
            inputs["extra"] = F.pad(stands * known, (0, 0, 0, 0, 0, later))
        return inputs

    def forward(
        self, batch: Mapping[str, Tensor], noise: Mapping[str, Tensor], step: int
    ) -> dict[str, Tensor]:
        if self.encoder is not None:
            batch = self.encode(batch, self.encoder)
        z_clean, t = batch["z_clean"], noise["t/base"]
        conditions = Conditions.of(batch).without(batch["uniform"] < self.loss.label_dropout)
        v, v_hat = self._predict(z_clean, t, noise["eps/base"], conditions)
        loss = losses.base_loss(v, v_hat, t, self.schedule, loss_bias=self.loss.loss_bias)
        diffusion = losses.prior_elbo(v, v_hat.detach(), t, self.schedule)
        if (weight := noise.get("t_weight/base")) is not None:
            loss, diffusion = weight * loss, weight * diffusion
        nats = diffusion + losses.kl_to_normal(z_clean, self.loss.log_snr_min)
        return {
            "loss": losses.bits_per_pixel(loss, self.num_pixels),
            "bits_per_pixel": losses.bits_per_pixel(nats, self.num_pixels),
        }

    @torch.no_grad()
    def encode(self, batch: Mapping[str, Any], encoder: nn.Module) -> dict[str, Any]:
        """Return a batch of images or videos with z_clean, and with z_given where the model takes it."""
        x, channels = batch["x"], self.latent_shape[0]  # further ones are a learned variance
        encoded = {**batch, "z_clean": encoder(x)[:, :channels]}
        if self.given_frames is not None:
            stride = x.shape[2] // self.latent_shape[1]
            encoded["z_given"] = encoder(first_frames(x, self.given_frames, stride))[:, :channels]
        return encoded

    def _predict(
        self, z_clean: Tensor, t: Tensor, eps: Tensor, conditions: Conditions
    ) -> tuple[Tensor, Tensor]:
        log_snr = self.schedule.log_snr(t)
        v_hat = self.denoise(add_noise(z_clean, eps, log_snr), log_snr, conditions)
        return v_from_x_eps(z_clean, eps, log_snr), v_hat

    def latent_nats(self, z_clean: Tensor, t: Tensor, eps: Tensor, conditions: Conditions = UNTOLD) -> Tensor:
        """Return the unweighted estimate of each latent's bitrate at times t, (b,) nats."""
        v, v_hat = self._predict(z_clean, t, eps, conditions)
        kl = losses.kl_to_normal(z_clean, self.loss.log_snr_min)
        return losses.prior_elbo(v, v_hat, t, self.schedule) + kl

    def sample(
        self, conditions: Conditions, sampling: Sampling, generators: Sequence[torch.Generator]
    ) -> Tensor:
        """Return z_0 (b, c, h, w) or (b, c, t, h, w): noisy, at λ = 5, as the decoder expects it.

        Args:
            conditions: of each sample.
            sampling: how.
            generators: one for each sample, on the model's device.
        """
        device = self.z_std.device
        z_1 = torch.stack([torch.randn(self.latent_shape, generator=g, device=device) for g in generators])
        nothing = conditions.none()
        denoise = samplers.guided(
            lambda z_t, log_snr: self.denoise(z_t, log_snr, conditions),
            lambda z_t, log_snr: self.denoise(z_t, log_snr, nothing),
            scale=sampling.guidance,
            interval=sampling.guidance_interval,
        )
        return samplers.sample(
            sampling.sampler,
            denoise,
            z_1,
            self.schedule,
            num_steps=sampling.num_steps,
            generators=generators,
            gamma=sampling.gamma,
        )
