/* SPDX-License-Identifier: MIT */
/* Sub-tables of opfpu.c, for the rows of the opcode maps that lead to them. */
#ifndef PYKVM_OPFPU_H
#define PYKVM_OPFPU_H

#include "insns.h"

/* clang-format off */
/* D8 to DF, each by O_MOD3. */
extern const struct op x87_map[8][2];
#define X87_ROW(n) { NULL, NULL, NULL, x87_map[n], O_MOD3, F_NONE, 0 }

/* MMX: MMX(id) is the row of an opcode without the prefixes of its XMM forms. */
#define MMX_BINARY_ROWS(X) /* mm = mm op mm/m64 */                                                 \
    X(packsswb) X(packssdw) X(packuswb)                                                            \
    X(punpckhbw) X(punpckhwd) X(punpckhdq)                                                         \
    X(pcmpgtb) X(pcmpgtw) X(pcmpgtd) X(pcmpeqb) X(pcmpeqw) X(pcmpeqd)                              \
    X(psrlw) X(psrld) X(psrlq) X(psraw) X(psrad) X(psllw) X(pslld) X(psllq)                        \
    X(pmullw) X(pmulhw) X(pmaddwd) X(pand) X(pandn) X(por) X(pxor)                                 \
    X(psubusb) X(psubusw) X(paddusb) X(paddusw) X(psubsb) X(psubsw) X(paddsb) X(paddsw)            \
    X(psubb) X(psubw) X(psubd) X(paddb) X(paddw) X(paddd)
#define MMX_LOW_ROWS(X) /* mm = mm op mm/m32 */                                                    \
    X(punpcklbw) X(punpcklwd) X(punpckldq)
#define MMX_SSE_ROWS(X) /* the same, as new as SSE */                                              \
    X(pminub) X(pmaxub) X(pminsw) X(pmaxsw) X(pavgb) X(pavgw) X(pmulhuw) X(psadbw)
#define MMX_SSE2_ROWS(X) X(paddq) X(psubq) X(pmuludq)
#define MMX_SSSE3_ROWS(X)                                                                          \
    X(pshufb) X(phaddw) X(phaddd) X(phaddsw) X(pmaddubsw) X(phsubw) X(phsubd) X(phsubsw)           \
    X(psignb) X(psignw) X(psignd) X(pmulhrsw) X(pabsb) X(pabsw) X(pabsd)
#define MMX_IMM_ROWS(X) /* shifts */                                                               \
    X(psrlw_imm) X(psrld_imm) X(psrlq_imm) X(psraw_imm) X(psrad_imm) X(psllw_imm) X(pslld_imm)     \
    X(psllq_imm)
#define MMX_OTHER_ROWS(X)                                                                          \
    X(movd) X(movd_e) X(movq) X(movq_e) X(emms)                                                    \
    X(pshufw) X(pinsrw) X(pextrw) X(pmovmskb) X(maskmovq) X(movntq) X(palignr)                     \
    X(movq2dq) X(movdq2q)                                                                          \
    X(cvtpi2ps) X(cvtpi2pd) X(cvtps2pi) X(cvttps2pi) X(cvtpd2pi) X(cvttpd2pi)
#define MMX_ROWS(X)                                                                                \
    MMX_BINARY_ROWS(X) MMX_LOW_ROWS(X) MMX_SSE_ROWS(X) MMX_SSE2_ROWS(X) MMX_SSSE3_ROWS(X)          \
    MMX_IMM_ROWS(X) MMX_OTHER_ROWS(X)

#define MMX_DECLARE(id) int x_mmx_##id(struct cpu *cpu, const struct insn *i);
MMX_ROWS(MMX_DECLARE)
#define MMX_ENUM(id) MMX_##id,
enum { MMX_ROWS(MMX_ENUM) NR_MMX };
extern const struct op mmx_rows[NR_MMX][2]; /* by O_ENC: there is no VEX encoding */
#define MMX(id) { NULL, NULL, NULL, mmx_rows[MMX_##id], O_ENC, F_NONE, 0 }
/* clang-format on */

#endif
