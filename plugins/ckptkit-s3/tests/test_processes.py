"""Two real processes that save one checkpoint to an S3 server."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

import ckptkit

pytestmark = pytest.mark.slow


def played(port, url, *options, **environment):
    """What each of two processes printed last."""
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(path for path in sys.path if path), **environment}
    environment.pop("XLA_FLAGS", None)  # the count of devices of this process
    script = str(Path(__file__).with_name("process.py"))
    processes = [
        subprocess.Popen(
            [sys.executable, "-W", "ignore", script, str(rank), str(port), url, *options],
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            env=environment,
            text=True,
        )
        for rank in range(2)
    ]
    try:
        return [json.loads(process.communicate(timeout=120)[0].splitlines()[-1]) for process in processes]
    finally:
        for process in processes:
            process.kill()
            process.wait()


def test_several_processes_save_and_restore_one_checkpoint(server, registry, url, port):
    assert played(port, url, "well", AWS_ENDPOINT_URL_S3=server.endpoint) == [[2, True]] * 2
    assert ckptkit.verify(url, registry=registry).state == "whole"
    place = registry.location(url)
    (folder,) = (name for name, is_directory in place.names().items() if is_directory)  # the second save's, the first one is gone
    assert {"ocdbt.process_0", "ocdbt.process_1", "manifest.ocdbt"} <= set(place.child(folder).names())
    assert not [name for name in place.files() if "mark" in name or "index.process" in name]


def test_a_save_that_the_processes_do_not_agree_on_leaves_the_old_checkpoint(server, registry, url, port):
    found = played(port, url, "fails", AWS_ENDPOINT_URL_S3=server.endpoint)
    assert [kind for kind, _ in found] == ["ProcessError"] * 2
    assert all("first difference: leaf ('step',)" in text for _, text in found)
    assert ckptkit.verify(url, registry=registry).state == "whole"


def test_a_place_in_the_memory_of_each_process_is_recognised_as_not_shared(port):
    found = played(port, "memory://own/step", "well")
    assert [kind for kind, _ in found] == ["StorageError"] * 2
    assert all("share no storage" in text for _, text in found)
