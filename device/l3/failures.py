"""pytest plugin: each failure's text to $OUT/failures.txt as soon as it is known; xdist's controller gets all reports."""
import os
def pytest_runtest_logreport(report):
    if report.failed and not os.environ.get("PYTEST_XDIST_WORKER"):
        with open(os.path.join(os.environ["OUT"], "failures.txt"), "a") as f:
            f.write(f"=== {report.nodeid} {report.when} {report.duration:.1f} s\n{str(report.longrepr)[-3500:]}\n")
