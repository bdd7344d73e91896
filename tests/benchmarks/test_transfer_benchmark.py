"""The benchmark of the data path: its made-up link and engine do what they say; all of it runs, and is named right."""

from __future__ import annotations

import json
import threading
import time
from pathlib import Path

import numpy as np
import pytest

from lmcache_s3.benchmarks import transfer
from lmcache_s3.benchmarks.transfer_parts import LLAMA_1B, Engine, LinkedStore, LinkSpeed, made_up_kv
from lmcache_s3.testing.small import fresh_memory_url
from lmcache_s3.tiers.stores.open import open_store


def test_what_the_sink_wrote_is_what_is_read() -> None:
    kv, engine = made_up_kv(LLAMA_1B, 2), Engine(LLAMA_1B, 2)
    n = LLAMA_1B.chunk_tokens
    for chunk in (2, 3):
        engine.sink(chunk, range(16), range(8), kv[:, :, (chunk - 2) * n : (chunk - 1) * n])
    out = np.empty_like(kv[:, :, :n])
    for chunk in (0, 1):
        engine.read(chunk, out)
        assert np.array_equal(out, kv[:, :, chunk * n : (chunk + 1) * n])


def test_the_made_up_link_is_never_faster_than_it_says_and_is_shared() -> None:
    store = LinkedStore(open_store(fresh_memory_url()), LinkSpeed(0.01, 20e6))
    data = bytes(range(256)) * 4096
    store.put("a", data)
    buffers = [bytearray(len(data)) for _ in range(2)]
    start_s = time.monotonic()
    threads = [threading.Thread(target=store.get_into, args=("a", 0, memoryview(buffer))) for buffer in buffers]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert time.monotonic() - start_s >= 0.01 + 2 * len(data) / 20e6
    assert buffers == [data, data]


@pytest.mark.slow
@pytest.mark.s3
def test_it_measures_what_it_says(tmp_path: Path) -> None:
    path = tmp_path / "figures.json"
    transfer.main(path, extents=2, rounds=1, loads=8)
    figures = {figure["name"]: figure for figure in json.loads(path.read_text())["figures"]}
    goals = {
        "get_vs_raw": 0.9,
        "put_vs_raw": 0.9,
        "get_cpu_s_per_gb": 0.8,
        "get_vs_s3fs_zarr": 3,
        "gets_per_4096_tokens_read": 16,
        "puts_per_4096_tokens_stored": 3,
        "overlap": 1.15,
        "peak_over_budget": 0,
        "relayout_overread": 1.1,
        "slow_tail_p99_ratio": 1.5,
    }
    assert {name: figures[f"transfer.{name}"]["goal"] for name in goals} == goals
    for name in ("gets_per_4096_tokens_read", "puts_per_4096_tokens_stored", "peak_over_budget", "relayout_overread"):
        assert figures[f"transfer.{name}"]["ok"], name
