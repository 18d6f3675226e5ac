"""From histories to slates: strategies and their fallback order, retrieval, reranking, exclusion.

May import: errors, types, records, items, features, counters, artifact, backends, kernels, tensors.
"""
