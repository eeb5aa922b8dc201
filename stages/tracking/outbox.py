"""What a run sends to MLflow, and what happens while MLflow cannot take it: the setting `runtime.tracking`.

required     the stage stops, with an error that says how to go on
best_effort  the stage goes on; what was not taken is sent again later, in order, and what is left at the end is named
off          nothing is sent, and MLflow is not even imported
"""

import sys
import time
from collections import deque
from collections.abc import Callable
from typing import NamedTuple

from retro_model.core.printable import one_line
from stages.tracking.store import explain_store_errors, first_reason, is_unreachable, store_name

# After a failed attempt, wait this long before the next one, or ten times as long as the attempt took.
LEAST_WAIT_SECONDS = 10.0
SHARE_OF_WAITING = 10.0


class _Message(NamedTuple):
    what: str  # the kind, as "metrics"
    since: str  # from where on, as " from step 20 on", if it is the first of its kind that is lost
    write: Callable[[], object]


class Outbox:
    """Sends to MLflow in order, as `tracking` says. Call `close` at the end."""

    def __init__(self, tracking: str) -> None:
        self.tracking = tracking
        self._waiting: deque[_Message] = deque()
        self._next_try = 0.0
        self._away = self._unreachable = False

    def send(self, what: str, write: Callable[[], object], since: str = "") -> None:
        """Call `write`, now or later. Raises RetroError if it fails and tracking is required."""
        if self.tracking == "required":
            with explain_store_errors():
                write()
        elif self.tracking == "best_effort":
            self._waiting.append(_Message(what, since, write))
            if time.monotonic() >= self._next_try:
                self._send_waiting()

    def close(self) -> None:
        """Try once more to send each message that waits, and name those that are lost."""
        was_away, lost = self._away, dict[str, str]()
        while self._waiting and not self._send_waiting():
            if self._unreachable:  # so would be all others
                break
            message = self._waiting.popleft()  # refused: the next one may be taken
            lost.setdefault(message.what, message.what + message.since)
        for message in self._waiting:
            lost.setdefault(message.what, message.what + message.since)
        if lost:
            self._say(f"not recorded: {', '.join(lost.values())}")
        elif was_away:
            self._say("can be reached again, and all is recorded")

    def _send_waiting(self) -> bool:
        """Send what waits, in order, up to the first failure; whether all was sent."""
        while self._waiting:
            started = time.monotonic()
            try:
                self._waiting[0].write()
            except Exception as error:  # noqa: BLE001 (a store for artifacts has its own client library and errors)
                now = time.monotonic()
                self._next_try = now + max(LEAST_WAIT_SECONDS, SHARE_OF_WAITING * (now - started))
                if not self._away:
                    self._say(f"{first_reason(error)}; the stage goes on, and sends what it has to record later")
                self._away, self._unreachable = True, is_unreachable(error)
                return False
            self._waiting.popleft()
        self._away = False
        return True

    @staticmethod
    def _say(text: str) -> None:
        print(one_line(f"mlflow: {store_name()}: {text}"), file=sys.stderr, flush=True)
