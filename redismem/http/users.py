"""Lists the users that a caller may see."""

from __future__ import annotations

from typing import Annotated

from msgspec import Meta, Struct
from starlette.requests import Request
from starlette.responses import Response

from redismem.http.routes import service_of
from redismem.http.wire import converted, json_response, key_of
from redismem.keys import Owner
from redismem.store import USERS_CURSOR, owners_page, user_items
from redismem.types import UsersReply

#: query parameters: name -> JSON schema
USERS_QUERY: dict[str, dict[str, object]] = {
    "contains": {"type": "string", "maxLength": 256, "description": "letters of either case are the same"},
    "cursor": {"type": "string", "pattern": USERS_CURSOR},
    "limit": {"type": "integer", "minimum": 1, "maximum": 500, "default": 50},
}


class _UsersQuery(Struct, kw_only=True):
    contains: Annotated[str, Meta(max_length=256)] = ""
    cursor: Annotated[str, Meta(pattern=USERS_CURSOR)] | None = None
    limit: Annotated[int, Meta(ge=1, le=500)] = 50


async def list_users(request: Request) -> Response:
    """List users with memories, in no order; `contains` is a part of their id."""
    service, query = service_of(request), converted(dict(request.query_params), _UsersQuery)
    key, part = key_of(request.scope), query.contains.casefold()
    namespace = service.settings.namespace if key is None else key.namespace

    def is_wanted(owner: Owner) -> bool:
        return (key is None or key.covers(owner.user)) and part in owner.user.casefold()

    found, cursor = await owners_page(
        service.client, namespace, is_wanted, limit=query.limit, cursor=query.cursor
    )
    return json_response(UsersReply(users=await user_items(service.client, found), cursor=cursor))
