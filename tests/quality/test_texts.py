"""What is calibrated on is never measured on, and every text is there and long enough."""

from __future__ import annotations

import re
from collections import Counter

from lmcache_s3.calibration.calibrate import _SET_ASIDE
from lmcache_s3.quality.texts import (
    CALIBRATION_CHATS,
    CALIBRATION_ESSAYS,
    CALIBRATION_LANGUAGES,
    CHATS,
    KINDS,
    MORE_ESSAYS,
    Document,
    calibration,
    digest,
    held_out,
)


def test_there_are_24_documents_of_prose_and_some_of_each_other_kind() -> None:
    documents = held_out()
    counts = {kind: sum(one.kind == kind for one in documents) for kind in KINDS}
    assert counts == {"prose": 24, "code": 4, "languages": 4, "chat": 3}
    assert len({(one.kind, one.name) for one in documents}) == len(documents)
    assert {one.name for one in documents} >= set(MORE_ESSAYS)
    assert {one.kind for one in held_out(1)} == set(KINDS)
    assert len(held_out(1)) == len(KINDS)


def test_texts_are_long_enough_to_be_prompt_and_prediction() -> None:
    """A token of the densest tokenizers is about 4.5 letters of English; 1,280 tokens are wanted, 512 needed."""
    for one in held_out():
        if one.kind in ("prose", "code"):
            assert len(one.text) > 5_500, one.name


def test_calibration_shares_no_passage_with_what_is_held_out() -> None:
    """What a document is measured by is its beginning; no line of it long enough to mean something may be learnt."""
    learnt = {line.strip() for one in calibration() for line in one.text.splitlines() if len(line.strip()) > 40}
    for one in held_out():
        lines = [line.strip() for line in one.text[:6_000].splitlines() if len(line.strip()) > 40]
        shared = [line for line in lines if line in learnt]
        assert len(shared) <= 0.02 * len(lines), (one.name, shared[:3])


def test_calibration_shares_no_sentence_with_what_is_held_out() -> None:
    """Of texts written for this project, wholly: Python's own have turns of phrase that their authors repeat."""
    written = {*CALIBRATION_ESSAYS, *CALIBRATION_LANGUAGES, *CALIBRATION_CHATS}
    learnt = {sentence for one in calibration() if one.name in written for sentence in sentences(one)}
    assert len(learnt) > 1_000
    for one in held_out():
        assert not learnt & sentences(one), one.name


def sentences(document: Document) -> set[str]:
    """Those of five words or more; of eight characters where words are not parted."""
    parts = (part.strip().lower() for part in re.split(r"[.!?\u3002\uff01\uff1f\u061f\n]", document.text))
    return {part for part in parts if len(part.split()) >= 5 or (len(part) >= 8 and ord(part[0]) > 0x3000)}


def test_calibration_knows_prose_that_is_no_reference() -> None:
    pieces = {one.name: one for one in calibration()}
    assert pieces.keys() >= set(CALIBRATION_ESSAYS)
    assert all(len(pieces[name].text) > 5_500 for name in CALIBRATION_ESSAYS)


def test_calibration_knows_every_kind_that_is_measured() -> None:
    documents = calibration()
    names = [one.name for one in documents]
    assert len(set(names)) == len(names)
    assert {one.kind for one in documents} == set(KINDS)
    languages = {one.split("_")[0] for one in CALIBRATION_LANGUAGES}
    assert len(languages) == 12
    assert languages >= {one.name for one in held_out() if one.kind == "languages"}


def test_calibrations_languages_and_conversations_fill_a_prompt() -> None:
    """1,280 tokens are wanted: of SmolLM2's, which has few letters a token in anything but English."""
    for one in calibration():
        if one.kind == "chat":
            assert len(one.text) > 4_500, one.name
        elif one.kind == "languages":
            dense = one.name.startswith(("chinese", "japanese", "korean"))
            assert len(one.text) > (1_100 if dense else 2_500), one.name


def test_what_calibration_sets_aside_and_what_it_uses_have_every_kind_in_the_same_part() -> None:
    documents = calibration()
    of_all = Counter(one.kind for one in documents)
    aside = Counter(one.kind for one in documents[1::_SET_ASIDE])
    for kind, n in of_all.items():
        assert n // _SET_ASIDE <= aside[kind] <= -(-n // _SET_ASIDE), kind
        assert 1 <= aside[kind] < n, kind


def test_what_is_set_aside_is_in_languages_that_calibration_has_seen() -> None:
    documents = calibration()
    aside = documents[1::_SET_ASIDE]
    seen = {one.name.split("_")[0] for one in documents if one.kind == "languages" and one not in aside}
    assert {one.name.split("_")[0] for one in aside if one.kind == "languages"} <= seen


def test_conversations_take_turns() -> None:
    chats = [one for one in held_out() if one.kind == "chat"]
    assert [one.name for one in chats] == list(CHATS)
    learnt = [one for one in calibration() if one.kind == "chat"]
    assert [one.name for one in learnt] == list(CALIBRATION_CHATS)
    for one in chats + learnt:
        assert [role for role, _ in one.messages] == ["user", "assistant"] * (len(one.messages) // 2), one.name
        assert len(one.messages) >= 6, one.name
        assert all(content for _, content in one.messages), one.name


def test_the_digest_is_of_names_and_texts() -> None:
    documents = held_out()
    assert digest(documents) == digest(held_out()) != digest(documents[1:])
