"""What is done to a PostgreSQL server of a test's own while it is at work."""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal

import psycopg

OURS = "FROM pg_stat_activity WHERE backend_type = 'client backend' AND pid <> pg_backend_pid()"
END_ALL = f"SELECT pg_terminate_backend(pid) {OURS}"


async def end_all(server: str) -> None:
    with psycopg.connect(server, autocommit=True) as outside:
        for _ in range(20):
            outside.execute(END_ALL)
            await asyncio.sleep(0.05)


async def stop_one(server: str) -> None:
    with psycopg.connect(server, autocommit=True) as outside:
        [pid] = outside.execute(f"SELECT pid {OURS} LIMIT 1").fetchone() or []
    os.kill(pid, signal.SIGSTOP)
    await asyncio.sleep(3)
    os.kill(pid, signal.SIGCONT)


async def lock_the_table(server: str) -> None:
    with psycopg.connect(server) as outside:
        # Whoever is writing needs this loop to come to an end.
        await asyncio.to_thread(outside.execute, "LOCK TABLE written")
        await asyncio.sleep(3)


async def take_all_connections(server: str) -> None:
    with contextlib.ExitStack() as held:
        with psycopg.connect(server, autocommit=True) as outside:
            outside.execute(END_ALL)
            with contextlib.suppress(psycopg.OperationalError):
                while True:
                    held.enter_context(psycopg.connect(server))
        await asyncio.sleep(2)


async def crash(server: str) -> None:
    with psycopg.connect(server, autocommit=True) as outside:
        [pid] = outside.execute(f"SELECT pid {OURS} LIMIT 1").fetchone() or []
    os.kill(pid, signal.SIGKILL)
    await asyncio.sleep(2)
