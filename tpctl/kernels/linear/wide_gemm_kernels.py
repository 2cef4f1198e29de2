"""The device code of `wide_gemm`, in Gluon: 4-bit weights become numbers in registers while the tensor cores multiply.

A program has tiles of 64 outputs for each of its one or two groups of four warps, and of as many rows of x as those
multiply at once (`wide_cut`). One more warp asks for codes and x, a group of 128 inputs at a time, through a ring of
buffers, ahead of them, also of the next tile.

    thread (r, q) of a warp, r of 8, q of 4:  16 bytes of codes of rows r and r + 8
    of a word, 8 codes:                       codes 0 and 4, 1 and 5 in the first half of the group's products,
                                              2 and 6, 3 and 7 in the second

So what a thread reads at once is what it has of the tensor cores' operand: nothing moves between threads, and x is
brought into the order of these inputs before (`wide_parts_kernels`). Rows r and r + 8 come from two places of W: the
halves of the outputs of a program's warps, or a gate and its up.
"""

from __future__ import annotations

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import (
    fence_async_shared,
    mbarrier,
    tma,
    warpgroup_mma,
    warpgroup_mma_wait,
)

from tpctl.kernels.common.activation import act
from tpctl.kernels.linear.wide_flags_kernels import tell, wait_for, wait_for_the_kernel_before


def _assembly(first: int, scaled: bool) -> str:
    """$0, $1: codes first and first + 4 of a word, and the next ones, as bfloat16 numbers; $2: the word; $3, $4:
    -(128 + zero); $5, $6: scales. A code c is 0x4300 | c less 128, and all but the last product is exact."""
    body = [".reg .b32 w, t, u, one, none;", "mov.b32 one, 0x3f803f80;", "mov.b32 none, 0x80008000;", "mov.b32 w, $2;"]
    for i, name in enumerate("tu"):
        shift = 4 * (first + i)
        body += [f"shr.u32 {name}, w, {shift};" if shift else f"mov.b32 {name}, w;"]
        body += [f"lop3.b32 {name}, {name}, 0x000f000f, 0x43004300, 0xEA;"]
        body += [f"fma.rn.bf16x2 {name}, {name}, one, ${3 + i};"]
        body += [f"fma.rn.bf16x2 {name}, {name}, ${5 + i}, none;"] if scaled else []
    return "\n".join(["{", *body, "mov.b32 $0, t;", "mov.b32 $1, u;", "}"])


_HALVES = gl.constexpr(tuple(_assembly(first, False) for first in (0, 2)))
_SCALED_HALVES = gl.constexpr(tuple(_assembly(first, True) for first in (0, 2)))


@gluon.jit
def _works(tiles, CUT: gl.constexpr):
    """The first piece of a program's work, the end of all, from one to the next, and where its groups begin and end."""
    programs = gl.num_programs(0)
    program = gl.program_id(0)
    if CUT.split == 0:
        begin = program * (tiles * CUT.groups) // programs
        end = (program + 1) * (tiles * CUT.groups) // programs
        start = begin // CUT.groups
        stop = (end - 1) // CUT.groups + 1
        step = programs * 0 + 1
    else:
        start, stop, step, begin, end = program, tiles * CUT.split, programs, 0, 0
    return start, stop, step, begin, end


@gluon.jit
def _place(work, begin, end, row_tiles, CUT: gl.constexpr):
    """A piece of work's tile of outputs and tile of rows, its part of the inputs, and which groups those are."""
    if CUT.split == 0:
        tile = work
        part = 0
        first = gl.maximum(begin - work * CUT.groups, 0)
        last = gl.minimum(end - work * CUT.groups, CUT.groups)
    else:
        tile = work // row_tiles // CUT.split * row_tiles + work % row_tiles
        part = work // row_tiles % CUT.split
        first = part * CUT.each
        last = gl.minimum(first + CUT.each, CUT.groups)
    return tile // row_tiles, tile % row_tiles, part, first, last


@gluon.jit
def _first_output(n_tile, side: gl.constexpr, outputs, CUT: gl.constexpr):
    """Where the rows r (side 0) or r + 8 (side 1) of a tile begin in W. outputs: of W, or of its gate."""
    if CUT.gated:
        row = n_tile * (32 * CUT.warpgroups) + side * outputs
    else:
        row = (2 * n_tile + side) * (32 * CUT.warpgroups)
    return row


@gluon.jit
def _ask_for_codes(w_desc, n_tile, group, w_smem, ready, slot, outputs, CUT: gl.constexpr):
    for side in gl.static_range(2):
        row = _first_output(n_tile, side, outputs, CUT)
        tma.async_copy_global_to_shared(w_desc, [row, group * 64], ready.index(slot), w_smem.index(2 * slot + side))


@gluon.jit
def _fill(x_desc, w_desc, outputs, row_tiles, tiles, x_smem, w_smem, ready, empty, CUT: gl.constexpr):
    """Ask for codes and x of all of a program's work, as buffers become empty."""
    STAGES: gl.constexpr = CUT.stages
    BOTH: gl.constexpr = 2 * x_desc.block_type.nbytes + 2 * w_desc.block_type.nbytes
    start, stop, step, begin, end = _works(tiles, CUT)
    # Codes need not wait for the kernel before, which gives x.
    n_tile, _m_tile, _part, first, last = _place(start, begin, end, row_tiles, CUT)
    for early in gl.static_range(STAGES):
        if first + early < last:
            mbarrier.expect(ready.index(early), BOTH)
            _ask_for_codes(w_desc, n_tile, first + early, w_smem, ready, early, outputs, CUT)
    if CUT.pdl:
        wait_for_the_kernel_before()
    asked = gl.minimum(STAGES, last - first)
    count = 0
    for work in range(start, stop, step):
        n_tile, m_tile, _part, first, last = _place(work, begin, end, row_tiles, CUT)
        for group in range(first, last):
            slot = count % STAGES
            if count >= asked:
                mbarrier.wait(empty.index(slot), (count // STAGES) & 1 ^ 1)
                mbarrier.expect(ready.index(slot), BOTH)
                _ask_for_codes(w_desc, n_tile, group, w_smem, ready, slot, outputs, CUT)
            for half in gl.static_range(2):
                at = [m_tile * CUT.rows, group * 128 + half * 64]
                tma.async_copy_global_to_shared(x_desc, at, ready.index(slot), x_smem.index(2 * slot + half))
            count += 1


@gluon.jit
def _scale(scales_ptr, zeros_ptr, row, group, CUT: gl.constexpr):
    """bfloat16 scales, and what makes codes those less their zeros, of a group of some rows of the table."""
    FORM: gl.constexpr = CUT.form
    column = gl.minimum((group * 128 + FORM.first) // FORM.unit, FORM.scale_columns - 1)
    if not CUT.scaled:
        column = column * 0
    at = row * FORM.scale_columns + column
    scale = gl.load(scales_ptr + at).to(gl.bfloat16)
    if FORM.has_zeros:
        minus = (-128.0 - gl.load(zeros_ptr + at).to(gl.float32)).to(gl.bfloat16)
    else:
        minus = gl.full([32], -128.0 - FORM.zero, gl.bfloat16, gl.SliceLayout(1, CUT.words))
    return scale, minus


@gluon.jit
def _scales(scales_ptr, zeros_ptr, lower_row, upper_row, group, last, CUT: gl.constexpr):
    """Of the rows r, then of the rows r + 8; behind the last group, of that one."""
    group = gl.minimum(group, last - 1)
    scale, minus = _scale(scales_ptr, zeros_ptr, lower_row, group, CUT)
    upper_scale, upper_minus = _scale(scales_ptr, zeros_ptr, upper_row, group, CUT)
    return scale, minus, upper_scale, upper_minus


@gluon.jit
def _numbers(codes, minus, scale, HALF: gl.constexpr, CUT: gl.constexpr):
    """Half a group's, of [32, 64] bytes."""
    ASSEMBLY: gl.constexpr = _SCALED_HALVES[HALF] if CUT.scaled else _HALVES[HALF]
    return gl.inline_asm_elementwise(
        ASSEMBLY,
        "=r,=r,r,r,r,r,r",
        [codes, minus[:, None], scale[:, None]],
        dtype=gl.bfloat16,
        is_pure=True,
        pack=4,
    )


@gluon.jit
def _operand(lower, upper, scales, HALF: gl.constexpr, CUT: gl.constexpr):
    """Numbers [64, 64] of half a group, of codes of the rows r and of the rows r + 8."""
    first = _numbers(lower, scales[1], scales[0], HALF, CUT)
    second = _numbers(upper, scales[3], scales[2], HALF, CUT)
    # [warp, r, q, word, h, e, side] as the tensor cores have them: [warp, side, r, word, h, q, e].
    both = gl.join(first, second).reshape([4, 8, 4, 4, 2, 2, 2]).permute((0, 6, 1, 3, 4, 2, 5)).reshape([64, 64])
    return gl.convert_layout(both, CUT.operand)


@gluon.jit
def _operands(w_smem, slot, scales, HALF: gl.constexpr, CUT: gl.constexpr):
    """Both halves of a group."""
    lower = w_smem.index(2 * slot).slice(32 * HALF, 32).load(CUT.words)
    upper = w_smem.index(2 * slot + 1).slice(32 * HALF, 32).load(CUT.words)
    return _operand(lower, upper, scales, 0, CUT), _operand(lower, upper, scales, 1, CUT)


@gluon.jit
def _in_a_row(acc, CUT: gl.constexpr):
    """Sums of the tensor cores, [64, rows], as they are kept for another program."""
    # [warp, side, r, block, q, e] as [block, warp, r, q, side, e].
    acc = acc.reshape([4, 2, 8, CUT.rows // 8, 4, 2]).permute((3, 0, 2, 4, 1, 5)).reshape([64 * CUT.rows])
    return gl.convert_layout(acc, CUT.kept)


@gluon.jit
def _sides(kept, CUT: gl.constexpr):
    """Sums in a row as those of the rows r and of the rows r + 8, each [32, rows]."""
    sums = kept.reshape([CUT.rows // 8, 4, 8, 4, 2, 2]).permute((1, 2, 0, 3, 5, 4)).reshape([32, CUT.rows, 2])
    lower, upper = gl.split(sums)
    return gl.convert_layout(lower, CUT.fragment), gl.convert_layout(upper, CUT.fragment)


@gluon.jit
def _slot(parts_ptr, program, HALF: gl.constexpr, CUT: gl.constexpr):
    """Where a group of warps keeps its part of a tile that another program began."""
    number = (program * CUT.warpgroups + HALF) * (64 * CUT.rows)
    return parts_ptr + number + gl.arange(0, 64 * CUT.rows, layout=CUT.kept)


@gluon.jit
def _keep_part(sums, parts_ptr, n, part, m_tile, end, row_tiles, CUT: gl.constexpr):
    """Leave sums of a part of the inputs to the launch that follows, [outputs, rows] float32."""
    n += gl.arange(0, 32, layout=gl.SliceLayout(1, CUT.fragment))
    t = m_tile * CUT.rows + gl.arange(0, CUT.rows, layout=gl.SliceLayout(0, CUT.fragment))
    offsets = (part * end + n).to(gl.int64)[:, None] * (row_tiles * CUT.rows) + t[None, :]
    gl.store(parts_ptr + offsets, sums, mask=(n < end)[:, None])


@gluon.jit
def _finished(sums, n, row, scales_ptr, factors_ptr, bias_ptr, end, CUT: gl.constexpr):
    """Sums of 32 outputs with what is one number of an output. row: theirs in the table of scales."""
    n = gl.minimum(n + gl.arange(0, 32, layout=gl.SliceLayout(1, CUT.fragment)), end - 1)
    if not CUT.scaled:
        scale = gl.load(scales_ptr + row).to(gl.float32)
        sums = sums * gl.convert_layout(scale, gl.SliceLayout(1, CUT.fragment))[:, None]
    if CUT.form.has_factors:
        sums = sums * gl.load(factors_ptr + n)[:, None]
    if CUT.has_bias:
        sums = sums + gl.load(bias_ptr + n).to(gl.float32)[:, None]
    return sums.to(gl.bfloat16)


@gluon.jit
def _leave(value, out_ptr, residual_ptr, n, m_tile, rows, outputs, out_stride, residual_stride, CUT: gl.constexpr):
    """Leave 32 outputs of all of a tile's rows, [32, rows], where the result has them side by side."""
    value = gl.convert_layout(value, CUT.stored)
    n += gl.arange(0, 32, layout=gl.SliceLayout(1, CUT.stored))
    t = m_tile * CUT.rows + gl.arange(0, CUT.rows, layout=gl.SliceLayout(0, CUT.stored))
    some = (t < rows)[None, :] & (n < outputs)[:, None]
    if CUT.has_residual:
        source = residual_ptr + t.to(gl.int64)[None, :] * residual_stride + n[:, None]
        value = (value.to(gl.float32) + gl.load(source, mask=some, other=0.0).to(gl.float32)).to(gl.bfloat16)
    gl.store(out_ptr + t.to(gl.int64)[None, :] * out_stride + n[:, None], value, mask=some)


@gluon.jit
def _multiply(
    scales_ptr,
    zeros_ptr,
    rows_ptr,
    factors_ptr,
    bias_ptr,
    residual_ptr,
    out_ptr,
    parts_ptr,
    flags_ptr,
    rows,
    outputs,
    out_stride,
    residual_stride,
    row_tiles,
    tiles,
    x_smem,
    w_smem,
    ready,
    empty,
    HALF: gl.constexpr,
    CUT: gl.constexpr,
):
    """64 outputs of each of a program's tiles."""
    STAGES: gl.constexpr = CUT.stages
    WARPGROUPS: gl.constexpr = CUT.warpgroups
    ROWS: gl.constexpr = CUT.rows
    SUMS: gl.constexpr = CUT.sums
    ACTIVATION: gl.constexpr = CUT.activation
    program = gl.program_id(0)
    within = gl.arange(0, 32, layout=gl.SliceLayout(1, CUT.words))
    end_n = outputs * 2 if CUT.gated else outputs
    count = 0
    start, stop, step, begin, end = _works(tiles, CUT)
    for work in range(start, stop, step):
        n_tile, m_tile, part, first, last = _place(work, begin, end, row_tiles, CUT)
        lower_n = _first_output(n_tile, 0, outputs, CUT) + HALF * 32
        upper_n = _first_output(n_tile, 1, outputs, CUT) + HALF * 32
        lower_row = gl.minimum(lower_n + within, end_n - 1)
        upper_row = gl.minimum(upper_n + within, end_n - 1)
        if CUT.form.has_rows:
            lower_row = gl.load(rows_ptr + lower_row)
            upper_row = gl.load(rows_ptr + upper_row)
        scales = _scales(scales_ptr, zeros_ptr, lower_row, upper_row, first, last, CUT)
        next_scales = _scales(scales_ptr, zeros_ptr, lower_row, upper_row, first + 1, last, CUT)
        slot = count % STAGES
        mbarrier.wait(ready.index(slot), (count // STAGES) & 1)
        a, b = _operands(w_smem, slot, scales, HALF, CUT)
        acc = gl.zeros([64, ROWS], gl.float32, SUMS)
        for group in range(first, last):
            # Of the group after the next one, on their way while two are multiplied.
            later_scales = _scales(scales_ptr, zeros_ptr, lower_row, upper_row, group + 2, last, CUT)
            slot = count % STAGES
            acc = warpgroup_mma(a, x_smem.index(2 * slot).permute((1, 0)), acc, is_async=True)
            acc = warpgroup_mma(b, x_smem.index(2 * slot + 1).permute((1, 0)), acc, is_async=True)
            count += 1
            following = count % STAGES
            mbarrier.wait(ready.index(following), (count // STAGES) & 1, pred=group + 1 < last)
            a, b = _operands(w_smem, following, next_scales, HALF, CUT)
            next_scales = later_scales
            # Again, as it ends a basic block: else the assembler makes the numbers when it has waited for the products.
            mbarrier.wait(ready.index(following), (count // STAGES) & 1, pred=group + 1 < last)
            acc, a, b = warpgroup_mma_wait(0, deps=[acc, a, b])
            mbarrier.arrive(empty.index(slot))

        kept = _in_a_row(acc, CUT)
        if CUT.split == 0:
            # Of a tile that this program began, what those that follow have, in their first piece of work.
            others = gl.where(first == 0, ((work + 1) * CUT.groups * gl.num_programs(0) - 1) // (tiles * CUT.groups), 0)
            for other in range(program + 1, others + 1):
                wait_for(flags_ptr + (other * WARPGROUPS + HALF))
                kept += gl.load(_slot(parts_ptr, other, HALF, CUT))
            if first > 0:
                gl.store(_slot(parts_ptr, program, HALF, CUT), kept)
                tell(flags_ptr + (program * WARPGROUPS + HALF))
        lower, upper = _sides(kept, CUT)
        if CUT.split > 1:
            _keep_part(lower, parts_ptr, lower_n, part, m_tile, end_n, row_tiles, CUT)
            _keep_part(upper, parts_ptr, upper_n, part, m_tile, end_n, row_tiles, CUT)
        elif CUT.split == 1 or first == 0:
            lower_end = _finished(lower, lower_n, lower_row, scales_ptr, factors_ptr, bias_ptr, end_n, CUT)
            upper_end = _finished(upper, upper_n, upper_row, scales_ptr, factors_ptr, bias_ptr, end_n, CUT)
            if CUT.gated:
                gate = act(lower_end.to(gl.float32), ACTIVATION).to(gl.bfloat16).to(gl.float32)
                lower_end = (gate * upper_end.to(gl.float32)).to(gl.bfloat16)
            else:
                _leave(
                    upper_end, out_ptr, residual_ptr, upper_n, m_tile, rows, outputs, out_stride, residual_stride, CUT
                )
            _leave(lower_end, out_ptr, residual_ptr, lower_n, m_tile, rows, outputs, out_stride, residual_stride, CUT)


@gluon.jit(do_not_specialize=["rows", "row_tiles", "tiles"])
def wide_gemm_kernel(
    x_desc,  # of [rows, K] in the order of the codes, in blocks [CUT.rows, 64]
    w_desc,  # of bytes [N, K / 2], in blocks [32 * CUT.warpgroups, 64]
    scales_ptr,
    zeros_ptr,
    rows_ptr,
    factors_ptr,
    bias_ptr,
    residual_ptr,
    out_ptr,  # [rows, outputs]
    parts_ptr,  # float32: [split, N, rows of all tiles]; or of each program's groups of warps [64 * CUT.rows]
    flags_ptr,  # int32, one of each program's groups of warps: 1 as long as there is a part that nobody has read
    rows,
    outputs,  # N, or half of it
    out_stride,
    residual_stride,
    row_tiles,
    tiles,
    CUT: gl.constexpr,
):
    STAGES: gl.constexpr = CUT.stages
    WARPGROUPS: gl.constexpr = CUT.warpgroups
    x_smem = gl.allocate_shared_memory(gl.bfloat16, [2 * STAGES, CUT.rows, 64], x_desc.layout)
    w_smem = gl.allocate_shared_memory(gl.uint8, [2 * STAGES, 32 * WARPGROUPS, 64], w_desc.layout)
    ready = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    empty = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    for slot in gl.static_range(STAGES):
        mbarrier.init(ready.index(slot), count=1)
        mbarrier.init(empty.index(slot), count=WARPGROUPS)
    fence_async_shared()
    if WARPGROUPS == 2:
        gl.warp_specialize(
            [
                (_multiply, (scales_ptr, zeros_ptr, rows_ptr, factors_ptr, bias_ptr, residual_ptr, out_ptr, parts_ptr,
                             flags_ptr, rows, outputs, out_stride, residual_stride, row_tiles, tiles, x_smem, w_smem,
                             ready, empty, gl.constexpr(0), CUT)),
                (_multiply, (scales_ptr, zeros_ptr, rows_ptr, factors_ptr, bias_ptr, residual_ptr, out_ptr, parts_ptr,
                             flags_ptr, rows, outputs, out_stride, residual_stride, row_tiles, tiles, x_smem, w_smem,
                             ready, empty, gl.constexpr(1), CUT)),
                (_fill, (x_desc, w_desc, outputs, row_tiles, tiles, x_smem, w_smem, ready, empty, CUT)),
            ],
            [4, 1],
            [240, 24],
        )  # fmt: skip
    else:
        gl.warp_specialize(
            [
                (_multiply, (scales_ptr, zeros_ptr, rows_ptr, factors_ptr, bias_ptr, residual_ptr, out_ptr, parts_ptr,
                             flags_ptr, rows, outputs, out_stride, residual_stride, row_tiles, tiles, x_smem, w_smem,
                             ready, empty, gl.constexpr(0), CUT)),
                (_fill, (x_desc, w_desc, outputs, row_tiles, tiles, x_smem, w_smem, ready, empty, CUT)),
            ],
            [1],
            [24],
        )  # fmt: skip
