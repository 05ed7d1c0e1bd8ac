"""
The keys and values of what a model has read, so that each new token is computed once.

Its rows are independent: each may hold another number of tokens, and begin at another slot.
"""
import copy

import torch
import torch.nn.functional as F


class Cache:
    """Keys and values of all tokens read so far, in slots: slot number = position.

    kv      one tensor a layer, (2, B, nkv, S, hs): keys, then values
    length  (B,) the next free slot of each row: rows may differ
    first   (B,) the first slot of each row that holds anything: prompts of unequal length are aligned at their end
    slots   S
    context positions of the model: the largest S that `repeat` may give
    used    at least the largest `length`, padding counted, as a plain int: checking for room never waits for a GPU
    """

    def __init__(self, config, batch, slots, device=None, dtype=None):
        if slots > config.context:
            raise ValueError(f"a cache of {slots} slots does not fit the context of {config.context}")
        shape = (2, batch, config.n_kv_head, slots, config.head_size)
        self.kv = [torch.zeros(shape, device=device, dtype=dtype) for _ in range(config.n_layer)]
        self.length = torch.zeros(batch, dtype=torch.long, device=device)
        self.first = torch.zeros(batch, dtype=torch.long, device=device)
        self.slots, self.used, self.context = slots, 0, config.context

    def positions(self, T):
        """(B, T): where the next T tokens of each row stand, which is also the slot they get."""
        return self.length[:, None] + torch.arange(T, device=self.length.device)

    def mask(self, positions):
        """(B, 1, T, S) bool: whether a token at each of `positions` (B, T) attends to each slot."""
        slot = torch.arange(self.slots, device=positions.device)
        first = torch.minimum(self.first[:, None], positions)  # (B, T): padding sees itself, no NaN
        seen = (slot <= positions[..., None]) & (slot >= first[..., None])  # (B, T, S)
        return seen[:, None]  # (B, 1, T, S)

    def advance(self, T, real=None):
        """T tokens a row were written; of them `real` (B,) count, those behind are padding."""
        self.length = self.length + (T if real is None else real)
        self.used += T

    def rewind(self, length):
        """Forget what stands in slot length[b] of row b and behind: those slots are free again."""
        self.length, self.used = length, int(length.max())

    def repeat(self, chosen, room):
        """A new Cache: row b holds what row chosen[b] holds here, and has `room` free slots more.

        Raises ValueError when S + room exceeds the context.
        """
        if self.slots + room > self.context:
            raise ValueError(f"{self.slots} cached and {room} new tokens do not fit the context of {self.context}")
        new = copy.copy(self)
        new.kv = [F.pad(kv.index_select(1, chosen), (0, 0, 0, room)) for kv in self.kv]  # (2, B, nkv, S + room, hs)
        new.length, new.first = self.length[chosen], self.first[chosen]
        new.slots = self.slots + room
        return new
