"""Token mixers, one file each. Importing this package registers them all, by name and without loading them."""

from zoo.registry import mixers

for _name, _target in {
    "softmax": "zoo.mixers.softmax:Softmax",
    "swa": "zoo.mixers.swa:SWA",
    "fox": "zoo.mixers.fox:FoX",
    "gatedfwa": "zoo.mixers.gatedfwa:GatedFWA",
    "nsa": "zoo.mixers.nsa:NSA",
    "gatedfwa_nsa": "zoo.mixers.gatedfwa_nsa:GatedFWANSA",
    "baseconv": "zoo.mixers.baseconv:BaseConv",
}.items():
    mixers.add(_name, _target)
