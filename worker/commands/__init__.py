"""One module per sub-command: `configure(parser)` declares its arguments, `run(args)` returns the exit status.

Heavy imports (torch, aiokafka, redis) belong inside `run`, so that --help answers at once.

May import: errors, clock, system, config, config_file, logging, stream, kafka, redis, inference, fleet, lookup,
operations, process, replay, output, pipeline.
"""
