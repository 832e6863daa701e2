"""Stage 1: encoder, diffusion prior and diffusion decoder, trained together (Unified Latents, section 3)."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from ul_scale.diffusion import losses, samplers
from ul_scale.diffusion.process import add_noise, v_from_x_eps
from ul_scale.diffusion.schedule import (
    Schedule,
    TimeDensity,
    check_nats,
    latent_schedule,
    pixel_schedule,
)
from ul_scale.models.encoder import Encoder, EncoderConfig
from ul_scale.models.flops import Call, forward_flops, meta
from ul_scale.models.uvit import UViT, UViTConfig
from ul_scale.stages.bitrate_control import BitrateControl
from ul_scale.stages.noise import NoiseSpec, check_time_sampling, time_density

KINDS = {"prior_kind": ("diffusion", "normal"), "decoder_kind": ("diffusion", "mse")}


@dataclass(frozen=True, kw_only=True)
class AutoencoderModel:
    """Section ``model`` of an autoencoder; ``size`` fills in what is not given."""

    size: str | None = None
    latent_channels: int
    encoder: EncoderConfig
    prior: UViTConfig
    decoder: UViTConfig
    prior_kind: str = field(default="diffusion", metadata={"legacy": "diffusion"})
    """diffusion; or normal: the bitrate is the KL of z_0 to N(0, I), and there is no prior network."""
    decoder_kind: str = field(default="diffusion", metadata={"legacy": "diffusion"})
    """diffusion; or mse: the same network without a noisy image, under a Gaussian of variance e^−b."""
    learned_variance: bool = field(default=False, metadata={"legacy": False})
    """z_clean is drawn from a Gaussian whose variance the encoder gives too (UL, ablation D; unstable)."""

    def __post_init__(self) -> None:
        if self.latent_channels < 1:
            raise ValueError(f"model.latent_channels is {self.latent_channels}; expected 1 or more")
        for name in ("prior_kind", "decoder_kind"):
            choices = KINDS[name]
            if getattr(self, name) not in choices:
                raise ValueError(
                    f"model.{name} is {getattr(self, name)!r}; expected one of {', '.join(choices)}"
                )


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
    target_start: float = field(default=0.1, metadata={"legacy": 0.1})
    """Share of ``train.steps`` from which c_lf is adapted; until then it is as set, with its warm start,
    better too high than too low: bits are lost fast and regained slowly."""
    target_end: float = field(default=0.95, metadata={"legacy": 0.95})
    """Share of ``train.steps`` after which c_lf stays where it settled."""

    kl_factor: float = field(default=1.0, metadata={"legacy": 1.0})
    """Weight of the KL of z_0 to N(0, I): of the normal prior, or in place of the prior's gradient."""
    prior_gradient: bool = field(default=True, metadata={"legacy": True})
    """Whether the diffusion prior shapes the latent; false: it only measures the bitrate, and the KL to
    N(0, I) times ``kl_factor``, such as 1e-3, takes its place (UL, ablation A)."""
    time_sampling: str = field(default="uniform", metadata={"legacy": "uniform"})
    """uniform in t, or importance: more often where the loss of data of std 1 is large, with weights that
    undo it in expectation."""

    def __post_init__(self) -> None:
        check_time_sampling(self.time_sampling)
        check_nats("loss", self, "loss_bias", "log_snr_max", "log_snr_min")
        latent_schedule(self.log_snr_max, self.log_snr_min)  # refuses end points that it cannot hold
        if not 0 <= self.kl_factor < math.inf:
            raise ValueError(f"loss.kl_factor is {self.kl_factor}; expected a number from 0")
        if self.target_bits_per_pixel is not None and not 0 < self.target_bits_per_pixel < math.inf:
            raise ValueError(
                f"loss.target_bits_per_pixel is {self.target_bits_per_pixel}; expected a number above 0"
            )
        if not 0 <= self.target_start < self.target_end <= 1:
            raise ValueError(
                f"loss.target_start is {self.target_start} and loss.target_end {self.target_end}; "
                "expected shares of the run, the first below the second"
            )
        for name in ("loss_factor", "loss_factor_start"):
            value = getattr(self, name)
            if value is not None and not 0 < value < math.inf:
                raise ValueError(f"loss.{name} is {value}; expected a number above 0")
        if self.loss_factor_warmup_steps < 0:
            raise ValueError(
                f"loss.loss_factor_warmup_steps is {self.loss_factor_warmup_steps}; expected 0 or more"
            )
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
        frames: T of videos; None for images.
    """

    def __init__(
        self,
        model: AutoencoderModel,
        loss: AutoencoderLoss,
        *,
        image_size: int,
        channels: int,
        frames: int | None = None,
    ):
        super().__init__()
        grid = (image_size, image_size) if frames is None else (frames, image_size, image_size)
        self.model, self.loss = model, loss
        self.num_pixels = math.prod(grid)
        self.image_shape = (channels, *grid)
        self.latent_shape = (model.latent_channels, *_latent_grid(model, grid))
        self.latent_schedule = latent_schedule(loss.log_snr_max, loss.log_snr_min)
        self.pixel_schedule = pixel_schedule(image_size)
        video, encoder = frames is not None, model.encoder
        self.encoder = Encoder(
            encoder, channels, model.latent_channels * (2 if model.learned_variance else 1), video=video
        )
        self.prior = None
        if model.prior_kind == "diffusion":
            self.prior = UViT(model.prior, model.latent_channels, video=video)
        self.decoder = UViT(
            model.decoder,
            channels,
            video=video,
            z_channels=model.latent_channels,
            z_downsampling=encoder.downsampling,
            z_time_downsampling=encoder.time_downsampling,
        )
        self.bitrate_control = None
        if loss.target_bits_per_pixel is not None:
            self.bitrate_control = BitrateControl(
                loss.target_bits_per_pixel,
                loss.loss_factor_at(0),
                start=loss.target_start,
                end=loss.target_end,
            )

    @property
    def noise_spec(self) -> NoiseSpec:
        loss, eps = self.loss, {"z_0": self.latent_shape}
        times: dict[str, TimeDensity | None] = {}
        if self.prior is not None:
            times["prior"] = time_density(loss.time_sampling, self.latent_schedule, None)
            eps["prior"] = self.latent_shape
        if self.model.decoder_kind == "diffusion":
            times["decoder"] = time_density(loss.time_sampling, self.pixel_schedule, loss.loss_bias)
            eps["decoder"] = self.image_shape
        if self.model.learned_variance:
            eps["z_clean"] = self.latent_shape
        return NoiseSpec(times=times, eps=eps)

    @property
    def timed_losses(self) -> dict[str, tuple[str, Schedule]]:
        """Which loss is drawn at which times, and their schedule."""
        schedules = {"prior": self.latent_schedule, "decoder": self.pixel_schedule}
        return {name: (f"loss/{name}", schedules[name]) for name in self.noise_spec.times}

    def calls(self) -> dict[str, tuple[nn.Module, Call]]:
        """Return each trained network, with a call of it for one example on the meta device."""
        x, z, log_snr = meta(self.image_shape), meta(self.latent_shape), meta(())
        calls: dict[str, tuple[nn.Module, Call]] = {"encoder": (self.encoder, lambda net: net(x))}
        if self.prior is not None:
            calls["prior"] = (self.prior, lambda net: net(z, log_snr))
        return calls | {"decoder": (self.decoder, lambda net: net(x, log_snr, z=z))}

    def forward_flops(self) -> dict[str, int]:
        """Return the forward FLOPs of one example by network."""
        return {name: forward_flops(*call) for name, call in self.calls().items()}

    def forward(
        self, batch: Mapping[str, Tensor], noise: Mapping[str, Tensor], step: int
    ) -> dict[str, Tensor]:
        x = batch["x"]
        z_clean, gain = self._encode(x, noise)
        # Never detached: the prior's gradient reaches the encoder through z_t and through its target.
        prior, rate, kl = self._rate(z_clean, noise)
        z_0 = self.add_encoder_noise(z_clean, noise["eps/z_0"])
        control = self.bitrate_control
        loss_factor = self.loss.loss_factor_at(step) if control is None else control.loss_factor
        decoder = self._distortion(x, z_0, noise, loss_factor)

        # The gain belongs to the rate that shapes the encoder, and has its weight.
        shaped_by_kl = self.prior is None or not self.loss.prior_gradient
        gain_weight = self.loss.kl_factor if shaped_by_kl else 1.0
        prior = losses.bits_per_pixel(prior - gain_weight * gain, self.num_pixels)
        decoder = losses.bits_per_pixel(decoder, self.num_pixels)
        return {
            "loss": prior + decoder,
            "loss/prior": prior,
            "loss/decoder": decoder,
            "bits_per_pixel": losses.bits_per_pixel((rate - gain).detach(), self.num_pixels),
            "bits_per_pixel/kl": losses.bits_per_pixel(kl.detach(), self.num_pixels),
            "z_clean_square": z_clean.detach().square().flatten(1).mean(1),
            "loss_factor": torch.ones_like(prior.detach()) * loss_factor,
        }

    def _encode(self, x: Tensor, noise: Mapping[str, Tensor]) -> tuple[Tensor, Tensor | float]:
        """Return z_clean and what its learned variance saves the prior, (b,) nats."""
        if not self.model.learned_variance:
            return self.encoder(x), 0.0
        mean, log_variance = self.encoder(x).chunk(2, dim=1)
        z_clean = mean + torch.exp(0.5 * log_variance) * noise["eps/z_clean"]
        return z_clean, losses.variance_gain(log_variance, self.loss.log_snr_max)

    def draw(self, x: Tensor, eps: Tensor | None) -> tuple[Tensor, Tensor | float]:
        """Return z_clean as the prior is trained on it, and what its variance saves, (b,) nats."""
        return self._encode(x, {} if eps is None else {"eps/z_clean": eps})

    def _rate(self, z_clean: Tensor, noise: Mapping[str, Tensor]) -> tuple[Tensor, Tensor, Tensor]:
        """Return the prior's loss, the bitrate, and the part of it that is a KL to N(0, I); (b,) nats."""
        if self.prior is None:
            kl = losses.kl_to_normal(z_clean, self.loss.log_snr_max)
            return self.loss.kl_factor * kl, kl, kl
        seen = z_clean if self.loss.prior_gradient else z_clean.detach()
        diffusion, kl = self._prior_terms(seen, noise["t/prior"], noise["eps/prior"])
        if (weight := noise.get("t_weight/prior")) is not None:
            diffusion = weight * diffusion
        rate = diffusion + kl
        if self.loss.prior_gradient:
            return rate, rate, kl
        return rate + self.loss.kl_factor * losses.kl_to_normal(z_clean, self.loss.log_snr_max), rate, kl

    def _prior_terms(self, z_clean: Tensor, t: Tensor, eps: Tensor) -> tuple[Tensor, Tensor]:
        assert self.prior is not None
        log_snr = self.latent_schedule.log_snr(t)
        v_hat = self.prior(add_noise(z_clean, eps, log_snr), log_snr)
        v = v_from_x_eps(z_clean, eps, log_snr)
        diffusion = losses.prior_elbo(v, v_hat, t, self.latent_schedule)
        return diffusion, losses.kl_to_normal(z_clean, self.loss.log_snr_min)

    def _distortion(
        self, x: Tensor, z_0: Tensor, noise: Mapping[str, Tensor], loss_factor: float | Tensor
    ) -> Tensor:
        """Return the decoder's loss, (b,) nats."""
        if self.model.decoder_kind == "mse":
            return losses.mse_loss(
                x, self._decode_once(z_0), loss_factor=loss_factor, loss_bias=self.loss.loss_bias
            )
        t, eps = noise["t/decoder"], noise["eps/decoder"]
        log_snr = self.pixel_schedule.log_snr(t)
        v_hat = self.decoder(add_noise(x, eps, log_snr), log_snr, z=z_0)
        loss = losses.decoder_loss(
            v_from_x_eps(x, eps, log_snr),
            v_hat,
            t,
            self.pixel_schedule,
            loss_factor=loss_factor,
            loss_bias=self.loss.loss_bias,
        )
        weight = noise.get("t_weight/decoder")
        return loss if weight is None else weight * loss

    def _decode_once(self, z_0: Tensor) -> Tensor:
        """Return x̂ of a decoder that is trained by squared error; zeros take the noisy image's place."""
        blank = z_0.new_zeros(len(z_0), *self.image_shape)
        return self.decoder(blank, blank.new_full((len(z_0),), self.pixel_schedule.log_snr_min), z=z_0)

    def latent_nats(self, z_clean: Tensor, t: Tensor, eps: Tensor) -> Tensor:
        """Return the estimate of each latent's bitrate at times t, (b,) nats."""
        if self.prior is None:
            return losses.kl_to_normal(z_clean, self.loss.log_snr_max)
        diffusion, kl = self._prior_terms(z_clean, t, eps)
        return diffusion + kl

    def loss_factor_after(self, steps: int) -> float:
        """Return c_lf after so many completed steps: as scheduled, or as its control has set it."""
        if self.bitrate_control is None:
            return self.loss.loss_factor_at(steps)
        return self.bitrate_control.loss_factor.item()

    def add_encoder_noise(self, z_clean: Tensor, eps: Tensor) -> Tensor:
        """Return z_0 = α_0 z_clean + σ_0 ε, in the encoder's units: z_clean is never normalised first."""
        return add_noise(z_clean, eps, z_clean.new_full((len(z_clean),), self.loss.log_snr_max))

    def encode(self, x: Tensor) -> Tensor:
        """Return z_clean (b, latent_channels, h, w) of images (b, c, H, W); likewise of videos.

        With a learned variance, its mean.
        """
        return self.encoder(x)[:, : self.model.latent_channels]

    def decode(
        self,
        z_0: Tensor,
        *,
        num_steps: int,
        generators: Sequence[torch.Generator],
        sampler: str = "ancestral",
    ) -> Tensor:
        """Return images or videos sampled from the diffusion decoder given the *noisy* z_0.

        Args:
            z_0: (b, latent_channels, h, w) or (b, latent_channels, t, h, w), at λ = 5.
            num_steps: of the sampler; a decoder that is trained by squared error takes one.
            generators: one for each example, on z_0's device.
            sampler: one of ``samplers.SAMPLERS``.
        """
        if self.model.decoder_kind == "mse":
            return self._decode_once(z_0)
        x_1 = torch.stack([torch.randn(self.image_shape, generator=g, device=z_0.device) for g in generators])
        return samplers.sample(
            sampler,
            lambda x_t, log_snr: self.decoder(x_t, log_snr, z=z_0),
            x_1,
            self.pixel_schedule,
            num_steps=num_steps,
            generators=generators,
        )


def _latent_grid(model: AutoencoderModel, grid: tuple[int, ...]) -> tuple[int, ...]:
    """Return (h, w) or (t, h, w) of the latents of images or videos of a size.

    Raises:
        ValueError: if a network cannot downsample them so often.
    """
    space, time = model.encoder.downsampling, model.encoder.time_downsampling
    for name, factor, time_factor in (
        ("encoder", space, time),
        ("prior", space * model.prior.downsampling, time * model.prior.time_downsampling),
        ("decoder", model.decoder.downsampling, model.decoder.time_downsampling),
    ):
        if grid[-1] % factor:
            raise ValueError(f"data.image_size is {grid[-1]}; model.{name} needs a multiple of {factor}")
        if len(grid) == 3 and grid[0] % time_factor:
            raise ValueError(f"data.frames is {grid[0]}; model.{name} needs a multiple of {time_factor}")
        if len(grid) == 2 and time_factor > 1:
            raise ValueError(f"model.{name} halves time, but data.frames is not set: these are images")
    return (*(grid[0] // time for _ in grid[2:]), grid[-1] // space, grid[-1] // space)
