"""The handlers of random state: a PRNG key of JAX, a generator of NumPy. A folder for the values, a JSON file for the rest.

Nothing stored is executed: the only classes that a checkpoint can name are NumPy's own bit generators.
"""

from __future__ import annotations

import abc
import re
from collections.abc import Mapping
from concurrent.futures import Future
from typing import TYPE_CHECKING, Any, ClassVar, Final

import jax
import numpy as np

from ckptkit import args as args_lib
from ckptkit import errors, tree
from ckptkit.handlers.array import ArrayCheckpointHandler
from ckptkit.handlers.base import DelegatingHandler, folded_args
from ckptkit.handlers.json import JsonCheckpointHandler
from ckptkit.handlers.pytree import PyTreeCheckpointHandler

if TYPE_CHECKING:
    from etils import epath

__all__ = ["JaxRandomKeyCheckpointHandler", "NumpyRandomKeyCheckpointHandler"]

Json = dict[str, Any]


class _RandomKeyHandler(DelegatingHandler):
    """What both have in common: `<key_name>/` holds the values, `<key_name>_metadata/metadata` says what they are."""

    _save_class: ClassVar[type[args_lib.CheckpointArgs]]

    def __init__(self, key_name: str, values: ArrayCheckpointHandler | PyTreeCheckpointHandler) -> None:
        args_lib.check_item_name(key_name)
        self._key_name = key_name
        self._values = values
        self._description = JsonCheckpointHandler()
        super().__init__(self._values, self._description)

    async def async_save(self, directory: epath.Path, item: Any = None, args: Any = None) -> list[Future[Any]] | None:
        """Stages the key and starts to write it. `item` is deprecated: `args` says the same, by position too, as in Orbax.

        Raises:
          errors.ArgsTypeError: the item is no random key of this kind.
        """
        if isinstance(item, self._save_class):
            item, args = None, item
        args = folded_args(self._save_class, args, item=item)
        value_args, description = self._described(args)
        folder, beside = self._folders(directory)
        folder.mkdir()
        beside.mkdir()
        self._description.save(beside, args=args_lib.JsonSave(description))
        return await self._values.async_save(folder, args=value_args)

    def restore(self, directory: epath.Path, args: Any = None) -> Any:
        """The key as it was saved.

        Raises:
          errors.NotFoundError: there is none of this handler's `key_name`.
          errors.FormatError: what is there makes no key.
        """
        folder, beside = self._folders(directory)
        if not beside.exists():
            names = [path.name.removesuffix("_metadata") for path in directory.iterdir() if path.name.endswith("_metadata")]
            raise errors.NotFoundError(
                f"{directory} holds no random key of the name {self._key_name!r}, but {', '.join(sorted(names)) or 'none'}; "
                f"pass the name it was saved under: {type(self).__name__}(key_name)."
            )
        description = self._description.restore(beside)
        if not isinstance(description, dict):
            raise errors.FormatError(f"{beside}: expected a JSON object that describes a key, found {description!r:.100}.")
        restored = self._values.restore(folder, args=self._restore_args(args))
        try:
            return self._made(restored, description)
        except errors.CheckpointError:
            raise
        except (AttributeError, IndexError, KeyError, OverflowError, TypeError, ValueError) as error:
            what = f"{type(error).__name__}: {error}"
            raise errors.FormatError(f"{directory}: what is stored makes no random key ({what}); it is damaged.") from error

    def _folders(self, directory: epath.Path) -> tuple[epath.Path, epath.Path]:
        return directory / self._key_name, directory / f"{self._key_name}_metadata"

    @abc.abstractmethod
    def _described(self, args: Any) -> tuple[Any, Json]:
        """Args to save the values with, and what they are."""

    @abc.abstractmethod
    def _restore_args(self, args: Any) -> Any:
        """Args to restore the values with."""

    @abc.abstractmethod
    def _made(self, restored: Any, description: Json) -> Any:
        """The key; any error that values of the wrong kind lead to becomes an `errors.FormatError`."""


class JaxRandomKeyCheckpointHandler(_RandomKeyHandler):
    """Saves PRNG keys of JAX, typed ones of any implementation and raw uint32 ones, single or in arrays.

    Args:
      key_name: of the folder; 'jax_random_key' by default.

    Raises:
      errors.ArgsError: the name cannot be a folder's.
    """

    _save_class = args_lib.JaxRandomKeySave

    def __init__(self, key_name: str | None = None) -> None:
        super().__init__("jax_random_key" if key_name is None else key_name, ArrayCheckpointHandler())

    @classmethod
    def typestr(cls) -> str:
        return "orbax.checkpoint._src.handlers.random_key_checkpoint_handler.JaxRandomKeyCheckpointHandler"

    def _described(self, args: args_lib.JaxRandomKeySave) -> tuple[args_lib.ArraySave, Json]:
        key = args.item
        if not isinstance(key, jax.Array) or not (_is_typed(key) or (key.dtype == np.uint32 and key.ndim)):
            found = f"{type(key)} of dtype {key.dtype}" if isinstance(key, jax.Array) else str(type(key))
            raise errors.ArgsTypeError(f"Unsupported type: {found}. Expected a key of jax.random.key or jax.random.PRNGKey.")
        if not _is_typed(key):
            return args_lib.ArraySave(key, args.save_args), {"typed": False}
        impl = str(jax.random.key_impl(key))
        if impl != "threefry2x32":
            # Orbax makes a threefry key of whatever is 'typed'; of an array whose own record names the implementation it makes
            # the right one.
            return args_lib.ArraySave(key, args.save_args), {"typed": False, "impl": impl}
        return args_lib.ArraySave(jax.random.key_data(key), args.save_args), {"typed": True, "impl": impl}

    def _restore_args(self, args: args_lib.JaxRandomKeyRestore | None) -> args_lib.ArrayRestore:
        return args_lib.ArrayRestore(restore_args=args.restore_args if args else None)

    def _made(self, restored: Any, description: Json) -> Any:
        if not description["typed"]:
            return restored
        return jax.random.wrap_key_data(restored, impl=description.get("impl"))


def _is_typed(key: jax.Array) -> bool:
    return not isinstance(key.dtype, np.dtype)  # the one kind whose dtype is jax's own


class NumpyRandomKeyCheckpointHandler(_RandomKeyHandler):
    """Saves random state of NumPy: `np.random.get_state()`, either form, a `Generator`, a `BitGenerator`, or its `state`.

    Args:
      key_name: of the folder; 'np_random_key' by default.

    Raises:
      errors.ArgsError: the name cannot be a folder's.
    """

    _save_class = args_lib.NumpyRandomKeySave

    def __init__(self, key_name: str | None = None) -> None:
        super().__init__("np_random_key" if key_name is None else key_name, PyTreeCheckpointHandler())

    @classmethod
    def typestr(cls) -> str:
        return "orbax.checkpoint._src.handlers.random_key_checkpoint_handler.NumpyRandomKeyCheckpointHandler"

    def _described(self, args: args_lib.NumpyRandomKeySave) -> tuple[args_lib.PyTreeSave, Json]:
        state, description = _state(args.item)
        values, structure = tree.flatten(state)
        wide = [i for i, value in enumerate(values) if type(value) is int and not -(2**63) <= value < 2**63]
        for i in wide:
            values[i] = str(values[i])  # no array holds it
        description["integers"] = [list(structure.paths[i]) for i in wide]
        return args_lib.PyTreeSave(structure.unflatten(values)), description

    def _restore_args(self, args: args_lib.NumpyRandomKeyRestore | None) -> args_lib.PyTreeRestore:
        return args_lib.PyTreeRestore()

    def _made(self, restored: Any, description: Json) -> Any:
        values, structure = tree.flatten(restored)
        wide = {tuple(path) for path in description.get("integers", [])}
        state = structure.unflatten(
            [_integer(value) if path in wide else value for path, value in zip(structure.paths, values, strict=True)]
        )
        _check_position(state)
        if description["legacy"] is not isinstance(state, list):
            raise TypeError(f"a {type(state).__name__} where legacy is {description['legacy']!r}")
        if isinstance(state, list):
            return tuple(state)
        match description.get("type"):
            case None:
                return state
            case "Generator":
                return np.random.Generator(_bit_generator(state, description))
            case "BitGenerator":
                return _bit_generator(state, description)
        raise ValueError(f"type {description['type']!r}, expected 'Generator' or 'BitGenerator'")


def _bit_generator(state: Any, description: Json) -> Any:
    made = _BIT_GENERATORS[state["bit_generator"]](_seed_sequence(description.get("seed_sequence")))
    made.state = state
    return made


_BIT_GENERATORS: Final[Mapping[str, Any]] = {
    kind.__name__: kind for kind in (np.random.MT19937, np.random.PCG64, np.random.PCG64DXSM, np.random.Philox, np.random.SFC64)
}


def _state(item: Any) -> tuple[Any, Json]:
    """The state as a tree, and what it is the state of."""
    if isinstance(item, tuple):
        return item, {"legacy": True}
    if isinstance(item, dict):
        return item, {"legacy": False}
    bit_generator = item.bit_generator if isinstance(item, np.random.Generator) else item
    if type(bit_generator) not in _BIT_GENERATORS.values():
        raise errors.ArgsTypeError(
            f"Unsupported type: {type(bit_generator)}. Expected np.random.get_state(), a Generator or BitGenerator of NumPy's, "
            "or the state of one as a dict."
        )
    kind = "BitGenerator" if bit_generator is item else "Generator"
    return bit_generator.state, {"legacy": False, "type": kind, "seed_sequence": _seed(bit_generator.seed_seq)}


def _seed(sequence: Any) -> Json | None:
    """What `spawn` needs of a bit generator's seed; None where it has no seed of NumPy's kind."""
    if type(sequence) is not np.random.SeedSequence:
        return None
    state = sequence.state
    entropy = state["entropy"]
    return {
        "entropy": entropy if entropy is None or isinstance(entropy, int) else [int(word) for word in entropy],
        "spawn_key": [int(word) for word in state["spawn_key"]],
        "pool_size": state["pool_size"],
        "n_children_spawned": state["n_children_spawned"],
    }


_MAX_POOL_SIZE: Final = 1024  # mixing a pool takes the square of its size; 4 is what NumPy makes


def _seed_sequence(seed: Json | None) -> np.random.SeedSequence | None:
    if seed is None:
        return None
    if not 0 < seed["pool_size"] <= _MAX_POOL_SIZE:
        raise ValueError(f"a seed's pool of {seed['pool_size']} words, expected at most {_MAX_POOL_SIZE}")
    return np.random.SeedSequence(**{key: seed[key] for key in ("entropy", "spawn_key", "pool_size", "n_children_spawned")})


def _integer(text: str) -> int:
    if not re.fullmatch(r"-?[0-9]{1,100}", text):
        raise ValueError(f"{text[:100]!r} is no integer of a generator's state")
    return int(text)


def _check_position(state: Any) -> None:
    """A position in a generator's buffer lies in it, which NumPy does not check before it reads there."""
    match state:
        case ["MT19937", _, position, *_] | {"bit_generator": "MT19937", "state": {"pos": position}}:
            last = 624
        case {"bit_generator": "Philox", "buffer_pos": position}:
            last = 4
        case _:
            return
    if not 0 <= position <= last:
        raise ValueError(f"the position in the generator's buffer is {position}, expected 0 to {last}")
