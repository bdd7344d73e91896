"""Second touch: what was seen before is stored, what was not is remembered, and memory has an end."""

from __future__ import annotations

import hashlib

import pytest

from lmcache_s3.errors import Invalid
from lmcache_s3.tiers.eviction.admission import SecondTouch


def hashes(first: int, n: int) -> list[bytes]:
    return [hashlib.sha256(i.to_bytes(8, "big")).digest()[:16] for i in range(first, first + n)]


def test_the_second_touch_is_admitted() -> None:
    admission = SecondTouch(100)
    assert admission.admit(hashes(0, 5)) == 0
    assert admission.admit(hashes(0, 5)) == 5


def test_only_what_leads_is_admitted_and_the_rest_is_remembered() -> None:
    admission = SecondTouch(100)
    admission.admit([*hashes(0, 2), *hashes(10, 2)])
    longer = [*hashes(0, 3), *hashes(10, 2)]
    assert admission.admit(longer) == 2
    assert admission.admit(longer) == 5


def test_few_chunks_are_not_worth_an_upload() -> None:
    admission = SecondTouch(100, min_chunks=4)
    admission.admit(hashes(0, 6))
    assert admission.admit(hashes(0, 3)) == 0
    assert admission.admit(hashes(0, 6)) == 6


def test_it_forgets_but_not_too_soon() -> None:
    admission = SecondTouch(1000)
    admission.admit(hashes(0, 1000))
    assert admission.admit(hashes(0, 1)) == 1
    admission.admit(hashes(10_000, 500))
    assert admission.admit(hashes(1, 400)) == 400, "of two generations the older is still there"
    admission.admit(hashes(20_000, 3000))
    assert admission.admit(hashes(600, 50)) < 5


def test_few_that_are_new_look_seen() -> None:
    admission = SecondTouch(2000)
    admission.admit(hashes(0, 2000))
    wrong = sum(admission.admit(hashes(i, 1)) for i in range(100_000, 101_900))
    assert wrong < 40
    with pytest.raises(Invalid):
        SecondTouch(0)
