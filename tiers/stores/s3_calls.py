"""One S3 call: sign, send, and again where that is right. Knows no verbs.

Calls that may be repeated are, three times in all, as boto3's standard mode does: after failed connections, silence,
cut answers, throttling and server errors, with a jittered pause that doubles. A call that must be sent once is not,
except where nothing of it had left or the server said that the bucket is elsewhere. Safe for many threads. Raises
`Refused`, `Trouble`'s kinds, `Garbled`, and what `Account` raises.
"""

from __future__ import annotations

import random
import re
import secrets
import threading
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TypeVar

from lmcache_s3.errors import Invalid, Unavailable
from lmcache_s3.tiers.stores.http_connection import Trouble
from lmcache_s3.tiers.stores.http_head import Garbled
from lmcache_s3.tiers.stores.http_pool import Answer, Pool, route_to
from lmcache_s3.tiers.stores.options import StoreOptions
from lmcache_s3.tiers.stores.s3_errors import Refused
from lmcache_s3.tiers.stores.s3_place import Account, Place

T = TypeVar("T")

_ATTEMPTS = 3
_PAUSE_S = 0.05
_THROTTLED_PAUSE_S = 1.0
_CODE = re.compile(rb"<Code>([0-9A-Za-z.]{1,80})</Code>")
_REGION = re.compile(rb"<Region>([0-9a-z-]{1,40})</Region>")
_NAME = re.compile("[0-9a-z-]{1,40}", re.ASCII)


@dataclass(frozen=True, slots=True)
class Call:
    """key: below the bucket. headers: besides those of the signature and `Content-Length`. once: see the module."""

    method: str
    key: str
    headers: Mapping[str, str]
    body: memoryview | None = None
    once: bool = False


class Caller:
    """Calls to one bucket. Where it is, is found at the first."""

    def __init__(
        self,
        account: Account,
        options: StoreOptions,
        *,
        sleep: Callable[[float], None] = time.sleep,
        rng: random.Random | None = None,
    ) -> None:
        self._account = account
        self._options = options
        self._sleep = sleep
        self._rng = rng or random.Random(secrets.randbits(64))
        self._lock = threading.Lock()
        self._there: tuple[Place, Pool] | None = None
        self._closed = False

    def find(self) -> None:
        """Find out where the bucket is and how to get there, unless that is known; asks nobody."""
        self._find()

    def call(self, call: Call, receive: Callable[[Answer], T]) -> T:
        """What `receive` makes of a 2xx answer. It reads the body, and may be called again after `Trouble`."""
        attempt = 1
        moved = False
        while True:
            there = self._find()
            try:
                return self._attempt(there, call, receive)
            except Refused as e:
                if e.moved and e.region and not moved:
                    moved = True
                    self._find_again(there, e.region)
                    continue
                if call.once or attempt == _ATTEMPTS or not e.transient:
                    raise
                pause_s = _THROTTLED_PAUSE_S if e.throttled else _PAUSE_S
            except (Trouble, Garbled):
                if call.once or attempt == _ATTEMPTS:
                    raise
                pause_s = _PAUSE_S
            self._sleep(self._rng.random() * pause_s * 2 ** (attempt - 1))
            attempt += 1

    def close(self) -> None:
        with self._lock:
            self._closed = True
            if self._there is not None:
                self._there[1].close()

    def _attempt(self, there: tuple[Place, Pool], call: Call, receive: Callable[[Answer], T]) -> T:
        place, pool = there
        path, headers = self._account.signed(place, call.method, call.key, dict(call.headers), call.body)
        target = place.url + path if pool.route.forwarded else path
        lines = [f"{call.method} {target} HTTP/1.1", *(f"{name}: {value}" for name, value in headers.items())]
        lines += ["User-Agent: lmcache-s3", "Accept-Encoding: identity"]
        if pool.route.forwarded:
            lines += [f"{name}: {value}" for name, value in pool.route.proxy_headers.items()]
        if call.body is not None:
            lines.append(f"Content-Length: {len(call.body)}")
        head = "\r\n".join([*lines, "", ""]).encode("latin-1")
        with pool.exchange(head, call.body, once=call.once) as answer:
            if 200 <= answer.status < 300:
                return receive(answer)
            raise _refused(answer)

    def _find(self) -> tuple[Place, Pool]:
        there = self._there
        if there is not None:
            return there
        with self._lock:
            if self._closed:
                raise Unavailable("closed", kind="closed")
            if self._there is None:
                self._there = self._at(self._account.place())
            return self._there

    def _find_again(self, left: tuple[Place, Pool], region: str) -> None:
        with self._lock:
            if self._there is left and not self._closed:
                self._there = self._at(self._account.moved_place(region))
                left[1].close()

    def _at(self, place: Place) -> tuple[Place, Pool]:
        ca_file = self._account.ca_file
        try:
            route = route_to(
                place.url,
                ca_file=ca_file,
                connect_timeout_s=self._options.connect_timeout_s,
                silence_s=self._options.request_timeout_s,
            )
        except OSError as e:
            raise Invalid(
                f"ca_bundle: {ca_file} holds no certificates; name a PEM file", kind="setting", key="ca_bundle"
            ) from e
        return place, Pool(route, self._options.max_connections)


def _refused(answer: Answer) -> Refused:
    try:
        body = answer.small()
    except (Trouble, Garbled):  # the status was understood all the same
        body = b""
    code, region = _CODE.search(body), _REGION.search(body)
    there = answer.headers.get("x-amz-bucket-region", "") or (region[1].decode() if region else "")
    return Refused(answer.status, code[1].decode() if code else "", there if _NAME.fullmatch(there) else None)
