"""Pages of guest memory: runs of them, zero ones, those that have come."""
