"""The parameter update of FusedFactoredAdam as Triton kernels, for a group of tensors of any shapes in four launches.

The eager twin in ``lowmem`` is the definition; tests compare the two. A tensor is viewed as a matrix (rows, columns) = (O, I*kh*kw), a
vector as (1, n). Gradients wait until a group is worth its launches and are then updated together: SDXL's UNet has 1680 tensors, and
one launch for each step of each would keep the host busier than the card. No step waits for the host, none copies a whole tensor to
float32, and every sum runs in a fixed order, so that equal gradients give equal weights.
"""

# Annotations must be real objects here: triton reads them. Its functions carry no types.
# mypy: disable-error-code="no-untyped-def,misc,no-any-return,untyped-decorator,index,operator,valid-type"

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import triton
import triton.language as tl

TILE_ROWS, TILE_COLUMNS = 32, 256  # of the statistics' and the clipping's programs
SEGMENT = 1024  # rows or columns that one program of the second moments reduces
CHUNK_BLOCKS, CHUNK_ROUNDS = 16, 4  # momentum blocks that an update program takes at a time, and how often
PHILOX_ROUNDS = 7  # passes BigCrush (Salmon et al., 2011)

# Columns of a group's table, one row (int64) per tensor.
WEIGHT, MOMENTUM, SCALE, ROW, COLUMN, ROWS, COLUMNS, KEY = (tl.constexpr(field) for field in range(8))
ROW_PARTIAL, COLUMN_PARTIAL = tl.constexpr(8), tl.constexpr(9)  # where its partial sums begin
FIRST_TILE, TILES, FIRST_ROW_SEGMENT, ROW_SEGMENTS = (tl.constexpr(field) for field in range(10, 14))
FIRST_SEGMENT, FIRST_CHUNK, FIELDS = tl.constexpr(14), tl.constexpr(15), tl.constexpr(16)


@dataclass(frozen=True)
class Entry:
    """One tensor of a group. All tensors are contiguous, on one device; ``key`` is the 63-bit key of its rounding noise."""

    weight: torch.Tensor
    momentum: torch.Tensor
    scale: torch.Tensor
    row: torch.Tensor
    column: torch.Tensor
    rate: float
    weight_decay: float
    key: int


def aligned(entry: Entry) -> bool:
    """Whether rows begin at multiples of 16 elements, so that loads may be wide."""
    return entry.column.numel() % 16 == 0


class Group:
    """What is fixed about a group of tensors: where they lie and which program works on which part. On their device, built once."""

    def __init__(self, entries: Sequence[Entry], block: int) -> None:
        device = entries[0].weight.device
        table: list[list[int]] = []
        tiles: list[int] = []
        segments: list[int] = []
        chunks: list[int] = []
        row_segments_before = partials = 0
        for number, entry in enumerate(entries):
            rows, columns = entry.row.numel(), entry.column.numel()
            if rows * columns >= 2**31 - block * CHUNK_BLOCKS:
                raise ValueError(f"a tensor of {rows * columns:,} elements is too large for 32-bit indices")
            row_tiles, column_tiles = triton.cdiv(rows, TILE_ROWS), triton.cdiv(columns, TILE_COLUMNS)
            row_segments, column_segments = triton.cdiv(rows, SEGMENT), triton.cdiv(columns, SEGMENT)
            pointers = [tensor.data_ptr() for tensor in (entry.weight, entry.momentum, entry.scale, entry.row, entry.column)]
            table.append([
                *pointers, rows, columns, entry.key, partials, partials + rows * column_tiles, len(tiles), row_tiles * column_tiles,
                row_segments_before, row_segments, len(segments), len(chunks),
            ])  # fmt: skip
            partials += rows * column_tiles + columns * row_tiles
            row_segments_before += row_segments
            tiles += [number] * (row_tiles * column_tiles)
            segments += [number] * (row_segments + column_segments)
            chunks += [number] * triton.cdiv(rows * columns, block * CHUNK_BLOCKS * CHUNK_ROUNDS)
        self.aligned = all(aligned(entry) for entry in entries)
        self.dtype = entries[0].weight.dtype
        self.block = block
        self.row_segments, self.partials = row_segments_before, partials
        self.table = torch.tensor(table, dtype=torch.int64).to(device)
        self.rates = torch.tensor([[entry.rate, entry.weight_decay] for entry in entries], dtype=torch.float32).to(device)
        self.tiles, self.segments, self.chunks = (torch.tensor(m, dtype=torch.int32).to(device) for m in (tiles, segments, chunks))


def update(
    group: Group,
    gradients: Sequence[torch.Tensor],
    *,
    number: int,
    factor: float,
    blend: float,
    beta1: float,
    epsilon: float,
    clip_rms: float,
    gradient_scale: torch.Tensor,
) -> torch.Tensor:
    """Updates weights and states of a group in place and returns the sum of its squared gradients (unscaled), a float32 scalar there.

    gradients: of the weights' shapes and dtype, contiguous, in the group's order. number: the update's, 0-based. factor: on the
    learning rates. blend: share of the new square in the second moments. clip_rms: bound on each update's root mean square, 0 for
    none. gradient_scale: float32 scalar on the device that gradients are multiplied with.
    """
    device = group.table.device
    pointers = torch.tensor([gradient.data_ptr() for gradient in gradients], dtype=torch.int64).to(device, non_blocking=True)

    def scratch(count: int) -> torch.Tensor:
        return torch.empty(count, dtype=torch.float32, device=device)

    partials = scratch(group.partials)
    row_sums, squares, excess = scratch(group.row_segments), scratch(group.row_segments), scratch(len(group.tiles))
    bf16 = group.dtype == torch.bfloat16
    shape = {"TILE_ROWS": TILE_ROWS, "TILE_COLUMNS": TILE_COLUMNS, "BF16": bf16, "ALIGNED": group.aligned}
    _statistics[(len(group.tiles),)](group.table, group.tiles, pointers, partials, num_warps=4, **shape)
    _second_moments[(len(group.segments),)](
        group.table, group.segments, gradient_scale, partials, row_sums, squares, blend, epsilon,
        TILE_ROWS=TILE_ROWS, TILE_COLUMNS=TILE_COLUMNS, SEGMENT=SEGMENT, num_warps=4,
    )  # fmt: skip
    if clip_rms:
        _excess[(len(group.tiles),)](group.table, group.tiles, pointers, gradient_scale, row_sums, excess, num_warps=4, **shape)
    _apply[(len(group.chunks),)](
        group.table, group.chunks, group.rates, pointers, gradient_scale, row_sums, excess, number, factor, beta1, clip_rms,
        BLOCK=group.block, BLOCKS=CHUNK_BLOCKS, ROUNDS=CHUNK_ROUNDS, PHILOX=PHILOX_ROUNDS, CLIP=clip_rms > 0, BF16=bf16,
        ALIGNED=group.aligned, KEPT=beta1 > 0, num_warps=8,
    )  # fmt: skip
    return squares.sum()


@triton.jit
def _pointer(address, BF16: tl.constexpr):
    """An address from a table as a pointer to weights or gradients."""
    if BF16:
        return address.to(tl.pointer_type(tl.bfloat16))
    else:  # noqa: RET505  triton compiles one branch
        return address.to(tl.pointer_type(tl.float32))


@triton.jit
def _total(pointer, count, WIDTH: tl.constexpr):
    """The sum of ``count`` floats."""
    lanes = tl.arange(0, WIDTH)
    total = tl.zeros((WIDTH,), tl.float32)
    for start in range(0, count, WIDTH):
        total += tl.load(pointer + start + lanes, mask=start + lanes < count, other=0.0)
    return tl.sum(total)


@triton.jit
def _tile(
    entry, program, address,
    TILE_ROWS: tl.constexpr, TILE_COLUMNS: tl.constexpr, BF16: tl.constexpr, ALIGNED: tl.constexpr,
):  # fmt: skip
    """A program's tile of the gradient at ``address``: the tensor's rows and columns, which tile it is down and across, its row and column
    numbers, and the gradient there in float32, 0 beyond the edge."""
    rows, columns = tl.load(entry + ROWS).to(tl.int32), tl.load(entry + COLUMNS).to(tl.int32)
    if ALIGNED:
        columns = tl.multiple_of(columns, 16)
    column_tiles = tl.cdiv(columns, TILE_COLUMNS)
    tile = program - tl.load(entry + FIRST_TILE).to(tl.int32)
    down, across = tile // column_tiles, tile % column_tiles
    row = down * TILE_ROWS + tl.arange(0, TILE_ROWS)
    column = across * TILE_COLUMNS + tl.arange(0, TILE_COLUMNS)
    here = (row < rows)[:, None] & (column < columns)[None, :]
    places = _pointer(address, BF16) + row[:, None] * columns + column[None, :]
    if ALIGNED:
        places = tl.multiple_of(places, (16, 16))
    return rows, columns, down, across, row, column, tl.load(places, mask=here, other=0.0).to(tl.float32)


@triton.jit
def _statistics(
    table, tiles, gradients, partials,
    TILE_ROWS: tl.constexpr, TILE_COLUMNS: tl.constexpr, BF16: tl.constexpr, ALIGNED: tl.constexpr,
):  # fmt: skip
    """One tile's sums of squared gradients along its rows and its columns."""
    program = tl.program_id(0)
    tensor = tl.load(tiles + program)
    entry = table + tensor * FIELDS
    rows, columns, down, across, row, column, gradient = _tile(
        entry, program, tl.load(gradients + tensor), TILE_ROWS, TILE_COLUMNS, BF16, ALIGNED
    )
    square = gradient * gradient
    row_place = partials + tl.load(entry + ROW_PARTIAL) + across * rows + row
    tl.store(row_place, tl.sum(square, axis=1), mask=row < rows)
    column_place = partials + tl.load(entry + COLUMN_PARTIAL) + down * columns + column
    tl.store(column_place, tl.sum(square, axis=0), mask=column < columns)


@triton.jit
def _second_moments(
    table, segments, gradient_scale, partials, row_sums, squares, blend, epsilon,
    TILE_ROWS: tl.constexpr, TILE_COLUMNS: tl.constexpr, SEGMENT: tl.constexpr,
):  # fmt: skip
    """A segment of the row or column averages: tiles' sums together, blended into the state. Rows' sums are kept for their mean."""
    program = tl.program_id(0)
    entry = table + tl.load(segments + program) * FIELDS
    rows, columns = tl.load(entry + ROWS).to(tl.int32), tl.load(entry + COLUMNS).to(tl.int32)
    segment = program - tl.load(entry + FIRST_SEGMENT).to(tl.int32)
    row_segments = tl.load(entry + ROW_SEGMENTS).to(tl.int32)
    of_rows = segment < row_segments
    # A row's average runs over the columns' tiles and the other way round.
    length = tl.where(of_rows, rows, columns)
    across = tl.where(of_rows, columns, rows)
    count = tl.where(of_rows, tl.cdiv(columns, TILE_COLUMNS), tl.cdiv(rows, TILE_ROWS))
    place = tl.where(of_rows, segment, segment - row_segments) * SEGMENT + tl.arange(0, SEGMENT)
    here = place < length
    total = tl.zeros((SEGMENT,), tl.float32)
    mine = partials + tl.load(entry + tl.where(of_rows, ROW_PARTIAL, COLUMN_PARTIAL))
    for number in range(count):
        total += tl.load(mine + number * length + place, mask=here, other=0.0)
    if of_rows:
        tl.store(squares + tl.load(entry + FIRST_ROW_SEGMENT) + segment, tl.sum(total))
    gradient_factor = tl.load(gradient_scale)
    total *= gradient_factor * gradient_factor
    state = tl.load(entry + tl.where(of_rows, ROW, COLUMN)).to(tl.pointer_type(tl.float32)) + place
    old = tl.load(state, mask=here, other=0.0)
    new = old + blend * (total / across + epsilon - old)
    tl.store(state, new, mask=here)
    if of_rows:
        tl.store(row_sums + tl.load(entry + FIRST_ROW_SEGMENT) + segment, tl.sum(tl.where(here, new, 0.0)))


@triton.jit
def _excess(
    table, tiles, gradients, gradient_scale, row_sums, excess,
    TILE_ROWS: tl.constexpr, TILE_COLUMNS: tl.constexpr, BF16: tl.constexpr, ALIGNED: tl.constexpr,
):  # fmt: skip
    """One tile's sum of squared normalised gradients, for the root mean square of the whole tensor's update."""
    program = tl.program_id(0)
    tensor = tl.load(tiles + program)
    entry = table + tensor * FIELDS
    rows, columns, _down, _across, row, column, gradient = _tile(
        entry, program, tl.load(gradients + tensor), TILE_ROWS, TILE_COLUMNS, BF16, ALIGNED
    )
    gradient *= tl.load(gradient_scale)
    row_mean = _total(row_sums + tl.load(entry + FIRST_ROW_SEGMENT), tl.load(entry + ROW_SEGMENTS).to(tl.int32), 16) / rows
    row_state = tl.load(entry + ROW).to(tl.pointer_type(tl.float32)) + row
    column_state = tl.load(entry + COLUMN).to(tl.pointer_type(tl.float32)) + column
    by_row = tl.math.rsqrt(tl.load(row_state, mask=row < rows, other=1.0) / row_mean)
    by_column = tl.math.rsqrt(tl.load(column_state, mask=column < columns, other=1.0))
    normalised = gradient * by_row[:, None] * by_column[None, :]
    tl.store(excess + program, tl.sum(normalised * normalised))


@triton.jit(do_not_specialize=["number"])
def _apply(  # noqa: PLR0915  one kernel, from top to bottom
    table, chunks, rates, gradients, gradient_scale, row_sums, excess, number, factor, beta1, clip_rms,
    BLOCK: tl.constexpr, BLOCKS: tl.constexpr, ROUNDS: tl.constexpr, PHILOX: tl.constexpr, CLIP: tl.constexpr, BF16: tl.constexpr,
    ALIGNED: tl.constexpr, KEPT: tl.constexpr,
):  # fmt: skip
    """Momentum (if it is KEPT) and weights of ROUNDS * BLOCKS momentum blocks in flat order."""
    program = tl.program_id(0)
    tensor = tl.load(chunks + program)
    entry = table + tensor * FIELDS
    rows, columns = tl.load(entry + ROWS).to(tl.int32), tl.load(entry + COLUMNS).to(tl.int32)
    count = rows * columns
    if ALIGNED:
        count = tl.multiple_of(count, 16)
    gradient_pointer = _pointer(tl.load(gradients + tensor), BF16)
    weight_pointer = _pointer(tl.load(entry + WEIGHT), BF16)
    momentum_pointer = tl.load(entry + MOMENTUM).to(tl.pointer_type(tl.int8))
    scale_pointer = tl.load(entry + SCALE).to(tl.pointer_type(tl.float32))
    row_pointer = tl.load(entry + ROW).to(tl.pointer_type(tl.float32))
    column_pointer = tl.load(entry + COLUMN).to(tl.pointer_type(tl.float32))
    row_mean = _total(row_sums + tl.load(entry + FIRST_ROW_SEGMENT), tl.load(entry + ROW_SEGMENTS).to(tl.int32), 16) / rows
    scale_gradient = tl.load(gradient_scale)
    shrink = 1.0
    if CLIP:
        mean_square = _total(excess + tl.load(entry + FIRST_TILE), tl.load(entry + TILES).to(tl.int32), 1024) / count
        shrink = 1.0 / tl.maximum(1.0, tl.sqrt(mean_square) / clip_rms)
    rate = tl.load(rates + tensor * 2) * factor
    weight_decay = tl.load(rates + tensor * 2 + 1)
    first = (program - tl.load(entry + FIRST_CHUNK).to(tl.int32)) * ROUNDS * BLOCKS
    for turn in range(ROUNDS):
        block = first + turn * BLOCKS + tl.arange(0, BLOCKS)
        index = block[:, None] * BLOCK + tl.arange(0, BLOCK)[None, :]
        here = index < count
        gradient_place = tl.multiple_of(gradient_pointer + index, (16, 16))
        weight_place = tl.multiple_of(weight_pointer + index, (16, 16))
        gradient = tl.load(gradient_place, mask=here, other=0.0).to(tl.float32) * scale_gradient
        by_row = tl.math.rsqrt(tl.load(row_pointer + index // columns, mask=here, other=1.0) / row_mean)
        by_column = tl.math.rsqrt(tl.load(column_pointer + index % columns, mask=here, other=1.0))
        normalised = gradient * by_row * by_column * shrink
        counter = block[:, None] * (BLOCK // 4) + tl.arange(0, BLOCK // 4)[None, :]
        zero = counter * 0
        a, b, c, d = tl.philox(tl.load(entry + KEY), counter, zero + number, zero, zero, PHILOX)
        noise = tl.reshape(tl.join(tl.join(a, c), tl.join(b, d)), (BLOCKS, BLOCK))  # a b c d of each counter in turn
        momentum = tl.where(here, normalised, 0.0)
        if KEPT:
            # The state is padded to whole blocks; beyond the last block nothing is touched.
            in_state = block * BLOCK < count
            momentum_place = tl.multiple_of(momentum_pointer + index, (16, 16))
            old_scale = tl.load(scale_pointer + block, mask=in_state, other=0.0)
            old = tl.load(momentum_place, mask=here, other=0).to(tl.float32) * old_scale[:, None]
            momentum = beta1 * old + (1.0 - beta1) * momentum
            scale = tl.max(tl.abs(momentum), axis=1) / 127.0
            steps = momentum / tl.maximum(scale, 1e-38)[:, None]
            dither = ((noise >> 16).to(tl.float32) + 0.5) / 65536.0
            quantized = tl.minimum(tl.maximum(tl.floor(steps + dither), -127.0), 127.0)
            tl.store(momentum_place, quantized.to(tl.int8), mask=here)
            tl.store(scale_pointer + block, scale, mask=in_state)
        weight = tl.load(weight_place, mask=here, other=0.0).to(tl.float32)
        weight -= rate * (momentum + weight_decay * weight)
        if BF16:
            bits = weight.to(tl.uint32, bitcast=True) + (noise & 0xFFFF)
            rounded = (bits & 0xFFFF0000).to(tl.float32, bitcast=True).to(tl.bfloat16)
            tl.store(weight_place, rounded, mask=here)
        else:
            tl.store(weight_place, weight, mask=here)
