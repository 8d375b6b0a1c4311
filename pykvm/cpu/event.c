/* SPDX-License-Identifier: MIT */
/*
 * Exceptions and interrupts: raising them, and delivering them through the IVT, the IDT, call
 * frames and task gates (SDM vol. 3 chapter 6, vol. 2 "INT n").
 *
 * A delivery computes and writes its whole frame before it changes a register.  When it meets
 * a VM exit, memory below the stack pointer may have been written, nothing else: the module
 * delivers the same event again from exit.idt_vectoring.
 */
#include "segment.h"

/* ---- raising -------------------------------------------------------------------------------- */

static bool raise_typed(struct cpu *cpu, unsigned vector, u32 type, bool has_error, u32 error)
{
    cpu->exc = (struct exception){
        .vector = (u8)vector, .has_error = has_error, .type = (u8)(type >> 8), .error = error};
    cpu->stop = STOP_EXCEPTION;
    return false;
}

bool raise_exception(struct cpu *cpu, unsigned vector, bool has_error, u32 error)
{
    return raise_typed(cpu, vector, CPU_EVENT_HARD_EXC, has_error, error);
}

bool raise_pf(struct cpu *cpu, u64 la, u32 error)
{
    raise_exception(cpu, PF_VECTOR, true, error);
    cpu->exc.cr2 = la;
    return false;
}

bool raise_db(struct cpu *cpu, u64 dr6)
{
    raise_exception(cpu, DB_VECTOR, false, 0);
    cpu->exc.dr6 = dr6;
    return false;
}

/* ---- one delivery --------------------------------------------------------------------------- */

struct delivery {
    struct cpu_event ev;
    u64 return_rip;
    bool soft;  /* INT n, INT3, INTO: gate DPL is checked, no EXT bit in error codes */
    bool fault; /* RF is set in the pushed flags */
};

/* Where the gate leads. */
struct handler {
    struct cpu_seg cs;
    u64 rip;
    unsigned cpl;
    bool inner;    /* more privileged than CPL: the stack is switched */
    bool masks;    /* interrupt gate: IF is cleared */
    unsigned size; /* of a slot of the frame */
    unsigned ist;
};

static unsigned event_vector(const struct delivery *d) { return d->ev.info & CPU_EVENT_VECTOR; }
static u32 event_type(const struct delivery *d) { return d->ev.info & CPU_EVENT_TYPE; }

static u64 pushed_flags(const struct cpu *cpu, const struct delivery *d)
{
    return get_rflags(cpu) | (d->fault ? X86_EFLAGS_RF : 0);
}

static bool deliver_real(struct cpu *cpu, const struct delivery *d)
{
    struct cpu_guest *g = &GUEST(cpu);
    unsigned vector = event_vector(d);
    u32 entry;
    struct stack s;

    if (vector * 4 + 3 > g->idtr.limit)
        return raise_gp(cpu, vector * 8 | SELERR_IDT);
    if (!system_read(cpu, (u32)(g->idtr.base + vector * 4), &entry, 4))
        return false;
    stack_current(cpu, &s, false);
    if (!stack_push(cpu, &s, 2, pushed_flags(cpu, d)) ||
        !stack_push(cpu, &s, 2, g->seg[CPU_SEG_CS].selector) ||
        !stack_push(cpu, &s, 2, d->return_rip))
        return false;
    stack_commit(cpu, &s);
    set_segment_real(cpu, CPU_SEG_CS, (u16)(entry >> 16));
    g->rip = (u16)entry;
    set_rflags(cpu,
               get_rflags(cpu) & ~(X86_EFLAGS_IF | X86_EFLAGS_TF | X86_EFLAGS_AC | X86_EFLAGS_RF));
    return true;
}

/* The code segment of an interrupt or trap gate. */
static bool handler_segment(struct cpu *cpu, u16 sel, struct handler *h)
{
    struct desc cs;

    if (sel_is_null(sel))
        return raise_gp(cpu, 0);
    if (!desc_fetch(cpu, sel, GP_VECTOR, &cs))
        return false;
    unsigned dpl = ar_dpl(cs.ar);
    if (!ar_is_code(cs.ar) || dpl > cpu->cpl)
        return raise_selector(cpu, GP_VECTOR, sel);
    if (is_lma(cpu) && (cs.ar & (CPU_AR_L | CPU_AR_DB)) != CPU_AR_L)
        return raise_selector(cpu, GP_VECTOR, sel);
    if (!(cs.ar & CPU_AR_P))
        return raise_selector(cpu, NP_VECTOR, sel);
    h->inner = !ar_is_conforming(cs.ar) && dpl < cpu->cpl;
    if (is_vm86(cpu) && !(h->inner && dpl == 0))
        return raise_selector(cpu, GP_VECTOR, sel);
    h->cpl = h->inner ? dpl : cpu->cpl;
    h->cs = desc_segment(&cs, sel, h->cpl);
    return desc_mark_accessed(cpu, &cs);
}

/* What all frames of protected and long mode have above the old stack pointer's slots. */
static bool push_return(struct cpu *cpu, struct stack *s, const struct delivery *d, unsigned size)
{
    if (!stack_push(cpu, s, size, pushed_flags(cpu, d)) ||
        !stack_push(cpu, s, size, SEG(cpu, CPU_SEG_CS).selector) ||
        !stack_push(cpu, s, size, d->return_rip))
        return false;
    return !(d->ev.info & CPU_EVENT_HAS_ERROR) || stack_push(cpu, s, size, d->ev.error_code);
}

static bool push_old_stack(struct cpu *cpu, struct stack *s, unsigned size)
{
    return stack_push(cpu, s, size, SEG(cpu, CPU_SEG_SS).selector) &&
           stack_push(cpu, s, size, GPR(cpu, RSP));
}

static bool push_vm86_segments(struct cpu *cpu, struct stack *s, unsigned size)
{
    static const u8 order[] = {CPU_SEG_GS, CPU_SEG_FS, CPU_SEG_DS, CPU_SEG_ES};

    for (unsigned k = 0; k < 4; k++)
        if (!stack_push(cpu, s, size, SEG(cpu, order[k]).selector))
            return false;
    return true;
}

static void enter_handler(struct cpu *cpu, const struct handler *h, const struct stack *s)
{
    u64 clear = X86_EFLAGS_TF | X86_EFLAGS_NT | X86_EFLAGS_VM | X86_EFLAGS_RF;

    stack_commit(cpu, s);
    if (is_vm86(cpu)) {
        set_segment_null(cpu, CPU_SEG_GS, 0);
        set_segment_null(cpu, CPU_SEG_FS, 0);
        set_segment_null(cpu, CPU_SEG_DS, 0);
        set_segment_null(cpu, CPU_SEG_ES, 0);
    }
    SEG(cpu, CPU_SEG_CS) = h->cs;
    GUEST(cpu).rip = h->rip;
    if (h->masks)
        clear |= X86_EFLAGS_IF;
    set_rflags(cpu, get_rflags(cpu) & ~clear);
}

static bool deliver_legacy_gate(struct cpu *cpu, const struct delivery *d, struct handler *h,
                                u16 sel)
{
    struct stack s;

    if (!handler_segment(cpu, sel, h))
        return false;
    if (!h->inner)
        stack_current(cpu, &s, false);
    else if (!stack_from_tss(cpu, h->cpl, &s))
        return false;
    if (is_vm86(cpu) && !push_vm86_segments(cpu, &s, h->size))
        return false;
    if (h->inner && !push_old_stack(cpu, &s, h->size))
        return false;
    if (!push_return(cpu, &s, d, h->size) || !check_rip(cpu, &h->cs, h->rip))
        return false;
    enter_handler(cpu, h, &s);
    return true;
}

static bool deliver_long_gate(struct cpu *cpu, const struct delivery *d, struct handler *h, u16 sel)
{
    struct stack s;

    if (!handler_segment(cpu, sel, h))
        return false;
    if (h->ist || h->inner) {
        if (!stack_from_tss64(cpu, h->ist ? h->ist + 3 : h->cpl, h->cpl, &s))
            return false;
    } else {
        stack_current(cpu, &s, true);
    }
    s.sp &= ~15ull;
    if (!push_old_stack(cpu, &s, 8) || !push_return(cpu, &s, d, 8) ||
        !check_rip(cpu, &h->cs, h->rip))
        return false;
    enter_handler(cpu, h, &s);
    return true;
}

static bool deliver_task_gate(struct cpu *cpu, const struct delivery *d, u16 sel)
{
    return task_switch(cpu, sel, TASK_GATE, d->ev.info & CPU_EVENT_HAS_ERROR, d->ev.error_code,
                       d->return_rip) == TASK_DONE;
}

static bool deliver_idt(struct cpu *cpu, const struct delivery *d)
{
    struct cpu_guest *g = &GUEST(cpu);
    bool lma = is_lma(cpu);
    unsigned vector = event_vector(d), size = lma ? 16 : 8;
    u32 error = vector * 8 | SELERR_IDT;
    u64 gate[2] = {0, 0};

    if (vector * size + size - 1 > g->idtr.limit)
        return raise_gp(cpu, error);
    if (!system_read(cpu, table_linear(cpu, g->idtr.base + vector * size), gate, size))
        return false;

    unsigned type = gate[0] >> 40 & 0x1f; /* with S, which must be 0 */
    bool wide = type == DESC_INTR_GATE || type == DESC_TRAP_GATE;
    bool narrow = type == DESC_INTR_GATE16 || type == DESC_TRAP_GATE16;
    if (!wide && (lma || (!narrow && type != DESC_TASK_GATE)))
        return raise_gp(cpu, error);
    if (d->soft && (gate[0] >> 45 & 3) < cpu->cpl)
        return raise_gp(cpu, error);
    if (!(gate[0] >> 47 & 1))
        return raise_np(cpu, error);

    u16 sel = (u16)(gate[0] >> 16);
    if (type == DESC_TASK_GATE)
        return deliver_task_gate(cpu, d, sel);
    struct handler h = {
        .rip = (gate[0] & 0xffff) | (wide ? gate[0] >> 32 & 0xffff0000 : 0) | gate[1] << 32,
        .masks = type == DESC_INTR_GATE || type == DESC_INTR_GATE16,
        .size = lma    ? 8
                : wide ? 4
                       : 2,
        .ist = lma ? gate[0] >> 32 & 7 : 0,
    };
    return lma ? deliver_long_gate(cpu, d, &h, sel) : deliver_legacy_gate(cpu, d, &h, sel);
}

/* ---- exceptions on the way ------------------------------------------------------------------- */

/* SDM vol. 3 table 6-4 */
enum exception_class { BENIGN, CONTRIBUTORY, PAGE_FAULT };

static enum exception_class exception_class(unsigned vector)
{
    switch (vector) {
    case PF_VECTOR:
    case VE_VECTOR: return PAGE_FAULT;
    case DE_VECTOR:
    case TS_VECTOR:
    case NP_VECTOR:
    case SS_VECTOR:
    case GP_VECTOR:
    case CP_VECTOR: return CONTRIBUTORY;
    default: return BENIGN;
    }
}

/* The trap- and abort-class ones; #DB is a fault only when DR7.GD raised it (an instruction
 * breakpoint is one too, but pushes RF as it was: SDM vol. 3 17.3.1.1). */
static bool is_fault(const struct exception *exc)
{
    switch (exc->vector) {
    case DB_VECTOR: return exc->dr6 & DR6_BD;
    case NMI_VECTOR:
    case BP_VECTOR:
    case OF_VECTOR:
    case DF_VECTOR:
    case MC_VECTOR: return false;
    default: return true;
    }
}

static struct delivery delivery_of(struct cpu *cpu, struct cpu_event ev, u64 next_rip)
{
    u32 type = ev.info & CPU_EVENT_TYPE;
    bool soft = type == CPU_EVENT_SOFT_INTR || type == CPU_EVENT_SOFT_EXC;
    bool behind = soft || type == CPU_EVENT_PRIV_SW_EXC;
    struct exception exc = {.vector = ev.info & CPU_EVENT_VECTOR};

    return (struct delivery){.ev = ev,
                             .return_rip = behind ? next_rip : GUEST(cpu).rip,
                             .soft = soft,
                             .fault = type == CPU_EVENT_HARD_EXC && is_fault(&exc)};
}

static struct delivery delivery_of_exception(struct cpu *cpu, const struct exception *exc,
                                             u64 next_rip, u32 insn_len)
{
    u32 type = (u32)exc->type << 8;
    struct cpu_event ev = {.info = exc->vector | type | CPU_EVENT_VALID};

    if (exc->has_error && is_pe(cpu)) {
        ev.info |= CPU_EVENT_HAS_ERROR;
        ev.error_code = exc->error;
    }
    if (type != CPU_EVENT_HARD_EXC)
        ev.insn_len = insn_len;
    struct delivery d = delivery_of(cpu, ev, next_rip);
    d.fault = type == CPU_EVENT_HARD_EXC && is_fault(exc);
    return d;
}

/* The exit when the module wants to see this exception. */
static bool intercepted(struct cpu *cpu, const struct exception *exc, const struct delivery *d)
{
    if (event_type(d) == CPU_EVENT_SOFT_INTR || exc->vector >= 64 ||
        !(CTL(cpu).exception_bitmap >> exc->vector & 1))
        return false;
    raise_exit(cpu, EXIT_EXCEPTION);
    EXIT(cpu).intr_info = d->ev.info;
    EXIT(cpu).error_code = d->ev.error_code;
    EXIT(cpu).qualification = exc->vector == PF_VECTOR ? exc->cr2 : exc->dr6;
    EXIT(cpu).gla = exc->cr2;
    if (d->ev.insn_len)
        EXIT(cpu).insn_len = d->ev.insn_len;
    return true;
}

/* CR2 and DR6 change before the delivery starts: an event that is delivered again after an
 * exit brings neither. */
static void record_exception(struct cpu *cpu, const struct exception *exc)
{
    struct cpu_guest *g = &GUEST(cpu);

    if (exc->vector == PF_VECTOR)
        g->cr2 = exc->cr2;
    if (exc->vector == DB_VECTOR && exc->type == CPU_EVENT_HARD_EXC >> 8) {
        u64 traps = DR6_B0 | DR6_B1 | DR6_B2 | DR6_B3;
        g->dr6 = ((g->dr6 & ~traps) | DR6_ACTIVE_LOW | exc->dr6) ^ (exc->dr6 & DR6_ACTIVE_LOW);
        g->dr7 &= ~(u64)DR7_GD;
    }
}

static bool not_delivered(struct cpu *cpu, const struct delivery *d)
{
    /* A frame or a descriptor that only a stepped instruction could write: MMIO. */
    if (cpu->stop == STOP_STEP)
        raise_exit(cpu, EXIT_EMULATION);
    EXIT(cpu).idt_vectoring = d->ev;
    return false;
}

/* cpu->exc came up while *d was delivered: what is to be delivered now. false: exit recorded. */
static bool next_delivery(struct cpu *cpu, struct delivery *d)
{
    struct exception exc = cpu->exc;
    bool first_is_exception = event_type(d) == CPU_EVENT_HARD_EXC;
    enum exception_class second = exception_class(exc.vector);

    if (exc.has_error && second == CONTRIBUTORY && !d->soft)
        exc.error |= SELERR_EXT;
    struct delivery nested = delivery_of_exception(cpu, &exc, 0, 0);
    if (intercepted(cpu, &exc, &nested))
        return not_delivered(cpu, d);
    record_exception(cpu, &exc);

    if (first_is_exception && second != BENIGN) {
        enum exception_class first = exception_class(event_vector(d));
        if (event_vector(d) == DF_VECTOR) {
            /* an exit during no delivery, as that of #DF below: SDM vol. 3 27.2.4 */
            return raise_exit(cpu, EXIT_TRIPLE_FAULT);
        }
        if (first == PAGE_FAULT || (first == CONTRIBUTORY && second == CONTRIBUTORY)) {
            exc = (struct exception){
                .vector = DF_VECTOR, .has_error = true, .type = CPU_EVENT_HARD_EXC >> 8};
            nested = delivery_of_exception(cpu, &exc, 0, 0);
            if (intercepted(cpu, &exc, &nested))
                return false;
        }
    }
    *d = nested;
    return true;
}

static bool deliver(struct cpu *cpu, struct delivery d)
{
    struct cpu_guest *g = &GUEST(cpu);
    bool nmi = event_type(&d) == CPU_EVENT_NMI;
    bool done = true;

    cpu->delivering = true;
    cpu->vectoring = d.ev;
    while (!(is_pe(cpu) ? deliver_idt(cpu, &d) : deliver_real(cpu, &d))) {
        if (cpu->stop != STOP_EXCEPTION)
            done = not_delivered(cpu, &d);
        else
            done = next_delivery(cpu, &d);
        if (!done)
            break;
        cpu->vectoring = d.ev;
    }
    cpu->delivering = false;
    if (!done)
        return false;

    g->interruptibility &= ~(u32)(CPU_BLOCK_STI | CPU_BLOCK_MOVSS);
    if (nmi)
        g->interruptibility |= CPU_BLOCK_NMI;
    cpu->stop = STOP_NONE;
    update_mode(cpu);
    return true;
}

bool deliver_event(struct cpu *cpu, struct cpu_event ev, u64 next_rip)
{
    return deliver(cpu, delivery_of(cpu, ev, next_rip));
}

bool deliver_exception(struct cpu *cpu)
{
    struct exception exc = cpu->exc;
    bool hard = exc.type == CPU_EVENT_HARD_EXC >> 8;
    struct delivery d = delivery_of_exception(cpu, &exc, hard ? 0 : next_rip(cpu, cpu->insn),
                                              hard ? 0 : cpu->insn->len);

    if (intercepted(cpu, &exc, &d))
        return false;
    record_exception(cpu, &exc);
    return deliver(cpu, d);
}

/* ---- INT n and its kin ------------------------------------------------------------------------ */

static int soft_event(struct cpu *cpu, const struct insn *i, unsigned vector, u32 type)
{
    raise_typed(cpu, vector, type, false, 0);
    return stop(cpu, i);
}

/* CR4.VME: the bit of the vector in the interrupt redirection bitmap, the 32 bytes below the I/O
 * bitmap of the TSS. Clear: the program's own handler (SDM vol. 3 20.3.3, table 20-2). */
static bool is_redirected(struct cpu *cpu, u8 vector, bool *redirected)
{
    const struct cpu_seg *tr = &SEG(cpu, CPU_SEG_TR);
    u16 map;
    u8 bits;

    if (tr->limit < 103)
        return raise_gp(cpu, 0);
    if (!system_read(cpu, table_linear(cpu, tr->base + 102), &map, 2))
        return false;
    u32 at = map - 32u + vector / 8;
    if (at > tr->limit)
        return raise_gp(cpu, 0);
    if (!system_read(cpu, table_linear(cpu, tr->base + at), &bits, 1))
        return false;
    *redirected = !(bits >> vector % 8 & 1);
    return true;
}

/* INT n as in real mode, without leaving virtual-8086 mode. */
static int redirect(struct cpu *cpu, const struct insn *i, u8 vector)
{
    bool virtual = iopl(cpu) < 3;
    u64 flags = virtual ? vme_flags(cpu) : get_rflags(cpu);
    u64 clear = X86_EFLAGS_TF | X86_EFLAGS_RF | (virtual ? X86_EFLAGS_VIF : X86_EFLAGS_IF);
    u64 rsp = GPR(cpu, RSP);
    u32 entry;

    if (!ld32(cpu, vector * 4u, &entry, ACC_READ) || !push_at(cpu, &rsp, 2, flags) ||
        !push_at(cpu, &rsp, 2, SEG(cpu, CPU_SEG_CS).selector) ||
        !push_at(cpu, &rsp, 2, next_rip(cpu, i)))
        return stop(cpu, i);
    GPR(cpu, RSP) = rsp;
    set_rflags(cpu, get_rflags(cpu) & ~clear);
    set_segment_real(cpu, CPU_SEG_CS, (u16)(entry >> 16));
    set_rip(cpu, (u16)entry);
    update_mode(cpu);
    return LOOKUP;
}

int x_int(struct cpu *cpu, const struct insn *i)
{
    bool redirected = false;

    if (has_vme(cpu) && !is_redirected(cpu, (u8)i->imm, &redirected))
        return stop(cpu, i);
    if (redirected)
        return redirect(cpu, i, (u8)i->imm);
    if (is_vm86(cpu) && iopl(cpu) < 3)
        return fault_gp(cpu, i, 0);
    return soft_event(cpu, i, (u8)i->imm, CPU_EVENT_SOFT_INTR);
}

int x_int3(struct cpu *cpu, const struct insn *i)
{
    return soft_event(cpu, i, BP_VECTOR, CPU_EVENT_SOFT_EXC);
}

int x_into(struct cpu *cpu, const struct insn *i)
{
    if (get_of(cpu))
        return soft_event(cpu, i, OF_VECTOR, CPU_EVENT_SOFT_EXC);
    NEXT(cpu, i);
}

int x_int1(struct cpu *cpu, const struct insn *i)
{
    return soft_event(cpu, i, DB_VECTOR, CPU_EVENT_PRIV_SW_EXC);
}
