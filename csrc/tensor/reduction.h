/* The kinds of the slots `reduce` and `scan` of tensor/kernels.def. */
#ifndef MOE_TENSOR_REDUCTION_H
#define MOE_TENSOR_REDUCTION_H

typedef enum moe_reduction {
  MOE_RED_SUM,
  MOE_RED_MEAN,
  MOE_RED_PROD,
  MOE_RED_MAX,    /* NaN wins */
  MOE_RED_MIN,    /* NaN wins */
  MOE_RED_COUNT,  /* elements that are not zero: i64 */
  MOE_RED_ANY,    /* bool */
  MOE_RED_ALL,    /* bool */
  MOE_RED_NORM1,  /* sum |x| */
  MOE_RED_NORM2,  /* sqrt(sum x^2) */
  MOE_RED_NORMP,  /* (sum |x|^p)^(1/p) */
  MOE_RED_MAXABS, /* the norm of p = inf */
  MOE_RED_MINABS, /* the norm of p = -inf */
  MOE_RED_KINDS
} moe_reduction;

typedef enum moe_scan { MOE_SCAN_SUM, MOE_SCAN_PROD } moe_scan;

/* Elementwise losses l(a, b). */
typedef enum moe_pair_loss {
  MOE_LOSS_SQUARE, /* (a - b)^2 */
  MOE_LOSS_ABS,    /* |a - b| */
  MOE_LOSS_HUBER,  /* d^2 / 2 within delta, delta (|d| - delta / 2) beyond */
  MOE_LOSS_KL,     /* b (log b - a), 0 where b = 0 */
  MOE_LOSS_KL_LOG, /* exp(b) (b - a) */
  MOE_LOSS_BCE,    /* max(a, 0) - a b + log1p(exp(-|a|)) */
  MOE_LOSS_KINDS
} moe_pair_loss;

#endif
