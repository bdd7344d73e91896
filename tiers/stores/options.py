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

    def for_fsspec(self, url: str) -> dict[str, Any]:
        """The same in the words of the fsspec file system that reads `url`; nothing for local paths."""
        if not url.startswith("s3://"):
            return dict(self.storage_options) if "://" in url and not url.startswith("file://") else {}
        client = {"region_name": self.region, "verify": self.ca_bundle}
        style = None if self.addressing_style == "auto" else {"s3": {"addressing_style": self.addressing_style}}
        made = {
            "endpoint_url": self.endpoint_url,
            "profile": self.profile,
            "requester_pays": self.requester_pays or None,
            "client_kwargs": {name: value for name, value in client.items() if value is not None} or None,
            "config_kwargs": style,
        }
        return {name: value for name, value in made.items() if value is not None}
