// Counts the mutating system calls below a directory, and does something at the n-th of them. Loaded with LD_PRELOAD into a
// program that calls `fault_arm`; TensorStore's calls go through libc too. A call is logged before it is made, one line each:
// its kind, the path, and the new path of a rename. `actions` are those of `injection.py`.
#define _GNU_SOURCE
#include <dlfcn.h>
#include <errno.h>
#include <fcntl.h>
#include <signal.h>
#include <stdarg.h>
#include <stdatomic.h>
#include <stdio.h>
#include <string.h>
#include <sys/ioctl.h>
#include <sys/stat.h>
#include <sys/uio.h>
#include <unistd.h>

enum { COUNT, KILL, FAIL, FAIL_FROM, SHORT, SHUTDOWN, UNSYNCED, SIGNAL, DELAY };
enum { GO_ON, REFUSE, HALVE, PRETEND };

static char prefix[4096], kinds[256];
static atomic_long counted;
static long wanted;
static int action, value, log_fd = -1;

long fault_count(void) { return atomic_load(&counted); }

void fault_arm(const char *below, const char *of_kinds, long n, int what, int with, int log) {
    snprintf(prefix, sizeof prefix, "%s", below);
    snprintf(kinds, sizeof kinds, " %s ", of_kinds);
    atomic_store(&counted, 0);
    wanted = n, action = what, value = with, log_fd = log;
}

static long real_write(int fd, const void *data, size_t size) {
    static ssize_t (*next)(int, const void *, size_t);
    if (!next) next = dlsym(RTLD_NEXT, "write");
    return next(fd, data, size);
}

static void full_path(int fd, const char *path, char *out) {
    char link[64];
    long length = 0;
    if (path && path[0] == '/') { snprintf(out, 4096, "%s", path); return; }
    if (fd >= 0) {
        snprintf(link, sizeof link, "/proc/self/fd/%d", fd);
        length = readlink(link, out, 4095);
    }
    if (length < 0) length = 0;
    snprintf(out + length, 4096 - length, "%s%s", path ? "/" : "", path ? path : "");
}

static void cut_power(void) {  // FS_IOC_SHUTDOWN, which ext4 and xfs share; 1 keeps the journal, 2 loses it
    static int (*open_file)(const char *, int, ...);
    if (!open_file) open_file = dlsym(RTLD_NEXT, "open");
    unsigned flags = value;
    int fd = open_file(prefix, O_RDONLY);
    ioctl(fd, _IOR('X', 125, unsigned), &flags);
}

static int step(const char *kind, int fd, const char *path, const char *to) {
    char full[4096], line[9000], word[32];
    int saved = errno;
    if (!prefix[0]) return GO_ON;
    full_path(fd, path, full);
    snprintf(word, sizeof word, " %s ", kind);
    if (strncmp(full, prefix, strlen(prefix)) || (strcmp(kinds, "  ") ? !strstr(kinds, word) : !strcmp(kind, "flock"))) {
        errno = saved;
        return GO_ON;
    }
    long n = atomic_fetch_add(&counted, 1) + 1;
    if (log_fd >= 0) real_write(log_fd, line, snprintf(line, sizeof line, "%s\t%s\t%s\n", kind, full, to ? to : ""));
    errno = saved;
    if (action == UNSYNCED && strstr(kind, "sync")) return PRETEND;
    if (action == DELAY) usleep(value);
    if (action == FAIL_FROM ? n < wanted : n != wanted) return GO_ON;
    if (action == SHUTDOWN) cut_power();
    if (action == KILL || action == SHUTDOWN) for (;;) kill(getpid(), SIGKILL);
    if (action == SIGNAL) kill(getpid(), value);
    if (action == FAIL || action == FAIL_FROM) { errno = value; return REFUSE; }
    return action == SHORT && strstr(kind, "write") ? HALVE : GO_ON;
}

#define NEXT(name) static __typeof__(name) *next; if (!next) next = dlsym(RTLD_NEXT, #name)
#define WRAP(result, name, kind, parameters, fd, path, to, ...) \
    result name parameters { NEXT(name); int s = step(kind, fd, path, to); \
        return s == REFUSE ? -1 : s == PRETEND ? 0 : next(__VA_ARGS__); }
#define WRAP_WRITE(name, parameters, fd, data, size, ...) \
    ssize_t name parameters { NEXT(name); int s = step("write", fd, NULL, NULL); \
        if (s == HALVE) return real_write(fd, data, (size + 1) / 2); \
        return s == REFUSE ? -1 : next(__VA_ARGS__); }
#define WRAP_OPEN(name, parameters, fd, ...) \
    int name parameters { NEXT(name); mode_t mode = 0; \
        if (flags & O_CREAT) { va_list rest; va_start(rest, flags); mode = va_arg(rest, mode_t); va_end(rest); \
            if (step("open", fd, path, NULL) == REFUSE) return -1; } \
        return next(__VA_ARGS__); }

WRAP_OPEN(open, (const char *path, int flags, ...), -1, path, flags, mode)
WRAP_OPEN(open64, (const char *path, int flags, ...), -1, path, flags, mode)
WRAP_OPEN(openat, (int at, const char *path, int flags, ...), at, at, path, flags, mode)
WRAP_OPEN(openat64, (int at, const char *path, int flags, ...), at, at, path, flags, mode)
WRAP_WRITE(write, (int fd, const void *data, size_t size), fd, data, size, fd, data, size)
WRAP_WRITE(pwrite, (int fd, const void *data, size_t size, off_t at), fd, data, size, fd, data, size, at)
WRAP_WRITE(pwrite64, (int fd, const void *data, size_t size, off64_t at), fd, data, size, fd, data, size, at)
WRAP_WRITE(writev, (int fd, const struct iovec *v, int count), fd, v->iov_base, v->iov_len, fd, v, count)
WRAP_WRITE(pwritev, (int fd, const struct iovec *v, int count, off_t at), fd, v->iov_base, v->iov_len, fd, v, count, at)
WRAP_WRITE(pwritev64, (int fd, const struct iovec *v, int count, off64_t at), fd, v->iov_base, v->iov_len, fd, v, count, at)
WRAP(int, fsync, "fsync", (int fd), fd, NULL, NULL, fd)
WRAP(int, fdatasync, "fdatasync", (int fd), fd, NULL, NULL, fd)
WRAP(int, ftruncate, "ftruncate", (int fd, off_t size), fd, NULL, NULL, fd, size)
WRAP(int, ftruncate64, "ftruncate", (int fd, off64_t size), fd, NULL, NULL, fd, size)
WRAP(int, fchmod, "chmod", (int fd, mode_t mode), fd, NULL, NULL, fd, mode)
WRAP(int, chmod, "chmod", (const char *path, mode_t mode), -1, path, NULL, path, mode)
WRAP(int, fchmodat, "chmod", (int at, const char *path, mode_t mode, int flags), at, path, NULL, at, path, mode, flags)
WRAP(int, mkdir, "mkdir", (const char *path, mode_t mode), -1, path, NULL, path, mode)
WRAP(int, mkdirat, "mkdir", (int at, const char *path, mode_t mode), at, path, NULL, at, path, mode)
WRAP(int, unlink, "unlink", (const char *path), -1, path, NULL, path)
WRAP(int, rmdir, "rmdir", (const char *path), -1, path, NULL, path)
WRAP(int, unlinkat, flags & AT_REMOVEDIR ? "rmdir" : "unlink", (int at, const char *path, int flags), at, path, NULL, at, path, flags)
WRAP(int, rename, "rename", (const char *path, const char *to), -1, path, to, path, to)
WRAP(int, renameat, "rename", (int at, const char *path, int b, const char *to), at, path, to, at, path, b, to)
WRAP(int, renameat2, "rename2", (int at, const char *path, int b, const char *to, unsigned flags), at, path, to, at, path, b, to, flags)
WRAP(int, link, "link", (const char *path, const char *to), -1, path, to, path, to)
WRAP(int, linkat, "link", (int at, const char *path, int b, const char *to, int flags), at, path, to, at, path, b, to, flags)
WRAP(int, symlink, "link", (const char *path, const char *to), -1, to, NULL, path, to)
WRAP(int, flock, "flock", (int fd, int operation), fd, NULL, NULL, fd, operation)
