/* SPDX-License-Identifier: MIT */
/*
 * Stack slots for handlers of both speeds: push and pop of 16, 32 and 64 bits that leave rsp to
 * the caller.  64 bits exist in 64-bit mode only and 32 bits never do there, so the width says
 * how the stack is addressed; the fast way knows flat stacks.
 */
#ifndef PYKVM_STACK_H
#define PYKVM_STACK_H

#include "body.h"

static ALWAYS_INLINE bool slot_linear(struct cpu *cpu, u64 rsp, unsigned size, unsigned access,
                                      bool fast, u64 *la)
{
    if (!fast)
        return stack_linear(cpu, rsp, size, access, la);
    *la = size == 8 ? rsp : (u32)rsp;
    return size == 8 ||
           (size == 4 && (cpu->mode & (MODE_FLAT | MODE_SS32)) == (MODE_FLAT | MODE_SS32));
}

#define DEFINE_SLOT(bits)                                                                          \
    static ALWAYS_INLINE bool push##bits(struct cpu *cpu, bool fast, u64 *rsp, u64 v)              \
    {                                                                                              \
        u64 sp = bits == 64 ? *rsp - 8 : sp_add(cpu, *rsp, -(bits / 8)), la;                       \
        if (!slot_linear(cpu, sp, bits / 8, ACC_WRITE, fast, &la) ||                               \
            !store_la##bits(cpu, la, ACC_STACK, fast, v))                                          \
            return false;                                                                          \
        *rsp = sp;                                                                                 \
        return true;                                                                               \
    }                                                                                              \
    static ALWAYS_INLINE bool pop##bits(struct cpu *cpu, bool fast, u64 *rsp, u64 *v)              \
    {                                                                                              \
        u64 la;                                                                                    \
        if (!slot_linear(cpu, *rsp, bits / 8, ACC_READ, fast, &la) ||                              \
            !load_la##bits(cpu, la, ACC_STACK, fast, v))                                           \
            return false;                                                                          \
        *rsp = bits == 64 ? *rsp + 8 : sp_add(cpu, *rsp, bits / 8);                                \
        return true;                                                                               \
    }
DEFINE_SLOT(16)
DEFINE_SLOT(32)
DEFINE_SLOT(64)

#endif
