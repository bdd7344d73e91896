"""Engines of other shapes: hybrid attention (off, and says so), tensor-parallel ranks, other codecs."""

from __future__ import annotations

from pathlib import Path

import pytest

pytest.importorskip("vllm", reason="the real vLLM is needed: make setup")

from lmcache_s3.testing.engine import EngineProcess
from lmcache_s3.testing.models import random_hybrid, random_llama
from lmcache_s3.testing.servers import SeaweedFS
from lmcache_s3.tiers.stores.open import open_store

pytestmark = [pytest.mark.slow, pytest.mark.engine, pytest.mark.s3]

PROMPT = [(7 * i * i + 13 * i) % 40_000 + 100 for i in range(1100)]


@pytest.fixture
def s3(seaweedfs: SeaweedFS, bucket_url: str) -> tuple[str, dict[str, str]]:
    return bucket_url, seaweedfs.env()


def test_a_hybrid_model_is_served_without_the_cache_and_the_log_says_so(
    s3: tuple[str, dict[str, str]], tmp_path: Path
) -> None:
    url, env = s3
    model = random_hybrid(tmp_path / "hybrid")
    with EngineProcess(model, url=url, env=env, directory=tmp_path, name="hybrid") as engine:
        first = engine.ask([PROMPT], 8)[0]
        again = engine.ask([PROMPT], 8)[0]
        assert len(first.tokens) == len(again.tokens) == 8
        assert "nothing is stored or loaded for hybrid models yet" in engine.log()
    assert not list(open_store(url).list("")), "nothing was stored"


def test_two_tensor_parallel_ranks_write_what_one_process_reads(s3: tuple[str, dict[str, str]], tmp_path: Path) -> None:
    url, env = s3
    model = random_llama(tmp_path / "llama")
    # vLLM gives each rank of a CPU engine a NUMA node, here a made-up one, with no core left out on a small machine.
    ranks = {"VLLM_CPU_SIM_MULTI_NUMA": "1", "VLLM_CPU_NUM_OF_RESERVED_CPU": "2"}
    with EngineProcess(
        model, url=url, env=env | ranks, directory=tmp_path, name="tp2", engine_args={"tensor_parallel_size": 2}
    ) as writer:
        writer.ask([PROMPT], 4)
        writer.wait_stats(lambda s: s["scheduler"]["stored_extents"] >= 1, what="the store")
        assert writer.stat("worker", "stored_chunks") == 2 * 4, "each rank its own shard"
    with EngineProcess(model, url=url, env=env, directory=tmp_path, name="tp1") as reader:
        answer = reader.ask([PROMPT], 4)[0]
        assert answer.cached_tokens == 1024
        assert reader.stat("scheduler", "failed_loads") == 0


@pytest.mark.parametrize("codec", ["cachegen", "safetensors"])
def test_other_codecs_serve_too(s3: tuple[str, dict[str, str]], tmp_path: Path, codec: str) -> None:
    url, env = s3
    model = random_llama(tmp_path / "llama")
    extra = {"codec": codec}
    for name, cached in (("a", 0), ("b", 1024)):
        with EngineProcess(model, url=url, env=env, extra_config=extra, directory=tmp_path, name=name) as engine:
            assert engine.ask([PROMPT], 4)[0].cached_tokens == cached
            if not cached:
                engine.wait_stats(lambda s: s["scheduler"]["stored_extents"] >= 1, what="the store")
            assert engine.stat("scheduler", "failed_loads") == 0
            assert engine.stat("scheduler", "internal_errors") + engine.stat("worker", "internal_errors") == 0
