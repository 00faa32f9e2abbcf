"""Attention alignment: which LLM head each SLM head learns, and how far its attention is from that head's.

Where it sits: the loss of training.distill. Both models are run on the same tokens; `capture` keeps the keys, and the
queries of R random positions. Only their rows are ever made, (B, H', R, T) for one SLM layer at a time, never an n x n
matrix.

    heads:  cluster_heads -> deal_slots     LLM heads with alike rows share an SLM head; shallow heads go to low layers
    rows:   capture -> target_rows -> row_losses

What is measured (match.score_similarity) is the cosine of column sums without the first SINKS tokens, but most rows put
most of their mass there. So three losses are kept apart: the whole row, the row without its sinks, the column sums.
"""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from match import SINKS, cosine_similarity, row_features
from model import Config, Decoder

FAR = -1e4  # the logit of a future key: its softmax is 0 in fp32, and 0 * FAR is 0 where 0 * -inf is not
MASS_FLOOR = 0.005  # heads whose mean mass outside the sinks is below this count less: there is little to learn


# ---- what is captured ------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Captured:
    """hidden (B, R, hidden): the last layer's, at the positions; queries (B, L, H, R, D); keys (B, L, G, T, D)."""

    hidden: Tensor
    queries: Tensor
    keys: Tensor


class _Observer:
    def __init__(self, positions: Tensor):
        self.positions, self.queries, self.keys = positions, [], []

    @torch.compiler.disable
    def __call__(self, layer: int, query: Tensor, key: Tensor) -> None:
        self.queries.append(query[:, :, self.positions])
        self.keys.append(key)


def capture(decoder: Decoder, tokens: Tensor, positions: Tensor) -> Captured:
    """Run tokens (B, T) and keep what the rows of the queries at `positions` (R,) are made of."""
    observer = _Observer(positions)
    hidden = decoder(tokens, logits="none", observe=observer)
    return Captured(hidden[:, positions], torch.stack(observer.queries, 1), torch.stack(observer.keys, 1))


def row_logits(query: Tensor, key: Tensor, positions: Tensor) -> Tensor:
    """Attention logits of sampled rows, FAR on future keys: (B, H, R, D) x (B, G, T, D) -> (B, H, R, T).

    In fp32: a logit of 20 is known to 0.06 in bf16, which is six percent of a probability.
    """
    B, H, R, D = query.shape
    G, T = key.shape[1], key.shape[2]
    grouped = query.float().reshape(B, G, H // G * R, D)
    logits = (grouped @ key.float().transpose(-1, -2)).view(B, H, R, T) * D**-0.5
    future = torch.arange(T, device=key.device) > positions[:, None]  # (R, T)
    return logits.masked_fill(future, FAR)


# ---- which head learns which -----------------------------------------------------------------------------------------


@torch.no_grad()
def head_features(llm: Decoder, tokens: Tensor, positions: Tensor) -> Tensor:
    """The rows of every LLM head on a few windows (B, T) as one vector each, the sink column dropped: (L * H, F)."""
    captured = capture(llm, tokens, positions)
    features = []
    for layer in range(llm.config.layers):
        rows = row_logits(captured.queries[:, layer], captured.keys[:, layer], positions).softmax(-1)  # (B, H, R, T)
        features.append(row_features(rows.transpose(0, 1).flatten(1, 2)))  # (H, B * R * (T - 1))
    return F.normalize(torch.cat(features), dim=-1)


def cluster_heads(features: Tensor, clusters: int, iterations: int = 30) -> Tensor:
    """k-means by cosine; (heads, F) -> the cluster of each head (heads,), clusters numbered by their mean depth.

    Starts from the heads that are least like one another, so it draws no random numbers.
    """
    features = F.normalize(features, dim=-1)
    likeness = features @ features.T
    chosen = [0]
    while len(chosen) < clusters:
        chosen.append(int(likeness[:, chosen].max(-1).values.argmin()))
    centres = features[chosen]
    labels = torch.full((len(features),), -1, device=features.device)
    for _ in range(iterations):
        similarity = cosine_similarity(features, centres)  # (heads, clusters)
        before, labels = labels, similarity.argmax(-1)
        for empty in (torch.bincount(labels, minlength=clusters) == 0).nonzero().flatten():
            alone = similarity.max(-1).values.argmin()  # the head that its centre says least about
            labels[alone], similarity[alone] = empty, 1.0
        if torch.equal(before, labels):
            break
        centres = torch.stack([features[labels == cluster].mean(0) for cluster in range(clusters)])
    depth = torch.arange(len(features), device=features.device, dtype=torch.float32)
    means = torch.stack([depth[labels == cluster].mean() for cluster in range(clusters)])
    return means.argsort().argsort()[labels]


def deal_slots(labels: Tensor, slm: Config) -> Tensor:
    """The SLM head l' * H' + h' of each LLM head, (L * H,): clusters in order of depth, evenly over the KV heads.

    LLM heads with one key come after one another in that order, so they mostly share a key in the SLM too.
    """
    clusters, groups = int(labels.max()) + 1, slm.layers * slm.kv_heads
    size = slm.query_heads // slm.kv_heads
    group = [cluster * groups // clusters for cluster in range(clusters)]
    slots = [group[cluster] * size + cluster - group.index(group[cluster]) for cluster in range(clusters)]
    return torch.tensor(slots)[labels.cpu()]


def plan_heads(llm: Decoder, slm: Config, tokens: Tensor, positions: Tensor) -> Tensor:
    """The SLM head that learns each LLM head: one each if there are as many, else one for each cluster."""
    heads, places = llm.config.layers * llm.config.query_heads, slm.layers * slm.query_heads
    if places >= heads:
        return deal_slots(torch.arange(heads), slm)
    return deal_slots(cluster_heads(head_features(llm, tokens, positions), places), slm)


@dataclass(frozen=True)
class LayerTargets:
    """The LLM heads that one SLM layer learns.

    With one SLM head for each, h = H', they are in the order of the SLM's heads, and an idle one has LLM head 0 as a
    stand-in that does not count. With clusters they are in the LLM's order, and `share` makes the clusters' means.
    """

    heads: Tensor  # (h,) flat LLM heads
    keys: Tensor  # (h,) their flat KV heads
    place: Tensor  # (h,) the head of the SLM layer that learns it
    learns: Tensor  # (h,) 1.0, or 0.0 for a stand-in
    share: Tensor | None  # (H', h): the weight of each in the mean of its cluster
    active: Tensor  # (H',): 1.0, or 0.0 for an idle head


def layer_targets(slots: Tensor, llm: Config, slm: Config, device: torch.device) -> list[LayerTargets]:
    """Slots of `plan_heads` -> what each SLM layer learns."""
    single = len(slots.unique()) == len(slots)
    group, targets = llm.query_heads // llm.kv_heads, []
    for layer in range(slm.layers):
        heads = (slots // slm.query_heads == layer).nonzero().flatten()
        place = slots[heads] % slm.query_heads
        counts = torch.bincount(place, minlength=slm.query_heads)
        learns, share = torch.ones(len(heads)), None
        if single:
            ordered = torch.zeros(slm.query_heads, dtype=torch.long)
            ordered[place] = heads
            heads, place, learns = ordered, torch.arange(slm.query_heads), counts.float()
        else:
            share = F.one_hot(place, slm.query_heads).T / counts.clamp(min=1)[:, None]
        parts = heads, heads // group, place, learns, share, (counts > 0).float()
        targets.append(LayerTargets(*(None if part is None else part.to(device) for part in parts)))
    return targets


# ---- losses ----------------------------------------------------------------------------------------------------------


def target_rows(query: Tensor, key: Tensor, positions: Tensor, share: Tensor | None) -> tuple[Tensor, Tensor]:
    """LLM heads (B, h, R, D), their keys (B, h, T, D) -> rows to learn (B, H', R, T), column sums of each (B, h, T)."""
    rows = row_logits(query, key, positions).softmax(-1)  # (B, h, R, T)
    sums = rows.sum(2)
    return (rows if share is None else torch.einsum("shap,th->stap", rows, share)), sums


def row_losses(target: Tensor, query: Tensor, key: Tensor, positions: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Target rows (B, H', R, T) and one SLM layer's queries (B, H', R, D), keys (B, G', T, D) -> by SLM head (H',) the
    divergence of whole rows and of rows without sinks, and the SLM's column sums (B, H', T).

    Without sinks, a row counts by its mass outside the sinks, over the head's mean: what a row adds to the column sums.
    A divergence is the cross-entropy less the target's entropy, so its floor is 0.
    """
    logits = row_logits(query, key, positions)  # (B, H', R, T)
    norm = logits.logsumexp(-1)
    gain = target * logits + torch.special.entr(target)
    whole = norm - gain.sum(-1)  # (B, H', R)

    # The sinks are masked, not cut off: sums of one shape are one pass over the rows when this is compiled.
    outside = torch.arange(logits.shape[-1], device=logits.device) >= SINKS  # (T,)
    mass = (target * outside).sum(-1)  # m, (B, H', R)
    tail_norm = logits.masked_fill(~outside, FAR).logsumexp(-1)
    tail = mass * tail_norm - (gain * outside).sum(-1) - torch.xlogy(mass, mass)  # m * KL of the rows without sinks
    tail = tail.mean((0, 2)) / (mass.mean((0, 2)) + MASS_FLOOR)
    sums = (logits - norm[..., None]).exp().sum(2)  # (B, H', T)
    return whole.mean((0, 2)), tail, sums


def sum_losses(target_sums: Tensor, sums: Tensor) -> Tensor:
    """1 - cosine of column sums without the sinks: (B, h, T) x (B, h, T) -> (h,)."""
    return (1 - F.cosine_similarity(target_sums[..., SINKS:], sums[..., SINKS:], dim=-1)).mean(0)


def logit_loss(logits: Tensor, llm_logits: Tensor) -> Tensor:
    """KL of the SLM's next-token distribution to the LLM's, mean over the rows: (B, R, V) x (B, R, V) -> ()."""
    ours, theirs = logits.float().log_softmax(-1), llm_logits.float().log_softmax(-1)
    return (theirs.exp() * (theirs - ours)).sum(-1).mean()


@dataclass(frozen=True)
class Alignment:
    """The attention losses of a pair. The two functions may be compiled versions of those above."""

    targets: list[LayerTargets]
    target_rows: object = target_rows
    row_losses: object = row_losses

    def losses(self, llm: Captured, slm: Captured, positions: Tensor) -> dict[str, Tensor]:
        """Means over the SLM heads that learn ("rows", "tail") and over the LLM heads ("sums")."""
        queries, keys = llm.queries.flatten(1, 2), llm.keys.flatten(1, 2)  # (B, L * H, R, D), (B, L * G, T, D)
        rows = tail = sums = 0.0
        for layer, part in enumerate(self.targets):
            with torch.no_grad():
                query, key = queries[:, part.heads], keys[:, part.keys]
                target, target_sums = self.target_rows(query, key, positions, part.share)
            whole, rest, own_sums = self.row_losses(target, slm.queries[:, layer], slm.keys[:, layer], positions)
            rows = rows + (whole * part.active).sum()
            tail = tail + (rest * part.active).sum()
            own_sums = own_sums if part.share is None else own_sums[:, part.place]  # (B, h, T)
            sums = sums + (sum_losses(target_sums, own_sums) * part.learns).sum()
        active = sum(part.active.sum() for part in self.targets)
        learnt = sum(part.learns.sum() for part in self.targets)
        return {"rows": rows / active, "tail": tail / active, "sums": sums / learnt}


# ---- a start ---------------------------------------------------------------------------------------------------------


@torch.no_grad()
def principal_embedding(embedding: Tensor, size: int, std: float, generator: torch.Generator) -> Tensor:
    """An embedding (V, hidden) on its top `size` principal components, scaled to `std`: (V, size).

    More columns than it has are filled with noise.
    """
    centred = embedding.double().cpu()
    centred = centred - centred.mean(0)
    directions = torch.linalg.eigh(centred.T @ centred).eigenvectors.flip(-1)  # largest first
    projected = (centred @ directions[:, :size]).float()
    projected *= std / projected.std()
    extra = std * torch.randn(len(projected), size - projected.shape[1], generator=generator)
    return torch.cat((projected, extra), dim=-1)
