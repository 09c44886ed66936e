"""What schemathesis cannot know: how to write NDJSON, and that msgspec tells `1.0` from an integer."""

from __future__ import annotations

import json
from typing import Any

import schemathesis


@schemathesis.serializer("application/x-ndjson")
def ndjson(ctx: Any, value: Any) -> bytes:
    return json.dumps(value).encode() + b"\n"


@schemathesis.hook
def map_body(ctx: Any, body: Any) -> Any:
    """JSON Schema calls 10.0 an integer; msgspec does not."""
    if isinstance(body, dict):
        return {key: map_body(ctx, item) for key, item in body.items()}
    if isinstance(body, list):
        return [map_body(ctx, item) for item in body]
    return int(body) if isinstance(body, float) and body.is_integer() and abs(body) <= 2**53 else body
