"""Ways to rank a batch: the model's, the counters', one's own; their fallback order, retrieval, reranking, exclusion.

May import: errors, jagged, types, slates, tensors, records, items, features, counters, artifact, backends, kernels.
"""
