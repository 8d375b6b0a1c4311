/* SPDX-License-Identifier: MIT */
/* PUSH and POP in all forms, ENTER, LEAVE, and BOUND. */
#include "stack.h"

/* The value is read before rsp moves: PUSH rSP pushes the old one. */
#define PUSH_BITS(bits, op)                                                                        \
    MEM_HANDLER(op##_r##bits, {                                                                    \
        u64 rsp = GPR(cpu, RSP);                                                                   \
        if (unlikely(!push##bits(cpu, fast, &rsp, REG##bits(cpu, i->dst))))                        \
            return miss(cpu, i);                                                                   \
        GPR(cpu, RSP) = rsp;                                                                       \
        NEXT(cpu, i);                                                                              \
    })                                                                                             \
    MEM_HANDLER(op##_ri##bits, {                                                                   \
        u64 rsp = GPR(cpu, RSP);                                                                   \
        if (unlikely(!push##bits(cpu, fast, &rsp, i->imm)))                                        \
            return miss(cpu, i);                                                                   \
        GPR(cpu, RSP) = rsp;                                                                       \
        NEXT(cpu, i);                                                                              \
    })                                                                                             \
    MEM_HANDLER(op##_m##bits, {                                                                    \
        LOAD(bits, v)                                                                              \
        u64 rsp = GPR(cpu, RSP);                                                                   \
        if (unlikely(!push##bits(cpu, fast, &rsp, v)))                                             \
            return miss(cpu, i);                                                                   \
        GPR(cpu, RSP) = rsp;                                                                       \
        NEXT(cpu, i);                                                                              \
    })
FOR_16_UP(PUSH_BITS, push)
const struct body b_push = {
    {[K_R] = FROM_16(push_r), [K_RI] = FROM_16(push_ri), [K_M] = FROM_16(push_m)}};

/* The destination is written after rsp: POP rSP keeps the popped value, and a memory operand is
 * addressed with the rsp that has moved. */
#define POP_BITS(bits, op)                                                                         \
    MEM_HANDLER(op##_r##bits, {                                                                    \
        u64 rsp = GPR(cpu, RSP);                                                                   \
        u64 v;                                                                                     \
        if (unlikely(!pop##bits(cpu, fast, &rsp, &v)))                                             \
            return miss(cpu, i);                                                                   \
        GPR(cpu, RSP) = rsp;                                                                       \
        PUT##bits(cpu, i->dst, v);                                                                 \
        NEXT(cpu, i);                                                                              \
    })                                                                                             \
    static int op##_m##bits(struct cpu *cpu, const struct insn *i)                                 \
    {                                                                                              \
        const u64 old = GPR(cpu, RSP);                                                             \
        u64 rsp = old;                                                                             \
        u64 v, la;                                                                                 \
        if (!pop##bits(cpu, false, &rsp, &v))                                                      \
            return stop(cpu, i);                                                                   \
        GPR(cpu, RSP) = rsp;                                                                       \
        bool found = ea_linear(cpu, i, bits / 8, ACC_WRITE, &la);                                  \
        GPR(cpu, RSP) = old; /* a host fault in the store must find it so */                       \
        if (!found || !store_la##bits(cpu, la, ea_access(i), false, v))                            \
            return stop(cpu, i);                                                                   \
        GPR(cpu, RSP) = rsp;                                                                       \
        NEXT(cpu, i);                                                                              \
    }
FOR_16_UP(POP_BITS, pop)
const struct body b_pop = {{[K_R] = FROM_16(pop_r), [K_M] = FROM_16(pop_m)}};

/* All slots are checked before the first is written, so that a fault leaves the stack alone. */
int x_pusha(struct cpu *cpu, const struct insn *i)
{
    const u64 old = GPR(cpu, RSP);
    const unsigned size = i->opsize;
    u64 rsp = old, la;
    for (unsigned n = 1; n <= 8; n++) {
        u64 sp = sp_add(cpu, old, -(s64)(n * size));
        if (!stack_linear(cpu, sp, size, ACC_WRITE, &la) ||
            !mem_probe_write(cpu, la, size, ACC_WRITE | ACC_STACK))
            return stop(cpu, i);
    }
    for (unsigned n = 0; n < 8; n++) {
        if (!push_at(cpu, &rsp, size, n == RSP ? old : GPR(cpu, n)))
            return stop(cpu, i);
    }
    GPR(cpu, RSP) = rsp;
    NEXT(cpu, i);
}

int x_popa(struct cpu *cpu, const struct insn *i)
{
    u64 rsp = GPR(cpu, RSP), v[8];
    for (int n = 7; n >= 0; n--) {
        if (!pop_at(cpu, &rsp, i->opsize, &v[n]))
            return stop(cpu, i);
    }
    for (unsigned n = 0; n < 8; n++) {
        if (n != RSP)
            reg_write(cpu, n * 8, i->opsize, v[n]);
    }
    GPR(cpu, RSP) = rsp;
    NEXT(cpu, i);
}

/* imm: bytes to allocate; vvvv: nesting level.  A frame pointer is copied for every outer level
 * but the last, which is the new frame itself. */
int x_enter(struct cpu *cpu, const struct insn *i)
{
    const unsigned size = i->opsize, level = i->vvvv & 31;
    u64 rsp = GPR(cpu, RSP), rbp = GPR(cpu, RBP), v, la;
    if (!push_at(cpu, &rsp, size, rbp))
        return stop(cpu, i);
    const u64 frame = rsp;
    for (unsigned n = 1; n < level; n++) {
        rbp = sp_add(cpu, rbp, -(s64)size);
        if (!stack_linear(cpu, rbp, size, ACC_READ, &la) ||
            !ld_size(cpu, la, size, &v, ACC_STACK) || !push_at(cpu, &rsp, size, v))
            return stop(cpu, i);
    }
    if (level && !push_at(cpu, &rsp, size, frame))
        return stop(cpu, i);
    rsp = sp_add(cpu, rsp, -(s64)(u16)i->imm);
    /* SDM vol. 2 ENTER: faults if a write at the final stack pointer would */
    if (!stack_linear(cpu, rsp, size, ACC_WRITE, &la) ||
        !mem_probe_write(cpu, la, size, ACC_WRITE | ACC_STACK))
        return stop(cpu, i);
    GPR(cpu, RSP) = rsp;
    reg_write(cpu, RBP * 8, size, frame);
    NEXT(cpu, i);
}

#define LEAVE_BITS(bits, op)                                                                       \
    MEM_HANDLER(op##_r##bits, {                                                                    \
        u64 rsp = GPR(cpu, RBP);                                                                   \
        u64 v;                                                                                     \
        if (bits != 64)                                                                            \
            rsp = (GPR(cpu, RSP) & ~cpu->sp_mask) | (rsp & cpu->sp_mask);                          \
        if (unlikely(!pop##bits(cpu, fast, &rsp, &v)))                                             \
            return miss(cpu, i);                                                                   \
        GPR(cpu, RSP) = rsp;                                                                       \
        PUT##bits(cpu, RBP * 8, v);                                                                \
        NEXT(cpu, i);                                                                              \
    })
FOR_16_UP(LEAVE_BITS, leave)
const struct body b_leave = {{[K_R] = FROM_16(leave_r)}};

/* G,M: the register against a pair of signed bounds, upper one included. */
int x_bound(struct cpu *cpu, const struct insn *i)
{
    const unsigned size = i->opsize, bits = 8 * size;
    u64 la, low, high;
    if (!ea_linear(cpu, i, 2 * size, ACC_READ, &la) ||
        !ld_size(cpu, la, size, &low, ea_access(i)) ||
        !ld_size(cpu, la + size, size, &high, ea_access(i)))
        return stop(cpu, i);
    s64 index = (s64)SEXT(bits, reg_read(cpu, i->src, size));
    if (index < (s64)SEXT(bits, low) || index > (s64)SEXT(bits, high)) {
        raise_exception(cpu, BR_VECTOR, false, 0);
        return stop(cpu, i);
    }
    NEXT(cpu, i);
}
