"""The service's HTTP interface as the commands call it."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any
from urllib.parse import quote, urlsplit

if TYPE_CHECKING:
    import httpx

    from matcher_service.errors import MatcherError

TIMEOUT_S = 60.0
PAGE = 1000


class HttpApi:
    """JSON in, JSON out; a problem document is raised as the error of its cause. Raises Unreachable without a
    connection, InvalidInput for a clear connection beyond loopback."""

    def __init__(self, url: str, token: str, ca_file: Path | None = None) -> None:
        import ssl

        import httpx

        from matcher_service.errors import InvalidInput
        from matcher_service.settings import is_loopback

        parts = urlsplit(url)
        if parts.scheme not in ("http", "https") or not parts.hostname:
            raise InvalidInput(f"{url!r} is not a URL", field="http", hint="write http://127.0.0.1:8080")
        if parts.scheme == "http" and not is_loopback(parts.hostname):
            raise InvalidInput(
                f"{url} is neither loopback nor https: the token would travel in clear", field="http", hint="use https"
            )
        self.url = url
        try:
            verify = ssl.create_default_context(cafile=str(ca_file)) if ca_file else True
        except OSError as error:
            raise InvalidInput(
                f"cannot use {ca_file}: {error}", field="ca_file", hint="give PEM certificates"
            ) from error
        self._client = httpx.Client(
            base_url=url,
            headers={"Authorization": f"Bearer {token}"},
            verify=verify,
            timeout=TIMEOUT_S,
            trust_env=False,
        )

    def __enter__(self) -> HttpApi:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._client.close()

    def get(self, path: str, **query: str | int) -> Any:
        return self._ask("GET", path, query)

    def post(self, path: str, body: Mapping[str, Any] | None = None, **query: str) -> Any:
        return self._ask("POST", path, query, body)

    def delete(self, path: str, **query: str) -> Any:
        return self._ask("DELETE", path, query)

    def pages(self, path: str, items: str, cursor: str, limit: int, **query: str | int) -> Iterator[dict[str, Any]]:
        """At most `limit` of the `items` (0: all), page by page; `cursor` is "after" or "before"."""
        left = limit
        while True:
            size = min(PAGE, left) if limit else PAGE
            page = self.get(path, limit=size, **query)
            yield from page[items]
            left -= len(page[items])
            following = page[f"next_{cursor}"]
            if following is None or (limit and left <= 0):
                return
            query[cursor] = following

    def _ask(
        self, method: str, path: str, query: Mapping[str, str | int], body: Mapping[str, Any] | None = None
    ) -> Any:
        import httpx

        try:
            reply = self._client.request(
                method, path, params={name: value for name, value in query.items() if value != ""}, json=body
            )
        except httpx.HTTPError as error:
            from matcher_service.client import Unreachable

            raise Unreachable(
                f"{self.url}: {error}", hint="check --http, and that the service is running (`matcher serve`)"
            ) from error
        if reply.is_success:
            return reply.json()
        raise _error_of(reply)


@contextmanager
def api_to(url: str, token_file: Path | None, ca_file: Path | None) -> Iterator[HttpApi]:
    from matcher_service.commands.options import token_from

    with HttpApi(url, token_from(token_file), ca_file) as api:
        yield api


def path_of(*parts: str | int) -> str:
    """/v1/… with each part escaped."""
    return "/v1/" + "/".join(quote(str(part), safe="") for part in parts)


def _error_of(reply: httpx.Response) -> MatcherError:
    from matcher_service.client import error_for
    from matcher_service.errors import ServiceFault

    try:
        problem = reply.json()
        return error_for(
            problem["cause"],
            problem["detail"],
            problem.get("field", ""),
            problem.get("retry_after_ms"),
            problem.get("hint", ""),
        )
    except (ValueError, KeyError, TypeError, AttributeError):
        return ServiceFault(
            f"status {reply.status_code} without a problem document",
            hint="the address may not be a matcher's HTTP port",
        )
