"""A real PostgreSQL server as a child process: a cluster of its own in a folder, on a free loopback port.

It keeps its promises (`fsync` is on), so that what it acknowledged survives a SIGKILL.
"""

from __future__ import annotations

import contextlib
import os
import pwd
import shutil
import signal
import socket
import subprocess
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psutil

START_S_MAX = 60.0
STOP_S_MAX = 30.0
USER = "matcher"
# Where Debian and others put what is not on PATH.
PLACES = ("/usr/lib/postgresql/*/bin", "/usr/pgsql-*/bin", "/usr/local/pgsql/bin")
VERSION_LEAST = 15


class CannotServe(Exception):
    """Why there can be no PostgreSQL server here, in words for the reason of a skipped test."""


class ServerDied(Exception):
    """The server ended, or did not become ready; the message holds the end of its log."""


def programs() -> Path:
    """The folder of the newest PostgreSQL's programs. Raises CannotServe."""
    found = [Path(one).parent for one in (shutil.which("postgres"),) if one]
    found += [folder for place in PLACES for folder in Path("/").glob(place.lstrip("/"))]
    versions = {_version(folder): folder for folder in found if (folder / "postgres").exists()}
    usable = [version for version in versions if version >= VERSION_LEAST]
    if not usable:
        raise CannotServe(f"no PostgreSQL {VERSION_LEAST} or newer is installed; on Debian: apt install postgresql")
    return versions[max(usable)].resolve()


def _version(folder: Path) -> int:
    said = subprocess.run([folder / "postgres", "--version"], capture_output=True, text=True).stdout
    return int(said.split()[2].partition(".")[0]) if said else 0


def _account() -> str | None:
    """PostgreSQL refuses to run as root; then it runs as another account of this machine."""
    if os.geteuid() != 0:
        return None
    for name in ("postgres", "nobody"):
        with contextlib.suppress(KeyError):
            return pwd.getpwnam(name).pw_name
    raise CannotServe("PostgreSQL does not run as root, and there is no account postgres or nobody")


class ServedPostgres:
    """One server over one cluster, which is made at once and removed by `remove`; a standby of another server, if one
    is given, or with `return_to` a copy of it that was made now.

    `kill`, `stop`, `pause` and `resume` act on the server and all processes of its own; the port stays the same over
    restarts, and databases and their content stay too.
    """

    def __init__(self, *settings: str, standby_of: ServedPostgres | None = None) -> None:
        self._programs = programs()
        self._account = _account()
        # Not in the folder of a test: that is closed to other accounts.
        self.folder = Path(tempfile.mkdtemp(prefix="matcher-postgres-"))
        self.log_file = self.folder / "server.log"
        self._data = self.folder / "data"
        self._settings = settings
        self._process: subprocess.Popen[bytes] | None = None
        with socket.socket() as listener:
            listener.bind(("127.0.0.1", 0))
            self.port: int = listener.getsockname()[1]
        try:
            self._make(standby_of)
        except BaseException:
            self.remove()
            raise

    def _make(self, standby_of: ServedPostgres | None) -> None:
        if self._account is not None:
            shutil.chown(self.folder, self._account)
        if standby_of is None:
            command: list[str | Path] = [self._programs / "initdb", "-D", self._data, "-U", USER, "--auth=trust"]
            # A collation that orders otherwise than bytes do: what relies on byte order must say so itself.
            command += ["--encoding=UTF8", "--locale-provider=icu", "--icu-locale=en", "--locale=C.UTF-8"]
            # A cluster without content: only what is written to it later must outlast anything.
            command += ["--no-sync"]
        else:
            command = [self._programs / "pg_basebackup", "-d", standby_of.url("postgres"), "-D", self._data]
            command += ["--write-recovery-conf", "--checkpoint=fast", "--no-sync"]
        done = subprocess.run(command, cwd=self.folder, user=self._account, capture_output=True, text=True)
        if done.returncode != 0:
            raise CannotServe(f"{command[0]} failed: {done.stderr.strip().splitlines()[-1]}")

    def url(self, database: str) -> str:
        return f"postgresql://{USER}@127.0.0.1:{self.port}/{database}"

    def start(self, *more: str) -> None:
        """Start, this time with `more` settings, and return once it answers. Raises ServerDied."""
        settings = (
            "fsync=on",
            "listen_addresses=127.0.0.1",
            f"port={self.port}",
            f"unix_socket_directories={self.folder}",
            "max_connections=60",
            "shared_buffers=64MB",
            *self._settings,
            *more,
        )
        command = [self._programs / "postgres", "-D", self._data, *(part for one in settings for part in ("-c", one))]
        until = time.monotonic() + START_S_MAX
        while True:
            with self.log_file.open("ab") as log:
                self._process = subprocess.Popen(
                    command, cwd=self.folder, user=self._account, stdin=subprocess.DEVNULL, stdout=log, stderr=log
                )
            while self._process.poll() is None and time.monotonic() < until:
                if self._answers():
                    return
                time.sleep(0.02)
            # After a kill, processes of the old server may still hold its shared memory for a moment.
            if time.monotonic() > until:
                self.kill()
                raise ServerDied(f"the server is not ready:\n{self.log_tail()}")
            time.sleep(0.05)

    def archive(self) -> Path:
        """From now on keep the write-ahead log in the folder that is returned; needs the setting archive_mode=on."""
        folder = self.folder / "archive"
        folder.mkdir()
        if self._account is not None:
            shutil.chown(folder, self._account)
        self.ask(f"ALTER SYSTEM SET archive_command = 'cp %p {folder}/%f'")
        self.ask("SELECT pg_reload_conf()")
        return folder

    def archive_now(self) -> None:
        """Return once the archive holds all that was written. Raises ServerDied."""
        ((last,),) = self.ask("SELECT pg_walfile_name(pg_switch_wal())")
        until = time.monotonic() + START_S_MAX
        while (self.ask("SELECT last_archived_wal FROM pg_stat_archiver")[0][0] or "") < last:
            if time.monotonic() > until:
                raise ServerDied(f"the write-ahead log is not archived:\n{self.log_tail()}")
            time.sleep(0.02)

    def return_to(self, moment: str, archive: Path) -> None:
        """Start as the copy of a server that archives its log, brought to this moment (of the server's own clock), and
        return once it takes writes. Raises ServerDied."""
        (self._data / "standby.signal").rename(self._data / "recovery.signal")
        self.start(
            f"restore_command=cp {archive}/%f %p",
            f"recovery_target_time={moment}",
            "recovery_target_action=promote",
        )
        until = time.monotonic() + START_S_MAX
        while self.ask("SELECT pg_is_in_recovery()")[0][0]:
            if time.monotonic() > until:
                raise ServerDied(f"the server is still in recovery:\n{self.log_tail()}")
            time.sleep(0.02)

    def _answers(self) -> bool:
        asked = [self._programs / "pg_isready", "-q", "-h", "127.0.0.1", "-p", str(self.port)]
        return subprocess.run(asked).returncode == 0

    def create(self, database: str) -> str:
        """Make a database, in the collation of a language; returns its URL."""
        self.ask(f'CREATE DATABASE "{database}"')
        return self.url(database)

    def drop(self, database: str) -> None:
        """Remove a database, whoever is connected to it."""
        self.ask(f'DROP DATABASE IF EXISTS "{database}" WITH (FORCE)')

    def ask(self, statement: str) -> list[tuple[Any, ...]]:
        """Run a statement as the server's superuser; its rows, if it has some."""
        import psycopg

        with psycopg.connect(self.url("postgres"), autocommit=True) as connection:
            cursor = connection.execute(statement.encode())
            return cursor.fetchall() if cursor.description else []

    def log_tail(self, lines: int = 40) -> str:
        return "\n".join(self.log_file.read_text(errors="replace").splitlines()[-lines:])

    def _processes(self) -> list[psutil.Process]:
        if self._process is None or self._process.poll() is not None:
            return []
        server = psutil.Process(self._process.pid)
        return [server, *server.children(recursive=True)]

    def _send(self, which: signal.Signals) -> None:
        for process in self._processes():
            with contextlib.suppress(psutil.NoSuchProcess):
                process.send_signal(which)

    def pause(self) -> None:
        self._send(signal.SIGSTOP)

    def resume(self) -> None:
        self._send(signal.SIGCONT)

    def kill(self) -> None:
        """At once and all of it, as a power cut; repeatable."""
        self._send(signal.SIGKILL)
        if self._process is not None:
            self._process.wait()
            self._process = None

    def stop(self) -> None:
        """In order, ending the connections of clients; repeatable."""
        if self._process is not None and self._process.poll() is None:
            self._process.send_signal(signal.SIGINT)
            with contextlib.suppress(subprocess.TimeoutExpired):
                self._process.wait(STOP_S_MAX)
        self.kill()

    def remove(self) -> None:
        self.kill()
        shutil.rmtree(self.folder, ignore_errors=True)


@contextlib.contextmanager
def served_postgres(*settings: str) -> Iterator[ServedPostgres]:
    """A server for as long as the context lasts; `settings` such as "synchronous_commit=off". Raises CannotServe."""
    served = ServedPostgres(*settings)
    try:
        served.start()
        yield served
    finally:
        served.remove()
