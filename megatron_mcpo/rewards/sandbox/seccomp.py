"""Assemble a seccomp filter for programs that only compute: the bytes that `bwrap --seccomp FD` reads.

Written by hand: the bindings of libseccomp need that native library on the host, and this filter is a plain list of
comparisons.

It is a list of what is refused, on top of namespaces and limits: system calls by which kernels were attacked, that
reach other processes, or that take memory past the address-space limit. A program stays one process: threads may be
started, processes not, so that limits a process are limits of the program.

Format: an array of `struct sock_filter` (linux/filter.h) over `struct seccomp_data` (linux/seccomp.h).
"""

import errno
import platform
import struct

_AUDIT_ARCH = {"x86_64": 0xC000003E, "aarch64": 0xC00000B7}  # linux/audit.h

# Name: its number on x86_64 and on aarch64, None where there is none (asm/unistd_64.h, asm-generic/unistd.h).
_REFUSED: dict[str, tuple[int | None, int | None]] = {
    # other processes
    "ptrace": (101, 117), "process_vm_readv": (310, 270), "process_vm_writev": (311, 271),
    "process_madvise": (440, 440), "kcmp": (312, 272), "pidfd_open": (434, 434), "pidfd_getfd": (438, 438),
    "pidfd_send_signal": (424, 424), "fork": (57, None), "vfork": (58, None),
    # the network; socketpair, which reaches nobody else, stays: asyncio needs it, with buffers of their default size
    "socket": (41, 198), "setsockopt": (54, 208),
    # memory of the kernel: what no address space counts, and the host's own budgets (aio-max-nr, max_user_watches)
    "memfd_create": (319, 279), "memfd_secret": (447, 447), "shmget": (29, 194), "shmat": (30, 196),
    "shmctl": (31, 195), "msgget": (68, 186), "semget": (64, 190), "mq_open": (240, 180),
    "setxattr": (188, 5), "lsetxattr": (189, 6), "fsetxattr": (190, 7), "setxattrat": (463, 463),
    "io_setup": (206, 0), "io_destroy": (207, 1), "io_getevents": (208, 4), "io_submit": (209, 2),
    "io_cancel": (210, 3), "io_pgetevents": (333, 292), "inotify_init": (253, None), "inotify_init1": (294, 26),
    "inotify_add_watch": (254, 27), "landlock_create_ruleset": (444, 444), "landlock_add_rule": (445, 445),
    "landlock_restrict_self": (446, 446),
    # namespaces and mounts
    "unshare": (272, 97), "setns": (308, 268), "mount": (165, 40), "umount2": (166, 39), "pivot_root": (155, 41),
    "chroot": (161, 51), "open_tree": (428, 428), "move_mount": (429, 429), "fsopen": (430, 430),
    "fsconfig": (431, 431), "fsmount": (432, 432), "fspick": (433, 433), "mount_setattr": (442, 442),
    "name_to_handle_at": (303, 264), "open_by_handle_at": (304, 265),
    # large interfaces of the kernel that a computation has no use for
    "bpf": (321, 280), "perf_event_open": (298, 241), "userfaultfd": (323, 282), "io_uring_setup": (425, 425),
    "io_uring_enter": (426, 426), "io_uring_register": (427, 427), "keyctl": (250, 219), "add_key": (248, 217),
    "request_key": (249, 218), "fanotify_init": (300, 262), "vmsplice": (278, 75), "personality": (135, 92),
    "modify_ldt": (154, None), "migrate_pages": (256, 238), "move_pages": (279, 239), "mbind": (237, 235),
    "set_mempolicy": (238, 237), "lookup_dcookie": (212, 18),
    # the machine
    "kexec_load": (246, 104), "kexec_file_load": (320, 294), "init_module": (175, 105), "finit_module": (313, 273),
    "delete_module": (176, 106), "reboot": (169, 142), "swapon": (167, 224), "swapoff": (168, 225), "acct": (163, 89),
    "quotactl": (179, 60), "syslog": (103, 116), "sethostname": (170, 161), "setdomainname": (171, 162),
    "settimeofday": (164, 170), "clock_settime": (227, 112), "adjtimex": (159, 171), "clock_adjtime": (305, 266),
    "iopl": (172, None), "ioperm": (173, None), "vhangup": (153, 58),
}  # fmt: skip

_CLONE = (56, 220)
_CLONE3 = (435, 435)
_X32_BIT = 0x40000000
"""x86_64 kernels may take a second set of numbers, which have this bit."""

_CLONE_THREAD = 0x00010000
_CLONE_NAMESPACES = 0x7E020080
"""CLONE_NEWNS, NEWCGROUP, NEWUTS, NEWIPC, NEWUSER, NEWPID, NEWNET, NEWTIME (linux/sched.h)."""

_LOAD, _EQUAL, _AT_LEAST, _ANY_BIT, _RETURN = 0x20, 0x15, 0x35, 0x45, 0x06
_NUMBER_AT, _ARCH_AT, _FIRST_ARGUMENT_AT = 0, 4, 16
_ALLOW, _KILL, _ERRNO = 0x7FFF0000, 0x80000000, 0x00050000


def filter_bytes() -> bytes:
    """Return the filter for this machine. Raises ValueError for a machine other than x86_64 and aarch64."""
    machine = platform.machine()
    if machine not in _AUDIT_ARCH:
        raise ValueError(f"no seccomp filter for {machine!r}, only for {sorted(_AUDIT_ARCH)}")
    column = list(_AUDIT_ARCH).index(machine)
    program = [
        _statement(_LOAD, _ARCH_AT),
        _jump(_EQUAL, _AUDIT_ARCH[machine], skip_if_true=1),
        _statement(_RETURN, _KILL),
        _statement(_LOAD, _NUMBER_AT),
        _jump(_AT_LEAST, _X32_BIT, skip_if_false=1),
        _statement(_RETURN, _KILL),
    ]
    for numbers in _REFUSED.values():
        number = numbers[column]
        if number is not None:
            program += [_jump(_EQUAL, number, skip_if_false=1), _statement(_RETURN, _ERRNO | errno.EPERM)]
    program += [
        # Its flags are in memory, which a filter can't read. glibc then tries clone.
        _jump(_EQUAL, _CLONE3[column], skip_if_false=1),
        _statement(_RETURN, _ERRNO | errno.ENOSYS),
        _jump(_EQUAL, _CLONE[column], skip_if_false=4),
        _statement(_LOAD, _FIRST_ARGUMENT_AT),
        _jump(_ANY_BIT, _CLONE_NAMESPACES, skip_if_true=1),
        _jump(_ANY_BIT, _CLONE_THREAD, skip_if_true=1),
        _statement(_RETURN, _ERRNO | errno.EPERM),
        _statement(_RETURN, _ALLOW),
    ]
    return b"".join(program)


def _statement(code: int, operand: int) -> bytes:
    return struct.pack("=HBBI", code, 0, 0, operand)


def _jump(code: int, operand: int, *, skip_if_true: int = 0, skip_if_false: int = 0) -> bytes:
    return struct.pack("=HBBI", code, skip_if_true, skip_if_false, operand)
