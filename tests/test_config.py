import pytest
import yaml
from templates import AUTOENCODER, BASE

from ul_scale import config as configs


def load(path, *overrides):
    return configs.load(path, list(overrides))


def test_size_fills_in_what_is_not_given_and_can_be_overridden():
    config = load("configs/quickstart/autoencoder.yaml", "model.encoder.channels=[16,32]")
    assert config.model.size == "tiny32"
    assert config.model.encoder.channels == [16, 32]
    assert config.model.prior.levels[0].channels == 96


def test_resolved_config_reads_back_to_the_same_run(tmp_path):
    config = load("configs/quickstart/autoencoder.yaml")
    path = tmp_path / "config.yaml"
    path.write_text(configs.to_yaml(config))
    assert configs.run_id(load(path), "data") == configs.run_id(config, "data")
    assert load(path) == config


@pytest.mark.parametrize(
    "override,message",
    [
        ("loss.los_factor=2", "unknown key loss.los_factor; did you mean loss.loss_factor?"),
        ("model.encoder.patches=2", "unknown key model.encoder.patches; did you mean model.encoder.patch?"),
        ("train.steps=many", "train.steps: Value 'many' of type 'str' could not be converted to Integer"),
        ("train.steps=0", "train.steps is 0; expected 1 or more"),
        ("train.stop_at_step=2000", "train.stop_at_step is 2000; expected 1 to train.steps = 800"),
        ("model.size=huge", "model.size is 'huge'; expected one of tiny32, imagenet512"),
        ("kind=video", "kind is 'video'; expected one of autoencoder, base"),
        ("ema.half_lives_samples=[]", "ema.half_lives_samples is []; expected numbers above 0"),
        ("parallel.engine=ddp", "parallel.engine is 'ddp'; expected one of none, fsdp, deepspeed"),
        ("optim.warmup_steps=-5", "optim.warmup_steps is -5; expected 0 or more"),
        ("optim.betas=[0.9]", "optim.betas is [0.9]; expected two numbers"),
        ("model.prior.levels=[]", "levels are 0; expected at least 1"),
        ("model.decoder.patch=0", "patch is 0"),
        ("model.size=[1]", "model.size is [1]; expected one of"),
        ("kind={a: 1}", "kind is {'a': 1}; expected one of"),
        ("loss.loss_factor=.nan", "loss.loss_factor is nan; expected a number above 0"),
        ("name=a/b", "name is 'a/b'; expected a name for a folder"),
        ("oops", "override 'oops': expected key=value"),
        ("model..size=tiny32", "override 'model..size=tiny32': expected key=value"),
        ("model=[]", "model is []; expected a section of keys and values"),
        ("loss=true", "loss is True; expected a section of keys and values"),
        ("model.encoder.channels=8", "model.encoder.channels is 8; expected a list"),
        (
            "model.prior.levels.x.channels=32",
            "model.prior.levels is {'x': {'channels': 32}}; expected a list",
        ),
        ("model.prior.levels=[3]", "model.prior.levels[0] is 3; expected a section"),
        (
            "model.prior.levels=[{kind: conv, channels: 8, block: 1}]",
            "unknown key model.prior.levels[0].block; did you mean model.prior.levels[0].blocks?",
        ),
        ("data.val=&a [*a]", "override 'data.val=&a [*a]': "),
        ("parallel.threads=0", "parallel.threads is 0; expected 1 or more, or none"),
        ("parallel.timeout_s=.nan", "parallel.timeout_s is nan; expected seconds above 0"),
        ("model.latent_channels=0", "model.latent_channels is 0; expected 1 or more"),
        ("model.prior.head_dim=-8", "head_dim is -8; expected 1 or more"),
        ("model.encoder.blocks=[-1,1]", "model.encoder.blocks is [-1, 1]; expected 0 or more"),
        ("model.encoder.output_gain=.inf", "model.encoder.output_gain is inf; expected a finite number"),
        ("model.decoder.z_scale=.nan", "z_scale is nan; expected a finite number"),
        ("loss.loss_bias=201", "loss.loss_bias is 201.0; expected nats from -200 to 200"),
        ("loss.log_snr_max=.nan", "loss.log_snr_max is nan; expected nats"),
        ("loss.log_snr_min=-.inf", "loss.log_snr_min is -inf; expected nats"),
        ("loss.log_snr_min=6", "schedule needs log_snr_max > log_snr_min; got 5.0 and 6.0"),
    ],
)
def test_bad_values_are_named_in_one_line(override, message):
    with pytest.raises(ValueError) as caught:
        load("configs/quickstart/autoencoder.yaml", override)
    assert message in str(caught.value) and "\n" not in str(caught.value)


@pytest.mark.parametrize(
    "path,override,message",
    [
        ("quickstart/base.yaml", "model.num_classes=0", "model.num_classes is 0; expected at least 1"),
        ("quickstart/base.yaml", "model.text=true", "model.text is True; expected a section"),
        ("quickstart/base.yaml", "loss.log_snr_shift=1e4", "loss.log_snr_shift is 10000.0; expected nats"),
        ("quickstart/base.yaml", "autoencoder.run=runs/a-0123456789", "expected a run id under root"),
        ("quickstart/base.yaml", "autoencoder.run=a-0123456789/", "expected a run id under root"),
        ("quickstart/base.yaml", "autoencoder.step=-1", "autoencoder.step is -1; expected 0 or more"),
        ("baselines/pixels.yaml", "loss.log_snr_max=.inf", "loss.log_snr_max is inf; expected nats"),
        ("baselines/pixels.yaml", "model.size=small", "none, for a fixed_autoencoder has no sizes"),
    ],
)
def test_bad_values_of_other_kinds_are_named(path, override, message):
    known = ["autoencoder.run=a-0123456789", "autoencoder.step=1"] if "base.yaml" in path else []
    with pytest.raises(ValueError) as caught:
        configs.load_any(f"configs/{path}", [*known, override])
    assert message in str(caught.value) and "\n" not in str(caught.value)


@pytest.mark.parametrize(
    "text,message",
    [
        ("{bad", "not valid YAML"),
        ("- a\n", "expected keys and values"),
        ("3", "not valid YAML"),
        ("a: &a [*a]", "not valid YAML"),
        (b"\xff\x00", "not valid YAML: 'utf-8' codec can't decode"),
        ("", "kind is None"),
        (b"kind: base\n", "name is not set"),
    ],
)
def test_a_damaged_config_of_a_run_is_named(text, message):
    with pytest.raises(ValueError, match=f"runs/a/config.yaml: {message}") as caught:
        configs.loads(text, "runs/a/config.yaml")
    assert "\n" not in str(caught.value)


def test_a_missing_key_is_named(tmp_path):
    path = tmp_path / "config.yaml"
    path.write_text(yaml.safe_dump(AUTOENCODER | {"train": {"batch_size": 8}}))
    with pytest.raises(ValueError, match=r"config.yaml: train.steps is not set and has no default"):
        load(path)


def test_files_compose(tmp_path):
    (tmp_path / "parts").mkdir()
    (tmp_path / "parts" / "optim.yaml").write_text("optim: {lr: 0.5, warmup_steps: 7}\n")
    (tmp_path / "base.yaml").write_text(yaml.safe_dump(AUTOENCODER))
    (tmp_path / "config.yaml").write_text("defaults: [base.yaml, parts/optim.yaml]\noptim: {lr: 0.25}\n")
    config = load(tmp_path / "config.yaml")
    assert (config.optim.lr, config.optim.warmup_steps, config.train.steps) == (0.25, 7, 12)


@pytest.mark.parametrize(
    "text,message",
    [
        (None, "no such config file"),
        ("a: [", "not valid YAML"),
        ("- a\n", "expected keys and values"),
        ("defaults: [config.yaml]\n", "its defaults lead back to itself"),
        ("defaults: other.yaml\n", "expected a list of files"),
    ],
)
def test_unreadable_files_are_named(tmp_path, text, message):
    path = tmp_path / "config.yaml"
    if text is not None:
        path.write_text(text)
    with pytest.raises(ValueError, match=message) as caught:
        load(path)
    assert "config.yaml" in str(caught.value)


class TestIdentity:
    def run_id(self, *overrides, fingerprint="data"):
        return configs.run_id(load("configs/quickstart/autoencoder.yaml", *overrides), fingerprint)

    def test_where_and_how_do_not_count(self):
        overrides = (
            "root=elsewhere",
            "data.train=gs://bucket/train",
            "data.val=null",
            "data.threads=4",
            "parallel.engine=fsdp",
            "parallel.accumulation_steps=2",
            "checkpoint.every_steps=7",
            "checkpoint.keep_steps=[3]",
            "train.stop_at_step=5",
            "train.log_every_steps=1",
        )
        assert self.run_id(*overrides) == self.run_id()

    @pytest.mark.parametrize(
        "override",
        [
            "seed=1",
            "loss.loss_factor=2",
            "train.batch_size=64",
            "data.lanes=16",
            "data.window_chunks=4",
            "data.chunk_bytes=1000",
            "ema.half_lives_samples=[1]",
            "model.prior.levels=[{kind: transformer, channels: 96, blocks: 4}]",
        ],
    )
    def test_what_is_computed_counts(self, override):
        assert self.run_id(override) != self.run_id()

    def test_data_counts_by_its_fingerprint(self):
        assert self.run_id(fingerprint="other") != self.run_id()

    def test_one_and_one_point_zero_are_the_same(self):
        assert self.run_id("loss.loss_factor=2") == self.run_id("loss.loss_factor=2.0")

    def test_golden(self, tmp_path):
        """A change here gives every existing run another identity: raise METHOD_VERSION on purpose only."""
        ids = []
        for template in (AUTOENCODER, BASE | {"autoencoder": {"run": "a-0123456789", "step": 12}}):
            path = tmp_path / "config.yaml"
            order = {"chunk_bytes": 4_000_000, "window_chunks": 8}  # not the defaults, which may change
            path.write_text(yaml.safe_dump(template | {"data": template["data"] | order}))
            ids.append(
                configs.run_id(load(path), "train/0123" if template["kind"] == "autoencoder" else None)
            )
        assert ids == ["tiny-bb45b196a8", "tiny-base-b43355095e"]
