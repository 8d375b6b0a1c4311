"""``pykvm exec``: any dynamically linked program gets the fake /dev/kvm in its own process.

Two libraries.  ``libpykvm-preload.so`` (shim.c) is small, is loaded into the program by LD_PRELOAD
and stands before libc's functions; it needs no Python.  ``libpykvm-embed.so`` (start.c and what cffi
makes of embed.py) is loaded by it when the program opens /dev/kvm for the first time and brings the
interpreter.  `doctor` says why a program cannot be run so, `launcher` runs it.

What LD_PRELOAD cannot do: a static program has no libc to stand before; a program that makes its
system calls itself (Go) is not seen; a program under seccomp must allow the calls Python makes; last
references are noticed when something is opened, not at once; memory that libc gives back by itself
(free of a big block) is noticed when the guest touches it; docs/guests.md has what follows for clients.
"""
