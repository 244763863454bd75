"""Send a real memory image between two processes with each compressor, and compare.

make demo
"""

from __future__ import annotations

import argparse
import shutil
import sys
import tempfile
from pathlib import Path

from measure import make_image, same, transfer

COMPRESSORS = ("none", "zlib", "zstd", "qatzip-sw")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--mib", type=int, default=256, help="size of the image in MiB (256)")
    parser.add_argument("--directory", type=Path, help="where to work (a temporary directory)")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="multifd-demo-", dir=arguments.directory) as directory:
        image = Path(directory, "guest.raw")
        make_image(image, arguments.mib)
        print(f"{'compressor':<12}{'seconds':>9}{'MB/s':>9}{'ratio':>8}{'CPU send':>10}{'CPU recv':>10}  arrived")
        for compressor in COMPRESSORS:
            snapshot = Path(directory, "snapshot")
            source, destination = transfer(image, snapshot, compressor)
            result = source.result
            identical = same(image, snapshot)
            shutil.rmtree(snapshot)
            print(
                f"{compressor:<12}{result['seconds']:>9.2f}{result['memory_bytes'] / result['seconds'] / 1e6:>9.0f}"
                f"{result['memory_bytes'] / result['wire_bytes']:>8.2f}{source.cpu_seconds:>10.2f}"
                f"{destination.cpu_seconds:>10.2f}  {'identical' if identical else 'DIFFERENT'}"
            )
            if not identical:
                sys.exit(1)
        pages = result["normal_pages"] + result["zero_pages"]
        print(
            f"{pages} pages ({result['zero_pages']} zero) of {result['memory_bytes'] >> 20} MiB sent "
            f"{len(COMPRESSORS)} times over {result['channels']} channels; every byte arrived"
        )


if __name__ == "__main__":
    main()
