/* SPDX-License-Identifier: MIT */
/*
 * The instruction table's rows for x87 (D8 to DF) and MMX; optable.c and opvec.h refer to them.
 *
 * Source: SDM vol. 2 appendix A.5 (escape opcodes); AMD APM vol. 3 appendix A.1.3 for the
 * aliases, which every processor since the 387 has.
 */
#include "opfpu.h"

/* clang-format off */

#define OPF(text, id, f, feat, ...) { text, NULL, x_##id, NULL, (0 __VA_OPT__(|) __VA_ARGS__), F_##f, feat }
#define OP(text, id, f, ...) OPF(text, id, f, 0, ##__VA_ARGS__)
#define BY(selector, table) { NULL, NULL, NULL, table, selector, F_NONE, 0 }
#define ROWS(...) (const struct op[]){ __VA_ARGS__ }
#define UD { NULL, NULL, NULL, NULL, 0, 0, 0 }

#define F1C(bit) FEAT(CPU_CPUID_1_ECX, CPUID_1_ECX_##bit)
#define F1D(bit) FEAT(CPU_CPUID_1_EDX, CPUID_1_EDX_##bit)

/* ---- x87 --------------------------------------------------------------------------------------------- */

/* Row names as in the SDM; size of the memory operand in the handler's name. */
#define M(text, size) OP(text, x87_ld##size, X87)
#define ST(text, size) OP(text, x87_st##size, X87)
#define R(text) OP(text, x87, X87)
#define CMOV(text) OPF(text, fcmov, X87, F1D(CMOV))
#define COMI(text) OPF(text, fcomi, X87, F1D(CMOV))
#define ARITHMETIC(size, i)                                                                        \
    M("f" i "add", size), M("f" i "mul", size), M("f" i "com", size), M("f" i "comp", size),       \
    M("f" i "sub", size), M("f" i "subr", size), M("f" i "div", size), M("f" i "divr", size)
#define BY_RM(...) BY(O_RM, ROWS(__VA_ARGS__))

static const struct op d8_mem[8] = { ARITHMETIC(32, "") };
static const struct op d8_reg[8] = {
    R("fadd"), R("fmul"), R("fcom"), R("fcomp"), R("fsub"), R("fsubr"), R("fdiv"), R("fdivr"),
};
static const struct op d9_mem[8] = {
    M("fld", 32), UD, ST("fst", 32), ST("fstp", 32),
    OP("fldenv", fldenv, X87), OP("fldcw", fldcw, X87),
    OP("fnstenv", fnstenv, X87), OP("fnstcw", fnstcw, X87),
};
static const struct op d9_reg[8] = {
    R("fld"), R("fxch"), BY_RM(R("fnop"), UD, UD, UD, UD, UD, UD, UD), R("fstp"),
    BY_RM(R("fchs"), R("fabs"), UD, UD, R("ftst"), R("fxam"), UD, UD),
    BY_RM(R("fld1"), R("fldl2t"), R("fldl2e"), R("fldpi"), R("fldlg2"), R("fldln2"), R("fldz"), UD),
    BY_RM(R("f2xm1"), R("fyl2x"), R("fptan"), R("fpatan"),
          R("fxtract"), R("fprem1"), R("fdecstp"), R("fincstp")),
    BY_RM(R("fprem"), R("fyl2xp1"), R("fsqrt"), R("fsincos"),
          R("frndint"), R("fscale"), R("fsin"), R("fcos")),
};
static const struct op da_mem[8] = { ARITHMETIC(32, "i") };
static const struct op da_reg[8] = {
    CMOV("fcmovb"), CMOV("fcmove"), CMOV("fcmovbe"), CMOV("fcmovu"), UD,
    BY_RM(UD, R("fucompp"), UD, UD, UD, UD, UD, UD), UD, UD,
};
static const struct op db_mem[8] = {
    M("fild", 32), OPF("fisttp", x87_st32, X87, F1C(SSE3)), ST("fist", 32), ST("fistp", 32),
    UD, M("fld", 80), UD, ST("fstp", 80),
};
static const struct op db_reg[8] = {
    CMOV("fcmovnb"), CMOV("fcmovne"), CMOV("fcmovnbe"), CMOV("fcmovnu"),
    BY_RM(OP("fneni", fnop87, X87), OP("fndisi", fnop87, X87), OP("fnclex", fnclex, X87),
          OP("fninit", fninit, X87), OP("fnsetpm", fnop87, X87), UD, UD, UD),
    COMI("fucomi"), COMI("fcomi"), UD,
};
static const struct op dc_mem[8] = { ARITHMETIC(64, "") };
static const struct op dc_reg[8] = {
    R("fadd"), R("fmul"), R("fcom"), R("fcomp"), R("fsubr"), R("fsub"), R("fdivr"), R("fdiv"),
};
static const struct op dd_mem[8] = {
    M("fld", 64), OPF("fisttp", x87_st64, X87, F1C(SSE3)), ST("fst", 64), ST("fstp", 64),
    OP("frstor", frstor, X87), UD, OP("fnsave", fnsave, X87), OP("fnstsw", fnstsw, X87),
};
static const struct op dd_reg[8] = {
    R("ffree"), R("fxch"), R("fst"), R("fstp"), R("fucom"), R("fucomp"), UD, UD,
};
static const struct op de_mem[8] = { ARITHMETIC(16, "i") };
static const struct op de_reg[8] = {
    R("faddp"), R("fmulp"), R("fcomp"), BY_RM(UD, R("fcompp"), UD, UD, UD, UD, UD, UD),
    R("fsubrp"), R("fsubp"), R("fdivrp"), R("fdivp"),
};
static const struct op df_mem[8] = {
    M("fild", 16), OPF("fisttp", x87_st16, X87, F1C(SSE3)), ST("fist", 16), ST("fistp", 16),
    M("fbld", 80), M("fild", 64), ST("fbstp", 80), ST("fistp", 64),
};
static const struct op df_reg[8] = {
    R("ffreep"), R("fxch"), R("fstp"), R("fstp"),
    BY_RM(OP("fnstsw", fnstsw_ax, X87), UD, UD, UD, UD, UD, UD, UD),
    COMI("fucomip"), COMI("fcomip"), UD,
};

#define BY_MOD(n) { BY(O_GROUP, n##_mem), BY(O_GROUP, n##_reg) }
const struct op x87_map[8][2] = {
    BY_MOD(d8), BY_MOD(d9), BY_MOD(da), BY_MOD(db), BY_MOD(dc), BY_MOD(dd), BY_MOD(de), BY_MOD(df),
};

/* ---- MMX --------------------------------------------------------------------------------------------- */

#define MMX_ROW(text, id, form, feat) [MMX_##id] = { OPF(text, mmx_##id, form, feat), UD }
#define MMX1(id) MMX_ROW(#id, id, MMX, F1D(MMX)),
#define MMX_SSE(id) MMX_ROW(#id, id, MMX, F1D(SSE)),
#define MMX_SSE2(id) MMX_ROW(#id, id, MMX, F1D(SSE2)),
#define MMX_SSSE3(id) MMX_ROW(#id, id, MMX, F1C(SSSE3)),
#define MMX_SHIFT(text) [MMX_##text##_imm] = { BY(O_MOD3, ROWS(UD, OPF(#text, mmx_##text##_imm, MMX_I8, F1D(MMX)))), UD }

const struct op mmx_rows[NR_MMX][2] = {
    MMX_BINARY_ROWS(MMX1)
    MMX_LOW_ROWS(MMX1)
    MMX_SSE_ROWS(MMX_SSE)
    MMX_SSE2_ROWS(MMX_SSE2)
    MMX_SSSE3_ROWS(MMX_SSSE3)
    MMX_SHIFT(psrlw), MMX_SHIFT(psrld), MMX_SHIFT(psrlq), MMX_SHIFT(psraw), MMX_SHIFT(psrad),
    MMX_SHIFT(psllw), MMX_SHIFT(pslld), MMX_SHIFT(psllq),
    [MMX_movd] = { BY(O_REXW, ROWS(OPF("movd", mmx_movd, MMX, F1D(MMX)), OPF("movq", mmx_movd, MMX, F1D(MMX)))), UD },
    [MMX_movd_e] = { BY(O_REXW, ROWS(OPF("movd", mmx_movd_e, MMX, F1D(MMX)), OPF("movq", mmx_movd_e, MMX, F1D(MMX)))), UD },
    MMX_ROW("movq", movq, MMX, F1D(MMX)),
    MMX_ROW("movq", movq_e, MMX, F1D(MMX)),
    MMX_ROW("emms", emms, NONE, F1D(MMX)),
    MMX_ROW("pshufw", pshufw, MMX_I8, F1D(SSE)),
    MMX_ROW("pinsrw", pinsrw, MMX_I8, F1D(SSE)),
    [MMX_pextrw] = { BY(O_MOD3, ROWS(UD, OPF("pextrw", mmx_pextrw, MMX_I8, F1D(SSE)))), UD },
    [MMX_pmovmskb] = { BY(O_MOD3, ROWS(UD, OPF("pmovmskb", mmx_pmovmskb, MMX, F1D(SSE)))), UD },
    MMX_ROW("maskmovq", maskmovq, MMX_DI, F1D(SSE)),
    [MMX_movntq] = { BY(O_MOD3, ROWS(OPF("movntq", mmx_movntq, MMX, F1D(SSE)), UD)), UD },
    MMX_ROW("palignr", palignr, MMX_I8, F1C(SSSE3)),
    [MMX_movq2dq] = { BY(O_MOD3, ROWS(UD, OPF("movq2dq", mmx_movq2dq, MMX, F1D(SSE2)))), UD },
    [MMX_movdq2q] = { BY(O_MOD3, ROWS(UD, OPF("movdq2q", mmx_movdq2q, MMX, F1D(SSE2)))), UD },
    MMX_ROW("cvtpi2ps", cvtpi2ps, MMX, F1D(SSE)),
    MMX_ROW("cvtpi2pd", cvtpi2pd, MMX, F1D(SSE2)),
    MMX_ROW("cvtps2pi", cvtps2pi, MMX, F1D(SSE)),
    MMX_ROW("cvttps2pi", cvttps2pi, MMX, F1D(SSE)),
    MMX_ROW("cvtpd2pi", cvtpd2pi, MMX, F1D(SSE2)),
    MMX_ROW("cvttpd2pi", cvttpd2pi, MMX, F1D(SSE2)),
};
