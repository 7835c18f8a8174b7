"""The page at `/`: start runs, follow, cut, resume and cancel them from a browser.

One file, `index.html`, which loads nothing from anywhere. Its Content-Security-Policy allows this page's own script and
style, by a nonce that is new for each answer, and requests to this server; nothing else runs or is loaded.
"""

from __future__ import annotations

import secrets
from importlib.resources import files
from typing import TYPE_CHECKING, Final

from starlette.responses import HTMLResponse

if TYPE_CHECKING:
    from collections.abc import Mapping

_PAGE: Final = (files("penstock.http") / "index.html").read_text(encoding="utf-8")


def page(status: int = 200, headers: Mapping[str, str] | None = None) -> HTMLResponse:
    """The page. It asks for a token if what it asks for is answered 401, so it is the same for everybody."""
    nonce = secrets.token_urlsafe(16)
    policy = (
        f"default-src 'none'; script-src 'nonce-{nonce}'; style-src 'nonce-{nonce}'; connect-src 'self'; "
        "img-src data:; base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
    )
    return HTMLResponse(
        _PAGE.replace("{{nonce}}", nonce),
        status,
        headers={
            **(headers or {}),
            "Content-Security-Policy": policy,
            "Cache-Control": "no-store",
            "Referrer-Policy": "no-referrer",
            "X-Content-Type-Options": "nosniff",
        },
    )
