import sys
sys.path.insert(0, "scripts")
import bench_nsa as b
if __name__ == "__main__":
    b.compile_ahead(b.run_once, list(b.jobs(["speed", "decode", "crossover"], [16, 4, 1])))
