"""The documents that quality is measured on, and those that codecs are calibrated on: never the same.

Held out, by kind:

- `prose`: 10 texts written for this project (memoir, reportage, a story, essays), and 14 passages of Python's language
  reference (`pydoc_data`);
- `code`: the middle of 4 modules of the standard library;
- `languages`: short essays in German, French, Spanish and Chinese;
- `chat`: 3 conversations of several turns.

For calibration, the same kinds: three more texts, 16 essays in 12 languages, 5 conversations, other topics of the
reference, and other modules. What comes from the standard library changes a little between Python versions, so figures
name the `digest` of the texts they were measured on.
Pure apart from reading package data and the standard library's files. Raises `Invalid` where the latter are missing.
"""

from __future__ import annotations

import hashlib
import importlib.util
from collections.abc import Sequence
from dataclasses import dataclass
from importlib.resources import files
from pathlib import Path

from lmcache_s3.errors import Invalid
from lmcache_s3.quality.model import Model

KINDS = ("prose", "code", "languages", "chat")

ESSAYS = ("observatory", "seed_bank", "seed_bank/2", "tide_mill")
"""What the engines of `bench e2e` are asked about. `/2` is the second half of a text."""
MORE_ESSAYS = ("against_summaries", "cable_ferry", "lichens", "mountain_rescue", "piano_tuner", "town_clock")
CALIBRATION_ESSAYS = ("night_train", "rowing_letters", "salt")
CALIBRATION_LANGUAGES = (
    "chinese_dumplings", "french_meridian", "german_allotment", "spanish_railway", "arabic_paper", "dutch_dike",
    "italian_espresso", "japanese_sento", "chinese_tides", "korean_repair_shop", "polish_mushrooms",
    "portuguese_night_bus", "russian_dacha", "german_heat_pump", "french_puff_pastry", "spanish_summer_cinema",
)  # fmt: skip
CALIBRATION_CHATS = ("flaky_test", "interview_spanish", "kettle_support", "number_e", "slovenia")
LANGUAGES = ("chinese", "french", "german", "spanish")
CHATS = ("bicycle", "database", "moving")
HELD_OUT_TOPICS = (
    "assignment", "calls", "comparisons", "compound", "debugger", "execmodel", "formatstrings", "function", "import",
    "string-methods", "strings", "types", "typesmapping", "typesseq",
)  # fmt: skip
CALIBRATION_TOPICS = ("specialnames", "identifiers", "objects", "async", "raise", "binary", "with", "subscriptions")
HELD_OUT_MODULES = ("heapq", "statistics", "shlex", "tarfile")
CALIBRATION_MODULES = ("argparse", "configparser", "dataclasses", "difflib", "ftplib", "pickle", "smtplib", "threading")

_PIECE = 7_000
"""Characters of a longer text that make a document of its own for calibration: a little over 1,280 tokens of prose."""


@dataclass(frozen=True, slots=True)
class Document:
    """messages: of a conversation, else empty."""

    name: str
    kind: str
    text: str
    messages: tuple[tuple[str, str], ...] = ()

    def tokens(self, model: Model) -> list[int]:
        if not self.messages:
            return model.tokens(self.text)
        return model.chat_tokens([{"role": role, "content": content} for role, content in self.messages])


def held_out(most: int | None = None) -> list[Document]:
    """The documents to measure on, at most so many of each kind; essays and technical prose take turns."""
    essays = [Document(name, "prose", _essay(name)) for name in ESSAYS]
    essays += [Document(name, "prose", _bundled(f"essays/{name}")) for name in MORE_ESSAYS]
    topics = [Document(name, "prose", _topic(name)) for name in HELD_OUT_TOPICS]
    prose = [one for pair in zip(essays, topics, strict=False) for one in pair] + topics[len(essays) :]
    kinds = (
        prose,
        [Document(name, "code", _second_half(_module(name))) for name in HELD_OUT_MODULES],
        [Document(name, "languages", _bundled(f"languages/{name}")) for name in LANGUAGES],
        [_conversation(name) for name in CHATS],
    )
    return [document for kind in kinds for document in kind[:most]]


def calibration() -> list[Document]:
    """Documents to calibrate codecs on; none of them, nor a part of one, is held out.

    Kinds lie together, the smallest first: whoever sets every sixth document aside has a sixth of each kind, and what a
    tokenizer makes too short to be used moves no kind across.
    """
    documents = [_conversation(name, "calibration/chats") for name in CALIBRATION_CHATS]
    documents += [
        Document(name, "languages", _bundled(f"calibration/languages/{name}")) for name in CALIBRATION_LANGUAGES
    ]
    documents += [Document(name, "prose", _bundled(f"calibration/{name}")) for name in CALIBRATION_ESSAYS]
    documents += [piece for name in CALIBRATION_TOPICS for piece in _pieces(name, "prose", _topic(name))]
    modules = [piece for name in CALIBRATION_MODULES for piece in _pieces(name, "code", _module(name)[:28_000])]
    return documents + modules


def from_files(paths: Sequence[Path]) -> list[Document]:
    """Texts of one's own, a document for each piece of about 1,500 tokens. Raises `Invalid` for files that are none."""
    made = []
    for path in paths:
        try:
            made += _pieces(path.name, "own", path.read_text("utf-8"))
        except (OSError, UnicodeDecodeError) as error:
            said = error.strerror if isinstance(error, OSError) else "not UTF-8"
            raise Invalid(f"{path}: cannot be read as text ({said})", kind="argument", key="text") from error
    return made


def digest(documents: Sequence[Document]) -> str:
    """16 hex digits that stand for these texts."""
    state = hashlib.sha256()
    for one in documents:
        state.update(repr((one.name, one.kind, one.text)).encode())
    return state.hexdigest()[:16]


def _bundled(name: str) -> str:
    return files("lmcache_s3.quality").joinpath(f"texts/{name}.txt").read_text("utf-8")


def _essay(name: str) -> str:
    name, _, half = name.partition("/")
    text = files("lmcache_s3.benchmarks").joinpath(f"documents/{name}.txt").read_text("utf-8")
    return _second_half(text) if half else text


def _topic(name: str) -> str:
    try:
        from pydoc_data.topics import topics
    except ModuleNotFoundError as error:
        raise Invalid("this Python lacks its pydoc_data: install the full standard library", kind="setting") from error
    return str(topics[name])


def _module(name: str) -> str:
    spec = importlib.util.find_spec(name)
    if spec is None or spec.origin is None or not Path(spec.origin).is_file():
        raise Invalid(f"this Python lacks the source of {name}: install the full standard library", kind="setting")
    return Path(spec.origin).read_text("utf-8")


def _second_half(text: str) -> str:
    """From the middle on, whole lines: modules begin with prose."""
    return text[text.index("\n", len(text) // 2) + 1 :]


def _conversation(name: str, room: str = "chats") -> Document:
    """`## user` and `## assistant` begin the turns."""
    text = _bundled(f"{room}/{name}")
    turns = [turn.split("\n", 1) for turn in text.split("## ")[1:]]
    return Document(name, "chat", text, tuple((role.strip(), content.strip()) for role, content in turns))


def _pieces(name: str, kind: str, text: str) -> list[Document]:
    cut = [text[i : i + _PIECE] for i in range(0, len(text), _PIECE)]
    return [Document(f"{name}-{i}", kind, piece) for i, piece in enumerate(cut) if len(piece) > _PIECE // 2 or i == 0]
