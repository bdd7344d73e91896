"""Kinds of settings, and the one line that each mistake in one is answered with.

A field carries how its error reads (`what`, `mend`); `invalid` writes the line from that. Pure.
"""

from __future__ import annotations

import difflib
from collections.abc import Mapping
from typing import Annotated, Any

from pydantic import BeforeValidator, ByteSize, Field, ValidationError
from pydantic.fields import FieldInfo

from lmcache_s3.errors import Invalid


def _no_bool(value: object) -> object:
    # YAML's `yes` and JSON's `true` are no numbers, though Python thinks so.
    if isinstance(value, bool):
        raise ValueError("a truth value")  # noqa: TRY004 (pydantic turns only ValueError into its own report)
    return value


Size = Annotated[ByteSize, BeforeValidator(_no_bool)]
Count = Annotated[int, BeforeValidator(_no_bool)]
Number = Annotated[float, BeforeValidator(_no_bool)]


LEAST_BYTES = 1 << 20
"""Of what is to hold KV: less is a forgotten unit."""


def field(default: Any, description: str, *, what: str, mend: str, **constraints: Any) -> Any:
    """A setting. what, mend: how its error reads: `name: value is not <what>; <mend>`."""
    return Field(default, description=description, json_schema_extra={"what": what, "mend": mend}, **constraints)


def text(description: str, mend: str) -> Any:
    return field(None, description, what="a text", mend=mend, min_length=1)


def size(default: str, description: str) -> Any:
    return field(default, description, what="a size", mend=f"write for example {default}", gt=0)


def budget(default: str | None, description: str) -> Any:
    return field(default, description, what="a size", mend="write for example 4GiB", ge=0)


def seconds(default: float, description: str) -> Any:
    return field(
        default,
        description,
        what="a number of seconds above 0",
        mend=f"write for example {default:g}",
        gt=0,
        le=86_400,
        allow_inf_nan=False,
    )


def long(default: float | None, description: str) -> Any:
    return field(
        default,
        description,
        what="a number of seconds, 0 or more",
        mend="write for example 2592000 for 30 days",
        ge=0,
        le=1e10,
        allow_inf_nan=False,
    )


def limit(description: str) -> Any:
    return field(None, description, what="a size above 0", mend="write for example 1TiB", gt=0)


def switch(description: str) -> Any:
    return field(False, description, what="true or false", mend="write true or false")


def too_few(n_bytes: int, why: str, example: str) -> str:
    return f"{int(n_bytes)} bytes {why}; give 1MiB or more, and the unit: write for example {example}"


def unknown(name: str, what: str, known: tuple[str, ...]) -> str:
    near = difflib.get_close_matches(name, known, n=1, cutoff=0.5)
    mend = f"did you mean {near[0]}?" if near else f"there are {', '.join(known)}"
    return f"{name[:80]!r} is no {what}; {mend}" if what != "setting" else f"{name[:80]}: unknown setting; {mend}"


def invalid(error: ValidationError, fields: Mapping[str, FieldInfo]) -> Invalid:
    """The first problem, unknown names before wrong values, as our one line."""
    found = sorted(error.errors(include_url=False, include_context=False), key=lambda e: e["type"] != "extra_forbidden")
    first = found[0]
    name = str(first["loc"][0]) if first["loc"] else ""
    if first["type"] == "extra_forbidden":
        return Invalid(unknown(name, "setting", tuple(fields)), kind="setting", key=name)
    own = first["msg"].removeprefix("Value error, ") if first["type"] == "value_error" else None
    if not name:
        line = own or first["msg"]
        return Invalid(line, kind="setting", key=line.partition(":")[0])
    what, mend = _hints(fields[name])
    if first["type"] == "missing":
        line = f"missing; {mend}"
    elif own is not None and own != "a truth value":
        line = own
    else:
        # These may hold secrets: their value is not shown.
        value = "its value" if name in ("storage_options", "tenant_bytes") else _shown(first["input"])
        line = f"{value} is not {what}; {mend}"
    return Invalid(" ".join(f"{name}: {line}".split()), kind="setting", key=name)


def _hints(info: FieldInfo) -> tuple[str, str]:
    hints = info.json_schema_extra
    assert isinstance(hints, dict)
    return str(hints["what"]), str(hints["mend"])


def _shown(value: object) -> str:
    shown = repr(value)
    return shown if len(shown) <= 80 else shown[:77] + "…"
