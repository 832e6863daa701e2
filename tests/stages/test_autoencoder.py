import math

import pytest
import torch

from ul_scale.models.encoder import EncoderConfig
from ul_scale.models.uvit import LevelConfig, UViTConfig
from ul_scale.stages.autoencoder import AutoencoderLoss, AutoencoderModel, AutoencoderStage
from ul_scale.stages.noise import draw_noise

VIT, CONV = (
    LevelConfig(kind="transformer", channels=16, blocks=1),
    LevelConfig(kind="conv", channels=8, blocks=2),
)


def make_stage(**loss):
    torch.manual_seed(0)
    model = AutoencoderModel(
        latent_channels=2,
        encoder=EncoderConfig(patch=2, channels=[8, 8], blocks=[1, 1]),
        prior=UViTConfig(patch=1, levels=[VIT], head_dim=8),
        decoder=UViTConfig(patch=2, levels=[CONV, VIT], head_dim=8),
    )
    loss = {"loss_factor": 1.5, "loss_bias": 3.0} | loss
    stage = AutoencoderStage(model, AutoencoderLoss(**loss), image_size=16, channels=1)
    for net in (stage.prior, stage.decoder):  # zero-initialised heads pass no gradient on
        torch.nn.init.normal_(net.head.weight, std=0.1)
    return stage


def batch_and_noise(stage, b=4):
    x = torch.randn(b, 1, 16, 16, generator=torch.Generator().manual_seed(1)).clamp(-1, 1)
    noise = draw_noise(stage.noise_spec, seed=0, step=0, lanes=[0], lane_size=b, batch_size=b)
    return {"x": x}, noise


def encoder_gradient(stage, term):
    batch, noise = batch_and_noise(stage)
    stage.zero_grad()
    stage(batch, noise, 0)[term].sum().backward()
    return torch.cat(
        [p.grad.flatten() for p in stage.encoder.parameters() if p.grad is not None] or [torch.zeros(1)]
    )


def test_losses_are_per_example_and_add_up():
    stage = make_stage()
    out = stage(*batch_and_noise(stage), 0)
    assert {value.shape for value in out.values()} == {(4,)}
    torch.testing.assert_close(out["loss"], out["loss/prior"] + out["loss/decoder"])
    torch.testing.assert_close(out["bits_per_pixel"], out["loss/prior"])


def test_prior_gradient_reaches_the_encoder_through_z_t_and_through_its_target():
    """Against the gradient by hand, ∂L_z/∂z_clean in both of its paths, with neither detached."""
    stage = make_stage().double()
    batch, noise = batch_and_noise(stage)
    batch, noise = {"x": batch["x"].double()}, {name: value.double() for name, value in noise.items()}
    t, eps = noise["t/prior"], noise["eps/prior"]
    log_snr, slope = stage.latent_schedule.log_snr(t), stage.latent_schedule.log_snr_slope(t)
    alpha, sigma = log_snr.sigmoid().sqrt().view(-1, 1, 1, 1), (-log_snr).sigmoid().sqrt().view(-1, 1, 1, 1)
    z = stage.encode(batch["x"]).detach()

    def loss(z_in_input, z_as_target):
        z_t = alpha * z_in_input + sigma * eps
        z_hat = alpha * z_t - sigma * stage.prior(z_t, log_snr)
        error = (z_as_target - z_hat).square().flatten(1).sum(1)
        kl = 0.5 * (stage_alpha1_2 * z_as_target.square()).flatten(1).sum(1)
        return ((-0.5 * slope * log_snr.exp() * error + kl) / (256 * math.log(2))).sum()

    stage_alpha1_2 = 1 / (1 + math.exp(10.0))
    paths = []
    for detach_input, detach_target in ((False, True), (True, False), (False, False)):
        z_in, z_target = z.clone().requires_grad_(), z.clone().requires_grad_()
        value = loss(
            z_in.detach() if detach_input else z_in, z_target.detach() if detach_target else z_target
        )
        gradients = torch.autograd.grad(value, [z_in, z_target], allow_unused=True)
        paths.append(sum(g for g in gradients if g is not None))
    through_input, through_target, both = paths
    assert through_input.norm() > 1e-3 and through_target.norm() > 1e-3

    z_clean = []
    handle = stage.encoder.register_forward_hook(
        lambda module, args, out: z_clean.append(out) or out.retain_grad()
    )
    stage(batch, noise, 0)["loss/prior"].sum().backward()
    handle.remove()
    torch.testing.assert_close(z_clean[0].grad, both, rtol=1e-8, atol=1e-10)


def test_decoder_gradient_reaches_the_encoder_through_z_0():
    assert encoder_gradient(make_stage(), "loss/decoder").norm() > 0


def test_warm_start_moves_the_loss_factor_and_nothing_else():
    stage = make_stage(loss_factor=2.0, loss_factor_start=8.0, loss_factor_warmup_steps=100)
    factors = [stage.loss.loss_factor_at(step) for step in (0, 50, 100, 5000)]
    assert factors == pytest.approx([8.0, 4.0, 2.0, 2.0])
    batch, noise = batch_and_noise(stage)
    early, late = stage(batch, noise, 50), stage(batch, noise, 100)
    torch.testing.assert_close(early["loss/decoder"], 2 * late["loss/decoder"])
    torch.testing.assert_close(early["loss/prior"], late["loss/prior"])


def test_half_a_warm_start_is_refused():
    with pytest.raises(ValueError, match="expected both or neither"):
        AutoencoderLoss(loss_factor=2.0, loss_bias=3.0, loss_factor_start=8.0)


def test_encoder_noise_is_added_in_encoder_units():
    stage = make_stage()
    z, eps = torch.full((1, 2, 4, 4), 0.1), torch.ones(1, 2, 4, 4)
    torch.testing.assert_close(
        stage.add_encoder_noise(z, eps), 0.996648 * z + 0.081810 * eps, rtol=1e-5, atol=1e-6
    )


def test_decode_gives_the_same_image_for_any_batch():
    stage = make_stage().eval()
    z_0 = torch.randn(3, 2, 4, 4, generator=torch.Generator().manual_seed(2))

    def generators(seeds):
        return [torch.Generator().manual_seed(seed) for seed in seeds]

    with torch.no_grad():
        whole = stage.decode(z_0, num_steps=2, generators=generators([0, 1, 2]))
        one = stage.decode(z_0[1:2], num_steps=2, generators=generators([1]))
    assert whole.shape == (3, 1, 16, 16)
    torch.testing.assert_close(one, whole[1:2], rtol=1e-4, atol=1e-5)


def test_image_size_that_does_not_divide_is_named():
    model = make_stage()
    with pytest.raises(ValueError, match=r"data.image_size is 18; model.encoder needs a multiple of 4"):
        AutoencoderStage(
            AutoencoderModel(
                latent_channels=2,
                encoder=EncoderConfig(patch=2, channels=[8, 8], blocks=[1, 1]),
                prior=model.prior.config,
                decoder=model.decoder.config,
            ),
            model.loss,
            image_size=18,
            channels=1,
        )
