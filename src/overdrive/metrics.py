"""The numbers of a service, for Prometheus and for OpenTelemetry: what the parts have counted, read when asked for.

Names are those of OpenTelemetry's semantic conventions where there are any
(https://opentelemetry.io/docs/specs/semconv/db/database-metrics/), and `overdrive.*` otherwise; for Prometheus they are
spelled by the rules of its compatibility specification. Attributes take few values: routes are named by templates.
"""

from __future__ import annotations

import asyncio
import fcntl
import os
import shutil
import sys
import tempfile
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping
from hashlib import blake2b
from multiprocessing import current_process, parent_process
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, NamedTuple, TypeAlias, get_args

from fastapi import APIRouter, Request, Response
from sqlalchemy.pool import QueuePool

from .cache.store import PushMode
from .errors import ConfigurationError
from .instrumentation.numbers import BOUNDS, Histogram
from .log.handler import LogHandler
from .pages import served
from .pool.pool import FairPool

if TYPE_CHECKING:
    from opentelemetry.metrics import CallbackOptions, MeterProvider, Observation

    from .cache.cache import Cache

Kind: TypeAlias = Literal["counter", "gauge", "histogram"]

#: Seconds between two times at which a process writes down what it has counted, for the others to read.
_INTERVAL = 1.0

#: Bytes of a new file, which grows if that is not enough.
_ROOM = 1 << 16


# What is read


class Metric(NamedTuple):
    """What a number is.

    unit: in UCUM, as in the conventions: "s", "By", or in braces what is counted.
    """

    kind: Kind
    unit: str
    help: str


class Reading(NamedTuple):
    """One number, or one histogram, at this moment; its metric is found by its name."""

    name: str
    attributes: Mapping[str, str]
    value: float | Histogram


_POOL = "db.client.connection."

METRICS = {
    "db.client.connection.count": Metric("gauge", "{connection}", "Connections, by their state."),
    "db.client.connection.idle.max": Metric("gauge", "{connection}", "Connections that are kept open."),
    "db.client.connection.max": Metric("gauge", "{connection}", "Connections there may be."),
    "db.client.connection.pending_requests": Metric("gauge", "{request}", "Checkouts that wait."),
    "db.client.connection.timeouts": Metric("counter", "{timeout}", "Checkouts that were refused a connection."),
    "db.client.connection.create_time": Metric("histogram", "s", "Time to open a connection."),
    "db.client.connection.wait_time": Metric("histogram", "s", "Time to get a connection from the pool."),
    "db.client.connection.use_time": Metric("histogram", "s", "Time from a checkout to its return."),
    "overdrive.pool.failures": Metric("counter", "{failure}", "Attempts to connect that failed."),
    "overdrive.cache.hits": Metric("counter", "{request}", "Requests answered from the cache, by where."),
    "overdrive.cache.misses": Metric("counter", "{request}", "Requests the cache had no valid answer for, by why."),
    "overdrive.cache.bypassed": Metric("counter", "{request}", "Requests the cache took no part in, by why."),
    "overdrive.cache.stores": Metric("counter", "{response}", "Responses that were kept."),
    "overdrive.cache.stored": Metric("counter", "By", "Bodies that were kept."),
    "overdrive.cache.refused": Metric("counter", "{response}", "Responses not kept, as what they read was written."),
    "overdrive.cache.checked": Metric("counter", "{response}", "Responses compared with what was kept."),
    "overdrive.cache.mismatches": Metric("counter", "{response}", "Comparisons that found a difference."),
    "overdrive.cache.entries": Metric("gauge", "{entry}", "Entries in the process."),
    "overdrive.cache.memory": Metric("gauge", "By", "Memory that entries in the process take."),
    "overdrive.cache.evictions": Metric("counter", "{entry}", "Entries in the process that made room for others."),
    "overdrive.cache.tags": Metric("gauge", "{tag}", "Tags whose last write is remembered in the process."),
    "overdrive.cache.suspended": Metric("gauge", "{process}", "Caches left alone until a write can be announced."),
    "overdrive.cache.push": Metric("gauge", "{process}", "Processes, by how they hear of what others write."),
    "overdrive.cache.push_lag": Metric("histogram", "s", "Time from a write's mark to when a process is told of it."),
    "overdrive.cache.redis.trips": Metric("counter", "{command}", "Commands sent to Redis."),
    "overdrive.cache.redis.answered": Metric("counter", "{lookup}", "Look-ups that Redis has answered."),
    "overdrive.cache.redis.unreadable": Metric("counter", "{entry}", "Entries damaged, or another release's."),
    "overdrive.cache.redis.full": Metric("counter", "{entry}", "Entries Redis had no memory for."),
    "overdrive.cache.redis.opened": Metric("counter", "{time}", "Times Redis was found to be away."),
    "overdrive.admission.limit": Metric("gauge", "{request}", "Requests that may have a connection at once."),
    "overdrive.admission.inflight": Metric("gauge", "{request}", "Requests that were admitted and are not done."),
    "overdrive.admission.queued": Metric("gauge", "{request}", "Requests that wait to be admitted."),
    "overdrive.admission.admitted": Metric("counter", "{request}", "Requests that were admitted."),
    **{
        f"overdrive.admission.refused_{why}": Metric("counter", "{request}", f"Requests not admitted: {text}.")
        for why, text in (
            ("wait", "it would have been too long"),
            ("deadline", "its own time would have run out"),
            ("full", "too many waited"),
            ("late", "it had been too long"),
            ("left", "the client had hung up"),
        )
    },
    "overdrive.pages": Metric("counter", "{page}", "Pages, by their style."),
    "overdrive.log.emitted": Metric("counter", "{line}", "Lines that were logged."),
    "overdrive.log.written": Metric("counter", "{line}", "Lines that were written."),
    "overdrive.log.pending": Metric("gauge", "{line}", "Lines that wait to be written."),
    "overdrive.log.sampled": Metric("counter", "{line}", "Lines let go on purpose, by level."),
    "overdrive.log.dropped": Metric("counter", "{line}", "Lines that were lost, by level."),
}


def of_pool(name: str, pool: Any) -> Iterator[Reading]:
    """Read the pool of an engine of this name."""
    own = {f"{_POOL}pool.name": name}
    if isinstance(pool, FairPool):
        now = pool.statistics
        states = {"used": now.used, "idle": now.idle, "connecting": now.connecting, "closing": now.closing}
        yield Reading(f"{_POOL}max", own, now.max)
        yield Reading(f"{_POOL}pending_requests", own, now.pending_requests)
        yield Reading(f"{_POOL}timeouts", own, now.timeouts)
        yield Reading(f"{_POOL}create_time", own, pool.create_time)
        yield Reading(f"{_POOL}wait_time", own, pool.wait_time)
        yield Reading(f"{_POOL}use_time", own, pool.use_time)
        yield Reading("overdrive.pool.failures", own, now.failures)
    elif isinstance(pool, QueuePool):
        states = {"used": pool.checkedout(), "idle": pool.checkedin()}
    else:
        return
    yield Reading(f"{_POOL}idle.max", own, pool.size())
    for state, count in states.items():
        yield Reading(f"{_POOL}count", {**own, f"{_POOL}state": state}, count)


_STAGES = {"at_once": "before_fastapi", "early": "before_routing", "late": "after_dependencies"}
_OF_ROUTES = {
    "stores": "stores",
    "bytes": "stored",
    "refused": "refused",
    "checked": "checked",
    "mismatches": "mismatches",
}


def of_cache(cache: Cache) -> Iterator[Reading]:
    """Read a cache: its routes and its store."""
    for route, trust in cache.ledger.routes.items():
        method, _, template = route.rpartition(" ")
        own = {"http.request.method": method, "http.route": template}
        counts = trust.counts()
        for name, stage in _STAGES.items():
            yield Reading("overdrive.cache.hits", {**own, "stage": stage}, counts[name])
        yield Reading("overdrive.cache.misses", {**own, "reason": "absent"}, counts["misses"] - counts["stale"])
        yield Reading("overdrive.cache.misses", {**own, "reason": "stale"}, counts["stale"])
        # OpenTelemetry reads in a thread, while requests are counted.
        for reason, count in list(trust.bypassed.items()):
            yield Reading("overdrive.cache.bypassed", {**own, "reason": reason}, count)
        for name, called in _OF_ROUTES.items():
            yield Reading(f"overdrive.cache.{called}", own, counts[name])
    for name, count in cache.store.statistics().items():
        yield Reading(f"overdrive.cache.{name}", {}, count)
    if (push := cache.store.push()) is not None:
        for mode in get_args(PushMode):
            yield Reading("overdrive.cache.push", {"mode": mode}, int(push.mode == mode))
        yield Reading("overdrive.cache.push_lag", {}, push.lag)
    yield Reading("overdrive.cache.suspended", {}, int(cache.invalidator.is_behind))


def of_pages() -> Iterator[Reading]:
    """Read how many pages this process has begun."""
    for style, count in served.items():
        yield Reading("overdrive.pages", {"style": style}, count)


def of_log(handlers: Iterable[LogHandler]) -> Iterator[Reading]:
    """Read the ledger of all handlers together: emitted = written + sampled + dropped + pending."""
    every = [handler.stats for handler in handlers]
    for name in ("emitted", "written", "pending"):
        yield Reading(f"overdrive.log.{name}", {}, sum(getattr(stats, name) for stats in every))
    for name in ("sampled", "dropped"):
        levels = Counter[str]()
        for stats in every:
            levels.update(getattr(stats, name))
        for level, count in levels.items():
            yield Reading(f"overdrive.log.{name}", {"level": level}, count)


def of_source(source: str, numbers: Mapping[str, Any]) -> Iterator[Reading]:
    """Read a part of which no more is known than its numbers' names, or those of each of several things by its name."""
    for name, value in numbers.items():
        if isinstance(value, Mapping):
            for each, number in value.items():
                yield Reading(f"overdrive.{source}.{each}", {"name": name}, number)
        else:
            yield Reading(f"overdrive.{source}.{name}", {}, value)


def metric_of(name: str) -> Metric:
    """Return what the number of this name is; what ends in `_total` only grows."""
    return METRICS.get(name) or Metric("counter" if name.endswith("_total") else "gauge", "", f"{name}.")


# Prometheus

_SUFFIXES = {"s": "_seconds", "By": "_bytes"}


def prometheus_name(name: str) -> str:
    """Return the name of a family of Prometheus: https://opentelemetry.io/docs/specs/otel/compatibility/."""
    return name.removesuffix("_total").replace(".", "_") + _SUFFIXES.get(metric_of(name).unit, "")


class Exporter:
    """The metrics of all processes of one server, in files of a directory that they share.

    The files are those of prometheus_client's multiprocess mode, and it sums them up. Each process has a place of
    its own there, with a lock on it while it lives. Whoever takes the place of one that has died counts on from its
    numbers, so that none is lost, and there are never more places than there were processes at once.

    read: reads this process' numbers.
    """

    def __init__(self, read: Callable[[], Iterable[Reading]]) -> None:
        try:
            from prometheus_client import CollectorRegistry, exposition
            from prometheus_client.mmap_dict import MmapedDict, mmap_key
            from prometheus_client.multiprocess import MultiProcessCollector
        except ImportError:
            raise ConfigurationError(
                "metrics need prometheus_client, which is missing: pip install 'overdrive[metrics]'"
            ) from None
        self._read = read
        self._map: Any = MmapedDict
        self._key: Any = mmap_key
        self._collector: Any = MultiProcessCollector
        self._registry, self._encoder = CollectorRegistry, exposition.choose_encoder
        self._lock: int | None = None
        self._begin()
        os.register_at_fork(after_in_child=self._begin)

    def _begin(self) -> None:
        if self._lock is not None:
            # A fork shares it with its parent, and would keep it beyond its parent's life.
            os.close(self._lock)
            self._lock = None
        self._directory: Path | None = None
        self._place = ""
        self._files: dict[Kind, Any] = {}
        #: What those have counted who had this place before.
        self._before: dict[str, float] = {}
        self._timer: asyncio.TimerHandle | None = None

    def router(self) -> APIRouter:
        """Return what answers `GET /metrics`."""
        router = APIRouter()

        @router.get("/metrics", include_in_schema=False)
        async def metrics(request: Request) -> Response:
            encode, content_type = self._encoder(request.headers.get("accept", ""))
            return Response(encode(self.collected()), headers={"content-type": content_type})

        return router

    def collected(self) -> Any:
        """Return a registry with the numbers of all processes: this one's of now, the others' of their last second."""
        self.write()
        assert self._directory is not None
        self._bury(self._directory)
        registry = self._registry()
        self._collector(registry, path=str(self._directory))
        return registry

    def keep_writing(self) -> None:
        """Write down what was counted from time to time, for as long as the running loop lives."""
        self.write()
        self._timer = asyncio.get_running_loop().call_later(_INTERVAL, self.keep_writing)

    def write(self) -> None:
        """Write down what this process has counted."""
        if self._directory is None:
            self._take_place()
        for name, attributes, value in self._read():
            metric, family = metric_of(name), prometheus_name(name)
            labels = {key.replace(".", "_"): each for key, each in attributes.items()}
            if isinstance(value, Histogram):
                for bound, count in zip((*map(str, BOUNDS), "+Inf"), value.counts, strict=True):
                    self._put(metric, family, f"{family}_bucket", {**labels, "le": bound}, count)
                self._put(metric, family, f"{family}_sum", labels, value.sum)
            else:
                self._put(metric, family, f"{family}_total" if metric.kind == "counter" else family, labels, value)

    def _put(self, metric: Metric, family: str, name: str, labels: dict[str, str], value: float) -> None:
        key = self._key(family, name, list(labels), list(labels.values()), metric.help)
        before = 0.0 if metric.kind == "gauge" else self._before.get(key, 0.0)
        self._files[metric.kind].write_value(key, before + value, 0.0)

    def _take_place(self) -> None:
        directory = _directory()
        directory.mkdir(mode=0o700, parents=True, exist_ok=True)
        number = 0
        while (lock := _locked(directory / f"overdrive-{number}.lock")) is None:
            number += 1
        self._directory, self._place, self._lock = directory, f"overdrive-{number}", lock
        self._gauges(self._place).unlink(missing_ok=True)
        names: dict[Kind, str] = {
            "counter": f"counter_{self._place}.db",
            "gauge": self._gauges(self._place).name,
            "histogram": f"histogram_{self._place}.db",
        }
        self._files = {kind: self._opened(directory / name) for kind, name in names.items()}
        self._before = {
            key: value for kind in self._files for key, value, _ in self._files[kind].read_all_values() if value
        }

    def _opened(self, path: Path) -> Any:
        if not path.exists():
            # Who scrapes just now could not read one that is empty.
            new = path.with_suffix(".new")
            new.write_bytes(bytes(_ROOM))
            new.rename(path)
        return self._map(str(path))

    def _gauges(self, place: str) -> Path:
        assert self._directory is not None
        return self._directory / f"gauge_livesum_{place}.db"

    def _bury(self, directory: Path) -> int:
        """Take away the gauges of processes that are gone; return how many are left besides this one."""
        left = 0
        for path in directory.glob("overdrive-*.lock"):
            if path.stem == self._place:
                continue
            if (lock := _locked(path)) is None:
                left += 1
            else:
                self._gauges(path.stem).unlink(missing_ok=True)
                os.close(lock)
        return left

    def close(self) -> None:
        """Write down the last numbers and give the place back; the last process takes the directory along."""
        if self._timer is not None:
            self._timer.cancel()
        if (directory := self._directory) is None or self._lock is None:
            return
        self.write()
        for each in self._files.values():
            each.close()
        self._gauges(self._place).unlink(missing_ok=True)
        if not self._bury(directory) and "PROMETHEUS_MULTIPROC_DIR" not in os.environ:
            shutil.rmtree(directory, ignore_errors=True)
        self._begin()


def _locked(path: Path) -> int | None:
    """Return a descriptor that has a lock on a file; None where another process has it."""
    descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        os.close(descriptor)
        return None
    return descriptor


def _directory() -> Path:
    """Return where the processes of this server, and no other's, write.

    What `multiprocessing` starts, as uvicorn does its workers, has a secret in common; what gunicorn forks, its parent.
    """
    if (given := os.environ.get("PROMETHEUS_MULTIPROC_DIR")) is not None:
        return Path(given)
    if parent_process() is not None:
        server = blake2b(current_process().authkey, digest_size=12, person=b"overdrive.metric").hexdigest()
    else:
        server = f"of-{os.getppid()}" if "gunicorn.arbiter" in sys.modules else str(os.getpid())
    return Path(tempfile.gettempdir()) / f"overdrive-metrics-{os.getuid()}-{server}"


# OpenTelemetry


def instrument(read: Callable[[], Iterable[Reading]], meter_provider: MeterProvider | None) -> None:
    """Have a meter read each metric when it exports.

    It has no instrument that reads a histogram: of those it gets two counters, `.count` and `.sum`.

    meter_provider: left out, the global one.
    """
    try:
        from opentelemetry.metrics import Observation, get_meter
    except ImportError:
        raise ConfigurationError(
            "instruments need opentelemetry-api, which is missing: pip install opentelemetry-api"
        ) from None
    meter = get_meter("overdrive", meter_provider=meter_provider)

    def observing(name: str, value_of: Callable[[Any], float]) -> list[Callable[[CallbackOptions], list[Observation]]]:
        def observe(_options: CallbackOptions) -> list[Observation]:
            return [Observation(value_of(each.value), each.attributes) for each in read() if each.name == name]

        return [observe]

    for name in dict.fromkeys([*METRICS, *(each.name for each in read())]):
        kind, unit, text = metric_of(name)
        if kind == "gauge":
            meter.create_observable_up_down_counter(name, observing(name, _itself), unit, text)
        elif kind == "counter":
            meter.create_observable_counter(name, observing(name, _itself), unit, text)
        else:
            meter.create_observable_counter(f"{name}.count", observing(name, _count), "{time}", text)
            meter.create_observable_counter(f"{name}.sum", observing(name, _sum), unit, text)


def _itself(value: float) -> float:
    return value


def _count(histogram: Histogram) -> int:
    return sum(histogram.counts)


def _sum(histogram: Histogram) -> float:
    return histogram.sum
