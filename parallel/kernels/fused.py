import torch
def rms_norm(h, w, eps):
    f = h.float(); return w * (f * torch.rsqrt(f.pow(2).mean(-1, keepdim=True) + eps)).to(h.dtype)
def add_rms_norm(h, r, w, eps):
    r.add_(h); return rms_norm(r, w, eps)
def silu_mul(x):
    g, u = x.chunk(2, -1); return torch.nn.functional.silu(g) * u
def rotary_tables(rot, n):
    a = torch.arange(n, device=rot.inv_freq.device).float()[:, None] * rot.inv_freq.float()
    return a.cos() * rot.attention_scaling, a.sin() * rot.attention_scaling
def rot(x, c, s):
    a, b = x.float().chunk(2, -1); c, s = c[:, None], s[:, None]
    return torch.cat([a*c-b*s, b*c+a*s], -1).to(x.dtype)
def rotary_and_cache(qkv, cos, sin, pos, slots, kp, vp, h, kh, qn, kn, eps):
    d = kp.shape[-1]; P = kp.shape[2]
    q, k, v = qkv.split([h*d, kh*d, kh*d], -1)
    q, k, v = q.view(-1, h, d), k.view(-1, kh, d), v.view(-1, kh, d)
    if qn is not None: q, k = rms_norm(q, qn, eps), rms_norm(k, kn, eps)
    q, k = rot(q, cos[pos], sin[pos]), rot(k, cos[pos], sin[pos])
    kp[slots // P, :, slots % P] = k.to(kp.dtype); vp[slots // P, :, slots % P] = v.to(vp.dtype)
    return q
