/* SPDX-License-Identifier: MIT */
/* Relative branches, for their own handlers and those fused with them. */
#ifndef PYKVM_BRANCH_H
#define PYKVM_BRANCH_H

#include "block.h"
#include "body.h"

/* Not inlined where branches are. */
static SLOW int branch_fault(struct cpu *cpu, const struct insn *i) { return fault_gp(cpu, i, 0); }

static ALWAYS_INLINE bool target_valid(const struct cpu *cpu, unsigned bits, u64 target)
{
    if (bits != 64)
        return target <= SEG(cpu, CPU_SEG_CS).limit;
    return likely((u64)((s64)(target << 16) >> 16) == target) || is_canonical(cpu, target);
}

static ALWAYS_INLINE u64 relative_target(const struct cpu *cpu, const struct insn *i, unsigned bits)
{
    u64 target = GPR(cpu, GPR_RIP) + (u64)i->disp;
    return bits == 64 ? target : bits == 32 ? (u32)target : (u16)target;
}

/* Ends the block by the relative branch i; bits: its operand size. */
static ALWAYS_INLINE int branch_if(struct cpu *cpu, const struct insn *i, unsigned bits, bool taken)
{
    if (!taken)
        return block_leave(cpu, LINK0, block_end(cpu));
    const u64 target = relative_target(cpu, i, bits);
    if (unlikely(!target_valid(cpu, bits, target)))
        return branch_fault(cpu, i);
    return block_leave(cpu, LINK1, target);
}

#endif
