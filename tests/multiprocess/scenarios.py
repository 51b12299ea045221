"""What the processes of a job do together, by name. Each returns what JSON holds; an exception is told by class and message."""

from __future__ import annotations

import os
import resource
import signal
import time
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from failures import fail_at
from jax.sharding import NamedSharding, PartitionSpec

import ckptkit
from ckptkit import args as ckpt_args
from ckptkit import checkpointer as checkpointing
from ckptkit import errors, finding, meeting, restoration
from ckptkit._coordination import Store
from ckptkit.file_list import read_file_list
from ckptkit.leaves.jax_array import JaxArrayHandler
from ckptkit.location import FileLocation
from ckptkit.options import MultiprocessingOptions
from ckptkit.pipeline import alike, sharing
from ckptkit.pipeline import restore as restoring
from ckptkit.processes import job_of
from ckptkit.registry import Registry
from ckptkit.saving import Saving
from ckptkit.storage._chunk_reader import ChunkReader
from ckptkit.storage.base import StorageBackend
from ckptkit.storage.ocdbt import OcdbtBackend

P = PartitionSpec

SHORT = MultiprocessingOptions(timeout_secs=3)


def line() -> jax.sharding.Mesh:
    """All devices in a row."""
    return jax.sharding.Mesh(np.array(jax.devices()), ("x",))


def grid() -> jax.sharding.Mesh:
    """All devices in two columns; in one where there is one device."""
    devices = np.array(jax.devices())
    return jax.sharding.Mesh(devices.reshape(-1, min(2, devices.size)), ("a", "b"))


def values() -> dict[str, np.ndarray]:
    """The same on every process and in every job."""
    rng = np.random.default_rng(7)
    return {
        "rows": rng.normal(size=(64, 6)).astype(np.float32),
        "columns": rng.normal(size=(6, 64)).astype(jnp.bfloat16),
        "replicated": rng.integers(0, 1000, (5, 3), np.int32),
        "large": rng.normal(size=(1024, 1024)).astype(np.float32),
        "prime": rng.normal(size=(1_000_003,)).astype(np.float32),
        "tiles": rng.normal(size=(32, 32)).astype(np.float32),
        "partly": rng.normal(size=(32, 8)).astype(np.float16),
        "scalar": np.float32(2.5),
    }


def shardings() -> dict[str, NamedSharding]:
    return {
        "rows": NamedSharding(line(), P("x")),
        "columns": NamedSharding(line(), P(None, "x")),
        "replicated": NamedSharding(line(), P()),
        "large": NamedSharding(line(), P()),
        "prime": NamedSharding(line(), P()),
        "tiles": NamedSharding(grid(), P("a", "b")),
        "partly": NamedSharding(grid(), P("b")),
        "scalar": NamedSharding(line(), P()),
    }


def placed(value: np.ndarray, sharding: NamedSharding) -> jax.Array:
    return jax.make_array_from_callback(np.shape(value), sharding, lambda index: np.asarray(value)[index])


def arrays() -> dict[str, jax.Array]:
    where = shardings()
    return {name: placed(value, where[name]) for name, value in values().items()}


def targets() -> dict[str, jax.ShapeDtypeStruct]:
    where = shardings()
    return {name: jax.ShapeDtypeStruct(np.shape(v), v.dtype, sharding=where[name]) for name, v in values().items()}


def tree() -> dict[str, Any]:
    split = jax.jit(lambda: jax.random.split(jax.random.key(5), 8), out_shardings=NamedSharding(line(), P("x")))
    return {"arrays": arrays(), "keys": split(), "host": np.arange(6.0), "step": 3, "note": "text", "empty": {}}


def wrong(restored: dict[str, jax.Array]) -> list[str]:
    """The names of arrays of which a local shard differs from what was saved."""
    expected = values()
    assert restored.keys() == expected.keys()
    bad = []
    for name, array in restored.items():
        value = np.asarray(expected[name])
        kind = (array.shape, array.dtype)
        if kind != (value.shape, value.dtype) or any(
            np.asarray(shard.data).tobytes() != value[shard.index].tobytes() for shard in array.addressable_shards
        ):
            bad.append(name)
    return bad


def files(path: Path) -> list[str]:
    return sorted(str(p.relative_to(path)) for p in path.rglob("*") if p.is_file())


def standard(**options: Any) -> ckptkit.StandardCheckpointer:
    return ckptkit.StandardCheckpointer(**{"multiprocessing_options": SHORT, **options})


def round_trip(directory: Path, plan: Any) -> Any:
    path = directory / "round_trip"
    with ckptkit.AsyncCheckpointer(multiprocessing_options=SHORT) as checkpointer:
        checkpointer.save(path, ckpt_args.PyTreeSave(tree()))
        checkpointer.wait_until_finished()
        names = files(path)
        whole = checkpointer.restore(path)
        assert all(
            np.array_equal(jax.random.key_data(a.data), jax.random.key_data(b.data))
            for a, b in zip(whole["keys"].addressable_shards, tree()["keys"].addressable_shards, strict=True)
        )
        targeted = checkpointer.restore(path, ckpt_args.StandardRestore({**tree(), "arrays": targets()}))
    assert whole["host"].tolist() == list(range(6))
    assert (whole["step"], whole["note"], whole["empty"]) == (3, "text", {})
    return {"wrong": wrong(whole["arrays"]) + wrong(targeted["arrays"]), "files": names}


def many_saves(directory: Path, plan: Any) -> Any:
    with standard() as checkpointer:
        for step in range(5):
            checkpointer.save(directory / "many" / str(step), {"a": arrays()["rows"], "step": step})
        checkpointer.wait_until_finished()
        checkpointer.save(directory / "many" / "0", {"a": arrays()["rows"], "step": 100}, force=True)
        return [checkpointer.restore(directory / "many" / str(step))["step"] for step in range(5)]


def without_ocdbt(directory: Path, plan: Any) -> Any:
    path = directory / "without_ocdbt"
    with standard(storage="zarr") as checkpointer:
        checkpointer.save(path, arrays())
        return wrong(checkpointer.restore(path))


def own_shardings(directory: Path, plan: Any) -> Any:
    """Replicated arrays that share one sharding on process 0, and have equal ones on others."""
    shared = NamedSharding(line(), P())
    own = [shared if plan["rank"] == 0 else NamedSharding(line(), P()) for _ in range(4)]
    tree = {f"a{i}": placed(np.full(4, i, np.float32), sharding) for i, sharding in enumerate(own)}
    tree |= {f"k{i}": jax.jit(lambda: jax.random.key(7), out_shardings=sharding)() for i, sharding in enumerate(own)}
    path = directory / "own_shardings"
    with standard() as checkpointer:
        checkpointer.save(path, tree)
        restored = checkpointer.restore(path)
    return [restored[f"a{i}"].addressable_data(0)[0].item() for i in range(4)]


def compressed(directory: Path, plan: Any) -> Any:
    """Rows of which those of process 0 compress well and the others do not, compressed where it pays."""
    value = np.zeros((8, 1 << 18), np.float32)
    value[4:] = np.random.default_rng(3).normal(size=(4, 1 << 18))
    path = directory / "compressed"
    with standard(compression="auto") as checkpointer:
        checkpointer.save(path, {"a": placed(value, NamedSharding(line(), P("x")))})
        restored = checkpointer.restore(path)["a"]
    return all(np.array_equal(np.asarray(s.data), value[s.index]) for s in restored.addressable_shards)


def composite(directory: Path, plan: Any) -> Any:
    path = directory / "composite"
    items = ckpt_args.Composite(
        state=ckpt_args.StandardSave(arrays()), more=ckpt_args.StandardSave({"b": np.ones(3)}), info=ckpt_args.JsonSave({"x": 1})
    )
    with ckptkit.AsyncCheckpointer(multiprocessing_options=SHORT) as checkpointer:
        checkpointer.save(path, items)
        restored = checkpointer.restore(path)
    parts = {"state": ckptkit.verify(path).state, "listed": sorted(read_file_list(FileLocation(path)).files)}
    return {"wrong": wrong(restored["state"]), "info": restored["info"], **parts}


def to_orbax(directory: Path, plan: Any) -> Any:
    import orbax.checkpoint as ocp

    path = directory / "to_orbax"
    with standard() as checkpointer:
        checkpointer.save(path, arrays())
        checkpointer.wait_until_finished()
    with ocp.StandardCheckpointer() as theirs:
        return wrong(theirs.restore(path, targets()))


def from_orbax(directory: Path, plan: Any) -> Any:
    import orbax.checkpoint as ocp

    path = directory / "from_orbax"
    with ocp.StandardCheckpointer() as theirs:
        theirs.save(path, arrays())
        theirs.wait_until_finished()
    with standard() as checkpointer:
        return wrong(checkpointer.restore(path)) + wrong(checkpointer.restore(path, targets()))


def raised(directory: Path, name: str, save: Any) -> Any:
    """What a save raises, after how many seconds, what it left, and whether the next save works."""
    start = time.monotonic()
    try:
        save(directory / name)
    except Exception as error:
        found = {"error": type(error).__name__, "message": str(error), "secs": time.monotonic() - start}
    else:
        found = {"error": None}
    with standard() as checkpointer:
        checkpointer.save(directory / f"{name}_after", {"a": arrays()["rows"]})
        checkpointer.wait_until_finished()
    return {**found, "left": sorted(p.name for p in directory.glob(f"{name}*") if p.is_dir())}


def saved(path: Path, item: Any, force: bool = False, **options: Any) -> None:
    with standard(**options) as checkpointer:
        checkpointer.save(path, item, force=force)
        checkpointer.wait_until_finished()


def two_at_once(directory: Path, plan: Any) -> Any:
    """Two checkpointers save in the background at the same time, called in the same order by every process."""
    with standard() as first, standard() as second:
        for step in range(6):
            first.save(directory / "first" / str(step), {"a": arrays()["rows"], "b": np.ones(1 << 20)})
            second.save(directory / "second" / str(step), {"a": arrays()["rows"]})
    return [len(list((directory / name).iterdir())) for name in ("first", "second")]


def other_tree(directory: Path, plan: Any) -> Any:
    item = arrays() if plan["rank"] == 0 else {**arrays(), "more": np.ones(2)}
    return raised(directory, "other_tree", lambda path: saved(path, item))


def other_shape(directory: Path, plan: Any) -> Any:
    return raised(directory, "other_shape", lambda path: saved(path, {"a": np.ones(2 + plan["rank"])}))


def differences(directory: Path, plan: Any) -> Any:
    """What processes are told that save trees which differ in one place, and how many bytes they tell each other for it."""
    host, many = {"a": np.ones(2), "b": {"c": np.ones((3, 4)), "d": 1}}, {f"leaf{i:05}": i for i in range(20_000)}
    long = {f"leaf{i:03}": placed(np.ones(8, np.float32), shardings()["rows"]) for i in range(70)}
    others = {
        "missing there": (host, {"a": np.ones(2), "b": {"d": 1}}),
        "missing here": ({"b": host["b"]}, host),
        "shape": (host, {**host, "b": {**host["b"], "c": np.ones((3, 5))}}),
        "dtype": (host, {**host, "a": np.ones(2, np.int16)}),
        "kind": (host, {**host, "b": {**host["b"], "d": {}}}),
        "late": (many, {**many, "leaf17654": np.ones(1)}),
        "one more": (many, {**many, "z": 1}),
        "sharding": (long, {**long, "leaf069": placed(np.ones(8, np.float32), shardings()["replicated"])}),
    }
    found = {}
    for name, items in others.items():
        before = _told_so_far()
        try:
            saved(directory / "differences", items[min(plan["rank"], 1)])
        except errors.ProcessError as error:
            found[name] = [str(error), _told_so_far() - before]
    return found


_told_bytes: list[int] = []


def _told_so_far() -> int:
    """Bytes that this process has told others, since it first asked."""
    if not _told_bytes:
        tell = Store.set
        Store.set = lambda self, key, value: (_told_bytes.append(len(value)), tell(self, key, value))
        _told_bytes.append(0)
    return sum(_told_bytes)


def other_path(directory: Path, plan: Any) -> Any:
    return raised(directory, "other_path", lambda path: saved(path / str(plan["rank"]), arrays()))


def host_local(directory: Path, plan: Any) -> Any:
    return raised(directory, "host_local", lambda path: saved(path, {"a": jnp.ones(3)}))


def bad_leaf(directory: Path, plan: Any) -> Any:
    leaf = object() if plan["rank"] == 1 else 1
    return raised(directory, "bad_leaf", lambda path: saved(path, {"a": leaf, "b": arrays()}))


def taken(directory: Path, plan: Any) -> Any:
    (directory / "taken").mkdir(exist_ok=True)
    return raised(directory, "taken", lambda path: saved(path, arrays()))


def unshared(directory: Path, plan: Any) -> Any:
    """A path that leads each process into a directory of its own."""
    return raised(directory, "unshared", lambda _: saved(Path(f"/proc/self/cwd/{'unshared'}"), arrays()))


def local_each(directory: Path, plan: Any) -> Any:
    path = directory / f"local_{plan['rank']}"
    with standard(multiprocessing_options=MultiprocessingOptions(primary_host=None)) as checkpointer:
        checkpointer.save(path, {"a": jnp.full(3, plan["rank"])})
        return np.asarray(checkpointer.restore(path)["a"]).tolist()


def some_of_them(directory: Path, plan: Any) -> Any:
    """Process 0 saves alone, with arrays of its own."""
    alone = MultiprocessingOptions(active_processes={0})
    with standard(multiprocessing_options=alone) as checkpointer:
        try:
            checkpointer.save(directory / "some", {"a": jnp.ones(2)})
        except errors.ArgsError:
            return "ArgsError"
        return np.asarray(checkpointer.restore(directory / "some")["a"]).tolist()


def two_of_three(directory: Path, plan: Any) -> Any:
    """The first two processes save without the third, and all of them before and after that."""
    for step in range(4):
        if step not in (1, 2):
            saved(directory / "line" / str(step), {"a": np.ones(2)}, multiprocessing_options=SHORT)
        elif plan["rank"] < 2:
            two = MultiprocessingOptions(timeout_secs=3, active_processes={0, 1})
            saved(directory / "line" / str(step), {"a": np.ones(2)}, multiprocessing_options=two)
    return sorted(path.name for path in (directory / "line").iterdir())


def other_timeouts(directory: Path, plan: Any) -> Any:
    options = MultiprocessingOptions(timeout_secs=60 if plan["rank"] == 0 else 3)
    return raised(directory, "other_timeouts", lambda path: saved(path, {"a": np.ones(2)}, multiprocessing_options=options))


def other_primary(directory: Path, plan: Any) -> Any:
    """Each process takes itself for the primary one."""
    options = MultiprocessingOptions(timeout_secs=3, primary_host=plan["rank"])
    return raised(directory, "other_primary", lambda path: saved(path, {"a": np.ones(2)}, multiprocessing_options=options))


def no_primary(directory: Path, plan: Any) -> Any:
    """Each process takes the other one for the primary."""
    options = MultiprocessingOptions(timeout_secs=3, primary_host=1 - plan["rank"])
    return raised(directory, "no_primary", lambda path: saved(path, {"a": np.ones(2)}, multiprocessing_options=options))


def slow_primary(directory: Path, plan: Any) -> Any:
    """The primary lives, but is held up for longer than process 1 has patience, and commits then."""
    patience, gone = meeting._PATIENCE, directory / "gone"
    if plan["rank"] == 0:
        _before_next_call(Saving, "_commit", lambda: _await(gone))
    else:
        meeting._PATIENCE = 1
    try:
        saved(directory / "slow", {"a": np.ones(2)}, multiprocessing_options=MultiprocessingOptions(timeout_secs=2))
    except errors.TimeoutError as error:
        return str(error)
    finally:
        meeting._PATIENCE = patience
        gone.touch()


def _await(path: Path) -> None:
    while not path.exists():
        time.sleep(0.02)


def one_writer(directory: Path, plan: Any) -> Any:
    """A backend that does not say that several processes can write with it."""

    class Single(StorageBackend):
        name = "single"
        refuse = OcdbtBackend.refuse
        writer = OcdbtBackend.writer
        reader = OcdbtBackend.reader
        recognises = OcdbtBackend.recognises

    registry = Registry.with_builtins()
    registry.add_storage(Single())
    return raised(directory, "one_writer", lambda path: saved(path, arrays(), registry=registry, storage="single"))


def missing_call(directory: Path, plan: Any) -> Any:
    """Process 1 does not call save where the others do, and is back at the next one."""

    def save(path: Path) -> None:
        if plan["rank"] == 1:
            time.sleep(5)
            raise RuntimeError("not calling save")
        saved(path, arrays())

    return raised(directory, "missing_call", save)


def shared_values() -> dict[str, np.ndarray]:
    """Of many dtypes, some with bits that a sum of numbers would change; the largest is more than goes at once."""
    rng = np.random.default_rng(11)
    floats = np.array([-0.0, 0.0, np.nan, -np.inf, 1e-45, 1.5] * 4, np.float32).reshape(8, 3)
    floats.view(np.uint32)[5, 2] = 0x7FC12345  # a NaN that says something
    return {
        "floats": floats,
        "bfloat16": rng.normal(size=(8, 8)).astype(jnp.bfloat16),
        "int4": rng.integers(-8, 8, (8, 5)).astype(jnp.int4),
        "bool": rng.random((16, 3)) < 0.5,
        "complex": np.array([[complex(-0.0, 2.0)] * 3] * 8, np.complex64),
        "bytes": rng.integers(0, 256, (8, 1), np.uint8),
        "none": np.zeros((8, 0), np.float32),
        "large": rng.random((256, 18_000), np.float32),
    }


def shared_places() -> dict[str, NamedSharding]:
    """On all devices of all processes, on each, or on those of some."""
    replicas = jax.sharding.Mesh(np.array(jax.devices()).reshape(2, -1), ("replica", "data"))
    return {
        "all": NamedSharding(line(), P()),
        "replicas": NamedSharding(replicas, P("data")),
        "columns": NamedSharding(grid(), P("b")),
        "rows": NamedSharding(grid(), P("a")),
    }


def shared_targets(sharding: NamedSharding) -> dict[str, jax.ShapeDtypeStruct]:
    return {name: jax.ShapeDtypeStruct(value.shape, value.dtype, sharding=sharding) for name, value in shared_values().items()}


def saves_shared(directory: Path, plan: Any) -> None:
    item = {name: placed(value, NamedSharding(line(), P())) for name, value in shared_values().items()}
    key = jax.jit(lambda: jax.random.key(5), out_shardings=NamedSharding(line(), P()))()
    item = {"arrays": item, "host": np.arange(6.0), "step": 3, "key": key, "text": "t"}
    with ckptkit.AsyncCheckpointer(multiprocessing_options=SHORT) as checkpointer:
        checkpointer.save(directory / "shared", ckpt_args.PyTreeSave(item))
    saved(directory / "shared_zarr", item["arrays"], storage="zarr")


def shared(directory: Path, plan: Any) -> Any:
    """With one reader for what several processes need: what comes back wrong, and the bytes that this process reads."""
    reading = _counted_reads()
    options = MultiprocessingOptions(timeout_secs=5, single_reader=True)
    expected = shared_values()
    found: dict[str, Any] = {"wrong": [], "read": {}}
    with standard(multiprocessing_options=options) as checkpointer:
        for place, sharding in shared_places().items():
            before = sum(reading)
            restored = checkpointer.restore(directory / "shared_zarr", shared_targets(sharding))
            found["read"][place] = sum(reading) - before
            found["wrong"] += [f"{place} {name}" for name in expected if _differs(restored[name], expected[name])]
        target = {"large": jax.ShapeDtypeStruct((300, 17_000), jnp.bfloat16, sharding=shared_places()["rows"])}
        resized = checkpointer.restore(directory / "shared_zarr", {**expected, **target}, strict=False)
        cut = np.pad(expected["large"][:, :17_000], ((0, 44), (0, 0))).astype(jnp.bfloat16)
        found["wrong"] += ["resized"] * _differs(resized["large"], cut)
        found["wrong"] += [f"host {name}" for name in expected if name != "large" and not _same(resized[name], expected[name])]
    with ckptkit.AsyncCheckpointer(multiprocessing_options=options) as checkpointer:
        before = sum(reading)
        whole = checkpointer.restore(directory / "shared", ckpt_args.PyTreeRestore())
        found["read"]["as saved"] = sum(reading) - before
    found["wrong"] += [name for name, value in expected.items() if _differs(whole["arrays"][name], value)]
    data = jax.random.key_data(whole["key"]).addressable_data(0)
    rest = (data.tolist(), whole["host"].tolist(), whole["step"], whole["text"])
    found["wrong"] += [] if rest == ([0, 5], list(range(6)), 3, "t") else [str(rest)]
    return found


def _same(one: Any, other: np.ndarray) -> bool:
    one = np.asarray(one)
    return (one.shape, one.dtype, one.tobytes()) == (other.shape, other.dtype, other.tobytes())


def _differs(array: jax.Array, value: np.ndarray) -> bool:
    return array.shape != value.shape or not all(_same(shard.data, value[shard.index]) for shard in array.addressable_shards)


def _counted_reads() -> list[int]:
    """Grows by the bytes of chunks that this process reads from now on."""
    counts: list[int] = []
    read = ChunkReader._read_batch

    def counted(self: ChunkReader, requests: Any, *rest: Any) -> Any:
        counts.extend(out.nbytes for *_, out in requests)
        return read(self, requests, *rest)

    ChunkReader._read_batch = counted
    return counts


def shared_failures(directory: Path, plan: Any) -> Any:
    """What each process is told where one reader fails, or the processes do not restore the same."""
    options = MultiprocessingOptions(timeout_secs=3, single_reader=True)
    target = {
        name: jax.ShapeDtypeStruct(v.shape, v.dtype, sharding=shared_places()["all"]) for name, v in shared_values().items()
    }
    damaged = directory / "shared_damaged"
    saved(damaged, {name: placed(value, NamedSharding(line(), P())) for name, value in shared_values().items()})
    if plan["rank"] == 0:
        for file in (path for path in (damaged / "ocdbt.process_0" / "d").iterdir() if path.stat().st_size > 1 << 20):
            data = bytearray(file.read_bytes())
            data[len(data) // 2] ^= 1
            file.write_bytes(data)
    (directory / f"damaged_{plan['rank']}").touch()
    while not (directory / "damaged_0").exists():
        time.sleep(0.02)
    own = {**target, "large": jax.ShapeDtypeStruct((256, 18_000), jnp.float32, sharding=shared_places()["columns"])}
    faulty = {**target, "large": jax.ShapeDtypeStruct((1, 1), jnp.float32, sharding=shared_places()["all"])}
    whole = directory / "shared_zarr"
    tries = {
        "damaged": lambda checkpointer: checkpointer.restore(damaged, target),
        "skip": lambda checkpointer: checkpointer.restore(whole, target, on_corrupt="skip"),
        "other": lambda checkpointer: checkpointer.restore(whole, own if plan["rank"] == 1 else target),
        "bad target": lambda checkpointer: checkpointer.restore(whole, faulty if plan["rank"] == 1 else target),
        "assemble": lambda checkpointer: _restore_with_failing_assembly(checkpointer, whole, target, plan["rank"] == 1),
        "again": lambda checkpointer: checkpointer.restore(whole, target),
        "absent": lambda checkpointer: plan["rank"] != 1 and checkpointer.restore(whole, target),
    }
    found = {}
    for name, attempt in tries.items():
        with standard(multiprocessing_options=options) as checkpointer:
            try:
                attempt(checkpointer)
            except Exception as error:
                found[name] = [type(error).__name__, str(error)]
    return found


def shared_struck(directory: Path, plan: Any) -> Any:
    """Process 1 is killed while the others wait for the devices to pass on what was read."""
    target = {
        name: jax.ShapeDtypeStruct(v.shape, v.dtype, sharding=shared_places()["all"]) for name, v in shared_values().items()
    }
    with standard(multiprocessing_options=MultiprocessingOptions(timeout_secs=3, single_reader=True)) as checkpointer:
        checkpointer.restore(directory / "shared_zarr", target)
        if plan["rank"] == 1:
            JaxArrayHandler.assemble = lambda *args: os.kill(os.getpid(), signal.SIGKILL)
        start = time.monotonic()
        try:
            checkpointer.restore(directory / "shared_zarr", target)
        except errors.CheckpointError as error:
            return [type(error).__name__, str(error), time.monotonic() - start]


def shared_cut_off(directory: Path, plan: Any) -> Any:
    """Process 1 fails, is stopped, or is interrupted twice, where the others' devices wait for its own."""

    def interrupted() -> None:
        sharing.Sharing._take_turn = lambda *args: _interrupt()
        _interrupt()

    def failed() -> None:
        raise errors.ProcessError("no device memory, says the test")

    item = {"a": placed(values()["large"], shardings()["large"])}
    saved(directory / "cut_off", item)
    with standard(multiprocessing_options=MultiprocessingOptions(timeout_secs=3, single_reader=True)) as checkpointer:
        checkpointer.restore(directory / "cut_off")
        if plan["rank"] == 1:
            faults = {"fail": failed, "stop": lambda: os.kill(os.getpid(), signal.SIGSTOP), "interrupt": interrupted}
            owner, name = (restoring, "_damage") if plan["action"] == "interrupt" else (sharing, "_sum")
            _before_next_call(owner, name, faults[plan["action"]])
        start = time.monotonic()
        try:
            checkpointer.restore(directory / "cut_off")
        except BaseException as error:
            found = [type(error).__name__, str(error), time.monotonic() - start]
        while plan["rank"] == 1 and not (directory / "shared_cut_off_0.json").exists():
            time.sleep(0.02)  # whoever ends closes connections, which the others' devices notice
        return found


def _before_next_call(owner: Any, name: str, act: Any) -> None:
    """Has the next call of a function begin with `act`."""
    original = getattr(owner, name)

    def call(*args: Any, **kwargs: Any) -> Any:
        setattr(owner, name, original)
        act()
        return original(*args, **kwargs)

    setattr(owner, name, call)


def _see_another_version() -> None:
    """The next look at which checkpoint there is finds another one."""
    version = finding._version
    finding._version = lambda location: (setattr(finding, "_version", version), b"another")[1]


def _lack_memory() -> None:
    raise MemoryError("says the test")


def _interrupt() -> None:
    raise KeyboardInterrupt


def restores_astray(directory: Path, plan: Any) -> Any:
    """With one reader: what each process gets, or is told, where one goes astray, and what the same restore gives after it."""
    here, there = directory / "astray", directory / "astray_too"
    item = {"a": arrays()["replicated"], "step": 1}
    for path in (here, there):
        saved(path, item)
    alone = MultiprocessingOptions(active_processes={plan["rank"]}, primary_host=plan["rank"])
    saved(f"/proc/self/cwd/own_{plan['rank']}", {"step": 1}, multiprocessing_options=alone)

    def with_fault(rank: int, owner: Any, name: str, act: Any) -> Any:
        def restore(checkpointer: Any) -> Any:
            if plan["rank"] == rank:
                _before_next_call(owner, name, act)
            return checkpointer.restore(here)

        return restore

    def overwrite() -> None:
        saved(here, {"a": np.asarray(values()["replicated"]), "step": 2}, force=True, multiprocessing_options=alone)

    tries = {
        "other path": lambda checkpointer: checkpointer.restore((here, there)[plan["rank"]]),
        "missing here": lambda checkpointer: checkpointer.restore("/proc/self/cwd/own_1"),
        "missing there": lambda checkpointer: checkpointer.restore("/proc/self/cwd/own_0"),
        "closed": lambda checkpointer: (plan["rank"] and checkpointer.close(), checkpointer.restore(here))[1],
        "seen late": with_fault(1, finding, "attempts", _see_another_version),
        "no memory": with_fault(1, sharing, "_overlaps", _lack_memory),
        "interrupted": with_fault(1, restoring, "_damage", _interrupt),
        "replaced here": with_fault(0, checkpointing, "read_file_list", overwrite),
        "replaced there": with_fault(1, checkpointing, "read_file_list", overwrite),
        "replaced while read": with_fault(1, restoring, "_damage", overwrite),
    }
    found = {}
    options = MultiprocessingOptions(timeout_secs=3, single_reader=True)
    for name, restore in tries.items():
        for key, call in ((name, restore), (f"after {name}", lambda checkpointer: checkpointer.restore(here))):
            with standard(multiprocessing_options=options) as checkpointer:
                try:
                    found[key] = call(checkpointer)["step"]
                except BaseException as error:
                    found[key] = [type(error).__name__, str(error)]
    return found


def other_items(directory: Path, plan: Any) -> Any:
    """With one reader, process 1 asks for an item more."""
    path, options = directory / "other_items", MultiprocessingOptions(timeout_secs=3, single_reader=True)
    wanted = {"one": ckpt_args.JsonRestore()} | ({"two": ckpt_args.JsonRestore()} if plan["rank"] else {})
    with ckptkit.Checkpointer(multiprocessing_options=options) as checkpointer:
        checkpointer.save(path, ckpt_args.Composite(one=ckpt_args.JsonSave({}), two=ckpt_args.JsonSave({})))
        try:
            checkpointer.restore(path, ckpt_args.Composite(**wanted))
        except errors.ProcessError as error:
            return str(error)


def skipped_save(directory: Path, plan: Any) -> Any:
    """The primary leaves out a save that process 1 waits at; the next one is one of both."""
    found = None
    if plan["rank"] == 0:
        while not (directory / "skipped").exists():
            time.sleep(0.02)
    else:
        try:
            saved(directory / "skips", {"step": 1}, multiprocessing_options=MultiprocessingOptions(timeout_secs=1))
        except errors.TimeoutError as error:
            found = str(error)
        (directory / "skipped").touch()
    saved(directory / "after_skips", {"step": 2})
    return [found, step_there(directory, {"path": "after_skips"})]


def disagreements(directory: Path, plan: Any) -> Any:
    """What is said of leaves that differ late in long words, or of which one process has more."""
    leaf, rank = alike.Facts(("a",), {"kind": "k"}), plan["rank"]
    cases = {
        "long": [alike.Facts(("a",), {"places": "x" * 20_000 + f" {rank} " + "y" * 20_000})],
        "twice there": [leaf] * (1 + rank),
        "twice here": [leaf] * (2 - rank),
    }
    found = {}
    for name, leaves in cases.items():
        before = _told_so_far()
        try:
            with restoration.restoring(job_of(SHORT), None, SHORT.timeout_secs) as meet:
                alike.agree(meet, "tree", leaves, {})
        except errors.ProcessError as error:
            found[name] = [str(error), _told_so_far() - before]
    return found


def _restore_with_failing_assembly(checkpointer: Any, path: Path, target: Any, fails: bool) -> Any:
    assemble = JaxArrayHandler.assemble

    def failing(*args: Any) -> Any:
        JaxArrayHandler.assemble = assemble
        raise MemoryError("no memory, says the test")

    JaxArrayHandler.assemble = failing if fails else assemble
    return checkpointer.restore(path, target)


def matrix() -> np.ndarray:
    return np.arange(1 << 22, dtype=np.float32).reshape(2048, 2048)


def saves_matrix(directory: Path, plan: Any) -> None:
    """16 MB on rows of devices, in cells of 1 MB."""
    item = {"a": placed(matrix(), NamedSharding(line(), P("x")))}
    path = directory / f"matrix_{plan['count']}"
    saved(path, ckpt_args.StandardSave(item, save_args={"a": ckptkit.SaveArgs(chunk_byte_size=1 << 20)}))


def bytes_read(directory: Path, plan: Any) -> Any:
    """Bytes that this process reads to restore each of the matrices on rows of its own job's devices, beside what these hold."""
    value = matrix()
    backwards = jax.sharding.Mesh(np.array(jax.devices())[::-1], ("x",))
    target = {"a": jax.ShapeDtypeStruct(value.shape, value.dtype, sharding=NamedSharding(backwards, P("x")))}
    found = []
    with standard() as checkpointer:
        for path in sorted(directory.glob("matrix_*")):
            checkpointer.restore(path, target)  # the first one imports
            before = _read_so_far()
            restored = checkpointer.restore(path, target)["a"]
            read = _read_so_far() - before
            assert all(np.array_equal(np.asarray(s.data), value[s.index]) for s in restored.addressable_shards)
            found.append(read / sum(shard.data.nbytes for shard in restored.addressable_shards))
    return found


def _read_so_far() -> int:
    with open("/proc/self/io") as file:
        return int(file.readline().split()[1])


def raised_at_each_stage(directory: Path, plan: Any) -> Any:
    """Every process in turn fails at every stage that it comes to, over a checkpoint that must stay as it was."""
    found = {}
    for victim in range(plan["count"]):
        own = ["merge", "commit"] if victim == 0 else ["end"]
        for stage in ["stage", "write", "barrier", "part", *own]:
            found[f"{stage} {victim}"] = _faulty_save(directory / f"{stage}_{victim}", plan, stage, "raise", victim)
    return found


def struck(directory: Path, plan: Any) -> Any:
    """One process is killed or stopped at one stage."""
    fault = plan["fault"]
    return _faulty_save(directory / "struck_checkpoint", plan, **fault)


def _faulty_save(path: Path, plan: Any, stage: str, action: str, victim: int, primary: int = 0) -> dict[str, Any]:
    options = MultiprocessingOptions(timeout_secs=3, primary_host=primary)
    with standard(multiprocessing_options=options) as checkpointer:
        checkpointer.save(path, {"a": arrays()["rows"], "step": 1})
        checkpointer.wait_until_finished()
        disarm = fail_at(stage, action, path.parent) if plan["rank"] == victim else lambda: None
        start = time.monotonic()
        found: dict[str, Any] = {"error": None}
        try:
            checkpointer.save(path, {"a": arrays()["rows"], "step": 2}, force=True)
            checkpointer.wait_until_finished()
        except Exception as error:
            found = {"error": type(error).__name__, "message": str(error), "secs": time.monotonic() - start}
        disarm()
        found["step"] = checkpointer.restore(path)["step"]
        found["left"] = sorted(p.name for p in path.parent.glob(f"{path.name}.*"))
    (path.parent / f"gave_up_{plan['rank']}").touch()
    found["again"] = _saves_again(path, plan, victim if action == "kill" else None)
    return found


def _saves_again(path: Path, plan: Any, gone: int | None) -> int:
    """The step that the next save of those who are left leaves."""
    ranks = set(range(plan["count"])) - {gone}
    options = MultiprocessingOptions(timeout_secs=6, active_processes=ranks, primary_host=min(ranks))
    item = {"step": 3} if gone is not None else {"a": arrays()["rows"], "step": 3}
    with standard(multiprocessing_options=SHORT if gone is None else options) as checkpointer:
        checkpointer.save(path, item, force=True)
        checkpointer.wait_until_finished()
        return checkpointer.restore(path)["step"]


def disk_full(directory: Path, plan: Any) -> Any:
    """Process 1 may write no file of more than 100 kB."""
    unlimited = resource.getrlimit(resource.RLIMIT_FSIZE)
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    if plan["rank"] == 1:
        resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, unlimited[1]))
    try:
        return raised(directory, "disk_full", lambda path: saved(path, {"a": placed(values()["large"], shardings()["rows"])}))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, unlimited)


def keeps_saving(directory: Path, plan: Any) -> None:
    """Saves until somebody ends the process."""
    for step in range(1000):
        saved(directory / "kept" / str(step), {"a": arrays()["rows"], "step": step})
        (directory / f"kept_{step}").touch()


def saves_once_more(directory: Path, plan: Any) -> Any:
    newest = max(int(path.name) for path in (directory / "kept").iterdir() if path.name.isdecimal())
    with standard() as checkpointer:
        whole = [wrong({**arrays(), "rows": checkpointer.restore(directory / "kept" / str(newest))["a"]})]
        checkpointer.save(directory / "kept" / str(newest + 1), {"a": arrays()["rows"], "step": newest + 1})
        checkpointer.wait_until_finished()
    return whole, sorted(path.name for path in (directory / "kept").iterdir() if not path.name.isdecimal())


def same_path(directory: Path, plan: Any) -> Any:
    """Saves to a path to which another job saves, again and again."""
    path = directory / "shared" / "contested"
    raised = []
    for _ in range(15):
        try:
            saved(path, {"a": arrays()["rows"]})
        except errors.BusyError:
            raised.append("BusyError")
        except errors.ExistsError:
            with standard() as checkpointer:
                try:
                    checkpointer.save(path, {"a": arrays()["rows"]}, force=True)
                    checkpointer.wait_until_finished()
                except errors.BusyError:
                    raised.append("BusyError")
    with standard() as checkpointer:
        return {"errors": raised, "wrong": wrong({**arrays(), "rows": checkpointer.restore(path)["a"]})}


def writes(directory: Path, plan: Any) -> None:
    import orbax.checkpoint as ocp

    item = {"arrays": arrays(), "step": 3}
    long = MultiprocessingOptions()
    saved(directory / f"ckptkit_{plan['label']}", item, multiprocessing_options=long)
    saved(directory / f"zarr_{plan['label']}", item, multiprocessing_options=long, storage="zarr")
    with ocp.StandardCheckpointer() as theirs:
        theirs.save(directory / f"orbax_{plan['label']}", item)
        theirs.wait_until_finished()


def reads(directory: Path, plan: Any) -> dict[str, list[str]]:
    """The arrays that come back wrong, by who saved them."""
    import orbax.checkpoint as ocp

    target = {"arrays": targets(), "step": 0}
    found = {}
    with standard() as checkpointer, ocp.StandardCheckpointer() as theirs:
        for label in plan["labels"]:
            for kind in ("ckptkit", "zarr", "orbax"):
                restored = checkpointer.restore(directory / f"{kind}_{label}", target)
                found[f"{kind} {label}"] = [*wrong(restored["arrays"]), *["step"] * (restored["step"] != 3)]
            found[f"to orbax {label}"] = wrong(theirs.restore(directory / f"ckptkit_{label}", target)["arrays"])
    return found


def preempted(directory: Path, plan: Any) -> Any:
    """The step at which this process hears that the job is to end, and what is saved there."""
    for step in range(400):
        (directory / f"stepping_{plan['rank']}").touch()
        if ckptkit.reached_preemption(step):
            saved(directory / "preempted", {"a": arrays()["rows"], "step": step})
            with standard() as checkpointer:
                return [step, checkpointer.restore(directory / "preempted")["step"]]
        time.sleep(0.05)
    return None


def saves_over_struck(directory: Path, plan: Any) -> Any:
    """Saves to the path of a save in which a process was killed: the step before, the one after, and what lies beside them."""
    path = directory / "struck_checkpoint"
    with standard() as checkpointer:
        before = checkpointer.restore(path)["step"]
        checkpointer.save(path, {"a": arrays()["rows"], "step": 9}, force=True)
        checkpointer.wait_until_finished()
        after = checkpointer.restore(path)
    bad = wrong({**arrays(), "rows": after["a"]})
    return {"steps": [before, after["step"]], "wrong": bad, "left": sorted(p.name for p in directory.glob("struck_checkpoint.*"))}


def rejoined(directory: Path, plan: Any) -> Any:
    """Process 1 dies in the middle of a save; one that is started in its place saves with process 0 again."""
    path = directory / "rejoined"
    if not (directory / "struck").exists():
        saved(path, {"step": 1})
        if plan["rank"] == 1:
            fail_at("part", "kill", directory)
        try:
            saved(path, {"step": 2}, force=True)
        except errors.TimeoutError:
            (directory / "gave_up_0").touch()
        while not (directory / "back").exists():
            time.sleep(0.05)
    (directory / "back").touch()
    saved(path, {"step": 3}, force=True, multiprocessing_options=MultiprocessingOptions(timeout_secs=20))
    return step_there(directory, {"path": "rejoined"})


def survives(directory: Path, plan: Any) -> Any:
    """Process 1 dies; process 0 saves alone, before and after JAX itself has noticed."""
    saved(directory / "survives", {"step": 1})
    if plan["rank"] == 1:
        os.kill(os.getpid(), signal.SIGKILL)
    alone = MultiprocessingOptions(active_processes={0})
    start = time.monotonic()
    try:
        saved(directory / "survives", {"step": 2}, force=True)
    except errors.TimeoutError:
        saved(directory / "survives", {"step": 3}, force=True, multiprocessing_options=alone)
    time.sleep(max(0.0, 2 * plan["heartbeat_secs"] - (time.monotonic() - start)))
    saved(directory / "survives", {"step": 4}, force=True, multiprocessing_options=alone)
    with standard() as checkpointer:
        return checkpointer.restore(directory / "survives")["step"]


def step_there(directory: Path, plan: Any) -> Any:
    return ckptkit.restore(directory / plan["path"], devices="numpy")["step"]
