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
    ],
)
def test_bad_values_are_named_in_one_line(override, message):
    with pytest.raises(ValueError) as caught:
        load("configs/quickstart/autoencoder.yaml", override)
    assert message in str(caught.value) and "\n" not in str(caught.value)


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
