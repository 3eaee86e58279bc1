"""Memory that other processes of the same host may map to read: a sealed file without a path (memfd), in huge pages.

Its owner makes it with `allocate`; others `attach` it through /proc/PID/fd/N, which the kernel grants to processes of
the same user that see its PID. Its random name is its identity: a process of another host or of a later life has no
file of that name. It lives until its owner and all that mapped it are gone, and leaves nothing behind. Linux only.
"""

from __future__ import annotations

import contextlib
import ctypes
import fcntl
import mmap
import os
import secrets
import weakref

from duopool.core.messages import SharedMemory

HUGE_PAGE_BYTES = 2 << 20
SEALS = 0x1 | 0x2 | 0x4 | 0x10
"""F_SEAL_SEAL, _SHRINK, _GROW and _FUTURE_WRITE: its size stays, so that a read never runs past its end (SIGBUS), and
only the owner, who has mapped it already, writes."""

_FAILED = ctypes.c_void_p(-1).value
_PROT_NONE, _MAP_FIXED, _MAP_NORESERVE = 0x0, 0x10, 0x4000
_MADV_HUGEPAGE, _MADV_COLLAPSE = 14, 25

_libc = ctypes.CDLL(None, use_errno=True)


def _declare() -> None:
    address, number, flags = ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int
    _libc.mmap.argtypes = [address, number, flags, flags, flags, ctypes.c_int64]
    _libc.mmap.restype = address
    _libc.munmap.argtypes = [address, number]
    _libc.madvise.argtypes = [address, number, flags]


_declare()


class Mapping:
    """A file in this process's memory, from an address at which huge pages can lie. Raises OSError."""

    def __init__(self, file: int, num_bytes: int, protection: int) -> None:
        self._num_reserved = num_bytes + HUGE_PAGE_BYTES
        anywhere = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | _MAP_NORESERVE
        self._reserved = _map(None, self._num_reserved, _PROT_NONE, anywhere, -1)
        self.address = -(-self._reserved // HUGE_PAGE_BYTES) * HUGE_PAGE_BYTES
        try:
            _map(self.address, num_bytes, protection, mmap.MAP_SHARED | _MAP_FIXED, file)
        except OSError:
            self.close()
            raise

    def close(self) -> None:
        """Unmap it; once."""
        _libc.munmap(self._reserved, self._num_reserved)


class AttachedMemory:
    """Another process's memory, mapped to be read until `close`."""

    def __init__(self, mapping: Mapping, owner: int) -> None:
        self._mapping = mapping
        self.address = mapping.address
        self.owner = owner
        """A file that becomes readable when the owner's process ends (pidfd)."""

    def close(self) -> None:
        """Unmap it: nothing of this process reads there any more."""
        self._mapping.close()
        os.close(self.owner)


def allocate(num_bytes: int, *, is_sparse: bool = False) -> tuple[ctypes.Array[ctypes.c_uint8], SharedMemory] | None:
    """Zeroed memory, and where others find it; None where the system has no such memory.

    It is there until the array and everything made over its buffer are gone. All of it is taken at once, or with
    `is_sparse` what is touched when it is touched.
    """
    if not hasattr(os, "memfd_create"):
        return None
    name = f"duopool-{secrets.token_hex(16)}"
    try:
        file = os.memfd_create(name, os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
    except OSError:
        return None
    try:
        os.ftruncate(file, num_bytes)
        mapping = Mapping(file, num_bytes, mmap.PROT_READ | mmap.PROT_WRITE)
        fcntl.fcntl(file, fcntl.F_ADD_SEALS, SEALS)
    except OSError:
        os.close(file)
        return None
    if is_sparse:
        _libc.madvise(mapping.address, num_bytes, _MADV_HUGEPAGE)
    else:
        _fill(mapping.address, num_bytes)
    memory = (ctypes.c_uint8 * num_bytes).from_address(mapping.address)

    def release() -> None:
        mapping.close()
        os.close(file)

    weakref.finalize(memory, release).atexit = False  # threads may still compute when the interpreter ends
    return memory, SharedMemory(pid=os.getpid(), file=file, name=name)


def attach(memory: SharedMemory, num_bytes: int) -> AttachedMemory:
    """Map the first `num_bytes` of another process's memory. Raises OSError if this process cannot have it."""
    path, link = f"/proc/{memory.pid}/fd/{memory.file}", f"/memfd:{memory.name} (deleted)"
    with contextlib.ExitStack() as undo:
        try:
            owner = os.pidfd_open(memory.pid)
        except OverflowError as error:
            raise OSError(f"there is no process {memory.pid}") from error
        undo.callback(os.close, owner)
        if os.readlink(path) != link:  # before it is opened: to open some files is to do something with them
            raise OSError(f"{path} is not {link}")
        file = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK | os.O_NOCTTY)
        undo.callback(os.close, file)
        if os.readlink(f"/proc/self/fd/{file}") != link:
            raise OSError(f"{path} is not {link} any more")
        if fcntl.fcntl(file, fcntl.F_GET_SEALS) & SEALS != SEALS:
            raise OSError(f"{link} is not sealed")
        if os.fstat(file).st_size < num_bytes:
            raise OSError(f"{link} has {os.fstat(file).st_size} bytes, not {num_bytes}")
        mapping = Mapping(file, num_bytes, mmap.PROT_READ)
        undo.pop_all()
        os.close(file)
    return AttachedMemory(mapping, owner)


def _map(address: int | None, num_bytes: int, protection: int, flags: int, file: int) -> int:
    mapped: int | None = _libc.mmap(address, num_bytes, protection, flags, file, 0)
    if mapped is None or mapped == _FAILED:
        number = ctypes.get_errno()
        raise OSError(number, os.strerror(number))
    return mapped


def _fill(address: int, num_bytes: int) -> None:
    """Have all pages there at once, so that memory that is not to be had is missed here: huge ones where that works.

    A memory file gets none by itself where /sys says `shmem_enabled: never`. From 6.1 on Linux collapses a stretch of
    which one page is there, whatever that says.
    """
    huge_bytes = num_bytes - num_bytes % HUGE_PAGE_BYTES
    for offset in range(0, huge_bytes, HUGE_PAGE_BYTES):
        ctypes.c_uint8.from_address(address + offset).value = 0
    if huge_bytes and _libc.madvise(address, huge_bytes, _MADV_COLLAPSE) != 0:
        _libc.madvise(address, huge_bytes, _MADV_HUGEPAGE)  # where `shmem_enabled` is `advise`
        huge_bytes = 0
    ctypes.memset(address + huge_bytes, 0, num_bytes - huge_bytes)
