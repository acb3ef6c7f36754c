"""Pairs of numbers below 2¹⁷ as rANS streams: the compiled loops of the overflow's entropy code.

A number is its class, coded by a table of frequencies, then its low bits as they are, all in one 32-bit state. Numbers
below 4 are classes of their own; above, every octave has two: 0.02 bits more than the entropy of a geometric
distribution, few classes, and at most 27 bits for any number. Tables hold frequencies of five binary digits, a byte
each. A stream is the state, low word first, then 16-bit words. The state starts (in the decoder: ends) at 2¹⁶, which
tells a good stream from a bad one.

Source: Duda, Asymmetric numeral systems, arXiv 1311.2540.
Importing this module imports numba: import it where it is used.
"""

import numpy as np

from vllm_babai.compiled import compiled
from vllm_babai.errors import FormatError
from vllm_babai.format.entropy.rans import INITIAL_STATE
from vllm_babai.format.entropy.tables import ESCAPE, PRECISION, TOTAL, normalize

CLASSES = 34
PADDING = np.zeros(6, np.uint16)  # what `decode_streams` may read after the words
FIVE_DIGITS = np.unique([digits << power for digits in range(32) for power in range(8)])  # codes of frequencies


def fit_tables(numbers: np.ndarray) -> list[np.ndarray]:
    """Numbers, int64 [pairs, 2] → for each of the two a code for the frequency of every class, uint8 [classes]."""
    counts = np.zeros((2, CLASSES), np.int64)
    counts[:, 0] = len(numbers) == 0  # without numbers any valid table will do
    count_classes(numbers, counts)
    codes = [np.searchsorted(FIVE_DIGITS, normalize(count), side="right") - 1 for count in counts]
    return [np.trim_zeros(code, "b").astype(np.uint8) for code in codes]


def frequencies(tables: list[np.ndarray]) -> np.ndarray:
    """Tables as `fit_tables` gives them → frequencies of the classes, uint32 [2, ESCAPE + 1].

    Raises FormatError when a table has other codes, too many, or none above 0.
    """
    result = np.zeros((2, ESCAPE + 1), np.uint32)
    for frequency, codes in zip(result, tables, strict=True):
        if len(codes) > CLASSES or not codes.any() or codes.max() >= len(FIVE_DIGITS):
            raise FormatError("overflow blob has an invalid frequency table")
        frequency[: len(codes)] = normalize(FIVE_DIGITS[codes])
    return result


@compiled
def low_bits(number):
    """How many bits of a number its class leaves open; the class is (number >> low) + 2 · low."""
    low = 0
    while number >> low > 3:
        low += 1
    return low


@compiled
def count_classes(numbers, counts):
    """Add the classes of numbers, int64 [pairs, 2], to counts, int64 [2, classes]."""
    for pair in range(len(numbers)):
        for kind in range(2):
            low = low_bits(numbers[pair, kind])
            counts[kind, (numbers[pair, kind] >> low) + 2 * low] += 1


@compiled
def encode_streams(numbers, counts, packed):
    """Numbers, int64 [pairs, 2] → words of all streams, uint16, and how many each has, int64 [streams].

    counts: int64 [streams], pairs in each; a stream without pairs has no words. packed: see `tables.encoder_table`.
    """
    words = np.empty(4 * len(numbers) + 2 * len(counts), np.uint16)
    lengths = np.empty(len(counts), np.int64)
    position, pair = len(words), len(numbers)
    for stream in range(len(counts) - 1, -1, -1):
        end, first = position, pair - counts[stream]
        state = INITIAL_STATE
        while pair > first:
            pair -= 1
            for kind in range(1, -1, -1):
                number = numbers[pair, kind]
                low = low_bits(number)
                symbol = np.int64(packed[kind, (number >> low) + 2 * low])
                frequency = symbol & 0xFFFF
                if state >> (32 - low):
                    position -= 1
                    words[position] = state & 0xFFFF
                    state >>= 16
                state = state << low | number & ((1 << low) - 1)
                if state >= frequency << (32 - PRECISION):
                    position -= 1
                    words[position] = state & 0xFFFF
                    state >>= 16
                state = (state // frequency << PRECISION) + state % frequency + (symbol >> 16)
        if counts[stream]:
            position -= 2
            words[position] = state & 0xFFFF
            words[position + 1] = state >> 16
        lengths[stream] = end - position
    return words[position:].copy(), lengths


@compiled
def decode_streams(words, spans, counts, lut, numbers):
    """Decode some streams into numbers, int64 [pairs, 2]; gives the first stream that is damaged, or −1.

    words: uint16, with PADDING after them. spans: int64 [streams, 2], where in them each begins and ends. counts: int64
    [streams], pairs in each. lut: see `tables.decoder_table`, of CLASSES classes or less.
    """
    pair = 0
    for stream in range(len(spans)):
        position, end = spans[stream]
        state, last = np.int64(INITIAL_STATE), pair + counts[stream]
        if counts[stream]:
            state = np.int64(words[position]) | np.int64(words[position + 1]) << 16
            position += 2
        while pair < last:
            if position > end:
                return stream
            for kind in range(2):
                slot = np.int64(lut[kind << PRECISION | state & (TOTAL - 1)])
                state = ((slot & (TOTAL - 1)) + 1) * (state >> PRECISION) + (slot >> PRECISION & (TOTAL - 1))
                if state < INITIAL_STATE:
                    state = state << 16 | words[position]
                    position += 1
                symbol = slot >> (2 * PRECISION)
                low = (symbol >> 1) - 1 if symbol > 3 else 0
                numbers[pair, kind] = (symbol - 2 * low << low) | state & ((1 << low) - 1)
                state >>= low
                if state < INITIAL_STATE:
                    state = state << 16 | words[position]
                    position += 1
            pair += 1
        if position != end or state != INITIAL_STATE:
            return stream
    return -1
