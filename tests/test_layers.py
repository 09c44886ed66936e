"""The package's shape, read from its source: directions, purity, sizes."""

from __future__ import annotations

import ast
from pathlib import Path

PACKAGE = Path(__file__).parent.parent / "redismem"

#: a module imports only modules of lower rank (a package counts as one module)
RANKS = {
    "fields": 0,
    "errors": 0,
    "circuit": 0,
    "flight": 0,
    "l1": 0,
    "rules": 0,
    "trace": 0,
    "admission": 0,
    "slo": 0,
    "filters": 1,
    "settings": 1,
    "spans": 1,
    "keys": 1,
    "words": 1,
    "periods": 1,
    "types": 2,
    "logs": 2,
    "metrics": 1,
    "apikeys": 3,
    "material": 2,
    "views": 2,
    "lane": 2,
    "archivelines": 2,
    "embed": 2,
    "embedded": 2,
    "query": 3,
    "clustering": 3,
    "extract": 3,
    "wording": 3,
    "profile": 4,
    "similarity": 3,
    "weights": 3,
    "conversation": 3,
    "entities": 3,
    "timewindow": 3,
    "spacynames": 3,
    "rendering": 4,
    "immediacy": 5,
    "packing": 5,
    "opening": 5,
    "watch": 7,
    "tokens": 3,
    "naming": 5,
    "sessions": 8,
    "gathering": 10,
    "prefetch": 11,
    "stages": 11,
    "sdk": 4,
    "chat": 15,
    "context": 12,
    "archivefiles": 3,
    "effort": 3,
    "progress": 3,
    "client": 3,
    "codec": 4,
    "lualib": 4,
    "coherence": 4,
    "vectors": 5,
    "store": 5,
    "series": 5,
    "ratelimit": 5,
    "idempotency": 5,
    "keyring": 6,
    "jobs": 5,
    "touches": 5,
    "queryvectors": 5,
    "index": 5,
    "archiverun": 5,
    "archive": 6,
    "backfill": 6,
    "graph": 6,
    "found": 5,
    "read": 6,
    "browse": 6,
    "write": 7,
    "reembed": 7,
    "derived": 8,
    "tiers": 9,
    "worker": 9,
    "warm": 10,
    "maintain": 10,
    "telemetry": 12,
    "overview": 13,
    "service": 14,
    "om": 15,
    "http": 15,
    "doctor": 15,
    "serve": 16,
    "demo": 16,
    "cli": 17,
    "__main__": 18,
}

PURE = (
    "fields",
    "filters",
    "types",
    "errors",
    "circuit",
    "trace",
    "admission",
    "slo",
    "apikeys",
    "l1",
    "rules",
    "settings",
    "keys",
    "words",
    "periods",
    "query",
    "codec",
    "effort",
    "material",
    "views",
    "clustering",
    "extract",
    "profile",
    "wording",
    "similarity",
    "weights",
    "conversation",
    "entities",
    "timewindow",
    "rendering",
    "immediacy",
    "packing",
)
IMPURE_LIBRARIES = {"redis", "redis_om", "aredis_om", "starlette", "uvicorn", "asyncio", "httpx"}

MAX_LINES = 500


def modules() -> dict[str, list[Path]]:
    """Files by module name; those of a sub-package together."""
    found: dict[str, list[Path]] = {}
    for path in sorted(PACKAGE.rglob("*.py")):
        name = path.relative_to(PACKAGE).parts[0].removesuffix(".py")
        if name != "__init__":
            found.setdefault(name, []).append(path)
    return found


def imported(path: Path) -> set[str]:
    """Full names of everything a file imports, wherever in the file."""
    names: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names.update(alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import"
            names.add(node.module or "")
            if node.module == "redismem":
                names.update(f"redismem.{alias.name}" for alias in node.names)
    return names


def test_every_module_has_a_rank() -> None:
    assert set(modules()) == set(RANKS)


def test_imports_point_to_lower_ranks() -> None:
    wrong = []
    for name, paths in modules().items():
        for path in paths:
            for target in imported(path):
                parts = target.split(".")
                if parts[0] != "redismem" or len(parts) == 1 or parts[1] == name:
                    continue
                if RANKS[parts[1]] >= RANKS[name]:
                    wrong.append(f"{name} imports {target}")
    assert not wrong


def test_pure_modules_import_no_io() -> None:
    wrong = [
        f"{name}: {target}"
        for name in PURE
        for path in modules()[name]
        for target in imported(path)
        if target.split(".")[0] in IMPURE_LIBRARIES
    ]
    assert not wrong


def test_starlette_stays_in_http() -> None:
    users = {name for name, paths in modules().items() for path in paths if "starlette" in path.read_text()}
    assert users <= {"http"}


def test_init_files_only_export() -> None:
    for path in PACKAGE.rglob("__init__.py"):
        for node in ast.parse(path.read_text()).body:
            assert isinstance(node, ast.Expr | ast.ImportFrom | ast.Assign), path
            if isinstance(node, ast.Assign):
                assert [getattr(target, "id", "") for target in node.targets] == ["__all__"], path


def test_files_stay_small() -> None:
    root = PACKAGE.parent
    files = [*PACKAGE.rglob("*.py"), *(root / "lua").glob("*.lua"), *(root / "tests").rglob("*.py")]
    assert not [str(path) for path in files if len(path.read_text().splitlines()) > MAX_LINES]
