"""Caches of codec `transform`: which calibration they store with, and whose cells they read."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest

from lmcache_s3 import calibration_store
from lmcache_s3.analysis.check import check_extent
from lmcache_s3.cache import Cache
from lmcache_s3.calibration_store import attached, name_key, publish, read_name
from lmcache_s3.codecs import calibrations
from lmcache_s3.codecs.base import CellPosition, CellSpec
from lmcache_s3.codecs.calibration import Calibration
from lmcache_s3.codecs.registry import make_codec
from lmcache_s3.errors import Invalid, Missing, Unavailable, Unusable
from lmcache_s3.extent import open_extent
from lmcache_s3.plain_calibration import load_calibration
from lmcache_s3.testing.calibrations import made_calibration
from lmcache_s3.testing.small import random_tokens, small_settings, small_space
from lmcache_s3.tiers.stores.base import ObjectStore
from lmcache_s3.tiers.stores.open import open_store
from lmcache_s3.types import Grid

SPACE = small_space(fidelity="kl0.0625")
SPEC = CellSpec.of(SPACE.geometry, Grid())
N = SPACE.chunk_tokens


@pytest.fixture(autouse=True)
def registry(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> calibrations.Registry:
    """A process that knows nothing yet."""
    return forget(monkeypatch, tmp_path / "kept")


def forget(monkeypatch: pytest.MonkeyPatch, directory: Path | None = None) -> calibrations.Registry:
    fresh = calibrations.Registry(directory)
    for name in ("register", "attach", "detach", "known", "find"):
        monkeypatch.setattr(calibrations, name, getattr(fresh, name))
    return fresh


@pytest.fixture
def store(tmp_path: Path) -> ObjectStore:
    return open_store(str(tmp_path / "cache"))


def opened(store: ObjectStore, **settings: Any) -> Cache:
    return Cache.open(store.url, SPACE, small_settings(store.url, **({"codec": "transform"} | settings)))


def values(n_tokens: int, seed: int = 0) -> np.ndarray:
    shape = (2, SPACE.geometry.layers, n_tokens, SPACE.geometry.heads, SPACE.geometry.head_dim)
    return np.random.default_rng(seed).standard_normal(shape).astype(ml_dtypes.bfloat16)


def close(got: np.ndarray, wanted: np.ndarray) -> bool:
    off = np.abs(got.view(ml_dtypes.bfloat16).astype(np.float32) - wanted.astype(np.float32))
    return 0 < float(off.mean()) < 0.15


def test_the_models_own_is_found_and_its_cells_are_read_by_anyone(
    store: ObjectStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    where = publish(store, made_calibration(SPEC), SPACE.weights)
    digest = read_name(store, SPACE.weights, SPACE.kv_dtype)
    assert where == f"{store.url}/calibrations/{digest}.safetensors"
    forget(monkeypatch)
    tokens, kv = random_tokens(4 * N), values(4 * N)
    with opened(store) as cache:
        assert cache.transfer.codec.config == {"level": "medium", "calibration": digest}
        cache.store(tokens, kv).result(20)
    (key,) = [one.key for one in store.list("spaces/") if one.key.endswith("/zarr.json")]
    written = json.loads(store.get(key))["attributes"]["lmcache_s3"]
    assert (written["codec"], written["measured_kl"], written["fidelity"]) == ("transform", 0.0625, "kl0.0625")
    forget(monkeypatch)
    with opened(store, codec="fast", read_only=True) as anyone:
        got = anyone.retrieve(anyone.lookup(tokens)).result(20)
        assert got.tokens == 4 * N
        assert close(got.array, kv)
    forget(monkeypatch)
    array = open_extent(f"{store.url}/{key.removesuffix('/zarr.json')}")
    assert array[...].tobytes() == got.array.tobytes()


def test_another_calibration_later_changes_what_is_stored_not_what_is_read(
    store: ObjectStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    tokens, kv = random_tokens(8 * N), values(8 * N)
    publish(store, made_calibration(SPEC), SPACE.weights)
    with opened(store) as cache:
        cache.store(tokens[: 4 * N], kv[:, :, : 4 * N]).result(20)
    publish(store, made_calibration(SPEC, unit_layers=2, joint=True, seed=1), SPACE.weights)
    with opened(store) as cache:
        cache.store(tokens, kv).result(20)
    forget(monkeypatch)
    with opened(store) as cache:
        got = cache.retrieve(cache.lookup(tokens)).result(20)
        assert got.tokens == 8 * N
        assert close(got.array, kv)
        assert not got.report.failed


def test_a_stated_one_is_used_whatever_the_bucket_names(store: ObjectStore) -> None:
    first = made_calibration(SPEC)
    publish(store, first, SPACE.weights)
    publish(store, made_calibration(SPEC, seed=1), SPACE.weights)
    with opened(store, codec_calibration=first.digest) as cache:
        assert cache.transfer.codec.config["calibration"] == first.digest


def test_what_does_not_fit_is_said_with_the_command_that_mends_it(
    store: ObjectStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(Invalid, match=r"no calibration for this model .*lmcache-s3 calibrate MODEL --url") as caught:
        opened(store)
    assert caught.value.key == "codec_calibration"
    with pytest.raises(Invalid, match=r"not at hand.*; or run lmcache-s3 calibrate"):
        opened(store, codec_calibration="ab" * 32)
    publish(store, made_calibration(SPEC), SPACE.weights)
    with pytest.raises(Invalid, match=r"1 layers × 4 heads; .* cut them: run lmcache-s3 calibrate .* 2 head groups"):
        opened(store, head_groups=2)
    with pytest.raises(Invalid, match=r"codec_level='finest': .* fine, medium, coarse"):
        opened(store, codec_level="finest")
    with pytest.raises(Invalid, match="codec_calibration: 'ab' is not 64 hex digits"):
        opened(store, codec_calibration="ab")
    other = CellSpec((2, 6, N, 4, 8), "bfloat16")
    publish(store, made_calibration(other), SPACE.weights)
    with pytest.raises(Invalid, match=r"6 layers, 4 heads, 8\], the model of 4 layers.*run lmcache-s3 calibrate"):
        opened(store)
    for document in (b"{", b"[]", b'{"format": 1}', b'{"format": 2, "digest": "%s"}' % (b"ab" * 32), b"[" * 4000):
        store.put(name_key(SPACE.weights, SPACE.kv_dtype), document)
        with pytest.raises(Invalid, match="run lmcache-s3 calibrate"):
            opened(store)


def test_a_file_that_is_not_what_its_name_says_is_not_used(store: ObjectStore, monkeypatch: pytest.MonkeyPatch) -> None:
    made = made_calibration(SPEC)
    publish(store, made, SPACE.weights)
    store.put(calibrations.key_of(made.digest), made_calibration(SPEC, seed=1).to_bytes())
    forget(monkeypatch)
    with pytest.raises(Invalid, match="not at hand"):
        opened(store)
    with pytest.raises(Unusable, match="not the file of its name"):
        load_calibration(f"{store.url}/{calibrations.key_of(made.digest)}")


# --- the registry


def cell_of(made: Calibration) -> bytes:
    bits = values(N).view(np.uint16)
    return make_codec("transform", {"calibration": made.digest}).encode(bits, SPEC, CellPosition(bytes(16), 0, 0, 0))


def decode(data: bytes) -> np.ndarray:
    out = np.empty(SPEC.shape, np.uint16)
    make_codec("transform").decode(data, SPEC, None, out)
    return out


@pytest.mark.parametrize("what", ["root", "file"])
def test_plain_readers_load_it_once(what: str, store: ObjectStore, monkeypatch: pytest.MonkeyPatch) -> None:
    made = made_calibration(SPEC)
    where = publish(store, made, SPACE.weights)
    data = cell_of(made)
    wanted = decode(data)
    forget(monkeypatch)
    with pytest.raises(Unusable, match=r"lmcache_s3\.load_calibration") as caught:
        decode(data)
    assert caught.value.kind == "calibration"
    load_calibration(store.url if what == "root" else where)
    assert (decode(data) == wanted).all()
    store.delete(calibrations.key_of(made.digest))
    assert (decode(data) == wanted).all()
    for absent in (f"{store.url}/calibrations/{'ab' * 32}.safetensors", "nowhere://x"):
        with pytest.raises((Missing, Invalid)):
            load_calibration(absent)


def test_what_was_fetched_is_kept_on_disk_and_believed_by_its_digest(
    store: ObjectStore, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    made = made_calibration(SPEC)
    publish(store, made, SPACE.weights)
    folder = tmp_path / "kept"
    first = calibrations.Registry(folder)
    first.attach("store", lambda digest: store.get(calibrations.key_of(digest)))
    assert first.find(made.digest).digest == made.digest
    (file,) = folder.iterdir()
    assert file.read_bytes() == made.to_bytes()
    assert calibrations.Registry(folder).find(made.digest).digest == made.digest
    file.write_bytes(file.read_bytes()[:-1])
    with pytest.raises(Unusable):
        calibrations.Registry(folder).find(made.digest)
    nowhere = calibrations.Registry(file / "no directory")
    nowhere.attach("store", lambda digest: store.get(calibrations.key_of(digest)))
    assert nowhere.find(made.digest).digest == made.digest


def test_the_absent_is_asked_for_once_and_the_unreachable_again() -> None:
    asked: list[str] = []

    def absent(digest: str) -> bytes:
        asked.append(digest)
        raise Missing("not there")

    registry = calibrations.Registry(None)
    registry.attach("a", absent)
    for _ in range(3):
        with pytest.raises(Unusable):
            registry.find("ab" * 32)
    assert len(asked) == 1
    made = made_calibration(SPEC)

    def unreachable(digest: str) -> bytes:
        raise Unavailable("no answer", kind="timeout")

    registry.attach("b", unreachable)
    with pytest.raises(Unavailable):
        registry.find(made.digest)
    registry.attach("b", lambda digest: made.to_bytes())
    assert registry.find(made.digest).digest == made.digest
    with pytest.raises(Unusable):
        registry.find("ab" * 32)


def test_what_is_kept_in_memory_is_bounded() -> None:
    several = [made_calibration(SPEC, seed=seed) for seed in range(4)]
    registry = calibrations.Registry(None, most_bytes=2 * several[0].nbytes)
    for made in several:
        registry.register(made)
    assert [registry.known(made.digest) is not None for made in several] == [False, False, True, True]
    one = calibrations.Registry(None, most_bytes=1)
    one.register(several[0])
    assert one.known(several[0].digest) is several[0]


def test_caches_side_by_side_each_find_theirs(store: ObjectStore, monkeypatch: pytest.MonkeyPatch) -> None:
    made = made_calibration(SPEC)
    publish(store, made, SPACE.weights)
    registry = forget(monkeypatch)
    with attached(store):
        with attached(store):
            pass
        assert registry.find(made.digest).digest == made.digest
    assert calibration_store.name_key("ab", "float16") == "calibrations/ab.float16.json"


def test_what_lacks_its_calibration_is_not_damaged(store: ObjectStore, monkeypatch: pytest.MonkeyPatch) -> None:
    """Hidden in this process, computed, and neither removed from the index nor certain to `verify`."""
    made = made_calibration(SPEC)
    publish(store, made, SPACE.weights)
    tokens, kv = random_tokens(4 * N), values(4 * N)
    with opened(store) as cache:
        cache.store(tokens, kv).result(20)
        (record,) = [one.record for one in cache.index.extents()]
    assert check_extent(store, SPACE, record) == []
    store.delete(calibrations.key_of(made.digest))
    forget(monkeypatch)
    with opened(store, codec="fast", read_only=True) as reader:
        got = reader.retrieve(reader.lookup(tokens)).result(20)
        assert got.tokens == 0
        assert {error.kind for _, _, error in got.report.failed} == {"calibration"}
        assert reader.damage.settle(10)
        assert reader.lookup(tokens).tokens == 0
        assert [one.record.name for one in reader.index.extents()] == [record.name]
    (finding,) = check_extent(store, SPACE, record)
    assert not finding.is_certain
    store.put(calibrations.key_of(made.digest), made.to_bytes())
    with opened(store, codec="fast", read_only=True) as reader:
        assert reader.retrieve(reader.lookup(tokens)).result(20).tokens == 4 * N


def test_a_bound_is_held_to_what_the_calibration_measured(store: ObjectStore) -> None:
    publish(store, made_calibration(SPEC), SPACE.weights)
    bounded = replace(SPACE, fidelity="kl0.07")
    for settings in ({}, {"read_only": True}):
        values = small_settings(store.url, codec="transform", max_kl=0.07, **settings)
        with Cache.open(store.url, bounded, values) as cache:
            assert cache.transfer.codec.measured_kl == 0.0625
    with pytest.raises(Invalid, match=r"max_kl=0\.06: .* it measures 0\.0625"):
        opened(store, max_kl=0.06)
    with pytest.raises(Invalid, match=r"max_kl=0\.06: nobody has measured .*: run lmcache-s3 calibrate MODEL"):
        opened(store, max_kl=0.06, codec_level="fine")
