"""A file system in memory whose disk is slow, or fails, and which records what a power cut would leave: a program of its own.

It speaks the kernel's protocol (<linux/fuse.h>), so that nothing but the kernel is needed, and every call can be answered as a
test wants. It mounts itself at the directory that its argument names, until stdin ends. Requests come as lines of JSON on stdin;
for each, one line of JSON goes to stdout:

    {"behave": {...}}     the fields of `Behaviour`; calls are counted from 1 again
    {"record": "path"}    pickles the events since the file system was made into that file, and answers how often calls came
"""

from __future__ import annotations

import collections
import contextlib
import ctypes
import errno
import json
import os
import pickle
import stat
import struct
import sys
import threading
import time
import traceback
from collections.abc import Callable
from typing import Any

import attrs
from faults.survival import ROOT, Dropped, Event, Named, Sized, Synced, Written

_THREADS = 12
_MAX_WRITE = 1 << 17
_MS_NOSUID_NODEV, _MNT_DETACH = 2 | 4, 2
_EXCHANGE = 2
_BIG_WRITES = 1 << 5
_CACHE_SECS = 1
_SET_MODE, _SET_USER, _SET_GROUP, _SET_SIZE, _SET_MTIME = 1, 2, 4, 8, 32


@attrs.frozen
class Behaviour:
    """How the disk answers.

    Attributes:
      write_secs, sync_secs: how long each write, and each sync, takes.
      short: a write takes half of what it is given.
      lying: a sync does nothing, and says that it did.
      exchange: whether two names can be exchanged.
      fails: the number of the one call that fails with EIO, by kind: 'fsync', 'fsyncdir', or 'close' of what was written.
        A file whose sync failed, or whose close did, loses what was not synced before.
    """

    write_secs: float = 0
    sync_secs: float = 0
    short: bool = False
    lying: bool = False
    exchange: bool = True
    fails: dict[str, int] = attrs.Factory(dict)


@attrs.define
class Node:
    """A file, or a directory, which has entries."""

    number: int
    mode: int
    user: int = 0
    group: int = 0
    modified_ns: int = attrs.field(factory=time.time_ns)
    changed_ns: int = attrs.field(factory=time.time_ns)
    data: bytearray = attrs.field(factory=bytearray)
    entries: dict[str, Node] = attrs.field(factory=dict)

    def attributes(self) -> bytes:
        """`struct fuse_attr`."""
        size, times = len(self.data), (self.modified_ns, self.modified_ns, self.changed_ns)
        seconds, rest = zip(*(divmod(ns, 10**9) for ns in times), strict=True)
        links = 2 if stat.S_ISDIR(self.mode) else 1
        numbers = (self.number, size, -(-size // 512), *seconds, *rest, self.mode, links, self.user, self.group, 0, 4096, 0)
        return struct.pack("<6Q10I", *numbers)

    def entry(self) -> bytes:
        """`struct fuse_entry_out`."""
        return struct.pack("<4Q2I", self.number, 0, _CACHE_SECS, _CACHE_SECS, 0, 0) + self.attributes()


@attrs.frozen
class Call:
    """A request of the kernel's: the node it is about, who asks, and what follows the header."""

    node: Node
    user: int
    group: int
    body: bytes

    def fields(self, layout: str) -> tuple[Any, ...]:
        return struct.unpack_from(f"<{layout}", self.body)

    def names(self, start: int = 0) -> list[str]:
        """Those that follow the fields."""
        return [os.fsdecode(name) for name in self.body[start:].split(b"\0")[:-1]]


class FileSystem:
    """Answers calls. What raises OSError is answered with its errno."""

    def __init__(self) -> None:
        self.behaviour = Behaviour()
        self.counts: collections.Counter[str] = collections.Counter()
        self.events: list[Event] = []
        self.lock = threading.Lock()
        self._nodes = {ROOT: Node(ROOT, stat.S_IFDIR | 0o755)}
        self._answers: dict[int, Callable[[Call], bytes]] = {
            1: self._lookup,
            3: self._getattr,
            4: self._setattr,
            9: self._mkdir,
            10: self._unlink,
            11: self._rmdir,
            12: self._rename,
            14: self._open,
            15: self._read,
            16: self._write,
            17: lambda call: struct.pack("<5Q4I24x", 1 << 30, 1 << 29, 1 << 29, 1 << 20, 1 << 19, 4096, 255, 4096, 0),  # statfs
            18: lambda call: b"",  # release
            20: self._fsync,
            25: self._flush,
            26: lambda call: struct.pack("<4I2H2I2H8I", 7, 31, 1 << 17, _BIG_WRITES, 12, 9, _MAX_WRITE, 1, *[0] * 10),  # init
            27: lambda call: struct.pack("<QII", 0, 0, 0),  # opendir
            28: self._readdir,
            29: lambda call: b"",  # releasedir
            30: self._fsyncdir,
            35: self._create,
            45: self._rename2,
        }

    def answer(self, opcode: int, number: int, user: int, group: int, body: bytes) -> bytes:
        """What follows the header of the answer."""
        if opcode not in self._answers:
            raise OSError(errno.ENOSYS, "the kernel does without")
        time.sleep({16: self.behaviour.write_secs, 20: self.behaviour.sync_secs, 30: self.behaviour.sync_secs}.get(opcode, 0))
        with self.lock:
            return self._answers[opcode](Call(self._nodes.get(number, self._nodes[ROOT]), user, group, body))

    def _fails(self, kind: str) -> bool:
        self.counts[kind] += 1
        return self.behaviour.fails.get(kind) == self.counts[kind]

    def _named(self, *entries: tuple[Node, str, Node | None], made: int = 0) -> None:
        """Changes entries of directories at once."""
        for directory, name, node in entries:
            directory.entries.pop(name, None)
            directory.modified_ns = directory.changed_ns = time.time_ns()
            if node is not None:
                directory.entries[name] = node
                node.changed_ns = time.time_ns()
        changes = {(directory.number, name): node and node.number for directory, name, node in entries}
        self.events.append(Named(changes, made))

    def _make(self, call: Call, name: str, mode: int) -> Node:
        if name in call.node.entries:
            raise OSError(errno.EEXIST, name)
        node = Node(len(self._nodes) + 1, mode, call.user, call.group)
        self._nodes[node.number] = node
        self._named((call.node, name, node), made=node.number if stat.S_ISDIR(mode) else 0)
        return node

    def _lookup(self, call: Call) -> bytes:
        return _entry(call.node, call.names()[0]).entry()

    def _getattr(self, call: Call) -> bytes:
        return struct.pack("<QII", _CACHE_SECS, 0, 0) + call.node.attributes()

    def _setattr(self, call: Call) -> bytes:
        node = call.node
        what, _, size, _, mtime, mtime_ns, mode, user, group = call.fields("I4xQQ8xQQ8x4xI4xI4xII")
        if what & _SET_MODE:
            node.mode = stat.S_IFMT(node.mode) | stat.S_IMODE(mode)
        node.user = user if what & _SET_USER else node.user
        node.group = group if what & _SET_GROUP else node.group
        node.changed_ns = time.time_ns()
        if what & _SET_SIZE:
            node.data = node.data[:size].ljust(size, b"\0")
            self.events.append(Sized(node.number, size, cut=True))
        if what & (_SET_SIZE | _SET_MTIME):
            node.modified_ns = mtime * 10**9 + mtime_ns if what & _SET_MTIME else node.changed_ns
        return self._getattr(call)

    def _mkdir(self, call: Call) -> bytes:
        return self._make(call, call.names(8)[0], stat.S_IFDIR | call.fields("I")[0]).entry()

    def _create(self, call: Call) -> bytes:
        return self._make(call, call.names(16)[0], call.fields("II")[1]).entry() + self._open(call)

    def _unlink(self, call: Call) -> bytes:
        name = call.names()[0]
        _entry(call.node, name)
        self._named((call.node, name, None))
        return b""

    def _rmdir(self, call: Call) -> bytes:
        if _entry(call.node, call.names()[0]).entries:
            raise OSError(errno.ENOTEMPTY, call.names()[0])
        return self._unlink(call)

    def _rename(self, call: Call, layout: str = "Q") -> bytes:
        other = self._nodes[call.fields("Q")[0]]
        before, after = call.names(struct.calcsize(f"<{layout}"))
        if after in other.entries and other.entries[after].entries:
            raise OSError(errno.ENOTEMPTY, after)
        self._named((call.node, before, None), (other, after, _entry(call.node, before)))
        return b""

    def _rename2(self, call: Call) -> bytes:
        number, flags = call.fields("QI")
        if not flags:
            return self._rename(call, "QI4x")
        if flags != _EXCHANGE or not self.behaviour.exchange:
            raise OSError(errno.EINVAL, "no such rename")
        one, other = call.node, self._nodes[number]
        name, other_name = call.names(16)
        self._named((one, name, _entry(other, other_name)), (other, other_name, _entry(one, name)))
        return b""

    def _open(self, call: Call) -> bytes:
        """The handle tells, when it is closed, whether it was open for writing."""
        return struct.pack("<QII", call.fields("I")[0] & os.O_ACCMODE != os.O_RDONLY, 0, 0)

    def _read(self, call: Call) -> bytes:
        _, offset, size = call.fields("QQI")
        return bytes(call.node.data[offset : offset + size])

    def _write(self, call: Call) -> bytes:
        _, offset, size = call.fields("QQI")
        data = call.body[40 : 40 + (-(-size // 2) if self.behaviour.short else size)]
        node = call.node
        node.data.extend(bytes(max(0, offset - len(node.data))))
        node.data[offset : offset + len(data)] = data
        node.modified_ns = node.changed_ns = time.time_ns()
        self.events.append(Written(node.number, offset, data))
        return struct.pack("<II", len(data), 0)

    def _flush(self, call: Call) -> bytes:
        if call.fields("Q")[0] and self._fails("close"):
            self.events.append(Dropped(call.node.number))
            raise OSError(errno.EIO, "a close that fails")
        return b""

    def _fsync(self, call: Call) -> bytes:
        if self._fails("fsync"):
            self.events.append(Dropped(call.node.number))
            raise OSError(errno.EIO, "a sync that fails")
        return self._synced(call)

    def _fsyncdir(self, call: Call) -> bytes:
        if self._fails("fsyncdir"):
            raise OSError(errno.EIO, "a sync that fails")
        return self._synced(call)

    def _synced(self, call: Call) -> bytes:
        if not self.behaviour.lying:
            self.events.append(Synced(call.node.number))
        return b""

    def _readdir(self, call: Call) -> bytes:
        """Entries by number, so that what goes meanwhile moves none of the others."""
        _, after, size = call.fields("QQI")
        answer = b""
        for name, node in sorted(call.node.entries.items(), key=lambda item: item[1].number):
            encoded = os.fsencode(name)
            entry = struct.pack("<QQII", node.number, node.number, len(encoded), stat.S_IFMT(node.mode) >> 12) + encoded
            entry += bytes(-len(entry) % 8)
            if node.number > after:
                if len(answer) + len(entry) > size:
                    break
                answer += entry
        return answer


def _entry(directory: Node, name: str) -> Node:
    if name not in directory.entries:
        raise OSError(errno.ENOENT, name)
    return directory.entries[name]


def _serve(device: int, system: FileSystem) -> None:
    """Answers the kernel until the file system is unmounted."""
    while True:
        try:
            request = os.read(device, _MAX_WRITE + (1 << 16))
        except OSError as error:
            if error.errno in (errno.ENOENT, errno.EINTR, errno.EAGAIN):  # a call that was interrupted before it was read
                continue
            return
        _, opcode, unique, number, user, group = struct.unpack_from("<IIQQII", request)
        if opcode in (2, 42):  # what the kernel forgets, it wants no answer to
            continue
        code, body = 0, b""
        try:
            body = system.answer(opcode, number, user, group, request[40:])
        except OSError as error:
            code = error.errno or errno.EIO
        except Exception:  # a mistake of this program's: who called is not left waiting
            traceback.print_exc()
            code = errno.EIO
        with contextlib.suppress(OSError):  # nobody waits for it any more
            os.write(device, struct.pack("<IiQ", 16 + len(body), -code, unique) + body)


def main() -> None:
    """Mounts, answers requests until stdin ends, and unmounts."""
    target = os.fsencode(sys.argv[1])
    libc = ctypes.CDLL(None, use_errno=True)
    device = os.open("/dev/fuse", os.O_RDWR)
    options = f"fd={device},rootmode=40000,user_id=0,group_id=0,allow_other,default_permissions".encode()
    if libc.mount(b"ckptkit", target, b"fuse", _MS_NOSUID_NODEV, options):
        code = ctypes.get_errno()
        raise OSError(code, os.strerror(code), sys.argv[1])
    system = FileSystem()
    for _ in range(_THREADS):
        threading.Thread(target=_serve, args=(device, system), daemon=True).start()
    print("mounted", flush=True)
    for line in sys.stdin:
        request = json.loads(line)
        with system.lock:
            if "behave" in request:
                system.behaviour = Behaviour(**request["behave"])
                system.counts.clear()
            else:
                with open(request["record"], "wb") as record:
                    pickle.dump(system.events, record)
            print(json.dumps(system.counts), flush=True)
    libc.umount2(target, _MNT_DETACH)


if __name__ == "__main__":
    main()
