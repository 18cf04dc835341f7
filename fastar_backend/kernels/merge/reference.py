"""What `place_kernel` and `merge_kernel` compute, in plain loops and float64. State and entries are dicts of tensors:
key, value [heads, rows, dim], code [heads, slots, dim], count [heads, rows], stay [heads, slots]; of entries, stay
is [tokens], all heads'."""

from __future__ import annotations

from torch import Tensor

State = dict[str, Tensor]


def place(state: State, slot: Tensor, newcomer: Tensor, replace: Tensor, new: State) -> State:
    result = {name: value.clone() for name, value in state.items()}
    for head in range(slot.shape[0]):
        for pair in range(slot.shape[1]):
            if replace[head, pair]:
                to, source = int(slot[head, pair]), int(newcomer[head, pair])
                for name in ("key", "value", "code"):
                    result[name][head, to] = new[name][head, source]
                result["count"][head, to], result["stay"][head, to] = 1, new["stay"][source]
    return result


def merge(state: State, target: Tensor, new: State, renew: bool) -> State:
    """target: [heads, tokens] the slot of each token, or one past the last: nowhere."""
    result = {name: value.clone() for name, value in state.items()}
    slots = state["code"].shape[1]
    for head in range(target.shape[0]):
        for token in range(target.shape[1]):
            to = int(target[head, token])
            if to >= slots:
                continue
            for name in ("value", "count"):
                result[name][head, to] += new[name][head, token]
            if renew:
                for name in ("key", "code"):
                    result[name][head, to] = new[name][head, token]
                result["stay"][head, to] = new["stay"][token]
    return result
