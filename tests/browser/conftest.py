"""A real browser on a real service, started once for the run; a page that reports what went wrong in it."""

from __future__ import annotations

import asyncio
import os
import re
import shutil
import signal
import subprocess
import sys
from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from urllib.parse import urlsplit

import httpx
import pytest
from playwright.async_api import Browser, Page, Request, async_playwright, expect

from tests.conftest import until

ROOT = Path(__file__).parents[2]
BROWSERS = ("chromium", "google-chrome", "chromium-browser", "google-chrome-stable")

expect.set_options(timeout=10_000)


@dataclass
class Site:
    """A service process: where it is, a client of it, and the directory of its Redis."""

    url: str
    http: httpx.AsyncClient
    environ: dict[str, str]

    async def run(self, *command: str) -> str:
        """Run a command of redismem on the same store, as an operator does, and return what it prints."""
        done = await asyncio.to_thread(
            subprocess.run,
            [sys.executable, "-m", "redismem", *command],
            env=self.environ,
            capture_output=True,
            text=True,
            check=False,
            timeout=60,
        )
        assert done.returncode == 0, done.stdout + done.stderr
        return done.stdout

    async def add(self, user: str, *memories: Mapping[str, object]) -> list[str]:
        """Store memories, and return their ids."""
        reply = await self.http.post(f"/v1/users/{user}/memories", json={"memories": memories})
        assert reply.status_code == 201, reply.text
        return [item["id"] for item in reply.json()["memories"]]


@asynccontextmanager
async def serving(directory: Path) -> AsyncIterator[Site]:
    """Run `redismem serve` on a free port with a Redis of its own."""
    environ = {name: value for name, value in os.environ.items() if not name.startswith("REDISMEM_")}
    environ |= {"REDISMEM_DATA_DIR": str(directory / "data"), "REDISMEM_TESTING": "1"}
    environ |= {"REDISMEM_EMBEDDER": "deterministic", "PYTHONPATH": str(ROOT), "PYTHONUNBUFFERED": "1"}
    log = directory / "service.log"
    with log.open("w") as output:
        process = subprocess.Popen(
            [sys.executable, "-m", "redismem", "serve", "--port", "0"],
            env=environ,
            stdout=output,
            stderr=subprocess.STDOUT,
        )

    async def address() -> str | None:
        assert process.poll() is None, log.read_text()
        found = re.search(r"http://127\.0\.0\.1:[1-9]\d*", log.read_text())
        return found[0] if found else None

    try:
        await until("the service tells its address", address, 60)
        url = str(await address())
        async with httpx.AsyncClient(base_url=url, timeout=20) as http:

            async def ready() -> bool:
                with suppress(httpx.TransportError):
                    return (await http.get("/health/ready")).status_code == 200
                return False

            await until("the service is ready", ready, 60)
            yield Site(url, http, environ)
    finally:
        process.send_signal(signal.SIGTERM)
        await asyncio.to_thread(process.wait, 30)


@pytest.fixture(scope="session")
async def browser() -> AsyncIterator[Browser]:
    """The installed browser; without one the tests are skipped, or fail where tools are demanded."""
    program = next(filter(None, map(shutil.which, BROWSERS)), None)
    if program is None:
        missing = f"none of {', '.join(BROWSERS)} is installed"
        if os.environ.get("REDISMEM_NEEDS_TOOLS") == "1":
            pytest.fail(missing)
        pytest.skip(missing)
    async with async_playwright() as playwright:
        # its sandbox needs privileges that containers rarely give
        opened = await playwright.chromium.launch(executable_path=program, args=["--no-sandbox"])
        yield opened
        await opened.close()


@pytest.fixture(scope="session")
async def site(tmp_path_factory: pytest.TempPathFactory, browser: Browser) -> AsyncIterator[Site]:
    """One service for the whole run; each test has users of its own."""
    async with serving(tmp_path_factory.mktemp("site")) as running:
        yield running


@pytest.fixture
async def fresh(tmp_path: Path, browser: Browser) -> AsyncIterator[Site]:
    """A service that nobody asked anything yet; name it before `page`, which asks as long as it is open."""
    async with serving(tmp_path) as running:
        yield running


@dataclass
class Watch:
    """What the browser reported; `expected` are parts of messages that a test provokes."""

    hosts: set[str] = field(default_factory=set)
    problems: list[str] = field(default_factory=list)
    expected: list[str] = field(default_factory=list)

    def follow(self, page: Page) -> None:
        page.on("request", self._requested)
        page.on("pageerror", lambda error: self.problems.append(f"error: {error}"))
        page.on("console", lambda message: self.problems.append(f"{message.type}: {message.text}"))

    def _requested(self, request: Request) -> None:
        if not request.url.startswith("data:"):
            self.hosts.add(urlsplit(request.url).netloc)


@pytest.fixture
async def watch() -> Watch:
    return Watch()


@pytest.fixture
async def page(browser: Browser, watch: Watch) -> AsyncIterator[Page]:
    """A page; afterwards nothing may stand in its console, CSP included, and one host was asked at most."""
    context = await browser.new_context(viewport={"width": 1280, "height": 900})
    opened = await context.new_page()
    watch.follow(opened)
    yield opened
    await context.close()
    assert len(watch.hosts) <= 1
    assert [one for one in watch.problems if not any(part in one for part in watch.expected)] == []


#: texts whose contrast to what they stand on is below 4.5, as "ratio: text"
LOW_CONTRAST = """() => {
  const parse = (color) => {
    const [r, g, b, a = 1] = color.match(/[\\d.]+/g).map(Number);
    return { r, g, b, a };
  };
  const over = (top, below) => ({ ...Object.fromEntries(["r", "g", "b"].map((one) =>
    [one, top[one] * top.a + below[one] * (1 - top.a)])), a: 1 });
  const luminance = ({ r, g, b }) => {
    const [x, y, z] = [r, g, b].map((one) => one / 255).map((one) =>
      one <= 0.04045 ? one / 12.92 : ((one + 0.055) / 1.055) ** 2.4);
    return 0.2126 * x + 0.7152 * y + 0.0722 * z;
  };
  const behind = (element) => {
    const layers = [];
    for (let at = element; at; at = at.parentElement) {
      layers.push(parse(getComputedStyle(at).backgroundColor));
    }
    const solid = layers.findIndex((one) => one.a === 1);
    return layers.slice(0, solid === -1 ? undefined : solid + 1).reverse()
      .reduce((below, top) => over(top, below), { r: 255, g: 255, b: 255, a: 1 });
  };
  const walker = document.createTreeWalker(document.body, NodeFilter.SHOW_TEXT);
  const found = [];
  let seen = 0;
  while (walker.nextNode()) {
    const element = walker.currentNode.parentElement;
    if (!walker.currentNode.data.trim() || !element.checkVisibility({ visibilityProperty: true })) continue;
    if (element.closest("noscript, script, style, .quiet, option")) continue;
    const style = getComputedStyle(element);
    const ink = element.namespaceURI.endsWith("svg") ? style.fill : style.color;
    const ground = behind(element), color = over(parse(ink), ground);
    const [light, dark] = [luminance(color), luminance(ground)].sort((a, b) => b - a);
    const ratio = (light + 0.05) / (dark + 0.05);
    seen++;
    if (ratio < 4.5) found.push(`${ratio.toFixed(2)}: ${walker.currentNode.data.trim().slice(0, 40)}`);
  }
  return { seen, found };
}"""

#: how the focused element is to be told from others, whether its focus can be seen, whether it is in a dialog
FOCUSED = """() => {
  const at = document.activeElement, all = [...document.querySelectorAll("*")];
  const style = getComputedStyle(at);
  return { place: all.indexOf(at), name: at.outerHTML.slice(0, 80), isBody: at === document.body,
    isSeen: style.outlineStyle !== "none" && parseFloat(style.outlineWidth) > 0,
    inDialog: at.closest("dialog") !== null };
}"""

FOCUSABLE = """() => {
  const all = [...document.querySelectorAll("*")];
  const wanted = "a[href], button:not([disabled]), input, select, textarea, summary, [tabindex='0']";
  return [...document.querySelectorAll(wanted)]
    .filter((one) => one.checkVisibility({ visibilityProperty: true }) && one.tabIndex >= 0)
    .map((one) => [all.indexOf(one), one.outerHTML.slice(0, 80)]);
}"""


async def check_contrast(page: Page, least_texts: int) -> None:
    """Check every text that is seen, and that there are so many: an empty page has no contrast."""
    result = await page.evaluate(LOW_CONTRAST)
    assert result["found"] == []
    assert result["seen"] >= least_texts


async def check_fits(page: Page) -> None:
    """Check that nobody has to scroll sideways."""
    wide, seen = await page.evaluate("() => [document.documentElement.scrollWidth, innerWidth]")
    assert wide <= seen


async def check_keyboard(page: Page) -> None:
    """Check that Tab comes to everything that can be operated, and that one sees where it is."""
    await page.evaluate("() => document.activeElement.blur()")
    wanted = dict(await page.evaluate(FOCUSABLE))
    reached: set[int] = set()
    for _ in range(4 * len(wanted) + 20):  # a field for a date has several stops
        await page.keyboard.press("Tab")
        focused = await page.evaluate(FOCUSED)
        if not focused["isBody"]:
            assert focused["isSeen"], focused["name"]
            reached.add(focused["place"])
        if reached >= wanted.keys():
            return
    assert [name for place, name in wanted.items() if place not in reached] == []
