/* SPDX-License-Identifier: MIT */
/*
 * Starts the interpreter in the client's process, and takes it over fork().
 *
 * The interpreter is an isolated one: it looks at no PYTHON* variable, installs no signal handler,
 * and its module search path is the one of the Python that `pykvm exec` ran with.
 */
#include <Python.h>

#include <pthread.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "embed.h"

#define EXPORT __attribute__((visibility("default")))

/* What cffi makes of EMBEDDING_API in embed.py. */
int pykvm_embed_open(int flags);
int64_t pykvm_embed_ioctl(int fd, uint32_t request, uint64_t arg, uint64_t mask);
void pykvm_embed_invalidate_start(uint64_t start, uint64_t end);
void pykvm_embed_invalidate_end(uint64_t start, uint64_t end);
uintptr_t pykvm_embed_guard_action(void);
int pykvm_embed_start(const struct embed_settings *settings, int own_interpreter);

static int fail(const char *what, const char *why)
{
    fprintf(stderr, "pykvm: cannot start the interpreter: %s%s%s\n", what, why ? ": " : "",
            why ? why : "");
    return -1;
}

static int fail_status(PyStatus status)
{
    return fail("Python", status.err_msg ? status.err_msg : "exit");
}

/* ---- fork: what os.fork() does around the system call ---- */

static __thread PyGILState_STATE gil;

static void before_fork(void)
{
    gil = PyGILState_Ensure();
    PyOS_BeforeFork();
}

static void after_fork_in_parent(void)
{
    PyOS_AfterFork_Parent();
    PyGILState_Release(gil);
}

static void after_fork_in_child(void)
{
    PyOS_AfterFork_Child();
    PyGILState_Release(gil);
}

/* ---- start ---- */

static PyStatus set_search_path(PyConfig *config, const char *path)
{
    PyStatus status = PyStatus_Ok();
    char *copy = strdup(path), *rest = copy;

    config->module_search_paths_set = 1;
    for (char *entry; (entry = strsep(&rest, ":")) && !PyStatus_Exception(status);) {
        wchar_t *wide = Py_DecodeLocale(entry, NULL);

        if (!wide)
            status = PyStatus_NoMemory();
        else if (*wide)
            status = PyWideStringList_Append(&config->module_search_paths, wide);
        PyMem_RawFree(wide);
    }
    free(copy);
    return status;
}

static int start_interpreter(const char *home, const char *path)
{
    PyPreConfig preconfig;
    PyConfig config;
    PyStatus status;

    PyPreConfig_InitIsolatedConfig(&preconfig);
    preconfig.utf8_mode = 1;
    status = Py_PreInitialize(&preconfig);
    if (PyStatus_Exception(status))
        return fail_status(status);
    PyConfig_InitIsolatedConfig(&config);
    config.install_signal_handlers = 0;
    config.site_import = 0;
    config.write_bytecode = 0;
    status = PyConfig_SetBytesString(&config, &config.home, home);
    if (!PyStatus_Exception(status))
        status = set_search_path(&config, path);
    if (!PyStatus_Exception(status))
        status = Py_InitializeFromConfig(&config);
    PyConfig_Clear(&config);
    if (PyStatus_Exception(status))
        return fail_status(status);
    PyEval_SaveThread();
    return 0;
}

/* The client is a Python program: its interpreter serves, with our modules behind its own. */
static int join_interpreter(const char *path)
{
    PyGILState_STATE state = PyGILState_Ensure();
    PyObject *list = PySys_GetObject("path");
    char *copy = strdup(path), *rest = copy;

    for (char *entry; list && (entry = strsep(&rest, ":"));) {
        PyObject *item = PyUnicode_DecodeFSDefault(entry);

        if (item)
            PyList_Append(list, item);
        Py_XDECREF(item);
        PyErr_Clear();
    }
    free(copy);
    PyGILState_Release(state);
    return 0;
}

/* ---- memory of a Python program ----
 *
 * Its interpreter gives memory back from the middle of anything: its allocator, a thread that ends.
 * Python cannot be called from there; it is told before the next ioctl.  Until then the guest finds
 * at these addresses what the program finds there: translations lead to host addresses.
 */

static pthread_mutex_t changes_lock = PTHREAD_MUTEX_INITIALIZER;
static struct embed_range changed; /* all that changed, and what is between; end 0: nothing */

static void tell_changes(void)
{
    struct embed_range now;

    pthread_mutex_lock(&changes_lock);
    now = changed;
    changed = (struct embed_range){0, 0};
    pthread_mutex_unlock(&changes_lock);
    if (now.end) {
        pykvm_embed_invalidate_start(now.start, now.end);
        pykvm_embed_invalidate_end(now.start, now.end);
    }
}

static void note_start(uint64_t start, uint64_t end)
{
    (void)start;
    (void)end;
}

static void note_end(uint64_t start, uint64_t end)
{
    pthread_mutex_lock(&changes_lock);
    if (!changed.end || start < changed.start)
        changed.start = start;
    if (end > changed.end)
        changed.end = end;
    pthread_mutex_unlock(&changes_lock);
}

static int64_t ioctl_after_changes(int fd, uint32_t request, uint64_t arg, uint64_t mask)
{
    tell_changes();
    return pykvm_embed_ioctl(fd, request, arg, mask);
}

EXPORT int embed_start(const struct embed_settings *settings, struct embed_api *api)
{
    int own = !Py_IsInitialized(), error;

    if (!settings->home || !settings->path)
        return fail("the library was not loaded by `pykvm exec`", NULL);
    error =
        own ? start_interpreter(settings->home, settings->path) : join_interpreter(settings->path);
    if (error)
        return error;
    if (own)
        pthread_atfork(before_fork, after_fork_in_parent, after_fork_in_child);
    if (!pykvm_embed_start(settings, own))
        return fail("pykvm", "see above");
    api->open = pykvm_embed_open;
    api->ioctl = own ? pykvm_embed_ioctl : ioctl_after_changes;
    api->invalidate_start = own ? pykvm_embed_invalidate_start : note_start;
    api->invalidate_end = own ? pykvm_embed_invalidate_end : note_end;
    api->guard_action = (int (*)(int, const void *, void *))pykvm_embed_guard_action();
    return 0;
}
