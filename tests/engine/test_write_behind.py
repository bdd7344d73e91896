"""Chunks of a growing prompt rest in the workers' memory, are loaded from there, and go up together."""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path

import pytest

pytest.importorskip("vllm", reason="the real vLLM is needed: make setup")

from vllm.sampling_params import SamplingParams
from vllm.v1.outputs import KVConnectorOutput
from vllm.v1.request import Request

from lmcache_s3.errors import Invalid
from lmcache_s3.integrations.vllm.metadata import StepOrders, StoredPart
from lmcache_s3.tiers.stores.open import open_store
from tests.engine.test_roles import BLOCK, CHUNK, HEADS, Blocks, Engine, prompt

pytestmark = pytest.mark.engine


@pytest.fixture
def url(tmp_path: Path) -> str:
    (tmp_path / "bucket").mkdir()
    return f"file://{tmp_path}/bucket"


def until(engine: Engine, true: Callable[[], bool]) -> None:
    """Steps of an engine that has other work, so that nothing goes up for idleness."""
    end = time.monotonic() + 20
    while not true():
        assert time.monotonic() < end
        engine.step([], {})
        time.sleep(0.01)


def count(engine: Engine, what: str) -> int:
    extents = engine.scheduler._extents
    assert extents is not None
    return extents.counts()[what]


def resting_bytes(engine: Engine) -> int:
    tiers = [worker._transfer.stats().get("resting") for worker in engine.workers if worker._transfer is not None]
    return sum(tier.used_bytes for tier in tiers if tier is not None)


def shards(url: str) -> int:
    return sum("/c/" in one.key for one in open_store(url).list("spaces/"))


@pytest.mark.parametrize(("tp", "pp"), [(1, 1), (2, 1), (2, 2)])
def test_the_turns_of_a_chat_go_up_as_one_extent(url: str, tp: int, pp: int) -> None:
    tokens = prompt(7 * CHUNK)
    a = Engine(url, tp, pp, write_behind_s=600)
    for turn, chunks in enumerate((2, 3, 6)):
        known = sum((2, 3, 6)[turn - 1 : turn])
        assert a.ask(tokens[: chunks * CHUNK + 5], f"turn{turn}") == known * CHUNK, "what rests is loaded"
        until(a, lambda n=chunks: count(a, "resting") == n)  # type: ignore[misc]
    assert not a.failed
    assert shards(url) == 0
    assert resting_bytes(a) > 0
    a.settle()
    until(a, lambda: count(a, "resting") == 0)
    assert a.scheduler.counters.total("stored_extents") == 1
    assert shards(url) == tp * pp
    assert resting_bytes(a) == 0, "what is in the bucket rests no more"
    assert a.ask(tokens, "then") == 6 * CHUNK
    a.close()
    b = Engine(url)
    assert b.ask(tokens, "b") == 6 * CHUNK
    assert not b.failed
    b.close()


def test_what_has_rested_long_enough_goes_up_while_the_engine_is_busy(url: str) -> None:
    a = Engine(url, write_behind_s=0.3)
    a.ask(prompt(3 * CHUNK), "a")
    until(a, lambda: a.scheduler.counters.total("stored_extents") == 1)
    assert a.scheduler.counters.total("rested_chunks") == 3
    a.close()


def test_an_extents_worth_does_not_rest(url: str) -> None:
    a = Engine(url, write_behind_s=600, extent_bytes=2 * 2 * 4 * CHUNK * 4 * 32 * 2)
    a.ask(prompt(5 * CHUNK), "a")
    until(a, lambda: a.scheduler.counters.total("stored_extents") == 2)
    assert a.scheduler.counters.total("rested_chunks") == 1
    a.close()


def test_what_rests_when_the_process_dies_is_lost_and_leaves_nothing(url: str) -> None:
    tokens = prompt(3 * CHUNK)
    a = Engine(url, write_behind_s=600)
    a.ask(tokens, "a")
    until(a, lambda: count(a, "resting") == 3)
    a.close()
    assert shards(url) == 0
    b = Engine(url)
    assert b.ask(tokens, "b") == 0
    b.close()


def test_memory_in_which_nothing_can_rest_is_refused(url: str) -> None:
    with pytest.raises(Invalid, match="write_behind_bytes: 65536 holds no chunk of this model"):
        Engine(url, 2, write_behind_s=600, write_behind_bytes="64KiB")


def test_more_than_may_rest_is_given_up_and_computed_again(url: str) -> None:
    tokens = prompt(3 * CHUNK)
    a = Engine(url, 2, write_behind_s=600, write_behind_bytes="96KiB", store_deadline_s=0.5)
    a.ask(tokens, "a")
    until(a, lambda: a.scheduler.counters.total("failed_extents") == 1)
    assert a.ask(tokens, "again") == 0
    until(a, lambda: a.scheduler.counters.total("failed_extents") == 2)
    until(a, lambda: resting_bytes(a) == 0)
    assert not a.failed
    a.close()


def test_what_a_load_reads_rests_until_it_has_ended(url: str) -> None:
    """Its chunks are committed, and so could be forgotten, between the order and the load."""
    tokens = prompt(4 * CHUNK)
    a = Engine(url, write_behind_s=600)
    a.ask(tokens, "a")
    until(a, lambda: count(a, "resting") == 4)
    request = Request("late", tokens, SamplingParams(max_tokens=1), None)
    blocks = [a.free.pop() for _ in range(4 * CHUNK // BLOCK)]
    assert a.scheduler.match(request, 0) == 4 * CHUNK
    a.scheduler.allocated(request, Blocks(blocks), 4 * CHUNK)
    held, a.scheduler._orders.loads = a.scheduler._orders.loads, []  # the step with the load comes late
    a.settle()
    until(a, lambda: count(a, "resting") == 0)
    assert resting_bytes(a) > 0
    a.scheduler._orders.loads = held
    a.step([], {})
    assert a.wait_for_load("late")
    a.check(tokens, blocks, 4 * CHUNK)
    a.scheduler.finished(request)
    until(a, lambda: resting_bytes(a) == 0)
    a.close()


def test_ranks_that_hold_the_same_heads_load_nothing_that_rests_with_one_of_them(url: str) -> None:
    tokens = prompt(3 * CHUNK)
    a = Engine(url, 2 * HEADS, write_behind_s=600)
    a.ask(tokens, "a")
    until(a, lambda: count(a, "resting") == 3)
    assert a.ask(tokens, "again") == 0
    assert not a.failed
    a.settle()
    until(a, lambda: count(a, "resting") == 0)
    assert a.scheduler.counters.total("stored_extents") == 1
    assert a.ask(tokens, "then") == 3 * CHUNK
    assert not a.failed
    a.close()


def test_what_is_given_up_within_a_step_comes_to_rest_again_after_it(url: str) -> None:
    a = Engine(url, write_behind_s=600)
    a.ask(prompt(3 * CHUNK), "a")
    until(a, lambda: count(a, "resting") == 3)
    extents, cache = a.scheduler._extents, a.scheduler._cache
    assert extents is not None
    assert cache is not None
    hashes = list(extents._resting._chunks)
    extents._flush = True
    extents.step(StepOrders(), cache)
    extents._settle(b"".join(hashes))  # its commit failed: on another thread, so at any time within a step
    if not extents.is_pending(hashes[0]):  # then a request in this very step gathers them again
        extents.close(orders := StepOrders(), cache, "s", bytes(16), 0, hashes)
        name = str(orders.uploads[0].name)
        extents.stored(cache, StoredPart(name, 0, b"\1\0\0\0" * 3, bytes(24), 3))
    extents.step(StepOrders(), cache)
    extents._flush = True
    extents.step(StepOrders(), cache)
    assert not extents.is_pending(hashes[0])
    assert count(a, "resting") == 0
    a.close()


def test_a_cache_that_is_turned_off_has_nothing_to_do(url: str) -> None:
    a = Engine(url, write_behind_s=600)
    a.ask(prompt(3 * CHUNK), "a")
    until(a, lambda: count(a, "resting") == 3)
    a.scheduler.turn_off("a test")
    a.step([], {})
    assert not a.scheduler.busy()
    until(a, lambda: resting_bytes(a) == 0)
    a.close()


def test_an_extent_whose_store_is_down_is_given_up(url: str, tmp_path: Path) -> None:
    tokens = prompt(3 * CHUNK)
    a = Engine(url, write_behind_s=600)
    a.ask(tokens, "a")
    until(a, lambda: count(a, "resting") == 3)
    for one in (tmp_path / "bucket").glob("spaces/*"):
        (one / "extents").write_text("a file where a directory is needed")
    assert a.scheduler.busy()
    until(a, lambda: a.scheduler.counters.total("failed_extents") == 1)
    until(a, lambda: resting_bytes(a) == 0)
    a.scheduler.reported(KVConnectorOutput())
    assert a.ask(tokens, "again") == 0
    a.close()
