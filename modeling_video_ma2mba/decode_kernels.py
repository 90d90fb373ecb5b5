"""One decoding step in Triton: the table of all operations.

`decode_reference` holds the same functions in PyTorch, and their documentation. Reading one token is bound by memory
traffic: every weight once, every state once. For a batch of one, three kernels a layer do nothing else: norm, in_proj
and convolution in one; scan step and gate; gated norm, out_proj and the residual addition. Larger batches take five:
norm; in_proj; convolution and what the heads need to know; scan step and gate; out_proj in partial sums, which the
next norm adds up.
"""

from types import SimpleNamespace

from .decode_batch_kernels import batch_scan_step, prepare_step
from .decode_matrix_kernels import add_norm, group_norm, partial_product, product
from .decode_product_kernels import gated_linear_add, norm_linear, norm_linear_conv
from .decode_scan_kernels import scan_step

OPERATIONS = SimpleNamespace(
    add_norm=add_norm,
    norm_linear=norm_linear,
    norm_linear_conv=norm_linear_conv,
    scan_step=scan_step,
    product=product,
    prepare_step=prepare_step,
    batch_scan_step=batch_scan_step,
    partial_product=partial_product,
    gated_linear_add=gated_linear_add,
    group_norm=group_norm,
)
"""What `decode_step.token_step` is made of."""
