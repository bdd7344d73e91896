"""How to reach a store: what a URL alone does not say. Pure values."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

AddressingStyle = Literal["auto", "path", "virtual"]


@dataclass(frozen=True, kw_only=True)
class StoreOptions:
    """Everything is optional; credentials come from the client's own chain (environment, profile, instance role).

    endpoint_url: S3 server other than AWS. addressing_style: `auto` is path style on a custom endpoint, else virtual.
    ca_bundle: PEM file for TLS. profile: of the AWS configuration. storage_options: passed to the fsspec file system.
    connect_timeout_s, request_timeout_s: of one attempt (the second: silence on the socket). max_connections: kept
    open, so the number of threads that work at once. requester_pays: agree to pay
    for requests to a bucket whose owner does not.
    """

    endpoint_url: str | None = None
    region: str | None = None
    addressing_style: AddressingStyle = "auto"
    ca_bundle: str | None = None
    profile: str | None = None
    storage_options: Mapping[str, Any] = field(default_factory=dict)
    connect_timeout_s: float = 5.0
    request_timeout_s: float = 30.0
    max_connections: int = 16
    requester_pays: bool = False
