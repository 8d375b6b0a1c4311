/* SPDX-License-Identifier: MIT */
/*
 * What the processor needs of the host: guest memory that may vanish under it, signals, the
 * memory of second-level tables, the time stamp counter.
 */
#define _GNU_SOURCE
#include "core.h"

#include <dlfcn.h>
#include <errno.h>
#include <pthread.h>
#include <signal.h>
#include <stdio.h>
#include <stdlib.h>
#include <sys/mman.h>
#include <sys/syscall.h>
#include <ucontext.h>
#include <unistd.h>

#ifndef __x86_64__
#error "guest memory is used in place: the host must have the guest's byte and memory order"
#endif

/* ---- accesses that may fault --------------------------------------------------------------
 *
 * Each instruction that touches guest memory has an entry in the section host_ex: where it
 * is and where to go on after a fault, with `failed` still 1 from before.
 */
struct host_ex {
    s32 at, fixup; /* relative to themselves */
};
extern const struct host_ex __start_host_ex[] __attribute__((visibility("hidden")));
extern const struct host_ex __stop_host_ex[] __attribute__((visibility("hidden")));

#define MAY_FAULT(insn)                                                                            \
    "movl $1, %k[failed]\n"                                                                        \
    "1: " insn "\n"                                                                                \
    "movl $0, %k[failed]\n"                                                                        \
    "2:\n"                                                                                         \
    ".pushsection host_ex, \"a\"\n"                                                                \
    ".balign 4\n"                                                                                  \
    ".long 1b - ., 2b - .\n"                                                                       \
    ".popsection"

/* Initial-exec: the signal handler must not allocate the variable. */
#define THREAD static _Thread_local __attribute__((tls_model("initial-exec")))
THREAD struct cpu *guarded; /* in guest mode on this thread */
THREAD uintptr_t fault_hva;

static bool host_fault(struct cpu *cpu)
{
    raise_exit(cpu, EXIT_HOST_FAULT);
    EXIT(cpu).hva = fault_hva;
    return false;
}

#define DEFINE_ACCESS(bits, suffix, constraint)                                                    \
    static inline bool try_load##bits(void *dst, uintptr_t hva)                                    \
    {                                                                                              \
        u##bits v;                                                                                 \
        u32 failed;                                                                                \
        __asm__ volatile(MAY_FAULT("mov" suffix " (%[hva]), %[v]")                                 \
                         : [v] "=&" constraint(v), [failed] "=&r"(failed)                          \
                         : [hva] "r"(hva)                                                          \
                         : "memory");                                                              \
        memcpy(dst, &v, sizeof(v));                                                                \
        return !failed;                                                                            \
    }                                                                                              \
    static inline bool try_store##bits(uintptr_t hva, const void *src)                             \
    {                                                                                              \
        u##bits v;                                                                                 \
        u32 failed;                                                                                \
        memcpy(&v, src, sizeof(v));                                                                \
        __asm__ volatile(MAY_FAULT("mov" suffix " %[v], (%[hva])")                                 \
                         : [failed] "=&r"(failed)                                                  \
                         : [v] constraint(v), [hva] "r"(hva)                                       \
                         : "memory");                                                              \
        return !failed;                                                                            \
    }
DEFINE_ACCESS(8, "b", "q")
DEFINE_ACCESS(16, "w", "r")
DEFINE_ACCESS(32, "l", "r")
DEFINE_ACCESS(64, "q", "r")

static bool try_copy(void *dst, const void *src, size_t n)
{
    u32 failed;
    __asm__ volatile(MAY_FAULT("rep movsb")
                     : [failed] "=&r"(failed), "+D"(dst), "+S"(src), "+c"(n)
                     :
                     : "memory");
    return !failed;
}

bool host_load(struct cpu *cpu, void *dst, uintptr_t hva, unsigned size)
{
    bool ok;
    switch (size) {
    case 1: ok = try_load8(dst, hva); break;
    case 2: ok = try_load16(dst, hva); break;
    case 4: ok = try_load32(dst, hva); break;
    case 8: ok = try_load64(dst, hva); break;
    case 16: ok = try_load64(dst, hva) && try_load64((u8 *)dst + 8, hva + 8); break;
    default: ok = try_copy(dst, (const void *)hva, size);
    }
    return likely(ok) || host_fault(cpu);
}

bool host_store(struct cpu *cpu, uintptr_t hva, const void *src, unsigned size)
{
    bool ok;
    switch (size) {
    case 1: ok = try_store8(hva, src); break;
    case 2: ok = try_store16(hva, src); break;
    case 4: ok = try_store32(hva, src); break;
    case 8: ok = try_store64(hva, src); break;
    case 16: ok = try_store64(hva, src) && try_store64(hva + 8, (const u8 *)src + 8); break;
    default: ok = try_copy((void *)hva, src, size);
    }
    return likely(ok) || host_fault(cpu);
}

/* The page may be gone, too, but no instruction of the guest's is under way. */
int gpte_read(u64 hva, u64 *gpte, int size)
{
    *gpte = 0;
    return size == 4 ? try_load32(gpte, hva) : try_load64(gpte, hva);
}

static bool try_cmpxchg(uintptr_t hva, u64 *old, u64 val, unsigned size)
{
    u64 expected = *old;
    u32 failed;
    if (size == 4)
        __asm__ volatile(MAY_FAULT("lock cmpxchgl %k[val], (%[hva])")
                         : [failed] "=&r"(failed), "+a"(expected)
                         : [val] "r"(val), [hva] "r"(hva)
                         : "memory", "cc");
    else
        __asm__ volatile(MAY_FAULT("lock cmpxchgq %[val], (%[hva])")
                         : [failed] "=&r"(failed), "+a"(expected)
                         : [val] "r"(val), [hva] "r"(hva)
                         : "memory", "cc");
    *old = size == 4 ? (u32)expected : expected;
    return !failed;
}

bool host_cmpxchg(struct cpu *cpu, uintptr_t hva, u64 *old, u64 val, unsigned size)
{
    return likely(try_cmpxchg(hva, old, val, size)) || host_fault(cpu);
}

int gpte_cmpxchg(u64 hva, u64 old_gpte, u64 new_gpte, int size)
{
    u64 found = old_gpte;
    if (!try_cmpxchg(hva, &found, new_gpte, (unsigned)size))
        return -1;
    return found == old_gpte;
}

/* ---- SIGSEGV and SIGBUS ----------------------------------------------------------------------
 *
 * One handler for the process.  A client's own gets what is not ours: one that was there before, and
 * one that it installs later, which ours is put before from time to time.
 * The module must leave both signals unblocked: the kernel kills at a blocked synchronous one.
 */
static const int guard_signals[] = {SIGSEGV, SIGBUS};
static struct sigaction previous[2];
static pthread_mutex_t guard_lock = PTHREAD_MUTEX_INITIALIZER;
static pthread_once_t libc_once = PTHREAD_ONCE_INIT;
static int (*libc_sigaction)(int, const struct sigaction *, struct sigaction *) = sigaction;

/* Not the preload library's: it hides this handler from the program, and would from us. */
static void find_libc_sigaction(void)
{
    void *libc = dlopen("libc.so.6", RTLD_LAZY | RTLD_NOLOAD);
    void *found = libc ? dlsym(libc, "sigaction") : NULL;

    if (found)
        memcpy(&libc_sigaction, &found, sizeof(found));
}

static int host_sigaction(int sig, const struct sigaction *action, struct sigaction *old)
{
    pthread_once(&libc_once, find_libc_sigaction);
    return libc_sigaction(sig, action, old);
}

static bool is_memory_fault(int sig, const siginfo_t *info)
{
    bool code = sig == SIGSEGV ? info->si_code == SEGV_MAPERR || info->si_code == SEGV_ACCERR
                               : info->si_code == BUS_ADRERR || info->si_code == BUS_OBJERR ||
                                     info->si_code == BUS_MCEERR_AR;
    /* The zero page is nobody's guest memory: that is a bug of ours and must look like one. */
    return code && (uintptr_t)info->si_addr >= 0x10000;
}

static bool fix_up(ucontext_t *uc)
{
    greg_t *rip = &uc->uc_mcontext.gregs[REG_RIP];
    for (const struct host_ex *e = __start_host_ex; e < __stop_host_ex; e++) {
        if ((greg_t)(uintptr_t)&e->at + e->at == *rip) {
            *rip = (greg_t)(uintptr_t)&e->fixup + e->fixup;
            return true;
        }
    }
    return false;
}

/* Words that are searched for an instruction: not ours, so no sanitizer is asked. */
#define FOREIGN __attribute__((no_sanitize("address")))
#define STACK_WORDS 64
#define NEAR 2048 /* bytes of code */

/* Whether the fast path of i, whose registers are as they were, accesses the byte that faulted. */
static bool reaches(const struct cpu *cpu, const struct insn *i)
{
    u64 la = ea_sum(cpu, i);

    if (!(i->flags & I_MEM) || i->ea == EA_SEG)
        return false;
    if (i->ea != EA_64)
        la = (u32)la;
    if (i->ea != EA_32)
        la += cpu->seg_base[i->seg];
    const struct tlbe *r = &cpu->tlb->r[TLB_INDEX(la)], *w = &cpu->tlb->w[TLB_INDEX(la)];
    return (r->tag == (la & PAGE_MASK) && fault_hva - (la + r->addend) < 64) ||
           (w->tag == (la & PAGE_MASK) && fault_hva - (la + w->addend) < 64);
}

/* The first of the words that points to an instruction of the block: with handler fn, if any, and
 * reaching what faulted, if a cpu is given. */
static FOREIGN const struct insn *search_reaching(const struct cpu *cpu, const struct block *b,
                                                  const u64 *words, int n, insn_fn fn)
{
    for (int k = 0; k < n; k++) {
        u64 off = words[k] - (u64)(uintptr_t)b->insn;
        if (off >= b->n * sizeof(struct insn) || off % sizeof(struct insn))
            continue;
        const struct insn *i = &b->insn[off / sizeof(struct insn)];
        if ((!fn || i->fn == fn) && (!cpu || reaches(cpu, i)))
            return i;
    }
    return NULL;
}

static const struct insn *search(const struct block *b, const u64 *words, int n, insn_fn fn)
{
    return search_reaching(NULL, b, words, n, fn);
}

/* The last instruction of the block whose handler pc can be in. */
static const struct insn *by_handler(const struct block *b, u64 pc)
{
    const struct insn *found = NULL;

    for (unsigned k = 0; k < b->n; k++) {
        u64 distance = pc - (u64)(uintptr_t)b->insn[k].fn;
        if (distance < NEAR && (!found || distance <= pc - (u64)(uintptr_t)found->fn))
            found = &b->insn[k];
    }
    return found;
}

/*
 * The instruction whose handler faulted: a handler needs its second argument until the end, so
 * it is in a register or, when the access was in a function that it called, on the stack.  Only
 * one that ends the block may need it no more, and then its code says who it is.
 */
static const struct insn *find_insn(const struct cpu *cpu, const ucontext_t *uc)
{
    const struct block *b = cpu->block;
    const u64 *regs = (const u64 *)uc->uc_mcontext.gregs;
    const u64 *stack = (const u64 *)(uintptr_t)(regs[REG_RSP] & ~7ull);
    const struct insn *here = by_handler(b, regs[REG_RIP]), *i;
    insn_fn fn = here ? here->fn : NULL;

    /* Where the handler got it, or has put it to begin with: the others may have instructions before. */
    if ((i = search(b, &regs[REG_RSI], 1, fn)) || (i = search(b, &regs[REG_RAX], 1, fn)))
        return i;
    /* Of several with the same handler, stale ones among them, the one that accesses that byte. */
    if ((i = search_reaching(cpu, b, regs, REG_RSP, fn)))
        return i;
    if ((i = search(b, regs, REG_RSP, fn)) || (i = search(b, regs, REG_RSP, NULL)))
        return i;
    if (here)
        return (i = search(b, stack, STACK_WORDS, fn)) ? i : here;
    i = search(b, stack, STACK_WORDS, NULL);
    return i ? i : &b->insn[b->n - 1];
}

/* Frame of the chain() that is under way on this thread: the stack grows down. */
THREAD uintptr_t chaining;

/* A handler that came after ours gives back to us what we gave to it: faulthandler does, by raise(). */
static bool comes_back(const siginfo_t *info, uintptr_t frame)
{
    return info->si_code <= 0 && chaining && frame < chaining;
}

static void chain(int index, int sig, siginfo_t *info, void *uc)
{
    const struct sigaction *old = &previous[index];
    uintptr_t frame = (uintptr_t)__builtin_frame_address(0), outer = chaining;
    bool cycle = comes_back(info, frame);

    chaining = frame;
    if (!cycle && old->sa_flags & SA_SIGINFO) {
        old->sa_sigaction(sig, info, uc);
    } else if (cycle || old->sa_handler == SIG_DFL || old->sa_handler == SIG_IGN) {
        /* The instruction is executed again and the kernel does what it does without us. Not by
         * sigaction(): the preload library stands before that, and would put it behind us. */
        struct {
            void (*handler)(int);
            unsigned long flags;
            void *restorer;
            u64 mask;
        } action = {.handler = cycle ? SIG_DFL : old->sa_handler};
        syscall(SYS_rt_sigaction, sig, &action, NULL, sizeof(action.mask));
        if (info->si_code <= 0)
            raise(sig);
    } else {
        old->sa_handler(sig);
    }
    chaining = outer;
}

static void on_memory_fault(int sig, siginfo_t *info, void *context)
{
    struct cpu *cpu = guarded;

    if (is_memory_fault(sig, info)) {
        fault_hva = (uintptr_t)info->si_addr;
        if (fix_up(context))
            return;
        if (cpu) {
            cpu->insn = cpu->block ? find_insn(cpu, context) : NULL;
            cpu->fault_mxcsr = ((ucontext_t *)context)->uc_mcontext.fpregs->mxcsr;
            fpu_rescue(cpu, ((ucontext_t *)context)->uc_mcontext.fpregs);
            siglongjmp(cpu->guard, 1);
        }
    }
    chain(sig == SIGBUS, sig, info, context);
}

bool host_guard_install(void)
{
    /* NODEFER: the handler is left by siglongjmp without restoring a mask. */
    struct sigaction ours = {.sa_sigaction = on_memory_fault,
                             .sa_flags = SA_SIGINFO | SA_ONSTACK | SA_NODEFER};
    bool ok = true;

    sigemptyset(&ours.sa_mask);
    pthread_mutex_lock(&guard_lock);
    for (int k = 0; k < 2; k++) {
        struct sigaction now;
        ok = ok && !host_sigaction(guard_signals[k], NULL, &now);
        if (!ok || (now.sa_flags & SA_SIGINFO && now.sa_sigaction == on_memory_fault))
            continue;
        previous[k] = now;
        ok = !host_sigaction(guard_signals[k], &ours, NULL);
    }
    pthread_mutex_unlock(&guard_lock);
    return ok;
}

int cpu_guard_action(int sig, const void *action, void *old_action)
{
    int index = sig == SIGBUS;
    struct sigaction now;
    bool ours;

    pthread_mutex_lock(&guard_lock);
    ours = !host_sigaction(sig, NULL, &now) && now.sa_flags & SA_SIGINFO &&
           now.sa_sigaction == on_memory_fault;
    if (ours && old_action)
        memcpy(old_action, &previous[index], sizeof(previous[index]));
    if (ours && action)
        memcpy(&previous[index], action, sizeof(previous[index]));
    pthread_mutex_unlock(&guard_lock);
    return ours;
}

void host_guard_arm(struct cpu *cpu) { guarded = cpu; }

void host_guard_leave(struct cpu *cpu)
{
    (void)cpu;
    guarded = NULL;
}

int host_guard_fault(struct cpu *cpu)
{
    if (cpu->insn && !cpu->delivering) /* an event's rip is already there */
        set_rip(cpu, insn_rip(cpu, cpu->insn));
    raise_exit(cpu, EXIT_HOST_FAULT);
    EXIT(cpu).hva = fault_hva;
    if (cpu->delivering)
        EXIT(cpu).idt_vectoring = cpu->vectoring;
    cpu->delivering = false;
    return EXIT_HOST_FAULT;
}

/* ---- is the memory there? ------------------------------------------------------------------- */

#ifndef MADV_POPULATE_READ
#define MADV_POPULATE_READ 22 /* Linux 5.14 */
#define MADV_POPULATE_WRITE 23
#endif

/* For kernels without MADV_POPULATE_* and for device memory, which it refuses. */
static int probe_maps(u64 start, u64 end, int write)
{
    FILE *f = fopen("/proc/thread-self/maps", "re");
    unsigned long from, to;
    char r, w;
    int line;

    if (!f)
        return 0;
    while (start < end && (line = fscanf(f, "%lx-%lx %c%c%*[^\n]", &from, &to, &r, &w)) == 4) {
        if (to <= start)
            continue;
        if (from > start || r != 'r' || (write && w != 'w'))
            break;
        start = to;
    }
    fclose(f);
    return start >= end;
}

THREAD bool poisoned;

int host_probe(u64 hva, u64 len, int write)
{
    u64 start = hva & PAGE_MASK, end = (hva + len + PAGE_SIZE - 1) & PAGE_MASK;
    int advice = write ? MADV_POPULATE_WRITE : MADV_POPULATE_READ;

    poisoned = false;
    if (!len)
        return 1;
    if (hva + len < hva || end <= start)
        return 0;
    /* Takes the faults an access would take, as get_user_pages() does, and changes nothing. */
    while (madvise((void *)(uintptr_t)start, end - start, advice)) {
        if (errno == EINVAL)
            return probe_maps(start, end, write);
        poisoned = errno == EHWPOISON;
        if (errno != EAGAIN && errno != EINTR)
            return 0;
    }
    return 1;
}

int host_poisoned(void) { return poisoned; }

void host_send_hwpoison_signal(u64 hva)
{
    siginfo_t info = {.si_signo = SIGBUS, .si_code = BUS_MCEERR_AR};

    info.si_addr = (void *)(uintptr_t)(hva & PAGE_MASK);
    info.si_addr_lsb = PAGE_SHIFT;
    syscall(SYS_rt_tgsigqueueinfo, getpid(), syscall(SYS_gettid), SIGBUS, &info);
}

int host_mapped(u64 hva, u64 len)
{
    u64 start = hva & PAGE_MASK, end = (hva + len + PAGE_SIZE - 1) & PAGE_MASK;

    if (hva + len < hva || end < start)
        return 0;
    /* Looks at the mappings and does nothing; ENOMEM is a hole. */
    return !msync((void *)(uintptr_t)start, end - start, MS_ASYNC);
}

int host_resident(u64 hva)
{
    unsigned char in_memory = 0;
    return !mincore((void *)(uintptr_t)(hva & PAGE_MASK), PAGE_SIZE, &in_memory) && in_memory & 1;
}

u64 host_tsc(void) { return __builtin_ia32_rdtsc(); }

/* ---- signals ----------------------------------------------------------------------------------- */

void cpu_set_signal_mask(struct cpu *cpu, int check, u64 mask)
{
    cpu->check_signals = check;
    cpu->signal_mask = mask;
}

/* A blocked signal stays pending even when it is ignored; with KVM, where it is not blocked,
 * it would never become pending. */
static bool is_ignored(int sig)
{
    struct sigaction sa;
    if (sigaction(sig, NULL, &sa))
        return false;
    if (sa.sa_flags & SA_SIGINFO || sa.sa_handler != SIG_DFL)
        return !(sa.sa_flags & SA_SIGINFO) && sa.sa_handler == SIG_IGN;
    return sig == SIGCHLD || sig == SIGURG || sig == SIGWINCH || sig == SIGCONT;
}

bool host_signal_pending(struct cpu *cpu)
{
    u64 pending = 0;

    if (!cpu->check_signals || syscall(SYS_rt_sigpending, &pending, sizeof(pending)))
        return false;
    pending &= ~cpu->signal_mask;
    while (pending) {
        if (!is_ignored(__builtin_ctzll(pending) + 1))
            return true;
        pending &= pending - 1;
    }
    return false;
}

/* ---- second-level tables -------------------------------------------------------------------------- */

u64 spte_read(const u64 *sptep) { return __atomic_load_n(sptep, __ATOMIC_ACQUIRE); }

void spte_write(u64 *sptep, u64 spte) { __atomic_store_n(sptep, spte, __ATOMIC_RELEASE); }

u64 spte_xchg(u64 *sptep, u64 spte) { return __atomic_exchange_n(sptep, spte, __ATOMIC_SEQ_CST); }

int spte_cmpxchg(u64 *sptep, u64 old_spte, u64 new_spte)
{
    return __atomic_compare_exchange_n(sptep, &old_spte, new_spte, false, __ATOMIC_SEQ_CST,
                                       __ATOMIC_SEQ_CST);
}

u64 spt_clear_bits(u64 *spt, const u64 *mask, u64 bits)
{
    u64 all = 0;

    for (int word = 0; word < 8; word++) {
        for (u64 left = mask[word]; left; left &= left - 1) {
            u64 *sptep = &spt[word * 64 + __builtin_ctzll(left)];
            u64 old = spte_read(sptep);
            if (!(old & SPTE_R))
                continue;
            all |= __atomic_fetch_and(sptep, ~bits, __ATOMIC_SEQ_CST);
        }
    }
    return all;
}

u64 *spt_alloc(void)
{
    u64 *spt = aligned_alloc(PAGE_SIZE, PAGE_SIZE);
    return spt ? memset(spt, 0, PAGE_SIZE) : NULL;
}

void spt_free(u64 *spt) { free(spt); }
