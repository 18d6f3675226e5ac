"""The items topic, and the local journal that makes a restart fast.

May import: errors, interfaces, metrics, executor, rate_limit, config, deadline, logging, stream, kafka, inference,
pipeline.
"""
