/* SPDX-License-Identifier: MIT */
/*
 * Vector instructions: SSE to SSE4.2, AES, PCLMULQDQ, SHA, AVX, AVX2, FMA, F16C.
 *
 * They are executed by the very same host instruction: operands from guest.fpu.ymm, or from
 * memory, into host registers, result back.  What a host without the feature cannot execute is
 * not offered (cpu_host_features()).
 *
 * The handlers of an operation are b_<name>.fn[kind][encoding]: kind K_RR for registers only,
 * K_RM for a memory source, K_MR for a memory destination; encoding ENC_*.  A NULL is an
 * encoding that does not exist.
 *
 * Host instructions are spelled in assembler and not with intrinsics: the compiler exchanges the
 * operands of an addition, but which NaN comes out depends on their order; and it knows nothing
 * of MXCSR.  Registers are always written whole (16 or 32 bytes): a narrow store followed by a
 * wide load of the next instruction would stall.
 */
#ifndef PYKVM_VECTOR_H
#define PYKVM_VECTOR_H

#include "body.h"

/* PKRU in the standard format of the XSAVE area; processors differ here. */
#define XSAVE_PKRU_OFFSET 2688

enum encoding { ENC_LEGACY, ENC_VEX128, ENC_VEX256 };

/* ---- operands -------------------------------------------------------------------------------- */

struct vec {
    u8 b[32];
} __attribute__((may_alias));

/* A register by what decode put into insn.vd, va, vb. */
#define VREG(cpu, off) ((void *)((u8 *)(cpu)->vmcs.guest.fpu.ymm + (off)))
#define VEC(p) (*(struct vec *)(p))
#define VREG_SIZE 32
#define V_SCRATCH (u16)(offsetof(struct cpu, vscratch) - offsetof(struct cpu, vmcs.guest.fpu.ymm))
_Static_assert(offsetof(struct cpu, vmcs.guest.fpu.ymm) % 32 == 0, "movaps, and no split lines");
_Static_assert(offsetof(struct cpu, vscratch) - offsetof(struct cpu, vmcs.guest.fpu.ymm) < 0x10000,
               "reached by insn.vb");

/* The memory operand in host memory; false: it takes the slow way to get there. */
static ALWAYS_INLINE bool v_operand(struct cpu *cpu, const struct insn *i, const struct tlbe *tlb,
                                    unsigned size, unsigned align, void **p)
{
    u64 la;
    if (unlikely(!operand_linear(cpu, i, size, 0, true, &la)))
        return false;
    if (align > 1 && unlikely(la & (align - 1)))
        return false;
    const struct tlbe *e = &tlb[TLB_INDEX(la)];
    *p = (void *)(uintptr_t)(la + e->addend);
    return tlb_hit(e, la, size);
}
static ALWAYS_INLINE bool v_source(struct cpu *cpu, const struct insn *i, unsigned size,
                                   unsigned align, const void **p)
{
    return v_operand(cpu, i, cpu->tlb->r, size, align, (void **)p);
}
static ALWAYS_INLINE bool v_target(struct cpu *cpu, const struct insn *i, unsigned size,
                                   unsigned align, void **p)
{
    return v_operand(cpu, i, cpu->tlb->w, size, align, p);
}

/* Any memory operand. align: #GP(0) unless aligned so. */
bool v_read(struct cpu *cpu, const struct insn *i, void *p, unsigned size, unsigned align);
bool v_write(struct cpu *cpu, const struct insn *i, const void *p, unsigned size, unsigned align);
/* Reads the memory operand into cpu->vscratch and does fn with that as its register operand. */
int v_load_slow(struct cpu *cpu, const struct insn *i, insn_fn fn, unsigned size, unsigned align);
int v_store_slow(struct cpu *cpu, const struct insn *i, const void *p, unsigned size,
                 unsigned align);
/* Handler behind fn when an instruction is executed by itself. */
int v_end(struct cpu *cpu, const struct insn *i);

/* ---- MXCSR ----------------------------------------------------------------------------------- */

#define MXCSR_FLAGS 0x003fu
#define MXCSR_DAZ 0x0040u
#define MXCSR_MASKS 0x1f80u
#define MXCSR_MASKS_SHIFT 7
#define MXCSR_FTZ 0x8000u
#define MXCSR_IE 0x01u
#define MXCSR_DE 0x02u
#define MXCSR_ZE 0x04u
#define MXCSR_OE 0x08u
#define MXCSR_UE 0x10u
#define MXCSR_PE 0x20u

/*
 * In guest mode the exception flags live in the host's MXCSR: mxcsr_sync() before anything reads
 * guest.fpu.mxcsr (FXSAVE, XSAVE, STMXCSR), mxcsr_load() after anything wrote it (FXRSTOR, XRSTOR,
 * LDMXCSR).  mxcsr_load() says whether cpu->mode changed: end the block with LOOKUP then.
 */
void mxcsr_sync(struct cpu *cpu);
bool mxcsr_load(struct cpu *cpu);

/* ---- building handlers --------------------------------------------------------------------------
 *
 * CODE is the assembler text: %[d] the destination, %[a] the first source (VEX), %[b] the last
 * source, register or memory.  xmm0 to xmm3 are free.
 */
#define V_CLOBBERS "xmm0", "xmm1", "xmm2", "xmm3", "memory"
#define V_ASM_DB(code, p)                                                                          \
    __asm__ volatile(code : : [d] "m"(VEC(VREG(cpu, i->vd))), [b] "m"(VEC(p)) : V_CLOBBERS)
#define V_ASM_DAB(code, p)                                                                         \
    __asm__ volatile(                                                                              \
        code                                                                                       \
        :                                                                                          \
        : [d] "m"(VEC(VREG(cpu, i->vd))), [a] "m"(VEC(VREG(cpu, i->va))), [b] "m"(VEC(p))          \
        : V_CLOBBERS)
/* The immediate is part of an instruction: stubs has one, 8 bytes long, for each of its values. */
#define V_ASM_STUB(before, operands, stub, after, ...)                                             \
    __asm__ volatile(before "\n\tlea -128(%%rsp), %%rsp\n\tcall *%[f]\n\t"                         \
                            "lea 128(%%rsp), %%rsp\n\t" after                                      \
                     :                                                                             \
                     : operands, [f] "r"(stub)                                                     \
                     : V_CLOBBERS __VA_OPT__(, ) __VA_ARGS__)
#define V_OPERANDS_DB(p) [d] "m"(VEC(VREG(cpu, i->vd))), [b] "m"(VEC(p))
#define V_OPERANDS_DAB(p)                                                                          \
    [d] "m"(VEC(VREG(cpu, i->vd))), [a] "m"(VEC(VREG(cpu, i->va))), [b] "m"(VEC(p))
#define COMMA ,

#define DEFINE_STUBS(name, n, insn)                                                                \
    extern const u8 stubs_##name[] __attribute__((visibility("hidden")));                          \
    __asm__(".pushsection .text\n"                                                                 \
            ".globl stubs_" #name "\n.hidden stubs_" #name "\n"                                    \
            ".balign 64\nstubs_" #name ":\n"                                                       \
            ".set .Limm, 0\n.rept " #n "\n.balign 8\n" insn "\nret\n"                              \
            ".set .Limm, .Limm + 1\n.endr\n"                                                       \
            ".popsection\n");
#define STUB(name, imm) (stubs_##name + (size_t)(imm) * 8)

/* Register and memory form of the same text. */
#define V_PAIR(name, size, align, ...)                                                             \
    static int name##_rr(struct cpu *cpu, const struct insn *i)                                    \
    {                                                                                              \
        const void *p = VREG(cpu, i->vb);                                                          \
        __VA_ARGS__;                                                                               \
        NEXT(cpu, i);                                                                              \
    }                                                                                              \
    static int name##_rm(struct cpu *cpu, const struct insn *i)                                    \
    {                                                                                              \
        const void *p;                                                                             \
        if (unlikely(!v_source(cpu, i, size, align, &p)))                                          \
            return v_load_slow(cpu, i, name##_rr, size, align);                                    \
        __VA_ARGS__;                                                                               \
        NEXT(cpu, i);                                                                              \
    }

/* d = d op b, d = op b; VEX: d = a op b. The upper half is cleared by storing ymm0. */
#define V_LEGACY_BINARY(name, insn, size, align)                                                   \
    V_PAIR(name##_l, size, align,                                                                  \
           V_ASM_DB("movaps %[d], %%xmm0\n\t" insn " %[b], %%xmm0\n\tmovaps %%xmm0, %[d]", p))
#define V_LEGACY_UNARY(name, insn, size, align)                                                    \
    V_PAIR(name##_l, size, align, V_ASM_DB(insn " %[b], %%xmm0\n\tmovaps %%xmm0, %[d]", p))
#define V_VEX128_BINARY(name, insn, size)                                                          \
    V_PAIR(name##_v, size, 1,                                                                      \
           V_ASM_DAB("vmovaps %[a], %%xmm0\n\t" insn " %[b], %%xmm0, %%xmm0\n\t"                   \
                     "vmovaps %%ymm0, %[d]",                                                       \
                     p))
#define V_VEX128_UNARY(name, insn, size)                                                           \
    V_PAIR(name##_v, size, 1, V_ASM_DB(insn " %[b], %%xmm0\n\tvmovaps %%ymm0, %[d]", p))
#define V_VEX256_BINARY(name, insn, size)                                                          \
    V_PAIR(name##_y, size, 1,                                                                      \
           V_ASM_DAB("vmovaps %[a], %%ymm0\n\t" insn " %[b], %%ymm0, %%ymm0\n\t"                   \
                     "vmovaps %%ymm0, %[d]\n\tvzeroupper",                                         \
                     p))
#define V_VEX256_UNARY(name, insn, size)                                                           \
    V_PAIR(name##_y, size, 1,                                                                      \
           V_ASM_DB(insn " %[b], %%ymm0\n\tvmovaps %%ymm0, %[d]\n\tvzeroupper", p))

/* With immediate: stubs work on xmm1 (b) and xmm0 (first source and result). load: b to xmm1 */
#define V_LEGACY_BINARY_IMM(name, load, size, align)                                               \
    V_PAIR(name##_l, size, align,                                                                  \
           V_ASM_STUB(load " %[b], %%xmm1\n\tmovaps %[d], %%xmm0", V_OPERANDS_DB(p),               \
                      STUB(name##_l, i->imm8), "movaps %%xmm0, %[d]"))
#define V_LEGACY_UNARY_IMM(name, load, size, align)                                                \
    V_PAIR(name##_l, size, align,                                                                  \
           V_ASM_STUB(load " %[b], %%xmm1", V_OPERANDS_DB(p), STUB(name##_l, i->imm8),             \
                      "movaps %%xmm0, %[d]"))
#define V_VEX128_BINARY_IMM(name, load, size)                                                      \
    V_PAIR(name##_v, size, 1,                                                                      \
           V_ASM_STUB("v" load " %[b], %%xmm1\n\tvmovaps %[a], %%xmm0", V_OPERANDS_DAB(p),         \
                      STUB(name##_v, i->imm8), "vmovaps %%ymm0, %[d]"))
#define V_VEX128_UNARY_IMM(name, load, size)                                                       \
    V_PAIR(name##_v, size, 1,                                                                      \
           V_ASM_STUB("v" load " %[b], %%xmm1", V_OPERANDS_DB(p), STUB(name##_v, i->imm8),         \
                      "vmovaps %%ymm0, %[d]"))
#define V_VEX256_BINARY_IMM(name)                                                                  \
    V_PAIR(name##_y, 32, 1,                                                                        \
           V_ASM_STUB("vmovups %[b], %%ymm1\n\tvmovaps %[a], %%ymm0", V_OPERANDS_DAB(p),           \
                      STUB(name##_y, i->imm8), "vmovaps %%ymm0, %[d]\n\tvzeroupper"))
#define V_VEX256_UNARY_IMM(name)                                                                   \
    V_PAIR(name##_y, 32, 1,                                                                        \
           V_ASM_STUB("vmovups %[b], %%ymm1", V_OPERANDS_DB(p), STUB(name##_y, i->imm8),           \
                      "vmovaps %%ymm0, %[d]\n\tvzeroupper"))

/* Rows: the handlers of the three encodings. */
#define V_ROWS(l, v, y)                                                                            \
    {                                                                                              \
        {                                                                                          \
            [K_RR] = {l##_rr, v##_rr, y##_rr}, [K_RM] = {l##_rm, v##_rm, y##_rm},                  \
        }                                                                                          \
    }
#define V_ALL(name) const struct body b_##name = V_ROWS(name##_l, name##_v, name##_y);
#define none_rr NULL
#define none_rm NULL
#define V_128(name) const struct body b_##name = V_ROWS(name##_l, name##_v, none);
#define V_LIG(name) const struct body b_##name = V_ROWS(name##_l, name##_v, name##_v);
#define V_LEGACY(name) const struct body b_##name = V_ROWS(name##_l, none, none);
#define V_VEX(name) const struct body b_##name = V_ROWS(none, name##_v, name##_y);
#define V_VEX_LIG(name) const struct body b_##name = V_ROWS(none, name##_v, name##_v);
#define V_VEX_128(name) const struct body b_##name = V_ROWS(none, name##_v, none);
#define V_VEX_256(name) const struct body b_##name = V_ROWS(none, none, name##_y);

/* The common shapes: whole registers, 128 and 256 bits. */
#define V_BINARY(name)                                                                             \
    V_LEGACY_BINARY(name, #name, 16, 16)                                                           \
    V_VEX128_BINARY(name, "v" #name, 16)                                                           \
    V_VEX256_BINARY(name, "v" #name, 32)                                                           \
    V_ALL(name)
#define V_BINARY_128(name)                                                                         \
    V_LEGACY_BINARY(name, #name, 16, 16)                                                           \
    V_VEX128_BINARY(name, "v" #name, 16)                                                           \
    V_128(name)
#define V_UNARY(name)                                                                              \
    V_LEGACY_UNARY(name, #name, 16, 16)                                                            \
    V_VEX128_UNARY(name, "v" #name, 16)                                                            \
    V_VEX256_UNARY(name, "v" #name, 32)                                                            \
    V_ALL(name)
#define V_UNARY_128(name)                                                                          \
    V_LEGACY_UNARY(name, #name, 16, 16)                                                            \
    V_VEX128_UNARY(name, "v" #name, 16)                                                            \
    V_128(name)
/* One element of size bytes; VEX.L is ignored. */
#define V_SCALAR(name, size)                                                                       \
    V_LEGACY_BINARY(name, #name, size, 1)                                                          \
    V_VEX128_BINARY(name, "v" #name, size)                                                         \
    V_LIG(name)

#define V_BINARY_IMM_STUBS(name)                                                                   \
    DEFINE_STUBS(name##_l, 256, #name " $.Limm, %xmm1, %xmm0")                                     \
    DEFINE_STUBS(name##_v, 256, "v" #name " $.Limm, %xmm1, %xmm0, %xmm0")
#define V_UNARY_IMM_STUBS(name)                                                                    \
    DEFINE_STUBS(name##_l, 256, #name " $.Limm, %xmm1, %xmm0")                                     \
    DEFINE_STUBS(name##_v, 256, "v" #name " $.Limm, %xmm1, %xmm0")
#define V_BINARY_IMM(name)                                                                         \
    V_BINARY_IMM_STUBS(name)                                                                       \
    DEFINE_STUBS(name##_y, 256, "v" #name " $.Limm, %ymm1, %ymm0, %ymm0")                          \
    V_LEGACY_BINARY_IMM(name, "movups", 16, 16)                                                    \
    V_VEX128_BINARY_IMM(name, "movups", 16)                                                        \
    V_VEX256_BINARY_IMM(name)                                                                      \
    V_ALL(name)
#define V_BINARY_IMM_128(name)                                                                     \
    V_BINARY_IMM_STUBS(name)                                                                       \
    V_LEGACY_BINARY_IMM(name, "movups", 16, 16)                                                    \
    V_VEX128_BINARY_IMM(name, "movups", 16)                                                        \
    V_128(name)
#define V_UNARY_IMM(name)                                                                          \
    V_UNARY_IMM_STUBS(name)                                                                        \
    DEFINE_STUBS(name##_y, 256, "v" #name " $.Limm, %ymm1, %ymm0")                                 \
    V_LEGACY_UNARY_IMM(name, "movups", 16, 16)                                                     \
    V_VEX128_UNARY_IMM(name, "movups", 16)                                                         \
    V_VEX256_UNARY_IMM(name)                                                                       \
    V_ALL(name)
/* load: movss or movsd, by the size of the element */
#define V_SCALAR_IMM(name, load, size)                                                             \
    V_BINARY_IMM_STUBS(name)                                                                       \
    V_LEGACY_BINARY_IMM(name, load, size, 1)                                                       \
    V_VEX128_BINARY_IMM(name, load, size)                                                          \
    V_LIG(name)

/* The only VEX encodings. */
#define V_VEX_BINARY(name)                                                                         \
    V_VEX128_BINARY(name, #name, 16)                                                               \
    V_VEX256_BINARY(name, #name, 32)                                                               \
    V_VEX(name)
#define V_VEX_UNARY_IMM(name)                                                                      \
    DEFINE_STUBS(name##_v, 256, #name " $.Limm, %xmm1, %xmm0")                                     \
    DEFINE_STUBS(name##_y, 256, #name " $.Limm, %ymm1, %ymm0")                                     \
    V_VEX128_UNARY_IMM(name, "movups", 16)                                                         \
    V_VEX256_UNARY_IMM(name)                                                                       \
    V_VEX(name)
#define V_VEX_BINARY_IMM(name)                                                                     \
    DEFINE_STUBS(name##_v, 256, #name " $.Limm, %xmm1, %xmm0, %xmm0")                              \
    DEFINE_STUBS(name##_y, 256, #name " $.Limm, %ymm1, %ymm0, %ymm0")                              \
    V_VEX128_BINARY_IMM(name, "movups", 16)                                                        \
    V_VEX256_BINARY_IMM(name)                                                                      \
    V_VEX(name)

/* ---- what there is --------------------------------------------------------------------------- */

/* clang-format off */
#define SSE_MOVES(X)                                                                               \
    X(extractps) X(insertps) X(lddqu) X(ldmxcsr) X(maskmovdqu) X(movaps) X(movd) X(movd_e)         \
    X(movddup) X(movhlps) X(movhps) X(movlhps) X(movlps) X(movmskpd) X(movmskps) X(movntdqa)       \
    X(movntps) X(movq) X(movsd) X(movshdup) X(movsldup) X(movss) X(movups) X(pextrb) X(pextrd)     \
    X(pextrw) X(pextrw_g) X(pinsrb) X(pinsrd) X(pinsrw) X(pmovmskb) X(stmxcsr)
#define SSE_INTEGERS(X)                                                                            \
    X(andnpd) X(andnps) X(andpd) X(andps) X(blendpd) X(blendps) X(blendvpd) X(blendvps)            \
    X(mpsadbw) X(orpd) X(orps) X(pabsb) X(pabsd) X(pabsw) X(packssdw) X(packsswb) X(packusdw)      \
    X(packuswb) X(paddb) X(paddd) X(paddq) X(paddsb) X(paddsw) X(paddusb) X(paddusw) X(paddw)      \
    X(palignr) X(pand) X(pandn) X(pavgb) X(pavgw) X(pblendvb) X(pblendw) X(pcmpeqb) X(pcmpeqd)     \
    X(pcmpeqq) X(pcmpeqw) X(pcmpgtb) X(pcmpgtd) X(pcmpgtq) X(pcmpgtw) X(phaddd) X(phaddsw)         \
    X(phaddw) X(phminposuw) X(phsubd) X(phsubsw) X(phsubw) X(pmaddubsw) X(pmaddwd) X(pmaxsb)       \
    X(pmaxsd) X(pmaxsw) X(pmaxub) X(pmaxud) X(pmaxuw) X(pminsb) X(pminsd) X(pminsw) X(pminub)      \
    X(pminud) X(pminuw) X(pmovsxbd) X(pmovsxbq) X(pmovsxbw) X(pmovsxdq) X(pmovsxwd) X(pmovsxwq)    \
    X(pmovzxbd) X(pmovzxbq) X(pmovzxbw) X(pmovzxdq) X(pmovzxwd) X(pmovzxwq) X(pmuldq)              \
    X(pmulhrsw) X(pmulhuw) X(pmulhw) X(pmulld) X(pmullw) X(pmuludq) X(por) X(psadbw) X(pshufb)     \
    X(pshufd) X(pshufhw) X(pshuflw) X(psignb) X(psignd) X(psignw) X(pslld) X(pslld_imm)            \
    X(pslldq_imm) X(psllq) X(psllq_imm) X(psllw) X(psllw_imm) X(psrad) X(psrad_imm) X(psraw)       \
    X(psraw_imm) X(psrld) X(psrld_imm) X(psrldq_imm) X(psrlq) X(psrlq_imm) X(psrlw) X(psrlw_imm)   \
    X(psubb) X(psubd) X(psubq) X(psubsb) X(psubsw) X(psubusb) X(psubusw) X(psubw) X(ptest)         \
    X(punpckhbw) X(punpckhdq) X(punpckhqdq) X(punpckhwd) X(punpcklbw) X(punpckldq) X(punpcklqdq)   \
    X(punpcklwd) X(pxor) X(shufpd) X(shufps) X(unpckhpd) X(unpckhps) X(unpcklpd) X(unpcklps)       \
    X(vblendvpd) X(vblendvps) X(vpblendvb) X(vtestpd) X(vtestps) X(xorpd) X(xorps)
#define SSE_FLOATS(X)                                                                              \
    X(addpd) X(addps) X(addsd) X(addss) X(addsubpd) X(addsubps) X(cmppd) X(cmpps) X(cmpsd)         \
    X(cmpss) X(comisd) X(comiss) X(cvtdq2pd) X(cvtdq2ps) X(cvtpd2dq) X(cvtpd2ps) X(cvtps2dq)       \
    X(cvtps2pd) X(cvtsd2si) X(cvtsd2ss) X(cvtsi2sd) X(cvtsi2ss) X(cvtss2sd) X(cvtss2si)            \
    X(cvttpd2dq) X(cvttps2dq) X(cvttsd2si) X(cvttss2si) X(divpd) X(divps) X(divsd) X(divss)        \
    X(dppd) X(dpps) X(haddpd) X(haddps) X(hsubpd) X(hsubps) X(maxpd) X(maxps) X(maxsd) X(maxss)    \
    X(minpd) X(minps) X(minsd) X(minss) X(mulpd) X(mulps) X(mulsd) X(mulss) X(rcpps) X(rcpss)      \
    X(roundpd) X(roundps) X(roundsd) X(roundss) X(rsqrtps) X(rsqrtss) X(sqrtpd) X(sqrtps)          \
    X(sqrtsd) X(sqrtss) X(subpd) X(subps) X(subsd) X(subss) X(ucomisd) X(ucomiss) X(vcvtph2ps)     \
    X(vcvtps2ph) X(vfmadd132pd) X(vfmadd132ps) X(vfmadd132sd) X(vfmadd132ss) X(vfmadd213pd)        \
    X(vfmadd213ps) X(vfmadd213sd) X(vfmadd213ss) X(vfmadd231pd) X(vfmadd231ps) X(vfmadd231sd)      \
    X(vfmadd231ss) X(vfmaddsub132pd) X(vfmaddsub132ps) X(vfmaddsub213pd) X(vfmaddsub213ps)         \
    X(vfmaddsub231pd) X(vfmaddsub231ps) X(vfmsub132pd) X(vfmsub132ps) X(vfmsub132sd)               \
    X(vfmsub132ss) X(vfmsub213pd) X(vfmsub213ps) X(vfmsub213sd) X(vfmsub213ss) X(vfmsub231pd)      \
    X(vfmsub231ps) X(vfmsub231sd) X(vfmsub231ss) X(vfmsubadd132pd) X(vfmsubadd132ps)               \
    X(vfmsubadd213pd) X(vfmsubadd213ps) X(vfmsubadd231pd) X(vfmsubadd231ps) X(vfnmadd132pd)        \
    X(vfnmadd132ps) X(vfnmadd132sd) X(vfnmadd132ss) X(vfnmadd213pd) X(vfnmadd213ps)                \
    X(vfnmadd213sd) X(vfnmadd213ss) X(vfnmadd231pd) X(vfnmadd231ps) X(vfnmadd231sd)                \
    X(vfnmadd231ss) X(vfnmsub132pd) X(vfnmsub132ps) X(vfnmsub132sd) X(vfnmsub132ss)                \
    X(vfnmsub213pd) X(vfnmsub213ps) X(vfnmsub213sd) X(vfnmsub213ss) X(vfnmsub231pd)                \
    X(vfnmsub231ps) X(vfnmsub231sd) X(vfnmsub231ss)
#define SSE_STRINGS(X)                                                                             \
    X(pcmpestri) X(pcmpestrm) X(pcmpistri) X(pcmpistrm)
#define AES_SHA(X)                                                                                 \
    X(aesdec) X(aesdeclast) X(aesenc) X(aesenclast) X(aesimc) X(aeskeygenassist)                   \
    X(gf2p8affineinvqb) X(gf2p8affineqb) X(gf2p8mulb) X(pclmulqdq) X(sha1msg1) X(sha1msg2)         \
    X(sha1nexte) X(sha1rnds4) X(sha256msg1) X(sha256msg2) X(sha256rnds2)
#define AVX_ONLY(X)                                                                                \
    X(vbroadcastf128) X(vbroadcastsd) X(vbroadcastss) X(vextractf128) X(vinsertf128)               \
    X(vmaskmovpd) X(vmaskmovps) X(vpblendd) X(vpbroadcastb) X(vpbroadcastd) X(vpbroadcastq)        \
    X(vpbroadcastw) X(vperm2f128) X(vperm2i128) X(vpermd) X(vpermilpd) X(vpermilpd_imm)            \
    X(vpermilps) X(vpermilps_imm) X(vpermpd) X(vpermps) X(vpermq) X(vpgatherdd) X(vpgatherdq)      \
    X(vpgatherqd) X(vpgatherqq) X(vpsllvd) X(vpsllvq) X(vpsravd) X(vpsrlvd) X(vpsrlvq)             \
    X(vzeroupper)
/* clang-format on */
#define DECLARE_VECTOR(name) extern const struct body b_##name;
SSE_MOVES(DECLARE_VECTOR)
SSE_INTEGERS(DECLARE_VECTOR)
SSE_FLOATS(DECLARE_VECTOR)
SSE_STRINGS(DECLARE_VECTOR)
AES_SHA(DECLARE_VECTOR)
AVX_ONLY(DECLARE_VECTOR)

/* ---- the choice of a handler (vector.c) ------------------------------------------------------ */

/* NULL: no such encoding. kind: K_RR, K_RM, K_MR, or K_R for an instruction without operands. */
insn_fn vector_handler(const struct cpu *cpu, const struct op *op, const struct insn *i, u32 flags,
                       unsigned kind, u32 mode);

#endif
