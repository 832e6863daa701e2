import pytest
import torch
from parallel.parity import BATCH_SIZE, Case, batch_of, build, train

from ul_scale.parallel.build import build_engine
from ul_scale.parallel.engine import ParallelConfig, Process
from ul_scale.stages.noise import draw_noise
from ul_scale.train.optim import OptimConfig, build_optimizer

ALONE = Process(0, 1, torch.device("cpu"))


def engine_of(precision="fp32", **config):
    return build_engine(
        ParallelConfig(**config),
        build("autoencoder"),
        lambda module: build_optimizer(module, OptimConfig()),
        clip_norm=0.1,
        precision=precision,
        process=ALONE,
        samples_per_rank=BATCH_SIZE,
    )


def one_step(engine, step=0, poison=False):
    batch = batch_of(engine.stage, step)
    noise = draw_noise(
        engine.stage.noise_spec, seed=0, step=step, lanes=range(24), lane_size=1, batch_size=BATCH_SIZE
    )
    if poison:
        batch["x"][3, 0, 2, 2] = float("inf")
    terms = engine.forward(batch, noise, step)
    loss = terms["loss"].mean()
    engine.backward(loss, last=True)
    return loss.item(), engine.step(1e-3)


def test_a_step_that_is_not_finite_changes_nothing():
    engine = engine_of()
    one_step(engine)
    state = engine.state_dict()
    before = {
        **{name: value.clone() for name, value in state["model"].items()},
        **{f"{n}/{k}": v.clone() for n, m in state["optim"]["state"].items() for k, v in m.items()},
    }
    _, norm = one_step(engine, 1, poison=True)
    assert not norm.isfinite()
    state = engine.state_dict()
    after = state["model"] | {f"{n}/{k}": v for n, m in state["optim"]["state"].items() for k, v in m.items()}
    assert len(before) > 100 and all(torch.equal(before[name], after[name]) for name in before)
    _, norm = one_step(engine, 1)
    assert norm.isfinite()
    assert not torch.equal(before["encoder.stem.weight"], engine.state_dict()["model"]["encoder.stem.weight"])


def test_an_infinite_loss_with_finite_gradients_is_seen():
    engine = engine_of()
    parameter = next(iter(engine.parameters().values()))
    engine.backward(parameter.sum() + float("inf"), last=True)
    assert not engine.step(1e-3).isfinite()


def test_the_norm_is_that_of_all_gradients_before_clipping():
    engine = engine_of()
    batch = batch_of(engine.stage, 0)
    noise = draw_noise(
        engine.stage.noise_spec, seed=0, step=0, lanes=range(24), lane_size=1, batch_size=BATCH_SIZE
    )
    engine.stage(batch, noise, 0)["loss"].mean().backward()
    squares = sum(p.grad.double().square().sum() for p in engine.parameters().values())
    engine.optimizer.zero_grad()
    _, norm = one_step(engine)
    assert norm.item() == pytest.approx(squares.sqrt().item(), rel=1e-6)


def test_bf16_multiplies_in_bf16_and_keeps_weights_and_losses_in_fp32():
    (exact, _), (rounded, _) = one_step(engine_of()), one_step(engine := engine_of("bf16"))
    assert rounded == pytest.approx(exact, rel=0.02) and rounded != exact
    assert {p.dtype for p in engine.parameters().values()} == {torch.float32}


@pytest.mark.parametrize("mode", ["selective", "full"])
def test_activation_checkpointing_changes_no_bit(mode):
    plain = train(Case("autoencoder", "none", 1, 1, "none"), ALONE)
    checkpointed = train(Case("autoencoder", "none", 1, 1, mode), ALONE)
    assert all(torch.equal(plain[name], checkpointed[name]) for name in plain)


@pytest.mark.parametrize(
    "values,message",
    [
        ({"engine": "ddp"}, "expected one of none, fsdp, deepspeed"),
        ({"zero_stage": 4}, "parallel.zero_stage is 4; expected one of 1, 2, 3"),
        ({"activation_checkpointing": "some"}, "expected one of none, selective, full"),
        ({"dp_replicate": 2}, "is for parallel.engine=fsdp; it is none"),
        ({"timeout_s": 0}, "parallel.timeout_s is 0"),
    ],
)
def test_bad_values_are_refused(values, message):
    with pytest.raises(ValueError, match=message.replace(".", r"\.")):
        ParallelConfig(**values)
