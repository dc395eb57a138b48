/* Files: replacement that a kill or a full disk cannot tear, and reading that trusts nothing.
** All failures are MOE_EIO with a message that names the path.
*/
#ifndef MOE_IO_FILE_H
#define MOE_IO_FILE_H

#include <stdbool.h>
#include <stdint.h>

#include "base/err.h"

/* A file written aside ("path.tmp-pid-n"): commit makes it durable and renames it over `path`; until then, and when
** anything fails, what was at `path` stays. Start from a zeroed struct; discard may always be called. */
typedef struct moe_file_out {
  int fd;
  bool open;
  char *path, *aside;
} moe_file_out;

moe_status moe_file_create(moe_file_out *f, const char *path);
moe_status moe_file_write(moe_file_out *f, const void *p, int64_t n);
moe_status moe_file_commit(moe_file_out *f);
void moe_file_discard(moe_file_out *f);
/* All three in one. */
moe_status moe_file_replace(const char *path, const void *p, int64_t n);

/* Opens a regular file for reading; *fd < 0 on failure. */
moe_status moe_file_open(const char *path, int *fd, int64_t *size);
/* Reads n bytes at `at`, in pieces; a shorter file is an error. */
moe_status moe_file_read_at(int fd, const char *path, void *p, int64_t n, int64_t at);
void moe_file_close(int fd);
/* The whole of a file of at most `limit` bytes, a zero byte after it; *data from malloc. */
moe_status moe_file_read(const char *path, int64_t limit, char **data, int64_t *size);

moe_status moe_file_make_dir(const char *path); /* with its parents; one that exists is fine */
moe_status moe_file_remove(const char *path);   /* of a file; a missing one is fine */
enum moe_file_kind { MOE_FILE_NONE, MOE_FILE_REGULAR, MOE_FILE_DIRECTORY, MOE_FILE_OTHER };
enum moe_file_kind moe_file_stat(const char *path);
/* Names in a directory, but "." and "..", sorted; *list (names and array) is one block from malloc. */
moe_status moe_file_list(const char *path, char ***list, int64_t *n);

#endif
