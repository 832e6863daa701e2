"""Stop requests: caught on any rank, agreed by all at the same step, acted on once."""

import multiprocessing
import os
import signal
import socket
import threading
import time
from datetime import timedelta

import pytest
import torch
import torch.distributed as dist

from ul_scale.checkpoint.attempts import start_attempt
from ul_scale.parallel.engine import Process
from ul_scale.train import notices, preemption
from ul_scale.train.host import Host
from ul_scale.train.notices import Source
from ul_scale.train.preemption import (
    DELAY_STEPS,
    Notice,
    PreemptionConfig,
    StopRequest,
    fits_notice,
    leaving_on_signals,
    notice_in_force,
    request_stop,
)

FORK = multiprocessing.get_context("fork")
ALONE = Process(rank=0, world_size=1, device=torch.device("cpu"))
GUEST = Host(takes_signals=False, ends_when_stopped=False)
QUIET = PreemptionConfig(cloud="none", poll_s=0.01)


@pytest.fixture(autouse=True)
def no_deadline_or_cloud(monkeypatch):
    for name in (notices.DEADLINE, "GCE_METADATA_HOST", "AWS_EC2_METADATA_SERVICE_ENDPOINT", "LOCAL_RANK"):
        monkeypatch.delenv(name, raising=False)


def stop_request(tmp_path, config=QUIET, process=ALONE, host=GUEST, **options):
    return StopRequest(config, process, host, run_dir=tmp_path, attempt=1, **options)


def wait_for(condition, timeout_s=20.0):
    deadline = time.monotonic() + timeout_s
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.005)


# One process --------------------------------------------------------------------------------------


def test_a_request_is_acted_on_once_and_a_new_source_again(tmp_path):
    with stop_request(tmp_path) as stop:
        assert stop.agreed() is None
        stop.request(Source.SIGTERM)
        first = stop.agreed()
        assert first.source is Source.SIGTERM and str(first) == "SIGTERM (rank 0)"
        assert stop.agreed() is None
        stop.request(Source.SAVE_FAILED, "step 40: disk full")
        assert str(stop.agreed()) == "a save failed (rank 0, step 40: disk full)"
        assert stop.agreed() is None and stop.agreed() is None


def test_of_several_sources_the_gravest_is_named(tmp_path):
    with stop_request(tmp_path) as stop:
        stop.request(Source.STOP_FILE)
        stop.request(Source.SAVE_FAILED)
        assert stop.agreed().source is Source.SAVE_FAILED
        assert stop.agreed() is None


def test_a_stop_file_is_heard_and_a_newer_attempt_is_deaf_to_it(tmp_path):
    with start_attempt(tmp_path):
        line = request_stop(tmp_path, "asked by ada")
        assert "asked attempt 1" in line and f"process {os.getpid()}" in line and "exits with 75" in line
        with stop_request(tmp_path) as stop:
            found = []
            wait_for(lambda: found.append(stop.agreed()) or found[-1])
            assert str(found[-1]) == "ul-scale stop (rank 0, asked by ada)"
    with start_attempt(tmp_path, log=str) as attempt:
        with StopRequest(QUIET, ALONE, GUEST, run_dir=tmp_path, attempt=attempt.number) as stop:
            time.sleep(0.05)
            assert stop.agreed() is None


def test_what_is_not_running_cannot_be_stopped(tmp_path):
    with pytest.raises(ValueError, match="no such run"):
        request_stop(tmp_path / "absent", "why not")
    start_attempt(tmp_path).close()
    with pytest.raises(ValueError, match="not running; its attempt 1 has ended"):
        request_stop(tmp_path, "why not")
    assert not (tmp_path / "stop.json").exists()


def test_a_host_is_asked_now_and_then_and_heard_again_after_silence(tmp_path):
    answers = [None, "node drains", "node drains", None, "node drains again"]
    asked = []

    def notice():
        asked.append(time.monotonic())
        return answers[min(len(asked), len(answers)) - 1]

    stops = []
    with stop_request(tmp_path, host=Host(takes_signals=False, notice=notice)) as stop:
        wait_for(lambda: stops.append(stop.agreed()) or len(asked) > len(answers))
    assert [str(found) for found in stops if found] == [
        "the launcher's notice (rank 0, node drains)",
        "the launcher's notice (rank 0, node drains again)",
    ]
    assert min(after - before for before, after in zip(asked, asked[1:])) >= QUIET.poll_s


def test_one_process_a_machine_asks_the_cloud_and_one_a_run_the_run_directory(tmp_path, monkeypatch):
    monkeypatch.setattr(preemption, "cloud_looks", lambda cloud: {Source.GCE_PREEMPTED: lambda: cloud})
    second_machine = Process(rank=8, world_size=1, device=torch.device("cpu"))
    notices.write_stop_file(tmp_path, 1, "not read there")
    with stop_request(tmp_path, PreemptionConfig(cloud="gce", poll_s=0.01), second_machine) as stop:
        found = []
        wait_for(lambda: found.append(stop.agreed()) or found[-1])
        time.sleep(0.03)
        assert str(found[-1]) == "GCE preempts this machine (rank 8, gce)" and stop.agreed() is None
    monkeypatch.setenv("LOCAL_RANK", "1")
    threads = threading.active_count()
    with stop_request(tmp_path, PreemptionConfig(cloud="gce"), second_machine):
        assert threading.active_count() == threads


def test_a_deadline_leaves_time_for_two_saves(tmp_path):
    now = time.monotonic()
    with stop_request(tmp_path, deadline=now + 1000) as stop:
        stop.measured_save(3.0)
        assert stop.agreed() is None
        stop.measured_save(600.0)
        stop.measured_save(3.0)
        found = stop.agreed()
    assert found.source is Source.DEADLINE and "s left" in found.detail
    with stop_request(tmp_path, PreemptionConfig(cloud="none", notice_s=30.0), deadline=now + 1000) as stop:
        stop.measured_save(600.0)  # they said how long before
        assert stop.agreed() is None
    with stop_request(tmp_path, deadline=now + 59) as stop:
        assert stop.agreed() is None
    with stop_request(tmp_path, deadline=now - 1) as stop:
        assert stop.agreed().source is Source.DEADLINE


def test_handlers_and_threads_are_as_before_afterwards(tmp_path):
    signal.signal(signal.SIGUSR1, signal.SIG_IGN)
    before = [signal.getsignal(number) for number in preemption.STOP_SIGNALS]
    threads = threading.active_count()
    for _ in range(2):
        with leaving_on_signals(75), stop_request(tmp_path, host=Host()) as stop:
            assert threading.active_count() == threads + 1
            os.kill(os.getpid(), signal.SIGUSR1)
            wait_for(lambda: stop.agreed() or stop._acted)
        assert [signal.getsignal(number) for number in preemption.STOP_SIGNALS] == before
        assert threading.active_count() == threads
    with pytest.raises(RuntimeError, match="mid-step"), stop_request(tmp_path, host=Host()):
        raise RuntimeError("mid-step")
    assert [signal.getsignal(number) for number in preemption.STOP_SIGNALS] == before
    signal.signal(signal.SIGUSR1, signal.SIG_DFL)


def test_a_guest_leaves_signals_alone(tmp_path):
    before = [signal.getsignal(number) for number in preemption.STOP_SIGNALS]
    with leaving_on_signals(75, takes_signals=False), stop_request(tmp_path):
        assert [signal.getsignal(number) for number in preemption.STOP_SIGNALS] == before


# Signals to a process of its own ------------------------------------------------------------------


def in_child(body, *arguments):
    """Start ``body(connection, *arguments)`` in a forked process; return it and our end."""
    ours, theirs = FORK.Pipe()
    process = FORK.Process(target=body, args=(theirs, *arguments), daemon=True)
    process.start()
    return process, ours


def step_until_told(connection, tmp_path, press_s):
    preemption._ONE_PRESS_S = press_s
    with stop_request(tmp_path, host=Host()) as stop:
        connection.send("ready")
        while True:
            time.sleep(0.002)
            if found := stop.agreed():
                connection.send(str(found))


def receive(connection):
    assert connection.poll(20)
    return connection.recv()


def test_signals_are_heard_and_a_second_ctrl_c_interrupts_at_once(tmp_path):
    process, connection = in_child(step_until_told, tmp_path, 0.0)
    assert receive(connection) == "ready"
    for number in (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT):
        os.kill(process.pid, number)
        assert receive(connection) == f"{number.name} (rank 0)"
    os.kill(process.pid, signal.SIGINT)
    process.join(20)
    assert process.exitcode == 1  # KeyboardInterrupt


def test_a_ctrl_c_that_torchrun_passes_on_is_one_press(tmp_path):
    process, connection = in_child(step_until_told, tmp_path, 60.0)
    assert receive(connection) == "ready"
    for _ in range(3):
        os.kill(process.pid, signal.SIGINT)
        time.sleep(0.02)
    assert receive(connection) == "SIGINT (rank 0)"
    assert process.is_alive()
    process.kill()
    process.join()


def sleep_with_nothing_to_save(connection):
    with leaving_on_signals(75):
        connection.send("ready")
        time.sleep(60)


def test_with_nothing_to_save_yet_a_signal_ends_the_process(tmp_path):
    process, connection = in_child(sleep_with_nothing_to_save)
    assert receive(connection) == "ready"
    process.terminate()
    process.join(20)
    assert process.exitcode == 75


# Several ranks ------------------------------------------------------------------------------------


def free_port():
    with socket.create_server(("127.0.0.1", 0)) as server:
        return server.getsockname()[1]


def on_three_ranks(body, *arguments):
    """Return what ``body(rank, store, *arguments)`` returned on each of three gloo processes."""
    port = free_port()

    def run(connection, rank):
        os.environ["GLOO_SOCKET_IFNAME"] = "lo"
        timeout = timedelta(seconds=30)
        store = dist.TCPStore("127.0.0.1", port, 3, is_master=rank == 0, timeout=timeout)
        dist.init_process_group("gloo", store=store, rank=rank, world_size=3, timeout=timeout)
        connection.send(body(rank, dist.PrefixStore("test", store), *arguments))
        dist.barrier()  # the store ends with rank 0
        dist.destroy_process_group()

    children = [in_child(run, rank) for rank in range(3)]
    results = [receive(connection) for _, connection in children]
    for process, _ in children:
        process.join(20)
        assert process.exitcode == 0
    return results


def ranked(rank):
    return Process(rank=rank, world_size=3, device=torch.device("cpu"))


def stops_of(stop, steps, before=lambda step: None):
    found = []
    for step in range(steps):
        before(step)
        if agreed := stop.agreed():
            found.append((step, agreed.source.name, agreed.rank))
    return found


def test_a_flag_of_one_rank_is_acted_on_by_all_at_the_same_step(tmp_path):
    def body(rank, store):
        with stop_request(tmp_path, process=ranked(rank), timeout_s=30) as stop:

            def before(step):
                if rank == 2 and step == 3:
                    stop.request(Source.EC2_SPOT)
                if rank == 1 and step == 7:
                    stop.request(Source.SIGTERM)
                if rank == 0 and step == 8:
                    stop.request(Source.EC2_SPOT)

            return stops_of(stop, 12, before)

    expected = [(3 + DELAY_STEPS, "EC2_SPOT", 2), (7 + DELAY_STEPS, "SIGTERM", 1)]
    assert on_three_ranks(body) == [expected] * 3


def test_no_step_waits_for_the_flags_of_a_slower_rank(tmp_path):
    """Ranks 0 and 2 pass ``DELAY_STEPS`` calls more before rank 1, held until they have, makes its own."""

    def body(rank, store):
        def before(step):
            if rank == 1:
                store.wait([f"{other} passed {step + DELAY_STEPS - 1}" for other in (0, 2)])

        with stop_request(tmp_path, process=ranked(rank), timeout_s=30) as stop:
            for step in range(10):
                if step < 10 - DELAY_STEPS:
                    before(step)
                stop.agreed()
                store.set(f"{rank} passed {step}", "")
        return "done"

    assert on_three_ranks(body) == ["done"] * 3


def test_a_host_is_asked_by_all_ranks_at_the_same_steps(tmp_path):
    def body(rank, store):
        step, asked = 0, []

        def notice():
            asked.append(step)
            return "the node of rank 2 drains" if rank == 2 and len(asked) > 1 else None

        host = Host(takes_signals=False, notice=notice)
        found = []
        with stop_request(tmp_path, process=ranked(rank), host=host, timeout_s=30) as stop:
            while step < 200 and not found:
                time.sleep(0.002 * rank)
                if agreed := stop.agreed():
                    found.append((step, agreed.source.name, agreed.rank))
                step += 1
        return asked, found

    results = on_three_ranks(body)
    assert results[0] == results[1] == results[2]
    asked, found = results[0]
    # Heard at a step, a flag goes out with the next one's.
    assert found == [(asked[1] + 1 + DELAY_STEPS, "HOST", 2)]


def test_a_deadline_stops_all_ranks_together(tmp_path):
    def body(rank, store):
        deadline = time.monotonic() + 0.4 if rank == 1 else None
        found = []
        with stop_request(tmp_path, process=ranked(rank), deadline=deadline, timeout_s=30) as stop:
            for step in range(100_000):
                if agreed := stop.agreed():
                    found.append((step, agreed.source.name, agreed.rank))
                    break
        return found

    results = on_three_ranks(body)
    assert results[0] == results[1] == results[2] and results[0][0][1:] == ("DEADLINE", 1)


# What is said of it -------------------------------------------------------------------------------


def test_the_line_on_whether_a_save_fits():
    gce = Notice(30.0, "GCE", late_s=5.0)
    assert fits_notice(gce, 4.2, 200, 0.415) == (
        "save 4.2 s (measured), notice 30 s (GCE), at risk 200 steps (83 s) of work between saves"
    )
    assert fits_notice(gce, None, 200, None) == (
        "save not measured yet, notice 30 s (GCE), at risk 200 steps of work between saves"
    )
    assert "WARNING" not in fits_notice(gce, 21.9, 200, 1.0)
    assert "WARNING: the save, begun up to 8.0 s after the notice" in fits_notice(gce, 22.1, 200, 1.0)


def test_the_notice_in_force(monkeypatch):
    monkeypatch.delenv("KUBERNETES_SERVICE_HOST", raising=False)
    assert notice_in_force(PreemptionConfig(cloud="none")) == Notice(30.0, "SIGTERM")
    assert notice_in_force(PreemptionConfig(cloud="ec2")) == Notice(120.0, "EC2", 5.0)
    assert notice_in_force(PreemptionConfig(cloud="gce")).seconds == 30
    monkeypatch.setenv("KUBERNETES_SERVICE_HOST", "10.0.0.1")
    assert notice_in_force(PreemptionConfig(cloud="gce", poll_s=2.0)) == Notice(15.0, "GCE pod", 2.0)
    assert notice_in_force(PreemptionConfig(cloud="gce", notice_s=90.0)).seconds == 90


@pytest.mark.parametrize(
    ("field", "value"), [("cloud", "azure"), ("poll_s", 0.0), ("stop_after_s", -1.0), ("notice_s", 0.0)]
)
def test_a_bad_setting_is_named(field, value):
    with pytest.raises(ValueError, match=f"preemption.{field} is {value!r}"):
        PreemptionConfig(**{field: value})
