"""pytest plugin (-p trap_random): who draws from Python's global generator, with the stack, to $OUT/random.txt."""
import os, random, traceback
for name in ("random", "getrandbits", "randrange", "randint", "choice", "choices", "shuffle", "sample", "uniform", "gauss", "seed", "setstate"):
    def wrapped(*args, _name=name, _function=getattr(random, name), **words):
        with open(os.path.join(os.environ["OUT"], "random.txt"), "a") as file:
            file.write(f"=== {_name} in {os.environ.get('PYTEST_CURRENT_TEST')}\n" + "".join(traceback.format_stack(limit=60)))
        return _function(*args, **words)
    setattr(random, name, wrapped)
