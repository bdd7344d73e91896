"""S3 in virtual time: latencies, prices, 503s, lost answers, repeated and late effects, Last-Modified; counts dollars.

Strongly consistent, as S3 is: a write takes effect at one moment between request and answer, a read (a page of a LIST)
sees all that took effect before it. A GET is answered from the moment it was sent, so what a process reads is up to one
latency older than it could be, never newer.

Latencies are log-normal: medians and tails that S3 users report in public, a model and no measurement. Prices are AWS's
list prices of S3 Standard in us-east-1.
"""

from __future__ import annotations

import math
from bisect import bisect_left, bisect_right, insort
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from heapq import merge
from itertools import islice
from typing import Literal

import numpy as np
from greenlet import getcurrent

from lmcache_s3.errors import Missing, Unavailable, Unusable
from lmcache_s3.testing.virtual import Simulation
from lmcache_s3.types import Buffer, ObjectInfo, Outcome

Verb = Literal["get", "put", "delete", "list"]
"""A create is a put."""

_BLOCK = 4096
_PAGE = 1000
_Z99 = 2.3263478740408408
"""The normal distribution's 99th percentile."""


@dataclass(frozen=True, slots=True)
class Latency:
    """Log-normal seconds by median and 99th percentile."""

    median_s: float
    p99_s: float

    def draw(self, rng: np.random.Generator, n: int) -> list[float]:
        if self.median_s == 0:
            return [0.0] * n
        sigma = math.log(self.p99_s / self.median_s) / _Z99
        drawn: list[float] = rng.lognormal(math.log(self.median_s), sigma, n).tolist()
        return drawn


S3_LATENCIES: Mapping[Verb, Latency] = {
    "get": Latency(0.020, 0.120),
    "put": Latency(0.040, 0.200),
    "delete": Latency(0.030, 0.150),
    "list": Latency(0.060, 0.300),
}


@dataclass(frozen=True, slots=True)
class Prices:
    """Dollars per request."""

    get: float = 0.4e-6
    put: float = 5e-6
    list: float = 5e-6
    delete: float = 0.0


@dataclass(slots=True)
class Requests:
    """How many were sent. Refused ones count, and cost here, though S3 does not charge for a 503."""

    get: int = 0
    put: int = 0
    create: int = 0
    delete: int = 0
    list: int = 0

    def dollars(self, prices: Prices) -> float:
        puts = self.put + self.create
        return self.get * prices.get + puts * prices.put + self.list * prices.list + self.delete * prices.delete

    def __add__(self, other: Requests) -> Requests:
        return self._each(other, 1)

    def __sub__(self, other: Requests) -> Requests:
        return self._each(other, -1)

    def _each(self, other: Requests, sign: int) -> Requests:
        return Requests(*(getattr(self, f) + sign * getattr(other, f) for f in Requests.__slots__))


@dataclass(frozen=True, slots=True)
class Misbehaviour:
    """Shares of requests. throttled: answered 503, without effect. lost: carried out, but the answer is lost. late: no
    answer; a write is carried out later. repeated: a write is answered, and carried out once more later. Reads know
    `throttled` and `lost` only. no_answer_s: until the client gives up. latest_s: how much later at most.
    """

    throttled: float = 0.0
    lost: float = 0.0
    late: float = 0.0
    repeated: float = 0.0
    no_answer_s: float = 5.0
    latest_s: float = 7200.0

    @property
    def total(self) -> float:
        return self.throttled + self.lost + self.late + self.repeated


class SimulatedS3:
    """The bucket. `client(name)` gives an `ObjectStore` for one instance, with counters of its own.

    injected: misbehaviour so far, by kind. epoch_s: Unix seconds at virtual time 0. attempts: that the client library
    makes of anything but a create (ours makes three), with pauses of up to 1, 2, … seconds.
    """

    def __init__(
        self,
        simulation: Simulation,
        *,
        latencies: Mapping[Verb, Latency] = S3_LATENCIES,
        misbehaviour: Misbehaviour = Misbehaviour(),
        prices: Prices = Prices(),
        epoch_s: float = 1.8e9,
        attempts: int = 1,
    ) -> None:
        self.simulation, self.prices, self.epoch_s = simulation, prices, epoch_s
        self.misbehaviour, self.attempts = misbehaviour, attempts
        self.injected: Counter[str] = Counter()
        self.objects: dict[str, bytes] = {}
        self.modified_s: dict[str, float] = {}
        self.clients: dict[str, SimulatedClient] = {}
        self._directories: dict[str, list[str]] = {}
        self._latencies = latencies
        self._rng = np.random.default_rng([simulation.seed, 53])
        self._drawn: dict[Verb, list[float]] = {verb: [] for verb in latencies}
        self._uniforms: list[float] = []
        self.until_fault = 0
        """Requests until the next one that misbehaves."""
        self._next_fault()

    def client(self, name: str) -> SimulatedClient:
        """The instance's store; the same one each time."""
        if name not in self.clients:
            self.clients[name] = SimulatedClient(self)
        return self.clients[name]

    def adopt(self, other: SimulatedS3) -> None:
        """Hold what the other bucket holds now: to look at it once its simulation is over."""
        self.objects, self.modified_s = dict(other.objects), dict(other.modified_s)
        self._directories = {directory: list(keys) for directory, keys in other._directories.items()}

    # ---- effects ---------------------------------------------------------------------------------------------------

    def carry_out(self, verb: str, key: str, data: bytes) -> bool:
        """A write takes effect now; whether a create created."""
        there = key in self.objects
        if verb == "delete":
            if there:
                del self.objects[key], self.modified_s[key]
                keys = self._directories[_directory(key)]
                del keys[bisect_left(keys, key)]
                if not keys:
                    del self._directories[_directory(key)]
            return True
        if verb == "create" and there:
            return False
        self.objects[key] = data
        self.modified_s[key] = math.floor(self.epoch_s + self.simulation.clock())
        if not there:
            insort(self._directories.setdefault(_directory(key), []), key)
        return True

    def page(self, prefix: str, after: str, n: int) -> list[ObjectInfo]:
        """Up to `n` objects as they are now, in order of their keys."""
        runs = []
        for directory, keys in self._directories.items():
            if directory.startswith(prefix) or prefix.startswith(directory):
                first = max(bisect_left(keys, prefix), bisect_right(keys, after) if after else 0)
                run = keys[first : first + n]
                if run:
                    runs.append(run)
        found = islice((key for key in merge(*runs) if key.startswith(prefix)), n)
        return [ObjectInfo(key, len(self.objects[key]), self.modified_s[key]) for key in found]

    def later(self, verb: str, key: str, data: bytes) -> None:
        """The write takes effect some time from now: in seconds or hours."""
        delay_s = self.misbehaviour.latest_s ** self.uniform()
        self.simulation.start(lambda: self.carry_out(verb, key, data), after_s=delay_s, owner=self)

    # ---- chance ----------------------------------------------------------------------------------------------------

    def latency(self, verb: Verb) -> float:
        drawn = self._drawn[verb]
        if not drawn:
            drawn.extend(self._latencies[verb].draw(self._rng, _BLOCK))
        return drawn.pop()

    def uniform(self) -> float:
        if not self._uniforms:
            self._uniforms.extend(self._rng.random(_BLOCK).tolist())
        return self._uniforms.pop()

    def fault(self) -> str:
        """Which misbehaviour the request meets that is due for one."""
        m = self.misbehaviour
        self._next_fault()
        point = self.uniform() * m.total
        for kind in ("throttled", "lost", "late", "repeated"):
            point -= getattr(m, kind)
            if point < 0:
                return kind
        return "repeated"

    def _next_fault(self) -> None:
        share = self.misbehaviour.total
        self.until_fault = int(self._rng.geometric(share)) if share > 0 else 1 << 62


class SimulatedClient:
    """One instance's `ObjectStore`. index, extents: requests to keys of the index, and of the extents."""

    def __init__(self, s3: SimulatedS3) -> None:
        self._s3, self._simulation = s3, s3.simulation
        self._agenda = s3.simulation._agenda
        self._get_latencies = s3._drawn["get"]
        self.index, self.extents = Requests(), Requests()

    @property
    def url(self) -> str:
        return "s3://simulated"

    def get(self, key: str, start: int = 0, end: int | None = None, *, limit_bytes: int | None = None) -> bytes:
        # An idle poll is one of these, and a simulated day of a fleet has fifty million: hence what is inlined.
        s3, me, agenda = self._s3, getcurrent(), self._agenda
        if agenda and agenda[0][0] <= me.at_s:
            self._simulation.sleep(0.0)
        (self.extents if "/extents/" in key else self.index).get += 1
        s3.until_fault -= 1
        if s3.until_fault <= 0:
            self._misbehave_reading("get", key)
        try:
            me.at_s += self._get_latencies.pop()
        except IndexError:
            me.at_s += s3.latency("get")
        data = s3.objects.get(key)
        if data is None:
            raise Missing(key, key=key)
        if limit_bytes is not None and (len(data) if end is None else end - start) > limit_bytes:
            raise Unusable(f"{key}: more than {limit_bytes} bytes", kind="oversized", key=key)
        if end is not None and len(data) < end:
            raise Unusable(f"{key}: {len(data)} bytes, fewer than {end}", kind="truncated", key=key)
        return data if start == 0 and end is None else data[start:end]

    def get_into(self, key: str, start: int, into: memoryview) -> None:
        into.cast("B")[:] = self.get(key, start, start + into.nbytes)

    def put(self, key: str, data: Buffer) -> None:
        self._write_again("put", key, bytes(data))

    def create(self, key: str, data: Buffer) -> Outcome:
        try:
            return Outcome.WON if self._write("create", key, bytes(data)) else Outcome.LOST
        except Unavailable:
            return Outcome.UNKNOWN

    def delete(self, key: str) -> None:
        self._write_again("delete", key, b"")

    def list(self, prefix: str, start_after: str = "", limit: int | None = None) -> Iterator[ObjectInfo]:
        left = limit
        while left is None or left > 0:
            wanted = _PAGE if left is None else min(left, _PAGE)
            self._counter(prefix).list += 1
            self._simulation.catch_up()
            self._s3.until_fault -= 1
            if self._s3.until_fault <= 0:
                self._misbehave_reading("list", prefix)
            self._simulation.sleep(self._s3.latency("list"))
            page = self._s3.page(prefix, start_after, wanted)
            yield from page
            if len(page) < wanted:
                return
            start_after = page[-1].key
            left = None if left is None else left - len(page)

    def check(self) -> None:
        next(self.list("", limit=1), None)

    def close(self) -> None:
        pass

    def _counter(self, key: str) -> Requests:
        return self.extents if "/extents/" in key else self.index

    def _write_again(self, verb: Literal["put", "delete"], key: str, data: bytes) -> None:
        for attempt in range(1, self._s3.attempts + 1):
            try:
                self._write(verb, key, data)
                return
            except Unavailable:
                if attempt == self._s3.attempts:
                    raise
                self._back_off(attempt)

    def _back_off(self, attempt: int) -> None:
        self._simulation.sleep(self._s3.uniform() * 2.0 ** (attempt - 1))

    def _write(self, verb: Literal["put", "create", "delete"], key: str, data: bytes) -> bool:
        s3, simulation, counter = self._s3, self._simulation, self._counter(key)
        setattr(counter, verb, getattr(counter, verb) + 1)
        s3.until_fault -= 1
        fault = s3.fault() if s3.until_fault <= 0 else ""
        latency_s = s3.latency("delete" if verb == "delete" else "put")
        arrives_s = latency_s * s3.uniform()
        if fault:
            s3.injected[fault] += 1
        if fault == "throttled":
            simulation.sleep(latency_s)
            raise self._throttled(key)
        if fault == "late":
            s3.later(verb, key, data)
            simulation.sleep(s3.misbehaviour.no_answer_s)
            raise self._no_answer(key)
        simulation.sleep(arrives_s)
        done = s3.carry_out(verb, key, data)
        if fault == "repeated":
            s3.later(verb, key, data)
        simulation.sleep(s3.misbehaviour.no_answer_s if fault == "lost" else latency_s - arrives_s)
        if fault == "lost":
            raise self._no_answer(key)
        return done

    def _misbehave_reading(self, verb: Literal["get", "list"], key: str) -> None:
        """The attempts of a read that meets misbehaviour; returns before the one that is answered."""
        s3, counter = self._s3, self._counter(key)
        for attempt in range(1, s3.attempts + 1):
            kind = s3.fault()
            if kind not in ("throttled", "lost"):
                return
            s3.injected[kind] += 1
            self._simulation.sleep(s3.latency(verb) if kind == "throttled" else s3.misbehaviour.no_answer_s)
            if attempt == s3.attempts:
                raise self._throttled(key) if kind == "throttled" else self._no_answer(key)
            self._back_off(attempt)
            setattr(counter, verb, getattr(counter, verb) + 1)
            s3.until_fault -= 1
            if s3.until_fault > 0:
                return

    def _throttled(self, key: str) -> Unavailable:
        return Unavailable(f"{key}: 503 (injected)", kind="throttled", key=key)

    def _no_answer(self, key: str) -> Unavailable:
        return Unavailable(f"{key}: no answer (injected)", kind="timeout", key=key)


def _directory(key: str) -> str:
    """The first four parts of a key (`spaces/<id>/extents/<2 hex>/`), or fewer: short sorted lists, and few of them."""
    end = -1
    for _ in range(4):
        slash = key.find("/", end + 1)
        if slash < 0:
            break
        end = slash
    return key[: end + 1]
