"""How hard a search tries: the width of the graph's search, and when enough was found. Pure."""

from __future__ import annotations

from redismem.types import QueryType, SearchRequest

#: candidates that a graph's search keeps (EF), by what the query is for
WIDTHS: dict[QueryType, int] = {"suggestion": 32, "prefetch": 64, "primary": 128, "verification": 256}

#: a budget below this is tight: it caps EF, and the hot set is looked at first
TIGHT_MS = 20
TIGHT_WIDTH = 64

#: with `min_results` a search ends early when so many hits are at least this similar (unless the request says
#: how similar), and the best is nearer than EXCELLENT
GOOD, EXCELLENT = 0.85, 0.9

#: milliseconds of a budget that the embedding leaves for the search
RESERVED_MS = 3.0


def chosen_width(request: SearchRequest) -> int:
    """Return EF: as asked for, else by the query's type, at most 64 in a tight budget.

    By type it is meant for the production profile; graphs of another EF take it in proportion.
    """
    if request.ef is not None:
        return request.ef
    width = WIDTHS[request.query_type]
    return min(width, TIGHT_WIDTH) if is_tight(request) else width


def is_fixed(request: SearchRequest) -> bool:
    """Return whether the width does not depend on the graph's profile."""
    return request.ef is not None or is_tight(request)


def is_tight(request: SearchRequest) -> bool:
    """Return whether the request has less than 20 ms."""
    return request.max_ms is not None and request.max_ms < TIGHT_MS


def is_staged(request: SearchRequest) -> bool:
    """Return whether the hot set and the session are looked at before the whole index."""
    return request.min_results is not None or is_tight(request)
