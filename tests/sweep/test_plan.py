import dataclasses

import pytest

from ul_scale.sweep.local import critical_paths
from ul_scale.sweep.plan import evaluation_steps, load_sweep, plan_sweep


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
        ("root=gs://bucket/runs", "expected a local directory"),
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
