/* The operation table and how an operation is called.
**
** csrc/op/ops.def holds one row an operation; everything else expands from it: the enum here, the
** table in op.c, the Lua method and function (csrc/lua/ops.c), the help, the reference page, the
** editor stubs, the gradient check and the device-parity check.
**
** A row:  OP(name, args, results, forward, backward, variant, flags, examples, doc)
**   args      "x:tensor, dim:dims?, keepdim:bool=false" - see moe_kind; `?` = may be absent,
**             `=value` = default (a number, true/false, an enum's choice)
**   results   "tensor", "tensor, index", "tensors" (any number)
**   forward   moe_fwd_<forward>(moe_ctx *): checks, makes the results with moe_out, runs kernels, moe_saves
**   backward  moe_bwd_<backward>(moe_ctx *): fills gin from gout; `none` = not differentiable
**   variant   an int the forward and backward find in c->op->variant (which kernel of a family)
**   flags     MOE_F_...
**   examples  arguments for the automatic checks, several sets separated by ';', in a mini language:
**             N(2,3) normal f64, P(2,3) uniform in [0.5,1.5], I(n,2,3) index tensor of values 1..n,
**             B(2,3) random bool; numbers, true, false, "strings", {1,2}, nil, {name = value} last
**   doc       one line, with shapes: "x [.., n] -> ..." ; formula and source where it has one
**
** Writing an operation:
**   moe_status moe_fwd_foo(moe_ctx *c) {
**     moe_tensor *x = moe_dense(c->arg[0].t, compute type);        (NULL-safe, scoped)
**     moe_tensor *y = moe_out(c, 0, x->ndim, x->shape, x->dtype);
**     if (x == NULL || y == NULL) return moe_error_code();
**     moe_save(c, y);
**     return MOE_RUN(moe_dev(x), c->op->name, foo, ...);
**   }
** The dispatcher opens a scope around forward and backward, so temporaries need no release. Inside a
** forward nothing records. A backward runs recorded only under create_graph; compose it of MOE_CALLs
** where that costs nothing, so that second derivatives come for free; else call kernels directly.
*/
#ifndef MOE_OP_OP_H
#define MOE_OP_OP_H

#include "tensor/env.h"
#include "tensor/tensor.h"

typedef enum moe_op_id {
#define OP(name, ...) MOE_OP_##name,
#include "op/ops.def"
#undef OP
  MOE_OP_COUNT
} moe_op_id;

enum {
  MOE_F_NONE = 0,
  MOE_F_INPLACE = 1,  /* has a `name_` form that writes the result over its first argument */
  MOE_F_FUNCTION = 2, /* moe.name only, no method (creation) */
  MOE_F_INTERNAL = 4, /* for C code; not exported to Lua */
  MOE_F_VIEW = 8,     /* results share the first argument's storage */
  MOE_F_RANDOM = 16,  /* draws from the generator */
  MOE_F_NOCHECK = 32, /* the automatic gradient check does not apply (a spec of its own covers it) */
  MOE_F_METHOD = 64,  /* method only, no moe.name */
  MOE_F_AUTOCAST = 256, /* under moe.autocast its f32 arguments are taken in the type asked for */
  MOE_F_COMPOSED = 128 /* the forward is made of recorded calls: its results bring their own history; backward is `none` */
};

/* Kinds of arguments. In C: dimensions and positions count from 0, -1 = the last. */
typedef enum moe_kind {
  MOE_K_tensor,  /* .t */
  MOE_K_operand, /* a tensor (.t) or a number (.f, is_int tells "3" from "3.0") */
  MOE_K_index,   /* a tensor of i64/i32/u8 whose values are positions counting from c->base (.t) */
  MOE_K_tensors, /* a list of tensors (.list) */
  MOE_K_number,  /* .f */
  MOE_K_int,     /* a count or size (.i) */
  MOE_K_dim,     /* a dimension (.i); not range-checked: use moe_arg_dim */
  MOE_K_dims,    /* a list of dimensions, or one (.ints) */
  MOE_K_pos,     /* a position along a dimension (.i) */
  MOE_K_ints,    /* a list of integers: sizes, repeats, paddings (.ints) */
  MOE_K_bool,    /* .i */
  MOE_K_enum,    /* enum(a|b|c): the number of the choice (.i) */
  MOE_K_dtype,   /* .i */
  MOE_K_device,  /* .dev */
  MOE_K_string,  /* .s */
  MOE_K_none     /* absent; only as the kind of a value */
} moe_kind;

typedef struct moe_value {
  moe_kind kind; /* what is here: MOE_K_none when absent; an operand is MOE_K_tensor or MOE_K_number */
  bool is_int;
  union {
    moe_tensor *t;
    double f;
    int64_t i;
    const char *s;
    moe_device *dev;
    struct {
      const int64_t *v;
      int n;
    } ints;
    struct {
      moe_tensor **v;
      int n;
    } list;
  };
} moe_value;

typedef struct moe_param {
  char name[24];
  moe_kind kind;
  bool optional;    /* may be absent (default included) */
  moe_value def;    /* MOE_K_none when it has none */
  char choices[96]; /* enum: "mean|sum|none" */
} moe_param;

typedef struct moe_ctx moe_ctx;
typedef moe_status moe_op_fn(moe_ctx *c);

typedef struct moe_op {
  const char *name, *args, *results;
  moe_op_fn *forward, *backward;
  int variant;
  unsigned flags;
  const char *examples, *doc;
} moe_op;

enum { MOE_MAX_PARAM = 24, MOE_MAX_OUT = 64, MOE_MAX_SAVED = 16, MOE_MAX_INPUT = 1024 };

typedef struct moe_signature {
  int nparams, nresults; /* nresults = -1: any number */
  moe_param param[MOE_MAX_PARAM];
} moe_signature;

extern const moe_op moe_ops[MOE_OP_COUNT];
const moe_signature *moe_op_signature(const moe_op *op); /* parsed once */
const moe_op *moe_op_find(const char *name);             /* NULL when there is none */
/* Parses a row's two columns; also used for layers (nn/module.h). */
void moe_signature_parse(const char *args, const char *results, moe_signature *sig);
const char *moe_kind_name(moe_kind k);

/* Shape and type of a tensor that is not kept. */
typedef struct moe_meta {
  moe_dtype dtype;
  int ndim;
  const int64_t *shape;
  moe_device *device;
} moe_meta;

struct moe_ctx {
  const moe_op *op;
  int base;   /* what index-valued tensors count from: 0 in C, 1 from Lua */
  int nargs;
  moe_value *arg; /* all of the signature, defaults filled in. In backward .t of tensors is NULL: use in[] */
  /* forward */
  int nout;
  moe_tensor *out[MOE_MAX_OUT];
  moe_tensor *inplace; /* moe_out(c, 0, ...) must return this one */
  bool record;         /* a backward will be wanted: whoever does extra work only for it asks this */
  int nsaved;
  moe_tensor *saved[MOE_MAX_SAVED];
  uint32_t saved_version[MOE_MAX_SAVED]; /* the storage's version when it was saved */
  /* backward: inputs in order, a list argument taking one place a tensor; c->slot[i] = first place of arg i */
  int slot[MOE_MAX_PARAM];
  int nin;
  const moe_meta *in;   /* [nin] */
  const bool *need;     /* [nin] a gradient is wanted for this input */
  moe_tensor **gout;    /* [nout] NULL = zero */
  const moe_meta *outs; /* [nout] */
  moe_tensor **gin;     /* [nin] to fill with scoped tensors shaped as in[] (moe_unbroadcast); NULL = zero */
  int64_t user[4];      /* free for a forward to leave numbers for its backward (rng offsets, flags) */
};

/* Makes result k: contiguous; written over c->inplace when the call is in place (then shape and type must fit). */
moe_tensor *moe_out(moe_ctx *c, int k, int ndim, const int64_t *shape, moe_dtype dtype);
/* Sets result k to a tensor made otherwise (a view, a composed result). Returns a status. */
moe_status moe_set_out(moe_ctx *c, int k, moe_tensor *t);
/* Keeps t for the backward as c->saved[number], the number counting up from 0. Cheap when !c->record. NULL may be saved. */
void moe_save(moe_ctx *c, moe_tensor *t);
/* g summed over the dimensions that were broadcast, cast to the input's type. */
moe_tensor *moe_unbroadcast(moe_tensor *g, const moe_meta *to);
/* Dimension argument i resolved against ndim: 0..ndim-1, or -1 with an error. A scalar counts as one dimension. */
int moe_arg_dim(moe_ctx *c, int i, int ndim);
/* A dims argument as flags over ndim (absent = all); false with an error for a bad or repeated one. */
bool moe_arg_dims(moe_ctx *c, int i, int ndim, bool *flag);
/* Fails with the operation's name before the message. */
#define OP_FAIL(c, ...) moe_op_fail((c), MOE_EINVAL, __VA_ARGS__)
moe_status moe_op_fail(const moe_ctx *c, moe_status code, const char *fmt, ...) MOE_PRINTF(3, 4) MOE_COLD;

/* --- calling --- */
/* Runs op on args (missing ones at the end are defaults), records it where needed. outs: room for MOE_MAX_OUT
** or the fixed count; results are scoped. inplace: write over the first argument. */
moe_status moe_call(const moe_op *op, int base, bool inplace, const moe_value *args, int nargs, moe_tensor **outs, int *nouts);
/* One result, from C; NULL on failure, or when a required tensor argument is NULL (the earlier error stands). */
moe_tensor *moe_call1(moe_op_id id, const moe_value *args, int nargs);
/* Two or more results. */
moe_status moe_calln(moe_op_id id, const moe_value *args, int nargs, moe_tensor **outs);

#define MOE_CALL(name, ...) \
  moe_call1(MOE_OP_##name, (const moe_value[]){__VA_ARGS__}, (int)(sizeof((const moe_value[]){__VA_ARGS__}) / sizeof(moe_value)))
#define MOE_CALLN(outs, name, ...)                                 \
  moe_calln(MOE_OP_##name, (const moe_value[]){__VA_ARGS__},       \
            (int)(sizeof((const moe_value[]){__VA_ARGS__}) / sizeof(moe_value)), (outs))

/* Values for MOE_CALL: T(tensor) F(number) I(integer, dim, bool, enum, dtype) INTS(v, n) DIM1(d) TS(list, n) NIL */
#define T(x) ((moe_value){.kind = MOE_K_tensor, .t = (x)})
#define F(x) ((moe_value){.kind = MOE_K_number, .f = (x)})
#define I(x) ((moe_value){.kind = MOE_K_int, .is_int = true, .i = (x)})
#define INTS(p, count) ((moe_value){.kind = MOE_K_ints, .ints = {(p), (count)}})
#define DIM1(d) INTS(((const int64_t[]){(d)}), 1)
#define TS(p, count) ((moe_value){.kind = MOE_K_tensors, .list = {(p), (count)}})
#define NIL ((moe_value){.kind = MOE_K_none})

/* --- the functions of the rows --- */
#define OP(name, args, results, forward, backward, ...) \
  moe_op_fn moe_fwd_##forward, moe_bwd_##backward;
#include "op/ops.def"
#undef OP

#endif
