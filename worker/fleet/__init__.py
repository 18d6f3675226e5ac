"""Several worker processes on one machine under one supervisor, with one endpoint for all.

May import: backoff, clock, config, errors, interfaces, kafka, logging, stream.
"""
