/* SPDX-License-Identifier: MIT */
/*
 * Building handlers: from the text of one operation, a handler for each operand size and kind.
 *
 * A handler with a memory operand is compiled twice from the same text.  The fast one knows
 * only flat addresses and TLB hits; it calls nothing and so has no frame, and anything else is
 * a tail call of the slow one, which knows segments, page crossings, MMIO, code pages and LOCK.
 */
#ifndef PYKVM_BODY_H
#define PYKVM_BODY_H

#include "core.h"
#include "insns.h"

#define ALWAYS_INLINE inline __attribute__((always_inline))
#define SLOW __attribute__((noinline, cold))

#define HANDLER(name) static int name(struct cpu *cpu, const struct insn *i)
#define MEM_HANDLER(name, ...)                                                                     \
    static SLOW int name##_slow(struct cpu *cpu, const struct insn *i)                             \
    {                                                                                              \
        const bool fast = false;                                                                   \
        const insn_fn miss = stop;                                                                 \
        __VA_ARGS__                                                                                \
    }                                                                                              \
    static int name(struct cpu *cpu, const struct insn *i)                                         \
    {                                                                                              \
        const bool fast = true;                                                                    \
        const insn_fn miss = name##_slow;                                                          \
        __VA_ARGS__                                                                                \
    }

/* Register write by width; 32 bits clear the upper half. */
#define PUT8(cpu, o, v) ((void)(REG8(cpu, o) = (u8)(v)))
#define PUT16(cpu, o, v) ((void)(REG16(cpu, o) = (u16)(v)))
#define PUT32(cpu, o, v) ((void)(REG64(cpu, o) = (u32)(v)))
#define PUT64(cpu, o, v) ((void)(REG64(cpu, o) = (v)))

/* What an operation on `bits` computes with: no narrower than int, so that nothing is truncated
 * before the register is written. */
typedef u32 w8, w16, w32;
typedef u64 w64;

/* Rows of a struct body, and the empty ones. */
#define BY_SIZE(name) {name##8, name##16, name##32, name##64}
#define FROM_16(name) {NULL, name##16, name##32, name##64}
#define FOR_SIZES(X, ...) X(8, __VA_ARGS__) X(16, __VA_ARGS__) X(32, __VA_ARGS__) X(64, __VA_ARGS__)
#define FOR_16_UP(X, ...) X(16, __VA_ARGS__) X(32, __VA_ARGS__) X(64, __VA_ARGS__)

/* Linear address of an offset in the segment of the operand: string sources, XLAT. */
static ALWAYS_INLINE bool offset_linear(struct cpu *cpu, const struct insn *i, u64 offset,
                                        unsigned size, unsigned access, u64 *la)
{
    switch (i->ea) {
    case EA_64: *la = offset + cpu->seg_base[i->seg]; return true;
    case EA_32: *la = (u32)offset; return true;
    case EA_64_32: *la = (u32)offset + cpu->seg_base[i->seg]; return true;
    default: return seg_linear(cpu, i->seg, offset, size, access, la);
    }
}

/* Linear address of the memory operand; fast: false means "not by the fast way". */
static ALWAYS_INLINE bool operand_linear(struct cpu *cpu, const struct insn *i, unsigned size,
                                         unsigned access, bool fast, u64 *la)
{
    if (!fast)
        return ea_linear(cpu, i, size, access, la);
    u64 a = ea_sum(cpu, i);
    if (likely(i->ea == EA_64)) {
        *la = a + cpu->seg_base[i->seg];
        return true;
    }
    *la = (u32)a;
    return i->ea == EA_32;
}

static ALWAYS_INLINE bool tlb_hit(const struct tlbe *e, u64 la, unsigned size)
{
    return likely(e->tag == ((la + size - 1) & PAGE_MASK));
}

#define DEFINE_LOAD_STORE(bits)                                                                    \
    static ALWAYS_INLINE bool load_la##bits(struct cpu *cpu, u64 la, unsigned access, bool fast,   \
                                            u64 *v)                                                \
    {                                                                                              \
        u##bits t;                                                                                 \
        if (fast) {                                                                                \
            const struct tlbe *e = &cpu->tlb->r[TLB_INDEX(la)];                                    \
            if (!tlb_hit(e, la, bits / 8))                                                         \
                return false;                                                                      \
            t = *(const volatile u##bits##_mem *)(uintptr_t)(la + e->addend);                      \
        } else if (!ld##bits(cpu, la, &t, access)) {                                               \
            return false;                                                                          \
        }                                                                                          \
        *v = t;                                                                                    \
        return true;                                                                               \
    }                                                                                              \
    static ALWAYS_INLINE bool store_la##bits(struct cpu *cpu, u64 la, unsigned access, bool fast,  \
                                             u64 v)                                                \
    {                                                                                              \
        if (!fast)                                                                                 \
            return st##bits(cpu, la, (u##bits)v, access);                                          \
        const struct tlbe *e = &cpu->tlb->w[TLB_INDEX(la)];                                        \
        if (!tlb_hit(e, la, bits / 8))                                                             \
            return false;                                                                          \
        *(volatile u##bits##_mem *)(uintptr_t)(la + e->addend) = (u##bits)v;                       \
        return true;                                                                               \
    }                                                                                              \
    static ALWAYS_INLINE bool load##bits(struct cpu *cpu, const struct insn *i, bool fast, u64 *v) \
    {                                                                                              \
        u64 la;                                                                                    \
        return operand_linear(cpu, i, bits / 8, ACC_READ, fast, &la) &&                            \
               load_la##bits(cpu, la, ea_access(i), fast, v);                                      \
    }                                                                                              \
    static ALWAYS_INLINE bool store##bits(struct cpu *cpu, const struct insn *i, bool fast, u64 v) \
    {                                                                                              \
        u64 la;                                                                                    \
        return operand_linear(cpu, i, bits / 8, ACC_WRITE, fast, &la) &&                           \
               store_la##bits(cpu, la, ea_access(i), fast, v);                                     \
    }                                                                                              \
    /* Atomically *p: *a -> r; when it fails *a is what was there instead. */                      \
    static ALWAYS_INLINE bool cas##bits(void *p, u64 *a, u64 r)                                    \
    {                                                                                              \
        u##bits expected = (u##bits) * a;                                                          \
        bool done = __atomic_compare_exchange_n((u##bits *)p, &expected, (u##bits)r, false,        \
                                                __ATOMIC_SEQ_CST, __ATOMIC_SEQ_CST);               \
        *a = expected;                                                                             \
        return done;                                                                               \
    }
DEFINE_LOAD_STORE(8)
DEFINE_LOAD_STORE(16)
DEFINE_LOAD_STORE(32)
DEFINE_LOAD_STORE(64)

/* The memory operand for read-modify-write. */
static ALWAYS_INLINE bool operand_rmw(struct cpu *cpu, const struct insn *i, unsigned size,
                                      bool fast, void **p)
{
    u64 la;
    if (fast && unlikely(i->flags & I_LOCK))
        return false;
    if (!operand_linear(cpu, i, size, ACC_WRITE, fast, &la))
        return false;
    if (!fast) {
        *p = rmw_begin(cpu, la, size, ea_access(i));
        return *p != NULL;
    }
    const struct tlbe *e = &cpu->tlb->w[TLB_INDEX(la)];
    *p = (void *)(uintptr_t)(la + e->addend);
    return tlb_hit(e, la, size);
}

/*
 * In a MEM_HANDLER: declares a and r, does a = operand, `expr`, operand = r, with LOCK as one
 * atomic step.  On plain RAM that is a compare-and-swap loop, so expr may run several times;
 * anything else (MMIO, two pages) has no other user that could see the difference.
 */
#define RMW(bits, expr)                                                                            \
    void *p_;                                                                                      \
    if (unlikely(!operand_rmw(cpu, i, bits / 8, fast, &p_)))                                       \
        return miss(cpu, i);                                                                       \
    u64 a = *(volatile u##bits##_mem *)p_, r;                                                      \
    if (!fast && (i->flags & I_LOCK) && rmw_is_direct(cpu, p_)) {                                  \
        do {                                                                                       \
            expr;                                                                                  \
        } while (!cas##bits(p_, &a, r));                                                           \
    } else {                                                                                       \
        expr;                                                                                      \
        *(volatile u##bits##_mem *)p_ = (u##bits)r;                                                \
        if (!fast)                                                                                 \
            rmw_end(cpu, p_);                                                                      \
    }

/* In a MEM_HANDLER: declares v, the memory operand. */
#define LOAD(bits, v)                                                                              \
    u64 v;                                                                                         \
    if (unlikely(!load##bits(cpu, i, fast, &v)))                                                   \
        return miss(cpu, i);

/* dst = op(dst, src): register, memory and immediate sources, register and memory destinations. */
#define BINARY_BITS(bits, op, expr, flags)                                                         \
    HANDLER(op##_rr##bits)                                                                         \
    {                                                                                              \
        enum { BITS = bits };                                                                      \
        const w##bits a = REG##bits(cpu, i->dst), b = REG##bits(cpu, i->src);                      \
        w##bits r;                                                                                 \
        expr;                                                                                      \
        PUT##bits(cpu, i->dst, r);                                                                 \
        flags(cpu, bits, a, b, r);                                                                 \
        NEXT(cpu, i);                                                                              \
    }                                                                                              \
    HANDLER(op##_ri##bits)                                                                         \
    {                                                                                              \
        enum { BITS = bits };                                                                      \
        const w##bits a = REG##bits(cpu, i->dst), b = i->imm;                                      \
        w##bits r;                                                                                 \
        expr;                                                                                      \
        PUT##bits(cpu, i->dst, r);                                                                 \
        flags(cpu, bits, a, b, r);                                                                 \
        NEXT(cpu, i);                                                                              \
    }                                                                                              \
    MEM_HANDLER(op##_rm##bits, {                                                                   \
        enum { BITS = bits };                                                                      \
        LOAD(bits, b)                                                                              \
        const u64 a = REG##bits(cpu, i->dst);                                                      \
        u64 r;                                                                                     \
        expr;                                                                                      \
        PUT##bits(cpu, i->dst, r);                                                                 \
        flags(cpu, bits, a, b, r);                                                                 \
        NEXT(cpu, i);                                                                              \
    })                                                                                             \
    MEM_HANDLER(op##_mr##bits, {                                                                   \
        enum { BITS = bits };                                                                      \
        const u64 b = REG##bits(cpu, i->src);                                                      \
        RMW(bits, expr)                                                                            \
        flags(cpu, bits, a, b, r);                                                                 \
        NEXT(cpu, i);                                                                              \
    })                                                                                             \
    MEM_HANDLER(op##_mi##bits, {                                                                   \
        enum { BITS = bits };                                                                      \
        const u64 b = i->imm;                                                                      \
        RMW(bits, expr)                                                                            \
        flags(cpu, bits, a, b, r);                                                                 \
        NEXT(cpu, i);                                                                              \
    })

/* The same without a destination: CMP, TEST. */
#define COMPARE_BITS(bits, op, expr, flags)                                                        \
    HANDLER(op##_rr##bits)                                                                         \
    {                                                                                              \
        enum { BITS = bits };                                                                      \
        const w##bits a = REG##bits(cpu, i->dst), b = REG##bits(cpu, i->src);                      \
        w##bits r;                                                                                 \
        expr;                                                                                      \
        flags(cpu, bits, a, b, r);                                                                 \
        NEXT(cpu, i);                                                                              \
    }                                                                                              \
    HANDLER(op##_ri##bits)                                                                         \
    {                                                                                              \
        enum { BITS = bits };                                                                      \
        const w##bits a = REG##bits(cpu, i->dst), b = i->imm;                                      \
        w##bits r;                                                                                 \
        expr;                                                                                      \
        flags(cpu, bits, a, b, r);                                                                 \
        NEXT(cpu, i);                                                                              \
    }                                                                                              \
    MEM_HANDLER(op##_rm##bits, {                                                                   \
        enum { BITS = bits };                                                                      \
        LOAD(bits, b)                                                                              \
        const u64 a = REG##bits(cpu, i->dst);                                                      \
        u64 r;                                                                                     \
        expr;                                                                                      \
        flags(cpu, bits, a, b, r);                                                                 \
        NEXT(cpu, i);                                                                              \
    })                                                                                             \
    MEM_HANDLER(op##_mr##bits, {                                                                   \
        enum { BITS = bits };                                                                      \
        LOAD(bits, a)                                                                              \
        const u64 b = REG##bits(cpu, i->src);                                                      \
        u64 r;                                                                                     \
        expr;                                                                                      \
        flags(cpu, bits, a, b, r);                                                                 \
        NEXT(cpu, i);                                                                              \
    })                                                                                             \
    MEM_HANDLER(op##_mi##bits, {                                                                   \
        enum { BITS = bits };                                                                      \
        LOAD(bits, a)                                                                              \
        const u64 b = i->imm;                                                                      \
        u64 r;                                                                                     \
        expr;                                                                                      \
        flags(cpu, bits, a, b, r);                                                                 \
        NEXT(cpu, i);                                                                              \
    })

/* dst = op(src): register or memory to register.  v: the third operand, in VEX.vvvv. */
#define TO_REG_BITS(bits, op, expr, flags)                                                         \
    HANDLER(op##_rr##bits)                                                                         \
    {                                                                                              \
        enum { BITS = bits };                                                                      \
        const u64 a = REG##bits(cpu, i->dst), b = REG##bits(cpu, i->src);                          \
        u64 r;                                                                                     \
        const u64 v = GPR(cpu, i->vvvv);                                                           \
        (void)a, (void)v;                                                                          \
        expr;                                                                                      \
        PUT##bits(cpu, i->dst, r);                                                                 \
        flags(cpu, bits, a, b, r);                                                                 \
        NEXT(cpu, i);                                                                              \
    }                                                                                              \
    MEM_HANDLER(op##_rm##bits, {                                                                   \
        enum { BITS = bits };                                                                      \
        LOAD(bits, b)                                                                              \
        const u64 a = REG##bits(cpu, i->dst);                                                      \
        u64 r;                                                                                     \
        const u64 v = GPR(cpu, i->vvvv);                                                           \
        (void)a, (void)v;                                                                          \
        expr;                                                                                      \
        PUT##bits(cpu, i->dst, r);                                                                 \
        flags(cpu, bits, a, b, r);                                                                 \
        NEXT(cpu, i);                                                                              \
    })

/* dst = op(dst) */
#define UNARY_BITS(bits, op, expr, flags)                                                          \
    HANDLER(op##_r##bits)                                                                          \
    {                                                                                              \
        enum { BITS = bits };                                                                      \
        const w##bits a = REG##bits(cpu, i->dst);                                                  \
        w##bits r;                                                                                 \
        expr;                                                                                      \
        PUT##bits(cpu, i->dst, r);                                                                 \
        flags(cpu, bits, a, a, r);                                                                 \
        NEXT(cpu, i);                                                                              \
    }                                                                                              \
    MEM_HANDLER(op##_m##bits, {                                                                    \
        enum { BITS = bits };                                                                      \
        RMW(bits, expr)                                                                            \
        flags(cpu, bits, a, a, r);                                                                 \
        NEXT(cpu, i);                                                                              \
    })

#define BINARY_ROWS(op)                                                                            \
    {                                                                                              \
        {                                                                                          \
            [K_RR] = BY_SIZE(op##_rr), [K_RM] = BY_SIZE(op##_rm), [K_MR] = BY_SIZE(op##_mr),       \
            [K_RI] = BY_SIZE(op##_ri), [K_MI] = BY_SIZE(op##_mi),                                  \
        }                                                                                          \
    }
#define INSN_BINARY(op, expr, flags)                                                               \
    FOR_SIZES(BINARY_BITS, op, expr, flags)                                                        \
    const struct body b_##op = BINARY_ROWS(op);
#define INSN_COMPARE(op, expr, flags)                                                              \
    FOR_SIZES(COMPARE_BITS, op, expr, flags)                                                       \
    const struct body b_##op = BINARY_ROWS(op);
#define INSN_UNARY(op, expr, flags)                                                                \
    FOR_SIZES(UNARY_BITS, op, expr, flags)                                                         \
    const struct body b_##op = {{[K_R] = BY_SIZE(op##_r), [K_M] = BY_SIZE(op##_m)}};
#define INSN_TO_REG(op, expr, flags)                                                               \
    FOR_16_UP(TO_REG_BITS, op, expr, flags)                                                        \
    const struct body b_##op = {{[K_RR] = FROM_16(op##_rr), [K_RM] = FROM_16(op##_rm)}};

#endif
