/* SPDX-License-Identifier: MIT */
/*
 * The instruction table: what each opcode is called, which handlers it has, and how its
 * operands are encoded.  Decoding, lengths, mnemonics and the documentation derive from it;
 * an opcode without a row is undefined.
 *
 * A row with a sub-table selects by one of the O_GROUP .. O_REXB flags; its other flags and
 * its form hold for every row below it.
 *
 * Source: SDM vol. 2 appendix A and the instruction pages.
 */
#include <stdio.h>

#include "opfpu.h"
#include "vector.h"

/* clang-format off */

/* ---- row builders -------------------------------------------------------------------------- */

#define FLAGS_(dummy, ...) (0 __VA_OPT__(| (__VA_ARGS__)))
#define NAMED(text, id, f, ...) { text, &b_##id, x_##id, NULL, FLAGS_(, ##__VA_ARGS__), F_##f, 0 }
#define OP(id, f, ...) NAMED(#id, id, f, ##__VA_ARGS__)
/* with the CPUID bit that must be set */
#define OPF(id, f, feat, ...) { #id, &b_##id, x_##id, NULL, FLAGS_(, ##__VA_ARGS__), F_##f, feat }
#define NAMEDF(text, id, f, feat, ...) { text, &b_##id, x_##id, NULL, FLAGS_(, ##__VA_ARGS__), F_##f, feat }
#define BY(selector, table, ...) { NULL, NULL, NULL, table, (selector) FLAGS_PLUS(__VA_ARGS__), F_NONE, 0 }
#define BYF(selector, table, f, ...) { NULL, NULL, NULL, table, (selector) FLAGS_PLUS(__VA_ARGS__), F_##f, 0 }
#define FLAGS_PLUS(...) __VA_OPT__(| (__VA_ARGS__))
#define ROWS(...) (const struct op[]){ __VA_ARGS__ }
#define UD { NULL, NULL, NULL, NULL, 0, 0, 0 }
#define UNDEFINED(text) { text, NULL, NULL, NULL, 0, F_NONE, 0 }

/* The CPUID words of ctl.cpuid[] */
#define F1C(bit) FEAT(CPU_CPUID_1_ECX, CPUID_1_ECX_##bit)
#define F1D(bit) FEAT(CPU_CPUID_1_EDX, CPUID_1_EDX_##bit)
#define F7B(bit) FEAT(CPU_CPUID_7_EBX, CPUID_7_EBX_##bit)
#define F7C(bit) FEAT(CPU_CPUID_7_ECX, CPUID_7_ECX_##bit)
#define F7D(bit) FEAT(CPU_CPUID_7_EDX, CPUID_7_EDX_##bit)
#define FD1(bit) FEAT(CPU_CPUID_D_1_EAX, CPUID_D_1_EAX_##bit)
#define F8C(bit) FEAT(CPU_CPUID_8000_0001_ECX, CPUID_80000001_ECX_##bit)
#define F8D(bit) FEAT(CPU_CPUID_8000_0001_EDX, CPUID_80000001_EDX_##bit)

#define ALU6(base, id, lock)                                                                       \
    [base + 0] = OP(id, E_G, O_BYTE | (lock)),                                                     \
    [base + 1] = OP(id, E_G, lock),                                                                \
    [base + 2] = OP(id, G_E, O_BYTE),                                                              \
    [base + 3] = OP(id, G_E),                                                                      \
    [base + 4] = OP(id, A_I, O_BYTE),                                                              \
    [base + 5] = OP(id, A_I)

#define TIMES8(base, row)                                                                          \
    [base + 0] = row, [base + 1] = row, [base + 2] = row, [base + 3] = row,                        \
    [base + 4] = row, [base + 5] = row, [base + 6] = row, [base + 7] = row

#define CC16(base, id, f, feat, ...)                                                               \
    [base + 0x0] = CCROW(id, o, f, feat, ##__VA_ARGS__), [base + 0x1] = CCROW(id, no, f, feat, ##__VA_ARGS__), \
    [base + 0x2] = CCROW(id, b, f, feat, ##__VA_ARGS__), [base + 0x3] = CCROW(id, ae, f, feat, ##__VA_ARGS__), \
    [base + 0x4] = CCROW(id, e, f, feat, ##__VA_ARGS__), [base + 0x5] = CCROW(id, ne, f, feat, ##__VA_ARGS__), \
    [base + 0x6] = CCROW(id, be, f, feat, ##__VA_ARGS__), [base + 0x7] = CCROW(id, a, f, feat, ##__VA_ARGS__), \
    [base + 0x8] = CCROW(id, s, f, feat, ##__VA_ARGS__), [base + 0x9] = CCROW(id, ns, f, feat, ##__VA_ARGS__), \
    [base + 0xa] = CCROW(id, p, f, feat, ##__VA_ARGS__), [base + 0xb] = CCROW(id, np, f, feat, ##__VA_ARGS__), \
    [base + 0xc] = CCROW(id, l, f, feat, ##__VA_ARGS__), [base + 0xd] = CCROW(id, ge, f, feat, ##__VA_ARGS__), \
    [base + 0xe] = CCROW(id, le, f, feat, ##__VA_ARGS__), [base + 0xf] = CCROW(id, g, f, feat, ##__VA_ARGS__)
#define CCROW(id, cc, f, feat, ...) NAMEDF(#id #cc, id##cc, f, feat, ##__VA_ARGS__)

#define PRIV (O_CPL0 | O_END)

#define ONLY_F3(row) BY(O_PREFIX, ROWS(UD, UD, row, UD))
#define ONLY_NP(row) BY(O_PREFIX, ROWS(row, UD, UD, UD))

#include "opvec.h" /* row builders and groups of the vector rows */

/* ---- groups --------------------------------------------------------------------------------- */

static const struct op group1[8] = {
    OP(add, NONE, O_LOCK), OP(or, NONE, O_LOCK), OP(adc, NONE, O_LOCK), OP(sbb, NONE, O_LOCK),
    OP(and, NONE, O_LOCK), OP(sub, NONE, O_LOCK), OP(xor, NONE, O_LOCK), OP(cmp, NONE),
};
static const struct op group1a[8] = { OP(pop, E, O_D64) };
static const struct op group2[8] = {
    OP(rol, NONE), OP(ror, NONE), OP(rcl, NONE), OP(rcr, NONE),
    OP(shl, NONE), OP(shr, NONE), OP(shl, NONE), OP(sar, NONE),
};
static const struct op group3b[8] = {
    OP(test, E_I), OP(test, E_I), OP(not, E, O_LOCK), OP(neg, E, O_LOCK),
    OP(mul, E), OP(imul, E), OP(div, E), OP(idiv, E),
};
static const struct op group4[8] = { OP(inc, E, O_LOCK), OP(dec, E, O_LOCK) };
static const struct op group5[8] = {
    OP(inc, E, O_LOCK), OP(dec, E, O_LOCK),
    NAMED("call", call_e, E, O_F64 | O_END), NAMED("call", call_far_m, M, O_END),
    NAMED("jmp", jmp_e, E, O_F64 | O_END), NAMED("jmp", jmp_far_m, M, O_END),
    OP(push, E, O_D64), UD,
};
static const struct op group6[8] = {
    OP(sldt, E, O_PROT), OP(str, E, O_PROT), OP(lldt, E, O_PROT | PRIV), OP(ltr, E, O_PROT | PRIV),
    OP(verr, E, O_PROT), OP(verw, E, O_PROT), UD, UD,
};
static const struct op group7_mem[8] = {
    OP(sgdt, M), OP(sidt, M), OP(lgdt, M, PRIV), OP(lidt, M, PRIV),
    OP(smsw, E), UD, OP(lmsw, E, PRIV), OP(invlpg, M, PRIV),
};
static const struct op group7_reg[8] = {
    BY(O_RM, ROWS(UD, ONLY_NP(OP(vmcall, NONE, O_END)), UD, UD, UD, UD, UD, UD)),
    BY(O_RM, ROWS(ONLY_NP(OP(monitor, NONE)), ONLY_NP(OP(mwait, NONE, O_END)),
                  ONLY_NP(OPF(clac, NONE, F7B(SMAP))), ONLY_NP(OPF(stac, NONE, F7B(SMAP))),
                  UD, UD, UD, UD)),
    BY(O_RM, ROWS(ONLY_NP(OPF(xgetbv, NONE, F1C(XSAVE))), ONLY_NP(OPF(xsetbv, NONE, F1C(XSAVE), O_END)),
                  UD, UD, UD, UD, UD, UD)),
    BY(O_RM, ROWS(UD, OP(vmmcall, NONE, O_END), UD, UD, UD, UD, UD, UD)),
    OP(smsw, E),
    BY(O_RM, ROWS(ONLY_NP(OPF(serialize, NONE, F7D(SERIALIZE), O_END)),
                  UD, UD, UD, UD, UD,
                  ONLY_NP(OPF(rdpkru, NONE, F7C(PKU))),
                  ONLY_NP(OPF(wrpkru, NONE, F7C(PKU), O_END)))),
    OP(lmsw, E, PRIV),
    BY(O_RM, ROWS(OP(swapgs, NONE, O_O64 | O_CPL0), OPF(rdtscp, NONE, F8D(RDTSCP)),
                  UD, UD, UD, UD, UD, UD)),
};
static const struct op group7[2] = { BY(O_GROUP, group7_mem), BY(O_GROUP, group7_reg) };
static const struct op group8[8] = {
    UD, UD, UD, UD,
    OP(bt, E_I8), OP(bts, E_I8, O_LOCK), OP(btr, E_I8, O_LOCK), OP(btc, E_I8, O_LOCK),
};
static const struct op group9_mem[8] = {
    [1] = BY(O_REXW, ROWS(NAMEDF("cmpxchg8b", cmpxchg8b, M, F1D(CX8), O_LOCK | O_S32),
                          NAMEDF("cmpxchg16b", cmpxchg8b, M, F1C(CX16), O_LOCK | O_S32))),
    [3] = ONLY_NP(OPF(xrstors, M, FD1(XSAVES), O_END)),
    [4] = ONLY_NP(OPF(xsavec, M, FD1(XSAVEC))),
    [5] = ONLY_NP(OPF(xsaves, M, FD1(XSAVES))),
};
static const struct op group9_reg[8] = {
    [6] = BY(O_PREFIX, ROWS(OPF(rdrand, E, F1C(RDRAND)), OPF(rdrand, E, F1C(RDRAND)), UD, UD)),
    [7] = BY(O_PREFIX, ROWS(OPF(rdseed, E, F7B(RDSEED)), OPF(rdseed, E, F7B(RDSEED)),
                            OPF(rdpid, E, F7C(RDPID), O_S32), UD)),
};
static const struct op group9[2] = { BY(O_GROUP, group9_mem), BY(O_GROUP, group9_reg) };
static const struct op group11[8] = { OP(mov, E_I) };

static const struct op group15_mem[8] = {
    [0] = ONLY_NP(OPF(fxsave, M, F1D(FXSR))), [1] = ONLY_NP(OPF(fxrstor, M, F1D(FXSR), O_END)),
    [4] = ONLY_NP(OPF(xsave, M, F1C(XSAVE))), [5] = ONLY_NP(OPF(xrstor, M, F1C(XSAVE), O_END)),
    [2] = ONLY_NP(V(ldmxcsr, M, SSE, O_END)),
    [3] = ONLY_NP(V(stmxcsr, M, SSE)),
    [6] = BY(O_PREFIX, ROWS(OPF(xsaveopt, M, FD1(XSAVEOPT)), OPF(clwb, M, F7B(CLWB), O_BYTE), UD, UD)),
    [7] = BY(O_PREFIX, ROWS(OPF(clflush, M, F1D(CLFLUSH), O_BYTE),
                            OPF(clflushopt, M, F7B(CLFLUSHOPT), O_BYTE), UD, UD)),
};
static const struct op group15_reg[8] = {
    ONLY_F3(OPF(rdfsbase, E, F7B(FSGSBASE), O_O64 | O_S32)),
    ONLY_F3(OPF(rdgsbase, E, F7B(FSGSBASE), O_O64 | O_S32)),
    ONLY_F3(OPF(wrfsbase, E, F7B(FSGSBASE), O_O64 | O_S32)),
    ONLY_F3(OPF(wrgsbase, E, F7B(FSGSBASE), O_O64 | O_S32)),
    UD,
    ONLY_NP(OPF(lfence, MODRM, F1D(SSE2))),
    ONLY_NP(OPF(mfence, MODRM, F1D(SSE2))),
    ONLY_NP(OPF(sfence, MODRM, F1D(SSE))),
};
static const struct op group15[2] = { BY(O_GROUP, group15_mem), BY(O_GROUP, group15_reg) };

static const struct op group17[8] = { /* VEX 0f 38 f3 */
    UD,
    OPF(blsr, V_E, F7B(BMI1), O_VEX | O_S32), OPF(blsmsk, V_E, F7B(BMI1), O_VEX | O_S32),
    OPF(blsi, V_E, F7B(BMI1), O_VEX | O_S32),
    UD, UD, UD, UD,
};

/* ---- maps ------------------------------------------------------------------------------------ */

const struct op opcode_map[NR_MAPS][256] = {

[MAP_1] = {
    ALU6(0x00, add, O_LOCK), [0x06] = OP(push_s, S, O_I64), [0x07] = OP(pop_s, S, O_I64 | O_END),
    ALU6(0x08, or, O_LOCK),  [0x0e] = OP(push_s, S, O_I64),
    ALU6(0x10, adc, O_LOCK), [0x16] = OP(push_s, S, O_I64), [0x17] = OP(pop_s, S, O_I64 | O_END),
    ALU6(0x18, sbb, O_LOCK), [0x1e] = OP(push_s, S, O_I64), [0x1f] = OP(pop_s, S, O_I64 | O_END),
    ALU6(0x20, and, O_LOCK), [0x27] = OP(daa, NONE, O_I64),
    ALU6(0x28, sub, O_LOCK), [0x2f] = OP(das, NONE, O_I64),
    ALU6(0x30, xor, O_LOCK), [0x37] = OP(aaa, NONE, O_I64),
    ALU6(0x38, cmp, 0),      [0x3f] = OP(aas, NONE, O_I64),
    TIMES8(0x40, OP(inc, Z, O_I64)), /* REX in 64-bit mode */
    TIMES8(0x48, OP(dec, Z, O_I64)),
    TIMES8(0x50, OP(push, Z, O_D64)),
    TIMES8(0x58, OP(pop, Z, O_D64)),

    [0x60] = OP(pusha, NONE, O_I64),
    [0x61] = OP(popa, NONE, O_I64),
    [0x62] = OP(bound, G_M, O_I64),
    [0x63] = BY(O_CODE, ROWS(OP(arpl, E_G, O_PROT), OP(movsxd, G_E))),
    [0x68] = OP(push, I, O_D64),
    [0x69] = NAMED("imul", imul3, G_E_I),
    [0x6a] = OP(push, I8, O_D64),
    [0x6b] = NAMED("imul", imul3, G_E_I8),
    [0x6c] = OP(ins, STR, O_BYTE), [0x6d] = OP(ins, STR, O_NO64),
    [0x6e] = OP(outs, STR, O_BYTE), [0x6f] = OP(outs, STR, O_NO64),
    CC16(0x70, j, J8, 0, O_F64 | O_END),

    [0x80] = BYF(O_GROUP, group1, E_I, O_BYTE),
    [0x81] = BYF(O_GROUP, group1, E_I),
    [0x82] = BYF(O_GROUP, group1, E_I, O_BYTE | O_I64),
    [0x83] = BYF(O_GROUP, group1, E_I8),
    [0x84] = OP(test, E_G, O_BYTE), [0x85] = OP(test, E_G),
    [0x86] = OP(xchg, E_G, O_BYTE | O_LOCK), [0x87] = OP(xchg, E_G, O_LOCK),
    [0x88] = OP(mov, E_G, O_BYTE), [0x89] = OP(mov, E_G),
    [0x8a] = OP(mov, G_E, O_BYTE), [0x8b] = OP(mov, G_E),
    [0x8c] = NAMED("mov", mov_e_s, E_S),
    [0x8d] = OP(lea, G_M),
    [0x8e] = NAMED("mov", mov_s_e, S_E, O_END),
    [0x8f] = BY(O_GROUP, group1a),
    /* 90 is XCHG of r8, but of eax with itself it must not clear the upper half */
    [0x90] = BY(O_REXB, ROWS(BY(O_PREFIX, ROWS(OP(nop, NONE), OP(nop, NONE),
                                               OP(pause, NONE, O_END), OP(nop, NONE))),
                             OP(xchg, A_Z))),
    [0x91] = OP(xchg, A_Z), [0x92] = OP(xchg, A_Z), [0x93] = OP(xchg, A_Z), [0x94] = OP(xchg, A_Z),
    [0x95] = OP(xchg, A_Z), [0x96] = OP(xchg, A_Z), [0x97] = OP(xchg, A_Z),
    [0x98] = OP(cbw, NONE),
    [0x99] = OP(cwd, NONE),
    [0x9a] = NAMED("call", call_far, FAR, O_I64 | O_END),
    [0x9b] = OP(fwait, NONE),
    [0x9c] = OP(pushf, NONE, O_D64),
    [0x9d] = OP(popf, NONE, O_D64 | O_END),
    [0x9e] = BY(O_CODE, ROWS(OP(sahf, NONE), OPF(sahf, NONE, F8C(LAHF_LM)))),
    [0x9f] = BY(O_CODE, ROWS(OP(lahf, NONE), OPF(lahf, NONE, F8C(LAHF_LM)))),

    [0xa0] = OP(mov, A_O, O_BYTE), [0xa1] = OP(mov, A_O),
    [0xa2] = OP(mov, O_A, O_BYTE), [0xa3] = OP(mov, O_A),
    [0xa4] = OP(movs, STR, O_BYTE), [0xa5] = OP(movs, STR),
    [0xa6] = OP(cmps, STR, O_BYTE), [0xa7] = OP(cmps, STR),
    [0xa8] = OP(test, A_I, O_BYTE), [0xa9] = OP(test, A_I),
    [0xaa] = OP(stos, STR, O_BYTE), [0xab] = OP(stos, STR),
    [0xac] = OP(lods, STR, O_BYTE), [0xad] = OP(lods, STR),
    [0xae] = OP(scas, STR, O_BYTE), [0xaf] = OP(scas, STR),
    TIMES8(0xb0, OP(mov, Z_I, O_BYTE)),
    TIMES8(0xb8, OP(mov, Z_I)),

    [0xc0] = BYF(O_GROUP, group2, E_I8, O_BYTE), [0xc1] = BYF(O_GROUP, group2, E_I8),
    [0xc2] = OP(ret, I16, O_F64 | O_END),
    [0xc3] = OP(ret, NONE, O_F64 | O_END),
    [0xc4] = OP(les, G_M, O_I64 | O_END), /* VEX3 */
    [0xc5] = OP(lds, G_M, O_I64 | O_END), /* VEX2 */
    [0xc6] = BY(O_GROUP, group11, O_BYTE), [0xc7] = BY(O_GROUP, group11),
    [0xc8] = OP(enter, I16_I8, O_D64),
    [0xc9] = OP(leave, NONE, O_D64),
    [0xca] = NAMED("retf", ret_far, I16, O_END),
    [0xcb] = NAMED("retf", ret_far, NONE, O_END),
    [0xcc] = OP(int3, NONE, O_END | O_TFLATE),
    [0xcd] = OP(int, I8, O_END | O_TFLATE),
    [0xce] = OP(into, NONE, O_I64 | O_END | O_TFLATE),
    [0xcf] = OP(iret, NONE, O_END),
    [0xd0] = BYF(O_GROUP, group2, E_1, O_BYTE), [0xd1] = BYF(O_GROUP, group2, E_1),
    [0xd2] = BYF(O_GROUP, group2, E_CL, O_BYTE), [0xd3] = BYF(O_GROUP, group2, E_CL),
    [0xd4] = OP(aam, I8, O_I64),
    [0xd5] = OP(aad, I8, O_I64),
    [0xd6] = OP(salc, NONE, O_I64),
    [0xd7] = OP(xlat, XLAT, O_BYTE),

    [0xd8] = X87_ROW(0), [0xd9] = X87_ROW(1), [0xda] = X87_ROW(2), [0xdb] = X87_ROW(3),
    [0xdc] = X87_ROW(4), [0xdd] = X87_ROW(5), [0xde] = X87_ROW(6), [0xdf] = X87_ROW(7),

    [0xe0] = OP(loopne, J8, O_F64 | O_END), [0xe1] = OP(loope, J8, O_F64 | O_END),
    [0xe2] = OP(loop, J8, O_F64 | O_END), [0xe3] = OP(jcxz, J8, O_F64 | O_END),
    [0xe4] = OP(in, A_I8PORT, O_BYTE), [0xe5] = OP(in, A_I8PORT, O_NO64),
    [0xe6] = OP(out, A_I8PORT, O_BYTE), [0xe7] = OP(out, A_I8PORT, O_NO64),
    [0xe8] = OP(call, JV, O_F64 | O_END),
    [0xe9] = OP(jmp, JV, O_F64 | O_END),
    [0xea] = NAMED("jmp", jmp_far, FAR, O_I64 | O_END),
    [0xeb] = OP(jmp, J8, O_F64 | O_END),
    [0xec] = NAMED("in", in_dx, A_DX, O_BYTE), [0xed] = NAMED("in", in_dx, A_DX, O_NO64),
    [0xee] = NAMED("out", out_dx, A_DX, O_BYTE), [0xef] = NAMED("out", out_dx, A_DX, O_NO64),
    [0xf1] = OP(int1, NONE, O_END | O_TFLATE),
    [0xf4] = OP(hlt, NONE, PRIV),
    [0xf5] = OP(cmc, NONE),
    [0xf6] = BY(O_GROUP, group3b, O_BYTE), [0xf7] = BY(O_GROUP, group3b),
    [0xf8] = OP(clc, NONE), [0xf9] = OP(stc, NONE),
    [0xfa] = OP(cli, NONE, O_END), [0xfb] = OP(sti, NONE, O_END),
    [0xfc] = OP(cld, NONE), [0xfd] = OP(std, NONE),
    [0xfe] = BY(O_GROUP, group4, O_BYTE),
    [0xff] = BY(O_GROUP, group5),
},

[MAP_0F] = {
    [0x00] = BY(O_GROUP, group6),
    [0x01] = BY(O_MOD3, group7),
    [0x02] = OP(lar, G_E, O_PROT), [0x03] = OP(lsl, G_E, O_PROT),
    [0x05] = OPF(syscall, NONE, F8D(SYSCALL), O_END | O_TFLATE),
    [0x06] = OP(clts, NONE, PRIV),
    [0x07] = OPF(sysret, NONE, F8D(SYSCALL), O_END),
    [0x08] = OP(invd, NONE, PRIV),
    [0x09] = OP(wbinvd, NONE, PRIV), /* F3: WBNOINVD, WBINVD where it is not offered */
    [0x0b] = UNDEFINED("ud2"),
    [0x0d] = OP(prefetch, MODRM, O_BYTE),
    [0x18] = OP(prefetch, MODRM, O_BYTE),
    [0x19] = OP(nop, MODRM), [0x1a] = OP(nop, MODRM), [0x1b] = OP(nop, MODRM),
    [0x1c] = OP(nop, MODRM), [0x1d] = OP(nop, MODRM),
    [0x1e] = OP(nop, MODRM), /* ENDBR32, ENDBR64, RDSSP where CET is not offered */
    [0x1f] = OP(nop, MODRM),
    [0x20] = NAMED("mov", mov_r_cr, C, O_CPL0), [0x21] = NAMED("mov", mov_r_dr, C, O_CPL0),
    [0x22] = NAMED("mov", mov_cr_r, C, PRIV), [0x23] = NAMED("mov", mov_dr_r, C, PRIV),
    [0x30] = OPF(wrmsr, NONE, F1D(MSR), PRIV),
    [0x31] = OPF(rdtsc, NONE, F1D(TSC)),
    [0x32] = OPF(rdmsr, NONE, F1D(MSR), O_CPL0),
    [0x33] = OP(rdpmc, NONE),
    [0x34] = OPF(sysenter, NONE, F1D(SEP), O_END),
    [0x35] = OPF(sysexit, NONE, F1D(SEP), O_END),
    CC16(0x40, cmov, G_E, F1D(CMOV)),
    CC16(0x80, j, JV, 0, O_F64 | O_END),
    CC16(0x90, set, E, 0, O_BYTE),
    [0xa0] = OP(push_s, S, O_D64), [0xa1] = OP(pop_s, S, O_D64 | O_END),
    [0xa2] = OP(cpuid, NONE, O_END),
    [0xa3] = OP(bt, E_G),
    [0xa4] = OP(shld, E_G_I8), [0xa5] = NAMED("shld", shld_cl, E_G_CL),
    [0xa8] = OP(push_s, S, O_D64), [0xa9] = OP(pop_s, S, O_D64 | O_END),
    [0xaa] = OP(rsm, NONE, O_END),
    [0xab] = OP(bts, E_G, O_LOCK),
    [0xac] = OP(shrd, E_G_I8), [0xad] = NAMED("shrd", shrd_cl, E_G_CL),
    [0xae] = BY(O_MOD3, group15),
    [0xaf] = NAMED("imul", imul2, G_E),
    [0xb0] = OP(cmpxchg, E_G, O_BYTE | O_LOCK), [0xb1] = OP(cmpxchg, E_G, O_LOCK),
    [0xb2] = OP(lss, G_M, O_END),
    [0xb3] = OP(btr, E_G, O_LOCK),
    [0xb4] = OP(lfs, G_M, O_END), [0xb5] = OP(lgs, G_M, O_END),
    [0xb6] = NAMED("movzx", movzx8, G_E, O_DST8), [0xb7] = NAMED("movzx", movzx16, G_E, O_SRC16),
    [0xb8] = ONLY_F3(OPF(popcnt, G_E, F1C(POPCNT))),
    [0xb9] = { "ud1", NULL, NULL, NULL, 0, F_MODRM, 0 },
    [0xba] = BY(O_GROUP, group8),
    [0xbb] = OP(btc, E_G, O_LOCK),
    [0xbc] = BY(O_PREFIX, ROWS(OP(bsf, G_E), OP(bsf, G_E),
                               OPF(tzcnt, G_E, F7B(BMI1), O_ELSE0), OP(bsf, G_E))),
    [0xbd] = BY(O_PREFIX, ROWS(OP(bsr, G_E), OP(bsr, G_E),
                               OPF(lzcnt, G_E, F8C(ABM), O_ELSE0), OP(bsr, G_E))),
    [0xbe] = NAMED("movsx", movsx8, G_E, O_DST8), [0xbf] = NAMED("movsx", movsx16, G_E, O_SRC16),
    [0xc0] = OP(xadd, E_G, O_BYTE | O_LOCK), [0xc1] = OP(xadd, E_G, O_LOCK),
    [0xc3] = BY(O_MOD3, ROWS(ONLY_NP(NAMEDF("movnti", mov, E_G, F1D(SSE2), O_S32)), UD)),
    [0xc7] = BY(O_MOD3, group9),
    TIMES8(0xc8, OP(bswap, Z)),
    [0xff] = { "ud0", NULL, NULL, NULL, 0, F_MODRM, 0 },
#define OPVEC_MAP 0x0f
#include "opvec.h"
#undef OPVEC_MAP
},

[MAP_0F38] = {
    [0x82] = BY(O_PREFIX, ROWS(UD, OPF(invpcid, G_M, F7B(INVPCID), PRIV), UD, UD)),
    [0xf0] = BY(O_PREFIX, ROWS(OPF(movbe, G_M, F1C(MOVBE)), OPF(movbe, G_M, F1C(MOVBE)), UD,
                               OPF(crc32, G_E, F1C(SSE4_2), O_BYTE | O_GFULL))),
    [0xf1] = BY(O_PREFIX, ROWS(BY(O_MOD3, ROWS(OPF(movbe, E_G, F1C(MOVBE)), UD)),
                               BY(O_MOD3, ROWS(OPF(movbe, E_G, F1C(MOVBE)), UD)), UD,
                               OPF(crc32, G_E, F1C(SSE4_2)))),
    [0xf2] = ONLY_NP(OPF(andn, G_V_E, F7B(BMI1), O_VEX | O_S32)),
    [0xf3] = ONLY_NP(BY(O_GROUP, group17)),
    [0xf5] = BY(O_PREFIX, ROWS(OPF(bzhi, G_E_V, F7B(BMI2), O_VEX | O_S32), UD,
                               OPF(pext, G_V_E, F7B(BMI2), O_VEX | O_S32),
                               OPF(pdep, G_V_E, F7B(BMI2), O_VEX | O_S32))),
    [0xf6] = BY(O_PREFIX, ROWS(UD, OPF(adcx, G_E, F7B(ADX), O_S32 | O_NOVEX),
                               OPF(adox, G_E, F7B(ADX), O_S32 | O_NOVEX),
                               OPF(mulx, G_V_E, F7B(BMI2), O_VEX | O_S32))),
    [0xf7] = BY(O_PREFIX, ROWS(OPF(bextr, G_E_V, F7B(BMI1), O_VEX | O_S32),
                               OPF(shlx, G_E_V, F7B(BMI2), O_VEX | O_S32),
                               OPF(sarx, G_E_V, F7B(BMI2), O_VEX | O_S32),
                               OPF(shrx, G_E_V, F7B(BMI2), O_VEX | O_S32))),
#define OPVEC_MAP 0x0f38
#include "opvec.h"
#undef OPVEC_MAP
},

[MAP_0F3A] = {
    [0xf0] = BY(O_PREFIX, ROWS(UD, UD, UD, OPF(rorx, G_E_I8, F7B(BMI2), O_VEX | O_S32))),
#define OPVEC_MAP 0x0f3a
#include "opvec.h"
#undef OPVEC_MAP
},

};

/* ---- the table as text -------------------------------------------------------------------------- */

static const char *const form_text[F_MAX] = {
    [F_NONE] = "", [F_E_G] = "E,G", [F_G_E] = "G,E", [F_A_I] = "A,I", [F_E_I] = "E,I",
    [F_E_I8] = "E,Ib", [F_G_E_I] = "G,E,I", [F_G_E_I8] = "G,E,Ib", [F_E] = "E", [F_E_1] = "E,1",
    [F_E_CL] = "E,CL", [F_E_G_I8] = "E,G,Ib", [F_E_G_CL] = "E,G,CL", [F_Z] = "Z", [F_Z_I] = "Z,I",
    [F_A_Z] = "A,Z", [F_I] = "I", [F_I8] = "Ib", [F_I16] = "Iw", [F_I16_I8] = "Iw,Ib",
    [F_J8] = "Jb", [F_JV] = "J", [F_M] = "M", [F_G_M] = "G,M", [F_R] = "R", [F_A_O] = "A,O",
    [F_O_A] = "O,A", [F_A_I8PORT] = "Ib", [F_A_DX] = "DX", [F_FAR] = "far", [F_E_S] = "E,S",
    [F_S_E] = "S,E", [F_C] = "control", [F_STR] = "string", [F_XLAT] = "", [F_MODRM] = "ModRM",
    [F_MODRM_I8] = "ModRM,Ib", [F_S] = "S", [F_G_V_E] = "G,V,E", [F_G_E_V] = "G,E,V",
    [F_V_E] = "V,E", [F_X87] = "x87", [F_MMX] = "mmx", [F_MMX_I8] = "mmx,Ib", [F_MMX_DI] = "mmx,DI",
    [F_V_W] = "V,W", [F_V_W_I8] = "V,W,Ib", [F_V_H_W] = "V,H,W", [F_V_H_W_I8] = "V,H,W,Ib",
    [F_W_V] = "W,V", [F_W_H_V] = "W,H,V", [F_W_V_I8] = "W,V,Ib", [F_H_W_I8] = "H,W,Ib",
    [F_V_X] = "V,X", [F_V_H_X] = "V,H,X", [F_V_H_X_I8] = "V,H,X,Ib", [F_X_V] = "X,V",
    [F_X_V_I8] = "X,V,Ib", [F_G_W] = "G,W", [F_G_W_I8] = "G,W,Ib", [F_V_W_DI] = "V,W",
};
/* clang-format on */

#define O_SELECT (O_GROUP | O_MOD3 | O_PREFIX | O_RM | O_REXW | O_CODE | O_ENC | O_REXB)

static unsigned nr_rows(const struct op *op)
{
    return op->flags & (O_GROUP | O_RM) ? 8 : op->flags & O_PREFIX ? 4 : 2;
}

static void describe(const struct op *op, unsigned n, char *text, unsigned size)
{
    static const char *const prefix[4] = {"np", "66", "f3", "f2"};
    unsigned used = (unsigned)strlen(text);

    if (op->flags & O_GROUP)
        snprintf(text + used, size - used, " /%u", n);
    else if (op->flags & O_RM)
        snprintf(text + used, size - used, " rm%u", n);
    else if (op->flags & O_MOD3)
        snprintf(text + used, size - used, " %s", n ? "reg" : "mem");
    else if (op->flags & O_PREFIX)
        snprintf(text + used, size - used, " %s", prefix[n]);
    else if (op->flags & O_CODE)
        snprintf(text + used, size - used, " %s", n ? "64" : "16/32");
    else if (op->flags & O_ENC)
        snprintf(text + used, size - used, " %s", n ? "vex" : "legacy");
    else
        snprintf(text + used, size - used, " %c%u", op->flags & O_REXW ? 'W' : 'B', n);
}

/* Which encodings a vector row has. */
static void describe_encodings(const struct op *op, char *text, unsigned size)
{
    static const char *const name[] = {" sse", " vex128", " vex256"};

    for (unsigned enc = 0; op->flags & O_SSE && enc < 3; enc++) {
        bool there = false;
        for (unsigned kind = 0; kind < K_MAX; kind++)
            there |= op->body->fn[kind][enc] != NULL;
        if (there)
            snprintf(text + strlen(text), size - strlen(text), "%s", name[enc]);
    }
}

/* Writes row *n of the rows below op, or counts *n down by their number; returns the row found. */
static const struct op *find_row(const struct op *op, const char *where, u32 flags, unsigned form,
                                 int *n, char *row, unsigned size)
{
    flags |= op->flags;
    form = op->form ? op->form : form;
    if (!op->sub) {
        if (!op->name || (*n)-- != 0)
            return NULL;
        snprintf(row, size, "%s%s %s%s%s%s%s%s", flags & O_VEX ? "vex " : "", where, op->name,
                 *form_text[form] ? " " : "", form_text[form], flags & O_BYTE ? " 8-bit" : "",
                 flags & O_LOCK ? " lock" : "", flags & O_CPL0 ? " cpl0" : "");
        describe_encodings(op, row, size);
        return op;
    }
    for (unsigned k = 0; k < nr_rows(op); k++) {
        char below[64];
        snprintf(below, sizeof(below), "%s", where);
        describe(op, k, below, sizeof(below));
        const struct op *found =
            find_row(&op->sub[k], below, flags & ~(u32)O_SELECT, form, n, row, size);
        if (found)
            return found;
    }
    return NULL;
}

static const struct op *row_of(int n, char *row, unsigned size)
{
    static const char *const escape[NR_MAPS] = {"", "0f ", "0f38 ", "0f3a "};

    for (unsigned map = 0; map < NR_MAPS; map++) {
        for (unsigned opcode = 0; opcode < 256; opcode++) {
            char where[16];
            snprintf(where, sizeof(where), "%s%02x", escape[map], opcode);
            const struct op *op =
                find_row(&opcode_map[map][opcode], where, 0, F_NONE, &n, row, size);
            if (op)
                return op;
        }
    }
    return NULL;
}

const char *cpu_insn_row(int n)
{
    static _Thread_local char row[128];

    return row_of(n, row, sizeof(row)) ? row : NULL;
}

int cpu_insn_feature(int n)
{
    char row[128];
    const struct op *op = row_of(n, row, sizeof(row));

    return op && op->feature ? op->feature & 0x3ff : -1;
}
