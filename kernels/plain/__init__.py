"""The fused operations in plain PyTorch: what each of them means. `kernels.api` documents their arguments."""
