/* SPDX-License-Identifier: MIT */
/*
 * What vector instructions have in common: whether they may be executed at all, memory operands
 * that are not simple, MXCSR and its exceptions, and what the host can do.
 */
#include "vector.h"

#include <cpuid.h>
#include <pthread.h>
#include <signal.h>
#include <ucontext.h>

/* ---- memory operands ------------------------------------------------------------------------- */

static bool v_linear(struct cpu *cpu, const struct insn *i, unsigned size, unsigned align,
                     unsigned access, u64 *la)
{
    /* Before what the segment says, as Zen 5 does: of an operand behind SS it is #GP, not #SS. */
    if ((ea_offset(cpu, i) + cpu->seg_base[i->seg]) & (align - 1))
        return raise_gp(cpu, 0);
    return ea_linear(cpu, i, size, access, la);
}

bool v_read(struct cpu *cpu, const struct insn *i, void *p, unsigned size, unsigned align)
{
    u64 la;
    return v_linear(cpu, i, size, align, ACC_READ, &la) && mem_read(cpu, la, p, size, ea_access(i));
}

bool v_write(struct cpu *cpu, const struct insn *i, const void *p, unsigned size, unsigned align)
{
    u64 la;
    return v_linear(cpu, i, size, align, ACC_WRITE, &la) &&
           mem_write(cpu, la, p, size, ea_access(i));
}

int v_end(struct cpu *cpu, const struct insn *i)
{
    (void)cpu;
    (void)i;
    return LINK0;
}

int v_load_slow(struct cpu *cpu, const struct insn *i, insn_fn fn, unsigned size, unsigned align)
{
    struct insn alone[2] = {*i, {.fn = v_end}};

    if (!v_read(cpu, i, cpu->vscratch, size, align))
        return stop(cpu, i);
    alone->vb = V_SCRATCH;
    fn(cpu, alone); /* without memory operand: nothing can stop it */
    NEXT(cpu, i);
}

int v_store_slow(struct cpu *cpu, const struct insn *i, const void *p, unsigned size,
                 unsigned align)
{
    if (!v_write(cpu, i, p, size, align))
        return stop(cpu, i);
    NEXT(cpu, i);
}

/* ---- MXCSR ----------------------------------------------------------------------------------- */

/* The host never traps.  FTZ does nothing while underflow is unmasked (SDM vol. 1 10.2.3.3). */
static u32 mxcsr_for_host(u32 guest)
{
    bool ftz = guest & MXCSR_FTZ && guest & MXCSR_UE << MXCSR_MASKS_SHIFT;
    return (guest & ~MXCSR_FTZ) | MXCSR_MASKS | (ftz ? MXCSR_FTZ : 0);
}

void mxcsr_enter(struct cpu *cpu)
{
    cpu->host_mxcsr = __builtin_ia32_stmxcsr();
    GUEST(cpu).fpu.mxcsr &= MXCSR_MASK; /* the host would fault */
    __builtin_ia32_ldmxcsr(mxcsr_for_host(GUEST(cpu).fpu.mxcsr));
}

void mxcsr_leave(struct cpu *cpu)
{
    mxcsr_sync(cpu);
    __builtin_ia32_ldmxcsr(cpu->host_mxcsr);
}

void mxcsr_sync(struct cpu *cpu) { GUEST(cpu).fpu.mxcsr |= __builtin_ia32_stmxcsr() & MXCSR_FLAGS; }

bool mxcsr_load(struct cpu *cpu)
{
    u32 mode = (cpu->mode & ~(MODE_SSE | MODE_AVX | MODE_XM)) | vector_mode(cpu);
    bool changed = mode != cpu->mode;

    __builtin_ia32_ldmxcsr(mxcsr_for_host(GUEST(cpu).fpu.mxcsr));
    cpu->mode = mode;
    return changed;
}

/* ---- unmasked exceptions ------------------------------------------------------------------------
 *
 * In MODE_XM every instruction that looks at MXCSR comes here.  It is executed with all exceptions
 * masked, and that was it when no unmasked flag came up.  Otherwise the host does it once more
 * with the guest's MXCSR: which flags are set when an exception is not masked is no function of
 * those set when it is (SDM vol. 1 4.9.1.5, 11.5.2), and unmasked underflow does not need an
 * inexact result.  The trap arrives as SIGFPE.
 */
#define THREAD static _Thread_local __attribute__((tls_model("initial-exec")))
THREAD sigjmp_buf trap;
THREAD volatile sig_atomic_t trap_armed;
THREAD u32 trap_mxcsr;
static struct sigaction previous_sigfpe;
static pthread_mutex_t sigfpe_lock = PTHREAD_MUTEX_INITIALIZER;

static void on_sigfpe(int sig, siginfo_t *info, void *context)
{
    const struct sigaction *old = &previous_sigfpe;

    if (trap_armed) {
        trap_mxcsr = ((ucontext_t *)context)->uc_mcontext.fpregs->mxcsr;
        siglongjmp(trap, 1);
    }
    if (old->sa_flags & SA_SIGINFO)
        old->sa_sigaction(sig, info, context);
    else if (old->sa_handler == SIG_DFL || old->sa_handler == SIG_IGN)
        sigaction(sig, old, NULL); /* executed again, without us */
    else
        old->sa_handler(sig);
}

/* Somebody else may have taken the signal since the last time. */
static void take_sigfpe(sigset_t *blocked)
{
    struct sigaction ours = {.sa_sigaction = on_sigfpe,
                             .sa_flags = SA_SIGINFO | SA_ONSTACK | SA_NODEFER},
                     now;
    sigset_t fpe;

    pthread_mutex_lock(&sigfpe_lock);
    sigaction(SIGFPE, NULL, &now);
    if (!(now.sa_flags & SA_SIGINFO) || now.sa_sigaction != on_sigfpe) {
        previous_sigfpe = now;
        sigaction(SIGFPE, &ours, NULL);
    }
    pthread_mutex_unlock(&sigfpe_lock);
    sigemptyset(&fpe);
    sigaddset(&fpe, SIGFPE);
    pthread_sigmask(SIG_UNBLOCK, &fpe, blocked);
}

/* false: it trapped. In a function of its own: sigsetjmp() is hard on local variables. */
static __attribute__((noinline)) bool execute_trapping(struct cpu *cpu, insn_fn fn,
                                                       const struct insn *alone)
{
    if (sigsetjmp(trap, 0))
        return false;
    trap_armed = 1;
    __builtin_ia32_ldmxcsr(GUEST(cpu).fpu.mxcsr);
    fn(cpu, alone);
    trap_mxcsr = __builtin_ia32_stmxcsr();
    return true;
}

/* Executes *alone with the guest's very MXCSR, and gives its flags to it. false: #XM. */
static bool execute_unmasked(struct cpu *cpu, insn_fn fn, const struct insn *alone)
{
    u32 *mxcsr = &GUEST(cpu).fpu.mxcsr;
    sigset_t blocked;
    bool completed;

    fpu_leave(cpu); /* a signal handler that is not returned from would leave it reset */
    take_sigfpe(&blocked);
    completed = execute_trapping(cpu, fn, alone);
    __builtin_ia32_ldmxcsr(mxcsr_for_host(*mxcsr));
    trap_armed = 0;
    pthread_sigmask(SIG_SETMASK, &blocked, NULL);
    *mxcsr |= trap_mxcsr & MXCSR_FLAGS;
    __builtin_ia32_ldmxcsr(mxcsr_for_host(*mxcsr));
    return completed;
}

void mxcsr_recover(struct cpu *cpu)
{
    trap_armed = 0;
    __builtin_ia32_ldmxcsr(cpu->fault_mxcsr | MXCSR_MASKS);
}

/* What an instruction with floating point may change, besides memory. */
struct before {
    struct vec v;
    u64 gpr, res, aux;
    u32 mmio_pos;
};

static struct before save_before(struct cpu *cpu, const struct insn *i)
{
    return (struct before){VEC(VREG(cpu, i->vd)), REG64(cpu, i->src), cpu->cc_res, cpu->cc_aux,
                           cpu->mmio_pos};
}

static void restore_before(struct cpu *cpu, const struct insn *i, const struct before *b)
{
    VEC(VREG(cpu, i->vd)) = b->v;
    REG64(cpu, i->src) = b->gpr;
    cpu->cc_res = b->res;
    cpu->cc_aux = b->aux;
    cpu->mmio_pos = b->mmio_pos;
}

static insn_fn handler_of(const struct insn *i, unsigned kind)
{
    unsigned enc = i->flags & I_VEXL ? ENC_VEX256 : i->flags & I_VEX ? ENC_VEX128 : ENC_LEGACY;
    return i->op->body->fn[kind][enc];
}

static int raise_xm(struct cpu *cpu, const struct insn *i)
{
    unsigned vector = GUEST(cpu).cr4 & X86_CR4_OSXMMEXCPT ? XM_VECTOR : UD_VECTOR;
    raise_exception(cpu, vector, false, 0);
    return stop(cpu, i);
}

static int x_vector_checked(struct cpu *cpu, const struct insn *i)
{
    struct insn alone[2] = {*i, {.fn = v_end}};
    bool store = i->op->form == F_W_V_I8 && i->flags & I_MEM; /* VCVTPS2PH: to scratch first */
    insn_fn fn = handler_of(i, i->flags & I_MEM && !store ? K_RM : K_RR);
    struct cpu_fpu *fpu = &GUEST(cpu).fpu;
    u32 flags, unmasked;
    u64 la;

    if (store) {
        unsigned size = i->flags & I_VEXL ? 16 : 8;
        if (!v_linear(cpu, i, size, 1, ACC_WRITE, &la) ||
            !mem_probe_write(cpu, la, size, ea_access(i)))
            return stop(cpu, i); /* before #XM */
        alone->vd = V_SCRATCH;
    }
    mxcsr_sync(cpu);
    unmasked = ~fpu->mxcsr >> MXCSR_MASKS_SHIFT & MXCSR_FLAGS;
    struct before before = save_before(cpu, alone);
    __builtin_ia32_ldmxcsr(mxcsr_for_host(fpu->mxcsr) & ~MXCSR_FLAGS);
    if (fn(cpu, alone) == STOP) {
        __builtin_ia32_ldmxcsr(mxcsr_for_host(fpu->mxcsr));
        return stop(cpu, i);
    }
    flags = __builtin_ia32_stmxcsr() & MXCSR_FLAGS;
    __builtin_ia32_ldmxcsr(mxcsr_for_host(fpu->mxcsr) | flags);
    if (unmasked & (flags | MXCSR_UE)) {
        restore_before(cpu, alone, &before);
        if (!execute_unmasked(cpu, fn, alone)) {
            restore_before(cpu, alone, &before);
            return raise_xm(cpu, i);
        }
    }
    if (store)
        return handler_of(i, K_MR)(cpu, i);
    NEXT(cpu, i);
}

/* ---- the choice of a handler ----------------------------------------------------------------- */

/* CR0, CR4 or XCR0 is against it; SDM vol. 2 2.4 and 2.6. */
static int x_vector_unusable(struct cpu *cpu, const struct insn *i)
{
    const struct cpu_guest *g = &GUEST(cpu);
    bool ud = i->flags & I_VEX
                  ? !(g->cr4 & X86_CR4_OSXSAVE) || (g->xcr0 & XFEATURES_AVX) != XFEATURES_AVX
                  : (g->cr0 & X86_CR0_EM) || !(g->cr4 & X86_CR4_OSFXSR);
    return ud ? fault_ud(cpu, i) : fault_nm(cpu, i);
}

static bool is_offered(const struct cpu *cpu, u16 feature)
{
    unsigned word = feature >> 5 & 0x1f, bit = feature & 0x1f;

    return !feature || !cpu ||
           (has_feature(cpu, word, bit) && cpu_host_features((int)word) >> bit & 1);
}

/* What 256 bits need besides AVX. */
static u16 wide_feature(const struct op *op, u32 flags)
{
    if (flags & O_AVX2)
        return FEAT(CPU_CPUID_7_EBX, CPUID_7_EBX_AVX2);
    switch (op->feature) {
    case FEAT(CPU_CPUID_1_ECX, CPUID_1_ECX_AES): return FEAT(CPU_CPUID_7_ECX, CPUID_7_ECX_VAES);
    case FEAT(CPU_CPUID_1_ECX, CPUID_1_ECX_PCLMULQDQ):
        return FEAT(CPU_CPUID_7_ECX, CPUID_7_ECX_VPCLMULQDQ);
    default: return 0;
    }
}

insn_fn vector_handler(const struct cpu *cpu, const struct op *op, const struct insn *i, u32 flags,
                       unsigned kind, u32 mode)
{
    unsigned enc = i->flags & I_VEXL ? ENC_VEX256 : i->flags & I_VEX ? ENC_VEX128 : ENC_LEGACY;
    insn_fn fn = op->body ? op->body->fn[kind][enc] : NULL;

    if (!fn || !is_offered(cpu, op->feature))
        return NULL;
    if (enc != ENC_LEGACY && !is_offered(cpu, FEAT(CPU_CPUID_1_ECX, CPUID_1_ECX_AVX)))
        return NULL;
    if (enc == ENC_VEX256 && !is_offered(cpu, wide_feature(op, flags)))
        return NULL;
    if (!(mode & (enc == ENC_LEGACY ? MODE_SSE : MODE_AVX)))
        return x_vector_unusable;
    return flags & O_FLOAT && mode & MODE_XM ? x_vector_checked : fn;
}

/* ---- the host -------------------------------------------------------------------------------- */

#define BIT(n) (1u << (n))
#define AVX_1_ECX (BIT(CPUID_1_ECX_FMA) | BIT(CPUID_1_ECX_AVX) | BIT(CPUID_1_ECX_F16C))
#define SSE_1_ECX                                                                                  \
    (BIT(CPUID_1_ECX_SSE3) | BIT(CPUID_1_ECX_PCLMULQDQ) | BIT(CPUID_1_ECX_SSSE3) |                 \
     BIT(CPUID_1_ECX_SSE4_1) | BIT(CPUID_1_ECX_SSE4_2) | BIT(CPUID_1_ECX_AES))
#define AVX_7_EBX BIT(CPUID_7_EBX_AVX2)
#define SSE_7_EBX BIT(CPUID_7_EBX_SHA_NI)
#define AVX_7_ECX (BIT(CPUID_7_ECX_VAES) | BIT(CPUID_7_ECX_VPCLMULQDQ))
#define SSE_7_ECX BIT(CPUID_7_ECX_GFNI)

static bool host_has_ymm(u32 ecx1)
{
    u32 eax, edx;

    if (!(ecx1 & BIT(CPUID_1_ECX_OSXSAVE)))
        return false;
    __asm__ volatile("xgetbv" : "=a"(eax), "=d"(edx) : "c"(0));
    return (eax & XFEATURES_AVX) == XFEATURES_AVX;
}

/* QEMU takes the layout of the XSAVE area from the host's CPUID (kvm_cpu_xsave_init): PKRU elsewhere
 * than where we store it, or at 0 because the host has none, is a guest's memory overwritten. */
static bool host_has_pkru_where_we_do(void)
{
    u32 eax, ebx, ecx, edx;

    return __get_cpuid_count(0xd, 9, &eax, &ebx, &ecx, &edx) && eax == 8 &&
           ebx == XSAVE_PKRU_OFFSET;
}

/* Bits of what we execute by the host's instruction are the host's, all others but PKU are set. */
static u32 host_word(int word)
{
    u32 eax, ebx, ecx, edx, ecx1;
    bool ymm;

    __cpuid(1, eax, ebx, ecx1, edx);
    ymm = host_has_ymm(ecx1);
    if (word == CPU_CPUID_1_ECX)
        return (ymm ? ecx1 : ecx1 & ~AVX_1_ECX) | ~(AVX_1_ECX | SSE_1_ECX);
    if (!__get_cpuid_count(7, 0, &eax, &ebx, &ecx, &edx))
        ebx = ecx = 0;
    if (word == CPU_CPUID_7_EBX)
        return (ymm ? ebx : ebx & ~AVX_7_EBX) | ~(AVX_7_EBX | SSE_7_EBX);
    if (word == CPU_CPUID_7_ECX)
        return ((ymm ? ecx : ecx & ~AVX_7_ECX) | ~(AVX_7_ECX | SSE_7_ECX)) &
               ~(host_has_pkru_where_we_do() ? 0 : BIT(CPUID_7_ECX_PKU));
    return ~0u;
}

uint32_t cpu_host_features(int word)
{
    static u32 words[CPU_NR_CPUID]; /* 0: not asked yet; the answer is never 0 */
    u32 v;

    if (word < 0 || word >= CPU_NR_CPUID)
        return ~0u;
    v = __atomic_load_n(&words[word], __ATOMIC_RELAXED);
    if (!v) {
        v = host_word(word);
        __atomic_store_n(&words[word], v, __ATOMIC_RELAXED);
    }
    return v;
}
