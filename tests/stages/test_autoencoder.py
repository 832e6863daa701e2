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


def make_stage(model=(), **loss):
    torch.manual_seed(0)
    model = AutoencoderModel(
        latent_channels=2,
        encoder=EncoderConfig(patch=2, channels=[8, 8], blocks=[1, 1]),
        prior=UViTConfig(patch=1, levels=[VIT], head_dim=8),
        decoder=UViTConfig(patch=2, levels=[CONV, VIT], head_dim=8),
        **dict(model),
    )
    loss = {"loss_factor": 1.5, "loss_bias": 3.0} | loss
    stage = AutoencoderStage(model, AutoencoderLoss(**loss), image_size=16, channels=1)
    for net in (stage.prior, stage.decoder):  # zero-initialised heads pass no gradient on
        if net is not None:
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


@pytest.mark.parametrize(
    "warm_start,message",
    [
        ({"loss_factor_start": 8.0}, "expected both or neither"),
        ({"loss_factor_start": 8.0, "loss_factor_warmup_steps": -3}, "steps is -3; expected 0 or more"),
    ],
)
def test_half_a_warm_start_is_refused(warm_start, message):
    with pytest.raises(ValueError, match=message):
        AutoencoderLoss(loss_factor=2.0, loss_bias=3.0, **warm_start)


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


def parameters_with_gradient(stage, term):
    batch, noise = batch_and_noise(stage)
    stage.zero_grad()
    stage(batch, noise, 0)[term].sum().backward()
    return {name.split(".")[0] for name, p in stage.named_parameters() if p.grad is not None and p.grad.any()}


def test_normal_prior_is_the_kl_of_z_0_and_has_no_network():
    stage = make_stage({"prior_kind": "normal"}, kl_factor=0.5)
    batch, noise = batch_and_noise(stage)
    out = stage(batch, noise, 0)
    alpha2 = torch.sigmoid(torch.tensor(5.0))
    q = torch.distributions.Normal(alpha2.sqrt() * stage.encode(batch["x"]), (1 - alpha2).sqrt())
    kl = torch.distributions.kl_divergence(q, torch.distributions.Normal(0.0, 1.0)).flatten(1).sum(1)
    bits = kl / (256 * math.log(2))
    torch.testing.assert_close(out["bits_per_pixel"], bits, rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(out["loss/prior"], 0.5 * bits, rtol=1e-4, atol=1e-6)
    assert stage.prior is None and "prior" not in stage.forward_flops()
    assert parameters_with_gradient(stage, "loss/prior") == {"encoder"}
    z = stage.encode(batch["x"])
    torch.testing.assert_close(stage.latent_nats(z, noise["t/decoder"], z), kl, rtol=1e-4, atol=1e-4)


def test_without_the_priors_gradient_it_only_measures():
    stage = make_stage(prior_gradient=False, kl_factor=0.0)
    assert parameters_with_gradient(stage, "loss/prior") == {"prior"}
    as_usual, out = (s(*batch_and_noise(s), 0) for s in (make_stage(), stage))
    torch.testing.assert_close(out["bits_per_pixel"], as_usual["bits_per_pixel"])
    held = make_stage(prior_gradient=False, kl_factor=1e-3)
    assert parameters_with_gradient(held, "loss/prior") == {"prior", "encoder"}
    assert (held(*batch_and_noise(held), 0)["loss/prior"] > out["loss/prior"]).all()


def test_mse_decoder_is_a_gaussian_likelihood_of_variance_e_to_minus_b():
    stage = make_stage({"decoder_kind": "mse"}, loss_factor=1.7, loss_bias=2.0)
    batch, noise = batch_and_noise(stage)
    assert "t/decoder" not in noise and "eps/decoder" not in noise
    z_0 = stage.add_encoder_noise(stage.encode(batch["x"]), noise["eps/z_0"])
    x_hat = stage.decode(z_0, num_steps=9, generators=[])
    q = torch.distributions.Normal(x_hat, math.exp(-1.0))
    nats = (q.log_prob(x_hat) - q.log_prob(batch["x"])).flatten(1).sum(1)
    expected = 1.7 * nats / (256 * math.log(2))
    torch.testing.assert_close(stage(batch, noise, 0)["loss/decoder"], expected)
    assert encoder_gradient(stage, "loss/decoder").norm() > 0


def test_learned_variance_saves_the_prior_what_the_paper_says():
    stage = make_stage({"learned_variance": True})
    batch, noise = batch_and_noise(stage)
    mean, log_variance = stage.encoder(batch["x"]).chunk(2, dim=1)
    torch.testing.assert_close(stage.encode(batch["x"]), mean)
    z_clean = mean + (0.5 * log_variance).exp() * noise["eps/z_clean"]
    nats = stage.latent_nats(z_clean, noise["t/prior"], noise["eps/prior"])
    nats = nats - 0.5 * torch.log(log_variance.exp() * math.exp(5.0) + 1).flatten(1).sum(1)
    torch.testing.assert_close(
        stage(batch, noise, 0)["loss/prior"], nats / (256 * math.log(2)), rtol=1e-4, atol=1e-5
    )


def test_a_kls_factor_weighs_all_of_it():
    """Of what a learned variance saves, too."""
    once, tenth = (
        make_stage({"learned_variance": True, "prior_kind": "normal"}, kl_factor=factor)
        for factor in (1.0, 0.1)
    )
    batch, noise = batch_and_noise(once)
    whole, part = once(batch, noise, 0), tenth(batch, noise, 0)
    torch.testing.assert_close(part["loss/prior"], 0.1 * whole["loss/prior"])
    torch.testing.assert_close(part["bits_per_pixel"], whole["loss/prior"])


def test_videos_have_latents_with_time_and_bits_per_pixel_of_all_frames():
    vit = UViTConfig(patch=1, levels=[LevelConfig(kind="transformer", channels=16, blocks=1)], head_dim=16)
    model = AutoencoderModel(
        latent_channels=2,
        encoder=EncoderConfig(patch=2, channels=[8, 8], blocks=[1, 1], time_strides=[2]),
        prior=vit,
        decoder=UViTConfig(patch=2, levels=[CONV, vit.levels[0]], head_dim=16, time_strides=[2]),
    )
    loss = AutoencoderLoss(loss_factor=1.5, loss_bias=3.0)
    stage = AutoencoderStage(model, loss, image_size=16, channels=1, frames=4)
    assert stage.latent_shape == (2, 2, 4, 4) and stage.num_pixels == 4 * 256
    x = torch.rand(2, 1, 4, 16, 16, generator=torch.Generator().manual_seed(0)) * 2 - 1
    noise = draw_noise(stage.noise_spec, seed=0, step=0, lanes=[0], lane_size=2, batch_size=2)
    out = stage({"x": x}, noise, 0)
    assert out["loss"].shape == (2,)
    z_0 = stage.add_encoder_noise(stage.encode(x), noise["eps/z_0"])
    generators = [torch.Generator().manual_seed(i) for i in range(2)]
    assert stage.decode(z_0, num_steps=1, generators=generators).shape == x.shape
    with pytest.raises(ValueError, match="data.frames is 5; model.encoder needs a multiple of 2"):
        AutoencoderStage(model, loss, image_size=16, channels=1, frames=5)
    with pytest.raises(ValueError, match="model.encoder halves time, but data.frames is not set"):
        AutoencoderStage(model, loss, image_size=16, channels=1)


def test_target_bitrate_takes_its_loss_factor_from_the_control():
    stage = make_stage(target_bits_per_pixel=0.1)
    batch, noise = batch_and_noise(stage)
    before = stage(batch, noise, 0)["loss/decoder"]
    stage.bitrate_control.loss_factor.mul_(2)
    torch.testing.assert_close(stage(batch, noise, 0)["loss/decoder"], 2 * before)
    assert not [name for name, _ in stage.named_parameters() if "control" in name]
