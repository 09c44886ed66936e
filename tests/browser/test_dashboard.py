from __future__ import annotations

import re

import pytest
from playwright.async_api import Page, expect

from tests.browser.conftest import Site, Watch, check_contrast, check_fits, check_keyboard


async def ask(site: Site, user: str, times: int = 20) -> None:
    """Let a user be asked for so often."""
    for number in range(times):
        reply = await site.http.post(f"/v1/users/{user}/search", json={"text": f"question {number}"})
        assert reply.status_code == 200, reply.text


async def opened(page: Page, site: Site) -> Page:
    await page.goto(site.url + "/dashboard")
    await expect(page.locator("#objectives li")).to_have_count(10)
    return page


async def test_numbers_and_lights_change_by_themselves(fresh: Site, page: Page) -> None:
    await opened(page, fresh)
    objective = page.locator("#objectives li", has_text="Retrieval P95")
    searches = page.locator("#operations tbody tr", has_text="search")
    await expect(objective).to_contain_text("no data")
    await expect(searches).to_have_count(0)
    await expect(page.locator("#news")).to_be_empty()

    await fresh.add("ada", {"text": "Ada likes trains."})
    await ask(fresh, "ada")
    await expect(searches.locator("td").first).to_have_text("20", timeout=30_000)
    await expect(objective).not_to_contain_text("no data")
    light = await objective.locator(".light").inner_text()
    await expect(page.locator("#news")).to_contain_text(f"Retrieval P95: {light}")
    await expect(page.locator("#figures")).to_contain_text("hour 20")
    await expect(page.locator("#verdict")).to_contain_text("missed" if light == "missed" else "objectives")
    await page.get_by_text("The last hour as a table").click()
    await expect(page.locator("#minutes tbody tr")).to_have_count(60)
    await expect(page.locator("#chart svg[role=img]")).to_have_attribute(
        "aria-label", re.compile("Latency of the last 60 minutes. At .* P95 .* milliseconds")
    )


async def test_every_part_shows_what_the_service_says(page: Page, site: Site) -> None:
    await site.add("parts", {"text": "Ada likes trains."})
    await ask(site, "parts", 3)
    await opened(page, site)
    told = (await site.http.get("/v1/dashboard")).json()
    await expect(page.locator("#service")).to_contain_text(told["process"])
    await expect(page.locator("#redis")).to_contain_text(told["redis"]["version"])
    await expect(page.locator("#tiers tbody tr")).to_have_count(len(told["cache"]["tiers"]))
    await expect(page.locator("#worker dt")).to_have_count(6)
    await expect(page.locator("#load")).to_contain_text(f"of {told['load']['limit']}")
    lights = await page.locator("#objectives .light").all_inner_texts()
    assert len(lights) == len(told["slo"])
    assert set(lights) <= {"met", "missed", "no data"}


async def test_it_says_since_when_nobody_answers_and_recovers(page: Page, site: Site, watch: Watch) -> None:
    watch.expected = ["ERR_INTERNET_DISCONNECTED"]
    await opened(page, site)
    await page.context.set_offline(True)
    await expect(page.locator("#away")).to_contain_text("No answer since")
    await expect(page.locator("#objectives li")).to_have_count(10)
    await page.context.set_offline(False)
    await expect(page.locator("#away")).to_be_hidden()
    await expect(page.locator("#state")).to_contain_text("Live")


async def test_a_hidden_page_does_not_ask(page: Page, site: Site) -> None:
    asked: list[str] = []
    await opened(page, site)
    page.on("request", lambda request: asked.append(request.url))
    await page.evaluate(
        "() => { Object.defineProperty(document, 'hidden', { get: () => window.away, configurable: true });"
        " window.away = true; document.dispatchEvent(new Event('visibilitychange')); }"
    )
    await page.wait_for_timeout(500)  # what was under way
    asked.clear()
    await page.wait_for_timeout(2_500)  # a visible page would have asked
    assert asked == []
    await page.evaluate(
        "() => { window.away = false; document.dispatchEvent(new Event('visibilitychange')); }"
    )
    await expect(page.locator("#state")).to_contain_text("Live")
    assert asked


async def test_a_key_is_asked_for_kept_in_the_tab_and_forgotten(
    fresh: Site, page: Page, watch: Watch
) -> None:
    watch.expected = ["401 (Unauthorized)"]
    token = await new_key(fresh)
    await page.goto(fresh.url + "/dashboard")
    field = page.get_by_label("Key", exact=True)
    await expect(field).to_be_focused()
    await expect(page.locator("#main")).to_be_hidden()
    await field.fill("rmk_wrong")
    await page.keyboard.press("Enter")
    await expect(page.locator("#key-why")).to_contain_text("does not know this key")
    await field.fill(token)
    await page.keyboard.press("Enter")
    await expect(page.locator("#objectives li")).to_have_count(10)
    await page.reload()
    await expect(page.locator("#objectives li")).to_have_count(10)
    assert await page.evaluate("() => [sessionStorage.length, localStorage.length]") == [1, 0]
    assert token not in page.url
    await page.get_by_role("button", name="Forget key").click()
    await expect(field).to_be_focused()
    assert await page.evaluate("() => sessionStorage.length") == 0


async def new_key(site: Site) -> str:
    """Create a key as an operator does, and return its token."""
    told = await site.run("keys", "create", "--name", "test", "--scope", "admin")
    token = re.search(r"rmk_[0-9a-f]{12}_[\w-]{43}", told)
    assert token is not None, told
    return token[0]


@pytest.mark.parametrize("scheme", ["light", "dark"])
async def test_texts_have_contrast(page: Page, site: Site, scheme: str) -> None:
    await page.emulate_media(color_scheme=scheme)  # type: ignore[arg-type]
    await opened(page, site)
    await page.get_by_text("The last hour as a table").click()
    await check_contrast(page, 100)
    ground = await page.evaluate("() => getComputedStyle(document.body).backgroundColor")
    assert (ground == "rgb(255, 255, 255)") == (scheme == "light")


async def test_a_phone_shows_it_without_scrolling_sideways(page: Page, site: Site) -> None:
    await page.set_viewport_size({"width": 360, "height": 740})
    await opened(page, site)
    await page.get_by_text("The last hour as a table").click()
    await check_fits(page)


async def test_the_keyboard_reaches_everything(page: Page, site: Site) -> None:
    await opened(page, site)
    await page.keyboard.press("Tab")
    await expect(page.get_by_text("Skip to the numbers")).to_be_focused()
    await check_keyboard(page)
    await page.locator("details summary").focus()
    await page.keyboard.press("Enter")
    await expect(page.locator("#minutes tbody tr").first).to_be_visible()


async def test_nothing_moves_for_who_wants_no_motion(page: Page, site: Site) -> None:
    await page.emulate_media(reduced_motion="reduce")
    await opened(page, site)
    moving = """() => [...document.querySelectorAll("*")]
        .filter((one) => getComputedStyle(one).transitionDuration !== "0s").length"""
    assert await page.evaluate(moving) == 0
    await page.emulate_media(reduced_motion="no-preference")
    assert await page.evaluate(moving) > 0
