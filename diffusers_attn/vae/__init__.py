"""Encodes and decodes with an unmodified VAE of diffusers on several ranks: each rank computes some rows of the image.

1. `split`: the public functions. They replace the `forward` of a VAE's encoder and decoder (`parts`).
2. `row_split`: a tensor subclass with the shape of the full tensor, of which a rank holds some rows. `rows` describes
   which, `team` gathers over the ranks.
3. What operations do to such tensors: `functions` has those of `torch.nn.functional`, `operators`, `views`, `matmul`
   and `convolution` those of ATen. `alignment` makes operands fit together. `halo` (for `windows`), `norms` and
   `attend` exchange with other ranks. An operation without a rule is an error (`unsplittable`). `shortcuts` has the
   rules of the most frequent functions.
4. `row_unit`: rows of an image that become one row of latents.

Why a subclass with the full shape: a VAE computes with shapes (masks, sizes of reshapes, whether to use tiles). With
the full shape, its code does on every rank what it does in one process, and each tensor carries the place of its rows.
The alternatives were patched layers, which do not see `F.pad`, norms by hand or attention between the layers, and a
function mode over plain local tensors, which cannot tell rows from other dimensions after a reshape.
"""
