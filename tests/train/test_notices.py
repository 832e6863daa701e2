"""The clouds' metadata servers, played on loopback; deadlines; requests left in a run directory."""

import contextlib
import json
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest

from ul_scale.train import notices
from ul_scale.train.notices import Ec2SpotAction, GceMaintenance, Source, Watcher, gce_preempted

GCE = "/computeMetadata/v1/instance/"
SPOT_ACTION = "/latest/meta-data/spot/instance-action"
NOTICE = json.dumps({"action": "terminate", "time": "2026-11-21T08:22:00Z"})


class MetadataServer:
    """Answers as the two clouds' servers do: on GCE to those who name its flavor, on EC2 for a token.

    ``answers`` maps a path to a status and a body; ``delay_s`` comes before each.
    """

    def __init__(self):
        self.answers = {GCE + "preempted": (200, "FALSE"), GCE + "maintenance-event": (200, "NONE")}
        self.delay_s, self.tokens, self.seen = 0.0, 0, []
        server = self

        class Handler(BaseHTTPRequestHandler):
            def do_PUT(self):
                life = self.headers.get("X-aws-ec2-metadata-token-ttl-seconds", "")
                if self.path != "/latest/api/token" or not life.isdecimal():
                    return self.reply(400, "")
                server.tokens += 1
                self.reply(200, f"token-{server.tokens}")

            def do_GET(self):
                path = self.path.partition("?")[0]
                server.seen.append(self.path)
                time.sleep(server.delay_s)
                if path.startswith(GCE) and self.headers.get("Metadata-Flavor") != "Google":
                    return self.reply(403, "")
                token = self.headers.get("X-aws-ec2-metadata-token")
                if path.startswith("/latest/") and token != f"token-{server.tokens}":
                    return self.reply(401, "")
                self.reply(*server.answers.get(path, (404, "not found")))

            def reply(self, status, body):
                data = body if isinstance(body, bytes) else body.encode()
                with contextlib.suppress(ConnectionError):  # Whoever asked may have gone.
                    if status is not None:
                        self.send_response(status)
                        self.send_header("Content-Length", str(len(data)))
                        self.end_headers()
                    self.wfile.write(data)

            def log_message(self, *_):
                pass

        self.http = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.address = f"127.0.0.1:{self.http.server_port}"


@pytest.fixture
def server(monkeypatch):
    played = MetadataServer()
    thread = threading.Thread(target=played.http.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    monkeypatch.setenv("GCE_METADATA_HOST", played.address)
    monkeypatch.setenv("AWS_EC2_METADATA_SERVICE_ENDPOINT", f"http://{played.address}/")
    monkeypatch.setenv("http_proxy", "http://127.0.0.1:9")  # where nobody listens: it must not be asked
    monkeypatch.setattr(notices, "_REPLY_TIMEOUT_S", 0.3)
    yield played
    played.http.shutdown()
    thread.join()
    played.http.server_close()


def test_gce_preemption_is_seen_once_it_is_true(server):
    assert gce_preempted() is None
    server.answers[GCE + "preempted"] = (200, "TRUE\n")
    assert gce_preempted() is not None
    assert server.seen[-1] == GCE + "preempted?wait_for_change=false"


def test_gce_maintenance_is_a_notice_when_it_comes_and_not_when_it_stood_before(server):
    event = GCE + "maintenance-event"
    look = GceMaintenance()
    assert look() is None
    server.answers[event] = (200, "MIGRATE_ON_HOST_MAINTENANCE")
    assert look() is None
    server.answers[event] = (200, "TERMINATE_ON_HOST_MAINTENANCE")
    assert look() == look() == "TERMINATE_ON_HOST_MAINTENANCE"

    after_a_restart = GceMaintenance()
    assert after_a_restart() is None and after_a_restart() is None
    server.answers[event] = (200, "NONE")
    assert after_a_restart() is None and look() is None
    server.answers[event] = (200, "TERMINATE_ON_HOST_MAINTENANCE")
    assert after_a_restart() is not None and look() is not None


@pytest.mark.parametrize("action", ["terminate", "stop", "hibernate"])
def test_an_ec2_spot_action_is_asked_for_with_a_token(server, action):
    look = Ec2SpotAction()
    assert look() is None and look() is None
    assert server.tokens == 1
    server.answers[SPOT_ACTION] = (200, json.dumps({"action": action, "time": "2026-11-21T08:22:00Z"}))
    assert look() == f"{action} at 2026-11-21T08:22:00Z"


def test_an_expired_ec2_token_is_replaced(server):
    look = Ec2SpotAction()
    look()
    server.tokens += 1  # the server knows only its newest token
    server.answers[SPOT_ACTION] = (200, NOTICE)
    assert look() is not None
    assert server.tokens == 3


@pytest.mark.parametrize(
    ("status", "body"),
    [(503, "busy"), (200, "<html>TRUE</html>"), (200, '{"action": 1}'), (200, b"\xff\xfe"), (None, b"?\r\n")],
    ids=["503", "html", "json", "bytes", "no HTTP"],
)
def test_bad_answers_are_neither_notices_nor_anything_but_os_errors(server, status, body):
    for path in (GCE + "preempted", GCE + "maintenance-event", SPOT_ACTION):
        server.answers[path] = (status, body)
    for look in (gce_preempted, GceMaintenance(), Ec2SpotAction()):
        try:
            assert look() is None
        except OSError:
            pass


def test_a_slow_or_absent_server_is_given_up_soon(server, monkeypatch):
    server.answers[GCE + "preempted"] = (200, "TRUE")
    server.delay_s = 0.6
    started = time.monotonic()
    with pytest.raises(OSError):
        gce_preempted()
    assert time.monotonic() - started < 0.6
    monkeypatch.setenv("GCE_METADATA_HOST", "127.0.0.1:9")
    with pytest.raises(OSError):
        gce_preempted()


def watch(looks, poll_s=0.01):
    """Return a started watcher, what it reported, a condition that tells of more, and what it logged."""
    reports, lines, news = [], [], threading.Condition()

    def report(source, answer):
        with news:
            reports.append((source, answer))
            news.notify()

    watcher = Watcher(looks, poll_s, report, lines.append)
    watcher.start()
    return watcher, reports, news, lines


def test_the_watcher_outlives_errors_and_keeps_what_it_knew(server):
    def of_no_known_kind():
        raise RuntimeError("a bucket's client")

    looks = {Source.STOP_FILE: of_no_known_kind} | notices.cloud_looks("gce")
    server.answers[GCE + "preempted"] = (503, "")
    watcher, reports, news, lines = watch(looks)
    with news:
        assert news.wait_for(lambda: len(reports) >= 3, 5)
    assert {source for source, _ in reports} == {Source.GCE_MAINTENANCE}
    server.answers[GCE + "preempted"] = (200, "TRUE")
    with news:
        assert news.wait_for(lambda: any(source is Source.GCE_PREEMPTED for source, _ in reports), 5)
    watcher.stop()
    # One line for each that could not be asked, however often.
    assert len(lines) == 2 and "bucket" in lines[0] and "503" in lines[1]
    count = len(reports)
    time.sleep(0.05)
    assert len(reports) == count
    assert "notices" not in {thread.name for thread in threading.enumerate()}


def test_without_anything_to_look_at_there_is_no_thread():
    before = threading.active_count()
    watcher, *_ = watch({})
    assert threading.active_count() == before
    watcher.stop()


@pytest.mark.parametrize(
    ("files", "cloud"),
    [
        ({"product_name": "Google Compute Engine\n", "sys_vendor": "Google\n"}, "gce"),
        ({"product_name": "p5.48xlarge\n", "sys_vendor": "Amazon EC2\n"}, "ec2"),
        ({"product_name": "HVM domU\n", "sys_vendor": "Xen\n", "bios_vendor": "Amazon EC2"}, "ec2"),
        ({"product_name": "PowerEdge R7525\n", "sys_vendor": "Dell Inc.\n"}, None),
        ({}, None),
    ],
)
def test_the_cloud_is_read_off_the_firmware(tmp_path, monkeypatch, files, cloud):
    monkeypatch.delenv("GCE_METADATA_HOST", raising=False)
    monkeypatch.delenv("AWS_EC2_METADATA_SERVICE_ENDPOINT", raising=False)
    for name, text in files.items():
        (tmp_path / name).write_text(text)
    assert notices.detect_cloud(tmp_path) == cloud


def test_the_earlier_deadline_holds(monkeypatch):
    monkeypatch.delenv(notices.DEADLINE, raising=False)
    assert notices.find_deadline(None) is None
    assert notices.find_deadline(50.0) - time.monotonic() == pytest.approx(50, abs=1)
    monkeypatch.setenv(notices.DEADLINE, str(int(time.time()) + 30))
    assert notices.find_deadline(None) - time.monotonic() == pytest.approx(30, abs=2)
    assert notices.find_deadline(10.0) - time.monotonic() == pytest.approx(10, abs=1)
    assert notices.find_deadline(50.0) - time.monotonic() == pytest.approx(30, abs=2)


@pytest.mark.parametrize("given", ["soon", "14400", "2026-11-21", "nan"])
def test_a_deadline_that_is_no_unix_time_is_refused(monkeypatch, given):
    monkeypatch.setenv(notices.DEADLINE, given)
    with pytest.raises(ValueError, match=f"UL_SCALE_DEADLINE is '{given}'; expected a unix time"):
        notices.find_deadline(None)


def test_a_stop_file_speaks_to_its_attempt_and_older_ones(tmp_path):
    looks = [notices.stop_file(tmp_path, attempt) for attempt in (1, 2, 3)]
    assert [look() for look in looks] == [None, None, None]
    notices.write_stop_file(tmp_path, 2, "maintenance at noon")
    assert [look() for look in looks] == ["maintenance at noon", "maintenance at noon", None]


@pytest.mark.parametrize("content", ["", "{", "[]", '{"attempt": "3"}', '{"reason": "me"}'])
def test_a_torn_stop_file_is_no_request(tmp_path, content):
    (tmp_path / "stop.json").write_text(content)
    assert notices.stop_file(tmp_path, 1)() is None
