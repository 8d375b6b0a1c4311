/* SPDX-License-Identifier: MIT */
/* Between the preload library (shim.c) and the one with the interpreter (start.c). */
#ifndef PYKVM_EMBED_H
#define PYKVM_EMBED_H

#include <stdint.h>

/* What embed_api.ioctl answers for a descriptor that is not pykvm's. */
#define EMBED_NOT_OURS (-100000)

struct embed_range {
    uint64_t start, end; /* host addresses, end exclusive */
};

/* What `pykvm exec` said in the environment; NULL for what it did not say. */
struct embed_settings {
    const char *home;       /* the Python installation */
    const char *path;       /* its module search path, ':' between entries */
    const char *extensions; /* names with ',' between them */
    const char *kernel;     /* names of the profiles that the device claims to be */
    const char *cpu;
    void (*set_ranges)(const struct embed_range *, int); /* host memory behind slots, sorted */
};

/* Results are as of the system call: >= 0, or a negated errno. */
struct embed_api {
    int (*open)(int flags);
    /* mask: the signals that the calling thread blocks, the first 64 */
    int64_t (*ioctl)(int fd, uint32_t request, uint64_t arg, uint64_t mask);
    /* The program's mapping of [start, end) is about to change, and has been changed. */
    void (*invalidate_start)(uint64_t start, uint64_t end);
    void (*invalidate_end)(uint64_t start, uint64_t end);
    /* sigaction() for SIGSEGV and SIGBUS, see cpu_guard_action() */
    int (*guard_action)(int sig, const void *action, void *old_action);
};

/* The one function of libpykvm-embed.so: 0, or -1 after a message on stderr. */
int embed_start(const struct embed_settings *settings, struct embed_api *api);

#endif
