/* SPDX-License-Identifier: MIT */
/*
 * FXSAVE and FXRSTOR, and the XSAVE family: state components 0 (x87), 1 (SSE), 2 (AVX) and
 * 9 (PKRU) in the standard and the compacted format.
 *
 * The whole area of the components asked for must be there, initial or not (but for XRSTOR from
 * the compacted format), and is looked at before the first byte is written; all that is loaded
 * is read and checked before a register changes.
 *
 * XINUSE is what the registers hold: a component is in use when it is not in its initial
 * configuration.  The modified optimisation of XSAVEOPT and XSAVES does not exist.
 *
 * Source: SDM vol. 1 chapters 10.5 and 13, vol. 2 instruction pages.
 */
#include "fpu.h"
#include "vector.h"

#define FXSAVE_SIZE 512
#define HEADER_OFFSET 512
#define HEADER_SIZE 64
#define EXTENDED_OFFSET (HEADER_OFFSET + HEADER_SIZE)
#define COMPACTED (1ull << 63) /* XCOMP_BV */

#define COMPONENT_AVX 2
#define COMPONENT_PKRU 9
#define NR_COMPONENTS 10

/* Size, and offset in the standard format, as CPUID leaf 0DH says; none is aligned when compacted. */
static const struct component {
    u16 offset, size;
} components[NR_COMPONENTS] = {
    [COMPONENT_AVX] = {576, 256},
    [COMPONENT_PKRU] = {XSAVE_PKRU_OFFSET, 8},
};

/* The legacy region: what FXSAVE stores; SDM vol. 1 table 10-2. */
struct legacy {
    u16 fcw, fsw;
    u8 ftw, reserved;
    u16 fop;
    u64 fip, fdp;
    u32 mxcsr, mxcsr_mask;
    u8 st[8][16];
    u8 xmm[16][16];
};
_Static_assert(sizeof(struct legacy) == 416, "the rest of the 512 bytes is not written");
#define OFFSET_MXCSR offsetof(struct legacy, mxcsr)
#define OFFSET_ST offsetof(struct legacy, st)
#define OFFSET_XMM offsetof(struct legacy, xmm)

struct header {
    u64 xstate_bv, xcomp_bv, reserved[6];
};

/* The extended region of the components above, packed: AVX, then PKRU. */
struct extended {
    u8 avx[16][16];
    u64 pkru;
};

#define NR_XMM 16

/* XMM8 to XMM15 exist in 64-bit mode only. */
static unsigned nr_xmm(const struct cpu *cpu) { return is_code64(cpu) ? NR_XMM : 8; }

/* ---- XINUSE ---------------------------------------------------------------------------------------- */

static bool is_zero(const void *p, size_t size)
{
    const u64_mem *v = p;
    u64 any = 0;
    for (size_t n = 0; n < size / 8; n++)
        any |= v[n];
    return !any;
}

static bool is_x87_initial(const struct cpu_fpu *f)
{
    return f->fcw == FCW_INIT && !f->fsw && !f->ftw && !f->fop && !f->fip && !f->fdp &&
           is_zero(f->st, sizeof(f->st));
}

/* With the first nr vector registers. */
static u64 in_use(struct cpu *cpu, unsigned nr)
{
    const struct cpu_fpu *f = &GUEST(cpu).fpu;
    u64 inuse = 0;

    fpu_save(cpu);
    if (!is_x87_initial(f))
        inuse |= XFEATURE_MASK_FP;
    for (unsigned n = 0; n < nr; n++) {
        inuse |= is_zero(f->ymm[n], 16) ? 0 : XFEATURE_MASK_SSE;
        inuse |= is_zero(f->ymm[n] + 16, 16) ? 0 : XFEATURE_MASK_YMM;
    }
    if (GUEST(cpu).pkru)
        inuse |= XFEATURE_MASK_PKRU;
    return inuse;
}

u64 fpu_xinuse(struct cpu *cpu) { return in_use(cpu, nr_xmm(cpu)); }

/* As XSAVES of a 64-bit kernel finds it: all registers, and MXCSR as a part of SSE (SDM vol. 1
 * 13.11). */
u64 fpu_components(struct cpu *cpu)
{
    u64 mxcsr = GUEST(cpu).fpu.mxcsr == MXCSR_INIT ? 0 : XFEATURE_MASK_SSE;

    return in_use(cpu, NR_XMM) | mxcsr;
}

/* ---- the area ----------------------------------------------------------------------------------------- */

/* A part of the area that an instruction touches. */
struct piece {
    u32 offset, size;
    void *data;
};
#define MAX_PIECES 8
struct pieces {
    unsigned n;
    struct piece p[MAX_PIECES];
};

static void add_piece(struct pieces *s, u32 offset, u32 size, void *data)
{
    s->p[s->n++] = (struct piece){offset, size, data};
}

static bool area_linear(struct cpu *cpu, const struct insn *i, u32 size, u32 align, unsigned access,
                        u64 *la)
{
    if (!ea_linear(cpu, i, size, access, la))
        return false;
    return !(*la & (align - 1)) || raise_gp(cpu, 0);
}

/* Where component n is in an area of that format; compacted: by the bits of XCOMP_BV. */
static u32 component_offset(unsigned n, u64 xcomp_bv)
{
    u32 offset = EXTENDED_OFFSET;

    if (!(xcomp_bv & COMPACTED))
        return components[n].offset;
    for (unsigned k = COMPONENT_AVX; k < n; k++)
        offset += xcomp_bv >> k & 1 ? components[k].size : 0;
    return offset;
}

/* The end of the area for these components. */
static u32 area_size(u64 mask, u64 xcomp_bv)
{
    u32 size = EXTENDED_OFFSET;

    for (unsigned n = COMPONENT_AVX; n < NR_COMPONENTS; n++)
        if (mask >> n & 1)
            size = component_offset(n, xcomp_bv) + components[n].size;
    return size;
}

static bool write_pieces(struct cpu *cpu, const struct insn *i, u64 la, u32 size,
                         const struct pieces *s)
{
    if (!mem_probe_write(cpu, la, size, ea_access(i)))
        return false;
    for (unsigned k = 0; k < s->n; k++)
        if (!mem_write(cpu, la + s->p[k].offset, s->p[k].data, s->p[k].size, ea_access(i)))
            return false;
    return true;
}

static bool read_piece(struct cpu *cpu, const struct insn *i, u64 la, u32 offset, u32 size, void *p)
{
    return mem_read(cpu, la + offset, p, size, ea_access(i));
}

static bool read_pieces(struct cpu *cpu, const struct insn *i, u64 la, u32 size,
                        const struct pieces *s)
{
    if (!mem_probe_read(cpu, la + size - 1, 1, ea_access(i)))
        return false;
    for (unsigned k = 0; k < s->n; k++)
        if (!read_piece(cpu, i, la, s->p[k].offset, s->p[k].size, s->p[k].data))
            return false;
    return true;
}

/* The area begins on the first of its two pages. */
static bool read_header(struct cpu *cpu, const struct insn *i, u64 la, struct header *h)
{
    return mem_probe_read(cpu, la, 1, ea_access(i)) &&
           read_piece(cpu, i, la, HEADER_OFFSET, sizeof(*h), h);
}

/* The pieces of the components in `mask`; that of the x87 component in two, around MXCSR. */
static void add_components(struct cpu *cpu, struct pieces *s, u64 mask, u64 xcomp_bv,
                           struct legacy *l, struct extended *e)
{
    if (mask & XFEATURE_MASK_FP) {
        add_piece(s, 0, OFFSET_MXCSR, l);
        add_piece(s, OFFSET_ST, sizeof(l->st), l->st);
    }
    if (mask & XFEATURE_MASK_SSE)
        add_piece(s, OFFSET_XMM, nr_xmm(cpu) * 16, l->xmm);
    if (mask & XFEATURE_MASK_YMM)
        add_piece(s, component_offset(COMPONENT_AVX, xcomp_bv), nr_xmm(cpu) * 16, e->avx);
    if (mask & XFEATURE_MASK_PKRU)
        add_piece(s, component_offset(COMPONENT_PKRU, xcomp_bv), sizeof(e->pkru), &e->pkru);
}

/* ---- registers to and from the area ------------------------------------------------------------------------ */

/* Without REX.W the pointers are 32 bits and a selector, which is zero. */
static u64 pointer(const struct insn *i, u64 v) { return i->flags & I_REXW ? v : (u32)v; }

static void get_registers(struct cpu *cpu, const struct insn *i, struct legacy *l,
                          struct extended *e)
{
    struct cpu_fpu *f = &GUEST(cpu).fpu;

    fpu_save(cpu);
    fpu_normalize(f);
    mxcsr_sync(cpu);
    l->fcw = f->fcw;
    l->fsw = f->fsw;
    l->ftw = f->ftw;
    l->reserved = 0;
    l->fop = f->fop;
    l->fip = pointer(i, f->fip);
    l->fdp = pointer(i, f->fdp);
    l->mxcsr = f->mxcsr;
    l->mxcsr_mask = MXCSR_MASK;
    memcpy(l->st, f->st, sizeof(l->st));
    for (unsigned n = 0; n < 16; n++) {
        memcpy(l->xmm[n], f->ymm[n], 16);
        memcpy(e->avx[n], f->ymm[n] + 16, 16);
    }
    e->pkru = GUEST(cpu).pkru;
}

static void set_x87(struct cpu *cpu, const struct insn *i, const struct legacy *l)
{
    struct cpu_fpu *f = &GUEST(cpu).fpu;

    fpu_leave(cpu);
    f->fcw = l->fcw;
    f->fsw = l->fsw;
    f->ftw = l->ftw;
    f->fop = l->fop & 0x7ff;
    f->fip = pointer(i, l->fip);
    f->fdp = pointer(i, l->fdp);
    memset(f->st, 0, sizeof(f->st));
    for (unsigned n = 0; n < 8; n++)
        memcpy(f->st[n], l->st[n], 10);
    fpu_normalize(f);
}

static void set_xmm(struct cpu *cpu, const struct legacy *l)
{
    for (unsigned n = 0; n < nr_xmm(cpu); n++)
        memcpy(GUEST(cpu).fpu.ymm[n], l->xmm[n], 16);
}

static void set_avx(struct cpu *cpu, const struct extended *e)
{
    for (unsigned n = 0; n < nr_xmm(cpu); n++)
        memcpy(GUEST(cpu).fpu.ymm[n] + 16, e->avx[n], 16);
}

static void set_pkru(struct cpu *cpu, u32 pkru)
{
    if (GUEST(cpu).pkru == pkru)
        return;
    GUEST(cpu).pkru = pkru;
    tlb_flush_guest(cpu); /* its rights are part of every TLB entry */
}

/* The end of an instruction that loaded state: what is decoded depends on MXCSR. */
static int loaded(struct cpu *cpu, const struct insn *i)
{
    bool changed = mxcsr_load(cpu);

    set_rip(cpu, next_rip(cpu, i));
    return changed ? LOOKUP : LINK0;
}

/* ---- FXSAVE, FXRSTOR ------------------------------------------------------------------------------------------- */

static bool is_fx_usable(struct cpu *cpu)
{
    return !(GUEST(cpu).cr0 & (X86_CR0_EM | X86_CR0_TS)) || raise_nm(cpu);
}

/* Non-waiting: an exception pending is saved as such. All 512 bytes must be there. */
int x_fxsave(struct cpu *cpu, const struct insn *i)
{
    unsigned size = (unsigned)OFFSET_XMM + nr_xmm(cpu) * 16;
    struct extended e;
    struct legacy l;
    u64 la;

    if (!is_fx_usable(cpu) || !area_linear(cpu, i, FXSAVE_SIZE, 16, ACC_WRITE, &la) ||
        !mem_probe_write(cpu, la, FXSAVE_SIZE, ea_access(i)))
        return stop(cpu, i);
    get_registers(cpu, i, &l, &e);
    if (!mem_write(cpu, la, &l, size, ea_access(i)))
        return stop(cpu, i);
    NEXT(cpu, i);
}

int x_fxrstor(struct cpu *cpu, const struct insn *i)
{
    union {
        u8 area[FXSAVE_SIZE];
        struct legacy l;
    } image;
    u64 la;

    if (!is_fx_usable(cpu) || !area_linear(cpu, i, FXSAVE_SIZE, 16, ACC_READ, &la) ||
        !mem_read(cpu, la, image.area, FXSAVE_SIZE, ea_access(i)))
        return stop(cpu, i);
    if (image.l.mxcsr & ~MXCSR_MASK)
        return fault_gp(cpu, i, 0);
    set_x87(cpu, i, &image.l);
    set_xmm(cpu, &image.l);
    GUEST(cpu).fpu.mxcsr = image.l.mxcsr;
    return loaded(cpu, i);
}

/* ---- XSAVE, XSAVEOPT, XSAVEC, XSAVES ------------------------------------------------------------------------------ */

static bool is_x_usable(struct cpu *cpu, bool supervisor)
{
    if (!(GUEST(cpu).cr4 & X86_CR4_OSXSAVE))
        return raise_ud(cpu);
    if (supervisor && cpu->cpl)
        return raise_gp(cpu, 0);
    return !(GUEST(cpu).cr0 & X86_CR0_TS) || raise_nm(cpu);
}

/* RFBM: the components asked for that are enabled. */
static u64 requested(const struct cpu *cpu, bool supervisor)
{
    u64 enabled = GUEST(cpu).xcr0 | (supervisor ? GUEST(cpu).xss : 0);
    return enabled & ((u64)(u32)GPR(cpu, RDX) << 32 | (u32)GPR(cpu, RAX));
}

static int xsave_standard(struct cpu *cpu, const struct insn *i, bool optimized)
{
    u64 rfbm = requested(cpu, false), inuse, la;
    u32 size = area_size(rfbm, 0);
    struct pieces s = {0};
    struct header h;
    struct extended e;
    struct legacy l;

    if (!is_x_usable(cpu, false) || !area_linear(cpu, i, size, 64, ACC_WRITE, &la) ||
        !read_piece(cpu, i, la, HEADER_OFFSET, 8, &h.xstate_bv))
        return stop(cpu, i);
    inuse = fpu_xinuse(cpu);
    get_registers(cpu, i, &l, &e);
    h.xstate_bv = (h.xstate_bv & ~rfbm) | (rfbm & inuse);
    add_components(cpu, &s, optimized ? rfbm & inuse : rfbm, 0, &l, &e);
    if (rfbm & (XFEATURE_MASK_SSE | XFEATURE_MASK_YMM))
        add_piece(&s, OFFSET_MXCSR, 8, &l.mxcsr);
    add_piece(&s, HEADER_OFFSET, 8, &h.xstate_bv);
    if (!write_pieces(cpu, i, la, size, &s))
        return stop(cpu, i);
    NEXT(cpu, i);
}

int x_xsave(struct cpu *cpu, const struct insn *i) { return xsave_standard(cpu, i, false); }
int x_xsaveopt(struct cpu *cpu, const struct insn *i) { return xsave_standard(cpu, i, true); }

static int xsave_compacted(struct cpu *cpu, const struct insn *i, bool supervisor)
{
    u64 rfbm = requested(cpu, supervisor), la;
    u32 size = area_size(rfbm, rfbm | COMPACTED);
    struct pieces s = {0};
    struct header h;
    struct extended e;
    struct legacy l;

    if (!is_x_usable(cpu, supervisor) || !area_linear(cpu, i, size, 64, ACC_WRITE, &la))
        return stop(cpu, i);
    h.xcomp_bv = rfbm | COMPACTED;
    h.xstate_bv = rfbm & fpu_xinuse(cpu);
    get_registers(cpu, i, &l, &e);
    /* MXCSR belongs to the SSE component here. */
    if (l.mxcsr != MXCSR_INIT)
        h.xstate_bv |= rfbm & XFEATURE_MASK_SSE;
    add_components(cpu, &s, h.xstate_bv, h.xcomp_bv, &l, &e);
    if (h.xstate_bv & XFEATURE_MASK_SSE)
        add_piece(&s, OFFSET_MXCSR, 8, &l.mxcsr);
    add_piece(&s, HEADER_OFFSET, 16, &h);
    if (!write_pieces(cpu, i, la, size, &s))
        return stop(cpu, i);
    NEXT(cpu, i);
}

int x_xsavec(struct cpu *cpu, const struct insn *i) { return xsave_compacted(cpu, i, false); }
int x_xsaves(struct cpu *cpu, const struct insn *i) { return xsave_compacted(cpu, i, true); }

/* ---- XRSTOR, XRSTORS --------------------------------------------------------------------------------------------------- */

/* SDM vol. 1 13.8, 13.12 */
static bool is_header_valid(const struct cpu *cpu, const struct header *h, bool supervisor)
{
    u64 enabled = GUEST(cpu).xcr0 | (supervisor ? GUEST(cpu).xss : 0);
    bool has_compacted = has_feature(cpu, CPU_CPUID_D_1_EAX, CPUID_D_1_EAX_XSAVEC);

    if (!(h->xcomp_bv & COMPACTED))
        return !supervisor && !(h->xstate_bv & ~enabled) && !h->xcomp_bv && !h->reserved[0];
    if (!supervisor && !has_compacted)
        return false;
    return !(h->xcomp_bv & ~enabled & ~COMPACTED) &&
           !(h->xstate_bv & ~(h->xcomp_bv & ~COMPACTED)) &&
           is_zero(h->reserved, sizeof(h->reserved));
}

/* Components of rfbm that are not in the area get their initial configuration: zeros, but for FCW. */
static void load_components(struct cpu *cpu, const struct insn *i, u64 rfbm, const struct legacy *l,
                            const struct extended *e)
{
    if (rfbm & XFEATURE_MASK_FP)
        set_x87(cpu, i, l);
    if (rfbm & XFEATURE_MASK_SSE)
        set_xmm(cpu, l);
    if (rfbm & XFEATURE_MASK_YMM)
        set_avx(cpu, e);
    if (rfbm & XFEATURE_MASK_PKRU)
        set_pkru(cpu, (u32)e->pkru);
}

/* Is MXCSR loaded? In the standard format it is there whatever XSTATE_BV says. */
static bool has_mxcsr(const struct header *h, u64 rfbm)
{
    if (h->xcomp_bv & COMPACTED)
        return rfbm & h->xstate_bv & XFEATURE_MASK_SSE;
    return rfbm & (XFEATURE_MASK_SSE | XFEATURE_MASK_YMM);
}

static int xrstor(struct cpu *cpu, const struct insn *i, bool supervisor)
{
    struct legacy l = {.fcw = FCW_INIT, .mxcsr = MXCSR_INIT};
    u64 rfbm = requested(cpu, supervisor), la;
    struct extended e = {.pkru = 0};
    struct pieces s = {0};
    struct header h;
    u32 size;

    if (!is_x_usable(cpu, supervisor) ||
        !area_linear(cpu, i, area_size(rfbm, 0), 64, ACC_READ, &la) || !read_header(cpu, i, la, &h))
        return stop(cpu, i);
    if (!is_header_valid(cpu, &h, supervisor))
        return fault_gp(cpu, i, 0);
    add_components(cpu, &s, rfbm & h.xstate_bv, h.xcomp_bv, &l, &e);
    if (has_mxcsr(&h, rfbm))
        add_piece(&s, OFFSET_MXCSR, 4, &l.mxcsr);
    size = area_size(h.xcomp_bv & COMPACTED ? rfbm & h.xstate_bv : rfbm, h.xcomp_bv);
    if (!read_pieces(cpu, i, la, size, &s))
        return stop(cpu, i);
    if (l.mxcsr & ~MXCSR_MASK)
        return fault_gp(cpu, i, 0);
    load_components(cpu, i, rfbm, &l, &e);
    if (rfbm & XFEATURE_MASK_SSE || has_mxcsr(&h, rfbm))
        GUEST(cpu).fpu.mxcsr = l.mxcsr;
    else
        mxcsr_sync(cpu);
    return loaded(cpu, i);
}

int x_xrstor(struct cpu *cpu, const struct insn *i) { return xrstor(cpu, i, false); }
int x_xrstors(struct cpu *cpu, const struct insn *i) { return xrstor(cpu, i, true); }
