"""Ways to get the manifest protocol wrong: each breaks one rule of the real code, and the interleavings must notice.

    caught(mutant) -> Violation | None

A suite that lets one of these pass could not tell the protocol from something that loses data. The first 18 are the
rules of the protocol proper; those after them belong to the leader, to covered extents and to collection.
Deterministic: the same seeds give the same answer. Raises nothing of its own.
"""

from __future__ import annotations

from collections.abc import Callable, Container, Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field, replace
from typing import Any
from unittest.mock import patch

from lmcache_s3.errors import Unavailable
from lmcache_s3.index import change, inbox, log, manifest
from lmcache_s3.index import rebuild as rebuilding
from lmcache_s3.index.delta import Delta, encode_delta
from lmcache_s3.index.gc import Checkpoint, Collector
from lmcache_s3.index.inbox import HandedOver, HandOvers, Inbox
from lmcache_s3.index.log import Log, _Read
from lmcache_s3.index.manifest import State, Verdict, fence, log_key
from lmcache_s3.testing import manifest_world
from lmcache_s3.testing.manifest_model import play
from lmcache_s3.testing.manifest_process import Rules, Violation
from lmcache_s3.testing.manifest_roles import object_keys
from lmcache_s3.tiers.stores.base import ObjectStore
from lmcache_s3.types import ExtentName, ExtentRecord, Outcome

SEEDS = range(400)
"""Runs a mutant must be caught in."""


@dataclass(frozen=True)
class Mutant:
    """why: the rule that is broken. patches: functions replaced while it runs. cast: who shows it soonest."""

    name: str
    why: str
    rules: Rules
    cast: str = "direct"
    patches: dict[str, Callable[..., Any]] = field(default_factory=dict)


def caught(mutant: Mutant, seeds: Iterable[int] = SEEDS) -> Violation | None:
    """The first violation that one of these runs shows; None: nobody noticed. Seconds at most."""
    with _patched(mutant.patches):
        for seed in seeds:
            try:
                play(seed, mutant.rules, cast=mutant.cast)
            except Violation as violation:
                return violation
    return None


def missed(mutants: Iterable[Mutant] | None = None) -> list[str]:
    """Names of the mutants that nobody noticed; of all by default (half a minute). None should be."""
    return [mutant.name for mutant in (MUTANTS if mutants is None else mutants) if caught(mutant) is None]


@contextmanager
def _patched(patches: dict[str, Callable[..., Any]]) -> Iterator[None]:
    """Replace functions of `manifest` wherever they were imported to."""
    with ExitStack() as stack:
        for name, function in patches.items():
            for module in (manifest, log, change, inbox, manifest_world):
                if hasattr(module, name):
                    stack.enter_context(patch.object(module, name, function))
        yield


# ---- the fence -------------------------------------------------------------------------------------------------------


class NoFenceAfterCreate(Log):
    def _settle(self, batch: list[_Read]) -> State:
        if batch:
            self._apply(batch)
            return self.state
        return super()._settle(batch)


class FenceBeforeCreate(Log):
    _fenced = False

    def _create(self, version: int, body: bytes) -> Outcome:
        self._fenced = self._exists(fence(version, self.limits.milestone))
        return super()._create(version, body)

    def _settle(self, batch: list[_Read]) -> State:
        if batch and not self._fenced:
            self._apply(batch)
            return self.state
        return super()._settle(batch)


class NoFenceForWhatIsRead(Log):
    _was_read = False

    def _settle(self, batch: list[_Read]) -> State:
        self._was_read = False
        return super()._settle(batch)

    def _read_batch(self, first: int) -> Any:
        out = super()._read_batch(first)
        self._was_read = bool(out[0])
        return out

    def _exists(self, version: int) -> bool:
        return not self._was_read and super()._exists(version)


class FenceOfTheLast(Log):
    _last = 0

    def _read_batch(self, first: int) -> Any:
        out = super()._read_batch(first)
        self._last = first + max(0, len(out[0]) - 1)
        return out

    def _exists(self, version: int) -> bool:
        return super()._exists(max(version, fence(self._last, self.limits.milestone)))


class NeverOnEmptyPolls(Log):
    def _settle(self, batch: list[_Read]) -> State:
        self._empty_polls = 0
        return super()._settle(batch)


class MilestonesDeleted(Collector):
    def _version_deletable(self, version: int, checkpoint: int, confirmed: int) -> bool:
        return version <= checkpoint and fence(version, self.log.limits.milestone) <= confirmed


class VersionsWithoutCheckpoint(Collector):
    def _version_deletable(self, version: int, checkpoint: int, confirmed: int) -> bool:
        return super()._version_deletable(version, confirmed, confirmed)


# ---- create ----------------------------------------------------------------------------------------------------------


class PlainPut(Log):
    def _create(self, version: int, body: bytes) -> Outcome:
        self.store.put(log_key(self.space_id, version), body)
        return Outcome.WON


class ConflictIsWon(Log):
    def _create(self, version: int, body: bytes) -> Outcome:
        outcome = super()._create(version, body)
        return Outcome.WON if outcome is Outcome.LOST else outcome


class NoAnswerIsWon(Log):
    def _create(self, version: int, body: bytes) -> Outcome:
        outcome = super()._create(version, body)
        return Outcome.WON if outcome is Outcome.UNKNOWN else outcome


# ---- extents ---------------------------------------------------------------------------------------------------------


class SweepByAge(Collector):
    def _deletable(self, live: Container[ExtentName], floor: int, name: ExtentName) -> bool:
        return name not in live


class DeletionBeforeConfirmation(Collector):
    def _commit(self, delta: Delta) -> bool:
        version = self.log.state.version + 1
        try:
            self.store.create(log_key(self.space_id, version), encode_delta(delta))
            for name in delta.remove:
                for key in object_keys(name):
                    self.store.delete(key)
        except Unavailable:
            return False
        self.log.sync()
        return True


_apply, _judged, _unjudged = manifest.apply, manifest.judged, manifest.unjudged


def _apply_without_floor(state: State, delta: Delta) -> State:
    after = _apply(replace(state, floor=0), delta)
    return replace(after, floor=max(state.floor, delta.floor))


def _judged_without_floor(state: State, record: ExtentRecord) -> Verdict | None:
    return _judged(replace(state, floor=0), record)


def _unjudged_without_floor(state: State, add: Sequence[ExtentRecord], remove: Iterable[ExtentName] = ()) -> Any:
    return _unjudged(replace(state, floor=0), add, remove)


# ---- inbox -----------------------------------------------------------------------------------------------------------


class InboxEarly(Inbox):
    def _commit(self, group: Sequence[Any]) -> None:
        self._delete([one.key for one in group if isinstance(one, HandedOver)])
        super()._commit(group)


class CoveredEarly(Inbox):
    """Of objects that cover each other within a round only the first is kept until its version is confirmed."""

    def _sorted(self, found: Iterable[HandedOver]) -> tuple[list[HandedOver], list[HandedOver]]:
        judged, waiting = super()._sorted(found)
        chunks: set[bytes] = set()
        left = []
        for one in waiting:
            hashes = {chunk for record in one.change.add for chunk in record.chunk_hashes()}
            if hashes and hashes <= chunks:
                judged.append(one)
            else:
                left.append(one)
            chunks |= hashes
        return judged, left


class Forgotten(HandOvers[Any]):
    """What was handed over is somebody else's business."""

    def take_given_up(self) -> tuple[list[Any], bool]:
        return [], False

    @property
    def due_s(self) -> float | None:
        return None


class NoMerge(Collector):
    def _merge(self, now_s: float) -> None:
        pass


# ---- rebuild ---------------------------------------------------------------------------------------------------------


def _write_last_milestone_last(
    store: ObjectStore, space_id: str, state: State, missing: list[int], writer: str, nonce: str
) -> None:
    _write(store, space_id, state, missing[:-1], writer, nonce)
    store.create(log_key(space_id, missing[-1]), encode_delta(Delta(writer)))


_write = rebuilding._write


def _rebuild_last_milestone_last(*args: Any, **more: Any) -> object:
    with patch.object(rebuilding, "_write", _write_last_milestone_last):
        return rebuilding.rebuild(*args, **more)


# ---- checkpoints -----------------------------------------------------------------------------------------------------


class IndexBeforeSegments(Log):
    def _put_checkpoint(self, prefix: str, files: dict[str, bytes], key: str, index: bytes) -> None:
        self.store.put(key, index)
        for file, data in files.items():
            self.store.put(prefix + file, data)


class AnySegmentWithoutIndex(Collector):
    def _segment_deletable(self, version: int, newest: Checkpoint) -> bool:
        return True


_NO_FLOOR: dict[str, Callable[..., Any]] = {
    "apply": _apply_without_floor,
    "judged": _judged_without_floor,
    "unjudged": _unjudged_without_floor,
}

MUTANTS = (
    Mutant("no_fence_writer", "the fence is not asked after a create", Rules(log=NoFenceAfterCreate), "log"),
    Mutant("fence_first", "the fence is asked before the create", Rules(log=FenceBeforeCreate), "log"),
    Mutant("no_fence_reader", "the fence is not asked by readers", Rules(log=NoFenceForWhatIsRead), "log"),
    Mutant("fence_of_last", "the fence of the batch's last version is asked", Rules(log=FenceOfTheLast), "log"),
    Mutant("no_idle_fence", "the fence is never asked on empty polls", Rules(log=NeverOnEmptyPolls), "log"),
    Mutant("milestone_deleted", "milestones are deleted", Rules(collector=MilestonesDeleted), "log"),
    Mutant("no_checkpoint_rule", "versions go without a checkpoint", Rules(collector=VersionsWithoutCheckpoint), "log"),
    Mutant("plain_put", "versions are plain PUTs", Rules(log=PlainPut)),
    Mutant("conflict_is_success", "a lost create counts as won", Rules(log=ConflictIsWon)),
    Mutant("unknown_is_success", "a create without answer counts as won", Rules(log=NoAnswerIsWon)),
    Mutant("commit_first", "the commit precedes the upload", Rules(uploads_first=False)),
    Mutant("same_name", "two uploads of one prefix share a name", Rules(fresh_names=False)),
    Mutant("sweep_by_age", "orphans are swept by age, without a floor", Rules(collector=SweepByAge)),
    Mutant("no_void_rule", "adds born below the floor are accepted", Rules(), patches=_NO_FLOOR),
    Mutant(
        "delete_before_confirm",
        "victims are deleted before their removal is confirmed",
        Rules(collector=DeletionBeforeConfirmation),
    ),
    Mutant("inbox_early", "inbox objects go before confirmation", Rules(inbox=InboxEarly), "followers"),
    Mutant("index_first", "a checkpoint's index precedes its segments", Rules(log=IndexBeforeSegments)),
    Mutant(
        "sweep_newest",
        "segments without index are swept though not older than the newest checkpoint",
        Rules(collector=AnySegmentWithoutIndex),
    ),
    Mutant("covered_early", "covered hand-overs go before confirmation", Rules(inbox=CoveredEarly), "followers"),
    Mutant("covered_swept", "a covered upload is deleted at once", Rules(sweeps_covered=True), "followers"),
    Mutant("handover_forgotten", "a hand-over is never taken back", Rules(hand_overs=Forgotten), "followers"),
    Mutant(
        "rebuild_last_late",
        "rebuild creates its last milestone after the checkpoint",
        Rules(rebuild=_rebuild_last_milestone_last),
        "rebuild",
    ),
    Mutant("gc_no_merge", "collectors leave the inbox alone", Rules(collector=NoMerge), "followers"),
)
"""Each must be caught."""
