from __future__ import annotations

import re
from collections.abc import Mapping
from urllib.parse import quote

import pytest
from playwright.async_api import Locator, Page, expect

from tests.browser.conftest import FOCUSED, Site, Watch, check_contrast, check_fits, check_keyboard

EVIL = (
    '<img src=x onerror="window.hacked=1"> & <script>window.hacked=1</script>'
    " \u202eodd\u202c \"'` ünï {{x}} 🦊"
)
TRAINS = {"text": "Ada prefers trains to planes.", "topics": ["travel"], "entities": ["Ada"]}
PLACES = "first second northern southern oldest newest orchard".split()
NUTS = {"text": "Ada is allergic to hazelnuts.", "topics": ["health"], "event_date": "2026-03-01T10:00:00Z"}


async def opened(page: Page, site: Site, user: str, tab: str) -> Locator:
    """Show a tab of a user, and return its panel."""
    await page.goto(f"{site.url}/explorer#user={quote(user, safe='')}&tab={tab}")
    panel = page.locator(f"#panel-{tab}")
    await expect(panel).to_be_visible()
    return panel


async def search(panel: Locator, text: str) -> Locator:
    """Search for a text and return what is found."""
    field = panel.get_by_label("Look for")
    await field.fill(text)
    await field.press("Enter")
    found = panel.locator(".memory")
    await expect(found.first).to_be_visible()
    return found


async def texts(site: Site, user: str, query: str = "") -> list[str]:
    reply = await site.http.get(f"/v1/users/{user}/memories?{query}")
    return [memory["text"] for memory in reply.json()["memories"]]


async def test_a_user_is_found_and_picked(page: Page, site: Site) -> None:
    for number in range(60):
        await site.add(f"crowd-{number:02}", {"text": "one"})
    await site.add("crowd-00", {"text": "two"})
    await page.goto(site.url + "/explorer")
    people = page.locator("#people button")
    contains = page.get_by_label("Part of a user id")
    await contains.fill("CROWD")
    await expect(page.locator("#people-note")).to_have_text("50 so far")
    more = page.get_by_role("button", name="More users")
    await expect(more).to_be_visible()
    # more of what is shown is of what was typed before
    hides_more = """field => {
        field.dispatchEvent(new Event("input"));
        return document.getElementById("people-more").hidden;
    }"""
    assert await contains.evaluate(hides_more)
    await more.click()
    await expect(people).to_have_count(60)
    await expect(people.nth(50)).to_be_focused()
    await contains.fill("crowd-00")
    await expect(people).to_have_count(1)
    await expect(people).to_contain_text("2 memories")
    await people.click()
    await expect(page.get_by_role("heading", name="crowd-00")).to_be_focused()
    await expect(people).to_have_attribute("aria-current", "true")
    await expect(page).to_have_title("crowd-00 – redismem explorer")
    await contains.fill("nobody is called this")
    await expect(page.locator("#people-note")).to_contain_text("No user id contains this")


async def test_a_search_finds_and_explains(page: Page, site: Site) -> None:
    await site.add("seeker", TRAINS, NUTS)
    panel = await opened(page, site, "seeker", "search")
    found = await search(panel, "hazelnuts")
    await expect(found.first.locator(".text")).to_have_text(str(NUTS["text"]))
    await expect(found.first.locator("dl")).to_have_count(0)
    await panel.get_by_label("Explain").check()
    await panel.get_by_role("button", name="Search").click()
    await expect(found.first.locator("dl")).to_contain_text("similarity")
    await expect(found.first.locator("dl")).to_contain_text("relevance")
    note = panel.locator("p[role=status]")
    await expect(note).to_contain_text("served by l")
    await expect(note).to_contain_text("plan flat")
    await expect(note).to_contain_text("embed")


@pytest.mark.parametrize(
    ("label", "value", "left"),
    [
        ("Topics, any of", "travel, other", [TRAINS]),
        ("Entities, any of", "Ada", [TRAINS]),
        ("Happened from", "2026-02-01", [NUTS]),
        ("Happened before", "2026-02-01", []),
        ("Limit", "1", [NUTS]),
        ("Type", "episodic", []),
    ],
)
async def test_filters_and_options_are_sent(
    page: Page, site: Site, label: str, value: str, left: list[Mapping[str, object]]
) -> None:
    user = re.sub(r"\W", "", f"filter{label}{value}")
    await site.add(user, TRAINS, NUTS)
    panel = await opened(page, site, user, "search")
    found = await search(panel, "Ada hazelnuts")
    await expect(found).to_have_count(2)
    await panel.get_by_text("Filters and options").click()
    await panel.get_by_label(label, exact=True).fill(value)
    await panel.get_by_role("button", name="Search").click()
    await expect(found).to_have_count(len(left))
    assert await found.locator(".text").all_inner_texts() == [one["text"] for one in left]


async def test_an_error_is_shown_at_its_field(page: Page, site: Site, watch: Watch) -> None:
    watch.expected = ["422 (Unprocessable"]
    await site.add("wrong", TRAINS)
    panel = await opened(page, site, "wrong", "search")
    await search(panel, "trains")
    await panel.get_by_text("Filters and options").click()
    limit = panel.get_by_label("Limit")
    await limit.fill("0")
    await panel.get_by_text("Filters and options").click()
    await panel.get_by_role("button", name="Search").click()
    await expect(page.get_by_role("alert")).to_contain_text("(field limit)")
    await expect(limit).to_be_focused()
    await expect(limit).to_have_attribute("aria-invalid", "true")
    await limit.fill("1")
    await panel.get_by_role("button", name="Search").click()
    await expect(page.locator("#error")).to_be_hidden()
    await expect(panel.locator("[aria-invalid]")).to_have_count(0)


async def test_a_memory_is_pinned_and_unpinned(page: Page, site: Site) -> None:
    await site.add("pinner", TRAINS, NUTS)
    panel = await opened(page, site, "pinner", "search")
    found = await search(panel, "trains")
    await found.first.get_by_role("button", name="Pin").click()
    await expect(page.locator("#status")).to_have_text("The memory is pinned.")
    await expect(found.first.get_by_role("button", name="Unpin")).to_be_focused()
    assert await texts(site, "pinner", "pinned=true") == [TRAINS["text"]]
    await page.keyboard.press("Enter")
    await expect(page.locator("#status")).to_contain_text("not pinned any more")
    assert await texts(site, "pinner", "pinned=true") == []


async def test_what_changed_meanwhile_is_not_overwritten(page: Page, site: Site, watch: Watch) -> None:
    watch.expected = ["412 (Precondition"]
    (memory_id,) = await site.add("racer", TRAINS)
    panel = await opened(page, site, "racer", "memories")
    await expect(panel.locator(".memory")).to_have_count(1)
    path = f"/v1/users/racer/memories/{memory_id}"
    assert (await site.http.patch(path, json={"text": "Ada prefers boats."})).status_code == 200
    await panel.get_by_role("button", name="Pin").click()
    await expect(page.get_by_role("alert")).not_to_be_empty()
    assert (await site.http.get(path)).json()["pinned"] is False
    await expect(panel.locator(".text")).to_have_text("Ada prefers boats.")


async def test_a_memory_is_corrected(page: Page, site: Site) -> None:
    await site.add("fixer", TRAINS)
    panel = await opened(page, site, "fixer", "memories")
    await panel.get_by_role("button", name="Correct").click()
    dialog = page.get_by_role("dialog", name="Correct this memory")
    field = dialog.get_by_label("What is true")
    await expect(field).to_be_focused()
    await expect(field).to_have_value(str(TRAINS["text"]))
    await field.fill("Ada prefers boats to trains.")
    await dialog.get_by_role("button", name="Correct").click()
    await expect(page.locator("#status")).to_contain_text("corrected")
    await expect(panel.locator(".text")).to_have_text("Ada prefers boats to trains.")
    await expect(panel.locator(".tag").first).to_have_text("travel")
    assert await texts(site, "fixer") == ["Ada prefers boats to trains."]
    assert await texts(site, "fixer", "superseded=only") == [TRAINS["text"]]
    await panel.get_by_label("Show").select_option("all")
    await expect(panel.locator(".memory.old .tag.gone")).to_contain_text("superseded by")


async def test_a_delete_asks_first_and_cancel_does_nothing(page: Page, site: Site) -> None:
    await site.add("eraser", TRAINS, NUTS)
    panel = await opened(page, site, "eraser", "memories")
    await expect(panel.locator(".memory")).to_have_count(2)
    memory = panel.locator(".memory", has_text="trains")
    delete = memory.get_by_role("button", name="Delete")
    dialog = page.get_by_role("dialog", name="Delete this memory?")
    for leave in ("Enter", "Escape"):  # Cancel has the focus
        await delete.click()
        await expect(dialog).to_contain_text(str(TRAINS["text"]))
        await expect(dialog.get_by_role("button", name="Cancel")).to_be_focused()
        await page.keyboard.press(leave)
        await expect(dialog).to_have_count(0)
        await expect(delete).to_be_focused()
    assert len(await texts(site, "eraser")) == 2
    await delete.click()
    await dialog.get_by_role("button", name="Delete").click()
    await expect(page.locator("#status")).to_have_text("The memory is deleted.")
    await expect(panel.locator(".memory")).to_have_count(1)
    await expect(panel.locator(".memory")).to_be_focused()
    assert await texts(site, "eraser") == [NUTS["text"]]


async def test_a_history_is_told(page: Page, site: Site) -> None:
    (memory_id,) = await site.add("past", TRAINS)
    await site.http.patch(f"/v1/users/past/memories/{memory_id}", json={"pinned": True})
    panel = await opened(page, site, "past", "memories")
    await panel.get_by_role("button", name="History").click()
    events = page.get_by_role("dialog", name="History").get_by_role("listitem")
    await expect(events).to_have_count(2)
    await expect(events.first).to_contain_text("created")
    await page.keyboard.press("Escape")
    await expect(panel.get_by_role("button", name="History")).to_be_focused()


async def test_what_users_write_stays_text(page: Page, site: Site) -> None:
    user = "a/b% <img src=x onerror=window.hacked=1>"
    await site.add(quote(user, safe=""), {"text": EVIL, "topics": [EVIL[:100]], "entities": ["<b>Ada</b>"]})
    await page.goto(site.url + "/explorer")
    await page.get_by_label("Part of a user id").fill("<IMG")
    await expect(page.locator("#people button")).to_have_count(1)
    await page.locator("#people button").click()
    await expect(page.locator("#user-title")).to_have_text(user)
    found = await search(page.locator("#panel-search"), EVIL)
    assert await found.locator(".text").text_content() == EVIL
    await found.get_by_role("button", name="Delete").click()
    assert await page.locator("dialog .quote").text_content() == EVIL
    await page.keyboard.press("Escape")
    for tab in ("Memories", "Topics", "Profile", "Summaries", "Context"):
        await page.get_by_role("tab", name=tab).click()
        await expect(page.get_by_role("tabpanel", name=tab)).to_be_visible()
    await page.locator("#panel-context").get_by_label("What the user says").fill(EVIL)
    await page.keyboard.press("Enter")
    await expect(page.locator("#panel-context .sheet")).to_contain_text("onerror")
    assert await page.locator("img, main script, main b > b").count() == 0
    assert await page.evaluate("() => window.hacked") is None


async def test_topics_show_their_memories(page: Page, site: Site) -> None:
    bees = [{"text": f"The {place} beehive gave honey; bees like clover."} for place in PLACES]
    boats = [{"text": f"The sailing boat leaves the {place} harbour at dawn."} for place in PLACES]
    await site.add("sorter", *bees, *boats, NUTS)
    await site.run("topics", "sorter", "--fresh")
    panel = await opened(page, site, "sorter", "topics")
    topics = panel.locator(".topics button")
    await expect(topics).to_have_count(3)
    await topics.filter(has_text="bees").click()
    await expect(panel.get_by_role("heading", name="Memories in")).to_be_focused()
    await expect(panel.locator(".memory")).to_have_count(len(bees))
    await expect(panel.locator(".memory", has_not_text="honey")).to_have_count(0)
    await panel.get_by_role("button", name="In no topic").click()
    await expect(panel.locator(".memory")).to_have_count(1)
    await expect(panel.locator(".memory .text")).to_have_text(str(NUTS["text"]))
    await expect(panel.locator("[aria-pressed=true]")).to_contain_text("In no topic")


async def test_who_has_no_topics_is_told_so(page: Page, site: Site) -> None:
    await site.add("new", TRAINS)
    panel = await opened(page, site, "new", "topics")
    await expect(panel).to_contain_text("No topics yet")
    await expect(panel.get_by_role("button")).to_have_count(0)


async def test_a_summary_that_is_being_made_is_waited_for(page: Page, site: Site) -> None:
    await site.add("teller", TRAINS, {**NUTS, "entities": ["Ada"]})
    panel = await opened(page, site, "teller", "summaries")
    await panel.get_by_label("Summary of").select_option("entity")
    await panel.get_by_label("Name").fill("Ada")
    await page.keyboard.press("Enter")
    await expect(panel.locator(".sheet")).to_contain_text("trains", timeout=30_000)
    await expect(panel).to_contain_text("2 sources")


async def test_the_profile_is_shown_when_it_is_compiled(page: Page, site: Site) -> None:
    await site.add("known", TRAINS, {**NUTS, "pinned": True})
    panel = await opened(page, site, "known", "profile")

    async def compiled() -> bool:
        await page.reload()
        await expect(panel.locator("p").first).to_contain_text("compiled")
        return "not compiled yet" not in await panel.inner_text()

    for _ in range(30):
        if await compiled():
            break
    await expect(panel.locator("p").first).to_contain_text(re.compile(r"^compiled \d"))
    await expect(panel.locator(".memory", has_text="hazelnuts")).to_be_visible()


async def test_the_address_keeps_user_and_tab(page: Page, site: Site) -> None:
    await site.add("keeper", TRAINS)
    await opened(page, site, "keeper", "search")
    await page.get_by_role("tab", name="Memories").click()
    await expect(page).to_have_url(re.compile(r"#user=keeper&tab=memories$"))
    await page.reload()
    await expect(page.locator("#panel-memories .memory")).to_have_count(1)
    await page.go_back()
    await expect(page.locator("#panel-search")).to_be_visible()
    await expect(page.locator("#panel-memories")).to_be_hidden()


async def test_arrow_keys_move_between_tabs(page: Page, site: Site) -> None:
    await site.add("arrows", TRAINS)
    await opened(page, site, "arrows", "search")
    await page.get_by_role("tab", name="Search").focus()
    for key, tab in (
        ("ArrowRight", "Memories"),
        ("End", "Context"),
        ("ArrowRight", "Search"),
        ("ArrowLeft", "Context"),
        ("Home", "Search"),
    ):
        await page.keyboard.press(key)
        await expect(page.get_by_role("tab", name=tab)).to_be_focused()
        await expect(page.get_by_role("tab", name=tab)).to_have_attribute("aria-selected", "true")
        await expect(page.get_by_role("tabpanel")).to_have_count(1)
    assert await page.locator("[role=tab][tabindex='0']").count() == 1


async def test_the_keyboard_reaches_everything_and_dialogs_keep_it(page: Page, site: Site) -> None:
    await site.add("typist", TRAINS)
    panel = await opened(page, site, "typist", "search")
    await search(panel, "trains")
    await page.get_by_label("Part of a user id").fill("typist")
    await expect(page.locator("#people button")).to_have_count(1)
    await panel.get_by_text("Filters and options").click()
    await check_keyboard(page)
    await panel.get_by_role("button", name="Correct").focus()
    await page.keyboard.press("Enter")
    await expect(page.get_by_role("dialog")).to_be_visible()
    seen = set()
    for _ in range(12):
        await page.keyboard.press("Tab")
        focused = await page.evaluate(FOCUSED)
        assert focused["inDialog"] or focused["isBody"], focused["name"]
        seen.add(focused["name"])
    assert len(seen) >= 3
    await page.keyboard.press("Escape")
    await expect(panel.get_by_role("button", name="Correct")).to_be_focused()


@pytest.mark.parametrize("scheme", ["light", "dark"])
async def test_texts_have_contrast(page: Page, site: Site, scheme: str) -> None:
    user = f"contrast-{scheme}"
    (old, _) = await site.add(user, TRAINS, {**NUTS, "pinned": True})
    correction = {"ids": [old], "memory": {"text": "Ada prefers boats."}}
    assert (await site.http.post(f"/v1/users/{user}/corrections", json=correction)).status_code == 201
    await page.emulate_media(color_scheme=scheme)  # type: ignore[arg-type]
    panel = await opened(page, site, user, "search")
    await panel.get_by_label("Explain").check()
    await panel.get_by_text("Filters and options").click()
    await panel.get_by_label("Superseded").select_option("included")
    found = await search(panel, "Ada")
    await expect(found).to_have_count(3)
    await check_contrast(page, 80)
    await found.first.get_by_role("button", name="Pin").first.click()
    await expect(page.locator("#status")).to_be_visible()
    await found.first.get_by_role("button", name="Delete").click()
    await check_contrast(page, 80)


async def test_a_phone_shows_it_without_scrolling_sideways(page: Page, site: Site) -> None:
    await site.add(
        "phone",
        TRAINS,
        {"text": "x" * 3_000, "topics": ["t" * 200], "entities": ["e" * 200], "id": "i" * 200},
    )
    await page.set_viewport_size({"width": 360, "height": 740})
    panel = await opened(page, site, "phone", "search")
    await panel.get_by_label("Explain").check()
    await panel.get_by_text("Filters and options").click()
    await search(panel, "trains")
    await check_fits(page)
    for tab in ("Memories", "Topics", "Profile", "Summaries", "Context"):
        await page.get_by_role("tab", name=tab).click()
        await expect(page.get_by_role("tabpanel", name=tab)).to_be_visible()
        await check_fits(page)
    await page.get_by_role("tab", name="Memories").click()
    await page.get_by_role("button", name="Delete").first.click()
    await check_fits(page)
