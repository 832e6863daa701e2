"""A proxy on loopback before an emulated bucket, which spoils range requests for shards.

It stands between the client and the servers of tests/buckets.py. Everything is passed on as it is, bodies
piece by piece, but for the requests that a fault was injected into; `latency_s` delays all requests.
"""

import http.client
import json
import math
import os
import re
import select
import socket
import struct
import threading
from collections import Counter
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import unquote

import fsspec
import pytest

STATUSES = {"503": "SlowDown", "429": "TooManyRequests", "404": "NoSuchKey", "403": "AccessDenied"}
FAULTS = {
    **dict.fromkeys(STATUSES, "the status, and no object"),
    "reset": "half the body, then RST",
    "close": "half the body, then the connection ends",
    "short": "half the body, and a Content-Length that says so",
    "whole": "the Range header is ignored: 200 and the whole object",
    "elsewhere": "the range one byte aside, as Content-Range says",
    "stall": "nothing for stall_s, then the answer",
    "stall_body": "half the body, nothing for stall_s, then the rest",
}
_HOP_BY_HOP = ("connection", "keep-alive", "transfer-encoding")
_PIECE_BYTES = 1 << 16


class FaultProxy:
    """A running proxy.

    Args:
        target: URL of the server behind it.
        latency_s: delay of every request.

    Attributes:
        url: where it listens.
        stall_s: how long a stall lasts.
        ranges: of the range requests for shards, as they came.
        injected: how often each fault was met.
        body_bytes: sent in answer to range requests for shards.
        hung_up: released for every client that went away during a stall.
    """

    def __init__(self, target: str, latency_s: float = 0.0) -> None:
        self.target, self.latency_s, self.stall_s = target.removeprefix("http://"), latency_s, 30.0
        self.ranges: list[str] = []
        self.injected: Counter[str] = Counter()
        self.body_bytes = 0
        self.hung_up = threading.Semaphore(0)
        self.closing = threading.Event()
        self._lock = threading.Lock()
        self._fault, self._left = "", 0.0
        handler = type("Handler", (_Handler,), {"proxy": self})
        self._server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
        self._server.handle_error = lambda *_: None  # type: ignore[method-assign]
        self.url = f"http://127.0.0.1:{self._server.server_port}"
        threading.Thread(
            target=self._server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True
        ).start()

    def inject(self, fault: str, times: float = math.inf) -> None:
        """Spoil the next `times` range requests for shards."""
        assert fault in FAULTS
        with self._lock:
            self._fault, self._left = fault, times

    def close(self) -> None:
        self.closing.set()
        self._server.shutdown()
        self._server.server_close()

    def meet(self, method: str, path: str, range_: str | None) -> str:
        """Return the fault of a request, empty for none."""
        if method != "GET" or range_ is None or ".tar" not in unquote(path):
            return ""
        with self._lock:
            self.ranges.append(range_)
            if self._left < 1:
                return ""
            self._left -= 1
            self.injected[self._fault] += 1
            return self._fault


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True
    proxy: FaultProxy

    def forward(self) -> None:
        body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
        self.proxy.closing.wait(self.proxy.latency_s)
        fault = self.proxy.meet(self.command, self.path, self.headers.get("Range"))
        if fault in STATUSES:
            return self.refuse(fault)
        if fault == "stall":
            self.stall()
        headers = {k: v for k, v in self.headers.items() if k.lower() not in (*_HOP_BY_HOP, "host", "expect")}
        if fault == "whole":
            del headers["Range"]
        elif fault == "elsewhere":
            first, last = map(int, re.findall(r"\d+", headers["Range"]))
            aside = -1 if first else 1
            headers["Range"] = f"bytes={first + aside}-{last + aside}"
        upstream = http.client.HTTPConnection(self.proxy.target)
        try:
            upstream.request(self.command, self.path, body, headers)
            self.answer(upstream.getresponse(), fault)
        finally:
            upstream.close()

    do_GET = do_PUT = do_POST = do_PATCH = do_DELETE = do_HEAD = forward

    def answer(self, reply: http.client.HTTPResponse, fault: str) -> None:
        length, whole = reply.getheader("Content-Length"), b""
        if length is None:
            whole = reply.read()
            length = str(len(whole))
        half = int(length) // 2
        self.send_response_only(reply.status, reply.reason)
        for name, value in reply.getheaders():
            if name.lower() not in (*_HOP_BY_HOP, "content-length"):
                self.send_header(name, value)
        self.send_header("Content-Length", str(half) if fault == "short" else length)
        self.end_headers()
        if self.command == "HEAD":
            return
        if fault not in ("reset", "close", "short", "stall_body"):
            return self.send(whole) if whole else self.copy(reply, int(length))
        self.copy(reply, half)
        if fault == "reset":
            self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
            os.close(self.connection.detach())
            self.close_connection = True
        elif fault == "close":
            self.close_connection = True
        elif fault == "stall_body":
            self.stall()
            self.copy(reply, int(length) - half)

    def copy(self, reply: http.client.HTTPResponse, count: int) -> None:
        while count and (piece := reply.read(min(count, _PIECE_BYTES))):
            self.send(piece)
            count -= len(piece)

    def send(self, data: bytes) -> None:
        self.wfile.write(data)
        if self.headers.get("Range"):
            self.proxy.body_bytes += len(data)

    def refuse(self, status: str) -> None:
        code = STATUSES[status]
        body = f"<Error><Code>{code}</Code><Message>{code}</Message></Error>".encode()
        if "/storage/v1/" in self.path:
            body = json.dumps({"error": {"code": int(status), "message": code}}).encode()
        self.send_response_only(int(status))
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def stall(self) -> None:
        """Say nothing for a while, or until the client is gone."""
        readable, _, _ = select.select([self.connection], [], [], self.proxy.stall_s)
        if readable and not self.connection.recv(1, socket.MSG_PEEK):
            self.proxy.hung_up.release()

    def log_message(self, *_: object) -> None:
        pass


@pytest.fixture
def proxy(bucket_root: str, monkeypatch: pytest.MonkeyPatch) -> Iterator[FaultProxy]:
    """Put a proxy before the emulator of `bucket_root`."""
    variable = "STORAGE_EMULATOR_HOST" if bucket_root.startswith("gs") else "AWS_ENDPOINT_URL"
    kind = fsspec.get_filesystem_class(bucket_root.split("://")[0])
    proxy = FaultProxy(os.environ[variable])
    monkeypatch.setenv(variable, proxy.url)
    kind.clear_instance_cache()
    yield proxy
    kind.clear_instance_cache()
    proxy.close()
