"""A bound on the KL is promised only on the strength of a measurement of this very model, codec, level and chunk."""

from __future__ import annotations

import json
from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from lmcache_s3.cache import Cache
from lmcache_s3.codecs.registry import make_codec
from lmcache_s3.errors import Invalid
from lmcache_s3.fidelity import Measurement, Subject, measured_codec, save
from lmcache_s3.identity import Space
from lmcache_s3.testing.small import fresh_memory_url, random_tokens, small_settings, small_space
from lmcache_s3.tiers.stores.base import ObjectStore
from lmcache_s3.tiers.stores.counting import CountingStore
from lmcache_s3.tiers.stores.open import open_store

SPACE = small_space()
LEVEL = make_codec("cachegen").level
SUBJECT = Subject(SPACE.weights, SPACE.kv_dtype, SPACE.chunk_tokens, "cachegen", LEVEL)


@pytest.fixture
def store() -> ObjectStore:
    return open_store(fresh_memory_url())


def opened(store: ObjectStore, space: Space = SPACE, **settings: Any) -> Cache:
    return Cache.on_store(store, space, small_settings(store.url, **({"codec": "cachegen", "max_kl": 0.02} | settings)))


def test_a_measured_codec_opens_the_space_of_its_bound_and_says_its_error(store: ObjectStore) -> None:
    save(store, Measurement(SUBJECT, 0.0163, {"model": "small"}))
    with opened(store, replace(SPACE, fidelity="kl0.02")) as cache:
        values = np.zeros((2, 4, 32, 4, 8), np.uint16)
        cache.store(random_tokens(32), values).result(10)
        (key,) = [o.key for o in store.list("spaces/") if o.key.endswith("/zarr.json")]
        written = json.loads(store.get(key))["attributes"]["lmcache_s3"]
    assert (written["measured_kl"], written["fidelity"]) == (0.0163, "kl0.02")


def test_without_a_measurement_the_bound_is_refused_with_the_command_that_measures(store: ObjectStore) -> None:
    with pytest.raises(Invalid, match=rf"nobody has measured .*bench quality --model MODEL .*{LEVEL} --save") as caught:
        opened(store)
    assert caught.value.key == "max_kl"
    assert "\n" not in str(caught.value)


def test_a_codec_that_measures_worse_is_refused(store: ObjectStore) -> None:
    save(store, Measurement(SUBJECT, 0.0201))
    with pytest.raises(Invalid, match=r"max_kl=0\.02: .* it measures 0\.0201"):
        opened(store)


@pytest.mark.parametrize(
    "other",
    [
        replace(SUBJECT, weights="cd" * 32),
        replace(SUBJECT, kv_dtype="float16"),
        replace(SUBJECT, chunk_tokens=256),
        replace(SUBJECT, level="other"),
    ],
    ids=["weights", "kv_dtype", "chunk", "level"],
)
def test_a_measurement_of_something_else_does_not_count(store: ObjectStore, other: Subject) -> None:
    save(store, Measurement(other, 0.001))
    with pytest.raises(Invalid, match="nobody has measured"):
        opened(store)
    # … not even under this one's name
    store.put(SUBJECT.key, Measurement(other, 0.001).to_json())
    with pytest.raises(Invalid, match="measure again with"):
        opened(store)


@pytest.mark.parametrize(
    "document",
    [
        b"",
        b"[]",
        b"[" * 60_000,
        b"{}" + b" " * (1 << 16),
        b"\xff\xfe",
        *(
            Measurement(SUBJECT, 0.25).to_json().replace(b"0.25", lie)
            for lie in (b"-1", b"NaN", b"Infinity", b"true", b"null", b'"0.001"', b"1" * 400, b"[0.001]")
        ),
        Measurement(SUBJECT, 0.25).to_json().replace(b'"format": 1', b'"format": 2'),
        Measurement(SUBJECT, 0.001).to_json().replace(b'"about": {}', b'"about": []'),
    ],
)
def test_a_document_that_cannot_be_read_promises_nothing(store: ObjectStore, document: bytes) -> None:
    store.put(SUBJECT.key, document)
    with pytest.raises(Invalid, match="measure again with"):
        opened(store)


def test_nothing_is_read_where_nothing_depends_on_it() -> None:
    counting = CountingStore(open_store(fresh_memory_url()))
    where = {"weights": SPACE.weights, "kv_dtype": SPACE.kv_dtype, "chunk_tokens": 16}
    save(counting, Measurement(SUBJECT, 0.001))
    before = dict(counting.counts)
    assert measured_codec(counting, make_codec("cachegen"), None, **where)[1] == f"unmeasured-cachegen-{LEVEL}"  # type: ignore[arg-type]
    assert measured_codec(counting, make_codec("fast"), 0.02, **where)[1] == "exact"  # type: ignore[arg-type]
    knowing = make_codec("cachegen").measured(0.01)
    assert measured_codec(counting, knowing, 0.02, **where) == (knowing, "kl0.02")  # type: ignore[arg-type]
    assert dict(counting.counts) == before


def test_documents_come_back_and_names_are_keys() -> None:
    made = Measurement(SUBJECT, 0.0163, {"model": "small", "documents": 24})
    assert Measurement.from_json(made.to_json(), SUBJECT) == made
    with pytest.raises(Invalid):
        Subject("../elsewhere", "bfloat16", 256, "cachegen", "medium")
    with pytest.raises(Invalid):
        Subject("ab" * 32, "bfloat16", 256, "cachegen", "a/b")
