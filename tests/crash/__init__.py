"""Every command and every writer of the policy, killed at each of its calls, and each of those calls made to fail.

:mod:`.interpose` stops a process at its system calls (seccomp(2), user notification), :mod:`.forkserver` runs commands
quickly, :mod:`.scene` has a live gate with twelve sources around it, :mod:`.operations` says what is tried, and
:mod:`.points` tries it. ``make crash`` tries all.
"""
