"""What an optimizer's state_dict needs beyond its leaves."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from ckptkit import errors

__all__ = ["optimizer_state"]


def optimizer_state(tree: Any) -> dict[str, Any]:
    """An optimizer's state_dict, from one that was restored without a target: the numbers of its parameters are ints again.

    A checkpoint keeps keys as text, and `Optimizer.load_state_dict` takes state under '0' for that of no parameter.

    Raises:
      errors.ArgsTypeError: no state_dict of an optimizer.
    """
    state = tree.get("state") if isinstance(tree, Mapping) else None
    if not isinstance(state, Mapping) or not all(str(key).isdecimal() for key in state):
        raise errors.ArgsTypeError(
            "This is no state_dict of an optimizer: expected a dict with 'state', whose keys are numbers, and 'param_groups'."
        )
    return {**tree, "state": {int(key): value for key, value in state.items()}}
