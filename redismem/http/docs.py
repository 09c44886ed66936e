"""Renders the OpenAPI document as one HTML page: no script, no outside asset."""

from __future__ import annotations

import json
import re
import shlex
from collections.abc import Iterator
from html import escape
from string import Template
from typing import Any

Schema = dict[str, Any]

#: where the curl examples go: the address `redismem serve` listens on by default
_HOST = "http://127.0.0.1:8000"
_SAMPLES = {"user": "alice", "id": "wedding"}

_PAGE = Template("""\
<!doctype html>
<html lang="en">
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta name="color-scheme" content="light dark">
<link rel="icon" href="data:,">
<title>$title HTTP API</title>
<style>$style</style>
<a class="skip" href="#main">Skip to the operations</a>
<nav aria-label="Contents">$nav</nav>
<main id="main">
<header><h1>$title <small>HTTP API</small></h1>
$about
<p>For programs: <a href="/openapi.json">/openapi.json</a> (OpenAPI $openapi).</p></header>
$operations
<section aria-labelledby="schemas"><h2 id="schemas">Schemas</h2>
$schemas
</section>
</main>
</html>
""")

_STYLE = """
:root{--bg:#fff;--fg:#1b1f24;--dim:#59636e;--line:#d8dee4;--soft:#f5f7f9;--link:#0b5cad;
--get:#0b5cad;--post:#1a6e3a;--patch:#8a5300;--delete:#b3261e;--on:#fff}
@media(prefers-color-scheme:dark){:root{--bg:#14171b;--fg:#e3e7ec;--dim:#9aa5b1;--line:#30373f;--soft:#1c2127;
--link:#79b8ff;--get:#79b8ff;--post:#6fce8f;--patch:#e8b45a;--delete:#ff9a92;--on:#14171b}}
*{box-sizing:border-box}
html{scroll-padding-top:1rem}
body{margin:0;background:var(--bg);color:var(--fg);font:16px/1.55 system-ui,sans-serif;
display:grid;grid-template-columns:17rem minmax(0,1fr)}
a{color:var(--link);text-underline-offset:.15em}
:focus-visible{outline:2px solid var(--link);outline-offset:2px;border-radius:4px}
.skip{position:absolute;left:-99rem}.skip:focus{left:1rem;top:1rem;background:var(--bg);padding:.5rem;z-index:1}
nav{position:sticky;top:0;height:100vh;overflow-y:auto;padding:1.5rem 1rem;border-right:1px solid var(--line);
font-size:.875rem}
nav h2{font-size:.75rem;letter-spacing:.06em;text-transform:uppercase;color:var(--dim);margin:1.2rem 0 .3rem}
nav ul{list-style:none;margin:0;padding:0}nav a{display:block;padding:.15rem 0;text-decoration:none}
nav a:hover{text-decoration:underline}
main{padding:1.5rem clamp(1rem,4vw,3rem) 4rem;max-width:62rem}
h1{font-size:1.9rem;line-height:1.2;margin:.2rem 0 1rem}h1 small{color:var(--dim);font-weight:400}
h2{font-size:1.25rem;margin:2.2rem 0 .7rem}main h2{text-transform:capitalize}
h3{font-size:.95rem;margin:1.3rem 0 .4rem}h4{font-size:.95rem;margin:.8rem 0 .2rem}
p{margin:.5rem 0}
code,pre{font:.875em/1.5 ui-monospace,SFMono-Regular,Menlo,Consolas,monospace}
code{overflow-wrap:anywhere}
pre{background:var(--soft);border:1px solid var(--line);border-radius:6px;padding:.7rem .9rem;overflow-x:auto;
margin:.4rem 0}
details{border:1px solid var(--line);border-radius:8px;margin:.6rem 0}
summary{cursor:pointer;padding:.55rem .8rem;display:flex;flex-wrap:wrap;gap:.2rem .7rem;align-items:center;
list-style:none}
summary::-webkit-details-marker{display:none}
summary::after{content:"+";color:var(--dim);margin-left:auto;font-size:1.2rem;line-height:1}
details[open]>summary::after{content:"\\2212"}
details[open]>summary{border-bottom:1px solid var(--line)}
summary:hover{background:var(--soft);border-radius:8px}
summary span{color:var(--dim)}
.in{padding:.4rem .9rem 1rem;scroll-margin-top:4rem}
b.m{font:600 .75rem/1 ui-monospace,Menlo,Consolas,monospace;color:var(--on);border-radius:4px;
padding:.35em .5em;min-width:4.2rem;text-align:center}
.get{background:var(--get)}.post{background:var(--post)}.patch{background:var(--patch)}
.delete{background:var(--delete)}
table{border-collapse:collapse;width:100%;font-size:.9rem;table-layout:fixed}
th{width:25%}th:last-child{width:50%}
th{text-align:left;font-weight:600;color:var(--dim);font-size:.8rem}
th,td{padding:.35rem .8rem .35rem 0;border-bottom:1px solid var(--line);vertical-align:top}
td{overflow-wrap:anywhere}tr:last-child td{border-bottom:0}
.must{color:var(--delete);font-size:.8rem}.dim{color:var(--dim)}
@media(max-width:52rem){body{display:block}nav{display:none}}
@media(max-width:36rem){thead{display:none}tr,td{display:block}td{border:0;padding:.05rem 0}
tr{border-bottom:1px solid var(--line);padding:.4rem 0}tr:last-child{border:0}td:empty{display:none}}
"""


def docs_page(document: dict[str, Any]) -> str:
    """Return the page of an OpenAPI document."""
    schemas = document["components"]["schemas"]
    areas: dict[str, list[tuple[str, str, Schema]]] = {tag["name"]: [] for tag in document["tags"]}
    for path, methods in document["paths"].items():
        for method, operation in methods.items():
            areas[operation["tags"][0]].append((method, path, operation))
    sections = []
    for area, operations in areas.items():
        inner = "\n".join(_operation(document, *operation) for operation in operations)
        sections.append(f"<section><h2>{escape(area)}</h2>\n{inner}\n</section>")
    return _PAGE.substitute(
        title=escape(document["info"]["title"]),
        openapi=escape(document["openapi"]),
        about=_prose(document["info"]["description"]),
        style=_STYLE,
        nav=_contents(areas, schemas),
        operations="\n".join(sections),
        schemas="\n".join(_named_schema(name, schema) for name, schema in schemas.items()),
    )


def _contents(areas: dict[str, list[tuple[str, str, Schema]]], schemas: dict[str, Schema]) -> str:
    found = []
    for area, operations in areas.items():
        links = [(f"op-{item['operationId']}", item["summary"]) for _, _, item in operations]
        found.append((area, links))
    found.append(("Schemas", [(f"schema-{name}", name) for name in schemas]))
    return "".join(
        f"<h2>{escape(area)}</h2><ul>"
        + "".join(f'<li><a href="#{escape(anchor)}">{escape(text)}</a>' for anchor, text in links)
        + "</ul>"
        for area, links in found
    )


def _operation(document: Schema, method: str, path: str, operation: Schema) -> str:
    parts = [_prose(operation["description"])]
    if parameters := operation.get("parameters"):
        rows = (
            (one["name"], one["schema"], one["in"] == "path", f"in {one['in']}; {one.get('description', '')}")
            for one in parameters
        )
        parts.append("<h3>Parameters</h3>" + _table(rows))
    for media, content in operation.get("requestBody", {}).get("content", {}).items():
        parts.append(f"<h3>Body <code>{escape(media)}</code></h3>")
        refs = [name for item in content["schema"].get("anyOf", [content["schema"]]) if (name := _name(item))]
        for name in refs:
            schema = document["components"]["schemas"][name]
            parts.append(f"<h4>{_type({'$ref': name})}</h4>{_described(schema)}")
    parts.append("<h3>Replies</h3>" + _replies(document, operation["responses"]))
    parts.append(f"<h3>Example</h3><pre><code>{escape(_curl(method, path, operation))}</code></pre>")
    return (
        f'<details><summary><b class="m {escape(method)}">{escape(method.upper())}</b>'
        f"<code>{escape(path)}</code><span>{escape(operation['summary'])}</span></summary>"
        f'<div class="in" id="op-{escape(operation["operationId"])}">{"".join(parts)}</div></details>'
    )


def _named_schema(name: str, schema: Schema) -> str:
    return (
        f"<details><summary><code>{escape(name)}</code></summary>"
        f'<div class="in" id="schema-{escape(name)}">{_described(schema)}</div></details>'
    )


def _described(schema: Schema) -> str:
    required = schema.get("required", ())
    return _prose(schema.get("description", "")) + _table(
        (name, item, name in required, item.get("description", ""))
        for name, item in schema.get("properties", {}).items()
    )


def _table(rows: Iterator[tuple[str, Schema, bool, str]]) -> str:
    cells = []
    for name, schema, required, text in rows:
        must = ' <span class="must">required</span>' if required else ""
        default = schema.get("default")
        limits = [*_limits(schema), *([f"default `{json.dumps(default)}`"] if default is not None else [])]
        told = [*([text.strip("; .")] if text else []), *limits]
        cells.append(
            f"<tr><td><code>{escape(name)}</code>{must}</td><td>{_type(schema)}</td>"
            f"<td class=dim>{_inline('; '.join(dict.fromkeys(told)))}</td></tr>"
        )
    head = "<thead><tr><th>Name</th><th>Type</th><th>Notes</th></tr></thead>"
    return f"<table>{head}<tbody>{''.join(cells)}</tbody></table>"


def _replies(document: Schema, responses: dict[str, Schema]) -> str:
    rows = []
    for status, reply in responses.items():
        named = document["components"]["responses"].get(_name(reply), reply)
        kinds = [_type(content["schema"]) for content in named.get("content", {}).values()]
        headers = [f"<code>{name}</code>" for name in named.get("headers", ()) if name != "X-Request-ID"]
        rows.append(
            f"<tr><td><code>{escape(status)}</code></td><td>{', '.join([*kinds, *headers])}</td>"
            f"<td class=dim>{_inline(named['description'])}</td></tr>"
        )
    head = "<thead><tr><th>Status</th><th>Body, headers</th><th>Meaning</th></tr></thead>"
    return f"<table>{head}<tbody>{''.join(rows)}</tbody></table>"


def _name(schema: Schema) -> str:
    return str(schema.get("$ref", "")).rpartition("/")[2]


def _type(schema: Schema) -> str:
    """Return a schema's type as HTML, with links to named schemas."""
    if name := _name(schema):
        return f'<a href="#schema-{escape(name)}"><code>{escape(name)}</code></a>'
    if "anyOf" in schema and "properties" not in schema:
        return " or ".join(dict.fromkeys(_type(item) for item in schema["anyOf"]))
    if "enum" in schema:
        return " or ".join(f"<code>{escape(json.dumps(value))}</code>" for value in schema["enum"])
    kind = str(schema.get("type", "any"))
    if kind == "array":
        items = schema.get("items") or schema.get("contains") or {}
        return f"array of {_type(items)}"
    if kind == "object" and isinstance(schema.get("additionalProperties"), dict):
        return f"object of {_type(schema['additionalProperties'])}"
    return escape(schema.get("format", kind))


def _limits(schema: Schema) -> Iterator[str]:
    """Yield the constraints of a schema in words, those of its alternatives and items included."""
    for low, high, unit in (("minLength", "maxLength", "characters"), ("minItems", "maxItems", "items")):
        if high in schema:
            yield f"{schema.get(low, 0):,} to {schema[high]:,} {unit}"
        elif low in schema:
            yield f"at least {schema[low]:,} {unit}"
    bounds = (("minimum", ">="), ("exclusiveMinimum", ">"), ("maximum", "<="), ("exclusiveMaximum", "<"))
    if "minimum" in schema and "maximum" in schema:
        yield f"{schema['minimum']:,} to {schema['maximum']:,}"
    elif ranges := [f"{sign} {schema[key]:,}" for key, sign in bounds if key in schema]:
        yield " and ".join(ranges)
    if "pattern" in schema and r"\u" not in schema["pattern"]:  # the others are described in words
        yield f"matches `{schema['pattern']}`"
    if "description" in schema and "pattern" in schema:
        yield schema["description"]
    for item in schema.get("anyOf", ()):
        yield from _limits(item)
    if isinstance(schema.get("items"), dict):
        yield from (f"each {limit}" for limit in _limits(schema["items"]))


def _curl(method: str, path: str, operation: Schema) -> str:
    url = _HOST + re.sub(r"{(\w+)}", lambda part: _SAMPLES.get(part[1], part[1]), path)
    lines = ["curl" + (f" -X {method.upper()}" if method not in ("get", "post") else "") + f" {url}"]
    for media, content in operation.get("requestBody", {}).get("content", {}).items():
        lines.append(f"-H 'Content-Type: {media}'")
        body: Schema = next((example["value"] for example in content.get("examples", {}).values()), {})
        lines.append(f"--data-binary {shlex.quote(json.dumps(body, ensure_ascii=False))}")
    return " \\\n  ".join(lines)


def _prose(text: str) -> str:
    return "".join(f"<p>{_inline(part)}</p>" for part in text.split("\n\n") if part.strip())


def _inline(text: str) -> str:
    return re.sub(r"`([^`]+)`", r"<code>\1</code>", escape(text))
