/* The operation table, and the signatures parsed from its rows. */
#include <pthread.h>
#include <stdlib.h>
#include <string.h>

#include "op/op.h"
#include "op/pointwise.h" /* the variants that rows name */
#include "tensor/reduction.h"

#define moe_bwd_none NULL
const moe_op moe_ops[MOE_OP_COUNT] = {
#define OP(name, args, results, forward, backward, variant, flags, examples, doc) \
  [MOE_OP_##name] = {#name, args, results, moe_fwd_##forward, moe_bwd_##backward, variant, flags, examples, doc},
#include "op/ops.def"
#undef OP
};
#undef moe_bwd_none

static moe_signature signatures[MOE_OP_COUNT];
static pthread_once_t once = PTHREAD_ONCE_INIT;

static const char *const kind_names[] = {"tensor", "operand", "index", "tensors", "number", "int", "dim", "dims",
                                         "pos",    "ints",    "bool",  "enum",    "dtype",  "device", "string"};

/* The number of `word` among choices "a|b|c", or -1. */
static int choice_of(const char *choices, const char *word) {
  size_t n = strlen(word);
  for (int i = 0; *choices; i++) {
    size_t len = strcspn(choices, "|");
    if (len == n && memcmp(choices, word, n) == 0) return i;
    choices += len + (choices[len] == '|');
  }
  return -1;
}

static moe_value parse_default(moe_param *p, const char *text) {
  moe_value v = {.kind = p->kind};
  moe_dtype dt;
  switch (p->kind) { /* kinds, not operations */
    case MOE_K_bool: v.i = strcmp(text, "true") == 0; break;
    case MOE_K_enum: v.i = choice_of(p->choices, text); break;
    case MOE_K_dtype: v.i = moe_dtype_from_name(text, &dt) ? dt : MOE_f32; break;
    case MOE_K_number: v.f = strtod(text, NULL); break;
    case MOE_K_operand:
      v.kind = MOE_K_number;
      v.f = strtod(text, NULL);
      v.is_int = strpbrk(text, ".eE") == NULL;
      break;
    case MOE_K_int:
    case MOE_K_dim:
    case MOE_K_pos: v.i = strtoll(text, NULL, 10); break;
    default: v.kind = MOE_K_none;
  }
  return v;
}

static void copy_text(char *to, size_t room, const char *from) {
  size_t n = strlen(from);
  if (n >= room) n = room - 1;
  memcpy(to, from, n);
  to[n] = '\0';
}

/* "name:kind?", "name:kind=default", "name:enum(a|b)=a", separated by commas. */
void moe_signature_parse(const char *args, const char *results, moe_signature *sig) {
  char part[256];
  memset(sig, 0, sizeof *sig);
  while (*args && sig->nparams < MOE_MAX_PARAM) {
    while (*args == ' ' || *args == ',') args++;
    size_t len = strcspn(args, ",");
    if (len == 0) break;
    size_t n = MOE_MIN(len, sizeof part - 1);
    memcpy(part, args, n);
    part[n] = '\0';
    args += len;
    moe_param *p = &sig->param[sig->nparams++];
    char *kind = strchr(part, ':'), *def = strchr(part, '=');
    if (def) *def++ = '\0';
    if (kind) *kind++ = '\0';
    else kind = part + strlen(part);
    char *opt = strchr(kind, '?');
    if (opt) *opt = '\0';
    copy_text(p->name, sizeof p->name, part);
    char *choices = strchr(kind, '(');
    if (choices) {
      *choices++ = '\0';
      choices[strcspn(choices, ")")] = '\0';
      copy_text(p->choices, sizeof p->choices, choices);
    }
    for (int k = 0; k < MOE_K_none; k++)
      if (strcmp(kind, kind_names[k]) == 0) p->kind = (moe_kind)k;
    p->optional = opt != NULL || def != NULL;
    p->def = def ? parse_default(p, def) : (moe_value){.kind = MOE_K_none};
  }
  if (strcmp(results, "tensors") == 0) {
    sig->nresults = -1;
    return;
  }
  sig->nresults = *results ? 1 : 0;
  for (const char *r = results; *r; r++) sig->nresults += *r == ',';
}

static void parse_all(void) {
  for (int i = 0; i < MOE_OP_COUNT; i++) moe_signature_parse(moe_ops[i].args, moe_ops[i].results, &signatures[i]);
}

const moe_signature *moe_op_signature(const moe_op *op) {
  pthread_once(&once, parse_all);
  return &signatures[op - moe_ops];
}

const char *moe_kind_name(moe_kind k) { return k < MOE_K_none ? kind_names[k] : "none"; }

const moe_op *moe_op_find(const char *name) {
  for (int i = 0; i < MOE_OP_COUNT; i++)
    if (strcmp(moe_ops[i].name, name) == 0) return &moe_ops[i];
  return NULL;
}
