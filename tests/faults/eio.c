/* Preloaded: a share of write, fsync and rename below one of two directories fails with EIO, as on a bad disk.
 *
 * Off until eio_arm is called. Which calls fail depends on the seed and on the number of the call alone.
 */
#define _GNU_SOURCE
#include <dlfcn.h>
#include <errno.h>
#include <limits.h>
#include <stdint.h>
#include <stdio.h>
#include <string.h>
#include <sys/uio.h>
#include <unistd.h>

static char store[PATH_MAX], runs[PATH_MAX];
static uint64_t state;
static double share;
static int failures;

void eio_arm(const char *store_directory, const char *runs_directory, uint64_t seed, double share_of_calls) {
  snprintf(store, sizeof store, "%s/", store_directory);
  snprintf(runs, sizeof runs, "%s/", runs_directory);
  state = (seed + 1) * 0xD1342543DE82EF95u; /* not splitmix's own step, or seeds would shift one stream */
  share = share_of_calls;
}

int eio_failures(void) { return __atomic_load_n(&failures, __ATOMIC_RELAXED); }

static int fails(void) { /* splitmix64 */
  uint64_t z = __atomic_add_fetch(&state, 0x9E3779B97F4A7C15u, __ATOMIC_RELAXED);
  z = (z ^ (z >> 30)) * 0xBF58476D1CE4E5B9u;
  z = (z ^ (z >> 27)) * 0x94D049BB133111EBu;
  z ^= z >> 31;
  if ((double)(z >> 11) / (double)(1ull << 53) >= share) return 0;
  __atomic_add_fetch(&failures, 1, __ATOMIC_RELAXED);
  errno = EIO;
  return 1;
}

static int below(const char *path) {
  return strncmp(path, store, strlen(store)) == 0 || strncmp(path, runs, strlen(runs)) == 0;
}

static int hit_file(int descriptor) {
  char link[64], path[PATH_MAX];
  if (share <= 0) return 0;
  int before = errno;
  snprintf(link, sizeof link, "/proc/self/fd/%d", descriptor);
  ssize_t length = readlink(link, path, sizeof path - 1);
  errno = before;
  if (length < 0) return 0;
  path[length] = 0;
  return below(path) && fails();
}

static int hit_path(const char *name) {
  char path[2 * PATH_MAX];
  if (share <= 0) return 0;
  if (name[0] == '/') return below(name) && fails();
  if (!getcwd(path, PATH_MAX)) return 0;
  strcat(strcat(path, "/"), name);
  return below(path) && fails();
}

#define REAL(type, name, ...)                           \
  static type (*real)(__VA_ARGS__);                     \
  if (!real) real = (type(*)(__VA_ARGS__))dlsym(RTLD_NEXT, name)

ssize_t write(int fd, const void *data, size_t size) {
  REAL(ssize_t, "write", int, const void *, size_t);
  return hit_file(fd) ? -1 : real(fd, data, size);
}

ssize_t pwrite64(int fd, const void *data, size_t size, off64_t at) {
  REAL(ssize_t, "pwrite64", int, const void *, size_t, off64_t);
  return hit_file(fd) ? -1 : real(fd, data, size, at);
}

ssize_t writev(int fd, const struct iovec *parts, int count) {
  REAL(ssize_t, "writev", int, const struct iovec *, int);
  return hit_file(fd) ? -1 : real(fd, parts, count);
}

int fsync(int fd) {
  REAL(int, "fsync", int);
  return hit_file(fd) ? -1 : real(fd);
}

int rename(const char *from, const char *to) {
  REAL(int, "rename", const char *, const char *);
  return hit_path(to) ? -1 : real(from, to);
}

int renameat(int at, const char *from, int to_at, const char *to) {
  REAL(int, "renameat", int, const char *, int, const char *);
  return hit_path(to) ? -1 : real(at, from, to_at, to);
}
