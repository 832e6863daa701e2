"""Where notices to stop come from: the machine's cloud, a file in the run directory, a deadline.

A look is a call that returns why to stop or None, and raises when it cannot tell: a metadata server that
does not answer has not given notice.
"""

import http.client
import os
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Mapping
from enum import Enum
from pathlib import Path

from ul_scale.checkpoint.files import decode, encode, read, write_atomic

DEADLINE = "UL_SCALE_DEADLINE"
"""Environment variable: the unix time at which this process will be killed, as a job script knows it."""
CLOUDS = ("gce", "ec2")

Look = Callable[[], str | None]

# Link-local servers: a proxy would ask for its own machine's fate.
_OPENER = urllib.request.build_opener(urllib.request.ProxyHandler({}))
_REPLY_TIMEOUT_S = 2.0
_MAX_REPLY_BYTES = 4096


class Source(Enum):
    """What asked to stop; where several did, the first of this list is named."""

    SAVE_FAILED = "a save failed"
    GCE_PREEMPTED = "GCE preempts this machine"
    EC2_SPOT = "EC2 reclaims this spot instance"
    SIGTERM = "SIGTERM"
    SIGUSR1 = "SIGUSR1"
    SIGINT = "SIGINT"
    HOST = "the launcher's notice"
    GCE_MAINTENANCE = "GCE stops this machine for maintenance"
    DEADLINE = "the deadline is near"
    STOP_FILE = "ul-scale stop"


def _ask(url: str, headers: Mapping[str, str], method: str = "GET") -> str:
    """Return a metadata server's answer; every way of not answering is an ``OSError``."""
    request = urllib.request.Request(url, headers=dict(headers), method=method)
    try:
        with _OPENER.open(request, timeout=_REPLY_TIMEOUT_S) as reply:
            return reply.read(_MAX_REPLY_BYTES).decode()
    except urllib.error.HTTPError as error:
        error.close()
        raise
    except (http.client.HTTPException, UnicodeDecodeError) as error:
        raise OSError(f"{url}: {error!r}") from None


def _gce(key: str) -> str:
    host = os.environ.get("GCE_METADATA_HOST", "metadata.google.internal")
    url = f"http://{host}/computeMetadata/v1/instance/{key}?wait_for_change=false"
    return _ask(url, {"Metadata-Flavor": "Google"}).strip()


def gce_preempted() -> str | None:
    """Look whether this GCE machine is being preempted; it then has 30 s, a pod on it mostly 15 s."""
    return "instance/preempted is TRUE" if _gce("preempted") == "TRUE" else None


class GceMaintenance:
    """Looks whether GCE is about to stop this machine for maintenance, as it does those with GPUs.

    The event stands for up to an hour before the machine goes. Only its coming is a notice: a run that is
    started again on the same machine meanwhile would otherwise stop at its first step, again and again.
    """

    def __init__(self) -> None:
        self._stands_from_before: bool | None = None

    def __call__(self) -> str | None:
        event = _gce("maintenance-event")
        stands = event.startswith("TERMINATE")
        self._stands_from_before = stands and self._stands_from_before is not False
        return event if stands and not self._stands_from_before else None


class Ec2SpotAction:
    """Looks for a spot interruption notice, two minutes before it, with the tokens of IMDSv2."""

    _TOKEN_LIFE_S = 21600

    def __init__(self) -> None:
        server = os.environ.get("AWS_EC2_METADATA_SERVICE_ENDPOINT") or "http://169.254.169.254"
        self._url = server.rstrip("/") + "/latest/"
        self._token: str | None = None

    def __call__(self) -> str | None:
        try:
            return self._look()
        except urllib.error.HTTPError as error:
            if error.code != 401:
                raise
            self._token = None  # It has expired.
            return self._look()

    def _look(self) -> str | None:
        if self._token is None:
            life = {"X-aws-ec2-metadata-token-ttl-seconds": str(self._TOKEN_LIFE_S)}
            self._token = _ask(self._url + "api/token", life, "PUT")
        try:
            answer = _ask(
                self._url + "meta-data/spot/instance-action", {"X-aws-ec2-metadata-token": self._token}
            )
        except urllib.error.HTTPError as error:
            if error.code == 404:
                return None
            raise
        notice = decode(answer.encode())
        if notice.get("action") not in ("terminate", "stop", "hibernate"):
            raise OSError(f"not a spot notice: {answer!r}")
        return f"{notice['action']} at {notice.get('time')}"


def detect_cloud(dmi: Path = Path("/sys/class/dmi/id")) -> str | None:
    """Return gce or ec2 if this machine is one of theirs, from its environment and firmware: no request."""
    if "GCE_METADATA_HOST" in os.environ:
        return "gce"
    if "AWS_EC2_METADATA_SERVICE_ENDPOINT" in os.environ:
        return "ec2"
    text = ""
    for name in ("product_name", "sys_vendor", "bios_vendor"):
        try:
            text += (dmi / name).read_text()
        except (OSError, UnicodeDecodeError):
            continue
    return "gce" if "Google" in text else "ec2" if "Amazon EC2" in text else None


def cloud_looks(cloud: str | None) -> dict[Source, Look]:
    """Return what to look at on a machine of a cloud."""
    if cloud == "gce":
        return {Source.GCE_PREEMPTED: gce_preempted, Source.GCE_MAINTENANCE: GceMaintenance()}
    if cloud == "ec2":
        return {Source.EC2_SPOT: Ec2SpotAction()}
    return {}


# A request that a person left in the run directory ------------------------------------------------


def stop_file(run_dir: Path, attempt: int) -> Look:
    """Return a look at ``stop.json``: it speaks to the attempt it names and older ones, never to a rerun."""

    def look() -> str | None:
        request = decode(read(run_dir / "stop.json"))
        named = request.get("attempt")
        return str(request.get("reason")) if isinstance(named, int) and attempt <= named else None

    return look


def write_stop_file(run_dir: Path, attempt: int, reason: str) -> None:
    record = {"attempt": attempt, "reason": reason, "unix_time_s": round(time.time(), 3)}
    write_atomic(run_dir / "stop.json", encode(record))


# The deadline -------------------------------------------------------------------------------------


def find_deadline(stop_after_s: float | None) -> float | None:
    """Return when this process has to have saved, on ``time.monotonic()``'s clock, or None.

    Args:
        stop_after_s: seconds from now; the environment's deadline counts too, and the earlier one holds.

    Raises:
        ValueError: if the environment's deadline is no unix time.
    """
    deadlines = []
    if stop_after_s is not None:
        deadlines.append(time.monotonic() + stop_after_s)
    if given := os.environ.get(DEADLINE):
        if not given.isdecimal() or int(given) < 1e9:
            raise ValueError(
                f"{DEADLINE} is {given!r}; expected a unix time in seconds, such as $(date -d '+4 hours' +%s)"
            )
        deadlines.append(time.monotonic() + int(given) - time.time())
    return min(deadlines, default=None)


class Watcher:
    """Looks at all sources every so often, in one daemon thread between ``start`` and ``stop``.

    Args:
        looks: what to look at.
        poll_s: seconds between two rounds.
        report: called with each answer, in the thread.
        log: takes one line for a person, once per source that cannot be asked.
    """

    def __init__(
        self,
        looks: Mapping[Source, Look],
        poll_s: float,
        report: Callable[[Source, str | None], object],
        log: Callable[[str], object],
    ):
        self._looks, self._poll_s, self._report, self._log = looks, poll_s, report, log
        self._silent: set[Source] = set()
        self._closed = threading.Event()
        self._thread = threading.Thread(target=self._watch, name="notices", daemon=True)

    def start(self) -> None:
        if self._looks:
            self._thread.start()

    def stop(self) -> None:
        self._closed.set()
        if self._thread.is_alive():
            # A look may hang in a request; the thread then ends after it, with nobody listening.
            self._thread.join(_REPLY_TIMEOUT_S + 1)

    def _watch(self) -> None:
        while not self._closed.is_set():
            for source, look in self._looks.items():
                try:
                    answer = look()
                except Exception as error:  # Of a bucket's client too: none of them is a notice, or fatal.
                    if source not in self._silent:
                        self._log(f"cannot ask for notices ({source.value}), going on to try: {error}")
                    self._silent.add(source)
                    continue
                if not self._closed.is_set():
                    self._report(source, answer)
            self._closed.wait(self._poll_s)
