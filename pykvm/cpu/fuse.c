/* SPDX-License-Identifier: MIT */
/*
 * Macro-fusion: in 64-bit code one handler does CMP, TEST and others of their kind together with
 * the conditional branch behind them, which then need not find its condition in the flags.
 *
 * The branch stays in its place in the block.  So counts, rip and faults are as without fusion,
 * and what a fused handler cannot do at once, an operand that is not in the TLB, it leaves to the
 * handler that it stands for: that one goes on to the branch by itself.  When stepping there is
 * nothing to fuse: the block has one instruction.
 */
#include "block.h"
#include "body.h"
#include "branch.h"

#define CONDITION_CODE(cc) CC_##cc,
enum { CONDITIONS(CONDITION_CODE) };

/* ---- conditions of operands ---------------------------------------------------------------------- */

/* Of a - b; a and b as zero-extended values. */
static ALWAYS_INLINE bool difference_is(const struct cpu *cpu, unsigned cc, unsigned bits, u64 a,
                                        u64 b)
{
    const s64 x = (s64)SEXT(bits, a), y = (s64)SEXT(bits, b);
    bool v;

    switch (cc >> 1) {
    case CC_b >> 1: v = a < b; break;
    case CC_e >> 1: v = a == b; break;
    case CC_be >> 1: v = a <= b; break;
    case CC_s >> 1: v = (s64)SEXT(bits, a - b) < 0; break;
    case CC_l >> 1: v = x < y; break;
    case CC_le >> 1: v = x <= y; break;
    default: return condition(cpu, cc);
    }
    return v ^ (cc & 1);
}

/* Of a result that leaves CF and OF clear. */
static ALWAYS_INLINE bool result_is(const struct cpu *cpu, unsigned cc, unsigned bits, u64 a, u64 b,
                                    u64 r)
{
    (void)a, (void)b;
    return difference_is(cpu, cc, bits, r, 0);
}

static ALWAYS_INLINE bool compared_is(const struct cpu *cpu, unsigned cc, unsigned bits, u64 a,
                                      u64 b, u64 r)
{
    (void)r;
    return difference_is(cpu, cc, bits, a, b);
}

static ALWAYS_INLINE bool flags_are(const struct cpu *cpu, unsigned cc, unsigned bits, u64 a, u64 b,
                                    u64 r)
{
    (void)bits, (void)a, (void)b, (void)r;
    return condition(cpu, cc);
}

/* ---- handlers -------------------------------------------------------------------------------------- */

static ALWAYS_INLINE void flags_bitwise(struct cpu *cpu, unsigned bits, u64 a, u64 b, u64 r)
{
    (void)a, (void)b;
    flags_logic(cpu, bits, r);
}

static ALWAYS_INLINE void put_none(struct cpu *cpu, unsigned o, u64 v)
{
    (void)cpu, (void)o, (void)v;
}

/* r, its flags, and the branch. */
#define FUSED_END(bits, cc, expr, put, flags, holds)                                               \
    const u##bits r = (u##bits)(expr);                                                             \
    put(cpu, i->dst, r);                                                                           \
    flags(cpu, bits, a, b, r);                                                                     \
    return branch_if(cpu, i + 1, 64, holds(cpu, CC_##cc, bits, a, b, r));

#define FUSED_REGISTERS(cc, bits, op, ...)                                                         \
    HANDLER(op##_rr##bits##_j##cc)                                                                 \
    {                                                                                              \
        const u##bits a = REG##bits(cpu, i->dst), b = REG##bits(cpu, i->src);                      \
        FUSED_END(bits, cc, __VA_ARGS__)                                                           \
    }                                                                                              \
    HANDLER(op##_ri##bits##_j##cc)                                                                 \
    {                                                                                              \
        const u##bits a = REG##bits(cpu, i->dst), b = (u##bits)i->imm;                             \
        FUSED_END(bits, cc, __VA_ARGS__)                                                           \
    }

#define FUSED_LOAD(bits, v, op, kind)                                                              \
    u64 v##_;                                                                                      \
    if (unlikely(!load##bits(cpu, i, true, &v##_)))                                                \
        return b_##op.fn[kind][SIZE_##bits](cpu, i);                                               \
    const u##bits v = (u##bits)v##_;

#define FUSED_MEMORY(cc, bits, op, ...)                                                            \
    HANDLER(op##_rm##bits##_j##cc)                                                                 \
    {                                                                                              \
        FUSED_LOAD(bits, b, op, K_RM)                                                              \
        const u##bits a = REG##bits(cpu, i->dst);                                                  \
        FUSED_END(bits, cc, __VA_ARGS__)                                                           \
    }                                                                                              \
    HANDLER(op##_mr##bits##_j##cc)                                                                 \
    {                                                                                              \
        FUSED_LOAD(bits, a, op, K_MR)                                                              \
        const u##bits b = REG##bits(cpu, i->src);                                                  \
        FUSED_END(bits, cc, __VA_ARGS__)                                                           \
    }                                                                                              \
    HANDLER(op##_mi##bits##_j##cc)                                                                 \
    {                                                                                              \
        FUSED_LOAD(bits, a, op, K_MI)                                                              \
        const u##bits b = (u##bits)i->imm;                                                         \
        FUSED_END(bits, cc, __VA_ARGS__)                                                           \
    }

enum { SIZE_8, SIZE_16, SIZE_32, SIZE_64 };

#define EACH_SIZE(X, cc, OP)                                                                       \
    EXPAND(X, cc, 8, OP(8)) EXPAND(X, cc, 32, OP(32)) EXPAND(X, cc, 64, OP(64))
#define EXPAND(X, ...) X(__VA_ARGS__)

/* name, result, where it goes, its flags, the condition from a, b and r */
#define CMP(bits) cmp, a - b, put_none, flags_sub, compared_is
#define TEST(bits) test, a &b, put_none, flags_bitwise, result_is
#define SUB(bits) sub, a - b, PUT##bits, flags_sub, compared_is
#define ADD(bits) add, a + b, PUT##bits, flags_add, flags_are
#define AND(bits) and, a &b, PUT##bits, flags_bitwise, result_is

#define HANDLERS(cc)                                                                               \
    EACH_SIZE(FUSED_REGISTERS, cc, CMP)                                                            \
    EACH_SIZE(FUSED_MEMORY, cc, CMP)                                                               \
    EACH_SIZE(FUSED_REGISTERS, cc, TEST)                                                           \
    EACH_SIZE(FUSED_MEMORY, cc, TEST)                                                              \
    EACH_SIZE(FUSED_REGISTERS, cc, SUB)                                                            \
    EACH_SIZE(FUSED_REGISTERS, cc, ADD)                                                            \
    EACH_SIZE(FUSED_REGISTERS, cc, AND)
CONDITIONS(HANDLERS)

/* ---- which there are ----------------------------------------------------------------------------------- */

#define ROW(op, kind, cc) {op##_##kind##8_j##cc, NULL, op##_##kind##32_j##cc, op##_##kind##64_j##cc}
#define REGISTERS(op, cc) [K_RR] = ROW(op, rr, cc), [K_RI] = ROW(op, ri, cc)
#define MEMORY(op, cc) [K_RM] = ROW(op, rm, cc), [K_MR] = ROW(op, mr, cc), [K_MI] = ROW(op, mi, cc)
#define FUSED_CMP(cc) [CC_##cc] = {{REGISTERS(cmp, cc), MEMORY(cmp, cc)}},
#define FUSED_TEST(cc) [CC_##cc] = {{REGISTERS(test, cc), MEMORY(test, cc)}},
#define FUSED_SUB(cc) [CC_##cc] = {{REGISTERS(sub, cc)}},
#define FUSED_ADD(cc) [CC_##cc] = {{REGISTERS(add, cc)}},
#define FUSED_AND(cc) [CC_##cc] = {{REGISTERS(and, cc)}},

static const struct fusion {
    const struct body *plain;
    struct body with[16]; /* by condition */
} fusions[] = {
    {&b_cmp, {CONDITIONS(FUSED_CMP)}}, {&b_test, {CONDITIONS(FUSED_TEST)}},
    {&b_sub, {CONDITIONS(FUSED_SUB)}}, {&b_add, {CONDITIONS(FUSED_ADD)}},
    {&b_and, {CONDITIONS(FUSED_AND)}},
};

#define JCC_BODY(cc) [CC_##cc] = &b_j##cc,
static const struct body *const jcc[16] = {CONDITIONS(JCC_BODY)};

static insn_fn fused_handler(const struct fusion *f, insn_fn plain, unsigned cc)
{
    for (unsigned kind = 0; kind < K_MAX; kind++)
        for (unsigned size = 0; size < 4; size++)
            if (f->plain->fn[kind][size] == plain)
                return f->with[cc].fn[kind][size];
    return NULL;
}

void fuse(struct insn *i)
{
    const struct insn *branch = i + 1;
    unsigned cc = branch->vvvv;

    if (!(branch->flags & I_CODE64) || cc > 15 || branch->op->body != jcc[cc] || branch->fn == x_ud)
        return; /* x_ud: LOCK */
    for (unsigned k = 0; k < sizeof(fusions) / sizeof(*fusions); k++) {
        insn_fn fused =
            i->op->body == fusions[k].plain ? fused_handler(&fusions[k], i->fn, cc) : NULL;
        if (fused)
            i->fn = fused;
    }
}
