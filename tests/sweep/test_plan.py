import dataclasses
import json
import shutil

import pytest

from ul_scale import config as configs
from ul_scale.sweep.local import critical_paths
from ul_scale.sweep.plan import evaluation_steps, load_sweep, plan_sweep
from ul_scale.train.prepare import latents_dir

ONE = ("loss_factors=[4.0]", "sizes=[tiny-s]")


def plan(path, *overrides):
    return plan_sweep(*load_sweep(path, list(overrides)))


def test_grid_expands_to_a_dag_in_order(sweep_path):
    nodes = plan(sweep_path).nodes
    kinds = [node.kind for node in nodes]
    counts = {kind: kinds.count(kind) for kind in kinds}
    assert counts == {"autoencoder": 2, "encode": 2, "base": 4, "evaluate": 6}
    seen = set()
    for node in nodes:
        assert seen.issuperset(node.parents) and not node.done()
        seen.add(node.id)
    assert len(seen) == len(nodes)


def test_a_changed_size_leaves_every_other_run_as_it_is(sweep_path):
    before = {node.id for node in plan(sweep_path).nodes}
    after = {node.id for node in plan(sweep_path, "sizes=[tiny-s, tiny-l]").nodes}
    new = after - before
    assert len(new) == 4 and all("tiny-l" in node for node in new)


def test_a_changed_autoencoder_changes_everything_that_stands_on_it(sweep_path):
    before = {node.id for node in plan(sweep_path).nodes}
    assert before.isdisjoint(node.id for node in plan(sweep_path, "autoencoder_seed=1").nodes)


def test_evaluations_change_no_run(sweep_path):
    settings = "evaluation={samples: 4}"
    assert plan(sweep_path).runs.keys() == plan(sweep_path, settings, "evaluation_points=2").runs.keys()


def test_autoencoders_can_be_held_at_bitrates_instead(sweep_path):
    targets = plan(sweep_path, "loss_factors=[]", "targets_bits_per_pixel=[0.1, 0.2]")
    cells = targets.cells
    assert {cell.autoencoder.loss.target_bits_per_pixel for cell in cells} == {0.1, 0.2}
    assert {cell.base.name for cell in cells} >= {"base-b0.1-tiny-s", "base-b0.2-tiny-m"}
    both = plan(sweep_path, "targets_bits_per_pixel=[0.1, 0.2]")
    assert {node.id for node in targets.nodes} < {node.id for node in both.nodes}


def test_overrides_by_size_reach_that_size_only(sweep_path):
    rates = {run.model.size: run.optim.lr for run in plan(sweep_path).runs.values() if run.kind == "base"}
    assert rates == {"tiny-s": 1e-3, "tiny-m": 2e-3}


def test_templates_that_are_sharded_are_trained_as_one_process(sweep_path):
    sharded = "[parallel.engine=fsdp,parallel.dp_replicate=2,parallel.compile=true]"
    planned = plan(sweep_path, f"autoencoder_overrides={sharded}", f"base_overrides={sharded}")
    assert {run.parallel.engine for run in planned.runs.values()} == {"none"}
    assert all(run.parallel.compile for run in planned.runs.values())
    assert planned.runs.keys() == plan(sweep_path).runs.keys()


def test_compute_points_are_log_spaced_and_kept(sweep_path):
    assert evaluation_steps(800, 3, 4.0) == [200, 400, 800]
    assert evaluation_steps(3, 4, 8.0) == [1, 3]  # never the same step twice
    assert evaluation_steps(5, 1, 4.0) == [5]
    bases = [run for run in plan(sweep_path).runs.values() if run.kind == "base"]
    assert all(run.checkpoint.keep_steps == [50, 100, 200] for run in bases)


def test_costs_follow_their_definitions(sweep_path):
    for cell in plan(sweep_path).cells:
        assert cell.cost.train_flops(8) == 3 * cell.cost.forward_flops * 8 * 8
        assert cell.autoencoder_cost.forward_flops > cell.autoencoder_cost.decode_flops > 0
    by_size = {cell.base.model.size: cell.cost.forward_flops for cell in plan(sweep_path).cells}
    assert by_size["tiny-s"] < by_size["tiny-m"]


def test_longest_way_first(sweep_path):
    nodes = plan(sweep_path).nodes
    lengths = critical_paths(nodes)
    for node in nodes:
        for parent in node.parents:
            assert lengths[parent] > lengths[node.id]
    sized = [dataclasses.replace(node, flops=1.0) for node in nodes]
    assert max(critical_paths(sized).values()) == 4


@pytest.mark.parametrize(
    "override,message",
    [
        ("root=s3://KEY:SECRET@bucket/runs", "root is s3://…; expected a local directory"),
        ("kind=base", "kind is 'base'; expected sweep"),
        ("name=''", "name is ''; expected a name for a folder"),
        ("name=..", "name is '..'; expected"),
        ("name=a/b", "name is 'a/b'; expected"),
        ("evaluation_points=0", "evaluation_points is 0 and evaluation_span 4.0; expected 1 or more"),
        ("evaluation_span=.nan", "evaluation_span nan; expected 1 or more, and a number above 1"),
        ("evaluation_span=.inf", "evaluation_span inf"),
        ("base=autoencoder.yaml", "autoencoder.yaml: kind is 'autoencoder'; expected base"),
        ("sizes=[tiny-x]", "model.size is 'tiny-x'"),
        ("sizes=[]", "sizes is []"),
        ("loss_factors=[]", "loss_factors and targets_bits_per_pixel are empty; expected values of either"),
        ("loss_factors=[2, 2]", "loss_factors is [2.0, 2.0]; expected one or more different values"),
        ("size_overrides={tiny-q: [a=1]}", "size_overrides names tiny-q"),
        ("evaluation.sample=3", "unknown key evaluation.sample; did you mean evaluation.samples?"),
        ("autoencoder=missing.yaml", "missing.yaml: no such config file"),
    ],
)
def test_bad_sweeps_are_named_in_one_line(sweep_path, override, message):
    with pytest.raises(ValueError) as caught:
        plan(sweep_path, override)
    assert message in str(caught.value) and "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("where", "given", "key", "setting"),
    [
        ("autoencoder_overrides", "seed=1", "seed", "autoencoder_seed"),
        ("autoencoder_overrides", "root=/tmp", "root", "root"),
        ("autoencoder_overrides", "name=a", "name", "the bitrate"),
        ("autoencoder_overrides", "loss.loss_factor=2", "loss.loss_factor", "loss_factors"),
        ("autoencoder_overrides", "loss={loss_factor: 2}", "loss.loss_factor", "loss_factors"),
        (
            "autoencoder_overrides",
            "loss.target_bits_per_pixel=null",
            "loss.target_bits_per_pixel",
            "targets_bits_per_pixel",
        ),
        ("autoencoder_overrides", "checkpoint.keep_steps=[1]", "checkpoint.keep_steps", "train.steps"),
        ("base_overrides", "seed=1", "seed", "seeds"),
        ("base_overrides", "model.size=tiny-s", "model.size", "sizes"),
        ("base_overrides", "root=/tmp", "root", "root"),
        ("base_overrides", "name=a", "name", "the bitrate and the size"),
        ("base_overrides", "autoencoder={run: a, step: 1}", "autoencoder.run", "its own autoencoders"),
        ("base_overrides", "autoencoder.step=1", "autoencoder.step", "its own autoencoders"),
        ("base_overrides", "checkpoint.keep_steps=[1]", "checkpoint.keep_steps", "evaluation_points"),
        ("size_overrides.tiny-s", "model.size=tiny-m", "model.size", "sizes"),
        ("size_overrides.tiny-s", "seed=1", "seed", "seeds"),
    ],
)
def test_what_a_sweep_sets_itself_cannot_be_overridden(sweep_path, where, given, key, setting):
    with pytest.raises(ValueError) as caught:
        load_sweep(sweep_path, [f"{where}=['{given}']"])
    assert f"{where} sets {key}, which a sweep sets from {setting};" in str(caught.value)
    assert "\n" not in str(caught.value)


def test_other_overrides_of_those_sections_are_taken(sweep_path):
    given = (
        "loss.target_start=0.2, loss.loss_factor=6, checkpoint.every_steps=100, model.prior.levels.0.blocks=2"
    )
    targets = ["loss_factors=[]", "targets_bits_per_pixel=[0.1]", "sizes=[tiny-s]"]
    [cell] = plan(sweep_path, *targets, f"autoencoder_overrides=[{given}]").cells
    run = cell.autoencoder
    assert (run.loss.target_start, run.loss.loss_factor, run.checkpoint.every_steps) == (0.2, 6, 100)
    assert run.model.prior.levels[0].blocks == 2


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("model.num_classes=1", "model.num_classes is 1, but the latents have 2"),
        ("data.horizontal_flip=true", "data.horizontal_flip is set"),
        ("data.crop=random", "data.crop is random"),
        ("data.captions=true", "data.captions is set"),
        ("data.val=missing", "missing"),
        ("data.lanes=3", "data.lanes is 3"),
        ("parallel.accumulation_steps=3", "parallel.accumulation_steps is 3, but a rank has 8 samples"),
    ],
)
def test_what_base_models_would_refuse_is_found_before_anything_is_trained(sweep_path, override, message):
    with pytest.raises(ValueError) as caught:
        plan(sweep_path, f"base_overrides=['{override}']")
    assert message in str(caught.value) and "\n" not in str(caught.value)


def test_latents_that_are_there_say_their_classes(sweep_path):
    [cell] = plan(sweep_path, *ONE).cells
    meta = latents_dir(cell.autoencoder_dir.parent, cell.autoencoder_dir.name, 200) / "_index" / "meta.json"
    meta.parent.mkdir(parents=True)
    meta.write_text(json.dumps({"complete": True, "extra": {"num_classes": 3}}))
    with pytest.raises(ValueError, match="model.num_classes is 2, but the latents have 3"):
        plan(sweep_path, *ONE)


def test_mirror_images_are_read_where_they_are_encoded(sweep_path):
    flips = ["base_overrides=[data.horizontal_flip=true]", "encoding.flipped=true"]
    [cell] = plan(sweep_path, *ONE, *flips).cells
    assert cell.base.data.horizontal_flip


def test_held_out_data_of_a_run_that_is_done_stay(sweep_path, shards, tmp_path):
    moved, gone = tmp_path / "moved", tmp_path / "gone"
    shutil.copytree(shards["val"], moved)
    shutil.copytree(shards["val"], gone)
    other = tmp_path / "other"
    shutil.copytree(shards["train"], other)
    [cell] = plan(sweep_path, *ONE).cells
    run_dir, last = cell.autoencoder_dir, cell.autoencoder.train.last_step

    def trained_with(val):
        data = dataclasses.replace(cell.autoencoder.data, val=val and str(val))
        run_dir.mkdir(parents=True, exist_ok=True)
        text = configs.to_yaml(dataclasses.replace(cell.autoencoder, data=data))
        (run_dir / "config.yaml").write_text(text)

    trained_with(other)
    plan(sweep_path, *ONE)  # it is not done, and goes on with the data it is now given
    (run_dir / "SUCCESS").write_text(json.dumps({"step": last}))
    for val in (other, None):
        trained_with(val)
        with pytest.raises(ValueError) as caught:
            plan(sweep_path, *ONE)
        line = str(caught.value)
        assert f"{run_dir.name} was trained with data.val={val}, and {shards['val']} has other" in line
        assert "\n" not in line
    trained_with(moved)
    plan(sweep_path, *ONE)
    trained_with(gone)
    shutil.rmtree(gone)
    plan(sweep_path, *ONE)
