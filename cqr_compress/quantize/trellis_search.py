"""Viterbi search of the paths of rows through a trellis, compiled on the CPU and in torch elsewhere.

Tail-biting: a free path over the dimensions around the seam of the ring gives the state at the seam; a second path
begins and ends with it.
"""

from __future__ import annotations

import torch
from torch import Tensor

from cqr_compress.kernel import ops, trellis_ops
from cqr_compress.table.trellis import pack_states

AROUND = 64
"""Dimensions on each side of the seam that its state is chosen by; more gain less than 0.01 dB."""
_BLOCK_BYTES = 256 * 2**20


def search_paths(
    rows: Tensor, weights: Tensor, rates: Tensor, window: int, values: Tensor
) -> tuple[Tensor, Tensor]:
    """Find the closed path of each row with the least sum of weighted squared errors.

    Args:
        rows: (n, P) float32, any device.
        weights: (P,) float32, positive.
        rates: (P,) uint8, 1 to 8, with a sum of whole bytes of at least `window` bits.
        window: L, bits of a state.
        values: (2**window,) floating point; errors are computed in float32.

    Returns:
        The states (n, P) int32 and the codes (n, row_nbytes) uint8. A row's path does not depend on other rows.
    """
    values = values.float()
    if rows.is_cpu and ops.available():
        return trellis_ops.trellis_search(rows.contiguous(), weights, rates, window, values, AROUND)
    P = rows.shape[1]
    size = max(1, _BLOCK_BYTES // ((2**window) * (P + 16)))
    states = torch.cat(
        [_search_block(part, weights, rates.tolist(), window, values) for part in torch.split(rows, size)]
    )
    return states, pack_states(states, rates, int(rates.sum()) // 8)


def _search_block(rows: Tensor, weights: Tensor, rates: list[int], window: int, values: Tensor) -> Tensor:
    """Search the paths of a block of rows: (n, P) int32."""
    P = rows.shape[1]
    before = max(1, min(AROUND, P // 2))
    around = [d % P for d in range(before - 1, -1, -1)] + [d % P for d in range(P - 1, P - 1 - before, -1)]
    if len(around) >= P - 1:
        around = [d % P for d in range(before - 1, before - 1 - P, -1)]
    seam = _best_path(rows, weights, rates, window, values, around, None)[around.index(0)]
    path = _best_path(rows, weights, rates, window, values, list(range(P - 1, -1, -1)), seam)
    return torch.stack(path[::-1], dim=1).to(torch.int32)


def _best_path(
    rows: Tensor,
    weights: Tensor,
    rates: list[int],
    window: int,
    values: Tensor,
    dimensions: list[int],
    tied: Tensor | None,
) -> list[Tensor]:
    """Find the states (n,) of the dimensions along the best path, from and to the states `tied` (n,) if given."""
    n, S = len(rows), values.shape[0]
    cost = torch.zeros(n, S, dtype=rows.dtype, device=rows.device)
    if tied is not None:
        cost = torch.full_like(cost, 1e30).scatter_(1, tied[:, None], 0.0)
    choices: list[Tensor] = []
    for d in dimensions:
        W = 2 ** rates[d]
        least, choice = cost.view(n, W, S // W).min(1)
        choices.append(choice.to(torch.uint8))
        error = rows[:, d, None] - values
        cost = (weights[d] * error * error).view(n, S // W, W).add_(least[:, :, None]).view(n, S)
    state = cost.argmin(1) if tied is None else tied
    path: list[Tensor] = []
    for d, choice in zip(reversed(dimensions), reversed(choices), strict=True):
        path.append(state)
        before = state >> rates[d]
        state = before | choice.gather(1, before[:, None])[:, 0].to(torch.int64) << (window - rates[d])
    return path[::-1]
