/* SPDX-License-Identifier: MIT */
/*
 * The soft TLB and the slow paths of every memory access.
 *
 * Two levels.  The first is what ld*() and st*() look at inline: direct-mapped, one array for
 * each of read, write and execute, and an entry means that nothing at all stands in the way.
 * The second holds everything that was walked: a page is in the first level only while it is
 * in the second, and the second has sets of four indexed by a hash, so that pages which collide
 * in the one do not in the other.  A flush costs what was filled: fills are logged.
 */
#include "core.h"

#include <sched.h>
#include <stdlib.h>
#include <sys/mman.h>

#define L2_BITS 15
#define L2_SIZE (1u << L2_BITS)
#define WAYS 4 /* a cache line */
#define SET_BITS (L2_BITS - 2)

/* l2_entry.word: page-aligned addend, and */
#define E_R 0x1
#define E_W 0x2 /* the tables allow it; code in the page is looked at when it gets into level 1 */
#define E_X 0x4
#define E_RWX 0x7
#define E_GLOBAL 0x8
#define E_LOGGED 0x10        /* in log[0] */
#define E_LOGGED_GLOBAL 0x20 /* in log[1] */
#define E_LOG (E_LOGGED | E_LOGGED_GLOBAL)

struct l2_entry {
    u64 page; /* linear page address; valid when word has a right */
    u64 word;
};

struct log {
    u32 n;
    u32 code[NR_CTX * L2_SIZE]; /* context << L2_BITS | index: each at most once */
};

/* A part of an access that lies in one page. */
struct span {
    u64 la, gpa;
    uintptr_t hva; /* 0: no memory */
    unsigned len;
    bool mmio;
};

struct breakpoint {
    u64 la, len;
    bool on_read;
    u32 dr6;
};

/* What translations are made from. The guest flushes after every change of its own; what
 * differs at an entry was changed by the module. */
struct origin {
    u64 eptp;
    u32 ept_level, maxphyaddr, tdp, pkru;
    u64 cr0, cr3, cr4, efer, pdptr[4];
};

#define REGIONS 4096 /* bits of a filter of 2 MiB regions, or host pages */

struct tlb_state {
    struct l2_entry l2[NR_CTX][L2_SIZE];
    unsigned victim;   /* way to be replaced next */
    struct log log[2]; /* fills of [0] pages that a CR3 load flushes, [1] global ones */
    u64 large[REGIONS /
              64]; /* 2 MiB regions in which the guest has a large page; may say too many */
    u64 huge;      /* the same of 1 GiB regions, modulo 64 */
    u64 stored[REGIONS / 64]; /* host pages of level 1 w entries; may say too many */
    unsigned nr_breakpoints;
    struct breakpoint breakpoint[4];
    unsigned nr_rmw;
    struct span rmw[2];   /* what is in cpu->rmw_buf */
    struct origin origin; /* as of the last flush */
    u64 dr[4], dr7;       /* as of the last tlb_breakpoints() */
};

static inline bool filter_test(const u64 *f, u64 key)
{
    key &= REGIONS - 1;
    return f[key / 64] >> key % 64 & 1;
}

static inline void filter_set(u64 *f, u64 key)
{
    key &= REGIONS - 1;
    f[key / 64] |= 1ull << key % 64;
}

static inline u64 region_key(u64 la) { return la >> 21 ^ la >> 33; }

/* ---- levels ------------------------------------------------------------------------------------- */

static inline struct l2_entry *l2_set(struct tlb_state *ts, enum tlb_ctx ctx, u64 page)
{
    u64 n = page >> 12;
    n ^= n >> SET_BITS ^ n >> 2 * SET_BITS;
    return &ts->l2[ctx][(n & ((1u << SET_BITS) - 1)) * WAYS];
}

static inline struct l2_entry *l2_find(struct tlb_state *ts, enum tlb_ctx ctx, u64 page)
{
    struct l2_entry *e = l2_set(ts, ctx, page);
    for (unsigned way = 0; way < WAYS; way++, e++) {
        if (e->page == page && e->word & E_RWX)
            return e;
    }
    return NULL;
}

/* Where to put a page that is not there. */
static struct l2_entry *l2_victim(struct tlb_state *ts, enum tlb_ctx ctx, u64 page)
{
    struct l2_entry *set = l2_set(ts, ctx, page);
    for (unsigned way = 0; way < WAYS; way++) {
        if (!(set[way].word & E_RWX))
            return &set[way];
    }
    return &set[ts->victim++ % WAYS];
}

static inline void l1_drop(struct tlbe *e, u64 page)
{
    if (e->tag == page)
        e->tag = TLB_EMPTY;
}

static inline void l1_drop_all(struct tlb *tlb, u64 page)
{
    unsigned k = TLB_INDEX(page);
    l1_drop(&tlb->r[k], page);
    l1_drop(&tlb->w[k], page);
    l1_drop(&tlb->x[k], page);
}

static void log_fill(struct tlb_state *ts, struct l2_entry *e, bool global)
{
    if (e->word & (global ? E_LOGGED_GLOBAL : E_LOGGED))
        return;
    e->word |= global ? E_LOGGED_GLOBAL : E_LOGGED;
    struct log *log = &ts->log[global];
    log->code[log->n++] = (u32)(e - ts->l2[0]);
}

static void note_large(struct tlb_state *ts, u64 la, u64 size)
{
    if (size > 1 << 22)
        ts->huge |= 1ull << (la >> 30 & 63);
    filter_set(ts->large, region_key(la));
    if (size == 1 << 22)
        filter_set(ts->large, region_key(la ^ (1 << 21)));
}

static struct l2_entry *l2_fill(struct cpu *cpu, enum tlb_ctx ctx, u64 page, u64 rights,
                                const struct translation *t)
{
    struct tlb_state *ts = cpu->ts;
    struct l2_entry *e = l2_find(ts, ctx, page);
    u64 addend = (t->hva & PAGE_MASK) - page;

    cpu->vmcs.stats.tlb_fills++;
    if (!e)
        e = l2_victim(ts, ctx, page);
    if (e->word & E_RWX && (e->page != page || (e->word & PAGE_MASK) != addend)) {
        l1_drop_all(&cpu->ctx[ctx], e->page);
        e->word &= E_LOG;
    }
    e->page = page;
    e->word = (e->word & ~(PAGE_MASK | E_GLOBAL)) | addend | rights | (t->global ? E_GLOBAL : 0);
    log_fill(ts, e, t->global);
    if (unlikely(t->page_size > PAGE_SIZE))
        note_large(ts, page, t->page_size);
    return e;
}

/* logged: E_LOG* of the log that is being emptied. */
static void flush_entry(struct cpu *cpu, unsigned code, u64 logged)
{
    struct l2_entry *e = cpu->ts->l2[0] + code;
    if (e->word & E_RWX)
        l1_drop_all(&cpu->ctx[code >> L2_BITS], e->page);
    e->word &= E_LOG & ~logged;
}

static struct origin current_origin(const struct cpu *cpu)
{
    const struct cpu_guest *g = &GUEST(cpu);
    const struct cpu_ctl *ctl = &CTL(cpu);
    struct origin o = {
        .eptp = ctl->eptp,
        .ept_level = ctl->ept_level,
        .maxphyaddr = ctl->maxphyaddr,
        .tdp = ctl->flags & CPU_TDP,
        .pkru = g->pkru,
        .cr0 = g->cr0 & (X86_CR0_PG | X86_CR0_WP),
        .cr3 = g->cr3,
        .cr4 = g->cr4 & (X86_CR4_PSE | X86_CR4_PAE | X86_CR4_PGE | X86_CR4_LA57 | X86_CR4_SMEP |
                         X86_CR4_SMAP | X86_CR4_PKE),
        .efer = g->efer & (EFER_LMA | EFER_NX),
    };
    memcpy(o.pdptr, g->pdptr, sizeof(o.pdptr));
    return o;
}

void tlb_flush_guest(struct cpu *cpu)
{
    struct tlb_state *ts = cpu->ts;

    ts->origin = current_origin(cpu);

    cpu->vmcs.stats.tlb_flushes++;
    for (int g = 0; g < 2; g++) {
        for (u32 k = 0; k < ts->log[g].n; k++)
            flush_entry(cpu, ts->log[g].code[k], E_LOG);
        ts->log[g].n = 0;
    }
    walk_flush_guest(cpu);
    memset(ts->large, 0, sizeof(ts->large));
    memset(ts->stored, 0, sizeof(ts->stored));
    ts->huge = 0;
}

void tlb_flush(struct cpu *cpu)
{
    tlb_flush_guest(cpu);
    walk_flush(cpu);
}

void tlb_flush_nonglobal(struct cpu *cpu)
{
    struct tlb_state *ts = cpu->ts;
    struct log *log = &ts->log[0];

    ts->origin = current_origin(cpu);
    cpu->vmcs.stats.tlb_flushes++;
    for (u32 k = 0; k < log->n; k++) {
        struct l2_entry *e = ts->l2[0] + log->code[k];
        if (e->word & E_GLOBAL)
            e->word &= ~(u64)E_LOGGED; /* replaced since, and in the other log */
        else
            flush_entry(cpu, log->code[k], E_LOGGED);
    }
    log->n = 0;
    walk_flush_guest(cpu);
}

static u64 linear_mask(const struct cpu *cpu, unsigned access)
{
    bool wide = is_lma(cpu) && (is_code64(cpu) || access & ACC_SYSTEM || cpu->delivering);
    return wide ? ~0ull : 0xffffffff;
}

void tlb_invlpg(struct cpu *cpu, u64 la)
{
    struct tlb_state *ts = cpu->ts;
    u64 page = la & linear_mask(cpu, 0) & PAGE_MASK;

    if (filter_test(ts->large, region_key(page)) || ts->huge >> (page >> 30 & 63) & 1) {
        tlb_flush_guest(cpu);
        return;
    }
    walk_flush_guest(cpu);
    for (unsigned ctx = 0; ctx < NR_CTX; ctx++) {
        struct l2_entry *e = l2_find(ts, ctx, page);
        if (!e)
            continue;
        l1_drop_all(&cpu->ctx[ctx], page);
        e->word &= E_LOG;
    }
}

void tlb_protect_code(struct cpu *cpu, uintptr_t hva_page)
{
    struct tlb_state *ts = cpu->ts;

    hva_page &= PAGE_MASK;
    if (!filter_test(ts->stored, hva_page >> 12))
        return;
    for (int g = 0; g < 2; g++) {
        for (u32 k = 0; k < ts->log[g].n; k++) {
            unsigned code = ts->log[g].code[k];
            struct l2_entry *e = ts->l2[0] + code;
            if (e->word & E_W && e->page + (e->word & PAGE_MASK) == hva_page)
                l1_drop(&cpu->ctx[code >> L2_BITS].w[TLB_INDEX(e->page)], e->page);
        }
    }
}

bool tlb_init(struct cpu *cpu)
{
    cpu->ctx = malloc(NR_CTX * sizeof(*cpu->ctx));
    /* Not malloc: sets are whole cache lines, and most pages of this stay untouched. */
    cpu->ts =
        mmap(NULL, sizeof(*cpu->ts), PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    if (cpu->ts == MAP_FAILED)
        cpu->ts = NULL;
    if (!cpu->ctx || !cpu->ts || !walk_init(cpu)) {
        tlb_free(cpu);
        return false;
    }
    struct tlbe *e = (struct tlbe *)cpu->ctx;
    for (size_t k = 0; k < NR_CTX * sizeof(*cpu->ctx) / sizeof(*e); k++)
        e[k] = (struct tlbe){.tag = TLB_EMPTY};
    cpu->tlb = &cpu->ctx[CTX_KERNEL];
    return true;
}

void tlb_free(struct cpu *cpu)
{
    free(cpu->ctx);
    if (cpu->ts)
        munmap(cpu->ts, sizeof(*cpu->ts));
    walk_free(cpu);
    cpu->ctx = cpu->tlb = NULL;
    cpu->ts = NULL;
    cpu->wc = NULL;
}

/* ---- data breakpoints ---------------------------------------------------------------------------- */

static bool add_breakpoint(struct tlb_state *ts, const struct cpu_guest *g, unsigned n)
{
    static const u8 length[4] = {1, 2, 8, 4};
    u32 control = (u32)(g->dr7 >> (DR7_RW_BIT + 4 * n));
    u64 len = length[control >> 2 & 3];

    if (!(g->dr7 >> 2 * n & 3) || !(control & 1)) /* R/W 01 and 11 are data */
        return false;
    ts->breakpoint[ts->nr_breakpoints++] = (struct breakpoint){
        .la = g->dr[n] & ~(len - 1), .len = len, .on_read = control & 2, .dr6 = 1u << n};
    return true;
}

void tlb_breakpoints(struct cpu *cpu)
{
    struct tlb_state *ts = cpu->ts;
    const struct cpu_guest *g = &GUEST(cpu);
    bool had = ts->nr_breakpoints, have = false;

    memcpy(ts->dr, g->dr, sizeof(ts->dr));
    ts->dr7 = g->dr7;
    ts->nr_breakpoints = 0;
    for (unsigned n = 0; n < 4; n++)
        have |= add_breakpoint(ts, g, n);
    if (had || have)
        tlb_flush_guest(cpu);
}

static bool page_has_breakpoint(const struct tlb_state *ts, u64 page)
{
    for (unsigned n = 0; n < ts->nr_breakpoints; n++) {
        if ((ts->breakpoint[n].la & PAGE_MASK) == page)
            return true;
    }
    return false;
}

/* The trap is due behind the instruction: it is done again as a step, whose hits are recorded. */
static bool check_breakpoints(struct cpu *cpu, u64 la, unsigned size, unsigned access)
{
    const struct tlb_state *ts = cpu->ts;

    if (likely(!ts->nr_breakpoints) || access & ACC_SYSTEM || cpu->delivering)
        return true;
    for (unsigned n = 0; n < ts->nr_breakpoints; n++) {
        const struct breakpoint *b = &ts->breakpoint[n];
        if (la + size <= b->la || b->la + b->len <= la || !(access & ACC_WRITE || b->on_read))
            continue;
        if (!cpu->step) {
            cpu->stop = STOP_STEP;
            return false;
        }
        cpu->data_bp |= b->dr6;
    }
    return true;
}

void tlb_check(struct cpu *cpu)
{
    const struct tlb_state *ts = cpu->ts;
    struct origin now = current_origin(cpu);

    if (memcmp(&ts->origin, &now, sizeof(now)))
        tlb_flush(cpu);
    if (ts->dr7 != GUEST(cpu).dr7 || memcmp(ts->dr, GUEST(cpu).dr, sizeof(ts->dr)))
        tlb_breakpoints(cpu);
}

/* ---- translation ------------------------------------------------------------------------------------- */

/* Whether stores to the page may go without us. */
static bool l1_store_allowed(struct cpu *cpu, uintptr_t hva)
{
    if (block_page_has_code(cpu, hva & PAGE_MASK))
        return false;
    filter_set(cpu->ts->stored, hva >> 12);
    return true;
}

static void l1_install(struct cpu *cpu, enum tlb_ctx ctx, const struct l2_entry *e, u64 right)
{
    struct tlb *tlb = &cpu->ctx[ctx];
    struct tlbe *arr = right == E_R ? tlb->r : right == E_W ? tlb->w : tlb->x;

    if (unlikely(ctx == CTX_USER_AC) && right != E_X)
        return;
    if (unlikely(cpu->ts->nr_breakpoints) && right != E_X && page_has_breakpoint(cpu->ts, e->page))
        return;
    if (right == E_W && !l1_store_allowed(cpu, e->page + (e->word & PAGE_MASK)))
        return;
    arr[TLB_INDEX(e->page)] = (struct tlbe){.tag = e->page, .addend = e->word & PAGE_MASK};
}

/* A read that the module has answered stays MMIO to its end, even if memory has come there since. */
static bool is_answered(const struct cpu *cpu, unsigned access, u64 gpa, unsigned len)
{
    const struct cpu_ctl *ctl = &CTL(cpu);

    if (likely(cpu->mmio_pos >= ctl->mmio_count) || access & (ACC_WRITE | ACC_FETCH))
        return false;
    for (u32 k = cpu->mmio_pos; k < ctl->mmio_count && k < CPU_NR_MMIO; k++) {
        if (ctl->mmio[k].gpa == gpa && ctl->mmio[k].len == len)
            return true;
    }
    return false;
}

static bool walk_and_fill(struct cpu *cpu, enum tlb_ctx ctx, unsigned access, u64 right,
                          struct span *s)
{
    struct translation t;

    if (!walk_linear(cpu, s->la, access, ctx >= CTX_USER, &t))
        return false;
    s->hva = t.hva;
    s->gpa = t.gpa;
    s->mmio = t.mmio;
    if (t.mmio)
        return true;
    if (unlikely(is_answered(cpu, access, t.gpa, s->len))) {
        s->hva = 0;
        s->mmio = true;
        return true;
    }
    u64 rights = right | (t.readable ? E_R : 0) | (t.writable ? E_W : 0);
    l1_install(cpu, ctx, l2_fill(cpu, ctx, s->la & PAGE_MASK, rights, &t), right);
    return true;
}

/* s->la and s->len are set. */
static bool translate(struct cpu *cpu, unsigned access, struct span *s)
{
    enum tlb_ctx ctx = tlb_context(cpu, access & ACC_SYSTEM);
    u64 right = access & ACC_WRITE ? E_W : access & ACC_FETCH ? E_X : E_R;
    struct l2_entry *e = l2_find(cpu->ts, ctx, s->la & PAGE_MASK);

    if (!e || !(e->word & right))
        return walk_and_fill(cpu, ctx, access, right, s);
    s->hva = s->la + (e->word & PAGE_MASK);
    s->mmio = false;
    l1_install(cpu, ctx, e, right);
    return true;
}

static bool check_canonical(struct cpu *cpu, u64 la, unsigned size, unsigned access)
{
    if (likely(is_canonical(cpu, la) && is_canonical(cpu, la + size - 1)))
        return true;
    return access & ACC_STACK ? raise_ss(cpu, 0) : raise_gp(cpu, 0);
}

/* SDM vol. 3 table 6-7. 10 bytes: an x87 register; the odd sizes are x87 environments, of two or
 * four bytes each; whether vectors are checked is the processor's choice (vol. 2, MOVDQU). */
static unsigned alignment(unsigned size)
{
    switch (size) {
    case 2:
    case 14:
    case 94: return 2;
    case 4:
    case 28:
    case 108: return 4;
    case 8:
    case 10: return 8;
    default: return 1;
    }
}

bool mem_check_alignment(struct cpu *cpu, u64 la, unsigned size)
{
    if (likely(cpu->tlb != &cpu->ctx[CTX_USER_AC]) || !(la & (alignment(size) - 1)))
        return true;
    return raise_exception(cpu, AC_VECTOR, true, 0);
}

/* #AC comes behind page faults: SDM vol. 3 table 6-2. */
static bool check_alignment(struct cpu *cpu, u64 la, unsigned size, unsigned access)
{
    return access & (ACC_SYSTEM | ACC_BYTES) || cpu->delivering ||
           mem_check_alignment(cpu, la, size);
}

/* Translates all of an access: nothing is done before every page of it was found. Number of
 * spans, 0 with cpu->stop set. */
static unsigned translate_spans(struct cpu *cpu, u64 la, unsigned size, unsigned access,
                                struct span s[2])
{
    u64 mask = linear_mask(cpu, access);
    unsigned room = (unsigned)(PAGE_SIZE - (la & ~PAGE_MASK));

    la &= mask;
    if (mask == ~0ull && !check_canonical(cpu, la, size, access))
        return 0;
    s[0] = (struct span){.la = la, .len = size < room ? size : room};
    if (!translate(cpu, access, &s[0]))
        return 0;
    if (likely(size <= room))
        return check_alignment(cpu, la, size, access);
    s[1] = (struct span){.la = (la + room) & mask, .len = size - room};
    return translate(cpu, access, &s[1]) && check_alignment(cpu, la, size, access) ? 2 : 0;
}

/* ---- MMIO ------------------------------------------------------------------------------------------ */

#define MMIO_PIECE 64

static unsigned mmio_pieces(unsigned len) { return (len + MMIO_PIECE - 1) / MMIO_PIECE; }

/* Whether this access may go to MMIO at all: descriptor tables and the frames of events cannot. */
static bool mmio_allowed(struct cpu *cpu, const struct span *s, unsigned access)
{
    if (likely(!(access & ACC_SYSTEM) && !cpu->delivering))
        return true;
    raise_exit(cpu, EXIT_EMULATION);
    EXIT(cpu).gpa = s->gpa;
    EXIT(cpu).gla = s->la;
    return false;
}

/* The module's answer to an earlier exit of this instruction, or that exit. */
static bool mmio_read_piece(struct cpu *cpu, u64 gpa, u64 la, void *dst, unsigned len)
{
    struct cpu_ctl *ctl = &CTL(cpu);
    struct cpu_exit *exit = &EXIT(cpu);

    for (u32 k = cpu->mmio_pos; k < ctl->mmio_count && k < CPU_NR_MMIO; k++) {
        if (ctl->mmio[k].gpa != gpa || ctl->mmio[k].len != len)
            continue;
        memcpy(dst, ctl->mmio[k].data, len);
        cpu->mmio_pos = k + 1;
        return true;
    }
    raise_exit(cpu, ctl->mmio_count < CPU_NR_MMIO ? EXIT_MMIO_READ : EXIT_EMULATION);
    exit->gpa = gpa;
    exit->gla = la;
    exit->mmio_count = 1;
    exit->mmio[0].gpa = gpa;
    exit->mmio[0].len = len;
    return false;
}

static bool mmio_read(struct cpu *cpu, const struct span *s, u8 *dst)
{
    for (unsigned k = 0; k < s->len; k += MMIO_PIECE) {
        unsigned len = s->len - k < MMIO_PIECE ? s->len - k : MMIO_PIECE;
        if (!mmio_read_piece(cpu, s->gpa + k, s->la + k, dst + k, len))
            return false;
    }
    return true;
}

static void mmio_post(struct cpu *cpu, const struct span *s, const u8 *src)
{
    for (unsigned k = 0; k < s->len; k += MMIO_PIECE) {
        struct cpu_mmio *m = &EXIT(cpu).mmio[cpu->posted++];
        m->gpa = s->gpa + k;
        m->len = s->len - k < MMIO_PIECE ? s->len - k : MMIO_PIECE;
        memcpy(m->data, src + k, m->len);
    }
}

/* ---- reading and writing ------------------------------------------------------------------------------ */

static bool span_read(struct cpu *cpu, const struct span *s, void *dst)
{
    return s->hva ? host_load(cpu, dst, s->hva, s->len) : mmio_read(cpu, s, dst);
}

static bool span_write(struct cpu *cpu, const struct span *s, const void *src)
{
    if (likely(!s->mmio))
        return host_store(cpu, s->hva, src, s->len);
    mmio_post(cpu, s, src);
    return true;
}

/* Everything that can still keep a translated read from being done. */
static bool begin_read(struct cpu *cpu, const struct span *s, unsigned n, unsigned access)
{
    for (unsigned k = 0; k < n; k++) {
        if ((!s[k].hva && !mmio_allowed(cpu, &s[k], access)) ||
            !check_breakpoints(cpu, s[k].la, s[k].len, access))
            return false;
    }
    return true;
}

/* The same for a write; code that is overwritten is dead afterwards. */
static bool begin_write(struct cpu *cpu, const struct span *s, unsigned n, unsigned access)
{
    unsigned pieces = 0;

    for (unsigned k = 0; k < n; k++) {
        if (s[k].mmio) {
            if (!mmio_allowed(cpu, &s[k], access))
                return false;
            pieces += mmio_pieces(s[k].len);
        }
        if (!check_breakpoints(cpu, s[k].la, s[k].len, access))
            return false;
    }
    if (pieces && !cpu->step) {
        cpu->stop = STOP_STEP;
        return false;
    }
    if (cpu->posted + pieces > CPU_NR_MMIO && pieces)
        return raise_exit(cpu, EXIT_EMULATION);
    for (unsigned k = 0; k < n; k++) {
        if (!s[k].mmio && unlikely(block_page_has_code(cpu, s[k].hva & PAGE_MASK)) &&
            !block_store(cpu, s[k].hva, s[k].len))
            return false;
    }
    return true;
}

bool mem_read(struct cpu *cpu, u64 la, void *p, unsigned size, unsigned access)
{
    struct span s[2];
    unsigned n = translate_spans(cpu, la, size, access, s);

    if (!n || !begin_read(cpu, s, n, access) || !span_read(cpu, &s[0], p))
        return false;
    return n == 1 || span_read(cpu, &s[1], (u8 *)p + s[0].len);
}

bool mem_write(struct cpu *cpu, u64 la, const void *p, unsigned size, unsigned access)
{
    struct span s[2];
    unsigned n;

    access |= ACC_WRITE;
    n = translate_spans(cpu, la, size, access, s);
    if (!n || !begin_write(cpu, s, n, access) || !span_write(cpu, &s[0], p))
        return false;
    return n == 1 || span_write(cpu, &s[1], (const u8 *)p + s[0].len);
}

bool mem_probe_read(struct cpu *cpu, u64 la, unsigned size, unsigned access)
{
    struct span s[2];

    return translate_spans(cpu, la, size, access, s) != 0;
}

bool mem_probe_write(struct cpu *cpu, u64 la, unsigned size, unsigned access)
{
    struct span s[2];

    return translate_spans(cpu, la, size, access | ACC_WRITE, s) != 0;
}

/* What lies in two pages that the host has apart is read and written by halves. Others that do the
 * same keep out meanwhile: the bus lock of SDM vol. 3 8.1.2.2, of which a machine has one. */
static atomic_flag bus = ATOMIC_FLAG_INIT;

static void bus_lock(struct cpu *cpu)
{
    for (unsigned n = 0; atomic_flag_test_and_set_explicit(&bus, memory_order_acquire); n++) {
        if (n < 100)
            __builtin_ia32_pause();
        else
            sched_yield();
    }
    cpu->bus_locked = true;
}

void bus_unlock(struct cpu *cpu)
{
    if (likely(!cpu->bus_locked))
        return;
    cpu->bus_locked = false;
    atomic_flag_clear_explicit(&bus, memory_order_release);
}

void *rmw_slow(struct cpu *cpu, u64 la, unsigned size, unsigned access)
{
    struct tlb_state *ts = cpu->ts;
    struct span *s = ts->rmw;

    access |= ACC_WRITE;
    ts->nr_rmw = translate_spans(cpu, la, size, access, s);
    if (!ts->nr_rmw || !begin_write(cpu, s, ts->nr_rmw, access))
        return NULL;
    /* In place whenever it can be: other processors must see it as one access. The pages of one
     * that crosses are mostly neighbours for the host, too. */
    if (!s[0].mmio && (ts->nr_rmw == 1 || (!s[1].mmio && s[1].hva == s[0].hva + s[0].len)))
        return (void *)s->hva;
    if (ts->nr_rmw == 2 && !s[0].mmio && !s[1].mmio)
        bus_lock(cpu);
    if (!span_read(cpu, &s[0], cpu->rmw_buf) ||
        (ts->nr_rmw == 2 && !span_read(cpu, &s[1], (u8 *)cpu->rmw_buf + s[0].len))) {
        bus_unlock(cpu);
        return NULL;
    }
    cpu->rmw_la = la;
    cpu->rmw_size = size;
    return cpu->rmw_buf;
}

void rmw_flush(struct cpu *cpu)
{
    const struct tlb_state *ts = cpu->ts;

    span_write(cpu, &ts->rmw[0], cpu->rmw_buf);
    if (ts->nr_rmw == 2)
        span_write(cpu, &ts->rmw[1], (u8 *)cpu->rmw_buf + ts->rmw[0].len);
    bus_unlock(cpu);
}

void *mem_direct(struct cpu *cpu, u64 la, unsigned access, unsigned *len)
{
    struct span s = {.la = la & linear_mask(cpu, access)};
    unsigned room = (unsigned)(PAGE_SIZE - (la & ~PAGE_MASK));
    u32 stop = cpu->stop;

    if (cpu->tlb == &cpu->ctx[CTX_USER_AC] ||
        (linear_mask(cpu, access) == ~0ull && !is_canonical(cpu, la)))
        return NULL;
    if (!translate(cpu, access, &s)) {
        cpu->stop = stop; /* the element that meets it raises it again */
        return NULL;
    }
    if (s.mmio || (cpu->ts->nr_breakpoints && page_has_breakpoint(cpu->ts, s.la & PAGE_MASK)) ||
        (access & ACC_WRITE && block_page_has_code(cpu, s.hva & PAGE_MASK)))
        return NULL;
    if (*len > room)
        *len = room;
    return (void *)s.hva;
}

uintptr_t tlb_fetch(struct cpu *cpu, u64 la)
{
    const struct tlbe *e = &cpu->tlb->x[TLB_INDEX(la)];
    struct span s = {.la = la & linear_mask(cpu, ACC_FETCH)};

    if (likely(e->tag == (la & PAGE_MASK)))
        return la + e->addend;
    if (linear_mask(cpu, ACC_FETCH) == ~0ull && !check_canonical(cpu, la, 1, ACC_FETCH))
        return 0;
    return translate(cpu, ACC_FETCH, &s) ? s.hva : 0;
}
