/* SPDX-License-Identifier: MIT */
/* The cache of decoded blocks: what the main loop inlines of it. */
#ifndef PYKVM_BLOCK_H
#define PYKVM_BLOCK_H

#include "core.h"

#define BLOCK_HASH_BITS 14
#define PAGE_HASH_BITS 11

struct block_cache {
    struct block *hash[1u << BLOCK_HASH_BITS];
    struct codepage *page[1u << PAGE_HASH_BITS];
    struct chunk *chunks; /* arena, newest first */
    size_t used;          /* bytes of the newest */
    size_t total;         /* bytes of all */
    u64 generation;       /* counts flushes: block pointers from before are gone */
};

static inline unsigned block_hash(uintptr_t hva)
{
    return (unsigned)(hva ^ hva >> BLOCK_HASH_BITS) & ((1u << BLOCK_HASH_BITS) - 1);
}

/* Linear address of the instruction at rip. */
static inline u64 code_linear(const struct cpu *cpu, u64 rip)
{
    return is_code64(cpu) ? rip : (u32)(rip + SEG(cpu, CPU_SEG_CS).base);
}

/* The block of rip when everything about it is known to be as it was; else NULL, which says
 * nothing: block_find() knows. */
static inline struct block *block_peek(struct cpu *cpu)
{
    u64 rip = GUEST(cpu).rip, la = code_linear(cpu, rip);
    const struct tlbe *e = &cpu->tlb->x[TLB_INDEX(la)];
    uintptr_t hva = (uintptr_t)(la + e->addend);
    struct block *b = cpu->bc->hash[block_hash(hva)];

    if (unlikely(e->tag != (la & PAGE_MASK) || !b || b->hva != hva || b->mode != cpu->mode ||
                 b->epoch != cpu->epoch || b->hva2))
        return NULL;
    if (!is_code64(cpu) && unlikely(rip + b->len - 1 > SEG(cpu, CPU_SEG_CS).limit))
        return NULL;
    return b;
}

#ifdef __SANITIZE_ADDRESS__ /* no tail calls: the stack would grow with every block */
#define BLOCKS_CHAIN false
#else
#define BLOCKS_CHAIN true
#endif

/* What a block without a successor is linked to: never usable. */
extern struct block no_block;

/* rip behind the current block. */
static inline u64 block_end(const struct cpu *cpu)
{
    return (GPR(cpu, GPR_RIP) + cpu->block->len) & cpu->ip_mask;
}

/* Not every call of the next handler is a tail call, since not every handler lets the compiler make it
 * one (a local variable whose address was given away is enough).  The stack of blocks that run each
 * other ends here. */
static inline bool block_has_stack(const struct cpu *cpu)
{
    uintptr_t sp;

    __asm__("mov %%rsp, %[sp]" : [sp] "=r"(sp));
    return sp > cpu->stack_limit;
}

/* May the loop be left out, because there is nothing to look at between this block and the next? */
static inline bool block_may_chain(const struct cpu *cpu)
{
    return BLOCKS_CHAIN && likely(cpu->budget > cpu->block->n && block_has_stack(cpu) &&
                                  !atomic_load_explicit(&cpu->request, memory_order_relaxed));
}

/* Retires the block and runs the next. */
static inline int block_chain(struct cpu *cpu, struct block *next, u64 rip)
{
    cpu->budget -= cpu->block->n;
    cpu->block = next;
    GPR(cpu, GPR_RIP) = rip;
    return next->insn->fn(cpu, next->insn);
}

/* The end of a direct branch: into the successor that is linked, or by the loop. */
static inline int block_leave(struct cpu *cpu, int way, u64 rip)
{
    struct block *next = cpu->block->link[way];

    if (likely(next->epoch == cpu->epoch) && block_may_chain(cpu))
        return block_chain(cpu, next, rip);
    set_rip(cpu, rip);
    return way;
}

/* The end of an indirect branch, which has changed nothing but registers and memory. */
static inline int block_leave_to(struct cpu *cpu, u64 rip)
{
    struct block *next;

    set_rip(cpu, rip);
    next = block_peek(cpu);
    if (likely(next) && !cpu->step && block_may_chain(cpu))
        return block_chain(cpu, next, rip);
    return LOOKUP;
}

/* fuse.c: if the handler of i and the branch behind it can be one, i gets that. */
void fuse(struct insn *i);

/* Whether `from`, which has just been left for `to`, may go there without a lookup: in the page, and
 * never by a truncated IP. */
bool block_can_link(const struct cpu *cpu, const struct block *from, const struct block *to);

#endif
