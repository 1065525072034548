"""Starts a command on a kernel that lacks something: ``python -m tests.process.old_kernel landlock|seccomp COMMAND…``.

A filter answers for the kernel, as one answers that is too old or was built or booted without it.
"""

from __future__ import annotations

import errno
import os
import sys

import pyseccomp

_PR_GET_SECCOMP, _PR_SET_SECCOMP = 21, 22


def _main() -> None:
    what, command = sys.argv[1], sys.argv[2:]
    rules = pyseccomp.SyscallFilter(pyseccomp.ALLOW)
    if what == "landlock":
        rules.add_rule(pyseccomp.ERRNO(errno.ENOSYS), "landlock_create_ruleset")
    else:
        rules.add_rule(pyseccomp.ERRNO(errno.ENOSYS), "seccomp")
        for option in (_PR_GET_SECCOMP, _PR_SET_SECCOMP):
            rules.add_rule(pyseccomp.ERRNO(errno.EINVAL), "prctl", pyseccomp.Arg(0, pyseccomp.EQ, option))
    rules.load()
    os.execv(command[0], command)


if __name__ == "__main__":
    _main()
