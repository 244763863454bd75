"""multifd: QEMU's parallel migration channels in Python, with compressors as plugins.

The jobs are functions: `multifd.migrate.send`, `multifd.migrate.receive`,
`multifd.inspect.inspect` and `multifd.plugins.rows`.  This module stays empty but for the
version, so that `multifd --version` costs nothing.
"""

__version__ = "0.1.0"
