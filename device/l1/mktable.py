import csv, sys, statistics as st
from collections import defaultdict
rows=list(csv.DictReader(open(sys.argv[1])))
d=defaultdict(lambda: defaultdict(dict))
for r in rows:
    if r['what'] in('forward','backward'):
        s=tuple(int(float(r[k] or 0)) for k in ('batch','heads','tokens','head_dim','window','kv_heads','document'))
        d[(r['what'],s)][r['peer']][int(r['round'])]=float(r['ms'])
def f(x): return f"{x:.3f}" if x<10 else f"{x:.2f}"
for what in('forward','backward'):
    print(f"| {what}: B, H, T, D, window | zoo | no gate | FA4 | fla | to FA4 | to fla | gate |\n|---|---|---|---|---|---|---|---|")
    for (w,s),p in d.items():
        if w!=what: continue
        def med(n): return st.median(p[n].values()) if n in p else None
        def cell(n,spread=True):
            m=med(n)
            if m is None: return ''
            v=list(p[n].values()); sp=(max(v)-min(v))/m*100
            return f"{f(m)} ({sp:.0f}%)" if spread else f(m)
        def ratio(n):
            if n not in p: return ''
            v=[p[n][r]/p['zoo'][r] for r in p[n] if r in p['zoo']]
            return v
        name=', '.join(map(str,s[:5]))+(f', {s[5]} kv heads' if s[5] else '')+(f', documents of {s[6]}' if s[6] else '')
        fa=ratio('flash-attention-4'); fl=ratio('fla forgetting')
        g=[p['zoo'][r]/p['zoo no gate'][r]-1 for r in p['zoo']] if 'zoo no gate' in p else []
        print(f"| {name} | {cell('zoo')} | {cell('zoo no gate',False)} | {cell('flash-attention-4')} | {cell('fla forgetting',False)} | {st.median(fa):.2f}x ({min(fa):.2f} to {max(fa):.2f}) | {st.median(fl):.1f}x | {100*st.median(g):.0f}% |" if fa else name)
