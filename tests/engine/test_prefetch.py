"""What waits in the engine's queue is brought into the host tier meanwhile, and so is a chat's next turn."""

from __future__ import annotations

import time
from pathlib import Path

import pytest

pytest.importorskip("vllm", reason="the real vLLM is needed: make setup")

from vllm.sampling_params import SamplingParams
from vllm.v1.request import Request

from lmcache_s3.handle import Work
from lmcache_s3.integrations.vllm.prefetching import Queue
from lmcache_s3.loading import LoadReport
from tests.engine.test_roles import CHUNK, Engine, prompt

pytestmark = pytest.mark.engine


@pytest.fixture
def url(tmp_path: Path) -> str:
    (tmp_path / "bucket").mkdir()
    return f"file://{tmp_path}/bucket"


def stored(url: str, tokens: list[int]) -> None:
    a = Engine(url)
    a.ask(tokens, "a")
    a.settle()
    a.close()


def opened(url: str, **extra: object) -> Engine:
    engine = Engine(url, **extra)  # type: ignore[arg-type]
    end = time.monotonic() + 20
    while engine.scheduler._ready() is None:
        assert time.monotonic() < end
        time.sleep(0.01)
    return engine


def wait_for_prefetches(engine: Engine) -> None:
    for worker in engine.workers:
        for handle in worker._prefetches.values():
            assert handle.result(20).failed == ()


def gets(engine: Engine) -> int:
    return sum(worker._store.counts["get"] for worker in engine.workers)


def test_a_request_that_waits_is_prefetched_and_then_loads_from_the_host_tier(url: str) -> None:
    tokens = prompt(4 * CHUNK)
    stored(url, tokens)
    b = opened(url, tp=2)
    b.scheduler.arrived(Request("b", tokens, SamplingParams(max_tokens=1), None))
    b.step([], {})
    assert all(not worker._prefetches for worker in b.workers), "the next step may take it"
    b.step([], {})
    wait_for_prefetches(b)
    assert gets(b) == 2, "one a rank"
    assert b.ask(tokens, "b") == 4 * CHUNK
    assert gets(b) == 2, "its load read nothing from the bucket"
    assert not b.failed
    b.step([], {})
    assert b.scheduler.counters.total("prefetched_requests") == 1
    b.close()


def test_what_is_scheduled_at_once_is_not_prefetched(url: str) -> None:
    tokens = prompt(4 * CHUNK)
    stored(url, tokens)
    b = opened(url)
    b.scheduler.arrived(Request("b", tokens, SamplingParams(max_tokens=1), None))
    assert b.ask(tokens, "b") == 4 * CHUNK
    for _ in range(3):
        b.step([], {})
    assert b.scheduler.counters.total("prefetched_requests") == 0
    b.close()


def test_no_more_is_on_its_way_than_the_tier_is_worth(url: str) -> None:
    tokens = prompt(4 * CHUNK)
    stored(url, tokens)
    b = opened(url)
    (worker,) = b.workers
    running: Work[LoadReport] = Work(total_bytes=8 << 20)  # of a tier of 16 MiB
    worker._prefetches["other"] = running.handle
    b.scheduler.arrived(Request("b", tokens, SamplingParams(max_tokens=1), None))
    b.step([], {})
    b.step([], {})
    assert worker.counters.total("dropped_prefetches") == 1
    assert gets(b) == 0
    running.finish(LoadReport(0))
    b.scheduler.arrived(Request("c", tokens, SamplingParams(max_tokens=1), None))
    b.step([], {})
    b.step([], {})
    assert list(worker._prefetches) == ["c"]
    b.close()


def test_the_next_turn_finds_what_the_engine_had_itself(url: str) -> None:
    """Its first turn was in the engine's own cache, so nothing of it came through our tiers."""
    tokens = prompt(4 * CHUNK)
    stored(url, tokens)
    b = opened(url, prefetch="next_turn")
    assert b.ask(tokens, "b", local_tokens=4 * CHUNK) == 0
    wait_for_prefetches(b)
    before = gets(b)
    assert before > 0
    assert b.ask(tokens, "again") == 4 * CHUNK
    assert gets(b) == before
    b.close()


def test_off_is_off(url: str) -> None:
    tokens = prompt(4 * CHUNK)
    stored(url, tokens)
    b = opened(url, prefetch="off")
    b.scheduler.arrived(Request("b", tokens, SamplingParams(max_tokens=1), None))
    for _ in range(3):
        b.step([], {})
    assert gets(b) == 0
    b.close()


def test_a_request_is_looked_up_once_and_not_after_it_left() -> None:
    queue = Queue()
    requests = [Request(str(i), [1, 2, 3], SamplingParams(max_tokens=1), None) for i in range(7)]
    for one in requests:
        queue.arrived(one)
    assert queue.step() == []
    queue.left("1")
    assert [one.request_id for one in queue.step()] == ["0", "2", "3", "4"]
    queue.left("6")
    assert [one.request_id for one in queue.step()] == ["5"]
    assert queue.step() == []
