"""What others need for the same bytes: obstore's ranges and puts, and plain zarr over s3fs.

Each client works in a process of its own, so that its CPU time is its own; it starts once and waits for orders, so that
a benchmark can alternate between it and us. What was read is checked for its length and dropped. Raises `Unavailable`
where the client fails or its package is missing.
"""

from __future__ import annotations

import multiprocessing
import os
import resource
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from multiprocessing.connection import Connection
from types import TracebackType
from typing import Any

from lmcache_s3.errors import Unavailable


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

    environment: AWS_ENDPOINT_URL, AWS_ACCESS_KEY_ID, AWS_SECRET_ACCESS_KEY, AWS_REGION.
    """

    def __init__(self, url: str, environment: Mapping[str, str]) -> None:
        context = multiprocessing.get_context("spawn")
        self._pipe, theirs = context.Pipe()
        self._process = context.Process(target=_serve, args=(theirs, url, dict(environment)), daemon=True)
        self._process.start()
        theirs.close()

    def get(self, ranges: Sequence[Range], at_once: int) -> Spent:
        """obstore `get_range` of each into memory of obstore's own, by `at_once` threads."""
        return self._order("get", list(ranges), at_once)

    def put(self, sizes: Mapping[str, int], at_once: int) -> Spent:
        """obstore `put` (one PutObject each) of so many random bytes under each key, by `at_once` threads."""
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


def _serve(pipe: Connection, url: str, environment: Mapping[str, str]) -> None:
    os.environ.update(environment)
    pool = ThreadPoolExecutor(64)
    clients: dict[str, Callable[[Any, int, ThreadPoolExecutor], Spent]] = {}
    while True:
        try:
            verb, what, at_once = pipe.recv()
        except (EOFError, OSError):
            return
        try:
            if verb not in clients:
                clients.update(_zarr_client(url) if verb == "zarr" else _obstore_client(url))
            pipe.send(clients[verb](what, at_once, pool))
        except Exception as e:  # noqa: BLE001 (whatever another client raises is told to the process that ordered)
            pipe.send(f"{type(e).__name__}: {e}"[:500])


def _obstore_client(url: str) -> dict[str, Callable[[Any, int, ThreadPoolExecutor], Spent]]:
    import obstore
    from obstore.store import S3Store

    bucket, _, prefix = url.removeprefix("s3://").partition("/")
    store = S3Store(
        bucket,
        prefix=prefix,
        endpoint=os.environ["AWS_ENDPOINT_URL"],
        virtual_hosted_style_request=False,
        unsigned_payload=True,
        client_options={"allow_http": True},
    )

    def get_one(one: Range) -> int:
        return len(obstore.get_range(store, one.key, start=one.start, end=one.end))

    def get(ranges: list[Range], at_once: int, pool: ThreadPoolExecutor) -> Spent:
        wanted = sum(one.end - one.start for one in ranges)
        with Meter() as meter:
            got = sum(_by_threads(get_one, ranges, at_once, pool))
        if got != wanted:
            raise ValueError(f"{got} bytes of {wanted}")
        return meter.spent(got)

    def put(sizes: dict[str, int], at_once: int, pool: ThreadPoolExecutor) -> Spent:
        bodies = {size: os.urandom(size) for size in set(sizes.values())}

        def put_one(key: str) -> int:
            obstore.put(store, key, bodies[sizes[key]], use_multipart=False)
            return sizes[key]

        with Meter() as meter:
            written = sum(_by_threads(put_one, list(sizes), at_once, pool))
        return meter.spent(written)

    return {"get": get, "put": put}


def _zarr_client(url: str) -> dict[str, Callable[[Any, int, ThreadPoolExecutor], Spent]]:
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


def _cpu_s() -> float:
    usage = resource.getrusage(resource.RUSAGE_SELF)
    return usage.ru_utime + usage.ru_stime
