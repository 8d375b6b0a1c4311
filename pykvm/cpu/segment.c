/* SPDX-License-Identifier: MIT */
/*
 * Segmentation: addresses in segments, loading segment registers, far transfers, call gates,
 * IRET, descriptor-table registers, and the fast system calls that load flat segments.
 * SDM vol. 3 chapters 3, 5 and 21; vol. 2 by instruction.
 */
#include "insns.h"
#include "segment.h"

/* ---- addresses ------------------------------------------------------------------------------ */

bool seg_within_limit(const struct cpu_seg *s, u64 offset, unsigned size)
{
    u64 last = offset + size - 1;
    bool expand_down = (s->ar & (SEG_TYPE_CODE | SEG_TYPE_EXPAND_DOWN)) == SEG_TYPE_EXPAND_DOWN;

    if (unlikely(expand_down))
        return offset > s->limit && last <= (s->ar & CPU_AR_DB ? 0xffffffffu : 0xffffu);
    /* An access that wraps around a 4 GiB segment is inside it. */
    return last <= s->limit || s->limit == 0xffffffff;
}

bool seg_linear(struct cpu *cpu, unsigned seg, u64 offset, unsigned size, unsigned access, u64 *la)
{
    const struct cpu_seg *s = &SEG(cpu, seg);
    bool ok = true;

    if (is_code64(cpu)) {
        *la = offset + (seg == CPU_SEG_FS || seg == CPU_SEG_GS ? s->base : 0);
        return true;
    }
    if (cpu->mode & MODE_PE) {
        if (s->ar & CPU_AR_UNUSABLE)
            ok = false;
        else if (access & ACC_WRITE)
            ok = ar_is_writable_data(s->ar);
        else
            ok = !(s->ar & SEG_TYPE_CODE) || s->ar & SEG_TYPE_READABLE;
    }
    if (unlikely(!ok || !seg_within_limit(s, offset, size)))
        return seg == CPU_SEG_SS ? raise_ss(cpu, 0) : raise_gp(cpu, 0);
    *la = (u32)(s->base + offset);
    return true;
}

bool check_rip(struct cpu *cpu, const struct cpu_seg *cs, u64 rip)
{
    bool ok = is_lma(cpu) && cs->ar & CPU_AR_L ? is_canonical(cpu, rip) : rip <= cs->limit;
    return ok || raise_gp(cpu, 0);
}

/* ---- descriptors ------------------------------------------------------------------------------ */

static void desc_unpack(struct desc *d)
{
    d->base = (d->raw >> 16 & 0xffffff) | (d->raw >> 32 & 0xff000000) | d->raw_hi << 32;
    d->limit = (u32)((d->raw & 0xffff) | (d->raw >> 32 & 0xf0000));
    d->ar = d->raw >> 40 & 0xf0ff;
    if (d->ar & CPU_AR_G)
        d->limit = d->limit << 12 | 0xfff;
}

static bool desc_read_bytes(struct cpu *cpu, u16 sel, unsigned size, struct desc *d, bool *in_table)
{
    const struct cpu_guest *g = &GUEST(cpu);
    const struct cpu_seg *ldtr = &g->seg[CPU_SEG_LDTR];
    u64 base = g->gdtr.base;
    u32 limit = g->gdtr.limit, first = sel & ~7u;

    *in_table = false;
    if (sel & SELECTOR_TI_MASK) {
        if (ldtr->ar & CPU_AR_UNUSABLE)
            return true;
        base = ldtr->base;
        limit = ldtr->limit;
    }
    if (first + size - 1 > limit)
        return true;
    *in_table = true;
    d->raw_hi = 0;
    d->la = table_linear(cpu, base + first);
    if (!system_read(cpu, d->la, &d->raw, 8) ||
        (size > 8 && !system_read(cpu, table_linear(cpu, d->la + 8), &d->raw_hi, 8)))
        return false;
    desc_unpack(d);
    return true;
}

bool desc_read(struct cpu *cpu, u16 sel, struct desc *d, bool *in_table)
{
    return desc_read_bytes(cpu, sel, 8, d, in_table);
}

bool desc_fetch(struct cpu *cpu, u16 sel, unsigned vector, struct desc *d)
{
    bool in_table;

    if (!desc_read_bytes(cpu, sel, 8, d, &in_table))
        return false;
    return in_table || raise_selector(cpu, vector, sel);
}

bool desc_fetch_system(struct cpu *cpu, u16 sel, unsigned vector, struct desc *d)
{
    bool in_table;

    if (!desc_read_bytes(cpu, sel, is_lma(cpu) ? 16 : 8, d, &in_table))
        return false;
    /* Bits 8 to 12 of the last word are where the type of a second descriptor would be. */
    return (in_table && !(d->raw_hi >> 40 & 0x1f)) || raise_selector(cpu, vector, sel);
}

bool desc_change_type(struct cpu *cpu, const struct desc *d, u8 set, u8 clear)
{
    u8_mem *p = rmw_slow(cpu, table_linear(cpu, d->la + 5), 1, ACC_WRITE | ACC_SYSTEM);

    if (!p)
        return false;
    if (!rmw_is_direct(cpu, p)) {
        *p = (u8)((*p | set) & ~clear);
        rmw_flush(cpu);
        return true;
    }
    if (set)
        __atomic_fetch_or(p, set, __ATOMIC_SEQ_CST);
    if (clear)
        __atomic_fetch_and(p, (u8)~clear, __ATOMIC_SEQ_CST);
    return true;
}

bool desc_mark_accessed(struct cpu *cpu, const struct desc *d)
{
    return d->ar & SEG_TYPE_ACCESSED || desc_change_type(cpu, d, SEG_TYPE_ACCESSED, 0);
}

struct cpu_seg desc_segment(const struct desc *d, u16 sel, unsigned rpl)
{
    return (struct cpu_seg){.base = d->base,
                            .limit = d->limit,
                            .ar = d->ar | (d->ar & CPU_AR_S ? SEG_TYPE_ACCESSED : 0),
                            .selector = (u16)((sel & ~SELECTOR_RPL_MASK) | rpl)};
}

/* ---- segment registers -------------------------------------------------------------------------- */

/* AMD's keep base and limit, which 64-bit mode sees of FS and GS (APM vol. 2 4.8.1; since Zen 2
 * CPUID 0x80000021 can say otherwise, which KVM's profiles here do not). */
void set_segment_null(struct cpu *cpu, unsigned seg, u16 sel)
{
    const struct cpu_seg old = SEG(cpu, seg);

    SEG(cpu, seg) = (struct cpu_seg){.selector = sel, .ar = CPU_AR_UNUSABLE};
    if (unlikely(is_amd(cpu) && seg <= CPU_SEG_GS)) {
        SEG(cpu, seg).base = old.base;
        SEG(cpu, seg).limit = old.limit;
    }
}

void set_segment_real(struct cpu *cpu, unsigned seg, u16 sel)
{
    struct cpu_seg *s = &SEG(cpu, seg);

    s->selector = sel;
    s->base = (u32)sel << 4;
    if (is_vm86(cpu)) {
        s->limit = 0xffff;
        s->ar = AR_VM86;
    } else if (s->ar & CPU_AR_UNUSABLE) {
        s->limit = 0xffff;
        s->ar = AR_REAL_DATA;
    } /* else limit and rights stay: unreal mode */
}

static bool check_stack_segment(struct cpu *cpu, u16 sel, const struct desc *d, unsigned cpl,
                                unsigned vector)
{
    if (sel_rpl(sel) != cpl || ar_dpl(d->ar) != cpl || !ar_is_writable_data(d->ar))
        return raise_selector(cpu, vector, sel);
    return d->ar & CPU_AR_P || raise_selector(cpu, SS_VECTOR, sel);
}

static bool check_data_segment(struct cpu *cpu, u16 sel, const struct desc *d, unsigned cpl,
                               unsigned vector)
{
    bool code = ar_is_code(d->ar);
    unsigned dpl = ar_dpl(d->ar);

    if (!(d->ar & CPU_AR_S) || (code && !(d->ar & SEG_TYPE_READABLE)))
        return raise_selector(cpu, vector, sel);
    if (!ar_is_conforming(d->ar) && (dpl < cpl || dpl < sel_rpl(sel)))
        return raise_selector(cpu, vector, sel);
    return d->ar & CPU_AR_P || raise_selector(cpu, NP_VECTOR, sel);
}

static bool load_null(struct cpu *cpu, unsigned seg, u16 sel)
{
    if (seg != CPU_SEG_SS) {
        set_segment_null(cpu, seg, sel);
        return true;
    }
    if (!is_code64(cpu) || cpu->cpl == 3 || sel_rpl(sel) != cpu->cpl)
        return raise_gp(cpu, 0);
    SEG(cpu, seg) = null_stack_segment(sel, cpu->cpl);
    return true;
}

bool load_data_segment(struct cpu *cpu, unsigned seg, u16 sel, unsigned cpl, unsigned vector)
{
    struct desc d;

    if (!desc_fetch(cpu, sel, vector, &d))
        return false;
    if (!(seg == CPU_SEG_SS ? check_stack_segment(cpu, sel, &d, cpl, vector)
                            : check_data_segment(cpu, sel, &d, cpl, vector)))
        return false;
    if (!desc_mark_accessed(cpu, &d))
        return false;
    SEG(cpu, seg) = desc_segment(&d, sel, sel_rpl(sel));
    return true;
}

bool load_segment(struct cpu *cpu, unsigned seg, u16 sel)
{
    if (!(cpu->mode & MODE_PE)) {
        set_segment_real(cpu, seg, sel);
        return true;
    }
    if (sel_is_null(sel))
        return load_null(cpu, seg, sel);
    return load_data_segment(cpu, seg, sel, cpu->cpl, GP_VECTOR);
}

/* After a return to an outer level: what the new level may not use is not kept. */
static void drop_inner_segments(struct cpu *cpu, unsigned cpl)
{
    static const u8 order[] = {CPU_SEG_ES, CPU_SEG_DS, CPU_SEG_FS, CPU_SEG_GS};

    for (unsigned k = 0; k < 4; k++) {
        const struct cpu_seg *s = &SEG(cpu, order[k]);
        if (!(s->ar & CPU_AR_UNUSABLE) && ar_dpl(s->ar) < cpl && !ar_is_conforming(s->ar))
            set_segment_null(cpu, order[k], 0);
    }
}

/* ---- stacks ---------------------------------------------------------------------------------------- */

void stack_current(struct cpu *cpu, struct stack *s, bool wide)
{
    *s = (struct stack){.ss = SEG(cpu, CPU_SEG_SS),
                        .sp = GPR(cpu, RSP),
                        .mask = wide || is_code64(cpu) ? ~0ull : cpu->sp_mask};
}

static u64 stack_mask(const struct cpu_seg *ss) { return ss->ar & CPU_AR_DB ? 0xffffffff : 0xffff; }

bool stack_from_tss(struct cpu *cpu, unsigned cpl, struct stack *s)
{
    const struct cpu_seg *tr = &SEG(cpu, CPU_SEG_TR);
    unsigned size = tss_is_16bit(tr) ? 2 : 4;
    unsigned offset = size + cpl * size * 2;
    struct desc d;
    u32 esp = 0;
    u16 sel;

    if (offset + size + 1 > tr->limit)
        return raise_selector(cpu, TS_VECTOR, tr->selector);
    if (!system_read(cpu, table_linear(cpu, tr->base + offset), &esp, size) ||
        !system_read(cpu, table_linear(cpu, tr->base + offset + size), &sel, 2))
        return false;
    if (sel_is_null(sel))
        return raise_ts(cpu, 0);
    if (!desc_fetch(cpu, sel, TS_VECTOR, &d) ||
        !check_stack_segment(cpu, sel, &d, cpl, TS_VECTOR) || !desc_mark_accessed(cpu, &d))
        return false;
    *s = (struct stack){.ss = desc_segment(&d, sel, cpl),
                        .sp = esp,
                        .access = ACC_SYSTEM,
                        .error = sel & (u16)~SELECTOR_RPL_MASK};
    s->mask = stack_mask(&s->ss);
    return true;
}

bool stack_from_tss64(struct cpu *cpu, unsigned slot, unsigned cpl, struct stack *s)
{
    const struct cpu_seg *tr = &SEG(cpu, CPU_SEG_TR);
    unsigned offset = 4 + slot * 8;
    bool inner = cpl < cpu->cpl;

    if (offset + 7 > tr->limit)
        return raise_selector(cpu, TS_VECTOR, tr->selector);
    *s = (struct stack){.ss = inner ? null_stack_segment((u16)cpl, cpl) : SEG(cpu, CPU_SEG_SS),
                        .mask = ~0ull,
                        .access = inner ? ACC_SYSTEM : 0};
    return system_read(cpu, tr->base + offset, &s->sp, 8);
}

/* One slot at a linear address; other processors see it whole. */
static bool stack_store(struct cpu *cpu, const struct stack *s, u64 la, unsigned size, u64 v)
{
    const struct tlb *tlb = s->access ? system_tlb(cpu) : cpu->tlb;
    const struct tlbe *e = &tlb->w[TLB_INDEX(la)];
    void *p = (void *)(uintptr_t)(la + e->addend);

    if (unlikely(e->tag != ((la + size - 1) & PAGE_MASK)))
        return mem_write(cpu, la, &v, size, ACC_WRITE | ACC_STACK | s->access);
    if (likely(size == 8))
        *(volatile u64_mem *)p = v;
    else if (size == 4)
        *(volatile u32_mem *)p = (u32)v;
    else
        *(volatile u16_mem *)p = (u16)v;
    return true;
}

bool stack_push(struct cpu *cpu, struct stack *s, unsigned size, u64 v)
{
    u64 sp = (s->sp - size) & s->mask, la = sp;

    if (s->mask != ~0ull) {
        if (!seg_within_limit(&s->ss, sp, size))
            return raise_ss(cpu, s->error);
        la = (u32)(s->ss.base + sp);
    }
    if (!stack_store(cpu, s, la, size, v))
        return false;
    s->sp = (s->sp & ~s->mask) | sp;
    return true;
}

void stack_commit(struct cpu *cpu, const struct stack *s)
{
    SEG(cpu, CPU_SEG_SS) = s->ss;
    GPR(cpu, RSP) = s->sp;
}

/* Reads stack slots above rsp without moving it: slot k is k * size further up. */
static bool stack_peek(struct cpu *cpu, unsigned slot, unsigned size, u64 *v)
{
    u64 sp = sp_add(cpu, GPR(cpu, RSP), (s64)slot * size);

    return pop_at(cpu, &sp, size, v);
}

/* Operand size of JMP, CALL and LFS through memory: AMD's know no 64-bit far pointers and take REX.W
 * for nothing (APM vol. 3 "CALL (Far)", "LFS"). */
static unsigned far_size(const struct cpu *cpu, const struct insn *i)
{
    return unlikely(i->opsize == 8 && is_amd(cpu)) ? 4 : i->opsize;
}

/* ---- far JMP and CALL --------------------------------------------------------------------------------- */

/* Every handler that loads CS, SS or flags ends with this. */
static int transferred(struct cpu *cpu, u64 rip)
{
    set_rip(cpu, rip);
    update_mode(cpu);
    return LOOKUP;
}

/* The end of a handler that may have switched tasks. */
static int task_switched(struct cpu *cpu, const struct insn *i, enum task_result result)
{
    switch (result) {
    case TASK_DONE: return LOOKUP;
    case TASK_FAULT: cpu->insn = i; return STOP; /* rip is the new task's */
    default: return stop(cpu, i);
    }
}

static int far_real(struct cpu *cpu, const struct insn *i, u16 sel, u64 offset, bool call)
{
    u64 rsp = GPR(cpu, RSP);

    if (offset > SEG(cpu, CPU_SEG_CS).limit)
        return fault_gp(cpu, i, 0);
    if (call && (!push_at(cpu, &rsp, i->opsize, SEG(cpu, CPU_SEG_CS).selector) ||
                 !push_at(cpu, &rsp, i->opsize, next_rip(cpu, i))))
        return stop(cpu, i);
    GPR(cpu, RSP) = rsp;
    set_segment_real(cpu, CPU_SEG_CS, sel);
    return transferred(cpu, offset);
}

/* CS of a direct far transfer, which cannot change the privilege level. */
static bool far_code_segment(struct cpu *cpu, u16 sel, const struct desc *d)
{
    unsigned dpl = ar_dpl(d->ar);
    bool both = (d->ar & (CPU_AR_L | CPU_AR_DB)) == (CPU_AR_L | CPU_AR_DB);

    if (is_lma(cpu) && both)
        return raise_selector(cpu, GP_VECTOR, sel);
    if (ar_is_conforming(d->ar) ? dpl > cpu->cpl : dpl != cpu->cpl || sel_rpl(sel) > cpu->cpl)
        return raise_selector(cpu, GP_VECTOR, sel);
    return d->ar & CPU_AR_P || raise_selector(cpu, NP_VECTOR, sel);
}

static int far_direct(struct cpu *cpu, const struct insn *i, u16 sel, const struct desc *d,
                      u64 offset, bool call)
{
    struct cpu_seg cs = desc_segment(d, sel, cpu->cpl);
    u64 rsp = GPR(cpu, RSP);

    if (!far_code_segment(cpu, sel, d) || !check_rip(cpu, &cs, offset))
        return stop(cpu, i);
    if (call && (!push_at(cpu, &rsp, far_size(cpu, i), SEG(cpu, CPU_SEG_CS).selector) ||
                 !push_at(cpu, &rsp, far_size(cpu, i), next_rip(cpu, i))))
        return stop(cpu, i);
    if (!desc_mark_accessed(cpu, d))
        return stop(cpu, i);
    GPR(cpu, RSP) = rsp;
    SEG(cpu, CPU_SEG_CS) = cs;
    return transferred(cpu, offset);
}

/* The privilege rule of TSS descriptors and of all gates. */
static bool check_gate_privilege(struct cpu *cpu, u16 sel, const struct desc *d)
{
    if (ar_dpl(d->ar) < cpu->cpl || ar_dpl(d->ar) < sel_rpl(sel))
        return raise_selector(cpu, GP_VECTOR, sel);
    return d->ar & CPU_AR_P || raise_selector(cpu, NP_VECTOR, sel);
}

static int far_task(struct cpu *cpu, const struct insn *i, u16 sel, const struct desc *d, bool call)
{
    u16 tss = ar_system_type(d->ar) == DESC_TASK_GATE ? (u16)(d->raw >> 16) : sel;

    if (!check_gate_privilege(cpu, sel, d))
        return stop(cpu, i);
    return task_switched(
        cpu, i, task_switch(cpu, tss, call ? TASK_CALL : TASK_JMP, false, 0, next_rip(cpu, i)));
}

/* Parameters of a call through a gate, from the old stack to the new, first pushed first. */
static bool copy_parameters(struct cpu *cpu, struct stack *s, unsigned count, unsigned size)
{
    while (count--) {
        u64 v;
        if (!stack_peek(cpu, count, size, &v) || !stack_push(cpu, s, size, v))
            return false;
    }
    return true;
}

static int far_gate(struct cpu *cpu, const struct insn *i, u16 sel, const struct desc *short_gate,
                    bool call)
{
    struct desc gate = *short_gate, d;
    struct stack s;
    bool lma = is_lma(cpu);
    unsigned size = lma ? 8 : ar_system_type(gate.ar) == DESC_CALL_GATE ? 4 : 2;

    if (!check_gate_privilege(cpu, sel, &gate))
        return stop(cpu, i);
    if (lma && !desc_fetch_system(cpu, sel, GP_VECTOR, &gate))
        return stop(cpu, i);

    u16 cs_sel = (u16)(gate.raw >> 16);
    u64 rip =
        (gate.raw & 0xffff) | (size == 2 ? 0 : gate.raw >> 32 & 0xffff0000) | gate.raw_hi << 32;
    if (sel_is_null(cs_sel))
        return fault_gp(cpu, i, 0);
    if (!desc_fetch(cpu, cs_sel, GP_VECTOR, &d))
        return stop(cpu, i);

    unsigned dpl = ar_dpl(d.ar);
    bool conforming = ar_is_conforming(d.ar);
    if (!ar_is_code(d.ar) || dpl > cpu->cpl || (!call && !conforming && dpl != cpu->cpl) ||
        (lma && (d.ar & (CPU_AR_L | CPU_AR_DB)) != CPU_AR_L)) {
        raise_selector(cpu, GP_VECTOR, cs_sel);
        return stop(cpu, i);
    }
    if (!(d.ar & CPU_AR_P)) {
        raise_selector(cpu, NP_VECTOR, cs_sel);
        return stop(cpu, i);
    }

    bool inner = call && !conforming && dpl < cpu->cpl;
    struct cpu_seg cs = desc_segment(&d, cs_sel, inner ? dpl : cpu->cpl);
    stack_current(cpu, &s, lma);
    if (inner && !(lma ? stack_from_tss64(cpu, dpl, dpl, &s) : stack_from_tss(cpu, dpl, &s)))
        return stop(cpu, i);
    if (!check_rip(cpu, &cs, rip))
        return stop(cpu, i);
    if (inner && (!stack_push(cpu, &s, size, SEG(cpu, CPU_SEG_SS).selector) ||
                  !stack_push(cpu, &s, size, GPR(cpu, RSP)) ||
                  (!lma && !copy_parameters(cpu, &s, gate.raw >> 32 & 31, size))))
        return stop(cpu, i);
    if (call && (!stack_push(cpu, &s, size, SEG(cpu, CPU_SEG_CS).selector) ||
                 !stack_push(cpu, &s, size, next_rip(cpu, i))))
        return stop(cpu, i);
    if (!desc_mark_accessed(cpu, &d))
        return stop(cpu, i);
    stack_commit(cpu, &s);
    SEG(cpu, CPU_SEG_CS) = cs;
    return transferred(cpu, rip);
}

static int far_transfer(struct cpu *cpu, const struct insn *i, u16 sel, u64 offset, bool call)
{
    struct desc d;
    bool lma = is_lma(cpu);

    if (!(cpu->mode & MODE_PE))
        return far_real(cpu, i, sel, offset, call);
    if (sel_is_null(sel))
        return fault_gp(cpu, i, 0);
    if (!desc_fetch(cpu, sel, GP_VECTOR, &d))
        return stop(cpu, i);
    if (ar_is_code(d.ar))
        return far_direct(cpu, i, sel, &d, offset, call);
    switch (ar_system_type(d.ar)) {
    case DESC_CALL_GATE: return far_gate(cpu, i, sel, &d, call);
    case DESC_CALL_GATE16:
        if (!lma)
            return far_gate(cpu, i, sel, &d, call);
        break;
    case DESC_TASK_GATE:
    case DESC_TSS16_AVAILABLE:
    case DESC_TSS_AVAILABLE:
        if (!lma)
            return far_task(cpu, i, sel, &d, call);
        break;
    }
    raise_selector(cpu, GP_VECTOR, sel);
    return stop(cpu, i);
}

/* Far pointer in memory: offset of the operand size, selector behind it. */
static bool read_far_pointer(struct cpu *cpu, const struct insn *i, u16 *sel, u64 *offset)
{
    unsigned size = far_size(cpu, i);
    u64 la;

    return ea_linear(cpu, i, size + 2, ACC_READ, &la) &&
           ld_size(cpu, la, size, offset, ea_access(i)) && ld16(cpu, la + size, sel, ea_access(i));
}

static int far_through_memory(struct cpu *cpu, const struct insn *i, bool call)
{
    u16 sel;
    u64 offset;

    if (!read_far_pointer(cpu, i, &sel, &offset))
        return stop(cpu, i);
    return far_transfer(cpu, i, sel, offset, call);
}

int x_jmp_far(struct cpu *cpu, const struct insn *i)
{
    return far_transfer(cpu, i, (u16)i->disp, i->imm & size_mask(i->opsize), false);
}

int x_call_far(struct cpu *cpu, const struct insn *i)
{
    return far_transfer(cpu, i, (u16)i->disp, i->imm & size_mask(i->opsize), true);
}

int x_jmp_far_m(struct cpu *cpu, const struct insn *i) { return far_through_memory(cpu, i, false); }
int x_call_far_m(struct cpu *cpu, const struct insn *i) { return far_through_memory(cpu, i, true); }

/* ---- far RET and IRET ------------------------------------------------------------------------------------ */

/* Where a far return leads, checked and not committed. */
struct far_return {
    struct cpu_seg cs, ss;
    struct desc cs_desc, ss_desc;
    u64 rip, rsp;
    unsigned cpl;
    bool loads_ss;
    bool ss_null;
};

static bool return_code_segment(struct cpu *cpu, u16 sel, struct far_return *r)
{
    struct desc *d = &r->cs_desc;

    if (sel_is_null(sel))
        return raise_gp(cpu, 0);
    if (!desc_fetch(cpu, sel, GP_VECTOR, d))
        return false;
    unsigned dpl = ar_dpl(d->ar), rpl = sel_rpl(sel);
    bool both = (d->ar & (CPU_AR_L | CPU_AR_DB)) == (CPU_AR_L | CPU_AR_DB);
    if (!ar_is_code(d->ar) || rpl < cpu->cpl ||
        (ar_is_conforming(d->ar) ? dpl > rpl : dpl != rpl) || (is_lma(cpu) && both))
        return raise_selector(cpu, GP_VECTOR, sel);
    if (!(d->ar & CPU_AR_P))
        return raise_selector(cpu, NP_VECTOR, sel);
    r->cpl = rpl;
    r->cs = desc_segment(d, sel, rpl);
    return true;
}

static bool return_stack_segment(struct cpu *cpu, u16 sel, struct far_return *r)
{
    r->ss_null = sel_is_null(sel);
    if (r->ss_null) {
        bool to64 = is_lma(cpu) && r->cs.ar & CPU_AR_L;
        if (!to64 || r->cpl == 3 || sel_rpl(sel) != r->cpl)
            return raise_gp(cpu, 0);
        r->ss = null_stack_segment(sel, r->cpl);
        return true;
    }
    if (!desc_fetch(cpu, sel, GP_VECTOR, &r->ss_desc) ||
        !check_stack_segment(cpu, sel, &r->ss_desc, r->cpl, GP_VECTOR))
        return false;
    r->ss = desc_segment(&r->ss_desc, sel, r->cpl);
    return true;
}

/* Pops SS:RSP of the level returned to, into r. */
static bool return_stack(struct cpu *cpu, u64 *rsp, unsigned size, struct far_return *r)
{
    u64 new_rsp, sel;

    if (!pop_at(cpu, rsp, size, &new_rsp) || !pop_at(cpu, rsp, size, &sel) ||
        !return_stack_segment(cpu, (u16)sel, r))
        return false;
    r->loads_ss = true;
    r->rsp = new_rsp;
    return true;
}

static bool return_mark_accessed(struct cpu *cpu, const struct far_return *r)
{
    return desc_mark_accessed(cpu, &r->cs_desc) &&
           (!r->loads_ss || r->ss_null || desc_mark_accessed(cpu, &r->ss_desc));
}

static void return_commit(struct cpu *cpu, const struct far_return *r, unsigned release)
{
    u64 mask = is_lma(cpu) && r->cs.ar & CPU_AR_L ? ~0ull : stack_mask(&r->ss);

    SEG(cpu, CPU_SEG_CS) = r->cs;
    GPR(cpu, RSP) = r->rsp;
    if (r->loads_ss) {
        SEG(cpu, CPU_SEG_SS) = r->ss;
        GPR(cpu, RSP) = (r->rsp & ~mask) | ((r->rsp + release) & mask);
    }
    if (r->cpl > cpu->cpl)
        drop_inner_segments(cpu, r->cpl);
}

static int ret_far_real(struct cpu *cpu, const struct insn *i)
{
    u64 rsp = GPR(cpu, RSP), rip, sel;

    if (!pop_at(cpu, &rsp, i->opsize, &rip) || !pop_at(cpu, &rsp, i->opsize, &sel))
        return stop(cpu, i);
    if (rip > SEG(cpu, CPU_SEG_CS).limit)
        return fault_gp(cpu, i, 0);
    GPR(cpu, RSP) = sp_add(cpu, rsp, (u16)i->imm);
    set_segment_real(cpu, CPU_SEG_CS, (u16)sel);
    return transferred(cpu, rip);
}

int x_ret_far(struct cpu *cpu, const struct insn *i)
{
    struct far_return r = {0};
    u64 rsp = GPR(cpu, RSP), sel;
    u16 release = (u16)i->imm;

    if (!(cpu->mode & MODE_PE))
        return ret_far_real(cpu, i);
    if (!pop_at(cpu, &rsp, i->opsize, &r.rip) || !pop_at(cpu, &rsp, i->opsize, &sel) ||
        !return_code_segment(cpu, (u16)sel, &r))
        return stop(cpu, i);
    r.rsp = rsp = sp_add(cpu, rsp, release);
    if (r.cpl > cpu->cpl && !return_stack(cpu, &rsp, i->opsize, &r))
        return stop(cpu, i);
    if (!check_rip(cpu, &r.cs, r.rip) || !return_mark_accessed(cpu, &r))
        return stop(cpu, i);
    return_commit(cpu, &r, release);
    return transferred(cpu, r.rip);
}

/* Flags after IRET: `flags` was popped with the operand size, CPL is the old one. */
static u64 iret_flags(const struct cpu *cpu, u64 flags, unsigned size, unsigned cpl)
{
    u64 mask = STATUS_FLAGS | X86_EFLAGS_TF | X86_EFLAGS_DF | X86_EFLAGS_NT;

    if (size > 2)
        mask |= X86_EFLAGS_RF | X86_EFLAGS_AC | X86_EFLAGS_ID;
    if (cpl <= iopl(cpu))
        mask |= X86_EFLAGS_IF;
    if (cpl == 0) {
        mask |= X86_EFLAGS_IOPL;
        if (size > 2 && is_pe(cpu))
            mask |= X86_EFLAGS_VIF | X86_EFLAGS_VIP;
    }
    return (get_rflags(cpu) & ~mask) | (flags & mask);
}

static int iret_done(struct cpu *cpu, u64 flags, u64 rip)
{
    set_rflags(cpu, flags);
    GUEST(cpu).interruptibility &= ~(u32)CPU_BLOCK_NMI;
    set_rip(cpu, rip);
    serialize(cpu);
    return LOOKUP;
}

/* A faulting IRET unblocks NMIs as well (SDM vol. 3 6.7.1); one that exits is done again. */
static int iret_failed(struct cpu *cpu, const struct insn *i)
{
    if (cpu->stop == STOP_EXCEPTION)
        GUEST(cpu).interruptibility &= ~(u32)CPU_BLOCK_NMI;
    return stop(cpu, i);
}

/* Real mode, and virtual-8086 mode with IOPL 3. */
static int iret_real(struct cpu *cpu, const struct insn *i)
{
    u64 rsp = GPR(cpu, RSP), rip, sel, flags;

    if (!pop_at(cpu, &rsp, i->opsize, &rip) || !pop_at(cpu, &rsp, i->opsize, &sel) ||
        !pop_at(cpu, &rsp, i->opsize, &flags))
        return iret_failed(cpu, i);
    if (rip > SEG(cpu, CPU_SEG_CS).limit) {
        raise_gp(cpu, 0);
        return iret_failed(cpu, i);
    }
    GPR(cpu, RSP) = rsp;
    set_segment_real(cpu, CPU_SEG_CS, (u16)sel);
    return iret_done(cpu, iret_flags(cpu, flags, i->opsize, cpu->cpl), rip);
}

/* Virtual-8086 mode with IOPL < 3 and CR4.VME. */
static int iret_vme(struct cpu *cpu, const struct insn *i)
{
    u64 rsp = GPR(cpu, RSP), rip, sel, flags;

    if (!pop_at(cpu, &rsp, 2, &rip) || !pop_at(cpu, &rsp, 2, &sel) ||
        !pop_at(cpu, &rsp, 2, &flags) || !vme_load_flags(cpu, flags))
        return iret_failed(cpu, i);
    GPR(cpu, RSP) = rsp;
    set_segment_real(cpu, CPU_SEG_CS, (u16)sel);
    return iret_done(cpu, get_rflags(cpu), rip);
}

static int iret_task(struct cpu *cpu, const struct insn *i)
{
    u16 link;

    if (!system_read(cpu, table_linear(cpu, SEG(cpu, CPU_SEG_TR).base), &link, 2))
        return stop(cpu, i);
    enum task_result result = task_switch(cpu, link, TASK_IRET, false, 0, next_rip(cpu, i));
    if (result != TASK_FAILED)
        GUEST(cpu).interruptibility &= ~(u32)CPU_BLOCK_NMI;
    else if (cpu->stop == STOP_EXCEPTION)
        return iret_failed(cpu, i);
    return task_switched(cpu, i, result);
}

static int iret_to_vm86(struct cpu *cpu, const struct insn *i, u64 rsp, u64 rip, u16 cs, u64 flags)
{
    static const u8 order[] = {CPU_SEG_ES, CPU_SEG_DS, CPU_SEG_FS, CPU_SEG_GS};
    u64 esp, ss, sel[4];

    if (!pop_at(cpu, &rsp, 4, &esp) || !pop_at(cpu, &rsp, 4, &ss))
        return iret_failed(cpu, i);
    for (unsigned k = 0; k < 4; k++)
        if (!pop_at(cpu, &rsp, 4, &sel[k]))
            return iret_failed(cpu, i);
    if (rip > 0xffff) {
        raise_gp(cpu, 0);
        return iret_failed(cpu, i);
    }

    u64 mask = STATUS_FLAGS | X86_EFLAGS_TF | X86_EFLAGS_IF | X86_EFLAGS_DF | X86_EFLAGS_IOPL |
               X86_EFLAGS_NT | X86_EFLAGS_RF | X86_EFLAGS_VM | X86_EFLAGS_AC | X86_EFLAGS_VIF |
               X86_EFLAGS_VIP | X86_EFLAGS_ID;
    set_rflags(cpu, (get_rflags(cpu) & ~mask) | (flags & mask));
    set_segment_real(cpu, CPU_SEG_CS, cs);
    set_segment_real(cpu, CPU_SEG_SS, (u16)ss);
    for (unsigned k = 0; k < 4; k++)
        set_segment_real(cpu, order[k], (u16)sel[k]);
    GPR(cpu, RSP) = (u32)esp;
    return iret_done(cpu, get_rflags(cpu), rip);
}

int x_iret(struct cpu *cpu, const struct insn *i)
{
    struct far_return r = {0};
    u64 rsp = GPR(cpu, RSP), sel, flags;
    unsigned size = i->opsize, cpl = cpu->cpl;

    if (!(cpu->mode & MODE_PE)) {
        if (!is_vm86(cpu) || iopl(cpu) == 3)
            return iret_real(cpu, i);
        if (has_vme(cpu) && size == 2)
            return iret_vme(cpu, i);
        raise_gp(cpu, 0);
        return iret_failed(cpu, i);
    }
    if (GUEST(cpu).rflags & X86_EFLAGS_NT) {
        if (!is_lma(cpu))
            return iret_task(cpu, i);
        raise_gp(cpu, 0);
        return iret_failed(cpu, i);
    }
    if (!pop_at(cpu, &rsp, size, &r.rip) || !pop_at(cpu, &rsp, size, &sel) ||
        !pop_at(cpu, &rsp, size, &flags))
        return iret_failed(cpu, i);
    if (flags & X86_EFLAGS_VM && size == 4 && cpl == 0 && !is_lma(cpu))
        return iret_to_vm86(cpu, i, rsp, r.rip, (u16)sel, flags);

    if (!return_code_segment(cpu, (u16)sel, &r))
        return iret_failed(cpu, i);
    r.rsp = rsp;
    /* 64-bit mode always pops SS:RSP */
    if ((r.cpl > cpl || is_code64(cpu)) && !return_stack(cpu, &rsp, size, &r))
        return iret_failed(cpu, i);
    if (!check_rip(cpu, &r.cs, r.rip) || !return_mark_accessed(cpu, &r))
        return iret_failed(cpu, i);
    flags = iret_flags(cpu, flags, size, cpl);
    return_commit(cpu, &r, 0);
    return iret_done(cpu, flags, r.rip);
}

/* ---- MOV, PUSH, POP of segment registers ------------------------------------------------------------------------ */

/* The instruction is done: block events behind a load of SS, decode anew for the new segment. */
static int segment_loaded(struct cpu *cpu, const struct insn *i, bool blocks)
{
    u64 rip = next_rip(cpu, i);

    if (blocks)
        GUEST(cpu).interruptibility |= CPU_BLOCK_MOVSS;
    return transferred(cpu, rip);
}

int x_mov_e_s(struct cpu *cpu, const struct insn *i)
{
    u64 sel;

    if (i->src > CPU_SEG_GS)
        return x_ud(cpu, i);
    sel = SEG(cpu, i->src).selector;
    if (!rm_write(cpu, i, i->dst, i->flags & I_MEM ? 2 : i->opsize, sel))
        return stop(cpu, i);
    NEXT(cpu, i);
}

int x_mov_s_e(struct cpu *cpu, const struct insn *i)
{
    u64 sel;

    if (i->src > CPU_SEG_GS || i->src == CPU_SEG_CS)
        return x_ud(cpu, i);
    if (!rm_read(cpu, i, i->dst, 2, &sel) || !load_segment(cpu, i->src, (u16)sel))
        return stop(cpu, i);
    return segment_loaded(cpu, i, i->src == CPU_SEG_SS);
}

/* With a 32-bit operand size processors write and read only the selector's 16 bits; AMD's write a
 * zero-extended one (SDM vol. 2 PUSH allows both; measured). */
static unsigned sreg_slot_access(const struct insn *i) { return i->opsize == 4 ? 2 : i->opsize; }

int x_push_s(struct cpu *cpu, const struct insn *i)
{
    u64 sp = sp_add(cpu, GPR(cpu, RSP), -(s64)i->opsize), la;
    unsigned size = is_amd(cpu) ? i->opsize : sreg_slot_access(i);

    if (!stack_linear(cpu, sp, size, ACC_WRITE, &la) ||
        !st_size(cpu, la, size, SEG(cpu, i->src).selector, ACC_STACK))
        return stop(cpu, i);
    GPR(cpu, RSP) = sp;
    NEXT(cpu, i);
}

int x_pop_s(struct cpu *cpu, const struct insn *i)
{
    u64 sp = sp_add(cpu, GPR(cpu, RSP), i->opsize), la, sel;
    unsigned size = sreg_slot_access(i);

    if (!stack_linear(cpu, GPR(cpu, RSP), size, ACC_READ, &la) ||
        !ld_size(cpu, la, size, &sel, ACC_STACK) || !load_segment(cpu, i->src, (u16)sel))
        return stop(cpu, i);
    GPR(cpu, RSP) = sp;
    return segment_loaded(cpu, i, i->src == CPU_SEG_SS);
}

static int load_far_pointer(struct cpu *cpu, const struct insn *i, unsigned seg)
{
    u16 sel;
    u64 offset;

    if (!read_far_pointer(cpu, i, &sel, &offset) || !load_segment(cpu, seg, sel))
        return stop(cpu, i);
    reg_write(cpu, i->src, far_size(cpu, i), offset);
    return segment_loaded(cpu, i, false);
}

int x_les(struct cpu *cpu, const struct insn *i) { return load_far_pointer(cpu, i, CPU_SEG_ES); }
int x_lds(struct cpu *cpu, const struct insn *i) { return load_far_pointer(cpu, i, CPU_SEG_DS); }
int x_lss(struct cpu *cpu, const struct insn *i) { return load_far_pointer(cpu, i, CPU_SEG_SS); }
int x_lfs(struct cpu *cpu, const struct insn *i) { return load_far_pointer(cpu, i, CPU_SEG_FS); }
int x_lgs(struct cpu *cpu, const struct insn *i) { return load_far_pointer(cpu, i, CPU_SEG_GS); }

/* ---- descriptor-table registers ------------------------------------------------------------------------------------ */

static bool umip_blocks(const struct cpu *cpu)
{
    return cpu->vmcs.guest.cr4 & X86_CR4_UMIP && cpu->cpl > 0;
}

static int store_table(struct cpu *cpu, const struct insn *i, const struct cpu_table *t)
{
    unsigned base_size = i->flags & I_CODE64 ? 8 : 4;
    u16 limit = (u16)t->limit;
    u64 base = t->base, la;
    u8 m[10];

    if (umip_blocks(cpu))
        return fault_gp(cpu, i, 0);
    /* All 32 bits, whatever the operand size: only LGDT and LIDT know one of 24. */
    memcpy(m, &limit, 2);
    memcpy(m + 2, &base, 8);
    if (!ea_linear(cpu, i, 2 + base_size, ACC_WRITE, &la) || !mem_check_alignment(cpu, la, 2) ||
        !mem_check_alignment(cpu, la + 2, 4) ||
        !mem_write(cpu, la, m, 2 + base_size, ACC_WRITE | ACC_BYTES | ea_access(i)))
        return stop(cpu, i);
    NEXT(cpu, i);
}

/* LGDT, LIDT, LLDT and LTR serialize (SDM vol. 3 8.3). */
static int serialized(struct cpu *cpu, const struct insn *i)
{
    serialize(cpu);
    return transferred(cpu, next_rip(cpu, i));
}

static int load_table(struct cpu *cpu, const struct insn *i, struct cpu_table *t)
{
    unsigned base_size = i->flags & I_CODE64 ? 8 : 4;
    u64 base, la;
    u16 limit;

    if (!ea_linear(cpu, i, 2 + base_size, ACC_READ, &la) || !ld16(cpu, la, &limit, ea_access(i)) ||
        !ld_size(cpu, la + 2, base_size, &base, ea_access(i)))
        return stop(cpu, i);
    if (base_size == 4 && i->opsize == 2)
        base &= 0xffffff;
    if (!is_canonical(cpu, base))
        return fault_gp(cpu, i, 0);
    t->base = base;
    t->limit = limit;
    return serialized(cpu, i);
}

int x_sgdt(struct cpu *cpu, const struct insn *i) { return store_table(cpu, i, &GUEST(cpu).gdtr); }
int x_sidt(struct cpu *cpu, const struct insn *i) { return store_table(cpu, i, &GUEST(cpu).idtr); }
int x_lgdt(struct cpu *cpu, const struct insn *i) { return load_table(cpu, i, &GUEST(cpu).gdtr); }
int x_lidt(struct cpu *cpu, const struct insn *i) { return load_table(cpu, i, &GUEST(cpu).idtr); }

static int store_selector(struct cpu *cpu, const struct insn *i, unsigned seg)
{
    if (umip_blocks(cpu))
        return fault_gp(cpu, i, 0);
    if (!rm_write(cpu, i, i->dst, i->flags & I_MEM ? 2 : i->opsize, SEG(cpu, seg).selector))
        return stop(cpu, i);
    NEXT(cpu, i);
}

int x_sldt(struct cpu *cpu, const struct insn *i) { return store_selector(cpu, i, CPU_SEG_LDTR); }
int x_str(struct cpu *cpu, const struct insn *i) { return store_selector(cpu, i, CPU_SEG_TR); }

/* The LDT or TSS descriptor LLDT and LTR want: in the GDT, of this type, present. */
static bool fetch_table_segment(struct cpu *cpu, u16 sel, unsigned type, unsigned type_or,
                                struct desc *d)
{
    if (sel & SELECTOR_TI_MASK)
        return raise_selector(cpu, GP_VECTOR, sel);
    if (!desc_fetch_system(cpu, sel, GP_VECTOR, d))
        return false;
    unsigned found = ar_system_type(d->ar);
    if (found != type && found != type_or)
        return raise_selector(cpu, GP_VECTOR, sel);
    if (!(d->ar & CPU_AR_P))
        return raise_selector(cpu, NP_VECTOR, sel);
    return is_canonical(cpu, d->base) || raise_selector(cpu, GP_VECTOR, sel);
}

int x_lldt(struct cpu *cpu, const struct insn *i)
{
    struct desc d;
    u64 sel;

    if (!rm_read(cpu, i, i->dst, 2, &sel))
        return stop(cpu, i);
    if (sel_is_null((u16)sel)) {
        set_segment_null(cpu, CPU_SEG_LDTR, (u16)sel);
        return serialized(cpu, i);
    }
    if (!fetch_table_segment(cpu, (u16)sel, DESC_LDT, DESC_LDT, &d))
        return stop(cpu, i);
    SEG(cpu, CPU_SEG_LDTR) = desc_segment(&d, (u16)sel, sel_rpl((u16)sel));
    return serialized(cpu, i);
}

int x_ltr(struct cpu *cpu, const struct insn *i)
{
    unsigned narrow = is_lma(cpu) ? DESC_TSS_AVAILABLE : DESC_TSS16_AVAILABLE;
    struct desc d;
    u64 sel;

    if (!rm_read(cpu, i, i->dst, 2, &sel))
        return stop(cpu, i);
    if (sel_is_null((u16)sel))
        return fault_gp(cpu, i, 0);
    if (!fetch_table_segment(cpu, (u16)sel, DESC_TSS_AVAILABLE, narrow, &d) ||
        !desc_change_type(cpu, &d, 2, 0))
        return stop(cpu, i);
    d.ar |= 2;
    SEG(cpu, CPU_SEG_TR) = desc_segment(&d, (u16)sel, sel_rpl((u16)sel));
    return serialized(cpu, i);
}

/* ---- LAR, LSL, VERR, VERW, ARPL ---------------------------------------------------------------------------------------- */

/* Whether CPL and RPL may use the segment, as these instructions see it. */
static bool privilege_allows(const struct cpu *cpu, u16 sel, u32 ar)
{
    return ar_is_conforming(ar) || (ar_dpl(ar) >= cpu->cpl && ar_dpl(ar) >= sel_rpl(sel));
}

/* *found: there is a descriptor in reach. false: cpu->stop is set. */
static bool query_descriptor(struct cpu *cpu, const struct insn *i, unsigned reg_off, u16 *sel,
                             struct desc *d, bool *found)
{
    u64 v;

    if (!rm_read(cpu, i, reg_off, 2, &v))
        return false;
    *sel = (u16)v;
    *found = false;
    if (sel_is_null(*sel))
        return true;
    return desc_read(cpu, *sel, d, found);
}

#define TYPE(t) (1u << (t))
#define LSL_TYPES_LONG (TYPE(DESC_LDT) | TYPE(DESC_TSS_AVAILABLE) | TYPE(DESC_TSS_BUSY))
#define LSL_TYPES (LSL_TYPES_LONG | TYPE(DESC_TSS16_AVAILABLE) | TYPE(DESC_TSS16_BUSY))
#define LAR_TYPES_LONG (LSL_TYPES_LONG | TYPE(DESC_CALL_GATE))
#define LAR_TYPES (LSL_TYPES | TYPE(DESC_CALL_GATE) | TYPE(DESC_CALL_GATE16) | TYPE(DESC_TASK_GATE))

static int query(struct cpu *cpu, const struct insn *i, bool limit, unsigned types)
{
    struct desc d;
    bool found;
    u16 sel;

    if (!query_descriptor(cpu, i, i->dst, &sel, &d, &found))
        return stop(cpu, i);
    found = found && (d.ar & CPU_AR_S || types >> (d.ar & CPU_AR_TYPE) & 1) &&
            privilege_allows(cpu, sel, d.ar);
    if (found)
        reg_write(cpu, i->src, i->opsize, limit ? d.limit : d.raw >> 32 & 0x00ffff00);
    set_zf(cpu, found);
    NEXT(cpu, i);
}

int x_lar(struct cpu *cpu, const struct insn *i)
{
    return query(cpu, i, false, is_lma(cpu) ? LAR_TYPES_LONG : LAR_TYPES);
}

int x_lsl(struct cpu *cpu, const struct insn *i)
{
    return query(cpu, i, true, is_lma(cpu) ? LSL_TYPES_LONG : LSL_TYPES);
}

static int verify(struct cpu *cpu, const struct insn *i, bool write)
{
    struct desc d;
    bool found;
    u16 sel;

    if (!query_descriptor(cpu, i, i->dst, &sel, &d, &found))
        return stop(cpu, i);
    if (found && write)
        found = ar_is_writable_data(d.ar);
    else if (found)
        found = d.ar & CPU_AR_S && (!ar_is_code(d.ar) || d.ar & SEG_TYPE_READABLE);
    set_zf(cpu, found && privilege_allows(cpu, sel, d.ar));
    NEXT(cpu, i);
}

int x_verr(struct cpu *cpu, const struct insn *i) { return verify(cpu, i, false); }
int x_verw(struct cpu *cpu, const struct insn *i) { return verify(cpu, i, true); }

/* The operand is written only when it changes (SDM vol. 2 ARPL; measured: read-only pages do not
 * matter otherwise). */
int x_arpl(struct cpu *cpu, const struct insn *i)
{
    u16 src = REG16(cpu, i->src);
    u64 dst;

    if (!rm_read(cpu, i, i->dst, 2, &dst))
        return stop(cpu, i);
    bool raised = sel_rpl((u16)dst) < sel_rpl(src);
    u64 changed = (dst & ~(u64)SELECTOR_RPL_MASK) | sel_rpl(src);
    if (raised && !rm_write(cpu, i, i->dst, 2, changed))
        return stop(cpu, i);
    set_zf(cpu, raised);
    NEXT(cpu, i);
}

/* ---- SYSCALL, SYSENTER, and the way back ------------------------------------------------------------------------------------ */

static struct cpu_seg flat_segment(u32 ar, u64 selector, unsigned cpl)
{
    return (struct cpu_seg){.limit = 0xffffffff,
                            .ar = ar | cpl << CPU_AR_DPL_SHIFT,
                            .selector = (u16)((selector & ~3ull) | cpl)};
}

static void load_flat(struct cpu *cpu, u32 code_ar, u64 cs, u64 ss, unsigned cpl)
{
    SEG(cpu, CPU_SEG_CS) = flat_segment(code_ar, cs, cpl);
    SEG(cpu, CPU_SEG_SS) = flat_segment(AR_DATA, ss, cpl);
}

/* The other vendor's instruction outside 64-bit mode, where KVM emulates it for a guest whose CPUID
 * says that vendor (emulate.c em_syscall, em_sysenter). */
static bool emulates_other_vendor(const struct cpu *cpu)
{
    return CTL(cpu).flags & CPU_OTHER_VENDOR && !is_code64(cpu);
}

/* Intel's know SYSCALL in 64-bit mode only (SDM vol. 2). */
static bool has_syscall(const struct cpu *cpu)
{
    if (!(cpu->vmcs.guest.efer & EFER_SCE) || !(cpu->mode & MODE_PE))
        return false;
    return is_code64(cpu) || is_amd(cpu) || emulates_other_vendor(cpu);
}

/* APM vol. 3 SYSCALL, outside long mode: no flags are saved, ECX has the return address. */
static int syscall_legacy(struct cpu *cpu, const struct insn *i)
{
    u64 star = GUEST(cpu).star, sel = star >> 32 & 0xffff;
    u64 clear = X86_EFLAGS_VM | X86_EFLAGS_IF | X86_EFLAGS_RF;

    GPR(cpu, RCX) = (u32)next_rip(cpu, i);
    set_rflags(cpu, get_rflags(cpu) & ~clear);
    load_flat(cpu, AR_CODE32, sel, sel + 8, 0);
    return transferred(cpu, (u32)star);
}

int x_syscall(struct cpu *cpu, const struct insn *i)
{
    struct cpu_guest *g = &GUEST(cpu);
    u64 sel = g->star >> 32 & 0xffff, flags = get_rflags(cpu) & ~(u64)X86_EFLAGS_RF;

    if (!has_syscall(cpu))
        return x_ud(cpu, i);
    if (!is_lma(cpu))
        return syscall_legacy(cpu, i);
    u64 target = is_code64(cpu) ? g->lstar : g->cstar;
    GPR(cpu, RCX) = next_rip(cpu, i);
    GPR(cpu, 11) = flags;
    set_rflags(cpu, (flags & ~g->sfmask) | X86_EFLAGS_FIXED);
    load_flat(cpu, AR_CODE64, sel, sel + 8, 0);
    return transferred(cpu, target);
}

static u64 sysret_flags(const struct cpu *cpu)
{
    return (GPR(cpu, 11) & 0x3c7fd7) | X86_EFLAGS_FIXED;
}

/* APM vol. 3 SYSRET: only the selector of SS is loaded. What is there of a segment stays, usable or
 * not; CPL is what KVM shows as its DPL. The target is checked when it is fetched from, at CPL 3. */
static int sysret_amd(struct cpu *cpu, const struct insn *i)
{
    struct cpu_seg ss = SEG(cpu, CPU_SEG_SS);
    u64 sel = GUEST(cpu).star >> 48, rip = GPR(cpu, RCX);
    bool to64 = is_code64(cpu) && i->opsize == 8;

    if (!(cpu->mode & MODE_PE) || cpu->cpl != 0)
        return fault_gp(cpu, i, 0);
    set_rflags(cpu, is_code64(cpu) ? sysret_flags(cpu) : get_rflags(cpu) | X86_EFLAGS_IF);
    load_flat(cpu, to64 ? AR_CODE64 : AR_CODE32, to64 ? sel + 16 : sel, sel + 8, 3);
    ss.selector = SEG(cpu, CPU_SEG_SS).selector;
    ss.ar |= CPU_AR_DPL;
    SEG(cpu, CPU_SEG_SS) = ss;
    return transferred(cpu, to64 ? rip : (u32)rip);
}

int x_sysret(struct cpu *cpu, const struct insn *i)
{
    struct cpu_guest *g = &GUEST(cpu);
    u64 sel = g->star >> 48, rip = GPR(cpu, RCX);
    bool to64 = i->opsize == 8;

    if (!(g->efer & EFER_SCE) || !(is_code64(cpu) || is_amd(cpu)))
        return x_ud(cpu, i);
    if (is_amd(cpu))
        return sysret_amd(cpu, i);
    if (cpu->cpl != 0 || (to64 && !is_canonical(cpu, rip)))
        return fault_gp(cpu, i, 0);
    set_rflags(cpu, sysret_flags(cpu));
    load_flat(cpu, to64 ? AR_CODE64 : AR_CODE32, to64 ? sel + 16 : sel, sel + 8, 3);
    return transferred(cpu, to64 ? rip : (u32)rip);
}

/* AMD's have them in legacy mode only (APM vol. 3 SYSENTER). */
static bool has_sysenter(const struct cpu *cpu)
{
    return !is_amd(cpu) || !is_lma(cpu) || emulates_other_vendor(cpu);
}

int x_sysenter(struct cpu *cpu, const struct insn *i)
{
    struct cpu_guest *g = &GUEST(cpu);
    bool lma = is_lma(cpu);
    u64 sel = g->sysenter_cs & 0xfffc;

    if (!has_sysenter(cpu))
        return x_ud(cpu, i);
    if (!is_pe(cpu) || !sel)
        return fault_gp(cpu, i, 0);
    u64 clear = X86_EFLAGS_VM | X86_EFLAGS_IF | X86_EFLAGS_RF;
    set_rflags(cpu, get_rflags(cpu) & ~clear);
    load_flat(cpu, lma ? AR_CODE64 : AR_CODE32, sel, sel + 8, 0);
    GPR(cpu, RSP) = lma ? g->sysenter_esp : (u32)g->sysenter_esp;
    return transferred(cpu, lma ? g->sysenter_eip : (u32)g->sysenter_eip);
}

int x_sysexit(struct cpu *cpu, const struct insn *i)
{
    u64 sel = GUEST(cpu).sysenter_cs & 0xfffc;
    u64 rip = GPR(cpu, RDX), rsp = GPR(cpu, RCX);
    bool to64 = i->opsize == 8;

    if (cpu->cpl != 0) /* Zen 5 looks at this first: measured */
        return fault_gp(cpu, i, 0);
    if (!has_sysenter(cpu) && !(CTL(cpu).flags & CPU_OTHER_VENDOR))
        return x_ud(cpu, i);
    if (!(cpu->mode & MODE_PE) || !sel)
        return fault_gp(cpu, i, 0);
    if (to64 && (!is_canonical(cpu, rip) || !is_canonical(cpu, rsp)))
        return fault_gp(cpu, i, 0);
    load_flat(cpu, to64 ? AR_CODE64 : AR_CODE32, sel + (to64 ? 32 : 16), sel + (to64 ? 40 : 24), 3);
    GPR(cpu, RSP) = to64 ? rsp : (u32)rsp;
    return transferred(cpu, to64 ? rip : (u32)rip);
}

/* ---- FS and GS bases ----------------------------------------------------------------------------------------------------------- */

static void set_base(struct cpu *cpu, unsigned seg, u64 base)
{
    SEG(cpu, seg).base = base;
    cpu->seg_base[seg] = base;
}

int x_swapgs(struct cpu *cpu, const struct insn *i)
{
    u64 base = SEG(cpu, CPU_SEG_GS).base;

    if (cpu->cpl != 0)
        return fault_gp(cpu, i, 0);
    set_base(cpu, CPU_SEG_GS, GUEST(cpu).kernel_gs_base);
    GUEST(cpu).kernel_gs_base = base;
    NEXT(cpu, i);
}

static int read_base(struct cpu *cpu, const struct insn *i, unsigned seg)
{
    if (!(GUEST(cpu).cr4 & X86_CR4_FSGSBASE))
        return x_ud(cpu, i);
    reg_write(cpu, i->dst, i->opsize, SEG(cpu, seg).base);
    NEXT(cpu, i);
}

static int write_base(struct cpu *cpu, const struct insn *i, unsigned seg)
{
    u64 base = reg_read(cpu, i->dst, i->opsize);

    if (!(GUEST(cpu).cr4 & X86_CR4_FSGSBASE))
        return x_ud(cpu, i);
    if (!is_canonical(cpu, base))
        return fault_gp(cpu, i, 0);
    set_base(cpu, seg, base);
    NEXT(cpu, i);
}

int x_rdfsbase(struct cpu *cpu, const struct insn *i) { return read_base(cpu, i, CPU_SEG_FS); }
int x_rdgsbase(struct cpu *cpu, const struct insn *i) { return read_base(cpu, i, CPU_SEG_GS); }
int x_wrfsbase(struct cpu *cpu, const struct insn *i) { return write_base(cpu, i, CPU_SEG_FS); }
int x_wrgsbase(struct cpu *cpu, const struct insn *i) { return write_base(cpu, i, CPU_SEG_GS); }
