"""dpo.py: preferences -> loss. Token ids to tensors, sequence log-probabilities, the SFT and the DPO loss.

Three lines carry the method: the shift by one token and the mask in `collate`, and the margin in `dpo_loss`.
Losses come as sums over units (tokens for SFT, pairs for DPO); the trainer divides by the number of units in the
whole batch, so micro-batches and processes of any size add up to the same gradient.

Left out: a second model. The frozen reference is two columns of numbers, computed once before the first update.

Shapes: B pairs, T tokens of all rows, D width, V vocabulary, N target tokens.
"""

from functools import partial

import torch
import torch.nn.functional as F
from torch.utils.checkpoint import checkpoint

IGNORE = -100  # target of a token that is not to be learned
CHUNK = 1 << 24  # most logits alive at once: 64 MB in fp32, whatever the batch


def collate(examples: list[tuple[list[int], ...]], device="cpu") -> tuple[torch.Tensor, torch.Tensor, list[tuple]]:
    """(prompt ids, response ids, ...) -> tokens and targets, each (1, T), and the layout of the rows in them.

    Every response is a row; rows lie end to end without padding. The first carries the prompt, which is computed once:
    the others begin with its last token, which reads out their first, and have the rest of it as their prefix.
    targets[0, t] is the token after tokens[0, t] where that belongs to a response, else IGNORE: the only shift
    there is. The mask comes from ids, since SentencePiece is not compositional.
    """
    tokens, targets, layout = [], [], []
    for prompt, *responses in examples:
        first, known = len(layout), 0
        for response in responses:
            ids = prompt[known:] + response
            layout.append((len(ids) - 1, first, known))
            tokens += ids[:-1]
            targets += [IGNORE] * (len(ids) - 1 - len(response)) + response
            known = len(prompt) - 1
    return torch.tensor([tokens], device=device), torch.tensor([targets], device=device), layout


def target_logps(hidden, head, targets):
    """Log-probabilities of the targets, in fp32, 0 where IGNORE: (B, T, D), the head, (B, T) -> (B, T).

    The vocabulary projection runs on target positions only, CHUNK logits at a time, and again in the backward
    pass, so the (B, T, V) tensor that makes DPO run out of memory never exists.
    """

    def logps(h, ids):  # (n, D), (n,) -> (n,)
        return -F.cross_entropy(head(h).float(), ids, reduction="none")

    mask = targets != IGNORE
    rows, ids = hidden[mask], targets[mask]  # (N, D), (N,)
    step = max(1, CHUNK // head.out_features)
    chunks = list(zip(rows.split(step), ids.split(step), strict=True))
    run = logps if len(chunks) == 1 else partial(checkpoint, logps, use_reentrant=False)
    found = torch.cat([run(*chunk) for chunk in chunks])  # (N,)
    return hidden.new_zeros(targets.shape, dtype=torch.float32).masked_scatter(mask, found)


def by_row(values, layout):
    """Sums over rows that lie end to end: (1, T) -> (number of rows,)."""
    return torch.stack([row.sum() for row in values[0].split([length for length, *_ in layout])])


def sequence_logps(model, tokens, targets, layout):
    """log pi(response | prompt), summed over the response's tokens, end of sequence included: -> (number of rows,)."""
    logps = model(tokens, readout=lambda hidden, head: target_logps(hidden, head, targets), layout=layout)
    return by_row(logps, layout)


def sft_loss(model, tokens, targets, layout) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    """Negative log-likelihood of the targets, summed over tokens; raises ValueError when nothing is to be learned."""
    if not (targets != IGNORE).any():
        raise ValueError("no target token in this batch: every position is masked")
    loss = -sequence_logps(model, tokens, targets, layout).sum()
    return loss, {"loss": loss.detach()}


def dpo_loss(chosen, rejected, reference_chosen, reference_rejected, *, beta: float = 0.1):
    """Direct preference optimisation (Rafailov et al. 2023, eq. 7): sequence log-probs, each (B,) -> losses (B,).

    Also returns diagnostics, each (B,). At the first step, where policy and reference are one, the margin is 0 and
    the loss is ln 2 = 0.693.
    """
    reward_chosen = beta * (chosen - reference_chosen)  # the implicit reward, eq. 5
    reward_rejected = beta * (rejected - reference_rejected)
    margin = reward_chosen - reward_rejected
    losses = -F.logsigmoid(margin)
    shown = {
        "loss": losses,
        "margin": margin,
        "accuracy": (margin > 0).float(),
        "reward_chosen": reward_chosen,
        "reward_rejected": reward_rejected,
        "logp_chosen": chosen,
        "logp_rejected": rejected,
    }
    return losses, {k: v.detach() for k, v in shown.items()}


def preference_loss(model, tokens, targets, layout, reference, *, beta: float = 0.1, nll: float = 0.0):
    """DPO on one batch of B pairs, summed over pairs; also sums of its diagnostics.

    The layout holds the chosen and the rejected response of each pair in turn, so that one forward pass serves both
    and reads their prompt once. reference (2B,) holds M_t's log-probs of the same rows.
    nll adds that many times the chosen response's negative log-likelihood per token (Pang et al. 2024, eq. 1),
    which the paper does not have.
    """
    logps = sequence_logps(model, tokens, targets, layout)  # (2B,)
    losses, shown = dpo_loss(logps[::2], logps[1::2], reference[::2], reference[1::2], beta=beta)
    per_token = -logps[::2] / by_row(targets != IGNORE, layout)[::2]  # (B,)
    shown["nll"] = per_token.detach()
    return (losses + nll * per_token).sum(), {k: v.sum() for k, v in shown.items()}
