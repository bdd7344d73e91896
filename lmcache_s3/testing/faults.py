"""A store that misbehaves on purpose, from a seed: latency, errors before or after the effect, lost answers, bad bytes.

A `Fault` says what happens, to which verbs and keys, and how often; the first that fires wins. Everything random comes
from the generator given, time from the `sleep` given, so that a failing test can be repeated. Thread-safe.
"""

from __future__ import annotations

import random
import re
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Literal

from lmcache_s3.errors import Invalid, LMCacheS3Error, Unavailable
from lmcache_s3.tiers.stores.base import ObjectStore
from lmcache_s3.types import Buffer, ObjectInfo, Outcome

Verb = Literal["get", "put", "create", "delete", "list"]
Mode = Literal["error", "error_after", "lost_answer", "truncate", "flip", "latency"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Fault:
    """One way to misbehave.

    mode: `error` nothing takes effect; `error_after` it does, then raises; `lost_answer` a create or put takes effect
    and a create answers UNKNOWN (a put raises a time-out); `truncate` a get loses its second half without an error
    (`get_into`: the tail keeps what was there); `flip` one bit of what a get read is wrong; `latency` sleeps first.
    verbs, key: which calls (key: a regular expression found anywhere in it). probability: of firing. times: at most so
    often, None for always. skip: that many matching calls pass first. error: what to raise (default
    `Unavailable(network)`). latency_s: how long `latency` sleeps.
    """

    mode: Mode
    verbs: frozenset[Verb] = frozenset({"get", "put", "create", "delete", "list"})
    key: str = ""
    probability: float = 1.0
    times: int | None = None
    skip: int = 0
    error: LMCacheS3Error | None = None
    latency_s: float = 0.0

    def __post_init__(self) -> None:
        if not 0 <= self.probability <= 1 or self.latency_s < 0 or self.skip < 0:
            raise Invalid(f"fault {self.mode}: probability 0…1, latency_s and skip from 0", kind="argument")


class FaultyStore:
    """Wraps any `ObjectStore`. `fired` counts by mode; `faults` may be replaced between calls."""

    def __init__(
        self,
        inner: ObjectStore,
        faults: Sequence[Fault] = (),
        *,
        seed: int = 0,
        sleep: Callable[[float], object] = time.sleep,
    ) -> None:
        self.inner = inner
        self.fired: Counter[str] = Counter()
        self._rng = random.Random(seed)
        self._sleep = sleep
        self._lock = threading.Lock()
        self.faults = faults

    @property
    def faults(self) -> Sequence[Fault]:
        return self._faults

    @faults.setter
    def faults(self, faults: Sequence[Fault]) -> None:
        with self._lock:
            self._faults = tuple(faults)
            self._seen = [0] * len(self._faults)
            self._used = [0] * len(self._faults)

    @property
    def url(self) -> str:
        return self.inner.url

    def check(self) -> None:
        self.inner.check()

    def get(self, key: str, start: int = 0, end: int | None = None, *, limit_bytes: int | None = None) -> bytes:
        fault = self._before("get", key)
        data = self.inner.get(key, start, end, limit_bytes=limit_bytes)
        self._after(fault, key)
        if fault is not None and fault.mode == "truncate":
            return data[: len(data) // 2]
        if fault is not None and fault.mode == "flip":
            flipped = bytearray(data)
            self._flip(memoryview(flipped))
            return bytes(flipped)
        return data

    def get_into(self, key: str, start: int, into: memoryview) -> None:
        fault = self._before("get", key)
        view = into.cast("B")
        if fault is not None and fault.mode == "truncate":
            half = len(view) // 2
            self.inner.get_into(key, start, view[:half])
            return
        self.inner.get_into(key, start, view)
        self._after(fault, key)
        if fault is not None and fault.mode == "flip":
            self._flip(view)

    def put(self, key: str, data: Buffer) -> None:
        fault = self._before("put", key)
        self.inner.put(key, data)
        self._after(fault, key)
        if fault is not None and fault.mode == "lost_answer":
            raise Unavailable(f"{self.url}/{key}: answer lost (injected)", kind="timeout", key=key)

    def create(self, key: str, data: Buffer) -> Outcome:
        fault = self._before("create", key)
        outcome = self.inner.create(key, data)
        self._after(fault, key)
        return Outcome.UNKNOWN if fault is not None and fault.mode == "lost_answer" else outcome

    def delete(self, key: str) -> None:
        fault = self._before("delete", key)
        self.inner.delete(key)
        self._after(fault, key)

    def list(self, prefix: str, start_after: str = "", limit: int | None = None) -> Iterator[ObjectInfo]:
        fault = self._before("list", prefix)
        infos = self.inner.list(prefix, start_after, limit)
        self._after(fault, prefix)
        return infos

    def close(self) -> None:
        self.inner.close()

    def _before(self, verb: Verb, key: str) -> Fault | None:
        fault = self._choose(verb, key)
        if fault is not None and fault.mode == "latency":
            self._sleep(fault.latency_s)
        if fault is not None and fault.mode == "error":
            raise _error(fault, key)
        return fault

    def _after(self, fault: Fault | None, key: str) -> None:
        if fault is not None and fault.mode == "error_after":
            raise _error(fault, key)

    def _choose(self, verb: Verb, key: str) -> Fault | None:
        with self._lock:
            for i, fault in enumerate(self._faults):
                if verb not in fault.verbs or not re.search(fault.key, key):
                    continue
                self._seen[i] += 1
                spent = fault.times is not None and self._used[i] >= fault.times
                if spent or self._seen[i] <= fault.skip or self._rng.random() >= fault.probability:
                    continue
                self._used[i] += 1
                self.fired[fault.mode] += 1
                return fault
        return None

    def _flip(self, view: memoryview) -> None:
        if view:
            with self._lock:
                bit = self._rng.randrange(8 * len(view))
            view[bit // 8] ^= 1 << bit % 8


def _error(fault: Fault, key: str) -> LMCacheS3Error:
    return fault.error or Unavailable(f"{key}: connection lost (injected)", kind="network", key=key)
