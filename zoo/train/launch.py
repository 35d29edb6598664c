"""Start a command once per rank on this machine, as torchrun does, and end all when one ends badly."""

import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Sequence

from torch.distributed import TCPStore

from zoo.train.watchdog import AGREED, VERDICT

GRACE = 5.0  # seconds for the others to say where they were


def launch(ranks: int, command: Sequence[str]) -> int:
    """Run `command` in `ranks` processes that find each other; returns the exit code of the first that failed, or 0.

    Signals to this process go on to all of them. The store where they meet lives here, so none takes it along.
    """
    store = TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    threads = max(1, (os.cpu_count() or 1) // ranks)
    shared = {
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(store.port),
        "TORCHELASTIC_USE_AGENT_STORE": "True",  # they join this store instead of opening one
        "WORLD_SIZE": str(ranks),
        "LOCAL_WORLD_SIZE": str(ranks),
        "GLOO_SOCKET_IFNAME": os.environ.get("GLOO_SOCKET_IFNAME", _loopback()),
        "OMP_NUM_THREADS": os.environ.get("OMP_NUM_THREADS", str(threads)),
    }
    processes = [
        subprocess.Popen(command, env={**os.environ, **shared, "RANK": str(rank), "LOCAL_RANK": str(rank)})
        for rank in range(ranks)
    ]

    def pass_on(number: int, _: object) -> None:
        for process in processes:
            if process.poll() is None:
                process.send_signal(number)

    # Ctrl-C reaches the whole terminal group by itself
    old = {signal.SIGTERM: signal.signal(signal.SIGTERM, pass_on), signal.SIGINT: signal.signal(signal.SIGINT, _wait)}
    try:
        return _watch(processes, store)
    finally:
        for number, handler in old.items():
            signal.signal(number, handler)
        for process in processes:
            if process.poll() is None:
                process.kill()
                process.wait()


def _watch(processes: list[subprocess.Popen], store: TCPStore) -> int:
    failed: int | None = None
    why, tell, deadline = "", float("inf"), float("inf")
    while True:
        codes = [process.poll() for process in processes]
        if failed is None and (bad := [rank for rank, code in enumerate(codes) if code]):
            failed = min(bad, key=lambda rank: (codes[rank] or 0) > 0)  # a killed one explains errors of others
            why = _how(codes[failed])
            sys.stderr.write(f"zoo: rank {failed} ended with {why}; ending the job\n")
            deadline = time.monotonic() + GRACE
            tell = time.monotonic() + (0.0 if (codes[failed] or 0) < 0 else AGREED)
        if time.monotonic() > tell:
            store.set(VERDICT, f"rank {failed} ended with {why}")
            tell = float("inf")
        if all(code is not None for code in codes) or time.monotonic() > deadline:
            return 0 if failed is None else _exit_code(codes[failed])
        time.sleep(0.05)


def _loopback() -> str:
    """All ranks are on this machine, whose own name may not resolve."""
    return next((name for _, name in socket.if_nameindex() if name in ("lo", "lo0")), "")


def _how(code: int | None) -> str:
    return f"signal {signal.Signals(-code).name}" if code is not None and code < 0 else f"exit code {code}"


def _exit_code(code: int | None) -> int:
    assert code is not None
    return code if code > 0 else 128 - code


def _wait(*_: object) -> None:
    """Ctrl-C: the ranks end by themselves, after saving."""
