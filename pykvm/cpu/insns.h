/* SPDX-License-Identifier: MIT */
/*
 * The handlers the instruction table names.  For every operation there may be
 *   b_<name>  a table of handlers specialised by operand kind and size, and
 *   x_<name>  one handler for every kind and size;
 * decoding takes b_<name>.fn[kind][log2 size] where that exists, x_<name> otherwise.  All are
 * weak: an operation without a handler is undefined (#UD).
 *
 * Kinds by form (what dst, src and imm hold for a handler of b_):
 *   E,G     K_RR dst = rm, src = reg     K_MR src = reg
 *   G,E     K_RR dst = reg, src = rm     K_RM dst = reg            (G,M: K_RM)
 *   G,E,I   as G,E, and imm
 *   A,I  Z,I  I  I8  J    K_RI           moffs: K_RM dst = 0, K_MR src = 0
 *   E,I  E,I8  E,1        K_RI, K_MI     (E,1: imm = 1)
 *   E,CL    K_RR src = offset of CL      K_MR
 *   E,G,I8  K_RI, K_MI: src = reg, imm   E,G,CL: K_RR, K_MR: src = reg, the count is CL
 *   E       K_R, K_M                     Z: K_R        M: K_M       A,Z: K_RR dst = Z, src = 0
 *   strings: K_R without, K_M with REP or REPNE
 *   none    K_R (size: operand size)
 * For a handler x_: dst = rm (register form), src = reg, whatever the direction; other forms as
 * above.  VEX: vvvv is a register number.
 */
#ifndef PYKVM_INSNS_H
#define PYKVM_INSNS_H

#include "core.h"

/* Conditions in the order of their codes; insn.vvvv holds the code. */
#define CONDITIONS(X)                                                                              \
    X(o) X(no) X(b) X(ae) X(e) X(ne) X(be) X(a) X(s) X(ns) X(p) X(np) X(l) X(ge) X(le) X(g)

/* clang-format off */
#define ALU_INSNS(X)                                                                               \
    X(add) X(or) X(adc) X(sbb) X(and) X(sub) X(xor) X(cmp) X(test)                                 \
    X(inc) X(dec) X(neg) X(not)                                                                    \
    X(mul) X(imul) X(div) X(idiv)    /* one operand: E */                                          \
    X(imul2)                         /* G,E */                                                     \
    X(imul3)                         /* G,E,I */                                                   \
    X(rol) X(ror) X(rcl) X(rcr) X(shl) X(shr) X(sar)                                               \
    X(shld) X(shrd)                  /* E,G,I8 */                                                  \
    X(shld_cl) X(shrd_cl)            /* E,G,CL; b_shld serves both */                              \
    X(bt) X(bts) X(btr) X(btc)       /* E,G (bit string in memory) and E,I8 */                     \
    X(bsf) X(bsr) X(popcnt) X(lzcnt) X(tzcnt)                                                      \
    X(andn) X(pdep) X(pext)          /* G,V,E: dst = V op E, vvvv the first source */              \
    X(bextr) X(bzhi) X(shlx) X(shrx) X(sarx) /* G,E,V: vvvv the control or count */                \
    X(blsr) X(blsmsk) X(blsi)        /* V,E: b_: dst = the register of vvvv */                     \
    X(mulx)                          /* G,V,E: high half to dst, low half to vvvv */               \
    X(rorx)                          /* G,E,I8 */                                                  \
    X(adcx) X(adox) X(crc32)         /* G,E; crc32: size is that of E, G is 32 bits zero-ext. */   \
    X(aaa) X(aas) X(aam) X(aad) X(daa) X(das) X(salc)                                              \
    X(cbw)                           /* cbw cwde cdqe by operand size */                           \
    X(cwd)                           /* cwd cdq cqo */                                             \
    X(bswap) X(rdrand) X(rdseed)

#define MOV_INSNS(X)                                                                               \
    X(mov) X(movbe) X(xchg) X(xadd) X(cmpxchg)                                                     \
    X(cmpxchg8b)                     /* opsize 8: CMPXCHG16B */                                    \
    X(movzx8) X(movzx16) X(movsx8) X(movsx16) /* opsize is the destination's */                    \
    X(movsxd)                        /* source 32 bits (16 with opsize 2) */                       \
    X(lea) X(xlat) X(lahf) X(sahf) X(clc) X(stc) X(cmc) X(cld) X(std)                              \
    X(cmovcc) X(setcc)               /* fall-backs of the 16 conditional ones, code in vvvv */

#define STACK_INSNS(X)                                                                             \
    X(push) X(pop) X(pusha) X(popa) X(enter) X(leave) X(bound)

#define BRANCH_INSNS(X)                                                                            \
    X(jmp) X(call)                   /* J */                                                       \
    X(jmp_e) X(call_e)               /* near, E */                                                 \
    X(ret)                           /* imm bytes released, 0 for C3 */                            \
    X(loopne) X(loope) X(loop) X(jcxz)                                                             \
    X(jcc)                           /* fall-back, code in vvvv */

#define STRING_INSNS(X) X(movs) X(cmps) X(stos) X(lods) X(scas)

#define IO_INSNS(X)                                                                                \
    X(in) X(out)                     /* port: imm */                                               \
    X(in_dx) X(out_dx) X(ins) X(outs)

#define SEGMENT_INSNS(X)                                                                           \
    X(mov_e_s) X(mov_s_e) X(push_s) X(pop_s) /* src = segment register number */                   \
    X(les) X(lds) X(lss) X(lfs) X(lgs) /* G,M */                                                   \
    X(jmp_far) X(call_far)           /* ptr16:16/32: imm = offset, disp = selector */              \
    X(jmp_far_m) X(call_far_m)       /* m16:16/32/64 */                                            \
    X(ret_far)                       /* imm bytes released */                                      \
    X(iret) X(int) X(int3) X(into) X(int1)                                                         \
    X(sldt) X(str) X(lldt) X(ltr) X(verr) X(verw) X(lar) X(lsl) X(arpl)                            \
    X(sgdt) X(sidt) X(lgdt) X(lidt)                                                                \
    X(syscall) X(sysret) X(sysenter) X(sysexit) X(swapgs)                                          \
    X(rdfsbase) X(rdgsbase) X(wrfsbase) X(wrgsbase)

#define SYSTEM_INSNS(X)                                                                            \
    X(mov_r_cr) X(mov_cr_r) X(mov_r_dr) X(mov_dr_r) /* src = CR/DR number, dst = GPR offset */     \
    X(smsw) X(lmsw) X(clts) X(invlpg) X(invpcid)                                                   \
    X(rdmsr) X(wrmsr) X(cpuid) X(rdtsc) X(rdtscp) X(rdpmc) X(rdpid)                                \
    X(hlt) X(invd) X(wbinvd) X(cli) X(sti) X(clac) X(stac) X(pushf) X(popf)                        \
    X(vmcall) X(vmmcall) X(xgetbv) X(xsetbv) X(monitor) X(mwait) X(pause) X(rsm)                   \
    X(rdpkru) X(wrpkru)                                                                            \
    X(lfence) X(mfence) X(sfence) X(clflush) X(clflushopt) X(clwb) X(serialize)                    \
    X(nop) X(prefetch)

#define FPU_INSNS(X)                                                                               \
    X(x87) X(fcmov) X(fcomi)         /* registers, by the stub of insn.imm */                       \
    X(x87_ld16) X(x87_ld32) X(x87_ld64) X(x87_ld80) /* a memory source, the same */                \
    X(x87_st16) X(x87_st32) X(x87_st64) X(x87_st80)                                                \
    X(fnop87) X(fwait) X(fldcw) X(fnstcw) X(fnstsw) X(fnstsw_ax) X(fnclex) X(fninit)               \
    X(fnstenv) X(fldenv) X(fnsave) X(frstor) X(x87_unusable) X(mmx_unusable)                       \
    X(fxsave) X(fxrstor) X(xsave) X(xsaveopt) X(xsavec) X(xsaves) X(xrstor) X(xrstors)

#define INSNS(X)                                                                                   \
    ALU_INSNS(X) MOV_INSNS(X) STACK_INSNS(X) BRANCH_INSNS(X) STRING_INSNS(X) IO_INSNS(X)           \
    SEGMENT_INSNS(X) SYSTEM_INSNS(X) FPU_INSNS(X)
/* clang-format on */

#define WEAK __attribute__((weak))
#define DECLARE_INSN(name)                                                                         \
    extern const struct body b_##name WEAK;                                                        \
    WEAK int x_##name(struct cpu *cpu, const struct insn *i);
#define DECLARE_CONDITION(cc) DECLARE_INSN(j##cc) DECLARE_INSN(set##cc) DECLARE_INSN(cmov##cc)

INSNS(DECLARE_INSN)
CONDITIONS(DECLARE_CONDITION)

/* optable.c: the four opcode maps; VEX maps 1 to 3 are the last three. */
enum { MAP_1, MAP_0F, MAP_0F38, MAP_0F3A, NR_MAPS };
extern const struct op opcode_map[NR_MAPS][256];

#endif
