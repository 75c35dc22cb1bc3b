"""One file per fused kernel: the reference, the Triton kernel, the dispatch."""
