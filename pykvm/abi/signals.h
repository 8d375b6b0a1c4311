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
/* Those that wait for this thread or for its process because they are blocked. */
uint64_t signals_pending(void);
/* Those of `signals` that would be thrown away at once were they not blocked. */
uint64_t signals_ignored(uint64_t signals);

#endif
