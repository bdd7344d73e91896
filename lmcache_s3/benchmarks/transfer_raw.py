"""What clients need for the same bytes: obstore, boto3 and ours by ranges and puts, and plain zarr over s3fs.

Each works in a process of its own, so that its CPU time is its own; it starts once and waits for orders, so that
a benchmark can alternate between it and us. What was read is checked for its length and dropped. Raises `Unavailable`
where the client fails or its package is missing.
"""

from __future__ import annotations

import multiprocessing
import os
import resource
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from multiprocessing.connection import Connection
from types import TracebackType
from typing import Any, Literal, Protocol

from lmcache_s3.errors import Unavailable
from lmcache_s3.tiers.stores.open import open_store
from lmcache_s3.tiers.stores.options import StoreOptions

Client = Literal["ours", "obstore", "boto3"]


@dataclass(frozen=True)
class Spent:
    """On one order. seconds: wall time; cpu_s: user and system time of the process; n_bytes: read or written."""

    seconds: float
    cpu_s: float
    n_bytes: int

    @property
    def mb_per_s(self) -> float:
        return self.n_bytes / self.seconds / 1e6

    @property
    def cpu_s_per_gb(self) -> float:
        return self.cpu_s / (self.n_bytes / 1e9)


@dataclass(frozen=True)
class Range:
    """Bytes [start, end) of an object. key: below the client's URL."""

    key: str
    start: int
    end: int


class Meter:
    """`with Meter() as meter: …` then `meter.spent(n_bytes)`: wall and CPU time of this process meanwhile."""

    def __enter__(self) -> Meter:
        self._cpu_s = _cpu_s()
        self._at_s = time.perf_counter()
        return self

    def __exit__(self, kind: type[BaseException] | None, e: BaseException | None, tb: TracebackType | None) -> None:
        self._seconds = time.perf_counter() - self._at_s
        self._spent_cpu_s = _cpu_s() - self._cpu_s

    def spent(self, n_bytes: int) -> Spent:
        return Spent(self._seconds, self._spent_cpu_s, n_bytes)


class RawClient:
    """`with RawClient("s3://bucket/prefix", server.env()) as raw:` then any of its orders, one at a time.

    environment: AWS_ENDPOINT_URL, AWS_ACCESS_KEY_ID, AWS_SECRET_ACCESS_KEY, AWS_REGION. client: that gets and puts.
    busy: a thread of Python code runs beside them, as an engine's does; its CPU time is in `cpu_s`.
    """

    def __init__(
        self, url: str, environment: Mapping[str, str], client: Client = "obstore", *, busy: bool = False
    ) -> None:
        context = multiprocessing.get_context("spawn")
        self._pipe, theirs = context.Pipe()
        self._process = context.Process(target=_serve, args=(theirs, url, dict(environment), client, busy), daemon=True)
        self._process.start()
        theirs.close()

    def get(self, ranges: Sequence[Range], at_once: int) -> Spent:
        """Each read into memory (obstore: of its own), by `at_once` threads."""
        return self._order("get", list(ranges), at_once)

    def put(self, sizes: Mapping[str, int], at_once: int) -> Spent:
        """One PutObject of so many random bytes under each key, by `at_once` threads."""
        return self._order("put", dict(sizes), at_once)

    def zarr(self, arrays: Sequence[str], at_once: int) -> Spent:
        """Each array read whole by zarr over s3fs, decoded as its metadata says, by `at_once` threads. arrays: key
        prefixes below the URL. n_bytes: of the decoded arrays."""
        return self._order("zarr", list(arrays), at_once)

    def __enter__(self) -> RawClient:
        return self

    def __exit__(self, kind: type[BaseException] | None, e: BaseException | None, tb: TracebackType | None) -> None:
        self._pipe.close()  # the process ends with it
        self._process.join(10)
        if self._process.is_alive():
            self._process.kill()
            self._process.join()

    def _order(self, verb: str, what: object, at_once: int) -> Spent:
        try:
            self._pipe.send((verb, what, at_once))
            answer = self._pipe.recv()
        except (EOFError, OSError) as e:
            raise Unavailable(f"{verb}: the process that measures it has ended", kind="closed") from e
        if not isinstance(answer, Spent):
            raise Unavailable(f"{verb}: {answer}", kind="network")
        return answer


def _serve(pipe: Connection, url: str, environment: Mapping[str, str], client: Client, busy: bool) -> None:
    os.environ.update(environment)
    if busy:
        threading.Thread(target=_spin, daemon=True).start()
    pool = ThreadPoolExecutor(64)
    orders: dict[str, Callable[[Any, int, ThreadPoolExecutor], Spent]] = {}
    while True:
        try:
            verb, what, at_once = pipe.recv()
        except (EOFError, OSError):
            return
        try:
            if verb not in orders:
                orders.update(_zarr_orders(url) if verb == "zarr" else _orders(_CLIENTS[client](url)))
            pipe.send(orders[verb](what, at_once, pool))
        except Exception as e:  # noqa: BLE001 (whatever another client raises is told to the process that ordered)
            pipe.send(f"{type(e).__name__}: {e}"[:500])


class _Gets(Protocol):
    def get(self, one: Range) -> int:
        """Bytes read."""
        ...

    def put(self, key: str, body: bytes) -> None: ...


class _Obstore:
    def __init__(self, url: str) -> None:
        import obstore
        from obstore.store import S3Store

        bucket, _, prefix = url.removeprefix("s3://").partition("/")
        self._obstore = obstore
        self._store = S3Store(
            bucket,
            prefix=prefix,
            endpoint=os.environ["AWS_ENDPOINT_URL"],
            virtual_hosted_style_request=False,
            unsigned_payload=True,
            client_options={"allow_http": True},
        )

    def get(self, one: Range) -> int:
        return len(self._obstore.get_range(self._store, one.key, start=one.start, end=one.end))

    def put(self, key: str, body: bytes) -> None:
        self._obstore.put(self._store, key, body, use_multipart=False)


class _Ours:
    def __init__(self, url: str) -> None:
        self._store = open_store(url, options=StoreOptions(max_connections=64))
        self._threads = threading.local()

    def get(self, one: Range) -> int:
        into = _memory(self._threads, one.end - one.start)
        self._store.get_into(one.key, one.start, into)
        return len(into)

    def put(self, key: str, body: bytes) -> None:
        self._store.put(key, body)


class _Boto3:
    """As thrifty as boto3 can be: no checksums of its own, read into given memory, no pause before a body."""

    def __init__(self, url: str) -> None:
        import boto3
        import botocore.config
        import botocore.handlers

        self._bucket, _, self._prefix = url.removeprefix("s3://").partition("/")
        self._client: Any = boto3.client(
            "s3",
            config=botocore.config.Config(
                max_pool_connections=64,
                request_checksum_calculation="when_required",
                response_checksum_validation="when_required",
            ),
        )
        self._client.meta.events.unregister("before-call.s3", botocore.handlers.add_expect_header)
        self._threads = threading.local()

    def get(self, one: Range) -> int:
        into = _memory(self._threads, one.end - one.start)
        asked = {
            "Bucket": self._bucket,
            "Key": f"{self._prefix}/{one.key}",
            "Range": f"bytes={one.start}-{one.end - 1}",
        }
        done = 0
        with self._client.get_object(**asked)["Body"] as body:
            while n := body.readinto(into[done : done + (1 << 20)]):
                done += n
        return done

    def put(self, key: str, body: bytes) -> None:
        self._client.put_object(Bucket=self._bucket, Key=f"{self._prefix}/{key}", Body=body)


_CLIENTS: dict[Client, Callable[[str], _Gets]] = {"ours": _Ours, "obstore": _Obstore, "boto3": _Boto3}


def _memory(threads: threading.local, n_bytes: int) -> memoryview:
    """This thread's buffer: memory that was touched before, as staging memory is."""
    if getattr(threads, "size", -1) < n_bytes:
        threads.buffer, threads.size = bytearray(n_bytes), n_bytes
    return memoryview(threads.buffer)[:n_bytes]


def _orders(client: _Gets) -> dict[str, Callable[[Any, int, ThreadPoolExecutor], Spent]]:
    def get(ranges: list[Range], at_once: int, pool: ThreadPoolExecutor) -> Spent:
        wanted = sum(one.end - one.start for one in ranges)
        with Meter() as meter:
            got = sum(_by_threads(client.get, ranges, at_once, pool))
        if got != wanted:
            raise ValueError(f"{got} bytes of {wanted}")
        return meter.spent(got)

    def put(sizes: dict[str, int], at_once: int, pool: ThreadPoolExecutor) -> Spent:
        bodies = {size: os.urandom(size) for size in set(sizes.values())}

        def put_one(key: str) -> int:
            client.put(key, bodies[sizes[key]])
            return sizes[key]

        with Meter() as meter:
            written = sum(_by_threads(put_one, list(sizes), at_once, pool))
        return meter.spent(written)

    return {"get": get, "put": put}


def _zarr_orders(url: str) -> dict[str, Callable[[Any, int, ThreadPoolExecutor], Spent]]:
    import zarr
    from zarr.storage import FsspecStore

    store = FsspecStore.from_url(
        url, storage_options={"client_kwargs": {"endpoint_url": os.environ["AWS_ENDPOINT_URL"]}}, read_only=True
    )

    def read_one(path: str) -> int:
        array = zarr.open_array(store, path=path, mode="r", zarr_format=3)
        data: Any = array[...]
        return int(data.nbytes)

    def read(arrays: list[str], at_once: int, pool: ThreadPoolExecutor) -> Spent:
        with Meter() as meter:
            n_bytes = sum(_by_threads(read_one, arrays, at_once, pool))
        return meter.spent(n_bytes)

    return {"zarr": read}


def _by_threads(work: Callable[[Any], int], items: Sequence[Any], at_once: int, pool: ThreadPoolExecutor) -> list[int]:
    """`work` of every item, at most `at_once` (≤ 64) at a time."""
    left = iter(items)  # its `next` is one step under the interpreter's lock

    def one_thread(_: int) -> int:
        return sum(work(item) for item in left)

    return list(pool.map(one_thread, range(min(at_once, len(items)))))


def _spin() -> None:
    while True:
        sum(range(100))


def _cpu_s() -> float:
    usage = resource.getrusage(resource.RUSAGE_SELF)
    return usage.ru_utime + usage.ru_stime
