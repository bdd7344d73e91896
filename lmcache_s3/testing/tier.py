"""What every `Tier` must do: a suite to subclass, for our tiers and anybody else's.

    class TestMyTier(TierTests):
        def make_tier(self, budget_bytes, path): ...   # a fresh tier, of a durable one: over what lies in `path`
        def plant(self, tier, cell, data): ...         # change a cell's bytes behind the tier's back; None: remove
        def peek(self, tier, cell): ...                # its bytes, read behind the tier's back, or None

What a tier does not do is stated by the class attributes. Not checked: what a power cut leaves, and speed.
"""

from __future__ import annotations

import random
import threading
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import ClassVar

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from lmcache_s3.codecs.checksum import xxh3
from lmcache_s3.errors import Missing, Unavailable, Unusable
from lmcache_s3.tiers.base import Tier
from lmcache_s3.types import Buffer, CellRef, ExtentName, Grid

_PER_CLASS = [HealthCheck.differing_executors]  # the examples of one subclass are as good for the others

Cells = list[tuple[CellRef, bytes]]
_WHOLE = Grid()


def make_cells(rng: random.Random, lengths: Sequence[int], *, shard: int = 0, grid: Grid = _WHOLE) -> Cells:
    """A whole shard of random cells of those lengths, of an extent with a name of its own."""
    n = len(lengths)
    name = ExtentName(rng.randbytes(16), n, "fast", rng.randrange(100), rng.randbytes(16).hex())
    out: Cells = []
    offset, parent = 0, bytes(16)
    for i, length in enumerate(lengths):
        data, own = rng.randbytes(length), name.last_hash if i == n - 1 else rng.randbytes(16)
        out.append((CellRef(name, grid, shard, i, offset, length, xxh3(data), own, parent, 0), data))
        offset, parent = offset + length, own
    return out


def refs(cells: Cells) -> list[CellRef]:
    return [cell for cell, _ in cells]


def plain(buffers: Sequence[Buffer]) -> list[bytes]:
    return [bytes(one) for one in buffers]


class TierTests:
    """The conformance suite. Attributes a subclass may set:

    durable: another tier over the same path has what this one kept. evictable: it has a budget. rereads: its bytes lie
    where others can damage them, so it verifies what it reads, not only what it is given.
    """

    durable: ClassVar[bool] = False
    evictable: ClassVar[bool] = True
    rereads: ClassVar[bool] = False

    def make_tier(self, budget_bytes: int, path: Path) -> Tier:
        raise AssertionError("a subclass gives a tier")

    def plant(self, tier: Tier, cell: CellRef, data: bytes | None) -> None:
        raise AssertionError("a subclass reaches behind the tier")

    def peek(self, tier: Tier, cell: CellRef) -> bytes | None:
        raise AssertionError("a subclass reaches behind the tier")

    @pytest.fixture
    def tier(self, tmp_path: Path) -> Iterator[Tier]:
        tier = self.make_tier(10_000, tmp_path)
        yield tier
        tier.close()

    @pytest.fixture
    def rng(self) -> random.Random:
        return random.Random(7)

    def only_evictable(self) -> None:
        if not self.evictable:
            pytest.skip("this tier has no budget")

    # --- keeping

    def test_is_a_tier(self, tier: Tier) -> None:
        assert isinstance(tier, Tier)
        assert (tier.budget_bytes is not None) == self.evictable

    def test_gives_back_what_it_was_given(self, tier: Tier, rng: random.Random) -> None:
        cells = make_cells(rng, [100, 1, 250, 64])
        assert tier.put(cells) == 4
        assert tier.match_prefix(refs(cells)) == 4
        assert plain(tier.get(refs(cells))) == [data for _, data in cells]
        assert plain(tier.get(refs(cells)[2:3])) == [cells[2][1]]
        assert plain(tier.get([cells[3][0], cells[0][0]])) == [cells[3][1], cells[0][1]]
        assert [self.peek(tier, cell) for cell in refs(cells)] == [data for _, data in cells]
        assert tier.get([]) == []

    def test_extents_shards_and_positions_are_kept_apart(self, tier: Tier, rng: random.Random) -> None:
        grid = Grid(1, 2)
        a = make_cells(rng, [50, 60], grid=grid)
        shard1 = make_cells(rng, [50, 60], grid=grid)
        b = [
            (replace(a[i][0], shard=1, offset=ref.offset, length=ref.length, checksum=ref.checksum), data)
            for i, (ref, data) in enumerate(shard1)
        ]
        c = make_cells(rng, [50, 60])
        for cells in (a, b, c):
            tier.put(cells)
        mixed = [c[1], a[0], b[0], b[1], a[1], c[0]]
        assert plain(tier.get(refs(mixed))) == [data for _, data in mixed]

    def test_what_was_given_may_be_reused_at_once(self, tier: Tier, rng: random.Random) -> None:
        cells = make_cells(rng, [100])
        buffer = bytearray(cells[0][1])
        tier.put([(cells[0][0], memoryview(buffer))])
        buffer[:] = bytes(100)
        assert plain(tier.get(refs(cells))) == [cells[0][1]]

    def test_what_it_gives_out_is_read_only(self, tier: Tier, rng: random.Random) -> None:
        cells = make_cells(rng, [100])
        tier.put(cells)
        assert memoryview(tier.get(refs(cells))[0]).readonly

    def test_putting_again_changes_nothing(self, tier: Tier, rng: random.Random) -> None:
        cells = make_cells(rng, [100, 100])
        assert (tier.put(cells), tier.put(cells)) == (2, 2)
        assert plain(tier.get(refs(cells))) == [data for _, data in cells]
        if self.evictable:
            assert (tier.stats().cells, tier.stats().used_bytes) == (2, 200)

    # --- misses

    def test_an_unknown_cell_is_missing(self, tier: Tier, rng: random.Random) -> None:
        cells = make_cells(rng, [100, 100])
        with pytest.raises(Missing) as e:
            tier.get(refs(cells))
        assert e.value.key == str(cells[0][0].extent)
        if self.evictable:
            assert tier.match_prefix(refs(cells)) == 0

    def test_get_is_all_or_nothing_and_match_prefix_counts_the_leading_ones(
        self, tier: Tier, rng: random.Random
    ) -> None:
        cells, other = make_cells(rng, [100, 100]), make_cells(rng, [100])
        tier.put(cells)
        with pytest.raises(Missing):
            tier.get([*refs(cells), *refs(other)])
        if self.evictable:
            assert tier.match_prefix([cells[0][0], other[0][0], cells[1][0]]) == 1

    # --- lies

    @pytest.mark.parametrize("kind", ["truncated", "oversized", "checksum"])
    def test_a_put_that_contradicts_its_reference_leaves_no_trace(
        self, tier: Tier, rng: random.Random, kind: str
    ) -> None:
        cells = make_cells(rng, [100, 100, 100])
        good = cells[1][1]
        bad = {"truncated": good[:-1], "oversized": good + b"x", "checksum": bytes([good[0] ^ 1]) + good[1:]}[kind]
        with pytest.raises(Unusable) as e:
            tier.put([cells[0], (cells[1][0], bad), cells[2]])
        assert (e.value.kind, e.value.key) == (kind, str(cells[0][0].extent))
        assert [self.peek(tier, cell) for cell in refs(cells)] == [None, None, None]
        assert tier.stats().used_bytes == 0

    def test_damage_is_never_given_out(self, tmp_path: Path) -> None:
        if not self.rereads:
            pytest.skip("nobody can reach this tier's bytes")
        for seed in range(60):
            tier = self.make_tier(10_000, tmp_path / str(seed))
            self._damage(tier, random.Random(seed), seed)
            tier.close()

    def _damage(self, tier: Tier, rng: random.Random, seed: int) -> None:
        cells = make_cells(rng, [rng.randrange(1, 300) for _ in range(4)])
        tier.put(cells)
        victim, data = cells[rng.randrange(4)]
        at = rng.randrange(len(data))
        flipped = data[:at] + bytes([data[at] ^ (1 << rng.randrange(8))]) + data[at + 1 :]
        lie = [flipped, data[:at], data + b"\0", b"", None][seed % 5]
        if not self.evictable and lie == data + b"\0":
            lie = flipped  # inside a larger object there is no "longer"
        self.plant(tier, victim, lie)
        with pytest.raises(Unusable) as e:
            tier.get(refs(cells))
        assert e.value.key == str(victim.extent), seed
        if self.evictable:
            assert tier.match_prefix([victim]) == 0, f"dropped, seed {seed}"
            assert tier.stats().bad_cells == (lie is not None)
            assert self.peek(tier, victim) is None
            rest = [one for one in cells if one[0] != victim]
            assert plain(tier.get(refs(rest))) == [data for _, data in rest]
            assert tier.put([(victim, data)]) == 1
            assert plain(tier.get([victim])) == [data]

    def test_swapped_cells_are_never_given_out(self, tier: Tier, rng: random.Random) -> None:
        if not self.rereads:
            pytest.skip("nobody can reach this tier's bytes")
        cells = make_cells(rng, [100, 100])
        tier.put(cells)
        self.plant(tier, cells[0][0], cells[1][1])
        self.plant(tier, cells[1][0], cells[0][1])
        for ref in refs(cells):
            with pytest.raises(Unusable, match="checksum"):
                tier.get([ref])

    # --- budget

    def test_the_least_recently_used_goes_first(self, tmp_path: Path, rng: random.Random) -> None:
        self.only_evictable()
        tier = self.make_tier(300, tmp_path)
        a, b, c, d = (make_cells(rng, [100]) for _ in range(4))
        for cells in (a, b, c):
            tier.put(cells)
        tier.get(refs(a))
        tier.put(d)
        assert [tier.match_prefix(refs(cells)) for cells in (a, b, c, d)] == [1, 0, 1, 1]
        assert self.peek(tier, b[0][0]) is None
        tier.put(c)  # putting again is a use, too
        tier.put(b)
        assert [tier.match_prefix(refs(cells)) for cells in (a, b, c, d)] == [0, 1, 1, 1]
        assert tier.stats().evicted_cells == 2
        tier.close()

    def test_of_one_prefix_the_end_goes_before_the_beginning(self, tmp_path: Path, rng: random.Random) -> None:
        self.only_evictable()
        tier = self.make_tier(400, tmp_path)
        cells = make_cells(rng, [100] * 4)
        tier.put(cells)
        tier.put(make_cells(rng, [150]))
        assert tier.match_prefix(refs(cells)) == 2
        tier.close()

    def test_what_can_never_fit_is_not_kept_and_evicts_nothing(self, tmp_path: Path, rng: random.Random) -> None:
        self.only_evictable()
        tier = self.make_tier(300, tmp_path)
        small, large = make_cells(rng, [100, 100]), make_cells(rng, [301])
        tier.put(small)
        assert tier.put(large) == 0
        assert tier.match_prefix(refs(small)) == 2
        assert self.peek(tier, large[0][0]) is None
        tier.close()

    def test_of_more_than_fits_the_beginning_is_kept(self, tmp_path: Path, rng: random.Random) -> None:
        self.only_evictable()
        tier = self.make_tier(350, tmp_path)
        cells = make_cells(rng, [100] * 5)
        assert tier.put(cells) == 3
        assert tier.match_prefix(refs(cells)) == 3
        tier.close()

    def test_evict_frees_what_it_says(self, tier: Tier, rng: random.Random) -> None:
        cells = [make_cells(rng, [100]) for _ in range(5)]
        for one in cells:
            tier.put(one)
        if not self.evictable:
            assert tier.evict(1) == 0
            return
        kept = tier.get(refs(cells[0]))
        assert tier.evict(0) == 0
        assert tier.evict(101) == 200
        assert tier.stats().used_bytes == 300
        assert tier.evict(10_000) == 300
        assert (tier.stats().cells, tier.stats().used_bytes) == (0, 0)
        assert plain(kept) == [cells[0][0][1]], "what was given out stays valid"
        assert all(self.peek(tier, one[0][0]) is None for one in cells)

    def test_discard_forgets(self, tier: Tier, rng: random.Random) -> None:
        cells = make_cells(rng, [100, 100])
        tier.put(cells)
        tier.discard([cells[1][0], make_cells(rng, [5])[0][0]])
        assert plain(tier.get([cells[0][0]])) == [cells[0][1]]
        if self.evictable:
            assert tier.match_prefix(refs(cells)) == 1
            assert tier.stats().used_bytes == 100

    @settings(max_examples=60, deadline=None, suppress_health_check=_PER_CLASS)
    @given(data=st.data())
    def test_any_history_keeps_the_budget_and_the_bytes(
        self, data: st.DataObject, tmp_path_factory: pytest.TempPathFactory
    ) -> None:
        self.only_evictable()
        rng = random.Random(data.draw(st.integers(0, 2**32)))
        budget = data.draw(st.integers(1, 500))
        tier = self.make_tier(budget, tmp_path_factory.mktemp("tier"))
        known: Cells = []
        for _ in range(data.draw(st.integers(1, 12))):
            op = data.draw(st.sampled_from(["put", "put", "again", "get", "evict", "discard"]))
            some = data.draw(st.lists(st.sampled_from(known), max_size=4, unique=True)) if known else []
            if op == "put":
                cells = make_cells(rng, data.draw(st.lists(st.integers(1, 200), min_size=1, max_size=4)))
                kept = tier.put(cells)
                known += cells
                assert kept == sum(tier.match_prefix([ref]) for ref in refs(cells))
            elif op == "again":
                tier.put(some)
            elif op == "get":
                there = [one for one in some if tier.match_prefix([one[0]])]
                assert plain(tier.get(refs(there))) == [one for _, one in there]
            elif op == "evict":
                before, n_bytes = tier.stats().used_bytes, data.draw(st.integers(0, 300))
                assert tier.evict(n_bytes) >= min(n_bytes, before)
            else:
                tier.discard(refs(some))
            peeked = [self.peek(tier, ref) for ref in refs(known)]
            assert sum(len(one) for one in peeked if one is not None) == tier.stats().used_bytes <= budget
            for (ref, right), one in zip(known, peeked, strict=True):
                assert one == (right if tier.match_prefix([ref]) else None)
        tier.close()

    def test_many_threads_keep_the_budget_and_the_bytes(self, tmp_path: Path) -> None:
        budget = 2_000
        tier = self.make_tier(budget, tmp_path)
        shared = [make_cells(random.Random(i), [90, 110]) for i in range(20)]
        over: list[int] = []
        stop = threading.Event()

        def watch() -> None:
            while not stop.is_set():
                used = tier.stats().used_bytes
                if used > budget:
                    over.append(used)

        def work(seed: int) -> int:
            rng = random.Random(seed)
            hits = 0
            for _ in range(60):
                cells = rng.choice(shared)
                if rng.random() < 0.5:
                    tier.put(cells)
                elif rng.random() < 0.1:
                    tier.discard(refs(cells)[:1])
                else:
                    try:
                        assert plain(tier.get(refs(cells))) == [data for _, data in cells]
                        hits += 1
                    except Missing:
                        pass
            return hits

        watcher = threading.Thread(target=watch)
        watcher.start()
        with ThreadPoolExecutor(6) as pool:
            hits = sum(pool.map(work, range(6)))
        stop.set()
        watcher.join()
        assert hits
        assert not over
        held = sum(len(self.peek(tier, ref) or b"") for cells in shared for ref in refs(cells))
        if self.evictable:
            assert held == tier.stats().used_bytes <= budget
        tier.close()

    # --- counting and closing

    def test_counts(self, tier: Tier, rng: random.Random) -> None:
        cells = make_cells(rng, [100, 50])
        tier.put(cells)
        tier.get(refs(cells))
        tier.get(refs(cells)[1:])
        with pytest.raises(Missing):
            tier.get(refs(make_cells(rng, [10])))
        stats = tier.stats()
        assert (stats.hits, stats.misses, stats.read_bytes) == (3, 1, 200)
        assert stats.written_bytes >= 150

    def test_a_closed_tier_says_so(self, tier: Tier, rng: random.Random) -> None:
        self.only_evictable()
        cells = make_cells(rng, [100])
        tier.put(cells)
        tier.close()
        tier.close()
        with pytest.raises(Unavailable) as e:
            tier.get(refs(cells))
        assert e.value.kind == "closed"
        with pytest.raises(Unavailable):
            tier.put(cells)

    # --- durable tiers

    def only_durable(self) -> None:
        if not self.durable:
            pytest.skip("this tier forgets")

    def test_survives_a_restart(self, tmp_path: Path, rng: random.Random) -> None:
        self.only_durable()
        cells = make_cells(rng, [100, 1, 300])
        first = self.make_tier(1_000, tmp_path)
        first.put(cells)
        first.close()
        again = self.make_tier(1_000, tmp_path)
        assert plain(again.get(refs(cells))) == [data for _, data in cells]
        if self.evictable:
            assert again.match_prefix(refs(cells)) == 3
            assert again.stats().used_bytes == 401
        again.close()

    def test_order_of_use_and_a_smaller_budget_after_a_restart(self, tmp_path: Path, rng: random.Random) -> None:
        self.only_durable()
        self.only_evictable()
        a, b, c = (make_cells(rng, [100]) for _ in range(3))
        first = self.make_tier(1_000, tmp_path)
        for cells in (a, b, c):
            first.put(cells)
        first.get(refs(a))
        first.close()
        again = self.make_tier(200, tmp_path)
        assert [again.match_prefix(refs(cells)) for cells in (a, b, c)] == [1, 0, 1]
        assert self.peek(again, b[0][0]) is None
        again.put(b)
        assert [again.match_prefix(refs(cells)) for cells in (a, b, c)] == [1, 1, 0]
        again.close()

    def test_damage_while_away_is_found(self, tmp_path: Path, rng: random.Random) -> None:
        self.only_durable()
        cells = make_cells(rng, [100, 100])
        first = self.make_tier(1_000, tmp_path)
        first.put(cells)
        self.plant(first, cells[0][0], bytes(100))
        self.plant(first, cells[1][0], cells[1][1][:50])
        first.close()
        again = self.make_tier(1_000, tmp_path)
        for ref, kind in zip(refs(cells), ("checksum", "truncated"), strict=True):
            with pytest.raises(Unusable) as e:
                again.get([ref])
            if self.evictable:
                assert e.value.kind == kind
        again.close()
