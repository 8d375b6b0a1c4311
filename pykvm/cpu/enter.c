/* SPDX-License-Identifier: MIT */
/*
 * VM entry, the main loop, VM exit.
 *
 * The loop runs blocks and looks around only when the instruction budget is used up, when
 * somebody requests something, or when a handler says LOOKUP and an instruction boundary
 * matters: shadows, traps, windows and breakpoints.  There instructions are executed one by one,
 * as blocks of one instruction decoded in MODE_STEP.
 */
#include "block.h"

#define SLICE 20000              /* instructions between two looks at the clock */
#define LOOKS 256                /* the same in looks around */
#define DEADLINE_TICKS 25000000  /* about 10 ms, when ctl.deadline is 0 */
#define SIGNAL_TICKS 600000      /* about 250 us */
#define COMPLETE_ITERATIONS 4096 /* of a REP instruction in cpu_complete() */
#define CHAIN_STACK (32u << 10)  /* bytes of stack that chained blocks may have */

#define SHADOWS (CPU_BLOCK_STI | CPU_BLOCK_MOVSS)
#define ATTENTION_BREAKPOINTS 1 /* in cpu.attention, next to the bits of ctl.flags */

/* What to do after a look at the instruction boundary. */
enum next { LEAVE, AGAIN, GO_ON };

/* ---- what follows from the guest state ---------------------------------------------------------- */

static bool is_flat(const struct cpu_seg *s, bool code)
{
    u32 type = CPU_AR_UNUSABLE | CPU_AR_P | CPU_AR_S | SEG_TYPE_CODE;
    u32 writable = SEG_TYPE_WRITABLE | SEG_TYPE_EXPAND_DOWN;

    if (s->base || s->limit != 0xffffffff)
        return false;
    if (code)
        return !(s->ar & CPU_AR_UNUSABLE);
    return (s->ar & (type | writable)) == (CPU_AR_P | CPU_AR_S | SEG_TYPE_WRITABLE);
}

static u32 code_mode(const struct cpu *cpu)
{
    u32 ar = SEG(cpu, CPU_SEG_CS).ar;

    if (is_lma(cpu) && (ar & CPU_AR_L))
        return MODE_CODE64;
    return ar & CPU_AR_DB ? MODE_CODE32 : MODE_CODE16;
}

static bool has_instruction_breakpoint(u64 dr7)
{
    for (unsigned n = 0; n < 4; n++)
        if ((dr7 >> n * 2 & 3) && (dr7 >> (DR7_RW_BIT + n * 4) & 3) == DR_RW_EXECUTE)
            return true;
    return false;
}

static void update_attention(struct cpu *cpu)
{
    cpu->attention = CTL(cpu).flags & (CPU_EXIT_IRQ_WINDOW | CPU_EXIT_NMI_WINDOW | CPU_SINGLE_STEP);
    if (unlikely(GUEST(cpu).dr7 & DR7_BP_EN_MASK))
        cpu->attention |= has_instruction_breakpoint(GUEST(cpu).dr7) ? ATTENTION_BREAKPOINTS : 0;
}

void update_mode(struct cpu *cpu)
{
    const struct cpu_seg *s = GUEST(cpu).seg;
    bool pe = is_pe(cpu), vm86 = pe && is_vm86(cpu);
    u32 mode = code_mode(cpu);
    bool code64 = mode == MODE_CODE64;

    cpu->cpl = !pe ? 0 : vm86 ? 3 : (s[CPU_SEG_SS].ar & CPU_AR_DPL) >> CPU_AR_DPL_SHIFT;
    if (s[CPU_SEG_SS].ar & CPU_AR_DB)
        mode |= MODE_SS32;
    if (is_flat(&s[CPU_SEG_CS], true) && is_flat(&s[CPU_SEG_DS], false) &&
        is_flat(&s[CPU_SEG_ES], false) && is_flat(&s[CPU_SEG_SS], false))
        mode |= MODE_FLAT;
    if (code64) /* neither says anything there: no reason to decode twice */
        mode &= ~(u32)(MODE_SS32 | MODE_FLAT);
    if (pe && !vm86)
        mode |= MODE_PE;
    if (cpu->cpl)
        mode |= MODE_CPL3;
    if (is_lma(cpu))
        mode |= MODE_LMA;
    mode |= vector_mode(cpu);
    if (!(GUEST(cpu).cr0 & (X86_CR0_EM | X86_CR0_TS)))
        mode |= MODE_FPU;
    cpu->mode = mode;
    cpu->ip_mask = code64 ? ~0ull : 0xffffffff;
    cpu->sp_mask = code64 ? ~0ull : mode & MODE_SS32 ? 0xffffffff : 0xffff;
    for (unsigned n = CPU_SEG_ES; n <= CPU_SEG_GS; n++)
        cpu->seg_base[n] = code64 && n < CPU_SEG_FS ? 0 : s[n].base;
    cpu->seg_base[SEG_ZERO] = 0;
    cpu->tlb = &cpu->ctx[tlb_context(cpu, false)];
    update_attention(cpu);
}

void serialize(struct cpu *cpu)
{
    cpu->epoch++;
    update_mode(cpu);
}

/* ---- exits ----------------------------------------------------------------------------------------- */

bool raise_exit(struct cpu *cpu, u32 reason)
{
    EXIT(cpu).reason = reason;
    cpu->stop = STOP_EXIT;
    return false;
}

int vmexit(struct cpu *cpu, const struct insn *i, u32 reason)
{
    raise_exit(cpu, reason);
    return stop(cpu, i);
}

int vmexit_done(struct cpu *cpu, const struct insn *i, u32 reason)
{
    EXIT(cpu).reason = reason;
    cpu->stop = STOP_EXIT_DONE;
    cpu->insn = i;
    return STOP;
}

static void fill_insn(struct cpu *cpu)
{
    const struct insn *i = cpu->insn;

    if (!i || !cpu->block || i->len > sizeof(EXIT(cpu).insn))
        return;
    EXIT(cpu).insn_len = i->len;
    EXIT(cpu).insn_bytes = i->len;
    memcpy(EXIT(cpu).insn, cpu->block->bytes + i->off, i->len);
}

static bool leave(struct cpu *cpu, u32 reason)
{
    EXIT(cpu).reason = reason;
    return false;
}

/* ---- one instruction retired --------------------------------------------------------------------------- */

static void drop_answers(struct cpu *cpu)
{
    cpu->mmio_pos = 0;
    CTL(cpu).mmio_count = 0;
    CTL(cpu).emulate_count = 0;
}

/* Traps, shadows and answers, when instruction i (or an iteration of it) is done. */
static void retire(struct cpu *cpu, const struct insn *i, bool tf)
{
    struct cpu_guest *g = &GUEST(cpu);

    if (tf && (!(i->op && i->op->flags & O_TFLATE) || g->rflags & X86_EFLAGS_TF))
        g->pending_dbg |= DR6_BS;
    g->pending_dbg |= cpu->data_bp;
    cpu->data_bp = 0;
    cpu->shadow = 0;
    cpu->rf = 0;
    drop_answers(cpu);
    if (CTL(cpu).flags & CPU_SINGLE_STEP)
        cpu->mtf = true;
}

/* What the instruction would have ended, had it been executed. */
static void restore_shadows(struct cpu *cpu)
{
    GUEST(cpu).interruptibility |= cpu->shadow;
    GUEST(cpu).rflags |= cpu->rf;
    cpu->shadow = 0;
    cpu->rf = 0;
    cpu->data_bp = 0;
}

/* ---- stops ---------------------------------------------------------------------------------------------- */

/* A REP instruction that is not through yet comes back with rip at itself. */
static inline bool is_iteration(const struct cpu *cpu, const struct block *b)
{
    return unlikely(b->repeats) && GUEST(cpu).rip == insn_rip(cpu, &b->insn[b->n - 1]);
}

/* What comes between two iterations finds RF set: instruction breakpoints are met once, before the
 * first (SDM vol. 3 17.3.1.1). */
static inline bool end_iteration(struct cpu *cpu, const struct block *b)
{
    if (likely(!is_iteration(cpu, b)))
        return false;
    GUEST(cpu).rflags |= X86_EFLAGS_RF;
    return true;
}

static bool step_one(struct cpu *cpu);

static bool handle_exception(struct cpu *cpu)
{
    bool soft = cpu->exc.type != CPU_EVENT_HARD_EXC >> 8;

    /* What a port answered was for the instruction that has now failed. */
    CTL(cpu).pio_pos = CTL(cpu).pio_count = CTL(cpu).pio_out_done = 0;
    if (!deliver_exception(cpu)) {
        fill_insn(cpu);
        restore_shadows(cpu);
        return false;
    }
    cpu->block = NULL;
    cpu->budget -= soft;
    cpu->shadow = 0;
    cpu->rf = 0;
    cpu->data_bp = 0;
    drop_answers(cpu);
    if (CTL(cpu).flags & CPU_SINGLE_STEP)
        cpu->mtf = true;
    return true;
}

/* An instruction, or the fetch of one, has stopped; false: leave guest mode. */
static bool handle_stop(struct cpu *cpu)
{
    bool stepping = cpu->step;

    if (cpu->block && cpu->insn)
        cpu->budget -= cpu->insn - cpu->block->insn;
    cpu->step = false;
    switch (cpu->stop) {
    case STOP_EXCEPTION: return handle_exception(cpu);
    case STOP_EXIT_DONE:
        cpu->budget -= !end_iteration(cpu, cpu->block);
        fill_insn(cpu);
        if (!stepping) /* step_one() knows what TF was */
            retire(cpu, cpu->insn, false);
        return false;
    case STOP_STEP:
        cpu->block = NULL;
        if (!stepping)
            return step_one(cpu);
        return leave(cpu, EXIT_EMULATION);
    default:
        fill_insn(cpu);
        restore_shadows(cpu);
        return false;
    }
}

/* ---- one instruction at a time -------------------------------------------------------------------------- */

static bool post_writes(struct cpu *cpu)
{
    if (!cpu->posted)
        return true;
    EXIT(cpu).mmio_count = cpu->posted;
    cpu->posted = 0;
    fill_insn(cpu);
    return leave(cpu, EXIT_MMIO_WRITE);
}

/* Executes the instruction at rip by itself. false: leave guest mode. */
static bool step_one(struct cpu *cpu)
{
    struct cpu_guest *g = &GUEST(cpu);
    bool tf = g->rflags & X86_EFLAGS_TF;
    struct block *b;
    int status;

    cpu->mmio_pos = 0;
    cpu->posted = 0;
    cpu->data_bp = 0;
    cpu->repeating = false;
    b = block_find(cpu, true);
    if (!b)
        return handle_stop(cpu);
    cpu->shadow = g->interruptibility & SHADOWS;
    cpu->rf = g->rflags & X86_EFLAGS_RF;
    g->interruptibility &= ~cpu->shadow;
    g->rflags &= ~cpu->rf;

    cpu->block = b;
    g->gpr[GPR_RIP] = g->rip;
    cpu->step = true;
    status = b->insn->fn(cpu, b->insn);
    if (status == STOP) {
        if (cpu->stop == STOP_EXIT_DONE)
            retire(cpu, b->insn, tf);
        return handle_stop(cpu);
    }
    cpu->step = false;
    cpu->insn = b->insn;
    cpu->repeating = end_iteration(cpu, b);
    cpu->budget -= !cpu->repeating;
    retire(cpu, b->insn, tf);
    bool go_on = post_writes(cpu);
    cpu->block = NULL;
    return go_on;
}

/* ---- looking around -------------------------------------------------------------------------------------- */

/* Flushes other threads ask for, done before they are acknowledged; returns what else they want. */
static u32 do_flushes(struct cpu *cpu)
{
    u32 flushes = CPU_REQ_FLUSH_TLB | CPU_REQ_FLUSH_CODE;
    u32 request = atomic_load(&cpu->request);

    while (request & flushes) {
        u32 during = (request & ~flushes) | R_FLUSHING;
        if (!atomic_compare_exchange_weak(&cpu->request, &request, during))
            continue;
        if (request & CPU_REQ_FLUSH_TLB)
            tlb_flush(cpu);
        cpu->epoch++;
        atomic_fetch_and(&cpu->request, ~R_FLUSHING);
        request = atomic_load(&cpu->request);
    }
    return request;
}

static bool do_requests(struct cpu *cpu)
{
    return !(do_flushes(cpu) & CPU_REQ_KICK) || leave(cpu, EXIT_KICK);
}

static void begin_slice(struct cpu *cpu)
{
    u64 insns = cpu->vmcs.stats.insns, left = cpu->insn_end - insns;

    cpu->budget = left < SLICE ? (s64)left : SLICE;
    cpu->insns_at_entry = insns + (u64)cpu->budget;
}

static void end_slice(struct cpu *cpu)
{
    cpu->vmcs.stats.insns = cpu->insns_at_entry - (u64)cpu->budget;
}

static bool check_time(struct cpu *cpu)
{
    u64 now = host_tsc();

    end_slice(cpu);
    begin_slice(cpu);
    if (cpu->vmcs.stats.insns >= cpu->insn_end || now >= cpu->preempt_at)
        return leave(cpu, EXIT_PREEMPTED);
    if (now < cpu->check_at)
        return true;
    cpu->check_at = now + SIGNAL_TICKS;
    return !host_signal_pending(cpu) || leave(cpu, EXIT_KICK);
}

static u64 breakpoint_hits(const struct cpu *cpu)
{
    const struct cpu_guest *g = &GUEST(cpu);
    u64 la = code_linear(cpu, g->rip), hits = 0;

    for (unsigned n = 0; n < 4; n++)
        if ((g->dr7 >> n * 2 & 3) && (g->dr7 >> (DR7_RW_BIT + n * 4) & 3) == DR_RW_EXECUTE &&
            g->dr[n] == la)
            hits |= DR6_B0 << n;
    return hits;
}

/* #DB at an instruction boundary. */
static bool deliver_debug(struct cpu *cpu, u64 dr6)
{
    cpu->insn = NULL;
    raise_db(cpu, dr6);
    return handle_exception(cpu);
}

/* Does the boundary ask for the next instruction to be executed by itself? */
static bool wants_step(const struct cpu *cpu)
{
    return GUEST(cpu).rflags & X86_EFLAGS_TF || GUEST(cpu).interruptibility & SHADOWS ||
           cpu->attention & (CPU_SINGLE_STEP | ATTENTION_BREAKPOINTS);
}

/* Everything that can happen between two instructions, in the order of SDM vol. 3 table 6-2. */
static enum next boundary(struct cpu *cpu)
{
    struct cpu_guest *g = &GUEST(cpu);
    u32 flags = CTL(cpu).flags;
    u64 dr6 = g->pending_dbg;

    if (dr6 && !(g->interruptibility & CPU_BLOCK_MOVSS)) {
        g->pending_dbg = 0;
        return deliver_debug(cpu, dr6) ? AGAIN : LEAVE;
    }
    if (cpu->mtf) {
        cpu->mtf = false;
        leave(cpu, EXIT_MTF);
        return LEAVE;
    }
    if (flags & CPU_EXIT_NMI_WINDOW && !(g->interruptibility & (CPU_BLOCK_NMI | SHADOWS))) {
        leave(cpu, EXIT_NMI_WINDOW);
        return LEAVE;
    }
    if (flags & CPU_EXIT_IRQ_WINDOW && g->rflags & X86_EFLAGS_IF &&
        !(g->interruptibility & SHADOWS)) {
        leave(cpu, EXIT_IRQ_WINDOW);
        return LEAVE;
    }
    if (cpu->attention & ATTENTION_BREAKPOINTS && !(g->rflags & X86_EFLAGS_RF) &&
        !(g->interruptibility & CPU_BLOCK_MOVSS)) {
        dr6 = breakpoint_hits(cpu);
        if (dr6)
            return deliver_debug(cpu, dr6) ? AGAIN : LEAVE;
    }
    if (wants_step(cpu))
        return step_one(cpu) ? AGAIN : LEAVE;
    g->rflags &= ~X86_EFLAGS_RF; /* it would end with the next instruction */
    return GO_ON;
}

/* Is there anything for boundary() to do? */
static inline bool needs_attention(const struct cpu *cpu)
{
    const struct cpu_guest *g = &GUEST(cpu);

    return (g->rflags & (X86_EFLAGS_TF | X86_EFLAGS_RF)) | (g->interruptibility & SHADOWS) |
           g->pending_dbg | cpu->attention;
}

static inline bool must_look(struct cpu *cpu)
{
    return cpu->budget <= 0 || atomic_load_explicit(&cpu->request, memory_order_relaxed);
}

/* ---- the loop ---------------------------------------------------------------------------------------------- */

static inline struct block *find(struct cpu *cpu)
{
    struct block *b = block_peek(cpu);

    return likely(b != NULL) ? b : block_find(cpu, false);
}

/* The successor that b has no usable link to. */
static __attribute__((noinline)) struct block *follow(struct cpu *cpu, struct block *b, int way)
{
    u64 generation = cpu->bc->generation;
    struct block *next = find(cpu);

    if (next && generation == cpu->bc->generation && block_can_link(cpu, b, next))
        b->link[way] = next;
    return next;
}

/* Runs blocks until it is time to look around (true) or to leave guest mode (false). */
static bool run_blocks(struct cpu *cpu)
{
    struct block *b = find(cpu), *next;

    while (b) {
        cpu->block = b;
        GPR(cpu, GPR_RIP) = GUEST(cpu).rip;
        int status = b->insn->fn(cpu, b->insn);
        b = cpu->block; /* where block_leave() has come to */
        if (likely(status <= LINK1)) {
            next = b->link[status];
            cpu->budget -= b->n;
            if (unlikely(must_look(cpu)))
                return true;
            if (unlikely(next->epoch != cpu->epoch))
                next = follow(cpu, b, status);
            b = next;
        } else if (likely(status == LOOKUP)) {
            cpu->budget -= b->n - end_iteration(cpu, b);
            /* a repetition retires nothing until it ends, but leaves RF behind */
            if (unlikely(must_look(cpu) || needs_attention(cpu)))
                return true;
            b = find(cpu);
        } else {
            return handle_stop(cpu);
        }
    }
    return handle_stop(cpu);
}

static bool look_around(struct cpu *cpu)
{
    cpu->block = NULL;
    cpu->insn = NULL;
    /* now and then even without a used up budget: a guest may do nothing but fault */
    bool due = cpu->budget <= 0 || !(++cpu->looks % LOOKS);
    return do_requests(cpu) && (!due || check_time(cpu));
}

/* As with VMX the event is gone after the entry, delivered or not: exit.idt_vectoring has it then. */
static bool inject(struct cpu *cpu)
{
    struct cpu_event ev = CTL(cpu).entry_event;

    CTL(cpu).entry_event.info = 0;
    if (!(ev.info & CPU_EVENT_VALID))
        return true;
    cpu->vmcs.stats.injected[ev.info >> 8 & 7]++;
    if (!deliver_event(cpu, ev, (GUEST(cpu).rip + ev.insn_len) & cpu->ip_mask))
        return false;
    if (CTL(cpu).flags & CPU_SINGLE_STEP)
        cpu->mtf = true;
    return true;
}

static void run(struct cpu *cpu)
{
    bool go_on;

    do_flushes(cpu); /* nobody waited for those that were asked for while we were out */
    go_on = inject(cpu);

    if (go_on && (CTL(cpu).mmio_count || CTL(cpu).emulate_count))
        go_on = step_one(cpu);
    while (go_on && look_around(cpu)) {
        enum next next = needs_attention(cpu) ? boundary(cpu) : GO_ON;
        go_on = next == AGAIN || (next == GO_ON && run_blocks(cpu));
    }
}

/* cpu_complete(): one instruction, all iterations of it. */
static void run_one(struct cpu *cpu)
{
    u64 rip = GUEST(cpu).rip;

    for (unsigned k = 0; k < COMPLETE_ITERATIONS; k++)
        if (!step_one(cpu) || GUEST(cpu).rip != rip || !cpu->repeating || GUEST(cpu).pending_dbg)
            return;
}

/* ---- entry --------------------------------------------------------------------------------------------------- */

/* exit.qualification of EXIT_INVALID_STATE */
enum invalid_state {
    VALID_STATE,
    INVALID_CR0 = 1,
    INVALID_EFER,
    INVALID_RFLAGS,
    INVALID_CS,
    INVALID_VM86_SEGMENT,
    INVALID_RIP,
};

static bool is_vm86_segment(const struct cpu_seg *s)
{
    return s->base == (u64)s->selector << 4 && s->limit == 0xffff &&
           (s->ar & 0xff) == (CPU_AR_P | CPU_AR_DPL | CPU_AR_S | 3);
}

/* Of the checks of SDM vol. 3 26.3.1 those without which the rest of the processor makes no sense. */
static enum invalid_state check_state(const struct cpu *cpu)
{
    const struct cpu_guest *g = &GUEST(cpu);
    bool pg = g->cr0 & X86_CR0_PG, lma = g->efer & EFER_LMA;
    bool code64 = lma && g->seg[CPU_SEG_CS].ar & CPU_AR_L;

    if (pg && !(g->cr0 & X86_CR0_PE))
        return INVALID_CR0;
    if (lma != (pg && g->efer & EFER_LME) || (lma && !(g->cr4 & X86_CR4_PAE)))
        return INVALID_EFER;
    if (!(g->rflags & X86_EFLAGS_FIXED) || g->rflags & ~0x3f7fd7ull ||
        (g->rflags & X86_EFLAGS_VM && (lma || !(g->cr0 & X86_CR0_PE))))
        return INVALID_RFLAGS;
    if (code64 && g->seg[CPU_SEG_CS].ar & CPU_AR_DB)
        return INVALID_CS;
    if (g->rflags & X86_EFLAGS_VM)
        for (unsigned n = CPU_SEG_ES; n <= CPU_SEG_GS; n++)
            if (!is_vm86_segment(&g->seg[n]))
                return INVALID_VM86_SEGMENT;
    /* AMD's: a fetch from there is #GP (APM vol. 2 15.5.1 has no such check) */
    if (code64 ? !is_amd(cpu) && !is_canonical(cpu, g->rip) : g->rip >> 32)
        return INVALID_RIP;
    return VALID_STATE;
}

static void reset_exit(struct cpu *cpu)
{
    struct cpu_exit *e = &EXIT(cpu);

    e->reason = EXIT_NONE;
    e->insn_len = 0;
    e->insn_bytes = 0;
    e->qualification = 0;
    e->intr_info = 0;
    e->error_code = 0;
    e->idt_vectoring.info = 0;
    e->mmio_count = 0;
}

static void begin(struct cpu *cpu)
{
    u64 now = host_tsc();

    if (now >= cpu->guard_at) { /* asking the kernel costs as much as a short entry */
        cpu->guard_at = now + SIGNAL_TICKS;
        host_guard_install();
    }
    reset_exit(cpu);
    atomic_store(&cpu->in_guest, 1);
    set_status(cpu, GUEST(cpu).rflags);
    cpu->stop = STOP_NONE;
    cpu->step = false;
    cpu->delivering = false;
    cpu->block = NULL;
    cpu->insn = NULL;
    cpu->shadow = 0;
    cpu->rf = 0;
    cpu->mtf = cpu->mtf && CTL(cpu).flags & CPU_SINGLE_STEP;
    cpu->stack_limit = (uintptr_t)__builtin_frame_address(0) - CHAIN_STACK;
    cpu->preempt_at = CTL(cpu).deadline ? CTL(cpu).deadline : now + DEADLINE_TICKS;
    /* check_at stays: a guest that does nothing but exit must notice signals, too */
    cpu->insn_end = CTL(cpu).insn_budget ? cpu->vmcs.stats.insns + CTL(cpu).insn_budget : ~0ull;
    begin_slice(cpu);
    tlb_check(cpu);
    serialize(cpu);
    mxcsr_enter(cpu);
    fpu_enter(cpu);
}

static int finish(struct cpu *cpu)
{
    bus_unlock(cpu);
    mxcsr_leave(cpu);
    fpu_leave(cpu);
    GUEST(cpu).fpu.xinuse = fpu_components(cpu);
    end_slice(cpu);
    GUEST(cpu).rflags = get_rflags(cpu);
    cpu->block = NULL;
    cpu->step = false;
    atomic_store(&cpu->in_guest, 0);
    return (int)EXIT(cpu).reason;
}

/* Guest memory is gone: what host.c found out is finished as any other exit. */
static void host_fault(struct cpu *cpu)
{
    mxcsr_recover(cpu);
    host_guard_fault(cpu);
    handle_stop(cpu);
}

int cpu_enter(struct cpu *cpu)
{
    enum invalid_state invalid;

    begin(cpu);
    invalid = check_state(cpu);
    if (invalid) {
        leave(cpu, EXIT_INVALID_STATE);
        EXIT(cpu).qualification = invalid;
        return finish(cpu);
    }
    if (host_guard_enter(cpu))
        host_fault(cpu);
    else
        run(cpu);
    host_guard_leave(cpu);
    cpu->vmcs.stats.exits[EXIT(cpu).reason]++;
    return finish(cpu);
}

int cpu_complete(struct cpu *cpu)
{
    begin(cpu);
    cpu->vmcs.stats.completed++;
    do_flushes(cpu); /* memory may have gone since the exit; a kick can wait for one instruction */
    if (host_guard_enter(cpu))
        host_fault(cpu);
    else
        run_one(cpu);
    host_guard_leave(cpu);
    return finish(cpu);
}
