"""Use the pipeline as a library, without Kafka and Redis.

usage: python docs/examples/recommend.py ARTIFACT
"""

import sys

from pipeline.records import Event
from pipeline.serving.pipeline import Pipeline


def main(artifact: str) -> None:
    pipeline = Pipeline.load(artifact)
    history = [
        Event("user-1", "item-3", "view", 1_700_000_000_000),
        Event("user-1", "item-7", "purchase", 1_700_000_060_000, value=19.9),
    ]
    nobody: list[Event] = []  # a user without events gets what is popular
    for slate in pipeline.recommend([history, nobody], k=5):
        print(slate.strategy, [(item.item_id, round(item.score, 2)) for item in slate.items])


if __name__ == "__main__":
    main(sys.argv[1])
