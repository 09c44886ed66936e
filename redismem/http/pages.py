"""The only place that serves pages for people, the documentation apart, and says what a page may load.

The pages are shells without data: their scripts ask /v1 like any other client, with the key that the
reader gave. What they are made of is read once, when the application is made.
"""

from __future__ import annotations

import hashlib
from collections.abc import Awaitable, Callable
from pathlib import Path

from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route

_ASSETS = Path(__file__).with_name("assets")

#: page -> its file
_PAGES = {"/dashboard": "dashboard.html", "/explorer": "explorer.html"}

_MEDIA_TYPES = {".html": "text/html", ".css": "text/css", ".js": "text/javascript"}


def page_headers(*, style: str = "'self'", script: str = "'self'") -> dict[str, str]:
    """Return the security headers of a page: it loads nothing from elsewhere and stands in no frame.

    Beside `X-Content-Type-Options`, which every reply has.

    Args:
        style, script: sources that the page's styles and scripts may come from, in the words of CSP.
    """
    policy = (
        "default-src 'none'",
        f"script-src {script}",
        f"style-src {style}",
        "img-src 'self' data:",
        "connect-src 'self'",
        "base-uri 'none'",
        "form-action 'none'",
        "frame-ancestors 'none'",
    )
    return {
        "Content-Security-Policy": "; ".join(policy),
        "X-Frame-Options": "DENY",
        "Referrer-Policy": "no-referrer",
        "Cross-Origin-Opener-Policy": "same-origin",
    }


def page_routes() -> list[Route]:
    """Return the routes of the pages and of what they load."""
    files = {f"/assets/{file.name}": file for file in sorted(_ASSETS.iterdir()) if file.suffix != ".html"}
    files |= {path: _ASSETS / name for path, name in _PAGES.items()}
    return [Route(path, _served(file)) for path, file in files.items()]


def _served(file: Path) -> Callable[[Request], Awaitable[Response]]:
    content = file.read_bytes()
    tag = f'"{hashlib.sha256(content).hexdigest()[:32]}"'
    # asked for again each time: an upgrade must not meet the scripts of the old version
    headers = {**page_headers(), "Cache-Control": "no-cache", "ETag": tag}
    media_type = _MEDIA_TYPES[file.suffix]

    async def serve(request: Request) -> Response:
        known = {
            name.strip().removeprefix("W/") for name in request.headers.get("if-none-match", "").split(",")
        }
        if tag in known or "*" in known:
            return Response(status_code=304, headers=headers)
        return Response(content, headers=headers, media_type=media_type)

    return serve
