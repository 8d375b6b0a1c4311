/* SPDX-License-Identifier: MIT */
#include "signals.h"

#include <signal.h>
#include <stddef.h>
#include <sys/syscall.h>
#include <unistd.h>

#define BIT(signal) (1ull << ((signal) - 1))

/* The kernel's calls and not libc's, whose sigset_t is 128 bytes and whose wrappers hide two. */
static const uint64_t never_blocked = BIT(SIGSEGV) | BIT(SIGBUS) | BIT(SIGFPE) | BIT(SIGILL) |
                                      BIT(SIGTRAP) | BIT(SIGSYS) | BIT(SIGABRT) | BIT(SIGKILL) |
                                      BIT(SIGSTOP) | BIT(32) | BIT(33);
static const uint64_t ignored_by_default =
    BIT(SIGCHLD) | BIT(SIGCONT) | BIT(SIGURG) | BIT(SIGWINCH);

/* The preload library runs no handler of the client's while an ioctl is under way. */
static __thread struct {
    int on, taken;
    uint64_t blocked;
} held;

void signals_held(int on, uint64_t blocked)
{
    held.on = on;
    held.taken = 0;
    held.blocked = blocked;
}

uint64_t signals_block(void)
{
    uint64_t all = ~never_blocked, before = 0;

    if (held.on && !held.taken) {
        held.taken = 1;
        return held.blocked;
    }

    syscall(SYS_rt_sigprocmask, SIG_BLOCK, &all, &before, sizeof all);
    return before;
}

void signals_restore(uint64_t blocked)
{
    if (held.on && held.taken && blocked == held.blocked) {
        held.taken = 0;
        return;
    }
    syscall(SYS_rt_sigprocmask, SIG_SETMASK, &blocked, NULL, sizeof blocked);
}

uint64_t signals_pending(void)
{
    uint64_t pending = 0;

    syscall(SYS_rt_sigpending, &pending, sizeof pending);
    return pending;
}

uint64_t signals_ignored(uint64_t signals)
{
    uint64_t ignored = 0;

    for (int signal = 1; signal <= 64; signal++) {
        struct sigaction action;

        if (!(signals & BIT(signal)) || sigaction(signal, NULL, &action))
            continue;
        if (action.sa_handler == SIG_IGN ||
            (action.sa_handler == SIG_DFL && ignored_by_default & BIT(signal)))
            ignored |= BIT(signal);
    }
    return ignored;
}
