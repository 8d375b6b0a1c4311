/* SPDX-License-Identifier: MIT */
/*
 * What the kernel module calls besides entering the guest: life, reset, requests from other
 * threads, and notice of what it changed.
 */
#include "core.h"

#include <sched.h>
#include <stdlib.h>
#include <time.h>

/* ---- life --------------------------------------------------------------------------------------- */

static void init_controls(struct cpu_ctl *ctl)
{
    ctl->flags = CPU_TDP;
    ctl->ept_level = 4;
    ctl->maxphyaddr = 36; /* as without CPUID leaf 0x80000008 */
    ctl->xcr0_valid = XFEATURE_MASK_FP;
}

struct cpu *cpu_create(void)
{
    struct cpu *cpu = aligned_alloc(64, (sizeof(*cpu) + 63) & ~63ul);

    if (!cpu)
        return NULL;
    memset(cpu, 0, sizeof(*cpu));
    if (!host_guard_install() || !tlb_init(cpu) || !block_cache_init(cpu)) {
        tlb_free(cpu);
        free(cpu);
        return NULL;
    }
    init_controls(&CTL(cpu));
    cpu_reset(cpu, 0);
    return cpu;
}

void cpu_destroy(struct cpu *cpu)
{
    if (!cpu)
        return;
    block_cache_free(cpu);
    tlb_free(cpu);
    free(cpu);
}

struct vmcs *cpu_vmcs(struct cpu *cpu) { return &cpu->vmcs; }

/* ---- reset ----------------------------------------------------------------------------------------- */

static void reset_segments(struct cpu_guest *g)
{
    for (int n = 0; n < 8; n++)
        g->seg[n] = (struct cpu_seg){.limit = 0xffff, .ar = 0x93};
    g->seg[CPU_SEG_CS] =
        (struct cpu_seg){.base = 0xffff0000, .limit = 0xffff, .ar = 0x9b, .selector = 0xf000};
    g->seg[CPU_SEG_LDTR].ar = CPU_AR_P | DESC_LDT;
    g->seg[CPU_SEG_TR].ar = CPU_AR_P | DESC_TSS_BUSY;
    g->gdtr = g->idtr = (struct cpu_table){.limit = 0xffff};
}

static void reset_fpu(struct cpu_fpu *fpu)
{
    memset(fpu, 0, sizeof(*fpu));
    fpu->fcw = FCW_INIT;
    fpu->mxcsr = MXCSR_INIT;
    fpu->mxcsr_mask = MXCSR_MASK;
}

/* What INIT leaves alone and RESET does not; SDM vol. 3 table 9-1. */
static void power_up(struct cpu_guest *g)
{
    memset(g, 0, sizeof(*g));
    g->cr0 = X86_CR0_NW | X86_CR0_CD;
    g->xcr0 = XFEATURE_MASK_FP;
    reset_fpu(&g->fpu);
}

void cpu_reset(struct cpu *cpu, int init)
{
    struct cpu_guest *g = &GUEST(cpu);

    if (!init)
        power_up(g);
    memset(g->gpr, 0, sizeof(g->gpr));
    g->gpr[RDX] = 0x600; /* the module knows family, model and stepping, if any are set */
    g->rip = 0xfff0;
    set_rflags(cpu, X86_EFLAGS_FIXED);
    reset_segments(g);
    g->cr0 = X86_CR0_ET | (g->cr0 & (X86_CR0_NW | X86_CR0_CD));
    g->cr2 = g->cr3 = g->cr4 = g->cr8 = g->efer = 0;
    memset(g->pdptr, 0, sizeof(g->pdptr));
    memset(g->dr, 0, sizeof(g->dr));
    g->dr6 = DR6_INIT;
    g->dr7 = DR7_FIXED_1;
    g->interruptibility = g->pending_dbg = 0;
    g->activity = CPU_ACTIVE;
    CTL(cpu).entry_event.info = 0;
    CTL(cpu).mmio_count = CTL(cpu).pio_count = CTL(cpu).pio_pos = CTL(cpu).pio_out_done = 0;
    cpu_state_changed(cpu);
}

/* ---- between exit and entry -------------------------------------------------------------------- */

void cpu_skip(struct cpu *cpu)
{
    struct cpu_guest *g = &GUEST(cpu);

    update_mode(cpu); /* the module may have changed CS since */
    g->rip = (g->rip + EXIT(cpu).insn_len) & cpu->ip_mask;
    g->interruptibility &= ~(u32)(CPU_BLOCK_STI | CPU_BLOCK_MOVSS);
    g->rflags &= ~X86_EFLAGS_RF;
    if (g->rflags & X86_EFLAGS_TF)
        g->pending_dbg |= DR6_BS;
    cpu->mtf = CTL(cpu).flags & CPU_SINGLE_STEP;
}

void cpu_flush_tlb(struct cpu *cpu) { tlb_flush(cpu); }

void cpu_sync_code(struct cpu *cpu) { serialize(cpu); }

void cpu_state_changed(struct cpu *cpu)
{
    if (memcmp(cpu->cpuid, CTL(cpu).cpuid, sizeof(cpu->cpuid))) {
        memcpy(cpu->cpuid, CTL(cpu).cpuid, sizeof(cpu->cpuid));
        block_flush(cpu); /* decoding asks for features */
    }
    tlb_check(cpu);
    update_mode(cpu);
}

int cpu_load_pdptrs(struct cpu *cpu)
{
    u32 stop = cpu->stop;
    int result = load_pdptrs(cpu, GUEST(cpu).cr3, GUEST(cpu).pdptr);

    cpu->stop = stop;
    if (!result)
        tlb_flush_guest(cpu);
    return result;
}

/* ---- requests ----------------------------------------------------------------------------------------
 *
 * Everything here is sequentially consistent: the processor sets in_guest before it looks at
 * `request`, a requester sets its bits before it looks at in_guest.  One of them sees the other.
 */

#define FLUSH_REQUESTS (CPU_REQ_FLUSH_TLB | CPU_REQ_FLUSH_CODE | R_FLUSHING)

void cpu_request(struct cpu *cpu, uint32_t bits) { atomic_fetch_or(&cpu->request, bits); }

void cpu_clear_kick(struct cpu *cpu) { atomic_fetch_and(&cpu->request, ~(u32)CPU_REQ_KICK); }

int cpu_in_guest(struct cpu *cpu) { return atomic_load(&cpu->in_guest) != 0; }

void cpu_sync(struct cpu *cpu)
{
    /* A running guest looks every few microseconds; one that faults on the host may take long. */
    for (unsigned n = 0; atomic_load(&cpu->in_guest) && atomic_load(&cpu->request) & FLUSH_REQUESTS;
         n++) {
        if (n < 100)
            __builtin_ia32_pause();
        else if (n < 1000)
            sched_yield();
        else
            nanosleep(&(struct timespec){.tv_nsec = 100000}, NULL);
    }
}
