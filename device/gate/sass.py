"""Innermost loops with HGMMA of each kernel, from its SASS. sass.py TREE name dim [key=value ...] [--dump FILE]"""
import sys, re, subprocess, collections, tempfile, pathlib, hashlib
tree = sys.argv[1]; sys.path.insert(0, tree)
import importlib
t = importlib.import_module("tests.kernels.test_hopper_offline")
name, dim = sys.argv[2], int(sys.argv[3])
sw = {}
dump = None
for a in sys.argv[4:]:
    if a.startswith("--dump="): dump = a[7:]; continue
    k, v = a.split("="); sw[k] = eval(v) if v in ("True","False") or v.isdigit() else v
kernel, table = t.KERNELS[name]
b = t.build(kernel, table[dim], dim, **sw)
d = pathlib.Path(tempfile.mkdtemp())
log = t.assemble(b.asm["ptx"], d)
nv = str(pathlib.Path(t.get_ptxas(90).path).parent/"nvdisasm")
sass = subprocess.run([nv, "-c", str(d/"kernel.cubin")],capture_output=True,text=True,check=True).stdout
if dump: pathlib.Path(dump).write_text(sass); pathlib.Path(dump+".ptx").write_text(b.asm["ptx"]); pathlib.Path(dump+".ttgir").write_text(b.asm.get("ttgir",""))
spill = re.findall(r"(\d+) bytes spill stores, (\d+) bytes spill loads", log)
print(name, dim, sw, "shared", b.metadata.shared, "spill", spill, "C75" if "C75" in log else "")
ins = []; labels = {}
for line in sass.splitlines():
    m = re.match(r"^(\.L_x_\d+):", line)
    if m: labels[m.group(1)] = len(ins); continue
    m = re.search(r"/\*[0-9a-f]{4,}\*/\s+(.*?);", line)
    if m: ins.append(m.group(1))
print(" total instructions", len(ins))
def op(i):
    p = i.split(); 
    return (p[1] if p[0].startswith("@") else p[0])
loops=[]
for n,i in enumerate(ins):
    m = re.search(r"BRA.*(\.L_x_\d+)", i)
    if m and m.group(1) in labels and labels[m.group(1)]<=n: loops.append((labels[m.group(1)],n))
inner=[l for l in loops if not any(o!=l and o[0]>=l[0] and o[1]<=l[1] and any("HGMMA" in x for x in ins[o[0]:o[1]+1]) for o in loops)]
for a,z in inner:
    body=ins[a:z+1]
    c=collections.Counter(op(x).split(".")[0] for x in body)
    if c["HGMMA"]==0: continue
    # mask branch: ISETP region
    keys=["HGMMA","MUFU","FFMA","FADD","FMUL","FMNMX","LDS","STS","LDL","STL","SHFL","BAR","MOV","LOP3","ISETP","FSEL","SEL","PRMT","F2FP","R2P","P2R","SYNCS","WARPSYNC","BRA","DEPBAR","LDC","ULDC","R2UR","WARPGROUP","IADD3","IMAD"]
    print("  loop",a,z,"n",len(body)," ".join(f"{k}{c[k]}" for k in keys if c[k]))
