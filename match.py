"""Similarity matching: which SLM head stands in for each LLM head (Section 4, Eq. 1-3).

Where it sits: once per sequence, in the prefill, before the first tier plan. While both models go through the prompt, a
`Window` keeps the queries and keys of its first 100 to 200 tokens; attention is causal, so their rows are those of the
whole prompt. A head of the LLM is compared with every head of the SLM, in any layer, and the most similar one is taken:
f(i) = argmax_s sim(i, s) (Eq. 3). The map is then frozen.

Two ways to compare:

- `jaccard`: the paper's, Jaccard similarity of the top-k index sets of the accumulated scores (Eq. 1-2);
- `cosine`: cosine of the whole attention rows, the sink column dropped. It uses every row, not a set of k indices,
  so it is less noisy at the same cost.

Beyond the paper: the layers that an LLM layer may be matched with can be those that the SLM has done by the time the
LLM comes to it (`layers_within`), so that the SLM need not be through before the LLM begins (decode.py).
"""

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from kernels import attention_rows, column_sums
from model import Decoder

MATCHERS = ("jaccard", "cosine")
WINDOW_MIN, WINDOW_MAX = 100, 200  # tokens: shorter waits, longer is cut (Section 4, "Method Details")
TOP_SHARE = 0.1  # k of Eq. 2 as a share of the window; the paper does not give k
SINKS = 4  # first tokens left out of a reported similarity: every head looks at them, which would flatter it


def layers_within(reach: float, layer: int, llm_layers: int, slm_layers: int) -> int:
    """How many of the SLM's layers, the first ones, an LLM layer may be matched with: those that begin at most `reach`
    times as deep in the SLM as it begins in the LLM, l' / L' <= reach * l / L.

    reach 1 keeps both models in step, 2 lets the SLM be twice as fast, math.inf is every layer, as in the paper.
    """
    if reach == math.inf:
        return slm_layers
    return min(slm_layers, math.floor(reach * layer * slm_layers / llm_layers + 1e-9) + 1)


@dataclass(frozen=True)
class HeadMap:
    """index (L, H) int64: the SLM head f(i) of each LLM head, counted l' * H' + h'. similarity (L, H) fp32: the cosine
    of the two heads' accumulated scores on the window without the first SINKS tokens, whatever the matcher. anywhere
    (L, H) fp32: the same of the head that would be taken if every SLM layer were within reach."""

    index: Tensor
    similarity: Tensor
    anywhere: Tensor


def accumulated_scores(rows: Tensor) -> Tensor:
    """Eq. 1: a[j] = sum over queries q of A[q, j]; (..., W, W) -> (..., W)."""
    return rows.sum(-2)


def top_sets(scores: Tensor, k: int) -> Tensor:
    """Membership (heads, W) in each head's TopK index set, as 0.0 and 1.0."""
    return torch.zeros_like(scores).scatter(-1, scores.topk(k, dim=-1).indices, 1.0)


def jaccard_similarity(scores: Tensor, others: Tensor, k: int) -> Tensor:
    """Eq. 2: |TopK(a_i) and TopK(a_s)| / |TopK(a_i) or TopK(a_s)|; (h, W) x (s, W) -> (h, s)."""
    common = top_sets(scores, k) @ top_sets(others, k).T
    return common / (2 * k - common)


def unit_rows(features: Tensor) -> Tensor:
    """Each row divided by its length; (h, F) -> (h, F)."""
    return torch.nn.functional.normalize(features, dim=-1)


def cosine_similarity(features: Tensor, others: Tensor) -> Tensor:
    """Cosine between all pairs; (h, F) x (s, F) -> (h, s)."""
    return unit_rows(features) @ unit_rows(others).T


def row_features(rows: Tensor) -> Tensor:
    """Whole attention rows of each head as one vector, the sink column dropped; (heads, W, W) -> (heads, W * (W-1))."""
    return rows[:, :, 1:].flatten(1)


class Window:
    """Queries (L, H, W, D) and keys (L, G, W, D) of a prompt's first W tokens, from the chunks of a forward."""

    def __init__(self, decoder: Decoder, width: int):
        config, like = decoder.config, {"device": decoder.device, "dtype": decoder.dtype}
        self.query = torch.empty(config.layers, config.query_heads, width, config.head_dim, **like)
        self.key = torch.empty(config.layers, config.kv_heads, width, config.head_dim, **like)
        self.width, self.filled = width, 0  # filled: tokens that all layers have seen

    def observe(self, layer: int, query: Tensor, key: Tensor) -> None:
        """Take what of the next tokens' query (1, H, T, D) and key (1, G, T, D) belongs to the window."""
        start, end = self.filled, min(self.filled + query.shape[2], self.width)
        if start == end:
            return
        self.query[layer, :, start:end] = query[0, :, : end - start]
        self.key[layer, :, start:end] = key[0, :, : end - start]
        if layer == len(self.query) - 1:
            self.filled = end

    def rows(self, layers: slice) -> Tensor:
        """Attention matrices of the heads of some layers: (l * H, W, W) fp32."""
        return attention_rows(self.query[layers], self.key[layers]).flatten(0, 1)


def seen_window(decoder: Decoder, tokens: Tensor) -> Window:
    """The window that is all of tokens (1, W)."""
    window = Window(decoder, tokens.shape[1])
    decoder(tokens, logits="none", observe=window.observe)
    return window


def match_heads(llm: Decoder, slm: Decoder, window: list[int], matcher: str, reach: float = math.inf) -> HeadMap:
    """Match every LLM head on a window of WINDOW_MIN..WINDOW_MAX token ids, which both models are run on."""
    tokens = torch.tensor([window], device=llm.device)
    with torch.inference_mode():
        return match_windows(seen_window(llm, tokens), seen_window(slm, tokens.to(slm.device)), matcher, reach)


def match_windows(llm: Window, slm: Window, matcher: str, reach: float) -> HeadMap:
    """Match every LLM head on what both models have seen of the same window, within reach (`layers_within`). Nothing
    here waits for the device.

    The SLM's matrices are held (L' * H' * W * W fp32), the LLM's for as many layers at a time as have no more heads:
    one by one, the layers' small kernels would take longer to launch than to run.
    """
    if matcher not in MATCHERS:
        raise ValueError(f"unknown matcher {matcher!r}; supported: {', '.join(MATCHERS)}")
    L, H = llm.query.shape[:2]
    top_k = max(1, round(TOP_SHARE * llm.width))
    slm_rows = slm.rows(slice(None)).to(llm.query.device)  # (L' * H', W, W)
    slm_scores = accumulated_scores(slm_rows)  # (L' * H', W)
    slm_features = unit_rows(row_features(slm_rows)) if matcher == "cosine" else None
    together = max(1, len(slm_rows) // H)
    del slm_rows
    near = torch.tensor([layers_within(reach, layer, L, len(slm.query)) for layer in range(L)])
    near = near.to(slm_scores.device, non_blocking=True).repeat_interleave(H)  # (L * H,)
    beyond = torch.arange(len(slm_scores), device=near.device) // slm.query.shape[1] >= near[:, None]  # (.., L' * H')
    index, similarity, anywhere = [], [], []
    for first in range(0, L, together):
        rows = llm.rows(slice(first, first + together))  # (l * H, W, W)
        scores = accumulated_scores(rows)
        if matcher == "cosine":
            pairwise = unit_rows(row_features(rows)) @ slm_features.T  # (l * H, L' * H')
        else:
            pairwise = jaccard_similarity(scores, slm_scores, top_k)
        near_only = pairwise.masked_fill(beyond[first * H : (first + together) * H], -torch.inf)
        index.append(near_only.argmax(-1))  # Eq. 3, (l * H,)
        for found, best in ((similarity, index[-1]), (anywhere, pairwise.argmax(-1))):
            matched = slm_scores[best]
            found.append(torch.cosine_similarity(scores[:, SINKS:], matched[:, SINKS:], dim=-1))
    return HeadMap(*(torch.cat(found).view(L, H) for found in (index, similarity, anywhere)))


@torch.inference_mode()
def head_scores(decoder: Decoder, tokens: Tensor) -> Tensor:
    """Accumulated scores (Eq. 1) of every head over a text of any length: (1, n) -> (L * H, n) fp32, O(n) memory."""
    layers = []
    decoder(tokens, logits="none", observe=lambda layer, query, key: layers.append(column_sums(query, key, 1.0)[0]))
    return torch.cat(layers)


def score_similarity(llm: Decoder, slm: Decoder, text: list[int], matcher: str = "jaccard") -> tuple[Tensor, Tensor]:
    """How alike the two models attend on one text, per LLM head: best cosine and matched cosine, each (L, H).

    Both are cosines of accumulated scores over the text without its first SINKS tokens. Best: the most similar SLM head
    on this text. Matched: the head that `matcher` picks on the text's first WINDOW_MAX tokens, in any layer.
    """
    shape = (llm.config.layers, llm.config.query_heads)
    tokens = torch.tensor([text], device=llm.device)
    scores = head_scores(llm, tokens)[:, SINKS:]
    slm_scores = head_scores(slm, tokens.to(slm.device)).to(llm.device)[:, SINKS:]
    pairwise = cosine_similarity(scores, slm_scores)  # (L * H, L' * H')
    chosen = match_heads(llm, slm, text[:WINDOW_MAX], matcher).index.view(-1, 1)
    return pairwise.max(-1).values.view(shape), pairwise.gather(1, chosen).view(shape)
