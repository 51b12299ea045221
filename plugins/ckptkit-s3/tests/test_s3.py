"""Checkpoints on a real S3 server, and what happens when it fails."""

from __future__ import annotations

import http.server
import os
import socket
import subprocess
import sys
import threading
import time

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import ckptkit
import ckptkit_s3
from ckptkit import args, errors

TREE = {"a": np.arange(300_000.0), "b": {"c": jnp.ones((3, 4), jnp.bfloat16)}, "n": 3}
FORMATS = {
    "ocdbt": {"use_ocdbt": True},
    "ocdbt-zarr3": {"use_ocdbt": True, "use_zarr3": True},
    "zarr": {"use_ocdbt": False},
    "zarr3": {"use_ocdbt": False, "use_zarr3": True},
}


def assert_same(found, expected):
    assert jax.tree.structure(found) == jax.tree.structure(expected)
    jax.tree.map(np.testing.assert_array_equal, found, expected)


# What is saved is restored.


@pytest.mark.parametrize("options", FORMATS.values(), ids=FORMATS)
def test_every_format_round_trips(registry, url, options):
    with ckptkit.StandardCheckpointer(registry=registry, **options) as checkpointer:
        checkpointer.save(url, TREE)
        assert_same(checkpointer.restore(url), TREE)
        assert checkpointer.metadata(url).item_metadata["a"].shape == (300_000,)


def test_a_composite_of_every_handler_round_trips(registry, url):
    items = {
        "tree": args.StandardSave(TREE),
        "texts": args.PyTreeSave({"a": "text"}),
        "array": args.ArraySave(np.arange(4)),
        "json": args.JsonSave({"a": [1, None]}),
        "key": args.JaxRandomKeySave(jax.random.key(3)),
    }
    with ckptkit.Checkpointer(registry=registry) as checkpointer:
        checkpointer.save(url, args.Composite(**items))
        restored = checkpointer.restore(url)
    assert_same(restored["tree"], TREE)
    assert (restored["texts"], restored["json"]) == ({"a": "text"}, {"a": [1, None]})
    assert_same(restored["array"], np.arange(4))


def test_a_path_that_the_store_does_not_list_is_refused_and_left_empty(registry, url):
    with ckptkit.StandardCheckpointer(registry=registry) as checkpointer:
        with pytest.raises(errors.StorageError, match="does not list what was written there"):
            checkpointer.save(f"{url}/a\\b", TREE)
        with pytest.raises(errors.NotFoundError):
            registry.location(f"{url}/a\\b").read_bytes("ckptkit_writer.txt")


def test_the_environment_tells_the_endpoint(server, url, monkeypatch):
    registry = ckptkit.Registry.with_builtins()
    ckptkit_s3.ckptkit_register(registry)
    monkeypatch.setenv("AWS_ENDPOINT_URL", server.endpoint)
    with ckptkit.StandardCheckpointer(registry=registry) as checkpointer:
        checkpointer.save(url, TREE)
        assert_same(checkpointer.restore(url), TREE)


def test_sharded_arrays_are_restored_from_byte_ranges(registry, url):
    with ckptkit.StandardCheckpointer(registry=registry) as checkpointer:
        checkpointer.save(url, {str(i): np.full(100, i) for i in range(1000)})
        assert_same(checkpointer.restore(url), {str(i): np.full(100, i) for i in range(1000)})


# One of the checkpoints is there, always.


def test_an_existing_checkpoint_is_replaced_only_by_force(registry, url):
    with ckptkit.StandardCheckpointer(registry=registry) as checkpointer:
        checkpointer.save(url, {"a": 1})
        checkpointer.wait_until_finished()
        with pytest.raises(errors.ExistsError):
            checkpointer.save(url, {"a": 2})
        checkpointer.save(url, {"a": 3}, force=True)
        assert checkpointer.restore(url) == {"a": 3}
    assert len(registry.location(url).names()) == 2


def test_without_a_checkpoint_the_error_says_so(registry, url):
    with ckptkit.Checkpointer(registry=registry) as checkpointer:
        with pytest.raises(errors.NotFoundError, match="no checkpoint here"):
            checkpointer.restore(url)
        registry.location(url).write_bytes("_METADATA", b"{}")
        with pytest.raises(errors.IncompleteError):
            checkpointer.restore(url)


def test_of_writers_at_the_same_time_one_wins_and_the_others_are_told(registry, url):
    outcomes = []
    start = threading.Barrier(4)

    def write(i):
        with ckptkit.Checkpointer(ckptkit.StandardCheckpointHandler(), registry=registry) as checkpointer:
            start.wait(30)
            try:
                checkpointer.save(url, {"a": np.full(1000, i)})
                outcomes.append(i)
            except errors.ExistsError:
                outcomes.append(None)

    threads = [threading.Thread(target=write, args=(i,)) for i in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    (winner,) = [outcome for outcome in outcomes if outcome is not None]
    assert len(outcomes) == 4
    with ckptkit.Checkpointer(registry=registry) as checkpointer:
        assert_same(checkpointer.restore(url), {"a": np.full(1000, winner)})


def test_a_checkpoint_is_deleted_with_all_its_files_and_no_others(registry, url):
    with ckptkit.Checkpointer(ckptkit.StandardCheckpointHandler(), registry=registry) as checkpointer:
        for name in (url, f"{url}0"):
            checkpointer.save(name, {"a": 1})
        registry.location(url).delete()
        assert not registry.location(url).exists()
        assert checkpointer.restore(f"{url}0") == {"a": 1}


# Names.


@pytest.mark.parametrize(
    "bad",
    ["s3://bucket", "s3://bucket/", "s3://bucket/a/../../other/x", "s3://bucket/./a", "s3://bucket//a", "s3://", "s3://b_/../x"],
)
def test_urls_that_name_no_folder_of_a_bucket_are_refused(bad):
    with pytest.raises(errors.ArgsError, match="expected s3://bucket/path"):
        ckptkit_s3.S3()(bad)


def test_names_with_dots_never_reach_the_store(registry, url):
    place = registry.location(url)
    for name in ("../x", "a/../../x", "./x", "/x", "a\0b"):
        for use in (place.child, place.read_bytes, place.exists, place.delete, lambda n: place.write_bytes(n, b"")):
            with pytest.raises(errors.FormatError):
                use(name)


@pytest.mark.parametrize("options", [{"endpoint": "localhost:80"}, {"max_retries": -1}, {"max_retries": True}])
def test_options_that_cannot_be_are_refused(options):
    with pytest.raises(errors.ArgsError):
        ckptkit_s3.S3(**options)


# Faults: a typed error in bounded time, and the old checkpoint is whole.


def test_wrong_credentials_are_told(server, registry_at, url, monkeypatch):
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "another")
    registry = registry_at(server.endpoint, region="us-west-1")  # a client of its own: the other has its credentials already
    with ckptkit.StandardCheckpointer(registry=registry) as checkpointer:
        for use in (checkpointer.restore, lambda u: checkpointer.save(u, {"a": 1})):
            with pytest.raises(errors.StorageError, match=r"PERMISSION_DENIED: SignatureDoesNotMatch"):
                use(url)


class Killing(ckptkit.StandardCheckpointHandler):
    """Kills the server once the save has begun, or when everything but the commit is written."""

    def __init__(self, server, when):
        super().__init__()
        self._server = server
        self._when = when

    async def async_save(self, directory, *, args):
        if self._when == "begun":
            (directory / "first").write_bytes(b"1")
            self._server.kill()
        return await super().async_save(directory, args=args)

    def finalize(self, directory):
        self._server.kill()


@pytest.mark.parametrize("when", ["begun", "written"])
@pytest.mark.parametrize(
    "force", [pytest.param(True, id="over an old one"), pytest.param(False, id="first", marks=pytest.mark.slow)]
)
def test_a_server_that_dies_during_a_save_takes_no_checkpoint_with_it(new_server, registry_at, url, when, force):
    server = new_server()
    registry = registry_at(server.endpoint, max_retries=2)
    with ckptkit.StandardCheckpointer(registry=registry) as checkpointer:
        if force:
            checkpointer.save(url, TREE)
    start = time.monotonic()
    killing = ckptkit.Checkpointer(Killing(server, when), registry=registry)
    with killing, pytest.raises(errors.StorageError, match=r"cannot (write|read|list)"):
        killing.save(url, args=args.StandardSave({"a": 1}), force=force)
    assert time.monotonic() - start < 30
    server.start()
    with ckptkit.StandardCheckpointer(registry=registry) as checkpointer:
        if force:
            assert_same(answered(lambda: checkpointer.restore(url)), TREE)
        else:
            with pytest.raises(errors.IncompleteError):
                answered(lambda: checkpointer.restore(url))
        checkpointer.save(url, {"a": 2}, force=force)
        assert checkpointer.restore(url) == {"a": 2}
    assert len(registry.location(url).names()) == 2


def answered(use, deadline_secs=30):
    """What `use` returns once the server has found what it stored before."""
    deadline = time.monotonic() + deadline_secs
    while True:
        try:
            return use()
        except errors.StorageError:
            if time.monotonic() > deadline:
                raise


class _Refusing(http.server.BaseHTTPRequestHandler):
    """Answers every request with one error, and counts them."""

    protocol_version = "HTTP/1.1"

    def _answer(self):
        self.server.count += 1
        self.rfile.read(int(self.headers.get("Content-Length", 0)))
        status, code = self.server.answer
        body = f"<?xml version='1.0'?><Error><Code>{code}</Code><Message>{code}</Message></Error>".encode()
        self.send_response(status)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    do_GET = do_PUT = do_HEAD = do_DELETE = do_POST = _answer  # noqa: N815 - the names that http.server calls

    def log_message(self, *args):
        pass


@pytest.fixture
def refusing():
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), _Refusing)
    server.count = 0
    server.daemon_threads = True
    thread = threading.Thread(target=server.serve_forever, args=(0.05,))
    thread.start()
    yield server
    server.shutdown()
    thread.join()
    server.server_close()


@pytest.mark.parametrize("max_retries", [0, 1, 3])
def test_a_store_that_stays_busy_is_given_up_after_the_retries(refusing, registry_at, url, max_retries):
    refusing.answer = (503, "SlowDown")
    registry = registry_at(f"http://127.0.0.1:{refusing.server_port}", max_retries=max_retries)
    start = time.monotonic()
    with ckptkit.StandardCheckpointer(registry=registry) as checkpointer:
        with pytest.raises(errors.StorageError, match="SlowDown"):
            checkpointer.restore(url)
        assert refusing.count == 1 + max_retries
        with pytest.raises(errors.StorageError, match="SlowDown"):
            checkpointer.save(url, {"a": 1})
    assert time.monotonic() - start < 20


def test_a_bucket_that_is_missing_is_told(refusing, registry_at, url):
    refusing.answer = (404, "NoSuchBucket")
    registry = registry_at(f"http://127.0.0.1:{refusing.server_port}")
    with ckptkit.StandardCheckpointer(registry=registry) as checkpointer:
        for use in (checkpointer.restore, lambda u: checkpointer.save(u, {"a": 1})):
            with pytest.raises(errors.StorageError, match="NoSuchBucket"):
                use(url)


_RESTORE = """
import sys, ckptkit, ckptkit_s3
registry = ckptkit.Registry.with_builtins()
registry.add_scheme("s3", ckptkit_s3.S3(endpoint=sys.argv[1], max_retries=0))
try:
    ckptkit.Checkpointer(registry=registry).restore("s3://bucket/a")
except ckptkit.errors.StorageError as error:
    print(error)
"""


def test_a_server_that_says_nothing_is_given_up():
    with socket.create_server(("127.0.0.1", 0)) as silent:
        command = [sys.executable, "-c", _RESTORE, f"http://127.0.0.1:{silent.getsockname()[1]}"]
        environment = os.environ | {"TENSORSTORE_CURL_LOW_SPEED_TIME_SECONDS": "1"}  # not the 60 s of the package
        done = subprocess.run(command, env=environment, capture_output=True, text=True, check=True, timeout=60)
    assert "Timeout was reached" in done.stdout
