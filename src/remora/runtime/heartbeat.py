"""Signs of life between the processes of a run: one that hangs or is gone ends them all."""

from __future__ import annotations

import datetime
import os
import sys
import threading
from typing import Any, NoReturn

from remora.errors import PeerLostError

BEAT_SECONDS = 1.0
LOST_BEATS = 12
"""A process is lost if it sends no heartbeat while another sends this many.

They are counted, not timed: processes that were all suspended, with the machine or by Ctrl-Z, are
not lost.
"""


class Heartbeat(threading.Thread):
    """Sends heartbeats, and ends this process once another sends none."""

    def __init__(self, store: Any, rank: int, size: int) -> None:
        super().__init__(daemon=True)
        self._store, self._rank, self._size = store, rank, size
        self._stopped = threading.Event()
        self._num_answers = 0
        store.set_timeout(datetime.timedelta(seconds=BEAT_SECONDS * LOST_BEATS))
        store.set(f"beat/{rank}", "0")

    def run(self) -> None:
        """Send heartbeats and watch for those of the others, until stopped."""
        names = [f"beat/{rank}" for rank in range(self._size)]
        seen, changed = [b""] * self._size, [0] * self._size
        count = 0
        while not self._stopped.wait(BEAT_SECONDS):
            count += 1
            try:
                self._store.set(names[self._rank], str(count))
                beats = self._store.multi_get(names)
            except RuntimeError:  # the process that keeps the store is gone
                self._end(0)
                return
            self._num_answers = count
            for rank, beat in enumerate(beats):
                if beat != seen[rank]:
                    seen[rank], changed[rank] = beat, count
                elif count - changed[rank] > LOST_BEATS:
                    self._end(rank)
                    return

    def start(self) -> None:
        """Begin, and watch that the store answers: no timeout ends a call if its process hangs."""
        threading.Thread(target=self._watch, daemon=True).start()
        super().start()

    def _watch(self) -> None:
        answered, silent = 0, 0
        while not self._stopped.wait(BEAT_SECONDS):
            silent = 0 if self._num_answers != answered else silent + 1
            answered = self._num_answers
            if silent > LOST_BEATS:
                self._end(0)

    def stop(self) -> None:
        """Send no more heartbeats, and expect none; return when this thread has ended.

        A thread in the store's C++ code must not see Python shut down: it would be ended there, by
        an exception that C++ does not let pass, and abort the process. The store answers late
        where its process gets no time, and not at all where it hangs; then this process ends.
        """
        self._stopped.set()
        if self.is_alive():
            self.join(BEAT_SECONDS * LOST_BEATS)
            if self.is_alive():
                self._leave(0)

    def _end(self, lost: int) -> None:
        if not self._stopped.wait(2 * BEAT_SECONDS):  # else the run has ended, here too
            self._leave(lost)

    def _leave(self, lost: int) -> NoReturn:
        if self._rank == (0 if lost else 1):
            what = f"process {lost} of {self._size} is gone or hangs"
            print(f"error: {what}; run the same command again to resume", file=sys.stderr)  # noqa: T201
        os._exit(PeerLostError.exit_code)
