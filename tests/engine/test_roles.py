"""Both connector roles against each other, several ranks side by side, without a model: every byte is known.

The engine's part is played here: blocks, scheduling steps and messages are vLLM's own types, KV is a known function of
the prompt. What is loaded must be what was computed, bit for bit, whatever layouts writer and reader have.
"""

from __future__ import annotations

import functools
import hashlib
import time
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

vllm = pytest.importorskip("vllm", reason="the real vLLM is needed: make setup")

from vllm.sampling_params import SamplingParams  # noqa: E402
from vllm.v1.core.sched.output import CachedRequestData, NewRequestData, SchedulerOutput  # noqa: E402
from vllm.v1.outputs import KVConnectorOutput  # noqa: E402
from vllm.v1.request import Request  # noqa: E402

from lmcache_s3.config import load_settings  # noqa: E402
from lmcache_s3.identity import KVGroup  # noqa: E402
from lmcache_s3.integrations.vllm import scheduler as scheduler_module  # noqa: E402
from lmcache_s3.integrations.vllm.metadata import StepOrders, WorkerReport  # noqa: E402
from lmcache_s3.integrations.vllm.model import ModelFacts  # noqa: E402
from lmcache_s3.integrations.vllm.opening import Opening  # noqa: E402
from lmcache_s3.integrations.vllm.scheduler import SchedulerRole  # noqa: E402
from lmcache_s3.integrations.vllm.worker import WorkerRole  # noqa: E402

pytestmark = pytest.mark.engine

CHUNK, BLOCK, LAYERS, HEADS, DIM = 64, 32, 4, 4, 32


def truth(tokens: list[int]) -> np.ndarray:
    return _truth(tuple(tokens))


@functools.cache
def _truth(tokens: tuple[int, ...]) -> np.ndarray:
    """KV of a prompt, uint16 [kv, layer, token, head, channel]: token t's depends on tokens 0 … t."""
    out = np.empty((2, LAYERS, len(tokens), HEADS, DIM), np.uint16)
    state = hashlib.sha256()
    for t, token in enumerate(tokens):
        state.update(token.to_bytes(4, "little"))
        seed = int.from_bytes(state.digest()[:8], "little")
        out[:, :, t] = np.random.default_rng(seed).integers(0, 0x7F80, (2, LAYERS, HEADS, DIM), dtype=np.uint16)
    return out


class Engine:
    """One engine of tp × pp ranks: blocks, steps and messages."""

    def __init__(self, url: str, tp: int = 1, pp: int = 1, blocks: int = 64, **extra: Any) -> None:
        self.settings = load_settings(
            url=url, chunk_tokens=CHUNK, weights_digest="ab" * 32, host_bytes="16MiB", poll_s=0.05, **extra
        )
        self.facts = ModelFacts(
            path="/nowhere",
            revision=None,
            name="known",
            group=KVGroup("full", LAYERS, 2, HEADS, DIM),
            kv_dtype="bfloat16",
            rope={"rope_theta": 10000.0},
            quantisation=None,
            block_tokens=BLOCK,
            tensor_parallel=tp,
            pipeline_parallel=pp,
        )
        codec = self.settings.make_codec()
        self.opening = Opening(self.facts, self.settings, codec)
        self.opening.start()
        self.scheduler = SchedulerRole(self.facts, self.settings, codec, self.opening)
        self.n_blocks = blocks
        self.workers: list[WorkerRole] = []
        for stage in range(pp):
            for rank in range(tp):
                names = [f"layers.{i}.attn" for i in range(stage * LAYERS // pp, (stage + 1) * LAYERS // pp)]
                worker = WorkerRole(
                    self.facts,
                    self.settings,
                    codec,
                    attention_layers=dict.fromkeys(names, SimpleNamespace(impl=CpuImpl(), **CPU)),
                    tensor_rank=rank,
                    stage=stage,
                )
                heads = len(self.facts.heads_of(rank))
                worker.register({n: torch.zeros(blocks, heads, BLOCK, 2 * DIM, dtype=torch.bfloat16) for n in names})
                self.workers.append(worker)
        self.free = list(range(blocks))
        self.loaded_tokens: list[int] = []
        self.failed: list[str] = []

    def step(self, new: list[NewRequestData], scheduled: dict[str, int], compute: Any = None) -> None:
        output = SchedulerOutput.make_empty()
        output.scheduled_new_reqs, output.num_scheduled_tokens = new, scheduled
        output.scheduled_cached_reqs = CachedRequestData.make_empty()
        orders = self.scheduler.orders(output)
        if compute is not None:
            compute()
        for worker in self.workers:
            worker.start_loads(orders)
            worker.gather(orders)
        self.collect()

    def collect(self) -> None:
        report = WorkerReport()
        for worker in self.workers:
            part = worker.take_report()
            if part is not None:
                report = report.aggregate(part)
        if report:
            self.scheduler.reported(KVConnectorOutput(kv_connector_worker_meta=report))

    def ask(self, tokens: list[int], request_id: str, local_tokens: int = 0) -> int:
        """Serve one prompt as the engine would; returns tokens loaded. Checks what was loaded against the truth."""
        request = Request(request_id, tokens, SamplingParams(max_tokens=1), None)
        blocks = [self.free.pop() for _ in range(-(-len(tokens) // BLOCK))]
        self.write(tokens, blocks, 0, local_tokens)
        external = self.scheduler.match(request, local_tokens)
        if external:
            self.scheduler.allocated(request, Blocks(blocks), external)
            self.step([], {})
            if not self.wait_for_load(request_id):
                self.failed.append(request_id)
                self.scheduler.reported(KVConnectorOutput(failed_recving={request_id}))
                assert self.scheduler.match(request, local_tokens) == 0, "a failed request is never matched again"
                external = 0
            else:
                self.check(tokens, blocks, local_tokens + external)
        self.loaded_tokens.append(external)
        computed = min(local_tokens + external, len(tokens) - 1)
        new = NewRequestData(request_id, tokens, [], None, None, (blocks,), computed, None)
        self.step(
            [new], {request_id: len(tokens) - computed}, lambda: self.write(tokens, blocks, computed, len(tokens))
        )
        self.scheduler.finished(request)
        self.step([], {})
        self.free.extend(blocks)
        return external

    def wait_for_load(self, request_id: str) -> bool:
        done: list[tuple[bool, bool]] = []
        end = time.monotonic() + 20
        waiting = list(self.workers)
        while waiting and time.monotonic() < end:
            for worker in list(waiting):
                finished, failed = worker.take_finished()
                if request_id in finished:
                    waiting.remove(worker)
                    done.append((True, request_id in failed))
            time.sleep(0.005)
        assert not waiting, "a rank never reported its load"
        self.collect()
        return not any(failed for _, failed in done)

    def write(self, tokens: list[int], blocks: list[int], start: int, stop: int) -> None:
        """The forward pass: fill tokens start … stop−1 through the real cache update."""
        kv = truth(tokens)
        slots = torch.tensor([blocks[t // BLOCK] * BLOCK + t % BLOCK for t in range(start, stop)], dtype=torch.int64)
        for worker in self.workers:
            mine = worker._blocks
            assert mine is not None
            for view, layer in zip(mine.views, mine.layers, strict=True):
                part = np.ascontiguousarray(kv[:, layer, start:stop, mine.heads.start : mine.heads.stop])
                k, v = torch.from_numpy(part).view(torch.bfloat16)
                CpuImpl().do_kv_cache_update(SimpleNamespace(**CPU), k, v, view, slots)

    def check(self, tokens: list[int], blocks: list[int], stop: int) -> None:
        kv = truth(tokens)[:, :, :stop]
        for worker in self.workers:
            mine = worker._blocks
            assert mine is not None
            got = mine.gather(mine.ids(blocks, 0, -(-stop // BLOCK) * BLOCK))[:, :, :stop]
            want = kv[:, mine.layers.start : mine.layers.stop, :, mine.heads.start : mine.heads.stop]
            assert np.array_equal(got, want), "loaded KV is not what was computed"

    def settle(self) -> None:
        """Until everything ordered is stored and committed, or given up."""
        end = time.monotonic() + 20
        while (self.scheduler.busy() or self.publishing()) and time.monotonic() < end:
            self.step([], {})
            time.sleep(0.01)
        assert not self.scheduler.busy()

    def publishing(self) -> int:
        extents = self.scheduler._extents
        return 0 if extents is None else extents.counts()["publishing"]

    def close(self) -> None:
        for worker in self.workers:
            worker.close(2.0)
        self.scheduler.close(2.0)


class Blocks:
    def __init__(self, ids: list[int]) -> None:
        self._ids = ids

    def get_block_ids(self) -> tuple[list[int]]:
        return (self._ids,)


def _cpu() -> tuple[type, dict[str, Any]]:
    from vllm.v1.attention.backends.cpu_attn import CPUAttentionBackendImpl, _get_attn_isa

    class Impl(CPUAttentionBackendImpl):
        def __init__(self) -> None:
            self.attn_type, self.kv_cache_dtype = "decoder", "auto"

    isa = _get_attn_isa(torch.bfloat16, BLOCK, DIM, "auto")
    return Impl, {"isa": isa, "_k_scale_float": 1.0, "_v_scale_float": 1.0, "dtype": torch.bfloat16}


CpuImpl, CPU = _cpu()


@pytest.fixture
def url(tmp_path: Any) -> str:
    (tmp_path / "bucket").mkdir()
    return f"file://{tmp_path}/bucket"


def prompt(n: int, seed: int = 1) -> list[int]:
    return [int(t) for t in np.random.default_rng(seed).integers(0, 50_000, n)]


@pytest.mark.parametrize("writer", [(1, 1), (2, 1), (4, 1), (8, 1), (1, 2), (2, 2)])
@pytest.mark.parametrize("reader", [(1, 1), (2, 1), (4, 2), (8, 1)])
def test_any_layout_reads_what_any_other_wrote(url: str, writer: tuple[int, int], reader: tuple[int, int]) -> None:
    tokens = prompt(5 * CHUNK + 7)
    a = Engine(url, *writer)
    assert a.ask(tokens, "a") == 0
    a.settle()
    assert a.scheduler.counters.total("stored_extents") == 1
    a.close()
    b = Engine(url, *reader)
    assert b.ask(tokens, "b") == 5 * CHUNK
    assert b.ask(tokens[: 3 * CHUNK], "shorter") == 3 * CHUNK
    assert b.ask(tokens[: 2 * CHUNK] + prompt(200, 9), "forked") == 2 * CHUNK
    assert b.ask(tokens, "mid-chunk", local_tokens=CHUNK + BLOCK) == 4 * CHUNK - BLOCK
    assert not b.failed
    cache = b.scheduler._ready()
    assert cache is not None
    assert cache.index.stats().accesses == 1, "the hit is told to all, some time"
    b.close()


def test_a_longer_prompt_stores_only_its_new_chunks(url: str) -> None:
    tokens = prompt(9 * CHUNK)
    a = Engine(url)
    for n in (3, 3, 9):
        a.ask(tokens[: n * CHUNK], f"n{n}")
        a.settle()
    assert a.scheduler.counters.total("stored_extents") == 2
    assert sum(w.counters.total("stored_chunks") for w in a.workers) == 9
    a.close()


def test_second_touch_stores_what_was_computed_before(url: str) -> None:
    tokens = prompt(6 * CHUNK)
    a = Engine(url, admission="second_touch")
    for n, stored in ((3, 0), (5, 3), (6, 5)):
        a.ask(tokens[: n * CHUNK], f"n{n}")
        a.settle()
        assert sum(w.counters.total("stored_chunks") for w in a.workers) == stored
    assert not a.failed
    a.close()


@pytest.mark.parametrize("harm", ["truncate", "flip", "swap", "remove"])
def test_damaged_objects_are_computed_then_dropped(url: str, harm: str, tmp_path: Any) -> None:
    tokens = prompt(4 * CHUNK)
    a = Engine(url)
    a.ask(tokens, "a")
    a.settle()
    a.close()
    (shard,) = tmp_path.rglob("c/0/0/0/0/0")
    data = bytearray(shard.read_bytes())
    cell = (len(data) - 4 - 16 * 4) // 4
    if harm == "truncate":
        shard.write_bytes(data[: len(data) // 3])
    elif harm == "flip":
        data[cell + 100] ^= 4
        shard.write_bytes(data)
    elif harm == "swap":
        shard.write_bytes(data[cell : 2 * cell] + data[:cell] + data[2 * cell :])
    else:
        shard.unlink()
    b = Engine(url)
    assert b.ask(tokens, "b") == 0
    assert b.failed == ["b"]
    assert b.ask(tokens, "again") == 0, "the entry is hidden at once"
    assert b.failed == ["b"]
    cache = b.scheduler._ready()
    assert cache is not None
    assert cache.index.stats().accesses == 0, "a load that failed was no hit"
    b.settle()
    end = time.monotonic() + 10
    while b.scheduler.counters.total("stored_extents") < 1 and time.monotonic() < end:
        b.ask(tokens, f"later{time.monotonic()}")
        b.settle()
    c = Engine(url)
    assert c.ask(tokens, "c") == 4 * CHUNK, "what was dropped is stored anew and serves"
    assert not c.failed
    b.close()
    c.close()


def test_staging_that_is_full_drops_stores_never_answers(url: str) -> None:
    tokens = prompt(6 * CHUNK)
    chunk_bytes = 2 * LAYERS * CHUNK * HEADS * DIM * 2
    a = Engine(url, staging_bytes=3 * chunk_bytes)
    a.ask(tokens, "a")
    a.settle()
    assert a.scheduler.counters.total("stored_extents") == 0
    assert a.scheduler.counters.total("failed_extents") == 1
    assert sum(w.counters.total("dropped_chunks") for w in a.workers) > 0
    a.ask(tokens[: 2 * CHUNK], "small")
    a.settle()
    assert a.scheduler.counters.total("stored_extents") == 1, "staging was given back"
    a.close()


def test_a_rank_that_never_reports_costs_one_extent_and_the_deadline(url: str) -> None:
    a = Engine(url, tp=2, store_deadline_s=0.5)
    silent = a.workers.pop()
    a.ask(prompt(2 * CHUNK), "a")
    assert a.scheduler.busy()
    end = time.monotonic() + 5
    while a.scheduler.busy() and time.monotonic() < end:
        time.sleep(0.05)
    assert not a.scheduler.busy()
    assert a.scheduler.counters.total("failed_extents") == 1
    silent.close(1.0)
    a.close()


def test_salted_requests_share_only_with_their_salt(url: str) -> None:
    tokens = prompt(2 * CHUNK)
    a = Engine(url)
    a.ask(tokens, "plain")
    a.settle()
    salted = Request("salted", tokens, SamplingParams(max_tokens=1), None, cache_salt="tenant")
    assert a.scheduler.match(salted, 0) == 0
    assert a.scheduler.match(Request("again", tokens, SamplingParams(max_tokens=1), None), 0) == 2 * CHUNK
    a.close()


def test_an_error_while_ordering_fails_the_loads_it_held(url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever was ordered and is not sent must be reported failed, or its request waits for ever."""
    tokens = prompt(3 * CHUNK)
    a = Engine(url)
    a.ask(tokens, "a")
    a.settle()
    request = Request("b", tokens, SamplingParams(max_tokens=1), None)
    external = a.scheduler.match(request, 0)
    a.scheduler.allocated(request, Blocks(list(range(3 * CHUNK // BLOCK))), external)

    def broken(*_: object) -> None:
        raise RuntimeError("broken")

    monkeypatch.setattr(a.scheduler._queue, "step", broken)
    with pytest.raises(RuntimeError):
        a.scheduler.orders(SchedulerOutput.make_empty())
    assert a.scheduler.failed_orders().fail == ["b"]
    a.close()


def test_a_load_that_cannot_be_taken_over_has_failed(url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    tokens = prompt(2 * CHUNK)
    a = Engine(url)
    a.ask(tokens, "a")
    a.settle()

    def broken(*_: object) -> bool:
        raise OSError("no space left for the audit")

    monkeypatch.setattr(a.workers[0], "_finish_load", broken)
    assert a.ask(tokens, "b") == 0
    assert a.failed == ["b"]
    a.close()


def test_after_a_reset_nothing_is_matched_or_stored(url: str) -> None:
    """The weights may have changed in the engine's memory: the files no longer say whose KV it is."""
    a = Engine(url)
    a.ask(prompt(2 * CHUNK), "a")
    a.settle()
    a.scheduler.reset()
    assert a.ask(prompt(2 * CHUNK), "again") == 0
    a.ask(prompt(4 * CHUNK, 5), "other")
    a.settle()
    assert a.scheduler.counters.total("stored_extents") == 1
    a.close()


def test_a_rank_that_cannot_work_turns_the_cache_off(url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    a = Engine(url, tp=2)
    a.ask(prompt(2 * CHUNK), "a")
    a.settle()
    lame = a.workers[1]
    gather = lame.gather

    def gather_without_blocks(orders: StepOrders) -> None:
        blocks, lame._blocks = lame._blocks, None
        gather(orders)
        lame._blocks = blocks

    monkeypatch.setattr(lame, "gather", gather_without_blocks)
    lame.turn_off("its layout could not be learnt")
    a.ask(prompt(3 * CHUNK, 4), "ordered before it was known")
    a.settle()
    assert a.scheduler.counters.total("failed_extents") == 1, "answered, not waited for"
    assert a.ask(prompt(2 * CHUNK), "again") == 0
    assert not a.failed
    a.close()


def test_an_upload_that_raises_is_answered_and_its_staging_given_back(
    url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    a = Engine(url)

    def broken(*_: object) -> None:
        raise RuntimeError("no transfer")

    monkeypatch.setattr(a.workers[0], "_start_upload", broken)
    a.ask(prompt(2 * CHUNK, 3), "b")
    a.settle()
    assert a.workers[0]._staged_bytes == 0
    assert a.scheduler.counters.total("failed_extents") == 1
    a.close()


def test_two_engines_on_one_host_have_their_own_part_of_the_disk(url: str, tmp_path: Any) -> None:
    disk: dict[str, Any] = {"disk_path": str(tmp_path / "disk"), "disk_bytes": "16MiB"}
    a, b = Engine(url, **disk), Engine(url, **disk)
    tokens = prompt(2 * CHUNK)
    a.ask(tokens, "a")
    a.settle()
    b.ask(prompt(CHUNK, 8), "b")
    b.settle()
    places = {path.parent.name for path in (tmp_path / "disk").rglob("lock")}
    assert places == {"rank0", "rank0.1"}
    a.close()
    b.close()


def test_an_extents_chunks_follow_one_another_after_a_preemption(url: str) -> None:
    """What grew before a load ends there: chunks behind the load are an extent of their own."""
    tokens = prompt(6 * CHUNK)
    other = Engine(url)
    other.ask(tokens[: 5 * CHUNK], "other")
    other.settle()
    other.close()
    a = Engine(url)
    request = Request("a", tokens, SamplingParams(max_tokens=1), None)
    cache = a.scheduler._ready()
    assert cache is not None
    tracked = a.scheduler._track(request, cache)
    assert tracked is not None
    hashes = a.scheduler._hashes(tracked, len(tokens))
    tracked.next_chunk = 2
    tracked.growing = scheduler_module._Growing("1", 1, [hashes[1]])  # chunk 1 was gathered, then it was preempted
    assert a.scheduler.match(request, 0) == 5 * CHUNK
    a.scheduler.allocated(request, Blocks(list(range(5 * CHUNK // BLOCK))), 5 * CHUNK)
    assert not tracked.growing
    (upload,) = a.scheduler._orders.uploads
    assert (upload.first_token, upload.hashes) == (CHUNK, hashes[1])
    assert tracked.next_chunk == 5
    a.close()
