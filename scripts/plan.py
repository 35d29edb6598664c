def jobs():
    J = []
    b = lambda D, dq=None, dkv=None, **k: J.append(dict(kind="bwd", D=D, dq_plan=dq, dkv_plan=dkv, **k))
    b(64); b(128); b(64, gated=False, check=False); b(128, gated=False, check=False); b(64, check=False); b(128, check=False)
    return J
