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
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import ClassVar

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from lmcache_s3.errors import Missing, Unavailable, Unusable
from lmcache_s3.testing.cells import Cells, make_cells, plain, refs
from lmcache_s3.tiers.base import Tier
from lmcache_s3.types import CellRef, Grid

_PER_CLASS = [HealthCheck.differing_executors]  # the examples of one subclass are as good for the others


class TierTests:
    """The conformance suite. Attributes a subclass may set:

    durable: another tier over the same path has what this one kept. evictable: it has a budget. rereads: its bytes lie
    where others can damage them, so it verifies what it reads, not only what it is given. cuts: a cell can be cut short
    or taken away without touching others. lends: what `get` gives out is the tier's own memory.
    unit_bytes: room is given in multiples of it; cell_bytes: of a cell's room, what is not its bytes; fixed_bytes: of
    the budget, what is not for cells.
    """

    durable: ClassVar[bool] = False
    evictable: ClassVar[bool] = True
    rereads: ClassVar[bool] = False
    cuts: ClassVar[bool] = True
    lends: ClassVar[bool] = False
    unit_bytes: ClassVar[int] = 1
    cell_bytes: ClassVar[int] = 0
    fixed_bytes: ClassVar[int] = 0

    def length(self, units: int) -> int:
        """Length of a cell that takes so many units."""
        return units * self.unit_bytes - self.cell_bytes

    def lengths(self, *units: int) -> list[int]:
        return [self.length(one) for one in units]

    def room(self, n_bytes: int) -> int:
        """What a cell of so many bytes takes. Exact up to 16 units."""
        return -(-(n_bytes + self.cell_bytes) // self.unit_bytes) * self.unit_bytes

    def make_tier_of(self, units: int, path: Path) -> Tier:
        """A tier with room for so many units."""
        return self.make_tier(self.fixed_bytes + units * self.unit_bytes, path)

    def make_tier(self, budget_bytes: int, path: Path) -> Tier:
        raise AssertionError("a subclass gives a tier")

    def plant(self, tier: Tier, cell: CellRef, data: bytes | None) -> None:
        raise AssertionError("a subclass reaches behind the tier")

    def peek(self, tier: Tier, cell: CellRef) -> bytes | None:
        raise AssertionError("a subclass reaches behind the tier")

    @pytest.fixture
    def tier(self, tmp_path: Path) -> Iterator[Tier]:
        tier = self.make_tier_of(1_000, tmp_path)
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
            assert (tier.stats().cells, tier.stats().used_bytes) == (2, 2 * self.room(100))

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
            tier = self.make_tier_of(1_000, tmp_path / str(seed))
            self._damage(tier, random.Random(seed), seed)
            tier.close()

    def _damage(self, tier: Tier, rng: random.Random, seed: int) -> None:
        cells = make_cells(rng, [rng.randrange(1, 300) for _ in range(4)])
        tier.put(cells)
        victim, data = cells[rng.randrange(4)]
        at = rng.randrange(len(data))
        flipped = data[:at] + bytes([data[at] ^ (1 << rng.randrange(8))]) + data[at + 1 :]
        lies = [flipped, data[:at], b"", None] if self.cuts else [flipped]
        lie = lies[seed % len(lies)]
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
        tier = self.make_tier_of(12, tmp_path)
        a, b, c, d = (make_cells(rng, self.lengths(4)) for _ in range(4))
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
        tier = self.make_tier_of(16, tmp_path)
        cells = make_cells(rng, self.lengths(4, 4, 4, 4))
        tier.put(cells)
        tier.put(make_cells(rng, self.lengths(6)))
        assert tier.match_prefix(refs(cells)) == 2
        tier.close()

    def test_no_cell_is_held_longer_than_the_one_before_it(self, tmp_path: Path, rng: random.Random) -> None:
        """Whatever was used last: the end alone, or other branches of the same prompt."""
        self.only_evictable()
        tier = self.make_tier_of(24, tmp_path)
        cells = make_cells(rng, self.lengths(4, 4, 4))
        branch = [
            (replace(one, prefix_hash=rng.randbytes(16), parent=cells[0][0].prefix_hash, first_token=256), data)
            for one, data in make_cells(rng, self.lengths(4))
        ]
        tier.put(cells)
        tier.put(branch)
        tier.get(refs(cells)[2:])
        held: list[tuple[bool, ...]] = []
        while tier.evict(1):
            held.append(tuple(bool(tier.match_prefix([one])) for one in refs(cells + branch)))
        for first, second, third, other in held:
            assert first >= second >= third
            assert first >= other
        tier.close()

    def test_room_for_the_end_is_never_made_of_the_beginning(self, tmp_path: Path, rng: random.Random) -> None:
        self.only_evictable()
        tier = self.make_tier_of(8, tmp_path)
        cells = make_cells(rng, self.lengths(4, 4, 4))
        assert tier.put(cells[:2]) == 2
        assert tier.put(cells[2:]) + tier.put(cells) == 2
        assert tier.match_prefix(refs(cells)) == 2
        tier.close()

    def test_what_can_never_fit_is_not_kept_and_evicts_nothing(self, tmp_path: Path, rng: random.Random) -> None:
        self.only_evictable()
        tier = self.make_tier_of(12, tmp_path)
        small, large = make_cells(rng, self.lengths(4, 4)), make_cells(rng, self.lengths(13))
        tier.put(small)
        assert tier.put(large) == 0
        assert tier.match_prefix(refs(small)) == 2
        assert self.peek(tier, large[0][0]) is None
        tier.close()

    def test_of_more_than_fits_the_beginning_is_kept(self, tmp_path: Path, rng: random.Random) -> None:
        self.only_evictable()
        tier = self.make_tier_of(14, tmp_path)
        cells = make_cells(rng, self.lengths(4, 4, 4, 4, 4))
        assert tier.put(cells) == 3
        assert tier.match_prefix(refs(cells)) == 3
        tier.close()

    def test_evict_frees_what_it_says(self, tier: Tier, rng: random.Random) -> None:
        cells = [make_cells(rng, self.lengths(4)) for _ in range(5)]
        for one in cells:
            tier.put(one)
        if not self.evictable:
            assert tier.evict(1) == 0
            return
        assert tier.evict(0) == 0
        assert tier.evict(5 * self.unit_bytes) == 8 * self.unit_bytes
        assert tier.stats().used_bytes == 12 * self.unit_bytes
        assert tier.evict(10_000 * self.unit_bytes) == 12 * self.unit_bytes
        assert (tier.stats().cells, tier.stats().used_bytes) == (0, 0)
        assert all(self.peek(tier, one[0][0]) is None for one in cells)

    def test_what_was_given_out_stays_valid_and_counts_while_it_does(self, tmp_path: Path, rng: random.Random) -> None:
        self.only_evictable()
        tier = self.make_tier_of(12, tmp_path)
        a, b, c, d = (make_cells(rng, self.lengths(4)) for _ in range(4))
        for cells in (a, b, c):
            tier.put(cells)
        kept = tier.get(refs(a))
        view = memoryview(kept[0])[1:100]
        del kept
        tier.get(refs(b) + refs(c))
        assert tier.put(d) == 1
        assert tier.match_prefix(refs(a)) == self.lends, "what is being read is spared"
        tier.evict(10_000 * self.unit_bytes)
        assert tier.stats().cells == 0
        assert tier.stats().used_bytes == (4 * self.unit_bytes if self.lends else 0)
        e = [make_cells(rng, self.lengths(4)) for _ in range(3)]
        assert sum(tier.put(cells) for cells in e) == 3, "the others make room for each other"
        assert sum(tier.match_prefix(refs(cells)) for cells in e) == (2 if self.lends else 3)
        assert bytes(view) == a[0][1][1:100]
        del view
        assert tier.stats().used_bytes <= 12 * self.unit_bytes
        assert tier.put(a) == 1
        assert plain(tier.get(refs(a))) == [a[0][1]]
        tier.close()

    def test_another_extents_copy_of_a_chunk_takes_its_place(self, tier: Tier, rng: random.Random) -> None:
        self.only_evictable()
        old, new = make_cells(rng, [100]), make_cells(rng, [120])
        new = [(replace(new[0][0], prefix_hash=old[0][0].prefix_hash), new[0][1])]
        assert (tier.put(old), tier.put(new)) == (1, 1)
        assert [tier.match_prefix(refs(one)) for one in (old, new)] == [0, 1]
        assert plain(tier.get(refs(new))) == [new[0][1]]
        assert tier.stats().used_bytes == self.room(120)

    def test_discard_forgets(self, tier: Tier, rng: random.Random) -> None:
        cells = make_cells(rng, [100, 100])
        tier.put(cells)
        tier.discard([cells[1][0], make_cells(rng, [5])[0][0]])
        assert plain(tier.get([cells[0][0]])) == [cells[0][1]]
        if self.evictable:
            assert tier.match_prefix(refs(cells)) == 1
            assert tier.stats().used_bytes == self.room(100)

    @settings(max_examples=60, deadline=None, suppress_health_check=_PER_CLASS)
    @given(data=st.data())
    def test_any_history_keeps_the_budget_and_the_bytes(
        self, data: st.DataObject, tmp_path_factory: pytest.TempPathFactory
    ) -> None:
        self.only_evictable()
        rng = random.Random(data.draw(st.integers(0, 2**32)))
        units = data.draw(st.integers(1, 50))
        tier = self.make_tier_of(units, tmp_path_factory.mktemp("tier"))
        known: Cells = []
        for _ in range(data.draw(st.integers(1, 12))):
            op = data.draw(st.sampled_from(["put", "put", "again", "get", "evict", "discard"]))
            some = data.draw(st.lists(st.sampled_from(known), max_size=4, unique=True)) if known else []
            if op == "put":
                lengths = st.integers(1, self.length(16))
                cells = make_cells(rng, data.draw(st.lists(lengths, min_size=1, max_size=4)))
                kept = tier.put(cells)
                known += cells
                assert kept == sum(tier.match_prefix([ref]) for ref in refs(cells))
            elif op == "again":
                tier.put(some)
            elif op == "get":
                there = [one for one in some if tier.match_prefix([one[0]])]
                assert plain(tier.get(refs(there))) == [one for _, one in there]
            elif op == "evict":
                before, n_bytes = tier.stats().used_bytes, data.draw(st.integers(0, 30 * self.unit_bytes))
                assert tier.evict(n_bytes) >= min(n_bytes, before)
            else:
                tier.discard(refs(some))
            peeked = [self.peek(tier, ref) for ref in refs(known)]
            used = sum(self.room(len(one)) for one in peeked if one is not None)
            assert used == tier.stats().used_bytes <= units * self.unit_bytes
            for (ref, right), one in zip(known, peeked, strict=True):
                assert one == (right if tier.match_prefix([ref]) else None)
        tier.close()

    def test_many_threads_keep_the_budget_and_the_bytes(self, tmp_path: Path) -> None:
        budget = 20 * self.unit_bytes
        tier = self.make_tier_of(20, tmp_path)
        shared = [make_cells(random.Random(i), self.lengths(1, 2)) for i in range(20)]
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
        found = [self.peek(tier, ref) for cells in shared for ref in refs(cells)]
        if self.evictable:
            assert sum(self.room(len(one)) for one in found if one) == tier.stats().used_bytes <= budget
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
        first = self.make_tier_of(100, tmp_path)
        first.put(cells)
        first.close()
        again = self.make_tier_of(100, tmp_path)
        assert plain(again.get(refs(cells))) == [data for _, data in cells]
        if self.evictable:
            assert again.match_prefix(refs(cells)) == 3
            assert again.stats().used_bytes == sum(self.room(n_bytes) for n_bytes in (100, 1, 300))
        again.close()

    def test_order_of_use_and_a_smaller_budget_after_a_restart(self, tmp_path: Path, rng: random.Random) -> None:
        self.only_durable()
        self.only_evictable()
        a, b, c = (make_cells(rng, self.lengths(4)) for _ in range(3))
        first = self.make_tier_of(100, tmp_path)
        for cells in (a, b, c):
            first.put(cells)
        first.get(refs(a))
        first.close()
        again = self.make_tier_of(8, tmp_path)
        assert [again.match_prefix(refs(cells)) for cells in (a, b, c)] == [1, 0, 1]
        assert self.peek(again, b[0][0]) is None
        again.put(b)
        assert [again.match_prefix(refs(cells)) for cells in (a, b, c)] == [1, 1, 0]
        again.close()

    def test_damage_while_away_is_found(self, tmp_path: Path, rng: random.Random) -> None:
        self.only_durable()
        cells = make_cells(rng, [100, 100])
        first = self.make_tier_of(100, tmp_path)
        first.put(cells)
        self.plant(first, cells[0][0], bytes(100))
        self.plant(first, cells[1][0], cells[1][1][:50] + bytes(0 if self.cuts else 50))
        first.close()
        again = self.make_tier_of(100, tmp_path)
        for ref in refs(cells):
            with pytest.raises(Unusable):  # one cut short is not even taken over
                again.get([ref])
        again.close()
