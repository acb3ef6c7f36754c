"""Which block of rows belongs to which expert: visits sorted by expert, on the device, without asking the host.

A *visit* is a token at one of its experts. A block of rows holds visits to one expert only, so that a program reads the
weights of one; an expert's last block is filled up with rows that belong to no visit. Nothing is moved: kernels find
the rows of x by the visits, and write what belongs to one where the visit stands.
"""

from typing import NamedTuple

import triton
import triton.language as tl
from torch import Tensor

from vllm_babai.triton_kernels.configs import bucket

SMALLEST_BLOCK = 16  # rows, of sorted visits: the overflow part takes no fewer tokens at a time
COMPARISONS = tl.constexpr(1 << 14)  # of ids with experts that a program makes at a time; like the warps a choice
WARPS = 4


class Routing(NamedTuple):
    """owners: int32 [blocks], the expert of each block; −1: none. visits: int32 [blocks · rows], the visit of each row
    of a block with an owner; −1: none. Where a block is a single visit, block and visit have the same number.
    """

    owners: Tensor
    visits: Tensor

    @property
    def rows(self) -> int:
        """Rows of a block."""
        return len(self.visits) // len(self.owners)


@triton.jit(do_not_specialize=["visits", "experts", "blocks"])
def sort_kernel(ids_ptr, owners_ptr, visits_ptr, visits, experts, blocks, ROWS: tl.constexpr, EXPERTS: tl.constexpr):
    """Give one expert's visits rows, in their order; the program behind all experts disowns the blocks that are left.

    ids_ptr: int32 [visits], −1: an expert elsewhere. owners_ptr, visits_ptr: as of `Routing`. ROWS: of a block.
    EXPERTS: the next power of two. Grid: [experts + 1].
    """
    CHUNK: tl.constexpr = max(1, COMPARISONS // EXPERTS)
    expert = tl.program_id(0)
    numbers = tl.arange(0, EXPERTS)
    counts = tl.zeros((EXPERTS,), tl.int32)  # every program counts for itself: none has to wait for another
    for first in range(0, visits, CHUNK):
        visit = first + tl.arange(0, CHUNK)
        ids = tl.load(ids_ptr + visit, mask=visit < visits, other=-1)
        counts += tl.sum((ids[:, None] == numbers[None, :]).to(tl.int32), 0)
    first_block = tl.sum(tl.where(numbers < expert, tl.cdiv(counts, ROWS), 0), 0)
    first_row = visits_ptr + first_block * ROWS
    placed = 0
    for first in range(0, visits, CHUNK):
        visit = first + tl.arange(0, CHUNK)
        own = tl.load(ids_ptr + visit, mask=visit < visits, other=-1) == expert
        tl.store(first_row + placed + tl.cumsum(own.to(tl.int32), 0) - 1, visit, mask=own)
        placed += tl.sum(own.to(tl.int32), 0)
    owned = tl.cdiv(placed, ROWS)
    rest = placed + tl.arange(0, ROWS)
    tl.store(first_row + rest, tl.full((ROWS,), -1, tl.int32), mask=rest < owned * ROWS)
    owner = expert
    if expert == experts:
        owner = -1
        owned = blocks - first_block
    for first in range(0, owned, ROWS):
        block = first + tl.arange(0, ROWS)
        owners = tl.zeros((ROWS,), tl.int32) + owner
        tl.store(owners_ptr + first_block + block, owners, mask=block < owned)


def block_rows(visits: int, tokens: int, experts: int) -> int:
    """Rows of a block: 1 where hardly two visits meet, so that nothing is sorted; else as an expert gets on average.

    The experts of one token differ. A quarter of as many visits as experts is also where vLLM begins to sort.
    """
    if tokens == 1 or 4 * visits <= experts:
        return 1
    return max(SMALLEST_BLOCK, bucket(-(-visits // experts)))


def route(ids: Tensor, experts: int, rows: int) -> Routing:
    """Place every visit. ids: int32 [tokens, k], −1: an expert elsewhere. rows: of a block, see `block_rows`.

    The number of blocks is a bound that depends on sizes alone: an expert leaves one unfull at most.
    """
    flat = ids.flatten()
    if rows == 1:
        return Routing(flat, flat)
    visits = len(flat)
    blocks = (visits + min(visits, experts) * (rows - 1)) // rows
    owners = flat.new_empty(blocks)
    placed = flat.new_empty(blocks * rows)
    width = triton.next_power_of_2(experts)
    sort_kernel[(experts + 1,)](
        flat, owners, placed, visits, experts, blocks, ROWS=rows, EXPERTS=width, num_warps=WARPS
    )
    return Routing(owners, placed)
