"""From sequences to slates: everything that knows the model, nothing that knows Kafka or Redis.

May import: kernels.
"""
