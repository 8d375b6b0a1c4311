/* SPDX-License-Identifier: MIT */
/*
 * The calling process as the kernel sees it: its memory and its descriptors.  No function here
 * faults, whatever the address.  Read by the C compiler and by cffi.
 */
#ifndef PYKVM_UACCESS_H
#define PYKVM_UACCESS_H

#include <stdint.h>

/* copy_from_user() and copy_to_user(): 0, or -1 when a byte of the range cannot be accessed.  As in
 * the kernel, a failing user_write() may have written the start of the range. */
int user_read(void *to, uint64_t from, uint64_t size);
int user_write(uint64_t to, const void *from, uint64_t size);

/* What tells an open file from every other: its inode.  -1 and errno EBADF for no such descriptor,
 * 0 for a file that is not on the file system that memfds are on. */
int64_t file_inode(int fd);

/* A file in memory and what is needed to follow it. */
struct memory_file {
    int32_t fd;    /* the caller's only descriptor of it */
    int32_t watch; /* what file_closed() names it by */
    uint64_t inode;
    void *
        memory; /* its `size` bytes, mapped here; does not keep the open file alive.  NULL if none */
};

/* An event queue for file_create() and file_closed(); -1 and errno when there cannot be one. */
int file_queue(void);
/* Makes a file of `size` bytes that cannot be resized.  `name` is what /proc/self/fd shows.  readonly: so is
 * the descriptor; `memory` is writable all the same.  0, or -1 and errno. */
int file_create(struct memory_file *file, const char *name, uint64_t size, int cloexec,
                int readonly, int queue);
void file_unmap(void *memory, uint64_t size);
/* Fills in the `watch` of at most `max` files that have neither a descriptor nor a mapping left, in
 * any process (the mapping `memory` does not count).  Does not wait.  Returns how many; -1 when
 * `queue` is no event queue (any more). */
int file_closed(int queue, int32_t *watches, int max);

#endif
