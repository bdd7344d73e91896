"""Write-behind and prefetch in the real engine: an idle one uploads what rests; what queues comes nearer."""

from __future__ import annotations

from importlib.resources import files
from pathlib import Path

import pytest

pytest.importorskip("vllm", reason="the real vLLM is needed: make setup")

from lmcache_s3.testing.engine import EngineProcess
from lmcache_s3.testing.models import smollm2
from lmcache_s3.testing.servers import SeaweedFS

pytestmark = [pytest.mark.slow, pytest.mark.engine, pytest.mark.s3]

CHUNK, OUT = 256, 12


def test_what_rested_is_shared_and_what_queues_is_prefetched(seaweedfs: SeaweedFS, tmp_path: Path) -> None:
    model, url, env = smollm2(), seaweedfs.make_bucket("behind") + "/cache", seaweedfs.env()
    text = files("lmcache_s3.benchmarks").joinpath("documents", "coffee_machine.txt").read_text("utf-8")
    with EngineProcess(
        model,
        url=url,
        env=env,
        name="a",
        directory=tmp_path,
        block_size=CHUNK,
        extra_config={"write_behind_s": 600},
    ) as a:
        tokens = (a.encode(text) * 3)[: 4 * CHUNK + 40]
        first = a.ask([tokens[: 2 * CHUNK + 20]], OUT)[0]
        again = a.ask([tokens], OUT)[0]
        stats = a.wait_stats(lambda s: s["scheduler"].get("stored_extents") == 2, what="what rests to go up")[
            "scheduler"
        ]
        assert first.tokens
        assert stats["rested_chunks"] == 4, "an idle engine uploads at once, so each turn is an extent"
        assert stats["internal_errors"] == 0

    with EngineProcess(
        model,
        url=url,
        env=env,
        name="b",
        directory=tmp_path,
        block_size=CHUNK,
        engine_args={"max_num_seqs": 1},
    ) as b:
        other = a_prompt_of_its_own(tokens)
        _, answer = b.ask([other, tokens], OUT, together=True)
        assert answer.cached_tokens == 4 * CHUNK
        assert answer.tokens == again.tokens
        assert b.stat("worker", "loaded_tokens") == 4 * CHUNK
        stats = b.stats()["scheduler"]
        assert stats["prefetched_requests"] == 1, "the second waits until the first has ended"
        assert stats["internal_errors"] + stats["failed_loads"] == 0


def a_prompt_of_its_own(tokens: list[int]) -> list[int]:
    """As long, and alike in nothing but its words."""
    return tokens[::-1]
