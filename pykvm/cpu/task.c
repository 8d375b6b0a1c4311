/* SPDX-License-Identifier: MIT */
/*
 * Task switches through 16- and 32-bit TSS.  SDM vol. 3 chapter 7.
 */
#include "segment.h"

/* ---- the TSS ---------------------------------------------------------------------------------- */

/* The dynamic fields of either TSS, in one form. */
struct task_state {
    u32 cr3, eip, eflags;
    u32 gpr[8];
    u16 seg[6]; /* ES CS SS DS FS GS */
    u16 ldt;
    bool trap;
};

struct tss16 {
    u16 link, stacks[6], ip, flags, gpr[8], seg[4], ldt;
} __attribute__((packed));

struct tss32 {
    u32 link, stacks[6], cr3, eip, eflags, gpr[8], seg[6], ldt;
    u16 trap, iomap;
} __attribute__((packed));

#define TSS16_SAVED_FROM offsetof(struct tss16, ip)
#define TSS16_SAVED_TO offsetof(struct tss16, ldt)
#define TSS32_SAVED_FROM offsetof(struct tss32, eip)
#define TSS32_SAVED_TO offsetof(struct tss32, ldt)

static u64 tss_linear(const struct cpu_seg *tss, size_t offset)
{
    return (u32)(tss->base + offset);
}

static bool read_task(struct cpu *cpu, const struct cpu_seg *tss, struct task_state *t)
{
    if (tss_is_16bit(tss)) {
        struct tss16 m;
        if (!system_read(cpu, tss_linear(tss, 0), &m, sizeof(m)))
            return false;
        /* High halves of the registers are undefined in the SDM; KVM clears them. */
        *t = (struct task_state){.eip = m.ip, .eflags = m.flags, .ldt = m.ldt};
        for (unsigned k = 0; k < 8; k++)
            t->gpr[k] = m.gpr[k];
        for (unsigned k = 0; k < 4; k++)
            t->seg[k] = m.seg[k];
        return true;
    }
    struct tss32 m;
    if (!system_read(cpu, tss_linear(tss, 0), &m, sizeof(m)))
        return false;
    *t = (struct task_state){
        .cr3 = m.cr3, .eip = m.eip, .eflags = m.eflags, .ldt = (u16)m.ldt, .trap = m.trap & 1};
    for (unsigned k = 0; k < 8; k++)
        t->gpr[k] = m.gpr[k];
    for (unsigned k = 0; k < 6; k++)
        t->seg[k] = (u16)m.seg[k];
    return true;
}

/* The fields saved are contiguous in both formats: from EIP up to GS. */
static bool write_task(struct cpu *cpu, const struct cpu_seg *tss, u64 rip, u64 flags)
{
    const struct cpu_guest *g = &GUEST(cpu);

    if (tss_is_16bit(tss)) {
        struct tss16 m = {.ip = (u16)rip, .flags = (u16)flags};
        for (unsigned k = 0; k < 8; k++)
            m.gpr[k] = (u16)g->gpr[k];
        for (unsigned k = 0; k < 4; k++)
            m.seg[k] = g->seg[k].selector;
        return mem_write(cpu, tss_linear(tss, TSS16_SAVED_FROM), (u8 *)&m + TSS16_SAVED_FROM,
                         TSS16_SAVED_TO - TSS16_SAVED_FROM, ACC_WRITE | ACC_SYSTEM);
    }
    struct tss32 m = {.eip = (u32)rip, .eflags = (u32)flags};
    for (unsigned k = 0; k < 8; k++)
        m.gpr[k] = (u32)g->gpr[k];
    for (unsigned k = 0; k < 6; k++)
        m.seg[k] = g->seg[k].selector;
    return mem_write(cpu, tss_linear(tss, TSS32_SAVED_FROM), (u8 *)&m + TSS32_SAVED_FROM,
                     TSS32_SAVED_TO - TSS32_SAVED_FROM, ACC_WRITE | ACC_SYSTEM);
}

/* ---- the new task's segments -------------------------------------------------------------------- */

/* LDTR of the new task: every fault is #TS. */
static bool load_task_ldt(struct cpu *cpu, u16 sel)
{
    struct desc d;

    set_segment_null(cpu, CPU_SEG_LDTR, sel);
    if (sel_is_null(sel))
        return true;
    if (sel & SELECTOR_TI_MASK)
        return raise_selector(cpu, TS_VECTOR, sel);
    if (!desc_fetch(cpu, sel, TS_VECTOR, &d))
        return false;
    if (ar_system_type(d.ar) != DESC_LDT || !(d.ar & CPU_AR_P))
        return raise_selector(cpu, TS_VECTOR, sel);
    SEG(cpu, CPU_SEG_LDTR) = desc_segment(&d, sel, sel_rpl(sel));
    return true;
}

static bool load_task_cs(struct cpu *cpu, u16 sel)
{
    struct desc d;

    if (sel_is_null(sel))
        return raise_ts(cpu, 0);
    if (!desc_fetch(cpu, sel, TS_VECTOR, &d))
        return false;
    unsigned dpl = ar_dpl(d.ar), rpl = sel_rpl(sel);
    if (!ar_is_code(d.ar) || (ar_is_conforming(d.ar) ? dpl > rpl : dpl != rpl))
        return raise_selector(cpu, TS_VECTOR, sel);
    if (!(d.ar & CPU_AR_P))
        return raise_selector(cpu, NP_VECTOR, sel);
    if (!desc_mark_accessed(cpu, &d))
        return false;
    SEG(cpu, CPU_SEG_CS) = desc_segment(&d, sel, rpl);
    return true;
}

static bool load_task_data(struct cpu *cpu, unsigned seg, u16 sel, unsigned cpl)
{
    if (!sel_is_null(sel))
        return load_data_segment(cpu, seg, sel, cpl, TS_VECTOR);
    return seg != CPU_SEG_SS || raise_ts(cpu, 0);
}

/* The registers are the new task's; now its descriptors, each able to fault in the new task. */
static bool load_task_segments(struct cpu *cpu, const struct task_state *t)
{
    static const u8 data[] = {CPU_SEG_DS, CPU_SEG_ES, CPU_SEG_FS, CPU_SEG_GS};
    unsigned cpl = sel_rpl(t->seg[CPU_SEG_CS]);

    if (!load_task_ldt(cpu, t->ldt))
        return false;
    if (is_vm86(cpu)) {
        for (unsigned seg = CPU_SEG_ES; seg <= CPU_SEG_GS; seg++)
            set_segment_real(cpu, seg, t->seg[seg]);
        return true;
    }
    if (!load_task_cs(cpu, t->seg[CPU_SEG_CS]) ||
        !load_task_data(cpu, CPU_SEG_SS, t->seg[CPU_SEG_SS], cpl))
        return false;
    for (unsigned k = 0; k < 4; k++)
        if (!load_task_data(cpu, data[k], t->seg[data[k]], cpl))
            return false;
    return true;
}

/* ---- the switch ----------------------------------------------------------------------------------- */

/* Selectors are visible, and unusable, until their descriptors are loaded; CPL is already new. */
static void load_task_registers(struct cpu *cpu, const struct task_state *t)
{
    struct cpu_guest *g = &GUEST(cpu);
    unsigned cpl = t->eflags & X86_EFLAGS_VM ? 3 : sel_rpl(t->seg[CPU_SEG_CS]);

    for (unsigned k = 0; k < 8; k++)
        g->gpr[k] = t->gpr[k];
    for (unsigned seg = CPU_SEG_ES; seg <= CPU_SEG_GS; seg++)
        g->seg[seg] = null_stack_segment(t->seg[seg], cpl);
    set_rflags(cpu, (t->eflags & 0x003f7fd5) | X86_EFLAGS_FIXED);
    g->rip = t->eip;
    g->cr0 |= X86_CR0_TS;
    g->dr7 &= ~0x155ull; /* L0..L3, LE */
    tlb_breakpoints(cpu);
    if (t->trap)
        g->pending_dbg |= DR6_BT;
}

static bool check_task(struct cpu *cpu, u16 sel, enum task_reason why, struct desc *d)
{
    unsigned bad = why == TASK_IRET ? TS_VECTOR : GP_VECTOR;
    unsigned busy = why == TASK_IRET ? 2 : 0;

    if (sel & SELECTOR_TI_MASK)
        return raise_selector(cpu, bad, sel);
    if (!desc_fetch(cpu, sel, bad, d))
        return false;
    unsigned type = ar_system_type(d->ar);
    if (type != (DESC_TSS16_AVAILABLE | busy) && type != (DESC_TSS_AVAILABLE | busy))
        return raise_selector(cpu, bad, sel);
    if (!(d->ar & CPU_AR_P))
        return raise_selector(cpu, NP_VECTOR, sel);
    bool narrow = (type & ~2u) == DESC_TSS16_AVAILABLE;
    if (d->limit < (narrow ? sizeof(struct tss16) : sizeof(struct tss32)) - 1)
        return raise_selector(cpu, TS_VECTOR, sel);
    return true;
}

/* An exit in the new task's descriptors: back to before the switch. */
static void undo_switch(struct cpu *cpu, const struct cpu_guest *before)
{
    GUEST(cpu) = *before;
    set_status(cpu, before->rflags);
    update_mode(cpu);
    tlb_breakpoints(cpu);
    tlb_flush_guest(cpu);
}

static bool push_task_error(struct cpu *cpu, const struct cpu_seg *tss, u32 error)
{
    struct stack s;

    stack_current(cpu, &s, false);
    if (!stack_push(cpu, &s, tss_is_16bit(tss) ? 2 : 4, error))
        return false;
    stack_commit(cpu, &s);
    return true;
}

enum task_result task_switch(struct cpu *cpu, u16 sel, enum task_reason why, bool has_error,
                             u32 error, u64 return_rip)
{
    struct cpu_guest *g = &GUEST(cpu);
    struct cpu_seg old = g->seg[CPU_SEG_TR], new;
    struct desc new_desc, old_desc;
    struct task_state t;
    bool nested = why == TASK_CALL || why == TASK_GATE, in_table;
    u64 flags = get_rflags(cpu);

    if (!check_task(cpu, sel, why, &new_desc))
        return TASK_FAILED;
    new = desc_segment(&new_desc, sel, sel_rpl(sel));
    if (!desc_read(cpu, old.selector, &old_desc, &in_table) || !read_task(cpu, &new, &t) ||
        (nested && !mem_probe_write(cpu, tss_linear(&new, 0), 2, ACC_WRITE | ACC_SYSTEM)) ||
        (why != TASK_IRET && !mem_probe_write(cpu, new_desc.la, 8, ACC_WRITE | ACC_SYSTEM)) ||
        (!nested && in_table && !mem_probe_write(cpu, old_desc.la, 8, ACC_WRITE | ACC_SYSTEM)))
        return TASK_FAILED;
    if (!write_task(cpu, &old, return_rip, why == TASK_IRET ? flags & ~(u64)X86_EFLAGS_NT : flags))
        return TASK_FAILED;

    g->rflags = flags; /* undo_switch() restores the status flags from here */
    struct cpu_guest before = *g;
    if (!nested && in_table && !desc_change_type(cpu, &old_desc, 0, 2))
        return TASK_FAILED;
    if (why != TASK_IRET && !desc_change_type(cpu, &new_desc, 2, 0))
        return TASK_FAILED;
    if (nested) {
        if (!mem_write(cpu, tss_linear(&new, 0), &old.selector, 2, ACC_WRITE | ACC_SYSTEM))
            return TASK_FAILED;
        t.eflags |= X86_EFLAGS_NT;
    }
    new.ar |= 2; /* busy */
    g->seg[CPU_SEG_TR] = new;
    load_task_registers(cpu, &t);
    bool paged = g->cr0 & X86_CR0_PG && !tss_is_16bit(&new);
    bool ok = !paged || write_cr3(cpu, t.cr3);
    update_mode(cpu);
    ok = ok && load_task_segments(cpu, &t);
    update_mode(cpu);
    ok = ok && (!has_error || push_task_error(cpu, &new, error)) &&
         check_rip(cpu, &g->seg[CPU_SEG_CS], g->rip);
    if (ok)
        return TASK_DONE;
    if (cpu->stop == STOP_EXCEPTION)
        return TASK_FAULT;

    undo_switch(cpu, &before);
    u32 stop = cpu->stop; /* busy bits are back in plain memory that was just written */
    if (!nested && in_table)
        desc_change_type(cpu, &old_desc, 2, 0);
    if (why != TASK_IRET)
        desc_change_type(cpu, &new_desc, 0, 2);
    cpu->stop = stop;
    return TASK_FAILED;
}
