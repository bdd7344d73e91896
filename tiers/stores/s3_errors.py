"""What failed calls mean to us, ours and boto3's, by type and status code (never by text). Pure.

One message form: the thing, what is wrong, how to mend it.
"""

from __future__ import annotations

import ssl

import botocore.exceptions as bc

from lmcache_s3.errors import Invalid, LMCacheS3Error, Missing, Unavailable, Unusable
from lmcache_s3.tiers.stores.http_connection import NoTls, ProxyRefused, Silence, Trouble, Unreachable, Untrusted
from lmcache_s3.tiers.stores.http_head import Garbled


class Refused(Exception):
    """An answer other than 2xx. code: S3's word for it, "" where there is none. region: of the bucket, if told."""

    def __init__(self, status: int, code: str, region: str | None = None) -> None:
        super().__init__(f"{status} {code}")
        self.status = status
        self.code = code
        self.region = region

    @property
    def moved(self) -> bool:
        """The bucket is elsewhere; nothing was done here."""
        return self.status in (301, 302, 307, 308) or self.code in _MOVED_CODES

    @property
    def throttled(self) -> bool:
        return self.status == 429 or self.code in _THROTTLE_CODES

    @property
    def transient(self) -> bool:
        return self.throttled or self.status in (500, 502, 503, 504) or self.code == "RequestTimeout"


CLIENT_ERRORS: tuple[type[Exception], ...] = (Refused, Trouble, Garbled, bc.BotoCoreError, bc.ClientError)
"""Everything our calls and boto3's raise of their own accord."""

_CREDENTIAL_CODES = frozenset(
    {
        "AuthorizationHeaderMalformed",
        "ExpiredToken",
        "ExpiredTokenException",
        "InvalidAccessKeyId",
        "InvalidToken",
        "RequestTimeTooSkewed",
        "SignatureDoesNotMatch",
        "TokenRefreshRequired",
    }
)
_THROTTLE_CODES = frozenset(
    {"SlowDown", "ServiceUnavailable", "Throttling", "ThrottlingException", "RequestLimitExceeded"}
)
_MOVED_CODES = frozenset({"AuthorizationHeaderMalformed", "PermanentRedirect", "IllegalLocationConstraintException"})
_NO_CREDENTIALS = (
    bc.NoCredentialsError,
    bc.PartialCredentialsError,
    bc.CredentialRetrievalError,
    bc.NoAuthTokenError,
    bc.TokenRetrievalError,
    bc.UnauthorizedSSOTokenError,
    bc.SSOTokenLoadError,
    bc.ProfileNotFound,
)
_TIMEOUTS = (Silence, bc.ConnectTimeoutError, bc.ReadTimeoutError)


def status_of(error: BaseException) -> int | None:
    """HTTP status of a botocore `ClientError`, or None."""
    response = getattr(error, "response", None)
    if not isinstance(response, dict):
        return None
    status = response.get("ResponseMetadata", {}).get("HTTPStatusCode")
    return status if isinstance(status, int) else None


def mapped(error: Exception, *, where: str, bucket: str, endpoint: str, key: str | None) -> LMCacheS3Error:
    """Our error for one of `CLIENT_ERRORS`. `where`: the object's URL; `endpoint`: what was talked to, for people."""
    if isinstance(error, bc.ClientError):
        status = error.response.get("ResponseMetadata", {}).get("HTTPStatusCode", 0)
        code = str(error.response.get("Error", {}).get("Code", ""))[:80]
        return _answered(status, code, where=where, bucket=bucket, endpoint=endpoint, key=key)
    if isinstance(error, Refused):
        return _answered(error.status, error.code, where=where, bucket=bucket, endpoint=endpoint, key=key)
    if isinstance(error, _NO_CREDENTIALS):
        return Invalid(
            f"{where}: no usable credentials ({error}); set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, or a profile",
            kind="credentials",
            key=key,
        )
    if isinstance(error, _TIMEOUTS):
        return Unavailable(f"{where}: {endpoint} did not answer in time", kind="timeout", key=key)
    if isinstance(error, Untrusted | NoTls | bc.SSLError):
        ask = "is ca_bundle the server's CA?" if _is_distrust(error) else "does it speak TLS there, or plain http://?"
        return Unavailable(f"{where}: TLS to {endpoint} failed ({_one_line(error)}); {ask}", kind="network", key=key)
    if isinstance(error, ProxyRefused | bc.ProxyConnectionError):
        # The proxy's address is not shown: it may hold a password.
        return Unavailable(
            f"{where}: cannot connect to {endpoint} by way of the proxy; is it up, and HTTP_PROXY or HTTPS_PROXY "
            "right? (NO_PROXY names what is reached without it)",
            kind="network",
            key=key,
        )
    if isinstance(error, Unreachable | bc.EndpointConnectionError):
        return Unavailable(
            f"{where}: cannot connect to {endpoint}; is the server up, and endpoint_url right?", kind="network", key=key
        )
    if isinstance(error, bc.ParamValidationError):
        return Invalid(f"{where}: not a valid bucket or key ({_one_line(error)})", kind="bucket", key=key)
    if isinstance(error, bc.NoRegionError | bc.InvalidRegionError):
        return Invalid(f"{where}: no usable region; set region or AWS_REGION", kind="setting", key="region")
    return Unavailable(f"{where}: connection to {endpoint} failed ({_one_line(error)})", kind="network", key=key)


def _answered(status: int, code: str, *, where: str, bucket: str, endpoint: str, key: str | None) -> LMCacheS3Error:
    if code == "NoSuchBucket" or (status == 404 and key is None):
        return Invalid(
            f"{where}: bucket {bucket!r} does not exist at {endpoint}; create it or mend the url",
            kind="bucket",
            key=key,
        )
    if code == "InvalidBucketName":
        return Invalid(f"{where}: {bucket!r} is not a valid bucket name; mend the url", kind="bucket", key=key)
    if status == 404:
        return Missing(f"{where}: not there", key=key)
    if code in _CREDENTIAL_CODES or status == 401:
        return Invalid(
            f"{where}: {endpoint} refused the credentials ({code}); check access key, secret, region and clock",
            kind="credentials",
            key=key,
        )
    if status == 403:
        return Invalid(
            f"{where}: permission denied by {endpoint} ({code}); the credentials need s3:ListBucket on the bucket and "
            "s3:GetObject, s3:PutObject, s3:DeleteObject on the prefix",
            kind="permission",
            key=key,
        )
    if status == 416:
        return Unusable(f"{where}: shorter than the range it should have", kind="truncated", key=key)
    if code in _THROTTLE_CODES or status in (429, 503):
        return Unavailable(f"{where}: {endpoint} is throttling ({code})", kind="throttled", key=key)
    if code == "RequestTimeout" or status in (408, 504):
        return Unavailable(f"{where}: {endpoint} did not answer in time ({code})", kind="timeout", key=key)
    if status in (301, 307, 308):
        return Invalid(
            f"{where}: the bucket lives in another region ({code}); set region", kind="setting", key="region"
        )
    if status == 507:
        return Unavailable(f"{where}: {endpoint} has no space left ({code})", kind="full", key=key)
    if status in (400, 405, 411, 501):
        return Invalid(f"{where}: {endpoint} refused the request ({status} {code})", kind="argument", key=key)
    return Unavailable(f"{where}: {endpoint} answered {status} ({code})", kind="network", key=key)


def _is_distrust(error: BaseException | None) -> bool:
    """Whether a certificate was refused; boto3 says so only in what its error came from."""
    while error is not None:
        if isinstance(error, Untrusted | ssl.SSLCertVerificationError):
            return True
        error = error.__cause__ or error.__context__
    return False


def _one_line(error: BaseException) -> str:
    return " ".join(str(error).split())[:200]
