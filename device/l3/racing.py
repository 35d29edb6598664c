"""The test of the first replay on main as it was: it has to fail there."""
import torch
class Same(torch.cuda.Stream): pass
from zoo.train import graph
real = torch.cuda.Stream.wait_stream
torch.cuda.Stream.wait_stream = lambda self, other: None
stream, pool = torch.cuda.Stream(), torch.cuda.graph_pool_handle()
def draw(): return torch.rand(1000, device="cuda")
torch.manual_seed(0); steps = [draw(), draw()]
torch.manual_seed(0); draw(); torch.cuda.synchronize()
torch.cuda.synchronize = torch.cuda.empty_cache = lambda *_: None
with torch.cuda.stream(stream): torch.cuda._sleep(10**9)
drawn, replay = graph.record(draw, (), stream, pool)
replay()
print("without waiting: as the first step", torch.equal(drawn, steps[0]), "as the second", torch.equal(drawn, steps[1]))
