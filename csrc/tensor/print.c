/* The text of a tensor. A matrix is printed by rows, a vector in one row, a tensor of higher rank as its first
** matrices. Only what is printed is read.
*/
#include "tensor/print.h"

#include <math.h>
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "autograd/graph.h"

enum {
  MAX_COLS = 10,   /* numbers a row; more: EDGE_COLS at each end */
  EDGE_COLS = 4,
  MAX_LINES = 10,  /* rows of one matrix: with the scale and the last line 12 */
  SLICE_LINES = 3, /* rows of each of two matrices of a higher rank */
  CELL = 32
};

/* --- a growing buffer --- */

typedef struct text {
  char *s;
  size_t n, cap;
  bool failed;
} text;

static void add(text *b, const char *fmt, ...) MOE_PRINTF(2, 3);
static void add(text *b, const char *fmt, ...) {
  char piece[256];
  va_list ap;
  va_start(ap, fmt);
  int len = vsnprintf(piece, sizeof piece, fmt, ap);
  va_end(ap);
  if (len < 0 || b->failed) return;
  size_t n = MOE_MIN((size_t)len, sizeof piece - 1);
  if (b->n + n + 1 > b->cap) {
    size_t cap = 2 * (b->cap + n + 128);
    char *s = realloc(b->s, cap);
    if (s == NULL) {
      b->failed = true;
      return;
    }
    b->s = s;
    b->cap = cap;
  }
  memcpy(b->s + b->n, piece, n + 1);
  b->n += n;
}

/* --- what is printed of a dimension: the first `head` and the last `tail` of n positions --- */

typedef struct span {
  int64_t n, head, tail;
} span;

static span span_of(int64_t n, int64_t most, int64_t edge_head, int64_t edge_tail) {
  return n <= most ? (span){n, n, 0} : (span){n, edge_head, edge_tail};
}

static int64_t shown(const span *s) { return s->head + s->tail; }

/* --- the printed corner, read into host memory --- */

typedef union cell {
  double f;
  int64_t i;
} cell;

typedef struct corner {
  int64_t matrices, rows, cols; /* printed */
  span row, col;
  bool is_float;
  cell *v; /* [matrices, rows, cols] */
} corner;

/* One block of a matrix, read densely: rows x cols from (r, k). */
static moe_status read_block(moe_tensor *t, int64_t at, int64_t rs, int64_t cs, int64_t rows, int64_t cols, cell *out, int64_t out_row,
                             bool is_float) {
  if (rows == 0 || cols == 0) return MOE_OK;
  cell block[(MAX_LINES + 1) * (MAX_COLS + 1)];
  const int64_t shape[2] = {rows, cols}, stride[2] = {rs, cs};
  moe_tensor *v = moe_view_of(t, 2, shape, stride, at);
  if (v == NULL) return moe_error_code();
  MOE_TRY(moe_read(v, block, is_float ? MOE_f64 : MOE_i64));
  for (int64_t i = 0; i < rows; i++) memcpy(out + i * out_row, block + i * cols, (size_t)cols * sizeof *block);
  return MOE_OK;
}

static moe_status read_matrix(moe_tensor *t, int64_t at, int64_t rs, int64_t cs, const corner *c, cell *out) {
  const span *r = &c->row, *k = &c->col;
  for (int a = 0; a < 2; a++)
    for (int b = 0; b < 2; b++) {
      int64_t row = a ? r->n - r->tail : 0, col = b ? k->n - k->tail : 0;
      MOE_TRY(read_block(t, at + row * rs + col * cs, rs, cs, a ? r->tail : r->head, b ? k->tail : k->head,
                         out + (a ? r->head : 0) * c->cols + (b ? k->head : 0), c->cols, c->is_float));
    }
  return MOE_OK;
}

/* --- numbers --- */

typedef struct format {
  int width, decimals;
  double scale; /* printed numbers are divided by it */
  int exponent;
} format;

static int cell_text(char *buf, const cell *v, const corner *c, const format *f, bool boolean) {
  if (boolean) return snprintf(buf, CELL, "%s", v->i ? "true" : "false");
  if (!c->is_float) return snprintf(buf, CELL, "%lld", (long long)v->i);
  if (isnan(v->f)) return snprintf(buf, CELL, "nan");
  if (isinf(v->f)) return snprintf(buf, CELL, v->f < 0 ? "-inf" : "inf");
  return snprintf(buf, CELL, "%.*f", f->decimals, v->f / f->scale);
}

/* One scale and one number of decimals for all that is printed. */
static format choose_format(const corner *c, bool boolean) {
  format f = {0, 0, 1, 0};
  int64_t n = c->matrices * c->rows * c->cols;
  if (c->is_float) {
    double most = 0;
    bool whole = true;
    for (int64_t i = 0; i < n; i++) {
      double v = c->v[i].f;
      if (!isfinite(v)) continue;
      most = fmax(most, fabs(v));
      whole = whole && v == nearbyint(v);
    }
    int e = most > 0 ? (int)floor(log10(most)) : 0;
    if (!(whole && e < 7)) {
      f.decimals = 4;
      if (e >= 5 || e < -3) {
        f.exponent = e;
        f.scale = pow(10, e);
        if (f.scale == 0 || !isfinite(most / f.scale)) f.exponent = 0, f.scale = 1; /* denormals */
      } else if (e >= 2) {
        f.decimals = 5 - e > 1 ? 5 - e : 1;
      }
    }
  }
  char buf[CELL];
  for (int64_t i = 0; i < n; i++) f.width = MOE_MAX(f.width, cell_text(buf, &c->v[i], c, &f, boolean));
  return f;
}

static void add_row(text *b, const corner *c, const format *f, const cell *row, bool boolean) {
  char buf[CELL];
  for (int64_t k = 0; k < c->cols; k++) {
    if (c->col.tail && k == c->col.head) add(b, "  …");
    cell_text(buf, &row[k], c, f, boolean);
    add(b, "%s%*s", k ? "  " : " ", f->width, buf);
  }
  add(b, "\n");
}

static void add_matrix(text *b, const corner *c, const format *f, const cell *m, bool boolean) {
  for (int64_t r = 0; r < c->rows; r++) {
    if (c->row.tail && r == c->row.head) add(b, " …\n");
    add_row(b, c, f, m + r * c->cols, boolean);
  }
}

/* "moe.Tensor f32 [512×8] cpu grad=add" */
static void add_summary(text *b, const moe_tensor *t) {
  add(b, "moe.Tensor %s [", moe_dtype_name(t->dtype));
  for (int d = 0; d < t->ndim; d++) add(b, d ? "×%lld" : "%lld", (long long)t->shape[d]);
  add(b, "] %s", moe_dev(t)->name);
  if (t->node) add(b, " grad=%s", t->node->op ? t->node->op->name : t->node->custom.name ? t->node->custom.name : "custom");
  else if (t->requires_grad) add(b, " requires_grad");
}

static moe_status print(text *b, moe_tensor *t) {
  corner c = {.matrices = 1, .is_float = moe_dtype_is_float(t->dtype)};
  bool boolean = t->dtype == MOE_bool;
  int n = t->ndim;
  int64_t total = 1; /* matrices */
  for (int d = 0; d < n - 2; d++) total *= t->shape[d];
  c.col = span_of(n > 0 ? t->shape[n - 1] : 1, MAX_COLS, EDGE_COLS, EDGE_COLS);
  if (n <= 2) c.row = span_of(n == 2 ? t->shape[0] : 1, MAX_LINES, 5, 4);
  else if (total == 1) c.row = span_of(t->shape[n - 2], MAX_LINES - 1, 4, 4);
  else c.row = span_of(t->shape[n - 2], SLICE_LINES, 1, 1);
  c.matrices = MOE_MIN(total, 2);
  c.rows = shown(&c.row);
  c.cols = shown(&c.col);
  c.v = malloc(sizeof *c.v * (size_t)(c.matrices * c.rows * c.cols + 1));
  if (c.v == NULL) return moe_fail(MOE_ENOMEM, "out of memory");
  int64_t at[2][MOE_MAX_DIM] = {{0}};
  moe_status st = MOE_OK;
  for (int64_t m = 0; m < c.matrices && st == MOE_OK && c.rows * c.cols > 0; m++) {
    int64_t rest = m, offset = t->offset;
    for (int d = n - 3; d >= 0; d--) {
      at[m][d] = rest % t->shape[d];
      rest /= t->shape[d];
      offset += at[m][d] * t->stride[d];
    }
    st = read_matrix(t, offset, n > 1 ? t->stride[n - 2] : 0, n > 0 ? t->stride[n - 1] : 0, &c, c.v + m * c.rows * c.cols);
  }
  if (st == MOE_OK && c.matrices * c.rows * c.cols > 0) {
    format f = choose_format(&c, boolean);
    if (f.exponent) add(b, " 1e%+03d ×\n", f.exponent);
    for (int64_t m = 0; m < c.matrices; m++) {
      if (n > 2) {
        add(b, " [");
        for (int d = 0; d < n - 2; d++) add(b, "%lld, ", (long long)at[m][d] + 1);
        add(b, "{}, {}]\n");
      }
      add_matrix(b, &c, &f, c.v + m * c.rows * c.cols, boolean);
    }
    if (total > c.matrices) add(b, " …\n");
  }
  free(c.v);
  if (st == MOE_OK) add_summary(b, t);
  if (st == MOE_OK && b->failed) st = moe_fail(MOE_ENOMEM, "out of memory");
  return st;
}

char *moe_tensor_text(moe_tensor *t) {
  text b = {0};
  moe_scope s = moe_scope_open();
  moe_status st = print(&b, t);
  moe_scope_close(s);
  if (st == MOE_OK) return b.s;
  free(b.s);
  return NULL;
}
