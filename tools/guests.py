"""Make the memory of three real Linux guests: what compressors are measured on.

    python tools/guests.py DIR [NAME...]

Writes DIR/NAME.raw, 1 GiB each: the RAM of a Debian 13 in QEMU 10.0, paused while its programs still run.
`files`: packages' files in a tmpfs and in the page cache, archives of them.
`python`: Python programs that hold syntax trees, an index of words, JSON, a table in SQLite.
`database`: PostgreSQL with rows, an index and eight clients, a compiler beside it.

The packages are the machine's own mirror's; nothing is installed and no rights are needed.  A guest takes some
minutes: its processor is emulated.
"""

from __future__ import annotations

import argparse
import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

sys.path.append(str(Path(__file__).parents[1] / "tests" / "support"))

from apt import Apt
from guest import files as guest_files
from qemus import Qemu

MIB = 1024
#: Seconds until a guest has to be ready.
PATIENCE = 1200
PACKAGES = (
    "base-files",
    "busybox-static",
    "coreutils",
    "dash",
    "gcc",
    "libc6-dev",
    "libstb-dev",
    "postgresql-17",
    "python3",
)

#: The kernel hands `work=NAME` of its command line to init as a variable.
INIT = """#!/usr/bin/busybox sh
export PATH=/usr/sbin:/usr/bin HOME=/root LC_ALL=C.UTF-8
busybox mount -t proc none /proc
busybox --install -s /usr/bin 2>/dev/null
mount -t sysfs none /sys
mount -t devtmpfs none /dev
mkdir /dev/shm
mount -t tmpfs none /dev/shm
mount -t tmpfs -o size=90% none /tmp
chmod 1777 /tmp /dev/shm
exec </dev/console >/dev/console 2>&1
set -e
. /work/$work
echo ready
while :; do sleep 1; done
"""

FILES = """
cp -r /usr/share/doc /usr/share/perl /usr/share/i18n /usr/include /usr/lib/python3.13 /tmp
tar -c /usr/share/locale | gzip -1 >/tmp/locale.tar.gz
tar -cf /tmp/postgresql.tar /usr/share/postgresql /usr/lib/postgresql
echo 1 >/proc/sys/vm/drop_caches
sort -r /usr/share/i18n/locales/* >/tmp/sorted
cat /usr/libexec/gcc/*/*/cc1 /usr/lib/*/lib*.so.* /usr/bin/python3* >/dev/null
grep -rs license /usr/share | wc -l
"""

PYTHON = """
python3 /work/trees.py &
python3 /work/words.py &
python3 /work/rows.py &
while [ "$(ls /tmp/*.done 2>/dev/null | wc -l)" -lt 3 ]; do sleep 1; done
"""

#: Programs that fill memory, and keep it: name -> what they do after the head.
HEAD = """
import ast, hashlib, json, os, pathlib, re, signal, sqlite3, sys
name = sys.argv[0].rpartition("/")[2]
def texts(*folders):
    for folder in folders:
        for path in sorted(pathlib.Path(folder).rglob("*")):
            if path.is_file() and path.suffix in (".py", ".h", ".pm", ".pod", ".txt", ".sql", ".pl"):
                yield str(path), path.read_text(errors="replace")
def done():
    open(f"/tmp/{name}.done", "w").close()
    signal.pause()
"""
PROGRAMS = {
    "trees.py": """
trees = {}
for path, text in texts("/usr/lib/python3.13"):
    if path.endswith(".py"):
        trees[path] = ast.parse(text)
        if len(trees) == 100:
            break
done()
""",
    "words.py": """
index, documents = {}, []
for path, text in texts("/usr/include", "/usr/lib/python3.13/email", "/usr/lib/python3.13/asyncio"):
    documents.append(json.dumps({"path": path, "size": len(text), "lines": text.splitlines()[:200]}))
    for number, line in enumerate(text.splitlines()):
        for word in re.findall("[A-Za-z_]+", line):
            index.setdefault(word, []).append((path, number))
    if len(documents) == 900:
        break
loaded = [json.loads(document) for document in documents]
done()
""",
    "rows.py": """
table = sqlite3.connect(":memory:")
table.execute("create table line (id integer primary key, path text, number int, digest text, text text)")
for path, text in texts("/usr/share/perl", "/usr/lib/x86_64-linux-gnu/perl", "/usr/lib/x86_64-linux-gnu/perl-base"):
    rows = ((path, number, hashlib.md5(line.encode()).hexdigest(), line)
            for number, line in enumerate(text.splitlines()))
    table.executemany("insert into line (path, number, digest, text) values (?, ?, ?, ?)", rows)
table.execute("create index digests on line (digest)")
done()
""",
    "lines.py": """
for path, text in texts("/usr/include", "/usr/share/postgresql"):
    for number, line in enumerate(text.splitlines()):
        line = line.replace("\\\\", "/").replace("\\t", " ")
        print(path, number, hashlib.md5(line.encode()).hexdigest(), line, sep="\\t")
""",
}

DATABASE = """
mkdir /pg
chown postgres /pg
cat >/work/serve <<'END'
set -e
export PATH=/usr/lib/postgresql/17/bin:$PATH PGHOST=/tmp PGDATA=/pg/data
initdb -A trust >/tmp/initdb.log
pg_ctl -w -l /tmp/server.log -o '-h "" -k /tmp -c shared_buffers=256MB -c max_wal_size=256MB -c fsync=off' start
psql -q -c 'create table line (id serial primary key, path text, number int, digest text, text text)' postgres
python3 /work/lines.py | psql -q -c '\\copy line (path, number, digest, text) from stdin' postgres
psql -q -c 'create index on line (digest)' -c 'analyze line' postgres
pgbench -q -i -s 5 postgres 2>/dev/null
pgbench -c 8 -T 20 postgres | grep tps
(pgbench -c 8 -T 3600 postgres >/tmp/pgbench.log) &
END
compile() {
    for part in image image_write truetype ds sprintf image_resize2 dxt perlin; do
        upper=$(echo $part | tr a-z A-Z)
        gcc -O2 -g -x c -DSTB_${upper}_IMPLEMENTATION -c /usr/include/stb/stb_$part.h -o /tmp/$part.$1.o
    done
}
su postgres -c 'sh /work/serve'
(while :; do compile 1; done) &
(while :; do compile 2; done) &
sleep 30
"""

WORKS = {"files": FILES, "python": PYTHON, "database": DATABASE}


def make_disk(folder: Path) -> Path:
    """An ext4 disk with Debian 13's userland, the programs and an init."""
    mke2fs = shutil.which("mke2fs", path=os.environ.get("PATH", "") + ":/usr/sbin:/sbin")
    if mke2fs is None:
        sys.exit("guests.py: mke2fs is missing: install the package e2fsprogs")
    disk, root = folder / "disk", folder / "root"
    apt = Apt(folder / "apt", "trixie")
    apt.unpack_with_all_it_needs(root, *PACKAGES)
    apt.close()
    (root / "work").mkdir()
    for name, text in (WORKS | {name: HEAD + program for name, program in PROGRAMS.items()}).items():
        (root / "work" / name).write_text(text)
    (root / "init").write_text(INIT)
    (root / "init").chmod(0o755)
    (root / "etc/passwd").write_text("root::0:0::/root:/bin/sh\npostgres::100:100::/tmp:/bin/sh\n")
    (root / "etc/group").write_text("root::0:\npostgres::100:\n")
    subprocess.run(
        [mke2fs, "-q", "-t", "ext4", "-E", "root_owner=0:0", "-d", root, disk, "3G"], check=True, stdout=sys.stderr
    )
    return disk


def run(folder: Path, disk: Path, name: str) -> Path:
    """Run a guest until it says that it is ready; the file of its RAM."""
    serial = folder / f"{name}.serial"
    # idle=poll: an emulated processor that halts may miss the interrupt that would wake it (seen with QEMU 10.0).
    append = f"console=ttyS0 quiet panic=-1 mitigations=off idle=poll root=/dev/nvme0n1 rw init=/init work={name}"
    more = [
        *("-kernel", str(guest_files() / "vmlinuz"), "-append", append, "-serial", f"file:{serial}"),
        *("-drive", f"file={disk},if=none,id=disk,format=raw,snapshot=on", "-device", "nvme,serial=1,drive=disk"),
    ]
    deadline = time.monotonic() + PATIENCE
    qemu = Qemu("10.0", folder, name, mib=MIB, more=more)
    try:
        qemu.monitor.command("cont")
        while not re.search(r"^ready\r?$", text := serial.read_text(errors="replace"), re.MULTILINE):
            failed = any(word in text for word in ("panic", "Traceback", "Out of memory"))
            if failed or qemu.process.poll() is not None or time.monotonic() > deadline:
                sys.exit(f"{text[-2000:]}\nguests.py: the guest {name} is not ready {qemu.log.read_text()}")
            time.sleep(0.5)
        qemu.monitor.command("stop")
    finally:
        qemu.close()
    return qemu.ram


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("directory", type=Path, metavar="DIR")
    parser.add_argument("names", nargs="*", choices=tuple(WORKS), metavar="NAME", help=f"of {', '.join(WORKS)} (all)")
    arguments = parser.parse_args()
    directory = arguments.directory.absolute()
    directory.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=directory) as folder:
        disk = make_disk(Path(folder))
        for name in arguments.names or WORKS:
            started = time.monotonic()
            image = run(Path(folder), disk, name).replace(directory / f"{name}.raw")
            print(f"{image}: ready after {time.monotonic() - started:.0f} s", flush=True)


if __name__ == "__main__":
    main()
