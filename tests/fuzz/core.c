/* SPDX-License-Identifier: MIT */
/* Executes the cases in the core, at CPL 3 of a mode that tests/fuzz/insns.py has set up. */
#include <string.h>

#include "pykvm/cpu.h"

#include "fuzz.h"

#define BP 3
#define OF 4
#define PF 14
#define STEPS 100000 /* iterations of a REP instruction */

/* The XSAVE image; what of it the guest state has in another form is left alone. */
static void set_vectors(struct cpu_fpu *f, const uint8_t *xsave)
{
    memcpy(&f->mxcsr, xsave + FUZZ_MXCSR, sizeof(f->mxcsr));
    for (unsigned n = 0; n < 16; n++) {
        memcpy(f->ymm[n], xsave + FUZZ_XMM + 16 * n, 16);
        memcpy(f->ymm[n] + 16, xsave + FUZZ_YMM + 16 * n, 16);
    }
}

static void get_vectors(const struct cpu_fpu *f, uint8_t *xsave)
{
    memcpy(xsave + FUZZ_MXCSR, &f->mxcsr, sizeof(f->mxcsr));
    for (unsigned n = 0; n < 16; n++) {
        memcpy(xsave + FUZZ_XMM + 16 * n, f->ymm[n], 16);
        memcpy(xsave + FUZZ_YMM + 16 * n, f->ymm[n] + 16, 16);
    }
}

static void set_fpu(struct cpu_fpu *f, const uint8_t *xsave)
{
    memcpy(&f->fcw, xsave, sizeof(f->fcw));
    memcpy(&f->fsw, xsave + 2, sizeof(f->fsw));
    f->ftw = xsave[4];
    memcpy(&f->fop, xsave + 6, sizeof(f->fop));
    memcpy(&f->fip, xsave + 8, sizeof(f->fip));
    memcpy(&f->fdp, xsave + 16, sizeof(f->fdp));
    memcpy(f->st, xsave + FUZZ_ST, sizeof(f->st));
}

static void get_fpu(const struct cpu_fpu *f, uint8_t *xsave)
{
    memcpy(xsave, &f->fcw, sizeof(f->fcw));
    memcpy(xsave + 2, &f->fsw, sizeof(f->fsw));
    xsave[4] = f->ftw;
    memcpy(xsave + FUZZ_ST, f->st, sizeof(f->st));
}

/* How it ended: what of enum cpu_exit_reason is not an end. */
static int enter(const struct fuzz_core *core, const struct fuzz_case *c)
{
    struct vmcs *v = core->vmcs;
    int reason = EXIT_NONE;

    for (unsigned n = 0; n < STEPS; n++) {
        reason = core->enter(core->cpu);
        if (reason == EXIT_MTF && (c->flags & FUZZ_REPEATED) && v->guest.rip == c->in.rip)
            continue;
        if (reason == EXIT_MTF && (c->flags & FUZZ_BRANCH)) { /* the fetch may fault */
            v->ctl.flags &= ~(uint32_t)CPU_SINGLE_STEP;
            continue;
        }
        if (reason != EXIT_PREEMPTED && reason != EXIT_KICK)
            break;
    }
    return reason;
}

static void run_case(const struct fuzz_core *core, const struct fuzz_case *c, struct fuzz_result *r)
{
    struct vmcs *v = core->vmcs;
    struct cpu_guest *g = &v->guest;
    uint8_t *at = core->code + c->in.rip - (c->flags & FUZZ_CODE16 ? 0 : FUZZ_CODE);
    int reason;

    fuzz_fill(core->data, c);
    memcpy(at, c->bytes, c->len);
    core->sync_code(core->cpu);
    memcpy(g->gpr, c->in.gpr, sizeof(c->in.gpr));
    g->rip = c->in.rip;
    g->rflags = c->in.rflags;
    if (c->flags & FUZZ_VECTOR)
        set_vectors(&g->fpu, c->in.xsave);
    if (c->flags & FUZZ_FPU)
        set_fpu(&g->fpu, c->in.xsave);
    g->interruptibility = g->pending_dbg = 0;
    v->ctl.flags =
        (v->ctl.flags & ~(uint32_t)CPU_SINGLE_STEP) | (c->flags & FUZZ_STEP ? CPU_SINGLE_STEP : 0);

    reason = enter(core, c);

    memset(r, 0, sizeof(*r));
    memcpy(r->out.gpr, g->gpr, sizeof(r->out.gpr));
    r->out.rip = g->rip;
    r->out.rflags = g->rflags;
    if (c->flags & FUZZ_VECTOR)
        get_vectors(&g->fpu, r->out.xsave);
    if (c->flags & FUZZ_FPU)
        get_fpu(&g->fpu, r->out.xsave);
    fuzz_forget(core->data, c);
    r->memory_hash = fuzz_hash(core->data);
    r->vector = reason == EXIT_MTF ? -1 : -2 - reason;
    if (reason == EXIT_EXCEPTION) {
        r->vector = (int32_t)(v->exit.intr_info & CPU_EVENT_VECTOR);
        r->error = v->exit.error_code;
        r->cr2 = r->vector == PF ? v->exit.qualification : 0;
        if ((r->vector == BP || r->vector == OF) && g->rip == c->in.rip)
            r->out.rip += c->len; /* the instruction itself: a trap for the program */
        else if (r->vector == BP)
            r->vector = -1;
    }
    memset(at, 0xcc, c->len);
}

void fuzz_core_run(const struct fuzz_core *core, const struct fuzz_case *cases,
                   struct fuzz_result *results, int n)
{
    for (int k = 0; k < n; k++)
        run_case(core, &cases[k], &results[k]);
}
