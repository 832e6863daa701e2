"""Killed at any instant, a run ends as if nothing had happened."""

import os
import random
import signal
import time
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

import pytest
from chaos.runs import (
    AIMED,
    BEFORE_COMMIT,
    CLEANING,
    RESUMING,
    SHORT,
    SLOW_S,
    STEPS,
    TEMPLATE,
    TRAINING,
    Life,
    assert_bit_identical,
    newest_attempt,
    newest_row,
    phase,
    rows,
    run_dir_of,
    tensors,
    undisturbed_run,
    write_run,
)

from ul_scale.checkpoint import store

EPISODES, RANDOM_KILLS = 4, 3
RANDOM = "anywhere"
UP_TO_S = {RESUMING: 10 * SLOW_S, TRAINING: 1.0}
"""How long after its beginning a phase is hit; two file operations where it is not said."""
LOSS_TOLERANCE, STATE_TOLERANCE = 1e-4, 1e-4


@dataclass
class Kill:
    aim: str
    hit: str
    step: int
    """The newest row in the metrics."""


def kill_once(config: Path, run_dir: Path, aim: str, rng: random.Random, startup_s: float) -> Kill | None:
    """Live, and be killed at the aim if it comes; return None if the run is done before."""
    before = newest_attempt(run_dir)
    life = Life(config, slow_s=SLOW_S)
    if aim == RANDOM:
        moment = time.monotonic() + rng.uniform(0, 2.5 * startup_s)
        hit = life.until(lambda: time.monotonic() >= moment)
    else:
        hit = life.until(lambda: phase(run_dir, before) == aim)
        time.sleep(rng.uniform(0, UP_TO_S.get(aim, 2 * SLOW_S)))
    if not hit:
        life.succeed()
        return None
    newest = store.latest_step(run_dir) or 0
    life.kill()
    assert (store.latest_step(run_dir) or 0) >= newest, "a complete checkpoint was lost"
    for step in store.complete_steps(run_dir):
        store.verify(run_dir, step)
    return Kill(aim, phase(run_dir, before), newest_row(run_dir))


def test_killed_where_it_hurts_most_the_run_ends_the_same(shards, tmp_path, undisturbed):
    config = write_run(tmp_path / "killed", shards, **SHORT)
    run_dir, rng = run_dir_of(config), random.Random(0)
    kills = [kill_once(config, run_dir, aim, rng, 0) for aim in (BEFORE_COMMIT, CLEANING, RESUMING)]
    assert all(kills)
    assert "resuming from step" in Life(config).succeed()
    assert_bit_identical(run_dir, undisturbed)


@pytest.mark.exhaustive
@pytest.mark.timeout(1800)
def test_killed_often_in_every_phase_the_run_ends_the_same(shards, tmp_path, findings):
    expected = undisturbed_run(tmp_path / "undisturbed", shards)
    startup_s = time_to_first_row(write_run(tmp_path / "startup", shards))
    kills: list[Kill] = []
    for seed in range(EPISODES):
        rng = random.Random(seed)
        config = write_run(tmp_path / f"killed-{seed}", shards)
        run_dir, aims = run_dir_of(config), [*AIMED, *[RANDOM] * RANDOM_KILLS]
        rng.shuffle(aims)
        for aim in aims:
            kill = kill_once(config, run_dir, aim, rng, startup_s)
            if kill is None:
                break
            kills.append(kill)
            print(f"episode {seed}: {kill}")
        Life(config).succeed()
        assert_bit_identical(run_dir, expected)
        assert "is done" in Life(config).succeed()
    hits = Counter(kill.hit for kill in kills)
    # Between saves that are slowed down little time is left for training alone.
    assert len(kills) >= 20 and all(hits[aim] >= 2 for aim in AIMED if aim != TRAINING), hits
    findings.setdefault("Kills", []).extend(
        [
            f"{len(kills)} SIGKILLs in {EPISODES} runs of {STEPS} steps (dropout on, asynchronous saves),",
            "each continued by the same command. Each run ended with parameters, averages, snapshots,",
            "optimizer state and metrics bit for bit those of the undisturbed run. File operations of",
            f"checkpoints were {SLOW_S:g} s apart, so that the gaps between them could be hit; where a kill",
            "hit was judged by what was on disk.",
            "",
            "| at the moment of the kill, the run was | kills |",
            "|---|---|",
            *(f"| {name} | {count} |" for name, count in hits.most_common()),
            "",
        ]
    )


def time_to_first_row(config: Path) -> float:
    began, run_dir, life = time.monotonic(), run_dir_of(config), Life(config)
    assert life.until(lambda: newest_row(run_dir))
    life.kill()
    return time.monotonic() - began


def end_of(pids: list[int]) -> None:
    """Wait until processes that are not our children are gone."""
    deadline = time.monotonic() + 60
    while any(Path(f"/proc/{pid}").exists() for pid in pids):
        assert time.monotonic() < deadline
        time.sleep(0.01)


def torchrun_life(config: Path, processes: int, victims: str, steps: int, jitter_s: float) -> None:
    """Live on several ranks for so many logged steps, then kill: rank 0, rank 1, the agent, or all."""
    run_dir = run_dir_of(config)
    life, before = Life(config, processes=processes, slow_s=SLOW_S), newest_attempt(run_dir)

    def far_enough() -> bool:
        own = run_dir / "metrics" / f"{before + 1}.jsonl"
        return own.exists() and own.read_bytes().count(b"\n") >= steps

    assert life.until(far_enough), life.output()
    time.sleep(jitter_s)
    ranks, agent = life.ranks(), life.process.pid
    assert len(ranks) == processes
    for pid in {"rank 0": ranks[:1], "rank 1": ranks[1:2], "agent": [agent], "all": [agent, *ranks]}[victims]:
        os.kill(pid, signal.SIGKILL)
    assert life.wait() != 0
    if victims == "agent":  # its ranks live on, and nobody may join them
        for pid in ranks:
            os.kill(pid, signal.SIGSTOP)  # or they might be done before
        refused = Life(config, processes=processes)
        assert refused.wait() == 1 and "is in use by attempt" in refused.output()
        for pid in ranks:
            os.kill(pid, signal.SIGKILL)
    end_of(ranks)


@pytest.mark.exhaustive
@pytest.mark.timeout(1800)
def test_killed_ranks_and_agents_of_torchrun(shards, tmp_path, findings):
    few = {"train": {"steps": 60}}
    expected = write_run(tmp_path / "undisturbed", shards, **few)
    Life(expected, processes=2).succeed()
    config, rng = write_run(tmp_path / "killed", shards, **few), random.Random(1)
    run_dir = run_dir_of(config)
    victims = ["rank 0", "rank 1", "all", "agent"]
    for victim in victims:
        torchrun_life(config, 2, victim, rng.randint(3, 12), rng.uniform(0, 0.3))
    Life(config, processes=2).succeed()
    assert_bit_identical(run_dir, run_dir_of(expected))
    findings.setdefault("Kills", []).append(
        f"Under torchrun with 2 processes (fsdp) these were killed in turn: {', '.join(victims)}. The end was"
        "\nbit for bit that of the undisturbed run of 2 processes."
    )


@pytest.mark.exhaustive
@pytest.mark.timeout(1800)
def test_through_other_world_sizes_the_end_is_near(shards, tmp_path, findings):
    # Biases before a normalisation have no gradient but rounding errors: a small eps gives those full steps.
    optim = TEMPLATE["optim"] | {"eps": 1e-5}
    plain = no_dropout(TEMPLATE | {"train": TEMPLATE["train"] | {"steps": 48}, "optim": optim})
    expected = undisturbed_run(tmp_path / "undisturbed", shards, plain)
    config = write_run(tmp_path / "killed", shards, plain)
    run_dir = run_dir_of(config)
    torchrun_life(config, 2, "all", 14, 0.1)
    life = Life(config)
    assert life.until(lambda: newest_row(run_dir) >= 26)
    life.kill()
    torchrun_life(config, 3, "all", 12, 0.05)
    Life(config, processes=2).succeed()
    loss = max(
        abs(mine[name] - value) / abs(value)
        for mine, theirs in zip(rows(run_dir), rows(expected), strict=True)
        for name, value in theirs.items()
        if name in ("loss", "loss/prior", "loss/decoder", "grad_norm")
    )
    mine, theirs = tensors(run_dir), tensors(expected)
    assert mine.keys() == theirs.keys()
    names = [name for name in mine if name.startswith(("model.", "ema."))]
    deviation = max((mine[name].double() - theirs[name].double()).abs().max().item() for name in names)
    largest = max(theirs[name].double().abs().max().item() for name in names)
    assert loss < LOSS_TOLERANCE and deviation < STATE_TOLERANCE, (loss, deviation)
    findings["World sizes"] = [
        "2 → 1 → 3 → 2 processes (fsdp, none, fsdp, fsdp), killed between; dropout off; 48 steps.",
        f"Against one undisturbed process, losses and gradient norms deviate by up to {loss:.1e} (relative;",
        f"stated tolerance {LOSS_TOLERANCE:g}), parameters and averages by {deviation:.1e} (absolute; the",
        f"largest is {largest:.1f}, the stated tolerance {STATE_TOLERANCE:g}).",
    ]


def no_dropout(value):
    if isinstance(value, dict):
        return {key: no_dropout(item) for key, item in value.items() if key != "dropout"}
    return [no_dropout(item) for item in value] if isinstance(value, list) else value
