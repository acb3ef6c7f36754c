"""From the words of a tile to pairs of weights, in the registers that a matrix instruction takes them from.

A program is one warp, and its lanes are elements of tensors [32]. Lane 4 g + t has rows 2 g and 2 g + 1 of a tile, and
of each a run of 8 pairs: 16 columns from 16 t on. For these it reads a few whole words of its rows, 8 bytes at a time;
then a pair takes a shift over two words, a multiplication and an and, and is a register of the left operand of
m16n8k16. No thread needs what another one has read. `tl.dot` adds no data movement as long as `fragment` and
`activations` put registers where its layout has them (`tests/kernels/gate.py` would count the shuffles): it takes the
operands as Triton gives them to a product of joined 16-bit numbers, four of a row side by side.
"""

import triton
import triton.language as tl

from vllm_babai.format.trellis.code import MULTIPLIERS
from vllm_babai.triton_kernels.trellis.arguments import UNITS

SIGNED = tuple(MULTIPLIERS.astype("int32").tolist())


@triton.constexpr_function
def multiplier(bits):
    """The multiplier for so many bits a pair, as int32."""
    return SIGNED[bits]


@triton.constexpr_function
def words_of_run(bits):
    """Words of a row that a lane needs at most for its run, from the one in which its first state begins."""
    runs = [(8 * bits * t // 32, (8 * bits * (t + 1) - 1) // 32 + 1) for t in range(4)]  # with the word before
    return max(last - first for first, last in runs) + 1


@triton.jit
def load_run(own, entry, lane_words, BITS: tl.constexpr):
    """Words of a lane's run of a tile, a tuple of int64 [32]: the even row's word below the odd row's.

    own: pointer to the block's words. entry: of `layout.tiles`. lane_words: int32 [32], see `lane_start`.
    """
    ROWS: tl.constexpr = UNITS.value.rows
    ptrs = (own + ((entry & UNITS.value.line_mask) * ROWS + lane_words)).to(tl.pointer_type(tl.int64))
    words = ()
    for i in tl.static_range(words_of_run(BITS)):
        words += (tl.load(ptrs + i * (ROWS // 2)),)  # type: ignore[assignment]
    return words


@triton.jit
def lane_start(BITS: tl.constexpr):
    """Where the words of every lane's run begin, int32 [32], from the line before a tile on."""
    LANES: tl.constexpr = UNITS.value.lanes
    lane = tl.arange(0, LANES)
    return ((lane & 3) * BITS >> 2) * UNITS.value.rows + 2 * (lane >> 2)


@triton.jit
def decode_run(words, BITS: tl.constexpr):
    """Pairs of fp16 patterns of a lane's run, int32 [32, 2, 2, 2, 2]: rows; bits 0, 1 and 2 of the pair's number."""
    LANES: tl.constexpr = UNITS.value.lanes
    shift = ((tl.arange(0, LANES) & 3) * BITS & 3) * 8  # of the run in its first word
    even, odd = (), ()
    for i in tl.static_range(len(words)):
        even += (words[i].to(tl.int32),)  # type: ignore[assignment]
        odd += ((words[i] >> 32).to(tl.int32),)  # type: ignore[assignment]
    even, odd = _pairs_of_row(even, shift, BITS), _pairs_of_row(odd, shift, BITS)
    first = tl.join(_four(even, odd, 0, 1), _four(even, odd, 2, 3))
    second = tl.join(_four(even, odd, 4, 5), _four(even, odd, 6, 7))
    return tl.join(first, second)


@triton.jit
def _four(even, odd, I: tl.constexpr, J: tl.constexpr):  # noqa: E741
    """Pairs I and J of both rows, [32, rows, 2]."""
    return tl.join(tl.join(even[I], odd[I]), tl.join(even[J], odd[J]))


@triton.jit
def _pairs_of_row(words, shift, BITS: tl.constexpr):
    """The 8 pairs of one row, a tuple of int32 [32]."""
    MULTIPLIER: tl.constexpr = multiplier(BITS)
    stream = _aligned(words, shift, BITS)
    pairs = ()
    for i in tl.static_range(1, 9):
        if i * BITS % 32 == 0:
            state = stream[i * BITS // 32]
        else:
            upper = stream[i * BITS // 32] << (i * BITS % 32)
            lower = stream[i * BITS // 32 + 1].to(tl.uint32, bitcast=True) >> (32 - i * BITS % 32)
            state = upper | lower.to(tl.int32, bitcast=True)
        pairs += ((state * MULTIPLIER) & UNITS.value.pair_mask,)  # type: ignore[assignment]
    return pairs


@triton.jit
def _aligned(words, shift, BITS: tl.constexpr):
    """The 32 bits before a run, and its own from the first on, in words."""
    if BITS % 4 == 0:
        return words
    stream = ()
    for i in tl.static_range(len(words) - 1):
        both = (words[i].to(tl.uint32, bitcast=True).to(tl.uint64) << 32) | words[i + 1].to(tl.uint32, bitcast=True)
        stream += (((both << shift.to(tl.uint64)) >> 32).to(tl.int32),)  # type: ignore[assignment]
    if 8 * BITS > 32 * (len(words) - 2):
        stream += (words[len(words) - 1] << shift,)  # type: ignore[assignment]
    return stream


@triton.jit
def halves(pairs):
    """Pairs of fp16 patterns, int32 [...] → numbers, fp16 [..., 2]; the even column's comes first."""
    low = pairs.to(tl.int16).to(tl.float16, bitcast=True)
    high = (pairs >> 16).to(tl.int16).to(tl.float16, bitcast=True)
    return tl.join(low, high)


@triton.jit
def fragment(pairs):
    """What `decode_run` gives → left operand of a product, fp16 [16, 64]; row 8 r + g is row 2 g + r of the tile.

    Columns are in an order of their own, that of `activations`.
    """
    ROWS: tl.constexpr = UNITS.value.rows
    COLUMNS: tl.constexpr = UNITS.value.columns
    numbers = halves(pairs).reshape(8, 4, 2, 2, 2, 2, 2)  # g, t, row, three bits of the pair, column of the pair
    return numbers.permute(2, 0, 5, 3, 1, 4, 6).reshape(ROWS, COLUMNS)


@triton.jit
def activations(x_ptrs):
    """Right operand of a product, fp16 [64, tokens], in the order of `fragment`'s columns.

    x_ptrs: [tokens / 8, 32, 8], to the first half of the run of token 8 i + g in lane 4 g + t.
    """
    COLUMNS: tl.constexpr = UNITS.value.columns
    both = tl.join(tl.load(x_ptrs), tl.load(x_ptrs + UNITS.value.run // 2))
    both = both.reshape(both.shape[0], 8, 4, 2, 2, 2, 2)  # g, t, bits 1 and 0 of the pair, column of the pair, bit 2
    return both.permute(6, 4, 2, 3, 5, 0, 1).reshape(COLUMNS, both.shape[0] * 8)
