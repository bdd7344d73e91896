"""What the user must mend stops the engine's start with one line that names thing and mend; all else does not."""

from __future__ import annotations

import json
import logging
from pathlib import Path
from types import SimpleNamespace
from typing import Any, ClassVar

import fsspec
import pytest
import torch
from fsspec.implementations.memory import MemoryFileSystem

pytest.importorskip("vllm", reason="the real vLLM is needed: make setup")

from vllm.config import KVTransferConfig, VllmConfig
from vllm.distributed.kv_transfer.kv_connector.v1.base import KVConnectorRole, SupportsHMA
from vllm.engine.arg_utils import EngineArgs
from vllm.v1.core.sched.output import SchedulerOutput
from vllm.v1.kv_cache_interface import FullAttentionSpec, KVCacheConfig, KVCacheGroupSpec, SlidingWindowSpec

from lmcache_s3.errors import Invalid, LMCacheS3Error, Unsafe
from lmcache_s3.integrations.vllm import LMCacheS3Connector
from lmcache_s3.testing.engine import kv_transfer_config
from lmcache_s3.testing.models import random_llama
from lmcache_s3.testing.servers import SeaweedFS

pytestmark = [pytest.mark.engine, pytest.mark.filterwarnings("ignore::DeprecationWarning")]

LAYERS = [f"model.layers.{i}.self_attn.attn" for i in range(2)]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return random_llama(tmp_path_factory.mktemp("model") / "llama", layers=2)


def full(block: int = 128, **other: Any) -> KVCacheGroupSpec:
    spec = FullAttentionSpec(block_size=block, num_kv_heads=4, head_size=64, dtype=torch.bfloat16, **other)
    return KVCacheGroupSpec(LAYERS, spec)


def start(
    model: Path, url: str, groups: list[KVCacheGroupSpec] | None = None, transfer: Any = None, **extra: Any
) -> LMCacheS3Connector:
    settings = KVTransferConfig(**(transfer or kv_transfer_config(url, extra)))
    args = EngineArgs(model=str(model), dtype="bfloat16", block_size=128, enforce_eager=True, max_model_len=1024)
    config: VllmConfig = args.create_engine_config()
    config.kv_transfer_config = settings
    cache = KVCacheConfig(num_blocks=8, kv_cache_tensors=[], kv_cache_groups=groups or [full()])
    return LMCacheS3Connector(config, KVConnectorRole.SCHEDULER, cache)


def one_line(error: LMCacheS3Error, *names: str) -> None:
    text = str(error)
    assert "\n" not in text
    for name in names:
        assert name in text, text


@pytest.mark.parametrize(
    ("extra", "names"),
    [
        ({"codec": "zip"}, ("codec", "zip", "fast")),
        ({"host_bytes": 0}, ("host_bytes", "0")),
        ({"host_bytes": "12 parrots"}, ("host_bytes", "12 parrots")),
        ({"host_byte": "1GiB"}, ("host_byte", "host_bytes")),
        ({"chunk_tokens": 200}, ("chunk_tokens", "200", "128")),
    ],
)
def test_a_setting_that_makes_no_sense(model: Path, local_url: str, extra: dict[str, Any], names: tuple[str]) -> None:
    with pytest.raises(Invalid) as error:
        start(model, local_url, **extra)
    one_line(error.value, *names)


def test_an_unknown_scheme(model: Path) -> None:
    with pytest.raises(Invalid) as error:
        start(model, "s4://bucket/prefix")
    one_line(error.value, "s4", "s3")


def test_vllms_default_failure_policy(model: Path, local_url: str) -> None:
    transfer = {**kv_transfer_config(local_url), "kv_load_failure_policy": "fail"}
    with pytest.raises(Invalid) as error:
        start(model, local_url, transfer=transfer)
    one_line(error.value, "kv_load_failure_policy", "recompute")


@pytest.mark.s3
def test_a_missing_bucket_and_a_wrong_secret(
    model: Path, seaweedfs: SeaweedFS, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, value in seaweedfs.env().items():
        monkeypatch.setenv(name, value)
    with pytest.raises(Invalid) as error:
        start(model, "s3://no-such-bucket/prefix")
    one_line(error.value, "no-such-bucket")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "wrong")
    with pytest.raises(Invalid) as error:
        start(model, seaweedfs.make_bucket("start-secret"))
    assert error.value.kind in ("credentials", "permission")
    one_line(error.value)


class ClobberingFileSystem(MemoryFileSystem):
    """Accepts create-only writes and ignores the condition, as some gateways do."""

    protocol = "clobber"
    store: ClassVar[dict[str, Any]] = {}
    pseudo_dirs: ClassVar[list[str]] = [""]

    @classmethod
    def _strip_protocol(cls, path: str) -> str:
        return str(super()._strip_protocol(path.replace("clobber://", "memory://")))

    def pipe_file(self, path: str, value: bytes, mode: str = "overwrite", **kwargs: Any) -> None:
        super().pipe_file(path, value, mode="overwrite", **kwargs)


def test_a_store_that_ignores_put_if_absent(model: Path) -> None:
    fsspec.register_implementation("clobber", ClobberingFileSystem, clobber=True)
    fsspec.filesystem("clobber").makedirs("/bucket/prefix", exist_ok=True)
    with pytest.raises(Unsafe) as error:
        start(model, "clobber://bucket/prefix")
    one_line(error.value, "clobber", "single_writer")


def test_another_models_space_under_our_id(model: Path, tmp_path: Path) -> None:
    url = f"file://{tmp_path}"
    start(model, url).shutdown()
    (path,) = tmp_path.rglob("space.json")
    document = json.loads(path.read_text())
    document["identity"]["kv_dtype"] = "float16"
    path.write_text(json.dumps(document))
    with pytest.raises(Unsafe) as error:
        start(model, url)
    one_line(error.value, "space.json")


def test_a_store_that_is_away_does_not_stop_the_engine(model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "some")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "secret")
    connector = start(model, "s3://bucket/prefix", endpoint_url="http://127.0.0.1:9", connect_timeout_s=0.5)
    connector.build_connector_meta(SchedulerOutput.make_empty())
    assert not connector.has_pending_push_work()
    connector.shutdown()


def test_hybrid_models_are_off_and_say_so(model: Path, local_url: str) -> None:
    sliding = SlidingWindowSpec(block_size=128, num_kv_heads=4, head_size=64, dtype=torch.bfloat16, sliding_window=512)
    made: list[LMCacheS3Connector] = []
    groups = [full(), KVCacheGroupSpec(LAYERS, sliding)]
    lines = said_while(lambda: made.append(start(model, local_url, groups)))
    (connector,) = made
    assert isinstance(connector, SupportsHMA)
    assert any("hybrid" in line for line in lines)
    connector.build_connector_meta(SchedulerOutput.make_empty())
    connector.shutdown()


def test_an_attention_backend_that_fails_when_asked_turns_it_off_and_not_the_engine(
    model: Path, local_url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    connector = start(model, local_url)
    off: list[str] = []

    def register(kv_caches: dict[str, torch.Tensor]) -> None:
        raise TypeError("do_kv_cache_update() takes 5 positional arguments")

    monkeypatch.setattr(connector, "_worker", SimpleNamespace(register=register, turn_off=off.append))
    lines = said_while(lambda: connector.register_kv_caches({}))
    assert [line for line in lines if "register_kv_caches failed" in line]
    assert len(off) == 1
    assert "5 positional" in off[0]
    monkeypatch.undo()
    connector.shutdown()


def said_while(start_it: Any) -> list[str]:
    """What our loggers say meanwhile."""
    records: list[str] = []
    handler = logging.Handler()
    handler.emit = lambda record: records.append(record.getMessage())  # type: ignore[method-assign]
    logging.getLogger("lmcache_s3").addHandler(handler)
    try:
        start_it()
    finally:
        logging.getLogger("lmcache_s3").removeHandler(handler)
    return records


def test_sliding_windows_and_overrides_are_off_and_say_so(
    model: Path, local_url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    sliding = SlidingWindowSpec(block_size=128, num_kv_heads=4, head_size=64, dtype=torch.bfloat16, sliding_window=512)
    lines = said_while(lambda: start(model, local_url, [KVCacheGroupSpec(LAYERS, sliding)]))
    assert any("sliding window" in line for line in lines)
    original = EngineArgs.create_engine_config

    def with_overrides(self: EngineArgs) -> VllmConfig:
        config = original(self)
        config.model_config.hf_overrides = {"rms_norm_eps": 0.1}
        return config

    monkeypatch.setattr(EngineArgs, "create_engine_config", with_overrides)
    assert any("hf-overrides" in line for line in said_while(lambda: start(model, local_url)))


def test_the_same_weights_share_and_changed_weights_do_not(model: Path, local_url: str, tmp_path: Path) -> None:
    """A copy of the directory is the same space; one changed byte of the weights is another."""
    import shutil

    def space_id(where: Path) -> str:
        connector = start(where, local_url)
        assert connector._scheduler is not None
        cache = connector._scheduler._ready()
        assert cache is not None
        connector.shutdown()
        return cache.space.id

    copy = shutil.copytree(model, tmp_path / "copy")
    assert space_id(copy) == space_id(model)
    (weights,) = copy.glob("*.safetensors")
    data = bytearray(weights.read_bytes())
    data[-1] ^= 1
    weights.write_bytes(data)
    assert space_id(copy) != space_id(model)
