"""From grid rows (validation alone) the next words.

    choose.py GRID RECIPE best               words of the setting with the best mean score over seeds
    choose.py GRID RECIPE combine COUNT      lines: combinations of the best COUNT changes that do better than none

A score is the mean MSE over horizons; of M4 MASE / .730 + WQL / .0247 of the hold-out.
"""
import itertools, json, sys
from collections import defaultdict

grid, recipe, what = sys.argv[1:4]
groups = defaultdict(list)
shared = None
for text in open(grid):
    row = json.loads(text)
    if row["recipe"] != recipe or "error" in row:
        continue
    if recipe == "series/m4_hourly":
        score = row["others"]["mase_48"] / 0.730 + row["others"]["wql_48"] / 0.0247
    else:
        score = row["mse"]
    groups[row["setting"]].append(score)
words = {setting: setting.split() for setting in groups}
common = set.intersection(*(set(w) for w in words.values())) if words else set()
most = max(map(len, groups.values()))
# a setting counts with as many seeds as any has, or it is luck
scores = {s: sum(v) / len(v) for s, v in groups.items() if len(v) == most}
own = {s: [w for w in words[s] if w not in common] for s in scores}
base = next((scores[s] for s in scores if not own[s]), float("inf"))
ranked = sorted(scores, key=scores.get)
for s in ranked[:12]:
    print(f"{scores[s]:.5f} ({most} seeds, as it is {base:.5f})  {' '.join(own[s]) or '(as it is)'}", file=sys.stderr)
if what == "best":
    print(" ".join(own[ranked[0]]))
else:
    good = [own[s] for s in ranked if own[s] and scores[s] < base][: int(sys.argv[4])]
    for size in (2, 3):
        for parts in itertools.combinations(good, size):
            all_words = [w for part in parts for w in part]
            if len({w.split("=")[0] for w in all_words}) == len(all_words):
                print(" ".join(all_words))
