"""Triton's part of `recipes.data.resample`: the weights of an antialiased resize, and the resize itself.

The arithmetic is that of torch's CPU kernel for 8 bits: weights are computed in double precision and rounded to whole
numbers of 16 bits, with as many binary places as the largest weight of an image's axis leaves room for. Pixels are
resampled along their rows first, rounded to 8 bits, and then along the columns.

A row of `crops` is FIELDS numbers of 64 bits about an image: the address of its crop's first byte, the bytes from a
channel, row and column to the next, the crop's height and width, those to which it is resized, the first row and
column of the window of the resized crop that is made, and whether that is mirrored.
"""

import triton
import triton.language as tl

FIELDS = tl.constexpr(11)


@triton.jit
def _filter(x, REACH: tl.constexpr):
    """The weight at a distance: linear if the filter reaches 1, Keys' cubic with a = -0.5 if it reaches 2."""
    x = tl.abs(x)
    if REACH == 1:
        weight = tl.maximum(1.0 - x, 0.0)
    else:
        near = (1.5 * x - 2.5) * x * x + 1.0
        far = ((-0.5 * x + 2.5) * x - 4.0) * x + 2.0
        weight = tl.where(x < 1.0, near, tl.where(x < 2.0, far, 0.0))
    return weight


@triton.jit
def _reach(position, scale, length, REACH: tl.constexpr):
    """The place of resized pixels in the crop, the first of its pixels that go into each, and their number."""
    centre = scale * (position.to(tl.float64) + 0.5)
    reach = REACH * tl.maximum(scale, 1.0)
    first = tl.maximum((centre - reach + 0.5).to(tl.int32), 0)
    return centre, first, tl.minimum((centre + reach + 0.5).to(tl.int32), length) - first


@triton.jit
def _weight(tap, centre, first, count, scale, REACH: tl.constexpr):
    return tl.where(tap < count, _filter((first + tap - centre + 0.5) * (1.0 / tl.maximum(scale, 1.0)), REACH), 0.0)


@triton.jit
def _total_and_largest(centre, first, count, scale, SIZE: tl.constexpr, REACH: tl.constexpr):
    """The sum of the weights of each resized pixel, and the largest weight of all once the sums are one."""
    total = tl.zeros([SIZE], tl.float64)
    largest = tl.zeros([SIZE], tl.float64)
    for tap in range(tl.max(count)):
        weight = _weight(tap, centre, first, count, scale, REACH)
        total += weight
        largest = tl.maximum(largest, weight)
    return total, tl.max(largest / total)


@triton.jit
def weights_kernel(crops, weights, reaches, precisions, height, width, taps, SIZE: tl.constexpr, REACH: tl.constexpr):
    """For the rows (axis 0) or columns of an image: which of its crop's go into each, and their weights of 16 bits.

    The reaches (2, SIZE) are the first of them and their number. The weights are (SIZE, taps) for the rows and
    (taps, SIZE) for the columns: as each is read. Those outside the window only count for the precision.
    """
    image, axis = tl.program_id(0), tl.program_id(1)
    crop = crops + image * FIELDS + axis
    length, size = tl.load(crop + 4).to(tl.int32), tl.load(crop + 6).to(tl.int32)
    start = tl.load(crop + 8).to(tl.int32)
    made = tl.where(axis == 0, height, width)
    lane = tl.arange(0, SIZE)
    scale = length.to(tl.float64) / size
    centre, first, count = _reach(start + tl.minimum(lane, made - 1), scale, length, REACH)
    reaches += (image * 2 + axis) * 2 * SIZE + lane
    tl.store(reaches, first)
    tl.store(reaches + SIZE, count)

    total, most = _total_and_largest(centre, first, count, scale, SIZE, REACH)
    for passed in range(made, size, SIZE):
        outside, first_outside, count_outside = _reach((start + passed + lane) % size, scale, length, REACH)
        _, largest = _total_and_largest(outside, first_outside, count_outside, scale, SIZE, REACH)
        most = tl.maximum(most, largest)
    precision = 0
    for places in range(22):
        precision += (most * (2 << places) + 0.5 < 32768.0).to(tl.int32)
    tl.store(precisions + image * 2 + axis, precision)

    weights += (image.to(tl.int64) * 2 + axis) * SIZE * taps + lane * tl.where(axis == 0, taps, 1)
    for tap in range(tl.max(count)):
        weight = _weight(tap, centre, first, count, scale, REACH) / total * (1 << precision)
        rounded = (weight + tl.where(weight < 0.0, -0.5, 0.5)).to(tl.int32)  # halves away from zero
        tl.store(weights + tap * tl.where(axis == 0, 1, SIZE), rounded.to(tl.int16))


@triton.jit
def _grey_levels(sums, precision):
    return tl.minimum(tl.maximum(sums >> precision, 0), 255)


@triton.jit
def resample_kernel(
    crops, weights, reaches, precisions, out, channels, height, width, taps, scale, shift,
    SIZE: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr, CHUNK: tl.constexpr,
):  # fmt: skip
    """ROWS x COLUMNS pixels of one channel of an image, from CHUNK rows of its crop at a time.

    The sums along the columns are products of matrices. Their factors are exact in half precision once the weights
    are split into two bytes, and their sums in single precision.
    """
    program = tl.program_id(0)
    column = program % tl.cdiv(width, COLUMNS) * COLUMNS + tl.arange(0, COLUMNS)
    program //= tl.cdiv(width, COLUMNS)
    row = program % tl.cdiv(height, ROWS) * ROWS + tl.arange(0, ROWS)
    program //= tl.cdiv(height, ROWS)
    image, channel = (program // channels).to(tl.int64), program % channels

    crop = crops + image * FIELDS
    pixels = (tl.load(crop) + channel * tl.load(crop + 1)).to(tl.pointer_type(tl.uint8))
    row_stride, column_stride = tl.load(crop + 2), tl.load(crop + 3)
    crop_height = tl.load(crop + 4).to(tl.int32)
    reaches += image * 4 * SIZE
    first_row, row_taps = tl.load(reaches + row), tl.load(reaches + SIZE + row)
    seen = tl.where(tl.load(crop + 10) == 0, column, tl.maximum(width - 1 - column, 0))  # before the image is mirrored
    first_column, column_taps = tl.load(reaches + 2 * SIZE + seen), tl.load(reaches + 3 * SIZE + seen)
    row_weights = weights + image * 2 * SIZE * taps + row[:, None] * taps
    column_weights = weights + (image * 2 + 1) * SIZE * taps + seen
    row_precision, column_precision = tl.load(precisions + image * 2), tl.load(precisions + image * 2 + 1)

    high = tl.zeros([ROWS, COLUMNS], tl.float32)
    low = tl.zeros([ROWS, COLUMNS], tl.float32)
    for start in range(tl.min(first_row), tl.max(first_row + row_taps), CHUNK):
        crop_row = start + tl.arange(0, CHUNK)
        lines = pixels + tl.minimum(crop_row, crop_height - 1)[:, None] * row_stride
        places = first_column * column_stride
        sums = tl.zeros([CHUNK, COLUMNS], tl.int32) + (1 << column_precision >> 1)
        for tap in range(tl.max(column_taps)):
            weight = tl.load(column_weights + tap * SIZE).to(tl.int32)
            # The hint alone spreads a warp over columns in every release of Triton: nothing is known of alignments, so
            # no two pixels are read as one.
            near = tl.max_contiguous(lines + places[None, :], (1, 2))
            sums += weight[None, :] * tl.load(near).to(tl.int32)
            places += tl.where(tap + 1 < column_taps, column_stride, 0)
        levels = _grey_levels(sums, column_precision).to(tl.float16)
        tap = crop_row[None, :] - first_row[:, None]
        weight = tl.load(row_weights + tap, mask=(tap >= 0) & (tap < row_taps[:, None]), other=0).to(tl.int32)
        upper = (weight + 128) >> 8
        high = tl.dot(upper.to(tl.float16), levels, high)
        low = tl.dot((weight - upper * 256).to(tl.float16), levels, low)
    sums = high.to(tl.int32) * 256 + low.to(tl.int32) + (1 << row_precision >> 1)
    values = _grey_levels(sums, row_precision)
    if scale is not None:
        factor, summand = scale[0], shift[0]
        for i in tl.static_range(1, len(scale)):
            factor, summand = tl.where(channel == i, scale[i], factor), tl.where(channel == i, shift[i], summand)
        values = values.to(tl.float32) * factor + summand
    out += (image * channels + channel) * height * width + row[:, None] * width + column[None, :]
    tl.store(out, values.to(out.dtype.element_ty), mask=(row < height)[:, None] & (column < width)[None, :])
