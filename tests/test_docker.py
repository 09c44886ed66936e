"""docker/ as far as it can be proved without an engine: files are read, commands run outside a container."""

from __future__ import annotations

import asyncio
import json
import os
import re
import shlex
import socket
import subprocess
import sys
import tomllib
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import httpx
import pytest
import yaml  # type: ignore[import-untyped]  # it ships no types
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

from redismem import embedded
from redismem.client import Client
from redismem.embed import minilm
from redismem.embedded import EmbeddedRedis
from redismem.settings import Settings
from redismem.store import SAFE_REDIS, check_server
from tests.conftest import until

ROOT = Path(__file__).parent.parent
DOCKER = ROOT / "docker"
COMPOSE: dict[str, Any] = yaml.safe_load((DOCKER / "compose.yaml").read_text())
STACK: dict[str, Any] = yaml.safe_load((DOCKER / "compose.redis-stack.yaml").read_text())
#: what is not under test need not be loaded
QUICK = {"embedder": "deterministic", "testing": 1}
PINNED = re.compile(r":v?\d+\.\d+\.\d+(-[\w.-]+)?")


def dockerfile() -> list[tuple[str, str]]:
    """Return the Dockerfile's instructions with their arguments, continued lines joined."""
    text = (DOCKER / "Dockerfile").read_text()
    lines = [line for line in text.splitlines() if not line.lstrip().startswith("#")]
    joined = "\n".join(lines).replace("\\\n", " ")
    return [(name, rest) for name, _, rest in (line.partition(" ") for line in joined.splitlines() if line)]


def last_stage() -> list[tuple[str, str]]:
    told = dockerfile()
    start = max(at for at, (name, _) in enumerate(told) if name == "FROM")
    return told[start:]


def argument(name: str) -> str:
    (found,) = (rest for told, rest in last_stage() if told == name)
    return found


def exec_form(argument: str) -> list[str]:
    """Return the command of CMD or HEALTHCHECK, whose list is JSON, with this interpreter for the image's."""
    command: list[str] = json.loads(argument[argument.index("[") :])
    assert command[0] in ("redismem", "python")
    return [sys.executable, *(["-m", "redismem"] if command[0] == "redismem" else []), *command[1:]]


def image_environment(**more: object) -> dict[str, str]:
    """Return the variables a container would have, and what this machine needs to run the same."""
    kept = {name: value for name, value in os.environ.items() if not name.startswith("REDISMEM_")}
    told = dict(item.split("=", 1) for item in shlex.split(argument("ENV").replace("$PATH", kept["PATH"])))
    return kept | told | {f"REDISMEM_{name.upper()}": str(value) for name, value in more.items()}


def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as probe:
        return int(probe.getsockname()[1])


async def ended(command: list[str], environ: dict[str, str]) -> subprocess.CompletedProcess[str]:
    return await asyncio.to_thread(
        subprocess.run, command, env=environ, capture_output=True, text=True, timeout=60, cwd=ROOT
    )


@pytest.fixture
async def redis(tmp_path: Path) -> AsyncIterator[EmbeddedRedis]:
    async with EmbeddedRedis(tmp_path / "data", persist=False) as opened:
        yield opened


def test_images_are_pinned_to_a_patch_version() -> None:
    bases = [rest.split()[0] for name, rest in dockerfile() if name == "FROM"]
    assert len(bases) == 2
    assert len(set(bases)) == 1
    assert re.fullmatch(r"python:3\.11\.\d+-slim-\w+", bases[0])
    services = [*COMPOSE["services"].values(), *STACK["services"].values()]
    assert all(PINNED.search(service["image"]) for service in services)


def test_redis_is_one_that_is_safe_to_run() -> None:
    version = COMPOSE["services"]["redis"]["image"].partition(":")[2]
    assert tuple(map(int, version.split("."))) >= SAFE_REDIS


def test_the_image_runs_as_a_numbered_user_without_rights() -> None:
    uid, gid = argument("USER").split(":")
    assert int(uid) > 0
    assert int(gid) > 0
    (made,) = (rest for name, rest in last_stage() if name == "RUN")
    assert f"--uid {uid} " in made
    assert f"--gid {gid} " in made


def test_the_image_writes_to_temporary_files_only() -> None:
    """What a read-only root needs: no bytecode is written, and the working directory is the temporary one."""
    assert image_environment()["PYTHONDONTWRITEBYTECODE"] == "1"
    assert argument("WORKDIR") == "/tmp"
    assert COMPOSE["services"]["redismem"]["tmpfs"][0].startswith("/tmp:")


def test_the_image_has_pinned_what_the_package_asks_for() -> None:
    lines = (DOCKER / "requirements.txt").read_text().splitlines()
    pinned = [Requirement(line) for line in lines if line and not line.startswith("#")]
    versions = {canonicalize_name(item.name): str(item.specifier).removeprefix("==") for item in pinned}
    assert all(re.fullmatch(r"==[\w.+]+", str(item.specifier)) for item in pinned)
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    for wanted in map(Requirement, project["dependencies"]):
        assert wanted.specifier.contains(versions[canonicalize_name(wanted.name)]), wanted


def test_the_image_has_the_model_of_the_local_extra_and_no_redis() -> None:
    lines = [line for line in (DOCKER / "model.txt").read_text().splitlines() if not line.startswith("#")]
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    assert set(lines) < set(project["optional-dependencies"]["local"])
    assert {line.partition("==")[0] for line in lines} == {minilm._MODEL[0], minilm._TOKENIZER[0]}


def test_what_the_image_copies_is_let_into_its_build() -> None:
    allowed = {line[1:] for line in (ROOT / ".dockerignore").read_text().splitlines() if line.startswith("!")}
    copied = {
        source.removeprefix("./")
        for name, rest in dockerfile()
        if name == "COPY" and not rest.startswith("--from")
        for source in rest.split()[:-1]
    }
    assert copied == allowed
    assert all((ROOT / source).exists() for source in copied)


async def test_the_command_refuses_to_listen_while_there_is_no_key(redis: EmbeddedRedis) -> None:
    environ = image_environment(redis_url=redis.url, port=free_port(), **QUICK)
    assert "0.0.0.0" in argument("CMD")
    done = await ended(exec_form(argument("CMD")), environ)
    assert done.returncode == 1
    assert "API key" in done.stderr


async def test_the_command_gets_ready_and_its_healthcheck_and_prometheus_can_tell(
    redis: EmbeddedRedis,
) -> None:
    environ = image_environment(redis_url=redis.url, port=free_port(), worker=0)
    (told,) = re.findall(
        r"redismem (keys create --name prometheus .*?) >", (DOCKER / "compose.yaml").read_text()
    )
    made = await ended([sys.executable, "-m", "redismem", *told.split()], environ)
    assert made.returncode == 0, made.stderr
    check = exec_form(argument("HEALTHCHECK"))
    assert (await ended(check, environ)).returncode != 0
    command = [part.replace("0.0.0.0", "127.0.0.1") for part in exec_form(argument("CMD"))]
    process = subprocess.Popen(command, env=environ, stdout=subprocess.DEVNULL)
    try:
        base = f"http://127.0.0.1:{environ['REDISMEM_PORT']}"
        async with httpx.AsyncClient(base_url=base, trust_env=False) as http:
            await until("the service is ready", lambda: is_ready(http), 60)
            assert (await ended(check, environ)).returncode == 0
            assert (await ended(check, environ | {"http_proxy": "http://127.0.0.1:9"})).returncode == 0
            assert (await http.get("/metrics")).status_code == 401
            key = {"Authorization": f"Bearer {made.stdout.strip()}"}
            assert "redismem_redis_up 1.0" in (await http.get("/metrics", headers=key)).text
        assert redis.pid is not None
        os.kill(redis.pid, 9)
        assert (await ended(check, environ)).returncode != 0
    finally:
        process.terminate()
        await asyncio.to_thread(process.wait, 25)


async def is_ready(http: httpx.AsyncClient) -> bool:
    try:
        return (await http.get("/health/ready")).status_code == 200
    except httpx.TransportError:
        return False


@pytest.mark.parametrize("redis_service", [COMPOSE, STACK], ids=["redis-8", "redis-stack"])
async def test_a_server_takes_the_command_of_redis(redis_service: dict[str, Any], tmp_path: Path) -> None:
    told = redis_service["services"]["redis"]["command"]
    options = told[told.index("--appendonly") :]
    if "--loadmodule" in options:
        options = options[: options.index("--loadmodule")]
    server = embedded._executable(embedded._locate(*embedded._SERVER), tmp_path)
    port = free_port()
    command = [str(server), *options, "--bind", "127.0.0.1", "--port", str(port), "--dir", str(tmp_path)]
    for module in embedded._MODULES:
        command += ["--loadmodule", str(embedded._executable(embedded._locate(*module), tmp_path))]
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL)
    client = Client(Settings(), f"redis://127.0.0.1:{port}/0")
    try:
        await until("Redis answers", lambda: answers(port), 10)
        await check_server(client)
        settings = await client.execute("CONFIG", "GET", "appendonly", "appendfsync", "save", "maxmemory*")
        found = dict(zip(settings[::2], settings[1::2], strict=True))
        assert found[b"appendonly"] == b"yes"
        assert found[b"appendfsync"] == b"everysec"
        assert found[b"save"] == b""
        assert found[b"maxmemory"] == b"2147483648"
        assert found[b"maxmemory-policy"] == b"noeviction"
    finally:
        await client.close()
        process.terminate()
        await asyncio.to_thread(process.wait, 10)


async def answers(port: int) -> bool:
    try:
        _, writer = await asyncio.open_connection("127.0.0.1", port)
    except OSError:
        return False
    writer.close()
    await writer.wait_closed()
    return True


def test_both_redis_have_the_same_options() -> None:
    ours, stack = (told["services"]["redis"]["command"] for told in (COMPOSE, STACK))
    options = ours[ours.index("--appendonly") :]
    assert stack[stack.index("--appendonly") : stack.index("--loadmodule")] == options


def test_everything_compose_mounts_or_reads_is_there() -> None:
    for name, service in COMPOSE["services"].items():
        mounted = [volume.split(":")[0] for volume in service.get("volumes", ())]
        for source in [*mounted, *service.get("env_file", ())]:
            is_volume = source in COMPOSE["volumes"]
            assert is_volume or (DOCKER / source).exists(), (name, source)
        assert set(service.get("networks", ())) <= set(COMPOSE["networks"])
        assert set(service.get("depends_on", ())) <= set(COMPOSE["services"])
        assert set(service.get("secrets", ())) <= set(COMPOSE["secrets"])
    build = COMPOSE["services"]["redismem"]["build"]
    assert (DOCKER / build["context"] / build["dockerfile"]).samefile(DOCKER / "Dockerfile")


def test_secrets_stay_out_of_the_repository() -> None:
    ignored = (DOCKER / ".gitignore").read_text().splitlines()
    assert {Path(secret["file"]).parts[0] + "/" for secret in COMPOSE["secrets"].values()} <= set(ignored)


def test_ports_are_open_on_this_machine_only() -> None:
    ports = [port for service in COMPOSE["services"].values() for port in service.get("ports", ())]
    assert ports
    assert all(port.startswith("127.0.0.1:") for port in ports)
    assert "ports" not in COMPOSE["services"]["redis"]


@pytest.mark.parametrize("name", COMPOSE["services"])
def test_a_service_is_confined_and_bounded(name: str) -> None:
    service = COMPOSE["services"][name]
    assert service["read_only"] is True
    assert service["cap_drop"] == ["ALL"]
    assert "cap_add" not in service
    assert service["security_opt"] == ["no-new-privileges:true"]
    assert {"mem_limit", "pids_limit"} <= set(service)
    assert name == "redismem" or "healthcheck" in service


def test_redis_has_room_above_its_maxmemory() -> None:
    service = COMPOSE["services"]["redis"]
    maxmemory = service["command"][service["command"].index("--maxmemory") + 1]
    assert int(service["mem_limit"].removesuffix("g")) >= 2 * int(maxmemory.removesuffix("gb"))


def test_only_the_service_reaches_redis() -> None:
    services = COMPOSE["services"]
    assert {name for name, told in services.items() if "store" in told["networks"]} == {"redis", "redismem"}
    assert services["redis"]["networks"] == ["store"]
    assert COMPOSE["networks"]["store"]["internal"] is True


def test_monitoring_is_wanted_by_name_and_finds_the_service() -> None:
    services = COMPOSE["services"]
    wanted = {name for name, told in services.items() if told.get("profiles") == ["monitoring"]}
    assert wanted == {"prometheus", "grafana"}
    scraped = yaml.safe_load((DOCKER / "prometheus" / "prometheus.yml").read_text())["scrape_configs"][0]
    assert scraped["static_configs"] == [{"targets": ["redismem:8000"]}]
    (secret,) = services["prometheus"]["secrets"]
    assert scraped["authorization"]["credentials_file"] == f"/run/secrets/{secret}"
    provisioning = DOCKER / "grafana" / "provisioning"
    (source,) = yaml.safe_load((provisioning / "datasources" / "prometheus.yaml").read_text())["datasources"]
    assert source["url"] == "http://prometheus:9090"
    (boards,) = yaml.safe_load((provisioning / "dashboards" / "redismem.yaml").read_text())["providers"]
    mounts = dict(volume.split(":")[:2] for volume in services["grafana"]["volumes"])
    assert mounts["./grafana/dashboards"] == boards["options"]["path"]
    home = services["grafana"]["environment"]["GF_DASHBOARDS_DEFAULT_HOME_DASHBOARD_PATH"]
    assert (DOCKER / "grafana" / "dashboards" / Path(home).name).is_file()


def test_settings_of_the_environment_file_exist() -> None:
    lines = (DOCKER / "redismem.env").read_text().splitlines()
    told = dict(line.removeprefix("#").split("=", 1) for line in lines if "=" in line)
    told |= COMPOSE["services"]["redismem"]["environment"]
    assert Settings.from_environment(told).redis_url == "redis://redis:6379/0"
    assert set(told) <= set(Settings().to_environment())
