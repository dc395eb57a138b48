/* C layers: named parameters, buffers and options behind one call.
**
** csrc/nn/modules.def holds one row a layer; the constructor moe.<group>.<name>, its option check, the help,
** the reference page and the stubs expand from it (csrc/lua/module.c). A layer's forward composes operations.
**
**   MODULE(group, name, options, npositional, call, results, init, forward, doc)
**   MIXER (group, name, options, npositional, call, state, init, forward, start, doc)
**     group        "nn", "router", "experts", "mixer": moe.<group>.<name>; a bare word, as is name
**     options      signature language of op/op.h; every layer also takes `dtype` and `device`
**     npositional  so many of the options may be given as positional arguments; the rest in one table
**     call         signature of the call: "x:tensor, mask:tensor?"
**     results      names of the results: "y", or "y, weight"
**     state        names of the tensors of a mixer's state: "k, v". In Lua the call is
**                  `y = m(x [, call arguments])` or `y, state = m(x, state [, call arguments])`,
**                  the state a table of these names
**     init         moe_nn_init_<init>(m): checks the options, makes and fills the slots
**     forward      moe_nn_forward_<forward>(m, c): c->out (and c->next) from c->arg (and c->state)
**     start        moe_nn_start_<start>(m, batch, out): the empty state, for `m:state(batch)`
*/
#ifndef MOE_NN_MODULE_H
#define MOE_NN_MODULE_H

#include "op/op.h"

enum { MOE_MODULE_SLOTS = 16, MOE_MODULE_DATA = 16, MOE_MODULE_RESULTS = 4, MOE_MODULE_STATE = 4 };

/* Tags of a tensor (moe_tensor.tag). */
enum {
  MOE_TAG_PARAMETER = 1,
  MOE_TAG_BUFFER = 2,   /* saved in the state dict, not trained */
  MOE_TAG_NO_DECAY = 4, /* optimizers leave it out of weight decay */
  MOE_TAG_KEEP_TYPE = 8 /* keeps its element type when its module is converted (state-space decays, counters) */
};

typedef struct moe_module moe_module;

typedef struct moe_module_call {
  int base;            /* what index-valued arguments count from */
  const moe_value *arg; /* by the class's call signature, defaults filled in */
  bool stateful;       /* a state came in: fill next[] too */
  moe_tensor *state[MOE_MODULE_STATE]; /* NULL: empty */
  moe_tensor *out[MOE_MODULE_RESULTS]; /* to fill, scoped; NULL = failed */
  moe_tensor *next[MOE_MODULE_STATE];  /* to fill, scoped */
} moe_module_call;

typedef moe_status moe_module_init_fn(moe_module *m);
typedef moe_status moe_module_forward_fn(moe_module *m, moe_module_call *c);
typedef moe_status moe_module_start_fn(moe_module *m, int64_t batch, moe_tensor **out);

typedef struct moe_module_class {
  const char *group, *name, *options;
  int npositional;
  const char *call, *results, *state; /* state: "" for a layer without one */
  moe_module_init_fn *init;
  moe_module_forward_fn *forward;
  moe_module_start_fn *start; /* NULL without state */
  const char *doc;
} moe_module_class;

typedef struct moe_slot {
  const char *name;  /* static; may hold a dot: "o_proj.weight" */
  moe_tensor *t;     /* owned; NULL when absent (bias = false) */
} moe_slot;

struct moe_module {
  const moe_module_class *cls;
  bool training;
  moe_dtype dtype;
  moe_device *device;
  moe_value opt[MOE_MAX_PARAM]; /* in the order of cls->options; strings and lists are owned copies */
  int nslots;
  moe_slot slot[MOE_MODULE_SLOTS];
  int64_t data[MOE_MODULE_DATA]; /* the layer's own numbers */
};

extern const moe_module_class moe_modules[];
extern const int moe_module_count;
const moe_module_class *moe_module_find(const char *group, const char *name);
/* Parsed once. */
const moe_signature *moe_module_options(const moe_module_class *cls);
const moe_signature *moe_module_call_signature(const moe_module_class *cls);
/* The comma-separated names of `results` or `state`: copies name i into buf; false past the last. */
bool moe_module_name_at(const char *names, int i, char *buf, int size);

/* Owned; runs init. opt: all of the class's options, absent ones MOE_K_none; copied. */
moe_module *moe_module_new(const moe_module_class *cls, const moe_value *opt);
void moe_module_free(moe_module *m);

/* For init: makes a slot of the module's type, uninitialised, scoped; NULL on failure. The name is static. */
moe_tensor *moe_module_parameter(moe_module *m, const char *name, int ndim, const int64_t *shape);
moe_tensor *moe_module_buffer(moe_module *m, const char *name, moe_dtype dtype, int ndim, const int64_t *shape);
/* A slot that this module does not have: reads as nil. */
void moe_module_absent(moe_module *m, const char *name);

/* The tensor in a slot, or NULL. */
moe_tensor *moe_module_get(const moe_module *m, const char *name);
/* Option by name; MOE_K_none when absent. */
const moe_value *moe_module_opt(const moe_module *m, const char *name);
/* The same as a number; `absent` when it was not given. */
int64_t moe_module_int(const moe_module *m, const char *name, int64_t absent);
double moe_module_number(const moe_module *m, const char *name, double absent);
bool moe_module_flag(const moe_module *m, const char *name);
const char *moe_module_string(const moe_module *m, const char *name); /* NULL when absent */
/* Fails with "linear: in_features must be at least 1, got 0"; absent options pass. */
moe_status moe_module_at_least(const moe_module *m, const char *name, int64_t least);
/* Fails with the layer's name before the message. */
moe_status moe_module_fail(const moe_module *m, const char *fmt, ...) MOE_PRINTF(2, 3) MOE_COLD;

/* Converts a leaf in place, its gradient too: whoever holds the tensor sees the new type (dtype < 0: keep)
** and device (NULL: keep). */
moe_status moe_leaf_to(moe_tensor *t, int dtype, moe_device *dev);
moe_status moe_module_to(moe_module *m, int dtype, moe_device *dev);
/* Puts t into slot i (shapes must agree; retained, tagged as the old one). */
moe_status moe_module_put(moe_module *m, int i, moe_tensor *t);

/* --- the functions of the rows --- */
#define MODULE(group, name, options, npositional, call, results, init, forward, doc) \
  moe_module_init_fn moe_nn_init_##init;                                             \
  moe_module_forward_fn moe_nn_forward_##forward;
#define MIXER(group, name, options, npositional, call, state, init, forward, start, doc) \
  moe_module_init_fn moe_nn_init_##init;                                                 \
  moe_module_forward_fn moe_nn_forward_##forward;                                        \
  moe_module_start_fn moe_nn_start_##start;
#include "nn/modules.def"
#undef MODULE
#undef MIXER

#endif
