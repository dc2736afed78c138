"""dpo.py: preferences -> loss. Token ids to tensors, sequence log-probabilities, the SFT and the DPO loss.

Three lines carry the method: the shift by one token and the mask in `collate`, and the margin in `dpo_loss`.
Losses come as sums over units (tokens for SFT, pairs for DPO); the trainer divides by the number of units in the
whole batch, so micro-batches and processes of any size add up to the same gradient.

Left out: a second model. The frozen reference is two columns of numbers, computed once before the first update.

Shapes: B rows, T time, D width, V vocabulary, N target tokens.
"""

import torch
import torch.nn.functional as F
from torch.utils.checkpoint import checkpoint

IGNORE = -100  # target of a token that is not to be learned
CHUNK = 1 << 24  # most logits alive at once: 64 MB in fp32, whatever the batch


def collate(examples: list[tuple[list[int], list[int]]], device="cpu") -> tuple[torch.Tensor, torch.Tensor]:
    """(prompt ids, response ids) pairs -> tokens and targets, each (B, T), padded on the right.

    targets[b, t] is the token after tokens[b, t] where that belongs to the response, else IGNORE: the only shift
    there is. The mask comes from ids, since SentencePiece is not compositional.
    """
    T = max(len(p) + len(r) for p, r in examples) - 1
    tokens = torch.zeros(len(examples), T, dtype=torch.long)
    targets = torch.full((len(examples), T), IGNORE)
    for b, (prompt, response) in enumerate(examples):
        row = torch.tensor(prompt + response)
        tokens[b, : len(row) - 1] = row[:-1]
        targets[b, len(prompt) - 1 : len(row) - 1] = row[len(prompt) :]
    return tokens.to(device), targets.to(device)


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
    if len(rows) <= step:
        parts = [logps(rows, ids)]
    else:
        parts = [
            checkpoint(logps, rows[i : i + step], ids[i : i + step], use_reentrant=False)
            for i in range(0, len(rows), step)
        ]
    return hidden.new_zeros(targets.shape, dtype=torch.float32).masked_scatter(mask, torch.cat(parts))


def sequence_logps(model, tokens, targets):
    """log pi(response | prompt), summed over the response's tokens, end of sequence included: (B, T) -> (B,)."""
    return model(tokens, readout=lambda hidden, head: target_logps(hidden, head, targets)).sum(-1)


def sft_loss(model, tokens, targets) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    """Negative log-likelihood of the targets, summed over tokens; raises ValueError when nothing is to be learned."""
    if not (targets != IGNORE).any():
        raise ValueError("no target token in this batch: every position is masked")
    loss = -sequence_logps(model, tokens, targets).sum()
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


def preference_loss(model, tokens, targets, reference, *, beta: float = 0.1, nll: float = 0.0):
    """DPO on one batch of B pairs, summed over pairs; also sums of its diagnostics.

    tokens and targets (2B, T) hold the chosen responses, then the rejected ones, of the same prompts in the same
    order, so that one forward pass serves both. reference (2B,) holds M_t's log-probs of the same rows.
    nll adds that many times the chosen response's negative log-likelihood per token (Pang et al. 2024, eq. 1),
    which the paper does not have.
    """
    logps = sequence_logps(model, tokens, targets)  # (2B,)
    (chosen, rejected), (ref_chosen, ref_rejected) = logps.chunk(2), reference.chunk(2)
    losses, shown = dpo_loss(chosen, rejected, ref_chosen, ref_rejected, beta=beta)
    per_token = -chosen / (targets.chunk(2)[0] != IGNORE).sum(-1)  # (B,)
    shown["nll"] = per_token.detach()
    return (losses + nll * per_token).sum(), {k: v.sum() for k, v in shown.items()}
