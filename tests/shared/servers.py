"""Servers of a test's own on the loopback: PostgreSQL from Debian's package, and MLflow before it."""

from __future__ import annotations

import os
import shutil
import signal
import socket
import subprocess
import sys
import time
import urllib.request
from pathlib import Path

PASSWORD = "open-sesame"


def postgresql_programs() -> Path | None:
    """The folder of the newest PostgreSQL that Debian's package `postgresql` installed."""
    found = sorted(Path("/usr/lib/postgresql").glob("*/bin/initdb"), key=lambda path: int(path.parts[-3]))
    return found[-1].parent if found else None


class Cluster:
    """A PostgreSQL of its own, with one user and one database, which a stop does not lose.

    Args:
        programs: where `initdb` and `postgres` are.
        folder: for its files; it must be one that other users can reach, as PostgreSQL refuses to run as root.
    """

    def __init__(self, programs: Path, folder: Path) -> None:
        self._programs, self._folder, self._port = programs, folder, free_port()
        self._as: dict[str, object] = {"cwd": folder}
        if os.geteuid() == 0:
            shutil.chown(folder, "postgres", "postgres")
            self._as |= {"user": "postgres", "group": "postgres", "extra_groups": []}
        (folder / "password").write_text(PASSWORD)
        words = ["-D", "data", "-U", "keeper", "--auth=scram-sha-256", "--pwfile=password", "--no-sync"]
        subprocess.run(
            [programs / "initdb", *words, "--no-locale", "--encoding=UTF8"],
            check=True,
            stdout=subprocess.DEVNULL,
            **self._as,
        )
        self._process: subprocess.Popen[bytes] | None = None
        # The driver of this URI is named: which one a bare postgresql:// means differs between versions of SQLAlchemy.
        self.uri = f"postgresql+psycopg2://keeper:{PASSWORD}@127.0.0.1:{self._port}/postgres"

    def start(self) -> None:
        """Start it, and wait until it lets us in."""
        import psycopg2

        words = ["-D", "data", "-k", "", "-h", "127.0.0.1", "-p", str(self._port), "-F"]
        with (self._folder / "log").open("ab") as log:
            self._process = subprocess.Popen([self._programs / "postgres", *words], stderr=log, **self._as)
        deadline = time.monotonic() + 60
        while True:
            try:
                psycopg2.connect(self.uri.replace("+psycopg2", "")).close()
                return
            except psycopg2.OperationalError:
                if time.monotonic() > deadline:
                    raise
                time.sleep(0.05)

    def database(self, name: str) -> str:
        """Make another database, which is empty; returns its URI."""
        import psycopg2

        connection = psycopg2.connect(self.uri.replace("+psycopg2", ""))
        connection.autocommit = True
        connection.cursor().execute(f"CREATE DATABASE {name}")
        connection.close()
        return self.uri.removesuffix("postgres") + name

    def stop(self) -> None:
        """Stop it at once; whoever is connected is thrown out."""
        if self._process is not None:
            self._process.send_signal(signal.SIGINT)
            self._process.wait(60)
            self._process = None


class MlflowServer:
    """A real `mlflow server`.

    Args:
        store: the URI of its database.
        artifacts: the folder that it keeps artifacts in.
        log: the file for what it says.
    """

    def __init__(self, store: str, artifacts: Path, log: Path) -> None:
        self._port, self._log = free_port(), log
        words = ["--backend-store-uri", store, "--artifacts-destination", str(artifacts), "--workers", "1"]
        self._command = [sys.executable, "-m", "mlflow", "server", *words, "--host", "127.0.0.1", "--port"]
        self._process: subprocess.Popen[bytes] | None = None
        self.uri = f"http://127.0.0.1:{self._port}"

    def start(self) -> None:
        """Start it, and wait until it answers."""
        with self._log.open("ab") as log:
            self._process = subprocess.Popen(
                [*self._command, str(self._port)],
                stdout=log,
                stderr=log,
                env={**os.environ, "MLFLOW_DISABLE_TELEMETRY": "true", "MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false"},
                start_new_session=True,
            )
        deadline = time.monotonic() + 120
        while True:
            try:
                with urllib.request.urlopen(f"{self.uri}/health", timeout=5):
                    return
            except OSError:
                if time.monotonic() > deadline or self._process.poll() is not None:
                    raise
                time.sleep(0.1)

    def stop(self) -> None:
        """Kill it and its workers, in the middle of whatever they do."""
        if self._process is not None:
            os.killpg(self._process.pid, signal.SIGKILL)
            self._process.wait(60)
            self._process = None


def free_port() -> int:
    """A port of the loopback that nobody listens on."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return int(free.getsockname()[1])
