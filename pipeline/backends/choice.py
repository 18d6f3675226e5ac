"""Choose the backend that encodes a model in this process."""

import torch

from pipeline.backends.encoder import Encoder, GraphOptions, ItemVectors
from pipeline.backends.torch import TorchEncoder
from pipeline.model.hstu import Hstu, supports_kernels


def make_encoder(hstu: Hstu, table: ItemVectors, graphs: GraphOptions | None) -> Encoder:
    """Return the kernels' encoder where graphs are wanted, on a GPU, and it supports the model; else torch's."""
    if graphs is None or not table.vectors.is_cuda or not supports_kernels(hstu.config):
        return TorchEncoder(hstu, table)
    from pipeline.backends.fused import FusedEncoder  # Triton, which a CPU does not need

    dtype = torch.bfloat16 if torch.cuda.is_bf16_supported(including_emulation=False) else torch.float16
    return FusedEncoder(hstu, table, dtype, graphs)
