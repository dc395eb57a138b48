/* The safetensors format (https://github.com/huggingface/safetensors): an 8-byte little-endian header length, a JSON
** header {name: {dtype, shape, data_offsets}, "__metadata__": {string: string}}, then the data. Nothing in a file is
** trusted, nothing in it can run.
*/
#ifndef MOE_IO_SAFETENSORS_H
#define MOE_IO_SAFETENSORS_H

#include "io/json.h"
#include "tensor/tensor.h"

/* --- reading --- */

typedef struct moe_st_entry {
  const char *name;      /* into the header's text, zero-ended; may hold zero bytes */
  int64_t name_len;
  const char *type_name; /* "F32" */
  int dtype;             /* a moe_dtype, or -1: a type that the format knows and we do not */
  int ndim;
  int64_t shape[MOE_MAX_DIM];
  int64_t begin, end;    /* bytes, from the start of the data */
} moe_st_entry;

typedef struct moe_st_file {
  int fd;
  bool open;
  char *path;
  int64_t size, data_start;
  moe_json header;
  int64_t n;
  moe_st_entry *entry; /* sorted by name */
  int32_t metadata;    /* node of the header, or -1 */
} moe_st_file;

/* Reads and checks the header. Start from a zeroed struct; close may always be called. */
moe_status moe_st_open(moe_st_file *f, const char *path);
void moe_st_close(moe_st_file *f);
const moe_st_entry *moe_st_find(const moe_st_file *f, const char *name, int64_t len);
/* One tensor, on the CPU; scoped; NULL on failure. */
moe_tensor *moe_st_read(const moe_st_file *f, const moe_st_entry *e);

/* --- writing --- */

typedef struct moe_st_string {
  const char *s;
  int64_t len;
} moe_st_string;

/* Replaces `path` as file.h does. The same content gives the same bytes: the order of the arguments does not matter.
** meta: keys and values in turn. Fails for names that are not UTF-8, doubled, or "__metadata__". */
moe_status moe_st_save(const char *path, int64_t n, const moe_st_string *name, moe_tensor *const *t, int64_t nmeta,
                       const moe_st_string *meta);

#endif
