"""A strategy of one's own whose first batch after the file HANG appears never ends."""

import os
import threading
from pathlib import Path

from docs.examples.own_strategy import Trending
from pipeline.strategies.strategy import Request


class Hanging(Trending):
    name = "hanging"

    def prepare(self, request: Request) -> Request:
        if Path(os.environ["HANG"]).exists():
            threading.Event().wait()
        return request
