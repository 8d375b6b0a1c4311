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

/* Floating point of 32 and 64 bits: zeros, denormals, the ends of ranges, infinities, NaNs, values
 * about those that integers hold; half precision; masks; anything. */
static uint32_t float32(uint64_t *s)
{
    static const uint32_t edges[] = {
        0,          1,          0x00400000, 0x007fffff, 0x00800000, 0x00ffffff, 0x1fffffff,
        0x20000000, 0x33800000, 0x3effffff, 0x3f000000, 0x3f800000, 0x3fc00000, 0x40000000,
        0x40200000, 0x4effffff, 0x4f000000, 0x5f000000, 0x7f000000, 0x7f7fffff, 0x7f800000,
        0x7f800001, 0x7fa12345, 0x7fc00000, 0x7fc12345,
    };
    uint64_t r = next_random(s);
    uint32_t v = edges[(r >> 8) % (sizeof(edges) / sizeof(*edges))] | (uint32_t)(r >> 63 << 31);

    switch (r & 3) {
    case 0: return v;
    case 1: return v ^ (r >> 40 & 3);
    case 2: return 0x3f000000 + (uint32_t)(r >> 16 & 0x1ffffff) + (uint32_t)(r >> 63 << 31);
    default: return (uint32_t)(r >> 16);
    }
}

static uint64_t float64(uint64_t *s)
{
    static const uint64_t edges[] = {
        0,
        1,
        0x000fffffffffffff,
        0x0010000000000000,
        0x1fffffffffffffff,
        0x2000000000000000,
        0x3690000000000000,
        0x36a0000000000000,
        0x3800000000000000,
        0x380fffffffffffff,
        0x3fe0000000000000,
        0x3ff0000000000000,
        0x3ff8000000000000,
        0x4004000000000000,
        0x41dfffffffc00000,
        0x41e0000000000000,
        0x43e0000000000000,
        0x47efffffe0000000,
        0x47efffffffffffff,
        0x7fefffffffffffff,
        0x7ff0000000000000,
        0x7ff0000000000001,
        0x7ff4000012345678,
        0x7ff8000000000000,
    };
    uint64_t r = next_random(s);
    uint64_t v = edges[(r >> 8) % (sizeof(edges) / sizeof(*edges))] | (r >> 63 << 63);

    switch (r & 3) {
    case 0: return v;
    case 1: return v ^ (r >> 40 & 3);
    case 2: return 0x3fe0000000000000 + next_random(s) % 0x40000000000000 + (r >> 63 << 63);
    default: return next_random(s);
    }
}

static uint64_t half4(uint64_t *s)
{
    static const uint16_t edges[] = {0,      1,      0x3ff,  0x400,  0x3c00, 0x7bff,
                                     0x7c00, 0x7c01, 0x7e00, 0x8000, 0xfbff, 0xfc00};
    uint64_t v = next_random(s);

    for (unsigned n = 0; n < 4; n++) {
        uint64_t r = next_random(s);
        if (r & 1)
            v = (v & ~(0xffffull << 16 * n)) | (uint64_t)edges[(r >> 8) % 12] << 16 * n;
    }
    return v;
}

/* Vectors are of one kind each. */
static void vector(uint64_t *s, uint64_t *v, unsigned n)
{
    unsigned kind = next_random(s) % 8;

    for (unsigned k = 0; k < n; k++) {
        switch (kind) {
        case 0:
        case 1:
            v[k] = float32(s);
            v[k] |= (uint64_t)float32(s) << 32;
            break;
        case 2:
        case 3: v[k] = float64(s); break;
        case 4: v[k] = half4(s); break;
        case 5:
            v[k] =
                next_random(s) & (0x8080808080808080 | next_random(s) % 256 * 0x0101010101010101);
            break;
        case 6: v[k] = operand(s); break;
        default: v[k] = next_random(s);
        }
    }
}

static void set_mxcsr(uint8_t *xsave, uint32_t v) { memcpy(xsave + FUZZ_MXCSR, &v, sizeof(v)); }

static void random_vectors(uint64_t *s, uint8_t *xsave)
{
    uint64_t r = next_random(s), bv = 7;
    uint32_t mxcsr = 0x1f80 | (r & 0x3f);

    memcpy(xsave + FUZZ_XSTATE_BV, &bv, sizeof(bv));
    for (unsigned n = 0; n < 16; n++) {
        uint64_t v[4];
        vector(s, v, 4);
        memcpy(xsave + FUZZ_XMM + 16 * n, v, 16);
        memcpy(xsave + FUZZ_YMM + 16 * n, v + 2, 16);
    }
    for (unsigned n = 0; r >> 60 == 0 && n < 16; n++) /* equal operands */
        memcpy(xsave + FUZZ_XMM + 16 * n, xsave + FUZZ_XMM + 16 * (r >> n & 3), 16);
    if (r & 0x100) /* rounding */
        mxcsr |= r >> 16 & 0x6000;
    if (!(r & 0xe00)) /* flush to zero, denormals are zero */
        mxcsr |= r >> 20 & 0x8040;
    if (!(r & 0x3000)) /* unmasked exceptions */
        mxcsr &= ~(uint32_t)(r >> 32 & 0x1f80);
    set_mxcsr(xsave, mxcsr);
}

/* 80 bits of every class there is: normal ones near the ends of the formats that are stored and
 * near 1, denormals, pseudo-denormals, unnormals, infinities, NaNs and what is neither. */
static void float80(uint64_t *s, uint8_t *p)
{
    static const uint16_t exponents[] = {
        0x3fff,        0x3fff - 1022,
        0x3fff - 1080, 0x3fff + 1023,
        0x3fff - 126,  0x3fff - 150,
        0x3fff + 127,  0x3fff - 63,
        0x3fff + 62,   0x3fff + 31,
        0x3fff + 15,   0x3fff - 70,
        0x3fff - 1000, 1,
        0x7ffe,        0x7000,
    };
    static const uint64_t edges[] = {
        1ull << 63, ~0ull, 3ull << 62, (1ull << 63) + 1, 0xffffff0000000000, 0xfffffffffffff800,
    };
    uint64_t r = next_random(s), significand = next_random(s) | 1ull << 63;
    uint16_t exponent = exponents[r >> 8 & 15];

    if (r & 0x10000)
        significand &= ~0ull << (r >> 17 & 63);
    if (!(r >> 24 & 7))
        significand = edges[(r >> 27) % (sizeof(edges) / sizeof(*edges))];
    exponent += r >> 40 & 3;
    switch (r & 15) {
    case 0:
        exponent = 0;
        significand >>= 1 + (r >> 32 & 63);
        break;
    case 1: exponent = 0; break;
    case 2:
        exponent = 0;
        significand = 0;
        break;
    case 3: significand >>= 1; break;
    case 4:
        exponent = 0x7fff;
        significand = 1ull << 63;
        break;
    case 5: exponent = 0x7fff; break;
    case 6:
        exponent = 0x7fff;
        significand &= ~(1ull << 62);
        break;
    case 7:
        exponent = 0x7fff;
        significand >>= 1 + (r >> 32 & 63);
        break;
    case 8: exponent = r >> 48 & 0x7fff; break;
    case 9: exponent = 0x3fff + (r >> 48 & 7); break;
    }
    exponent |= r >> 63 << 15;
    memcpy(p, &significand, 8);
    memcpy(p + 8, &exponent, 2);
}

/* Sixteen bytes of data: 80 bits, two of 64, four of 32, decimal digits, or integers. */
static void fpu_data(uint64_t *s, uint64_t *v)
{
    uint64_t r = next_random(s);

    v[0] = operand(s);
    v[1] = operand(s);
    switch (r & 7) {
    case 0:
    case 1: float80(s, (uint8_t *)v); break;
    case 2:
    case 3:
        v[0] = float64(s);
        v[1] = float64(s);
        break;
    case 4:
    case 5:
        v[0] = float32(s) | (uint64_t)float32(s) << 32;
        v[1] = float32(s) | (uint64_t)float32(s) << 32;
        break;
    case 6:
        for (unsigned n = 0; n < 18; n++) /* 18 digits */
            ((uint8_t *)v)[n / 2] = (uint8_t)(((uint8_t *)v)[n / 2] << 4 | next_random(s) % 10);
        ((uint8_t *)v)[9] = r >> 32 & 0x80;
        break;
    }
}

static void random_fpu(uint64_t *s, uint8_t *xsave)
{
    uint64_t r = next_random(s);
    uint16_t fcw = 0x37f, fsw = r >> 8 & 0x7f00;
    uint16_t fop = next_random(s) & 0x7ff;
    uint64_t pointers[2] = {next_random(s) & 0xffffffff, next_random(s) & 0xffffffff};

    if (r & 1) /* rounding and precision */
        fcw ^= r >> 24 & 0x0f00;
    if (!(r & 6)) /* unmasked exceptions */
        fcw &= ~(r >> 32 & 0x3f);
    if (r & 8)
        fsw |= r >> 40 & 0x7f;
    if (r >> 60) /* mostly nothing is pending */
        fsw &= fcw | ~0x3f;
    if (fsw & ~fcw & 0x3f)
        fsw |= 0x8080;
    memcpy(xsave, &fcw, 2);
    memcpy(xsave + 2, &fsw, 2);
    xsave[4] = r & 0x30 ? 0xff : r & 0x40 ? 0 : (uint8_t)(r >> 48);
    memcpy(xsave + 6, &fop, 2);
    memcpy(xsave + 8, pointers, sizeof(pointers));
    for (unsigned n = 0; n < 8; n++)
        float80(s, xsave + FUZZ_ST + 16 * n);
}

static void small_indexes(uint64_t *s, uint8_t *xsave, unsigned reg, unsigned size)
{
    for (unsigned k = 0; k < 32; k += size) {
        int64_t v = (int64_t)(next_random(s) % 0x300) - 0x80;
        if (next_random(s) % 64 == 0)
            v = (int64_t)next_random(s);
        memcpy(xsave + (k < 16 ? FUZZ_XMM : FUZZ_YMM - 16) + 16 * reg + k, &v, size);
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
    c->in.xsave[0] = 0x7f; /* FCW */
    c->in.xsave[1] = 0x03;
    set_mxcsr(c->in.xsave, 0x1f80);
    if (t->flags & FUZZ_VECTOR)
        random_vectors(&seed, c->in.xsave);
    if (t->flags & FUZZ_FPU)
        random_fpu(&seed, c->in.xsave);
    memcpy(c->zeroed, t->zeroed, sizeof(c->zeroed));
    memcpy(c->ignored, t->ignored, sizeof(c->ignored));
    if (t->index_size)
        small_indexes(&seed, c->in.xsave, t->index_register, t->index_size);
    c->in.rip = t->rip;
    c->in.rflags = 0x202 | (next_random(&seed) & 0xcd5);
}

static void clear(uint8_t *pages, const struct fuzz_range *range)
{
    for (unsigned n = 0; n < FUZZ_RANGES; n++) {
        uint64_t from = range[n].at - FUZZ_DATA, to = from + range[n].size;
        for (uint64_t at = from; at < to; at++)
            if (at < FUZZ_DATA_PAGES * PAGE && at / PAGE != 2)
                pages[at] = 0;
    }
}

/* A repeating word (or eight, for vectors) with some changes: string instructions find equal and
 * unequal runs. */
void fuzz_fill(uint8_t *pages, const struct fuzz_case *c)
{
    uint64_t seed = c->memory_seed, word = next_random(&seed);
    uint64_t words[8] = {word, word, word, word, word, word, word, word};

    if (c->flags & FUZZ_FPU) {
        for (unsigned n = 0; n < 8; n += 2)
            fpu_data(&seed, words + n);
    } else if (c->flags & FUZZ_VECTOR) {
        vector(&seed, words, 4);
        vector(&seed, words + 4, 4);
    }

    for (unsigned page = 0; page < FUZZ_DATA_PAGES; page++) {
        uint64_t *p = (uint64_t *)(pages + page * PAGE);
        if (page == 2)
            continue;
        for (unsigned n = 0; n < PAGE / 8; n++)
            p[n] = words[n & 7];
        for (unsigned n = 0; n < 24; n++)
            p[next_random(&seed) % (PAGE / 8)] = next_random(&seed);
    }
    clear(pages, c->zeroed);
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

void fuzz_forget(uint8_t *pages, const struct fuzz_case *c) { clear(pages, c->ignored); }

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

static int is_segment_fault(int vector) { return vector == 12 || vector == 13; }

static int same_exception(const struct fuzz_case *c, const struct fuzz_result *a,
                          const struct fuzz_result *b)
{
    /* misaligned, beyond the limit, not canonical: or the page before that is not there */
    if (c->flags & FUZZ_PARTS && is_segment_fault(b->vector))
        return is_segment_fault(a->vector) || (a->vector == 14 && is_foreign(a->cr2));
    if (a->vector != b->vector)
        return 0;
    if (a->vector == 14 && c->flags & FUZZ_PARTS)
        return a->cr2 - b->cr2 + PAGE < 2 * PAGE || (is_foreign(a->cr2) && is_foreign(b->cr2));
    if (a->vector == 14 && is_foreign(a->cr2) && is_foreign(b->cr2))
        return a->cr2 == b->cr2;
    return a->vector < 0 || (a->error == b->error && (a->vector != 14 || a->cr2 == b->cr2));
}

static int same_vectors(const struct fuzz_result *a, const struct fuzz_result *b)
{
    const uint8_t *x = a->out.xsave, *y = b->out.xsave;
    return !memcmp(x + FUZZ_MXCSR, y + FUZZ_MXCSR, 4) && !memcmp(x + FUZZ_XMM, y + FUZZ_XMM, 256) &&
           !memcmp(x + FUZZ_YMM, y + FUZZ_YMM, 256);
}

/* Not the pointers: AMD saves them only with an exception pending (APM vol. 2 11.4.4). */
static int same_fpu(const struct fuzz_result *a, const struct fuzz_result *b)
{
    const uint8_t *x = a->out.xsave, *y = b->out.xsave;

    for (unsigned n = 0; n < 8; n++)
        if (memcmp(x + FUZZ_ST + 16 * n, y + FUZZ_ST + 16 * n, 10))
            return 0;
    return !memcmp(x, y, 5);
}

static int same(const struct fuzz_case *c, const struct fuzz_result *a, const struct fuzz_result *b)
{
    if (b->vector == 14 && a->vector != 14 && is_foreign(b->cr2))
        return 1;
    return same_exception(c, a, b) && a->out.rip == b->out.rip &&
           (!(c->flags & FUZZ_VECTOR) || same_vectors(a, b)) &&
           (!(c->flags & FUZZ_FPU) || same_fpu(a, b)) &&
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
