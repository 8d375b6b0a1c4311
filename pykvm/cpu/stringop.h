/* SPDX-License-Identifier: MIT */
/* What string instructions and string I/O share: addresses, index registers, REP. */
#ifndef PYKVM_STRINGOP_H
#define PYKVM_STRINGOP_H

#include "body.h"

static inline u64 string_offset(struct cpu *cpu, const struct insn *i, unsigned reg)
{
    return reg_read(cpu, reg * 8, i->asize);
}

/* Source: rSI in DS or the segment of an override. */
static inline bool source_linear(struct cpu *cpu, const struct insn *i, u64 *la)
{
    return offset_linear(cpu, i, string_offset(cpu, i, RSI), i->opsize, ACC_READ, la);
}

/* Destination: rDI in ES, always.  When the source is not simple neither is this. */
static inline bool destination_linear(struct cpu *cpu, const struct insn *i, unsigned access,
                                      u64 *la)
{
    *la = string_offset(cpu, i, RDI);
    return i->ea != EA_SEG || seg_linear(cpu, CPU_SEG_ES, *la, i->opsize, access, la);
}

/* Moves an index register by n elements in the direction of DF. */
static inline void string_advance(struct cpu *cpu, const struct insn *i, unsigned reg, u64 n)
{
    u64 bytes = n * i->opsize;
    u64 offset = GPR(cpu, reg);
    offset = GUEST(cpu).rflags & X86_EFLAGS_DF ? offset - bytes : offset + bytes;
    reg_write(cpu, reg * 8, i->asize, offset);
}

static inline bool is_repeated(const struct insn *i) { return i->flags & (I_REP | I_REPNE); }

static inline u64 repeat_count(struct cpu *cpu, const struct insn *i)
{
    return is_repeated(i) ? reg_read(cpu, RCX * 8, i->asize) : 1;
}

static inline void repeat_done(struct cpu *cpu, const struct insn *i, u64 n)
{
    if (is_repeated(i))
        reg_write(cpu, RCX * 8, i->asize, GPR(cpu, RCX) - n);
}

/* Between two iterations: events, posted MMIO and the trap flag are looked at, then the
 * instruction goes on. */
static inline int repeat_later(struct cpu *cpu, const struct insn *i)
{
    set_rip(cpu, insn_rip(cpu, i));
    return LOOKUP;
}

#endif
