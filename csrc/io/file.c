/* Files: see file.h. POSIX. */
#include "io/file.h"

#include <dirent.h>
#include <errno.h>
#include <fcntl.h>
#include <limits.h>
#include <stdatomic.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <unistd.h>

#ifndef O_CLOEXEC
#define O_CLOEXEC 0
#endif

enum { PIECE = 1 << 26 };

static moe_status io_fail(const char *path, const char *what) {
  return moe_fail(MOE_EIO, "%s: %s: %s", path, what, strerror(errno));
}

enum moe_file_kind moe_file_stat(const char *path) {
  struct stat st;
  if (stat(path, &st) != 0) return MOE_FILE_NONE;
  return S_ISREG(st.st_mode) ? MOE_FILE_REGULAR : S_ISDIR(st.st_mode) ? MOE_FILE_DIRECTORY : MOE_FILE_OTHER;
}

/* The directory entry itself must reach the disk, or a crash undoes the rename. Best effort: some file systems
** cannot sync directories. */
static void sync_parent(const char *path) {
  char dir[PATH_MAX];
  size_t n = strlen(path);
  if (n >= sizeof dir) return;
  memcpy(dir, path, n + 1);
  char *slash = strrchr(dir, '/');
  if (slash == NULL) strcpy(dir, ".");
  else slash[slash == dir] = '\0';
  int fd = open(dir, O_RDONLY | O_CLOEXEC);
  if (fd < 0) return;
  (void)!fsync(fd);
  close(fd);
}

moe_status moe_file_create(moe_file_out *f, const char *path) {
  static atomic_uint counter;
  memset(f, 0, sizeof *f);
  enum moe_file_kind kind = moe_file_stat(path);
  if (kind == MOE_FILE_DIRECTORY) return moe_fail(MOE_EIO, "%s: is a directory", path);
  if (kind == MOE_FILE_OTHER) return moe_fail(MOE_EIO, "%s: is not a regular file", path);
  f->path = kind == MOE_FILE_REGULAR ? realpath(path, NULL) : strdup(path); /* a link's target is replaced, not the link */
  size_t size = f->path ? strlen(f->path) + 64 : 0;
  f->aside = f->path ? malloc(size) : NULL;
  if (f->aside == NULL) {
    moe_file_discard(f);
    return moe_fail(MOE_ENOMEM, "%s: out of memory", path);
  }
  for (int attempt = 0; attempt < 1000; attempt++) {
    snprintf(f->aside, size, "%s.tmp-%ld-%u", f->path, (long)getpid(), atomic_fetch_add(&counter, 1));
    f->fd = open(f->aside, O_WRONLY | O_CREAT | O_EXCL | O_CLOEXEC, 0666);
    if (f->fd >= 0) {
      f->open = true;
      return MOE_OK;
    }
    if (errno != EEXIST) break; /* else: left by a killed process with our number */
  }
  moe_status st = io_fail(path, "cannot write");
  moe_file_discard(f);
  return st;
}

moe_status moe_file_write(moe_file_out *f, const void *p, int64_t n) {
  const char *s = p;
  while (n > 0) {
    ssize_t k = write(f->fd, s, (size_t)MOE_MIN(n, (int64_t)PIECE));
    if (k < 0 && errno == EINTR) continue;
    if (k < 0) return io_fail(f->path, "cannot write");
    s += k;
    n -= k;
  }
  return MOE_OK;
}

moe_status moe_file_commit(moe_file_out *f) {
  moe_status st = MOE_OK;
  if (fsync(f->fd) != 0 && errno != EINVAL && errno != ENOTSUP) st = io_fail(f->path, "cannot write");
  f->open = false;
  if (close(f->fd) != 0 && st == MOE_OK) st = io_fail(f->path, "cannot write");
  if (st == MOE_OK && rename(f->aside, f->path) != 0) st = io_fail(f->path, "cannot rename the new file into place");
  if (st == MOE_OK) {
    sync_parent(f->path);
    free(f->aside);
    f->aside = NULL;
  }
  moe_file_discard(f);
  return st;
}

void moe_file_discard(moe_file_out *f) {
  if (f->open) {
    close(f->fd);
    f->open = false;
  }
  if (f->aside != NULL) unlink(f->aside);
  free(f->aside);
  free(f->path);
  memset(f, 0, sizeof *f);
}

moe_status moe_file_replace(const char *path, const void *p, int64_t n) {
  moe_file_out f;
  MOE_TRY(moe_file_create(&f, path));
  moe_status st = moe_file_write(&f, p, n);
  if (st == MOE_OK) return moe_file_commit(&f);
  moe_file_discard(&f);
  return st;
}

moe_status moe_file_open(const char *path, int *fd, int64_t *size) {
  struct stat st;
  *fd = open(path, O_RDONLY | O_CLOEXEC | O_NONBLOCK); /* a pipe must not make us wait */
  if (*fd < 0) return io_fail(path, "cannot open");
  moe_status code = MOE_OK;
  if (fstat(*fd, &st) != 0) code = io_fail(path, "cannot read");
  else if (S_ISDIR(st.st_mode)) code = moe_fail(MOE_EIO, "%s: is a directory", path);
  else if (!S_ISREG(st.st_mode)) code = moe_fail(MOE_EIO, "%s: is not a regular file", path);
  else *size = st.st_size;
  if (code != MOE_OK) {
    close(*fd);
    *fd = -1;
  }
  return code;
}

moe_status moe_file_read_at(int fd, const char *path, void *p, int64_t n, int64_t at) {
  char *s = p;
  while (n > 0) {
    ssize_t k = pread(fd, s, (size_t)MOE_MIN(n, (int64_t)PIECE), at);
    if (k < 0 && errno == EINTR) continue;
    if (k < 0) return io_fail(path, "cannot read");
    if (k == 0) return moe_fail(MOE_EIO, "%s: the file ends too early (it changed while being read)", path);
    s += k;
    at += k;
    n -= k;
  }
  return MOE_OK;
}

void moe_file_close(int fd) {
  if (fd >= 0) close(fd);
}

moe_status moe_file_read(const char *path, int64_t limit, char **data, int64_t *size) {
  int fd;
  *data = NULL;
  MOE_TRY(moe_file_open(path, &fd, size));
  moe_status st = MOE_OK;
  if (*size > limit)
    st = moe_fail(MOE_EIO, "%s: %lld bytes, more than the %lld that are taken", path, (long long)*size, (long long)limit);
  else if ((*data = malloc((size_t)*size + 1)) == NULL)
    st = moe_fail(MOE_ENOMEM, "%s: no memory for %lld bytes", path, (long long)*size);
  else st = moe_file_read_at(fd, path, *data, *size, 0);
  close(fd);
  if (st == MOE_OK) {
    (*data)[*size] = '\0';
  } else {
    free(*data);
    *data = NULL;
  }
  return st;
}

moe_status moe_file_make_dir(const char *path) {
  char buf[PATH_MAX];
  size_t n = strlen(path);
  if (n == 0 || n >= sizeof buf) return moe_fail(MOE_EIO, "%.100s: not a usable path", path);
  memcpy(buf, path, n + 1);
  for (char *p = buf + 1;; p++) {
    if (*p != '/' && *p != '\0') continue;
    char c = *p;
    *p = '\0';
    if (mkdir(buf, 0777) != 0 && moe_file_stat(buf) != MOE_FILE_DIRECTORY) return io_fail(buf, "cannot make the directory");
    *p = c;
    if (c == '\0') return MOE_OK;
  }
}

moe_status moe_file_remove(const char *path) {
  return unlink(path) != 0 && errno != ENOENT ? io_fail(path, "cannot remove") : MOE_OK;
}

static int compare_names(const void *a, const void *b) { return strcmp(*(char *const *)a, *(char *const *)b); }

moe_status moe_file_list(const char *path, char ***list, int64_t *n) {
  char *names = NULL;
  size_t used = 0, capacity = 0;
  *list = NULL;
  *n = 0;
  DIR *d = opendir(path);
  if (d == NULL) return io_fail(path, "cannot list");
  for (struct dirent *e; (e = readdir(d)) != NULL;) {
    if (strcmp(e->d_name, ".") == 0 || strcmp(e->d_name, "..") == 0) continue;
    size_t len = strlen(e->d_name) + 1;
    if (capacity - used < len) {
      capacity = capacity * 2 + len + 1024;
      char *grown = realloc(names, capacity);
      if (grown == NULL) goto no_memory;
      names = grown;
    }
    memcpy(names + used, e->d_name, len);
    used += len;
    ++*n;
  }
  /* one block: the pointers, then the text */
  size_t head = (size_t)*n * sizeof(char *);
  *list = malloc(head + used + 1);
  if (*list == NULL) goto no_memory;
  closedir(d);
  char *text = (char *)*list + head;
  if (used > 0) memcpy(text, names, used);
  free(names);
  for (int64_t i = 0; i < *n; i++, text += strlen(text) + 1) (*list)[i] = text;
  qsort(*list, (size_t)*n, sizeof **list, compare_names);
  return MOE_OK;
no_memory:
  closedir(d);
  free(names);
  *n = 0;
  return moe_fail(MOE_ENOMEM, "%s: out of memory", path);
}
