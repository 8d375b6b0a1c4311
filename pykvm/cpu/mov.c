/* SPDX-License-Identifier: MIT */
/* Moves, exchanges, conditional moves, and moves between flags and registers. */
#include "body.h"

/* ---- MOV --------------------------------------------------------------------------------- */

#define MOV_BITS(bits, op)                                                                         \
    HANDLER(op##_rr##bits)                                                                         \
    {                                                                                              \
        PUT##bits(cpu, i->dst, REG##bits(cpu, i->src));                                            \
        NEXT(cpu, i);                                                                              \
    }                                                                                              \
    HANDLER(op##_ri##bits)                                                                         \
    {                                                                                              \
        PUT##bits(cpu, i->dst, i->imm);                                                            \
        NEXT(cpu, i);                                                                              \
    }                                                                                              \
    MEM_HANDLER(op##_rm##bits, {                                                                   \
        LOAD(bits, v)                                                                              \
        PUT##bits(cpu, i->dst, v);                                                                 \
        NEXT(cpu, i);                                                                              \
    })                                                                                             \
    MEM_HANDLER(op##_mr##bits, {                                                                   \
        if (unlikely(!store##bits(cpu, i, fast, REG##bits(cpu, i->src))))                          \
            return miss(cpu, i);                                                                   \
        NEXT(cpu, i);                                                                              \
    })                                                                                             \
    MEM_HANDLER(op##_mi##bits, {                                                                   \
        if (unlikely(!store##bits(cpu, i, fast, i->imm)))                                          \
            return miss(cpu, i);                                                                   \
        NEXT(cpu, i);                                                                              \
    })
FOR_SIZES(MOV_BITS, mov)
const struct body b_mov = BINARY_ROWS(mov);

#define SWAP16(v) __builtin_bswap16((u16)(v))
#define SWAP32(v) __builtin_bswap32((u32)(v))
#define SWAP64(v) __builtin_bswap64(v)
#define MOVBE_BITS(bits, op)                                                                       \
    MEM_HANDLER(op##_rm##bits, {                                                                   \
        LOAD(bits, v)                                                                              \
        PUT##bits(cpu, i->dst, SWAP##bits(v));                                                     \
        NEXT(cpu, i);                                                                              \
    })                                                                                             \
    MEM_HANDLER(op##_mr##bits, {                                                                   \
        if (unlikely(!store##bits(cpu, i, fast, SWAP##bits(REG##bits(cpu, i->src)))))              \
            return miss(cpu, i);                                                                   \
        NEXT(cpu, i);                                                                              \
    })
FOR_16_UP(MOVBE_BITS, movbe)
const struct body b_movbe = {{[K_RM] = FROM_16(movbe_rm), [K_MR] = FROM_16(movbe_mr)}};

/* Extending moves: from `from` bits to `bits`. */
#define EXTEND_BITS(bits, op, from, ext)                                                           \
    HANDLER(op##_rr##bits)                                                                         \
    {                                                                                              \
        PUT##bits(cpu, i->dst, (u##bits)(ext)REG##from(cpu, i->src));                              \
        NEXT(cpu, i);                                                                              \
    }                                                                                              \
    MEM_HANDLER(op##_rm##bits, {                                                                   \
        LOAD(from, v)                                                                              \
        PUT##bits(cpu, i->dst, (u##bits)(ext)v);                                                   \
        NEXT(cpu, i);                                                                              \
    })
#define INSN_EXTEND(op, from, ext)                                                                 \
    FOR_16_UP(EXTEND_BITS, op, from, ext)                                                          \
    const struct body b_##op = {{[K_RR] = FROM_16(op##_rr), [K_RM] = FROM_16(op##_rm)}};

INSN_EXTEND(movzx8, 8, u8)
INSN_EXTEND(movzx16, 16, u16)
INSN_EXTEND(movsx8, 8, s8)
INSN_EXTEND(movsx16, 16, s16)

/* MOVSXD: with operand sizes below 64 bits a plain MOV of that size. */
EXTEND_BITS(64, movsxd, 32, s32)
const struct body b_movsxd = {{[K_RR] = {NULL, mov_rr16, mov_rr32, movsxd_rr64},
                               [K_RM] = {NULL, mov_rm16, mov_rm32, movsxd_rm64}}};

#define LEA_BITS(bits, op)                                                                         \
    HANDLER(op##_rm##bits)                                                                         \
    {                                                                                              \
        u64 a = ea_sum(cpu, i);                                                                    \
        if (unlikely(i->asize < bits / 8))                                                         \
            a = i->asize == 4 ? (u32)a : (u16)a;                                                   \
        PUT##bits(cpu, i->dst, a);                                                                 \
        NEXT(cpu, i);                                                                              \
    }
FOR_16_UP(LEA_BITS, lea)
const struct body b_lea = {{[K_RM] = FROM_16(lea_rm)}};

int x_xlat(struct cpu *cpu, const struct insn *i)
{
    u64 offset = GPR(cpu, RBX) + REG8(cpu, 0), la;
    u8 v;
    offset = i->asize == 8 ? offset : i->asize == 4 ? (u32)offset : (u16)offset;
    if (!offset_linear(cpu, i, offset, 1, ACC_READ, &la) || !ld8(cpu, la, &v, ea_access(i)))
        return stop(cpu, i);
    REG8(cpu, 0) = v;
    NEXT(cpu, i);
}

/* ---- exchanges ------------------------------------------------------------------------------- */

/* With memory XCHG is atomic even without LOCK. */
#define XCHG_BITS(bits, op)                                                                        \
    HANDLER(op##_rr##bits)                                                                         \
    {                                                                                              \
        const u64 a = REG##bits(cpu, i->dst), b = REG##bits(cpu, i->src);                          \
        PUT##bits(cpu, i->src, a);                                                                 \
        PUT##bits(cpu, i->dst, b);                                                                 \
        NEXT(cpu, i);                                                                              \
    }                                                                                              \
    MEM_HANDLER(op##_mr##bits, {                                                                   \
        void *p;                                                                                   \
        if (unlikely(!operand_rmw(cpu, i, bits / 8, fast, &p)))                                    \
            return miss(cpu, i);                                                                   \
        u##bits v = REG##bits(cpu, i->src);                                                        \
        v = __atomic_exchange_n((u##bits *)p, v, __ATOMIC_SEQ_CST);                                \
        if (!fast)                                                                                 \
            rmw_end(cpu, p);                                                                       \
        PUT##bits(cpu, i->src, v);                                                                 \
        NEXT(cpu, i);                                                                              \
    })
FOR_SIZES(XCHG_BITS, xchg)
const struct body b_xchg = {{[K_RR] = BY_SIZE(xchg_rr), [K_MR] = BY_SIZE(xchg_mr)}};

#define XADD_BITS(bits, op)                                                                        \
    HANDLER(op##_rr##bits)                                                                         \
    {                                                                                              \
        const u64 a = REG##bits(cpu, i->dst), b = REG##bits(cpu, i->src), r = a + b;               \
        PUT##bits(cpu, i->src, a);                                                                 \
        PUT##bits(cpu, i->dst, r);                                                                 \
        flags_add(cpu, bits, a, b, r);                                                             \
        NEXT(cpu, i);                                                                              \
    }                                                                                              \
    MEM_HANDLER(op##_mr##bits, {                                                                   \
        const u64 b = REG##bits(cpu, i->src);                                                      \
        RMW(bits, r = a + b)                                                                       \
        PUT##bits(cpu, i->src, a);                                                                 \
        flags_add(cpu, bits, a, b, r);                                                             \
        NEXT(cpu, i);                                                                              \
    })
FOR_SIZES(XADD_BITS, xadd)
const struct body b_xadd = {{[K_RR] = BY_SIZE(xadd_rr), [K_MR] = BY_SIZE(xadd_mr)}};

/* The destination is written even when the comparison fails, with what it held: so a read-only
 * page faults.  The accumulator is written only then. */
#define CMPXCHG_BITS(bits, op)                                                                     \
    HANDLER(op##_rr##bits)                                                                         \
    {                                                                                              \
        const u64 acc = REG##bits(cpu, RAX * 8), a = REG##bits(cpu, i->dst);                       \
        if (a == acc)                                                                              \
            PUT##bits(cpu, i->dst, REG##bits(cpu, i->src));                                        \
        else                                                                                       \
            PUT##bits(cpu, RAX * 8, a);                                                            \
        flags_sub(cpu, bits, acc, a, acc - a);                                                     \
        NEXT(cpu, i);                                                                              \
    }                                                                                              \
    MEM_HANDLER(op##_mr##bits, {                                                                   \
        const u64 acc = REG##bits(cpu, RAX * 8), b = REG##bits(cpu, i->src);                       \
        RMW(bits, r = a == acc ? b : a)                                                            \
        if (a != acc)                                                                              \
            PUT##bits(cpu, RAX * 8, a);                                                            \
        flags_sub(cpu, bits, acc, a, acc - a);                                                     \
        NEXT(cpu, i);                                                                              \
    })
FOR_SIZES(CMPXCHG_BITS, cmpxchg)
const struct body b_cmpxchg = {{[K_RR] = BY_SIZE(cmpxchg_rr), [K_MR] = BY_SIZE(cmpxchg_mr)}};

#ifdef __x86_64__
__attribute__((target("cx16")))
#endif
static bool cas128(void *p, u128 *a, u128 r)
{
    u128 old = __sync_val_compare_and_swap((u128 *)p, *a, r);
    bool done = old == *a;
    *a = old;
    return done;
}

static SLOW int cmpxchg16b(struct cpu *cpu, const struct insn *i)
{
    u64 la;
    u64_mem *p;
    if (!ea_linear(cpu, i, 16, ACC_WRITE, &la))
        return stop(cpu, i);
    if (la & 15)
        return fault_gp(cpu, i, 0);
    p = rmw_begin(cpu, la, 16, ea_access(i));
    if (!p)
        return stop(cpu, i);
    u128 acc = (u128)GPR(cpu, RDX) << 64 | GPR(cpu, RAX);
    u128 b = (u128)GPR(cpu, RCX) << 64 | GPR(cpu, RBX), a, r;
    a = (u128)p[1] << 64 | p[0];
    if ((i->flags & I_LOCK) && rmw_is_direct(cpu, p)) {
        do
            r = a == acc ? b : a;
        while (!cas128(p, &a, r));
    } else {
        r = a == acc ? b : a;
        p[0] = (u64)r;
        p[1] = (u64)(r >> 64);
        rmw_end(cpu, p);
    }
    if (a != acc) {
        GPR(cpu, RAX) = (u64)a;
        GPR(cpu, RDX) = (u64)(a >> 64);
    }
    set_zf(cpu, a == acc);
    NEXT(cpu, i);
}

int x_cmpxchg8b(struct cpu *cpu, const struct insn *i)
{
    const bool fast = false;
    const insn_fn miss = stop;
    if (i->opsize == 8)
        return cmpxchg16b(cpu, i);
    const u64 acc = GPR(cpu, RDX) << 32 | (u32)GPR(cpu, RAX);
    const u64 b = GPR(cpu, RCX) << 32 | (u32)GPR(cpu, RBX);
    RMW(64, r = a == acc ? b : a)
    if (a != acc) {
        GPR(cpu, RAX) = (u32)a;
        GPR(cpu, RDX) = a >> 32;
    }
    set_zf(cpu, a == acc);
    NEXT(cpu, i);
}

/* ---- by condition --------------------------------------------------------------------------------- */

#define CONDITION_CODE(cc) CC_##cc,
enum { CONDITIONS(CONDITION_CODE) };

/* The source is read, and a 32-bit destination zero-extended, whatever the condition. */
#define CMOV_BITS(bits, cc)                                                                        \
    HANDLER(cmov##cc##_rr##bits)                                                                   \
    {                                                                                              \
        const u64 b = REG##bits(cpu, i->src), a = REG##bits(cpu, i->dst);                          \
        PUT##bits(cpu, i->dst, condition(cpu, CC_##cc) ? b : a);                                   \
        NEXT(cpu, i);                                                                              \
    }                                                                                              \
    MEM_HANDLER(cmov##cc##_rm##bits, {                                                             \
        LOAD(bits, b)                                                                              \
        const u64 a = REG##bits(cpu, i->dst);                                                      \
        PUT##bits(cpu, i->dst, condition(cpu, CC_##cc) ? b : a);                                   \
        NEXT(cpu, i);                                                                              \
    })
#define INSN_CMOV(cc)                                                                              \
    FOR_16_UP(CMOV_BITS, cc)                                                                       \
    const struct body b_cmov##cc = {                                                               \
        {[K_RR] = FROM_16(cmov##cc##_rr), [K_RM] = FROM_16(cmov##cc##_rm)}};
CONDITIONS(INSN_CMOV)

#define INSN_SETCC(cc)                                                                             \
    HANDLER(set##cc##_r)                                                                           \
    {                                                                                              \
        REG8(cpu, i->dst) = condition(cpu, CC_##cc);                                               \
        NEXT(cpu, i);                                                                              \
    }                                                                                              \
    MEM_HANDLER(set##cc##_m, {                                                                     \
        if (unlikely(!store8(cpu, i, fast, condition(cpu, CC_##cc))))                              \
            return miss(cpu, i);                                                                   \
        NEXT(cpu, i);                                                                              \
    })                                                                                             \
    const struct body b_set##cc = {{[K_R] = {set##cc##_r}, [K_M] = {set##cc##_m}}};
CONDITIONS(INSN_SETCC)

/* ---- flags ---------------------------------------------------------------------------------------- */

int x_lahf(struct cpu *cpu, const struct insn *i)
{
    REG8(cpu, 1) = (u8)get_status(cpu) | X86_EFLAGS_FIXED;
    NEXT(cpu, i);
}

int x_sahf(struct cpu *cpu, const struct insn *i)
{
    set_status(cpu, (u64)get_of(cpu) << 11 | (REG8(cpu, 1) & STATUS_FLAGS));
    NEXT(cpu, i);
}

int x_clc(struct cpu *cpu, const struct insn *i)
{
    set_cf(cpu, false);
    NEXT(cpu, i);
}

int x_stc(struct cpu *cpu, const struct insn *i)
{
    set_cf(cpu, true);
    NEXT(cpu, i);
}

int x_cmc(struct cpu *cpu, const struct insn *i)
{
    set_cf(cpu, !get_cf(cpu));
    NEXT(cpu, i);
}

int x_cld(struct cpu *cpu, const struct insn *i)
{
    GUEST(cpu).rflags &= ~(u64)X86_EFLAGS_DF;
    NEXT(cpu, i);
}

int x_std(struct cpu *cpu, const struct insn *i)
{
    GUEST(cpu).rflags |= X86_EFLAGS_DF;
    NEXT(cpu, i);
}
