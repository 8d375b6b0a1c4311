/* SPDX-License-Identifier: MIT */
/*
 * The page walker: guest page tables, every access to them through the SPTEs.
 *
 * Source: SDM vol. 3 chapter 4 (paging) and 28.3 (EPT).  Order of a walk: entries from the top,
 * not-present and reserved bits where they are met; then the rights of all levels together;
 * then A and D; then the second-level translation of the address itself.
 */
#include "core.h"

#include <stdlib.h>

/* ---- second level ------------------------------------------------------------------------------ */

#define FRAMES 1024
#define TABLES 128

/* A page frame whose SPTEs were walked with A, and for W with D, set. */
struct frame {
    u64 gpa; /* page address | SPTE_R, W, X */
    u64 hva;
};

/* A guest page table of the last level: what the SDM calls a PDE cache (vol. 3 4.10.3). */
struct table {
    u64 region; /* la >> 21 */
    u64 generation;
    u64 gpa;
    u64 rights; /* of the entries above it, all of which have A set */
};

/* What was found to be allowed is kept until it is flushed; what was not is looked up again. */
struct walk_cache {
    struct frame frame[FRAMES]; /* the module flushes */
    struct table table[TABLES]; /* the guest flushes, by starting another generation */
    u64 generation;
};

enum spte_status { SPTE_OK, SPTE_VIOLATION, SPTE_IS_MMIO };

struct spte_walk {
    u64 rights;    /* of all levels, 0 when an entry is not present; W not usable without dirty */
    uintptr_t hva; /* of the byte */
    bool dirty;
    u64 spte, size; /* leaf */
};

bool walk_init(struct cpu *cpu)
{
    cpu->wc = calloc(1, sizeof(*cpu->wc));
    if (cpu->wc)
        cpu->wc->generation = 1;
    return cpu->wc;
}

void walk_free(struct cpu *cpu) { free(cpu->wc); }

void walk_flush(struct cpu *cpu) { memset(cpu->wc->frame, 0, sizeof(cpu->wc->frame)); }

void walk_flush_guest(struct cpu *cpu) { cpu->wc->generation++; }

static bool is_mmio_spte(const struct cpu *cpu, u64 spte)
{
    return (spte & SPTE_RWX) == SPTE_MMIO && (spte & CTL(cpu).mmio_gen_mask) == CTL(cpu).mmio_gen;
}

/* Down the table at eptp. addr: guest-physical, or linear in shadow mode. need: SPTE_R, W, X, U. */
static enum spte_status walk_sptes(struct cpu *cpu, u64 addr, u64 need, struct spte_walk *w)
{
    unsigned level, shift;
    u64 *table, spte;

restart:
    table = (u64 *)(uintptr_t)CTL(cpu).eptp;
    level = CTL(cpu).ept_level;
    shift = 12 + 9 * level;
    w->rights = 0;
    if (unlikely(!table || addr >> shift))
        return SPTE_VIOLATION;
    for (u64 rights = SPTE_RWX | SPTE_U;; level--) {
        shift -= 9;
        u64 *sptep = &table[addr >> shift & 511];
        spte = __atomic_load_n(sptep, __ATOMIC_ACQUIRE);
        if (unlikely(!(spte & SPTE_R))) {
            w->spte = spte;
            w->rights = 0;
            return level == 1 && is_mmio_spte(cpu, spte) ? SPTE_IS_MMIO : SPTE_VIOLATION;
        }
        rights &= spte;
        bool leaf = level == 1 || spte & SPTE_PS;
        u64 set = SPTE_A;
        if (leaf) {
            w->rights = rights;
            w->spte = spte;
            if (need & ~rights)
                return SPTE_VIOLATION;
            if (need & SPTE_W)
                set |= SPTE_D;
        }
        /* Not an OR: the module may take the entry away meanwhile. */
        if (unlikely(set & ~spte)) {
            if (!spte_cmpxchg(sptep, spte, spte | set))
                goto restart;
            spte |= set;
        }
        if (leaf)
            break;
        table = (u64 *)(uintptr_t)(spte & SPTE_PFN);
    }
    w->spte = spte;
    w->size = 1ull << shift;
    w->hva = (spte & SPTE_PFN) + (addr & (w->size - 1));
    w->dirty = spte & SPTE_D;
    return SPTE_OK;
}

/* gpa to host address. need: SPTE_R, W, X. */
static inline enum spte_status translate_gpa(struct cpu *cpu, u64 gpa, u64 need,
                                             struct spte_walk *w)
{
    u64 page = gpa & PAGE_MASK;
    struct frame *f = &cpu->wc->frame[gpa >> 12 & (FRAMES - 1)];

    if (likely((f->gpa & (PAGE_MASK | need)) == (page | need))) {
        w->rights = f->gpa & SPTE_RWX;
        w->dirty = w->rights & SPTE_W;
        w->hva = f->hva + (gpa & ~PAGE_MASK);
        return SPTE_OK;
    }
    enum spte_status status = walk_sptes(cpu, gpa, need, w);
    if (likely(status == SPTE_OK)) {
        f->gpa = page | (w->rights & (w->dirty ? SPTE_RWX : SPTE_R | SPTE_X));
        f->hva = w->hva & PAGE_MASK;
    }
    return status;
}

static u64 needed_rights(unsigned access)
{
    return access & ACC_WRITE ? SPTE_W : access & ACC_FETCH ? SPTE_X : SPTE_R;
}

/* Whether the module wants to see writes to the frame as MMIO. */
static bool is_emulated_gfn(const struct cpu *cpu, u64 gpa)
{
    const struct cpu_ctl *ctl = &CTL(cpu);

    for (u32 k = 0; k < ctl->emulate_count; k++)
        if (ctl->emulate[k].gfn == gpa >> 12)
            return true;
    return false;
}

/* The frame that a linear page is emulated as in shadow mode, ~0 when it is not. */
static u64 emulated_frame(const struct cpu *cpu, u64 la)
{
    const struct cpu_ctl *ctl = &CTL(cpu);

    for (u32 k = 0; k < ctl->emulate_count; k++)
        if (ctl->emulate[k].gla == (la & PAGE_MASK))
            return ctl->emulate[k].gfn;
    return ~0ull;
}

/* how: CPU_EPT_* */
static bool ept_violation(struct cpu *cpu, u64 gpa, u64 gla, const struct spte_walk *w, u64 how)
{
    raise_exit(cpu, EXIT_EPT_VIOLATION);
    EXIT(cpu).gpa = gpa;
    EXIT(cpu).gla = gla;
    EXIT(cpu).qualification = how | (w->rights & SPTE_RWX) * CPU_EPT_R;
    return false;
}

static u64 ept_access(unsigned access)
{
    return access & ACC_WRITE ? CPU_EPT_WRITE : access & ACC_FETCH ? CPU_EPT_FETCH : CPU_EPT_READ;
}

static bool fetch_from_mmio(struct cpu *cpu, u64 gpa, u64 gla)
{
    raise_exit(cpu, EXIT_EMULATION);
    EXIT(cpu).gpa = gpa;
    EXIT(cpu).gla = gla;
    return false;
}

/* The last step of every walk in tdp mode. how: CPU_EPT_GLA_* of a violation. */
static bool translate_final(struct cpu *cpu, u64 gpa, u64 gla, unsigned access, u64 how,
                            struct translation *t)
{
    struct spte_walk w;
    enum spte_status status = translate_gpa(cpu, gpa, needed_rights(access), &w);

    t->gpa = gpa;
    t->mmio = false;
    if (unlikely(status != SPTE_OK)) {
        t->hva = 0;
        t->mmio = true;
        t->readable = t->writable = false;
        if (status == SPTE_IS_MMIO)
            return access & ACC_FETCH ? fetch_from_mmio(cpu, gpa, gla) : true;
        if (!(access & ACC_WRITE) || !is_emulated_gfn(cpu, gpa))
            return ept_violation(cpu, gpa, gla, &w, how | ept_access(access));
        /* What the write leaves alone is read from the frame: it must be there to read. */
        if (translate_gpa(cpu, gpa, SPTE_R, &w) != SPTE_OK)
            return ept_violation(cpu, gpa, gla, &w, how | CPU_EPT_READ);
        t->hva = w.hva;
        return true;
    }
    t->hva = w.hva;
    t->readable = w.rights & SPTE_R;
    t->writable = w.rights & SPTE_W && w.dirty;
    return true;
}

bool walk_gpa(struct cpu *cpu, u64 gpa, unsigned access, struct translation *t)
{
    t->page_size = PAGE_SIZE;
    t->global = false;
    return translate_final(cpu, gpa, 0, access, 0, t);
}

/* ---- guest tables ---------------------------------------------------------------------------------- */

struct gpte {
    u64 val, gpa;
};

struct guest_walk {
    u64 la;
    unsigned access;
    bool user;
    bool from_table;     /* started at a table of the cache */
    unsigned gpte_size;  /* 4 or 8 */
    int n;               /* entries used */
    struct gpte gpte[5]; /* from the top */
    u64 rights;          /* PT_WRITABLE_MASK, PT_USER_MASK of all levels; PT64_NX_MASK of any */
    u64 upper_rights;    /* without the last level */
    u64 page_size;
    u32 error; /* WALK_FAULT */
};

enum walk_status {
    WALK_OK,
    WALK_FAULT,   /* #PF with w->error */
    WALK_STOP,    /* exit recorded */
    WALK_RESTART, /* an entry changed meanwhile */
};

static bool has_nx(const struct cpu *cpu)
{
    return GUEST(cpu).efer & EFER_NX && GUEST(cpu).cr4 & X86_CR4_PAE;
}

/* error: the bits that the tables decide. */
static enum walk_status guest_fault(struct guest_walk *w, u32 error)
{
    w->error = error;
    return WALK_FAULT;
}

static bool raise_guest_fault(struct cpu *cpu, const struct guest_walk *w)
{
    u32 error = w->error;

    if (w->access & ACC_WRITE)
        error |= PFERR_WRITE_MASK;
    if (w->user)
        error |= PFERR_USER_MASK;
    if (w->access & ACC_FETCH && (has_nx(cpu) || GUEST(cpu).cr4 & X86_CR4_SMEP))
        error |= PFERR_FETCH_MASK;
    return raise_pf(cpu, w->la, error);
}

/* Reads the next entry of the walk, which is present when this returns WALK_OK. */
static enum walk_status read_gpte(struct cpu *cpu, struct guest_walk *w, u64 gpa, u64 *val)
{
    struct gpte *p = &w->gpte[w->n++];
    struct spte_walk s;
    enum spte_status status = translate_gpa(cpu, gpa, SPTE_R, &s);

    if (unlikely(status == SPTE_VIOLATION)) {
        ept_violation(cpu, gpa, w->la, &s, CPU_EPT_READ | CPU_EPT_GLA_VALID);
        return WALK_STOP;
    }
    /* KVM: a table outside memory reads as not present. */
    if (unlikely(status == SPTE_IS_MMIO))
        return guest_fault(w, 0);
    p->val = 0;
    p->gpa = gpa;
    if (!host_load(cpu, &p->val, s.hva, w->gpte_size))
        return WALK_STOP;
    *val = p->val;
    return likely(*val & PT_PRESENT_MASK) ? WALK_OK : guest_fault(w, 0);
}

static enum walk_status reserved_fault(struct guest_walk *w)
{
    return guest_fault(w, PFERR_PRESENT_MASK | PFERR_RSVD_MASK);
}

/* Bits maxphyaddr..51, and NX while it is not enabled. */
static u64 reserved_high(const struct cpu *cpu)
{
    u64 high = PT64_ADDR_MASK & ~((1ull << CTL(cpu).maxphyaddr) - 1);
    return GUEST(cpu).efer & EFER_NX ? high : high | PT64_NX_MASK;
}

/* 8-byte entries: from `level` at table address `table` down to the page. */
static enum walk_status walk64(struct cpu *cpu, struct guest_walk *w, u64 table, unsigned level,
                               u64 reserved, u64 *gpa)
{
    const struct table *cached = &cpu->wc->table[w->la >> 21 & (TABLES - 1)];
    unsigned shift;

    w->gpte_size = 8;
    w->rights = PT_WRITABLE_MASK | PT_USER_MASK;
    w->from_table = cached->region == w->la >> 21 && cached->generation == cpu->wc->generation;
    if (w->from_table) {
        level = 1;
        table = cached->gpa;
        w->rights = cached->rights;
    }
    for (shift = 12 + 9 * level;; level--) {
        u64 gpte;
        shift -= 9;
        enum walk_status status = read_gpte(cpu, w, table | (w->la >> shift & 511) << 3, &gpte);
        if (unlikely(status != WALK_OK))
            return status;
        bool leaf = level == 1 || gpte & PT_PAGE_SIZE_MASK;
        u64 large = leaf && level > 1 ? ((1ull << shift) - 1) & ~0x1fffull : 0;
        if (unlikely(gpte & (reserved | large)) || (leaf && level > 3))
            return reserved_fault(w);
        w->upper_rights = w->rights;
        w->rights = (w->rights & gpte) | ((w->rights | gpte) & PT64_NX_MASK);
        if (leaf) {
            w->page_size = 1ull << shift;
            *gpa = (gpte & PT64_ADDR_MASK & ~(w->page_size - 1)) | (w->la & (w->page_size - 1));
            return WALK_OK;
        }
        table = gpte & PT64_ADDR_MASK;
    }
}

static enum walk_status walk_pae(struct cpu *cpu, struct guest_walk *w, u64 *gpa)
{
    u64 pdpte = GUEST(cpu).pdptr[w->la >> 30 & 3];

    if (!(pdpte & PT_PRESENT_MASK))
        return guest_fault(w, 0);
    /* Bits 52..62 are reserved only here; PDPTEs have no rights and no A. */
    return walk64(cpu, w, pdpte & PT64_ADDR_MASK, 2,
                  reserved_high(cpu) | (PT64_NX_MASK - (1ull << 52)), gpa);
}

static enum walk_status walk32(struct cpu *cpu, struct guest_walk *w, u64 *gpa)
{
    u64 gpte;

    w->gpte_size = 4;
    enum walk_status status =
        read_gpte(cpu, w, (GUEST(cpu).cr3 & PT32_ADDR_MASK) | (w->la >> 22) << 2, &gpte);
    if (status != WALK_OK)
        return status;
    w->rights = gpte;
    if (gpte & PT_PAGE_SIZE_MASK && GUEST(cpu).cr4 & X86_CR4_PSE) {
        /* PSE-36: bits 13..20 are address bits 32..39, as many as there are. */
        unsigned width = CTL(cpu).maxphyaddr < 40 ? CTL(cpu).maxphyaddr : 40;
        if (gpte & ((1u << 22) - (1u << (width - 19))))
            return reserved_fault(w);
        w->page_size = 1ull << 22;
        *gpa = (gpte & ~0x3fffffull) | (gpte & PT32_PSE36_MASK) << 19 | (w->la & 0x3fffff);
        return WALK_OK;
    }
    status = read_gpte(cpu, w, (gpte & PT32_ADDR_MASK) | (w->la >> 12 & 1023) << 2, &gpte);
    if (status != WALK_OK)
        return status;
    w->rights &= gpte;
    w->page_size = PAGE_SIZE;
    *gpa = (gpte & PT32_ADDR_MASK) | (w->la & ~PAGE_MASK);
    return WALK_OK;
}

/* After a successful walk of more than one level, the last of 4 KiB pages. */
static void keep_table(struct cpu *cpu, const struct guest_walk *w)
{
    cpu->wc->table[w->la >> 21 & (TABLES - 1)] = (struct table){
        .region = w->la >> 21,
        .generation = cpu->wc->generation,
        .gpa = w->gpte[w->n - 2].val & PT64_ADDR_MASK,
        .rights = w->upper_rights,
    };
}

static enum walk_status walk_tables(struct cpu *cpu, struct guest_walk *w, u64 *gpa)
{
    const struct cpu_guest *g = &GUEST(cpu);

    w->n = 0;
    w->page_size = PAGE_SIZE;
    w->from_table = false;
    if (likely(g->efer & EFER_LMA))
        return walk64(cpu, w, g->cr3 & PT64_ADDR_MASK, g->cr4 & X86_CR4_LA57 ? 5 : 4,
                      reserved_high(cpu), gpa);
    return g->cr4 & X86_CR4_PAE ? walk_pae(cpu, w, gpa) : walk32(cpu, w, gpa);
}

/* Protection keys: SDM vol. 3 4.6.2. Of user pages and data accesses only. */
static bool pkey_denies(const struct cpu *cpu, u64 leaf, bool write, bool user)
{
    const struct cpu_guest *g = &GUEST(cpu);

    if (likely(!(g->cr4 & X86_CR4_PKE && g->efer & EFER_LMA)))
        return false;
    unsigned key = g->pkru >> 2 * (leaf >> PT64_PK_BIT & 15);
    return key & 1 || (key & 2 && write && (user || g->cr0 & X86_CR0_WP));
}

/* Whether the rights of the tables forbid the access; SDM vol. 3 4.6.1. */
static bool denied(const struct cpu *cpu, const struct guest_walk *w, bool write)
{
    u64 cr4 = GUEST(cpu).cr4;
    bool user_page = w->rights & PT_USER_MASK;

    if (w->access & ACC_FETCH) {
        if (w->rights & PT64_NX_MASK)
            return true;
        return w->user ? !user_page : user_page && cr4 & X86_CR4_SMEP;
    }
    if (w->user ? !user_page
                : user_page && tlb_context(cpu, w->access & ACC_SYSTEM) == CTX_KERNEL_SMAP)
        return true;
    return write && !(w->rights & PT_WRITABLE_MASK) && (w->user || GUEST(cpu).cr0 & X86_CR0_WP);
}

static enum walk_status check_rights(struct cpu *cpu, struct guest_walk *w, bool *writable)
{
    u64 leaf = w->gpte[w->n - 1].val;
    bool write = w->access & ACC_WRITE, data = !(w->access & ACC_FETCH);
    bool keyed = data && w->rights & PT_USER_MASK;
    bool pk = keyed && pkey_denies(cpu, leaf, write, w->user);

    if (unlikely(pk || denied(cpu, w, write)))
        return guest_fault(w, PFERR_PRESENT_MASK | (pk ? PFERR_PK_MASK : 0));
    *writable = data && !denied(cpu, w, true) && !(keyed && pkey_denies(cpu, leaf, true, w->user));
    return WALK_OK;
}

/* Sets bits of one entry, which must still be what was read. */
static enum walk_status update_gpte(struct cpu *cpu, const struct guest_walk *w,
                                    const struct gpte *p, u64 bits)
{
    struct spte_walk s;
    u64 found = p->val;

    if (translate_gpa(cpu, p->gpa, SPTE_W, &s) != SPTE_OK) {
        /* KVM leaves A and D alone in a read-only slot. */
        if (s.rights & SPTE_R && (s.spte & SPTE_ROM || is_emulated_gfn(cpu, p->gpa)))
            return WALK_OK;
        ept_violation(cpu, p->gpa, w->la, &s, CPU_EPT_READ | CPU_EPT_WRITE | CPU_EPT_GLA_VALID);
        return WALK_STOP;
    }
    if (!host_cmpxchg(cpu, s.hva, &found, p->val | bits, w->gpte_size))
        return WALK_STOP;
    return found == p->val ? WALK_OK : WALK_RESTART;
}

static enum walk_status set_accessed_dirty(struct cpu *cpu, struct guest_walk *w)
{
    for (int k = 0; k < w->n; k++) {
        struct gpte *p = &w->gpte[k];
        u64 bits = PT_ACCESSED_MASK;
        if (k == w->n - 1 && w->access & ACC_WRITE)
            bits |= PT_DIRTY_MASK;
        if (likely((p->val & bits) == bits))
            continue;
        enum walk_status status = update_gpte(cpu, w, p, bits);
        if (status != WALK_OK)
            return status;
        p->val |= bits;
    }
    return WALK_OK;
}

static enum walk_status try_walk(struct cpu *cpu, struct guest_walk *w, u64 *gpa, bool *writable)
{
    enum walk_status status = walk_tables(cpu, w, gpa);

    if (likely(status == WALK_OK))
        status = check_rights(cpu, w, writable);
    if (likely(status == WALK_OK))
        status = set_accessed_dirty(cpu, w);
    /* More rights must be seen without a flush: only what the tables say now is a fault. */
    if (unlikely(status == WALK_FAULT && w->from_table)) {
        walk_flush_guest(cpu);
        return WALK_RESTART;
    }
    return status;
}

static bool walk_guest(struct cpu *cpu, u64 la, unsigned access, bool user, struct translation *t)
{
    enum walk_status status;
    struct guest_walk w;
    bool writable = false;
    u64 gpa = 0;

    w.la = la;
    w.access = access;
    w.user = user;
    cpu->vmcs.stats.walks++;
    do
        status = try_walk(cpu, &w, &gpa, &writable);
    while (unlikely(status == WALK_RESTART));
    if (unlikely(status != WALK_OK))
        return status == WALK_FAULT && raise_guest_fault(cpu, &w);
    if (w.page_size == PAGE_SIZE && w.gpte_size == 8 && w.n > 1)
        keep_table(cpu, &w);

    u64 leaf = w.gpte[w.n - 1].val;
    t->page_size = w.page_size;
    t->global = leaf & PT_GLOBAL_MASK && GUEST(cpu).cr4 & X86_CR4_PGE;
    if (!translate_final(cpu, gpa, la, access, CPU_EPT_GLA_VALID | CPU_EPT_GLA_FINAL, t))
        return false;
    t->readable = t->readable && !(access & ACC_FETCH);
    t->writable = t->writable && writable && leaf & PT_DIRTY_MASK;
    return true;
}

/* ---- shadow mode ------------------------------------------------------------------------------------- */

static bool shadow_fault(struct cpu *cpu, u64 la, unsigned access, bool user, u32 error)
{
    if (access & ACC_WRITE)
        error |= PFERR_WRITE_MASK;
    if (user)
        error |= PFERR_USER_MASK;
    if (access & ACC_FETCH)
        error |= PFERR_FETCH_MASK;
    if (access & ACC_SYSTEM)
        error |= CPU_PF_IMPLICIT;
    raise_exit(cpu, EXIT_PAGE_FAULT);
    EXIT(cpu).gla = la;
    EXIT(cpu).qualification = la;
    EXIT(cpu).error_code = error;
    return false;
}

/* SMEP and SMAP look at SPTE_U as hardware would; without paging there is neither. */
static bool shadow_supervisor_denied(const struct cpu *cpu, unsigned access)
{
    if (!(GUEST(cpu).cr0 & X86_CR0_PG))
        return false;
    if (access & ACC_FETCH)
        return GUEST(cpu).cr4 & X86_CR4_SMEP;
    return tlb_context(cpu, access & ACC_SYSTEM) == CTX_KERNEL_SMAP;
}

/* Fetches, and what the entry does not allow, are the module's to look at: it asks the guest's tables
 * and has the instruction done as emulated when they have nothing against it. */
static bool shadow_mmio(struct cpu *cpu, u64 la, unsigned access, bool user, u64 spte,
                        struct translation *t)
{
    bool denied = (user && !(spte & SPTE_MMIO_U)) ||
                  (access & ACC_WRITE && !(spte & SPTE_MMIO_W)) ||
                  (!user && spte & SPTE_MMIO_U && shadow_supervisor_denied(cpu, access));

    t->gpa = (spte & SPTE_PFN) | (la & ~PAGE_MASK);
    t->mmio = true;
    if (unlikely((denied || access & ACC_FETCH) && emulated_frame(cpu, la) != t->gpa >> 12))
        return shadow_fault(cpu, la, access, user, PFERR_PRESENT_MASK);
    return access & ACC_FETCH ? fetch_from_mmio(cpu, t->gpa, la) : true;
}

static bool walk_shadow(struct cpu *cpu, u64 la, unsigned access, bool user, struct translation *t)
{
    struct spte_walk w;
    u64 need = needed_rights(access) | (user ? SPTE_U : 0);
    u64 addr = la;

    cpu->vmcs.stats.walks++;
    /* The root covers the canonical halves as one range. */
    if (CTL(cpu).ept_level > 3)
        addr &= (1ull << (12 + 9 * CTL(cpu).ept_level)) - 1;
    *t = (struct translation){.page_size = PAGE_SIZE};
    switch (walk_sptes(cpu, addr, need, &w)) {
    case SPTE_IS_MMIO: return shadow_mmio(cpu, la, access, user, w.spte, t);
    case SPTE_VIOLATION:
        if (!w.rights)
            return shadow_fault(cpu, la, access, user, 0);
        if (need & ~w.rights & ~(u64)SPTE_W || !(w.rights & SPTE_R) ||
            emulated_frame(cpu, la) == ~0ull || walk_sptes(cpu, addr, SPTE_R, &w) != SPTE_OK)
            return shadow_fault(cpu, la, access, user, PFERR_PRESENT_MASK);
        t->mmio = true;
        t->gpa = emulated_frame(cpu, la) << 12 | (la & ~PAGE_MASK);
        break;
    case SPTE_OK: break;
    }
    bool user_page = w.rights & SPTE_U || w.spte & SPTE_GUEST_USER;
    if (!user && user_page && shadow_supervisor_denied(cpu, access))
        return shadow_fault(cpu, la, access, user, PFERR_PRESENT_MASK);
    t->hva = w.hva;
    t->page_size = w.size;
    t->readable = !(access & ACC_FETCH) && !t->mmio && w.rights & SPTE_R;
    t->writable = t->readable && w.rights & SPTE_W && w.dirty;
    return true;
}

/* ---- the way in ----------------------------------------------------------------------------------------- */

bool walk_linear(struct cpu *cpu, u64 la, unsigned access, bool user, struct translation *t)
{
    if (unlikely(!(CTL(cpu).flags & CPU_TDP)))
        return walk_shadow(cpu, la, access, user, t);
    if (likely(GUEST(cpu).cr0 & X86_CR0_PG))
        return walk_guest(cpu, la, access, user, t);
    t->page_size = PAGE_SIZE;
    t->global = false;
    if (!translate_final(cpu, la, la, access, CPU_EPT_GLA_VALID | CPU_EPT_GLA_FINAL, t))
        return false;
    if (access & ACC_FETCH)
        t->readable = t->writable = false;
    return true;
}

int load_pdptrs(struct cpu *cpu, u64 cr3, u64 pdptr[4])
{
    u64 reserved = ~0ull << CTL(cpu).maxphyaddr | 0x1e6;
    struct translation t;
    u64 table[4];

    if (!(CTL(cpu).flags & CPU_TDP)) {
        memcpy(pdptr, GUEST(cpu).pdptr, sizeof(table));
        return 0;
    }
    if (!walk_gpa(cpu, cr3 & 0xffffffe0, ACC_READ, &t))
        return -2;
    if (t.mmio)
        return -1;
    if (!host_load(cpu, table, t.hva, sizeof(table)))
        return -2;
    for (int k = 0; k < 4; k++) {
        if (table[k] & PT_PRESENT_MASK && table[k] & reserved)
            return -1;
    }
    memcpy(pdptr, table, sizeof(table));
    return 0;
}
