"""What handlers, type handlers and storage backends answer, checked: a plugin's mistake is one error that says whose it is.

Each function looks at the answer for a batch as a whole, and closer at what differs in it: at a layout that 10,000 leaves
share, once. Most make the call too; what leads to TensorStore is called by the pipeline itself, to keep the stack flat.
What a plugin raises that is no error of ckptkit's is its mistake too; what the operating system says, and what ckptkit's
own classes raise, stays what it is.
"""

from __future__ import annotations

import concurrent.futures
import contextlib
import inspect
from collections.abc import Awaitable, Collection, Coroutine, Iterable, Iterator, Mapping, Sequence
from typing import Any, Final, TypeVar

import numpy as np
import orjson

from ckptkit import errors
from ckptkit._gc import resumed_gc
from ckptkit.grid import Array, ArraySpec, Chunk, Index, chunk_count, index_shape
from ckptkit.handlers.base import CheckpointHandler
from ckptkit.leaves.base import Kinds, Leaf, LeafSpec, Problem, RestoreArgs, TypeHandler
from ckptkit.location import Location
from ckptkit.options import RestoreDefaults
from ckptkit.processes import Job
from ckptkit.registry import Registry
from ckptkit.storage.base import StorageBackend

__all__ = [
    "Answers",
    "assembled",
    "calling",
    "chunks",
    "coroutine",
    "described",
    "directories",
    "futures",
    "heads",
    "instance",
    "keys",
    "kinds",
    "name_refusals",
    "needed",
    "owned",
    "recognising",
    "refusals",
    "requested",
    "shared",
    "staged_sizes",
    "stored_arrays",
    "synchronous",
    "typestr",
    "unhurried",
]

T = TypeVar("T")

_STOP_SECS: Final = 60.0
"""How long whoever writes by a wrong answer may take to stop."""


class Answers:
    """Whose mistakes are told, and how.

    Args:
      registry: knows who registered what.
      thing: the type handler, backend, writer or reader that is called.
      method: what of it is called.
    """

    def __init__(self, registry: Registry, thing: object, method: str) -> None:
        self._registry = registry
        self._thing = thing
        self._method = method

    def mistake(self, wrong: str) -> errors.PluginError:
        """The error for what the call did, such as 'returned None; expected ...'."""
        owner, cls = self._registry.owner_of(self._thing), type(self._thing)
        return errors.PluginError(f"Plugin {owner}: {cls.__module__}.{cls.__qualname__}.{self._method} {wrong}.")

    def each(self, answer: Any, count: int, what: str, kinds: tuple[type, ...]) -> Sequence[Any]:
        """The answer as a sequence of as many things as there should be, all of some types.

        Raises:
          errors.PluginError: it is not.
        """
        expected = f"expected {count} of {' or '.join(kind.__name__ for kind in kinds)}, one for each {what}"
        if not isinstance(answer, Sequence) or isinstance(answer, str):
            raise self.mistake(f"returned {type(answer).__name__}; {expected}")
        if len(answer) != count:
            raise self.mistake(f"returned {len(answer)} results for {count}; {expected}")
        if wrong := [kind for kind in set(map(type, answer)) if not issubclass(kind, kinds)]:
            raise self.mistake(f"returned {wrong[0].__name__} among its results; {expected}")
        return answer

    @property
    def is_builtin(self) -> bool:
        return self._registry.owner_of(self._thing).is_builtin


@contextlib.contextmanager
def calling(registry: Registry, thing: object, method: str) -> Iterator[Answers]:
    """A call to something that a plugin made, and the checks of what it returned.

    Raises:
      errors.PluginError: the call raised what is neither an error of ckptkit's nor one of the operating system's.
    """
    answers = Answers(registry, thing, method)
    try:
        yield answers
    except (errors.CheckpointError, OSError, MemoryError):
        raise
    except Exception as error:
        if answers.is_builtin:
            raise
        raise answers.mistake(f"raised {type(error).__name__}: {error}") from error


def unhurried(registry: Registry, handler: CheckpointHandler) -> contextlib.AbstractContextManager[None]:
    """Where a plugin's handler runs for as long as it likes: garbage is collected meanwhile, as it would be without ckptkit."""
    return contextlib.nullcontext() if registry.owner_of(handler).is_builtin else resumed_gc()


def instance(answers: Answers, answer: T, kind: type) -> T:
    """The answer, which must be of a type.

    Raises:
      errors.PluginError: it is of another.
    """
    if not isinstance(answer, kind):
        raise answers.mistake(f"returned {_shown(answer)}; expected a {kind.__module__}.{kind.__qualname__}")
    return answer


def kinds(registry: Registry, handler: TypeHandler[Any], leaves: Sequence[Any]) -> Kinds | None:
    """What `TypeHandler.kinds` says of leaves."""
    with calling(registry, handler, "kinds") as answers:
        found = handler.kinds(leaves)
        if found is None or answers.is_builtin:
            return found
        instance(answers, found, Kinds)
        try:
            hash(found)
        except TypeError as error:
            raise answers.mistake(f"returned what cannot be hashed ({error}); expected Kinds of hashables, or None") from error
        numbers = list(dict.fromkeys(answers.each(found.numbers, len(leaves), "leaf", (int,))))
        if numbers != list(range(len(found.keys))):
            raise answers.mistake(
                f"returned the numbers {_shown(numbers)} for {len(found.keys)} kinds; expected them from 0 on, as they appear"
            )
        return found


def described(registry: Registry, handler: TypeHandler[Any], leaves: Sequence[Leaf]) -> Sequence[LeafSpec | Problem]:
    """What `TypeHandler.describe` says of leaves, each spec one that can be written."""
    with calling(registry, handler, "describe") as answers:
        found = answers.each(handler.describe(leaves), len(leaves), "leaf", (LeafSpec, Problem))
        specs = [(leaf, spec) for leaf, spec in zip(leaves, found, strict=True) if isinstance(spec, LeafSpec)]
        if strange := {spec.typestr for _, spec in specs} - {handler.typestr}:
            raise answers.mistake(f"returned a LeafSpec of typestr {strange.pop()!r}; expected its own, {handler.typestr!r}")
        inline = handler.orbax_typestr == "string"
        for leaf, spec in specs:
            if inline:
                wrong = spec.array is not None or not isinstance(spec.inline, str)
            else:
                wrong = not isinstance(spec.array, ArraySpec) or spec.array.name != leaf.name
            if wrong:
                what = "a str inline and no array" if inline else f"an ArraySpec named {leaf.name!r}"
                raise answers.mistake(f"returned {_shown(spec)} for {leaf.name!r}; expected a LeafSpec with {what}")
        _check_layouts(answers, [spec.array for _, spec in specs if spec.array is not None])
        _check_json(answers, [spec for _, spec in specs])
        return found


def _check_json(answers: Answers, specs: Sequence[LeafSpec]) -> None:
    shared = {id(value): value for spec in specs for value in (spec.extra, spec.sharding)}
    for value in shared.values():
        try:
            orjson.dumps(dict(value or {}))
        except (TypeError, ValueError) as error:
            raise answers.mistake(
                f"returned a LeafSpec with {_shown(value)} as extra or sharding ({error}); expected a dict that JSON holds"
            ) from error


def _check_layouts(answers: Answers, arrays: Sequence[ArraySpec]) -> None:
    for layout in _distinct(answers, [array[1:] for array in arrays]):
        if (reason := _wrong_layout(*layout)) is not None:
            raise answers.mistake(f"returned an ArraySpec of shape, dtype and chunk_shape {layout}: {reason}")


def _wrong_layout(shape: Any, dtype: Any, chunk_shape: Any) -> str | None:
    if not isinstance(dtype, np.dtype):
        return f"{dtype!r} is no numpy dtype"
    if not (_is_ints(shape, 0) and _is_ints(chunk_shape, 1) and len(shape) == len(chunk_shape)):
        return "expected two tuples of ints of one length, chunks at least 1 long"
    return None


def _is_ints(value: Any, least: int) -> bool:
    return isinstance(value, tuple) and all(isinstance(n, int) and n >= least for n in value)


def owned(
    registry: Registry, handler: TypeHandler[Any], leaves: Sequence[Leaf], specs: Sequence[LeafSpec], job: Job
) -> Sequence[Sequence[Index] | Problem]:
    """What `TypeHandler.owned` says of leaves: cells of their grids, each once; all of them where there is one process."""
    with calling(registry, handler, "owned") as answers:
        found = answers.each(handler.owned(leaves, specs, job), len(leaves), "leaf", (Sequence, Problem))
        grids = [
            (spec.array and spec.array[1:], tuple(cells))
            for spec, cells in zip(specs, found, strict=True)
            if not isinstance(cells, Problem)
        ]
        for grid, cells in _distinct(answers, grids):
            array = grid and ArraySpec("", *grid)
            if wrong := [cell for cell in cells if array is None or not _is_cell(array, cell)]:
                raise answers.mistake(f"returned {_shown(wrong[0])} for {grid}; expected cells of the array's grid")
            count = chunk_count(array) if array and job.process_count == 1 else len(cells)
            if len(cells) != count or len(set(cells)) != count:
                raise answers.mistake(f"returned {len(cells)} cells for {grid}; expected each of the {count} of its grid once")
        return found


def _is_cell(array: ArraySpec, cell: Any) -> bool:
    axes = zip(cell, array.shape, array.chunk_shape, strict=True) if _is_index(cell, array.shape) else [((1, 0), 0, 1)]
    return all(start % c == 0 and start < stop == min(start + c, n) for (start, stop), n, c in axes)


def _is_index(index: Any, shape: Sequence[int]) -> bool:
    """Whether something is a part of an array of this shape."""
    if not isinstance(index, tuple) or len(index) != len(shape):
        return False
    return all(_is_ints(bounds, 0) and len(bounds) == 2 for bounds in index) and all(
        start <= stop <= n for (start, stop), n in zip(index, shape, strict=True)
    )


def staged_sizes(registry: Registry, handler: TypeHandler[Any], pieces: Sequence[tuple[Any, LeafSpec, Index]]) -> Sequence[int]:
    """What `TypeHandler.staged_nbytes` says of cells."""
    with calling(registry, handler, "staged_nbytes") as answers:
        sizes = answers.each(handler.staged_nbytes(pieces), len(pieces), "cell", (int,))
        if sizes and min(sizes) < 0:
            raise answers.mistake(f"returned {min(sizes)}; expected sizes in bytes")
        return sizes


def chunks(
    registry: Registry, handler: TypeHandler[Any], cells: Sequence[tuple[ArraySpec, Index]], staged: Any
) -> Sequence[Chunk]:
    """What `TypeHandler.stage` returned for cells, as a backend takes it."""
    answers = Answers(registry, handler, "stage")
    answers.each(staged, len(cells), "cell", (np.ndarray,))
    if answers.is_builtin:
        return [Chunk(array, cell, data) for (array, cell), data in zip(cells, staged, strict=True)]
    made = []
    shapes = {id(cell): index_shape(cell) for cell in {id(cell): cell for _, cell in cells}.values()}  # which leaves share
    for (array, cell), data in zip(cells, staged, strict=True):
        if data.dtype != array.dtype or data.shape != shapes[id(cell)] or not data.flags.c_contiguous:
            contiguous = "" if data.flags.c_contiguous else "not C-contiguous "
            raise answers.mistake(
                f"returned a {contiguous}{data.dtype} array of shape {data.shape} for {array.name!r}; expected a C-contiguous "
                f"{array.dtype} array of shape {index_shape(cell)}"
            )
        made.append(Chunk(array, cell, data))
    return made


def requested(
    registry: Registry, handler: TypeHandler[Any], targets: Sequence[Any], specs: Sequence[LeafSpec], defaults: RestoreDefaults
) -> Sequence[RestoreArgs]:
    """What `TypeHandler.requests` makes of a target's leaves."""
    with calling(registry, handler, "requests") as answers:
        return answers.each(handler.requests(targets, specs, defaults), len(specs), "leaf", (RestoreArgs,))


def needed(
    registry: Registry, handler: TypeHandler[Any], specs: Sequence[LeafSpec], requests: Sequence[RestoreArgs], job: Job
) -> Sequence[Sequence[Index] | Problem]:
    """What `TypeHandler.needs` says of leaves: parts of what is stored."""
    with calling(registry, handler, "needs") as answers:
        found = answers.each(handler.needs(specs, requests, job), len(specs), "leaf", (Sequence, Problem))
        parts = [
            (spec.array.shape, tuple(need))
            for spec, need in zip(specs, found, strict=True)
            if spec.array is not None and not isinstance(need, Problem)
        ]
        for shape, indices in _distinct(answers, parts):
            if wrong := [index for index in indices if not _is_index(index, shape)]:
                raise answers.mistake(f"returned {_shown(wrong[0])} for an array of shape {shape}; expected parts of it")
        return found


def shared(
    registry: Registry,
    handler: TypeHandler[Any],
    specs: Sequence[LeafSpec],
    requests: Sequence[RestoreArgs],
    needs: Sequence[Sequence[Index]],
    job: Job,
) -> Sequence[Mapping[Index, tuple[int, ...]]]:
    """What `TypeHandler.sharers` says of leaves, whose `needs` it fits: this process is named where it needs the part."""
    with calling(registry, handler, "sharers") as answers:
        found = answers.each(handler.sharers(specs, requests, job), len(specs), "leaf", (Mapping,))
        for sharers, need in zip(found, needs, strict=True) if not answers.is_builtin else ():
            for part, processes in sharers.items():
                if processes != tuple(sorted({*processes} & {*job.processes})) or (job.process_index in processes) != (
                    part in need
                ):
                    raise answers.mistake(
                        f"returned {_shown(processes)} for {_shown(part)}; expected the processes that need it, in order"
                    )
        return found


def assembled(
    registry: Registry,
    handler: TypeHandler[Any],
    specs: Sequence[LeafSpec],
    requests: Sequence[RestoreArgs],
    parts: Sequence[Mapping[Index, Array]],
) -> Sequence[Any]:
    """The leaves that `TypeHandler.assemble` makes; what they are is its own affair."""
    with calling(registry, handler, "assemble") as answers:
        return answers.each(handler.assemble(specs, requests, parts), len(specs), "leaf", (object,))


def refusals(registry: Registry, backend: StorageBackend, arrays: Sequence[ArraySpec]) -> Sequence[str | None]:
    """What `StorageBackend.refuse` says of arrays."""
    with calling(registry, backend, "refuse") as answers:
        return answers.each(backend.refuse(arrays), len(arrays), "array", (str, type(None)))


def name_refusals(registry: Registry, backend: StorageBackend, names: Sequence[str]) -> Sequence[str | None]:
    """What `StorageBackend.refuse_names` says of names."""
    with calling(registry, backend, "refuse_names") as answers:
        return answers.each(backend.refuse_names(names), len(names), "name", (str, type(None)))


def recognising(registry: Registry, location: Location, writers: Collection[str] = ()) -> StorageBackend | None:
    """A storage backend that says that it recognises a directory: where one of its `writers`, by name, does, that one."""
    for backend in sorted(registry.storages(), key=lambda backend: backend.name not in writers):
        with calling(registry, backend, "recognises"):
            if backend.recognises(location):
                return backend
    return None


def directories(answers: Answers, found: Any) -> Sequence[str]:
    """What `StorageBackend.data_directories` and `ManyWriters.merge` say."""
    listed = list(found)
    return answers.each(listed, len(listed), "directory", (str,))


def heads(answers: Answers, found: Any) -> Mapping[str, int]:
    """What `Writer.data_files` says."""
    listed: Mapping[str, int] = instance(answers, found, Mapping)
    answers.each(list(listed), len(listed), "file", (str,))
    if wrong := [nbytes for nbytes in listed.values() if type(nbytes) is not int or nbytes < 0]:
        raise answers.mistake(f"returned {_shown(wrong[0])} as the size of a head; expected a number of bytes")
    return listed


def keys(registry: Registry, backend: StorageBackend, names: Iterable[str]) -> Mapping[str, tuple[str, ...]]:
    """What `StorageBackend.keys_of` says of names, by name."""
    with calling(registry, backend, "keys_of") as answers:
        found: dict[str, Any] = {name: backend.keys_of(name) for name in names}
        for name, path in found.items():
            if not (isinstance(path, tuple) and path and all(isinstance(key, str) for key in path)):
                raise answers.mistake(f"returned {_shown(path)} for {_shown(name)}; expected a tuple of strings")
        return found


def stored_arrays(answers: Answers, found: Any) -> Mapping[str, ArraySpec]:
    """What `Reader.arrays` says."""
    arrays: Mapping[str, ArraySpec] = instance(answers, found, Mapping)
    values = answers.each(list(arrays.values()), len(arrays), "array", (ArraySpec,))
    if wrong := [name for name, spec in zip(arrays, values, strict=True) if spec.name != name]:
        raise answers.mistake(f"returned an ArraySpec of another name for {_shown(wrong[0])}")
    _check_layouts(answers, values)
    return arrays


def typestr(registry: Registry, handler: CheckpointHandler) -> str:
    """The type string of a handler."""
    answers = Answers(registry, handler, "typestr")
    found = instance(answers, handler.typestr(), str)
    if not found:
        raise answers.mistake("returned ''; expected a name by which another process finds the handler again")
    return found


def coroutine(registry: Registry, handler: CheckpointHandler, answer: Any) -> Coroutine[Any, Any, Any]:
    """What calling `async_save` returns, before it is awaited."""
    if not inspect.iscoroutine(answer):
        raise Answers(registry, handler, "async_save").mistake(
            f"returned {_shown(answer)}; expected a coroutine: define it with async def"
        )
    return answer


def futures(registry: Registry, handler: CheckpointHandler, answer: Any) -> list[concurrent.futures.Future[Any]]:
    """What awaiting `async_save` gives; nobody writes any more where that is wrong."""
    several = isinstance(answer, Iterable) and not isinstance(answer, str | Awaitable)  # an asyncio.Future is iterable, too
    listed = list(answer) if several else [] if answer is None else [answer]
    made = [future for future in listed if isinstance(future, concurrent.futures.Future)]
    if (several or answer is None) and len(made) == len(listed):
        return made
    # The directory is about to be removed.
    concurrent.futures.wait([future for future in made if not future.cancel()], _STOP_SECS)
    raise Answers(registry, handler, "async_save").mistake(
        f"returned {_shown(answer)}; expected a list of concurrent.futures.Future, or None"
    )


def synchronous(registry: Registry, handler: CheckpointHandler, answer: Any) -> None:
    """What `save` of a handler returns, which must not be a coroutine: nothing would have been written."""
    if inspect.iscoroutine(answer):
        answer.close()
        raise Answers(registry, handler, "save").mistake(
            "is a coroutine; expected a plain method, or a subclass of AsyncCheckpointHandler with async_save"
        )


def _distinct(answers: Answers, values: Sequence[Any]) -> set[Any]:
    """Values without repetition, so that what leaves share is looked at once.

    Raises:
      errors.PluginError: they hold what indices and shapes cannot.
    """
    try:
        return set(values)
    except TypeError as error:
        raise answers.mistake(f"returned what is no shape and no index ({error}); expected tuples of ints") from error


def _shown(value: Any) -> str:
    shown = repr(value)
    return shown if len(shown) <= 200 else f"{shown[:200]}..."
