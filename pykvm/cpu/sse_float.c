/* SPDX-License-Identifier: MIT */
/*
 * Vector instructions that compute with floating point.  Rounding, denormals, NaNs and exception
 * flags are the host's: its MXCSR is the guest's while the processor is in guest mode.
 */
#include "vector.h"

/* clang-format off */

/* ---- d = a op b ------------------------------------------------------------------------------ */

#define FOUR(op) V_BINARY(op##ps) V_BINARY(op##pd) V_SCALAR(op##ss, 4) V_SCALAR(op##sd, 8)
FOUR(add) FOUR(sub) FOUR(mul) FOUR(div) FOUR(min) FOUR(max)
V_BINARY(haddps) V_BINARY(haddpd) V_BINARY(hsubps) V_BINARY(hsubpd)
V_BINARY(addsubps) V_BINARY(addsubpd)

/* d = op b, elements above the first from a */
V_UNARY(sqrtps) V_UNARY(sqrtpd) V_SCALAR(sqrtss, 4) V_SCALAR(sqrtsd, 8)
V_UNARY(rcpps) V_SCALAR(rcpss, 4) V_UNARY(rsqrtps) V_SCALAR(rsqrtss, 4)

/* ---- with an immediate: the predicate, the rounding mode, the mask --------------------------- */

V_BINARY_IMM(cmpps) V_BINARY_IMM(cmppd)
V_SCALAR_IMM(cmpss, "movss", 4) V_SCALAR_IMM(cmpsd, "movsd", 8)
V_UNARY_IMM(roundps) V_UNARY_IMM(roundpd)
V_SCALAR_IMM(roundss, "movss", 4) V_SCALAR_IMM(roundsd, "movsd", 8)
V_BINARY_IMM(dpps) V_BINARY_IMM_128(dppd)

/* ---- comparison to flags --------------------------------------------------------------------- */

/* Unordered: ZF, PF and CF; OF, SF and AF are cleared. */
#define COMPARE(name, load, size)                                                                  \
    V_PAIR(name##_l, size, 1, {                                                                    \
        bool z, np, c;                                                                             \
        __asm__ volatile(load " %[d], %%xmm0\n\t" #name " %[b], %%xmm0"                            \
                         : "=@ccz"(z), "=@ccnp"(np), "=@ccc"(c)                                    \
                         : V_OPERANDS_DB(p)                                                        \
                         : V_CLOBBERS);                                                            \
        cpu->cc_res = (u64)!z << 8;                                                                \
        cpu->cc_aux = -(u64)c << 62 | (u64)np << 8;                                                \
    })                                                                                             \
    const struct body b_##name = V_ROWS(name##_l, name##_l, name##_l);
COMPARE(ucomiss, "movss", 4) COMPARE(ucomisd, "movsd", 8)
COMPARE(comiss, "movss", 4) COMPARE(comisd, "movsd", 8)

/* ---- conversions ----------------------------------------------------------------------------- */

V_SCALAR(cvtss2sd, 4) V_SCALAR(cvtsd2ss, 8)
V_UNARY(cvtdq2ps) V_UNARY(cvtps2dq) V_UNARY(cvttps2dq)

/* To wider elements */
#define WIDEN(name)                                                                                \
    V_LEGACY_UNARY(name, #name, 8, 1)                                                              \
    V_VEX128_UNARY(name, "v" #name, 8)                                                             \
    V_VEX256_UNARY(name, "v" #name, 16)                                                            \
    V_ALL(name)
WIDEN(cvtps2pd) WIDEN(cvtdq2pd)

/* To narrower ones: the result of 256 bits is one of 128 */
#define NARROW(name)                                                                               \
    V_LEGACY_UNARY(name, #name, 16, 16)                                                            \
    V_VEX128_UNARY(name, "v" #name "x", 16)                                                        \
    V_PAIR(name##_y, 32, 1,                                                                        \
           V_ASM_DB("v" #name "y %[b], %%xmm0\n\tvmovaps %%ymm0, %[d]\n\tvzeroupper", p))          \
    V_ALL(name)
NARROW(cvtpd2ps) NARROW(cvtpd2dq) NARROW(cvttpd2dq)

/* From general registers: the other elements come from a */
#define FROM_GPR(name)                                                                             \
    static ALWAYS_INLINE void name##_set(struct cpu *cpu, const struct insn *i, u64 v, bool vex)   \
    {                                                                                              \
        if (vex) {                                                                                 \
            if (i->opsize == 8)                                                                    \
                __asm__ volatile("vmovaps %[b], %%xmm0\n\tv" #name "q %[v], %%xmm0, %%xmm0\n\t"    \
                                 "vmovaps %%ymm0, %[d]"                                            \
                                 : : V_OPERANDS_DB(VREG(cpu, i->va)), [v] "r"(v) : V_CLOBBERS);    \
            else                                                                                   \
                __asm__ volatile("vmovaps %[b], %%xmm0\n\tv" #name "l %k[v], %%xmm0, %%xmm0\n\t"   \
                                 "vmovaps %%ymm0, %[d]"                                            \
                                 : : V_OPERANDS_DB(VREG(cpu, i->va)), [v] "r"(v) : V_CLOBBERS);    \
        } else if (i->opsize == 8) {                                                               \
            __asm__ volatile("movaps %[d], %%xmm0\n\t" #name "q %[v], %%xmm0\n\t"                  \
                             "movaps %%xmm0, %[d]"                                                 \
                             : : [d] "m"(VEC(VREG(cpu, i->vd))), [v] "r"(v) : V_CLOBBERS);         \
        } else {                                                                                   \
            __asm__ volatile("movaps %[d], %%xmm0\n\t" #name "l %k[v], %%xmm0\n\t"                 \
                             "movaps %%xmm0, %[d]"                                                 \
                             : : [d] "m"(VEC(VREG(cpu, i->vd))), [v] "r"(v) : V_CLOBBERS);         \
        }                                                                                          \
    }                                                                                              \
    FROM_GPR_HANDLERS(name, l, false) FROM_GPR_HANDLERS(name, v, true)                             \
    V_LIG(name)
#define FROM_GPR_HANDLERS(name, enc, vex)                                                          \
    static int name##_##enc##_rr(struct cpu *cpu, const struct insn *i)                            \
    {                                                                                              \
        name##_set(cpu, i, REG64(cpu, i->dst), vex);                                               \
        NEXT(cpu, i);                                                                              \
    }                                                                                              \
    MEM_HANDLER(name##_##enc##_rm, {                                                               \
        u64 v;                                                                                     \
        if (unlikely(!(i->opsize == 8 ? load64(cpu, i, fast, &v) : load32(cpu, i, fast, &v))))     \
            return miss(cpu, i);                                                                   \
        name##_set(cpu, i, v, vex);                                                                \
        NEXT(cpu, i);                                                                              \
    })
FROM_GPR(cvtsi2ss) FROM_GPR(cvtsi2sd)

/* To general registers */
#define TO_GPR(name, size)                                                                         \
    V_PAIR(name##_l, size, 1, {                                                                    \
        u64 v;                                                                                     \
        if (i->opsize == 8)                                                                        \
            __asm__ volatile(#name " %[b], %q[v]" : [v] "=r"(v) : [b] "m"(VEC(p)) : "memory");     \
        else                                                                                       \
            __asm__ volatile(#name " %[b], %k[v]" : [v] "=r"(v) : [b] "m"(VEC(p)) : "memory");     \
        REG64(cpu, i->src) = v; /* a 32-bit result has cleared the upper half */                   \
    })                                                                                             \
    const struct body b_##name = V_ROWS(name##_l, name##_l, name##_l);
TO_GPR(cvtss2si, 4) TO_GPR(cvtsd2si, 8) TO_GPR(cvttss2si, 4) TO_GPR(cvttsd2si, 8)

/* ---- half precision -------------------------------------------------------------------------- */

V_VEX128_UNARY(vcvtph2ps, "vcvtph2ps", 8)
V_VEX256_UNARY(vcvtph2ps, "vcvtph2ps", 16)
V_VEX(vcvtph2ps)

DEFINE_STUBS(vcvtps2ph_v, 256, "vcvtps2ph $.Limm, %xmm1, %xmm0")
DEFINE_STUBS(vcvtps2ph_y, 256, "vcvtps2ph $.Limm, %ymm1, %xmm0")

#define TO_HALF(name, size, reg, zeroupper)                                                        \
    static int name##_rr(struct cpu *cpu, const struct insn *i)                                    \
    {                                                                                              \
        V_ASM_STUB("vmovaps %[b], " reg, V_OPERANDS_DB(VREG(cpu, i->vb)), STUB(name, i->imm8),     \
                   "vmovaps %%ymm0, %[d]" zeroupper);                                              \
        NEXT(cpu, i);                                                                              \
    }                                                                                              \
    static SLOW int name##_mr_slow(struct cpu *cpu, const struct insn *i)                          \
    {                                                                                              \
        u32 before = __builtin_ia32_stmxcsr();                                                     \
        V_ASM_STUB("vmovaps %[b], " reg,                                                           \
                   [d] "m"(VEC(cpu->vscratch)) COMMA [b] "m"(VEC(VREG(cpu, i->vb))),               \
                   STUB(name, i->imm8), "vmovaps %%ymm0, %[d]" zeroupper);                         \
        if (!v_write(cpu, i, cpu->vscratch, size, 1)) {                                            \
            __builtin_ia32_ldmxcsr(before);                                                        \
            return stop(cpu, i);                                                                   \
        }                                                                                          \
        NEXT(cpu, i);                                                                              \
    }                                                                                              \
    static int name##_mr(struct cpu *cpu, const struct insn *i)                                    \
    {                                                                                              \
        void *p;                                                                                   \
        if (unlikely(!v_target(cpu, i, size, 1, &p)))                                              \
            return name##_mr_slow(cpu, i);                                                         \
        V_ASM_STUB("vmovaps %[b], " reg,                                                           \
                   [d] "m"(VEC(p)) COMMA [b] "m"(VEC(VREG(cpu, i->vb))), STUB(name, i->imm8),      \
                   STORE_##size zeroupper);                                                        \
        NEXT(cpu, i);                                                                              \
    }
#define STORE_8 "vmovq %%xmm0, %[d]"
#define STORE_16 "vmovups %%xmm0, %[d]"
TO_HALF(vcvtps2ph_v, 8, "%%xmm1", "")
TO_HALF(vcvtps2ph_y, 16, "%%ymm1", "\n\tvzeroupper")
const struct body b_vcvtps2ph = {{
    [K_RR] = {NULL, vcvtps2ph_v_rr, vcvtps2ph_y_rr},
    [K_MR] = {NULL, vcvtps2ph_v_mr, vcvtps2ph_y_mr},
}};

/* ---- fused multiply-add: the destination is an operand too ----------------------------------- */

#define FMA_128(name, size)                                                                        \
    V_PAIR(name##_v, size, 1,                                                                      \
           V_ASM_DAB("vmovaps %[d], %%xmm0\n\tvmovaps %[a], %%xmm1\n\t"                            \
                     #name " %[b], %%xmm1, %%xmm0\n\tvmovaps %%ymm0, %[d]", p))
#define FMA_PACKED(name)                                                                           \
    FMA_128(name, 16)                                                                              \
    V_PAIR(name##_y, 32, 1,                                                                        \
           V_ASM_DAB("vmovaps %[d], %%ymm0\n\tvmovaps %[a], %%ymm1\n\t"                            \
                     #name " %[b], %%ymm1, %%ymm0\n\tvmovaps %%ymm0, %[d]\n\tvzeroupper", p))      \
    V_VEX(name)
#define FMA_SCALAR(name, size) FMA_128(name, size) V_VEX_LIG(name)
#define FMA_ORDERS(X, op, ...)                                                                     \
    X(op##132, __VA_ARGS__) X(op##213, __VA_ARGS__) X(op##231, __VA_ARGS__)
#define FMA_BOTH(op, dummy) FMA_PACKED(op##ps) FMA_PACKED(op##pd)
#define FMA_FOUR(op, dummy) FMA_BOTH(op, ) FMA_SCALAR(op##ss, 4) FMA_SCALAR(op##sd, 8)
FMA_ORDERS(FMA_FOUR, vfmadd, ) FMA_ORDERS(FMA_FOUR, vfmsub, )
FMA_ORDERS(FMA_FOUR, vfnmadd, ) FMA_ORDERS(FMA_FOUR, vfnmsub, )
FMA_ORDERS(FMA_BOTH, vfmaddsub, ) FMA_ORDERS(FMA_BOTH, vfmsubadd, )
