"""Token eviction while decoding, to compare windowed heads with: the same accounting of bytes, the same tasks and samples."""
