/* einsum: sums of products named by letters, composed of recorded operations. Operands meet pairwise, from left to
** right; a pair is permuted to [batch, left, summed] x [batch, summed, right] and multiplied as matrices. */
#include <ctype.h>
#include <string.h>

#include "autograd/graph.h"
#include "op/product.h"

enum { LETTERS = 52, LABELS = LETTERS + MOE_MAX_DIM }; /* a-z, A-Z, then the dimensions of an ellipsis, the last one last */

typedef struct term {
  moe_tensor *t;
  int n; /* dimensions; label[i] names dimension i */
  int label[2 * MOE_MAX_DIM];
} term;

typedef struct equation {
  moe_ctx *c;
  const char *text;
  int64_t size[LABELS]; /* of each label; -1: not seen */
  int dots;             /* dimensions of the longest ellipsis */
} equation;

static int letter(char ch) {
  if (ch >= 'a' && ch <= 'z') return ch - 'a';
  if (ch >= 'A' && ch <= 'Z') return ch - 'A' + 26;
  return -1;
}

static char letter_name(int label) { return label < 26 ? (char)('a' + label) : label < LETTERS ? (char)('A' + label - 26) : '.'; }

/* Reads the letters of one term, up to ',' or '-' or the end, into label; `dots` dimensions stand for an ellipsis. */
static moe_status read_term(equation *e, const char **at, int dots, term *out, bool *ellipsis) {
  const char *p = *at;
  out->n = 0;
  *ellipsis = false;
  for (; *p && *p != ',' && *p != '-'; p++) {
    if (isspace((unsigned char)*p)) continue;
    int l = letter(*p);
    if (l < 0 && strncmp(p, "...", 3) == 0 && !*ellipsis) {
      *ellipsis = true;
      p += 2;
      for (int i = 0; i < dots && out->n < MOE_MAX_DIM; i++) out->label[out->n++] = LABELS - dots + i;
      continue;
    }
    if (l < 0) return OP_FAIL(e->c, "the equation \"%.100s\" holds '%.1s' where a letter was expected", e->text, p);
    if (out->n >= MOE_MAX_DIM) return OP_FAIL(e->c, "a term of the equation \"%.100s\" has more than %d dimensions", e->text, MOE_MAX_DIM);
    out->label[out->n++] = l;
  }
  *at = p;
  return MOE_OK;
}

static int count_letters(const char *p) {
  int n = 0;
  for (; *p && *p != ',' && *p != '-'; p++) n += letter(*p) >= 0;
  return n;
}

static moe_status read_operand(equation *e, const char **at, int number, moe_tensor *t, term *out) {
  int letters = count_letters(*at), dots = t->ndim - letters;
  bool ellipsis;
  char shape[MOE_SHAPE_TEXT];
  const char *from = *at;
  MOE_TRY(read_term(e, at, dots > 0 ? dots : 0, out, &ellipsis));
  if (dots < 0 || (dots > 0 && !ellipsis))
    return OP_FAIL(e->c, "operand %d is %s, its term \"%.*s\" has %d letters", number, moe_shape_of(shape, t),
                   (int)MOE_MIN(*at - from, 40), from, letters);
  if (ellipsis && dots > e->dots) e->dots = dots;
  out->t = t;
  for (int d = 0; d < out->n; d++) {
    int l = out->label[d];
    int64_t n = t->shape[d], *size = &e->size[l];
    if (*size < 0 || (l >= LETTERS && *size == 1)) *size = n;
    else if (*size != n && !(l >= LETTERS && n == 1))
      return OP_FAIL(e->c, "'%c' is %lld in one operand and %lld in operand %d, which is %s", letter_name(l), (long long)*size,
                     (long long)n, number, moe_shape_of(shape, t));
  }
  return MOE_OK;
}

static int find(const term *x, int label) {
  for (int d = 0; d < x->n; d++)
    if (x->label[d] == label) return d;
  return -1;
}

static void drop(term *x, int d) {
  for (int i = d; i + 1 < x->n; i++) x->label[i] = x->label[i + 1];
  x->n--;
}

/* A letter twice in one operand means its diagonal. */
static void take_diagonals(term *x) {
  for (int d = 0; d < x->n; d++)
    for (int k = d + 1; k < x->n; k++)
      if (x->label[d] == x->label[k]) {
        int l = x->label[d];
        x->t = MOE_CALL(diagonal, T(x->t), I(0), I(d), I(k));
        drop(x, k);
        drop(x, d);
        x->label[x->n++] = l; /* the diagonal comes last */
        d = -1;
        break;
      }
}

/* Sums the labels that `keep` does not want. */
static void sum_out(term *x, const bool *keep) {
  int64_t dims[MOE_MAX_DIM];
  int n = 0, left = 0;
  for (int d = 0; d < x->n; d++) {
    if (keep[x->label[d]]) x->label[left++] = x->label[d];
    else dims[n++] = d;
  }
  x->n = left;
  if (n > 0) x->t = MOE_CALL(sum, T(x->t), INTS(dims, n));
}

/* Brings the dimensions into the order of label[0..n). */
static void arrange(term *x, const int *label, int n) {
  int64_t dims[MOE_MAX_DIM];
  bool same = true;
  for (int i = 0; i < n; i++) {
    dims[i] = find(x, label[i]);
    same = same && dims[i] == i;
  }
  if (!same) x->t = MOE_CALL(permute, T(x->t), INTS(dims, n));
  for (int i = 0; i < n; i++) x->label[i] = label[i];
}

/* Dimensions of an ellipsis may be 1 in one operand: repeat them. */
static void stretch(const equation *e, term *x) {
  int64_t shape[MOE_MAX_DIM];
  bool same = true;
  if (x->t == NULL) return;
  for (int d = 0; d < x->n; d++) {
    shape[d] = e->size[x->label[d]];
    same = same && shape[d] == x->t->shape[d];
  }
  if (!same) x->t = MOE_CALL(expand, T(x->t), INTS(shape, x->n));
}

static moe_status too_many(const equation *e) {
  return OP_FAIL(e->c, "an intermediate result of \"%.100s\" has more than %d dimensions", e->text, MOE_MAX_DIM);
}

/* A size so large that no tensor has it stays one: the reshape that gets it fails. */
static void multiply_by(int64_t *size, int64_t n) {
  if (__builtin_mul_overflow(*size, n, size)) *size = INT64_MAX;
}

/* x <- x times y, keeping the labels that `keep` wants. */
static moe_status join(const equation *e, term *x, term *y, const bool *keep) {
  int batch[MOE_MAX_DIM], left[MOE_MAX_DIM], right[MOE_MAX_DIM], sum[MOE_MAX_DIM], nb = 0, nl = 0, nr = 0, ns = 0;
  bool keep_x[LABELS], keep_y[LABELS];
  for (int l = 0; l < LABELS; l++) {
    keep_x[l] = keep[l] || find(y, l) >= 0;
    keep_y[l] = keep[l] || find(x, l) >= 0;
  }
  sum_out(x, keep_x);
  sum_out(y, keep_y);
  stretch(e, x);
  stretch(e, y);
  int64_t sb = 1, sl = 1, sr = 1, ss = 1, shape[2 * MOE_MAX_DIM];
  for (int d = 0; d < x->n; d++) {
    int l = x->label[d];
    if (find(y, l) < 0) left[nl++] = l, multiply_by(&sl, e->size[l]);
    else if (keep[l]) batch[nb++] = l, multiply_by(&sb, e->size[l]);
    else sum[ns++] = l, multiply_by(&ss, e->size[l]);
  }
  for (int d = 0; d < y->n; d++)
    if (find(x, y->label[d]) < 0) right[nr++] = y->label[d], multiply_by(&sr, e->size[y->label[d]]);
  if (nb + nl + nr > MOE_MAX_DIM) return too_many(e);

  int order[2 * MOE_MAX_DIM], n = 0;
  for (int i = 0; i < nb; i++) order[n++] = batch[i];
  for (int i = 0; i < nl; i++) order[n++] = left[i];
  for (int i = 0; i < ns; i++) order[n++] = sum[i];
  arrange(x, order, n);
  n = nb;
  for (int i = 0; i < ns; i++) order[n++] = sum[i];
  for (int i = 0; i < nr; i++) order[n++] = right[i];
  arrange(y, order, n);
  if (ns == 0) { /* nothing is summed: a product of elements */
    x->t = MOE_CALL(reshape, T(x->t), INTS(((const int64_t[]){sb, sl, 1}), 3));
    y->t = MOE_CALL(reshape, T(y->t), INTS(((const int64_t[]){sb, 1, sr}), 3));
    x->t = MOE_CALL(mul, T(x->t), T(y->t));
  } else if (nb == 0) {
    x->t = MOE_CALL(reshape, T(x->t), INTS(((const int64_t[]){sl, ss}), 2));
    y->t = MOE_CALL(reshape, T(y->t), INTS(((const int64_t[]){ss, sr}), 2));
    x->t = MOE_CALL(matmul, T(x->t), T(y->t));
  } else {
    x->t = MOE_CALL(reshape, T(x->t), INTS(((const int64_t[]){sb, sl, ss}), 3));
    y->t = MOE_CALL(reshape, T(y->t), INTS(((const int64_t[]){sb, ss, sr}), 3));
    x->t = MOE_CALL(matmul, T(x->t), T(y->t));
  }
  x->n = 0;
  for (int i = 0; i < nb; i++) x->label[x->n++] = batch[i];
  for (int i = 0; i < nl; i++) x->label[x->n++] = left[i];
  for (int i = 0; i < nr; i++) x->label[x->n++] = right[i];
  for (int i = 0; i < x->n; i++) shape[i] = e->size[x->label[i]];
  x->t = MOE_CALL(reshape, T(x->t), INTS(shape, x->n));
  return x->t ? MOE_OK : moe_fail_prefix("einsum");
}

enum { MAX_OPERANDS = 16 };

moe_status moe_fwd_einsum(moe_ctx *c) {
  equation e = {.c = c, .text = c->arg[0].s};
  for (int l = 0; l < LABELS; l++) e.size[l] = -1;
  int count = c->arg[1].list.n, uses[LABELS] = {0};
  term in[MAX_OPERANDS], out = {0};
  const char *p = e.text;
  if (count < 1 || count > MAX_OPERANDS) return OP_FAIL(c, "takes from 1 to %d tensors, got %d", MAX_OPERANDS, count);
  for (int i = 0; i < count; i++) {
    MOE_TRY(read_operand(&e, &p, i + 1, c->arg[1].list.v[i], &in[i]));
    for (int d = 0; d < in[i].n; d++) uses[in[i].label[d]]++;
    bool more = *p == ',';
    if (more != (i + 1 < count)) {
      int terms = 1;
      for (const char *q = e.text; *q && *q != '-'; q++) terms += *q == ',';
      return OP_FAIL(c, "the equation \"%.100s\" has %d terms for %d tensors", e.text, terms, count);
    }
    p += more;
  }
  if (*p) { /* "->" and the output */
    if (strncmp(p, "->", 2) != 0) return OP_FAIL(c, "the equation \"%.100s\" has a '-' that is no \"->\"", e.text);
    p += 2;
    bool ellipsis;
    MOE_TRY(read_term(&e, &p, e.dots, &out, &ellipsis));
    if (*p) return OP_FAIL(c, "the equation \"%.100s\" goes on after its output: \"%.20s\"", e.text, p);
    for (int d = 0; d < out.n; d++) {
      int l = out.label[d];
      if (uses[l] == 0 || find(&out, l) != d)
        return OP_FAIL(c, "'%c' of the output of \"%.100s\" is %s", letter_name(l), e.text,
                       uses[l] == 0 ? "in no operand" : "there twice");
    }
  } else { /* the letters that occur once, in the order of the alphabet, after an ellipsis */
    for (int l = LABELS - e.dots; l < LABELS; l++) out.label[out.n++] = l;
    for (int i = 0; i < LETTERS; i++) {
      int l = i < 26 ? i + 26 : i - 26; /* capitals first, as their codes are */
      if (uses[l] == 1 && out.n < MOE_MAX_DIM) out.label[out.n++] = l;
    }
  }
  for (int i = 0; i < count; i++) take_diagonals(&in[i]);
  for (int i = 1; i < count; i++) {
    bool keep[LABELS] = {false};
    for (int d = 0; d < out.n; d++) keep[out.label[d]] = true;
    for (int k = i + 1; k < count; k++)
      for (int d = 0; d < in[k].n; d++) keep[in[k].label[d]] = true;
    MOE_TRY(join(&e, &in[0], &in[i], keep));
  }
  bool keep[LABELS] = {false};
  for (int d = 0; d < out.n; d++) keep[out.label[d]] = true;
  sum_out(&in[0], keep);
  stretch(&e, &in[0]);
  arrange(&in[0], out.label, out.n);
  /* never the operand itself: a result is a tensor of its own */
  if (in[0].t == c->arg[1].list.v[0]) in[0].t = MOE_CALL(clone, T(in[0].t));
  return in[0].t ? moe_set_out(c, 0, in[0].t) : moe_fail_prefix("einsum");
}
