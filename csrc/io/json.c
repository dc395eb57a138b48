/* JSON: see json.h. One recursive descent, its depth bounded by MOE_JSON_DEPTH. */
#include "io/json.h"

#include <locale.h>
#include <math.h>
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

/* --- UTF-8 --- */

int moe_utf8_decode(const char *str, int64_t left, uint32_t *code) {
  const unsigned char *s = (const unsigned char *)str;
  if (left < 1) return 0;
  if (s[0] < 0x80) {
    *code = s[0];
    return 1;
  }
  int more = s[0] >= 0xF0 ? 3 : s[0] >= 0xE0 ? 2 : 1;
  if (s[0] < 0xC2 || s[0] > 0xF4 || left <= more) return 0;
  uint32_t c = s[0] & (0x3Fu >> more);
  for (int k = 1; k <= more; k++) {
    if ((s[k] & 0xC0) != 0x80) return 0;
    c = c << 6 | (s[k] & 0x3Fu);
  }
  static const uint32_t least[4] = {0, 0x80, 0x800, 0x10000};
  if (c < least[more] || c > 0x10FFFF || (c >= 0xD800 && c <= 0xDFFF)) return 0;
  *code = c;
  return more + 1;
}

bool moe_utf8_valid(const char *s, int64_t len) {
  for (int64_t i = 0; i < len;) {
    uint32_t c;
    int k = moe_utf8_decode(s + i, len - i, &c);
    if (k == 0) return false;
    i += k;
  }
  return true;
}

int moe_utf8_encode(uint32_t c, char *out) {
  if (c < 0x80) {
    out[0] = (char)c;
    return 1;
  }
  if (c < 0x800) {
    out[0] = (char)(0xC0 | c >> 6);
    out[1] = (char)(0x80 | (c & 0x3F));
    return 2;
  }
  if (c < 0x10000) {
    out[0] = (char)(0xE0 | c >> 12);
    out[1] = (char)(0x80 | (c >> 6 & 0x3F));
    out[2] = (char)(0x80 | (c & 0x3F));
    return 3;
  }
  out[0] = (char)(0xF0 | c >> 18);
  out[1] = (char)(0x80 | (c >> 12 & 0x3F));
  out[2] = (char)(0x80 | (c >> 6 & 0x3F));
  out[3] = (char)(0x80 | (c & 0x3F));
  return 4;
}

/* --- reading --- */

typedef struct parser {
  moe_json *j;
  const char *begin, *p, *end;
  char *out; /* where the next unescaped string goes; strings never grow, so `len + count` bytes suffice */
} parser;

static moe_status bad(parser *ps, const char *what) {
  return moe_fail(MOE_EIO, "JSON: %s at byte %lld", what, (long long)(ps->p - ps->begin) + 1);
}

static void skip_space(parser *ps) {
  while (ps->p < ps->end && (*ps->p == ' ' || *ps->p == '\n' || *ps->p == '\r' || *ps->p == '\t')) ps->p++;
}

static moe_status new_node(parser *ps, int32_t *at) {
  moe_json *j = ps->j;
  if (j->n == j->capacity) {
    if (j->n >= MOE_JSON_NODES) return bad(ps, "too many values");
    int32_t capacity = j->capacity == 0 ? 64 : j->capacity * 2;
    moe_json_node *grown = realloc(j->node, (size_t)capacity * sizeof *grown);
    if (grown == NULL) return moe_fail(MOE_ENOMEM, "JSON: out of memory");
    j->node = grown;
    j->capacity = capacity;
  }
  *at = j->n++;
  memset(&j->node[*at], 0, sizeof j->node[*at]);
  return MOE_OK;
}

static int hex4(const char *s) {
  int v = 0;
  for (int k = 0; k < 4; k++) {
    char c = s[k];
    int d = c >= '0' && c <= '9' ? c - '0' : c >= 'a' && c <= 'f' ? c - 'a' + 10 : c >= 'A' && c <= 'F' ? c - 'A' + 10 : -1;
    if (d < 0) return -1;
    v = v * 16 + d;
  }
  return v;
}

/* \uXXXX after the backslash and u; p stands on the digits. */
static moe_status parse_unicode(parser *ps) {
  int v = ps->end - ps->p < 4 ? -1 : hex4(ps->p);
  if (v < 0) return bad(ps, "bad \\u escape");
  uint32_t c = (uint32_t)v;
  ps->p += 4;
  if (c >= 0xD800 && c <= 0xDFFF) {
    int low = c < 0xDC00 && ps->end - ps->p >= 6 && ps->p[0] == '\\' && ps->p[1] == 'u' ? hex4(ps->p + 2) : -1;
    if (low < 0xDC00 || low > 0xDFFF) return bad(ps, "lone surrogate");
    ps->p += 6;
    c = 0x10000 + ((c - 0xD800) << 10) + ((uint32_t)low - 0xDC00);
  }
  ps->out += moe_utf8_encode(c, ps->out);
  return MOE_OK;
}

static moe_status parse_string(parser *ps, const char **s, int64_t *len) {
  static const char from[] = "\"\\/bfnrt", to[] = "\"\\/\b\f\n\r\t";
  char *start = ps->out;
  if (ps->p >= ps->end || *ps->p != '"') return bad(ps, "string expected");
  ps->p++;
  for (;;) {
    if (ps->p >= ps->end) return bad(ps, "unfinished string");
    unsigned char c = (unsigned char)*ps->p;
    if (c == '"') break;
    if (c < 0x20) return bad(ps, "control character in a string");
    if (c == '\\') {
      if (ps->end - ps->p < 2) return bad(ps, "unfinished string");
      char e = ps->p[1];
      if (e == 'u') {
        ps->p += 2;
        MOE_TRY(parse_unicode(ps));
        continue;
      }
      const char *k = e != '\0' ? strchr(from, e) : NULL;
      if (k == NULL) return bad(ps, "bad escape");
      *ps->out++ = to[k - from];
      ps->p += 2;
      continue;
    }
    uint32_t code;
    int n = moe_utf8_decode(ps->p, ps->end - ps->p, &code);
    if (n == 0) return bad(ps, "invalid UTF-8");
    memcpy(ps->out, ps->p, (size_t)n);
    ps->out += n;
    ps->p += n;
  }
  ps->p++;
  *s = start;
  *len = ps->out - start;
  *ps->out++ = '\0'; /* takes the place of a quote */
  return MOE_OK;
}

static bool is_digit(const parser *ps) { return ps->p < ps->end && *ps->p >= '0' && *ps->p <= '9'; }

static moe_status parse_number(parser *ps, moe_json_node *node) {
  const char *start = ps->p;
  bool integer = true;
  if (*ps->p == '-') ps->p++;
  if (!is_digit(ps)) return bad(ps, "number expected");
  if (*ps->p == '0') ps->p++;
  else
    while (is_digit(ps)) ps->p++;
  if (ps->p < ps->end && *ps->p == '.') {
    integer = false;
    ps->p++;
    if (!is_digit(ps)) return bad(ps, "digit expected");
    while (is_digit(ps)) ps->p++;
  }
  if (ps->p < ps->end && (*ps->p == 'e' || *ps->p == 'E')) {
    integer = false;
    ps->p++;
    if (ps->p < ps->end && (*ps->p == '+' || *ps->p == '-')) ps->p++;
    if (!is_digit(ps)) return bad(ps, "digit expected");
    while (is_digit(ps)) ps->p++;
  }
  if (integer) {
    bool neg = *start == '-', fits = true;
    uint64_t v = 0, most = neg ? (uint64_t)1 << 63 : INT64_MAX;
    for (const char *q = start + neg; q < ps->p && fits; q++) {
      uint64_t d = (uint64_t)(*q - '0');
      fits = v <= (most - d) / 10;
      v = v * 10 + d;
    }
    if (fits) {
      node->kind = MOE_JSON_INT;
      node->i = neg ? (int64_t)(0 - v) : (int64_t)v;
      return MOE_OK;
    }
  }
  char text[400];
  int64_t n = ps->p - start;
  if (n >= (int64_t)sizeof text) return bad(ps, "number too long");
  memcpy(text, start, (size_t)n);
  text[n] = '\0';
  char *point = strchr(text, '.'); /* strtod reads the locale's point */
  if (point != NULL) *point = *localeconv()->decimal_point;
  char *stop;
  node->kind = MOE_JSON_FLOAT;
  node->f = strtod(text, &stop);
  if (stop != text + n || !isfinite(node->f)) return bad(ps, "number out of range");
  return MOE_OK;
}

static bool word(parser *ps, const char *w) {
  size_t n = strlen(w);
  if ((size_t)(ps->end - ps->p) < n || memcmp(ps->p, w, n) != 0) return false;
  ps->p += n;
  return true;
}

static int compare_keys(const void *a, const void *b) {
  const moe_json_node *x = *(const moe_json_node *const *)a, *y = *(const moe_json_node *const *)b;
  int64_t n = MOE_MIN(x->key_len, y->key_len);
  int c = memcmp(x->key, y->key, (size_t)n);
  return c != 0 ? c : (x->key_len > y->key_len) - (x->key_len < y->key_len);
}

static moe_status check_keys(parser *ps, int32_t object) {
  moe_json *j = ps->j;
  int32_t count = j->node[object].count, i = 0;
  if (count < 2) return MOE_OK;
  const moe_json_node **list = malloc((size_t)count * sizeof *list);
  if (list == NULL) return moe_fail(MOE_ENOMEM, "JSON: out of memory");
  for (int32_t k = object + 1; i < count; k = j->node[k].next) list[i++] = &j->node[k];
  qsort(list, (size_t)count, sizeof *list, compare_keys);
  moe_status st = MOE_OK;
  for (i = 1; i < count && st == MOE_OK; i++)
    if (compare_keys(&list[i - 1], &list[i]) == 0)
      st = moe_fail(MOE_EIO, "JSON: duplicate key \"%.60s\"", list[i]->key);
  free(list);
  return st;
}

static moe_status parse_value(parser *ps, int32_t *at, int depth);

static moe_status parse_children(parser *ps, int32_t at, int depth, bool object) {
  char close = object ? '}' : ']';
  int32_t last = 0;
  ps->p++;
  skip_space(ps);
  if (ps->p < ps->end && *ps->p == close) {
    ps->p++;
    return MOE_OK;
  }
  for (;;) {
    const char *key = NULL;
    int64_t key_len = 0;
    int32_t child;
    if (object) {
      skip_space(ps);
      MOE_TRY(parse_string(ps, &key, &key_len));
      skip_space(ps);
      if (ps->p >= ps->end || *ps->p != ':') return bad(ps, "':' expected");
      ps->p++;
    }
    MOE_TRY(parse_value(ps, &child, depth + 1));
    moe_json_node *node = ps->j->node;
    node[child].key = key;
    node[child].key_len = key_len;
    if (last != 0) node[last].next = child;
    last = child;
    node[at].count++;
    skip_space(ps);
    if (ps->p >= ps->end) return bad(ps, "unfinished value");
    char c = *ps->p++;
    if (c == close) return object ? check_keys(ps, at) : MOE_OK;
    if (c != ',') {
      ps->p--;
      return bad(ps, object ? "',' or '}' expected" : "',' or ']' expected");
    }
  }
}

static moe_status parse_value(parser *ps, int32_t *at, int depth) {
  if (depth > MOE_JSON_DEPTH) return bad(ps, "nested too deeply");
  skip_space(ps);
  if (ps->p >= ps->end) return bad(ps, "value expected");
  MOE_TRY(new_node(ps, at));
  moe_json_node *node = &ps->j->node[*at];
  char c = *ps->p;
  if (c == '{' || c == '[') {
    node->kind = c == '{' ? MOE_JSON_OBJECT : MOE_JSON_ARRAY;
    return parse_children(ps, *at, depth, c == '{');
  }
  if (c == '"') {
    node->kind = MOE_JSON_STRING;
    return parse_string(ps, &node->s, &node->len);
  }
  if (c == '-' || (c >= '0' && c <= '9')) return parse_number(ps, node);
  node->kind = MOE_JSON_BOOL;
  if (word(ps, "true")) {
    node->i = 1;
    return MOE_OK;
  }
  if (word(ps, "false")) return MOE_OK;
  node->kind = MOE_JSON_NULL;
  return word(ps, "null") ? MOE_OK : bad(ps, "value expected");
}

moe_status moe_json_parse(moe_json *j, const char *text, int64_t len) {
  parser ps = {j, text, text, text + len, NULL};
  int32_t root;
  memset(j, 0, sizeof *j);
  j->text = malloc((size_t)len + 1);
  if (j->text == NULL) return moe_fail(MOE_ENOMEM, "JSON: out of memory");
  ps.out = j->text;
  moe_status st = parse_value(&ps, &root, 1);
  if (st == MOE_OK) {
    skip_space(&ps);
    if (ps.p != ps.end) st = bad(&ps, "text after the value");
  }
  if (st != MOE_OK) moe_json_free(j);
  return st;
}

void moe_json_free(moe_json *j) {
  free(j->node);
  free(j->text);
  memset(j, 0, sizeof *j);
}

int32_t moe_json_member(const moe_json *j, int32_t object, const char *key) {
  const moe_json_node *o = &j->node[object];
  int64_t len = (int64_t)strlen(key);
  if (o->kind != MOE_JSON_OBJECT) return -1;
  int32_t k = object + 1;
  for (int32_t i = 0; i < o->count; i++, k = j->node[k].next)
    if (j->node[k].key_len == len && memcmp(j->node[k].key, key, (size_t)len) == 0) return k;
  return -1;
}

/* --- writing --- */

void moe_text_add(moe_text *b, const char *s, int64_t n) {
  if (b->failed || n == 0) return;
  if (b->capacity - b->n < n) {
    int64_t capacity = MOE_MAX(b->capacity * 2, b->n + n + 256);
    char *grown = realloc(b->s, (size_t)capacity);
    if (grown == NULL) {
      b->failed = true;
      return;
    }
    b->s = grown;
    b->capacity = capacity;
  }
  memcpy(b->s + b->n, s, (size_t)n);
  b->n += n;
}

void moe_text_addf(moe_text *b, const char *fmt, ...) {
  char buf[256];
  va_list ap;
  va_start(ap, fmt);
  int n = vsnprintf(buf, sizeof buf, fmt, ap);
  va_end(ap);
  if (n < 0 || n >= (int)sizeof buf) b->failed = true;
  else moe_text_add(b, buf, n);
}

void moe_text_quote(moe_text *b, const char *s, int64_t n) {
  moe_text_add(b, "\"", 1);
  for (int64_t i = 0; i < n; i++) {
    unsigned char c = (unsigned char)s[i];
    if (c == '"' || c == '\\') moe_text_addf(b, "\\%c", c);
    else if (c < 0x20) moe_text_addf(b, "\\u%04x", c);
    else moe_text_add(b, s + i, 1);
  }
  moe_text_add(b, "\"", 1);
}

void moe_text_number(moe_text *b, double v) {
  char buf[40];
  int n = snprintf(buf, sizeof buf, "%.17g", v);
  bool plain = true;
  for (int i = 0; i < n; i++) {
    if (buf[i] == *localeconv()->decimal_point) buf[i] = '.';
    if (buf[i] == '.' || buf[i] == 'e') plain = false;
  }
  moe_text_add(b, buf, n);
  if (plain) moe_text_add(b, ".0", 2); /* stays a float when read back */
}

void moe_text_free(moe_text *b) {
  free(b->s);
  memset(b, 0, sizeof *b);
}
