/* SPDX-License-Identifier: MIT */
/* Making cases from templates, and comparing what came out. */
#include <string.h>
#include <sys/mman.h>

#include "fuzz.h"

#define PAGE 4096u
#define RAX 0

static uint64_t next_random(uint64_t *s)
{
    uint64_t z = (*s += 0x9e3779b97f4a7c15);
    z = (z ^ z >> 30) * 0xbf58476d1ce4e5b9;
    z = (z ^ z >> 27) * 0x94d049bb133111eb;
    return z ^ z >> 31;
}

/* Values at the edges of the operand sizes, short and long ones of both signs, and any. */
static uint64_t operand(uint64_t *s)
{
    static const uint64_t edges[] = {
        0,          1,
        2,          0x7f,
        0x80,       0xff,
        0x7fff,     0x8000,
        0xffff,     0x7fffffff,
        0x80000000, 0xffffffff,
        1ull << 63, ~0ull >> 1,
        ~0ull,      ~1ull,
        31,         32,
        33,         63,
        64,         0x5555555555555555,
        9,          0x99,
        0x9a,
    };
    const unsigned n = sizeof(edges) / sizeof(*edges);
    uint64_t r = next_random(s);

    switch (r & 7) {
    case 0: return edges[(r >> 3) % n];
    case 1: return edges[(r >> 3) % n] ^ edges[(r >> 32) % n] << 32;
    case 2: return next_random(s) >> (r >> 3 & 63);
    case 3: return -(next_random(s) >> (r >> 3 & 63));
    default: return next_random(s);
    }
}

static uint64_t background(uint64_t memory_seed) { return next_random(&memory_seed); }

void fuzz_expand(const struct fuzz_template *t, uint64_t seed, struct fuzz_case *c)
{
    memset(c, 0, sizeof(*c));
    memcpy(c->bytes, t->bytes, sizeof(c->bytes));
    c->len = t->len;
    c->flags = t->flags;
    c->patch_at = t->patch_at;
    c->patch = t->patch;
    c->flags_mask = t->flags_mask;
    c->memory_seed = next_random(&seed);
    for (unsigned n = 0; n < 16; n++)
        c->in.gpr[n] = t->fixed >> n & 1 ? t->value[n] : operand(&seed);
    if ((t->flags & FUZZ_RAX_FOUND) && next_random(&seed) & 1)
        c->in.gpr[RAX] = background(c->memory_seed);
    for (unsigned n = 0; n < 16 && (t->flags & (FUZZ_CODE32 | FUZZ_CODE16)); n++)
        c->in.gpr[n] = (uint32_t)c->in.gpr[n];
    c->in.rip = t->rip;
    c->in.rflags = 0x202 | (next_random(&seed) & 0xcd5);
}

/* A repeating word with some changes: string instructions find equal and unequal runs. */
void fuzz_fill(uint8_t *pages, const struct fuzz_case *c)
{
    uint64_t seed = c->memory_seed, word = next_random(&seed);

    for (unsigned page = 0; page < FUZZ_DATA_PAGES; page++) {
        uint64_t *p = (uint64_t *)(pages + page * PAGE);
        if (page == 2)
            continue;
        for (unsigned n = 0; n < PAGE / 8; n++)
            p[n] = word;
        for (unsigned n = 0; n < 24; n++)
            p[next_random(&seed) % (PAGE / 8)] = next_random(&seed);
    }
    if (c->patch_at)
        memcpy(pages + (c->patch_at - FUZZ_DATA), &c->patch, 8);
}

uint64_t fuzz_hash(const uint8_t *pages)
{
    uint64_t h = 0;

    for (unsigned page = 0; page < FUZZ_DATA_PAGES; page++) {
        const uint64_t *p = (const uint64_t *)(pages + page * PAGE);
        for (unsigned n = 0; page != 2 && n < PAGE / 8; n++)
            h = (h ^ p[n]) * 0x9e3779b97f4a7c15 + (h >> 29);
    }
    return h;
}

void *fuzz_shared(uint64_t size)
{
    void *p = mmap(NULL, size, PROT_READ | PROT_WRITE, MAP_SHARED | MAP_ANONYMOUS, -1, 0);
    return p == MAP_FAILED ? NULL : p;
}

/* Addresses that are none of ours: what the host has there is its own affair. */
static int is_foreign(uint64_t la)
{
    return la - FUZZ_DATA >= FUZZ_DATA_PAGES * PAGE && la - FUZZ_CODE >= FUZZ_CODE_PAGES * PAGE;
}

static int same_exception(const struct fuzz_result *a, const struct fuzz_result *b)
{
    if (a->vector != b->vector)
        return 0;
    if (a->vector == 14 && is_foreign(a->cr2) && is_foreign(b->cr2))
        return a->cr2 == b->cr2;
    return a->vector < 0 || (a->error == b->error && (a->vector != 14 || a->cr2 == b->cr2));
}

static int same(const struct fuzz_case *c, const struct fuzz_result *a, const struct fuzz_result *b)
{
    if (b->vector == 14 && a->vector != 14 && is_foreign(b->cr2))
        return 1;
    return same_exception(a, b) && a->out.rip == b->out.rip &&
           !memcmp(a->out.gpr, b->out.gpr, sizeof(a->out.gpr)) &&
           !((a->out.rflags ^ b->out.rflags) & c->flags_mask) && a->memory_hash == b->memory_hash;
}

int fuzz_differs(const struct fuzz_case *cases, const struct fuzz_result *native,
                 const struct fuzz_result *core, int from, int n)
{
    while (from < n && same(&cases[from], &native[from], &core[from]))
        from++;
    return from;
}
