"""The source of the page at /: its policy, and what it does not hold."""

from __future__ import annotations

import httpx2
import trio

from penstock import create_app


async def test_the_page_holds_no_names_and_loads_nothing_from_elsewhere() -> None:
    app = create_app({"<script>alert(1)</script>": trio.sleep})
    transport = httpx2.ASGITransport(app)
    async with httpx2.AsyncClient(transport=transport, base_url="http://test") as client:
        pages = [await client.get("/") for _ in range(2)]
    for page in pages:
        policy = page.headers["content-security-policy"]
        nonce = policy.partition("script-src 'nonce-")[2].partition("'")[0]
        assert page.headers["content-type"] == "text/html; charset=utf-8"
        assert policy.startswith("default-src 'none'; ")
        assert page.text.count(f'nonce="{nonce}"') == 2
        assert page.text.count("<script") == page.text.count("<style") == 1
        assert "alert(1)" not in page.text
        assert "{{" not in page.text
        assert "//" not in page.text.partition("<script")[0]
    assert pages[0].headers["content-security-policy"] != pages[1].headers["content-security-policy"]
