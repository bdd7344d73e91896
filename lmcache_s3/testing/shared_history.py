"""One true history for all simulated instances: pure steps done once, every replica held against the truth.

A thousand replicas of one history would decode and apply each version a thousand times. Inside `SharedHistory.sharing`
the log's pure functions (`decode_delta`, `apply`, `load_checkpoint`) are looked up by what went in, and computed by the
real ones the first time; so a thousand instances share one `State` a version. What an instance applies must be what the
first one applied, to the same state: anything else raises `Violation` (FORMAT.md §4.1, §4.3; I1 and I7 of
`protocol_model`), and a state loaded from a checkpoint must equal the one that was checkpointed (I5).
"""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Callable, Iterator
from concurrent.futures import Executor
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import TypeVar
from unittest.mock import patch

from lmcache_s3.index import checkpoint_loading, manifest, segments
from lmcache_s3.index import log as log_module
from lmcache_s3.index.manifest import EMPTY, Delta, State
from lmcache_s3.index.segments import CheckpointIndex, Segment
from lmcache_s3.types import ExtentName

K = TypeVar("K")
V = TypeVar("V")

_KEPT_STATES = 2048
_KEPT_CHECKPOINTS = 64


class Violation(AssertionError):
    """A replica is not a prefix of the history, or a version has two contents."""


@dataclass(slots=True)
class _Version:
    """deltas: those found equal to the first (by identity, to be quick)."""

    state: State
    delta: Delta
    same: list[Delta]


@dataclass
class SharedHistory:
    """What the versions say, in order; grows as the first instance applies each.

    clock: when that was. added, removed: name → version that first added or (last) removed it. applied_s: by version.
    """

    clock: Callable[[], float]
    added: dict[ExtentName, int] = field(default_factory=dict)
    removed: dict[ExtentName, int] = field(default_factory=dict)
    applied_s: dict[int, float] = field(default_factory=dict)
    leads: list[tuple[int, str]] = field(default_factory=list)
    """(version, ULID or "") of each change of leader."""
    tip: State = field(default_factory=lambda: EMPTY)

    def __post_init__(self) -> None:
        self._lock = threading.Lock()
        self._versions: OrderedDict[int, _Version] = OrderedDict()
        self._decoded: OrderedDict[int, tuple[bytes, Delta]] = OrderedDict()
        self._checkpointed: OrderedDict[int, State] = OrderedDict()
        self._loaded: OrderedDict[tuple[int, str], State] = OrderedDict()
        self._apply, self._decode = manifest.apply, manifest.decode_delta
        self._encode_checkpoint, self._load_checkpoint = segments.encode_checkpoint, checkpoint_loading.load_checkpoint

    @contextmanager
    def sharing(self) -> Iterator[None]:
        """The log's pure functions, done once, as long as this lasts; for all threads of the process."""
        with ExitStack() as stack:
            for name, function in {
                "apply": self.apply,
                "decode_delta": self.decode,
                "encode_checkpoint": self.encode_checkpoint,
                "load_checkpoint": self.load_checkpoint,
            }.items():
                stack.enter_context(patch.object(log_module, name, function))
            yield

    def decode(self, data: bytes, version: int) -> Delta:
        known = self._decoded.get(version)
        if known is not None and (known[0] is data or known[0] == data):
            return known[1]
        with self._lock:
            known = self._decoded.get(version)
            if known is not None and known[0] == data:
                return known[1]
            delta = self._decode(data, version)
            _keep(self._decoded, version, (data, delta), _KEPT_STATES)
            return delta

    def apply(self, state: State, delta: Delta) -> State:
        with self._lock:
            return self._applied(state, delta)

    def _applied(self, state: State, delta: Delta) -> State:
        version = state.version + 1
        if state is self.tip:
            return self._first(state, delta)
        known = self._versions.get(version)
        if known is None:  # long past: a replica that has far to go; it is compared when it gets nearer
            return self._apply(state, delta)
        if not any(delta is same for same in known.same):
            if delta != known.delta:
                raise Violation(f"I7 version {version} has two contents")
            known.same.append(delta)
        before = self._versions.get(state.version)
        if before is None or state is not before.state:
            reached = self._apply(state, delta)
            if reached != known.state:
                raise Violation(f"I1 a replica at version {version} is no prefix of the history")
        return known.state

    def _first(self, state: State, delta: Delta) -> State:
        reached = self._apply(state, delta)
        version = reached.version
        self.tip = reached
        self.applied_s[version] = self.clock()
        for record in delta.add:
            if record.name in reached.extents:
                self.added.setdefault(record.name, version)
        for name in delta.remove:
            self.removed[name] = version
        if reached.lead != state.lead:
            self.leads.append((version, reached.lead or ""))
        _keep(self._versions, version, _Version(reached, delta, [delta]), _KEPT_STATES)
        return reached

    def encode_checkpoint(self, state: State, nonce: str, writer: str) -> tuple[dict[str, bytes], bytes]:
        _keep(self._checkpointed, state.version, state, _KEPT_CHECKPOINTS)
        return self._encode_checkpoint(state, nonce, writer)

    def load_checkpoint(
        self, index: CheckpointIndex, fetch: Callable[[Segment], bytes], executor: Executor | None = None
    ) -> State:
        """Every instance fetches its segments; one decodes them."""
        key = (index.version, index.nonce)
        if key in self._loaded:
            for _ in (map if executor is None else executor.map)(fetch, index.segments):
                pass
            return self._loaded[key]
        loaded, true = self._load_checkpoint(index, fetch, executor), self._checkpointed.get(index.version)
        if true is not None and loaded != true:
            raise Violation(f"I5 checkpoint {index.version} says something else than its state")
        _keep(self._loaded, key, loaded if true is None else true, _KEPT_CHECKPOINTS)
        return self._loaded[key]


def _keep(kept: OrderedDict[K, V], key: K, value: V, n: int) -> None:
    kept[key] = value
    if len(kept) > n:
        kept.popitem(last=False)
