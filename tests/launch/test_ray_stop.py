"""Signals to a command that trains under Ray."""

import os
import signal
import threading
import time

from launch.backends.ray_stop import Following, StopSignals
from ul_scale.checkpoint.attempts import start_attempt
from ul_scale.train import worker


def test_a_signal_asks_the_newest_attempt_to_stop(tmp_path, monkeypatch):
    """The attempt that is asked ends; the one that Ray has started meanwhile is asked too."""
    run_dir, asked = tmp_path / "run", []

    def training():
        for _ in range(2):
            with start_attempt(run_dir, log=lambda line: None) as attempt:
                signals.count = 1
                while not asked or asked[-1] != attempt.number:
                    time.sleep(0.01)
        return worker.EXIT_RUN_AGAIN

    write = monkeypatch.setattr
    write("launch.backends.ray_stop.write_stop_file", lambda run_dir, attempt, reason: asked.append(attempt))
    signals = StopSignals()
    assert Following(run_dir, training).until_the_end(signals, poll_s=0.01) == worker.EXIT_RUN_AGAIN
    assert asked == [1, 2]


def test_before_training_and_after_a_second_signal_nothing_is_waited_for(tmp_path):
    run_dir, forever = tmp_path / "run", threading.Event()
    signals = StopSignals()
    with signals:
        os.kill(os.getpid(), signal.SIGTERM)
        assert Following(run_dir, forever.wait).until_the_end(signals, poll_s=0.01) == 75

        following = Following(run_dir, forever.wait)
        with start_attempt(run_dir):
            threading.Timer(0.3, os.kill, (os.getpid(), signal.SIGINT)).start()
            assert following.until_the_end(signals, poll_s=0.01) == 75
    forever.set()
    assert signals.count == 2 and signal.getsignal(signal.SIGTERM) is signal.SIG_DFL
