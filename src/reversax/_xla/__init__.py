"""What the package asks of the compilers below it, and their private names."""
