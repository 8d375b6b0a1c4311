/* SPDX-License-Identifier: MIT */
/*
 * Executes single instructions on the host processor with a given state, in a forked child.
 *
 * A trampoline in 64-bit code loads every register from fixed addresses and jumps to the
 * instruction, through a far pointer when it is 32-bit code (Linux has a segment for that) or
 * 16-bit code (in an LDT).  A jump behind it leads to code that stores the registers again.  An
 * exception comes as a signal, whose handler takes the state from the signal frame.
 */
#include <asm/ldt.h>
#include <asm/prctl.h>
#include <signal.h>
#include <stdatomic.h>
#include <stdbool.h>
#include <stddef.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/syscall.h>
#include <sys/wait.h>
#include <ucontext.h>
#include <unistd.h>

#include "fuzz.h"

#define PAGE 4096ul

/* The trampoline's own memory: struct save, a stack for PUSHF and POPF that ends with its page,
 * and in the next page a copy of the trampoline that 32-bit far pointers reach. */
#define SAVE 0x21000000
#define SAVE_STACK 0x21001000
#define LOW_CODE 0x21001000

/* Linux's selectors, and ours in the LDT. */
#define USER_CS 0x33
#define USER32_CS 0x23
#define USER_DS 0x2b
#define LDT_SELECTOR(n) ((n) << 3 | 7)
enum { LDT_CS, LDT_DS, LDT_ES, LDT_SS };

struct save {
    struct fuzz_state in, out;
    uint64_t host_rsp;
    uint32_t far_offset;
    uint16_t far_selector, ds, es, ss;
    volatile uint32_t vector_plus_1, error;
    uint64_t cr2;
};
#define saved ((struct save *)SAVE)
_Static_assert(offsetof(struct save, in.xsave) == 192, "used by the trampoline");
_Static_assert(offsetof(struct save, out) == 1024, "used by the trampoline");
_Static_assert(offsetof(struct save, host_rsp) == 2048, "used by the trampoline");
_Static_assert(offsetof(struct save, far_offset) == 2056, "used by the trampoline");
_Static_assert(offsetof(struct save, far_selector) == 2060, "used by the trampoline");
_Static_assert(offsetof(struct save, ds) == 2062, "used by the trampoline");

void fuzz_enter(void);
void fuzz_leave(void);
void fuzz_return(void);
extern const char fuzz_end[];

/* clang-format off */
#define STR_(x) #x
#define STR(x) STR_(x)
#define IN STR(SAVE) "+"
#define OUT STR(SAVE) "+1024+"
#define HOST_RSP STR(SAVE) "+2048"
#define FAR_POINTER STR(SAVE) "+2056"
#define FAR_SELECTOR STR(SAVE) "+2060"
#define X87_SSE_AVX "mov $7, %eax\nxor %edx, %edx\n"
#define EACH_REGISTER(X)                                                                           \
    X("0", "rax") X("8", "rcx") X("16", "rdx") X("24", "rbx") X("40", "rbp") X("48", "rsi")        \
    X("56", "rdi") X("64", "r8") X("72", "r9") X("80", "r10") X("88", "r11") X("96", "r12")        \
    X("104", "r13") X("112", "r14") X("120", "r15") X("32", "rsp")
#define LOAD(offset, reg) "mov " IN offset ", %" reg "\n"
#define STORE(offset, reg) "mov %" reg ", " OUT offset "\n"

__asm__(".text\n"
        ".hidden fuzz_enter\n.hidden fuzz_leave\n.hidden fuzz_return\n.hidden fuzz_end\n"
        ".globl fuzz_enter\nfuzz_enter:\n"
        "push %rbp\npush %rbx\npush %r12\npush %r13\npush %r14\npush %r15\n"
        "mov %rsp, " HOST_RSP "\n"
        "mov $" STR(SAVE_STACK) ", %esp\n"
        "mov " STR(SAVE) "+2062, %ds\nmov " STR(SAVE) "+2064, %es\nmov " STR(SAVE) "+2066, %ss\n"
        X87_SSE_AVX "xrstor64 " IN "192\n"
        "movzwl " FAR_SELECTOR ", %ecx\ntest %ecx, %ecx\njz 1f\n"
        "pushq " IN "136\npopfq\n"
        EACH_REGISTER(LOAD)
        "ljmp *" FAR_POINTER "\n"
        "1: pushq " IN "136\npopfq\n"
        EACH_REGISTER(LOAD)
        "jmp *" IN "128\n"
        ".globl fuzz_leave\nfuzz_leave:\n"
        EACH_REGISTER(STORE)
        "mov $" STR(SAVE_STACK) ", %esp\n"
        "pushfq\npopq " OUT "136\n"
        X87_SSE_AVX "xsave64 " OUT "192\n"
        "mov $" STR(USER_DS) ", %eax\nmov %eax, %ss\n"
        ".globl fuzz_return\nfuzz_return:\n"
        "mov " HOST_RSP ", %rsp\n"
        "pushq $2\npopfq\n"
        "pop %r15\npop %r14\npop %r13\npop %r12\npop %rbx\npop %rbp\n"
        "ret\n"
        ".globl fuzz_end\nfuzz_end:\n");
/* clang-format on */

static const int greg[16] = {REG_RAX, REG_RCX, REG_RDX, REG_RBX, REG_RSP, REG_RBP,
                             REG_RSI, REG_RDI, REG_R8,  REG_R9,  REG_R10, REG_R11,
                             REG_R12, REG_R13, REG_R14, REG_R15};

static void on_signal(int sig, siginfo_t *info, void *context)
{
    greg_t *g = ((ucontext_t *)context)->uc_mcontext.gregs;
    (void)sig, (void)info;
    memcpy(saved->out.xsave, ((ucontext_t *)context)->uc_mcontext.fpregs, FUZZ_XSAVE_SIZE);
    for (int n = 0; n < 16; n++)
        saved->out.gpr[n] = (uint64_t)g[greg[n]];
    saved->out.rip = (uint64_t)g[REG_RIP];
    saved->out.rflags = (uint64_t)g[REG_EFL];
    saved->vector_plus_1 = (uint32_t)g[REG_TRAPNO] + 1;
    saved->error = (uint32_t)g[REG_ERR];
    saved->cr2 = (uint64_t)g[REG_CR2];
    g[REG_RIP] = (greg_t)(uintptr_t)fuzz_return;
    g[REG_EFL] = 2;
    g[REG_CSGSFS] = (g[REG_CSGSFS] & 0xffffffff0000) | USER_CS | (greg_t)USER_DS << 48;
}

/* Maps memory at its address, and once more for ourselves: always writable there. */
static uint8_t *map_twice(uint64_t at, unsigned pages, int prot)
{
    int fd = memfd_create("fuzz", 0);
    void *p, *alias;

    if (fd < 0 || ftruncate(fd, pages * PAGE))
        _exit(2);
    p = mmap((void *)at, pages * PAGE, prot, MAP_SHARED | MAP_POPULATE | MAP_FIXED_NOREPLACE, fd,
             0);
    alias = mmap(NULL, pages * PAGE, PROT_READ | PROT_WRITE, MAP_SHARED | MAP_POPULATE, fd, 0);
    if (p != (void *)at || alias == MAP_FAILED)
        _exit(2);
    return alias;
}

static uint8_t *data, *code;

/* Code behind the instruction that leads to fuzz_leave. */
static void put_exit(uint8_t *at, uint32_t flags)
{
    uint64_t leave = (uint64_t)(uintptr_t)fuzz_leave;
    uint32_t low = LOW_CODE + (uint32_t)((char *)fuzz_leave - (char *)fuzz_enter);

    if (flags & (FUZZ_CODE32 | FUZZ_CODE16)) {
        if (flags & FUZZ_CODE16)
            *at++ = 0x66;
        *at++ = 0xea; /* jmp USER_CS:low */
        memcpy(at, &low, 4);
        memcpy(at + 4, "\x33\0", 2);
    } else {
        memcpy(at, "\xff\x25\0\0\0\0", 6); /* jmp *0(%rip) */
        memcpy(at + 6, &leave, 8);
    }
}

static void choose_segments(const struct fuzz_case *c)
{
    bool code16 = c->flags & FUZZ_CODE16, code32 = c->flags & FUZZ_CODE32;

    saved->far_offset = (uint32_t)c->in.rip;
    saved->far_selector = code16 ? LDT_SELECTOR(LDT_CS) : code32 ? USER32_CS : 0;
    saved->ds = code16 ? LDT_SELECTOR(LDT_DS) : USER_DS;
    saved->es = code16 ? LDT_SELECTOR(LDT_ES) : USER_DS;
    saved->ss = code16 ? LDT_SELECTOR(LDT_SS) : USER_DS;
}

/* XSAVE leaves out what is in its initial state. */
static void complete_vectors(uint8_t *xsave)
{
    if (!(xsave[FUZZ_XSTATE_BV] & 2))
        memset(xsave + FUZZ_XMM, 0, 256);
    if (!(xsave[FUZZ_XSTATE_BV] & 4))
        memset(xsave + FUZZ_YMM, 0, 256);
}

static void run_case(const struct fuzz_case *c, struct fuzz_result *r)
{
    uint8_t *at = code + c->in.rip - (c->flags & FUZZ_CODE16 ? 0 : FUZZ_CODE);

    fuzz_fill(data, c);
    memcpy(at, c->bytes, c->len);
    if (!(c->flags & FUZZ_BRANCH))
        put_exit(at + c->len, c->flags);
    choose_segments(c);
    saved->in = c->in;
    saved->vector_plus_1 = 0;
    saved->error = 0;
    saved->cr2 = 0;
    saved->out.rip = c->in.rip + c->len;
    memset(saved->out.xsave + FUZZ_XSTATE_BV, 0, 64);
    fuzz_enter();
    __asm__ volatile("fninit");
    __builtin_ia32_ldmxcsr(0x1f80);
    complete_vectors(saved->out.xsave);
    memset(at, 0xcc, c->len + 14);

    r->out = saved->out;
    /* an interrupt of 16-bit code on its way back leaves kernel bits in the upper half of rsp */
    if (c->flags & (FUZZ_CODE32 | FUZZ_CODE16))
        r->out.gpr[4] = (uint32_t)r->out.gpr[4];
    r->vector = (int32_t)saved->vector_plus_1 - 1;
    r->error = saved->error;
    r->cr2 = saved->cr2;
    if (r->vector == 3 && (c->flags & FUZZ_BRANCH)) { /* the INT3 that a branch ran into */
        r->vector = -1;
        r->out.rip--;
    }
    fuzz_forget(data, c);
    r->memory_hash = fuzz_hash(data);
}

static void ldt_entry(unsigned n, unsigned base, unsigned limit, unsigned contents)
{
    struct user_desc d = {
        .entry_number = n,
        .base_addr = base,
        .limit = limit,
        .contents = contents,
        .useable = 1,
    };
    if (syscall(SYS_modify_ldt, 1, &d, sizeof(d)))
        _exit(3);
}

static void child(const struct fuzz_case *cases, struct fuzz_result *results, int n,
                  atomic_int *done)
{
    static const int signals[] = {SIGSEGV, SIGBUS, SIGILL, SIGFPE, SIGTRAP};
    struct sigaction sa = {.sa_sigaction = on_signal, .sa_flags = SA_SIGINFO | SA_ONSTACK};
    stack_t stack = {.ss_size = 65536};

    stack.ss_sp =
        mmap(NULL, stack.ss_size, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    sigaltstack(&stack, NULL);
    for (unsigned k = 0; k < sizeof(signals) / sizeof(*signals); k++)
        sigaction(signals[k], &sa, NULL);
    syscall(SYS_arch_prctl, ARCH_SET_GS, FUZZ_GS_BASE);
    map_twice(SAVE, 2, PROT_READ | PROT_WRITE | PROT_EXEC);
    memcpy((void *)LOW_CODE, (void *)fuzz_enter, (size_t)(fuzz_end - (char *)fuzz_enter));
    ldt_entry(LDT_CS, FUZZ_CODE, FUZZ_CS_LIMIT, MODIFY_LDT_CONTENTS_CODE);
    ldt_entry(LDT_DS, FUZZ_DATA, FUZZ_DS_LIMIT, MODIFY_LDT_CONTENTS_DATA);
    ldt_entry(LDT_ES, FUZZ_DATA, FUZZ_ES_LIMIT, MODIFY_LDT_CONTENTS_STACK);
    ldt_entry(LDT_SS, FUZZ_DATA, FUZZ_SS_LIMIT, MODIFY_LDT_CONTENTS_DATA);
    code = map_twice(FUZZ_CODE, FUZZ_CODE_PAGES, PROT_READ | PROT_EXEC);
    memset(code, 0xcc, FUZZ_CODE_PAGES * PAGE);
    data = map_twice(FUZZ_DATA, FUZZ_DATA_PAGES, PROT_READ | PROT_WRITE);
    munmap((void *)(FUZZ_DATA + 2 * PAGE), PAGE);
    mprotect((void *)(FUZZ_DATA + 3 * PAGE), PAGE, PROT_READ);
    for (int k = 0; k < n; k++) {
        alarm(10);
        run_case(&cases[k], &results[k]);
        atomic_store(done, k + 1);
    }
    _exit(0);
}

int fuzz_native(const struct fuzz_case *cases, struct fuzz_result *results, int n)
{
    atomic_int *done = mmap(NULL, PAGE, PROT_READ | PROT_WRITE, MAP_SHARED | MAP_ANONYMOUS, -1, 0);
    int status, count;
    pid_t pid;

    if (done == MAP_FAILED)
        return -1;
    pid = fork();
    if (pid == 0)
        child(cases, results, n, done);
    if (pid < 0 || waitpid(pid, &status, 0) != pid)
        return -1;
    count = atomic_load(done);
    munmap((void *)done, PAGE);
    return count;
}
