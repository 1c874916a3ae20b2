"""What a hostile train.py would try, from inside a sandbox. Standard library only.

usage: probes.py NAME ...     try each in a child of its own; one JSON line each on standard output
       probes.py --listen     be the neighbour that controls of the network reach: same namespace, nothing beyond it

A line says {"probe": name, "open": true | false, "how": "..."}, or "error" where the probe itself is broken. An attack
that works returns something, one that is held off raises OSError. Nothing is connected to outside the namespace: an
address is asked for its route first (connecting a datagram socket sends nothing). What would hurt when it worked
(reboot, settime) is called with arguments that are refused after the check for privilege, or opened and not written.
"""

from __future__ import annotations

import contextlib
import ctypes
import errno
import fcntl
import json
import mmap
import os
import platform
import resource
import select
import signal
import socket
import stat
import struct
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Callable, NamedTuple

LIMIT_S = 20  # of one probe; one that hangs is broken, not held off
MOST_TASKS = 600  # that a probe starts: just above the sandbox's 512
MOST_FILES = 9000  # that a probe opens: just above 8192
MOST_BYTES = 200 << 20  # of memory, above a sandbox of 64 MB
MOST_INODES = 150_000  # about 1 KB of kernel memory each
OUT_BYTES, TMP_BYTES = 100 << 20, (2 << 30) + (1 << 20)  # just above the sizes of /out here, and of /tmp and /dev/shm
OUTSIDE, OUTSIDE6 = "192.0.2.1", "2001:db8::1"  # reserved for documentation: nobody's
PR_SET_DUMPABLE, PR_GET_NO_NEW_PRIVS = 4, 39
NEWNS, NEWUSER, NEWNET = 0x20000, 0x10000000, 0x40000000
SYSCALLS = {  # name: x86_64, aarch64; another machine is refused, not guessed
    "ptrace": (101, 117), "mount": (165, 40), "umount2": (166, 39), "swapon": (167, 224), "reboot": (169, 142),
    "sethostname": (170, 161), "clock_settime": (227, 112), "settimeofday": (164, 170), "finit_module": (313, 273),
    "chroot": (161, 51), "acct": (163, 89), "syslog": (103, 116), "add_key": (248, 217), "request_key": (249, 218),
    "keyctl": (250, 219), "unshare": (272, 97), "setns": (308, 268), "clone": (56, 220), "clone3": (435, 435),
    "perf_event_open": (298, 241), "fanotify_init": (300, 262), "name_to_handle_at": (303, 264),
    "open_by_handle_at": (304, 265), "process_vm_readv": (310, 270), "kcmp": (312, 272), "bpf": (321, 280),
    "userfaultfd": (323, 282), "io_uring_setup": (425, 425), "io_uring_enter": (426, 426), "fsopen": (430, 430),
    "open_tree": (428, 428), "pidfd_getfd": (438, 438), "quotactl": (179, 60), "migrate_pages": (256, 238),
}  # fmt: skip
STANDARD_DEVICES = {"null", "zero", "full", "random", "urandom", "tty", "console", "pts", "ptmx", "shm", "mqueue", "fd",
                    "stdin", "stdout", "stderr", "core"}  # fmt: skip
MOUNTS = ("/proc", "/sys", "/dev", "/tmp", "/out", "/etc/hosts", "/etc/resolv.conf", "/etc/hostname", "/etc/group",
          "/etc/passwd", "/run/secrets", "/run/.containerenv", "/.dockerenv", "/probes.py", "/input", "/code",
          "/harness", "/data", "/weights")  # fmt: skip
WRITABLE = ("/tmp", "/out", "/dev/shm", "/dev/mqueue")
ENGINE_SOCKETS = ["/run/docker.sock", "/run/podman/podman.sock", "/run/containerd/containerd.sock",
                  *(f"/run/user/{uid}/podman/podman.sock" for uid in (0, 1000, 10001))]  # fmt: skip
HOST = json.loads(os.environ.get("PROBE_HOST", "{}"))  # what the test prepared outside: port, names, paths
LIBC = ctypes.CDLL(None, use_errno=True)


def closed(why: str) -> OSError:
    return OSError(errno.EACCES, why)


def call(name: str, *args) -> int:
    """A system call by its number; raises OSError."""
    number = SYSCALLS[name][("x86_64", "aarch64").index(platform.machine())]
    return checked(LIBC.syscall(number, *(ctypes.c_long(a) if isinstance(a, int) else a for a in args)))


def checked(result: int) -> int:
    if result < 0:
        raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()))
    return result


def past(attack: Callable, error: int) -> str:
    """For a call with arguments that are refused with `error`, but only after the check for privilege."""
    try:
        return f"worked: {attack()}"
    except OSError as e:
        if e.errno == error:
            return f"privileged: {e.strerror}"
        raise


def refused(error: int, *args) -> Callable:
    return lambda: past(lambda: call(*args), error)


def ask(family: int, kind: int, address: str, port: int, message: bytes = b"?") -> str:
    """Talk to an address. Where a route would leave the namespace, saying so is enough."""
    with socket.socket(family, socket.SOCK_DGRAM) as s:
        s.connect((address, port))
        if s.getsockname()[0] != address and not address.startswith("127."):
            return f"a route to {address} from {s.getsockname()[0]}"
    with socket.socket(family, kind) as s:
        s.settimeout(3)
        s.connect((address, port))
        s.send(message)
        return f"answer {s.recv(99)!r}"


def dns() -> str:
    names = [line.split()[1] for line in open("/etc/resolv.conf") if line.startswith("nameserver ")]
    query = struct.pack(">6H", 7, 256, 1, 0, 0, 0) + b"\7example\3org\0" + struct.pack(">2H", 1, 1)
    why = closed("no name server")
    for server in [*(n for n in names if ":" not in n), OUTSIDE]:
        try:
            return ask(socket.AF_INET, socket.SOCK_DGRAM, server, 53, query)
        except OSError as e:
            why = e
    raise why


def unix(address: str) -> str:
    with socket.socket(socket.AF_UNIX) as s:
        s.settimeout(3)
        s.connect(address)
        return f"connected to {address!r}"


def first(attempts: list[Callable], nothing: str = "nothing to try") -> str:
    """The first of several attacks that works."""
    why = closed(nothing)
    for attempt in attempts:
        try:
            return attempt()
        except OSError as e:
            why = e
    raise why


def other_families() -> str:
    """Every socket family but UNIX, IPv4 and IPv6."""
    kinds = (socket.SOCK_STREAM, socket.SOCK_DGRAM, socket.SOCK_RAW, socket.SOCK_SEQPACKET)
    pairs = [(f, k) for f in range(46) if f not in (1, 2, 10) for k in kinds]
    return first([lambda f=f, k=k: str(socket.socket(f, k)) for f, k in pairs])


def in_list(found: list, what: str) -> str:
    if not found:
        raise closed(f"no {what}")
    return f"{what}: {found}"


def interfaces() -> str:
    names = [line.split(":")[0].strip() for line in open("/proc/net/dev") if ":" in line]
    return in_list([n for n in names if n != "lo"], "other interface")


def mount_points() -> list[str]:
    return [line.split()[4] for line in open("/proc/self/mountinfo")]


def other_mounts() -> str:
    return in_list([p for p in mount_points() if p != "/" and not p.startswith(MOUNTS)], "other mount")


def write_to(path: str) -> str:
    """Make a file in a folder, or open a file for writing."""
    if not os.path.isdir(path):
        os.close(os.open(path, os.O_WRONLY))  # opened only: in a control this may be the machine's own
        return path
    os.close(os.open(f"{path}/probe", os.O_WRONLY | os.O_CREAT))
    os.unlink(f"{path}/probe")
    return path


def writable(paths: list[str]) -> str:
    found = []
    for path in paths:
        try:
            found.append(write_to(path))
        except OSError:
            continue
    return in_list(found, "writable")


def write_mounts() -> str:
    return writable([p for p in mount_points() if p not in WRITABLE and stat.S_IFMT(os.lstat(p).st_mode) in
                     (stat.S_IFDIR, stat.S_IFREG)])  # fmt: skip


def write_image() -> str:
    top = [f"/{d}" for d in os.listdir("/") if f"/{d}" not in WRITABLE and os.path.isdir(f"/{d}")]
    return writable(["/", *top, "/usr/bin", "/usr/local/bin", "/var/tmp", "/run/lock", "/etc/passwd"])


def own_cgroup() -> str:
    folders = [p for p in mount_points() if p.startswith("/sys/fs/cgroup")]
    return writable([f"{folder}/{file}" for folder in folders for file in ("cgroup.procs", "tasks")])


def some(path: str) -> str:
    """A masked file is there, but empty."""
    return in_list(open(path).read(9).split(), path)


def new_privileges() -> str:
    return in_list([1][LIBC.prctl(PR_GET_NO_NEW_PRIVS, 0, 0, 0, 0) :], "new privileges")


def set_user_id_binary() -> str:
    """Start a set-user-ID program, which waits for a password, and look whose it is."""
    with subprocess.Popen(["su"], stdin=subprocess.PIPE, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL) as p:
        try:
            time.sleep(0.3)
            return in_list([u for u in status("Uid", p.pid).split()[1:2] if u == "0"], "effective user")
        finally:
            p.kill()


def status(key: str, pid: object = "self") -> str:
    return next(line.split(":")[1] for line in open(f"/proc/{pid}/status") if line.startswith(key + ":"))


def capabilities(which: str) -> str:
    return in_list([c for c in [status(which).strip()] if int(c, 16)], which)


def owned_by_another() -> str:
    Path("/tmp/owned").touch()
    os.chown("/tmp/owned", 12345, -1)
    return "a file of user 12345"


def file_capability() -> str:
    Path("/tmp/capable").touch()
    os.setxattr("/tmp/capable", "security.capability", struct.pack("<5I", 0x02000001, 1 << 21, 0, 0, 0))
    return "a file with CAP_SYS_ADMIN"


def device(kind: int, major: int, minor: int) -> str:
    os.mknod(f"/tmp/device{kind}", kind | 0o666, os.makedev(major, minor))
    return "a device of my own"


def clone(name: str, *args) -> str:
    if (pid := call(name, *args)) == 0:
        os._exit(0)
    os.waitpid(pid, 0)
    return "a child in namespaces of its own"


def clone3() -> str:
    return clone("clone3", struct.pack("11Q", NEWUSER, 0, 0, 0, signal.SIGCHLD, *[0] * 6), 88)


def process_vm_readv() -> str:
    here, there = ctypes.create_string_buffer(8), int(open("/proc/self/maps").readline().split("-")[0], 16)
    vectors = [struct.pack("QQ", ctypes.addressof(here), 8), struct.pack("QQ", there, 8)]
    return past(lambda: call("process_vm_readv", 1, vectors[0], 1, vectors[1], 1, 0), errno.EFAULT)


def trace_first() -> str:
    call("ptrace", 0x4206, 1, 0, 0)  # PTRACE_SEIZE, which does not stop it; ends with this process
    return "PID 1 is traced"


def first_fd() -> str:
    return in_list([os.close(os.open("/proc/1/fd/1", os.O_WRONLY)) or "stdout"], "stream of PID 1")


def stop_first(number: int) -> str:
    os.kill(1, number)
    time.sleep(0.2)
    return in_list([s for s in [status("State", 1).strip()] if s[0] in "TtZX"], "state of PID 1")


def handle_of() -> str:
    return past(lambda: call("name_to_handle_at", -100, b"/tmp", bytes(4), bytes(4), 0), errno.EOVERFLOW)


def by_handle() -> str:
    """The way out of old docker: open a file of the file system below by its number."""
    handle = ctypes.create_string_buffer(struct.pack("Ii", 8, 1) + struct.pack("II", 2, 0), 128)
    root = os.open("/", os.O_RDONLY)
    return past(lambda: call("open_by_handle_at", root, handle, 0), errno.ESTALE)


def machine_code(code: bytes) -> int:
    page = mmap.mmap(-1, mmap.PAGESIZE, prot=mmap.PROT_READ | mmap.PROT_WRITE | mmap.PROT_EXEC)
    page.write(code)
    return ctypes.CFUNCTYPE(ctypes.c_int)(ctypes.addressof(ctypes.c_char.from_buffer(page)))()


def abi32() -> str:
    """socketcall by its 32 bit number (0x66) through int 0x80, where 64 bit filters do not look."""
    if platform.machine() != "x86_64":
        raise closed("x86_64 only")
    code = b"\x53\xb8\x66\0\0\0\xbb\x63\0\0\0\x31\xc9\xcd\x80\x5b\xc3"  # socketcall(99, 0): EINVAL from the kernel
    result = machine_code(code)
    if result != -errno.EINVAL:
        raise OSError(-result, "int 0x80")
    return "32 bit system calls"


def abi_x32() -> str:
    return f"pid {checked(LIBC.syscall(0x40000000 + 39))}"


def perf_event() -> str:
    event = struct.pack("IIQQQQQ", 1, 112, 0, 0, 0, 0, 0b1100000) + bytes(64)  # software clock, user part only
    return f"fd {call('perf_event_open', event, 0, -1, -1, 0)}"


def raise_limit(which: int, to: int) -> str:
    try:
        resource.setrlimit(which, (to, to))
    except ValueError as e:
        raise closed(str(e)) from None
    return f"raised to {to}"


def children(spawn: Callable, most: int) -> str:
    started = 0
    for started in range(most):
        try:
            spawn()
        except (OSError, RuntimeError) as e:
            raise closed(f"{started} started, then {e}") from None
    return f"{started + 1} started"


def child() -> None:
    if os.fork() == 0:
        signal.pause()


def thread() -> None:
    threading.Thread(target=threading.Event().wait, args=(LIMIT_S,), daemon=True).start()


def open_files() -> str:
    kept = []
    return children(lambda: kept.append(os.open("/dev/null", os.O_RDONLY)), MOST_FILES)


def fill(path: str, size: int) -> str:
    with open(path, "wb") as f:
        os.posix_fallocate(f.fileno(), 0, size)  # refused at once beyond the size of a tmpfs
    os.unlink(path)
    return f"{size >> 20} MB in {path}"


def touch(fd: int) -> str:
    page = mmap.mmap(fd, MOST_BYTES)
    for at in range(0, MOST_BYTES, mmap.PAGESIZE):
        page[at] = 1
    return f"{MOST_BYTES >> 20} MB"


def memory_file() -> str:
    fd = os.memfd_create("hog")
    os.ftruncate(fd, MOST_BYTES)
    return touch(fd)


def many_inodes() -> str:
    for n in range(MOST_INODES):
        os.mkdir(f"/tmp/{n}")
    return f"{MOST_INODES} folders"


class Probe(NamedTuple):
    name: str
    group: str
    attack: Callable
    lift: str  # what is lifted for the positive control (`lifts` of test_sandbox.py), or "" with the reason in `never`
    never: dict = {}  # where the control cannot work, and why: "all", a trait of the engine, or a path missing outside


INIT = {"all": "the kernel shields the first process of every PID namespace; no option lifts that"}
NOT_MAPPED = {"rootless": "root of a user namespace lacks this privilege"}
YAMA = {"yama": "Yama lets nobody but a parent attach"}
LOCKED = {"rootless": "flags of a mount from outside the user namespace are locked"}
ALL, UNMASKED = "root caps seccomp", "root caps seccomp masks"


def missing(path: str) -> dict[str, str]:
    return {**NOT_MAPPED, path: "this kernel has none"}


PROBES = [
    Probe("tcp", "network", lambda: ask(socket.AF_INET, socket.SOCK_STREAM, OUTSIDE, HOST["port"]), "neighbour"),
    Probe("udp", "network", lambda: ask(socket.AF_INET, socket.SOCK_DGRAM, OUTSIDE, HOST["port"]), "neighbour"),
    Probe("tcp6", "network", lambda: ask(socket.AF_INET6, socket.SOCK_STREAM, OUTSIDE6, HOST["port"]), "neighbour"),
    Probe("udp6", "network", lambda: ask(socket.AF_INET6, socket.SOCK_DGRAM, OUTSIDE6, HOST["port"]), "neighbour"),
    Probe("dns", "network", dns, "neighbour"),
    Probe("host_loopback_tcp", "network", lambda: ask(2, socket.SOCK_STREAM, "127.0.0.1", HOST["port"]), "neighbour"),
    Probe("host_loopback_udp", "network", lambda: ask(2, socket.SOCK_DGRAM, "127.0.0.1", HOST["port"]), "neighbour"),
    Probe("abstract_socket", "network", lambda: unix("\0" + HOST["abstract"]), "neighbour"),
    Probe("path_socket", "network", lambda: unix(HOST["folder"] + "/socket"), "folder"),
    Probe("engine_sockets", "network", lambda: first([lambda p=p: unix(p) for p in ENGINE_SOCKETS]), "folder"),
    Probe("interfaces", "network", interfaces, "host_network"),
    Probe("vsock", "network", lambda: str(socket.socket(40, socket.SOCK_STREAM)), "seccomp"),
    Probe("packet", "network", lambda: str(socket.socket(17, socket.SOCK_RAW)), ALL),
    Probe("netlink", "network", lambda: str(socket.socket(16, socket.SOCK_RAW)), "seccomp"),
    Probe("raw_ip", "network", lambda: str(socket.socket(2, socket.SOCK_RAW, 1)), "root caps"),
    Probe("other_families", "network", other_families, "seccomp"),
    Probe("io_uring_setup", "network", lambda: call("io_uring_setup", 4, bytes(120)), "seccomp"),
    Probe("io_uring_enter", "network", refused(errno.EBADF, "io_uring_enter", 999, 0, 0, 0, 0, 0), "seccomp"),
    Probe("host_file", "files", lambda: open(HOST["folder"] + "/secret").read(), "folder"),
    Probe("other_mounts", "files", other_mounts, "folder"),
    Probe("devices", "files", lambda: in_list(sorted(set(os.listdir("/dev")) - STANDARD_DEVICES), "device"), "device"),
    Probe("write_image", "files", write_image, "root writable"),
    Probe("write_mounts", "files", write_mounts, "root writable"),
    Probe("write_input", "files", lambda: write_to("/input/file"), "input"),
    Probe("add_to_input", "files", lambda: write_to("/input"), "input"),
    Probe("write_code", "files", lambda: write_to("/probes.py"), "code"),
    Probe("write_dev", "files", lambda: write_to("/dev"), "root caps"),
    Probe("kcore", "files", lambda: open("/proc/kcore", "rb").read(1), UNMASKED, missing("/proc/kcore")),
    Probe("timer_list", "files", lambda: some("/proc/timer_list"), UNMASKED, NOT_MAPPED),
    Probe("firmware", "files", lambda: in_list(os.listdir("/sys/firmware"), "firmware"), "masks"),
    Probe("by_handle", "files", by_handle, ALL, NOT_MAPPED),
    Probe("name_to_handle", "files", handle_of, "seccomp"),
    Probe("core_pattern", "files", lambda: write_to("/proc/sys/kernel/core_pattern"), UNMASKED, NOT_MAPPED),
    Probe("sysctl_net", "files", lambda: write_to("/proc/sys/net/ipv4/ip_forward"), UNMASKED),
    Probe("sysrq", "files", lambda: write_to("/proc/sysrq-trigger"), UNMASKED, missing("/proc/sysrq-trigger")),
    Probe("sys_kernel", "files", lambda: write_to("/sys/kernel/mm/ksm/run"), "root sys", NOT_MAPPED),
    Probe("own_cgroup", "files", own_cgroup, "root sys", NOT_MAPPED),
    Probe("setuid", "privilege", lambda: os.setresuid(*[int(os.getuid() == 0)] * 3) or "another user", "root caps"),
    Probe("setgid", "privilege", lambda: os.setresgid(*[int(os.getgid() == 0)] * 3) or "another group", "root caps"),
    Probe("setgroups", "privilege", lambda: os.setgroups([4]) or "group adm", "root caps"),
    Probe("set_user_id_binary", "privilege", set_user_id_binary, "new_privileges"),
    Probe("new_privileges", "privilege", new_privileges, "new_privileges"),
    Probe("effective", "privilege", lambda: capabilities("CapEff"), "root caps"),
    Probe("bounding", "privilege", lambda: capabilities("CapBnd"), "root caps"),
    Probe("chown", "privilege", owned_by_another, "root caps"),
    Probe("file_capability", "privilege", file_capability, "root caps"),
    Probe("mount", "privilege", lambda: call("mount", b"t", b"/tmp", b"tmpfs", 0, 0) or "a tmpfs", ALL),
    Probe("remount", "privilege", lambda: call("mount", 0, b"/probes.py", 0, 0x1020, 0) or "writable", ALL, LOCKED),
    Probe("umount", "privilege", lambda: call("umount2", b"/probes.py", 2) or "gone", ALL),
    Probe("fsopen", "privilege", lambda: call("fsopen", b"tmpfs", 0), ALL),
    Probe("open_tree", "privilege", lambda: call("open_tree", -100, b"/tmp", 1), ALL),
    Probe("chroot", "privilege", lambda: call("chroot", b"/tmp") or "another root", ALL),
    Probe("unshare_user", "privilege", lambda: call("unshare", NEWUSER) or "a user namespace", "seccomp"),
    Probe("unshare_net", "privilege", lambda: call("unshare", NEWUSER | NEWNET) or "a network namespace", "seccomp"),
    Probe("unshare_mount", "privilege", lambda: call("unshare", NEWNS) or "a mount namespace", ALL),
    Probe("clone_user", "privilege", lambda: clone("clone", NEWUSER | signal.SIGCHLD, 0, 0, 0, 0), "seccomp"),
    Probe("clone3_user", "privilege", clone3, "seccomp"),
    Probe("setns", "privilege", lambda: call("setns", os.open("/proc/self/ns/net", os.O_RDONLY), 0) or "joined", ALL),
    Probe("keyctl", "privilege", lambda: call("keyctl", 0, -2, 1, 0, 0), "seccomp"),
    Probe("add_key", "privilege", lambda: call("add_key", b"user", b"probe", b"x", 1, -2), "seccomp"),
    Probe("request_key", "privilege", refused(errno.ENOKEY, "request_key", b"user", b"probe", 0, -2), "seccomp"),
    Probe("ptrace_first", "privilege", trace_first, "seccomp dumpable", YAMA),
    Probe("ptrace_me", "privilege", lambda: call("ptrace", 0, 0, 0, 0) or "traced by PID 1", "seccomp"),
    Probe("process_vm_readv", "privilege", process_vm_readv, "seccomp dumpable", YAMA),
    Probe("pidfd_getfd", "privilege", lambda: call("pidfd_getfd", os.pidfd_open(1), 1, 0), "seccomp dumpable", YAMA),
    Probe("kcmp", "privilege", lambda: call("kcmp", 1, os.getpid(), 1, 0, 0), "seccomp dumpable"),
    Probe("first_memory", "privilege", lambda: write_to("/proc/1/mem"), "dumpable", YAMA),
    Probe("first_environ", "privilege", lambda: open("/proc/1/environ").read(9), "dumpable"),
    Probe("first_stream", "privilege", first_fd, "dumpable"),
    Probe("first_oom_score", "privilege", lambda: write_to("/proc/1/oom_score_adj"), "dumpable"),
    Probe("bpf", "privilege", lambda: call("bpf", 0, struct.pack("4I104x", 2, 4, 4, 1), 120), ALL, NOT_MAPPED),
    Probe("perf_event", "privilege", perf_event, ALL, NOT_MAPPED),
    Probe("userfaultfd", "privilege", lambda: call("userfaultfd", 1), "seccomp"),
    Probe("fanotify", "privilege", lambda: call("fanotify_init", 0, 0), ALL, NOT_MAPPED),
    Probe("migrate_pages", "privilege", refused(errno.EINVAL, "migrate_pages", 0, 0, 0, 0), "seccomp"),
    Probe("quotactl", "privilege", refused(errno.ENODEV, "quotactl", 0x800001 << 8, 0, 0, 0), "seccomp"),
    Probe("mknod_character", "privilege", lambda: device(stat.S_IFCHR, 1, 1), "root caps", NOT_MAPPED),
    Probe("mknod_block", "privilege", lambda: device(stat.S_IFBLK, 7, 0), "root caps", NOT_MAPPED),
    Probe("module", "privilege", refused(errno.EBADF, "finit_module", -1, b"", 0), ALL, missing("/proc/modules")),
    Probe("reboot", "privilege", refused(errno.EINVAL, "reboot", 0, 0, 0, 0), ALL),
    Probe("swapon", "privilege", refused(errno.ENOENT, "swapon", b"/missing", 0), ALL, NOT_MAPPED),
    Probe("clock_settime", "privilege", refused(errno.EINVAL, "clock_settime", 0, struct.pack("qq", 0, -1)), "seccomp"),
    Probe("sethostname", "privilege", lambda: call("sethostname", b"mine", 4) or "renamed", ALL),
    Probe("acct", "privilege", refused(errno.ENOENT, "acct", b"/missing"), ALL, NOT_MAPPED),
    Probe("kernel_log", "privilege", lambda: f"{call('syslog', 10, 0, 0)} bytes", ALL, NOT_MAPPED),
    Probe("nice", "privilege", lambda: os.nice(-5), "root caps", NOT_MAPPED),
    Probe("abi32", "privilege", abi32, "seccomp"),
    Probe("abi_x32", "privilege", abi_x32, "", {"all": "stock kernels are built without the x32 ABI"}),
    Probe("stop_first", "privilege", lambda: stop_first(signal.SIGSTOP), "", INIT),
    Probe("kill_first", "privilege", lambda: stop_first(signal.SIGKILL), "", INIT),
    Probe("more_files", "limits", lambda: raise_limit(resource.RLIMIT_NOFILE, 8193), "nofile"),
    Probe("more_core", "limits", lambda: raise_limit(resource.RLIMIT_CORE, 1000), "core"),
    Probe("open_files", "limits", open_files, "nofile"),
    Probe("fork", "limits", lambda: children(child, MOST_TASKS), "pids"),
    Probe("threads", "limits", lambda: children(thread, MOST_TASKS), "pids"),
    Probe("fill_out", "limits", lambda: fill("/out/full", OUT_BYTES), "sizes"),
    Probe("fill_tmp", "limits", lambda: fill("/tmp/full", TMP_BYTES), "sizes"),
    Probe("fill_shm", "limits", lambda: fill("/dev/shm/full", TMP_BYTES), "sizes"),
    Probe("memory", "limits", lambda: touch(-1), "memory"),
    Probe("memory_file", "limits", memory_file, "memory"),
    Probe("memory_tmp", "limits", lambda: fill("/tmp/hog", MOST_BYTES), "memory"),
    Probe("inodes", "limits", many_inodes, "memory"),
]  # fmt: skip


def attempt(probe: Probe, pipe: int) -> None:
    """In the child."""
    LIBC.prctl(PR_SET_DUMPABLE, 1, 0, 0, 0)
    Path("/proc/self/oom_score_adj").write_text("1000")  # as stage.py does
    try:
        answer = {"open": True, "how": str(probe.attack())}
    except OSError as e:
        answer = {"open": False, "how": str(e)}
    except BaseException as e:
        answer = {"error": repr(e)}
    os.write(pipe, json.dumps(answer).encode()[:4000])


def run(probe: Probe) -> dict:
    """Fork, try, and sweep up what the child left."""
    read, write = os.pipe()
    if (pid := os.fork()) == 0:
        attempt(probe, write)
        os._exit(0)
    os.close(write)
    in_time = select.select([read], [], [], LIMIT_S)[0]
    said = os.read(read, 4096) if in_time else b""
    os.kill(pid, signal.SIGKILL) if not in_time or said else None
    _, ended = os.waitpid(pid, 0)
    while os.getpid() == 1:
        try:
            os.kill(-1, signal.SIGKILL)
            os.waitpid(-1, 0)
        except (ProcessLookupError, ChildProcessError):
            break
    if said:
        return json.loads(said)
    if in_time and os.WIFSIGNALED(ended) and os.WTERMSIG(ended) in (signal.SIGSYS, signal.SIGKILL):
        return {"open": False, "how": f"killed by signal {os.WTERMSIG(ended)}"}
    return {"error": f"status {ended}" if in_time else f"hung for {LIMIT_S} s"}


def listen() -> None:
    """Take the outside addresses on this namespace's own loopback, and answer whoever asks."""
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as s:
        fcntl.ioctl(s, 0x8916, struct.pack("16sHH4s8x", b"lo:1", 2, 0, socket.inet_aton(OUTSIDE)))
    with socket.socket(socket.AF_INET6, socket.SOCK_DGRAM) as s:
        fcntl.ioctl(s, 0x8916, socket.inet_pton(socket.AF_INET6, OUTSIDE6) + struct.pack("Ii", 128, 1))
    port, name = HOST["port"], "\0" + HOST["abstract"]
    listeners = [("0.0.0.0", port, 2, 1), ("0.0.0.0", port, 2, 2), ("0.0.0.0", 53, 2, 2), ("::", port, 10, 1),
                 ("::", port, 10, 2), (name, 0, 1, 1)]  # fmt: skip
    sockets = [answering(*listener) for listener in listeners]
    print("listening", flush=True)
    serve(sockets)


def answering(address: str, port: int, family: int, kind: int) -> socket.socket:
    s = socket.socket(family, kind)
    if family == socket.AF_INET6:
        s.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 1)
    s.bind((address, port) if family != socket.AF_UNIX else address)
    if kind == socket.SOCK_STREAM:
        s.listen(16)
    return s


def serve(sockets: list[socket.socket]) -> None:
    while True:
        for s in select.select(sockets, [], [])[0]:
            if s.type == socket.SOCK_STREAM:
                with contextlib.suppress(BrokenPipeError), s.accept()[0] as client:
                    client.sendall(b"hello")
            else:
                s.sendto(b"hello", s.recvfrom(999)[1])


def main(names: list[str]) -> None:
    if not os.environ.get("PROBE_DUMPABLE"):
        LIBC.prctl(PR_SET_DUMPABLE, 0, 0, 0, 0)  # as stage.py does
    table = {p.name: p for p in PROBES}
    for name in names:
        print(json.dumps({"probe": name, **run(table[name])}), flush=True)


if __name__ == "__main__":
    listen() if sys.argv[1:] == ["--listen"] else main(sys.argv[1:])
