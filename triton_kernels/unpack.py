"""From packed words to the operand of a matrix product, in registers."""

import triton
import triton.language as tl


@triton.constexpr_function
def pair_assembly(bits, field, half):
    """PTX that turns one bit field of both half-words into two exact 16-bit floats z (fp16 when `half`, else bf16).

    A field inside the mantissa of a float with exponent 2^mantissa is that power plus the field (one lop3); a fused
    multiply-add then takes away the power, the field's position and the offset 2^(bits − 1) at once, exactly. A bf16
    mantissa has no room for eight bits: there the top bit makes a second float, −256 or −128.
    """
    mantissa = 10 if half else 7

    def twice(pattern):
        return f"0x{pattern:04x}{pattern:04x}"

    def number(value):
        """Bit pattern of a number that the format holds exactly."""
        sign, value = (0x8000, -value) if value < 0 else (0, value)
        exponent = 0
        while value >= 2 << exponent:
            exponent += 1
        while value * 2**-exponent < 1:
            exponent -= 1
        fraction = int((value * 2.0**-exponent - 1) * (1 << mantissa))
        return sign | (exponent + (15 if half else 127)) << mantissa | fraction

    if bits == 8 and not half:
        return f"""{{
            .reg .b32 field, low, high, one;
            shr.u32 field, $1, {8 * field};
            lop3.b32 low, field, {twice(0x7F)}, {twice(number(128))}, 0x6a;
            lop3.b32 high, field, {twice(0x80)}, {twice(number(-256))}, 0x6a;
            mov.b32 one, {twice(number(1))};
            fma.rn.bf16x2 $0, low, one, high;
        }}"""
    fields_per_shift = mantissa // bits
    shift = field // fields_per_shift * fields_per_shift * bits
    position = field % fields_per_shift * bits
    mask = ((1 << bits) - 1) << position
    bias = -(2 ** (mantissa - position)) - 2 ** (bits - 1)
    return f"""{{
        .reg .b32 field, scale, bias;
        shr.u32 field, $1, {shift};
        lop3.b32 field, field, {twice(mask)}, {twice(number(2**mantissa))}, 0xea;
        mov.b32 scale, {twice(number(2.0**-position))};
        mov.b32 bias, {twice(number(bias))};
        fma.rn.{"f16x2" if half else "bf16x2"} $0, field, scale, bias;
    }}"""


@triton.jit
def unpack_slot(words, SLOT: tl.constexpr, BITS: tl.constexpr, DTYPE: tl.constexpr, BACKEND: tl.constexpr):
    """Integers of one slot, [rows, 32] in DTYPE; `words` is the tuple of [rows, 16] words of a column block.

    In the interpreter they come as fp32, for it cannot compute with bf16 (see `matrix_product`).
    """
    WHOLE: tl.constexpr = 16 // BITS  # slots in one word
    FIELD: tl.constexpr = SLOT % WHOLE
    if SLOT < WHOLE * len(words):
        word = words[SLOT // WHOLE]
    else:
        word = (words[0] >> 15) & 0x00010001
        for bit in tl.static_range(1, BITS):
            word |= (words[bit] >> (15 - bit)) & (0x00010001 << bit)
    if BACKEND == "cuda":
        pairs = tl.inline_asm_elementwise(
            pair_assembly(BITS, FIELD, tl.float16 == DTYPE), "=r,r", [word], dtype=tl.int32, is_pure=True, pack=1
        )
        low = pairs.to(tl.int16).to(DTYPE, bitcast=True)
        high = (pairs >> 16).to(tl.int16).to(DTYPE, bitcast=True)
    else:
        MASK: tl.constexpr = (1 << BITS) - 1
        low = (((word >> (BITS * FIELD)) & MASK) - (1 << (BITS - 1))).to(tl.float32)
        high = (((word >> (BITS * FIELD + 16)) & MASK) - (1 << (BITS - 1))).to(tl.float32)
        if BACKEND != "interpreter":
            low = low.to(DTYPE)
            high = high.to(DTYPE)
    return tl.join(low, high).reshape(word.shape[0], 2 * word.shape[1])


@triton.jit
def load_words(pointers, WORDS: tl.constexpr, WORD_STRIDE: tl.constexpr):
    """The words of one column block as a tuple of [rows, 16] tensors."""
    words = (tl.load(pointers, eviction_policy="evict_first"),)
    for i in tl.static_range(1, WORDS):
        words += (tl.load(pointers + i * WORD_STRIDE, eviction_policy="evict_first"),)  # type: ignore[assignment]
    return words


@triton.jit
def matrix_product(a, b, total, BACKEND: tl.constexpr):
    """total + a @ b in fp32, of fp32 operands too (by default Triton rounds these to tf32).

    The interpreter takes bf16 for integers, so there the operands go in as fp32.
    """
    if BACKEND == "interpreter":
        return tl.dot(a.to(tl.float32), b.to(tl.float32), total, input_precision="ieee")
    else:
        return tl.dot(a, b, total, input_precision="ieee")


@triton.jit
def round_to(value, DTYPE: tl.constexpr, BACKEND: tl.constexpr):
    """fp32 → DTYPE, to nearest even, also in the interpreter, which truncates to bf16."""
    if BACKEND == "interpreter" and tl.bfloat16 == DTYPE:
        raw = value.to(tl.int32, bitcast=True)
        raw = raw + 0x7FFF + ((raw >> 16) & 1)
        value = (raw & -65536).to(tl.float32, bitcast=True)
    return value.to(DTYPE)
