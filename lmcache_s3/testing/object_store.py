"""What every `ObjectStore` must do: a suite to subclass, for our stores and anybody else's.

    class TestMyStore(ObjectStoreTests):
        @pytest.fixture
        def store(self): ...                    # a fresh, empty store; close it afterwards
        def plant(self, store, key, data): ...  # write an object without using the store's own methods
        def peek(self, store, key): ...         # read one so, or None

`plant` and `peek` go behind the store's back, so that a store is never judged by itself. Lacking abilities and slow
servers are stated by the class attributes. The suite does not check durability (no power cut here) nor what happens on
a bad network.
"""

from __future__ import annotations

import copy
import itertools
import threading
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from typing import ClassVar

import pytest

from lmcache_s3.errors import Invalid, LMCacheS3Error, Missing, Unavailable, Unusable
from lmcache_s3.tiers.stores.base import ObjectStore
from lmcache_s3.types import Outcome

_ODD_NAMES = (
    "a b", "a+b", "a%2Fb", "a&b", "a'b", 'a"b', "a<b>", "a=b,c", "a~!@$^()[]{}", "a#b", "a:b;c", "ü€", "a*b", "ﾮ", "𐍈",
)  # fmt: skip
_BAD_KEYS = ("", "/a", "a/", "a//b", "..", "../a", "a/../b", "a/.", "./a", "a\nb", "a\0b", "\ud800", "k" * 901)
_VERBS: dict[str, Callable[[ObjectStore, str], object]] = {
    "get": lambda store, key: store.get(key),
    "get_into": lambda store, key: store.get_into(key, 0, memoryview(bytearray(1))),
    "put": lambda store, key: store.put(key, b"x"),
    "create": lambda store, key: store.create(key, b"x"),
    "delete": lambda store, key: store.delete(key),
}


class ObjectStoreTests:
    """The conformance suite. Attributes a subclass may set:

    says_lost: a create that finds something answers LOST (False: UNKNOWN, for clients that may send it twice).
    sorts_directories: `a-b` is listed before `a/b` (False: SeaweedFS).
    race_threads, race_keys: size of the creators' race. many_keys: for paging; over 1,000 crosses S3's page.
    """

    says_lost: ClassVar[bool] = True
    sorts_directories: ClassVar[bool] = True
    race_threads: ClassVar[int] = 8
    race_keys: ClassVar[int] = 10
    many_keys: ClassVar[int] = 1050

    @pytest.fixture
    def store(self) -> Iterable[ObjectStore]:
        raise AssertionError("a subclass gives a fresh store")

    def plant(self, store: ObjectStore, key: str, data: bytes) -> None:
        raise AssertionError("a subclass writes behind the store's back")

    def peek(self, store: ObjectStore, key: str) -> bytes | None:
        raise AssertionError("a subclass reads behind the store's back")

    @property
    def lost(self) -> Outcome:
        return Outcome.LOST if self.says_lost else Outcome.UNKNOWN

    def test_it_is_an_object_store(self, store: ObjectStore) -> None:
        assert isinstance(store, ObjectStore)
        assert "://" in store.url

    # get

    def test_get_gives_exactly_the_range(self, store: ObjectStore) -> None:
        self.plant(store, "d/ten", b"0123456789")
        for start, end in [(0, None), (0, 10), (0, 1), (3, 7), (9, 10), (3, None), (9, None), (4, 4), (0, 0)]:
            assert store.get("d/ten", start, end) == b"0123456789"[start:end], (start, end)

    def test_get_of_an_empty_object(self, store: ObjectStore) -> None:
        self.plant(store, "empty", b"")
        assert store.get("empty") == b""
        assert store.get("empty", limit_bytes=10) == b""

    def test_a_range_beyond_the_end_is_truncated_never_short_bytes(self, store: ObjectStore) -> None:
        self.plant(store, "d/ten", b"0123456789")
        for start, end in [(0, 11), (5, 11), (9, 20), (10, 11), (50, 60), (10, None), (50, None)]:
            with pytest.raises(Unusable) as e:
                store.get("d/ten", start, end)
            assert (e.value.kind, e.value.key) == ("truncated", "d/ten"), (start, end)

    def test_a_range_of_an_empty_object_is_truncated(self, store: ObjectStore) -> None:
        self.plant(store, "empty", b"")
        with pytest.raises(Unusable) as e:
            store.get("empty", 0, 1)
        assert e.value.kind == "truncated"

    def test_get_refuses_more_than_the_limit(self, store: ObjectStore) -> None:
        self.plant(store, "ten", b"0123456789")
        assert store.get("ten", limit_bytes=10) == b"0123456789"
        assert store.get("ten", 2, limit_bytes=8) == b"23456789"
        for start, end, limit_bytes in [(0, None, 9), (0, 10, 9), (2, None, 7), (0, None, 0)]:
            with pytest.raises(Unusable) as e:
                store.get("ten", start, end, limit_bytes=limit_bytes)
            assert (e.value.kind, e.value.key) == ("oversized", "ten")

    def test_a_backward_range_is_invalid(self, store: ObjectStore) -> None:
        self.plant(store, "ten", b"0123456789")
        for start, end in [(-1, None), (-5, -1), (5, 4)]:
            with pytest.raises(Invalid):
                store.get("ten", start, end)

    def test_missing_object(self, store: ObjectStore) -> None:
        self.plant(store, "d/there", b"x")
        into = memoryview(bytearray(1))
        for key in ("absent", "d/absent", "d", "e/f/g"):
            for call in (
                lambda k=key: store.get(k),
                lambda k=key: store.get(k, 2, 3),
                lambda k=key: store.get(k, limit_bytes=5),
                lambda k=key: store.get_into(k, 0, into),
            ):
                with pytest.raises(Missing) as e:
                    call()
                assert (e.value.kind, e.value.key) == ("missing", key)

    def test_get_into_fills_the_view_and_nothing_else(self, store: ObjectStore) -> None:
        data = bytes(i % 251 for i in range(300_000))
        self.plant(store, "big", data)
        buffer = bytearray(b"\xff" * 200_010)
        store.get_into("big", 50_000, memoryview(buffer)[5:-5])
        assert bytes(buffer) == b"\xff" * 5 + data[50_000:250_000] + b"\xff" * 5

    def test_get_into_of_a_short_object_is_truncated(self, store: ObjectStore) -> None:
        self.plant(store, "ten", b"0123456789")
        for start, size in [(0, 11), (5, 6), (10, 1), (20, 5)]:
            with pytest.raises(Unusable) as e:
                store.get_into("ten", start, memoryview(bytearray(size)))
            assert (e.value.kind, e.value.key) == ("truncated", "ten")

    def test_many_threads_read_at_once(self, store: ObjectStore) -> None:
        data = bytes(i % 256 for i in range(64_000))
        self.plant(store, "shared", data)

        def read(i: int) -> bool:
            start, end = 100 * i, 100 * i + 5000
            into = bytearray(end - start)
            store.get_into("shared", start, memoryview(into))
            return bytes(into) == data[start:end] == store.get("shared", start, end)

        with ThreadPoolExecutor(16) as pool:
            assert all(pool.map(read, range(200)))

    # put

    def test_put_writes_the_whole_object(self, store: ObjectStore) -> None:
        for size in (0, 1, 70_000, 9 << 20):
            data = bytes(i % 253 for i in range(1000)) * (size // 1000) + b"e" * (size % 1000)
            store.put("a/b/c", data)
            assert self.peek(store, "a/b/c") == data, size

    def test_put_takes_any_buffer(self, store: ObjectStore) -> None:
        for data in (b"abcdef", bytearray(b"abcdef"), memoryview(b"xabcdefx")[1:-1], memoryview(b"abcdef").cast("H")):
            store.put("key", b"other")
            store.put("key", data)
            assert self.peek(store, "key") == b"abcdef"
            store.delete("key")
            assert store.create("key", data) is Outcome.WON
            assert self.peek(store, "key") == b"abcdef"

    def test_put_replaces_and_is_read_at_once(self, store: ObjectStore) -> None:
        for data in (b"long enough", b"short", b"", b"longer than all the others"):
            store.put("key", data)
            assert store.get("key") == data
            assert self.peek(store, "key") == data
            assert [info.size_bytes for info in store.list("key")] == [len(data)]

    def test_a_reader_never_sees_part_of_a_put(self, store: ObjectStore) -> None:
        size = 400_000
        store.put("key", b"0" * size)
        done = threading.Event()

        def write() -> None:
            try:
                for i in range(20):
                    store.put("key", b"%d" % (i % 10) * size)
            finally:
                done.set()

        def read() -> int:
            reads = 0
            while not done.is_set() or reads == 0:
                data = store.get("key")
                assert len(data) == size
                assert data.count(data[:1]) == size
                reads += 1
            return reads

        with ThreadPoolExecutor(3) as pool:
            writer, *readers = pool.submit(write), pool.submit(read), pool.submit(read)
            writer.result()
            assert all(reader.result() for reader in readers)

    # create

    def test_create_wins_once(self, store: ObjectStore) -> None:
        assert store.create("log/1", b"first") is Outcome.WON
        assert store.create("log/1", b"second") is self.lost
        assert self.peek(store, "log/1") == b"first"

    def test_create_loses_to_what_others_put(self, store: ObjectStore) -> None:
        self.plant(store, "log/1", b"planted")
        self.plant(store, "log/empty", b"")
        assert store.create("log/1", b"mine") is self.lost
        assert store.create("log/empty", b"mine") is self.lost
        assert self.peek(store, "log/1") == b"planted"
        assert self.peek(store, "log/empty") == b""

    def test_create_wins_again_after_delete(self, store: ObjectStore) -> None:
        assert store.create("log/1", b"first") is Outcome.WON
        store.delete("log/1")
        assert store.create("log/1", b"second") is Outcome.WON
        assert self.peek(store, "log/1") == b"second"

    def test_of_racing_creators_exactly_one_wins(self, store: ObjectStore) -> None:
        self.race([store] * self.race_threads)

    def race(self, stores: list[ObjectStore]) -> None:
        """All stores (over one root) create the same keys at once; each key has one winner, and holds its bytes."""
        barrier = threading.Barrier(len(stores))
        bodies = [b"%03d" % i * 5000 for i in range(len(stores))]

        def creator(i: int) -> list[Outcome]:
            outcomes = []
            for n in range(self.race_keys):
                barrier.wait(timeout=60)
                outcomes.append(stores[i].create(f"race/{n:020}", bodies[i]))
            return outcomes

        with ThreadPoolExecutor(len(stores)) as pool:
            by_creator = list(pool.map(creator, range(len(stores))))
        for n in range(self.race_keys):
            outcomes = [by_creator[i][n] for i in range(len(stores))]
            winners = [i for i, outcome in enumerate(outcomes) if outcome is Outcome.WON]
            assert len(winners) == 1, outcomes
            assert self.peek(stores[0], f"race/{n:020}") == bodies[winners[0]]

    # delete

    def test_delete(self, store: ObjectStore) -> None:
        self.plant(store, "a/b", b"1")
        self.plant(store, "a/c", b"2")
        store.delete("a/b")
        assert self.peek(store, "a/b") is None
        assert self.peek(store, "a/c") == b"2"
        with pytest.raises(Missing):
            store.get("a/b")
        assert [info.key for info in store.list("")] == ["a/c"]

    def test_delete_of_what_is_absent_is_fine(self, store: ObjectStore) -> None:
        self.plant(store, "a/b", b"1")
        for key in ("x", "x/y/z", "a/c", "a/b", "a/b"):
            store.delete(key)
        assert list(store.list("")) == []

    # list

    def test_list_tells_keys_sizes_and_times(self, store: ObjectStore) -> None:
        assert list(store.list("")) == []
        for key, size in (("b/2", 7), ("a", 0), ("b/1", 3), ("c/d/e/f", 11)):
            self.plant(store, key, b"x" * size)
        infos = list(store.list(""))
        assert [(info.key, info.size_bytes) for info in infos] == [("a", 0), ("b/1", 3), ("b/2", 7), ("c/d/e/f", 11)]
        times = [info.modified_s for info in infos]
        assert max(times) - min(times) < 300
        assert min(times) > 1.7e9

    def test_list_by_prefix(self, store: ObjectStore) -> None:
        keys = ["a/b/1", "a/b/2", "a/bc/1", "a/c", "b/1"]
        for key in keys:
            self.plant(store, key, b"x")
        for prefix in ("", "a", "a/", "a/b", "a/b/", "a/b/1", "a/b/12", "a/bc", "b", "c", "c/", "a/b/1/", "a/c/"):
            assert [i.key for i in store.list(prefix)] == [k for k in keys if k.startswith(prefix)], prefix

    def test_list_start_after_and_limit(self, store: ObjectStore) -> None:
        keys = [f"log/{n:03}" for n in range(12)]
        for key in keys:
            self.plant(store, key, b"x")
        self.plant(store, "other", b"x")
        for start_after in ("", "log", "log/", "log/000", "log/0045", "log/005", "log/011", "log/zzz", "zzz"):
            after = [key for key in keys if key > start_after]
            for limit in (None, 1, 5, 100):
                assert [i.key for i in store.list("log/", start_after, limit)] == after[:limit], (start_after, limit)
        assert list(store.list("log/", limit=0)) == []

    def test_list_pages(self, store: ObjectStore) -> None:
        keys = [f"p/{n:06}" for n in range(self.many_keys)]
        self.plant(store, keys[0], b"")  # directories are made before threads race to
        with ThreadPoolExecutor(8) as pool:
            list(pool.map(lambda key: self.plant(store, key, b""), keys[1:]))
        assert [i.key for i in store.list("p/")] == keys
        assert [i.key for i in store.list("p/", keys[3])] == keys[4:]
        most = self.many_keys - 20
        assert [i.key for i in store.list("p/", limit=most)] == keys[:most]
        assert [i.key for i in itertools.islice(store.list(""), 5)] == keys[:5]

    def test_odd_names_come_back_as_they_went_in_code_point_order(self, store: ObjectStore) -> None:
        for name in _ODD_NAMES:
            store.put(f"odd/{name}", name.encode())
            assert self.peek(store, f"odd/{name}") == name.encode(), name
            assert store.get(f"odd/{name}") == name.encode(), name
        assert [i.key for i in store.list("odd/")] == sorted(f"odd/{name}" for name in _ODD_NAMES)
        for name in _ODD_NAMES:
            assert [i.key for i in store.list(f"odd/{name}", limit=1)] == [f"odd/{name}"]
            store.delete(f"odd/{name}")
        assert list(store.list("odd/")) == []

    def test_list_order_of_a_directory_among_its_siblings(self, store: ObjectStore) -> None:
        if not self.sorts_directories:
            pytest.skip("this server sorts a directory as its bare name")
        keys = ["a!/x", "a-b", "a-b.c/y", "a.d", "a/b", "a/c/d", "a0"]
        for key in keys:
            self.plant(store, key, b"x")
        assert [i.key for i in store.list("")] == keys
        for start_after in keys:
            assert [i.key for i in store.list("", start_after)] == [k for k in keys if k > start_after]
            assert [i.key for i in store.list("a", start_after, 2)] == [k for k in keys if k > start_after][:2]

    # errors

    @pytest.mark.parametrize("verb", _VERBS)
    def test_bad_keys_are_refused(self, store: ObjectStore, verb: str) -> None:
        for key in _BAD_KEYS:
            with pytest.raises(Invalid) as e:
                _VERBS[verb](store, key)
            assert e.value.kind == "argument", key

    def test_bad_prefixes_are_refused_by_the_call(self, store: ObjectStore) -> None:
        for prefix in ("/", "/a", "../", "a/../b", "a//b", "a\n"):
            with pytest.raises(Invalid):
                store.list(prefix)

    def test_errors_survive_a_trip_to_another_process(self, store: ObjectStore) -> None:
        with pytest.raises(Missing) as e:
            store.get("absent")
        again = copy.deepcopy(e.value)  # what pickling does, too
        assert (type(again), str(again), again.kind, again.key) == (Missing, str(e.value), "missing", "absent")
        assert "\n" not in str(again)

    def test_a_closed_store_is_unavailable(self, store: ObjectStore) -> None:
        self.plant(store, "key", b"x")
        store.close()
        store.close()
        for verb in (*_VERBS.values(), lambda store, key: list(store.list(key))):
            with pytest.raises(Unavailable) as e:
                verb(store, "key")  # type: ignore[no-untyped-call]
            assert e.value.kind == "closed"
            assert isinstance(e.value, LMCacheS3Error)
