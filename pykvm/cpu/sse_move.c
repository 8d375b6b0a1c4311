/* SPDX-License-Identifier: MIT */
/*
 * Vector instructions that move: whole registers, halves, elements, masks, MXCSR.
 */
#include "vector.h"

/* clang-format off */

typedef long long vec16 __attribute__((vector_size(16), may_alias, aligned(1)));

static ALWAYS_INLINE void copy16(void *d, const void *s)
{
    *(volatile vec16 *)d = *(const volatile vec16 *)s;
}
/* d = two quadwords; one store, a vector load follows */
static ALWAYS_INLINE void set_quads(void *d, u64 low, u64 high)
{
    *(volatile vec16 *)d = (vec16){(long long)low, (long long)high};
}
static ALWAYS_INLINE void clear_upper(struct cpu *cpu, u16 reg)
{
    set_quads((u8 *)VREG(cpu, reg) + 16, 0, 0);
}
#define QUAD(cpu, reg, n) (((const u64_mem *)VREG(cpu, reg))[n])

/* A store of what expr makes of the register: source() is where it lies in the register file. */
#define STORE(name, size, align, source, ...)                                                      \
    static int name##_mr(struct cpu *cpu, const struct insn *i)                                    \
    {                                                                                              \
        const void *s = source;                                                                    \
        void *p;                                                                                   \
        if (unlikely(!v_target(cpu, i, size, align, &p)))                                          \
            return v_store_slow(cpu, i, s, size, align);                                           \
        __VA_ARGS__;                                                                               \
        NEXT(cpu, i);                                                                              \
    }
/* A load whose register form is something else: fast and slow way of the same text. */
#define LOAD_ONLY(name, size, align, ...)                                                          \
    static int name##_from_reg(struct cpu *cpu, const struct insn *i)                              \
    {                                                                                              \
        const void *p = VREG(cpu, i->vb);                                                          \
        __VA_ARGS__;                                                                               \
        NEXT(cpu, i);                                                                              \
    }                                                                                              \
    static int name##_rm(struct cpu *cpu, const struct insn *i)                                    \
    {                                                                                              \
        const void *p;                                                                             \
        if (unlikely(!v_source(cpu, i, size, align, &p)))                                          \
            return v_load_slow(cpu, i, name##_from_reg, size, align);                              \
        __VA_ARGS__;                                                                               \
        NEXT(cpu, i);                                                                              \
    }
#define SOURCE VREG(cpu, i->vb)
#define DEST VREG(cpu, i->vd)

#define VMOV_128 V_ASM_DB("vmovups %[b], %%xmm0\n\tvmovaps %%ymm0, %[d]", p)
#define VMOV_256 V_ASM_DB("vmovups %[b], %%ymm0\n\tvmovaps %%ymm0, %[d]\n\tvzeroupper", p)
#define STORE_256(nt)                                                                              \
    __asm__ volatile("vmovaps %[b], %%ymm0\n\t" nt " %%ymm0, %[d]\n\tvzeroupper"                   \
                     : : [d] "m"(VEC(p)), [b] "m"(VEC(s)) : V_CLOBBERS)

/* ---- whole registers ------------------------------------------------------------------------- */

/* align_l: of legacy encodings, align_v and align_y of VEX ones */
#define MOVE(name, align_l, align_v, align_y)                                                      \
    V_PAIR(name##_l, 16, align_l, copy16(DEST, p))                                                 \
    V_PAIR(name##_v, 16, align_v, VMOV_128)                                                        \
    V_PAIR(name##_y, 32, align_y, VMOV_256)                                                        \
    STORE(name##_l, 16, align_l, SOURCE, copy16(p, s))                                             \
    STORE(name##_v, 16, align_v, SOURCE, copy16(p, s))                                             \
    STORE(name##_y, 32, align_y, SOURCE, STORE_256("vmovups"))                                     \
    const struct body b_##name = {{                                                                \
        [K_RR] = {name##_l_rr, name##_v_rr, name##_y_rr},                                          \
        [K_RM] = {name##_l_rm, name##_v_rm, name##_y_rm},                                          \
        [K_MR] = {name##_l_mr, name##_v_mr, name##_y_mr},                                          \
    }};
MOVE(movaps, 16, 16, 32) /* also movapd, movdqa */
MOVE(movups, 1, 1, 1)    /* also movupd, movdqu */

/* Without temporal hint: an ordinary store is the stronger ordered one. Memory only. */
const struct body b_movntps = {{[K_MR] = {movaps_l_mr, movaps_v_mr, movaps_y_mr}}};
const struct body b_movntdqa = {{[K_RM] = {movaps_l_rm, movaps_v_rm, movaps_y_rm}}};
const struct body b_lddqu = {{[K_RM] = {movups_l_rm, movups_v_rm, movups_y_rm}}};

/* ---- one element ----------------------------------------------------------------------------- */

#define MOVE_SCALAR(name, size, type)                                                              \
    LOAD_ONLY(name##_l, size, 1, set_quads(DEST, *(const volatile type *)p, 0))                    \
    LOAD_ONLY(name##_v, size, 1, V_ASM_DB("v" #name " %[b], %%xmm0\n\tvmovaps %%ymm0, %[d]", p))   \
    STORE(name, size, 1, SOURCE, *(volatile type *)p = *(const type *)s)                           \
    static int name##_l_rr(struct cpu *cpu, const struct insn *i)                                  \
    {                                                                                              \
        V_ASM_DB("movaps %[d], %%xmm0\n\tmovaps %[b], %%xmm1\n\t" #name " %%xmm1, %%xmm0\n\t"      \
                 "movaps %%xmm0, %[d]", SOURCE);                                                   \
        NEXT(cpu, i);                                                                              \
    }                                                                                              \
    static int name##_v_rr(struct cpu *cpu, const struct insn *i)                                  \
    {                                                                                              \
        V_ASM_DAB("vmovaps %[a], %%xmm0\n\tvmovaps %[b], %%xmm1\n\tv" #name                        \
                  " %%xmm1, %%xmm0, %%xmm0\n\tvmovaps %%ymm0, %[d]", SOURCE);                      \
        NEXT(cpu, i);                                                                              \
    }                                                                                              \
    const struct body b_##name = {{                                                                \
        [K_RR] = {name##_l_rr, name##_v_rr, name##_v_rr},                                          \
        [K_RM] = {name##_l_rm, name##_v_rm, name##_v_rm},                                          \
        [K_MR] = {name##_mr, name##_mr, name##_mr},                                                \
    }};
MOVE_SCALAR(movss, 4, u32_mem) MOVE_SCALAR(movsd, 8, u64_mem)

/* Low quadword, the rest cleared: F3 7E and, as a store, 66 D6 */
V_PAIR(movq_l, 8, 1, set_quads(DEST, *(const volatile u64_mem *)p, 0))
V_PAIR(movq_v, 8, 1, V_ASM_DB("vmovq %[b], %%xmm0\n\tvmovaps %%ymm0, %[d]", p))
STORE(movq, 8, 1, SOURCE, *(volatile u64_mem *)p = *(const u64_mem *)s)
const struct body b_movq = {{
    [K_RR] = {movq_l_rr, movq_v_rr}, [K_RM] = {movq_l_rm, movq_v_rm}, [K_MR] = {movq_mr, movq_mr},
}};

/* ---- halves ---------------------------------------------------------------------------------- */

/* d = low and high quadword, from a, b or memory m */
#define HALVES(name, low, high)                                                                    \
    LOAD_ONLY(name##_l, 8, 1, set_quads(DEST, low, high))                                          \
    LOAD_ONLY(name##_v, 8, 1, { set_quads(DEST, low, high); clear_upper(cpu, i->vd); })
#define MEM_QUAD (*(const volatile u64_mem *)p)
HALVES(movlps, MEM_QUAD, QUAD(cpu, i->va, 1)) /* also movlpd */
HALVES(movhps, QUAD(cpu, i->va, 0), MEM_QUAD) /* also movhpd */
STORE(movlps, 8, 1, SOURCE, *(volatile u64_mem *)p = *(const u64_mem *)s)
STORE(movhps, 8, 1, (u8 *)SOURCE + 8, *(volatile u64_mem *)p = *(const u64_mem *)s)
const struct body b_movlps = {{
    [K_RM] = {movlps_l_rm, movlps_v_rm}, [K_MR] = {movlps_mr, movlps_mr},
}};
const struct body b_movhps = {{
    [K_RM] = {movhps_l_rm, movhps_v_rm}, [K_MR] = {movhps_mr, movhps_mr},
}};

#define HALVES_REG(name, low, high)                                                                \
    HANDLER(name##_l) { set_quads(DEST, low, high); NEXT(cpu, i); }                                \
    HANDLER(name##_v) { set_quads(DEST, low, high); clear_upper(cpu, i->vd); NEXT(cpu, i); }       \
    const struct body b_##name = {{[K_RR] = {name##_l, name##_v}}};
HALVES_REG(movhlps, QUAD(cpu, i->vb, 1), QUAD(cpu, i->va, 1))
HALVES_REG(movlhps, QUAD(cpu, i->va, 0), QUAD(cpu, i->vb, 0))

V_UNARY(movsldup) V_UNARY(movshdup)
V_LEGACY_UNARY(movddup, "movddup", 8, 1)
V_VEX128_UNARY(movddup, "vmovddup", 8)
V_VEX256_UNARY(movddup, "vmovddup", 32)
V_ALL(movddup)

/* ---- general registers ----------------------------------------------------------------------- */

/* movd, movq: 66 6E */
#define MOVD(name, ...)                                                                            \
    static int name##_rr(struct cpu *cpu, const struct insn *i)                                    \
    {                                                                                              \
        u64 v = i->opsize == 8 ? REG64(cpu, i->dst) : REG32(cpu, i->dst);                          \
        __VA_ARGS__;                                                                               \
        NEXT(cpu, i);                                                                              \
    }                                                                                              \
    MEM_HANDLER(name##_rm, {                                                                       \
        u64 v;                                                                                     \
        if (unlikely(!(i->opsize == 8 ? load64(cpu, i, fast, &v) : load32(cpu, i, fast, &v))))     \
            return miss(cpu, i);                                                                   \
        __VA_ARGS__;                                                                               \
        NEXT(cpu, i);                                                                              \
    })
MOVD(movd_l, set_quads(DEST, v, 0))
MOVD(movd_v, { set_quads(DEST, v, 0); clear_upper(cpu, i->vd); })
V_128(movd)

/* 66 7E */
HANDLER(movd_to_gpr)
{
    u64 v = QUAD(cpu, i->vb, 0);
    REG64(cpu, i->dst) = i->opsize == 8 ? v : (u32)v;
    NEXT(cpu, i);
}
MEM_HANDLER(movd_to_mem, {
    u64 v = QUAD(cpu, i->vb, 0);
    if (unlikely(!(i->opsize == 8 ? store64(cpu, i, fast, v) : store32(cpu, i, fast, v))))
        return miss(cpu, i);
    NEXT(cpu, i);
})
const struct body b_movd_e = {{
    [K_RR] = {movd_to_gpr, movd_to_gpr}, [K_MR] = {movd_to_mem, movd_to_mem},
}};

/* Sign bits to a general register */
#define MASK(name, load, reg, after)                                                               \
    {                                                                                              \
        u32 v;                                                                                     \
        __asm__ volatile(load " %[b], " reg "\n\t" name " " reg ", %k[v]" after                    \
                         : [v] "=r"(v) : [b] "m"(VEC(SOURCE)) : V_CLOBBERS);                       \
        REG64(cpu, i->src) = v;                                                                    \
        NEXT(cpu, i);                                                                              \
    }
#define SIGN_MASK(name)                                                                            \
    HANDLER(name##_l) MASK(#name, "movaps", "%%xmm0", "")                                          \
    HANDLER(name##_y) MASK("v" #name, "vmovaps", "%%ymm0", "\n\tvzeroupper")                       \
    const struct body b_##name = {{[K_RR] = {name##_l, name##_l, name##_y}}};
SIGN_MASK(movmskps) SIGN_MASK(movmskpd) SIGN_MASK(pmovmskb)

/* ---- elements by immediate ------------------------------------------------------------------- */

/* To a general register, zero-extended, or to memory */
#define EXTRACT(name, bits, n)                                                                     \
    static ALWAYS_INLINE u64 name##_get(struct cpu *cpu, const struct insn *i)                     \
    {                                                                                              \
        return ((const u##bits##_mem *)VREG(cpu, i->vb))[i->imm8 & (n - 1)];                       \
    }                                                                                              \
    HANDLER(name##_rr) { REG64(cpu, i->dst) = name##_get(cpu, i); NEXT(cpu, i); }                  \
    MEM_HANDLER(name##_mr, {                                                                       \
        if (unlikely(!store##bits(cpu, i, fast, name##_get(cpu, i))))                              \
            return miss(cpu, i);                                                                   \
        NEXT(cpu, i);                                                                              \
    })
EXTRACT(pextrb, 8, 16) EXTRACT(pextrw, 16, 8) EXTRACT(pextrl, 32, 4) EXTRACT(pextrq, 64, 2)
const struct body b_pextrb = {{[K_RR] = {pextrb_rr, pextrb_rr}, [K_MR] = {pextrb_mr, pextrb_mr}}};
const struct body b_pextrw = {{[K_RR] = {pextrw_rr, pextrw_rr}, [K_MR] = {pextrw_mr, pextrw_mr}}};
const struct body b_extractps = {{
    [K_RR] = {pextrl_rr, pextrl_rr}, [K_MR] = {pextrl_mr, pextrl_mr},
}};
HANDLER(pextrd_rr) { return i->opsize == 8 ? pextrq_rr(cpu, i) : pextrl_rr(cpu, i); }
HANDLER(pextrd_mr) { return i->opsize == 8 ? pextrq_mr(cpu, i) : pextrl_mr(cpu, i); }
const struct body b_pextrd = {{[K_RR] = {pextrd_rr, pextrd_rr}, [K_MR] = {pextrd_mr, pextrd_mr}}};

/* 0F C5: the general register is in reg */
HANDLER(pextrw_g)
{
    REG64(cpu, i->src) = ((const u16_mem *)SOURCE)[i->imm8 & 7];
    NEXT(cpu, i);
}
const struct body b_pextrw_g = {{[K_RR] = {pextrw_g, pextrw_g}}};

/* From a general register or memory, the other elements from a. The stubs take it in rax. */
#define INSERT_STUBS(name, n, gpr)                                                                 \
    DEFINE_STUBS(name##_l, n, #name " $.Limm, %" gpr ", %xmm0")                                    \
    DEFINE_STUBS(name##_v, n, "v" #name " $.Limm, %" gpr ", %xmm0, %xmm0")                         \
    static ALWAYS_INLINE void name##_set(struct cpu *cpu, const struct insn *i, u64 v, bool vex)   \
    {                                                                                              \
        unsigned k = i->imm8 & (n - 1);                                                            \
        if (vex)                                                                                   \
            V_ASM_STUB("vmovaps %[a], %%xmm0",                                                     \
                       [d] "m"(VEC(DEST)) COMMA [a] "m"(VEC(VREG(cpu, i->va))) COMMA "a"(v),       \
                       STUB(name##_v, k), "vmovaps %%ymm0, %[d]");                                 \
        else                                                                                       \
            V_ASM_STUB("movaps %[d], %%xmm0", [d] "m"(VEC(DEST)) COMMA "a"(v),                     \
                       STUB(name##_l, k), "movaps %%xmm0, %[d]");                                  \
    }
#define INSERT_HANDLERS(name, bits, enc, vex)                                                      \
    HANDLER(name##_##enc##_rr)                                                                     \
    {                                                                                              \
        name##_set(cpu, i, REG64(cpu, i->dst), vex);                                               \
        NEXT(cpu, i);                                                                              \
    }                                                                                              \
    MEM_HANDLER(name##_##enc##_rm, {                                                               \
        LOAD(bits, v)                                                                              \
        name##_set(cpu, i, v, vex);                                                                \
        NEXT(cpu, i);                                                                              \
    })
#define INSERT(name, n, gpr, bits)                                                                 \
    INSERT_STUBS(name, n, gpr)                                                                     \
    INSERT_HANDLERS(name, bits, l, false) INSERT_HANDLERS(name, bits, v, true)
INSERT(pinsrb, 16, "eax", 8) INSERT(pinsrw, 8, "eax", 16) INSERT(pinsrq, 2, "rax", 64)
V_128(pinsrb) V_128(pinsrw)
INSERT_STUBS(pinsrd, 4, "eax")
#define PINSRD_HANDLERS(enc, vex)                                                                  \
    HANDLER(pinsrd_##enc##_rr)                                                                     \
    {                                                                                              \
        if (i->opsize == 8)                                                                        \
            return pinsrq_##enc##_rr(cpu, i);                                                      \
        pinsrd_set(cpu, i, REG64(cpu, i->dst), vex);                                               \
        NEXT(cpu, i);                                                                              \
    }                                                                                              \
    MEM_HANDLER(pinsrd_##enc##_load, {                                                             \
        LOAD(32, v)                                                                                \
        pinsrd_set(cpu, i, v, vex);                                                                \
        NEXT(cpu, i);                                                                              \
    })                                                                                             \
    HANDLER(pinsrd_##enc##_rm)                                                                     \
    {                                                                                              \
        return i->opsize == 8 ? pinsrq_##enc##_rm(cpu, i) : pinsrd_##enc##_load(cpu, i);           \
    }
PINSRD_HANDLERS(l, false) PINSRD_HANDLERS(v, true)
V_128(pinsrd)

/* The memory form has one element: COUNT_S, bits 7:6, says nothing there. */
V_BINARY_IMM_STUBS(insertps)
HANDLER(insertps_l_rr)
{
    V_ASM_STUB("movaps %[b], %%xmm1\n\tmovaps %[d], %%xmm0", V_OPERANDS_DB(SOURCE),
               STUB(insertps_l, i->imm8), "movaps %%xmm0, %[d]");
    NEXT(cpu, i);
}
HANDLER(insertps_v_rr)
{
    V_ASM_STUB("vmovaps %[b], %%xmm1\n\tvmovaps %[a], %%xmm0", V_OPERANDS_DAB(SOURCE),
               STUB(insertps_v, i->imm8), "vmovaps %%ymm0, %[d]");
    NEXT(cpu, i);
}
LOAD_ONLY(insertps_l, 4, 1,
          V_ASM_STUB("movss %[b], %%xmm1\n\tmovaps %[d], %%xmm0", V_OPERANDS_DB(p),
                     STUB(insertps_l, i->imm8 & 0x3f), "movaps %%xmm0, %[d]"))
LOAD_ONLY(insertps_v, 4, 1,
          V_ASM_STUB("vmovss %[b], %%xmm1\n\tvmovaps %[a], %%xmm0", V_OPERANDS_DAB(p),
                     STUB(insertps_v, i->imm8 & 0x3f), "vmovaps %%ymm0, %[d]"))
V_128(insertps)

/* ---- masked stores --------------------------------------------------------------------------- */

/*
 * Bytes whose mask has the sign bit set go to DS:rDI.  The access is one of 16 bytes whatever the
 * mask (SDM vol. 2, MASKMOVDQU: with a mask of zero faults are implementation-specific), but only
 * those bytes are written: MMIO gets the runs of them.
 */
static bool store_run(struct cpu *cpu, const struct insn *i, unsigned from, unsigned to)
{
    struct insn run = *i;

    run.disp += from;
    return v_write(cpu, &run, (u8 *)VREG(cpu, i->vd) + from, to - from, 1);
}

static SLOW int maskmovdqu_slow(struct cpu *cpu, const struct insn *i, u32 mask)
{
    u64 la;

    if (!ea_linear(cpu, i, 16, ACC_WRITE, &la) || !mem_probe_write(cpu, la, 16, ea_access(i)))
        return stop(cpu, i);
    if (mask && !cpu->step) {
        cpu->stop = STOP_STEP; /* where nothing but the first run can fail */
        return stop(cpu, i);
    }
    for (unsigned from = 0, to = 0; mask >> to; from = to) {
        from = to + (unsigned)__builtin_ctz(mask >> to);
        to = from + (unsigned)__builtin_ctz(~(mask >> from));
        if (!store_run(cpu, i, from, to))
            return stop(cpu, i);
    }
    NEXT(cpu, i);
}

HANDLER(maskmovdqu)
{
    u32 mask;
    void *p;

    __asm__ volatile("movaps %[b], %%xmm0\n\tpmovmskb %%xmm0, %k[v]"
                     : [v] "=r"(mask) : [b] "m"(VEC(SOURCE)) : V_CLOBBERS);
    if (unlikely(!v_target(cpu, i, 16, 1, &p)))
        return maskmovdqu_slow(cpu, i, mask);
    const u8 *s = VREG(cpu, i->vd);
    for (; mask; mask &= mask - 1)
        ((volatile u8_mem *)p)[__builtin_ctz(mask)] = s[__builtin_ctz(mask)];
    NEXT(cpu, i);
}
const struct body b_maskmovdqu = {{[K_RR] = {maskmovdqu, maskmovdqu}}};

/* ---- MXCSR ----------------------------------------------------------------------------------- */

HANDLER(ldmxcsr)
{
    u32 v;

    if (!v_read(cpu, i, &v, 4, 1))
        return stop(cpu, i);
    if (v & ~MXCSR_MASK)
        return fault_gp(cpu, i, 0);
    GUEST(cpu).fpu.mxcsr = v;
    bool changed = mxcsr_load(cpu);
    set_rip(cpu, next_rip(cpu, i));
    return changed ? LOOKUP : LINK0;
}
HANDLER(stmxcsr)
{
    mxcsr_sync(cpu);
    if (!v_write(cpu, i, &GUEST(cpu).fpu.mxcsr, 4, 1))
        return stop(cpu, i);
    NEXT(cpu, i);
}
const struct body b_ldmxcsr = {{[K_M] = {ldmxcsr, ldmxcsr}}};
const struct body b_stmxcsr = {{[K_M] = {stmxcsr, stmxcsr}}};
