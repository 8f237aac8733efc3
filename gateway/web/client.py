"""HTTP client for a gateway's own endpoint, as commands on the same machine and elsewhere use it."""

from __future__ import annotations

import ipaddress
from typing import TYPE_CHECKING, TypeVar

import httpx
import msgspec

if TYPE_CHECKING:
    from gateway.settings.listeners import StatusSettings

T = TypeVar("T")
_TIMEOUT_S = 5.0
_ERROR_MAX_CHARS = 200


class GatewayClientError(Exception):
    """No usable answer; `status` is the HTTP status, 0 when there was none."""

    def __init__(self, message: str, status: int = 0) -> None:
        super().__init__(message)
        self.status = status


class GatewayClient:
    """Requests to one endpoint; answers are decoded into the type that is expected.

    `verify` false skips the check of the certificate, which does not name the loopback address.
    """

    def __init__(
        self, url: str, *, token: str = "", timeout_s: float = _TIMEOUT_S, verify: bool = True
    ) -> None:
        self.url = url.rstrip("/")
        self._token, self._timeout_s, self._verify = token, timeout_s, verify

    def get(self, path: str, answer: type[T], **query: str) -> T:
        """GET a document. Raises GatewayClientError."""
        return self._request("GET", path, answer, query)

    def post(self, path: str, body: object, answer: type[T]) -> T:
        """POST `body` as JSON. Raises GatewayClientError."""
        return self._request("POST", path, answer, {}, msgspec.json.encode(body))

    def _request(
        self, method: str, path: str, answer: type[T], query: dict[str, str], body: bytes | None = None
    ) -> T:
        headers = {} if body is None else {"Content-Type": "application/json"}
        if self._token:
            headers["Authorization"] = f"Bearer {self._token}"
        url = self.url + path
        try:
            reply = httpx.request(
                method,
                url,
                params=query,
                content=body,
                headers=headers,
                timeout=self._timeout_s,
                trust_env=False,
                verify=self._verify,
            )
            if reply.is_success:
                return msgspec.json.decode(reply.content, type=answer)
        except (httpx.HTTPError, httpx.InvalidURL, OSError) as error:
            raise GatewayClientError(f"{url}: {error}") from error
        except msgspec.DecodeError as error:
            raise GatewayClientError(f"{url}: unexpected answer: {error}") from error
        text = " ".join(reply.text.split())[:_ERROR_MAX_CHARS]
        raise GatewayClientError(f"{url}: HTTP {reply.status_code}: {text}", reply.status_code)


def local_gateway_client(status: StatusSettings, timeout_s: float = _TIMEOUT_S) -> GatewayClient | None:
    """A client for the endpoint of a gateway on this machine; None when [status] is not enabled."""
    if not status.enabled:
        return None
    host = status.host
    try:
        if ipaddress.ip_address(host).is_unspecified:
            host = "::1" if ":" in host else "127.0.0.1"
    except ValueError:
        host = host or "127.0.0.1"
    netloc = f"[{host}]:{status.port}" if ":" in host else f"{host}:{status.port}"
    scheme = "http" if status.tls_files is None else "https"
    return GatewayClient(f"{scheme}://{netloc}", timeout_s=timeout_s, verify=False)
