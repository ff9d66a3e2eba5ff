"""A cluster in a box: ranks as child processes with processor shares, memory caps and links that the kernel enforces."""
