"""What carries pages: identifies connections, reads and writes packets, sends and receives channels."""
