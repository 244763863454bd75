"""How hard to compress: which compressor and level, chosen once or while it runs."""
