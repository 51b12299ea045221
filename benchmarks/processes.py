"""Measures what several processes cost: saves and restores of real jobs, meetings on a real coordination service, merges.

    python benchmarks/processes.py                              # 1 to 8 processes, 1,000 leaves of 16 KB, beside Orbax
    python benchmarks/processes.py --processes 4 --leaves 100 --kilobytes 4096
    python benchmarks/processes.py --parts meetings,merge       # the constants of the model in docs/scaling.md

A job is started for each number of processes, on loopback, with two CPU devices in each; every leaf is a float32 matrix whose
rows lie on all devices. The best of three rounds counts. A meeting is played by threads of one process, each with a client of
its own, at JAX's own service: it shows what the service and the protocol cost, not the network.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import shutil
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

COLUMNS = ("block", "save", "restore")
MEASURED = "measured: "


def free_port() -> int:
    """A port that was free a moment ago."""
    with contextlib.closing(socket.socket()) as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def job(rank: int, count: int, port: int, options: argparse.Namespace, folder: str) -> None:
    """One process: saves and restores with each program; process 0 prints the seconds of the best round."""
    import jax

    jax.config.update("jax_num_cpu_devices", 2)
    jax.config.update("jax_cpu_collectives_implementation", "gloo")
    if count > 1:
        jax.distributed.initialize(f"127.0.0.1:{port}", count, rank)
    tree = tree_of(options.leaves, options.kilobytes * 1024)
    target = {name: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=leaf.sharding) for name, leaf in tree.items()}
    for program in options.programs.split(","):
        rounds = [one_round(program, os.path.join(folder, f"{program}{i}"), tree, target) for i in range(options.rounds)]
        if rank == 0:
            best = {column: min(seconds[column] for seconds in rounds) for column in COLUMNS}
            print(MEASURED + json.dumps([program, best]), flush=True)


def tree_of(leaves: int, byte_count: int) -> dict[str, Any]:
    """Matrices whose rows lie on all devices of all processes."""
    import jax
    from jax.sharding import Mesh, NamedSharding, PartitionSpec

    rows = NamedSharding(Mesh(np.array(jax.devices()), ("x",)), PartitionSpec("x"))
    value = np.random.default_rng(0).standard_normal((64, byte_count // 256), np.float32)
    return {f"leaf{i}": jax.make_array_from_callback(value.shape, rows, lambda index: value[index]) for i in range(leaves)}


def one_round(program: str, path: str, tree: Any, target: Any) -> dict[str, float]:
    """Seconds until the caller may go on, until the checkpoint is there, and of a restore."""
    import jax

    if program == "ckptkit":
        from ckptkit import StandardCheckpointer as Checkpointer
    else:
        from orbax.checkpoint import StandardCheckpointer as Checkpointer
    with Checkpointer() as checkpointer:
        start = time.perf_counter()
        checkpointer.save(path, tree)
        block = time.perf_counter() - start
        checkpointer.wait_until_finished()
        save = time.perf_counter() - start
        start = time.perf_counter()
        jax.block_until_ready(checkpointer.restore(path, target))
        return {"block": block, "save": save, "restore": time.perf_counter() - start}


def run_job(count: int, options: argparse.Namespace) -> dict[str, dict[str, float]]:
    """What a job of `count` processes measured, by program."""
    folder, port = tempfile.mkdtemp(prefix="ckptkit-processes-"), free_port()
    environment = {**os.environ, "JAX_PLATFORMS": "cpu"}
    environment.pop("XLA_FLAGS", None)
    processes = []
    try:
        for rank in range(count):
            command = [sys.executable, "-W", "ignore", __file__, *sys.argv[1:], "--as", f"{rank},{count},{port},{folder}"]
            processes.append(
                subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, env=environment, text=True)
            )
        outputs = [process.communicate(timeout=options.timeout_secs)[0] for process in processes]
        if any(process.returncode for process in processes):
            raise SystemExit(f"a process of the job failed: exit codes {[process.returncode for process in processes]}")
        lines = [line for line in outputs[0].splitlines() if line.startswith(MEASURED)]  # other libraries print too
        return dict(json.loads(line.removeprefix(MEASURED)) for line in lines)
    finally:
        for process in processes:
            process.kill()
            process.wait()
        shutil.rmtree(folder, ignore_errors=True)


def print_saves(options: argparse.Namespace) -> None:
    """Seconds of saves and restores, by number of processes and program."""
    print(f"{options.leaves:,} leaves of {options.kilobytes:,} KB; seconds, and how many times as long as ckptkit")
    print(f"{'processes':>9}  {'program':8}" + "".join(f"{column:>18}" for column in COLUMNS))
    for count in map(int, options.processes.split(",")):
        found = run_job(count, options)
        for program, seconds in found.items():
            ours = found.get("ckptkit", seconds)
            cells = [f"{seconds[column]:10.3f} ({seconds[column] / ours[column]:5.1f})" for column in COLUMNS]
            print(f"{count:9}  {program:8}" + "".join(f"{cell:>18}" for cell in cells), flush=True)


def print_meetings(options: argparse.Namespace) -> None:
    """Seconds that the points of one save take, by number of processes."""
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "1")  # each client says when it leaves
    from jaxlib import _jax

    from ckptkit import meeting
    from ckptkit.processes import Job

    print(f"{'processes':>9}{'seconds a save':>18}{'us a process':>16}")
    for count in map(int, options.meetings.split(",")):
        address = f"127.0.0.1:{free_port()}"
        service = _jax.get_distributed_runtime_service(address, count)
        clients = [_jax.get_distributed_runtime_client(address, rank, use_compression=True) for rank in range(count)]
        in_threads([client.connect for client in clients])
        own = threading.local()
        meeting.coordination_client = lambda own=own: own.client
        processes = tuple(range(count))

        def save(rank: int, clients: Any = clients, own: Any = own, processes: Any = processes, address: str = address) -> None:
            own.client = clients[rank]
            # Threads share what a process knows of its saves, so that each makes its meeting itself.
            meet = meeting.Meeting(Job(rank, processes), f"ckptkit/{address}/1")
            for point in ("begin", "tree"):
                meet.agree(point, {"path": "a path of usual length" * 4})
                meet.tell(point, b"word") if rank == 0 else meet.hear(point)
            meet.gather("chunks")
            meet.gather("written")
            meet.tell("committed") if rank == 0 else meet.hear("committed")
            meet.end()

        start = time.perf_counter()
        in_threads([lambda rank=rank: save(rank) for rank in range(count)])
        seconds = time.perf_counter() - start
        print(f"{count:9}{seconds:18.3f}{seconds / count * 1e6:16.0f}", flush=True)
        in_threads([client.shutdown for client in clients])
        service.shutdown()


def in_threads(calls: list[Callable[[], Any]]) -> None:
    """Makes all calls at once, and waits for all."""
    threads = [threading.Thread(target=call) for call in calls]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()


def print_merge(options: argparse.Namespace) -> None:
    """Seconds to merge what 16 processes wrote of arrays of one chunk a process, by number of arrays."""
    from ckptkit.grid import ArraySpec, Chunk
    from ckptkit.location import FileLocation
    from ckptkit.options import StorageOptions
    from ckptkit.processes import Job
    from ckptkit.storage.ocdbt import OcdbtBackend

    count, backend = 16, OcdbtBackend()
    print(f"{'keys':>9}{'seconds':>12}{'us a key':>12}")
    for arrays in map(int, options.arrays.split(",")):
        folder = tempfile.mkdtemp(prefix="ckptkit-merge-")
        specs = [ArraySpec(f"layer{i}.kernel", (count, 128), np.dtype(np.float32), (1, 128)) for i in range(arrays)]
        data = np.ones((1, 128), np.float32)
        for rank in range(count):
            job = Job(rank, tuple(range(count)))
            writer = backend.writer(FileLocation(folder), specs, StorageOptions(), job)
            writer.write([Chunk(spec, ((rank, rank + 1), (0, 128)), data) for spec in specs])
            writer.commit()
        start = time.perf_counter()
        backend.merge(FileLocation(folder), range(count))
        seconds = time.perf_counter() - start
        keys = arrays * (count + 1)
        print(f"{keys:9,}{seconds:12.3f}{seconds / keys * 1e6:12.2f}", flush=True)
        shutil.rmtree(folder)


PARTS = {"saves": print_saves, "meetings": print_meetings, "merge": print_merge}


def main() -> None:
    """Runs what the command line says."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--parts", default="saves", help=f"some of {', '.join(PARTS)}")
    parser.add_argument("--processes", default="1,2,4,8", help="numbers of processes of the jobs")
    parser.add_argument("--programs", default="ckptkit,orbax", help="who saves")
    parser.add_argument("--leaves", type=int, default=1000)
    parser.add_argument("--kilobytes", type=int, default=16, help="size of a leaf")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--timeout-secs", type=float, default=600, help="for one job")
    parser.add_argument("--meetings", default="2,8,32,128", help="numbers of processes that meet")
    parser.add_argument("--arrays", default="100,1000,10000", help="numbers of arrays that are merged")
    parser.add_argument("--as", dest="role", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.role:
        rank, count, port, folder = options.role.split(",")
        job(int(rank), int(count), int(port), options, str(Path(folder)))
        return
    for part in options.parts.split(","):
        PARTS[part](options)


if __name__ == "__main__":
    main()
