/* SPDX-License-Identifier: MIT */
/*
 * Vector instructions for cryptography: AES, PCLMULQDQ, GFNI, SHA.
 */
#include "vector.h"

/* clang-format off */

V_BINARY(aesenc) V_BINARY(aesenclast) V_BINARY(aesdec) V_BINARY(aesdeclast)
V_UNARY_128(aesimc)
V_UNARY_IMM_STUBS(aeskeygenassist)
V_LEGACY_UNARY_IMM(aeskeygenassist, "movups", 16, 16)
V_VEX128_UNARY_IMM(aeskeygenassist, "movups", 16)
V_128(aeskeygenassist)
V_BINARY_IMM(pclmulqdq)
V_BINARY(gf2p8mulb) V_BINARY_IMM(gf2p8affineqb) V_BINARY_IMM(gf2p8affineinvqb)

/*
 * The memory operand need not be aligned: Zen 5 does not ask for it either, though the SDM says
 * so (vol. 2 table 2-21).  So the host's instruction must not see it.
 */
#define SHA(name)                                                                                  \
    V_PAIR(name##_l, 16, 1,                                                                        \
           V_ASM_DB("movups %[b], %%xmm1\n\tmovaps %[d], %%xmm0\n\t"                              \
                    #name " %%xmm1, %%xmm0\n\tmovaps %%xmm0, %[d]", p))                            \
    V_LEGACY(name)
SHA(sha1nexte) SHA(sha1msg1) SHA(sha1msg2) SHA(sha256msg1) SHA(sha256msg2)

DEFINE_STUBS(sha1rnds4_l, 256, "sha1rnds4 $.Limm, %xmm1, %xmm0")
V_LEGACY_BINARY_IMM(sha1rnds4, "movups", 16, 1)
V_LEGACY(sha1rnds4)

/* The constants are in xmm0. */
V_PAIR(sha256rnds2_l, 16, 1,
       __asm__ volatile("movups %[b], %%xmm2\n\tmovaps %[k], %%xmm0\n\tmovaps %[d], %%xmm1\n\t"
                        "sha256rnds2 %%xmm2, %%xmm1\n\tmovaps %%xmm1, %[d]"
                        : : V_OPERANDS_DB(p), [k] "m"(VEC(VREG(cpu, 0))) : V_CLOBBERS))
V_LEGACY(sha256rnds2)
