/* SPDX-License-Identifier: MIT */
/*
 * MOVS, CMPS, STOS, LODS, SCAS.
 *
 * Every element is complete, registers included, before the next one starts: a fault in the
 * middle leaves rCX, rSI and rDI as of the elements done.  Forward runs within a page of plain
 * RAM are done at once on host memory.
 */
#include "stringop.h"

/* One element, with rSI and rDI moved; false: cpu->stop is set and nothing was done. */
typedef bool element_fn(struct cpu *cpu, const struct insn *i);
/* Up to count elements at once; returns how many, 0 when it must be done one by one. */
typedef u64 bulk_fn(struct cpu *cpu, const struct insn *i, u64 count);

/* When a repetition looks around: elements, a bulk counts as BULK_COST. */
#define REPEAT_BUDGET 2048
#define BULK_COST 128

enum repeat { ALWAYS, WHILE_CONDITION };

static ALWAYS_INLINE bool condition_ends(const struct cpu *cpu, const struct insn *i)
{
    return get_zf(cpu) == !!(i->flags & I_REPNE);
}

/* A fault in CMPS or SCAS leaves the flags of the last element done, as AMD processors do.  (Intel
 * documents that they are restored: SDM vol. 2, REP.) */
static ALWAYS_INLINE int string_insn(struct cpu *cpu, const struct insn *i, element_fn *element,
                                     bulk_fn *bulk, enum repeat repeat)
{
    if (!is_repeated(i)) {
        if (!element(cpu, i))
            return stop(cpu, i);
        NEXT(cpu, i);
    }
    for (int budget = REPEAT_BUDGET;;) {
        u64 count = repeat_count(cpu, i);
        if (count == 0)
            break;
        u64 n = cpu->step ? 0 : bulk(cpu, i, count);
        budget -= n ? BULK_COST : 1;
        if (n == 0) {
            if (!element(cpu, i))
                return stop(cpu, i);
            n = 1;
        }
        repeat_done(cpu, i, n);
        if (repeat == WHILE_CONDITION && condition_ends(cpu, i))
            break;
        /* With MMIO posted the last one, too, leaves rip here: it retires finding rCX 0, as in KVM. */
        if (cpu->posted ||
            (n < count && (cpu->step || budget <= 0 ||
                           atomic_load_explicit(&cpu->request, memory_order_relaxed))))
            return repeat_later(cpu, i);
    }
    NEXT(cpu, i);
}

/* ---- host memory -------------------------------------------------------------------------------- */

/* Bytes of a forward run from `offset` that neither wrap around the address size nor leave the
 * segment; the first element has been checked. */
static u64 run_limit(const struct cpu *cpu, const struct insn *i, unsigned seg, u64 offset,
                     u64 bytes)
{
    u64 last = i->asize == 8 ? ~0ull : i->asize == 4 ? 0xffffffff : 0xffff;
    if (i->ea == EA_SEG) {
        const struct cpu_seg *s = &SEG(cpu, seg);
        if ((s->ar & (SEG_TYPE_CODE | SEG_TYPE_EXPAND_DOWN)) == SEG_TYPE_EXPAND_DOWN)
            return 0;
        if (s->limit < last)
            last = s->limit;
    }
    return bytes - 1 <= last - offset ? bytes : last - offset + 1;
}

/* Host pointers of a run; shortens *len to what both sides have. NULL: one by one. */
static void *source_run(struct cpu *cpu, const struct insn *i, u64 *len)
{
    u64 offset = string_offset(cpu, i, RSI), la;
    unsigned n;
    if ((GUEST(cpu).rflags & X86_EFLAGS_DF) || !source_linear(cpu, i, &la))
        return NULL;
    *len = run_limit(cpu, i, i->seg, offset, *len);
    n = *len < PAGE_SIZE ? (unsigned)*len : (unsigned)PAGE_SIZE;
    void *p = n ? mem_direct(cpu, la, ACC_READ, &n) : NULL;
    *len = n;
    return p;
}
static void *destination_run(struct cpu *cpu, const struct insn *i, unsigned access, u64 *len)
{
    u64 offset = string_offset(cpu, i, RDI), la;
    unsigned n;
    if ((GUEST(cpu).rflags & X86_EFLAGS_DF) || !destination_linear(cpu, i, access, &la))
        return NULL;
    *len = run_limit(cpu, i, CPU_SEG_ES, offset, *len);
    n = *len < PAGE_SIZE ? (unsigned)*len : (unsigned)PAGE_SIZE;
    void *p = n ? mem_direct(cpu, la, access, &n) : NULL;
    *len = n;
    return p;
}

/* count * size, without overflow and no more than a page */
static ALWAYS_INLINE u64 run_bytes(const struct insn *i, u64 count)
{
    return count < PAGE_SIZE ? count * i->opsize : PAGE_SIZE;
}

static ALWAYS_INLINE u64 element_load(const u8 *p, unsigned size)
{
    switch (size) {
    case 1: return *p;
    case 2: return *(const u16_mem *)p;
    case 4: return *(const u32_mem *)p;
    default: return *(const u64_mem *)p;
    }
}

/* Copies n elements in ascending order, so a source that overlaps the destination's start is
 * repeated, as the elements one by one would do. */
static void copy_forward(u8 *d, const u8 *s, u64 len, unsigned size)
{
    u64 distance = (u64)(d - s);
    if (distance >= len) { /* apart, or the destination is below */
        memmove(d, s, len);
        return;
    }
    if (distance < size) {
        for (; len; len -= size, d += size, s += size) {
            u64 v = element_load(s, size);
            memcpy(d, &v, size);
        }
        return;
    }
    for (u64 n; len; len -= n, d += n, s += n) {
        n = distance < len ? distance : len;
        memcpy(d, s, n);
    }
}

/* ---- MOVS, STOS, LODS ------------------------------------------------------------------------------ */

static bool movs_element(struct cpu *cpu, const struct insn *i)
{
    u64 from, to, v;
    if (!source_linear(cpu, i, &from) || !ld_size(cpu, from, i->opsize, &v, ea_access(i)) ||
        !destination_linear(cpu, i, ACC_WRITE, &to) || !st_size(cpu, to, i->opsize, v, 0))
        return false;
    string_advance(cpu, i, RSI, 1);
    string_advance(cpu, i, RDI, 1);
    return true;
}
static u64 movs_bulk(struct cpu *cpu, const struct insn *i, u64 count)
{
    u64 len = run_bytes(i, count);
    const u8 *s = source_run(cpu, i, &len);
    u8 *d = s ? destination_run(cpu, i, ACC_WRITE, &len) : NULL;
    u64 n = d ? len / i->opsize : 0;
    if (n == 0)
        return 0;
    copy_forward(d, s, n * i->opsize, i->opsize);
    string_advance(cpu, i, RSI, n);
    string_advance(cpu, i, RDI, n);
    return n;
}
int x_movs(struct cpu *cpu, const struct insn *i)
{
    return string_insn(cpu, i, movs_element, movs_bulk, ALWAYS);
}

static bool stos_element(struct cpu *cpu, const struct insn *i)
{
    u64 to;
    if (!destination_linear(cpu, i, ACC_WRITE, &to) ||
        !st_size(cpu, to, i->opsize, GPR(cpu, RAX), 0))
        return false;
    string_advance(cpu, i, RDI, 1);
    return true;
}
static u64 stos_bulk(struct cpu *cpu, const struct insn *i, u64 count)
{
    u64 len = run_bytes(i, count), v = GPR(cpu, RAX);
    u8 *d = destination_run(cpu, i, ACC_WRITE, &len);
    u64 n = d ? len / i->opsize : 0;
    switch (n ? i->opsize : 0) {
    case 0: return 0;
    case 1: memset(d, (u8)v, n); break;
    case 2:
        for (u64 k = 0; k < n; k++)
            ((u16_mem *)d)[k] = (u16)v;
        break;
    case 4:
        for (u64 k = 0; k < n; k++)
            ((u32_mem *)d)[k] = (u32)v;
        break;
    default:
        for (u64 k = 0; k < n; k++)
            ((u64_mem *)d)[k] = v;
        break;
    }
    string_advance(cpu, i, RDI, n);
    return n;
}
int x_stos(struct cpu *cpu, const struct insn *i)
{
    return string_insn(cpu, i, stos_element, stos_bulk, ALWAYS);
}

static bool lods_element(struct cpu *cpu, const struct insn *i)
{
    u64 from, v;
    if (!source_linear(cpu, i, &from) || !ld_size(cpu, from, i->opsize, &v, ea_access(i)))
        return false;
    string_advance(cpu, i, RSI, 1);
    reg_write(cpu, RAX * 8, i->opsize, v);
    return true;
}
/* Only the last of a run is seen. */
static u64 lods_bulk(struct cpu *cpu, const struct insn *i, u64 count)
{
    u64 len = run_bytes(i, count);
    const u8 *s = source_run(cpu, i, &len);
    u64 n = s ? len / i->opsize : 0;
    if (n == 0)
        return 0;
    reg_write(cpu, RAX * 8, i->opsize, element_load(s + (n - 1) * i->opsize, i->opsize));
    string_advance(cpu, i, RSI, n);
    return n;
}
int x_lods(struct cpu *cpu, const struct insn *i)
{
    return string_insn(cpu, i, lods_element, lods_bulk, ALWAYS);
}

/* ---- CMPS, SCAS ------------------------------------------------------------------------------------- */

static void compare(struct cpu *cpu, const struct insn *i, u64 a, u64 b)
{
    flags_sub(cpu, 8u * i->opsize, a, b, a - b);
}

static bool cmps_element(struct cpu *cpu, const struct insn *i)
{
    u64 la, a, b;
    if (!source_linear(cpu, i, &la) || !ld_size(cpu, la, i->opsize, &a, ea_access(i)) ||
        !destination_linear(cpu, i, ACC_READ, &la) || !ld_size(cpu, la, i->opsize, &b, 0))
        return false;
    compare(cpu, i, a, b);
    string_advance(cpu, i, RSI, 1);
    string_advance(cpu, i, RDI, 1);
    return true;
}
static u64 cmps_bulk(struct cpu *cpu, const struct insn *i, u64 count)
{
    const unsigned size = i->opsize;
    const bool until_equal = i->flags & I_REPNE;
    u64 len = run_bytes(i, count), n = 0, a, b;
    const u8 *s = source_run(cpu, i, &len);
    const u8 *d = s ? destination_run(cpu, i, ACC_READ, &len) : NULL;
    if (!d || len < size)
        return 0;
    do {
        a = element_load(s + n * size, size);
        b = element_load(d + n * size, size);
        n++;
    } while ((a == b) != until_equal && (n + 1) * size <= len);
    compare(cpu, i, a, b);
    string_advance(cpu, i, RSI, n);
    string_advance(cpu, i, RDI, n);
    return n;
}
int x_cmps(struct cpu *cpu, const struct insn *i)
{
    return string_insn(cpu, i, cmps_element, cmps_bulk, WHILE_CONDITION);
}

static bool scas_element(struct cpu *cpu, const struct insn *i)
{
    u64 la, b;
    if (!destination_linear(cpu, i, ACC_READ, &la) || !ld_size(cpu, la, i->opsize, &b, 0))
        return false;
    compare(cpu, i, reg_read(cpu, RAX * 8, i->opsize), b);
    string_advance(cpu, i, RDI, 1);
    return true;
}
static u64 scas_bulk(struct cpu *cpu, const struct insn *i, u64 count)
{
    const unsigned size = i->opsize;
    const bool until_equal = i->flags & I_REPNE;
    u64 len = run_bytes(i, count), n = 0, a = reg_read(cpu, RAX * 8, size), b;
    const u8 *d = destination_run(cpu, i, ACC_READ, &len);
    if (!d || len < size)
        return 0;
    do {
        b = element_load(d + n * size, size);
        n++;
    } while ((a == b) != until_equal && (n + 1) * size <= len);
    compare(cpu, i, a, b);
    string_advance(cpu, i, RDI, n);
    return n;
}
int x_scas(struct cpu *cpu, const struct insn *i)
{
    return string_insn(cpu, i, scas_element, scas_bulk, WHILE_CONDITION);
}
