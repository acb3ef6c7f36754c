"""A progress bar over what is made of a model's layers at load."""

import torch
from tqdm.auto import tqdm


class LoadProgress:
    """One bar for all quantized layers of a model, shown by the first rank alone.

    vLLM prepares layers one by one and says neither how many there are nor when it is done: they are counted as they
    are made.
    """

    def __init__(self) -> None:
        self.layers = self.done = 0
        self.bar: tqdm | None = None

    def expect(self) -> None:
        """One more layer will come."""
        self.layers += 1

    def advance(self, activity: str) -> None:
        """One more layer is ready; `activity` says what was done to it."""
        if self.bar is None:
            first_rank = not torch.distributed.is_initialized() or torch.distributed.get_rank() == 0
            self.bar = tqdm(total=self.layers, desc=f"{activity} linear layers", disable=not first_rank)
        self.done += 1
        self.bar.update()
        if self.done >= self.layers:
            self.bar.close()
            self.bar, self.done = None, 0  # vLLM can load weights anew
