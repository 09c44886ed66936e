"""Topics, summaries, similar memories and conflicts as an HTTP client sees them."""

from __future__ import annotations

from datetime import UTC, datetime
from typing import Any

import httpx
import pytest

from redismem.service import Service
from tests.http.conftest import Gate, add, error_of, found, of_user

GENERATION = "redismem-generation"

NUMBERS = "one two three four five six seven eight".split()
BEES = [
    {"id": f"b{i}", "text": f"The bees of hive number {word} give honey"} for i, word in enumerate(NUMBERS)
]
BOATS = [
    {"id": f"s{i}", "text": f"Sailing boat {word} needs wind and rope"} for i, word in enumerate(NUMBERS[:6])
]
ALONE = {"id": "t", "text": "Quinces ripen late"}


async def body_of(http: httpx.AsyncClient, path: str, **query: str | list[str]) -> Any:
    reply = await http.get(path, params=query)
    assert reply.status_code == 200, reply.text
    return reply.json()


async def make(service: Service, user: str, *kinds: str) -> None:
    """Do jobs as the worker does."""
    for kind in kinds:
        await service.worker.make(service.owner(user), kind)


# topics ---------------------------------------------------------------------------------------


@pytest.fixture
async def topical(http: httpx.AsyncClient, service: Service) -> list[dict[str, Any]]:
    """The topics of ada: bees, then boats; one memory is in none."""
    await add(http, "ada", *BEES, *BOATS, ALONE)
    await make(service, "ada", "topics")
    reply = await http.get(of_user("ada", "topics"))
    body = reply.json()
    assert set(body) == {"topics", "uncategorized", "generation"}
    assert reply.headers[GENERATION] == str(body["generation"])
    topics: list[dict[str, Any]] = body["topics"]
    assert [topic["size"] for topic in topics] == [len(BEES), len(BOATS)]
    assert body["uncategorized"] == 1
    return topics


async def listed(http: httpx.AsyncClient, cluster: str | list[str]) -> set[str]:
    body = await body_of(http, of_user("ada", "memories"), cluster=cluster, limit="500")
    assert body["total"] == len(body["memories"])
    return {memory["id"] for memory in body["memories"]}


async def test_a_user_without_topics_has_an_empty_list(http: httpx.AsyncClient) -> None:
    empty = {"topics": [], "uncategorized": 0, "generation": 0}
    assert await body_of(http, of_user("nobody", "topics")) == empty
    await add(http, "ada", ALONE)
    assert (await body_of(http, of_user("ada", "topics")))["uncategorized"] == 1


async def test_a_topic_is_named_by_its_words_and_filters_its_memories(
    topical: list[dict[str, Any]], http: httpx.AsyncClient
) -> None:
    bees, boats = topical
    assert set(bees) == {"id", "label", "words", "size"}
    assert bees["label"] == ", ".join(bees["words"][:3])
    assert {"bees", "honey"} <= set(bees["words"])
    assert {"wind", "rope"} <= set(boats["words"])
    of_bees, of_boats = ({memory["id"] for memory in group} for group in (BEES, BOATS))
    assert await listed(http, bees["id"]) == of_bees
    assert await listed(http, "uncategorized") == {"t"}
    assert await listed(http, [boats["id"], "uncategorized"]) == of_boats | {"t"}
    for mode in ("hybrid", "semantic", "keyword"):
        query = "wind and honey", {"search_mode": mode, "limit": 50, "filters": {"cluster": bees["id"]}}
        assert set(await found(http, "ada", query[0], **query[1])) == of_bees


@pytest.mark.parametrize("cluster", ["999", "1|2", "*", "{1}", "1}|@pinned:{0", "' \"", "-1", "名", "\\"])
async def test_a_cluster_that_is_none_has_no_memories(http: httpx.AsyncClient, cluster: str) -> None:
    await add(http, "ada", ALONE)
    assert await listed(http, cluster) == set()
    assert await found(http, "ada", "quinces", filters={"cluster": cluster}) == []


async def test_a_cluster_filter_is_a_name_or_names(http: httpx.AsyncClient) -> None:
    for value in (" ", "", "x" * 257, [], [" "], 1, {"any": ["1"]}):
        json = {"text": "a", "filters": {"cluster": value}}
        error_of(await http.post(of_user("ada", "search"), json=json), 422)
    error = error_of(await http.get(of_user("ada", "memories"), params={"cluster": " "}), 422)
    assert error["field"] == "cluster"


async def test_topics_keep_their_ids_and_lose_what_is_deleted(
    topical: list[dict[str, Any]], http: httpx.AsyncClient, service: Service
) -> None:
    for memory in (BEES[0], BOATS[0]):
        await http.delete(of_user("ada", "memories", memory["id"]))
    sizes = {topic["id"]: topic["size"] - 1 for topic in topical}
    for _ in range(2):
        body = await body_of(http, of_user("ada", "topics"))
        assert {topic["id"]: topic["size"] for topic in body["topics"]} == sizes
        assert body["uncategorized"] == 1
        await make(service, "ada", "topics")


async def test_a_topic_shows_its_summary_until_a_source_of_it_goes(
    topical: list[dict[str, Any]], http: httpx.AsyncClient, service: Service
) -> None:
    number = topical[0]["id"]
    await make(service, "ada", f"summary:topic:{number}")
    summary = await body_of(http, of_user("ada", "summaries", "topic", number))
    shown = await body_of(http, of_user("ada", "topics"))
    assert [topic.get("summary") for topic in shown["topics"]] == [summary["text"], None]
    await http.delete(of_user("ada", "memories", summary["sources"][0]))
    assert "summary" not in (await body_of(http, of_user("ada", "topics")))["topics"][0]


async def test_as_many_are_uncategorized_as_are_listed(http: httpx.AsyncClient, service: Service) -> None:
    await add(http, "ada", ALONE)
    correction = {"ids": ["t"], "memory": {"text": "Quinces ripen in October"}}
    await http.post(of_user("ada", "corrections"), json=correction)
    await make(service, "ada", "topics")
    body = await body_of(http, of_user("ada", "topics"))
    assert body["uncategorized"] == len(await listed(http, "uncategorized"))


# summaries ------------------------------------------------------------------------------------

AT = "2026-12-31T10:00:00Z"
TRIP = {"id": "p", "text": "Ana flew to Porto with a red suitcase.", "entities": ["Ana"], "event_date": AT}
PERIODS = [("day", "2026-12-31"), ("week", "2026-W53"), ("month", "2026-12")]

# as entities: what RediSearch, Redis' globs, URLs, Lua patterns and the encoding of tags take for their own
ENTITIES = [
    *("a|b", "100%", "%7C", "%25", "a*b?[c]", "{x}", "a}{b", "say \"it\" 'now'", "New  York", "東京 タワー"),
    *("a/b", "..", "a\\b", "@text:{x}", "(a) -b ~c", "a,b;c", "$v", "entity:Ana", "😀", "İ", "ana" * 80),
]


def summary_path(kind: str, name: str, user: str = "ada") -> str:
    return of_user(user, "summaries", kind, name)


async def asked_twice(http: httpx.AsyncClient, service: Service, path: str) -> Any:
    """Ask for a summary that is not there, let the worker come to it, and return what there is then."""
    queued = await http.get(path)
    assert (queued.status_code, queued.json()) == (202, {"status": "queued"}), path
    assert queued.headers["retry-after"] == "1"
    await service.worker.settle(ahead_s=60)
    return await body_of(http, path)


@pytest.mark.parametrize(("kind", "name"), [*PERIODS, ("entity", "Ana")])
async def test_a_summary_is_queued_then_there_and_gone_with_its_source(
    http: httpx.AsyncClient, service: Service, kind: str, name: str
) -> None:
    await add(http, "ada", TRIP, {"id": "q", "text": "Bo sailed.", "event_date": "2026-11-30T23:59:59Z"})
    path = summary_path(kind, name)
    summary = await asked_twice(http, service, path)
    made_at = datetime.fromisoformat(summary.pop("generated_at"))
    assert made_at.tzinfo is not None
    assert summary == {
        "kind": kind,
        "name": name,
        "text": summary["text"],
        "sources": ["p"],
        "tokens": service.embedder.count_tokens([summary["text"]])[0],
        "method": "extractive",
    }
    assert "red suitcase" in summary["text"]
    assert (await http.delete(of_user("ada", "memories", "p"))).status_code == 200
    error_of(await http.get(path), 404)


async def test_a_summary_of_a_topic_names_it_by_its_id(
    topical: list[dict[str, Any]], http: httpx.AsyncClient, service: Service
) -> None:
    number = topical[1]["id"]
    await make(service, "ada", f"summary:topic:{number}")
    summary = await body_of(http, summary_path("topic", number))
    assert (summary["kind"], summary["name"]) == ("topic", number)
    assert set(summary["sources"]) <= {memory["id"] for memory in BOATS}
    error_of(await http.get(summary_path("topic", f"0{number}")), 404)


@pytest.mark.parametrize("entity", ENTITIES)
async def test_any_entity_has_a_summary_of_its_own(
    http: httpx.AsyncClient, service: Service, entity: str
) -> None:
    await add(
        http,
        "ada",
        {"id": "p", "text": "Flew to Porto with a red suitcase.", "entities": [entity]},
        {"id": "o", "text": "Sailed to Lisbon.", "entities": [f"{entity}2", "x"]},
    )
    summary = await asked_twice(http, service, summary_path("entity", entity))
    assert (summary["name"], summary["sources"]) == (entity, ["p"])
    for other in (f"{entity}3", entity.swapcase() + "_"):
        error_of(await http.get(summary_path("entity", other)), 404)


@pytest.mark.parametrize(
    ("kind", "name"),
    [("topic", "1"), ("topic", "9" * 256), *PERIODS, ("entity", "ana"), ("day", "0001-01-01")],
)
async def test_what_no_memory_belongs_to_has_no_summary(
    http: httpx.AsyncClient, service: Service, kind: str, name: str
) -> None:
    await add(http, "ada", {"text": "Bo sailed.", "event_date": "2020-01-01T00:00:00Z", "entities": ["Ana"]})
    waiting = await queued_jobs(service)
    for user in ("ada", "nobody"):
        assert error_of(await http.get(summary_path(kind, name, user)), 404)["code"] == "not_found"
    assert await queued_jobs(service) == waiting


async def queued_jobs(service: Service) -> list[str]:
    return [raw.decode() for raw in await service.client.execute("ZRANGE", "redismem:jobs:later", 0, -1)]


@pytest.mark.parametrize(
    ("kind", "name", "field"),
    [
        *(("topic", name, "name") for name in ("x", "-1", "1.0", "٣", "1 2", "1|2", "*", " ")),
        *(("day", name, "name") for name in ("today", "2026-02-30", "2026-2-3", "20260203", "2026-W06-2")),
        *(("day", name, "name") for name in ("2026-02", "2026-02-03T10:00:00Z", "0000-01-01", "٢٠٢٦-٠١-٠١")),
        *(("week", name, "name") for name in ("2026-54", "2026-W00", "2025-W53", "2026-w06", "2026W06")),
        *(("month", name, "name") for name in ("2026-13", "2026-00", "2026-2", "2026", "February")),
        *(("entity", name, "name") for name in (" ", "a\x01", "\x7f", "x" * 257, "\0")),
        *((kind, "x", "kind") for kind in ("year", "Day", "profile", " day", "*", "%", "\0")),
    ],
)
async def test_what_is_no_kind_or_no_name_is_refused(
    http: httpx.AsyncClient, kind: str, name: str, field: str
) -> None:
    await add(http, "ada", TRIP)
    assert error_of(await http.get(summary_path(kind, name)), 422)["field"] == field


async def test_a_summary_has_no_parameters_and_no_other_path(http: httpx.AsyncClient) -> None:
    await add(http, "ada", TRIP)
    path = summary_path("entity", "Ana")
    assert error_of(await http.get(path + "?fresh=1"), 422)["field"] == "fresh"
    error_of(await http.get(of_user("ada", "summaries", "day") + "/%FF"), 422)
    for wrong in (of_user("ada", "summaries"), of_user("ada", "summaries", "entity"), path + "/x"):
        error_of(await http.get(wrong), 404)
    error_of(await http.delete(path), 405)


async def test_a_superseded_memory_is_in_no_summary(http: httpx.AsyncClient, service: Service) -> None:
    await add(http, "ada", TRIP)
    await asked_twice(http, service, summary_path("entity", "Ana"))
    correction = {"ids": ["p"], "memory": {"text": "Ben flew to Porto with a blue suitcase."}}
    await http.post(of_user("ada", "corrections"), json=correction)
    error_of(await http.get(summary_path("entity", "Ana")), 404)


async def test_what_is_queued_will_be_there_or_is_not_found(
    http: httpx.AsyncClient, service: Service
) -> None:
    await add(http, "ada", TRIP)
    path = summary_path("day", f"{datetime.now(UTC):%Y-%m-%d}")
    await http.get(path)
    await service.worker.settle(ahead_s=60)
    assert (await http.get(path)).status_code in (200, 404)


# similar memories -----------------------------------------------------------------------------

SIMILAR = of_user("ada", "memories", "b0", "similar")


async def test_similar_memories_are_searched_until_they_are_linked(
    http: httpx.AsyncClient, service: Service
) -> None:
    await add(http, "ada", *BEES, *BOATS, ALONE)
    await add(http, "eve", *BEES)
    searched = await body_of(http, SIMILAR)
    await make(service, "ada", "link")
    linked = await body_of(http, SIMILAR)
    assert (searched["precomputed"], linked["precomputed"]) == (False, True)
    assert searched["id"] == linked["id"] == "b0"
    for one, other in zip(searched["similar"], linked["similar"], strict=True):
        # RediSearch rounds elsewhere than numpy
        assert one | {"similarity": 0} == other | {"similarity": 0}
        assert one["similarity"] == pytest.approx(other["similarity"], abs=5e-4)
    assert len(linked["similar"]) == 10
    assert {one["id"] for one in linked["similar"][:7]} == {memory["id"] for memory in BEES[1:]}
    cosines = [one["similarity"] for one in linked["similar"]]
    assert cosines == sorted(cosines, reverse=True)
    assert set(linked["similar"][0]) == {"id", "text", "similarity"}


@pytest.mark.parametrize("linked", [True, False])
async def test_the_nearest_are_as_many_as_asked_for_and_there(
    http: httpx.AsyncClient, service: Service, linked: bool
) -> None:
    await add(http, "ada", *BEES, ALONE)
    if linked:
        await make(service, "ada", "link")
    whole = await body_of(http, SIMILAR, limit="100")
    assert len(whole["similar"]) == len(BEES)
    for limit in (1, 3):
        assert (await body_of(http, SIMILAR, limit=str(limit)))["similar"] == whole["similar"][:limit]
    first, second = (one["id"] for one in whole["similar"][:2])
    await http.delete(of_user("ada", "memories", first))
    correction = {"ids": [second], "memory": {"id": "new", "text": "Quite another thing"}}
    await http.post(of_user("ada", "corrections"), json=correction)
    left = [one["id"] for one in (await body_of(http, SIMILAR))["similar"] if one["id"] != "new"]
    assert left == [one["id"] for one in whole["similar"][2:]]


async def test_similar_takes_a_limit_from_1_to_100_and_a_memory_of_the_user(http: httpx.AsyncClient) -> None:
    await add(http, "ada", BEES[0])
    assert await body_of(http, SIMILAR) == {"id": "b0", "similar": [], "precomputed": False}
    for limit in ("0", "101", "-1", "1.5", "x", ""):
        assert error_of(await http.get(SIMILAR, params={"limit": limit}), 422)["field"] == "limit"
    assert error_of(await http.get(SIMILAR + "?limit=1&limit=2"), 422)["field"] == "limit"
    assert error_of(await http.get(SIMILAR + "?min_similarity=1"), 422)["field"] == "min_similarity"
    for user, memory in (("ada", "nope"), ("eve", "b0"), ("ada", "*"), ("ada", "b0/")):
        error_of(await http.get(of_user(user, "memories", memory, "similar")), 404)
    assert error_of(await http.get(of_user("ada", "memories", " ", "similar")), 422)["field"] == "id"


async def test_a_memory_without_a_vector_is_near_nothing(gated_http: httpx.AsyncClient, gate: Gate) -> None:
    await add(gated_http, "ada", *BEES[1:])
    gate.open.clear()
    await add(gated_http, "ada", BEES[0], wait=False)
    assert await body_of(gated_http, SIMILAR) == {"id": "b0", "similar": [], "precomputed": False}


# conflicts ------------------------------------------------------------------------------------

CONFLICTS = of_user("ada", "conflicts")
WEDDING = "Anna's wedding is on {} June in Porto at the old town hall"
CLASHES: list[dict[str, object]] = [
    {"id": "new", "text": WEDDING.format(19), "entities": ["Anna"], "event_date": "2026-02-01T00:00:00Z"},
    {"id": "old", "text": WEDDING.format(12), "entities": ["Anna"], "event_date": "2026-01-01T00:00:00Z"},
    {"id": "x/1", "text": "The kiln room key hangs on the left hook", "event_date": "2026-01-01T00:00:00Z"},
    {"id": "x/2", "text": "The kiln room key hangs on the left hook!", "event_date": "2026-03-01T00:00:00Z"},
]


async def test_conflicts_tell_both_sides_and_contradictions_first(
    http: httpx.AsyncClient, service: Service
) -> None:
    assert await body_of(http, CONFLICTS) == {"conflicts": [], "total": 0}
    await add(http, "ada", *CLASHES)
    await make(service, "ada", "link")
    body = await body_of(http, CONFLICTS)
    contradiction, duplicate = body["conflicts"]
    assert body["total"] == 2
    assert contradiction["similarity"] > 0.7
    assert contradiction == {
        "kind": "contradiction",
        "older": "old",
        "newer": "new",
        "older_text": WEDDING.format(12),
        "newer_text": WEDDING.format(19),
        "similarity": contradiction["similarity"],
        "why": "number",
    }
    assert (duplicate["kind"], duplicate["older"], duplicate["newer"]) == ("duplicate", "x/1", "x/2")
    assert "why" not in duplicate
    near = (await body_of(http, of_user("ada", "memories", "old", "similar")))["similar"][0]
    assert (near["id"], near["flag"], near["why"]) == ("new", "contradiction", "number")
    first = await body_of(http, CONFLICTS, limit="1")
    assert (first["conflicts"], first["total"]) == ([contradiction], 2)


async def test_conflicts_are_settled_by_a_delete_or_a_correction(
    http: httpx.AsyncClient, service: Service
) -> None:
    await add(http, "ada", *CLASHES)
    await make(service, "ada", "link")
    correction = {"ids": ["old", "new"], "memory": {"id": "now", "text": "No wedding"}}
    assert (await http.post(of_user("ada", "corrections"), json=correction)).status_code == 201
    left = await body_of(http, CONFLICTS)
    assert ([one["kind"] for one in left["conflicts"]], left["total"]) == (["duplicate"], 1)
    await http.delete(of_user("ada", "memories", "x/1"))
    assert await body_of(http, CONFLICTS) == {"conflicts": [], "total": 0}


@pytest.mark.parametrize("how", ["DEL", "HSET"])
async def test_what_another_service_removes_or_supersedes_is_not_shown(
    http: httpx.AsyncClient, service: Service, how: str
) -> None:
    await add(http, "ada", *CLASHES)
    await make(service, "ada", "link")
    values = () if how == "DEL" else ("superseded_by", "x/2")
    await service.client.execute(how, service.owner("ada").memory("new"), *values)
    assert [one["kind"] for one in (await body_of(http, CONFLICTS))["conflicts"]] == ["duplicate"]
    near = (await body_of(http, of_user("ada", "memories", "old", "similar")))["similar"]
    assert {one["id"] for one in near} == {"x/1", "x/2"}


async def test_conflicts_take_a_limit_from_1_to_500(http: httpx.AsyncClient) -> None:
    for limit in ("0", "501", "x", "1.5"):
        assert error_of(await http.get(CONFLICTS, params={"limit": limit}), 422)["field"] == "limit"
    assert error_of(await http.get(CONFLICTS + "?kind=duplicate"), 422)["field"] == "kind"


async def test_stats_tell_what_waits_and_what_was_done(http: httpx.AsyncClient, service: Service) -> None:
    before = (await body_of(http, "/v1/stats"))["jobs"]
    assert {name: before[name] for name in ("waiting", "due", "started", "failing", "dead")} == dict.fromkeys(
        ("waiting", "due", "started", "failing", "dead"), 0
    )
    await add(http, "ada", ALONE)
    waiting = (await body_of(http, "/v1/stats"))["jobs"]
    assert waiting["waiting"] == len(await queued_jobs(service)) > 0
    await service.worker.settle(ahead_s=4000)
    after = (await body_of(http, "/v1/stats"))["jobs"]
    assert (after["waiting"], after["late_s"]) == (0, 0.0)
