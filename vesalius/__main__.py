"""`python -m vesalius` is the same as `vesalius`."""

from vesalius.cli import main

main()
