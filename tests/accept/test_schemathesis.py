"""The running service keeps every promise of its own /openapi.json."""

from __future__ import annotations

import asyncio
import os
import socket
import subprocess
import sys
from pathlib import Path

import httpx
import pytest

from tests.conftest import until

HERE = Path(__file__).parent
PHASES = "examples,fuzzing,stateful"  # the coverage phase takes minutes for the list's parameters


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


@pytest.mark.accept
async def test_schemathesis_finds_nothing(tmp_path: Path) -> None:
    port = free_port()
    url = f"http://127.0.0.1:{port}"
    environment = {**os.environ, "REDISMEM_EMBEDDER": "deterministic", "REDISMEM_TESTING": "1"}
    command = [sys.executable, "-m", "redismem", "serve", "--port", str(port)]
    server = subprocess.Popen([*command, "--data-dir", str(tmp_path / "data")], env=environment)
    try:
        async with httpx.AsyncClient(base_url=url) as client:

            async def ready() -> bool:
                try:
                    return (await client.get("/health/ready")).status_code == 200
                except httpx.TransportError:
                    return False

            await until("the service is ready", ready, 30)
        checks = await asyncio.create_subprocess_exec(
            *(
                str(Path(sys.executable).with_name("schemathesis")),
                "--config-file",
                HERE / "schemathesis.toml",
            ),
            *("run", f"{url}/openapi.json", "--phases", PHASES),
            *("--max-examples", "8", "--seed", "7", "--no-color"),
            cwd=tmp_path,
            env=environment | {"SCHEMATHESIS_HOOKS": "schemathesis_hooks", "PYTHONPATH": str(HERE)},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
        )
        output, _ = await asyncio.wait_for(checks.communicate(), 300)
        assert checks.returncode == 0, output.decode()[-6000:]
    finally:
        server.terminate()
        server.wait(20)
