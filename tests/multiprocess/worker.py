"""One process of a job: plays scenarios, and writes what it found into files for the test that started it."""

from __future__ import annotations

import faulthandler
import itertools
import json
import os
import sys
import time
import traceback
from pathlib import Path

import jax


def shift_clocks(secs: int) -> None:
    """Sets the clocks that this process reads `secs` ahead; the wall clock jumps to and fro by an hour besides."""
    for name, jumps in (("time", [0, 3600, -3600]), ("monotonic", [0])):
        for suffix, unit in (("", 1), ("_ns", 10**9)):
            read, offsets = getattr(time, name + suffix), itertools.cycle([unit * (secs + jump) for jump in jumps])
            setattr(time, name + suffix, lambda read=read, offsets=offsets: read() + next(offsets))


def main() -> None:
    plan = json.loads(sys.argv[1])
    if shift := plan.get("clock_shift_secs", {}).get(str(plan["rank"])):
        shift_clocks(shift)
    faulthandler.dump_traceback_later(plan.get("dump_secs", 100), exit=False)
    jax.config.update("jax_num_cpu_devices", plan["devices"])
    jax.config.update("jax_cpu_collectives_implementation", "gloo")
    jax.config.update("jax_enable_recoverability", plan.get("recoverable", False))
    jax.distributed.initialize(
        f"127.0.0.1:{plan['port']}",
        plan["count"],
        plan["rank"],
        initialization_timeout=60,
        heartbeat_timeout_seconds=plan.get("heartbeat_secs", 100),
    )
    import scenarios

    directory = Path(plan["directory"])
    failed = False
    for name in plan["scenarios"]:
        print(f"--- {name}", flush=True)
        try:
            found = {"value": getattr(scenarios, name)(directory, plan)}
        except Exception as error:
            traceback.print_exc()
            found = {"error": type(error).__name__, "message": str(error)}
            failed = True
        temporary = directory / f".{name}_{plan['rank']}"
        temporary.write_text(json.dumps(found))
        temporary.rename(directory / f"{name}_{plan['rank']}.json")
    sys.stdout.flush()
    sys.stderr.flush()
    if "survivors" in plan:  # without waiting for processes that are gone; process 0 last, since JAX ends the others with it
        last = [directory / f"{plan['scenarios'][-1]}_{rank}.json" for rank in plan["survivors"]]
        while plan["rank"] == 0 and not all(path.exists() for path in last):
            time.sleep(0.05)
        os._exit(failed)


if __name__ == "__main__":
    main()
