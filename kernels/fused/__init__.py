"""The same operations as Triton kernels. Imported only where they were chosen: Triton may be absent."""
