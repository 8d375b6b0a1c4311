"""Small C clients under `pykvm exec`: what the preload library stands before, and what it refuses."""

from __future__ import annotations

import os
import re
import stat
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from pykvm.preload import doctor, launcher

pytestmark = pytest.mark.skipif(
    bool(doctor.installation_problems()), reason=str(doctor.installation_problems())
)
REAL = Path("/dev/kvm").exists()
EXEC = [sys.executable, "-m", "pykvm", "exec"]

HEAD = """
#define _GNU_SOURCE
#include <errno.h>
#include <fcntl.h>
#include <linux/kvm.h>
#include <pthread.h>
#include <setjmp.h>
#include <signal.h>
#include <spawn.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/ioctl.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <sys/syscall.h>
#include <sys/sysmacros.h>
#include <sys/time.h>
#include <sys/wait.h>
#include <unistd.h>
#define CHECK(what) ((what) ? (void)0 : failed(__LINE__, #what))
#define FAILS(call, number) CHECK((errno = 0, (long)(call) == -1 && errno == (number)))
static void failed(int line, const char *what)
{
    printf("line %d: %s: %s\\n", line, what, strerror(errno));
    exit(1);
}
static int device(void) { int fd = open("/dev/kvm", O_RDWR | O_CLOEXEC); CHECK(fd >= 0); return fd; }
static int is_fake(int fd)
{
    char path[64], target[64] = "";
    sprintf(path, "/proc/self/fd/%d", fd);
    if (fd < 0 || readlink(path, target, 63) < 0) return 0;
    return strstr(target, "memfd:kvm") && ioctl(fd, KVM_GET_API_VERSION, 0) == 12;
}
"""

Compile = Callable[..., Path]


@pytest.fixture
def compile_c(tmp_path: Path) -> Compile:
    """Compile the body of main(), or a whole file that has one."""

    def build(body: str, *flags: str, name: str = "client") -> Path:
        source = tmp_path / f"{name}.c"
        whole = "main(" in body
        source.write_text(HEAD + (body if whole else f"int main(void)\n{{\n{body}\nreturn 0;\n}}\n"))
        program = tmp_path / name
        subprocess.run(["cc", "-w", "-O1", "-o", program, source, "-pthread", *flags], check=True)
        return program

    return build


def execute(
    *command: str | os.PathLike[str],
    env: dict[str, str] | None = None,
    options: tuple[str, ...] = (),
    timeout: int = 60,
) -> subprocess.CompletedProcess[str]:
    line = [*EXEC, *options, "--", *command]
    return subprocess.run(line, capture_output=True, text=True, timeout=timeout, check=False, env=env)


def passes(*command: str | os.PathLike[str], options: tuple[str, ...] = ()) -> str:
    done = execute(*command, options=options)
    assert (done.returncode, done.stderr) == (0, ""), done.stdout + done.stderr
    return done.stdout


# ---- opening ---------------------------------------------------------------------------------------


def test_every_way_to_open_it(compile_c: Compile, tmp_path: Path) -> None:
    link = tmp_path / "link"
    link.symlink_to("/dev/kvm")
    by_link = f'CHECK(is_fake(open("{link}", O_RDWR)));' if REAL else ""
    passes(
        compile_c(
            f"""
            CHECK(is_fake(open("/dev/kvm", O_RDWR)));
            CHECK(is_fake(open("/dev/kvm", O_RDONLY)));
            CHECK(is_fake(open("/dev//./kvm", O_RDWR)));
            CHECK(is_fake(open64("/dev/kvm", O_RDWR | O_CLOEXEC)));
            CHECK(is_fake(openat(AT_FDCWD, "/dev/kvm", O_RDWR)));
            CHECK(is_fake(openat64(-1, "/dev/kvm", O_RDWR)));
            CHECK(is_fake(__open_2("/dev/kvm", O_RDWR)));
            CHECK(is_fake(__open64_2("/dev/kvm", O_RDWR)));
            CHECK(is_fake(creat("/dev/kvm", 0600)));
            CHECK(is_fake(syscall(SYS_open, "/dev/kvm", O_RDWR)));
            CHECK(is_fake(syscall(SYS_openat, AT_FDCWD, "/dev/kvm", O_RDWR)));
            CHECK(is_fake(fileno(fopen("/dev/kvm", "r+"))));
            CHECK(syscall(SYS_ioctl, device(), KVM_GET_API_VERSION, 0) == 12);
            {by_link}
            CHECK(!(fcntl(open("/dev/kvm", O_RDWR), F_GETFD) & FD_CLOEXEC));
            CHECK(fcntl(device(), F_GETFD) & FD_CLOEXEC);
            FAILS(open("/dev/kvm2", O_RDWR), ENOENT);
            FAILS(open((char *)8, O_RDWR), EFAULT);
            FAILS(syscall(SYS_openat, AT_FDCWD, -1L, O_RDWR), EFAULT);
            FAILS(open("/dev/kvm/x", O_RDWR), REALLY);
            int fd = open("/dev/null", O_RDWR); CHECK(fd >= 0 && write(fd, "x", 1) == 1);
            """,
            f"-DREALLY={'ENOTDIR' if REAL else 'ENOENT'}",
        )
    )


def test_what_it_looks_like(compile_c: Compile) -> None:
    passes(
        compile_c("""
            struct stat st; struct stat64 st64;
            int kvm = device(), vm = ioctl(kvm, KVM_CREATE_VM, 0), vcpu = ioctl(vm, KVM_CREATE_VCPU, 0);
            CHECK(stat("/dev/kvm", &st) == 0 && S_ISCHR(st.st_mode) && st.st_rdev == makedev(10, 232));
            CHECK(stat64("/dev/kvm", &st64) == 0 && lstat("/dev/kvm", &st) == 0);
            CHECK(fstatat(AT_FDCWD, "/dev/kvm", &st, 0) == 0 && minor(st.st_rdev) == 232);
            CHECK(fstat(kvm, &st) == 0 && S_ISCHR(st.st_mode) && st.st_rdev == makedev(10, 232));
            CHECK(access("/dev/kvm", R_OK | W_OK) == 0 && access("/dev/kvm", F_OK) == 0);
            CHECK(faccessat(AT_FDCWD, "/dev/kvm", R_OK, 0) == 0 && eaccess("/dev/kvm", R_OK) == 0);
            FAILS(access("/dev/kvm", X_OK), EACCES);
            int fds[3] = {kvm, vm, vcpu};
            char b[8];
            for (int i = 0; i < 3; i++) {
                FAILS(read(fds[i], b, 8), EINVAL);
                FAILS(write(fds[i], b, 8), EINVAL);
                CHECK(lseek(fds[i], 0, SEEK_CUR) == 0);
            }
            FAILS(mmap(0, 4096, PROT_READ, MAP_SHARED, kvm, 0), ENODEV);
            FAILS(mmap(0, 4096, PROT_READ, MAP_SHARED, vm, 0), ENODEV);
            FAILS(mmap(0, 4096, PROT_READ | PROT_EXEC, MAP_SHARED, vcpu, 0), EPERM);
            CHECK(mmap(0, 12288, PROT_READ | PROT_WRITE, MAP_SHARED, vcpu, 0) != MAP_FAILED);
            errno = 0; CHECK(!isatty(kvm) && errno == EINVAL);
            errno = 0; CHECK(!isatty(vm) && errno == ENOTTY);
            FAILS(ioctl(kvm, 0x5401, b), EINVAL);
            FAILS(ioctl(vm, 0x5401, b), ENOTTY);
            CHECK(ioctl(vm, FIOCLEX) == 0 && ioctl(vcpu, FIONCLEX) == 0);
            CHECK(!(fcntl(vcpu, F_GETFD) & FD_CLOEXEC));
            close(vcpu);
            int ends[2]; CHECK(pipe(ends) == 0 && ends[0] == vcpu);
            CHECK(write(ends[1], "x", 1) == 1 && read(ends[0], b, 1) == 1);
            FAILS(ioctl(ends[0], KVM_GET_API_VERSION, 0), ENOTTY);
            """)
    )


def test_no_descriptor_has_data(compile_c: Compile) -> None:
    """Answers of Linux 6.18, for the descriptors that ioctls returned and for duplicates of them."""
    passes(
        compile_c("""
            #include <sys/uio.h>
            static void look(int fd, int named)
            {
                char b[4];
                struct iovec v = {b, 4};
                FAILS(read(fd, b, 4), EINVAL);
                FAILS(write(fd, b, 4), EINVAL);
                FAILS(readv(fd, &v, 1), EINVAL);
                FAILS(writev(fd, &v, 1), EINVAL);
                FAILS(pread(fd, b, 4, 0), named);
                FAILS(pwrite(fd, b, 4, 0), named);
                FAILS(preadv(fd, &v, 1, 0), named);
                FAILS(pwritev64(fd, &v, 1, 0), named);
                FAILS(ftruncate(fd, 0), EINVAL);
                FAILS(fallocate(fd, 0, 0, 4096), ENODEV);
                FAILS(fsync(fd), EINVAL);
                FAILS(fcntl(fd, F_GET_SEALS), EINVAL);
                CHECK(lseek(fd, 5, SEEK_SET) == 0 && lseek64(fd, 0, SEEK_END) == 0);
                CHECK(named == EINVAL || fcntl(fd, F_GETFL) == O_RDWR);
            }
            static void look_at_copies(int fd, int named)
            {
                look(fd, named);
                look(dup(fd), named);
                look(dup2(fd, 100), named);
                look(dup3(fd, 101, O_CLOEXEC), named);
                look(fcntl(fd, F_DUPFD_CLOEXEC, 102), named);
            }
            int main(void)
            {
                int kvm = device(), vm = ioctl(kvm, KVM_CREATE_VM, 0), vcpu = ioctl(vm, KVM_CREATE_VCPU, 0);
                look_at_copies(kvm, EINVAL);
                look_at_copies(vm, ESPIPE);
                look_at_copies(vcpu, ESPIPE);
                FAILS(mmap(NULL, 4096, PROT_READ, MAP_SHARED, dup(vm), 0), ENODEV);
                /* The number is another file's by now. */
                int ends[2];
                CHECK(pipe(ends) == 0 && dup2(ends[1], vcpu) == vcpu);
                CHECK(write(vcpu, "x", 1) == 1 && ioctl(vcpu, KVM_RUN, 0) == -1);
                return 0;
            }
            """)
    )


def test_descriptors_are_closed_all_at_once(compile_c: Compile) -> None:
    """As a daemon does: its own, and with those it does not know pykvm's."""
    passes(
        compile_c("""
            int kvm = device(), vm = ioctl(kvm, KVM_CREATE_VM, 0), vcpu = ioctl(vm, KVM_CREATE_VCPU, 0);
            struct kvm_regs regs;
            for (int fd = 3; fd < 2000; fd++)
                if (fd != kvm && fd != vm && fd != vcpu) close(fd);
            CHECK(ioctl(vcpu, KVM_GET_REGS, &regs) == 0 && ioctl(vm, KVM_CREATE_VCPU, 1) >= 0);
            CHECK(syscall(SYS_close_range, 3, ~0U, 0) == 0);
            FAILS(ioctl(vcpu, KVM_GET_REGS, &regs), EBADF);
            for (int i = 0; i < 3; i++) {
                vm = ioctl(device(), KVM_CREATE_VM, 0);
                CHECK(ioctl(ioctl(vm, KVM_CREATE_VCPU, 0), KVM_GET_REGS, &regs) == 0);
                closefrom(3);
            }
            """)
    )


@pytest.mark.spec("fd.nr_reuse")
def test_a_request_passed_through_int_arrives_sign_extended(compile_c: Compile) -> None:
    passes(
        compile_c("""
            int request = KVM_GET_SUPPORTED_CPUID;
            struct { struct kvm_cpuid2 head; struct kvm_cpuid_entry2 entry[256]; } c = {.head.nent = 256};
            CHECK(request < 0);
            CHECK(ioctl(device(), request, &c) == 0 && c.head.nent > 5);
            """)
    )


def test_errno_of_a_call_that_works_is_left_alone(compile_c: Compile) -> None:
    passes(
        compile_c("errno = 77; int kvm = device(); ioctl(kvm, KVM_GET_API_VERSION, 0); CHECK(errno == 77);")
    )


# ---- processes and threads ----------------------------------------------------------------------------


@pytest.mark.spec("fd.mm_owner")
def test_fork(compile_c: Compile) -> None:
    passes(
        compile_c("""
            int kvm = device(), vm = ioctl(kvm, KVM_CREATE_VM, 0), status;
            int vcpu = ioctl(vm, KVM_CREATE_VCPU, 0);
            for (int i = 0; i < 3; i++) {
                if (!fork()) {
                    struct kvm_regs regs;
                    FAILS(ioctl(vm, KVM_CREATE_VCPU, 1), EIO);
                    FAILS(ioctl(vcpu, KVM_GET_REGS, &regs), EIO);
                    CHECK(ioctl(kvm, KVM_CHECK_EXTENSION, KVM_CAP_USER_MEMORY) == 1);
                    int mine = ioctl(kvm, KVM_CREATE_VM, 0);
                    CHECK(mine >= 0 && ioctl(mine, KVM_CREATE_VCPU, 0) >= 0);
                    CHECK(ioctl(ioctl(device(), KVM_CREATE_VM, 0), KVM_CREATE_VCPU, 0) >= 0);
                    exit(0);
                }
                CHECK(wait(&status) > 0 && status == 0);
            }
            CHECK(ioctl(vm, KVM_CREATE_VCPU, 1) >= 0);
            """)
    )


@pytest.mark.spec("fd.mm_owner")
def test_fork_and_vfork_by_their_system_calls(compile_c: Compile) -> None:
    """libc's fork handlers do not run in the first; the second's child has the same memory."""
    passes(
        compile_c("""
            int kvm = device(), vm = ioctl(kvm, KVM_CREATE_VM, 0), status;
            int vcpu = ioctl(vm, KVM_CREATE_VCPU, 0);
            struct kvm_regs regs;
            if (!syscall(SYS_fork)) {
                FAILS(ioctl(vcpu, KVM_GET_REGS, &regs), EIO);
                FAILS(ioctl(vm, KVM_CREATE_VCPU, 1), EIO);
                /* Not as Linux. */
                FAILS(open("/dev/kvm", O_RDWR), EIO);
                _exit(0);
            }
            CHECK(wait(&status) > 0 && status == 0);
            if (!vfork()) _exit(ioctl(vcpu, KVM_GET_REGS, &regs));
            CHECK(wait(&status) > 0 && status == 0);
            CHECK(ioctl(vm, KVM_CREATE_VCPU, 1) >= 0);
            """)
    )


def test_fork_while_other_threads_are_inside(compile_c: Compile) -> None:
    passes(
        compile_c("""
            static volatile int stop;
            static void *busy(void *arg)
            {
                int kvm = *(int *)arg;
                while (!stop) { int vm = ioctl(kvm, KVM_CREATE_VM, 0); CHECK(vm >= 0); close(vm); }
                return NULL;
            }
            int main(void)
            {
                int kvm = device(), status;
                pthread_t threads[3];
                for (int i = 0; i < 3; i++) pthread_create(&threads[i], NULL, busy, &kvm);
                for (int i = 0; i < 10; i++) {
                    if (!fork()) {
                        CHECK(ioctl(ioctl(kvm, KVM_CREATE_VM, 0), KVM_CREATE_VCPU, 0) >= 0);
                        _exit(0);
                    }
                    CHECK(wait(&status) > 0 && status == 0);
                }
                stop = 1;
                for (int i = 0; i < 3; i++) pthread_join(threads[i], NULL);
                return 0;
            }
            """)
    )


def test_any_thread_may_be_first_and_many_may_call(compile_c: Compile) -> None:
    passes(
        compile_c("""
            static int sum[8];
            static void *work(void *arg)
            {
                int *mine = arg, kvm = device(), vm = ioctl(kvm, KVM_CREATE_VM, 0);
                for (int i = 0; i < 200; i++) *mine += ioctl(vm, KVM_CHECK_EXTENSION, KVM_CAP_USER_MEMORY);
                CHECK(ioctl(vm, KVM_CREATE_VCPU, 0) >= 0);
                return NULL;
            }
            int main(void)
            {
                pthread_t threads[8];
                for (int i = 0; i < 8; i++) pthread_create(&threads[i], NULL, work, &sum[i]);
                for (int i = 0; i < 8; i++) { pthread_join(threads[i], NULL); CHECK(sum[i] == 200); }
                return 0;
            }
            """)
    )


def test_handlers_wait_until_the_call_is_over(compile_c: Compile) -> None:
    """A handler may call ioctl, fork and leave by siglongjmp: it never interrupts the interpreter."""
    passes(
        compile_c("""
            static int kvm, count, forked;
            static sigjmp_buf back;
            static void on_alarm(int sig)
            {
                int status;
                CHECK(ioctl(kvm, KVM_GET_API_VERSION, 0) == 12);
                if (++count % 16 == 0) { if (!fork()) _exit(0); CHECK(wait(&status) > 0); forked++; }
                if (count % 3 == 0) siglongjmp(back, 1);
            }
            int main(void)
            {
                struct itimerval timer = {{0, 700}, {0, 700}};
                kvm = device();
                signal(SIGALRM, on_alarm);
                setitimer(ITIMER_REAL, &timer, NULL);
                sigsetjmp(back, 1);
                while (count < 300) CHECK(ioctl(kvm, KVM_CHECK_EXTENSION, KVM_CAP_USER_MEMORY) == 1);
                CHECK(forked > 3);
                return 0;
            }
            """)
    )


def test_no_handler_is_installed_and_ctrl_c_ends_the_program(compile_c: Compile) -> None:
    program = compile_c("""
        struct sigaction action;
        device();
        CHECK(sigaction(SIGINT, NULL, &action) == 0 && action.sa_handler == SIG_DFL);
        CHECK(sigaction(SIGPIPE, NULL, &action) == 0 && action.sa_handler == SIG_DFL);
        raise(SIGINT);
        """)
    assert execute(program).returncode == -2


def test_a_cancelled_thread_does_not_take_the_interpreter_along(compile_c: Compile) -> None:
    passes(
        compile_c("""
            static void *work(void *arg)
            {
                int kvm = *(int *)arg;
                for (;;) { ioctl(kvm, KVM_CHECK_EXTENSION, KVM_CAP_USER_MEMORY); pthread_testcancel(); }
            }
            int main(void)
            {
                int kvm = device();
                for (int i = 0; i < 50; i++) {
                    pthread_t thread;
                    pthread_create(&thread, NULL, work, &kvm);
                    usleep(500);
                    pthread_cancel(thread);
                    pthread_join(thread, NULL);
                }
                CHECK(ioctl(kvm, KVM_GET_API_VERSION, 0) == 12);
                return 0;
            }
            """)
    )


# ---- guests and the memory behind them -----------------------------------------------------------------

GUEST = """
static int kvm, vm, vcpu;
static struct kvm_run *run;
static uint8_t *memory;
/* Real mode: code at 0x1000, 64 KiB of memory at address 0. */
static void guest(const void *code, size_t size)
{
    struct kvm_sregs sregs;
    struct kvm_regs regs = {.rip = 0x1000, .rflags = 2};
    kvm = device();
    vm = ioctl(kvm, KVM_CREATE_VM, 0);
    memory = mmap(NULL, 0x10000, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    memcpy(memory + 0x1000, code, size);
    struct kvm_userspace_memory_region region = {.memory_size = 0x10000, .userspace_addr = (long)memory};
    CHECK(ioctl(vm, KVM_SET_USER_MEMORY_REGION, &region) == 0);
    vcpu = ioctl(vm, KVM_CREATE_VCPU, 0);
    run = mmap(NULL, 12288, PROT_READ | PROT_WRITE, MAP_SHARED, vcpu, 0);
    CHECK(run != MAP_FAILED && ioctl(vcpu, KVM_GET_SREGS, &sregs) == 0);
    sregs.cs.base = sregs.cs.selector = 0;
    CHECK(ioctl(vcpu, KVM_SET_SREGS, &sregs) == 0 && ioctl(vcpu, KVM_SET_REGS, &regs) == 0);
}
static int out(void)
{
    int result = ioctl(vcpu, KVM_RUN, 0);
    CHECK(result == 0 && run->exit_reason == KVM_EXIT_IO);
    return *((uint8_t *)run + run->io.data_offset);
}
static struct kvm_regs get_regs(void)
{
    struct kvm_regs regs;
    CHECK(ioctl(vcpu, KVM_GET_REGS, &regs) == 0);
    return regs;
}
#define MOVE (MREMAP_MAYMOVE | MREMAP_FIXED)
#define GUEST(...) static const uint8_t code[] = {__VA_ARGS__}; guest(code, sizeof code)
/* again: mov al, [0x5000]; inc byte [0x6000]; out 0x10, al; jmp again */
#define READ_AND_OUT 0xa0, 0x00, 0x50, 0xfe, 0x06, 0x00, 0x60, 0xe6, 0x10, 0xeb, 0xf5
"""


@pytest.mark.spec("vm.memslot_sync")
def test_the_guest_sees_what_becomes_of_its_memory(compile_c: Compile) -> None:
    passes(
        compile_c(
            GUEST
            + """
            int main(void)
            {
                int flags = MAP_PRIVATE | MAP_ANONYMOUS, rw = PROT_READ | PROT_WRITE;
                GUEST(READ_AND_OUT);
                memory[0x5000] = 7;
                CHECK(out() == 7 && memory[0x6000] == 1);
                /* Something else in the same place. */
                CHECK(mmap(memory + 0x5000, 4096, rw, flags | MAP_FIXED, -1, 0) == memory + 0x5000);
                CHECK(out() == 0 && memory[0x6000] == 2);
                uint8_t *other = mmap(NULL, 4096, rw, flags, -1, 0);
                other[0] = 9;
                CHECK(mremap(other, 4096, 4096, MOVE, memory + 0x5000) != MAP_FAILED);
                CHECK(out() == 9);
                CHECK(madvise(memory + 0x5000, 4096, MADV_DONTNEED) == 0 && out() == 0);
                /* Readable only: reads work, the write is EFAULT, and once mended the guest goes on. */
                CHECK(mprotect(memory + 0x6000, 4096, PROT_READ) == 0);
                CHECK(memory[0x6000] == 4);
                FAILS(ioctl(vcpu, KVM_RUN, 0), EFAULT);
                FAILS(ioctl(vcpu, KVM_RUN, 0), EFAULT);
                CHECK(mprotect(memory + 0x6000, 4096, rw) == 0);
                CHECK(out() == 0 && memory[0x6000] == 5);
                CHECK(munmap(memory + 0x5000, 4096) == 0);
                FAILS(ioctl(vcpu, KVM_RUN, 0), EFAULT);
                CHECK(mmap(memory + 0x5000, 4096, rw, flags | MAP_FIXED, -1, 0) == memory + 0x5000);
                CHECK(out() == 0);
                CHECK(munmap(memory, 0x10000) == 0);
                FAILS(ioctl(vcpu, KVM_RUN, 0), EFAULT);
                return 0;
            }
            """
        )
    )


def test_kvm_run_may_be_mapped_twice_or_not_at_all(compile_c: Compile) -> None:
    passes(
        compile_c(
            GUEST
            + """
            int main(void)
            {
                GUEST(READ_AND_OUT);
                struct kvm_run *second = mmap(NULL, 4096, PROT_READ | PROT_WRITE, MAP_SHARED, dup(vcpu), 0);
                out();
                CHECK(second->exit_reason == KVM_EXIT_IO && second->io.port == 0x10);
                munmap(run, 12288);
                munmap(second, 4096);
                CHECK(ioctl(vcpu, KVM_RUN, 0) == 0);
                run = mmap(NULL, 12288, PROT_READ | PROT_WRITE, MAP_SHARED, vcpu, 0);
                out();
                CHECK(memory[0x6000] == 3);
                return 0;
            }
            """
        )
    )


def test_vcpu_threads_come_and_go(compile_c: Compile) -> None:
    """Each with little stack; the main one first, and last of all the process in the middle of KVM_RUN."""
    program = compile_c(
        GUEST
        + """
        static void *once(void *arg) { out(); return NULL; }
        static void *forever(void *arg)
        {
            /* jmp . */
            memory[0x1000] = 0xeb; memory[0x1001] = 0xfe;
            struct kvm_regs regs = {.rip = 0x1000, .rflags = 2};
            CHECK(ioctl(vcpu, KVM_SET_REGS, &regs) == 0);
            ioctl(vcpu, KVM_RUN, 0);
            return NULL;
        }
        static void *rest(void *arg)
        {
            pthread_attr_t small;
            pthread_t thread;
            pthread_attr_init(&small);
            CHECK(pthread_attr_setstacksize(&small, 32768) == 0);
            for (int i = 0; i < 20; i++) {
                CHECK(pthread_create(&thread, &small, once, NULL) == 0);
                pthread_join(thread, NULL);
            }
            CHECK(memory[0x6000] == 20);
            CHECK(ioctl(ioctl(device(), KVM_CREATE_VM, 0), KVM_CREATE_VCPU, 0) >= 0);
            CHECK(pthread_create(&thread, NULL, forever, NULL) == 0);
            usleep(50000);
            exit(7);
        }
        int main(void)
        {
            pthread_t thread;
            GUEST(READ_AND_OUT);
            CHECK(pthread_create(&thread, NULL, rest, NULL) == 0);
            pthread_exit(NULL);
        }
        """
    )
    assert execute(program).returncode == 7


@pytest.mark.spec("vm.memslot_sync")
def test_code_that_is_mapped_away_is_not_run_any_more(compile_c: Compile) -> None:
    passes(
        compile_c(
            GUEST
            + """
            int main(void)
            {
                static const uint8_t other[] = {0xb0, 0x22, 0xe6, 0x10, 0xeb, 0xfa}; /* al = 0x22 */
                GUEST(0xb0, 0x11, 0xe6, 0x10, 0xeb, 0xfa);
                CHECK(out() == 0x11 && out() == 0x11);
                int rw = PROT_READ | PROT_WRITE;
                uint8_t *page = mmap(NULL, 4096, rw, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
                memcpy(page, other, sizeof other);
                CHECK(mremap(page, 4096, 4096, MOVE, memory + 0x1000) != MAP_FAILED);
                out();
                CHECK(out() == 0x22);
                return 0;
            }
            """
        )
    )


def test_memory_goes_away_while_the_guest_runs(compile_c: Compile) -> None:
    passes(
        compile_c(
            GUEST
            + """
            static volatile int result, number;
            static void *work(void *arg) { result = ioctl(vcpu, KVM_RUN, 0); number = errno; return NULL; }
            int main(void)
            {
                pthread_t thread;
                for (int i = 0; i < 5; i++) {
                    GUEST(0xfe, 0x06, 0x00, 0x50, 0xeb, 0xfa); /* again: inc byte [0x5000]; jmp again */
                    CHECK(pthread_create(&thread, NULL, work, NULL) == 0);
                    while (!((volatile uint8_t *)memory)[0x5000]) ;
                    CHECK(munmap(memory + (i % 2 ? 0x5000 : 0), i % 2 ? 4096 : 0x10000) == 0);
                    pthread_join(thread, NULL);
                    CHECK(result == -1 && number == EFAULT);
                }
                return 0;
            }
            """
        )
    )


def test_the_program_keeps_its_own_fault_handlers(compile_c: Compile) -> None:
    passes(
        compile_c(
            GUEST
            + """
            static sigjmp_buf back;
            static int faults;
            static void on_fault(int sig, siginfo_t *info, void *context) { faults++; siglongjmp(back, 1); }
            static void other(int sig) { faults += 10; siglongjmp(back, 1); }
            int main(void)
            {
                struct sigaction action = {.sa_sigaction = on_fault, .sa_flags = SA_SIGINFO}, old;
                GUEST(READ_AND_OUT);
                CHECK(sigaction(SIGSEGV, NULL, &old) == 0 && old.sa_handler == SIG_DFL);
                CHECK(sigaction(SIGSEGV, &action, &old) == 0 && old.sa_handler == SIG_DFL);
                CHECK(sigaction(SIGSEGV, NULL, &old) == 0 && old.sa_sigaction == on_fault);
                if (!sigsetjmp(back, 1)) *(volatile int *)0x123456 = 1;
                CHECK(faults == 1);
                out();
                CHECK(munmap(memory + 0x5000, 4096) == 0);
                FAILS(ioctl(vcpu, KVM_RUN, 0), EFAULT);
                CHECK(faults == 1);
                CHECK(signal(SIGSEGV, other) == (void *)on_fault);
                if (!sigsetjmp(back, 1)) *(volatile int *)0x123456 = 1;
                CHECK(faults == 11);
                FAILS(ioctl(vcpu, KVM_RUN, 0), EFAULT);
                CHECK(signal(SIGSEGV, SIG_DFL) == other);
                pid_t pid = fork();
                int status;
                if (!pid) *(volatile int *)0x123456 = 1;
                CHECK(waitpid(pid, &status, 0) == pid && WIFSIGNALED(status) && WTERMSIG(status) == SIGSEGV);
                return 0;
            }
            """
        )
    )


@pytest.mark.spec("run.eintr")
def test_a_signal_ends_kvm_run_before_its_handler_returns(compile_c: Compile) -> None:
    passes(
        compile_c(
            GUEST
            + """
            static volatile int handled;
            static void on_alarm(int sig)
            {
                struct kvm_regs regs;
                handled++;
                CHECK(ioctl(vcpu, KVM_GET_REGS, &regs) == 0); /* the vCPU is out: this does not hang */
            }
            int main(void)
            {
                struct itimerval timer = {{0, 0}, {0, 20000}};
                signal(SIGALRM, on_alarm);
                GUEST(0xeb, 0xfe); /* jmp $ */
                setitimer(ITIMER_REAL, &timer, NULL);
                FAILS(ioctl(vcpu, KVM_RUN, 0), EINTR);
                CHECK(handled == 1 && run->exit_reason == KVM_EXIT_INTR);
                return 0;
            }
            """
        )
    )


@pytest.mark.spec("run.eintr")
def test_a_signal_for_the_process_ends_the_main_threads_kvm_run(compile_c: Compile) -> None:
    """As on Linux, which gives it to the main thread though others would take it."""
    passes(
        compile_c(
            GUEST
            + """
            static siginfo_t last;
            static int handled_by, handled;
            static void handler(int signal, siginfo_t *info, void *context)
            {
                last = *info;
                handled_by = syscall(SYS_gettid);
                handled++;
            }
            static void plain(int signal) { handled_by = syscall(SYS_gettid); handled++; }
            static void *sends(void *arg)
            {
                usleep(100000);
                /* For this thread only: the guest runs on. */
                pthread_kill(pthread_self(), SIGUSR2);
                CHECK(handled == 1 && handled_by == syscall(SYS_gettid) && last.si_code == SI_TKILL);
                usleep(50000);
                kill(getpid(), SIGUSR1);
                return NULL;
            }
            int main(void)
            {
                pthread_t thread;
                struct sigaction action = {.sa_sigaction = handler, .sa_flags = SA_SIGINFO}, old;
                sigaction(SIGUSR1, &action, NULL);
                GUEST(0xeb, 0xfe);
                run->immediate_exit = 1;
                FAILS(ioctl(vcpu, KVM_RUN, 0), EINTR);
                run->immediate_exit = 0;
                CHECK(sigaction(SIGUSR2, &action, &old) == 0 && old.sa_handler == SIG_DFL);
                CHECK(sigaction(SIGUSR1, NULL, &old) == 0 && old.sa_sigaction == handler);
                CHECK(old.sa_flags & SA_SIGINFO);
                pthread_create(&thread, NULL, sends, NULL);
                FAILS(ioctl(vcpu, KVM_RUN, 0), EINTR);
                CHECK(handled == 2 && handled_by == getpid());
                CHECK(last.si_signo == SIGUSR1 && last.si_code == SI_USER && last.si_pid == getpid());
                pthread_join(thread, NULL);

                CHECK(signal(SIGALRM, plain) == SIG_DFL && signal(SIGALRM, plain) == plain);
                CHECK(sigaction(SIGALRM, NULL, &old) == 0 && !(old.sa_flags & SA_SIGINFO));
                pthread_create(&thread, NULL, (void *)pause, NULL);
                struct itimerval soon = {.it_value = {.tv_usec = 100000}};
                setitimer(ITIMER_REAL, &soon, NULL);
                FAILS(ioctl(vcpu, KVM_RUN, 0), EINTR);
                CHECK(handled == 3 && handled_by == getpid());
                return 0;
            }
            """
        )
    )


def test_two_vcpus_run_at_the_same_time(compile_c: Compile) -> None:
    passes(
        compile_c(
            GUEST
            + """
            #define WAIT(low) 0x80, 0x3e, low, 0x50, 0, 0x74, 0xf9
            #define INC(low) 0xfe, 0x06, low, 0x50
            static int vcpus[2];
            static void *work(void *arg) { return (void *)(long)ioctl(vcpus[(long)arg], KVM_RUN, 0); }
            int main(void)
            {
                /* vCPU 0 waits for 1 at [0x5000] and then writes [0x5001]; vCPU 1 the other way round. */
                static const uint8_t first[] = {WAIT(0x00), INC(0x01), 0xf4};
                static const uint8_t second[] = {INC(0x00), WAIT(0x01), 0xf4};
                struct kvm_sregs sregs;
                struct kvm_regs regs = {.rip = 0x2000, .rflags = 2};
                pthread_t threads[2];
                guest(first, sizeof first);
                memcpy(memory + 0x2000, second, sizeof second);
                vcpus[0] = vcpu;
                vcpus[1] = ioctl(vm, KVM_CREATE_VCPU, 1);
                CHECK(ioctl(vcpu, KVM_GET_SREGS, &sregs) == 0 && ioctl(vcpus[1], KVM_SET_SREGS, &sregs) == 0);
                CHECK(ioctl(vcpus[1], KVM_SET_REGS, &regs) == 0);
                for (long i = 0; i < 2; i++) pthread_create(&threads[i], NULL, work, (void *)i);
                for (int i = 0; i < 2; i++) { void *got; pthread_join(threads[i], &got); CHECK(got == NULL); }
                CHECK(run->exit_reason == KVM_EXIT_HLT && memory[0x5000] == 1 && memory[0x5001] == 1);
                return 0;
            }
            """
        )
    )


@pytest.mark.spec("fd.vcpu_mutex")
def test_another_threads_call_waits_until_kvm_run_is_over(compile_c: Compile) -> None:
    passes(
        compile_c(
            GUEST
            + """
            static volatile int waiting, got;
            static pthread_t runner;
            static void nothing(int sig) {}
            static void *other(void *arg)
            {
                while (!((volatile uint8_t *)memory)[0x5000]) ;
                waiting = 1;
                get_regs();
                got = 1;
                return NULL;
            }
            static void *kick(void *arg)
            {
                while (!waiting) usleep(1000);
                usleep(50000);
                CHECK(!got);
                pthread_kill(runner, SIGUSR1);
                return NULL;
            }
            int main(void)
            {
                struct sigaction action = {.sa_handler = nothing};
                pthread_t threads[2];
                sigaction(SIGUSR1, &action, NULL);
                GUEST(0xfe, 0x06, 0x00, 0x50, 0xeb, 0xfe); /* inc byte [0x5000]; jmp $ */
                runner = pthread_self();
                pthread_create(&threads[0], NULL, other, NULL);
                pthread_create(&threads[1], NULL, kick, NULL);
                if (ioctl(vcpu, KVM_RUN, 0) == 0) return 1;
                pthread_join(threads[0], NULL);
                pthread_join(threads[1], NULL);
                CHECK(got == 1);
                return 0;
            }
            """
        )
    )


# ---- children -------------------------------------------------------------------------------------------


@pytest.fixture
def child(compile_c: Compile) -> Path:
    return compile_c('CHECK(is_fake(open("/dev/kvm", O_RDWR))); puts("fake");', name="child")


def test_children_get_it_whatever_their_environment(compile_c: Compile, child: Path) -> None:
    program = compile_c(
        """
        extern char **environ;
        static const char *path;
        static char *args[2], *none[] = {NULL}, *some[] = {"LD_PRELOAD=", "A=B", NULL};
        static int shown(FILE *stream)
        {
            for (int c; (c = fgetc(stream)) != EOF;) putchar(c);
            fflush(stdout);
            return pclose(stream);
        }
        static void run(int way)
        {
            switch (way) {
            case 0: execve(path, args, none); break;
            case 1: execve(path, args, some); break;
            case 2: execv(path, args); break;
            case 3: execvp(path, args); break;
            case 4: execvpe(path, args, none); break;
            case 5: execl(path, path, NULL); break;
            case 6: execle(path, path, NULL, none); break;
            case 7: setenv("PATH", DIRECTORY, 1); execlp("child", "child", NULL); break;
            case 8: fexecve(open(path, O_RDONLY), args, none); break;
            case 9: execveat(AT_FDCWD, path, args, none, 0); break;
            case 10: clearenv(); execve(path, args, environ); break;
            case 11: exit(system(path));
            case 12: syscall(SYS_execve, path, args, none); break;
            case 13: execve(path, args, NULL); break;
            case 14: syscall(SYS_execveat, AT_FDCWD, path, args, none, 0); break;
            case 15: unsetenv("LD_PRELOAD"); exit(system(path));
            case 16: clearenv(); exit(system(path));
            case 17: environ = NULL; exit(shown(popen(path, "r")));
            }
            _exit(9);
        }
        int main(int argc, char **argv)
        {
            int status;
            pid_t pid;
            path = args[0] = argv[1];
            for (int way = 0; way < 18; way++) {
                if (!(pid = way % 2 && way < 14 ? vfork() : fork())) run(way);
                CHECK(waitpid(pid, &status, 0) == pid);
                if (status) printf("way %d: status %x\\n", way, status), exit(1);
            }
            CHECK(posix_spawn(&pid, path, NULL, NULL, args, none) == 0);
            CHECK(waitpid(pid, &status, 0) == pid && !status);
            CHECK(posix_spawnp(&pid, path, NULL, NULL, args, some) == 0);
            CHECK(waitpid(pid, &status, 0) == pid && !status);
            return 0;
        }
        """,
        f'-DDIRECTORY="{child.parent}"',
    )
    assert passes(program, child).count("fake\n") == 20


def test_a_grandchild_through_shells_and_env(child: Path) -> None:
    assert passes("/bin/sh", "-c", f"/usr/bin/env -i /bin/sh -c {child}") == "fake\n"


def test_the_environment_has_nothing_of_pythons() -> None:
    base = {"PATH": os.environ["PATH"], "MINE": "1"}
    done = execute("/usr/bin/env", env=base)
    names = {line.split("=")[0] for line in done.stdout.splitlines()}
    assert names == {*base, "LD_PRELOAD", "PYKVM_EXEC_HOME", "PYKVM_EXEC_PATH", "PYKVM_EXEC_EXTENSIONS"}


def test_python_variables_of_the_caller_do_not_matter(child: Path) -> None:
    env = {**os.environ, "PYTHONHOME": "/nonexistent", "PYTHONPATH": "/nonexistent"}
    env |= launcher.environment((), env)
    done = subprocess.run([child], capture_output=True, text=True, check=False, env=env)
    assert (done.stdout, done.stderr) == ("fake\n", "")


@pytest.mark.skipif(not REAL, reason="without a real /dev/kvm there is nothing to protect")
def test_a_child_that_cannot_have_it_is_not_run(compile_c: Compile) -> None:
    static = compile_c('puts("ran");', "-static", name="static")
    program = compile_c("""
        int main(int argc, char **argv)
        {
            pid_t pid;
            FAILS(execv(argv[1], argv + 1), EACCES);
            FAILS(execlp(argv[1], argv[1], NULL), EACCES);
            FAILS(syscall(SYS_execveat, AT_FDCWD, argv[1], argv + 1, NULL, 0), EACCES);
            CHECK(posix_spawn(&pid, argv[1], NULL, NULL, argv + 1, NULL) == EACCES);
            return 0;
        }
        """)
    done = execute(program, static)
    assert (done.returncode, done.stdout) == (0, "")
    lines = done.stderr.splitlines()
    assert len(lines) == 4
    assert set(lines) == {
        f"pykvm: {static}: not run: it is statically linked, and would use the real /dev/kvm"
    }
    script = static.with_name("script")
    script.write_text(f"#!{static}\n")
    script.chmod(0o755)
    done = execute(program, script)
    assert done.returncode == 0
    assert "statically linked" in done.stderr


# ---- doctor ------------------------------------------------------------------------------------------------


def not_started(program: Path | str, reason: str) -> None:
    done = execute(program)
    assert (done.returncode, done.stdout) == (2, "")
    assert len(done.stderr.splitlines()) == 1
    assert reason in done.stderr
    said = subprocess.run(
        [sys.executable, "-m", "pykvm", "doctor", program], capture_output=True, text=True, check=False
    )
    assert said.returncode == 1
    assert reason in said.stdout


def test_a_static_program_is_not_started(compile_c: Compile) -> None:
    not_started(compile_c('puts("ran");', "-static"), "statically linked")
    not_started(compile_c('puts("ran");', "-static-pie"), "statically linked")


def test_a_missing_or_strange_program_is_not_started(tmp_path: Path) -> None:
    not_started(tmp_path / "nothing", "there is no such program")
    file = tmp_path / "file"
    file.write_text("hello")
    not_started(file, "not executable")
    file.chmod(0o755)
    not_started(file, "not an ELF file")
    file.write_bytes(b"\x7fELF" + bytes(20))
    not_started(file, "damaged")
    not_started("no-such-program-anywhere", "there is no such program")


def test_a_program_for_another_machine_is_not_started(compile_c: Compile, tmp_path: Path) -> None:
    image = bytearray(compile_c("").read_bytes())
    other = tmp_path / "other"
    for at, value, reason in ((18, 183, "AArch64"), (18, 3, "i386"), (4, 1, "32-bit")):
        changed = bytearray(image)
        changed[at] = value
        other.write_bytes(changed)
        other.chmod(0o755)
        not_started(other, reason)


def test_a_program_of_another_libc_is_not_started(compile_c: Compile) -> None:
    not_started(compile_c('puts("ran");', "-Wl,--dynamic-linker=/lib/ld-musl-x86_64.so.1"), "musl")


@pytest.mark.skipif(os.getuid() != 0, reason="only root can make a program somebody else's")
def test_a_setuid_program_is_not_started(compile_c: Compile) -> None:
    program = compile_c('puts("ran");')
    os.chown(program, 12345, -1)
    program.chmod(program.stat().st_mode | stat.S_ISUID)
    not_started(program, "setuid")


def test_scripts_are_judged_by_their_interpreter(compile_c: Compile, child: Path, tmp_path: Path) -> None:
    script = tmp_path / "script"
    script.write_text(f"#!/bin/sh\n{child}\n")
    script.chmod(0o755)
    assert passes(script) == "fake\n"
    script.write_text(f"#!/usr/bin/env {child}\n")
    assert passes(script) == "fake\n"
    static = compile_c('puts("ran");', "-static", name="static")
    script.write_text(f"#!{static} x\n")
    not_started(script, "statically linked")
    script.write_text("#!/no/such/interpreter\n")
    not_started(script, "/no/such/interpreter does not exist")


def test_a_program_is_found_in_path(child: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", f"{child.parent}:{os.environ['PATH']}")
    assert passes("child") == "fake\n"


def test_status_arguments_and_streams_are_the_programs() -> None:
    done = subprocess.run(
        [*EXEC, "--", "/bin/sh", "-c", 'cat; echo "$0 $1"; exit 7', "--json", "-x"],
        input="in\n",
        capture_output=True,
        text=True,
        check=False,
    )
    assert (done.returncode, done.stdout) == (7, "in\n--json -x\n")


def test_an_unknown_extension_is_refused(child: Path) -> None:
    done = execute(child, options=("--extension", "nonsense"))
    assert (done.returncode, done.stdout) == (2, "")
    assert "no extension nonsense" in done.stderr


def test_missing_libraries_are_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(doctor, "EMBED", tmp_path / "libpykvm-embed.so")
    diagnosis = doctor.examine("/bin/sh")
    assert not diagnosis.ok
    assert "libpykvm-embed.so not built" in diagnosis.problems[0]
    monkeypatch.setattr("sysconfig.get_config_var", lambda _: 0)
    assert "no shared libpython" in doctor.examine("/bin/sh").problems[0]


def test_a_go_program_is_recognised() -> None:
    elf = doctor.Elf(
        62, 64, "/lib64/ld-linux-x86-64.so.2", ("libc.so.6",), frozenset({".go.buildinfo"}), frozenset()
    )
    assert "Go program" in doctor._elf_problems(elf)[0]


# ---- Python clients --------------------------------------------------------------------------------

PYTHON_CLIENT = """
import fcntl, os
kvm = os.open("/dev/kvm", os.O_RDWR)
assert fcntl.ioctl(kvm, 0xAE00, 0) == 12
vm = fcntl.ioctl(kvm, 0xAE01, 0)
if os.fork() == 0:
    try:
        fcntl.ioctl(vm, 0xAE41, 0)
    except OSError as error:
        os._exit(error.errno)
assert os.waitstatus_to_exitcode(os.wait()[1]) == 5
assert fcntl.ioctl(vm, 0xAE41, 0) > vm
print("done")
"""


def test_a_python_program_of_the_same_version(tmp_path: Path) -> None:
    script = tmp_path / "client.py"
    script.write_text(PYTHON_CLIENT)
    assert passes(sys.executable, script) == "done\n"


PYTHON_HANDLERS = """
import fcntl, mmap, os, signal, threading, time, ctypes, struct
kvm = os.open("/dev/kvm", os.O_RDWR)
vm = fcntl.ioctl(kvm, 0xAE01, 0)
memory = mmap.mmap(-1, 4096)
address = ctypes.addressof(ctypes.c_char.from_buffer(memory))
fcntl.ioctl(vm, 0x4020AE46, struct.pack("<IIQQQ", 0, 0, 0xFFFFF000, 4096, address))
memory[0xFF0:0xFF2] = b"\\xeb\\xfe"
vcpu = fcntl.ioctl(vm, 0xAE41, 0)
class Mine(Exception):
    pass
def handler(number, frame):
    raise Mine(number)
signal.signal(signal.SIGALRM, handler)
for number, expected in ((signal.SIGINT, KeyboardInterrupt), (signal.SIGALRM, Mine)) * 3:
    # The process's signal: the thread that runs the guest blocks it, this one takes it.
    other = threading.Timer(0.1, os.kill, (os.getpid(), number))
    other.start()
    try:
        fcntl.ioctl(vcpu, 0xAE80, 0)
    except expected:
        print("raised")
    other.join()
"""


def test_what_a_python_programs_signal_handler_raises_arrives(tmp_path: Path) -> None:
    script = tmp_path / "client.py"
    script.write_text(PYTHON_HANDLERS)
    assert passes(sys.executable, script) == "raised\n" * 6


USES_THE_MODULE_TOO = """
import os
from pykvm.client import Kvm
os.open("/dev/kvm", os.O_RDWR)
with Kvm() as kvm, kvm.create_vm() as vm:
    vm.create_vcpu(0)
print("made")
"""


def test_a_python_program_that_uses_the_module_too(tmp_path: Path) -> None:
    """Calls of the module come from outside the library, which must not take its handlers for the program's."""
    script = tmp_path / "client.py"
    script.write_text(USES_THE_MODULE_TOO)
    assert execute(sys.executable, script, timeout=20).stdout == "made\n"


def test_the_abi_tests_as_a_program() -> None:
    """One source, three devices: in this process, a program's under `pykvm exec`, and --real."""
    options = ("-q", "-p", "no:cacheprovider", "--exec", "--ignore", "tests/abi/test_unchanged.py")
    done = execute(sys.executable, "-m", "pytest", *options, "tests/abi", timeout=300)
    assert done.returncode == 0, done.stdout[-5000:]
    counted = re.search(r"(\d+) passed", done.stdout)
    assert int(counted[1] if counted else 0) > 400, done.stdout[-500:]


def test_a_python_of_another_version_is_not_started(compile_c: Compile) -> None:
    body = "int Py_IsInitialized(void) { return 0; } int main(void) { return 0; }"
    not_started(
        compile_c(body, "-rdynamic", name="python3.9"), "it has a Python 3.9 in it, and pykvm runs on"
    )
    same = f"python{sys.version_info.major}.{sys.version_info.minor}"
    assert doctor.examine(str(compile_c(body, "-rdynamic", name=same))).ok
    assert not doctor.examine(str(compile_c(body, "-rdynamic", name="blender"))).ok


def test_modules_in_the_current_directory_are_not_taken_for_ours(child: Path, tmp_path: Path) -> None:
    for module in ("json", "threading", "cffi", "enum"):
        (tmp_path / f"{module}.py").write_text("raise SystemExit('wrong module')\n")
    line = [sys.executable, "-P", "-m", "pykvm", "exec", "--", str(child)]
    done = subprocess.run(line, capture_output=True, text=True, check=False, cwd=tmp_path)
    assert (done.stdout, done.stderr) == ("fake\n", "")


def test_a_broken_installation_opens_nothing(child: Path, tmp_path: Path) -> None:
    env = {**os.environ, **launcher.environment((), os.environ), launcher.PATH: str(tmp_path)}
    done = subprocess.run([child], capture_output=True, text=True, check=False, env=env)
    assert (done.returncode, "fake" in done.stdout.splitlines()) == (1, False)
    assert "cannot start the interpreter" in done.stderr
    stdlib = [path for path in launcher.search_path() if not Path(path, "pykvm").exists()]
    done = subprocess.run(
        [child], capture_output=True, text=True, check=False, env={**env, launcher.PATH: ":".join(stdlib)}
    )
    assert (done.returncode, "fake" in done.stdout.splitlines()) == (1, False)
    assert "No module named 'pykvm'" in done.stderr
    assert "cannot start the interpreter" in done.stderr
