/* SPDX-License-Identifier: MIT */
/*
 * MMX, with what SSE, SSE2 and SSSE3 added to it.
 *
 * MMn is the significand of the physical x87 register n.  Every MMX instruction makes TOP 0 and
 * all tags valid; one that writes a register sets its exponent and sign to ones (SDM vol. 3
 * 12.2).  The registers are worked on in guest.fpu, as FPU_MMX.
 *
 * An instruction begins with mmx_begin(), which changes nothing a guest could see; once
 * memory has been accessed, mmx_commit() makes the transition.  Where that is all that is left
 * to do, the two are the same test.
 *
 * CVTPI2PS and CVTPI2PD from memory leave x87 alone, as AMD's processors do.
 */
#include <immintrin.h>

#include "fpu.h"
#include "opfpu.h"
#include "vector.h"

#define SSSE3_CODE __attribute__((target("ssse3")))

typedef u64 __attribute__((may_alias)) u64_reg;
typedef u16 __attribute__((may_alias)) u16_reg;

/* ---- registers ------------------------------------------------------------------------------------- */

static ALWAYS_INLINE unsigned reg_of(const struct insn *i) { return i->modrm >> 3 & 7; }
static ALWAYS_INLINE unsigned rm_of(const struct insn *i) { return i->modrm & 7; }

/* Only in FPU_MMX. */
static ALWAYS_INLINE u64 mm(const struct cpu *cpu, unsigned n)
{
    return *(const u64_reg *)GUEST(cpu).fpu.st[n];
}
static ALWAYS_INLINE void set_mm(struct cpu *cpu, unsigned n, u64 v)
{
    u8 *st = GUEST(cpu).fpu.st[n];
    *(u64_reg *)st = v;
    *(u16_reg *)(st + 8) = 0xffff;
}

/* MMn before the transition: the state is in memory, TOP is anything. */
static u64 peek_mm(const struct cpu *cpu, unsigned n)
{
    const struct cpu_fpu *f = &GUEST(cpu).fpu;
    return *(const u64_reg *)f->st[(n - fpu_top(f)) & 7];
}

static SLOW bool begin_slow(struct cpu *cpu)
{
    if (!fpu_check_pending(cpu))
        return false;
    fpu_save(cpu);
    return true;
}

static ALWAYS_INLINE bool mmx_begin(struct cpu *cpu)
{
    return likely(cpu->fpu_where == FPU_MMX) || begin_slow(cpu);
}

static SLOW void commit_slow(struct cpu *cpu)
{
    struct cpu_fpu *f = &GUEST(cpu).fpu;

    fpu_normalize(f);
    fpu_set_top(f, 0);
    f->ftw = 0xff;
    cpu->fpu_where = FPU_MMX;
}

static ALWAYS_INLINE void mmx_commit(struct cpu *cpu)
{
    if (unlikely(cpu->fpu_where != FPU_MMX))
        commit_slow(cpu);
}

/* EM comes before TS here: MMX does not exist when it is to be emulated (SDM vol. 3 12.1). */
int x_mmx_unusable(struct cpu *cpu, const struct insn *i)
{
    return GUEST(cpu).cr0 & X86_CR0_EM ? fault_ud(cpu, i) : fault_nm(cpu, i);
}

/* ---- operands ----------------------------------------------------------------------------------------- */

static ALWAYS_INLINE bool load_operand(struct cpu *cpu, const struct insn *i, unsigned size, u64 *v)
{
    u64 la;
    return ea_linear(cpu, i, size, ACC_READ, &la) && ld_size(cpu, la, size, v, ea_access(i));
}
static ALWAYS_INLINE bool store_operand(struct cpu *cpu, const struct insn *i, unsigned size, u64 v)
{
    u64 la;
    return ea_linear(cpu, i, size, ACC_WRITE, &la) && st_size(cpu, la, size, v, ea_access(i));
}

/* Begins, and after the transition has the source in *v. size: of a memory operand */
static ALWAYS_INLINE bool mmx_source(struct cpu *cpu, const struct insn *i, unsigned size, u64 *v)
{
    bool mem = i->flags & I_MEM;

    if (!mmx_begin(cpu) || (mem && !load_operand(cpu, i, size, v)))
        return false;
    mmx_commit(cpu);
    if (!mem)
        *v = mm(cpu, rm_of(i));
    return true;
}

/* The source, when that is simple. */
static ALWAYS_INLINE bool mmx_fast_source(struct cpu *cpu, const struct insn *i, unsigned size,
                                          u64 *v)
{
    if (cpu->fpu_where != FPU_MMX)
        return false;
    if (i->flags & I_MEM)
        return size == 8 ? load64(cpu, i, true, v) : load32(cpu, i, true, v);
    *v = mm(cpu, rm_of(i));
    return true;
}

/* ---- dst = dst op src ------------------------------------------------------------------------------------ */

static ALWAYS_INLINE __m128i vec(u64 v) { return _mm_cvtsi64_si128((s64)v); }
static ALWAYS_INLINE u64 low(__m128i v) { return (u64)_mm_cvtsi128_si64(v); }
/* Eight bytes of a below eight of b: horizontal operations and packs work on such pairs. */
static ALWAYS_INLINE __m128i pair(__m128i a, __m128i b) { return _mm_unpacklo_epi64(a, b); }
static ALWAYS_INLINE __m128i high(__m128i v) { return _mm_srli_si128(v, 8); }

/* The usual case calls nothing and so has no frame: the rest is a tail call. */
#define MMX_OP(attribute, name, size, expr)                                                        \
    attribute static ALWAYS_INLINE void do_##name(struct cpu *cpu, const struct insn *i,           \
                                                  u64 source)                                      \
    {                                                                                              \
        const __m128i a = vec(mm(cpu, reg_of(i))), b = vec(source);                                \
        (void)a;                                                                                   \
        set_mm(cpu, reg_of(i), low(expr));                                                         \
    }                                                                                              \
    attribute static SLOW int name##_slow(struct cpu *cpu, const struct insn *i)                   \
    {                                                                                              \
        u64 source;                                                                                \
        if (!mmx_source(cpu, i, size, &source))                                                    \
            return stop(cpu, i);                                                                   \
        do_##name(cpu, i, source);                                                                 \
        NEXT(cpu, i);                                                                              \
    }                                                                                              \
    attribute int x_mmx_##name(struct cpu *cpu, const struct insn *i)                              \
    {                                                                                              \
        u64 source;                                                                                \
        if (unlikely(!mmx_fast_source(cpu, i, size, &source)))                                     \
            return name##_slow(cpu, i);                                                            \
        do_##name(cpu, i, source);                                                                 \
        NEXT(cpu, i);                                                                              \
    }
#define MMX2(name, expr) MMX_OP(, name, 8, expr)
#define MMX2_SSSE3(name, expr) MMX_OP(SSSE3_CODE, name, 8, expr)

MMX_OP(, punpcklbw, 4, _mm_unpacklo_epi8(a, b))
MMX_OP(, punpcklwd, 4, _mm_unpacklo_epi16(a, b))
MMX_OP(, punpckldq, 4, _mm_unpacklo_epi32(a, b))
MMX2(punpckhbw, high(_mm_unpacklo_epi8(a, b)))
MMX2(punpckhwd, high(_mm_unpacklo_epi16(a, b)))
MMX2(punpckhdq, high(_mm_unpacklo_epi32(a, b)))
MMX2(packsswb, _mm_packs_epi16(pair(a, b), b))
MMX2(packssdw, _mm_packs_epi32(pair(a, b), b))
MMX2(packuswb, _mm_packus_epi16(pair(a, b), b))
MMX2(movq, b)

MMX2(pcmpgtb, _mm_cmpgt_epi8(a, b))
MMX2(pcmpgtw, _mm_cmpgt_epi16(a, b))
MMX2(pcmpgtd, _mm_cmpgt_epi32(a, b))
MMX2(pcmpeqb, _mm_cmpeq_epi8(a, b))
MMX2(pcmpeqw, _mm_cmpeq_epi16(a, b))
MMX2(pcmpeqd, _mm_cmpeq_epi32(a, b))

MMX2(psrlw, _mm_srl_epi16(a, b))
MMX2(psrld, _mm_srl_epi32(a, b))
MMX2(psrlq, _mm_srl_epi64(a, b))
MMX2(psraw, _mm_sra_epi16(a, b))
MMX2(psrad, _mm_sra_epi32(a, b))
MMX2(psllw, _mm_sll_epi16(a, b))
MMX2(pslld, _mm_sll_epi32(a, b))
MMX2(psllq, _mm_sll_epi64(a, b))

MMX2(pmullw, _mm_mullo_epi16(a, b))
MMX2(pmulhw, _mm_mulhi_epi16(a, b))
MMX2(pmulhuw, _mm_mulhi_epu16(a, b))
MMX2(pmuludq, _mm_mul_epu32(a, b))
MMX2(pmaddwd, _mm_madd_epi16(a, b))
MMX2(pand, _mm_and_si128(a, b))
MMX2(pandn, _mm_andnot_si128(a, b))
MMX2(por, _mm_or_si128(a, b))
MMX2(pxor, _mm_xor_si128(a, b))

MMX2(paddb, _mm_add_epi8(a, b))
MMX2(paddw, _mm_add_epi16(a, b))
MMX2(paddd, _mm_add_epi32(a, b))
MMX2(paddq, _mm_add_epi64(a, b))
MMX2(paddsb, _mm_adds_epi8(a, b))
MMX2(paddsw, _mm_adds_epi16(a, b))
MMX2(paddusb, _mm_adds_epu8(a, b))
MMX2(paddusw, _mm_adds_epu16(a, b))
MMX2(psubb, _mm_sub_epi8(a, b))
MMX2(psubw, _mm_sub_epi16(a, b))
MMX2(psubd, _mm_sub_epi32(a, b))
MMX2(psubq, _mm_sub_epi64(a, b))
MMX2(psubsb, _mm_subs_epi8(a, b))
MMX2(psubsw, _mm_subs_epi16(a, b))
MMX2(psubusb, _mm_subs_epu8(a, b))
MMX2(psubusw, _mm_subs_epu16(a, b))

MMX2(pminub, _mm_min_epu8(a, b))
MMX2(pmaxub, _mm_max_epu8(a, b))
MMX2(pminsw, _mm_min_epi16(a, b))
MMX2(pmaxsw, _mm_max_epi16(a, b))
MMX2(pavgb, _mm_avg_epu8(a, b))
MMX2(pavgw, _mm_avg_epu16(a, b))
MMX2(psadbw, _mm_sad_epu8(a, b))

/* Bit 7 of a selector gives 0, bits 2:0 select; in an XMM register bit 3 would select too. */
MMX2_SSSE3(pshufb, _mm_shuffle_epi8(a, _mm_and_si128(b, _mm_set1_epi8((char)0x87))))
MMX2_SSSE3(phaddw, _mm_hadd_epi16(pair(a, b), b))
MMX2_SSSE3(phaddd, _mm_hadd_epi32(pair(a, b), b))
MMX2_SSSE3(phaddsw, _mm_hadds_epi16(pair(a, b), b))
MMX2_SSSE3(phsubw, _mm_hsub_epi16(pair(a, b), b))
MMX2_SSSE3(phsubd, _mm_hsub_epi32(pair(a, b), b))
MMX2_SSSE3(phsubsw, _mm_hsubs_epi16(pair(a, b), b))
MMX2_SSSE3(pmaddubsw, _mm_maddubs_epi16(a, b))
MMX2_SSSE3(psignb, _mm_sign_epi8(a, b))
MMX2_SSSE3(psignw, _mm_sign_epi16(a, b))
MMX2_SSSE3(psignd, _mm_sign_epi32(a, b))
MMX2_SSSE3(pmulhrsw, _mm_mulhrs_epi16(a, b))
MMX2_SSSE3(pabsb, _mm_abs_epi8(b))
MMX2_SSSE3(pabsw, _mm_abs_epi16(b))
MMX2_SSSE3(pabsd, _mm_abs_epi32(b))

/* ---- immediates -------------------------------------------------------------------------------------------- */

#define MMX_SHIFT_IMM(name, shift)                                                                 \
    int x_mmx_##name##_imm(struct cpu *cpu, const struct insn *i)                                  \
    {                                                                                              \
        u64 v;                                                                                     \
        if (unlikely(!mmx_source(cpu, i, 8, &v)))                                                  \
            return stop(cpu, i);                                                                   \
        set_mm(cpu, rm_of(i), low(shift(vec(v), vec((u8)i->imm))));                                \
        NEXT(cpu, i);                                                                              \
    }
MMX_SHIFT_IMM(psrlw, _mm_srl_epi16)
MMX_SHIFT_IMM(psrld, _mm_srl_epi32)
MMX_SHIFT_IMM(psrlq, _mm_srl_epi64)
MMX_SHIFT_IMM(psraw, _mm_sra_epi16)
MMX_SHIFT_IMM(psrad, _mm_sra_epi32)
MMX_SHIFT_IMM(psllw, _mm_sll_epi16)
MMX_SHIFT_IMM(pslld, _mm_sll_epi32)
MMX_SHIFT_IMM(psllq, _mm_sll_epi64)

int x_mmx_pshufw(struct cpu *cpu, const struct insn *i)
{
    u64 v, r = 0;

    if (unlikely(!mmx_source(cpu, i, 8, &v)))
        return stop(cpu, i);
    for (unsigned n = 0; n < 4; n++)
        r |= (v >> 16 * (i->imm >> 2 * n & 3) & 0xffff) << 16 * n;
    set_mm(cpu, reg_of(i), r);
    NEXT(cpu, i);
}

/* Bytes imm to imm + 7 of the destination above the source, zeros above both. */
int x_mmx_palignr(struct cpu *cpu, const struct insn *i)
{
    unsigned bits = (u8)i->imm * 8u;
    u64 v;
    u128 both;

    if (unlikely(!mmx_source(cpu, i, 8, &v)))
        return stop(cpu, i);
    both = (u128)mm(cpu, reg_of(i)) << 64 | v;
    set_mm(cpu, reg_of(i), bits < 128 ? (u64)(both >> bits) : 0);
    NEXT(cpu, i);
}

/* ---- general registers --------------------------------------------------------------------------------------- */

static unsigned word_size(const struct insn *i) { return i->flags & I_REXW ? 8 : 4; }

/* MOVD, MOVQ: mm = r/m */
int x_mmx_movd(struct cpu *cpu, const struct insn *i)
{
    u64 v;

    if (!mmx_begin(cpu) || !rm_read(cpu, i, i->dst, word_size(i), &v))
        return stop(cpu, i);
    mmx_commit(cpu);
    set_mm(cpu, reg_of(i), v);
    NEXT(cpu, i);
}

/* r/m = mm */
int x_mmx_movd_e(struct cpu *cpu, const struct insn *i)
{
    if (!mmx_begin(cpu) || !rm_write(cpu, i, i->dst, word_size(i), peek_mm(cpu, reg_of(i))))
        return stop(cpu, i);
    mmx_commit(cpu);
    NEXT(cpu, i);
}

int x_mmx_pinsrw(struct cpu *cpu, const struct insn *i)
{
    unsigned shift = (i->imm & 3) * 16;
    u64 v;

    if (!mmx_begin(cpu) || !rm_read(cpu, i, i->dst, 2, &v))
        return stop(cpu, i);
    mmx_commit(cpu);
    set_mm(cpu, reg_of(i), (mm(cpu, reg_of(i)) & ~(0xffffull << shift)) | v << shift);
    NEXT(cpu, i);
}

int x_mmx_pextrw(struct cpu *cpu, const struct insn *i)
{
    u64 v;

    if (!mmx_source(cpu, i, 8, &v))
        return stop(cpu, i);
    REG64(cpu, i->src) = v >> (i->imm & 3) * 16 & 0xffff;
    NEXT(cpu, i);
}

int x_mmx_pmovmskb(struct cpu *cpu, const struct insn *i)
{
    u64 v;

    if (!mmx_source(cpu, i, 8, &v))
        return stop(cpu, i);
    REG64(cpu, i->src) = (u64)_mm_movemask_epi8(vec(v));
    NEXT(cpu, i);
}

/* ---- moves ------------------------------------------------------------------------------------------------------- */

static SLOW int movntq_slow(struct cpu *cpu, const struct insn *i)
{
    if (!mmx_begin(cpu) || !store_operand(cpu, i, 8, peek_mm(cpu, reg_of(i))))
        return stop(cpu, i);
    mmx_commit(cpu);
    NEXT(cpu, i);
}

int x_mmx_movntq(struct cpu *cpu, const struct insn *i)
{
    if (unlikely(cpu->fpu_where != FPU_MMX || !store64(cpu, i, true, mm(cpu, reg_of(i)))))
        return movntq_slow(cpu, i);
    NEXT(cpu, i);
}

/* MOVQ mm/m64, mm */
int x_mmx_movq_e(struct cpu *cpu, const struct insn *i)
{
    if (i->flags & I_MEM)
        return x_mmx_movntq(cpu, i);
    if (!mmx_begin(cpu))
        return stop(cpu, i);
    mmx_commit(cpu);
    set_mm(cpu, rm_of(i), mm(cpu, reg_of(i)));
    NEXT(cpu, i);
}

/* The bytes whose mask has bit 7 set. A mask of zero may fault all the same, and does on AMD. */
int x_mmx_maskmovq(struct cpu *cpu, const struct insn *i)
{
    u64 la, v, mask;

    if (!mmx_begin(cpu) || !ea_linear(cpu, i, 8, ACC_WRITE, &la) ||
        !mem_probe_write(cpu, la, 8, ea_access(i)))
        return stop(cpu, i);
    v = peek_mm(cpu, reg_of(i));
    mask = peek_mm(cpu, rm_of(i));
    for (unsigned n = 0; n < 8; n++)
        if (mask >> (8 * n + 7) & 1 && !st8(cpu, la + n, (u8)(v >> 8 * n), ea_access(i)))
            return stop(cpu, i);
    mmx_commit(cpu);
    NEXT(cpu, i);
}

int x_mmx_emms(struct cpu *cpu, const struct insn *i)
{
    if (!(cpu->mode & MODE_FPU))
        return x_mmx_unusable(cpu, i);
    if (!mmx_begin(cpu))
        return stop(cpu, i);
    mmx_commit(cpu);
    GUEST(cpu).fpu.ftw = 0;
    cpu->fpu_where = FPU_MEMORY;
    NEXT(cpu, i);
}

/* ---- to and from XMM ------------------------------------------------------------------------------------------------ */

/* Numbers with REX are in insn.src (reg) and insn.dst (rm), as for general registers. */
static u64_reg *xmm(struct cpu *cpu, unsigned gpr_offset)
{
    return (u64_reg *)GUEST(cpu).fpu.ymm[gpr_offset / 8];
}

static bool begin_xmm(struct cpu *cpu)
{
    if (cpu->mode & MODE_SSE)
        return true;
    return GUEST(cpu).cr0 & X86_CR0_EM || !(GUEST(cpu).cr4 & X86_CR4_OSFXSR) ? raise_ud(cpu)
                                                                             : raise_nm(cpu);
}

int x_mmx_movq2dq(struct cpu *cpu, const struct insn *i)
{
    u64 v;

    if (!begin_xmm(cpu) || !mmx_source(cpu, i, 8, &v))
        return stop(cpu, i);
    xmm(cpu, i->src)[0] = v;
    xmm(cpu, i->src)[1] = 0;
    NEXT(cpu, i);
}

int x_mmx_movdq2q(struct cpu *cpu, const struct insn *i)
{
    if (!begin_xmm(cpu) || !mmx_begin(cpu))
        return stop(cpu, i);
    mmx_commit(cpu);
    set_mm(cpu, reg_of(i), xmm(cpu, i->dst)[0]);
    NEXT(cpu, i);
}

/* ---- conversions -------------------------------------------------------------------------------------------------------
 *
 * The host's MXCSR has the guest's rounding, and all exceptions masked.  With an unmasked one
 * (MODE_XM) it is looked at which flags the conversion sets: then it may not be committed.
 */
typedef __m128i (*convert_fn)(__m128i src);

#define CONVERSION(name, insn)                                                                     \
    static __m128i name(__m128i src)                                                               \
    {                                                                                              \
        __m128i r;                                                                                 \
        __asm__ volatile(insn : "=x"(r) : "x"(src));                                               \
        return r;                                                                                  \
    }
CONVERSION(dword_to_single, "cvtdq2ps %1, %0")
CONVERSION(dword_to_double, "cvtdq2pd %1, %0")
CONVERSION(single_to_dword, "cvtps2dq %1, %0")
CONVERSION(single_to_dword_truncating, "cvttps2dq %1, %0")
CONVERSION(double_to_dword, "cvtpd2dq %1, %0")
CONVERSION(double_to_dword_truncating, "cvttpd2dq %1, %0")

static SLOW bool convert_checked(struct cpu *cpu, convert_fn convert, __m128i src, __m128i *result)
{
    struct cpu_fpu *f = &GUEST(cpu).fpu;
    u32 host, flags;

    mxcsr_sync(cpu);
    host = __builtin_ia32_stmxcsr() & ~MXCSR_FLAGS;
    __builtin_ia32_ldmxcsr(host);
    *result = convert(src);
    flags = __builtin_ia32_stmxcsr() & MXCSR_FLAGS;
    /* Invalid comes before the conversion, inexact after it: never both in one element. */
    if (flags & MXCSR_IE && !(f->mxcsr & MXCSR_IE << MXCSR_MASKS_SHIFT))
        flags = MXCSR_IE;
    f->mxcsr |= flags;
    __builtin_ia32_ldmxcsr(host | (f->mxcsr & MXCSR_FLAGS));
    if (!(flags & ~(f->mxcsr >> MXCSR_MASKS_SHIFT)))
        return true;
    return raise_exception(cpu, GUEST(cpu).cr4 & X86_CR4_OSXMMEXCPT ? XM_VECTOR : UD_VECTOR, false,
                           0);
}

static bool do_convert(struct cpu *cpu, convert_fn convert, __m128i src, __m128i *result)
{
    if (unlikely(cpu->mode & MODE_XM))
        return convert_checked(cpu, convert, src, result);
    *result = convert(src);
    return true;
}

/* xmm = mm/m64 */
static bool read_mmx_source(struct cpu *cpu, const struct insn *i, u64 *v)
{
    if (!begin_xmm(cpu))
        return false;
    return i->flags & I_MEM ? load_operand(cpu, i, 8, v) : mmx_source(cpu, i, 8, v);
}

int x_mmx_cvtpi2ps(struct cpu *cpu, const struct insn *i)
{
    __m128i r;
    u64 v;

    if (!read_mmx_source(cpu, i, &v) || !do_convert(cpu, dword_to_single, vec(v), &r))
        return stop(cpu, i);
    xmm(cpu, i->src)[0] = low(r);
    NEXT(cpu, i);
}

int x_mmx_cvtpi2pd(struct cpu *cpu, const struct insn *i)
{
    __m128i r;
    u64 v;

    if (!read_mmx_source(cpu, i, &v) || !do_convert(cpu, dword_to_double, vec(v), &r))
        return stop(cpu, i);
    xmm(cpu, i->src)[0] = low(r);
    xmm(cpu, i->src)[1] = low(high(r));
    NEXT(cpu, i);
}

/* mm = xmm/m64, xmm/m128 */
static int to_mmx(struct cpu *cpu, const struct insn *i, convert_fn convert, unsigned size)
{
    u64 src[2] = {0, 0};
    __m128i r;

    if (!begin_xmm(cpu) || !mmx_begin(cpu))
        return stop(cpu, i);
    if (!(i->flags & I_MEM))
        memcpy(src, xmm(cpu, i->dst), size);
    else if (!v_read(cpu, i, src, size, size == 16 ? 16 : 1))
        return stop(cpu, i);
    mmx_commit(cpu); /* also when it ends in #XM, on AMD */
    if (!do_convert(cpu, convert, _mm_set_epi64x((s64)src[1], (s64)src[0]), &r))
        return stop(cpu, i);
    set_mm(cpu, reg_of(i), low(r));
    NEXT(cpu, i);
}

int x_mmx_cvtps2pi(struct cpu *cpu, const struct insn *i)
{
    return to_mmx(cpu, i, single_to_dword, 8);
}
int x_mmx_cvttps2pi(struct cpu *cpu, const struct insn *i)
{
    return to_mmx(cpu, i, single_to_dword_truncating, 8);
}
int x_mmx_cvtpd2pi(struct cpu *cpu, const struct insn *i)
{
    return to_mmx(cpu, i, double_to_dword, 16);
}
int x_mmx_cvttpd2pi(struct cpu *cpu, const struct insn *i)
{
    return to_mmx(cpu, i, double_to_dword_truncating, 16);
}
