"""One of two processes that save to one URL and restore from it; prints as JSON what it saw, or the error."""

from __future__ import annotations

import json
import sys

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec


def main(rank, port, url, fails):
    jax.config.update("jax_num_cpu_devices", 2)
    jax.config.update("jax_cpu_collectives_implementation", "gloo")
    jax.distributed.initialize(f"127.0.0.1:{port}", 2, rank)
    import ckptkit
    from ckptkit.options import MultiprocessingOptions

    value = np.random.default_rng(5).random((8, 100_000), np.float32)

    def placed(*axes):
        sharding = NamedSharding(Mesh(np.array(jax.devices()), ("x",)), PartitionSpec(*axes))
        return jax.make_array_from_callback(value.shape, sharding, lambda index: value[index])

    tree = {"rows": placed("x"), "all": placed(), "step": 1}
    options = MultiprocessingOptions(timeout_secs=10, single_reader=True)
    with ckptkit.StandardCheckpointer(multiprocessing_options=options) as checkpointer:
        for step in (1, 2):
            checkpointer.save(url, {**tree, "step": step}, force=step == 2)
            checkpointer.wait_until_finished()
        if fails and rank == 1:
            tree["step"] = np.ones(3)
        if fails:
            checkpointer.save(url, {**tree}, force=True)
            checkpointer.wait_until_finished()
        restored = checkpointer.restore(url, tree)
    shards = [shard for name in ("rows", "all") for shard in restored[name].addressable_shards]
    return [restored["step"], all(np.array_equal(shard.data, value[shard.index]) for shard in shards)]


if __name__ == "__main__":
    try:
        print(json.dumps(main(int(sys.argv[1]), *sys.argv[2:4], sys.argv[4] == "fails")))
    except Exception as error:
        print(json.dumps([type(error).__name__, str(error)]))
