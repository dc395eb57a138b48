/* safetensors: see safetensors.h. */
#include "io/safetensors.h"

#include <stdlib.h>
#include <string.h>

#include "io/file.h"

/* The reference implementation refuses longer headers too. */
enum { MAX_HEADER = 100 * 1000 * 1000, COPY_PIECE = 1 << 24 };

/* name, bytes an element, our type or -1. Ours in the order in which the reference implementation writes them (the wide
** ones first, so that all data are aligned): the same tensors then give the same bytes as its own. */
static const struct {
  const char *name;
  int size, dtype;
} types[] = {
    {"I64", 8, MOE_i64}, {"F64", 8, MOE_f64}, {"F32", 4, MOE_f32}, {"I32", 4, MOE_i32}, {"BF16", 2, MOE_bf16},
    {"F16", 2, MOE_f16}, {"U8", 1, MOE_u8},   {"BOOL", 1, MOE_bool}, {"I16", 2, -1},    {"I8", 1, -1},
    {"U64", 8, -1},      {"U32", 4, -1},      {"U16", 2, -1},      {"F8_E4M3", 1, -1},  {"F8_E5M2", 1, -1},
    {"F8_E8M0", 1, -1},  {"C64", 8, -1},
};
enum { NTYPES = sizeof types / sizeof *types };

/* --- reading --- */

static moe_status bad(const moe_st_file *f, const char *name, const char *what) {
  return name ? moe_fail(MOE_EIO, "%s: tensor \"%.100s\": %s", f->path, name, what)
              : moe_fail(MOE_EIO, "%s: not a safetensors file: %s", f->path, what);
}

/* A list of whole numbers >= 0 into out[0..most); the count, or -1. */
static int read_sizes(const moe_json *j, int32_t node, int64_t *out, int most) {
  if (node < 0 || j->node[node].kind != MOE_JSON_ARRAY || j->node[node].count > most) return -1;
  int32_t k = node + 1;
  for (int i = 0; i < j->node[node].count; i++, k = j->node[k].next) {
    if (j->node[k].kind != MOE_JSON_INT || j->node[k].i < 0) return -1;
    out[i] = j->node[k].i;
  }
  return j->node[node].count;
}

static moe_status read_entry(const moe_st_file *f, int32_t node, moe_st_entry *e) {
  const moe_json *j = &f->header;
  const moe_json_node *v = &j->node[node];
  *e = (moe_st_entry){.name = v->key, .name_len = v->key_len};
  if (v->kind != MOE_JSON_OBJECT) return bad(f, e->name, "its description is not an object");
  int32_t type = moe_json_member(j, node, "dtype");
  int32_t shape = moe_json_member(j, node, "shape"), offsets = moe_json_member(j, node, "data_offsets");
  if (v->count != 3 || type < 0 || shape < 0 || offsets < 0)
    return bad(f, e->name, "its description must hold exactly dtype, shape and data_offsets");
  if (j->node[type].kind != MOE_JSON_STRING) return bad(f, e->name, "dtype is not a string");
  int t = 0;
  while (t < NTYPES && strcmp(types[t].name, j->node[type].s) != 0) t++;
  if (t == NTYPES || (int64_t)strlen(types[t].name) != j->node[type].len)
    return moe_fail(MOE_EIO, "%s: tensor \"%.100s\": unknown dtype \"%.40s\"", f->path, e->name, j->node[type].s);
  e->type_name = types[t].name;
  e->dtype = types[t].dtype;
  e->ndim = read_sizes(j, shape, e->shape, MOE_MAX_DIM);
  if (e->ndim < 0) return bad(f, e->name, "shape is not a list of at most 16 sizes");
  int64_t range[2], count = types[t].size;
  if (read_sizes(j, offsets, range, 2) != 2) return bad(f, e->name, "data_offsets is not a pair of positions");
  e->begin = range[0];
  e->end = range[1];
  if (e->begin > e->end || e->end > f->size - f->data_start)
    return moe_fail(MOE_EIO, "%s: tensor \"%.100s\": data_offsets [%lld, %lld] lie outside of the file's %lld bytes of data",
                    f->path, e->name, (long long)e->begin, (long long)e->end, (long long)(f->size - f->data_start));
  bool empty = false;
  for (int d = 0; d < e->ndim; d++) {
    empty = empty || e->shape[d] == 0;
    if (__builtin_mul_overflow(count, MOE_MAX(e->shape[d], 1), &count)) return bad(f, e->name, "its shape is too large");
  }
  if (empty) count = 0;
  if (count != e->end - e->begin)
    return moe_fail(MOE_EIO, "%s: tensor \"%.100s\": its shape and dtype take %lld bytes, its data_offsets hold %lld",
                    f->path, e->name, (long long)count, (long long)(e->end - e->begin));
  return MOE_OK;
}

static int compare_strings(const char *a, int64_t na, const char *b, int64_t nb) {
  int c = memcmp(a, b, (size_t)MOE_MIN(na, nb));
  return c != 0 ? c : (na > nb) - (na < nb);
}

static int by_name(const void *a, const void *b) {
  const moe_st_entry *x = a, *y = b;
  return compare_strings(x->name, x->name_len, y->name, y->name_len);
}

static int by_place(const void *a, const void *b) {
  const moe_st_entry *x = a, *y = b;
  if (x->begin != y->begin) return x->begin < y->begin ? -1 : 1;
  return (x->end > y->end) - (x->end < y->end);
}

static moe_status read_header(moe_st_file *f) {
  unsigned char head[8];
  uint64_t len = 0;
  if (f->size < 8) return bad(f, NULL, "it is shorter than its 8-byte head");
  MOE_TRY(moe_file_read_at(f->fd, f->path, head, 8, 0));
  for (int i = 7; i >= 0; i--) len = len << 8 | head[i];
  if (len > MAX_HEADER || (int64_t)len > f->size - 8)
    return moe_fail(MOE_EIO, "%s: not a safetensors file: a header of %llu bytes in a file of %lld", f->path,
                    (unsigned long long)len, (long long)f->size);
  char *text = malloc((size_t)len + 1);
  if (text == NULL) return moe_fail(MOE_ENOMEM, "%s: no memory for the header", f->path);
  moe_status st = moe_file_read_at(f->fd, f->path, text, (int64_t)len, 8);
  if (st == MOE_OK && (len == 0 || text[0] != '{')) st = bad(f, NULL, "its header does not begin with '{'");
  if (st == MOE_OK && (st = moe_json_parse(&f->header, text, (int64_t)len)) != MOE_OK) moe_fail_prefix(f->path);
  free(text);
  MOE_TRY(st);
  f->data_start = 8 + (int64_t)len;
  f->metadata = moe_json_member(&f->header, 0, "__metadata__");
  int32_t count = f->header.node[0].count, k = 1;
  f->entry = malloc((size_t)count * sizeof *f->entry + 1);
  if (f->entry == NULL) return moe_fail(MOE_ENOMEM, "%s: no memory for the header", f->path);
  for (int32_t i = 0; i < count; i++, k = f->header.node[k].next)
    if (k != f->metadata) MOE_TRY(read_entry(f, k, &f->entry[f->n++]));
  if (f->metadata >= 0) {
    const moe_json_node *m = &f->header.node[f->metadata];
    if (m->kind != MOE_JSON_OBJECT) return bad(f, NULL, "__metadata__ is not an object");
    k = f->metadata + 1;
    for (int32_t i = 0; i < m->count; i++, k = f->header.node[k].next)
      if (f->header.node[k].kind != MOE_JSON_STRING) return bad(f, NULL, "__metadata__ holds something else than strings");
  }
  /* every byte of the data belongs to exactly one tensor */
  int64_t at = 0;
  qsort(f->entry, (size_t)f->n, sizeof *f->entry, by_place);
  for (int64_t i = 0; i < f->n; i++) {
    if (f->entry[i].begin < at) return bad(f, f->entry[i].name, "its data overlap another tensor's");
    if (f->entry[i].begin > at) return bad(f, f->entry[i].name, "a hole lies before its data");
    at = f->entry[i].end;
  }
  if (at != f->size - f->data_start)
    return moe_fail(MOE_EIO, "%s: %lld bytes after the last tensor", f->path, (long long)(f->size - f->data_start - at));
  qsort(f->entry, (size_t)f->n, sizeof *f->entry, by_name);
  return MOE_OK;
}

moe_status moe_st_open(moe_st_file *f, const char *path) {
  memset(f, 0, sizeof *f);
  f->metadata = -1;
  f->path = strdup(path);
  if (f->path == NULL) return moe_fail(MOE_ENOMEM, "%s: out of memory", path);
  moe_status st = moe_file_open(path, &f->fd, &f->size);
  f->open = st == MOE_OK;
  if (st == MOE_OK) st = read_header(f);
  if (st != MOE_OK) moe_st_close(f);
  return st;
}

void moe_st_close(moe_st_file *f) {
  if (f->open) moe_file_close(f->fd);
  moe_json_free(&f->header);
  free(f->entry);
  free(f->path);
  memset(f, 0, sizeof *f);
}

const moe_st_entry *moe_st_find(const moe_st_file *f, const char *name, int64_t len) {
  moe_st_entry key = {.name = name, .name_len = len};
  return f->n == 0 ? NULL : bsearch(&key, f->entry, (size_t)f->n, sizeof *f->entry, by_name);
}

/* The format and every host we build for are little-endian; elsewhere the build stops here. */
#if defined(__BYTE_ORDER__) && __BYTE_ORDER__ != __ORDER_LITTLE_ENDIAN__
#error "safetensors.c needs byte swapping on this processor"
#endif

moe_tensor *moe_st_read(const moe_st_file *f, const moe_st_entry *e) {
  if (e->dtype < 0) {
    moe_fail(MOE_EIO, "%s: tensor \"%.100s\": dtype %s is not supported (f64 f32 bf16 f16 i64 i32 u8 bool are)", f->path,
             e->name, e->type_name);
    return NULL;
  }
  moe_tensor *t = moe_empty(e->ndim, e->shape, (moe_dtype)e->dtype, moe_cpu());
  if (t == NULL || e->begin == e->end) return t;
  uint8_t *p = moe_data(t);
  if (moe_file_read_at(f->fd, f->path, p, e->end - e->begin, f->data_start + e->begin) != MOE_OK) return NULL;
  if (e->dtype == MOE_bool)
    for (int64_t i = 0; i < e->end - e->begin; i++) p[i] = p[i] != 0;
  return t;
}

/* --- writing --- */

typedef struct item {
  moe_st_string name;
  moe_tensor *t;
} item;

static int type_row(moe_dtype t) {
  int i = 0;
  while (i < NTYPES - 1 && types[i].dtype != (int)t) i++;
  return i;
}

static int by_type_and_name(const void *a, const void *b) {
  const item *x = a, *y = b;
  int tx = type_row(x->t->dtype), ty = type_row(y->t->dtype);
  if (tx != ty) return tx < ty ? -1 : 1;
  return compare_strings(x->name.s, x->name.len, y->name.s, y->name.len);
}

static int by_item_name(const void *a, const void *b) {
  const item *x = a, *y = b;
  return compare_strings(x->name.s, x->name.len, y->name.s, y->name.len);
}

static int by_key(const void *a, const void *b) {
  const moe_st_string *x = a, *y = b;
  return compare_strings(x->s, x->len, y->s, y->len);
}

static moe_status write_header(moe_text *b, int64_t n, const item *it, int64_t nmeta, const moe_st_string *meta) {
  moe_text_add(b, "{", 1);
  if (nmeta > 0) {
    moe_text_addf(b, "\"__metadata__\":{");
    for (int64_t i = 0; i < nmeta; i++) {
      if (i > 0) moe_text_add(b, ",", 1);
      moe_text_quote(b, meta[2 * i].s, meta[2 * i].len);
      moe_text_add(b, ":", 1);
      moe_text_quote(b, meta[2 * i + 1].s, meta[2 * i + 1].len);
    }
    moe_text_add(b, n > 0 ? "}," : "}", n > 0 ? 2 : 1);
  }
  int64_t at = 0;
  for (int64_t i = 0; i < n; i++) {
    const moe_tensor *t = it[i].t;
    int64_t bytes = moe_numel(t) * moe_dtype_size(t->dtype);
    moe_text_quote(b, it[i].name.s, it[i].name.len);
    moe_text_addf(b, ":{\"dtype\":\"%s\",\"shape\":[", types[type_row(t->dtype)].name);
    for (int d = 0; d < t->ndim; d++) moe_text_addf(b, d > 0 ? ",%lld" : "%lld", (long long)t->shape[d]);
    moe_text_addf(b, "],\"data_offsets\":[%lld,%lld]}%s", (long long)at, (long long)(at + bytes), i + 1 < n ? "," : "");
    at += bytes;
  }
  moe_text_add(b, "}", 1);
  while (!b->failed && b->n % 8 != 0) moe_text_add(b, " ", 1);
  return b->failed ? moe_fail(MOE_ENOMEM, "out of memory for the header") : MOE_OK;
}

static moe_status write_tensor(moe_file_out *f, moe_tensor *t) {
  int64_t bytes = moe_numel(t) * moe_dtype_size(t->dtype);
  if (bytes == 0) return MOE_OK;
  moe_scope s = moe_scope_open();
  moe_tensor *c = moe_contiguous_raw(t);
  moe_device *dev = moe_dev(t);
  moe_status st = c ? MOE_OK : moe_error_code();
  if (st == MOE_OK && dev->host_memory) {
    st = moe_file_write(f, moe_data(c), bytes);
  } else if (st == MOE_OK) {
    char *piece = malloc(COPY_PIECE);
    if (piece == NULL) st = moe_fail(MOE_ENOMEM, "out of memory");
    for (int64_t at = 0; at < bytes && st == MOE_OK; at += COPY_PIECE) {
      int64_t k = MOE_MIN(bytes - at, (int64_t)COPY_PIECE);
      st = dev->to_host(dev, piece, (const char *)moe_data(c) + at, k);
      if (st == MOE_OK) st = moe_file_write(f, piece, k);
    }
    free(piece);
  }
  moe_scope_close(s);
  return st;
}

static moe_status check_names(int64_t n, item *it, int64_t nmeta, const moe_st_string *meta) {
  for (int64_t i = 0; i < n; i++)
    if (!moe_utf8_valid(it[i].name.s, it[i].name.len) || strcmp(it[i].name.s, "__metadata__") == 0)
      return moe_fail(MOE_EINVAL, "\"%.100s\" cannot name a tensor (it must be UTF-8, and not __metadata__)", it[i].name.s);
  for (int64_t i = 0; i < 2 * nmeta; i++)
    if (!moe_utf8_valid(meta[i].s, meta[i].len)) return moe_fail(MOE_EINVAL, "metadata must be UTF-8 text");
  qsort(it, (size_t)n, sizeof *it, by_item_name);
  for (int64_t i = 1; i < n; i++)
    if (by_item_name(&it[i - 1], &it[i]) == 0) return moe_fail(MOE_EINVAL, "the name \"%.100s\" comes twice", it[i].name.s);
  return MOE_OK;
}

moe_status moe_st_save(const char *path, int64_t n, const moe_st_string *name, moe_tensor *const *t, int64_t nmeta,
                       const moe_st_string *meta) {
  item *it = malloc((size_t)n * sizeof *it + 1);
  moe_st_string *pairs = malloc((size_t)nmeta * 2 * sizeof *pairs + 1);
  moe_text header = {0};
  moe_file_out f = {0};
  moe_status st = it && pairs ? MOE_OK : moe_fail(MOE_ENOMEM, "out of memory");
  if (st == MOE_OK) {
    for (int64_t i = 0; i < n; i++) it[i] = (item){name[i], t[i]};
    if (nmeta > 0) memcpy(pairs, meta, (size_t)nmeta * 2 * sizeof *pairs);
    st = check_names(n, it, nmeta, pairs);
  }
  if (st == MOE_OK) {
    qsort(it, (size_t)n, sizeof *it, by_type_and_name);
    if (nmeta > 0) qsort(pairs, (size_t)nmeta, 2 * sizeof *pairs, by_key);
    st = write_header(&header, n, it, nmeta, pairs);
  }
  if (st == MOE_OK) st = moe_file_create(&f, path);
  if (st == MOE_OK) {
    unsigned char head[8];
    for (int i = 0; i < 8; i++) head[i] = (unsigned char)((uint64_t)header.n >> (8 * i));
    st = moe_file_write(&f, head, 8);
    if (st == MOE_OK) st = moe_file_write(&f, header.s, header.n);
    for (int64_t i = 0; i < n && st == MOE_OK; i++) st = write_tensor(&f, it[i].t);
    if (st == MOE_OK) st = moe_file_commit(&f);
  }
  moe_file_discard(&f);
  moe_text_free(&header);
  free(pairs);
  free(it);
  return st;
}
