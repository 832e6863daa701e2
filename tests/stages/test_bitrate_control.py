import math

import pytest
import torch
from templates import AUTOENCODER

from ul_scale.stages.autoencoder import AutoencoderStage
from ul_scale.stages.bitrate_control import BitrateControl

STEPS, START, END = 200, 0.25, 0.9


def control_of(target=0.2, **changes):
    return BitrateControl(target, 4.0, start=START, end=END, **changes)


def observe(control, bits, step, lr_share=1.0, averaged=None):
    control.observe(torch.as_tensor(bits), averaged, step, STEPS, scheduled=4 - step / 50, lr_share=lr_share)


def test_c_lf_follows_its_schedule_then_the_bits_then_stays():
    control, seen = control_of(), []
    for step in range(STEPS):
        seen.append(float(control.loss_factor))
        observe(control, 0.17, step)  # too few
    assert seen[0] == 4
    assert seen[1:50] == pytest.approx([4 - step / 50 for step in range(49)])
    controlled = seen[60:179]
    assert all(after > before for before, after in zip(controlled, controlled[1:]))
    assert len(set(seen[180:])) == 1 and seen[180] == pytest.approx(float(control.loss_factor))
    # What is kept is the integral part, without what one measurement more or less adds.
    assert math.log(seen[180] - 1) == pytest.approx(float(control.integral))


@pytest.mark.parametrize("steps", [500, 20_000])
def test_a_latent_is_held_at_its_bitrate_however_long_the_run(steps):
    control, generator = control_of(), torch.Generator().manual_seed(0)
    log_bits = math.log(0.02)
    for step in range(steps):
        # Bits of c_lf − 1 to the power 0.8, behind by a twentieth of the run, 20 % of noise in each step.
        wanted = math.log(0.06) + 0.8 * math.log(float(control.loss_factor) - 1)
        log_bits += (wanted - log_bits) / (0.05 * steps)
        noise = 0.2 * torch.randn((), generator=generator)
        bits = math.exp(log_bits) * (1 + noise)
        control.observe(torch.as_tensor(bits), None, step, steps, scheduled=2.0, lr_share=1.0)
    assert math.exp(log_bits) == pytest.approx(0.2, rel=0.04)


def test_what_is_held_is_the_bitrate_of_averaged_weights():
    """Averaged weights have 0.7 of the bits in training, which every tenth batch shows."""
    control, generator, bits = control_of(), torch.Generator().manual_seed(0), 0.02
    for step in range(STEPS):
        bits += (0.1 * (float(control.loss_factor) - 1) - bits) / 5
        noisy = torch.tensor(bits) * (1 + 0.2 * torch.randn((), generator=generator))
        observe(control, noisy, step, averaged=0.7 * noisy if step % 10 == 0 else None)
    assert 0.7 * bits == pytest.approx(0.2, rel=0.05)
    assert float(control.averaged_share) == pytest.approx(0.7, rel=1e-6)


def test_what_does_not_train_is_not_steered():
    control = control_of()
    for step in range(100):
        observe(control, 0.2, step)
    before = float(control.integral)
    observe(control, 0.001, 100, lr_share=0.0)
    assert float(control.integral) == before


def test_from_saved_state_it_goes_on_bit_for_bit():
    bits = torch.rand(STEPS, generator=torch.Generator().manual_seed(0))
    whole, first, second = control_of(), control_of(), control_of()
    for step in range(STEPS):
        observe(whole, bits[step], step)
        observe(first if step < 111 else second, bits[step], step)
        if step == 110:
            second.load_state_dict(first.state_dict())
    assert whole.state_dict() == second.state_dict() and not list(whole.parameters())
    assert all(value.dtype == torch.float64 for value in whole.state_dict().values())


def test_bits_that_are_not_finite_change_no_state_for_good():
    control = control_of()
    for step in range(120):
        observe(control, math.nan if step == 100 else 0.1, step)
    assert all(value.isfinite() for value in control.state_dict().values())
    assert float(control.bits_per_pixel) == pytest.approx(0.1)


def test_the_host_never_waits_for_the_device():
    control = control_of().to("meta")  # whose tensors have no values to wait for
    for step in range(STEPS):
        observe(control, torch.empty((), device="meta"), step)


def stage_of(build_section, **loss):
    torch.manual_seed(0)
    model, loss = build_section("model", AUTOENCODER["model"]), build_section("loss", loss)
    return AutoencoderStage(model, loss, image_size=16, channels=1)


@pytest.fixture
def build_section():
    from omegaconf import OmegaConf

    from ul_scale.config import structure
    from ul_scale.stages.autoencoder import AutoencoderLoss, AutoencoderModel

    schemas = {"model": AutoencoderModel, "loss": AutoencoderLoss}
    return lambda name, values: structure(schemas[name], OmegaConf.create(values), "test")


def test_a_stage_with_a_target_has_the_same_weights_and_its_decoder_loss_is_times_c_lf(build_section):
    plain = stage_of(build_section, loss_factor=3.0, loss_bias=3.0)
    held = stage_of(build_section, loss_factor=3.0, loss_bias=3.0, target_bits_per_pixel=0.1)
    ours, theirs = dict(held.named_parameters()), dict(plain.named_parameters())
    assert ours.keys() == theirs.keys() and all(torch.equal(ours[name], theirs[name]) for name in ours)
    assert not any("bitrate" in name for name in plain.state_dict())

    from ul_scale.stages.noise import draw_noise

    noise = draw_noise(plain.noise_spec, seed=0, step=0, lanes=range(4), lane_size=1, batch_size=4)
    batch = {"x": torch.rand(4, 1, 16, 16)}
    plain.eval(), held.eval()
    torch.testing.assert_close(held(batch, noise, 0), plain(batch, noise, 0))
    held.bitrate_control.loss_factor.fill_(7.5)
    found, expected = held(batch, noise, 0), plain(batch, noise, 0)
    torch.testing.assert_close(found["loss/decoder"], 2.5 * expected["loss/decoder"])
    torch.testing.assert_close(found["loss/prior"], expected["loss/prior"])
    torch.testing.assert_close(found["loss_factor"], torch.full((4,), 7.5))
