/* SPDX-License-Identifier: MIT */
/* What x87.c, mmx.c and xsave.c share: where the x87 state is, and its form in guest.fpu. */
#ifndef PYKVM_FPU_H
#define PYKVM_FPU_H

#include "body.h"

/*
 * cpu->fpu_where.  guest.fpu.fcw, fop, fip and fdp are up to date everywhere; fsw, ftw and st[]
 * only where it says memory.
 */
enum fpu_where {
    FPU_MEMORY,        /* in guest.fpu, in a form that a host FPU may not have left behind */
    FPU_MMX,           /* in guest.fpu; TOP is 0, all tags are valid, no exception is pending */
    FPU_HOST_UNMASKED, /* in the host's FPU; FCW leaves an exception unmasked: one may be pending */
    FPU_HOST,          /* in the host's FPU, all exceptions masked: none is pending */
};

#define FCW_MASKS 0x003f
#define FCW_DEFINED 0x1f3f /* precision, rounding and the infinity bit of the 287 */
#define FCW_FIXED 0x0040

#define FSW_FLAGS 0x003f
#define FSW_PE 0x0020
#define FSW_ES 0x0080
#define FSW_TOP 0x3800
#define FSW_TOP_SHIFT 11
#define FSW_B 0x8000

static inline unsigned fpu_top(const struct cpu_fpu *f) { return f->fsw >> FSW_TOP_SHIFT & 7; }

/* Unmasked exception flags in FSW: what ES and B summarise. */
static inline bool fpu_is_pending(const struct cpu_fpu *f) { return f->fsw & ~f->fcw & FSW_FLAGS; }

/* Gives FCW and FSW the form a processor holds them in, whatever was loaded. */
void fpu_normalize(struct cpu_fpu *f);
/* Changes TOP; the physical registers keep their contents, st[] is their order from TOP on. */
void fpu_set_top(struct cpu_fpu *f, unsigned top);
/* Brings the state to guest.fpu. Nothing architectural changes. */
void fpu_save(struct cpu *cpu);
/* #MF when an x87 exception is pending. */
bool fpu_check_pending(struct cpu *cpu);
static inline bool raise_mf(struct cpu *cpu) { return raise_exception(cpu, MF_VECTOR, false, 0); }

#endif
