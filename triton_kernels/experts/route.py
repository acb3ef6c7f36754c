"""Which block of rows belongs to which expert: visits sorted by expert, on the device, without asking the host.

A *visit* is a token at one of its experts. A block of rows holds visits to one expert only, so that a program reads the
weights of one; an expert's last block is filled up with rows that nobody reads.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from vllm_babai.triton_kernels.configs import bucket

SMALLEST_BLOCK = 16  # rows, of sorted visits: the overflow part takes no fewer tokens at a time


class Routing(NamedTuple):
    """owners: int32 [blocks], the expert of each block; −1: none. places: int64 [visits], the row of each visit.

    tokens: rows of a block.
    """

    owners: Tensor
    places: Tensor
    tokens: int

    @property
    def rows(self) -> int:
        """Rows of all blocks."""
        return len(self.owners) * self.tokens


def block_rows(visits: int, tokens: int, experts: int) -> int:
    """Rows of a block: 1 where hardly two visits meet, so that nothing is sorted; else as an expert gets on average.

    The experts of one token differ. A quarter of as many visits as experts is also where vLLM begins to sort.
    """
    if tokens == 1 or 4 * visits <= experts:
        return 1
    return max(SMALLEST_BLOCK, bucket(-(-visits // experts)))


def route(ids: Tensor, experts: int, tokens: int) -> Routing:
    """Place every visit. ids: int [tokens, k], −1: an expert elsewhere. tokens: rows of a block, see `block_rows`.

    The number of blocks is a bound that depends on sizes alone: an expert leaves one unfull at most.
    """
    flat = ids.flatten()
    visits = len(flat)
    if tokens == 1:
        return Routing(flat.int(), torch.arange(visits, device=ids.device), 1)
    owner = torch.where(flat < 0, experts, flat).long()  # what goes elsewhere is sorted behind all
    order = owner.argsort(stable=True)
    sorted_owner = owner[order]
    counts = owner.new_zeros(experts + 1).scatter_add_(0, owner, torch.ones_like(owner))
    blocks_of = (counts + tokens - 1) // tokens
    last = blocks_of.cumsum(0)  # block of each expert, and one
    first_visit = counts.cumsum(0) - counts
    within = torch.arange(visits, device=ids.device) - first_visit[sorted_owner]
    places = torch.empty_like(order)
    places[order] = (last - blocks_of)[sorted_owner] * tokens + within
    blocks = (visits + min(visits, experts + 1) * (tokens - 1)) // tokens
    owners = torch.searchsorted(last, torch.arange(blocks, device=ids.device), right=True)
    return Routing(torch.where(owners < experts, owners, -1).int(), places, tokens)
