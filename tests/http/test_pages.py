from __future__ import annotations

import re
from html.parser import HTMLParser

import httpx
import pytest

from redismem.http.pages import page_headers, page_routes
from redismem.service import Service

PATHS = sorted(route.path for route in page_routes())
PAGES = ["/dashboard", "/explorer"]

#: what a script must not do with what users wrote
UNSAFE = re.compile(
    r"innerHTML|outerHTML|insertAdjacentHTML|document\.write|\beval\(|new Function|srcdoc|javascript:"
)
#: names, of a namespace and not of an address
NAMESPACES = ("http://www.w3.org/2000/svg",)


class Page(HTMLParser):
    """What a page loads, where it leads, and what CSP would refuse."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.links: list[str] = []
        self.refused: list[str] = []
        self.ids: list[str] = []
        self.named: list[str] = []
        self._is_script = False
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        for name, value in attrs:
            if name in ("src", "href") and value:
                self.links.append(value)
            if name.startswith("on") or name == "style":
                self.refused.append(f"{tag} {name}")
            if name == "id" and value:
                self.ids.append(value)
            if name in ("for", "aria-labelledby", "aria-controls") and value:
                self.named.append(value)
        self._is_script = tag in ("script", "style")

    def handle_data(self, data: str) -> None:
        if self._is_script and data.strip():
            self.refused.append(data)

    def handle_endtag(self, tag: str) -> None:
        self._is_script &= tag not in ("script", "style")


@pytest.mark.parametrize("path", PATHS)
async def test_every_file_comes_with_its_headers(http: httpx.AsyncClient, path: str) -> None:
    reply = await http.get(path)
    assert reply.status_code == 200
    kinds = {"css": "text/css", "js": "text/javascript"}
    assert (
        reply.headers["content-type"] == f"{kinds.get(path.rpartition('.')[2], 'text/html')}; charset=utf-8"
    )
    policy = reply.headers["content-security-policy"]
    assert "default-src 'none'" in policy
    assert "unsafe" not in policy
    assert reply.headers["x-content-type-options"] == "nosniff"
    assert reply.headers["x-frame-options"] == "DENY"
    assert reply.headers["referrer-policy"] == "no-referrer"
    assert reply.headers["cross-origin-opener-policy"] == "same-origin"
    assert reply.headers["cache-control"] == "no-cache"


@pytest.mark.parametrize("path", PATHS)
async def test_what_is_known_is_not_sent_again(http: httpx.AsyncClient, path: str) -> None:
    tag = (await http.get(path)).headers["etag"]
    known = await http.get(path, headers={"If-None-Match": f'"other", W/{tag}'})
    assert (known.status_code, known.content, known.headers["etag"]) == (304, b"", tag)
    assert (await http.get(path, headers={"If-None-Match": '"other"'})).status_code == 200


@pytest.mark.parametrize("path", PAGES)
async def test_a_page_loads_only_what_is_served_and_holds_nothing_inline(
    http: httpx.AsyncClient, path: str
) -> None:
    page = Page((await http.get(path)).text)
    assert page.refused == []
    assert len(page.ids) == len(set(page.ids))
    assert set(page.named) <= set(page.ids)
    for link in page.links:
        if not link.startswith(("#", "data:,")):
            assert (await http.get(link)).status_code == 200, link


@pytest.mark.parametrize("path", [path for path in PATHS if path.endswith((".js", ".css"))])
async def test_an_asset_names_no_other_host_and_makes_no_html_of_texts(
    http: httpx.AsyncClient, path: str
) -> None:
    text = (await http.get(path)).text
    for name in NAMESPACES:
        text = text.replace(name, "")
    assert "//" not in re.sub(r"^\s*//.*$|; // .*$|{ // .*$", "", text, flags=re.MULTILINE)
    assert not UNSAFE.search(text)
    for name in re.findall(r'from "([^"]+)"', text):
        assert name in PATHS


async def test_pages_need_no_key(http: httpx.AsyncClient, service: Service) -> None:
    await service.keyring.create(name="any", scopes=("admin",))
    assert (await http.get("/v1/dashboard")).status_code == 401
    for path in PATHS:
        assert (await http.get(path)).status_code == 200


@pytest.mark.parametrize(
    "path", ["/assets/", "/assets/none.js", "/assets/dashboard.html", "/assets/..%2Fpages.py", "/dashboard/"]
)
async def test_there_is_nothing_else(http: httpx.AsyncClient, path: str) -> None:
    assert (await http.get(path)).status_code == 404


async def test_a_page_is_only_read(http: httpx.AsyncClient) -> None:
    assert (await http.post("/dashboard")).status_code == 405


def test_a_page_with_styles_of_its_own_may_say_so() -> None:
    policy = page_headers(style="'unsafe-inline'", script="'none'")["Content-Security-Policy"].split("; ")
    assert "style-src 'unsafe-inline'" in policy
    assert "script-src 'none'" in policy
