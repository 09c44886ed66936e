"""One client that also talks, and asks for contexts while another one removes what they may show."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import msgspec

from redismem.conversation import STAGE_OF
from tests.accept import history_contexts
from tests.accept.history import Operation
from tests.accept.history_actor import (
    DONE,
    IDS,
    MESSAGES,
    NAMES,
    SESSIONS,
    TOPIC,
    Actor,
    Ground,
    generation_of,
    home,
    named,
)
from tests.accept.history_client import Reply
from tests.accept.history_contexts import Shown

#: share of the contexts with each of these, and milliseconds of those in a hurry
WITH_SESSION, WITHOUT_TEXT, WITHOUT_MORE, HURRIED, HURRY_MS = 0.6, 0.15, 0.6, 0.1, 60
#: share of the streams during which another client removes something, so many seconds after they began
TROUBLED, TROUBLE_S = 0.6, 0.2
#: share of the messages that were seen being typed
TYPED = 0.3


class _Said(msgspec.Struct):
    outcome: str


class _Saying(msgspec.Struct):
    items: list[_Said]


_saying = msgspec.json.Decoder(_Saying)


class Talker(Actor):
    """A client with another one, which makes trouble for its streams."""

    def __init__(self, ground: Ground, number: int, other: Actor) -> None:
        super().__init__(ground, number)
        self._other = other

    def close(self) -> None:
        super().close()
        self._other.close()

    async def tell_of_somebody(self, user: str) -> None:
        """Say a message that names somebody, whom half of the memories name by now."""
        name = self._rng.choice(NAMES)
        for memory_id in IDS[::2]:
            await self._put(user, memory_id, name)
        await self._say(user, name)

    async def look_at_loaded(self, user: str) -> None:
        """Delete something, and ask for what was loaded ahead."""
        for memory_id in self._rng.sample(IDS + MESSAGES, len(IDS) // 2):
            await self._delete(user, memory_id)
        parts = dict.fromkeys(STAGE_OF, False) | {"prefetched": True}
        for session in SESSIONS:
            wish = {"session_id": session, "text": "common", "stages": 2, "parts": parts}
            await self._ask(user, wish, {})

    async def _say(self, user: str, name: str = "") -> None:
        memory_id = self._rng.choice(MESSAGES)
        path = f"{home(user)}/sessions/{memory_id[:2]}"
        text = self._text(user, memory_id, name)
        if self._rng.random() < TYPED:
            await self._send("POST", f"{path}/typing", {"partial": text})
        body = {"id": memory_id, "text": text, "entities": named(text)}
        wait = "" if self._rng.random() < 0.7 else "?wait=false"
        reply, process = await self._send("POST", f"{path}/messages{wait}", body)
        more: dict[str, Any] = {"id": memory_id, "text": text, "generation": generation_of(reply)}
        if reply.status in DONE and _saying.decode(reply.body).items[0].outcome == "UNCHANGED":
            more["outcome"] = "failed"  # it was corrected, and stays so
        self._note("say", user, reply, process, **more)
        if reply.status in (404, 409):
            await self._open(user, memory_id[:2])

    async def _open(self, user: str, session: str) -> None:
        body = {"id": session, "active_topics": [TOPIC], "pins": self._rng.sample(IDS, 2)}
        reply, process = await self._send("POST", f"{home(user)}/sessions", body)
        shown = (
            history_contexts.of_opened(reply.body, reply.began, reply.ended) if reply.status in DONE else []
        )
        self._note_shown("context", user, reply, process, shown, {})

    async def _close(self, user: str) -> None:
        await self._send("DELETE", f"{home(user)}/sessions/{self._rng.choice(SESSIONS)}")

    async def _context(self, user: str) -> None:
        await self._ask(user, *self._wish(user))

    async def _ask(self, user: str, wish: dict[str, Any], told: dict[str, Any]) -> None:
        reply, process = await self._send("POST", f"{home(user)}/context", wish)
        shown = history_contexts.of_json(reply.body, reply.began, reply.ended) if reply.status in DONE else []
        self._note_shown("context", user, reply, process, shown, told)

    async def _stream(self, user: str) -> None:
        async with asyncio.TaskGroup() as group:
            if self._rng.random() < TROUBLED:
                group.create_task(self._trouble(user))
            await self._streamed(user)

    async def _trouble(self, user: str) -> None:
        await asyncio.sleep(self._rng.random() * TROUBLE_S)
        operation = self._rng.choice(["delete", "delete", "delete", "correct"])
        await self._other.do(operation, user, self._rng.choice(list(self._ground.there[user]) or IDS))

    async def _streamed(self, user: str) -> None:
        wish, told = self._wish(user)
        reply, process = await self._send("POST", f"{home(user)}/context", wish, accept="text/event-stream")
        shown, last = history_contexts.of_stream(reply.chunks, reply.began)
        self._ground.trace.shown["broken off"] += bool(shown) and last != "done"
        self._note_shown("stream", user, reply, process, shown, told)

    def _wish(self, user: str) -> tuple[dict[str, Any], dict[str, Any]]:
        """Return a request for a context and what to note of it."""
        dice, (query, told) = self._rng.random, self._query(user)
        wish: dict[str, Any] = {"stages": 4, "text": query["text"]}
        wish |= told if told["consistency"] != "eventual" else {}
        if dice() < 0.5:
            wish["text"] += f" {self._rng.choice(NAMES)}"
        if dice() < WITH_SESSION:
            wish["session_id"] = self._rng.choice(SESSIONS)
            if dice() < WITHOUT_TEXT:
                del wish["text"]
        if dice() < WITHOUT_MORE:  # else the second stage shows nearly everything
            wish["parts"] = {"more": False, self._rng.choice(["matches", "pinned", "prefetched"]): False}
        if dice() < HURRIED:
            wish["max_ms"] = HURRY_MS
        return wish, told

    def _note_shown(
        self,
        operation: Operation,
        user: str,
        reply: Reply,
        process: str,
        stages: Sequence[Shown],
        told: dict[str, Any],
    ) -> None:
        if not stages:
            self._note(operation, user, reply, process)
        for stage in stages:
            arrived = replace(reply, ended=stage.ended, status=200)
            more = {"returned": stage.items, "compared": stage.compared, "stage": stage.number}
            self._note(operation, user, arrived, process, **more, **told)
            self._ground.trace.shown.update(stage.parts)
            self._ground.trace.shown["partial"] += stage.partial
