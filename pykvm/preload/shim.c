/* SPDX-License-Identifier: MIT */
/*
 * The LD_PRELOAD library: functions of libc that a KVM client calls, with /dev/kvm answered by
 * pykvm in this process and everything else passed on.
 *
 * It knows which calls concern pykvm and nothing of KVM's rules: those are Python's, behind
 * libpykvm-embed.so, which is loaded at the first open of /dev/kvm.  No Python.h here: it sets
 * _FILE_OFFSET_BITS=64, which makes open() and open64() the same symbol.
 */
#include <dlfcn.h>
#include <elf.h>
#include <errno.h>
#include <fcntl.h>
#include <limits.h>
#include <pthread.h>
#include <signal.h>
#include <spawn.h>
#include <stdarg.h>
#include <stdatomic.h>
#include <stdbool.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/ioctl.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <sys/syscall.h>
#include <sys/sysmacros.h>
#include <sys/uio.h>
#include <termios.h>
#include <unistd.h>
#include <wordexp.h>

#include "embed.h"
#include "pykvm/kvm.h"

#define EXPORT __attribute__((visibility("default")))
#define DEVICE "/dev/kvm"
#define KVM_RDEV makedev(10, 232)

/* The function that the program would call without us.  Looked up once; a race finds the same. */
#define REAL(name)                                                                                 \
    ({                                                                                             \
        static _Atomic(void *) found;                                                              \
        void *f = atomic_load_explicit(&found, memory_order_relaxed);                              \
        if (!f) {                                                                                  \
            f = dlsym(RTLD_NEXT, #name);                                                           \
            atomic_store_explicit(&found, f, memory_order_relaxed);                                \
        }                                                                                          \
        (__typeof__(&name))f;                                                                      \
    })

/* > 0 in a thread that is inside pykvm: what Python and the C core call goes straight to libc. */
static __thread int inside __attribute__((tls_model("initial-exec")));

static void complain(const char *what, const char *why)
{
    char line[512];
    int n = snprintf(line, sizeof line, "pykvm: %s: %s\n", what, why);

    if (n > 0 && syscall(SYS_write, 2, line, n < (int)sizeof line ? n : (int)sizeof line - 1) < 0)
        return;
}

/* ---- entering pykvm ----------------------------------------------------------------------------- */

struct guard {
    sigset_t mask;
    int cancel;
};

/*
 * Signal handlers wait until the call is over, as they do for a system call: one that called ioctl()
 * itself or left by siglongjmp() would do so in the middle of the interpreter.  Faults stay
 * unblocked, the kernel kills a process for a blocked one.
 */
static void enter(struct guard *guard)
{
    sigset_t set;

    sigfillset(&set);
    sigdelset(&set, SIGSEGV);
    sigdelset(&set, SIGBUS);
    sigdelset(&set, SIGILL);
    sigdelset(&set, SIGFPE);
    sigdelset(&set, SIGTRAP);
    sigdelset(&set, SIGABRT);
    sigdelset(&set, SIGSYS);
    pthread_setcancelstate(PTHREAD_CANCEL_DISABLE, &guard->cancel);
    pthread_sigmask(SIG_BLOCK, &set, &guard->mask);
    inside++;
}

static void leave(struct guard *guard)
{
    inside--; /* first: the handlers that run now are the program's */
    pthread_sigmask(SIG_SETMASK, &guard->mask, NULL);
    pthread_setcancelstate(guard->cancel, &guard->cancel);
}

static uint64_t first_word(const sigset_t *set)
{
    uint64_t word;

    memcpy(&word, set, sizeof word);
    return word;
}

/* ---- the other library ---------------------------------------------------------------------------- */

static struct embed_api api;
static atomic_bool started;
static pthread_mutex_t start_lock = PTHREAD_MUTEX_INITIALIZER;
static char library[PATH_MAX]; /* path of this one */

/* Environment that `pykvm exec` sets and that every child gets: "NAME=value".  Copies, because the
 * program may clear its environment. */
#define ENV_PREFIX "PYKVM_EXEC_"
#define MAX_KEPT 8
static char *kept[MAX_KEPT];
static int nr_kept;

static bool has_name(const char *entry, const char *name, size_t length)
{
    return !strncmp(entry, name, length) && entry[length] == '=';
}

static const char *setting(const char *name)
{
    size_t length = strlen(name);

    for (int i = 0; i < nr_kept; i++)
        if (has_name(kept[i], name, length))
            return kept[i] + length + 1;
    return NULL;
}

/* A page that is zero in a child that fork() made: 1 says that this memory is where VMs live. */
static volatile char *own_memory;

/* In the child of a fork() by its system call, behind libc's back, where the interpreter is not whole. */
static bool in_stray_child(void) { return own_memory && !*own_memory; }

static bool mark_memory(void)
{
    void *page = REAL(mmap)(NULL, 4096, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);

    if (page == MAP_FAILED || REAL(madvise)(page, 4096, MADV_WIPEONFORK))
        return false;
    own_memory = page;
    *own_memory = 1;
    return true;
}

/* ---- memory behind slots ---- */

/* Host ranges behind the memory slots, sorted and merged.  Written by Python, read on every munmap()
 * of the program: a sequence lock, so that a reader neither waits nor enters Python for nothing. */
#define MAX_RANGES 1024
static atomic_uint ranges_sequence;
static struct embed_range ranges[MAX_RANGES];
static atomic_int nr_ranges;

static void set_ranges(const struct embed_range *table, int n)
{
    static pthread_mutex_t lock = PTHREAD_MUTEX_INITIALIZER;

    pthread_mutex_lock(&lock);
    atomic_fetch_add(&ranges_sequence, 1);
    if (n > MAX_RANGES) {
        ranges[0] = (struct embed_range){table[0].start, table[n - 1].end};
        n = 1;
    } else if (n) {
        memcpy(ranges, table, (size_t)n * sizeof *table);
    }
    atomic_store(&nr_ranges, n);
    atomic_fetch_add(&ranges_sequence, 1);
    pthread_mutex_unlock(&lock);
}

static bool behind_a_slot(uint64_t start, uint64_t end)
{
    bool found;
    unsigned before;

    if (!atomic_load_explicit(&nr_ranges, memory_order_relaxed))
        return false;
    do {
        before = atomic_load(&ranges_sequence);
        found = false;
        for (int i = 0, n = atomic_load(&nr_ranges); i < n && !found; i++)
            found = ranges[i].start < end && start < ranges[i].end;
        atomic_thread_fence(memory_order_acquire);
    } while ((before & 1) || before != atomic_load(&ranges_sequence));
    return found;
}

/* A change of the program's memory that a VM has to know of: the MMU notifier. */
struct change {
    uint64_t start, end; /* end 0: none has to */
};

/* The program is about to change the mapping of [address, address + size). */
static struct change memory_changes(const void *address, size_t size)
{
    struct change change = {(uintptr_t)address & ~4095ull,
                            ((uintptr_t)address + size + 4095) & ~4095ull};
    struct guard guard;
    int error = errno;

    if (inside || in_stray_child() || change.end <= change.start ||
        !behind_a_slot(change.start, change.end))
        return (struct change){0, 0};
    enter(&guard);
    api.invalidate_start(change.start, change.end);
    leave(&guard);
    errno = error;
    return change;
}

/* It has done so, or failed to. */
static void memory_changed(struct change change)
{
    struct guard guard;
    int error = errno;

    if (!change.end)
        return;
    enter(&guard);
    api.invalidate_end(change.start, change.end);
    leave(&guard);
    errno = error;
}

/* ---- starting ---- */

static bool load(void)
{
    char path[PATH_MAX + 32];
    char *slash;
    void *handle;
    __typeof__(&embed_start) start;
    struct embed_settings settings = {
        .home = setting("PYKVM_EXEC_HOME"),
        .path = setting("PYKVM_EXEC_PATH"),
        .extensions = setting("PYKVM_EXEC_EXTENSIONS"),
        .kernel = setting("PYKVM_EXEC_KERNEL"),
        .cpu = setting("PYKVM_EXEC_CPU"),
        .set_ranges = set_ranges,
    };

    snprintf(path, sizeof path, "%s", library);
    slash = strrchr(path, '/');
    if (!slash)
        return false;
    strcpy(slash + 1, "libpykvm-embed.so");
    /* Global: the interpreter's extension modules expect its symbols there. */
    handle = dlopen(path, RTLD_NOW | RTLD_GLOBAL);
    if (!handle) {
        complain("cannot load the interpreter", dlerror());
        return false;
    }
    start = (__typeof__(start))dlsym(handle, "embed_start");
    return start && start(&settings, &api) == 0;
}

static bool start(void)
{
    if (atomic_load(&started))
        return true;
    pthread_mutex_lock(&start_lock);
    if (!atomic_load(&started) && mark_memory() && load())
        atomic_store(&started, true);
    pthread_mutex_unlock(&start_lock);
    return atomic_load(&started);
}

/* Signals that end the main thread's KVM_RUN, bit n - 1 for signal n; 0 outside of it. */
static _Atomic uint64_t main_takes;

static void after_fork_in_child(void)
{
    /* The child has no VM of its own yet; another thread may have held the lock. */
    atomic_store(&nr_ranges, 0);
    atomic_store(&ranges_sequence, 0);
    pthread_mutex_init(&start_lock, NULL);
    if (own_memory)
        *own_memory = 1;
    atomic_store(&main_takes, 0);
}

/* ---- descriptors -------------------------------------------------------------------------------- */

enum fd_kind { NOT_OURS, SYSTEM, VM, VCPU };

/* What we handed out, by descriptor.  A hint only: the number may mean another file by now, or a
 * duplicate of one of ours may be unknown here.  ioctl() asks Python, which knows. */
#define MAX_FDS 65536
static struct {
    _Atomic uint64_t inode;
    _Atomic uint8_t kind;
} handed_out[MAX_FDS];
/* The file system that all of ours are on: inode numbers are unique only there. */
static _Atomic dev_t device_of_ours;

static bool raw_fstat(int fd, struct stat *st) { return syscall(SYS_fstat, fd, st) == 0; }

static void remember(int fd, enum fd_kind kind)
{
    struct stat st;

    if (fd < 0 || fd >= MAX_FDS || !raw_fstat(fd, &st))
        return;
    atomic_store(&device_of_ours, st.st_dev);
    atomic_store(&handed_out[fd].kind, kind);
    atomic_store(&handed_out[fd].inode, st.st_ino);
}

static enum fd_kind kind_of(int fd)
{
    int error = errno;
    struct stat st;
    uint64_t inode;

    if (inside || fd < 0 || fd >= MAX_FDS)
        return NOT_OURS;
    inode = atomic_load_explicit(&handed_out[fd].inode, memory_order_relaxed);
    if (!inode)
        return NOT_OURS;
    if (raw_fstat(fd, &st) && st.st_ino == inode && st.st_dev == atomic_load(&device_of_ours))
        return atomic_load(&handed_out[fd].kind);
    atomic_store(&handed_out[fd].inode, 0);
    errno = error;
    return NOT_OURS;
}

static bool is_real_device(int fd)
{
    struct stat st;

    return raw_fstat(fd, &st) && S_ISCHR(st.st_mode) && st.st_rdev == KVM_RDEV;
}

/* Is this "/dev/kvm", give or take slashes and dots?  What is no pointer is EFAULT, as the kernel says. */
static bool names_device(const char *path)
{
    static const char *const parts[] = {"dev", "kvm"};
    size_t n = 0;

    if ((uintptr_t)path < 0x10000 || (uintptr_t)path >> 47 || *path != '/')
        return false;
    while (*path) {
        size_t length = strcspn(path, "/");

        if (length && !(length == 1 && *path == '.')) {
            if (n == 2 || length != strlen(parts[n]) || memcmp(path, parts[n], length))
                return false;
            n++;
        }
        path += length + (path[length] == '/');
    }
    return n == 2;
}

/* Opens the fake device: a descriptor, or -1 and errno. */
static int open_device(int flags)
{
    struct guard guard;
    int result = -EIO, error = errno;

    enter(&guard);
    if (!in_stray_child() && start())
        result = api.open(flags);
    if (result >= 0)
        remember(result, SYSTEM);
    leave(&guard);
    errno = result < 0 ? -result : error;
    return result < 0 ? -1 : result;
}

/* A descriptor that open() gave under another name is never the real device. */
static int checked(int fd, int flags)
{
    int error = errno;

    if (fd < 0 || inside || !is_real_device(fd)) {
        errno = error;
        return fd;
    }
    syscall(SYS_close, fd);
    return open_device(flags);
}

#define MODE_OF(flags, last)                                                                       \
    ({                                                                                             \
        mode_t mode_ = 0;                                                                          \
        if ((flags) & (O_CREAT | __O_TMPFILE)) {                                                   \
            va_list ap_;                                                                           \
            va_start(ap_, last);                                                                   \
            mode_ = (mode_t)va_arg(ap_, int);                                                      \
            va_end(ap_);                                                                           \
        }                                                                                          \
        mode_;                                                                                     \
    })

EXPORT int open(const char *path, int flags, ...)
{
    mode_t mode = MODE_OF(flags, flags);

    if (!inside && names_device(path))
        return open_device(flags);
    return checked(REAL(open)(path, flags, mode), flags);
}

EXPORT int open64(const char *path, int flags, ...)
{
    mode_t mode = MODE_OF(flags, flags);

    if (!inside && names_device(path))
        return open_device(flags);
    return checked(REAL(open64)(path, flags, mode), flags);
}

EXPORT int openat(int dir, const char *path, int flags, ...)
{
    mode_t mode = MODE_OF(flags, flags);

    if (!inside && names_device(path))
        return open_device(flags);
    return checked(REAL(openat)(dir, path, flags, mode), flags);
}

EXPORT int openat64(int dir, const char *path, int flags, ...)
{
    mode_t mode = MODE_OF(flags, flags);

    if (!inside && names_device(path))
        return open_device(flags);
    return checked(REAL(openat64)(dir, path, flags, mode), flags);
}

/* What open() becomes with _FORTIFY_SOURCE. */
int __open_2(const char *path, int flags);
int __open64_2(const char *path, int flags);
int __openat_2(int dir, const char *path, int flags);
int __openat64_2(int dir, const char *path, int flags);

EXPORT int __open_2(const char *path, int flags)
{
    if (!inside && names_device(path))
        return open_device(flags);
    return checked(REAL(__open_2)(path, flags), flags);
}

EXPORT int __open64_2(const char *path, int flags)
{
    if (!inside && names_device(path))
        return open_device(flags);
    return checked(REAL(__open64_2)(path, flags), flags);
}

EXPORT int __openat_2(int dir, const char *path, int flags)
{
    if (!inside && names_device(path))
        return open_device(flags);
    return checked(REAL(__openat_2)(dir, path, flags), flags);
}

EXPORT int __openat64_2(int dir, const char *path, int flags)
{
    if (!inside && names_device(path))
        return open_device(flags);
    return checked(REAL(__openat64_2)(dir, path, flags), flags);
}

EXPORT int creat(const char *path, mode_t mode)
{
    return open(path, O_CREAT | O_WRONLY | O_TRUNC, mode);
}
EXPORT int creat64(const char *path, mode_t mode)
{
    return open64(path, O_CREAT | O_WRONLY | O_TRUNC, mode);
}

static FILE *open_stream(const char *mode)
{
    int fd = open_device(strchr(mode, 'e') ? O_CLOEXEC : 0);

    return fd < 0 ? NULL : fdopen(fd, mode);
}

/* libc opens the file of a stream without open(). */
#define FOPEN(name)                                                                                \
    EXPORT FILE *name(const char *path, const char *mode)                                          \
    {                                                                                              \
        FILE *stream;                                                                              \
                                                                                                   \
        if (!inside && names_device(path))                                                         \
            return open_stream(mode);                                                              \
        stream = REAL(name)(path, mode);                                                           \
        if (inside || !stream || !is_real_device(fileno(stream)))                                  \
            return stream;                                                                         \
        fclose(stream);                                                                            \
        return open_stream(mode);                                                                  \
    }

FOPEN(fopen)
FOPEN(fopen64)

/* ---- signals for the process ---------------------------------------------------------------------------
 *
 * The kernel gives one to the main thread, unless that blocks it; ours does while its guest runs, and
 * another thread would get it.  So that it ends KVM_RUN here too, handlers have one of ours in front
 * from the first KVM_RUN of the main thread on: it sends what another thread got on to the main one,
 * where it waits, is seen, and is handled after KVM_RUN.
 */

typedef void handler_fn(int, siginfo_t *, void *);

#define MAX_SIGNALS 65
static atomic_bool main_has_run;
/* A client that changes the mask of KVM_RUN does its own: which signals end it is not known here. */
static atomic_bool has_signal_mask;
static struct {
    _Atomic(handler_fn *) handler; /* the program's */
    atomic_int siginfo;            /* SA_SIGINFO if it asked for that, else 0 */
    enum { NONE, COMING, SENT } _Atomic state;
    siginfo_t info; /* of the signal on its way */
} forwarded[MAX_SIGNALS];

/* What one thread sends to another comes from tgkill(), and timers can name a thread. */
static bool is_for_the_process(const siginfo_t *info)
{
    return info->si_code == SI_USER || info->si_code == SI_KERNEL || info->si_signo == SIGCHLD;
}

static bool in_main_thread(void) { return REAL(syscall)(SYS_gettid) == getpid(); }

static void in_front(int sig, siginfo_t *info, void *context)
{
    siginfo_t copy;
    int none = NONE, error = errno;

    if (atomic_load(&main_takes) >> (sig - 1) & 1 && is_for_the_process(info) &&
        !in_main_thread()) {
        if (atomic_compare_exchange_strong(&forwarded[sig].state, &none, COMING)) {
            forwarded[sig].info = *info;
            atomic_store(&forwarded[sig].state, SENT);
        }
        REAL(syscall)(SYS_tgkill, getpid(), getpid(), sig);
        errno = error;
        return;
    }
    if (info->si_code == SI_TKILL && atomic_load(&forwarded[sig].state) == SENT &&
        in_main_thread()) {
        copy = forwarded[sig].info;
        atomic_store(&forwarded[sig].state, NONE);
        info = &copy;
    }
    atomic_load (&forwarded[sig].handler)(sig, info, context);
}

/* Puts ours in front of the program's.  One that is to go after its first signal is left as it is. */
static void put_in_front(int sig, struct sigaction *action)
{
    handler_fn *handler = action->sa_sigaction;

    if (!atomic_load(&main_has_run) || action->sa_handler == SIG_DFL ||
        action->sa_handler == SIG_IGN || action->sa_flags & (int)SA_RESETHAND)
        return;
    if (handler != in_front) {
        atomic_store(&forwarded[sig].handler, handler);
        atomic_store(&forwarded[sig].siginfo, action->sa_flags & SA_SIGINFO);
    }
    action->sa_sigaction = in_front;
    action->sa_flags |= SA_SIGINFO;
}

static void hide_ours(int sig, struct sigaction *action)
{
    if (action->sa_sigaction != in_front)
        return;
    action->sa_sigaction = atomic_load(&forwarded[sig].handler);
    action->sa_flags = (action->sa_flags & ~SA_SIGINFO) | atomic_load(&forwarded[sig].siginfo);
}

/* KVM_RUN of this thread begins; `blocked`: the signals that do not end it.  False: not in the main one. */
static bool main_enters(uint64_t blocked)
{
    if (atomic_load(&has_signal_mask) || !in_main_thread())
        return false;
    if (!atomic_exchange(&main_has_run, true))
        for (int sig = 1; sig < MAX_SIGNALS; sig++) {
            struct sigaction action;

            if (sig == SIGSEGV || sig == SIGBUS || REAL(sigaction)(sig, NULL, &action))
                continue;
            put_in_front(sig, &action);
            if (action.sa_sigaction == in_front)
                REAL(sigaction)(sig, &action, NULL);
        }
    atomic_store(&main_takes, ~blocked);
    return true;
}

/* ---- ioctl ---------------------------------------------------------------------------------------- */

/* Requests that the kernel answers for every file before the driver is asked: fs/ioctl.c. */
static bool is_generic(unsigned long request)
{
    return request == 0x5450 || request == 0x5451 || request == 0x5421 || request == 0x5452;
}

static int kvm_ioctl(int fd, uint32_t request, uint64_t arg, bool *ours)
{
    struct guard guard;
    int error = errno;
    bool runs_in_main;
    int64_t result;

    /* What the kernel says of a VM or a vCPU in a process with other memory. */
    if (in_stray_child()) {
        *ours = kind_of(fd) != NOT_OURS;
        errno = EIO;
        return -1;
    }
    if (request == KVM_SET_SIGNAL_MASK && arg)
        atomic_store(&has_signal_mask, true);
    enter(&guard);
    runs_in_main = request == KVM_RUN && main_enters(first_word(&guard.mask));
    result = api.ioctl(fd, request, arg, first_word(&guard.mask));
    if (runs_in_main)
        atomic_store(&main_takes, 0);
    if (result >= 0 && (request == KVM_CREATE_VM || request == KVM_CREATE_VCPU))
        remember((int)result, request == KVM_CREATE_VM ? VM : VCPU);
    leave(&guard);
    *ours = result != EMBED_NOT_OURS;
    errno = result < 0 ? (int)-result : error;
    return result < 0 ? -1 : (int)result;
}

static int any_ioctl(int fd, unsigned long request, void *arg)
{
    bool is_kvm = (request >> 8 & 0xff) == 0xae, ours = false;
    int error = errno, result;

    if (inside || is_generic((uint32_t)request) || !(is_kvm || kind_of(fd) != NOT_OURS))
        return REAL(ioctl)(fd, request, arg);
    if (atomic_load(&started)) {
        result = kvm_ioctl(fd, (uint32_t)request, (uintptr_t)arg, &ours);
        if (ours)
            return result;
    }
    if (is_real_device(fd)) {
        complain("ioctl", "refused on a descriptor of the real " DEVICE
                          " that the program was started with");
        errno = ENODEV;
        return -1;
    }
    errno = error;
    return REAL(ioctl)(fd, request, arg);
}

EXPORT int ioctl(int fd, unsigned long request, ...)
{
    va_list ap;
    void *arg;

    va_start(ap, request);
    arg = va_arg(ap, void *);
    va_end(ap);
    return any_ioctl(fd, request, arg);
}

/* The system calls above, made by number. */
EXPORT long syscall(long number, ...)
{
    long a[6];
    va_list ap;

    va_start(ap, number);
    for (int i = 0; i < 6; i++)
        a[i] = va_arg(ap, long);
    va_end(ap);
    if (!inside) {
        switch (number) {
        case SYS_ioctl: return any_ioctl((int)a[0], (unsigned long)a[1], (void *)a[2]);
        case SYS_open: return open((const char *)a[0], (int)a[1], (mode_t)a[2]);
        case SYS_openat: return openat((int)a[0], (const char *)a[1], (int)a[2], (mode_t)a[3]);
        case SYS_execve:
            return execve((const char *)a[0], (char *const *)a[1], (char *const *)a[2]);
        case SYS_execveat:
            return execveat((int)a[0], (const char *)a[1], (char *const *)a[2], (char *const *)a[3],
                            (int)a[4]);
        case SYS_munmap: return munmap((void *)a[0], (size_t)a[1]);
        }
    }
    return REAL(syscall)(number, a[0], a[1], a[2], a[3], a[4], a[5]);
}

/* ---- what else can be done with a descriptor ------------------------------------------------------- */

/* No file of KVM's has data.  0, or the errno that a call fails with; `named` is for those that name
 * a position: only the device, which is no anonymous inode, has one. */
static int data_error(int fd) { return kind_of(fd) == NOT_OURS ? 0 : EINVAL; }

static int named_error(int fd)
{
    enum fd_kind kind = kind_of(fd);

    return kind == NOT_OURS ? 0 : kind == SYSTEM ? EINVAL : ESPIPE;
}

static int room_error(int fd) { return kind_of(fd) == NOT_OURS ? 0 : ENODEV; }

#define NO_DATA(type, name, error, parameters, ...)                                                \
    EXPORT type name parameters                                                                    \
    {                                                                                              \
        int why = error(fd);                                                                       \
                                                                                                   \
        if (!why)                                                                                  \
            return REAL(name)(fd __VA_OPT__(, ) __VA_ARGS__);                                      \
        errno = why;                                                                               \
        return -1;                                                                                 \
    }

NO_DATA(ssize_t, read, data_error, (int fd, void *to, size_t size), to, size)
NO_DATA(ssize_t, write, data_error, (int fd, const void *from, size_t size), from, size)
NO_DATA(ssize_t, readv, data_error, (int fd, const struct iovec *to, int n), to, n)
NO_DATA(ssize_t, writev, data_error, (int fd, const struct iovec *from, int n), from, n)
NO_DATA(ssize_t, pread, named_error, (int fd, void *to, size_t size, off_t at), to, size, at)
NO_DATA(ssize_t, pread64, named_error, (int fd, void *to, size_t size, off64_t at), to, size, at)
NO_DATA(ssize_t, pwrite, named_error, (int fd, const void *from, size_t size, off_t at), from, size,
        at)
NO_DATA(ssize_t, pwrite64, named_error, (int fd, const void *from, size_t size, off64_t at), from,
        size, at)
NO_DATA(ssize_t, preadv, named_error, (int fd, const struct iovec *to, int n, off_t at), to, n, at)
NO_DATA(ssize_t, preadv64, named_error, (int fd, const struct iovec *to, int n, off64_t at), to, n,
        at)
NO_DATA(ssize_t, pwritev, named_error, (int fd, const struct iovec *from, int n, off_t at), from, n,
        at)
NO_DATA(ssize_t, pwritev64, named_error, (int fd, const struct iovec *from, int n, off64_t at),
        from, n, at)
NO_DATA(int, ftruncate, data_error, (int fd, off_t size), size)
NO_DATA(int, ftruncate64, data_error, (int fd, off64_t size), size)
NO_DATA(int, fallocate, room_error, (int fd, int mode, off_t at, off_t size), mode, at, size)
NO_DATA(int, fallocate64, room_error, (int fd, int mode, off64_t at, off64_t size), mode, at, size)
NO_DATA(int, fsync, data_error, (int fd))
NO_DATA(int, fdatasync, data_error, (int fd))

/* noop_llseek(): the position is 0 and stays there. */
EXPORT off_t lseek(int fd, off_t offset, int whence)
{
    return kind_of(fd) == NOT_OURS ? REAL(lseek)(fd, offset, whence) : 0;
}

EXPORT off64_t lseek64(int fd, off64_t offset, int whence)
{
    return kind_of(fd) == NOT_OURS ? REAL(lseek64)(fd, offset, whence) : 0;
}

/* A duplicate is what it is one of. */
static int duplicated(int fd, int copy)
{
    enum fd_kind kind = copy < 0 ? NOT_OURS : kind_of(fd);

    if (kind != NOT_OURS)
        remember(copy, kind);
    return copy;
}

EXPORT int dup(int fd) { return duplicated(fd, REAL(dup)(fd)); }
EXPORT int dup2(int fd, int to) { return duplicated(fd, REAL(dup2)(fd, to)); }
EXPORT int dup3(int fd, int to, int flags) { return duplicated(fd, REAL(dup3)(fd, to, flags)); }

/* What the kernel says of every file that it opens on a 64-bit machine, except KVM's. */
#define KERNELS_O_LARGEFILE 0100000

#define FCNTL(name)                                                                                \
    EXPORT int name(int fd, int command, ...)                                                      \
    {                                                                                              \
        va_list ap;                                                                                \
        void *arg;                                                                                 \
                                                                                                   \
        va_start(ap, command);                                                                     \
        arg = va_arg(ap, void *);                                                                  \
        va_end(ap);                                                                                \
        if (command == F_DUPFD || command == F_DUPFD_CLOEXEC)                                      \
            return duplicated(fd, REAL(name)(fd, command, arg));                                   \
        if (command == F_GETFL && (kind_of(fd) == VM || kind_of(fd) == VCPU))                      \
            return REAL(name)(fd, command) & ~KERNELS_O_LARGEFILE;                                 \
        if ((command == F_ADD_SEALS || command == F_GET_SEALS) && kind_of(fd) != NOT_OURS) {       \
            errno = EINVAL;                                                                        \
            return -1;                                                                             \
        }                                                                                          \
        return REAL(name)(fd, command, arg);                                                       \
    }

FCNTL(fcntl)
FCNTL(fcntl64)

/* libc asks for TCGETS without ioctl(). */
static bool is_no_terminal(int fd)
{
    enum fd_kind kind = kind_of(fd);

    if (kind != NOT_OURS)
        errno = kind == VM ? ENOTTY : EINVAL;
    return kind != NOT_OURS;
}

EXPORT int isatty(int fd) { return is_no_terminal(fd) ? 0 : REAL(isatty)(fd); }

EXPORT int tcgetattr(int fd, struct termios *mode)
{
    return is_no_terminal(fd) ? -1 : REAL(tcgetattr)(fd, mode);
}

#define DIRTY_RING_OFFSET (64 << 12)

/* Whether the first or the last page is one of the vCPU's dirty ring. */
static bool maps_dirty_ring(int fd, off64_t offset, size_t size)
{
    off64_t last = offset + (off64_t)(size - 1);
    struct stat st;

    return raw_fstat(fd, &st) && ((offset >= DIRTY_RING_OFFSET && offset < st.st_size) ||
                                  (last >= DIRTY_RING_OFFSET && last < st.st_size));
}

/* 0, or the errno that mmap() of one of our descriptors fails with. */
static int mmap_error(int prot, int flags, int fd, off64_t offset, size_t size)
{
    enum fd_kind kind = flags & MAP_ANONYMOUS ? NOT_OURS : kind_of(fd);

    if (kind == SYSTEM || kind == VM)
        return ENODEV;
    if (kind == VCPU && (flags & MAP_TYPE) == MAP_PRIVATE && maps_dirty_ring(fd, offset, size))
        return EINVAL;
    /* Linux 6.16: anonymous inodes are noexec. */
    return kind == VCPU && prot & PROT_EXEC ? EPERM : 0;
}

#define MMAP(name, offset_type)                                                                    \
    EXPORT void *name(void *address, size_t size, int prot, int flags, int fd, offset_type offset) \
    {                                                                                              \
        int error = mmap_error(prot, flags, fd, offset, size);                                     \
        struct change change = {0, 0};                                                             \
                                                                                                   \
        if (error) {                                                                               \
            errno = error;                                                                         \
            return MAP_FAILED;                                                                     \
        }                                                                                          \
        if (flags & MAP_FIXED)                                                                     \
            change = memory_changes(address, size);                                                \
        address = REAL(name)(address, size, prot, flags, fd, offset);                              \
        memory_changed(change);                                                                    \
        return address;                                                                            \
    }

MMAP(mmap, off_t)
MMAP(mmap64, off64_t)

EXPORT int munmap(void *address, size_t size)
{
    struct change change = memory_changes(address, size);
    int result = REAL(munmap)(address, size);

    memory_changed(change);
    return result;
}

EXPORT int mprotect(void *address, size_t size, int prot)
{
    struct change change = memory_changes(address, size);
    int result = REAL(mprotect)(address, size, prot);

    memory_changed(change);
    return result;
}

EXPORT void *mremap(void *address, size_t old_size, size_t new_size, int flags, ...)
{
    struct change to = {0, 0}, from;
    void *wanted = NULL;

    if (flags & MREMAP_FIXED) {
        va_list ap;

        va_start(ap, flags);
        wanted = va_arg(ap, void *);
        va_end(ap);
        to = memory_changes(wanted, new_size);
    }
    from = memory_changes(address, old_size);
    wanted = REAL(mremap)(address, old_size, new_size, flags, wanted);
    memory_changed(from);
    memory_changed(to);
    return wanted;
}

EXPORT int madvise(void *address, size_t size, int advice)
{
    struct change change = {0, 0};
    int result;

    if (advice == MADV_DONTNEED || advice == MADV_FREE || advice == MADV_REMOVE)
        change = memory_changes(address, size);
    result = REAL(madvise)(address, size, advice);
    memory_changed(change);
    return result;
}

/* ---- SIGSEGV and SIGBUS --------------------------------------------------------------------------
 *
 * The processor needs them: guest memory may go away under it.  The program's own handlers come
 * behind the processor's, and the program does not see that there is one.
 */

static bool guard_action(int sig, const struct sigaction *action, struct sigaction *old)
{
    bool done;

    if (inside || (sig != SIGSEGV && sig != SIGBUS) || !atomic_load(&started))
        return false;
    inside++;
    done = api.guard_action(sig, action, old);
    inside--;
    return done;
}

EXPORT int sigaction(int sig, const struct sigaction *restrict action,
                     struct sigaction *restrict old)
{
    struct sigaction before, ours;

    if (guard_action(sig, action, old))
        return 0;
    if (inside || sig < 1 || sig >= MAX_SIGNALS || !atomic_load(&main_has_run))
        return REAL(sigaction)(sig, action, old);
    if (REAL(sigaction)(sig, NULL, &before))
        return -1;
    hide_ours(sig, &before);
    if (action) {
        ours = *action;
        put_in_front(sig, &ours);
        if (REAL(sigaction)(sig, &ours, NULL))
            return -1;
    }
    if (old)
        *old = before;
    return 0;
}

EXPORT sighandler_t signal(int sig, sighandler_t handler)
{
    struct sigaction action = {.sa_handler = handler, .sa_flags = SA_RESTART}, old;

    if (guard_action(sig, &action, &old))
        return old.sa_handler;
    if (inside || !atomic_load(&main_has_run))
        return REAL(signal)(sig, handler);
    return sigaction(sig, &action, &old) ? SIG_ERR : old.sa_handler;
}

/* ---- what /dev/kvm looks like ------------------------------------------------------------------------ */

static int device_stat(struct stat *st)
{
    memset(st, 0, sizeof *st);
    st->st_mode = S_IFCHR | 0666;
    st->st_nlink = 1;
    st->st_rdev = KVM_RDEV;
    st->st_blksize = 4096;
    return 0;
}

/* struct stat and struct stat64 are the same on x86-64. */
#define STAT(name, type)                                                                           \
    EXPORT int name(const char *restrict path, struct type *restrict st)                           \
    {                                                                                              \
        if (!inside && names_device(path))                                                         \
            return device_stat((struct stat *)st);                                                 \
        return REAL(name)(path, st);                                                               \
    }
STAT(stat, stat)
STAT(stat64, stat64)
STAT(lstat, stat)
STAT(lstat64, stat64)

#define FSTAT(name, type)                                                                          \
    EXPORT int name(int fd, struct type *st)                                                       \
    {                                                                                              \
        if (kind_of(fd) == SYSTEM)                                                                 \
            return device_stat((struct stat *)st);                                                 \
        return REAL(name)(fd, st);                                                                 \
    }
FSTAT(fstat, stat)
FSTAT(fstat64, stat64)

#define FSTATAT(name, type)                                                                        \
    EXPORT int name(int dir, const char *restrict path, struct type *restrict st, int flags)       \
    {                                                                                              \
        if (!inside && names_device(path))                                                         \
            return device_stat((struct stat *)st);                                                 \
        return REAL(name)(dir, path, st, flags);                                                   \
    }
FSTATAT(fstatat, stat)
FSTATAT(fstatat64, stat64)

/* The same for programs linked with a glibc before 2.33. */
int __xstat(int version, const char *path, struct stat *st);
int __lxstat(int version, const char *path, struct stat *st);
int __fxstat(int version, int fd, struct stat *st);

EXPORT int __xstat(int version, const char *path, struct stat *st)
{
    return !inside && names_device(path) ? device_stat(st) : REAL(__xstat)(version, path, st);
}

EXPORT int __lxstat(int version, const char *path, struct stat *st)
{
    return !inside && names_device(path) ? device_stat(st) : REAL(__lxstat)(version, path, st);
}

EXPORT int __fxstat(int version, int fd, struct stat *st)
{
    return kind_of(fd) == SYSTEM ? device_stat(st) : REAL(__fxstat)(version, fd, st);
}

static int device_access(int mode)
{
    if (!(mode & X_OK))
        return 0;
    errno = EACCES;
    return -1;
}

EXPORT int access(const char *path, int mode)
{
    return !inside && names_device(path) ? device_access(mode) : REAL(access)(path, mode);
}

EXPORT int eaccess(const char *path, int mode)
{
    return !inside && names_device(path) ? device_access(mode) : REAL(eaccess)(path, mode);
}

EXPORT int euidaccess(const char *path, int mode)
{
    return !inside && names_device(path) ? device_access(mode) : REAL(euidaccess)(path, mode);
}

EXPORT int faccessat(int dir, const char *path, int mode, int flags)
{
    return !inside && names_device(path) ? device_access(mode)
                                         : REAL(faccessat)(dir, path, mode, flags);
}

/* ---- children ------------------------------------------------------------------------------------------
 *
 * A child gets the library too, whatever environment it is given; one that cannot have it must not
 * find the real device.  All of this may run in the child of a vfork(): no allocation, no locks.
 */

static bool sees_real_device(void) { return syscall(SYS_faccessat, AT_FDCWD, DEVICE, F_OK) == 0; }

static const char *unfit(const char *path, int depth);

static const char *unfit_script(char *line, size_t n, int depth)
{
    char *end = memchr(line, '\n', n), *name = line + 2;

    if (!end || depth > 4)
        return NULL; /* the kernel says what is wrong with it */
    *end = 0;
    name += strspn(name, " \t");
    name[strcspn(name, " \t")] = 0;
    return unfit(name, depth + 1);
}

static const char *unfit_elf(int fd, const Elf64_Ehdr *head)
{
    Elf64_Phdr phdr;
    char loader[256] = "";

    if (head->e_ident[EI_CLASS] != ELFCLASS64 || head->e_machine != EM_X86_64)
        return "is not a 64-bit x86 program";
    for (int i = 0; i < head->e_phnum; i++) {
        long at = (long)head->e_phoff + (long)i * (long)sizeof phdr;

        if (syscall(SYS_pread64, fd, &phdr, sizeof phdr, at) != sizeof phdr)
            return NULL;
        if (phdr.p_type != PT_INTERP)
            continue;
        if (syscall(SYS_pread64, fd, loader, sizeof loader - 1, phdr.p_offset) <= 0)
            return NULL;
        return strstr(loader, "musl") ? "is linked with another C library (musl)" : NULL;
    }
    return "is statically linked";
}

static const char *unfit_file(int fd, int depth)
{
    union {
        Elf64_Ehdr elf;
        char text[256];
    } head;
    struct stat st;
    long n = syscall(SYS_pread64, fd, &head, sizeof head, 0);

    if (n < 4 || !raw_fstat(fd, &st))
        return NULL;
    if (!memcmp(head.text, "#!", 2))
        return unfit_script(head.text, (size_t)n, depth);
    if ((st.st_mode & S_ISUID && st.st_uid != getuid()) ||
        (st.st_mode & S_ISGID && st.st_gid != getgid()))
        return "is setuid or setgid";
    if (n < (long)sizeof head.elf || memcmp(head.elf.e_ident, ELFMAG, SELFMAG))
        return NULL;
    return unfit_elf(fd, &head.elf);
}

/* Why LD_PRELOAD does not work with a program; NULL when it does, or when there is no program. */
static const char *unfit(const char *path, int depth)
{
    int fd = (int)syscall(SYS_openat, AT_FDCWD, path, O_RDONLY | O_CLOEXEC);
    const char *why;

    if (fd < 0)
        return errno == EACCES ? "cannot be read, so that nobody knows if it is linked dynamically"
                               : NULL;
    why = unfit_file(fd, depth);
    syscall(SYS_close, fd);
    return why;
}

static bool may_run(const char *path)
{
    int error = errno;
    const char *why;

    inside++;
    why = path && sees_real_device() ? unfit(path, 0) : NULL;
    if (why) {
        char line[PATH_MAX + 128];

        snprintf(line, sizeof line, "not run: it %s, and would use the real " DEVICE, why);
        complain(path, line);
    }
    inside--;
    errno = why ? EACCES : error;
    return !why;
}

/* How much room child_environment() needs, in pointers and in characters. */
static size_t count(char *const *list)
{
    size_t n = 0;

    while (list && list[n])
        n++;
    return n;
}

static size_t preload_size(char *const *environment)
{
    size_t size = sizeof "LD_PRELOAD=" + strlen(library) + 1;

    for (size_t i = 0; environment && environment[i]; i++)
        if (has_name(environment[i], "LD_PRELOAD", 10))
            size += strlen(environment[i]);
    return size;
}

/* Fills in `out` with the environment and what the library needs. */
static void child_environment(char *const *environment, char **out, char *preload)
{
    size_t n = 0;
    const char *others = "";

    for (size_t i = 0; environment && environment[i]; i++) {
        if (has_name(environment[i], "LD_PRELOAD", 10))
            others = environment[i] + 11;
        else
            out[n++] = environment[i];
    }
    if (strstr(others, library))
        sprintf(preload, "LD_PRELOAD=%s", others);
    else
        sprintf(preload, "LD_PRELOAD=%s%s%s", library, *others ? ":" : "", others);
    out[n++] = preload;
    for (int k = 0; k < nr_kept; k++) {
        size_t length = strcspn(kept[k], "="), i = 0;

        while (i < n && !has_name(out[i], kept[k], length))
            i++;
        if (i == n)
            out[n++] = kept[k];
    }
    out[n] = NULL;
}

#define CHILD_ENVIRONMENT(name, environment)                                                       \
    char *name[count(environment) + MAX_KEPT + 2];                                                 \
    char preload_of_##name[preload_size(environment)];                                             \
    child_environment(environment, name, preload_of_##name)

/* The file that a name without a slash means: first in PATH that can be executed. */
static const char *in_path(const char *file, char *buffer, size_t size)
{
    const char *path = getenv("PATH");
    struct stat st;

    if (!file || strchr(file, '/'))
        return file;
    for (path = path ? path : "/bin:/usr/bin"; *path; path += *path == ':') {
        size_t length = strcspn(path, ":");
        int n = snprintf(buffer, size, "%.*s%s%s", (int)length, path, length ? "/" : "", file);

        path += length;
        if (n > 0 && (size_t)n < size && syscall(SYS_faccessat, AT_FDCWD, buffer, X_OK) == 0 &&
            syscall(SYS_stat, buffer, &st) == 0 && S_ISREG(st.st_mode))
            return buffer;
    }
    return NULL;
}

static bool may_run_by_name(const char *file)
{
    char buffer[PATH_MAX];

    return may_run(in_path(file, buffer, sizeof buffer));
}

EXPORT int execve(const char *path, char *const argv[], char *const envp[])
{
    CHILD_ENVIRONMENT(env, envp);

    if (inside)
        return REAL(execve)(path, argv, envp);
    return may_run(path) ? REAL(execve)(path, argv, env) : -1;
}

EXPORT int execv(const char *path, char *const argv[]) { return execve(path, argv, environ); }

EXPORT int execvpe(const char *file, char *const argv[], char *const envp[])
{
    CHILD_ENVIRONMENT(env, envp);

    return may_run_by_name(file) ? REAL(execvpe)(file, argv, env) : -1;
}

EXPORT int execvp(const char *file, char *const argv[]) { return execvpe(file, argv, environ); }

EXPORT int fexecve(int fd, char *const argv[], char *const envp[])
{
    CHILD_ENVIRONMENT(env, envp);
    char path[32];

    snprintf(path, sizeof path, "/proc/self/fd/%d", fd);
    return may_run(path) ? REAL(fexecve)(fd, argv, env) : -1;
}

EXPORT int execveat(int dir, const char *path, char *const argv[], char *const envp[], int flags)
{
    CHILD_ENVIRONMENT(env, envp);
    char full[PATH_MAX + 32];

    if (*path == '/' || dir == AT_FDCWD)
        snprintf(full, sizeof full, "%s", path);
    else
        snprintf(full, sizeof full, "/proc/self/fd/%d%s%s", dir, *path ? "/" : "", path);
    return may_run(full) ? REAL(execveat)(dir, path, argv, env, flags) : -1;
}

/* The variadic ones.  `size` counts the arguments up to and with the NULL. */
#define COLLECT(argv, first, ap)                                                                   \
    va_list counting_;                                                                             \
    size_t size_ = 1;                                                                              \
    va_copy(counting_, ap);                                                                        \
    for (const char *a_ = first; a_; a_ = va_arg(counting_, const char *))                         \
        size_++;                                                                                   \
    va_end(counting_);                                                                             \
    char *argv[size_];                                                                             \
    argv[0] = (char *)(uintptr_t)first;                                                            \
    for (size_t i_ = 1; i_ < size_; i_++)                                                          \
    argv[i_] = va_arg(ap, char *)

EXPORT int execl(const char *path, const char *arg, ...)
{
    va_list ap;
    int result;

    va_start(ap, arg);
    COLLECT(argv, arg, ap);
    result = execve(path, argv, environ);
    va_end(ap);
    return result;
}

EXPORT int execlp(const char *file, const char *arg, ...)
{
    va_list ap;
    int result;

    va_start(ap, arg);
    COLLECT(argv, arg, ap);
    result = execvpe(file, argv, environ);
    va_end(ap);
    return result;
}

EXPORT int execle(const char *path, const char *arg, ...)
{
    va_list ap;
    int result;

    va_start(ap, arg);
    COLLECT(argv, arg, ap);
    result = execve(path, argv, va_arg(ap, char *const *));
    va_end(ap);
    return result;
}

EXPORT int posix_spawn(pid_t *pid, const char *path, const posix_spawn_file_actions_t *actions,
                       const posix_spawnattr_t *attributes, char *const argv[], char *const envp[])
{
    CHILD_ENVIRONMENT(env, envp);

    return may_run(path) ? REAL(posix_spawn)(pid, path, actions, attributes, argv, env) : EACCES;
}

EXPORT int posix_spawnp(pid_t *pid, const char *file, const posix_spawn_file_actions_t *actions,
                        const posix_spawnattr_t *attributes, char *const argv[], char *const envp[])
{
    CHILD_ENVIRONMENT(env, envp);

    return may_run_by_name(file) ? REAL(posix_spawnp)(pid, file, actions, attributes, argv, env)
                                 : EACCES;
}

/* libc starts the shell of these without us: what the program took out of its environment has to be
 * there again. */
static void mend_environment(void)
{
    const char *preload = getenv("LD_PRELOAD");

    if (!preload || !strstr(preload, library)) {
        size_t size = strlen(library) + (preload ? strlen(preload) : 0) + 2;
        char with_ours[size];

        snprintf(with_ours, size, "%s%s%s", library, preload ? ":" : "", preload ? preload : "");
        setenv("LD_PRELOAD", with_ours, 1);
    }
    for (int k = 0; k < nr_kept; k++) {
        size_t length = strcspn(kept[k], "=");
        char name[length + 1];

        memcpy(name, kept[k], length);
        name[length] = 0;
        setenv(name, kept[k] + length + 1, 0);
    }
}

EXPORT int system(const char *command)
{
    mend_environment();
    return REAL(system)(command);
}

EXPORT FILE *popen(const char *command, const char *mode)
{
    mend_environment();
    return REAL(popen)(command, mode);
}

EXPORT int wordexp(const char *restrict words, wordexp_t *restrict result, int flags)
{
    if (!(flags & WRDE_NOCMD))
        mend_environment();
    return REAL(wordexp)(words, result, flags);
}

/* ---- loading ------------------------------------------------------------------------------------------- */

__attribute__((constructor)) static void loaded(void)
{
    Dl_info info;

    if (dladdr(&api, &info) && info.dli_fname)
        snprintf(library, sizeof library, "%s", info.dli_fname);
    for (char **entry = environ; *entry && nr_kept < MAX_KEPT; entry++)
        if (!strncmp(*entry, ENV_PREFIX, sizeof ENV_PREFIX - 1) && (kept[nr_kept] = strdup(*entry)))
            nr_kept++;
    /* Looked up now: a vfork() child must not. */
    (void)REAL(execve);
    (void)REAL(execvpe);
    (void)REAL(fexecve);
    (void)REAL(execveat);
    (void)REAL(posix_spawn);
    (void)REAL(posix_spawnp);
    (void)REAL(dup2);
    (void)REAL(fcntl);
    pthread_atfork(NULL, NULL, after_fork_in_child);
}
