"""One computation, many passengers."""

from __future__ import annotations

import asyncio

import pytest

from redismem.flight import Abandoned, Flight


async def passengers(flight: Flight[int], count: int) -> list[asyncio.Task[int]]:
    tasks = [asyncio.create_task(flight.join()) for _ in range(count)]
    await asyncio.sleep(0)
    return tasks


async def test_everyone_who_joined_gets_the_result() -> None:
    flight = Flight[int]()
    tasks = await passengers(flight, 3)
    flight.land(7)
    assert await asyncio.gather(*tasks) == [7, 7, 7]


async def test_a_failure_reaches_everyone_once() -> None:
    flight = Flight[int]()
    tasks = await passengers(flight, 3)
    flight.fail(ValueError("no"))
    results = await asyncio.gather(*tasks, return_exceptions=True)
    assert [type(result) for result in results] == [ValueError] * 3


async def test_a_cancelled_computation_asks_its_passengers_to_try_again() -> None:
    flight = Flight[int]()
    (task,) = await passengers(flight, 1)
    flight.fail(asyncio.CancelledError())
    with pytest.raises(Abandoned):
        await task


async def test_a_passenger_who_leaves_takes_nobody_along() -> None:
    flight = Flight[int]()
    leaving, staying = await passengers(flight, 2)
    leaving.cancel()
    await asyncio.gather(leaving, return_exceptions=True)
    flight.land(1)
    assert await staying == 1


async def test_a_flight_without_passengers_lands_and_fails_quietly() -> None:
    Flight[int]().land(1)
    Flight[int]().fail(ValueError("nobody hears this"))


async def test_a_failure_whose_passengers_have_left_is_not_reported() -> None:
    flight = Flight[int]()
    (task,) = await passengers(flight, 1)
    task.cancel()
    await asyncio.gather(task, return_exceptions=True)
    problems: list[object] = []
    asyncio.get_running_loop().set_exception_handler(lambda _, context: problems.append(context))
    flight.fail(ValueError("nobody hears this"))
    await asyncio.sleep(0)
    del flight
    await asyncio.sleep(0)
    asyncio.get_running_loop().set_exception_handler(None)
    assert not problems
