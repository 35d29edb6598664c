"""Says which rank hangs, and ends a job whose ranks no longer go on together.

Each rank's thread writes a heartbeat and what its main thread is doing into the job's store, and reads the others'.
When a rank ended with an error, sent no heartbeat for `dead` seconds, or none got on for `stall` seconds, every rank
prints the same verdict and its stacks, and exits: waiting in a collective, its main thread could not.
"""

import faulthandler
import json
import os
import sys
import threading
import time
from typing import Any

EXIT = 70  # of a rank that the watchdog ended
INTERVAL = 0.5  # seconds between heartbeats
AGREED = 2.0  # seconds for an error that all ranks raise to end them all by itself
VERDICT = "zoo/verdict"


class Watchdog:
    """Starts at once. `store` is torch's key-value store, of this thread alone."""

    def __init__(
        self, store: Any, rank: int, world: int, *, dead: float, stall: float, session: int = 0, end: Any = None
    ):
        self.keys = [f"zoo/beat/{session}/{rank}" for rank in range(world)]
        self.store, self.rank, self.world, self.dead, self.stall = store, rank, world, dead, stall
        self.end = end or _end_process
        self.marks, self.doing, self.since = 0, "starting", time.monotonic()
        self.ended = ""
        self.heard: dict[int, tuple[str, float]] = {}  # rank -> its last heartbeat, and when it was new
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._watch, name="zoo-watchdog", daemon=True)
        self._thread.start()

    def mark(self, doing: str) -> None:
        self.marks, self.doing, self.since = self.marks + 1, doing, time.monotonic()

    def lost(self, error: str) -> None:
        """Another rank went away in mid-exchange: wait until it is known which; returns if that stays unknown."""
        self.mark(f"{self.doing}, where it lost the others ({error.splitlines()[0]})")
        self._thread.join(timeout=self.dead + 10 * INTERVAL)

    def close(self, error: BaseException | None = None) -> None:
        """The run is over here; with an error, the others are told."""
        self._stop.set()
        self._thread.join(timeout=5)
        self.ended = "done" if error is None else f"{type(error).__name__}: {error}"
        try:
            self._beat(0)
        except Exception:  # the store went with the rank that hosted it
            return

    # -- the thread ----------------------------------------------------------------------------------------------------

    def _watch(self) -> None:
        beats = 0
        while not self._stop.wait(INTERVAL):
            try:
                beats += 1
                self._beat(beats)
                verdict = self._verdict()
                if verdict:
                    self.store.set(VERDICT, verdict)
            except Exception as error:  # a store that does not answer
                verdict = f"the job's store is gone, and the rank or launcher that hosted it with it ({error})"
            if verdict and not self._stop.is_set():
                self.end(f"rank {self.rank}: {verdict}. This rank was at: {self.doing}")
                return

    def _beat(self, beats: int) -> None:
        told = {"beat": beats, "marks": self.marks, "doing": self.doing, "for": time.monotonic() - self.since}
        self.store.set(self.keys[self.rank], json.dumps({**told, "ended": self.ended}))

    def _verdict(self) -> str:
        """Why the job has to end, or nothing."""
        if self.store.check([VERDICT]):
            return self.store.get(VERDICT).decode()
        now, told = time.monotonic(), {}
        for rank, key in enumerate(self.keys):
            beat = self.store.get(key).decode() if self.store.check([key]) else ""
            if beat != self.heard.get(rank, (None, 0.0))[0]:
                self.heard[rank] = (beat, now)
            if not beat:
                continue
            told[rank] = json.loads(beat)
            silent = now - self.heard[rank][1]
            if told[rank]["ended"] not in ("", "done") and silent > AGREED:
                return f"rank {rank} ended with {told[rank]['ended']} (at: {told[rank]['doing']})"
            if silent > self.dead and not told[rank]["ended"]:
                return f"rank {rank} is dead: no heartbeat for {silent:.0f} s (last at: {told[rank]['doing']})"
        running = {rank: beat for rank, beat in told.items() if not beat["ended"]}
        if len(told) < self.world or not running or min(beat["for"] for beat in running.values()) < self.stall:
            return ""
        behind = min(running, key=lambda rank: running[rank]["marks"])
        places = "; ".join(
            f"rank {rank} at {beat['doing']!r} for {beat['for']:.0f} s" for rank, beat in running.items()
        )
        return f"no progress for {self.stall:.0f} s; rank {behind} hangs, it is the furthest behind: {places}"


def _end_process(message: str) -> None:
    sys.stderr.write(f"\n{message}\nThe job ends; go on with --resume. Stacks of this rank:\n")
    sys.stderr.flush()
    faulthandler.dump_traceback(file=sys.__stderr__ or sys.stderr, all_threads=True)
    os._exit(EXIT)
