/* SPDX-License-Identifier: MIT */
/*
 * Signals of the calling thread, as sets of 64 bits in the kernel's numbering: bit n - 1 is signal n.
 * Read by the C compiler and by cffi.
 */
#ifndef PYKVM_SIGNALS_H
#define PYKVM_SIGNALS_H

#include <stdint.h>

/* Blocks every signal that nothing but a request can cause: not those of faults, not SIGKILL and
 * SIGSTOP, not libc's own two.  Returns the set that was blocked before. */
uint64_t signals_block(void);
void signals_restore(uint64_t blocked);
/* Says that the caller of an ioctl blocks them around it by itself (on = 1), and had `blocked` blocked
 * before: the outermost signals_block() answers that, and the signals_restore() that belongs to it
 * leaves the rest to the caller.  Of the calling thread; on = 0 ends it. */
void signals_held(int on, uint64_t blocked);
/* Those that wait for this thread or for its process because they are blocked. */
uint64_t signals_pending(void);
/* Those of `signals` that would be thrown away at once were they not blocked. */
uint64_t signals_ignored(uint64_t signals);

#endif
