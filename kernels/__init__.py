"""Three fused operators in Triton (and CuTe DSL on Hopper), one folder each; the fp32 reference is the specification.

May import: nothing of ours.
"""
