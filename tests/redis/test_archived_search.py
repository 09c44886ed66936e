"""What a search, a delete and forgetting make of archived time."""

from __future__ import annotations

from collections.abc import AsyncIterator
from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path

import pytest

from redismem.errors import Conflict, NotFound
from redismem.filters import Filters, TimeRange
from redismem.keys import Owner
from redismem.service import Service, assembled
from redismem.types import MemoryInput, SearchRequest

NOW_S = datetime(2026, 11, 25, tzinfo=UTC).timestamp()


@pytest.fixture
async def keeping(service: Service, tmp_path: Path) -> AsyncIterator[Service]:
    """A service with caches and an archive."""
    settings = replace(service.settings, archive_url=str(tmp_path / "archive"), l2_searches=16)
    async with assembled(settings, service.client, service.embedder) as opened:
        yield opened
        assert await opened.backfill.drained(10)


@pytest.fixture
async def aged(keeping: Service, owner: Owner) -> Owner:
    """A user with memories of 2020 to 2026, the old ones archived."""
    years = range(2020, 2027)
    await keeping.writer.put(
        owner,
        [
            MemoryInput(id=f"y{year}", text=f"zebra of {year}", event_date=datetime(year, 5, 1, tzinfo=UTC))
            for year in years
        ],
    )
    moved = await keeping.archive.archive_old(owner, NOW_S)
    assert sorted(moved) == [f"{year}-Q2" for year in range(2020, 2025)]
    return owner


async def archived(service: Service, owner: Owner, **filters: object) -> list[str]:
    request = SearchRequest(text="zebra", filters=Filters(**filters))  # type: ignore[arg-type]
    return (await service.tiers.find(owner, [request]))[0].archived


async def test_a_search_that_reaches_into_archived_time_says_so(keeping: Service, aged: Owner) -> None:
    everything = ["2020-Q2", "2021-Q2", "2022-Q2", "2023-Q2", "2024-Q2"]
    assert await archived(keeping, aged) == everything
    assert await archived(keeping, aged, partition="2023-Q2") == ["2023-Q2"]
    since = TimeRange(gte=datetime(2024, 1, 1, tzinfo=UTC))
    assert await archived(keeping, aged, event_date=since) == ["2024-Q2"]
    assert await archived(keeping, aged, partition="2026-Q2") == []


async def test_a_cached_search_says_so_too(keeping: Service, aged: Owner) -> None:
    first = (await keeping.tiers.find(aged, [SearchRequest(text="zebra of 2026")]))[0]
    again = (await keeping.tiers.find(aged, [SearchRequest(text="zebra of 2026")]))[0]
    assert (first.served_by, again.served_by) == ("l3", "l2")
    assert first.archived == again.archived != []


async def test_a_restored_quarter_is_searched_and_not_named(keeping: Service, aged: Owner) -> None:
    assert await keeping.archive.restore(aged, "2022-Q2") == {"2022-Q2": 1}
    assert "2022-Q2" not in await archived(keeping, aged)
    found = (await keeping.tiers.find(aged, [SearchRequest(text="zebra of 2022", limit=1)]))[0]
    assert [hit.id for hit in found.memories] == ["y2022"]


async def test_a_deleted_archived_memory_does_not_come_back(keeping: Service, aged: Owner) -> None:
    assert (await keeping.writer.delete(aged, "y2021")).outcome == "DELETED"
    with pytest.raises(NotFound):
        await keeping.writer.delete(aged, "y2021")
    restored = await keeping.archive.restore(aged)
    assert sum(restored.values()) == 4
    with pytest.raises(NotFound):
        await keeping.browser.get(aged, "y2021")


async def test_reading_an_archived_memory_tells_where_it_is(keeping: Service, aged: Owner) -> None:
    with pytest.raises(NotFound, match=r"archived with 2021-Q2: run `redismem archive restore`"):
        await keeping.browser.get(aged, "y2021")


async def test_an_archived_id_that_is_written_anew_stays_new(keeping: Service, aged: Owner) -> None:
    await keeping.writer.put(aged, [MemoryInput(id="y2021", text="another zebra")])
    await keeping.archive.restore(aged)
    assert (await keeping.browser.get(aged, "y2021")).text == "another zebra"


async def test_forgetting_takes_the_files_along(keeping: Service, aged: Owner, tmp_path: Path) -> None:
    assert list((tmp_path / "archive").rglob("*.zst"))
    assert (await keeping.writer.forget(aged)).memories == 7
    assert not list((tmp_path / "archive").rglob("*.zst"))
    assert await keeping.client.execute("EXISTS", aged.archived, aged.meta) == 0


async def test_nobody_is_forgotten_where_the_archive_cannot_be_reached(
    service: Service, keeping: Service, aged: Owner
) -> None:
    with pytest.raises(Conflict, match="REDISMEM_ARCHIVE_URL"):
        await service.writer.forget(aged)
    assert (await service.browser.get(aged, "y2026")).text == "zebra of 2026"
