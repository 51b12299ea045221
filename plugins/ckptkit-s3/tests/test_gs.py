"""Checkpoints on Google Cloud Storage, as a strict fake of it on loopback sees them."""

from __future__ import annotations

import base64
import http.server
import json
import threading
import time
import urllib.parse
import uuid

import numpy as np
import pytest

import ckptkit
import ckptkit_s3
from ckptkit import args, errors
from ckptkit.testing import StorageBackendTests

_PAGE = 3


class FakeGcs(http.server.ThreadingHTTPServer):
    """A strict little Google Cloud Storage: uploads with conditions, ranges, listing in pages, deletion.

    What it does not know it refuses, so that no test passes because a condition was ignored. It has one bucket, 'bucket';
    `objects` maps names to (generation, content); each of `failures` is the status of one answer.
    """

    daemon_threads = True

    def __init__(self):
        super().__init__(("127.0.0.1", 0), _Handler)
        self.objects = {}
        self.generation = 0
        self.lock = threading.Lock()
        self.failures = []
        self.url = f"http://127.0.0.1:{self.server_port}"


class _Handler(http.server.BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True  # or each answer waits 40 ms for the rest of it

    def log_message(self, *args):
        pass

    def _reply(self, status, body=b"", **headers):
        self.send_response(status)
        self.send_header("Content-Length", str(len(body)))
        for name, value in headers.items():
            self.send_header(name.replace("_", "-"), value)
        self.end_headers()
        self.wfile.write(body)

    def _error(self, status, message):
        self._reply(status, json.dumps({"error": {"code": status, "message": message}}).encode(), Content_Type="application/json")

    def _serve(self):
        body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
        url = urllib.parse.urlsplit(self.path)
        query = {k: v[0] for k, v in urllib.parse.parse_qs(url.query, keep_blank_values=True).items()}
        parts = [urllib.parse.unquote(part) for part in url.path.strip("/").split("/")]
        with self.server.lock:
            if self.server.failures:
                self._error(self.server.failures.pop(), "try again")
                return
            match [self.command, *parts]:
                case ["POST", "upload", "storage", "v1", "b", "bucket", "o"]:
                    self._upload(query, body)
                case ["GET", "storage", "v1", "b", "bucket", "o"]:
                    self._list(query)
                case [("GET" | "DELETE") as method, "storage", "v1", "b", "bucket", "o", name]:
                    (self._read if method == "GET" else self._delete)(name, query)
                case [_, *_, "b", bucket, "o"] | [_, *_, "b", bucket, "o", _] if bucket != "bucket":
                    self._error(404, f"The specified bucket does not exist: {bucket}.")
                case _:
                    self._error(501, f"{self.command} {self.path} is not known here.")

    do_GET = do_POST = do_DELETE = _serve  # noqa: N815 - the names that http.server calls

    def _refuse_unknown(self, query, *known):
        unknown = set(query) - {*known, "tensorstore"}  # what TensorStore adds against caches
        if unknown:
            self._error(501, f"{sorted(unknown)} is not known here.")
        return bool(unknown)

    def _condition_fails(self, name, query):
        wanted = query.get("ifGenerationMatch")
        return wanted is not None and int(wanted) != self.server.objects.get(name, (0, b""))[0]

    def _upload(self, query, body):
        if self._refuse_unknown(query, "uploadType", "name", "ifGenerationMatch"):
            return
        if query["uploadType"] != "media":
            self._error(501, "uploads of one kind only")
        elif self._condition_fails(query["name"], query):
            self._error(412, "conditionNotMet")
        else:
            self.server.generation += 1
            self.server.objects[query["name"]] = (self.server.generation, body)
            self._reply(200, self._described(query["name"]), Content_Type="application/json")

    def _described(self, name):
        generation, content = self.server.objects[name]
        return json.dumps({"name": name, "generation": str(generation), "size": str(len(content))}).encode()

    def _read(self, name, query):
        if self._refuse_unknown(query, "alt", "ifGenerationMatch", "ifGenerationNotMatch"):
            return
        if name not in self.server.objects:
            self._error(404, f"No such object: bucket/{name}")
            return
        generation, content = self.server.objects[name]
        stamp = {"X_Goog_Generation": str(generation)}
        if query.get("ifGenerationNotMatch") == str(generation):
            self._reply(304, **stamp)
        elif self._condition_fails(name, query):
            self._error(412, "conditionNotMet")
        elif query.get("alt") != "media":
            self._reply(200, self._described(name), Content_Type="application/json")
        elif (wanted := self.headers.get("Range")) is None:
            self._reply(200, content, **stamp)
        else:
            first, last = wanted.removeprefix("bytes=").split("-")
            begin = int(first) if first else max(0, len(content) - int(last))
            end = min(int(last) + 1, len(content)) if first and last else len(content)
            if begin >= end:
                self._error(416, "The requested range cannot be satisfied.")
            else:
                self._reply(206, content[begin:end], Content_Range=f"bytes {begin}-{end - 1}/{len(content)}", **stamp)

    def _delete(self, name, query):
        if self._refuse_unknown(query, "ifGenerationMatch"):
            return
        if self._condition_fails(name, query):
            self._error(412, "conditionNotMet")
        elif self.server.objects.pop(name, None) is None:
            self._error(404, f"No such object: bucket/{name}")
        else:
            self._reply(204)

    def _list(self, query):
        if self._refuse_unknown(query, "prefix", "startOffset", "endOffset", "pageToken", "maxResults"):
            return
        names = sorted(name for name in self.server.objects if name.startswith(query.get("prefix", "")))
        last = base64.urlsafe_b64decode(query.get("pageToken", "")).decode()
        names = [name for name in names if name >= query.get("startOffset", "") and name > last]
        if "endOffset" in query:
            names = [name for name in names if name < query["endOffset"]]
        items = [{"name": name, "generation": str(self.server.objects[name][0])} for name in names[:_PAGE]]
        more = {}
        if len(names) > _PAGE:  # in ASCII, as Google's tokens are: TensorStore aborts the process over any other
            more["nextPageToken"] = base64.urlsafe_b64encode(names[_PAGE - 1].encode()).decode()
        self._reply(200, json.dumps({"items": items, **more}).encode(), Content_Type="application/json")


@pytest.fixture(scope="module")
def server():
    server = FakeGcs()
    thread = threading.Thread(target=server.serve_forever, args=(0.05,))
    thread.start()
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TENSORSTORE_GCS_HTTP_URL", server.url)  # read once in a process
        patch.setenv("GCE_METADATA_ROOT", "127.0.0.1:1")  # nobody there gives credentials
        patch.delenv("GOOGLE_APPLICATION_CREDENTIALS", raising=False)
        yield server
    server.shutdown()
    thread.join()
    server.server_close()


@pytest.fixture
def registry(server):
    registry = ckptkit.Registry.with_builtins()
    ckptkit_s3.ckptkit_register(registry)
    registry.add_scheme("gs", ckptkit_s3.GoogleStorage(max_retries=2), override=True)
    return registry


@pytest.fixture
def url():
    return f"gs://bucket/{uuid.uuid4().hex}"


def names_below(server, url):
    prefix = url.removeprefix("gs://bucket/") + "/"
    return sorted(name.removeprefix(prefix) for name in server.objects if name.startswith(prefix))


@pytest.mark.parametrize("use_zarr3", [False, True])
@pytest.mark.parametrize("storage", ["ocdbt", "zarr"])
def test_every_format_round_trips(registry, url, storage, use_zarr3):
    tree = {"a": np.arange(3000.0), **{str(i): i for i in range(5)}}
    with ckptkit.StandardCheckpointer(registry=registry, storage=storage, use_zarr3=use_zarr3) as checkpointer:
        checkpointer.save(url, tree)
        restored = checkpointer.restore(url)
    np.testing.assert_array_equal(restored.pop("a"), tree.pop("a"))
    assert restored == tree


def test_the_files_lie_where_orbax_looks_for_them(server, registry, url):
    with ckptkit.StandardCheckpointer(registry=registry) as checkpointer:
        checkpointer.save(url, {"a": np.arange(3)})
    names = names_below(server, url)
    assert {"_CHECKPOINT_METADATA", "_METADATA", "_sharding", "commit_success.txt", "manifest.ocdbt"} < set(names)
    assert "ckptkit_writer.txt" not in names


def test_the_commit_file_is_the_last_to_be_written(server, registry, url):
    with ckptkit.StandardCheckpointer(registry=registry) as checkpointer:
        checkpointer.save(url, {"a": np.arange(3)})
    prefix = url.removeprefix("gs://bucket/")
    newest = max((generation, name) for name, (generation, _) in server.objects.items() if name.startswith(prefix))
    assert newest[1] == f"{prefix}/commit_success.txt"


def test_the_old_checkpoint_is_there_until_the_new_one_is_committed(server, registry, url):
    class Looking(ckptkit.StandardCheckpointHandler):
        def finalize(self, directory):
            with ckptkit.Checkpointer(registry=registry) as other:
                assert other.restore(url) == {"a": 1}

    with ckptkit.Checkpointer(Looking(), registry=registry) as checkpointer:
        ckptkit.Checkpointer(ckptkit.StandardCheckpointHandler(), registry=registry).save(url, {"a": 1})
        checkpointer.save(url, args=args.StandardSave({"a": 2}), force=True)
        assert checkpointer.restore(url) == {"a": 2}
    tops = {name.split("/")[0] for name in names_below(server, url)}
    assert len(tops) == 2


def test_of_two_writers_one_wins(server, registry, url):
    class Overtaken(ckptkit.StandardCheckpointHandler):
        def finalize(self, directory):
            ckptkit.Checkpointer(ckptkit.StandardCheckpointHandler(), registry=registry).save(url, {"a": 1})

    with ckptkit.Checkpointer(Overtaken(), registry=registry) as checkpointer:
        with pytest.raises(errors.ExistsError):
            checkpointer.save(url, args=args.StandardSave({"a": 2}))
        assert checkpointer.restore(url) == {"a": 1}
    assert {name.split("/")[0][:8] for name in names_below(server, url)} == {"ckptkit-", "commit_s"}


def test_a_few_errors_that_pass_are_not_noticed_and_many_are_told(server, registry, url):
    with ckptkit.StandardCheckpointer(registry=registry) as checkpointer:
        server.failures[:] = [503, 503]
        checkpointer.save(url, {"a": 1})
        checkpointer.wait_until_finished()
        start = time.monotonic()
        server.failures[:] = [503] * 100
        try:
            with pytest.raises(errors.StorageError, match="try again"):
                checkpointer.restore(url)
        finally:
            server.failures.clear()
        assert time.monotonic() - start < 20
        assert checkpointer.restore(url) == {"a": 1}


def test_a_missing_bucket_is_told(registry):
    with ckptkit.StandardCheckpointer(registry=registry) as checkpointer:
        with pytest.raises(errors.StorageError, match="bucket does not exist"):
            checkpointer.save("gs://nobucket/a", {"a": 1})
        with pytest.raises(errors.NotFoundError, match="no checkpoint here"):
            checkpointer.restore("gs://nobucket/a")


@pytest.mark.parametrize("bad", ["gs://bucket", "gs://bucket/../other/a", "gs://bucket//a", "s3://bucket/a"])
def test_urls_that_name_no_folder_of_a_bucket_are_refused(bad):
    with pytest.raises(errors.ArgsError, match="expected gs://bucket/path"):
        ckptkit_s3.GoogleStorage()(bad)


@pytest.mark.slow
class TestStorage(StorageBackendTests):
    many = 500  # each is an object in zarr

    @pytest.fixture(params=["ocdbt", "zarr"])
    def backend(self, registry, request):
        return registry.storage(request.param)
