"""When a run under Ray goes on after a failure, and when it is given up."""

import os
import pickle
from pathlib import Path

import pytest

from launch.backends import ray_restarts
from launch.backends.ray_restarts import RestartGuard, Stop
from ul_scale.checkpoint.attempts import RunBusy
from ul_scale.train import ray_worker
from ul_scale.train.ray_worker import WorkerFailed, as_failure


@pytest.fixture
def newest(monkeypatch):
    """Return a list whose last item is the run's newest complete step."""
    steps = [0]
    monkeypatch.setattr(ray_restarts.store, "latest_step", lambda run_dir: steps[-1])
    return steps


def crash(message="boom", **fields):
    return WorkerFailed(message, "Traceback\n  line\n" + message, token=os.urandom(8).hex(), **fields)


def test_restarts_without_progress_end_the_run_with_the_traceback(newest):
    guard = RestartGuard(Path("run"), limit=2)
    assert "1 of 2 restarts" in guard.failed({1: crash()})
    assert "2 of 2 restarts" in guard.failed({0: crash()})
    with pytest.raises(Stop) as caught:
        guard.failed({1: crash("the last one")})
    assert caught.value.exit_code == 1
    assert "2 restarts in a row" in str(caught.value) and "Traceback\n  line\nthe last one" in str(
        caught.value
    )


def test_a_run_that_gets_on_restarts_without_limit(newest):
    guard = RestartGuard(Path("run"), limit=1)
    for step in range(10, 100, 10):
        guard.failed({0: crash()})
        newest.append(step)
        assert f"going on from step {step} (0 of 1" in guard.failed({0: crash()})
    guard.failed({0: crash()})
    with pytest.raises(Stop):
        guard.failed({0: crash()})


def test_a_failure_that_ray_shows_again_counts_once(newest):
    guard = RestartGuard(Path("run"), limit=1)
    first, later = crash(), crash()
    assert guard.failed({0: first}) is not None
    assert guard.failed({0: first}) is None and guard.failed({0: first, 1: later}) is None
    assert guard.failed({1: later}) is None


def test_no_restart_is_tried_where_none_could_help(newest):
    guard = RestartGuard(Path("run"), limit=5)
    with pytest.raises(Stop, match="^data.lanes is 3") as caught:
        guard.failed({0: crash(echo=True), 1: as_failure(ValueError("data.lanes is 3"))})
    assert caught.value.exit_code == 2
    with pytest.raises(Stop, match="^in use by") as caught:
        guard.failed({0: as_failure(RunBusy("in use by"))})
    assert caught.value.exit_code == 1


def test_the_cause_is_told_from_its_echoes(newest):
    gone, echo = RuntimeError("The actor died"), as_failure(RuntimeError("Connection closed by peer [::1]"))
    cause = as_failure(KeyError("z_clean"))
    assert echo.echo and not cause.echo
    assert ray_restarts.root_failure({0: echo, 1: cause, 2: gone}) == (1, cause)
    assert ray_restarts.root_failure({0: echo, 2: gone}) == (2, gone)


def test_a_failure_and_the_end_travel_between_processes_whole():
    try:
        raise ZeroDivisionError("division by zero")
    except ZeroDivisionError as error:
        failure = pickle.loads(pickle.dumps(as_failure(error)))
    assert failure.summary == "ZeroDivisionError: division by zero" and failure.exit_code is None
    assert "raise ZeroDivisionError" in failure.details and failure.token
    stop = pickle.loads(pickle.dumps(Stop("the end", 2)))
    assert (str(stop), stop.exit_code) == ("the end", 2)


def test_a_run_in_use_is_waited_for(monkeypatch):
    answers = [RunBusy("busy"), RunBusy("busy"), 0]

    def run():
        answer = answers.pop(0)
        if isinstance(answer, Exception):
            raise answer
        return answer

    assert ray_worker.run_when_free(run, wait_s=0) == 0
    answers[:] = [RunBusy("busy")] * 100
    with pytest.raises(RunBusy):
        ray_worker.run_when_free(run, wait_s=0)
