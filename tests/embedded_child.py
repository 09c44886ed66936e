"""A process that owns an embedded Redis until somebody ends it: `python embedded_child.py DATA_DIR`.

Prints the server's process id when it is ready.
"""

from __future__ import annotations

import asyncio
import sys
from pathlib import Path

from redismem.embedded import EmbeddedRedis


async def main() -> None:
    async with EmbeddedRedis(Path(sys.argv[1])) as redis:
        print(redis.pid, flush=True)
        await asyncio.Event().wait()


asyncio.run(main())
