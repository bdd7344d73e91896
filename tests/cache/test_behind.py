"""Write-behind's bookkeeping: what is judged when, whatever comes in between."""

from __future__ import annotations

from collections.abc import Iterator
from concurrent.futures import Future
from typing import Any

import pytest

from lmcache_s3.behind import Behind
from lmcache_s3.errors import Unavailable
from lmcache_s3.index.service import Verdict
from lmcache_s3.testing.small import small_space
from lmcache_s3.types import ExtentName, ExtentRecord, Grid
from lmcache_s3.uploading import StoredShard
from lmcache_s3.write_behind import WriteBehind


class Uploads:
    """A transfer, an index and a publisher that store nothing. Verdicts are given in turn."""

    def __init__(self, *verdicts: Verdict | Exception) -> None:
        self.geometry, self.codec, self.version = small_space().geometry, self, 1
        self.id = "fast"
        self.verdicts = list(verdicts)
        self.forgotten: list[ExtentName] = []

    def forget_rested(self, names: list[ExtentName]) -> None:
        self.forgotten += names

    def upload_rested(self, name: ExtentName, grid: Grid, shard: int, first_token: int, chunks: Any) -> Any:
        done: Future[StoredShard] = Future()
        done.set_result(StoredShard(b"", b"", 0))
        return done

    def publish(self, *args: object) -> Future[Verdict]:
        verdict = self.verdicts.pop(0)
        if isinstance(verdict, Exception):
            raise verdict
        done: Future[Verdict] = Future()
        done.set_result(verdict)
        return done


def record(first: int, stop: int) -> ExtentRecord:
    """Chunks first … stop − 1 of a prompt, of 100 bytes each."""
    hashes = [bytes([i + 1]) * 16 for i in range(first, stop)]
    n = stop - first
    lengths = (100).to_bytes(4, "little") * n
    name = ExtentName.fresh(hashes[-1], n, "fast", 1)
    return ExtentRecord(name, Grid(), bytes([first]) * 16, first * 16, b"".join(hashes), lengths, bytes(8 * n), 100 * n)


def make(uploads: Uploads) -> Behind:
    plan = WriteBehind(extent_bytes=400, age_s=600, max_bytes=1 << 20)
    it: Any = uploads
    return Behind(it, it, it, Grid(), plan)


@pytest.fixture
def closing() -> Iterator[list[Behind]]:
    opened: list[Behind] = []
    yield opened
    for one in opened:
        one.close(0.0)


def test_what_comes_to_rest_while_the_same_is_judged_is_judged_in_its_turn(closing: list[Behind]) -> None:
    uploads = Uploads(Verdict.COVERED)
    behind = make(uploads)
    closing.append(behind)
    first, second = record(0, 2), record(0, 2)
    behind.rest(first)
    late: list[Future[Verdict]] = []
    tidy = behind._tidy

    def tidy_late() -> None:
        behind._tidy = tidy  # type: ignore[method-assign]
        late.append(behind.rest(second))
        tidy()

    behind._tidy = tidy_late  # type: ignore[method-assign]
    behind._judged(list(first.chunk_hashes()), Unavailable("no", kind="network"))
    assert set(behind._waiting) == set(behind._resting._chunks) == set(second.chunk_hashes())
    behind.flush()
    assert late[0].result(5) is Verdict.COVERED
    assert {first.name, second.name} <= set(uploads.forgotten)


def test_a_store_of_which_a_part_came_too_late_came_too_late(closing: list[Behind]) -> None:
    """Four chunks make an extent: the second store's go up in two."""
    behind = make(Uploads(Verdict.VOID, Verdict.LIVE))
    closing.append(behind)
    verdicts = [behind.rest(record(0, 3)), behind.rest(record(3, 6))]
    behind.flush()
    assert [one.result(5) for one in verdicts] == [Verdict.VOID, Verdict.VOID]


def test_an_error_that_nobody_foresaw_fails_its_store_and_no_other(closing: list[Behind]) -> None:
    behind = make(Uploads(ValueError("unforeseen"), Verdict.LIVE))
    closing.append(behind)
    first = behind.rest(record(0, 2))
    behind.flush()
    with pytest.raises(ValueError, match="unforeseen"):
        first.result(5)
    second = behind.rest(record(0, 2))
    behind.flush()
    assert second.result(5) is Verdict.LIVE
