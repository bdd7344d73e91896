"""Where a bucket is and with what key its requests are signed, as boto3 would have it.

boto3 knows profiles, environment, configuration files, instance roles, SSO and assumed roles, regions, and both ways to
address a bucket: we ask it, and sign with its signer, so that whatever works with boto3 works here. Raises botocore's
exceptions and `Invalid`.
"""

from __future__ import annotations

import functools
import hashlib
import os
from dataclasses import dataclass
from typing import Any
from urllib.parse import quote, urlsplit

import boto3
import botocore.auth
import botocore.awsrequest
import botocore.config
import botocore.exceptions
import botocore.httpsession
import botocore.loaders
import botocore.session

from lmcache_s3.errors import Invalid
from lmcache_s3.tiers.stores.options import StoreOptions

SIGNED_BODY_BYTES = 1 << 18
"""Over plain HTTP, bodies up to this size are signed too, which costs a millisecond per megabyte or two: they are the
index, which names larger objects by checksum. Over TLS none is: TLS sees to it."""

_UNSIGNED = "UNSIGNED-PAYLOAD"
_EMPTY_SHA256 = hashlib.sha256(b"").hexdigest()
_ATTEMPTS = 3


@dataclass(frozen=True, slots=True)
class Place:
    """A bucket's address. netloc: host, and port where not the scheme's own. path: begins and ends with a slash; a
    quoted key follows it. region, service: in the signature."""

    scheme: str
    netloc: str
    path: str
    region: str
    service: str

    @property
    def url(self) -> str:
        return f"{self.scheme}://{self.netloc}"


class Account:
    """One boto3 client of a bucket (`client`: for LIST), its credentials, and its place."""

    def __init__(self, bucket: str, options: StoreOptions) -> None:
        """Raises botocore's exceptions, and ValueError for an `endpoint_url` that is no URL."""
        self._bucket = bucket
        self._options = options
        self._payer = {"x-amz-request-payer": "requester"} if options.requester_pays else {}
        self._session = botocore.session.Session(profile=options.profile)
        self._session.register_component("data_loader", _api_loader())
        self._boto = boto3.Session(botocore_session=self._session)
        self.client = self._client(options.region)
        self._credentials = self._session.get_credentials()

    @property
    def ca_file(self) -> str:
        """PEM file of the CAs that an https endpoint is checked against."""
        configured = self._options.ca_bundle or self._session.get_config_variable("ca_bundle") or True
        file: str = botocore.httpsession.get_cert_path(configured)
        return file

    def place(self) -> Place:
        try:
            self.client.get_object(Bucket=self._bucket, Key="k")
        except _Stopped as found:
            if found.version not in ("v4", "s3v4"):
                raise Invalid(
                    f"s3://{self._bucket}: signatures of kind {found.version!r} are not spoken here; use a general "
                    "purpose bucket",
                    kind="bucket",
                ) from None
            parts = urlsplit(found.url)
            assert parts.path.endswith("/k")
            return Place(parts.scheme, parts.netloc, parts.path[:-1], found.region, found.service)
        raise AssertionError("unreachable")

    def moved_place(self, region: str) -> Place:
        """Again, after the server said that the bucket is in `region`. LIST goes there, too, from now on."""
        left, self.client = self.client, self._client(region)
        left.close()
        return self.place()

    @property
    def list_arguments(self) -> dict[str, str]:
        return {"RequestPayer": "requester"} if self._payer else {}

    def signed(
        self, place: Place, method: str, key: str, headers: dict[str, str], body: memoryview | None
    ) -> tuple[str, dict[str, str]]:
        """The request's path, and all its headers. Takes 0.06 ms of CPU. Renews credentials near their end (may block).

        key: below the bucket, unquoted. Raises botocore's `NoCredentialsError` and kin.
        """
        if self._credentials is None:
            raise botocore.exceptions.NoCredentialsError
        path = place.path + quote(key, safe="/~")
        request = botocore.awsrequest.AWSRequest(
            method, f"{place.url}{path}", headers={**headers, **self._payer, "Host": place.netloc}
        )
        request.context["payload"] = _payload(place, body)
        frozen = self._credentials.get_frozen_credentials()
        _Signer(frozen, place.service, place.region).add_auth(request)
        return path, dict(request.headers.items())

    def _client(self, region: str | None) -> Any:
        options = self._options
        client = self._boto.client(
            "s3",
            endpoint_url=options.endpoint_url,
            region_name=region or self._boto.region_name or os.environ.get("AWS_REGION"),
            verify=options.ca_bundle,
            config=botocore.config.Config(
                connect_timeout=options.connect_timeout_s,
                read_timeout=options.request_timeout_s,
                max_pool_connections=options.max_connections,
                retries={"mode": "standard", "total_max_attempts": _ATTEMPTS},
                tcp_keepalive=True,
                s3={"addressing_style": options.addressing_style},
            ),
        )
        # boto3 tells where a request would go just before it is signed; no request is made.
        client.meta.events.register("before-sign.s3.GetObject", _stop)
        return client


class _Signer(botocore.auth.S3SigV4Auth):
    def payload(self, request: Any) -> str:
        payload: str = request.context["payload"]
        return payload


class _Stopped(Exception):
    def __init__(self, url: str, region: str, service: str, version: str) -> None:
        super().__init__(url)
        self.url = url
        self.region = region
        self.service = service
        self.version = version


def _stop(request: Any, region_name: str, signing_name: str, signature_version: str, **_: Any) -> None:
    context = request.context.get("signing", {})
    raise _Stopped(
        request.url,
        context.get("region") or region_name,
        context.get("signing_name") or signing_name,
        signature_version,
    )


def _payload(place: Place, body: memoryview | None) -> str:
    if body is None or not len(body):
        return _EMPTY_SHA256
    if place.scheme == "https" or len(body) > SIGNED_BODY_BYTES:
        return _UNSIGNED
    return hashlib.sha256(body).hexdigest()


@functools.cache
def _api_loader() -> Any:
    """Reads S3's API description once a process rather than once a store (0.1 s of CPU each)."""
    return botocore.loaders.create_loader()
