/* SPDX-License-Identifier: MIT */
/*
 * The cache of decoded blocks.
 *
 * A block is found by the host address of its first byte and the mode it was decoded for, so
 * that it survives whatever the guest does to its page tables.  It is code for as long as the
 * bytes it was decoded from are what memory holds:
 *   - the processor's own stores are caught exactly, in block_store(), since no page with
 *     code is writable through the TLB;
 *   - those of others (the VMM, DMA, other processors) are seen from the next serialising
 *     event on: that starts a new epoch, and a block of an older epoch is compared before use.
 * Blocks end at the page end.  An instruction that crosses it is a block of its own, whose two
 * translations are checked every time.
 */
#include <stdlib.h>

#include "block.h"

#define CHUNK_SIZE (64u << 10)
#define ARENA_MAX (32u << 20)
#define INSN_BYTES 15
#define LINE_SHIFT 6 /* 64 lines of 64 bytes per page */
/* So many stores over code in a page, and the page is probably used for something else now: all
 * of it is forgotten, and then written to at full speed. */
#define STORES_TO_FORGET 4

struct chunk {
    struct chunk *older;
    u8 mem[] __attribute__((aligned(16)));
};

struct codepage {
    uintptr_t hva;
    u64 lines;              /* those with code */
    u32 stores;             /* that hit code */
    struct block *blocks;   /* linked by page_next */
    struct block *crossing; /* that end here, linked by page2_next */
    struct codepage *next;
};

/* ---- memory ---------------------------------------------------------------------------------- */

static bool chunk_add(struct block_cache *bc)
{
    struct chunk *c = aligned_alloc(16, CHUNK_SIZE);

    if (!c)
        return false;
    c->older = bc->chunks;
    bc->chunks = c;
    bc->used = sizeof(struct chunk);
    bc->total += CHUNK_SIZE;
    return true;
}

/* NULL: full, or no memory. */
static void *arena_alloc(struct block_cache *bc, size_t size)
{
    size = (size + 15) & ~(size_t)15;
    if (bc->used + size > CHUNK_SIZE && (bc->total >= ARENA_MAX || !chunk_add(bc)))
        return NULL;
    void *p = (u8 *)bc->chunks + bc->used;
    bc->used += size;
    return p;
}

bool block_cache_init(struct cpu *cpu)
{
    cpu->bc = calloc(1, sizeof(*cpu->bc));
    cpu->epoch = 1;
    return cpu->bc && chunk_add(cpu->bc);
}

static void chunks_free(struct chunk *c)
{
    while (c) {
        struct chunk *older = c->older;
        free(c);
        c = older;
    }
}

void block_cache_free(struct cpu *cpu)
{
    if (cpu->bc)
        chunks_free(cpu->bc->chunks);
    free(cpu->bc);
    cpu->bc = NULL;
}

void block_flush(struct cpu *cpu)
{
    struct block_cache *bc = cpu->bc;

    memset(bc->hash, 0, sizeof(bc->hash));
    memset(bc->page, 0, sizeof(bc->page));
    chunks_free(bc->chunks->older);
    bc->chunks->older = NULL;
    bc->used = sizeof(struct chunk);
    bc->total = CHUNK_SIZE;
    bc->generation++;
    cpu->block = NULL;
    cpu->insn = NULL;
    cpu->vmcs.stats.blocks_flushed++;
}

/* ---- pages with code ---------------------------------------------------------------------------- */

static struct codepage **page_bucket(struct block_cache *bc, uintptr_t hva)
{
    return &bc->page[(hva >> PAGE_SHIFT ^ hva >> (PAGE_SHIFT + PAGE_HASH_BITS)) &
                     ((1u << PAGE_HASH_BITS) - 1)];
}

static struct codepage *page_find(struct block_cache *bc, uintptr_t hva)
{
    struct codepage *p = *page_bucket(bc, hva & PAGE_MASK);

    while (p && p->hva != (hva & PAGE_MASK))
        p = p->next;
    return p;
}

static struct codepage *page_get(struct block_cache *bc, uintptr_t hva)
{
    struct codepage *p = page_find(bc, hva), **bucket = page_bucket(bc, hva & PAGE_MASK);

    if (p)
        return p;
    p = arena_alloc(bc, sizeof(*p));
    if (!p)
        return NULL;
    *p = (struct codepage){.hva = hva & PAGE_MASK, .next = *bucket};
    *bucket = p;
    return p;
}

/* The lines of [hva, hva + len), which lie in one page. */
static u64 line_mask(uintptr_t hva, unsigned len)
{
    unsigned first = hva >> LINE_SHIFT & 63, last = (hva + len - 1) >> LINE_SHIFT & 63;

    return (~0ull >> (63 - (last - first))) << first;
}

bool block_page_has_code(struct cpu *cpu, uintptr_t hva)
{
    const struct codepage *p = page_find(cpu->bc, hva);

    return p && p->lines;
}

/* How many bytes of the block lie in its first page. */
static unsigned first_part(const struct block *b)
{
    unsigned room = PAGE_SIZE - (b->hva & ~PAGE_MASK);

    return b->len < room ? b->len : room;
}

static bool block_overlaps(const struct block *b, uintptr_t hva, unsigned len)
{
    unsigned first = first_part(b);

    if (hva < b->hva + first && b->hva < hva + len)
        return true;
    return b->hva2 && hva < b->hva2 + (b->len - first) && b->hva2 < hva + len;
}

static void page_count_lines(struct codepage *p)
{
    p->lines = 0;
    for (const struct block *b = p->blocks; b; b = b->page_next)
        p->lines |= line_mask(b->hva, first_part(b));
    for (const struct block *b = p->crossing; b; b = b->page2_next)
        p->lines |= line_mask(b->hva2, b->len - first_part(b));
}

static void page_add(struct cpu *cpu, struct codepage *p, uintptr_t hva, unsigned len)
{
    bool first = !p->lines;

    p->lines |= line_mask(hva, len);
    if (first)
        tlb_protect_code(cpu, p->hva);
}

/* ---- blocks dying --------------------------------------------------------------------------------- */

#define LIST_REMOVE(head, b, link)                                                                 \
    do {                                                                                           \
        struct block **at_ = &(head);                                                              \
        while (*at_ && *at_ != (b))                                                                \
            at_ = &(*at_)->link;                                                                   \
        if (*at_)                                                                                  \
            *at_ = (b)->link;                                                                      \
    } while (0)

/* The memory stays until the next flush: others may be linked to it, and see its epoch. */
static void block_kill(struct cpu *cpu, struct block *b)
{
    struct codepage *p = page_find(cpu->bc, b->hva);

    b->epoch = 0;
    LIST_REMOVE(cpu->bc->hash[block_hash(b->hva)], b, next);
    LIST_REMOVE(p->blocks, b, page_next);
    if (b->hva2) {
        p = page_find(cpu->bc, b->hva2);
        LIST_REMOVE(p->crossing, b, page2_next);
    }
}

/* Kills the blocks with bytes in [hva, hva + len); whether there were any. */
static bool page_kill(struct cpu *cpu, struct codepage *p, uintptr_t hva, unsigned len)
{
    struct block *b, *next;
    bool any = false;

    for (b = p->blocks; b; b = next) {
        next = b->page_next;
        if (!block_overlaps(b, hva, len))
            continue;
        block_kill(cpu, b);
        any = true;
    }
    for (b = p->crossing; b; b = next) {
        next = b->page2_next;
        if (!block_overlaps(b, hva, len))
            continue;
        block_kill(cpu, b);
        any = true;
    }
    return any;
}

bool block_store(struct cpu *cpu, uintptr_t hva, unsigned len)
{
    struct codepage *p = page_find(cpu->bc, hva);

    if (!p || !(p->lines & line_mask(hva, len)))
        return true;
    /* What has been decoded of the current block is behind the times, unless it is over. */
    if (cpu->block && !cpu->step && !cpu->delivering && block_overlaps(cpu->block, hva, len)) {
        cpu->stop = STOP_STEP;
        return false;
    }
    if (!page_kill(cpu, p, hva, len)) {
        page_count_lines(p); /* those of blocks that have died otherwise may be free */
        return true;
    }
    if (++p->stores % STORES_TO_FORGET == 0)
        page_kill(cpu, p, p->hva, PAGE_SIZE);
    page_count_lines(p);
    cpu->vmcs.stats.smc++;
    return true;
}

/* ---- decoding --------------------------------------------------------------------------------------- */

struct builder {
    struct cpu *cpu;
    u32 mode;
    u64 la;
    uintptr_t hva, hva2;
    unsigned n;     /* bytes there are */
    unsigned limit; /* bytes up to the limit of CS */
    unsigned len;   /* bytes decoded */
    unsigned count; /* instructions decoded */
    bool cut;       /* ends in the #GP of this limit of CS, not to be kept */
    u8 bytes[BLOCK_MAX * INSN_BYTES + INSN_BYTES];
    struct insn insn[BLOCK_MAX + 1];
};

struct block no_block;

int x_end(struct cpu *cpu, const struct insn *i)
{
    (void)i;
    return block_leave(cpu, LINK0, block_end(cpu));
}

static unsigned min_size(u64 a, u64 b) { return (unsigned)(a < b ? a : b); }

/* Reading may end in the guard (host.c), so before anything is changed. */
static void builder_read(struct builder *w, u64 rip)
{
    struct cpu *cpu = w->cpu;
    u64 limit = SEG(cpu, CPU_SEG_CS).limit;

    w->n = min_size(PAGE_SIZE - (w->hva & ~PAGE_MASK), BLOCK_MAX * INSN_BYTES);
    w->limit = sizeof(w->bytes);
    if (!is_code64(cpu))
        w->limit = rip > limit ? 0 : min_size(limit - rip + 1, sizeof(w->bytes));
    w->n = min_size(w->n, w->limit);
    memcpy(w->bytes, (const void *)w->hva, w->n);
}

/* Adds the bytes of the next page for the one instruction that needs them. */
static bool builder_read_next_page(struct builder *w)
{
    u64 la = (w->la & PAGE_MASK) + PAGE_SIZE;
    unsigned size = min_size(INSN_BYTES, w->limit - w->n);

    w->hva2 = tlb_fetch(w->cpu, is_code64(w->cpu) ? la : (u32)la);
    if (!w->hva2)
        return false;
    memcpy(w->bytes + w->n, (const void *)w->hva2, size);
    w->n += size;
    return true;
}

static bool is_rep(const struct insn *i)
{
    return i->op && i->op->form == F_STR && i->flags & (I_REP | I_REPNE);
}

static bool ends_block(const struct insn *i)
{
    if (i->fn == x_ud || i->fn == x_gp0)
        return true;
    return (i->op->flags & O_END) || is_rep(i);
}

static struct insn *builder_next(struct builder *w)
{
    struct insn *i = &w->insn[w->count];

    i->off = (u16)w->len;
    if (i->base == GPR_RIP)
        i->disp += i->off;
    w->len += i->len;
    w->count++;
    return i;
}

static void builder_gp(struct builder *w)
{
    struct insn *i = &w->insn[w->count];

    i->fn = x_gp0;
    i->base = GPR_ZERO;
    builder_next(w);
}

/* Decodes up to the end of the block; what needs more bytes than there are is left over. */
static void builder_decode(struct builder *w, unsigned max)
{
    while (w->count < max) {
        int len =
            decode_insn(w->cpu, w->bytes + w->len, w->n - w->len, w->mode, &w->insn[w->count]);
        if (len == -1)
            return;
        if (len == -2)
            w->insn[w->count].fn = x_gp0;
        if (ends_block(builder_next(w)))
            return;
    }
}

/* Decodes the block of rip. false: the first instruction cannot be fetched, cpu->stop set. */
static bool builder_run(struct builder *w, u64 rip)
{
    unsigned max = w->mode & MODE_STEP ? 1 : BLOCK_MAX;

    builder_read(w, rip);
    builder_decode(w, max);
    if (!w->count && w->n < w->limit && w->n < INSN_BYTES) {
        if (!builder_read_next_page(w))
            return false;
        builder_decode(w, 1);
    }
    if (!w->count) { /* only the limit of CS can be in the way now */
        builder_gp(w);
        w->cut = true;
    }
    if (w->hva2 && w->hva + w->len <= (w->hva | ~PAGE_MASK) + 1)
        w->hva2 = 0;
    if (w->count >= 2 && w->insn[w->count - 1].op)
        fuse(&w->insn[w->count - 2]);
    w->insn[w->count] =
        (struct insn){.fn = x_end, .off = (u16)w->len, .base = GPR_ZERO, .index = GPR_ZERO};
    return true;
}

/* Copies it into the arena; NULL when that is full. */
static struct block *builder_finish(const struct builder *w)
{
    struct block_cache *bc = w->cpu->bc;
    size_t insns = (w->count + 1) * sizeof(struct insn);
    struct codepage *p = page_get(bc, w->hva), *p2 = w->hva2 ? page_get(bc, w->hva2) : NULL;
    struct block *b = arena_alloc(bc, sizeof(*b) + insns + w->len);

    if (!b || !p || (w->hva2 && !p2))
        return NULL;
    *b = (struct block){.epoch = w->cut ? 0 : w->cpu->epoch,
                        .hva = w->hva,
                        .hva2 = w->hva2,
                        .mode = (u16)w->mode,
                        .n = (u16)w->count,
                        .len = (u16)w->len,
                        .bytes = (u8 *)b->insn + insns,
                        .repeats = is_rep(&w->insn[w->count - 1]),
                        .link = {&no_block, &no_block}};
    memcpy(b->insn, w->insn, insns);
    memcpy((u8 *)b->insn + insns, w->bytes, w->len);
    w->cpu->vmcs.stats.blocks_built++;
    if (w->cut)
        return b;
    b->next = bc->hash[block_hash(b->hva)];
    bc->hash[block_hash(b->hva)] = b;
    b->page_next = p->blocks;
    p->blocks = b;
    page_add(w->cpu, p, b->hva, first_part(b));
    if (b->hva2) {
        b->page2_next = p2->crossing;
        p2->crossing = b;
        page_add(w->cpu, p2, b->hva2, b->len - first_part(b));
    }
    return b;
}

static struct block *block_build(struct cpu *cpu, u64 la, uintptr_t hva, u32 mode)
{
    struct builder w = {.cpu = cpu, .mode = mode, .la = la, .hva = hva};
    struct block *b;

    if (!builder_run(&w, GUEST(cpu).rip))
        return NULL;
    b = builder_finish(&w);
    if (!b) {
        block_flush(cpu);
        b = builder_finish(&w);
    }
    if (!b)
        raise_exit(cpu, EXIT_EMULATION);
    return b;
}

/* ---- finding ------------------------------------------------------------------------------------------ */

/* Is memory still what the block was made of? */
static bool block_current(struct cpu *cpu, struct block *b)
{
    unsigned first = first_part(b);

    if (b->epoch == cpu->epoch)
        return true;
    if (memcmp(b->bytes, (const void *)b->hva, first) ||
        (b->hva2 && memcmp(b->bytes + first, (const void *)b->hva2, b->len - first)))
        return false;
    b->epoch = cpu->epoch;
    return true;
}

/* Is the second page still where it was? 0: no, -1: cannot be fetched. */
static int second_page_same(struct cpu *cpu, const struct block *b, u64 la)
{
    u64 next = (la & PAGE_MASK) + PAGE_SIZE;
    uintptr_t hva2 = tlb_fetch(cpu, is_code64(cpu) ? next : (u32)next);

    return hva2 ? hva2 == b->hva2 : -1;
}

struct block *block_find(struct cpu *cpu, bool step)
{
    u32 mode = cpu->mode | (step ? MODE_STEP : 0);
    u64 la = code_linear(cpu, GUEST(cpu).rip);
    struct block *b, **at;
    uintptr_t hva;

    cpu->block = NULL;
    cpu->insn = NULL;
    if (!is_code64(cpu) && GUEST(cpu).rip > SEG(cpu, CPU_SEG_CS).limit) {
        raise_gp(cpu, 0); /* before anything about the page */
        return NULL;
    }
    hva = tlb_fetch(cpu, la);
    if (!hva)
        return NULL;
    struct block **head = &cpu->bc->hash[block_hash(hva)];
    for (at = head; (b = *at); at = &b->next)
        if (b->hva == hva && b->mode == mode)
            break;
    if (!b)
        return block_build(cpu, la, hva, mode);
    int same = b->hva2 ? second_page_same(cpu, b, la) : 1;
    if (same < 0)
        return NULL;
    bool fits = is_code64(cpu) || GUEST(cpu).rip + b->len - 1 <= SEG(cpu, CPU_SEG_CS).limit;
    if (!same || !fits || !block_current(cpu, b)) {
        block_kill(cpu, b);
        return block_build(cpu, la, hva, mode);
    }
    *at = b->next; /* to the front, where block_peek() looks */
    b->next = *head;
    *head = b;
    return b;
}

bool block_can_link(const struct cpu *cpu, const struct block *from, const struct block *to)
{
    const struct insn *last = &from->insn[from->n - 1];
    bool code32 = (from->mode & MODE_CODE) == MODE_CODE32;

    /* Another linear page is another translation, though it may lead to the same host page now. */
    if ((GPR(cpu, GPR_RIP) ^ GUEST(cpu).rip) & PAGE_MASK)
        return false;
    if ((from->hva ^ to->hva) & PAGE_MASK || from->hva2 || to->hva2 || from->mode != to->mode)
        return false;
    if ((from->mode & MODE_CODE) == MODE_CODE64)
        return true;
    /* 16-bit targets depend on more of rip than its place in the page */
    return code32 && (from->mode & MODE_FLAT) && last->opsize != 2;
}
