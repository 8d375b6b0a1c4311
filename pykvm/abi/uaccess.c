/* SPDX-License-Identifier: MIT */
/* The calling process as the kernel sees it. */
#define _GNU_SOURCE
#include "uaccess.h"

#include <errno.h>
#include <fcntl.h>
#include <stdio.h>
#include <string.h>
#include <sys/inotify.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <sys/uio.h>
#include <unistd.h>

/* The system call checks and reads or writes in one step: a probe before a plain memcpy() would race
 * with another thread's munmap().  Of this thread, here and in /proc: the process's first one, by whose
 * number a process is named, may have ended, and then has neither memory nor descriptors. */
int user_read(void *to, uint64_t from, uint64_t size)
{
    struct iovec local = {to, size}, remote = {(void *)(uintptr_t)from, size};

    return process_vm_readv(gettid(), &local, 1, &remote, 1, 0) == (ssize_t)size ? 0 : -1;
}

int user_write(uint64_t to, const void *from, uint64_t size)
{
    struct iovec local = {(void *)(uintptr_t)from, size}, remote = {(void *)(uintptr_t)to, size};

    return process_vm_writev(gettid(), &local, 1, &remote, 1, 0) == (ssize_t)size ? 0 : -1;
}

/* Every memfd lives on one internal tmpfs; inode numbers are unique only there. */
static dev_t memfd_dev(void)
{
    static dev_t dev;
    struct stat st;
    int fd;

    if (dev)
        return dev;
    fd = memfd_create("kvm", MFD_CLOEXEC);
    if (fd < 0)
        return 0;
    if (fstat(fd, &st) == 0)
        dev = st.st_dev;
    close(fd);
    return dev;
}

int64_t file_inode(int fd)
{
    struct stat st;

    if (fstat(fd, &st) < 0)
        return -1;
    return st.st_dev == memfd_dev() ? (int64_t)st.st_ino : 0;
}

/* Clients expect the lowest free number for what they open. */
#define OUT_OF_THE_WAY 1000

int file_queue(void)
{
    int queue = inotify_init1(IN_NONBLOCK | IN_CLOEXEC), high;

    if (queue < 0)
        return -1;
    high = fcntl(queue, F_DUPFD_CLOEXEC, OUT_OF_THE_WAY);
    if (high < 0)
        return queue;
    close(queue);
    return high;
}

/* Maps the file and puts in place of the memfd another open file of the same inode.
 *
 * Two open files, because a mapping keeps its open file alive, and the one that the client has is to
 * end with the client's last reference.  The client gets the one made by open(), because since Linux
 * 6.14 those made by memfd_create() send no inotify events. */
static int reopen(struct memory_file *file, uint64_t size, int cloexec, int readonly)
{
    char path[40];
    int again;

    if (size) {
        file->memory = mmap(NULL, size, PROT_READ | PROT_WRITE, MAP_SHARED, file->fd, 0);
        if (file->memory == MAP_FAILED)
            return -1;
    }
    snprintf(path, sizeof path, "/proc/thread-self/fd/%d", file->fd);
    again = open(path, (readonly ? O_RDONLY : O_RDWR) | O_CLOEXEC);
    if (again < 0 || dup3(again, file->fd, cloexec ? O_CLOEXEC : 0) < 0)
        return -1;
    return close(again);
}

/* Clients keep descriptors apart by number and expect the lowest free one: file->fd does not change
 * from here on. */
static int set_up(struct memory_file *file, uint64_t size, int cloexec, int readonly, int queue)
{
    char path[40];
    struct stat st;

    if (ftruncate(file->fd, (off_t)size) < 0 || fstat(file->fd, &st) < 0)
        return -1;
    /* A client that made the file shorter would have this process fault on `memory`. */
    if (fcntl(file->fd, F_ADD_SEALS, F_SEAL_SHRINK | F_SEAL_GROW | F_SEAL_SEAL) < 0)
        return -1;
    file->inode = st.st_ino;
    if (reopen(file, size, cloexec, readonly) < 0)
        return -1;
    snprintf(path, sizeof path, "/proc/thread-self/fd/%d", file->fd);
    file->watch = inotify_add_watch(queue, path, IN_CLOSE_WRITE | IN_CLOSE_NOWRITE);
    return file->watch < 0 ? -1 : 0;
}

int file_create(struct memory_file *file, const char *name, uint64_t size, int cloexec,
                int readonly, int queue)
{
    int error;

    memset(file, 0, sizeof *file);
    file->fd = memfd_create(name, MFD_ALLOW_SEALING | (cloexec ? MFD_CLOEXEC : 0));
    if (file->fd < 0)
        return -1;
    if (set_up(file, size, cloexec, readonly, queue) == 0)
        return 0;
    error = errno;
    if (file->memory && file->memory != MAP_FAILED)
        munmap(file->memory, size);
    close(file->fd);
    errno = error;
    return -1;
}

void file_unmap(void *memory, uint64_t size) { munmap(memory, size); }

/* A client that closes every descriptor it does not know closes the queue too, and may get its number
 * for something else: that must not be read from. */
static int is_queue(int fd)
{
    static const char kind[] = "anon_inode:inotify";
    char path[40], target[sizeof kind];

    snprintf(path, sizeof path, "/proc/thread-self/fd/%d", fd);
    return readlink(path, target, sizeof target) == sizeof kind - 1 &&
           !memcmp(target, kind, sizeof kind - 1);
}

int file_closed(int queue, int32_t *watches, int max)
{
    struct inotify_event events[64];
    int n = 0;

    if (!is_queue(queue))
        return -1;
    while (n + 64 <= max) {
        /* The watches are on files, not directories, so that no event carries a name. */
        ssize_t size = read(queue, events, sizeof events);

        if (size <= 0)
            break;
        for (size_t i = 0; i < (size_t)size / sizeof *events; i++)
            if (events[i].mask & (IN_CLOSE_WRITE | IN_CLOSE_NOWRITE))
                watches[n++] = events[i].wd;
    }
    return n;
}
