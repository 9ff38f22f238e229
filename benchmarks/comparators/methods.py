"""Which tokens to evict: StreamingLLM, H2O, R-KV."""

import torch
from torch import Tensor

from comparators.eviction import EvictionLayer, Method

COSINES = 1 << 27  # similarities of keys that are held at once


class StreamingLLM(Method):
    """Keep the first tokens and the newest ones (arXiv 2309.17453), here without moving positions."""

    name = "streaming-llm"

    def __init__(self, sink: int = 4) -> None:
        self.sink = sink

    def keep_scores(self, layer: EvictionLayer, budget: Tensor) -> Tensor:
        """Newer is better; the sink stays."""
        return torch.where(layer.place < self.sink, torch.inf, layer.place.float())


class H2O(Method):
    """Keep the newest half of the budget and, of the others, the tokens that drew the most attention so far (arXiv 2306.14048).

    Attention is summed over all queries since the token came, and over the query heads of the group.
    """

    name = "h2o"
    sums_attention = True

    def keep_scores(self, layer: EvictionLayer, budget: Tensor) -> Tensor:
        """Accumulated attention; the newest half of the budget stays."""
        newest = torch.tensor(layer.seen, device=budget.device) - budget // 2
        return layer.sums.masked_fill(layer.place >= newest[:, None, None], torch.inf)


class RKV(Method):
    """Keep what is important and not redundant (R-KV, arXiv 2505.24133), every `slack` tokens.

    importance: softmax over the older keys of the scores of the newest `queries` queries, the largest of a group's query heads,
    averaged over these queries, then the maximum over 7 neighbouring tokens. redundancy: softmax of a key's mean cosine similarity
    to all keys, where each key's newest similar key (cosine above 0.5) does not count, nor the key itself. The tokens of the newest
    queries stay. Score: mix * importance - (1 - mix) * redundancy. The release compresses every 128 tokens and holds up to 128 more
    than its budget; at equal bytes those would come off the budget, so less is better here.
    """

    name = "r-kv"

    def __init__(self, mix: float = 0.1, queries: int = 8, kernel: int = 7, similar: float = 0.5, slack: int = 16) -> None:
        self.mix, self.queries, self.kernel, self.similar, self.slack = mix, queries, kernel, similar, slack

    def keep_scores(self, layer: EvictionLayer, budget: Tensor) -> Tensor:
        """See the class."""
        order = layer.place.argsort(dim=-1, stable=True)  # oldest first, behind the empty slots
        place = layer.place.gather(2, order)
        k = layer.k.gather(2, order[..., None].expand_as(layer.k)).float()
        there = place >= 0
        old = there & (place < (torch.tensor(layer.seen, device=place.device) - self.queries)[:, None, None])
        score = self.mix * self.importance(layer, k, old) - (1 - self.mix) * self.redundancy(k, there)
        score = score.masked_fill(there & ~old, torch.inf)
        return torch.empty_like(score).scatter_(2, order, score)

    def importance(self, layer: EvictionLayer, k: Tensor, old: Tensor) -> Tensor:
        """float32 [B, H, C]; 0 for tokens that are not old. k: [B, H, C, D], oldest first."""
        q = layer.recent.float().unflatten(1, (k.shape[1], -1))
        scores = torch.einsum("bhgnd,bhtd->bhgnt", q, k).amax(2) * k.shape[3] ** -0.5
        scores = scores.masked_fill(~old[:, :, None], torch.finfo(torch.float32).min)
        drawn = scores.softmax(-1).mean(2) * old
        return torch.nn.functional.max_pool1d(drawn, self.kernel, 1, self.kernel // 2)

    def redundancy(self, k: Tensor, there: Tensor) -> Tensor:
        """float32 [B, H, C]. k: [B, H, C, D], oldest first; there: bool [B, H, C]."""
        rows = max(1, COSINES // (k.shape[1] * k.shape[2] ** 2))
        return torch.cat([self._redundancy(*part) for part in zip(k.split(rows), there.split(rows), strict=True)])

    def _redundancy(self, k: Tensor, there: Tensor) -> Tensor:
        unit = k / (k.norm(dim=-1, keepdim=True) + 1e-8) * there[..., None]
        cosine = unit @ unit.mT
        cosine.diagonal(dim1=-2, dim2=-1).zero_()
        column = torch.arange(k.shape[2], device=k.device)
        first = there.int().argmax(-1)[..., None]  # the release zeroes the first token where no key is similar
        newest = torch.where(cosine > self.similar, column, first[..., None]).amax(-1, keepdim=True)
        cosine.scatter_(-1, newest, 0.0)
        mean = cosine.sum(-2) / there.sum(-1, keepdim=True)
        return mean.masked_fill(~there, -torch.inf).softmax(-1)


METHODS = {m.name: m for m in (StreamingLLM(), H2O(), RKV())}
