/* SPDX-License-Identifier: MIT */
/*
 * The vector rows of the instruction table; included by optable.c inside its maps, with
 * OPVEC_MAP saying which.  The columns of P4() are the mandatory prefixes: none, 66, F3, F2.
 *
 * Encodings (legacy, VEX.128, VEX.256) are those the handlers exist for.  The feature is that of
 * the legacy encoding; VEX also needs AVX, and AVX2 for 256 bits of integers (I rows), or what
 * vector_handler() says.  Names are those of the legacy encoding, VEX ones have a v before them.
 */
/* clang-format off */
#ifndef OPVEC_MAP

#include "opfpu.h"

#define VFLAGS (O_SSE | O_S32 | O_L256)
#define VROW(text, id, f, feat, ...) { text, &b_##id, NULL, NULL, VFLAGS FLAGS_PLUS(__VA_ARGS__), F_##f, feat }
#define V(id, f, feat, ...) VROW(#id, id, f, feat, ##__VA_ARGS__)
#define FP(id, f, feat) VROW(#id, id, f, feat, O_FLOAT)
#define I(id, f, feat) VROW(#id, id, f, feat, O_AVX2)
#define P4(...) BY(O_PREFIX, ROWS(__VA_ARGS__))
#define P66(row) BY(O_PREFIX, ROWS(UD, row, UD, UD))
#define MEM_REG(mem, reg) BY(O_MOD3, ROWS(mem, reg))
#define W01(w0, w1) BY(O_REXW, ROWS(w0, w1))

#define SSE F1D(SSE)
#define SSE2 F1D(SSE2)
#define SSE3 F1C(SSE3)
#define SSSE3 F1C(SSSE3)
#define SSE41 F1C(SSE4_1)
#define SSE42 F1C(SSE4_2)
#define AES F1C(AES)
#define PCLMULQDQ F1C(PCLMULQDQ)
#define SHA F7B(SHA_NI)
#define AVX F1C(AVX)
#define AVX2 F7B(AVX2)
#define FMA F1C(FMA)
#define F16C F1C(F16C)
#define GFNI F7C(GFNI)

/* packed single, packed double, scalar single, scalar double */
#define FLOAT4(op, f)                                                                              \
    P4(FP(op##ps, f, SSE), FP(op##pd, V_H_W, SSE2), FP(op##ss, V_H_W, SSE), FP(op##sd, V_H_W, SSE2))
/* an MMX row and its XMM one */
#define INT(id) P4(MMX(id), I(id, V_H_W, SSE2), UD, UD)
#define INT_SSSE3(id) P4(MMX(id), I(id, V_H_W, SSSE3), UD, UD)

static const struct op group12[8] = {
    UD, UD, P4(MMX(psrlw_imm), VROW("psrlw", psrlw_imm, H_W_I8, SSE2, O_AVX2), UD, UD),
    UD, P4(MMX(psraw_imm), VROW("psraw", psraw_imm, H_W_I8, SSE2, O_AVX2), UD, UD),
    UD, P4(MMX(psllw_imm), VROW("psllw", psllw_imm, H_W_I8, SSE2, O_AVX2), UD, UD), UD,
};
static const struct op group13[8] = {
    UD, UD, P4(MMX(psrld_imm), VROW("psrld", psrld_imm, H_W_I8, SSE2, O_AVX2), UD, UD),
    UD, P4(MMX(psrad_imm), VROW("psrad", psrad_imm, H_W_I8, SSE2, O_AVX2), UD, UD),
    UD, P4(MMX(pslld_imm), VROW("pslld", pslld_imm, H_W_I8, SSE2, O_AVX2), UD, UD), UD,
};
static const struct op group14[8] = {
    UD, UD, P4(MMX(psrlq_imm), VROW("psrlq", psrlq_imm, H_W_I8, SSE2, O_AVX2), UD, UD),
    P66(VROW("psrldq", psrldq_imm, H_W_I8, SSE2, O_AVX2)), UD,
    UD, P4(MMX(psllq_imm), VROW("psllq", psllq_imm, H_W_I8, SSE2, O_AVX2), UD, UD),
    P66(VROW("pslldq", pslldq_imm, H_W_I8, SSE2, O_AVX2)),
};

#elif OPVEC_MAP == 0x0f

    [0x10] = P4(V(movups, V_W, SSE), VROW("movupd", movups, V_W, SSE2),
                MEM_REG(V(movss, V_W, SSE), V(movss, V_H_W, SSE)),
                MEM_REG(V(movsd, V_W, SSE2), V(movsd, V_H_W, SSE2))),
    [0x11] = P4(V(movups, W_V, SSE), VROW("movupd", movups, W_V, SSE2),
                MEM_REG(V(movss, W_V, SSE), V(movss, W_H_V, SSE)),
                MEM_REG(V(movsd, W_V, SSE2), V(movsd, W_H_V, SSE2))),
    [0x12] = P4(MEM_REG(V(movlps, V_H_W, SSE), V(movhlps, V_H_W, SSE)),
                VROW("movlpd", movlps, V_H_W, SSE2), V(movsldup, V_W, SSE3), V(movddup, V_W, SSE3)),
    [0x13] = P4(V(movlps, W_V, SSE), VROW("movlpd", movlps, W_V, SSE2), UD, UD),
    [0x14] = P4(V(unpcklps, V_H_W, SSE), V(unpcklpd, V_H_W, SSE2), UD, UD),
    [0x15] = P4(V(unpckhps, V_H_W, SSE), V(unpckhpd, V_H_W, SSE2), UD, UD),
    [0x16] = P4(MEM_REG(V(movhps, V_H_W, SSE), V(movlhps, V_H_W, SSE)),
                VROW("movhpd", movhps, V_H_W, SSE2), V(movshdup, V_W, SSE3), UD),
    [0x17] = P4(V(movhps, W_V, SSE), VROW("movhpd", movhps, W_V, SSE2), UD, UD),
    [0x28] = P4(V(movaps, V_W, SSE), VROW("movapd", movaps, V_W, SSE2), UD, UD),
    [0x29] = P4(V(movaps, W_V, SSE), VROW("movapd", movaps, W_V, SSE2), UD, UD),
    [0x2a] = P4(MMX(cvtpi2ps), MMX(cvtpi2pd), FP(cvtsi2ss, V_H_X, SSE), FP(cvtsi2sd, V_H_X, SSE2)),
    [0x2b] = P4(V(movntps, W_V, SSE), VROW("movntpd", movntps, W_V, SSE2), UD, UD),
    [0x2c] = P4(MMX(cvttps2pi), MMX(cvttpd2pi), FP(cvttss2si, G_W, SSE), FP(cvttsd2si, G_W, SSE2)),
    [0x2d] = P4(MMX(cvtps2pi), MMX(cvtpd2pi), FP(cvtss2si, G_W, SSE), FP(cvtsd2si, G_W, SSE2)),
    [0x2e] = P4(FP(ucomiss, V_W, SSE), FP(ucomisd, V_W, SSE2), UD, UD),
    [0x2f] = P4(FP(comiss, V_W, SSE), FP(comisd, V_W, SSE2), UD, UD),

    [0x50] = P4(V(movmskps, G_W, SSE), V(movmskpd, G_W, SSE2), UD, UD),
    [0x51] = P4(FP(sqrtps, V_W, SSE), FP(sqrtpd, V_W, SSE2), FP(sqrtss, V_H_W, SSE), FP(sqrtsd, V_H_W, SSE2)),
    [0x52] = P4(V(rsqrtps, V_W, SSE), UD, V(rsqrtss, V_H_W, SSE), UD),
    [0x53] = P4(V(rcpps, V_W, SSE), UD, V(rcpss, V_H_W, SSE), UD),
    [0x54] = P4(V(andps, V_H_W, SSE), V(andpd, V_H_W, SSE2), UD, UD),
    [0x55] = P4(V(andnps, V_H_W, SSE), V(andnpd, V_H_W, SSE2), UD, UD),
    [0x56] = P4(V(orps, V_H_W, SSE), V(orpd, V_H_W, SSE2), UD, UD),
    [0x57] = P4(V(xorps, V_H_W, SSE), V(xorpd, V_H_W, SSE2), UD, UD),
    [0x58] = FLOAT4(add, V_H_W),
    [0x59] = FLOAT4(mul, V_H_W),
    [0x5a] = P4(FP(cvtps2pd, V_W, SSE2), FP(cvtpd2ps, V_W, SSE2), FP(cvtss2sd, V_H_W, SSE2), FP(cvtsd2ss, V_H_W, SSE2)),
    [0x5b] = P4(FP(cvtdq2ps, V_W, SSE2), FP(cvtps2dq, V_W, SSE2), FP(cvttps2dq, V_W, SSE2), UD),
    [0x5c] = FLOAT4(sub, V_H_W),
    [0x5d] = FLOAT4(min, V_H_W),
    [0x5e] = FLOAT4(div, V_H_W),
    [0x5f] = FLOAT4(max, V_H_W),

    [0x60] = INT(punpcklbw), [0x61] = INT(punpcklwd), [0x62] = INT(punpckldq), [0x63] = INT(packsswb),
    [0x64] = INT(pcmpgtb), [0x65] = INT(pcmpgtw), [0x66] = INT(pcmpgtd), [0x67] = INT(packuswb),
    [0x68] = INT(punpckhbw), [0x69] = INT(punpckhwd), [0x6a] = INT(punpckhdq), [0x6b] = INT(packssdw),
    [0x6c] = P66(I(punpcklqdq, V_H_W, SSE2)), [0x6d] = P66(I(punpckhqdq, V_H_W, SSE2)),
    [0x6e] = P4(MMX(movd), V(movd, V_X, SSE2), UD, UD),
    [0x6f] = P4(MMX(movq), VROW("movdqa", movaps, V_W, SSE2), VROW("movdqu", movups, V_W, SSE2), UD),
    [0x70] = P4(MMX(pshufw), I(pshufd, V_W_I8, SSE2), I(pshufhw, V_W_I8, SSE2), I(pshuflw, V_W_I8, SSE2)),
    [0x71] = BY(O_GROUP, group12), [0x72] = BY(O_GROUP, group13), [0x73] = BY(O_GROUP, group14),
    [0x74] = INT(pcmpeqb), [0x75] = INT(pcmpeqw), [0x76] = INT(pcmpeqd),
    [0x77] = P4(BY(O_ENC, ROWS(MMX(emms), V(vzeroupper, NONE, AVX))),
                UD, UD, UD),
    [0x7c] = P4(UD, FP(haddpd, V_H_W, SSE3), UD, FP(haddps, V_H_W, SSE3)),
    [0x7d] = P4(UD, FP(hsubpd, V_H_W, SSE3), UD, FP(hsubps, V_H_W, SSE3)),
    [0x7e] = P4(MMX(movd_e), VROW("movd", movd_e, X_V, SSE2), V(movq, V_W, SSE2), UD),
    [0x7f] = P4(MMX(movq_e), VROW("movdqa", movaps, W_V, SSE2), VROW("movdqu", movups, W_V, SSE2), UD),

    [0xc2] = P4(FP(cmpps, V_H_W_I8, SSE), FP(cmppd, V_H_W_I8, SSE2), FP(cmpss, V_H_W_I8, SSE), FP(cmpsd, V_H_W_I8, SSE2)),
    [0xc4] = P4(MMX(pinsrw), V(pinsrw, V_H_X_I8, SSE2), UD, UD),
    [0xc5] = P4(MMX(pextrw), VROW("pextrw", pextrw_g, G_W_I8, SSE2), UD, UD),
    [0xc6] = P4(V(shufps, V_H_W_I8, SSE), V(shufpd, V_H_W_I8, SSE2), UD, UD),

    [0xd0] = P4(UD, FP(addsubpd, V_H_W, SSE3), UD, FP(addsubps, V_H_W, SSE3)),
    [0xd1] = INT(psrlw), [0xd2] = INT(psrld), [0xd3] = INT(psrlq), [0xd4] = INT(paddq), [0xd5] = INT(pmullw),
    [0xd6] = P4(UD, V(movq, W_V, SSE2), MMX(movq2dq), MMX(movdq2q)),
    [0xd7] = P4(MMX(pmovmskb), I(pmovmskb, G_W, SSE2), UD, UD),
    [0xd8] = INT(psubusb), [0xd9] = INT(psubusw), [0xda] = INT(pminub), [0xdb] = INT(pand),
    [0xdc] = INT(paddusb), [0xdd] = INT(paddusw), [0xde] = INT(pmaxub), [0xdf] = INT(pandn),
    [0xe0] = INT(pavgb), [0xe1] = INT(psraw), [0xe2] = INT(psrad), [0xe3] = INT(pavgw),
    [0xe4] = INT(pmulhuw), [0xe5] = INT(pmulhw),
    [0xe6] = P4(UD, FP(cvttpd2dq, V_W, SSE2), FP(cvtdq2pd, V_W, SSE2), FP(cvtpd2dq, V_W, SSE2)),
    [0xe7] = P4(MMX(movntq), VROW("movntdq", movntps, W_V, SSE2), UD, UD),
    [0xe8] = INT(psubsb), [0xe9] = INT(psubsw), [0xea] = INT(pminsw), [0xeb] = INT(por),
    [0xec] = INT(paddsb), [0xed] = INT(paddsw), [0xee] = INT(pmaxsw), [0xef] = INT(pxor),
    [0xf0] = P4(UD, UD, UD, V(lddqu, V_W, SSE3)),
    [0xf1] = INT(psllw), [0xf2] = INT(pslld), [0xf3] = INT(psllq), [0xf4] = INT(pmuludq),
    [0xf5] = INT(pmaddwd), [0xf6] = INT(psadbw),
    [0xf7] = P4(MMX(maskmovq), V(maskmovdqu, V_W_DI, SSE2), UD, UD),
    [0xf8] = INT(psubb), [0xf9] = INT(psubw), [0xfa] = INT(psubd), [0xfb] = INT(psubq),
    [0xfc] = INT(paddb), [0xfd] = INT(paddw), [0xfe] = INT(paddd),

#elif OPVEC_MAP == 0x0f38

    [0x00] = INT_SSSE3(pshufb), [0x01] = INT_SSSE3(phaddw), [0x02] = INT_SSSE3(phaddd), [0x03] = INT_SSSE3(phaddsw),
    [0x04] = INT_SSSE3(pmaddubsw), [0x05] = INT_SSSE3(phsubw), [0x06] = INT_SSSE3(phsubd), [0x07] = INT_SSSE3(phsubsw),
    [0x08] = INT_SSSE3(psignb), [0x09] = INT_SSSE3(psignw), [0x0a] = INT_SSSE3(psignd), [0x0b] = INT_SSSE3(pmulhrsw),
    [0x0c] = P66(W01(V(vpermilps, V_H_W, AVX), UD)), [0x0d] = P66(W01(V(vpermilpd, V_H_W, AVX), UD)),
    [0x0e] = P66(W01(V(vtestps, V_W, AVX), UD)), [0x0f] = P66(W01(V(vtestpd, V_W, AVX), UD)),
    [0x10] = P66(V(pblendvb, V_W, SSE41)),
    [0x13] = P66(W01(FP(vcvtph2ps, V_W, F16C), UD)),
    [0x14] = P66(V(blendvps, V_W, SSE41)), [0x15] = P66(V(blendvpd, V_W, SSE41)),
    [0x16] = P66(W01(V(vpermps, V_H_W, AVX2), UD)),
    [0x17] = P66(V(ptest, V_W, SSE41)),
    [0x18] = P66(W01(MEM_REG(V(vbroadcastss, V_W, AVX), V(vbroadcastss, V_W, AVX2)), UD)),
    [0x19] = P66(W01(MEM_REG(V(vbroadcastsd, V_W, AVX), V(vbroadcastsd, V_W, AVX2)), UD)),
    [0x1a] = P66(W01(V(vbroadcastf128, V_W, AVX), UD)),
    [0x1c] = P4(MMX(pabsb), I(pabsb, V_W, SSSE3), UD, UD), [0x1d] = P4(MMX(pabsw), I(pabsw, V_W, SSSE3), UD, UD),
    [0x1e] = P4(MMX(pabsd), I(pabsd, V_W, SSSE3), UD, UD),
    [0x20] = P66(I(pmovsxbw, V_W, SSE41)), [0x21] = P66(I(pmovsxbd, V_W, SSE41)), [0x22] = P66(I(pmovsxbq, V_W, SSE41)),
    [0x23] = P66(I(pmovsxwd, V_W, SSE41)), [0x24] = P66(I(pmovsxwq, V_W, SSE41)), [0x25] = P66(I(pmovsxdq, V_W, SSE41)),
    [0x28] = P66(I(pmuldq, V_H_W, SSE41)), [0x29] = P66(I(pcmpeqq, V_H_W, SSE41)),
    [0x2a] = P66(I(movntdqa, V_W, SSE41)), [0x2b] = P66(I(packusdw, V_H_W, SSE41)),
    [0x2c] = P66(W01(V(vmaskmovps, V_H_W, AVX), UD)), [0x2d] = P66(W01(V(vmaskmovpd, V_H_W, AVX), UD)),
    [0x2e] = P66(W01(V(vmaskmovps, W_H_V, AVX), UD)), [0x2f] = P66(W01(V(vmaskmovpd, W_H_V, AVX), UD)),
    [0x30] = P66(I(pmovzxbw, V_W, SSE41)), [0x31] = P66(I(pmovzxbd, V_W, SSE41)), [0x32] = P66(I(pmovzxbq, V_W, SSE41)),
    [0x33] = P66(I(pmovzxwd, V_W, SSE41)), [0x34] = P66(I(pmovzxwq, V_W, SSE41)), [0x35] = P66(I(pmovzxdq, V_W, SSE41)),
    [0x36] = P66(W01(V(vpermd, V_H_W, AVX2), UD)), [0x37] = P66(I(pcmpgtq, V_H_W, SSE42)),
    [0x38] = P66(I(pminsb, V_H_W, SSE41)), [0x39] = P66(I(pminsd, V_H_W, SSE41)), [0x3a] = P66(I(pminuw, V_H_W, SSE41)),
    [0x3b] = P66(I(pminud, V_H_W, SSE41)), [0x3c] = P66(I(pmaxsb, V_H_W, SSE41)), [0x3d] = P66(I(pmaxsd, V_H_W, SSE41)),
    [0x3e] = P66(I(pmaxuw, V_H_W, SSE41)), [0x3f] = P66(I(pmaxud, V_H_W, SSE41)), [0x40] = P66(I(pmulld, V_H_W, SSE41)),
    [0x41] = P66(V(phminposuw, V_W, SSE41)),
    [0x45] = P66(W01(V(vpsrlvd, V_H_W, AVX2), V(vpsrlvq, V_H_W, AVX2))), [0x46] = P66(W01(V(vpsravd, V_H_W, AVX2), UD)),
    [0x47] = P66(W01(V(vpsllvd, V_H_W, AVX2), V(vpsllvq, V_H_W, AVX2))),
    [0x58] = P66(W01(V(vpbroadcastd, V_W, AVX2), UD)), [0x59] = P66(W01(V(vpbroadcastq, V_W, AVX2), UD)),
    [0x5a] = P66(W01(VROW("vbroadcasti128", vbroadcastf128, V_W, AVX2), UD)),
    [0x78] = P66(W01(V(vpbroadcastb, V_W, AVX2), UD)), [0x79] = P66(W01(V(vpbroadcastw, V_W, AVX2), UD)),
    [0x8c] = P66(W01(VROW("vpmaskmovd", vmaskmovps, V_H_W, AVX2), VROW("vpmaskmovq", vmaskmovpd, V_H_W, AVX2))),
    [0x8e] = P66(W01(VROW("vpmaskmovd", vmaskmovps, W_H_V, AVX2), VROW("vpmaskmovq", vmaskmovpd, W_H_V, AVX2))),
    [0x90] = P66(W01(V(vpgatherdd, V_H_W, AVX2, O_VSIB), V(vpgatherdq, V_H_W, AVX2, O_VSIB))),
    [0x91] = P66(W01(V(vpgatherqd, V_H_W, AVX2, O_VSIB), V(vpgatherqq, V_H_W, AVX2, O_VSIB))),
    [0x92] = P66(W01(VROW("vgatherdps", vpgatherdd, V_H_W, AVX2, O_VSIB), VROW("vgatherdpd", vpgatherdq, V_H_W, AVX2, O_VSIB))),
    [0x93] = P66(W01(VROW("vgatherqps", vpgatherqd, V_H_W, AVX2, O_VSIB), VROW("vgatherqpd", vpgatherqq, V_H_W, AVX2, O_VSIB))),
#define FMA_PD_PS(op) P66(W01(FP(op##ps, V_H_W, FMA), FP(op##pd, V_H_W, FMA)))
#define FMA_SD_SS(op) P66(W01(FP(op##ss, V_H_W, FMA), FP(op##sd, V_H_W, FMA)))
#define FMA_ORDER(base, order)                                                                     \
    [base + 0x6] = FMA_PD_PS(vfmaddsub##order), [base + 0x7] = FMA_PD_PS(vfmsubadd##order),        \
    [base + 0x8] = FMA_PD_PS(vfmadd##order), [base + 0x9] = FMA_SD_SS(vfmadd##order),              \
    [base + 0xa] = FMA_PD_PS(vfmsub##order), [base + 0xb] = FMA_SD_SS(vfmsub##order),              \
    [base + 0xc] = FMA_PD_PS(vfnmadd##order), [base + 0xd] = FMA_SD_SS(vfnmadd##order),            \
    [base + 0xe] = FMA_PD_PS(vfnmsub##order), [base + 0xf] = FMA_SD_SS(vfnmsub##order)
    FMA_ORDER(0x90, 132), FMA_ORDER(0xa0, 213), FMA_ORDER(0xb0, 231),
    [0xc8] = P4(V(sha1nexte, V_W, SHA), UD, UD, UD), [0xc9] = P4(V(sha1msg1, V_W, SHA), UD, UD, UD),
    [0xca] = P4(V(sha1msg2, V_W, SHA), UD, UD, UD), [0xcb] = P4(V(sha256rnds2, V_W, SHA), UD, UD, UD),
    [0xcc] = P4(V(sha256msg1, V_W, SHA), UD, UD, UD), [0xcd] = P4(V(sha256msg2, V_W, SHA), UD, UD, UD),
    [0xcf] = P66(BY(O_ENC, ROWS(V(gf2p8mulb, V_H_W, GFNI), W01(V(gf2p8mulb, V_H_W, GFNI), UD)))),
    [0xdb] = P66(V(aesimc, V_W, AES)), [0xdc] = P66(V(aesenc, V_H_W, AES)), [0xdd] = P66(V(aesenclast, V_H_W, AES)),
    [0xde] = P66(V(aesdec, V_H_W, AES)), [0xdf] = P66(V(aesdeclast, V_H_W, AES)),

#elif OPVEC_MAP == 0x0f3a

    [0x00] = P66(W01(UD, V(vpermq, V_W_I8, AVX2))), [0x01] = P66(W01(UD, V(vpermpd, V_W_I8, AVX2))),
    [0x02] = P66(W01(V(vpblendd, V_H_W_I8, AVX2), UD)),
    [0x04] = P66(W01(VROW("vpermilps", vpermilps_imm, V_W_I8, AVX), UD)),
    [0x05] = P66(W01(VROW("vpermilpd", vpermilpd_imm, V_W_I8, AVX), UD)),
    [0x06] = P66(W01(V(vperm2f128, V_H_W_I8, AVX), UD)),
    [0x08] = P66(FP(roundps, V_W_I8, SSE41)), [0x09] = P66(FP(roundpd, V_W_I8, SSE41)),
    [0x0a] = P66(FP(roundss, V_H_W_I8, SSE41)), [0x0b] = P66(FP(roundsd, V_H_W_I8, SSE41)),
    [0x0c] = P66(V(blendps, V_H_W_I8, SSE41)), [0x0d] = P66(V(blendpd, V_H_W_I8, SSE41)),
    [0x0e] = P66(I(pblendw, V_H_W_I8, SSE41)),
    [0x0f] = P4(MMX(palignr), I(palignr, V_H_W_I8, SSSE3), UD, UD),
    [0x14] = P66(V(pextrb, X_V_I8, SSE41)), [0x15] = P66(V(pextrw, X_V_I8, SSE41)),
    [0x16] = P66(V(pextrd, X_V_I8, SSE41)), [0x17] = P66(V(extractps, X_V_I8, SSE41)),
    [0x18] = P66(W01(V(vinsertf128, V_H_W_I8, AVX), UD)), [0x19] = P66(W01(V(vextractf128, W_V_I8, AVX), UD)),
    [0x1d] = P66(W01(FP(vcvtps2ph, W_V_I8, F16C), UD)),
    [0x20] = P66(V(pinsrb, V_H_X_I8, SSE41)), [0x21] = P66(V(insertps, V_H_W_I8, SSE41)), [0x22] = P66(V(pinsrd, V_H_X_I8, SSE41)),
    [0x38] = P66(W01(VROW("vinserti128", vinsertf128, V_H_W_I8, AVX2), UD)),
    [0x39] = P66(W01(VROW("vextracti128", vextractf128, W_V_I8, AVX2), UD)),
    [0x40] = P66(FP(dpps, V_H_W_I8, SSE41)), [0x41] = P66(FP(dppd, V_H_W_I8, SSE41)),
    [0x42] = P66(I(mpsadbw, V_H_W_I8, SSE41)), [0x44] = P66(V(pclmulqdq, V_H_W_I8, PCLMULQDQ)),
    [0x46] = P66(W01(V(vperm2i128, V_H_W_I8, AVX2), UD)),
    [0x4a] = P66(W01(V(vblendvps, V_H_W_I8, AVX), UD)), [0x4b] = P66(W01(V(vblendvpd, V_H_W_I8, AVX), UD)),
    [0x4c] = P66(W01(VROW("vpblendvb", vpblendvb, V_H_W_I8, AVX, O_AVX2), UD)),
    [0x60] = P66(V(pcmpestrm, V_W_I8, SSE42)), [0x61] = P66(V(pcmpestri, V_W_I8, SSE42)),
    [0x62] = P66(V(pcmpistrm, V_W_I8, SSE42)), [0x63] = P66(V(pcmpistri, V_W_I8, SSE42)),
    [0xcc] = P4(V(sha1rnds4, V_W_I8, SHA), UD, UD, UD),
#define GFNI_AFFINE(id) P66(BY(O_ENC, ROWS(V(id, V_H_W_I8, GFNI), W01(UD, V(id, V_H_W_I8, GFNI)))))
    [0xce] = GFNI_AFFINE(gf2p8affineqb), [0xcf] = GFNI_AFFINE(gf2p8affineinvqb),
    [0xdf] = P66(V(aeskeygenassist, V_W_I8, AES)),

#endif
