"""Linear layers for a few dozen rows, the input features cut into runs that are multiplied side by side.

From 17 rows to a few hundred cuBLAS has too few output tiles to busy a GPU where the outputs are few (o_proj,
down_proj, a rank's qkv_proj), and adds a reduction where it splits the input by itself. One batched GEMM over the runs
fills the GPU, and the sums of the runs are left to the kernel that reads the result anyway: RMSNorm, the all-reduce or
RoPE.
"""

from __future__ import annotations

import torch

_MIN_ROWS = 17  # below: `gemv`


def pick_splits(rows: int, out_features: int, in_features: int) -> int:
    """Into how many runs to cut the input of a linear of [out_features, in_features]; 1: not at all.

    Measured on an H100 (docs/kernel-notes.md): four for up to 1,024 outputs, two for up to 4,096 (6,144 above 256
    rows), while a run stays long beside the outputs and its rows are aligned to 128 bytes. From 321 rows on (513 for up
    to 1,024 outputs) one GEMM has tiles enough.
    """
    narrow = out_features <= 1024
    if not _MIN_ROWS <= rows <= (512 if narrow else 320):
        return 1
    splits = 4 if narrow else 2 if out_features <= (4096 if rows <= 256 else 6144) else 1
    while splits > 1 and (in_features % (64 * splits) or in_features // splits < out_features // 4):
        splits //= 2
    return splits


def split_linear(x_TH: torch.Tensor, weight_OH: torch.Tensor, splits: int) -> torch.Tensor:
    """[S, T, O]: x @ weight.T over each of S equal runs of the input features; their sum is the linear's result.

    x_TH: [T, H]. weight_OH: [O, H], x's dtype; both contiguous, H a multiple of S. Every run is rounded to x's dtype.
    """
    rows, in_features = x_TH.shape
    run = in_features // splits
    x_STR = x_TH.view(rows, splits, run).transpose(0, 1)
    weight_SRO = weight_OH.view(weight_OH.shape[0], splits, run).permute(1, 2, 0)
    return torch.bmm(x_STR, weight_SRO)
