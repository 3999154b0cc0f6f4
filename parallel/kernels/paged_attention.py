import torch
import torch.nn.functional as F

from parallel.engine.pages import PagedKV, gather_kv


def paged_attention(q, kp, vp, table, lengths, scale):
    out = torch.zeros_like(q)
    for b, n in enumerate(lengths.tolist()):
        if n:
            k, v = gather_kv(PagedKV(kp, vp), table[b], n, q.dtype)
            out[b] = F.scaled_dot_product_attention(
                q[b].unsqueeze(1), k.transpose(0, 1), v.transpose(0, 1), scale=scale, enable_gqa=True
            ).squeeze(1)
    return out


def prefill_attention(q, k, v, scale):
    t, n = len(q), len(k)
    mask = torch.ones(t, n, dtype=torch.bool).tril(n - t)
    return F.scaled_dot_product_attention(
        q.transpose(0, 1), k.transpose(0, 1), v.transpose(0, 1), attn_mask=mask, scale=scale, enable_gqa=True
    ).transpose(0, 1)
