"""Ends the process where the event loop cannot: from a plain thread, when a thread, a task or the way out hangs."""

import faulthandler
import os
import sys
import threading
import time

from worker.config import HealthConfig
from worker.deadline import Deadline
from worker.errors import Stalled
from worker.stream.health import LOOP_BLOCKED_S, HealthState

CHECK_S = 0.1
PAUSE_S = 5.0  # a sleep of CHECK_S that takes so long: the process was suspended, and its event loop with it
GRACE_S = 0.5  # after the deadline: the steps of the way out give up at it, and then need a moment to say so
INTERPRETER_EXIT_S = 0.5  # for threads that still run when the main thread has ended; Python would wait for them


class ExitGuard:
    """Watches one process. For `millrace run` alone: it lives as long as the process.

    exit_code: status of a process that it ends; set it once the true one is known
    """

    # NOTE: a native call that holds the interpreter's lock for ever stops this thread, too. The probes then do not
    # answer either: that is left to whoever probes /livez.

    def __init__(self, config: HealthConfig, health: HealthState, deadline: Deadline) -> None:
        self.exit_code = Stalled.exit_code
        self._config = config
        self._health = health
        self._deadline = deadline
        self._resumed_s = 0.0  # when the process went on after it had been suspended as a whole

    def start(self) -> None:
        threading.Thread(target=self._watch, name="exit guard", daemon=True).start()

    def _watch(self) -> None:
        while (reason := self._reason()) is None:
            before_s = self._health.clock.monotonic()
            time.sleep(CHECK_S)
            if self._health.clock.monotonic() - before_s > PAUSE_S:
                self._resumed_s = self._health.clock.monotonic()
        print(f"millrace run: {reason}; exit {self.exit_code}; stacks of all threads:", file=sys.stderr, flush=True)
        faulthandler.dump_traceback(file=sys.stderr)
        os._exit(self.exit_code)

    def _reason(self) -> str | None:
        """Return why the process must be ended now."""
        now_s = self._health.clock.monotonic()
        if now_s > self._deadline.at_s + GRACE_S:
            return f"the way out did not end within health.drain_timeout_s = {self._config.drain_timeout_s:g} s"
        late_s = now_s - max(self._health.heartbeat_s, self._resumed_s)
        if late_s > max(self._config.stall_timeout_s, LOOP_BLOCKED_S) and self._deadline.left_s() > 0:
            return f"the event loop has not run for {late_s:.0f} s"
        if not threading.main_thread().is_alive():
            time.sleep(INTERPRETER_EXIT_S)
            return "threads still run after the end"
        return None
