"""What is calibrated on is never measured on, and every text is there and long enough."""

from __future__ import annotations

from lmcache_s3.quality.texts import CALIBRATION_ESSAYS, CHATS, KINDS, MORE_ESSAYS, calibration, digest, held_out


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


def test_calibration_knows_prose_that_is_no_reference() -> None:
    pieces = {one.name: one for one in calibration()}
    assert pieces.keys() >= set(CALIBRATION_ESSAYS)
    assert all(len(pieces[name].text) > 5_500 for name in CALIBRATION_ESSAYS)


def test_conversations_take_turns() -> None:
    chats = [one for one in held_out() if one.kind == "chat"]
    assert [one.name for one in chats] == list(CHATS)
    for one in chats:
        assert [role for role, _ in one.messages] == ["user", "assistant"] * (len(one.messages) // 2)


def test_the_digest_is_of_names_and_texts() -> None:
    documents = held_out()
    assert digest(documents) == digest(held_out()) != digest(documents[1:])
