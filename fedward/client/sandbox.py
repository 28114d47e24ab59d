"""A process that cannot reach a network, and that nobody without root can look into.

Two steps, both for good, and without root. :func:`confine` comes first of all: no sockets but Unix
ones, no new privileges, no core dump, private files. :func:`seal` comes when the process has the
socket it listens on: from then on it can open no other. A system call filter (seccomp, Linux
``Documentation/userspace-api/seccomp_filter.rst``) holds for every library, whatever language it is
written in, and for every child.
"""

import ctypes
import errno
import os
import platform
import resource
import shutil
import struct
import sys
from collections.abc import Iterable, Mapping
from pathlib import Path

from fedward.errors import ConfigurationError
from fedward.private_files import make_private_folder

_ARCHITECTURES: Mapping[str, tuple[int, Mapping[str, int]]] = {
    "x86_64": (
        0xC000003E,
        {
            "socket": 41, "connect": 42, "socketpair": 53, "ptrace": 101, "perf_event_open": 298,
            "setns": 308, "process_vm_readv": 310, "process_vm_writev": 311, "bpf": 321,
            "seccomp": 317,
        },
    ),
    "aarch64": (
        0xC00000B7,
        {
            "socket": 198, "connect": 203, "socketpair": 199, "ptrace": 117, "perf_event_open": 241,
            "setns": 268, "process_vm_readv": 270, "process_vm_writev": 271, "bpf": 280,
            "seccomp": 277,
        },
    ),
}  # fmt: skip
"""``AUDIT_ARCH`` value and system call numbers (linux/audit.h, asm/unistd.h)."""

_EVERYWHERE = {"io_uring_setup": 425, "io_uring_enter": 426, "io_uring_register": 427,
               "pidfd_getfd": 438}  # fmt: skip
"""Calls whose numbers are the same everywhere; io_uring opens sockets past any filter."""

_FOREIGN = ("ptrace", "process_vm_readv", "process_vm_writev", "pidfd_getfd", "setns", "bpf",
            "perf_event_open", "io_uring_setup", "io_uring_enter", "io_uring_register")  # fmt: skip
"""Ways to another process's memory, sockets or network namespace."""

_X32 = 0x40000000  # x86-64's second set of numbers
_AF_UNIX = 1
_PR_SET_DUMPABLE, _PR_SET_NO_NEW_PRIVS = 4, 38
_SECCOMP_SET_MODE_FILTER, _SECCOMP_FILTER_FLAG_TSYNC = 1, 1
_ALLOW, _KILL, _REFUSE = 0x7FFF0000, 0x80000000, 0x00050000 | errno.EACCES
_LOAD, _EQUAL, _AT_LEAST, _RETURN = 0x20, 0x15, 0x35, 0x06
_NUMBER, _ARCHITECTURE, _FIRST_ARGUMENT = 0, 4, 16  # offsets in struct seccomp_data

_PASSED_ON = ("PATH", "LANG", "LC_ALL", "TZ", "LD_LIBRARY_PATH", "OMP_NUM_THREADS",
              "MKL_NUM_THREADS", "CUDA_VISIBLE_DEVICES")  # fmt: skip


def offline_environment(cache: Path) -> dict[str, str]:
    """The environment of a process that touches no network and writes to one folder.

    Args:
        cache: A private folder; libraries take it for home, temporary files and caches.

    Returns:
        All of it: proxies, tokens and everything else of the parent's is left out.
    """
    kept = {name: os.environ[name] for name in _PASSED_ON if name in os.environ}
    folder = str(cache)
    return kept | {
        "HOME": folder,
        "TMPDIR": str(cache / "tmp"),
        "HF_HOME": str(cache / "huggingface"),
        "XDG_CACHE_HOME": folder,
        "HF_HUB_OFFLINE": "1",
        "HF_DATASETS_OFFLINE": "1",
        "TRANSFORMERS_OFFLINE": "1",
        "TOKENIZERS_PARALLELISM": "false",
    }


def confine(cache: Path) -> None:
    """Take network, privileges and core dumps from this process, before any library is imported.

    Args:
        cache: As in :func:`offline_environment`. What a killed process left in its ``tmp`` goes.

    Raises:
        ConfigurationError: This system has no such filter.

    Guarantees:
        Neither this process nor a child of it can open a socket that is not a Unix one, io_uring
        and another process's descriptors included; nor read or trace another process. Root in the
        same namespaces and a hole in the kernel are beyond it.
    """
    os.umask(0o077)
    make_private_folder(cache)
    shutil.rmtree(cache / "tmp", ignore_errors=True)
    make_private_folder(cache / "tmp")
    environment = offline_environment(cache)
    for name in set(os.environ) - set(environment):
        if name.lower().endswith("_proxy"):
            del os.environ[name]
    os.environ.update(environment)
    shut_off()
    _prctl(_PR_SET_NO_NEW_PRIVS, 1)  # also what allows a filter without root
    _install(_program(_FOREIGN, unix_only=True))


def shut_off() -> None:
    """Write no core, and let no process of the same user read this one's memory.

    For the agent too: through ``/proc/PID/mem``, which is a file, the trainer could else reach the
    agent's keys and connections past the filter.
    """
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    _prctl(_PR_SET_DUMPABLE, 0)  # the limit alone does not stop a core that is piped to a program


def seal() -> None:
    """Refuse every new socket and connection, also in threads that run already.

    Without it a Unix socket could still reach a local service that has a network (a resolver, a
    log forwarder, a container engine).

    Raises:
        ConfigurationError: :func:`confine` did not come before, or the system has no such filter.
    """
    _install(_program(("socket", "socketpair", "connect"), unix_only=False))


def _prctl(option: int, value: int) -> None:
    libc = ctypes.CDLL(None, use_errno=True)
    zero = ctypes.c_ulong(0)
    if libc.prctl(option, ctypes.c_ulong(value), zero, zero, zero) != 0:
        raise _unavailable(os.strerror(ctypes.get_errno()))


def _program(refused: Iterable[str], *, unix_only: bool) -> bytes:
    """A filter in classic BPF that refuses some calls, and with ``unix_only`` other sockets."""
    audit, numbers = _architecture()
    program = [
        _code(_LOAD, _ARCHITECTURE),
        _code(_EQUAL, audit, if_so=1),
        _code(_RETURN, _KILL),  # 32-bit calls have other numbers
        _code(_LOAD, _NUMBER),
        _code(_AT_LEAST, _X32, if_not=1),
        _code(_RETURN, _KILL),
    ]
    for name in refused:
        program += [_code(_EQUAL, numbers[name], if_not=1), _code(_RETURN, _REFUSE)]
    if unix_only:
        program += [
            _code(_EQUAL, numbers["socket"], if_not=3),
            _code(_LOAD, _FIRST_ARGUMENT),  # the low half: the kernel's family is an int
            _code(_EQUAL, _AF_UNIX, if_so=1),
            _code(_RETURN, _REFUSE),
        ]
    program.append(_code(_RETURN, _ALLOW))
    return b"".join(program)


def _code(operation: int, value: int, *, if_so: int = 0, if_not: int = 0) -> bytes:
    """One ``struct sock_filter``; a jump says how many instructions to leave out."""
    return struct.pack("=HBBI", operation, if_so, if_not, value)


def _architecture() -> tuple[int, Mapping[str, int]]:
    machine = platform.machine()
    if sys.platform != "linux" or machine not in _ARCHITECTURES or sys.byteorder != "little":
        raise _unavailable(f"{sys.platform} on {machine}")
    audit, numbers = _ARCHITECTURES[machine]
    return audit, {**_EVERYWHERE, **numbers}


def _install(program: bytes) -> None:
    """Add a filter to every thread of this process; filters only ever add up."""
    length = len(program) // 8
    code = ctypes.create_string_buffer(program, len(program))
    # struct sock_fprog {unsigned short len; struct sock_filter *filter;} on a 64-bit machine
    header = struct.pack("=H6xQ", length, ctypes.addressof(code))
    libc = ctypes.CDLL(None, use_errno=True)
    call = ctypes.c_long(_architecture()[1]["seccomp"])
    mode, flags = _SECCOMP_SET_MODE_FILTER, _SECCOMP_FILTER_FLAG_TSYNC
    failed = libc.syscall(call, ctypes.c_ulong(mode), ctypes.c_ulong(flags), header)
    if failed > 0:
        raise _unavailable(f"thread {failed} has a filter of its own")
    if failed != 0:
        raise _unavailable(os.strerror(ctypes.get_errno()))


def _unavailable(problem: str) -> ConfigurationError:
    return ConfigurationError(
        f"this system cannot keep the trainer from the network ({problem}): it needs Linux 4.14 or "
        "newer on x86-64 or arm64, with seccomp"
    )
