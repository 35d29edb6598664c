import torch, torch.nn.functional as F
from zoo.ops.loss import linear_cross_entropy
def log_decay(z,u,eps=1e-3):
    beta=1+F.elu(u); return F.logsigmoid(beta*z)/(beta+eps)
def window_attention(q,k,v,log_decay=None,*,window=None,scale=None,cu_seqlens=None,return_lse=False,key_start=None):
    B,T,H,D=q.shape; S,G=k.shape[1:3]
    k=k.repeat_interleave(H//G,2); v=v.repeat_interleave(H//G,2)
    s=torch.einsum("bthd,bshd->bhts",q,k)*(scale or D**-.5)
    i=torch.arange(S-T,S)[:,None]; j=torch.arange(S)[None]
    m=(j<=i)
    if window is not None: m=m&(j>i-window)
    m=m[None].expand(B,-1,-1)
    if key_start is not None: m=m&(j[None]>=key_start[:,None,None])
    if cu_seqlens is not None:
        d=torch.searchsorted(cu_seqlens.long(),torch.arange(S),right=True); m=m&(d[None,:,None]==d[None,None,:])
    if log_decay is not None:
        U=log_decay.double().cumsum(1).transpose(1,2); s=s+(U[:,:,S-T:,None]-U[:,:,None,:]).to(s.dtype)
    s=s.masked_fill(~m[:,None],-torch.inf)
    return torch.einsum("bhts,bshd->bthd",s.softmax(-1),v)
def gated_window_attention(q,k,v,z,u,**kw): return window_attention(q,k,v,log_decay(z,u),**kw)
def ring_attention(q,k,v,decay,live,*,scale=None):
    B,_,H,D=q.shape;S,G=k.shape[1:3]
    k=k.repeat_interleave(H//G,2); v=v.repeat_interleave(H//G,2)
    s=torch.einsum("bhd,bshd->bsh",q[:,0],k)*D**-.5
    if decay is not None: s=s+decay
    s=s.masked_fill((torch.arange(S)[None]>=live[:,None])[...,None],-torch.inf)
    return torch.einsum("bsh,bshd->bhd",s.softmax(1),v)[:,None]
