"""The names of all keys of a deployment: several may share one Redis, each under a prefix of its own.

A user's keys have one hash tag, `{u:<user>}`, and so one slot of a cluster. A prefix has no braces: they would be the
tag of every key, and put all of them on one node.
"""

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Keys:
    """The keys under one prefix."""

    prefix: str = ""

    @property
    def owner(self) -> str:
        """Which deployment the keys belong to."""
        return f"{self.prefix}owner"

    @property
    def popular(self) -> str:
        """The slate of users without one of their own."""
        return f"{self.prefix}rec:popular"

    def ring(self, user_id: str) -> str:
        return f"{self.prefix}seq:{{u:{user_id}}}"

    def unreadable(self, user_id: str) -> str:
        """Return where a value goes that was found under a ring's name and is none."""
        return f"{self.prefix}seq:unreadable:{{u:{user_id}}}"

    def slate(self, user_id: str) -> str:
        return f"{self.prefix}rec:{{u:{user_id}}}"

    def counts(self, item_id: str) -> str:
        """An item's row of the shared counters."""
        return f"{self.prefix}cnt:{{i:{item_id}}}"

    def index(self, shard: int) -> str:
        """A set of the items that have such a row."""
        return f"{self.prefix}cnt:index:{shard}"

    def topic(self, topic_generation: str, topic: str) -> str:
        """The id of the topic that the rings belong to."""
        return f"{self.prefix}topic:{{{topic_generation}:{topic}}}"
