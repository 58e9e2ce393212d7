"""The benchmark: the same work by a plain hook loop, by Vesalius and by other libraries (see bench/README.md)."""
