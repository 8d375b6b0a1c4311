/* SPDX-License-Identifier: MIT */
/*
 * Near branches.
 *
 * The operand size is 64 bits in 64-bit mode, whatever the prefixes (66 is ignored, as Intel
 * does), and 16 or 32 elsewhere: so the size of a handler says whether a target must be
 * canonical or within the limit of CS.
 */
#include "branch.h"
#include "stack.h"

#define JMP_BITS(bits, op)                                                                         \
    HANDLER(op##_ri##bits) { return branch_if(cpu, i, bits, true); }
FOR_16_UP(JMP_BITS, jmp)
const struct body b_jmp = {{[K_RI] = FROM_16(jmp_ri)}};

#define CONDITION_CODE(cc) CC_##cc,
enum { CONDITIONS(CONDITION_CODE) };

#define JCC_BITS(bits, cc)                                                                         \
    HANDLER(j##cc##_ri##bits) { return branch_if(cpu, i, bits, condition(cpu, CC_##cc)); }
#define INSN_JCC(cc)                                                                               \
    FOR_16_UP(JCC_BITS, cc)                                                                        \
    const struct body b_j##cc = {{[K_RI] = FROM_16(j##cc##_ri)}};
CONDITIONS(INSN_JCC)

/* A fault of the push comes before that of the target: measured. */
static SLOW int call_fault(struct cpu *cpu, const struct insn *i)
{
    u64 la;
    if (!stack_linear(cpu, sp_add(cpu, GPR(cpu, RSP), -i->opsize), i->opsize, ACC_WRITE, &la) ||
        !mem_probe_write(cpu, la, i->opsize, ACC_WRITE | ACC_STACK))
        return stop(cpu, i);
    return fault_gp(cpu, i, 0);
}

#define CALL_BITS(bits, op)                                                                        \
    MEM_HANDLER(op##_ri##bits, {                                                                   \
        const u64 target = relative_target(cpu, i, bits);                                          \
        u64 rsp = GPR(cpu, RSP);                                                                   \
        if (unlikely(!target_valid(cpu, bits, target)))                                            \
            return call_fault(cpu, i);                                                             \
        if (unlikely(!push##bits(cpu, fast, &rsp, next_rip(cpu, i))))                              \
            return miss(cpu, i);                                                                   \
        GPR(cpu, RSP) = rsp;                                                                       \
        return block_leave(cpu, LINK1, target);                                                    \
    })
FOR_16_UP(CALL_BITS, call)
const struct body b_call = {{[K_RI] = FROM_16(call_ri)}};

#define INDIRECT_BITS(bits, op)                                                                    \
    HANDLER(jmp_e_r##bits)                                                                         \
    {                                                                                              \
        const u64 target = REG##bits(cpu, i->dst);                                                 \
        if (unlikely(!target_valid(cpu, bits, target)))                                            \
            return branch_fault(cpu, i);                                                           \
        return block_leave_to(cpu, target);                                                        \
    }                                                                                              \
    MEM_HANDLER(jmp_e_m##bits, {                                                                   \
        LOAD(bits, target)                                                                         \
        if (unlikely(!target_valid(cpu, bits, target)))                                            \
            return branch_fault(cpu, i);                                                           \
        return block_leave_to(cpu, target);                                                        \
    })                                                                                             \
    MEM_HANDLER(call_e_r##bits, {                                                                  \
        const u64 target = REG##bits(cpu, i->dst);                                                 \
        u64 rsp = GPR(cpu, RSP);                                                                   \
        if (unlikely(!target_valid(cpu, bits, target)))                                            \
            return call_fault(cpu, i);                                                             \
        if (unlikely(!push##bits(cpu, fast, &rsp, next_rip(cpu, i))))                              \
            return miss(cpu, i);                                                                   \
        GPR(cpu, RSP) = rsp;                                                                       \
        return block_leave_to(cpu, target);                                                        \
    })                                                                                             \
    MEM_HANDLER(call_e_m##bits, {                                                                  \
        LOAD(bits, target)                                                                         \
        u64 rsp = GPR(cpu, RSP);                                                                   \
        if (unlikely(!target_valid(cpu, bits, target)))                                            \
            return call_fault(cpu, i);                                                             \
        if (unlikely(!push##bits(cpu, fast, &rsp, next_rip(cpu, i))))                              \
            return miss(cpu, i);                                                                   \
        GPR(cpu, RSP) = rsp;                                                                       \
        return block_leave_to(cpu, target);                                                        \
    })                                                                                             \
    MEM_HANDLER(ret_i##bits, {                                                                     \
        u64 rsp = GPR(cpu, RSP);                                                                   \
        u64 target;                                                                                \
        if (unlikely(!pop##bits(cpu, fast, &rsp, &target)))                                        \
            return miss(cpu, i);                                                                   \
        if (unlikely(!target_valid(cpu, bits, target)))                                            \
            return branch_fault(cpu, i);                                                           \
        GPR(cpu, RSP) = sp_add(cpu, rsp, (s64)(u16)i->imm);                                        \
        return block_leave_to(cpu, target);                                                        \
    })
FOR_16_UP(INDIRECT_BITS, indirect)
const struct body b_jmp_e = {{[K_R] = FROM_16(jmp_e_r), [K_M] = FROM_16(jmp_e_m)}};
const struct body b_call_e = {{[K_R] = FROM_16(call_e_r), [K_M] = FROM_16(call_e_m)}};
const struct body b_ret = {{[K_R] = FROM_16(ret_i), [K_RI] = FROM_16(ret_i)}};

/* ---- by counter --------------------------------------------------------------------------------- */

static int branch_relative(struct cpu *cpu, const struct insn *i)
{
    switch (i->opsize) {
    case 2: return jmp_ri16(cpu, i);
    case 4: return jmp_ri32(cpu, i);
    default: return jmp_ri64(cpu, i);
    }
}

static int not_taken(struct cpu *cpu, const struct insn *i)
{
    set_rip(cpu, next_rip(cpu, i));
    return LINK0;
}

static bool can_branch(const struct cpu *cpu, const struct insn *i)
{
    const unsigned bits = 8 * i->opsize;
    return target_valid(cpu, bits, relative_target(cpu, i, bits));
}

/* The counter is rCX of the address size, and is left alone when the branch faults.  That is asked
 * beforehand: what a branch returns may be the status of blocks behind it. */
static ALWAYS_INLINE int do_loop(struct cpu *cpu, const struct insn *i, bool condition)
{
    const u64 rcx = GPR(cpu, RCX);
    const bool last = reg_read(cpu, RCX * 8, i->asize) == 1;
    if (condition && !last && unlikely(!can_branch(cpu, i)))
        return branch_fault(cpu, i);
    reg_write(cpu, RCX * 8, i->asize, rcx - 1);
    return condition && !last ? branch_relative(cpu, i) : not_taken(cpu, i);
}

int x_loop(struct cpu *cpu, const struct insn *i) { return do_loop(cpu, i, true); }
int x_loope(struct cpu *cpu, const struct insn *i) { return do_loop(cpu, i, get_zf(cpu)); }
int x_loopne(struct cpu *cpu, const struct insn *i) { return do_loop(cpu, i, !get_zf(cpu)); }

int x_jcxz(struct cpu *cpu, const struct insn *i)
{
    return reg_read(cpu, RCX * 8, i->asize) == 0 ? branch_relative(cpu, i) : not_taken(cpu, i);
}
