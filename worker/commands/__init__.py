"""One module a command: `configure(parser)` declares its arguments, `run(args)` does it and returns the exit status.

Heavy imports (torch, aiokafka, redis) belong inside `run`, so that --help answers at once.
"""
