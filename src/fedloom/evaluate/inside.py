"""What runs in a sandbox's own processes. `sandbox.py` starts this file as a script; nothing imports it.

    keeper   one per worker: reads jobs, one line of JSON each, and forks a stage for each. Never runs foreign code.
    stage    makes namespaces, forks the program's process, watches it, ends it, and reports one line of JSON.
    program  puts up the other walls around itself, and then runs the program's parts.

Standard library only, and an interpreter without site-packages: a program can import Python's own library.
"""

from __future__ import annotations

import builtins
import contextlib
import ctypes
import functools
import importlib
import json
import math
import os
import random
import re
import resource
import select
import shutil
import signal
import struct
import sys
import tempfile
import time
import types
from typing import Any, NoReturn

Job = dict[str, Any]

# Imported before any program is: many ask for one of these, and a forked process has them already.
FREQUENT = ("bisect", "collections", "copy", "heapq", "itertools", "math", "string", "typing")
KEPT_VERDICT = 1 << 16  # bytes
PR_SET_PDEATHSIG, PR_SET_DUMPABLE, PR_SET_SECCOMP, PR_CAPBSET_DROP, PR_SET_NO_NEW_PRIVS = 1, 4, 22, 24, 38
MS_RDONLY, MS_NOSUID, MS_NODEV, MS_NOEXEC, MS_REMOUNT = 1, 2, 4, 8, 32
MS_BIND, MS_REC, MS_PRIVATE, MS_RELATIME = 1 << 12, 1 << 14, 1 << 18, 1 << 21
MNT_DETACH = 2
CLONE_NEWNS, CLONE_NEWIPC, CLONE_NEWUSER, CLONE_NEWPID, CLONE_NEWNET = 1 << 17, 1 << 27, 1 << 28, 1 << 29, 1 << 30

# What a program may read besides Python's own library: shared libraries, time zones, and devices.
LIBRARIES = ("/lib", "/lib64", "/usr/lib", "/usr/lib64", "/nix/store", "/gnu/store", "/etc/ld.so.cache")
DEVICES = ("/dev/null", "/dev/zero", "/dev/urandom", "/dev/random")
READABLE = (*LIBRARIES, "/usr/share/zoneinfo", *DEVICES)


def keep() -> None:
    """Serve jobs from standard input until it ends: a line of JSON in, a line of JSON out."""
    die_with_parent()
    for name in FREQUENT:
        importlib.import_module(name)
    jobs, replies = os.fdopen(os.dup(0), "rb"), os.dup(1)
    quiet = os.open(os.devnull, os.O_RDWR)
    os.dup2(quiet, 0)
    os.dup2(quiet, 1)
    for line in jobs:
        pid = os.fork()
        if pid == 0:
            try:
                report = stage(json.loads(line))
            except BaseException as error:
                report = {"wall": f"{type(error).__name__}: {error}"}
            os.write(replies, json.dumps(report).encode() + b"\n")
            os._exit(0)
        if os.waitpid(pid, 0)[1]:  # killed from outside before it could report: say so by ending, too
            os._exit(1)


# ----------------------------------------------------------------------------------------------------------- stage


def stage(job: Job) -> dict[str, Any]:
    """Run one program in a process of its own, and say what was seen of it."""
    limits, layers, folder = job["limits"], job["layers"], ""
    with contextlib.suppress(OSError), open("/proc/self/oom_score_adj", "w") as file:
        file.write("1000")  # where memory runs out it is this that goes, and not a training run
    if "namespaces" in layers:
        enter_namespaces()
        private_root(os.getcwd(), limits["disk_bytes"])
    elif "unsandboxed" in layers:
        folder = tempfile.mkdtemp(dir=os.getcwd())
        os.chdir(folder)
    die_with_parent()  # again, since a change of credentials forgets it
    sizes = {"ready": 4096, "verdict": KEPT_VERDICT, "out": limits["output_bytes"], "err": limits["output_bytes"]}
    ends = {name: os.pipe() for name in ("seal", *sizes)}
    pid = os.fork()
    if pid == 0:
        try:
            program(job, {name: ends[name][name != "seal"] for name in ends})
        finally:
            os._exit(70)
    for name in ends:
        os.close(ends[name][name != "seal"])
    # Made after the fork, and read by the program's process after its last part: no memory of it holds the seal before.
    seal = os.urandom(16).hex()
    with contextlib.suppress(OSError):  # it may have ended already
        os.write(ends["seal"][1], seal.encode())
    os.close(ends["seal"][1])
    started = time.monotonic()
    seen = {name: bytearray() for name in sizes}
    ended = watch(pid, {ends[name][0]: (seen[name], sizes[name]) for name in sizes}, limits["wall_seconds"])
    late = ended is None
    if ended is None:
        os.kill(pid, signal.SIGKILL)  # in a namespace of its own the kernel ends all that it started
        _, *ended = os.wait4(pid, 0)
    status, usage = ended
    if "unsandboxed" in layers:
        with contextlib.suppress(OSError):
            os.killpg(pid, signal.SIGKILL)  # it may have children
    if folder:
        shutil.rmtree(folder, ignore_errors=True)
    ready = seen["ready"].decode(errors="replace")
    if ready != "walls are up":
        return {"wall": ready or f"the process ended with status {status} before its walls were up"}
    code = os.waitstatus_to_exitcode(status)
    return {
        "verdict": read_verdict(bytes(seen["verdict"]), seal),
        "late": late,
        "signal": max(0, -code),
        "exit": max(0, code),
        "seconds": time.monotonic() - started,
        "cpu_seconds": usage.ru_utime + usage.ru_stime,
        "peak_bytes": usage.ru_maxrss * (1 if sys.platform == "darwin" else 1024),
        "out": seen["out"].decode(errors="replace"),
        "err": seen["err"].decode(errors="replace"),
    }


def watch(pid: int, pipes: dict[int, tuple[bytearray, int]], seconds: float) -> list[Any] | None:
    """Read what the process writes, and keep the first bytes of each pipe, until it ends. None: its time ran out."""

    def take(fd: int) -> bool:
        buffer, size = pipes[fd]
        piece = os.read(fd, 1 << 16)
        buffer += piece[: max(0, size - len(buffer))]
        return bool(piece)

    deadline = time.monotonic() + seconds
    poll = select.poll()
    for fd in pipes:
        poll.register(fd, select.POLLIN)
    open_ends = len(pipes)
    while time.monotonic() < deadline:
        # Pipes close when the process ends. It is looked after in between in case it closed them early.
        for fd, _ in poll.poll(50 if open_ends else 1):
            if not take(fd):
                poll.unregister(fd)
                open_ends -= 1
        done, *ended = os.wait4(pid, os.WNOHANG)
        if done:
            for fd, _ in poll.poll(0):  # what was still under way
                take(fd)
            return ended
    return None


def read_verdict(text: bytes, seal: str) -> dict[str, Any] | None:
    """What the program's process said, which may be anything. A "passed" without the seal is none of ours."""
    if not text:
        return None
    try:
        said = json.loads(text)
        verdict: dict[str, Any] = {
            key: str(said.get(key, ""))[:2000] for key in ("status", "error", "where", "message")
        }
        verdict["reading"] = said["reading"] if type(said.get("reading")) is int else 0
        if verdict["status"] == "failed" or (verdict["status"] == "passed" and said.get("seal") == seal):
            return verdict
    except (ValueError, AttributeError, RecursionError):
        pass
    return {"status": "forged"}


# --------------------------------------------------------------------------------------------------------- program


def program(job: Job, ends: dict[str, int]) -> NoReturn:
    """Put up the walls, run the parts, and seal the verdict when all of them went through."""
    os.setsid()
    verdict, seal = wall_in(job, ends)
    parts, reading = job["parts"], 0
    # What is needed once the program has run is held in local names, out of reach of what it does to modules.
    run, read, write, leave, restore = exec, os.read, os.write, os._exit, vars(builtins).update
    describe_error, dumps, flushes = describe, json.dumps, (sys.stdout.flush, sys.stderr.flush)
    names, known = {f"<{name}>" for name, _ in parts}, dict(vars(builtins))
    module = types.ModuleType("program")
    sys.modules["program"] = module
    sys.argv[:] = ["program"]
    random.seed(0)

    def flush_all() -> None:
        for flush in flushes:
            with contextlib.suppress(Exception):  # closed, or full
                flush()

    try:
        compiled = []
        for name, readings in parts:
            code, chosen = first_that_compiles(readings, f"<{name}>")
            compiled.append(code)
            reading = max(reading, chosen)
        for code in compiled:
            run(code, module.__dict__)
            restore(known)
        flush_all()
        write(verdict, b'{"status": "passed", "reading": %d, "seal": "%b"}' % (reading, read(seal, 64)))
    except BaseException as error:
        restore(known)
        try:
            said = describe_error(error, names)
            flush_all()
        except BaseException:
            said = {"error": type(error).__name__}
        write(verdict, dumps({**said, "status": "failed", "reading": reading}).encode())
    leave(0)


def first_that_compiles(readings: list[str], name: str) -> tuple[types.CodeType, int]:
    """The first of several ways to read a text that is Python, and its number; an error is that of the first."""
    errors: list[Exception] = []
    for number, text in enumerate(readings):
        try:
            return compile(text, name, "exec", dont_inherit=True), number
        except (SyntaxError, ValueError, RecursionError, MemoryError) as error:
            errors.append(error)
    raise errors[0]


def describe(error: BaseException, names: set[str]) -> dict[str, str]:
    """An exception in words: its type, its message, and the last line of ours that it went through."""
    where, trace = "", error.__traceback__
    while trace is not None:
        if trace.tb_frame.f_code.co_filename in names:
            where = f"{trace.tb_frame.f_code.co_filename[1:-1]}, line {trace.tb_lineno}"
        trace = trace.tb_next
    if isinstance(error, SyntaxError) and error.filename in names:
        where, message = f"{error.filename[1:-1]}, line {error.lineno}", str(error.msg)
    else:
        message = str(error)
    return {"error": type(error).__name__, "where": where, "message": message[:500]}


# ----------------------------------------------------------------------------------------------------------- walls


def wall_in(job: Job, ends: dict[str, int]) -> tuple[int, int]:
    """Everything between this process and the rest of the machine. What does not stand is said, and ends it.

    Returns the pipes of the verdict and of the seal.
    """
    limits, layers = job["limits"], job["layers"]
    try:
        die_with_parent()
        ends = plug_in(ends)
        os.environ.clear()
        here = os.getcwd()
        os.environ.update(HOME=here, TMPDIR=here, PATH="/usr/bin:/bin", LANG="C.UTF-8", TZ="UTC")
        sys.path[:] = [os.path.realpath(path) for path in sys.path if os.path.exists(path)]
        set_limits(limits, strict="limits" in layers)
        if {"seccomp", "landlock", "namespaces"} & set(layers):
            _control(PR_SET_NO_NEW_PRIVS, 1)
            _control(PR_SET_DUMPABLE, 0)  # a crash is no business of the machine's collector of crashes
        if "landlock" in layers:
            landlock(readable(), here, writable="namespaces" in layers)
        if {"seccomp", "landlock", "namespaces"} & set(layers):
            drop_capabilities()
        if "seccomp" in layers:
            seccomp(os.getpid())
    except BaseException as error:
        os.write(ends["ready"], f"{type(error).__name__}: {error}".encode())
        os._exit(70)
    os.write(ends["ready"], b"walls are up")
    os.close(ends["ready"])
    return ends["verdict"], ends["seal"]


def plug_in(ends: dict[str, int]) -> dict[str, int]:
    """Standard input empty, output to the stage, and no other open file than the three pipes."""
    empty = os.open(os.devnull, os.O_RDONLY)
    os.dup2(empty, 0)
    os.dup2(ends["out"], 1)
    os.dup2(ends["err"], 2)
    copies = {name: os.dup(ends[name]) for name in ("ready", "verdict", "seal")}
    moved = {name: os.dup2(fd, 3 + n) for n, (name, fd) in enumerate(copies.items())}
    os.closerange(3 + len(moved), 1 << 16)
    return moved


def set_limits(limits: dict[str, Any], strict: bool) -> None:
    """Sizes, time and counts that the kernel enforces on this process."""
    seconds = math.ceil(limits["cpu_seconds"])
    wanted = {
        resource.RLIMIT_CORE: (0, 0),
        resource.RLIMIT_CPU: (seconds, seconds),  # equal: it is killed, and no handler of its own hears of it
        resource.RLIMIT_FSIZE: (limits["file_bytes"],) * 2,
        resource.RLIMIT_NOFILE: (limits["open_files"],) * 2,
        resource.RLIMIT_NPROC: (1, 1),  # means nothing to root; `seccomp` forbids new processes to everyone
        resource.RLIMIT_STACK: (limits["stack_bytes"],) * 2,
        resource.RLIMIT_AS: (limits["memory_bytes"],) * 2,
    }
    for kind, (soft, hard) in wanted.items():
        ceiling = resource.getrlimit(kind)[1]
        if ceiling != resource.RLIM_INFINITY:
            soft, hard = min(soft, ceiling), min(hard, ceiling)
        try:
            resource.setrlimit(kind, (soft, hard))
        except (OSError, ValueError):
            if strict:
                raise


def readable() -> list[str]:
    """What a program may read, as paths without links."""
    own = [*sys.path, os.path.join(sys.base_prefix, "lib"), os.path.join(sys.base_exec_prefix, "lib")]
    found: list[str] = []
    for path in sorted({os.path.realpath(path) for path in (*READABLE, *own) if os.path.exists(path)}):
        if not found or not path.startswith(found[-1] + "/"):
            found.append(path)
    return found


def landlock(paths: list[str], own_folder: str, writable: bool) -> None:
    """Forbid every file but these, and where the kernel knows how, TCP ports and signals, too.

    The program's own folder is writable where its size is limited, else nothing is.
    """
    version = _system("landlock_create_ruleset", None, 0, 1)
    read, read_file = (1 << 2) | (1 << 3), 1 << 2
    every = (1 << (13 if version < 2 else 14 if version < 3 else 15 if version < 5 else 16)) - 1
    # all of them but those that make devices, sockets and pipes, execute, and control devices
    own = every & ~(1 << 0 | 1 << 6 | 1 << 9 | 1 << 10 | 1 << 11 | 1 << 15)
    rules = struct.pack("=QQQ", every, 3 if version >= 4 else 0, 3 if version >= 6 else 0)
    size = 8 if version < 4 else 16 if version < 6 else 24
    ruleset = _system("landlock_create_ruleset", ctypes.create_string_buffer(rules, 24), size, 0)
    grants = [(path, read if os.path.isdir(path) else read_file) for path in paths]
    grants += [("/dev/null", read_file | 1 << 1), (own_folder, own if writable else read)]
    for path, access in grants:
        fd = os.open(path, os.O_PATH | os.O_CLOEXEC)
        rule = struct.pack("=Qi", access, fd)
        _system("landlock_add_rule", ruleset, 1, ctypes.create_string_buffer(rule, len(rule)), 0)
        os.close(fd)
    _system("landlock_restrict_self", ruleset, 1 if version >= 7 else 0)  # 1: refusals do not fill the system's log
    os.close(ruleset)


def drop_capabilities() -> None:
    """Give up what a superuser may do, for good."""
    for capability in range(64):
        with contextlib.suppress(OSError):  # beyond the last one, or not ours to drop
            _control(PR_CAPBSET_DROP, capability)
    _system("capset", struct.pack("=Ii", 0x20080522, 0), bytes(24))


# Calls a program may make, with their numbers on x86-64 and on AArch64. Others fail with EPERM: among them all that
# make processes, threads, sockets, or shared memory, that send signals, trace, mount, or change modes and owners.
ALLOWED = """
read 0 63, write 1 64, readv 19 65, writev 20 66, pread64 17 67, pwrite64 18 68, preadv 295 69, pwritev 296 70,
lseek 8 62, close 3 57, close_range 436 436, dup 32 23, dup2 33 -, dup3 292 24, pipe 22 -, pipe2 293 59, stat 4 -,
fstat 5 80, lstat 6 -, newfstatat 262 79, statx 332 291, statfs 137 43, fstatfs 138 44, access 21 -, faccessat 269 48,
faccessat2 439 439, readlink 89 -, readlinkat 267 78, getcwd 79 17, chdir 80 49, fchdir 81 50, getdents64 217 61,
fsync 74 82, fdatasync 75 83, ftruncate 77 46, fadvise64 221 223, sendfile 40 71, copy_file_range 326 285, umask 95 166,
mkdir 83 -, mkdirat 258 34, rmdir 84 -, unlink 87 -, unlinkat 263 35, rename 82 -, renameat 264 38, renameat2 316 276,
link 86 -, linkat 265 37, symlink 88 -, symlinkat 266 36, brk 12 214, mmap 9 222, munmap 11 215, mremap 25 216,
mprotect 10 226, madvise 28 233, msync 26 227, poll 7 -, ppoll 271 73, select 23 -, pselect6 270 72,
epoll_create1 291 20, epoll_ctl 233 21, epoll_wait 232 -, epoll_pwait 281 22, eventfd2 290 19, futex 202 98,
sched_yield 24 124, nanosleep 35 101, clock_nanosleep 230 115, restart_syscall 219 128, pause 34 -, rt_sigaction 13 134,
rt_sigprocmask 14 135, rt_sigreturn 15 139, rt_sigpending 127 136, rt_sigsuspend 130 133, rt_sigtimedwait 128 137,
sigaltstack 131 132, alarm 37 -, getitimer 36 102, setitimer 38 103, time 201 -, gettimeofday 96 169,
clock_gettime 228 113, clock_getres 229 114, times 100 153, getpid 39 172, gettid 186 178, getppid 110 173,
getuid 102 174, geteuid 107 175, getgid 104 176, getegid 108 177, getgroups 115 158, getresuid 118 148,
getresgid 120 150, getpgid 121 155, getpgrp 111 -, getsid 124 156, getrlimit 97 163, getrusage 98 165,
sched_getaffinity 204 123, getcpu 309 168, uname 63 160, sysinfo 99 179, getrandom 318 278, wait4 61 260,
waitid 247 95, exit 60 93, exit_group 231 94, sendto 44 206, recvfrom 45 207, shutdown 48 210
"""
# Of the calls allowed for some arguments only (see `seccomp`): the values of the second one.
FCNTL = (0, 1, 2, 3, 4, 5, 6, 7, 1030, 1032)  # not F_SETOWN, F_SETSIG: they send signals to others
IOCTL = (0x5401, 0x5413, 0x541B, 0x5421, 0x5450, 0x5451)  # is it a terminal, how large, FIONREAD, FIONBIO, FIOCLEX
KNOWN_CALLS = 462  # numbers from here on are newer than this table


def seccomp(pid: int) -> None:
    """Let the kernel refuse every system call that computing has no need of."""
    column, audit = _column(), (0xC000003E, 0xC00000B7)[_column()]
    allow, refuse, unknown, kill = 0x7FFF0000, 0x00050001, 0x00050026, 0x80000000  # EPERM, ENOSYS, the process
    some: dict[str, tuple[tuple[int | None, int | None], list[tuple[int, int, tuple[int, ...]]]]] = {
        "fcntl": ((72, 25), [(1, ~0, FCNTL)]),
        "ioctl": ((16, 29), [(1, ~0, IOCTL)]),
        "kill": ((62, 129), [(0, ~0, (pid,))]),
        "tgkill": ((234, 131), [(0, ~0, (pid,))]),
        "prlimit64": ((302, 261), [(0, ~0, (0,))]),  # its own limits only, and those only downwards
        # a connected pair of Unix stream sockets, which asyncio needs and which reaches nobody else
        "socketpair": ((53, 199), [(0, ~0, (1,)), (1, 0xF, (1,))]),
        # Before Landlock's third version, O_TRUNC with O_RDONLY would empty a file that may only be read.
        "open": ((2, None), [(1, 0o1003, (0, 1, 2, 0o1001, 0o1002))]),
        "openat": ((257, 56), [(2, 0o1003, (0, 1, 2, 0o1001, 0o1002))]),
    }
    load, equal, greater, mask, give = 0x20, 0x15, 0x35, 0x54, 0x06
    code = [(load, 0, 0, 4), (equal, 1, 0, audit), (give, 0, 0, kill), (load, 0, 0, 0)]
    code += [(greater, 0, 1, KNOWN_CALLS), (give, 0, 0, unknown)]
    for entry in ALLOWED.split(","):
        number = entry.split()[1 + column]
        if number != "-":
            code += [(equal, 0, 1, int(number)), (give, 0, 0, allow)]
    for numbers, conditions in some.values():
        if (own := numbers[column]) is None:
            continue
        body = []
        for argument, bits, values in conditions:
            body += [(load, 0, 0, 16 + 8 * argument), (mask, 0, 0, bits & 0xFFFFFFFF)]
            body += [(equal, len(values) - n, 0, value) for n, value in enumerate(values)]
            body += [(give, 0, 0, refuse)]
        code += [(equal, 0, len(body) + 1, own), *body, (give, 0, 0, allow)]
    code += [(give, 0, 0, refuse)]
    packed = b"".join(struct.pack("=HBBI", *line) for line in code)
    buffer = ctypes.create_string_buffer(packed, len(packed))
    program = struct.pack("@HP", len(code), ctypes.addressof(buffer))
    holder = ctypes.create_string_buffer(program, len(program))  # alive until the kernel has read it
    _control(PR_SET_SECCOMP, 2, ctypes.addressof(holder))


def enter_namespaces() -> None:
    """A machine of its own: no network, no other processes, and a view of the files that `private_root` makes."""
    uid, gid = os.geteuid(), os.getegid()
    _libc("unshare", CLONE_NEWUSER | CLONE_NEWNS | CLONE_NEWPID | CLONE_NEWNET | CLONE_NEWIPC)
    for name, text in (("setgroups", "deny"), ("uid_map", f"{uid} {uid} 1"), ("gid_map", f"{gid} {gid} 1")):
        with open(f"/proc/self/{name}", "w") as file:
            file.write(text)


def private_root(base: str, disk_bytes: int) -> None:
    """A root folder with what a program may read, for reading only, and /box, the program's own, in memory."""
    _mount(None, "/", None, MS_REC | MS_PRIVATE)
    paths = readable()
    _mount("tmpfs", base, "tmpfs", MS_NOSUID | MS_NODEV, "mode=755,size=1m")
    for path in paths:
        target = base + path
        os.makedirs(os.path.dirname(target), exist_ok=True)
        if os.path.isdir(path):
            os.makedirs(target, exist_ok=True)
        else:
            os.close(os.open(target, os.O_CREAT, 0o644))
        _mount(path, target, None, MS_BIND | MS_REC)
    for path in READABLE:
        if os.path.islink(path) and not os.path.lexists(base + path):
            os.makedirs(os.path.dirname(base + path), exist_ok=True)
            os.symlink(os.path.realpath(path), base + path)
    with open("/proc/self/mountinfo", errors="surrogateescape") as file:
        below = [_unescaped(line.split()[4]) for line in file]
    for target in below:
        if target.startswith(base + "/"):
            _mount(None, target, None, MS_BIND | MS_REMOUNT | MS_RDONLY | _kept_flags(target))
    os.mkdir(base + "/box")
    options = f"mode=700,size={disk_bytes},nr_inodes=1024"
    _mount("tmpfs", base + "/box", "tmpfs", MS_NOSUID | MS_NODEV | MS_NOEXEC, options)
    os.chdir(base)
    _system("pivot_root", b".", b".")
    _libc("umount2", b".", MNT_DETACH)
    os.chdir("/")
    _mount(None, "/", None, MS_BIND | MS_REMOUNT | MS_RDONLY | MS_NOSUID | MS_NODEV)
    os.chdir("/box")


def _unescaped(path: str) -> str:
    return re.sub(r"\\([0-7]{3})", lambda found: chr(int(found[1], 8)), path)


def _kept_flags(path: str) -> int:
    """The mount's own flags: within a user namespace none of them may be taken away."""
    flags = os.statvfs(path).f_flag
    pairs = ((2, MS_NOSUID), (4, MS_NODEV), (8, MS_NOEXEC), (1024, 1024), (2048, 2048), (4096, MS_RELATIME))
    return sum(wanted for shown, wanted in pairs if flags & shown)


# ----------------------------------------------------------------------------------------------- calls to the kernel

SYSTEM = {"capset": (126, 91), "pivot_root": (155, 41)}
SYSTEM |= {"landlock_create_ruleset": (444, 444), "landlock_add_rule": (445, 445), "landlock_restrict_self": (446, 446)}


def _column() -> int:
    """Which of two numbers of a system call is this machine's."""
    machine = os.uname().machine
    if machine not in ("x86_64", "aarch64") or sys.maxsize < 1 << 32:
        raise OSError(f"the numbers of the system calls of {machine} are not known")
    return int(machine == "aarch64")


def _checked(name: str, result: int) -> int:
    if result < 0:
        number = ctypes.get_errno()
        raise OSError(number, f"{name}: {os.strerror(number)}")
    return result


@functools.cache
def _library() -> Any:
    return ctypes.CDLL(None, use_errno=True)


def _libc(name: str, *arguments: Any) -> int:
    return _checked(name, getattr(_library(), name)(*arguments))


def _system(name: str, *arguments: Any) -> int:
    number = SYSTEM[name][_column()]
    words = [ctypes.c_long(value) if isinstance(value, int) else value for value in arguments]
    return _checked(name, _library().syscall(ctypes.c_long(number), *words))


def _control(option: int, *arguments: int) -> int:
    words = [ctypes.c_ulong(value) for value in (*arguments, 0, 0, 0, 0)[:4]]
    return _checked(f"prctl {option}", _library().prctl(ctypes.c_int(option), *words))


def _mount(source: str | None, target: str, kind: str | None, flags: int, options: str | None = None) -> None:
    def encoded(text: str | None) -> bytes | None:
        return None if text is None else os.fsencode(text)

    try:
        _libc("mount", encoded(source), encoded(target), encoded(kind), ctypes.c_ulong(flags), encoded(options))
    except OSError as error:
        raise OSError(error.errno, f"{error.strerror} ({target})") from None


def die_with_parent() -> None:
    """End with the process that made this one, whatever ends that."""
    if sys.platform == "linux":
        _control(PR_SET_PDEATHSIG, signal.SIGKILL)


if __name__ == "__main__":
    keep()
