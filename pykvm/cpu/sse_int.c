/* SPDX-License-Identifier: MIT */
/*
 * Vector instructions on integers: arithmetic, comparison, shifts, packing, shuffling, blending;
 * also bitwise logic and shuffles of floating-point vectors, which do not look at their contents.
 */
#include "vector.h"

/* clang-format off */

/* ---- d = a op b ------------------------------------------------------------------------------ */

V_BINARY(paddb) V_BINARY(paddw) V_BINARY(paddd) V_BINARY(paddq)
V_BINARY(psubb) V_BINARY(psubw) V_BINARY(psubd) V_BINARY(psubq)
V_BINARY(paddsb) V_BINARY(paddsw) V_BINARY(paddusb) V_BINARY(paddusw)
V_BINARY(psubsb) V_BINARY(psubsw) V_BINARY(psubusb) V_BINARY(psubusw)
V_BINARY(pavgb) V_BINARY(pavgw)
V_BINARY(pmullw) V_BINARY(pmulhw) V_BINARY(pmulhuw) V_BINARY(pmuludq) V_BINARY(pmaddwd)
V_BINARY(psadbw)
V_BINARY(pminub) V_BINARY(pmaxub) V_BINARY(pminsw) V_BINARY(pmaxsw)
V_BINARY(pcmpeqb) V_BINARY(pcmpeqw) V_BINARY(pcmpeqd)
V_BINARY(pcmpgtb) V_BINARY(pcmpgtw) V_BINARY(pcmpgtd)
V_BINARY(pand) V_BINARY(pandn) V_BINARY(por) V_BINARY(pxor)
V_BINARY(packsswb) V_BINARY(packssdw) V_BINARY(packuswb)
V_BINARY(punpcklbw) V_BINARY(punpcklwd) V_BINARY(punpckldq) V_BINARY(punpcklqdq)
V_BINARY(punpckhbw) V_BINARY(punpckhwd) V_BINARY(punpckhdq) V_BINARY(punpckhqdq)

V_BINARY(andps) V_BINARY(andnps) V_BINARY(orps) V_BINARY(xorps)
V_BINARY(andpd) V_BINARY(andnpd) V_BINARY(orpd) V_BINARY(xorpd)
V_BINARY(unpcklps) V_BINARY(unpckhps) V_BINARY(unpcklpd) V_BINARY(unpckhpd)

/* SSSE3 */
V_BINARY(pshufb) V_BINARY(phaddw) V_BINARY(phaddd) V_BINARY(phaddsw)
V_BINARY(phsubw) V_BINARY(phsubd) V_BINARY(phsubsw) V_BINARY(pmaddubsw) V_BINARY(pmulhrsw)
V_BINARY(psignb) V_BINARY(psignw) V_BINARY(psignd)
V_UNARY(pabsb) V_UNARY(pabsw) V_UNARY(pabsd)

/* SSE4.1, SSE4.2 */
V_BINARY(pmuldq) V_BINARY(pmulld) V_BINARY(pcmpeqq) V_BINARY(pcmpgtq) V_BINARY(packusdw)
V_BINARY(pminsb) V_BINARY(pminsd) V_BINARY(pminuw) V_BINARY(pminud)
V_BINARY(pmaxsb) V_BINARY(pmaxsd) V_BINARY(pmaxuw) V_BINARY(pmaxud)
V_UNARY_128(phminposuw)

/* ---- widening: the source is a half, a quarter or an eighth of the destination --------------- */

#define WIDEN(name, size)                                                                          \
    V_LEGACY_UNARY(name, #name, size, 1)                                                           \
    V_VEX128_UNARY(name, "v" #name, size)                                                          \
    V_VEX256_UNARY(name, "v" #name, 2 * size)                                                      \
    V_ALL(name)
WIDEN(pmovsxbw, 8) WIDEN(pmovsxbd, 4) WIDEN(pmovsxbq, 2)
WIDEN(pmovsxwd, 8) WIDEN(pmovsxwq, 4) WIDEN(pmovsxdq, 8)
WIDEN(pmovzxbw, 8) WIDEN(pmovzxbd, 4) WIDEN(pmovzxbq, 2)
WIDEN(pmovzxwd, 8) WIDEN(pmovzxwq, 4) WIDEN(pmovzxdq, 8)

/* ---- shifts -------------------------------------------------------------------------------------
 *
 * The count is the low quadword of an XMM register, of 128 bits of memory, or an immediate: that
 * is shifted by a register too.
 */
#define SHIFT(name)                                                                                \
    V_LEGACY_BINARY(name, #name, 16, 16)                                                           \
    V_VEX128_BINARY(name, "v" #name, 16)                                                           \
    V_VEX256_BINARY(name, "v" #name, 16)                                                           \
    V_ALL(name)                                                                                    \
    static int name##_imm_l(struct cpu *cpu, const struct insn *i)                                 \
    {                                                                                              \
        __asm__ volatile("movd %[n], %%xmm1\n\tmovaps %[d], %%xmm0\n\t"                            \
                         #name " %%xmm1, %%xmm0\n\tmovaps %%xmm0, %[d]"                            \
                         :                                                                         \
                         : [d] "m"(VEC(VREG(cpu, i->vd))), [n] "r"((u32)i->imm8)                   \
                         : V_CLOBBERS);                                                            \
        NEXT(cpu, i);                                                                              \
    }                                                                                              \
    static int name##_imm_v(struct cpu *cpu, const struct insn *i)                                 \
    {                                                                                              \
        __asm__ volatile("vmovd %[n], %%xmm1\n\tvmovaps %[b], %%xmm0\n\t"                          \
                         "v" #name " %%xmm1, %%xmm0, %%xmm0\n\tvmovaps %%ymm0, %[d]"               \
                         :                                                                         \
                         : V_OPERANDS_DB(VREG(cpu, i->vb)), [n] "r"((u32)i->imm8)                  \
                         : V_CLOBBERS);                                                            \
        NEXT(cpu, i);                                                                              \
    }                                                                                              \
    static int name##_imm_y(struct cpu *cpu, const struct insn *i)                                 \
    {                                                                                              \
        __asm__ volatile("vmovd %[n], %%xmm1\n\tvmovaps %[b], %%ymm0\n\t"                          \
                         "v" #name " %%xmm1, %%ymm0, %%ymm0\n\tvmovaps %%ymm0, %[d]\n\tvzeroupper" \
                         :                                                                         \
                         : V_OPERANDS_DB(VREG(cpu, i->vb)), [n] "r"((u32)i->imm8)                  \
                         : V_CLOBBERS);                                                            \
        NEXT(cpu, i);                                                                              \
    }                                                                                              \
    const struct body b_##name##_imm = {{[K_RR] = {name##_imm_l, name##_imm_v, name##_imm_y}}};
SHIFT(psllw) SHIFT(pslld) SHIFT(psllq)
SHIFT(psrlw) SHIFT(psrld) SHIFT(psrlq)
SHIFT(psraw) SHIFT(psrad)

/* By bytes: dst = register, imm */
#define SHIFT_BYTES(name)                                                                          \
    V_UNARY_SHIFT_STUBS(name)                                                                      \
    static int name##_imm_l(struct cpu *cpu, const struct insn *i)                                 \
    {                                                                                              \
        V_ASM_STUB("movaps %[b], %%xmm0", V_OPERANDS_DB(VREG(cpu, i->vb)),                         \
                   STUB(name##_l, i->imm8), "movaps %%xmm0, %[d]");                                \
        NEXT(cpu, i);                                                                              \
    }                                                                                              \
    static int name##_imm_v(struct cpu *cpu, const struct insn *i)                                 \
    {                                                                                              \
        V_ASM_STUB("vmovaps %[b], %%xmm0", V_OPERANDS_DB(VREG(cpu, i->vb)),                        \
                   STUB(name##_v, i->imm8), "vmovaps %%ymm0, %[d]");                               \
        NEXT(cpu, i);                                                                              \
    }                                                                                              \
    static int name##_imm_y(struct cpu *cpu, const struct insn *i)                                 \
    {                                                                                              \
        V_ASM_STUB("vmovaps %[b], %%ymm0", V_OPERANDS_DB(VREG(cpu, i->vb)),                        \
                   STUB(name##_y, i->imm8), "vmovaps %%ymm0, %[d]\n\tvzeroupper");                 \
        NEXT(cpu, i);                                                                              \
    }                                                                                              \
    const struct body b_##name##_imm = {{[K_RR] = {name##_imm_l, name##_imm_v, name##_imm_y}}};
#define V_UNARY_SHIFT_STUBS(name)                                                                  \
    DEFINE_STUBS(name##_l, 256, #name " $.Limm, %xmm0")                                            \
    DEFINE_STUBS(name##_v, 256, "v" #name " $.Limm, %xmm0, %xmm0")                                 \
    DEFINE_STUBS(name##_y, 256, "v" #name " $.Limm, %ymm0, %ymm0")
SHIFT_BYTES(pslldq) SHIFT_BYTES(psrldq)

/* ---- with an immediate ----------------------------------------------------------------------- */

V_UNARY_IMM(pshufd) V_UNARY_IMM(pshufhw) V_UNARY_IMM(pshuflw)
V_BINARY_IMM(shufps) V_BINARY_IMM(shufpd)
V_BINARY_IMM(palignr) V_BINARY_IMM(pblendw) V_BINARY_IMM(blendps) V_BINARY_IMM(blendpd)
V_BINARY_IMM(mpsadbw)

/* ---- blending by the signs of xmm0; VEX: of a fourth register -------------------------------- */

static u16 register_in_imm(const struct insn *i)
{
    return (u16)((i->imm8 >> 4 & (i->flags & I_CODE64 ? 15 : 7)) * VREG_SIZE);
}

#define BLEND(name)                                                                                \
    V_PAIR(name##_l, 16, 16,                                                                       \
           __asm__ volatile("movaps %[mask], %%xmm0\n\tmovaps %[d], %%xmm1\n\t"                    \
                            #name " %%xmm0, %[b], %%xmm1\n\tmovaps %%xmm1, %[d]"                   \
                            :                                                                      \
                            : V_OPERANDS_DB(p), [mask] "m"(VEC(VREG(cpu, 0)))                      \
                            : V_CLOBBERS))                                                         \
    V_PAIR(name##_v, 16, 1,                                                                        \
           __asm__ volatile("vmovaps %[mask], %%xmm0\n\tvmovaps %[a], %%xmm1\n\t"                  \
                            "v" #name " %%xmm0, %[b], %%xmm1, %%xmm1\n\tvmovaps %%ymm1, %[d]"      \
                            :                                                                      \
                            : V_OPERANDS_DAB(p), [mask] "m"(VEC(VREG(cpu, register_in_imm(i))))    \
                            : V_CLOBBERS))                                                         \
    V_PAIR(name##_y, 32, 1,                                                                        \
           __asm__ volatile("vmovaps %[mask], %%ymm0\n\tvmovaps %[a], %%ymm1\n\t"                  \
                            "v" #name " %%ymm0, %[b], %%ymm1, %%ymm1\n\tvmovaps %%ymm1, %[d]\n\t"  \
                            "vzeroupper"                                                           \
                            :                                                                      \
                            : V_OPERANDS_DAB(p), [mask] "m"(VEC(VREG(cpu, register_in_imm(i))))    \
                            : V_CLOBBERS))                                                         \
    const struct body b_##name = V_ROWS(name##_l, none, none);                                     \
    const struct body b_v##name = V_ROWS(none, name##_v, name##_y);
BLEND(pblendvb) BLEND(blendvps) BLEND(blendvpd)

/* ---- flags ----------------------------------------------------------------------------------- */

/* ZF and CF as the host has them, the others clear. */
#define SET_ZF_CF(cpu, z, c)                                                                       \
    do {                                                                                           \
        (cpu)->cc_res = (z) ? 0 : 0x100;                                                           \
        (cpu)->cc_aux = -(u64)(c) << 62 | 0x100;                                                   \
    } while (0)
#define TEST(name, text, size, align, load, reg)                                                   \
    V_PAIR(name, size, align, {                                                                    \
        bool z, c;                                                                                 \
        __asm__ volatile(load " %[d], " reg "\n\t" text " %[b], " reg                              \
                         : "=@ccz"(z), "=@ccc"(c)                                                  \
                         : V_OPERANDS_DB(p)                                                        \
                         : V_CLOBBERS);                                                            \
        SET_ZF_CF(cpu, z, c);                                                                      \
    })
#define TEST_256(name, text)                                                                       \
    V_PAIR(name, 32, 1, {                                                                          \
        bool z, c;                                                                                 \
        __asm__ volatile("vmovaps %[d], %%ymm0\n\t" text " %[b], %%ymm0\n\tvzeroupper"             \
                         : "=@ccz"(z), "=@ccc"(c)                                                  \
                         : V_OPERANDS_DB(p)                                                        \
                         : V_CLOBBERS);                                                            \
        SET_ZF_CF(cpu, z, c);                                                                      \
    })
TEST(ptest_l, "ptest", 16, 16, "movaps", "%%xmm0")
TEST(ptest_v, "vptest", 16, 1, "vmovaps", "%%xmm0") TEST_256(ptest_y, "vptest")
V_ALL(ptest)
TEST(vtestps_v, "vtestps", 16, 1, "vmovaps", "%%xmm0") TEST_256(vtestps_y, "vtestps")
V_VEX(vtestps)
TEST(vtestpd_v, "vtestpd", 16, 1, "vmovaps", "%%xmm0") TEST_256(vtestpd_y, "vtestpd")
V_VEX(vtestpd)
